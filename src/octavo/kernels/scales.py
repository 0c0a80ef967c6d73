"""Scales and histories on the memory itself, compiled: what `octavo.scaling` defines, for the CPU.

Small layers call these at each step, where an array library's dispatch would cost more than the work.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy as np
from numba import carray, njit

from octavo.kernels import memory
from octavo.kernels.native import native

__all__ = ["add_scaled", "current_scale", "gather_amax", "roll_history", "roll_history_at"]

_at: Any = memory.at
_fma: Any = memory.fma


@njit(cache=True, nogil=True, error_model="numpy")
def current_scale(amax: float, maximum: float, epsilon: float, power_of_two: bool) -> float:
    """`octavo.scaling.amax_scale` of one amax; all four are taken to float32 first."""
    peak = max(np.float32(amax), np.float32(epsilon)) if amax == amax else np.float32(np.nan)
    if not (peak > 0 and np.isfinite(peak)):
        return 1.0
    scale = min(np.float32(maximum) / peak, np.float32(3.4028234663852886e38))
    if power_of_two:
        exponent = np.float32(scale).view(np.int32) & np.int32(0x7F800000)
        scale = np.int32(exponent).view(np.float32)
    return np.float64(scale)


@njit(cache=True, nogil=True, error_model="numpy")
def _raise(row: Any, amaxes: Any) -> None:
    """Raise each of row to its amax where that is larger or NaN."""
    for t in range(len(row)):
        amax = np.float32(amaxes[t])
        if amax > row[t] or np.isnan(amax):
            row[t] = amax


@njit(cache=True, nogil=True, error_model="numpy")
def gather_amax(history: int, amaxes: Any) -> None:
    """Raise row 0 of the history at that address, float32 [steps, tensors], to `amaxes`, one a tensor, where they are larger or NaN."""
    _raise(carray(_at(history), (len(amaxes),), np.float32), amaxes)


@njit(cache=True, nogil=True, error_model="numpy")
def _peaks(history: Any, most_recent: bool) -> Any:
    """The bits of each tensor's largest amax, or of the newest: amaxes order as their bits do, NaN above Inf."""
    tensors = history.shape[1]
    flat, lanes = history.reshape(-1).view(np.int32), 16 * tensors  # whole rows, and whole vectors
    if most_recent:
        return flat[:tensors].copy()
    wide, whole = np.zeros(lanes, np.int32), flat.size - flat.size % lanes
    for start in range(0, whole, lanes):
        rows = flat[start : start + lanes]
        for j in range(lanes):
            wide[j] = np.int32(max(wide[j], rows[j]))
    for j in range(whole, flat.size):
        wide[j - whole] = max(wide[j - whole], flat[j])
    for j in range(tensors, lanes):
        wide[j % tensors] = max(wide[j % tensors], wide[j])
    return wide[:tensors]


@njit(cache=True, nogil=True, error_model="numpy")
def _shift(flat: Any, by: int) -> None:
    """flat[j] = flat[j + by], a piece at a time through other memory, which can be done in vectors."""
    piece = np.empty(256, np.float32)
    end = flat.size - by
    for start in range(0, end, 256):
        size = min(256, end - start)
        source, target = flat[start + by : start + by + size], flat[start : start + size]
        for j in range(size):
            piece[j] = source[j]
        for j in range(size):
            target[j] = piece[j]


@njit(cache=True, nogil=True, error_model="numpy")
def roll_history(history: Any, before: Any, scale: Any, maximum: Any, margin: float, most_recent: bool) -> None:
    """`octavo.scaling.roll_history` on the memory itself, for the algorithms that have a name.

    history: float32 [steps, tensors], rolled in place; before, scale: float32 [tensors], the scales so far and where the next ones
    go (may be the same); maximum: float32 [tensors]; margin: what maximum is multiplied with, 2**-margin of the recipe.
    """
    steps, tensors = history.shape
    peaks, rolls_all = _peaks(history, most_recent), True
    for t in range(tensors):
        scale[t] = before[t]
        if history[0, t] == 0:
            rolls_all = rolls_all and (not most_recent and peaks[t] == 0)  # nothing but zeros: as well rolled as not
            continue
        peak = peaks[t : t + 1].view(np.float32)[0]
        if peak > 0 and np.isfinite(peak):
            ratio = maximum[t] * np.float32(margin) / peak
            scale[t] = ratio if np.isfinite(ratio) else np.float32(3.4028234663852886e38)
    if rolls_all:
        _shift(history.reshape(-1)[tensors:], tensors)
    for t in range(tensors):
        last = history[0, t]
        if last == 0:
            if rolls_all and steps > 1:
                history[steps - 1, t] = last
            continue
        if not rolls_all:
            for i in range(1, steps - 1):
                history[i, t] = history[i + 1, t]
        history[0, t] = np.float32(0)
        if steps > 1:
            history[steps - 1, t] = last


@native(1)
def _roll_history(arguments: Any) -> None:
    p, floats = carray(_at(arguments), (7,), np.int64), carray(_at(arguments + 56), (4,), np.float64)
    tensors = (p[2],)
    rows = carray(_at(p[0]), (p[1], p[2]), np.float32)
    _raise(rows[0], floats[1:])
    before, scale = carray(_at(p[3]), tensors, np.float32), carray(_at(p[4]), tensors, np.float32)
    roll_history(rows, before, scale, carray(_at(p[5]), tensors, np.float32), floats[0], p[6] != 0)


_ROLL = struct.Struct("<7q4d")
_Roll: Any = ctypes.c_char * _ROLL.size


def roll_history_at(
    history: int,
    steps: int,
    tensors: int,
    before: int,
    scale: int,
    maximum: int,
    margin: float,
    most_recent: bool,
    amaxes: tuple[float, ...] = (0.0, 0.0, 0.0),
) -> None:
    """`gather_amax` of amaxes, then `roll_history`, of the arrays at these addresses; at most 3 tensors."""
    arguments = _Roll()
    _ROLL.pack_into(arguments, 0, history, steps, tensors, before, scale, maximum, most_recent, margin, *amaxes)
    _roll_history.ctypes(ctypes.addressof(arguments))


@njit(cache=True, nogil=True, error_model="numpy")
def add_scaled(p: Any, d_left: Any, d_right: Any, y: Any) -> None:
    """y = memory.fma(p * d_left, d_right, y), d_left by rows and d_right by columns."""
    for i in range(p.shape[0]):
        d = d_left[i]
        row, into = p[i], y[i]
        for j in range(p.shape[1]):
            into[j] = _fma(np.float32(row[j] * d), d_right[j], into[j])
