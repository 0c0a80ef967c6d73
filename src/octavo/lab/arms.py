"""The arms that a comparison can run: one row each, and one for every named recipe."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from octavo.lab.training import History
from octavo.recipes import NAMED, Recipe, current_scaling, delayed_scaling, direct, hybrid, mxfp8

__all__ = ["ARMS", "DEFAULT_ARMS", "Arm", "ArmResult", "Framework", "Mode"]


class Framework(enum.Enum):
    """What trains an arm."""

    TORCH = "torch"
    """PyTorch, eager."""
    JAX = "jax"
    """JAX and Flax, an epoch compiled as one loop."""
    ENGINE = "engine"
    """Octavo's own engine, a step captured once and repeated; networks of linear layers alone."""

    @property
    def baseline(self) -> str:
        """The arm that the framework's others are measured against: float32."""
        return "engine-autograd" if self is Framework.ENGINE else f"{self.value}-fp32"


class Mode(enum.Enum):
    """How an arm trains and tests."""

    FLOAT32 = enum.auto()
    """All in float32."""
    BFLOAT16 = enum.auto()
    """In bfloat16, parameters in float32: `torch.autocast`, or the dtype of Flax's layers."""
    RECIPE = enum.auto()
    """Linear layers under a recipe, in training and in testing."""
    EMULATED = enum.auto()
    """The whole network under a recipe, by emulation: convolutions too, the loss scaled, float16 masters."""
    CALIBRATED = enum.auto()
    """Trained in float32, then converted, calibrated on training batches and tested in the recipe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One row of the comparison; `recipe` is given for the modes that cast; by_hand: gradients are written out (the engine alone)."""

    name: str
    description: str
    mode: Mode
    recipe: Callable[[], Recipe] | None = None
    framework: Framework = Framework.TORCH
    by_hand: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmResult:
    """What one arm came to.

    final_loss: mean training loss over the last tenth of the last epoch's steps.  test_accuracy: a fraction.
    seconds_per_epoch: median, training alone.  ratio_to_fp32: an arm's training step over that of its framework's float32 arm, medians of
    steps taken in turns before the arm started; seconds_per_epoch of two arms may have met a different load.
    difference_to_fp32: test accuracy less that arm's, a fraction.  Both are None where that arm is not run.
    losses: of each step.  accuracies: of each epoch; of a calibrated arm the one after calibration.
    baseline: the arm it is measured against.
    trained_as: the arm whose training this one shares, so that its loss and seconds are that arm's; None for its own.
    """

    name: str
    description: str
    final_loss: float
    test_loss: float
    test_accuracy: float
    seconds_per_epoch: float
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    baseline: str = Framework.TORCH.baseline
    trained_as: str | None = None
    ratio_to_fp32: float | None = None
    difference_to_fp32: float | None = None

    @classmethod
    def of(
        cls,
        arm: Arm,
        history: History,
        ratio: float | None,
        accuracies: tuple[float, ...],
        *,
        test_loss: float | None = None,
        source: str | None = None,
    ) -> ArmResult:
        """The result of an arm from the history of its training, or of that of `source`, which it shares."""
        return cls(
            name=arm.name,
            description=arm.description,
            final_loss=history.final_loss,
            test_loss=history.test_losses[-1] if test_loss is None else test_loss,
            test_accuracy=accuracies[-1],
            seconds_per_epoch=history.seconds_per_epoch,
            losses=tuple(history.losses),
            baseline=arm.framework.baseline,
            accuracies=accuracies,
            trained_as=source if source != arm.name else None,
            ratio_to_fp32=ratio,
        )


_FIRST = (
    Arm(name="torch-fp32", description="float32 throughout", mode=Mode.FLOAT32),
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

_JAX = (
    Arm(name="jax-fp32", description="float32 throughout, JAX", mode=Mode.FLOAT32, framework=Framework.JAX),
    Arm(name="jax-bf16", description="bfloat16 layers, JAX", mode=Mode.BFLOAT16, framework=Framework.JAX),
    *(
        Arm(name=name, description=f"{text}, JAX", mode=Mode.RECIPE, recipe=recipe, framework=Framework.JAX)
        for name, text, recipe in (
            ("jax-fp8", "FP8 with delayed scaling", delayed_scaling),
            ("jax-fp8-current", "FP8 with current scaling", current_scaling),
            ("jax-mxfp8", "the recipe mxfp8", mxfp8),
        )
    ),
)

_ENGINE = (
    Arm(
        name="engine-manual",
        description="float32, gradients by hand, Octavo's engine",
        mode=Mode.FLOAT32,
        framework=Framework.ENGINE,
        by_hand=True,
    ),
    Arm(
        name="engine-autograd",
        description="float32, gradients by autograd, Octavo's engine",
        mode=Mode.FLOAT32,
        framework=Framework.ENGINE,
    ),
    Arm(
        name="engine-fp8",
        description="FP8 with delayed scaling, Octavo's engine",
        mode=Mode.RECIPE,
        recipe=delayed_scaling,
        framework=Framework.ENGINE,
    ),
)


def _of(recipe: Callable[[], Recipe]) -> Arm:
    """`torch-mxfp8` for `mxfp8`, `torch-bf16-recipe` where the name is taken: trained and tested under that recipe.

    Intel's two methods are of whole networks, and emulated.
    """
    name = f"torch-{recipe.__name__.replace('_', '-')}"
    name += "-recipe" if name in DEFAULT_ARMS else ""
    if recipe in (direct, hybrid):
        text = f"Intel's {recipe.__name__}, emulated: loss scaling, float16 masters"
        return Arm(name=name, description=text, mode=Mode.EMULATED, recipe=recipe)
    return Arm(name=name, description=f"the recipe {recipe.__name__}", mode=Mode.RECIPE, recipe=recipe)


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        arm.name: arm
        for arm in (
            *_FIRST,
            *(_of(make) for make in NAMED.values() if make not in (delayed_scaling, current_scaling)),
            *_JAX,
            *_ENGINE,
        )
    }
)
"""Every arm by name; a new arm is a new row, and a new recipe brings its own."""
