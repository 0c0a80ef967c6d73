"""The scales and amax histories that a layer keeps for delayed scaling, as buffers of the layer."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from octavo.kernels import scales
from octavo.recipes import Recipe
from octavo.scaling import AmaxAlgorithm, Delayed, roll_history
from octavo.torch import context
from octavo.torch.watching import Look

__all__ = ["BACKWARD", "FORWARD", "ScaledLayer", "next_serial"]

FORWARD = ("input", "weight", "output")
"""The tensors that the columns of the forward scales and histories stand for."""
BACKWARD = ("grad_output", "grad_input")
"""The same for the backward ones."""


@dataclass(slots=True)
class Progress:
    """What a layer remembers of its passes, besides tensors."""

    recipe: Recipe | None
    """The recipe of the last forward pass."""
    updates: int = 0
    """How often the forward scales were updated."""
    updates_at_forward: int = 0
    """`updates` at the last forward pass."""
    steps: int | None = None
    """How long both histories are, where that is known."""
    held: tuple[int, int] = (0, 0)
    """Bytes that the last pass held of its input for the backward pass, and bytes of that input."""
    gathered: bool = False
    """Whether a training pass wrote forward amaxes since the last update."""


_PERSISTENT = ("scale_forward", "amax_history_forward", "scale_backward", "amax_history_backward")
_serial = itertools.count()


def next_serial() -> int:
    """A number for the next layer: ranks that make layers in one order number them alike."""
    return next(_serial)


def gather(history: Tensor, amaxes: Tensor | tuple[float, ...]) -> None:
    """Take `amaxes`, one a tensor, into row 0 of a history, in place; NaN stays."""
    if isinstance(amaxes, Tensor):
        row = history[0]
        torch.maximum(row, amaxes, out=row)
    else:  # the same on the memory itself: eager CPU layers have floats, and torch's dispatch would cost more than the work
        scales.gather_amax(history.data_ptr(), amaxes)


class ScaledLayer(nn.Module):
    """A layer with delayed-scaling state.

    Invariants: `scale_*` float32 [tensors], positive and finite, ones at first; `amax_history_*` float32 [steps, tensors], row 0 gathers
    until the next update and is zero after it, the last row is the newest; steps is 0 until a recipe with delayed scaling asks for
    more.  Only training moves any of it.  The dtype stays float32 whatever the layer is converted to.
    """

    scale_forward: Tensor
    amax_history_forward: Tensor
    scale_backward: Tensor
    amax_history_backward: Tensor
    scale_forward_before: Tensor
    draws: Tensor

    def start_state(self, recipe: Recipe | None, device: torch.device) -> None:
        """Make the buffers and have `autocast` update them; `recipe` is the layer's own, where it has one."""
        context.check_recipe(recipe)
        self.recipe = recipe
        self.progress = Progress(recipe)
        for name, tensors in (("forward", FORWARD), ("backward", BACKWARD)):
            self.register_buffer(f"scale_{name}", torch.ones(len(tensors), device=device))
            self.register_buffer(f"amax_history_{name}", torch.zeros(0, len(tensors), device=device))
        self.register_buffer("draws", torch.tensor([0, 0], device=device))
        # What scale_forward was before its last update: a recomputation has to cast as the pass that it repeats did.
        self.register_buffer("scale_forward_before", torch.ones(len(FORWARD), device=device), persistent=False)
        if recipe is not None and recipe.delayed is not None:
            self.resize_histories(recipe.delayed.history)
        self._join()

    name = ""
    """Tells layers of one serial apart."""

    def _join(self) -> None:
        self.serial = next_serial()
        context.register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._join()

    # While torch.compile traces, this runs on the layer itself, so that the traced graph meets buffers of their final size.
    @torch.compiler.assume_constant_result
    def resize_histories(self, steps: int) -> None:
        """Have the histories remember `steps` steps, keeping the newest of what they hold."""
        for name in ("amax_history_forward", "amax_history_backward"):
            old = self._buffers[name]
            assert old is not None
            if old.shape[0] == steps:
                continue
            new = old.new_zeros(steps, old.shape[1])
            kept = min(old.shape[0], steps) - 1
            if kept > 0:
                new[-kept:] = old[-kept:]
            new[: min(1, old.shape[0])] = old[:1]
            setattr(self, name, new)
        self.progress.steps = steps

    def next_draws(self, *, advance: bool) -> Tensor:
        """The seed and step of stochastic rounding, int64 [2]; advance: a training pass, which takes a step of its own."""
        draws = self._buffers["draws"]
        assert draws is not None
        if advance and draws.device.type == "cpu" and not torch.compiler.is_compiling():
            draws.numpy()[1] += 1  # the dispatcher would cost more than a small layer's casts
        elif advance:
            with torch.no_grad():
                draws[1] += 1
        return draws.clone()

    def look(self) -> Look | None:
        """What is to see the tensors of this pass as they are cast; nothing, of a layer that nobody watches."""
        return None

    def took_gradients(self, amaxes: tuple[Any, ...]) -> None:
        """Called in eager CPU backward passes with the amaxes of grad_output, grad_input and grad_weight."""

    def refused_gradient(self, error: ValueError) -> None:
        """Called where a gradient cannot be cast: raises, or lets it be NaN."""
        raise error

    def gather_forward(self, amaxes: Tensor | tuple[float, ...]) -> None:
        """Take the amaxes of a forward pass, one for each of `FORWARD`, into row 0."""
        gather(self.amax_history_forward, amaxes)
        self.progress.gathered = True

    def scales_for(self, *, repeating: bool) -> Tensor:
        """The forward scales; for a recomputation, those of the pass that it repeats."""
        if not repeating or self.progress.updates == self.progress.updates_at_forward:
            return self.scale_forward
        if self.progress.updates == self.progress.updates_at_forward + 1:
            return self.scale_forward_before
        raise RuntimeError(
            "a checkpointed layer is recomputed after its scales moved twice; run the backward pass of one autocast block "
            "before leaving the next"
        )

    def _delayed(self) -> Delayed | None:
        recipe = self.progress.recipe
        return recipe.delayed if recipe is not None and self.amax_history_forward.shape[0] else None

    def rows_to_reduce(self, *, backward: bool) -> list[Tensor]:
        """Row 0 of the forward or backward history, where ranks share it; it will hold what other ranks gathered, too."""
        scaling = self._delayed()
        if scaling is None or not scaling.reduce:
            return []
        self.progress.gathered = self.progress.gathered or not backward
        return [(self.amax_history_backward if backward else self.amax_history_forward)[0]]

    def forget_forward(self) -> None:
        """Drop the amaxes gathered since the last update: they were of no training step."""
        if self.progress.gathered:
            self.amax_history_forward[:1].zero_()
            self.progress.gathered = False

    def update_forward(self, amaxes: tuple[float, ...] = ()) -> None:
        """Roll the forward history and move the forward scales, as `octavo.scaling.roll_history` defines; amaxes: yet to be gathered."""
        progress = self.progress
        if not progress.gathered or progress.recipe is None or progress.recipe.delayed is None:
            return
        # The two buffers change places: whoever holds the old scales (a recomputation, a compiled graph) keeps them unchanged.
        buffers = self._buffers
        before, after = buffers["scale_forward"], buffers["scale_forward_before"]
        buffers["scale_forward"], buffers["scale_forward_before"] = after, before
        progress.updates += 1
        progress.gathered = False
        _roll(buffers["amax_history_forward"], before, after, progress.recipe, False, amaxes)

    def update_backward(self) -> None:
        """Roll the backward history and move the backward scales, in the same way, unless every new amax is zero."""
        recipe, buffers = self.progress.recipe, self._buffers
        history, scale = buffers["amax_history_backward"], buffers["scale_backward"]
        if recipe is None or recipe.delayed is None or history is None or not history.shape[0]:
            return
        if isinstance(recipe.delayed.algorithm, AmaxAlgorithm) or history[0].any():
            _roll(history, scale, scale, recipe, True)

    def step_alone(self, amaxes: Tensor | tuple[float, ...]) -> None:
        """`gather_forward` and `update_forward` of one eager call that is a block of its own, where possible as one."""
        if isinstance(amaxes, Tensor) or context.has_ranks():
            self.gather_forward(amaxes)
            context.update_alone(self)
            return
        self.progress.gathered = True
        self.update_forward(amaxes)

    def update_forward_in_place(self) -> None:
        """`update_forward` for one call that is a block of its own, as torch.compile can trace it."""
        scaling = self._delayed()
        assert scaling is not None
        assert self.progress.recipe is not None
        maximum = torch.tensor(_maxima(self.progress.recipe, False), device=self.scale_forward.device)
        history, scale = roll_history(self.amax_history_forward, self.scale_forward, maximum, scaling)
        self.amax_history_forward.copy_(history)
        self.scale_forward.copy_(scale)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        names = (*_PERSISTENT, "scale_forward_before")
        before = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in names:
            after = getattr(self, name)
            if after.dtype != torch.float32:
                setattr(self, name, before[name].to(after.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        context.settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As torch's, but state is taken in whatever length it comes, and fresh state stands in for what does not come."""
        context.settle()
        self.progress.steps = None
        with torch.no_grad():
            for name in _PERSISTENT:
                own = getattr(self, name)
                value = state_dict.get(prefix + name)
                if value is None:
                    fresh = torch.ones_like(own) if name.startswith("scale") else torch.zeros_like(own)
                    state_dict[prefix + name] = fresh
                elif (
                    value.dim() == own.dim() == 2 and value.shape[0] != own.shape[0] and value.shape[1] == own.shape[1]
                ):
                    setattr(self, name, torch.empty_like(value, dtype=torch.float32, device=own.device))
        state_dict.setdefault(prefix + "draws", torch.zeros_like(self.draws))
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]


def _roll(
    history: Tensor | None,
    before: Tensor | None,
    scale: Tensor | None,
    recipe: Recipe,
    backward: bool,
    amaxes: tuple[float, ...] = (),
) -> None:
    """history and scale, in place, from history and the scales before, once amaxes are gathered."""
    assert history is not None
    assert before is not None
    assert scale is not None
    rule = _rule(recipe, backward)
    if rule.compiled and history.device.type == "cpu":
        scales.roll_history_at(
            history.data_ptr(),
            history.shape[0],
            len(rule.maxima),
            before.data_ptr(),
            scale.data_ptr(),
            rule.address,
            rule.margin,
            rule.most_recent,
            *((amaxes,) if amaxes else ()),
        )
        return
    if amaxes:
        gather(history, amaxes if history.device.type == "cpu" else torch.tensor(amaxes, device=history.device))
    with torch.no_grad():
        maxima = torch.from_numpy(rule.maxima).to(history.device)
        rolled, moved = roll_history(history, before, maxima, rule.scaling)
        history.copy_(rolled)
        scale.copy_(moved)


class _Rule(NamedTuple):
    """How the scales of one direction move under a recipe, ready for the compiled function."""

    scaling: Delayed
    maxima: np.ndarray[Any, np.dtype[np.float32]]
    address: int
    margin: float
    most_recent: bool
    compiled: bool


@functools.lru_cache(maxsize=256)
def _rule(recipe: Recipe, backward: bool) -> _Rule:
    scaling, maxima = recipe.delayed, np.array(_maxima(recipe, backward), np.float32)
    assert scaling is not None
    named = isinstance(scaling.algorithm, AmaxAlgorithm)
    most_recent = scaling.algorithm is AmaxAlgorithm.MOST_RECENT
    return _Rule(scaling, maxima, maxima.ctypes.data, 2.0**-scaling.margin, most_recent, named)


def _maxima(recipe: Recipe, backward: bool) -> list[float]:
    """format.max of each column's tensor; 1 for a tensor that is not cast, whose history stays empty."""
    return [recipe.maxima.get(tensor, 1.0) for tensor in (BACKWARD if backward else FORWARD)]
