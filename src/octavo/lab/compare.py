"""One network trained side by side in several precisions: same data, start, batches and dropout draws."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import rich.console
import torch
from torch import nn

from octavo.lab import checkpoint
from octavo.lab.arms import ARMS, BASELINE, DEFAULT_ARMS, Arm, Mode
from octavo.lab.data import Dataset, Source, batches, load
from octavo.lab.loop import (
    DivergenceError,
    Forward,
    History,
    Optimizer,
    Prepared,
    Progress,
    TrainConfig,
    evaluate,
    prepare,
    take_turns,
    train,
)
from octavo.lab.models import ModelName, build, exempt
from octavo.names import nearest
from octavo.torch import autocast, calibrate, convert

__all__ = ["ArmResult", "CompareConfig", "Comparison", "run"]

_ROUNDS = 150
_WARM_UP_ROUNDS = 3
# What is timed before an arm starts must not diverge, whatever rate the user asks for; a step's time is the same.
_IDLE_RATE = 1e-6
_CALIBRATION_BATCHES = 20
_SMALL = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings:
    """How a model is trained where the user does not say.  epochs_small: on fewer than `_SMALL` training images.

    The CNN's rate falls to almost nothing: where one epoch at the full rate ends is chance, by half a point of accuracy either way.
    """

    optimizer: Optimizer
    lr: float
    last_lr: float
    batch_size: int
    epochs: int
    epochs_small: int


_SETTINGS: Mapping[ModelName, _Settings] = MappingProxyType(
    {
        ModelName.CNN: _Settings(
            optimizer=Optimizer.ADADELTA, lr=1.0, last_lr=0.01, batch_size=64, epochs=1, epochs_small=8
        ),
        ModelName.MLP: _Settings(
            optimizer=Optimizer.SGD, lr=0.1, last_lr=1.0, batch_size=128, epochs=5, epochs_small=40
        ),
        ModelName.FC: _Settings(
            optimizer=Optimizer.SGD, lr=0.1, last_lr=1.0, batch_size=128, epochs=5, epochs_small=40
        ),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """What to compare; None leaves a setting to the model and the size of the data set."""

    source: Source = Source.AUTO
    model: ModelName = ModelName.MLP
    arms: tuple[str, ...] = DEFAULT_ARMS
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError(f"arms must name at least one arm; choose from {', '.join(ARMS)}")
        for name in self.arms:
            if name not in ARMS:
                raise ValueError(f"unknown arm {name!r}{nearest(name, ARMS) or '; the arms are ' + ', '.join(ARMS)}")
            if self.arms.count(name) > 1:
                raise ValueError(f"arm {name!r} is named {self.arms.count(name)} times; name each arm once")

    def training(self, samples: int) -> TrainConfig:
        """How each arm trains on `samples` training samples.  Where only `steps` is given, epochs follow from it."""
        settings = _SETTINGS[self.model]
        batch_size = settings.batch_size if self.batch_size is None else self.batch_size
        epochs = self.epochs
        if epochs is None and self.steps is not None:
            epochs = max(1, -(-self.steps // max(1, samples // max(1, batch_size))))
        elif epochs is None:
            epochs = settings.epochs if samples >= _SMALL else settings.epochs_small
        return TrainConfig(
            optimizer=settings.optimizer,
            lr=settings.lr if self.lr is None else self.lr,
            last_lr=settings.last_lr,
            batch_size=batch_size,
            epochs=epochs,
            steps=self.steps,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmResult:
    """What one arm came to.

    final_loss: mean training loss over the last tenth of the last epoch's steps.  test_accuracy: a fraction.
    seconds_per_epoch: median, training alone.  ratio_to_fp32: an arm's training step over the baseline's, medians of
    steps taken in turns before the arm started; seconds_per_epoch of two arms may have met a different load.
    difference_to_fp32: test accuracy less the baseline's, a fraction.  Both are None where the baseline is not run.
    losses: of each step.  accuracies: of each epoch; of a calibrated arm the one after calibration.
    trained_as: the arm whose training this one shares, so that its loss and seconds are that arm's; None for its own.
    """

    name: str
    description: str
    final_loss: float
    test_loss: float
    test_accuracy: float
    seconds_per_epoch: float
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    trained_as: str | None = None
    ratio_to_fp32: float | None = None
    difference_to_fp32: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The arms run so far, and what they share.  data: name -> fact about the data set, plain JSON."""

    config: CompareConfig
    training: TrainConfig
    data: Mapping[str, str | int]
    steps_per_epoch: int
    arms: tuple[ArmResult, ...] = ()

    def adding(self, result: ArmResult) -> Comparison:
        """With one more arm, the accuracy of each set against the baseline where it is among them."""
        arms = (*self.arms, result)
        base = next((arm for arm in arms if arm.name == BASELINE), None)
        if base is not None:
            arms = tuple(
                dataclasses.replace(arm, difference_to_fp32=arm.test_accuracy - base.test_accuracy) for arm in arms
            )
        return dataclasses.replace(self, arms=arms)


