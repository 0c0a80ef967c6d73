"""From amax to scale: the rules and their edge cases, once, for NumPy, torch and JAX arrays alike.

A scale here multiplies on the way in: `codes = encode(x * scale)`, `x ≈ decode(codes) / scale`.  Source: the order of operations
of Transformer Engine 2.x for its delayed and current scaling recipes, section by section in `docs/numerics.md`.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from octavo.names import nearest

__all__ = ["AmaxAlgorithm", "Current", "Delayed", "Scaling", "Unscaled", "amax_scale", "roll_history"]

Array: TypeAlias = Any
"""A float32 array of NumPy, torch or JAX."""

FLOAT32_MAX = 3.4028234663852886e38
_EXPONENT_MASK = 0x7F800000


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


Scaling: TypeAlias = Unscaled | Current | Delayed


def _namespace(x: Array) -> Any:
    """The module whose functions work on `x`: numpy, torch or jax.numpy, already imported since `x` exists."""
    root = type(x).__module__.partition(".")[0]
    return sys.modules["jax.numpy" if root in ("jax", "jaxlib") else "torch" if root == "torch" else "numpy"]


def _quiet(xp: Any) -> AbstractContextManager[Any]:
    """Overflow is meant where it happens below; only NumPy would warn of it."""
    return np.errstate(over="ignore") if xp is np else nullcontext()


def amax_scale(amax: Array, maximum: float, scaling: Current) -> Array:
    """The scale of current scaling for each `amax`.

    amax: float32, any shape; maximum: the format's.  Returns float32 of that shape, positive and finite for any input.
    """
    xp = _namespace(amax)
    one, largest = xp.ones_like(amax), xp.full_like(amax, FLOAT32_MAX)
    floor = xp.full_like(amax, scaling.epsilon)
    amax = xp.where(amax < floor, floor, amax)
    usable = (amax > 0) & xp.isfinite(amax)
    with _quiet(xp):
        scale = xp.full_like(amax, maximum) / xp.where(usable, amax, one)
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
        seen = last != 0
        match scaling.algorithm:
            case AmaxAlgorithm.MAX:
                peak = xp.amax(history, 0)
            case AmaxAlgorithm.MOST_RECENT:
                peak = last
    else:
        seen = xp.ones_like(last) != 0
        peak = scaling.algorithm(history)
    usable = seen & (peak > 0) & xp.isfinite(peak)
    with _quiet(xp):
        ratio = maximum * 2.0**-scaling.margin / xp.where(usable, peak, xp.ones_like(peak))
    ratio = xp.where(xp.isfinite(ratio), ratio, xp.full_like(ratio, FLOAT32_MAX))
    return xp.where(seen, rolled, history), xp.where(usable, ratio, scale)
