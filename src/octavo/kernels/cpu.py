"""The CPU backend: casts and amax over contiguous memory, on the threads the process already has."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit

from octavo.formats import Format
from octavo.kernels import loops, memory, threads, wide
from octavo.kernels.loops import CHUNK, Kind, Slot
from octavo.reference import overflow_codes, reject_nan
from octavo.rounding import Overflow, Rounding

__all__ = [
    "Buffer",
    "Caster",
    "Kind",
    "amax",
    "cast",
    "caster",
    "current_scale",
    "gather_amax",
    "roll_history",
    "roll_history_at",
]

SERIAL = 4 * CHUNK
"""Below this many elements waking a second thread costs more than it saves."""

_at: Any = memory.at
_MODES = {mode: number for number, mode in enumerate(Rounding)}


class Buffer(NamedTuple):
    """Contiguous memory: its address, what it holds, and how many elements."""

    address: int
    kind: Kind
    size: int


class Caster:
    """A cast to one format under one rounding and one overflow policy, ready to be called often: see `cast`."""

    __slots__ = ("_kernels", "_mode", "_slots", "format")

    def __init__(self, format: Format, rounding: Rounding, overflow: Overflow) -> None:
        self.format = format
        self._mode = _MODES[rounding]
        self._kernels = loops.cast32.ctypes, wide.cast64.ctypes
        self._slots = _LAYOUT.pack(*(0,) * Slot.MANTISSA_BITS, *_format_slots(format, overflow, rounding))

    def __call__(
        self, source: Buffer, target: Buffer, scale: float = 1.0, divisor: float = 1.0, seed: int = 0, offset: int = 0
    ) -> float:
        """The amax of the source.  The seed is not checked to be there, nor either counter to be in range."""
        address, kind, size = source
        in_float64 = kind is Kind.FLOAT64 or not self.format.signed
        arguments = _Arguments.from_buffer_copy(self._slots)
        _HEAD.pack_into(
            arguments, 0, address, target[0], size, kind, target[1], 0, 0, scale, divisor, self._mode, seed, offset
        )
        peak = _run(self._kernels[in_float64], arguments, size, in_float64)
        if peak != peak and self.format.nan_code is None:
            raise reject_nan(self.format)
        return peak


@functools.lru_cache(maxsize=256)
def caster(format: Format, rounding: Rounding, overflow: Overflow) -> Caster:
    """The one `Caster` of that format and those modes."""
    return Caster(format, rounding, overflow)


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
    seed = _counter("seed", seed or 0, 1 << 64)
    offset = _counter("offset", offset, (1 << 63) - source.size)
    return caster(format, rounding, overflow)(source, target, scale, divisor, seed, offset)


def amax(source: Buffer) -> float:
    """The largest magnitude in `source`: 0 of an empty one, NaN if it holds one."""
    arguments = _Arguments()
    _HEAD.pack_into(arguments, 0, source.address, 0, source.size, source.kind, *(0,) * 8)
    return _run(loops.amax.ctypes, arguments, source.size, source.kind is Kind.FLOAT64)


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


_HEAD = struct.Struct(f"<{Slot.SCALE}q2d{Slot.SEED - Slot.ROUNDING}qQq")
"""The slots that each call sets, as the kernels read them: 64-bit integers, but float64 for SCALE and DIVISOR."""
_LAYOUT = struct.Struct(f"{_HEAD.format}{len(Slot) - Slot.MANTISSA_BITS}q")
"""All slots."""
_Arguments: Any = ctypes.c_char * _LAYOUT.size


def _run(kernel: Any, arguments: Any, size: int, in_float64: bool) -> float:
    """Call a kernel on as many threads as its size is worth, and return the amax that it found."""
    threads.run(kernel, ctypes.addressof(arguments), 1 if size < SERIAL else min(threads.count(), size // SERIAL + 1))
    return float(struct.unpack_from("<d" if in_float64 else "<f", arguments, 8 * Slot.AMAX)[0])


def _counter(name: str, value: int, end: int) -> int:
    if not isinstance(value, (int, np.integer)) or not 0 <= value < end:
        raise ValueError(f"{name} is an integer from 0 to {end - 1}; got {value!r}")
    return int(value)


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
    return np.float64(scale)  # type: ignore[no-any-return]


@njit(cache=True, nogil=True, error_model="numpy")
def gather_amax(history: int, amaxes: Any) -> None:
    """Raise row 0 of the history at that address, float32 [steps, tensors], to `amaxes`, one a tensor, where they are larger or NaN."""
    row = carray(_at(history), (len(amaxes),), np.float32)
    for t in range(len(amaxes)):
        amax = np.float32(amaxes[t])
        if amax > row[t] or np.isnan(amax):
            row[t] = amax


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


@njit(cache=True, nogil=True, error_model="numpy")
def roll_history_at(
    history: int, steps: int, before: int, scale: int, maximum: Any, margin: float, most_recent: bool
) -> None:
    """`roll_history` of the arrays at these addresses; maximum is an array, whose length says how many tensors there are."""
    tensors = (len(maximum),)
    rows = carray(_at(history), (steps, len(maximum)), np.float32)
    old, new = carray(_at(before), tensors, np.float32), carray(_at(scale), tensors, np.float32)
    roll_history(rows, old, new, maximum, margin, most_recent)