def run(
    config: CompareConfig,
    *,
    dataset: Dataset | None = None,
    folder: Path | None = None,
    on_result: Callable[[Comparison], None] = lambda comparison: None,
    console: rich.console.Console | None = None,
) -> Comparison:
    """Runs the arms one after the other and returns what they came to.

    Args:
        config: what to compare.
        dataset: the data, loaded already; None loads `config.source`.
        folder: where each arm's checkpoint `<arm>.safetensors` goes after each epoch; None keeps none.
        on_result: called after each arm with the results so far, so that an interrupted run keeps them.
        console: where progress is drawn if it is a terminal; None is standard error.

    Raises:
        DataError, CheckpointError: as `data.load` and `checkpoint.save` do.
        DivergenceError: an arm met NaN or Inf; the message names arm, step and tensor.
    """
    dataset = dataset or load(config.source)
    samples = len(dataset.train_labels)
    training = config.training(samples)
    training.epoch_steps(samples)
    comparison = Comparison(
        config=config,
        training=training,
        data={"name": dataset.name, "training images": samples, "test images": len(dataset.test_labels)},
        steps_per_epoch=samples // training.batch_size,
    )
    bench = _Bench(
        model=config.model,
        training=training,
        data=prepare(dataset),
        folder=folder,
        name=dataset.name,
        console=console,
        paired=BASELINE in config.arms,
    )
    for name in config.arms:
        try:
            comparison = comparison.adding(bench.measure(ARMS[name]))
        except DivergenceError as error:
            raise DivergenceError(f"{name}: {error}") from None
        on_result(comparison)
    return comparison


