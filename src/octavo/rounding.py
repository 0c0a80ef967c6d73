"""Rounding modes, overflow policies, and the random bits that stochastic rounding draws.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11): a pure function of
(seed, position), so threads, tiles and backends all draw the same bits for the same element.
"""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

__all__ = ["Overflow", "Rounding", "checked_counter", "checked_draws", "philox", "random_bits", "require_seed"]


class Rounding(enum.Enum):
    """What happens to a value between two neighbours of the format, at a fraction f of the way up in magnitude."""

    NEAREST_EVEN = "nearest-even"
    """To the nearer one; a tie goes to the even code."""
    TOWARD_ZERO = "toward-zero"
    """To the smaller magnitude; a finite value never overflows."""
    NEAREST_AWAY = "nearest-away"
    """To the nearer one; a tie goes away from zero."""
    STOCHASTIC = "stochastic"
    """Up in magnitude with probability floor(f * 2**32) / 2**32; representable values never move."""


class Overflow(enum.Enum):
    """What becomes of a magnitude that rounds beyond the largest finite value.

    The formats that have neither Inf nor NaN (FP6, FP4) saturate under each policy: nothing else exists there.
    """

    SATURATE = "saturate"
    """Finite overflow and Inf become the largest finite value (OFP8 saturating mode, CUDA's SATFINITE)."""
    SATURATE_FINITE = "saturate-finite"
    """Finite overflow becomes the largest finite value; Inf stays Inf, or NaN where there is no Inf (arXiv 2209.05433)."""
    NONE = "none"
    """Finite overflow and Inf become Inf, or NaN where there is no Inf (OFP8 non-saturating mode, ml_dtypes)."""


def require_seed(rounding: Rounding, seed: object) -> None:
    """Raise ValueError for stochastic rounding without a seed."""
    if rounding is Rounding.STOCHASTIC and seed is None:
        raise ValueError("stochastic rounding draws from a seed, and none was given; pass seed=0, say")


def checked_counter(name: str, value: object, end: int) -> int:
    """`value` as an int.  Raises ValueError, by its name, for what is no integer from 0 to `end - 1`."""
    if not isinstance(value, (int, np.integer)) or not 0 <= value < end:
        raise ValueError(f"{name} is an integer from 0 to {end - 1}; got {value!r}")
    return int(value)


def checked_draws(rounding: Rounding, seed: int | None, offset: int, size: int) -> tuple[int, int]:
    """The seed (0 where none is needed) and offset of `size` elements.  Raises ValueError for a seed that is missing, and out of range."""
    require_seed(rounding, seed)
    return checked_counter("seed", seed or 0, 1 << 64), checked_counter("offset", offset, (1 << 63) - size)


_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox(counter: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Philox4x32-10 of `counter` [..., 4] under the two 32-bit words of `key`: four 32-bit words for each counter."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    for round_ in range(10):
        k0 = np.uint64((key[0] + round_ * _WEYL[0]) & 0xFFFFFFFF)
        k1 = np.uint64((key[1] + round_ * _WEYL[1]) & 0xFFFFFFFF)
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _WORD) ^ c1 ^ k0, p1 & _LOW, (p0 >> _WORD) ^ c3 ^ k1, p0 & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def random_bits(seed: int, offset: int, count: int) -> npt.NDArray[np.uint32]:
    """The 32 random bits of elements `offset` to `offset + count - 1`: uint32 [count].

    Element p takes word p % 4 of counter (p // 4, 0) under key `seed`, both split into 32-bit words, low word first.
    """
    first = offset // 4
    blocks = np.arange(first, (offset + count + 3) // 4, dtype=np.uint64)
    counter = np.zeros((len(blocks), 4), np.uint32)
    counter[:, 0] = (blocks & _LOW).astype(np.uint32)
    counter[:, 1] = (blocks >> _WORD).astype(np.uint32)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(-1)
    return words[offset - 4 * first :][:count]
