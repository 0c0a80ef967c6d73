"""The CPU kernel of the random Hadamard transform."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from octavo.reference import SIGNS

__all__ = ["turn"]

_SIGNS = np.array(SIGNS, np.float32)


@njit(cache=True, nogil=True, error_model="numpy")
def turn(x: Any, out: Any) -> None:
    """out = `octavo.reference.hadamard(x)`; x: float32 [rows, columns]; out: float32, columns filled up to a multiple of 16, zeros."""
    a, b = np.empty(16, np.float32), np.empty(16, np.float32)
    rows, columns = x.shape
    for r in range(rows):
        for first in range(0, out.shape[1], 16):
            for i in range(16):
                a[i] = x[r, first + i] * _SIGNS[i] if first + i < columns else np.float32(0) * _SIGNS[i]
            for apart in (1, 2, 4, 8):
                for pair in range(0, 16, 2 * apart):
                    for i in range(apart):
                        one, other = a[pair + i], a[pair + apart + i]
                        b[pair + i] = one + other
                        b[pair + apart + i] = one - other
                a[:] = b
            for i in range(16):
                value = np.float32(a[i] * np.float32(0.25))
                u = np.uint32(np.float32(value).view(np.int32))
                rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
                out[r, first + i] = value if np.isnan(value) else np.uint32(rounded).view(np.float32)
