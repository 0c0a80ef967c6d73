"""Where the GPU tests run, and how their results are held against `octavo.reference`.

Without a CUDA device nothing here can run, but under `TRITON_INTERPRET=1` the kernels do, on the CPU: tests/kernels/test_cuda.py sees to
that.
"""

from __future__ import annotations

import os
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from octavo.formats import Format

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
COUNT = 1 << (11 if INTERPRETED else 20)
"""Random inputs to a test: the interpreter is slow."""
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MARKS = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # the interpreter computes in NumPy


def on_device(x: npt.NDArray[Any]) -> torch.Tensor:
    """The tensor of the same bits."""
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(DEVICE)
    return torch.from_numpy(x).to(DEVICE)


def on_host(x: torch.Tensor) -> npt.NDArray[Any]:
    """The array of the same bits."""
    if x.dtype is torch.bfloat16:
        return x.cpu().view(torch.int16).numpy().view(BFLOAT16)
    return x.cpu().numpy()


def assert_same(got: torch.Tensor, expected: Any, what: str = "") -> None:
    """Equal in dtype, shape and bits, NaNs being one; names the first elements that are not."""
    ours, theirs = on_host(got), np.asarray(expected)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), what
    bits = np.dtype(f"u{ours.dtype.itemsize}")
    same = np.ascontiguousarray(ours).view(bits) == np.ascontiguousarray(theirs).view(bits)
    if ours.dtype.kind not in "iu":
        same |= np.isnan(ours) & np.isnan(theirs)
    wrong = np.argwhere(~same)[:5]
    lines = [f"{what} at {tuple(i)}: {ours[tuple(i)]!r}, not {theirs[tuple(i)]!r}" for i in wrong]
    assert not lines, "\n".join(lines)


def inputs(format: Format, *, seed: int = 0, count: int = COUNT) -> npt.NDArray[np.float32]:
    """Every value of the format, the middles between them and the neighbours of both; specials; random bits and magnitudes."""
    generator = np.random.default_rng(seed)
    values = np.unique(format.values[np.isfinite(format.values)].astype(np.float64))
    values = values[:: max(1, values.size // 512)]  # some of them where the format is wide
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2, [1.5 * format.max, -1.5 * format.max]])
    with np.errstate(over="ignore", invalid="ignore"):
        points = points.astype(np.float32)
        points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
        exponents = generator.uniform(np.log2(format.smallest_subnormal) - 6, format.emax + 2, count // 2)
        spread = (2.0**exponents * generator.choice([-1.0, 1.0], count // 2)).astype(np.float32)
    bits = generator.integers(0, 1 << 32, count // 2, dtype=np.uint32).view(np.float32)
    specials = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1e-38, 3.4e38], np.float32)
    x = np.concatenate([specials, points, spread, bits])
    return x if format.has_nan else x[~np.isnan(x)]
