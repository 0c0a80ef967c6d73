"""The CPU backend: casts and amax over contiguous memory, on the threads the process already has."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from octavo.formats import Format
from octavo.kernels import loops, threads
from octavo.kernels.loops import CHUNK, Kind, Slot
from octavo.reference import overflow_codes, reject_nan
from octavo.rounding import Overflow, Rounding

__all__ = ["Buffer", "Kind", "amax", "cast", "gather_amax", "roll_history"]

SERIAL = 4 * CHUNK
"""Below this many elements waking a second thread costs more than it saves."""

_MODES = {mode: number for number, mode in enumerate(Rounding)}


class Buffer(NamedTuple):
    """Contiguous memory: its address, what it holds, and how many elements."""

    address: int
    kind: Kind
    size: int


def cast(
    source: Buffer,
    target: Buffer,
    format: Format,
    *,
    scale: float = 1.0,
    divisor: float = 1.0,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow = Overflow.SATURATE,
    seed: int | None = None,
    offset: int = 0,
) -> float:
    """Write the codes of `source * scale`, or the values that they decode to over `divisor`, to `target`; return amax(|source|).

    source: any kind of float; target: codes or any kind of float, of the same size.  Products and quotients are float32, or float64
    for a float64 source.  NaN propagates into amax, which is that of the unscaled source.
    Raises ValueError for NaN where the format has none (the target is then undefined), and for stochastic rounding without a seed.
    """
    if rounding is Rounding.STOCHASTIC and seed is None:
        raise ValueError("stochastic rounding draws from a seed, and none was given; pass seed=0, say")
    wide = source.kind is Kind.FLOAT64 or not format.signed
    peak = _run(
        loops.cast64 if wide else loops.cast32,
        source.address,
        target.address,
        source.size,
        source.kind,
        target.kind,
        0,
        0,
        scale,
        divisor,
        _MODES[rounding],
        _counter("seed", seed or 0, 1 << 64),
        _counter("offset", offset, (1 << 63) - source.size),
        *_format_slots(format, overflow, rounding),
        wide=wide,
    )
    if peak != peak and format.nan_code is None:
        raise reject_nan(format)
    return peak


def amax(source: Buffer) -> float:
    """The largest magnitude in `source`: 0 of an empty one, NaN if it holds one."""
    rest = (0,) * (len(Slot) - Slot.TARGET_KIND)
    return _run(loops.amax, source.address, 0, source.size, source.kind, *rest, wide=source.kind is Kind.FLOAT64)


@functools.lru_cache(maxsize=256)
def _table(format: Format) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The format's values, padded to the 256 that the kernels look at."""
    table = np.zeros(256, np.float32)
    table[: 1 << format.bits] = format.values
    return table


@functools.lru_cache(maxsize=256)
def _format_slots(format: Format, overflow: Overflow, rounding: Rounding) -> tuple[int, ...]:
    """The slots from MANTISSA_BITS on, which the format and the modes decide."""
    finite_overflow, infinite = overflow_codes(format, overflow)
    zero_is_nan = not format.signed and overflow is Overflow.NONE
    return (
        format.mantissa_bits,
        format.bias,
        format.max_code,
        format.max_code if rounding is Rounding.TOWARD_ZERO else finite_overflow,
        infinite,
        -1 if format.inf_code is None else format.inf_code,
        -1 if format.nan_code is None else format.nan_code,
        format.sign_mask,
        int(format.has_negative_zero),
        format.nan_code if zero_is_nan and format.nan_code is not None else 0,
        _table(format).ctypes.data,
    )


_LAYOUT = struct.Struct(f"<{Slot.SCALE}q2d{Slot.SEED - Slot.ROUNDING}qQ{len(Slot) - Slot.OFFSET}q")
"""The slots as the kernels read them: 64-bit integers, but float64 for SCALE and DIVISOR."""


def _run(kernel: Any, *slots: Any, wide: bool) -> float:
    """Call a kernel on as many threads as its size is worth, and return the amax that it found."""
    arguments = ctypes.create_string_buffer(_LAYOUT.size)
    _LAYOUT.pack_into(arguments, 0, *slots)
    workers = min(threads.count(), slots[Slot.SIZE] // SERIAL + 1)
    threads.run(kernel.ctypes, ctypes.addressof(arguments), workers)
    return float(struct.unpack_from("<d" if wide else "<f", arguments, 8 * Slot.AMAX)[0])


def _counter(name: str, value: int, end: int) -> int:
    if not isinstance(value, (int, np.integer)) or not 0 <= value < end:
        raise ValueError(f"{name} is an integer from 0 to {end - 1}; got {value!r}")
    return int(value)


@njit(cache=True, nogil=True, error_model="numpy")
def gather_amax(history: Any, facts: Any) -> None:
    """Raise row 0 of `history`, float32 [steps, tensors], to the last entries of `facts`, float32, where they are larger or NaN."""
    tensors = history.shape[1]
    for t in range(tensors):
        amax = facts[len(facts) - tensors + t]
        if amax > history[0, t] or np.isnan(amax):
            history[0, t] = amax


@njit(cache=True, nogil=True, error_model="numpy")
def roll_history(history: Any, before: Any, scale: Any, maximum: Any, margin: float, most_recent: bool) -> None:
    """`octavo.scaling.roll_history` on the memory itself, for the algorithms that have a name.

    history: float32 [steps, tensors], rolled in place; before, scale: float32 [tensors], the scales so far and where the next ones
    go (may be the same); maximum: float32 [tensors]; margin: what maximum is multiplied with, 2**-margin of the recipe.
    """
    steps, tensors = history.shape
    for t in range(tensors):
        scale[t] = before[t]
        last = history[0, t]
        if last == 0:
            continue
        peak = last
        for i in range(1, steps):
            value = history[i, t]
            if not most_recent and (value > peak or np.isnan(value)):
                peak = value
            if i > 1:
                history[i - 1, t] = value
        history[0, t] = np.float32(0)
        if steps > 1:
            history[steps - 1, t] = last
        if peak > 0 and np.isfinite(peak):
            ratio = maximum[t] * np.float32(margin) / peak
            scale[t] = ratio if np.isfinite(ratio) else np.float32(3.4028234663852886e38)