@dataclass(kw_only=True, slots=True)
class _Bench:
    """What the arms share.

    paired: whether arms are timed against the baseline.  float32: the arm that trained in float32 with the trained
    model, once there is one.
    """

    model: ModelName
    training: TrainConfig
    data: Prepared
    name: str
    folder: Path | None
    console: rich.console.Console | None
    paired: bool
    float32: tuple[str, nn.Module, History] | None = field(default=None)

    def measure(self, arm: Arm) -> ArmResult:
        """Trains and tests one arm, from the same weights as every other."""
        match arm.mode:
            case Mode.BFLOAT16 | Mode.RECIPE:
                ratio = self._pace(arm)
                history = self._train(arm, *self._start(arm))
                return _result(arm, history, ratio, tuple(history.accuracies))
            case Mode.FLOAT32:
                source, model, history = self._train_float32(arm)
                if source != arm.name:
                    self._save(arm, model)
                return _result(arm, history, 1.0 if self.paired else None, tuple(history.accuracies), source=source)
            case Mode.CALIBRATED:
                assert arm.recipe is not None
                source, model, history = self._train_float32(arm)
                model = convert(copy.deepcopy(model), arm.recipe(), exempt=exempt(self.model))
                calibrate(model, self._calibration_batches())
                loss, accuracy = evaluate(model, self.data.test_inputs, self.data.test_labels, forward=autocast)
                self._save(arm, model)
                ratio = 1.0 if self.paired else None
                return _result(arm, history, ratio, (accuracy,), test_loss=loss, source=source)

    def _start(self, arm: Arm) -> tuple[nn.Module, Forward]:
        """The untrained model of an arm, and the context that its forward pass runs in."""
        model = build(self.model, seed=self.training.seed)
        match arm.mode:
            case Mode.FLOAT32 | Mode.CALIBRATED:
                return model, contextlib.nullcontext
            case Mode.BFLOAT16:
                return model, lambda: torch.autocast("cpu", dtype=torch.bfloat16)
            case Mode.RECIPE:
                assert arm.recipe is not None
                return convert(model, arm.recipe(), exempt=exempt(self.model)), contextlib.nullcontext

    def _train_float32(self, arm: Arm) -> tuple[str, nn.Module, History]:
        """The training that arms in float32 share: run by the first of them, handed to the others."""
        if self.float32 is None:
            self._pace(arm)
            model, forward = self._start(arm)
            self.float32 = (arm.name, model, self._train(arm, model, forward))
        return self.float32

    def _train(self, arm: Arm, model: nn.Module, forward: Forward) -> History:
        steps = sum(self.training.epoch_steps(len(self.data.train_labels)))
        return train(
            model,
            self.data,
            self.training,
            forward=forward,
            progress=Progress(arm.name, steps=steps, console=self.console),
            checkpoint_path=self._path(arm),
            header=self._header(arm),
        )

    def _pace(self, arm: Arm) -> float | None:
        """An arm's step time over the baseline's, on models that are thrown away; it warms kernels and caches up."""
        idle = dataclasses.replace(self.training, lr=_IDLE_RATE)
        if not self.paired or arm.mode in (Mode.FLOAT32, Mode.CALIBRATED):
            take_turns([self._start(arm)], self.data, idle, rounds=_WARM_UP_ROUNDS)
            return 1.0 if self.paired else None
        rounds = min(_ROUNDS, sum(self.training.epoch_steps(len(self.data.train_labels))))
        base, own = take_turns([self._start(ARMS[BASELINE]), self._start(arm)], self.data, idle, rounds=rounds)
        return own / base

    def _calibration_batches(self) -> Iterator[torch.Tensor]:
        """The first training batches, in the order of the first epoch."""
        order = batches(len(self.data.train_labels), self.training.batch_size, epoch=0, seed=self.training.seed)
        for _, index in zip(range(_CALIBRATION_BATCHES), order, strict=False):
            yield self.data.train_inputs[torch.from_numpy(index)]

    def _path(self, arm: Arm) -> Path | None:
        return self.folder and self.folder / f"{arm.name}.safetensors"

    def _header(self, arm: Arm) -> dict[str, Any]:
        return {"arm": arm.name, "model": self.model.value, "data": self.name, "seed": self.training.seed}

    def _save(self, arm: Arm, model: nn.Module) -> None:
        if path := self._path(arm):
            checkpoint.save(path, model.state_dict(), header=self._header(arm))


def _result(
    arm: Arm,
    history: History,
    ratio: float | None,
    accuracies: tuple[float, ...],
    *,
    test_loss: float | None = None,
    source: str | None = None,
) -> ArmResult:
    return ArmResult(
        name=arm.name,
        description=arm.description,
        final_loss=history.final_loss,
        test_loss=history.test_losses[-1] if test_loss is None else test_loss,
        test_accuracy=accuracies[-1],
        seconds_per_epoch=history.seconds_per_epoch,
        losses=tuple(history.losses),
        accuracies=accuracies,
        trained_as=source if source != arm.name else None,
        ratio_to_fp32=ratio,
    )
