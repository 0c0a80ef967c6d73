"""What the CPU's operators share: which tensors the compiled kernels take, and fresh ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from octavo.engine.kernels.launch import refuse
from octavo.engine.tensor import FLOAT32, Tensor, empty
from octavo.kernels import threads

__all__ = ["FLOAT32", "contiguous", "fast", "from_array", "lanes_for", "like"]

_SERIAL = 1 << 15
"""Numbers from which on another thread is worth waking."""


def lanes_for(size: int) -> int:
    return threads.count() if size >= _SERIAL else 1


def fast(*tensors: Tensor) -> bool:
    """Whether the compiled kernels take these: contiguous float32."""
    for one in tensors:  # noqa: SIM110 (a generator would cost more than the rest of a small operator's checks)
        if (one.dtype is not FLOAT32 and one.dtype != FLOAT32) or not one.is_contiguous:
            return False
    return True


def like(x: Tensor) -> Tensor:
    return empty(x.shape, x.dtype)


def contiguous(x: Tensor) -> Tensor:
    """x itself where its elements lie in order, else a copy."""
    if x.is_contiguous:
        return x
    refuse("a tensor's elements are put in order")
    out = empty(x.shape, x.dtype)
    np.copyto(out.array, x.array)
    return out


def from_array(array: Any) -> Tensor:
    """A NumPy result, copied into the engine's memory."""
    out = empty(np.shape(array), np.asarray(array).dtype)
    np.copyto(out.array, array)
    return out
