"""What `emulate` is asked for: which modules, in which recipe, with which optimizer and loss scale."""

from __future__ import annotations

import torch
from torch import nn

from octavo.recipes import Gemm, Recipe
from octavo.table import TensorSpec, Transform
from octavo.torch.loss_scaling import LossScaler

__all__ = ["check_optimizer", "output_uncast", "scaler_of"]


def output_uncast(recipe: Recipe) -> Recipe:
    """The recipe with neither output nor grad_output cast."""

    def bare(row: Gemm) -> Gemm:
        # Both operands of a GEMM have a transform or neither.
        right = row.right
        if right is not None and right.transform is not Transform.NONE:
            right = TensorSpec(right.format, right.scaling, right.rounding, right.overflow)
        return Gemm(left=None, right=right, result=row.result, accumulator=row.accumulator)

    output = Gemm(left=recipe.output.left, right=recipe.output.right, accumulator=recipe.output.accumulator)
    return Recipe(
        name=f"{recipe.name}, output fused",
        output=output,
        grad_input=bare(recipe.grad_input),
        grad_weight=bare(recipe.grad_weight),
    )


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for an optimizer that holds parameters of other models."""
    own = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in own for parameter in held)
    if foreign:
        raise ValueError(
            f"the optimizer holds {foreign} of {len(held)} parameters that are not of this model; build it from model.parameters() after "
            "the model is in place"
        )


def scaler_of(loss_scale: LossScaler | float | str | None, model: nn.Module) -> LossScaler | None:
    """The loss scale that is asked for, on the model's device."""
    if loss_scale is None or isinstance(loss_scale, LossScaler):
        return loss_scale
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    if loss_scale == "dynamic":
        return LossScaler(device)
    if isinstance(loss_scale, str):
        raise ValueError(f'loss_scale is "dynamic", a number or a LossScaler; got {loss_scale!r}')
    return LossScaler(device, start=float(loss_scale), dynamic=False)
