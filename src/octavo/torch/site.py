"""`Site`: one place of an emulated model where tensors are cast, with the state that the recipe keeps for it."""

from __future__ import annotations

import math
import zlib
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.recipes import Recipe
from octavo.torch import context, ops
from octavo.torch.bilinear import Product, spell_product
from octavo.torch.emulated import product
from octavo.torch.layouts import cells_of, marked
from octavo.torch.linear import activation_dtype
from octavo.torch.state import BACKWARD, FORWARD, ScaledLayer
from octavo.torch.stores import UNCAST, store
from octavo.torch.watching import Look

__all__ = ["Owner", "Site"]


class Owner(Protocol):
    """Whom a site tells what it met."""

    def look(self, site: str) -> Look | None:
        """What is to see the tensors of this pass; None where nobody watches."""

    def met(self, site: str, tensor: str, amax: float) -> None:
        """A tensor held Inf or NaN."""


class Site(ScaledLayer):
    """A product or a stored tensor of an emulated model: its scales, its histories, its draws.

    Its gradients and amaxes are those of `octavo.torch.Linear`; names are of the module, and of the function where it calls several.
    """

    def __init__(self, name: str, recipe: Recipe, device: torch.device, owner: Owner) -> None:
        super().__init__()
        self.start_state(recipe, device)
        self.draws[0] = zlib.crc32(name.encode())
        self.name, self.cast_key, self.owner = name, recipe.cast_key, owner

    def look(self) -> Look | None:
        """What is to see the tensors of this pass as they are cast."""
        return self.owner.look(self.name)

    def took_gradients(self, amaxes: tuple[Any, Any]) -> None:
        """Report a gradient that holds Inf or NaN."""
        self._report(BACKWARD, amaxes)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None, training: bool) -> Tensor:
        """`F.linear` of [..., I], [O, I] and [O] or None, by the recipe: [..., O]."""
        record, repeating, scales, draws = self._start_pass(training)
        buffers, features = self._buffers, weight.shape[1]
        output, _, _, facts = ops.linear(
            self,
            False,
            input if input.dim() == 2 else input.reshape(-1, features),
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
        output, facts = product(
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
        y, amax = store(
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
        if cell == UNCAST or torch.compiler.is_compiling():
            return y
        return marked(y, cells_of(self.cast_key).casts[cell])

    def _start_pass(self, training: bool) -> tuple[bool, bool, Tensor, Tensor]:
        """(whether amaxes are recorded, whether this is a recomputation, the forward scales, the draws)."""
        recipe = self.recipe
        assert recipe is not None
        compiling = torch.compiler.is_compiling()
        repeating = not compiling and context.in_backward()
        if not compiling and not repeating:
            self.progress.updates_at_forward = self.progress.updates
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
            if not math.isfinite(amax):
                self.owner.met(self.name, tensor, amax)
