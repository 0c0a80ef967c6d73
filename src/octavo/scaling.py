"""From amax to scale: the rules and their edge cases, once, for NumPy, torch and JAX arrays alike.

A scale here multiplies on the way in: `codes = encode(x * scale)`, `x ≈ decode(codes) / scale`.  Source: the order of operations
of Transformer Engine 2.x for its delayed and current scaling recipes, section by section in `docs/numerics.md`.
"""

from __future__ import annotations

import enum
import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from octavo.names import nearest

__all__ = [
    "AmaxAlgorithm",
    "Block",
    "BlockScale",
    "Current",
    "Delayed",
    "Row",
    "Scaling",
    "TwoLevel",
    "Unscaled",
    "amax_scale",
    "e8m0_codes",
    "roll_history",
    "same_along_both_axes",
    "scales_in_codes",
    "two_level_encode_factor",
    "two_level_scale",
    "two_level_target",
    "zero_code_limit",
]

Array: TypeAlias = Any
"""A float32 array of NumPy, torch or JAX."""

FLOAT32_MAX = 3.4028234663852886e38
_EXPONENT_MASK = 0x7F800000
_MAGNITUDE_MASK = 0x7FFFFFFF


class AmaxAlgorithm(enum.Enum):
    """Which amax of its history a delayed scale is computed from."""

    MAX = "max"
    """The largest of the window."""
    MOST_RECENT = "most_recent"
    """That of the last step."""

    @classmethod
    def _missing_(cls, value: object) -> AmaxAlgorithm:
        names = [member.value for member in cls]
        raise ValueError(
            f"an amax algorithm is one of {names} or a function of the history; got {value!r}{nearest(str(value), names)}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Unscaled:
    """The scale is 1: the tensor is cast as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Current:
    """One scale per tensor, from the amax of the tensor itself: `scale = format.max / max(amax, epsilon)`.

    `power_of_two` clears the scale's mantissa, which makes scaling exact and the scale up to 2x smaller.
    An amax of 0, Inf or NaN gives 1; a scale that overflows gives FLT_MAX (2**127 with `power_of_two`).
    """

    power_of_two: bool = False
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.epsilon < float("inf"):
            raise ValueError(f"epsilon is a finite floor under amax, 0 or more; got {self.epsilon}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Delayed:
    """One scale per tensor, from the amaxes of the last `history` steps: `scale = format.max / 2**margin / peak`.

    `algorithm` may be a function from the history, float32 [history, tensors], to the peaks, float32 [tensors]; then the
    history rolls at each step, even one that saw only zeros.  `reduce` takes the maximum over all ranks of
    the default (or given) process group where more than one trains.
    """

    margin: int = 0
    history: int = 1024
    algorithm: AmaxAlgorithm | Callable[[Array], Array] = AmaxAlgorithm.MAX
    reduce: bool = True

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"a history holds at least 1 amax; got {self.history}")
        if not callable(self.algorithm):
            object.__setattr__(self, "algorithm", AmaxAlgorithm(self.algorithm))


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One scale for each row along the contracted axis, from the row's own amax, by the rule of `Current`."""

    power_of_two: bool = False
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        Current(power_of_two=self.power_of_two, epsilon=self.epsilon)


class BlockScale(enum.Enum):
    """What a block's scale is and how it follows from the block's amax A; `d` is what decoding multiplies with, MAX the format's.

    FLOAT32 and POWER_OF_TWO are `Current`'s rule, block by block.  The others give `d` as a power of two in E8M0, code `c` for
    `2**(c - 127)`, at least 0 and at most 254; A = 0 gives 0; a NaN or Inf in the block gives 255, NaN, and with it the whole block.
    """

    FLOAT32 = "float32"
    """1 / (MAX / A), a float32."""
    POWER_OF_TWO = "power-of-two"
    """The same with MAX / A rounded down to a power of two, held as a float32."""
    RCEIL = "rceil"
    """A * fl(1 / MAX) rounded up to a power of two (NVIDIA, arXiv 2506.08027; cuBLAS; Transformer Engine)."""
    FLOOR = "floor"
    """2**(floor(log2 A) - emax): the largest values of a block may saturate (OCP MX v1.0, section 6.3)."""
    CEIL = "ceil"
    """2**(ceil(log2 A) - emax)."""
    EVEN = "even"
    """FLOOR of A rounded half away from zero to the format's mantissa."""

    @classmethod
    def _missing_(cls, value: object) -> BlockScale:
        names = [member.value for member in cls]
        raise ValueError(f"a block's scale is one of {names}; got {value!r}{nearest(str(value), names)}")

    @property
    def is_e8m0(self) -> bool:
        """Whether scales are E8M0 codes."""
        return self not in (BlockScale.FLOAT32, BlockScale.POWER_OF_TWO)


def _check_shape(shape: tuple[int, int]) -> None:
    if len(shape) != 2 or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(f"a block's shape is (across, along) the contracted axis, each 1 or more; got {shape!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One scale for each block of `shape`: (rows across, elements along) the contracted axis.

    The last blocks of an axis that they do not divide hold what there is; with `padding=False` such a tensor raises ValueError.
    epsilon: a floor under amax, of FLOAT32 and POWER_OF_TWO.  skip_nan: amax passes over NaN, and Inf gives E8M0's largest scale,
    as in Transformer Engine: only the NaN itself is then lost, and not its block.
    """

    shape: tuple[int, int] = (1, 128)
    scale: BlockScale = BlockScale.POWER_OF_TWO
    epsilon: float = 0.0
    padding: bool = True
    skip_nan: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "scale", BlockScale(self.scale))
        _check_shape(self.shape)
        Current(epsilon=self.epsilon)
        if self.epsilon and self.scale.is_e8m0:
            raise ValueError(f"epsilon is a floor for float32 scales; {self.scale.value} scales have none: leave it 0")

    @property
    def power_of_two(self) -> bool:
        """Whether the quotient MAX / A is rounded down to a power of two."""
        return self.scale is BlockScale.POWER_OF_TWO


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoLevel:
    """NVFP4's scales: E4M3 for each block of `shape` (across, along the contracted axis), under one float32 for the tensor.

    Source: Transformer Engine's NVFP4 recipe; NVIDIA, arXiv 2509.25149.  `padding` as in `Block`.
    """

    shape: tuple[int, int] = (1, 16)
    padding: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        _check_shape(self.shape)


Scaling: TypeAlias = Unscaled | Current | Delayed | Row | Block | TwoLevel


def same_along_both_axes(scaling: Scaling) -> bool:
    """Whether a matrix and its transpose get the same codes: then one cast serves both GEMMs of a tensor."""
    match scaling:
        case Unscaled() | Current() | Delayed():
            return True
        case Row():
            return False
        case Block(shape=(across, along)) | TwoLevel(shape=(across, along)):
            return across == along


def scales_in_codes(scaling: Scaling) -> bool:
    """Whether a cast holds its scales as uint8 codes, of E8M0 or, two-level, E4M3; else they are float32."""
    return isinstance(scaling, TwoLevel) or (isinstance(scaling, Block) and scaling.scale.is_e8m0)


def _namespace(x: Array) -> Any:
    """The module whose functions work on `x`: numpy, torch or jax.numpy, already imported since `x` exists; or what x itself names."""
    root = type(x).__module__.partition(".")[0]
    if root == "octavo":
        return x.__array_namespace__()
    return sys.modules["jax.numpy" if root in ("jax", "jaxlib") else "torch" if root == "torch" else "numpy"]


def _quiet(xp: Any) -> AbstractContextManager[Any]:
    """Overflow is meant where it happens below; only NumPy would warn of it."""
    return np.errstate(over="ignore") if xp is np else nullcontext()


def _magnitude(amax: Array) -> Array:
    """The bits of amaxes, int32: they order as amaxes do, NaN last, and no backend flushes the subnormal ones among them."""
    xp = _namespace(amax)
    return amax.view(xp.int32) & _MAGNITUDE_MASK


def amax_scale(amax: Array, maximum: float, scaling: Current | Row | Block) -> Array:
    """The scale of current scaling for each `amax`, of a tensor, a row or a block (FLOAT32 and POWER_OF_TWO).

    amax: float32, any shape; maximum: the format's.  Returns float32 of that shape, positive and finite for any input.
    """
    xp = _namespace(amax)
    one, largest = xp.ones_like(amax), xp.full_like(amax, FLOAT32_MAX)
    bits, floor = _magnitude(amax), _magnitude(xp.full_like(amax, scaling.epsilon))
    bits = xp.where(bits < floor, floor, bits)
    usable = (bits > 0) & (bits < _EXPONENT_MASK)
    with _quiet(xp):
        scale = xp.full_like(amax, maximum) / xp.where(usable, bits.view(xp.float32), one)
    scale = xp.where(xp.isfinite(scale), scale, largest)
    if scaling.power_of_two:
        scale = (scale.view(xp.int32) & _EXPONENT_MASK).view(xp.float32)
    return xp.where(usable, scale, one)


def roll_history(history: Array, scale: Array, maximum: Array, scaling: Delayed) -> tuple[Array, Array]:
    """One update of delayed scaling, for each tensor (column) on its own: the next (history, scale).

    history: float32 [steps, tensors], row 0 the amax gathered since the last update, row 1 the oldest kept, the last row the
    newest; scale: float32 [tensors]; maximum: float32 [tensors], each tensor's format.max.  A column whose row 0 is zero neither
    rolls nor rescales.  A peak of 0, Inf or NaN leaves its scale as it was; a scale that overflows becomes FLT_MAX.
    """
    xp = _namespace(history)
    last = history[0]
    zeros = xp.zeros_like(history[:1])
    rolled = xp.concatenate([zeros, history[2:], history[:1]]) if history.shape[0] > 1 else zeros
    if isinstance(scaling.algorithm, AmaxAlgorithm):
        bits = _magnitude(history)
        seen = (last.view(xp.int32) > 0) | xp.isnan(
            last
        )  # `bits[0] != 0` compiles to a float comparison, which flushes
        match scaling.algorithm:
            case AmaxAlgorithm.MAX:
                peak = xp.amax(bits, 0).view(xp.float32)
            case AmaxAlgorithm.MOST_RECENT:
                peak = last
    else:
        seen = xp.ones_like(last) != 0
        peak = xp.asarray(scaling.algorithm(history), dtype=xp.float32)
    usable = seen & (peak.view(xp.int32) > 0) & xp.isfinite(peak)
    with _quiet(xp):
        ratio = maximum * 2.0**-scaling.margin / xp.where(usable, peak, xp.ones_like(peak))
    ratio = xp.where(xp.isfinite(ratio), ratio, xp.full_like(ratio, FLOAT32_MAX))
    return xp.where(seen, rolled, history), xp.where(usable, ratio, scale)


@functools.lru_cache(maxsize=64)
def zero_code_limit(maximum: float) -> float:
    """The largest amax whose product with fl(1 / maximum) is at most 2**-127 in float32, whose RCEIL code therefore is 0."""
    middle = np.float32(maximum * 2.0**-127).view(np.int32)
    nearby = np.arange(middle - 8, middle + 8, dtype=np.int32).view(np.float32)
    at_most = nearby * (np.float32(1.0) / np.float32(maximum)) <= np.float32(2.0**-127)
    return float(nearby[at_most][-1])


def e8m0_codes(amax: Array, maximum: float, emax: int, mantissa_bits: int, scaling: Block) -> Array:
    """The E8M0 code of each block's `amax`, as `BlockScale` defines it: int32, 0 to 255, of amax's shape.

    amax: float32; maximum, emax, mantissa_bits: the format's.
    """
    xp = _namespace(amax)
    bits = _magnitude(amax)
    zero, infinite, nan = xp.zeros_like(bits), bits == _EXPONENT_MASK, bits > _EXPONENT_MASK
    bits = xp.where(infinite | nan, zero, bits)
    match scaling.scale:
        case BlockScale.RCEIL:
            # Lifted by 2**64 where it is small, so that no backend's way with subnormals enters.
            reciprocal = float(np.float32(1.0) / np.float32(maximum))
            amax = bits.view(xp.float32)
            small, one = amax < 2.0**-60, xp.ones_like(amax)
            bits = (amax * xp.where(small, one * 2.0**64, one) * reciprocal).view(xp.int32)
            code = ((bits + 0x7FFFFF) >> 23) - xp.where(small, zero + 64, zero)
            code = xp.where(amax <= zero_code_limit(maximum), zero, xp.where(code < 1, zero + 1, code))
        case BlockScale.FLOOR:
            code = (bits >> 23) - emax
        case BlockScale.CEIL:
            code = ((bits + 0x7FFFFF) >> 23) - emax
        case BlockScale.EVEN:
            code = ((bits + (1 << (22 - mantissa_bits))) >> 23) - emax
        case BlockScale.FLOAT32 | BlockScale.POWER_OF_TWO:
            raise ValueError(f"{scaling.scale.value} scales are no E8M0 codes; use amax_scale")
    code = xp.where(code < 0, zero, xp.where(code > 254, zero + 254, code))
    return xp.where(nan, zero + 255, xp.where(infinite, zero + (254 if scaling.skip_nan else 255), code))


def two_level_scale(amax: Array, maximum: float, scale_maximum: float) -> Array:
    """NVFP4's scale of the whole tensor: `min(scale_maximum * maximum / amax, FLT_MAX)`, 1 where amax or the quotient is 0, or NaN."""
    xp = _namespace(amax)
    one, largest, bits = xp.ones_like(amax), xp.full_like(amax, FLOAT32_MAX), _magnitude(amax)
    usable = (bits > 0) & (bits < _EXPONENT_MASK)
    with _quiet(xp):
        scale = xp.full_like(amax, maximum * scale_maximum) / xp.where(usable, amax, one)
    scale = xp.where(scale < largest, scale, largest)
    return xp.where(usable & (scale > 0), scale, one)


def two_level_target(amax: Array, scale: Array, maximum: float) -> Array:
    """What a block's scale is cast from, `min(amax * (scale * fl(1 / maximum)), FLT_MAX)`; amax: of blocks; scale: of the tensor."""
    xp = _namespace(amax)
    reciprocal = float(np.float32(1.0) / np.float32(maximum))
    with _quiet(xp):
        target = amax * (scale * reciprocal)
    largest = xp.full_like(target, FLOAT32_MAX)
    return xp.where(target > largest, largest, target)


def two_level_encode_factor(block: Array, scale: Array) -> Array:
    """What elements are multiplied with, `min(1 / (block * (1 / scale)), FLT_MAX)`; block: the decoded scales of blocks."""
    xp = _namespace(block)
    with np.errstate(divide="ignore", over="ignore") if xp is np else nullcontext():
        factor = 1.0 / (block * (1.0 / scale))
    largest = xp.full_like(factor, FLOAT32_MAX)
    return xp.where(factor > largest, largest, factor)
