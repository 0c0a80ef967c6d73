"""`autocast`: in which recipe the layers below it run, and when their scales move.

The order of updates is Transformer Engine's: forward scales on leaving the outermost enabled `autocast` while gradients are enabled;
backward scales at the end of the backward pass.  Evaluation (`eval()`, `no_grad`) moves nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed

from octavo.recipes import Recipe

__all__ = [
    "Frame",
    "agree",
    "autocast",
    "check_recipe",
    "current",
    "differentiated_once",
    "fp8_autocast",
    "has_ranks",
    "in_backward",
    "inside_function",
    "register",
    "settle",
    "unregister",
    "update_after_backward",
    "update_alone",
    "update_forward",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One entered `autocast`."""

    enabled: bool
    calibrating: bool
    recipe: Recipe | None
    group: Any


class Scaled(Protocol):
    """A layer with scales to update; `octavo.torch.state.ScaledLayer` is the one there is."""

    serial: int
    name: str

    def rows_to_reduce(self, *, backward: bool) -> list[torch.Tensor]: ...
    def update_forward(self) -> None: ...
    def update_backward(self) -> None: ...
    def forget_forward(self) -> None: ...


class _Active(threading.local):
    """The innermost `autocast` of this thread.  (A ContextVar would say so too, but torch.compile cannot read one.)"""

    frame: Frame | None = None
    updating: int = -1
    """The backward pass at whose end the scales will move."""
    took_part: dict[Scaled, None] | None = None
    """The layers that took part in it; None where they are not known, in compiled code."""
    group: Any = None
    """The process group of the last `autocast` left, for the backward pass that follows it."""
    held: bool = False
    """Whether a backward pass ended inside the block that is still open: its scales move when that is left."""


@dataclass(slots=True)
class _Between:
    """What ranks have put off, so that one collective a step is enough and overlaps with what follows the backward pass.

    Not of a thread: a backward pass on a GPU ends in a thread of its own.
    """

    forward: tuple[list[Scaled], Any] | None = None
    """Layers whose forward scales are yet to move, and their process group."""
    agreeing: _Agreement | None = None
    """The collective that is under way."""


@dataclass(slots=True)
class _Agreement:
    """The maxima of `rows` over ranks, in `together` once `work` is done; then the layers' scales move."""

    work: Any
    together: torch.Tensor
    rows: list[torch.Tensor]
    forward: list[Scaled]
    backward: list[Scaled]


_active = _Active()
_between = _Between()
_layers: weakref.WeakSet[Scaled] = weakref.WeakSet()


def register(layer: Scaled) -> None:
    """Have the layer's scales updated for as long as it lives.  A layer that a step did not use holds no new amax and stays as it is."""
    _layers.add(layer)


def agree(names: Iterable[str], *, anything_new: bool, device: torch.device) -> set[str]:
    """The names that any rank has and this one has not, or none where no rank has anything new; every rank has to ask."""
    if not has_ranks():
        return set()
    distributed = torch.distributed
    new = torch.tensor([float(anything_new)], device=device)
    distributed.all_reduce(new, op=distributed.ReduceOp.MAX)
    if not new.item():
        return set()
    own = set(names)
    told: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, sorted(own))
    return {name for rank in told for name in rank} - own


def unregister(layer: Scaled) -> None:
    """Leave the layer out of updates, and of what ranks share, from now on."""
    _layers.discard(layer)


def check_recipe(recipe: Any) -> None:
    """Raise ValueError for what is neither a Recipe nor None."""
    if recipe is not None and not isinstance(recipe, Recipe):
        raise ValueError(f"recipe is a Recipe such as octavo.recipes.delayed_scaling(); got {type(recipe).__name__}")


def current() -> Frame | None:
    """The innermost `autocast` of this thread."""
    return _active.frame


def in_backward() -> bool:
    """Whether a backward pass is running: a forward pass inside it is a recomputation (activation checkpointing)."""
    return bool(torch._C._current_graph_task_id() != -1)


def inside_function() -> bool:
    """Whether a torch.autograd.Function's forward is running: there gradients are off, yet a backward pass will come."""
    # Function.forward turns forward-mode gradients off too, which no_grad does not.
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


class autocast:
    """Run the Octavo layers of the block in 8 bits.

    enabled: False turns 8 bits off inside; calibrating: gather amaxes without casting (with enabled=False), so that the scales fit the
    data when the block ends; recipe: for all layers inside; None leaves each its own, or `delayed_scaling()` where it has none;
    amax_reduction_group: the process group whose ranks share amaxes (default: all ranks, where there are several).
    May be nested and entered again; scales move on leaving the outermost enabled block, and those of backward passes at their end.  Passes
    forward and backward inside one block, such as those of micro-batches, count as one: all scales then move once, when it is left.
    """

    def __init__(
        self,
        enabled: bool = True,
        calibrating: bool = False,
        recipe: Recipe | None = None,
        amax_reduction_group: Any = None,
    ) -> None:
        check_recipe(recipe)
        self.frame = Frame(enabled=enabled, calibrating=calibrating, recipe=recipe, group=amax_reduction_group)
        self.outer: list[Frame | None] = []

    def __enter__(self) -> None:
        if _between.forward is not None or _between.agreeing is not None:
            settle()
        self.outer.append(_active.frame)
        _active.frame = self.frame

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.frame = outer = self.outer.pop()
        outermost = outer is None or not (outer.enabled or outer.calibrating)
        if outermost and (self.frame.enabled or self.frame.calibrating):
            _leave(self.frame, keep=kind is None and (torch.is_grad_enabled() or self.frame.calibrating))


