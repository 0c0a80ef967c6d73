"""Kernels without PyTorch, on Python's own threads, in real processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FORKED = """
import os, sys
import numpy as np
import octavo
from octavo.formats import E4M3FN

x = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
codes = octavo.encode(x, E4M3FN)
assert "torch" not in sys.modules
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(octavo.encode(x, E4M3FN), codes) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_casts_too() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED],
        env={**os.environ, "OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "0", "")
