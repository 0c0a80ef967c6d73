"""The GPU backend without a GPU: its tests under Triton's interpreter, and its kernels compiled for Hopper."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
INTERPRETED = ("test_gpu_casts.py", "test_gpu_emulate.py", "test_gpu_linear.py", "test_gpu_matrices.py")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments: str, **variables: str) -> str:
    """Run Python in a process of its own: Triton reads its environment when it is imported, and others here import it too."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", INTERPRETED)
def test_the_interpreted_kernels_equal_the_reference(name: str) -> None:
    out = run("-m", "pytest", "-x", "-p", "no:cacheprovider", str(TESTS / "gpu" / name), TRITON_INTERPRET="1")
    assert " passed" in out
    assert "skipped" not in out or name == "test_gpu_emulate.py"  # a whole model needs the device


def test_the_kernels_compile_for_hopper_and_neither_flush_nor_fuse_nor_approximate(tmp_path: Path) -> None:
    out = run(str(TESTS / "kernels" / "compile_for_hopper.py"), TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert out.splitlines()[-1] == "all kernels compile"


def test_octavo_loads_triton_for_gpu_tensors_alone() -> None:
    loaded = run("-c", "import sys, octavo, octavo.casts, octavo.kernels; print(*sys.modules)").split()
    assert "octavo" in loaded
    assert "triton" not in loaded


def test_a_cpu_tensor_is_told_where_to_go() -> None:
    program = (
        "import torch; from octavo.formats import E4M3FN; from octavo.kernels import cuda\n"
        "try: cuda.encode(torch.ones(2), E4M3FN)\n"
        "except ValueError as error: print(error)"
    )
    assert "these casts run on a CUDA device, and the tensor is on cpu; move it first" in run(
        "-c", program, TRITON_INTERPRET="0"
    )
