"""`Site`: one place of an emulated model where tensors are cast, with the state that the recipe keeps for it."""

from __future__ import annotations

import math
import zlib
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.recipes import Recipe, TensorSpec
from octavo.rounding import Overflow, Rounding
from octavo.scaling import Unscaled
from octavo.torch import context, ops
from octavo.torch.bilinear import Product, spell_product
from octavo.torch.emulated import product
from octavo.torch.layouts import cells_of, marked
from octavo.torch.linear import activation_dtype
from octavo.torch.state import BACKWARD, FORWARD, ScaledLayer
from octavo.torch.stores import UNCAST, read, store
from octavo.torch.watching import Look

__all__ = ["Owner", "Site"]


class Owner(Protocol):
    """Whom a site tells what it met."""

    global_step: int
    serial: int
    seed: int

    def look(self, site: str) -> Look | None:
        """What is to see the tensors of this pass; None where nobody watches."""

    def met(self, site: str, tensor: str, amax: float) -> None:
        """A tensor held Inf or NaN."""

    def lets_gradients_be_nan(self) -> bool:
        """Whether a gradient that its format cannot hold may be NaN."""


class Site(ScaledLayer):
    """A product or a stored tensor of an emulated model: its scales, its histories, its draws.

    Its gradients and amaxes are those of `octavo.torch.Linear`; names are of the module, and of the function where it calls several.
    """

    def __init__(self, name: str, recipe: Recipe, device: torch.device, owner: Owner) -> None:
        super().__init__()
        self.start_state(recipe, device)
        self.draws[0] = zlib.crc32(name.encode()) ^ (owner.seed * 0x9E3779B1 & 0xFFFFFFFF)
        self.name, self.cast_key, self.owner = name, recipe.cast_key, owner
        self.serial = owner.serial  # ranks may meet sites in different orders
        self._limits = {tensor: _limit(spec) for _, _, tensor, spec in recipe.cells() if spec is not None}
        self._awaited: int | None = None  # the updates before the oldest pass whose backward pass is to come

    def update_backward(self) -> None:
        """As of every layer; the passes before it are done with."""
        self._awaited = None
        super().update_backward()

    def forget_overflow(self) -> None:
        """Drop what a skipped step left in the backward history: Inf there would hold the scale for as long as it is remembered."""
        history = self._buffers["amax_history_backward"]
        if history is not None and history.numel():
            history.masked_fill_(~history.isfinite(), 0.0)

    def look(self) -> Look | None:
        """What is to see the tensors of this pass as they are cast."""
        return self.owner.look(self.name)

    def took_gradients(self, amaxes: tuple[Any, ...]) -> None:
        """Report a gradient that holds Inf or NaN."""
        self._report((*BACKWARD, "grad_weight"), amaxes)

    def refused_gradient(self, error: ValueError) -> None:
        """A format without NaN met one: named, and an error unless a loss scale will skip the step."""
        if not self.owner.lets_gradients_be_nan():
            raise ValueError(f"{self.name}.grad_output at step {self.owner.global_step}: {error}") from None
        self.owner.met(self.name, "grad_output", math.nan)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None, training: bool) -> Tensor:
        """`F.linear` of [..., I], [O, I] and [O] or None, by the recipe: [..., O]."""
        features = weight.shape[1]
        if (
            input.dim() == 0
            or input.shape[-1] != features
            or (bias is not None and bias.numel() not in (1, len(weight)))
        ):
            sizes = list(input.shape), list(weight.shape), None if bias is None else list(bias.shape)
            raise ValueError(
                f"{self.name} multiplies [..., I] by [O, I] and adds [O]; got {sizes[0]}, {sizes[1]} and {sizes[2]}"
            )
        bias = bias if bias is None or bias.shape == weight.shape[:1] else bias.expand(len(weight))
        record, repeating, scales, draws = self._start_pass(training)
        buffers = self._buffers
        output: Tensor
        output, _, _, facts = self._named(
            ops.linear,
            self,
            False,
            input if input.dim() == 2 else input.reshape(math.prod(input.shape[:-1]), features),
            weight,
            bias,
            None,
            None,
            scales,
            buffers["scale_backward"],
            buffers["amax_history_backward"],
            draws,
            self.cast_key,
            activation_dtype(input),
            record,
        )
        self._end_pass(record and not repeating, facts[2:])
        return output if input.dim() == 2 else output.reshape(*input.shape[:-1], weight.shape[0])

    def product(self, kind: Product, left: Tensor, right: Tensor, bias: Tensor | None, training: bool) -> Tensor:
        """`kind.forward` of left, right and bias, by the recipe."""
        record, repeating, scales, draws = self._start_pass(training)
        output: Tensor
        output, facts = self._named(
            product,
            self,
            left,
            right,
            bias,
            scales,
            self._buffers["scale_backward"],
            self._buffers["amax_history_backward"],
            draws,
            self.cast_key,
            spell_product(kind),
            activation_dtype(left),
            record,
        )
        self._end_pass(record and not repeating, facts[2:])
        return output

    def store(
        self, x: Tensor, training: bool, *, cell: int, grad_cell: int, lane: int, in_place: bool = False
    ) -> Tensor:
        """x as the recipe stores it, its gradient too (`octavo.torch.stores.store`); in_place: x's memory is free to take."""
        record, repeating, scales, draws = self._start_pass(training)
        backward = self._buffers["scale_backward"]
        assert backward is not None
        y, amax = self._named(
            store,
            self,
            in_place,
            x,
            scales[2:],
            backward[1:],
            self._buffers["amax_history_backward"],
            draws,
            self.cast_key,
            cell,
            grad_cell,
            lane,
            record,
        )
        amaxes = (0.0, 0.0, amax) if isinstance(amax, float) else torch.cat([amax.new_zeros(2), amax])
        self._end_pass(record and not repeating, amaxes)
        stored: Tensor = y
        if cell == UNCAST or torch.compiler.is_compiling():
            return stored
        return marked(stored, cells_of(self.cast_key).casts[cell])

    def read(self, x: Tensor, training: bool, *, cell: int, lane: int) -> Tensor:
        """x, whose gradient the recipe stores by that cell."""
        record, _, _, draws = self._start_pass(training)
        backward, history = self._buffers["scale_backward"], self._buffers["amax_history_backward"]
        assert backward is not None
        return read(self, x, backward[1:], history, draws, self.cast_key, cell, lane, record)

    def _named(self, operator: Any, *arguments: Any) -> Any:
        """What the operator returns; what it refuses is said of this site and step."""
        if torch.compiler.is_compiling():
            return operator(*arguments)
        try:
            return operator(*arguments)
        except ValueError as error:  # such as NaN for a format that has none
            for tensor, x in zip(FORWARD, (x for x in arguments[1:] if isinstance(x, Tensor)), strict=False):
                if tensor != "output" and not torch.isfinite(x).all():
                    self.owner.met(self.name, tensor, math.nan if x.isnan().any() else math.inf)
            raise ValueError(f"{self.name} at step {self.owner.global_step}: {error}") from None

    def _start_pass(self, training: bool) -> tuple[bool, bool, Tensor, Tensor]:
        """(whether amaxes are recorded, whether this is a recomputation, the forward scales, the draws)."""
        recipe = self.recipe
        assert recipe is not None
        compiling = torch.compiler.is_compiling()
        repeating = not compiling and context.in_backward()
        if not compiling and not repeating:
            self.progress.updates_at_forward = self.progress.updates
            if self._awaited is None:
                self._awaited = self.progress.updates
        elif repeating and self._awaited is not None and self.progress.updates > self._awaited + 1:
            raise RuntimeError(
                f"{self.name} is recomputed after its scales moved more than once; run the backward pass of a checkpointed forward pass "
                "before the next one"
            )
        grads = torch.is_grad_enabled() or (not compiling and context.inside_function())
        record = recipe.delayed is not None and training and grads
        draws = self._buffers["draws"]
        assert draws is not None
        if recipe.stochastic:
            # In eval mode too, where gradients are wanted: else a frozen layer would draw alike at each step.
            draws = self.next_draws(advance=grads and not repeating)
        return record, repeating, self.scales_for(repeating=repeating), draws

    def _end_pass(self, gather: bool, amaxes: Tensor | tuple[float, ...]) -> None:
        if gather:
            self.gather_forward(amaxes)
            if torch.compiler.is_compiling():
                self.update_forward_in_place()
        self._report(FORWARD, amaxes)

    def _report(self, tensors: tuple[str, ...], amaxes: Any) -> None:
        if isinstance(amaxes, Tensor):  # reading it would wait for the device
            return
        for tensor, amax in zip(tensors, amaxes, strict=True):
            if not amax < self._limits.get(tensor, math.inf):  # NaN is not, either
                self.owner.met(self.name, tensor, amax if math.isnan(amax) else math.inf)


def _limit(spec: TensorSpec) -> float:
    """The smallest amax that becomes Inf or NaN under a cast without scale, or is so before: Inf under the others."""
    keeps = spec.overflow is not Overflow.NONE or not isinstance(spec.scaling, Unscaled) or spec.format.bits > 8
    if keeps:
        return math.inf
    last = 2.0 ** (spec.format.emax - spec.format.mantissa_bits)
    return spec.format.max + (last / 2 if spec.rounding is Rounding.NEAREST_EVEN else last / 2**20)
