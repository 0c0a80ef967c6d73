"""What an emulated model writes besides products, as a recipe stores it: `octavo::store`.

Operators that multiply no matrices (norms, sums, embeddings) read tensors as they are and write them as the recipe's results are: by
the cell of `output` forward, of `grad_input` or `grad_weight` backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.torch import context
from octavo.torch.emulated import numbers, packed
from octavo.torch.layouts import GRAD_INPUT, as_it_lies, cast_tensor, cells_of, marked
from octavo.torch.ops import is_plain
from octavo.torch.state import gather
from octavo.torch.table import seed_of
from octavo.torch.watching import looking

__all__ = ["UNCAST", "read", "store"]

UNCAST = -1
"""The number of no cell."""

_library = torch.library.Library("octavo", "FRAGMENT")
_library.define(
    "store(Tensor x, Tensor scale, Tensor grad_scale, Tensor grad_history, Tensor draws, str recipe, int cell, int grad_cell, int lane, "
    "bool record) -> (Tensor, Tensor)"
)


def store(site: Any, in_place: bool, x: Tensor, *arguments: Any) -> tuple[Tensor, Any]:
    """x as the recipe stores it, in x's dtype, and its amax, as of `product`; its gradient is stored so too.

    arguments: scale, grad_scale, float32 [1], of delayed scaling; grad_history, draws and recipe as of `octavo.torch.ops.linear`; cell,
    grad_cell, the numbers of the cells that x and its gradient are cast by, `UNCAST` for none; lane, which tells the draws of several
    tensors of a site apart; record.  in_place: x may be written to, as its own result.
    """
    if torch.compiler.is_compiling() or not is_plain(x):
        return torch.ops.octavo.store.default(x, *arguments)  # type: ignore[no-any-return]
    return _Store.apply(x, (site, in_place, *arguments))  # type: ignore[no-any-return, no-untyped-call]


def _stored(
    x: Tensor, recipe: str, cell: int, scale: Tensor, seed: int, lane: int, *, in_place: bool = False
) -> tuple[Tensor, Any]:
    """x cast by a cell, in its own dtype, and its amax."""
    cast = cells_of(recipe).casts[cell] if cell != UNCAST else None
    if cast is None:
        return x, 0.0
    found = cast_tensor(x, cast, as_it_lies(x.dim()), numbers(scale)[0], seed ^ (lane << 56), in_place=in_place)
    return found.values.to(x.dtype), found.amax


def _store_of_tensors(
    x: Tensor,
    scale: Tensor,
    grad_scale: Tensor,
    grad_history: Tensor,
    draws: Tensor,
    recipe: str,
    cell: int,
    grad_cell: int,
    lane: int,
    record: bool,
) -> tuple[Tensor, Tensor]:
    """`octavo::store`: x cast by `cell`, and its amax, float32 [1]."""
    seed = seed_of(draws, cells_of(recipe).recipe)
    y, amax = _stored(x, recipe, cell, scale, seed, lane)
    y = y.clone() if y is x else y
    return y.contiguous(), packed([amax], scale)


@torch.library.register_fake("octavo::store", lib=_library)
def _store_fake(
    x: Tensor,
    scale: Tensor,
    grad_scale: Tensor,
    grad_history: Tensor,
    draws: Tensor,
    recipe: str,
    cell: int,
    grad_cell: int,
    lane: int,
    record: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(1)


class _Store(torch.autograd.Function):
    """The gradient of `octavo::store`, or, where a site is given, all of it without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, others: Any) -> Any:
        ctx.site, in_place, scale, ctx.grad_scale, ctx.grad_history, ctx.draws, ctx.recipe, cell, *rest = others
        ctx.cell, ctx.lane, ctx.record = rest
        ctx.set_materialize_grads(False)
        if ctx.site is None:
            with torch._C._AutoDispatchBelowAutograd():
                y, amax = torch.ops.octavo.store.default(x, *others[2:])
            ctx.mark_non_differentiable(amax)
            return y, amax
        ctx.seed, ctx.look = seed_of(ctx.draws, cells_of(ctx.recipe).recipe), ctx.site.look()
        with looking(ctx.look):
            y, amax = _stored(x, ctx.recipe, cell, scale, ctx.seed, ctx.lane, in_place=in_place)
        if y is not x:
            return y, amax
        if in_place:
            ctx.mark_dirty(x)
            return x, amax
        return x.view_as(x), amax

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *unused: Any) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if grad_output is None or ctx.cell == UNCAST:
            return grad_output, None
        return context.differentiated_once(_gradients, ctx, grad_output)  # type: ignore[return-value]


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
    return _stored_gradient(ctx, grad_output), None