def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: Any = None,
) -> autocast:
    """`autocast` with the argument names it had earlier in Transformer Engine."""
    return autocast(enabled, calibrating, fp8_recipe, fp8_group)


@torch.compiler.disable
def _leave(frame: Frame, *, keep: bool) -> None:
    if keep:
        _active.group = frame.group
    held, _active.held = _active.held, False
    if keep and held:
        settle()
        _between.forward = (list(_layers), frame.group)
        _finish()
    else:
        update_forward(_layers, keep=keep, group=frame.group)


def differentiated_once(gradients_of: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
    """`gradients_of(*arguments)`; where the backward pass is itself recorded (`create_graph=True`), differentiating them is refused.

    `torch.autograd.function.once_differentiable` refuses only where the incoming gradient is recorded, too.
    """
    if not torch.is_grad_enabled():
        return gradients_of(*arguments)
    with torch.no_grad():
        gradients = gradients_of(*arguments)
    tensors = [gradient for gradient in gradients if isinstance(gradient, torch.Tensor)]
    refusal = torch._C._functions.DelayedError(
        b"trying to differentiate twice: 8-bit gradients are once_differentiable, as casts have no gradient of their own",
        len(tensors),
    )
    found = refusal(*(gradient.detach().requires_grad_() for gradient in tensors))
    refused = iter(found if isinstance(found, (tuple, list)) else (found,))
    return tuple(next(refused) if isinstance(gradient, torch.Tensor) else gradient for gradient in gradients)


def update_forward(layers: Iterable[Scaled], *, keep: bool, group: Any = None) -> None:
    """Update the forward scales of layers whose pass has ended; keep: whether it was one of training, else its amaxes are dropped.

    Where there are other ranks, the backward pass that follows does it, or whatever comes before it: one collective serves both, and scales
    have moved when the layers run again or their state is read (`state_dict`).
    """
    if not keep:
        for layer in layers:
            layer.forget_forward()
    elif has_ranks(group):
        settle()
        _between.forward = (list(layers), group)
    else:
        for layer in layers:
            layer.update_forward()


@torch.compiler.disable
def settle() -> None:
    """Move the scales that ranks have put off; nothing, of a process alone."""
    _conclude()
    forward, _between.forward = _between.forward, None
    if forward is not None:
        layers, group = forward
        _reduce(_rows(layers, backward=False, group=group), group)
        _move(layers, [])


def _conclude() -> None:
    """Wait for the collective that is under way, and move the scales that it was for."""
    agreeing, _between.agreeing = _between.agreeing, None
    if agreeing is not None:
        agreeing.work.wait()
        _hand_out(agreeing.together, agreeing.rows)
        _move(agreeing.forward, agreeing.backward)


def update_alone(layer: Scaled) -> None:
    """Update the forward scales of one layer that ran outside any `autocast`."""
    settle()
    _reduce(_rows([layer], backward=False, group=None), None)
    layer.update_forward()


def update_after_backward(layer: Scaled | None) -> None:
    """Have the backward scales of `layer`, of any layer where it is None, updated once, when the running backward pass ends."""
    task = torch._C._current_graph_task_id()
    if task == -1:
        return
    if _active.updating != task:
        _active.updating = task
        if not _active.held:
            _active.took_part = {}
        torch.autograd.Variable._execution_engine.queue_callback(_end_backward)
    if layer is None:
        _active.took_part = None
    elif _active.took_part is not None:
        _active.took_part[layer] = None


def _end_backward() -> None:
    """Move the backward scales, unless the passes of micro-batches, in one block, are to count as one."""
    frame = _active.frame
    if frame is not None and frame.enabled:
        _active.held = True
    else:
        _finish()


def _finish() -> None:
    """Move forward scales that were put off and backward scales, after one collective for both."""
    _conclude()
    group = _active.group
    if _between.forward is not None and _between.forward[1] is not group:
        settle()
    forward, _between.forward = _between.forward, None
    before = forward[0] if forward is not None else []
    took_part, _active.took_part = _active.took_part, None
    after = list(_layers) if took_part is None or has_ranks(group) else list(took_part)
    rows = [*_rows(before, backward=False, group=group), *_rows(_layers, backward=True, group=group)]
    if not rows:
        _move(before, after)
        return
    distributed = torch.distributed
    together = torch.cat(rows)
    work = distributed.all_reduce(together, op=distributed.ReduceOp.MAX, group=group, async_op=True)
    _between.agreeing = _Agreement(work, together, rows, before, after)


def _move(forward: Iterable[Scaled], backward: Iterable[Scaled]) -> None:
    for layer in forward:
        layer.update_forward()
    for layer in backward:
        layer.update_backward()


def has_ranks(group: Any = None) -> bool:
    """Whether other processes of the group train too."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1


def _rows(layers: Iterable[Scaled], *, backward: bool, group: Any) -> list[torch.Tensor]:
    """The new amaxes that ranks share, in the order the layers were made, which is the same on every rank; none of a rank alone."""
    if not has_ranks(group):
        return []
    in_order = sorted(layers, key=lambda layer: (layer.serial, layer.name))
    return [row for layer in in_order for row in layer.rows_to_reduce(backward=backward)]


def _reduce(rows: list[torch.Tensor], group: Any) -> None:
    """The maximum over all ranks, in place, in one collective."""
    if not rows:
        return
    together = torch.cat(rows)
    torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX, group=group)
    _hand_out(together, rows)


def _hand_out(together: torch.Tensor, rows: list[torch.Tensor]) -> None:
    for row, reduced in zip(rows, together.split([row.numel() for row in rows]), strict=True):
        row.copy_(reduced)
