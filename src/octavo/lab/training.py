"""What every trainer of the lab shares, whatever its framework: how a run is set up, recorded and shown."""

from __future__ import annotations

import contextlib
import enum
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import rich.console
import rich.progress

__all__ = ["MEAN", "STD", "TEST_BATCH", "DivergenceError", "History", "Optimizer", "Progress", "TrainConfig"]

MEAN, STD = 0.1307, 0.3081
"""Of MNIST's pixels, which are scaled to 0 ... 1 first."""
TEST_BATCH = 1000
_REFRESH_SECONDS = 0.2


class DivergenceError(ValueError):
    """Training met NaN or Inf and stopped; the message names the step and the first bad tensor."""


class Optimizer(enum.Enum):
    """Which rule updates the weights."""

    SGD = "sgd"
    """Plain stochastic gradient descent."""
    ADADELTA = "adadelta"
    """Adadelta, as the reference CNN script trains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that decides a run, apart from the model and the data.

    `steps`, where given, ends the run after that many steps in all, even within an epoch.  The learning rate falls in a
    straight line over the run, from `lr` towards `lr * last_lr`.  An epoch's last, smaller batch is left out.
    """

    optimizer: Optimizer
    lr: float
    batch_size: int
    epochs: int
    last_lr: float = 1.0
    steps: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; give a positive whole number")
        for name in ("lr", "last_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive finite number, got {value}; try 0.1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in 0 ... 2**63 - 1, got {self.seed}; try 1")

    def epoch_steps(self, samples: int) -> tuple[int, ...]:
        """How many steps each epoch takes over `samples` training samples; `steps` may cut the last epoch short."""
        whole = samples // self.batch_size
        if whole == 0:
            raise ValueError(
                f"batch_size {self.batch_size} exceeds the {samples} training samples; use at most {samples}"
            )
        total = min(whole * self.epochs, self.steps or whole * self.epochs)
        return tuple(min(whole, total - start) for start in range(0, total, whole))


@dataclass(kw_only=True, slots=True)
class History:
    """What a run recorded so far.

    losses: training loss of each step.  epochs: (steps, seconds) of each epoch, training alone, on a monotonic clock.
    test_losses, accuracies: of each epoch's end; accuracy is a fraction.
    """

    steps_per_epoch: int
    losses: list[float] = field(default_factory=list)
    epochs: list[tuple[int, float]] = field(default_factory=list)
    test_losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    @property
    def final_loss(self) -> float:
        """The mean training loss over the last tenth of the last epoch's steps (one step at least)."""
        return statistics.fmean(self.losses[-math.ceil(self.epochs[-1][0] / 10) :])

    @property
    def seconds_per_epoch(self) -> float:
        """The median over the epochs; an epoch cut short counts at its seconds a step times a whole epoch's steps."""
        return statistics.median(seconds / steps * self.steps_per_epoch for steps, seconds in self.epochs)


class Progress(contextlib.AbstractContextManager["Progress"]):
    """One line on a terminal (loss, accuracy of the newest batch, images/s, time left); silent anywhere else."""

    def __init__(self, label: str, *, steps: int, console: rich.console.Console | None = None) -> None:
        console = console or rich.console.Console(stderr=True)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:<16}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.TextColumn("{task.fields[text]}"),
            rich.progress.TimeRemainingColumn(compact=True),
            console=console,
            auto_refresh=False,
            disable=not console.file.isatty(),
        )
        self._task = self._bar.add_task(label, total=steps, text="")
        self._started = self._drawn = time.perf_counter()
        self._steps = 0

    def __enter__(self) -> Progress:
        self._bar.start()
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._bar.disable:
            self._bar.update(self._task, completed=self._steps, refresh=True)
        self._bar.stop()

    @property
    def shown(self) -> bool:
        """Whether there is a terminal to draw on."""
        return not self._bar.disable

    def step(self, loss: float, images: int, accuracy: Callable[[], float] | None, *, steps: int = 1) -> None:
        """Counts `steps` steps of that many images, and redraws the line where the last drawing is old enough.

        loss, accuracy: of the newest batch, the accuracy (a fraction) asked for only where it is drawn; None leaves it out.
        """
        self._steps += steps
        now = time.perf_counter()
        if self._bar.disable or now - self._drawn < _REFRESH_SECONDS:
            return
        self._drawn = now
        speed = self._steps * images / (now - self._started)
        share = "" if accuracy is None else f"accuracy {accuracy():6.1%}  "
        text = f"loss {loss:7.4f}  {share}{speed:8,.0f} images/s"
        self._bar.update(self._task, completed=self._steps, text=text, refresh=True)