def _stored_gradient(ctx: Any, grad_output: Tensor) -> Tensor:
    """A gradient by its cell; of a sparse one (of an embedding), its values."""
    if grad_output.is_sparse:
        rows = grad_output.coalesce()
        stored = _stored_gradient(ctx, rows.values())
        found: Tensor = torch.sparse_coo_tensor(
            rows.indices(), stored, rows.shape, is_coalesced=True, check_invariants=False
        )
        return found
    grad: Tensor
    amax: Any
    if ctx.site is None:
        scale, lane = ctx.grad_scale, ctx.lane
        settings = ctx.recipe, ctx.cell, UNCAST, lane, False
        grad, amax = torch.ops.octavo.store.default(grad_output, scale, scale, ctx.grad_history, ctx.draws, *settings)
    else:
        with looking(ctx.look):
            grad, amax = _stored(grad_output, ctx.recipe, ctx.cell, ctx.grad_scale, ctx.seed, ctx.lane)
        marked(grad, cells_of(ctx.recipe).casts[ctx.cell])
        ctx.site.took_gradients((0.0, amax, 0.0) if ctx.cell == GRAD_INPUT else (0.0, 0.0, amax))
    if ctx.record and ctx.cell == GRAD_INPUT:
        context.update_after_backward(ctx.site)
        gather(ctx.grad_history, (0.0, amax) if isinstance(amax, float) else torch.cat([torch.zeros_like(amax), amax]))
    return grad


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """What `_stored_gradient` needs, where a hook and no autograd function stores the gradient."""

    site: Any
    look: Any
    grad_scale: Tensor
    grad_history: Tensor
    recipe: str
    cell: int
    lane: int
    seed: int
    record: bool

    def __call__(self, grad_output: Tensor) -> Tensor:
        return context.differentiated_once(_gradients, self, grad_output)[0]  # type: ignore[no-any-return]


def read(site: Any, x: Tensor, *arguments: Any) -> Tensor:
    """x itself, in a view of its own whose gradient is stored; arguments: of `store`, from grad_scale on but for cell.

    A view, and not the result of an autograd function, because x may later be written to in place.
    """
    grad_scale, grad_history, draws, recipe, cell, lane, record = arguments
    if torch.compiler.is_compiling() or not is_plain(x):
        found = torch.ops.octavo.store.default(
            x, grad_scale, grad_scale, grad_history, draws, recipe, UNCAST, cell, lane, record
        )
        return found[0]  # type: ignore[no-any-return]
    view: Tensor = torch.ops.aten.alias.default(x)  # a view whose gradient may be sparse
    hook = _Read(
        site=site,
        look=site.look(),
        grad_scale=grad_scale,
        grad_history=grad_history,
        recipe=recipe,
        cell=cell,
        lane=lane,
        seed=seed_of(draws, cells_of(recipe).recipe),
        record=record,
    )
    view.register_hook(hook)
    return view


def _store_autograd(x: Tensor, *rest: Any) -> Any:
    return _Store.apply(x, (None, False, *rest))  # type: ignore[no-untyped-call]


for _device in ("CPU", "CUDA"):
    _library.impl("store", _store_of_tensors, _device)
_library.impl("store", _store_autograd, "Autograd")
