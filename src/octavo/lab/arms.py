"""The arms that a comparison can run: one row each, and one for every named recipe."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from octavo.recipes import NAMED, Recipe, current_scaling, delayed_scaling

__all__ = ["ARMS", "BASELINE", "DEFAULT_ARMS", "Arm", "Mode"]


class Mode(enum.Enum):
    """How an arm trains and tests."""

    FLOAT32 = enum.auto()
    """All in float32."""
    BFLOAT16 = enum.auto()
    """Under `torch.autocast` with bfloat16."""
    RECIPE = enum.auto()
    """Linear layers converted to a recipe, in training and in testing."""
    CALIBRATED = enum.auto()
    """Trained in float32, then converted, calibrated on training batches and tested in the recipe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One row of the comparison; `recipe` is given for the modes that cast."""

    name: str
    description: str
    mode: Mode
    recipe: Callable[[], Recipe] | None = None


BASELINE = "torch-fp32"
"""The arm that the others are measured against."""

_FIRST = (
    Arm(name=BASELINE, description="float32 throughout", mode=Mode.FLOAT32),
    Arm(name="torch-bf16", description="bfloat16 by torch.autocast", mode=Mode.BFLOAT16),
    Arm(
        name="torch-fp8",
        description="FP8 with delayed scaling: E4M3 forward, E5M2 gradients",
        mode=Mode.RECIPE,
        recipe=delayed_scaling,
    ),
    Arm(
        name="torch-fp8-current",
        description="FP8 with current scaling: E4M3 forward, E5M2 gradients",
        mode=Mode.RECIPE,
        recipe=current_scaling,
    ),
    Arm(
        name="torch-fp8-infer",
        description="trained in float32, calibrated, tested in FP8",
        mode=Mode.CALIBRATED,
        recipe=delayed_scaling,
    ),
)
DEFAULT_ARMS: tuple[str, ...] = tuple(arm.name for arm in _FIRST)
"""What runs where the user names no arms."""


def _of(recipe: Callable[[], Recipe]) -> Arm:
    """`torch-mxfp8` for `mxfp8`, `torch-bf16-recipe` where the name is taken: trained and tested under that recipe."""
    name = f"torch-{recipe.__name__.replace('_', '-')}"
    name += "-recipe" if name in DEFAULT_ARMS else ""
    return Arm(name=name, description=f"the recipe {recipe.__name__}", mode=Mode.RECIPE, recipe=recipe)


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        arm.name: arm
        for arm in (*_FIRST, *(_of(make) for make in NAMED.values() if make not in (delayed_scaling, current_scaling)))
    }
)
"""Every arm by name; a new arm is a new row, and a new recipe brings its own."""
