"""What a cast did to one tensor: what it lost at either end of the format's range, and how much noise it added."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from octavo.formats import Format

__all__ = ["TensorStatistics", "measure"]

Floats: TypeAlias = npt.NDArray[np.float32]
Bits: TypeAlias = npt.NDArray[np.int32]

_MAGNITUDE, _INF, _SMALLEST_NORMAL = 0x7FFFFFFF, 0x7F800000, 0x00800000
_LOWEST, _HIGHEST = -149, 127
"""The exponents of float32, subnormals included."""
_CHUNK = 32768
"""Elements looked at at a time: what is made of them stays in the cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorStatistics:
    """A tensor before a cast, and what the cast made of it.  Fractions are from 0 to 1, and 0 of nothing."""

    count: int
    """Elements."""
    amax: float
    """The largest finite magnitude before the cast, 0 where there is none."""
    nan: int
    """NaN before the cast."""
    inf: int
    """Inf before the cast, of either sign."""
    zeros: int
    """Zeros before the cast, of either sign."""
    underflow: float
    """The fraction of the finite nonzero elements that became 0."""
    overflow: float
    """The fraction of the finite elements that, scaled, lie more than half a last place beyond the format's largest value, or that
    became Inf or NaN.  NaN where nobody said by what the elements were scaled."""
    sqnr_db: float
    """10 log10(sum x**2 / sum (x - x')**2) over the elements that are finite before and after: Inf where none changed, NaN where all of
    them are 0 before."""
    exponents: tuple[tuple[int, int], ...]
    """(exponent, elements) for each floor(log2 |x|) that a finite nonzero element has before the cast, ascending."""
    format: str
    """The name of the format."""
    scale: float | None
    """What the elements were multiplied with on the way in; None where that is more than one number, or not known."""


class _Sums:
    """What is added up over the chunks of a tensor."""

    __slots__ = ("exponents", "inf", "nan", "noise", "overflow", "peak", "signal", "underflow", "zeros")

    def __init__(self) -> None:
        self.nan = self.inf = self.zeros = self.underflow = self.overflow = self.peak = 0
        self.signal = self.noise = 0.0
        self.exponents = np.zeros(_HIGHEST - _LOWEST + 1, np.int64)

    def add(self, x: Floats, y: Floats, scale: npt.NDArray[np.float32] | np.float32 | None, limit: np.float32) -> None:
        """One chunk: x before, y after; all [elements], `scale` too where it is no single number."""
        bits: Bits = x.view(np.int32) & _MAGNITUDE
        fields = np.bincount(bits >> 23, minlength=256)
        if fields[255]:
            inf = int(np.count_nonzero(bits == _INF))
            self.inf, self.nan = self.inf + inf, self.nan + int(fields[255]) - inf
            finite = bits < _INF
            x, y, bits = x[finite], y[finite], bits[finite]
            scale = scale[finite] if isinstance(scale, np.ndarray) else scale
        self._count_exponents(bits, fields)
        peak = bits.max(initial=0)
        self.peak = max(self.peak, int(peak))
        self.underflow += int(np.count_nonzero((y == 0) & (bits != 0)))

        wide = x.astype(np.float64)
        error = wide - y
        signal, noise = _sum_of_squares(wide), _sum_of_squares(error)
        lost = None
        if not math.isfinite(noise):
            kept = np.isfinite(y)
            lost, signal, noise = ~kept, _sum_of_squares(wide[kept]), _sum_of_squares(error[kept])
        self.signal, self.noise = self.signal + signal, self.noise + noise
        self.overflow += _overflowed(x, peak.view(np.float32), scale, limit, lost)

    def _count_exponents(self, bits: Bits, fields: npt.NDArray[np.int64]) -> None:
        """fields: how often each exponent field occurs among `bits`, of finite magnitudes; that of Inf and NaN is passed over."""
        zeros = bits.size - int(np.count_nonzero(bits))
        self.zeros += zeros
        self.exponents[-126 - _LOWEST :] += fields[1:255]
        if fields[0] > zeros:
            subnormal = bits[(bits > 0) & (bits < _SMALLEST_NORMAL)]
            places = np.frexp(subnormal.astype(np.float64))[1] - 1
            self.exponents[: -126 - _LOWEST] += np.bincount(places, minlength=-126 - _LOWEST)


