"""`Linear`: torch's own, whose three GEMMs run as a recipe says."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.recipes import Recipe, delayed_scaling
from octavo.torch import context, ops
from octavo.torch.operands import KINDS
from octavo.torch.state import ScaledLayer

__all__ = ["DEFAULT_RECIPE", "Linear", "activation_dtype"]

DEFAULT_RECIPE = delayed_scaling()
"""What an enabled `autocast` runs where neither it nor the layer names a recipe."""


class Linear(nn.Linear, ScaledLayer):
    """`torch.nn.Linear` in 8 bits: `y = x @ weight.T + bias` with the operands of its three GEMMs cast by a recipe.

    input: [..., in_features], any number of leading dimensions, any sizes, 0 among them; float32, bfloat16, float16 or float64.
    The output has torch.autocast's dtype where that is on, else the input's; input and weight are cast from their own dtypes.
    In 8 bits inside an enabled `autocast` and, for a layer with a recipe of its own (see `convert`), outside any; else this is
    `torch.nn.Linear`.  Parameters keep their dtype; grad_bias is the sum of the uncast grad_output.
    NaN and Inf propagate, into the result and into amax, and leave delayed scales as they were.
    Source: the order of operations of Transformer Engine's Linear; see `docs/numerics.md`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._start(recipe)

    @classmethod
    def adopt(cls, module: nn.Linear, recipe: Recipe | None) -> Linear:
        """Turn a torch Linear into this class where it stands: the same object, parameters, hooks and name."""
        module.__class__ = cls
        assert isinstance(module, cls)
        module._start(recipe)
        return module

    def _start(self, recipe: Recipe | None) -> None:
        self.start_state(recipe, self.weight.device)
        self._kept_weight: tuple[Tensor | None, Tensor | None] | None = None

    def forward(self, input: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        """The layer's output, [..., out_features].

        is_first_microbatch: None casts the weight at each call; True casts it and keeps the result; False uses what was kept, and
        leaves the weight's scale at rest.
        """
        frame = context.current()
        compiling = torch.compiler.is_compiling()
        repeating = not compiling and context.in_backward()
        progress = self.progress
        recipe = progress.recipe if repeating else self._recipe_in(frame)
        if compiling:
            if self.training:  # an exported, evaluated model has no side effects
                progress.recipe = recipe
        elif not repeating:
            progress.recipe, progress.updates_at_forward = recipe, progress.updates
        if recipe is None:
            if frame is not None and frame.calibrating:
                self._calibrate(input, frame.recipe or self.recipe or DEFAULT_RECIPE)
            return F.linear(input, self.weight, self.bias)
        self._check(input)
        delayed = recipe.delayed
        grads = torch.is_grad_enabled() or (not compiling and context.inside_function())
        record = delayed is not None and self.training and grads
        if delayed is not None and record and (compiling or progress.steps != delayed.history):
            self.resize_histories(delayed.history)
        record_draws = self.training and grads and not repeating
        buffers = self._buffers  # looked up as attributes they would cost a small layer a tenth of its time

        output, _, operand, facts = ops.linear(
            self,
            is_first_microbatch is True,
            input if input.dim() == 2 else input.reshape(-1, self.in_features),
            self.weight,
            self.bias,
            *self._kept(is_first_microbatch),
            self.scales_for(repeating=repeating),
            buffers["scale_backward"],
            buffers["amax_history_backward"],
            self.next_draws(advance=record_draws) if recipe.stochastic else buffers["draws"],
            recipe.cast_key,
            activation_dtype(input),
            record,
        )
        if is_first_microbatch:
            # A weight with scales of rows or blocks beside its values, or uncast, is cast anew each time: the same codes.
            cast_alone = operand is not None and operand.numel() == self.weight.numel()
            self._kept_weight = _keep(operand, facts) if cast_alone else (None, None)
        if record and not repeating:
            if frame is None and not compiling:
                self.step_alone(facts[2:])
            else:
                self.gather_forward(facts[2:])
                if frame is None:
                    self.update_forward_in_place()
        return output if input.dim() == 2 else output.reshape(*input.shape[:-1], self.out_features)

    @property
    def activation_bytes(self) -> tuple[int, int]:
        """(held, input): bytes that the last forward pass holds of its input for the backward pass, and bytes of that input.

        Eager only.  Inputs of `octavo.torch.table.PACK` elements and more, and all under recipes with scales of blocks, are held in
        codes with their scales; smaller ones as bfloat16 operands where the processor multiplies those.
        """
        return self.progress.held

    def extra_repr(self) -> str:
        recipe = "" if self.recipe is None else f", recipe={self.recipe.name}"
        return super().extra_repr() + recipe

    def _recipe_in(self, frame: context.Frame | None) -> Recipe | None:
        """The recipe in force: the autocast's, else the layer's own; None for high precision."""
        if frame is None:
            return self.recipe
        if not frame.enabled:
            return None
        return frame.recipe or self.recipe or DEFAULT_RECIPE

    def _check(self, input: Tensor) -> None:
        if input.dtype not in KINDS:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in KINDS)
            raise ValueError(f"Linear takes {names}; got {input.dtype}: convert it first (input.float())")
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"Linear({self.in_features}, {self.out_features}) takes [..., {self.in_features}]; got {list(input.shape)}: "
                "reshape the input so that its last dimension is in_features"
            )

    def _kept(self, is_first_microbatch: bool | None) -> tuple[Tensor | None, Tensor | None]:
        if is_first_microbatch is not False:
            return None, None
        if self._kept_weight is None:
            raise ValueError(
                "is_first_microbatch=False uses the weight that True kept, and no call with True came before"
            )
        return self._kept_weight

    def _calibrate(self, input: Tensor, recipe: Recipe) -> None:
        """Gather the amaxes of the tensors that `recipe` would cast."""
        if recipe.delayed is None:
            raise ValueError(
                f"calibration fills the scales of delayed scaling, and {recipe.name} keeps none: evaluate with it directly"
            )
        self._check(input)
        self.progress.recipe = recipe
        self.resize_histories(recipe.delayed.history)
        with torch.no_grad():
            peaks = [
                x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
                for x in (input, self.weight)
            ]
            self.gather_forward(torch.stack([*peaks, torch.zeros_like(peaks[0])]))


def _keep(operand: Tensor | None, facts: Tensor | tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """A weight operand and the factor that undoes its scale, for later micro-batches."""
    assert operand is not None
    factor = facts[1:2] if isinstance(facts, Tensor) else torch.tensor(facts[1:2])
    return operand.detach(), factor.detach()


def activation_dtype(input: Tensor) -> torch.dtype:
    """The dtype that a layer computes in: torch.autocast's where that is on, else the input's."""
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
