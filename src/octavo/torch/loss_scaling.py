"""Loss scaling: the loss is multiplied by a scale that lifts small gradients into the range of a narrow format (Micikevicius et al.,
arXiv 1710.03740).

`torch.amp.GradScaler` scales, unscales, looks for Inf and NaN and counts; here are the ceiling, the floor, and the report of a skip.
A recipe whose casts saturate shows no overflow, so that its scale grows to the ceiling; one that keeps Inf, as `hybrid` and `direct` do,
has the scale back off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from octavo.rounding import checked_counter

__all__ = ["PATIENCE", "LossScaleError", "LossScaler"]

PATIENCE = 100
"""Skips in a row after which a fixed scale is given up."""
_STATE = ("scale", "clean_steps", "skipped", "skipped_in_a_row")


class LossScaleError(ValueError):
    """Gradients overflow, and a smaller scale is no remedy.  Weights and optimizer state are as they were before the step."""


class LossScaler:
    """A loss scale, and optimizer steps that are skipped where gradients overflow.

    scaler = LossScaler()
    scaler.scale(loss).backward()  # once, or for each part of an accumulated batch
    scaler.unscale(optimizer)  # where gradients are clipped or looked at; else `step` does it
    scaler.step(optimizer, step_number)

    device: "cpu" or "cuda", where the scale lives.  start: the first scale.  Gradients with Inf or NaN halve it, down to `floor`, and the
    step is skipped; after `growth_interval` clean steps in a row it doubles, up to `ceiling`.  dynamic=False: `start` is the scale
    throughout, floor, ceiling and growth_interval mean nothing, and `PATIENCE` skips in a row are an error.  report: takes one line
    for each skip.  The scales are rounded to float32; powers of two scale and unscale exactly, barring underflow.
    With several processes every one has to see all gradients, as under DistributedDataParallel; else their scales part.

    Raises ValueError for scales that are not positive, finite and in order, and a device that is not there.
    """

    def __init__(
        self,
        device: str = "cpu",
        *,
        start: float = 2.0**16,
        growth_interval: int = 2000,
        ceiling: float = 2.0**24,
        floor: float = 1.0,
        dynamic: bool = True,
        report: Callable[[str], None] = print,
    ) -> None:
        if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"a loss scale lives on 'cpu', or on 'cuda' where there is a CUDA device; got {device!r}")
        first = _in_float32(start)
        lowest, highest = (_in_float32(floor), _in_float32(ceiling)) if dynamic else (first, first)
        if not 0 < lowest <= first <= highest < math.inf:
            raise ValueError(
                f"loss scales are finite, and 0 < floor <= start <= ceiling; got floor={floor}, start={start}, ceiling={ceiling}"
            )
        self._interval = checked_counter("growth_interval", growth_interval, 1 << 31)
        if self._interval == 0:
            raise ValueError("growth_interval is at least 1; got 0: pass dynamic=False for a scale that stays")
        self._floor, self._ceiling, self._patience = lowest, highest, 1 if dynamic else PATIENCE
        self._dynamic, self._report = dynamic, report
        self._scaler = torch.amp.GradScaler(device, init_scale=first, growth_interval=self._interval)
        self._scaler.scale(torch.zeros((), device=device))  # it makes its scale at the first call
        self._skipped = self._in_a_row = 0
        self._scaled = False
        self._unscaled: set[Optimizer] = set()

    @property
    def value(self) -> float:
        """The scale.  On CUDA, waits for the device."""
        return self._scaler.get_scale()

    @property
    def skipped(self) -> int:
        """How many steps were not taken."""
        return self._skipped

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` times the scale, to call `backward` on.  Raises ValueError for what is no floating-point tensor."""
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            kind = str(loss.dtype) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"a loss is a floating-point tensor; got {kind}: scale what the criterion returns")
        self._scaled = True
        return self._scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients of the optimizer's parameters by the scale, in place, and note whether they hold Inf or NaN.

        Raises ValueError before `scale`, a second time in one step, and for float16 gradients.
        """
        if not self._scaled:
            raise ValueError(
                "gradients are unscaled after scaler.scale(loss).backward(), and no loss was scaled in this step"
            )
        if optimizer in self._unscaled:
            raise ValueError("gradients are unscaled once in a step; these are already: drop the second unscale")
        self._scaler.unscale_(optimizer)
        self._unscaled.add(optimizer)

    def step(self, optimizers: Optimizer | Sequence[Optimizer], step_number: int, *, blame: str | None = None) -> bool:
        """Take the step of the optimizer, or of all of several, and move the scale; whether the step was taken.

        It is not where gradients of any of them hold Inf or NaN: then no weight and no optimizer state changes, and one line is
        reported.  step_number: for messages; blame: the first bad tensor, to be named in them.  Optimizers that need a closure do not
        fit.  On CUDA, waits for the device.

        Raises LossScaleError for an overflow at the floor, and for the last of `PATIENCE` in a row under a fixed scale.
        Raises ValueError where there is no gradient, no loss was scaled, or an optimizer was unscaled but is left out or comes twice.
        """
        chosen = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        self._check(chosen)
        for optimizer in chosen:
            if optimizer not in self._unscaled:
                self.unscale(optimizer)
        before = self.value
        self._scaler.update()  # halves after an overflow, without regard to bounds
        moved = self.value
        self._end(min(max(moved, self._floor), self._ceiling))
        if moved < before:
            self._skip(step_number, before, f"; first bad tensor: {blame}" if blame else "")
            return False
        self._in_a_row = 0
        for optimizer in chosen:
            optimizer.step()
        return True

    def state_dict(self) -> dict[str, float | int]:
        """Scale and counts, to resume with: what `load_state_dict` takes.  The settings are not part of it."""
        clean = self._scaler.state_dict()["_growth_tracker"]
        return dict(zip(_STATE, (self.value, clean, self._skipped, self._in_a_row), strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, between two steps.

        Raises ValueError, and changes nothing, for missing and unknown keys, a scale outside floor to ceiling, and impossible counts.
        """
        if set(state) != set(_STATE):
            raise ValueError(
                f"a loss scaler's state has the keys {', '.join(_STATE)}; got {', '.join(map(str, state))}"
            )
        scale = state["scale"]
        if not isinstance(scale, float) or not self._floor <= scale <= self._ceiling or scale != _in_float32(scale):
            bounds = f"{_show(self._floor)} to {_show(self._ceiling)}"
            raise ValueError(f"scale is a float32 from {bounds}; got {scale!r}: resume with the settings of that run")
        clean = checked_counter("clean_steps", state["clean_steps"], self._interval)
        skipped = checked_counter("skipped", state["skipped"], 1 << 63)
        self._in_a_row = checked_counter("skipped_in_a_row", state["skipped_in_a_row"], skipped + 1)
        self._skipped = skipped
        self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": scale, "_growth_tracker": clean})
        self._end(scale)

    def _check(self, chosen: list[Optimizer]) -> None:
        """Raise ValueError where these optimizers cannot be stepped together."""
        if len(set(chosen)) < len(chosen) or self._unscaled - set(chosen):
            raise ValueError("a step takes each optimizer once, and all that were unscaled; pass them in one list")
        parameters = (p for optimizer in chosen for group in optimizer.param_groups for p in group["params"])
        if all(p.grad is None for p in parameters):
            raise ValueError("no parameter of the optimizer has a gradient; call scaler.scale(loss).backward() first")

    def _end(self, scale: float) -> None:
        """Set the scale and forget what was done in this step."""
        self._scaler.update(scale)
        self._scaled = False
        self._unscaled.clear()

    def _skip(self, number: int, before: float, culprit: str) -> None:
        """Count and report a skipped step.  Raises LossScaleError where there is no use in going on."""
        self._skipped += 1
        self._in_a_row += 1
        look = "look for Inf or NaN in the data, the loss and the weights, or lower the learning rate"
        if before <= self._floor and self._in_a_row >= self._patience:
            where, remedy = f"at loss scale {_show(before)}, which is the floor", look
            if not self._dynamic:
                where = f"{self._in_a_row} steps in a row at the fixed loss scale {_show(before)}"
                remedy = f"take a smaller scale, {look}"
            raise LossScaleError(f"step {number}: gradient overflow {where}; {remedy}{culprit}")
        moved = f"{_show(before)} -> {_show(self.value)}" if self._dynamic else f"stays {_show(before)}"
        self._report(f"step {number}: gradient overflow; step skipped, loss scale {moved}{culprit}")


def _in_float32(scale: float) -> float:
    return torch.tensor(scale, dtype=torch.float32).item()


def _show(scale: float) -> str:
    return f"{scale:.9g}"
