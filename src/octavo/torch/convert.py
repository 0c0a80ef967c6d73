"""`convert` swaps a model's linear layers for 8-bit ones; `calibrate` fits their scales to data for inference."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from octavo.patterns import exempt_among
from octavo.recipes import Recipe
from octavo.torch import context
from octavo.torch.linear import Linear
from octavo.torch.state import FORWARD

__all__ = ["calibrate", "convert"]

M = TypeVar("M", bound=nn.Module)


def convert(model: M, recipe: Recipe | None = None, exempt: Iterable[str] = ()) -> M:
    """Turn each `nn.Linear` of `model` into an 8-bit `Linear`, in place, and return the model.

    recipe: what the layers run, inside and outside `autocast` (an autocast with a recipe of its own overrides it, one with
    enabled=False turns it off); None leaves them in high precision outside `autocast`.  exempt: qualified names, or patterns with *, ?
    and [], of the layers to leave alone.  Objects, parameters, names, ties and hooks stay; a layer that is 8-bit already gets the recipe.
    Raises ValueError for an exempt name that fits no linear layer.
    """
    context.check_recipe(recipe)
    layers = {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, Linear)}
    spared = exempt_among(layers, exempt)
    for name, layer in layers.items():
        if name in spared:
            continue
        if isinstance(layer, Linear):
            layer.recipe = recipe
        else:
            # Its own seed for stochastic rounding: layers of one shape must not draw alike.
            Linear.adopt(layer, recipe).draws[0] = zlib.crc32(name.encode())
    return model


def calibrate(model: M, batches: Iterable[Any], recipe: Recipe | None = None) -> M:
    """Fit the forward scales of the model's 8-bit layers to `batches`, in one high-precision pass without gradients.

    batches: inputs of the model; of a tuple or list, such as a DataLoader's (inputs, targets), the first element; a dict is passed by
    keyword.  recipe: with delayed scaling (default: each layer's own, else `delayed_scaling()`); it is what the scales are meant for.
    Afterwards the model, in `eval()`, runs 8-bit inference with these scales.  Its training mode is as before.
    Raises ValueError where there is no 8-bit layer, no batch, or a NaN or Inf, naming the tensor.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    if not layers:
        raise ValueError("the model has no 8-bit layer to calibrate; convert(model) first")
    modes = {module: module.training for module in model.modules()}
    count = 0
    try:
        model.eval()
        with torch.no_grad(), context.autocast(enabled=False, calibrating=True, recipe=recipe):
            for batch in batches:
                _run(model, batch)
                count += 1
            _require_finite(layers)
    finally:
        for module, training in modes.items():
            module.training = training
    if count == 0:
        raise ValueError("calibration needs at least one batch; got none")
    return model


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, dict):
        model(**batch)
    else:
        model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _require_finite(layers: dict[str, Linear]) -> None:
    for name, layer in layers.items():
        row: Tensor = layer.amax_history_forward[:1].flatten()
        for tensor, amax in zip(FORWARD, row.tolist(), strict=False):
            if not math.isfinite(amax):
                raise ValueError(
                    f"{name}.{tensor} holds {amax} during calibration; clean the data or the weights first"
                )
