"""Triton's interpreter with the device's dot product, a chain of fused multiply-adds along K, where NumPy has an order of its own.

Numbers: float32.  A product is exact in float64, and its sum is rounded to odd there, so that float32 rounds the exact sum once
(Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["chained_dot", "fused", "fused_once"]

Floats = npt.NDArray[np.float32]


def fused(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c, rounded once."""
    with np.errstate(all="ignore"):
        product, added = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
        total = product + added
        other = total - product
        error = (product - (total - other)) + (added - other)
        to_odd = np.isfinite(total) & (error != 0) & ((total.view(np.int64) & 1) == 0)
        odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        return np.where(to_odd, odd, total).astype(np.float32)


def chained_dot(builder: Any, a: Any, b: Any, onto: Any, precision: Any, inexact: Any) -> Any:
    """In place of `create_dot` of the interpreter's builder."""
    from triton.runtime.interpreter import TensorHandle

    total = onto.data
    for k in range(a.data.shape[1]):
        total = fused(a.data[:, k, None], b.data[None, k], total)
    return TensorHandle(total, onto.dtype.scalar)


def fused_once(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """In place of `create_fma`, which some versions round twice; float32 alone."""
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(fused(a.data, b.data, c.data), c.dtype.scalar)
