"""The engine on CUDA without a GPU: its tests under Triton's interpreter, its kernels compiled for Hopper, and what is missing named."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments: str, **variables: str) -> str:
    """Run Python in a process of its own: Triton reads its environment when it is imported, and others here import it too."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@needs_triton
def test_the_interpreted_kernels_have_the_cpus_bits() -> None:
    out = run(
        "-m", "pytest", "-x", "-p", "no:cacheprovider", str(TESTS / "gpu" / "test_gpu_engine.py"), TRITON_INTERPRET="1"
    )
    assert " passed" in out
    assert "skipped" not in out


@needs_triton
def test_the_kernels_compile_for_hopper_and_fuse_only_where_they_should(tmp_path: Path) -> None:
    script = TESTS / "engine" / "compile_engine_for_hopper.py"
    out = run(str(script), TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert out.splitlines()[-1] == "all kernels compile"


def test_the_engine_loads_no_framework_and_no_compiler_for_the_gpu() -> None:
    program = "import sys; from octavo import engine; engine.zeros((2,)).sum(); print(*sys.modules)"
    loaded = run("-c", program).split()
    assert "octavo.engine" in loaded
    assert not {"torch", "jax", "triton", "cupy"}.intersection(loaded)


@pytest.mark.parametrize("missing", ["cupy", "triton", "torch"])
def test_what_cuda_tensors_need_is_named(missing: str) -> None:
    if missing == "cupy" and not (importlib.util.find_spec("triton") and importlib.util.find_spec("torch")):
        pytest.skip("Triton or PyTorch is not installed, and looked for before CuPy")
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from octavo import engine\n"
        "for make in (lambda: engine.zeros((2,), device='cuda'), lambda: engine.zeros((2,)).to('cuda')):\n"
        "    try: make()\n"
        "    except ValueError as error: print(error)"
    )
    lines = run("-c", program, TRITON_INTERPRET="0").splitlines()
    assert len(lines) == 2
    assert all("cupy-cuda12x" in line for line in lines)
    assert all(("CuPy" if missing == "cupy" else missing) in line for line in lines)
