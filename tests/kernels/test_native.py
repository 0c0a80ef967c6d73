"""When kernels are compiled, and what whoever waits for it is told: in processes of their own, whose caches are empty."""

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

CAST = "import numpy, octavo; octavo.quantize(numpy.ones(3, numpy.float32), octavo.formats.E4M3FN)"


def on_a_terminal(cache: Path) -> str:
    """What CAST writes to a terminal's standard error, with that cache."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    subprocess.run([sys.executable, "-c", CAST], env=environment, stderr=theirs, check=True)
    said = b""
    with contextlib.suppress(BlockingIOError):  # nothing was written
        said = os.read(ours, 1000)
    os.close(ours)
    os.close(theirs)
    return said.decode()


def test_imports_compile_nothing(tmp_path: Path) -> None:
    script = "import octavo.torch, octavo.engine, octavo.kernels.convolution"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_terminal_is_told_once(tmp_path: Path) -> None:
    said = on_a_terminal(tmp_path)
    assert said.splitlines() == ["octavo: compiling for this processor, which is done once and takes up to a minute"]


def test_a_pipe_is_not_told_and_what_is_on_disk_is_not_announced(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    piped = subprocess.run([sys.executable, "-c", CAST], env=environment, capture_output=True, check=True)
    assert piped.stderr == b""
    assert on_a_terminal(tmp_path) == ""
