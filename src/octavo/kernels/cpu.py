"""The CPU backend: casts and amax over contiguous memory, on the threads the process already has."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Any, NamedTuple

import numpy as np

from octavo.formats import Format
from octavo.kernels import loops, threads, wide
from octavo.kernels.loops import CHUNK, Kind, Slot
from octavo.reference import overflow_codes, reject_nan
from octavo.rounding import Overflow, Rounding, checked_draws

__all__ = [
    "MODES",
    "Buffer",
    "Caster",
    "Kind",
    "amax",
    "amax_arguments",
    "cast",
    "caster",
    "nearest_words",
    "worthwhile_threads",
]

SERIAL = 2 * CHUNK
"""Below this many elements waking a second thread costs more than it saves."""

MODES = {mode: number for number, mode in enumerate(Rounding)}
"""Rounding modes as the kernels know them."""


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
        self._mode = MODES[rounding]
        self._kernels = loops.cast32, wide.cast64
        self._slots = _LAYOUT.pack(*(0,) * Slot.MANTISSA_BITS, *_format_slots(format, overflow, rounding))

    def arguments(self, kind: Kind, size: int, target: Kind) -> bytes:
        """The kernel's arguments for a source and a target of these kinds, with scale 1 and no address yet (`Slot`)."""
        arguments = _Arguments.from_buffer_copy(self._slots)
        _HEAD.pack_into(arguments, 0, 0, 0, size, kind, target, 0, 0, 1.0, 1.0, self._mode, 0, 0)
        return bytes(arguments)

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
        peak = _run(self._kernels[in_float64].ctypes, arguments, size, in_float64)
        if peak != peak and self.format.nan_code is None:
            raise reject_nan(self.format)
        return peak


@functools.lru_cache(maxsize=256)
def caster(format: Format, rounding: Rounding, overflow: Overflow) -> Caster:
    """The one `Caster` of that format and those modes.  Raises ValueError for a format of more than 8 bits."""
    if format.bits > 8:
        raise ValueError(
            f"codes have at most 8 bits; {format.name} has {format.bits}: cast to its dtype with your array library"
        )
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

    source: any kind of float; target: codes or any kind of float, of the same size.  Products are float32, or float64 for a
    float64 source, and so are quotients where the target is float64, too.  NaN propagates into amax, which is that of the unscaled source.
    Raises ValueError for NaN where the format has none (the target is then undefined), and for stochastic rounding without a seed.
    """
    draws = checked_draws(rounding, seed, offset, source.size)
    return caster(format, rounding, overflow)(source, target, scale, divisor, *draws)


def amax(source: Buffer) -> float:
    """The largest magnitude in `source`: 0 of an empty one, NaN if it holds one."""
    arguments = _Arguments.from_buffer_copy(amax_arguments(source.kind, source.size))
    _WORD.pack_into(arguments, 0, source.address)
    return _run(loops.amax.ctypes, arguments, source.size, source.kind is Kind.FLOAT64)


def amax_arguments(kind: Kind, size: int) -> bytes:
    """As `Caster.arguments`, for the kernel that takes the amax alone."""
    arguments = bytearray(_LAYOUT.size)
    _HEAD.pack_into(arguments, 0, 0, 0, size, kind, *(0,) * 8)
    return bytes(arguments)


def worthwhile_threads(size: int, count: int) -> int:
    """How many of `count` threads so many elements are worth."""
    return 1 if size < SERIAL else min(count, size // SERIAL + 1)


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


@functools.lru_cache(maxsize=256)
def nearest_words(format: Format, overflow: Overflow) -> np.ndarray[Any, np.dtype[np.int32]]:
    """What `octavo.kernels.dots.round_row` rounds to nearest even by: int32 [7]."""
    m, bias, last, over, infinite, *_, has_negative_zero, _, _ = _format_slots(format, overflow, Rounding.NEAREST_EVEN)
    values = _table(format)[[last, over, infinite]].view(np.int32)
    limit = ((last >> m) - bias + 129) << 23  # 2**(emax + 2)
    sign = -(1 << 31) if has_negative_zero else 0
    return np.array([(23 - m) << 23, (128 - bias) << 23, limit, *values, sign], np.int32)


_HEAD = struct.Struct(f"<{Slot.SCALE}q2d{Slot.SEED - Slot.ROUNDING}qQq")
"""The slots that each call sets, as the kernels read them: 64-bit integers, but float64 for SCALE and DIVISOR."""
_LAYOUT = struct.Struct(f"{_HEAD.format}{len(Slot) - Slot.MANTISSA_BITS}q")
"""All slots."""
_WORD = struct.Struct("<q")
_Arguments: Any = ctypes.c_char * _LAYOUT.size


def _run(kernel: Any, arguments: Any, size: int, in_float64: bool) -> float:
    """Call a kernel on as many threads as its size is worth, and return the amax that it found."""
    threads.run(kernel, ctypes.addressof(arguments), worthwhile_threads(size, threads.count()))
    return float(struct.unpack_from("<d" if in_float64 else "<f", arguments, 8 * Slot.AMAX)[0])