def _sum_of_squares(x: npt.NDArray[np.float64]) -> float:
    return float(np.einsum("i,i", x, x))  # np.dot would wake the threads of a BLAS


def _overflowed(
    x: Floats,
    peak: np.float32,
    scale: npt.NDArray[np.float32] | np.float32 | None,
    limit: np.float32,
    lost: npt.NDArray[np.bool_] | None,
) -> int:
    """How many of the finite `x`, of magnitude `peak` at most, exceed `limit` once scaled, or are among the lost."""
    if scale is None:
        return 0
    if isinstance(scale, np.ndarray) or peak * scale > limit:
        beyond = np.abs(x * scale) > limit
        return int(np.count_nonzero(beyond if lost is None else beyond | lost))
    return 0 if lost is None else int(np.count_nonzero(lost))


def measure(
    before: Floats, after: Floats, format: Format, scale: float | npt.ArrayLike | None = 1.0
) -> TensorStatistics:
    """What a cast to `format` did to a tensor: `before` is the tensor as it was, `after` what its codes decode to, scales taken out.

    before, after: float32, one shape, any strides; NaN and Inf are counted and enter no sum.  scale: what the elements were multiplied
    with on the way in, as float32: one number, positive and finite, or an array that broadcasts to that shape (scales of rows or
    blocks, one of which may be NaN), or None where it is not known; it decides nothing but `overflow`.  Sums are float64.
    Raises ValueError for other dtypes, for shapes that differ, and for such a scale.
    """
    for name, array in (("before", before), ("after", after)):
        if getattr(array, "dtype", None) != np.float32:
            found = getattr(array, "dtype", type(array).__name__)
            raise ValueError(f"statistics are taken of float32 arrays; {name} is {found}: convert it first")
    if before.shape != after.shape:
        raise ValueError(
            f"a cast keeps its shape; got {before.shape} before and {after.shape} after: give the same tensor"
        )
    factor, sums = _factor(scale, before.shape), _Sums()
    x, y = np.ascontiguousarray(before).reshape(-1), np.ascontiguousarray(after).reshape(-1)
    with np.errstate(all="ignore"):
        limit = np.float32(format.max + 2.0 ** (format.emax - format.mantissa_bits - 1))
        for start in range(0, x.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            sums.add(x[part], y[part], factor[part] if isinstance(factor, np.ndarray) else factor, limit)
    finite = x.size - sums.nan - sums.inf
    nonzero = finite - sums.zeros
    return TensorStatistics(
        count=x.size,
        amax=float(np.int32(sums.peak).view(np.float32)),
        nan=sums.nan,
        inf=sums.inf,
        zeros=sums.zeros,
        underflow=sums.underflow / nonzero if nonzero else 0.0,
        overflow=math.nan if factor is None else sums.overflow / finite if finite else 0.0,
        sqnr_db=_decibels(sums.signal, sums.noise),
        exponents=tuple((int(place) + _LOWEST, int(sums.exponents[place])) for place in np.flatnonzero(sums.exponents)),
        format=format.name,
        scale=float(factor) if isinstance(factor, np.float32) else None,
    )


def _factor(scale: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float32] | np.float32 | None:
    """The scale in float32: one number, one for each element [elements], or None."""
    if scale is None:
        return None
    with np.errstate(over="ignore", under="ignore"):
        held: npt.NDArray[np.float32] = np.asarray(scale, np.float32)
    if held.size == 1:
        one = np.float32(held.reshape(-1)[0])
        if 0 < one < math.inf:
            return one
        if held.ndim == 0:
            raise ValueError(
                f"a scale is positive and finite in float32; got {scale}: give what elements are multiplied with"
            )
    try:
        return np.broadcast_to(held, shape).reshape(-1)
    except ValueError:
        raise ValueError(
            f"scales broadcast to the tensor's shape {shape}; got {held.shape}: repeat each for the elements that share it"
        ) from None


def _decibels(signal: float, noise: float) -> float:
    if signal == 0:
        return math.nan
    return 10 * math.log10(signal / noise) if noise else math.inf
