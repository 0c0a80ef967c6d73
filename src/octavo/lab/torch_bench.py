"""Measuring the arms that PyTorch trains."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from octavo.formats import FLOAT16
from octavo.lab import checkpoint
from octavo.lab.arms import ARMS, Arm, ArmResult, Mode
from octavo.lab.bench import IDLE_RATE, ROUNDS, Bench
from octavo.lab.data import batches
from octavo.lab.loop import Contender, Prepared, evaluate, prepare, take_turns, train
from octavo.lab.models import build, exempt
from octavo.lab.training import History
from octavo.torch import LossScaler, autocast, calibrate, convert, emulate

__all__ = ["TorchBench"]

_WARM_UP_ROUNDS = 3
_CALIBRATION_BATCHES = 20


def _unsaid(line: str) -> None:
    """Skipped steps are part of the method: the table and the loss curve are what a comparison prints."""


@dataclass(kw_only=True, slots=True)
class TorchBench(Bench):
    """What the arms of PyTorch share.  float32: the arm that trained in float32 with the trained model, once there is one."""

    data: Prepared = field(init=False)
    float32: tuple[str, nn.Module, History] | None = field(default=None)

    def __post_init__(self) -> None:
        self.data = prepare(self.dataset)

    def measure(self, arm: Arm) -> ArmResult:
        """Trains and tests one arm, from the same weights as every other."""
        match arm.mode:
            case Mode.BFLOAT16 | Mode.RECIPE | Mode.EMULATED:
                ratio = self._pace(arm)
                history = self._train(arm, self._start(arm))
                return ArmResult.of(arm, history, ratio, tuple(history.accuracies))
            case Mode.FLOAT32:
                source, model, history = self._train_float32(arm)
                if source != arm.name:
                    self._save(arm, model)
                return ArmResult.of(
                    arm, history, 1.0 if self.paired else None, tuple(history.accuracies), source=source
                )
            case Mode.CALIBRATED:
                assert arm.recipe is not None
                source, model, history = self._train_float32(arm)
                model = convert(copy.deepcopy(model), arm.recipe(), exempt=exempt(self.model))
                calibrate(model, self._calibration_batches())
                loss, accuracy = evaluate(model, self.data.test_inputs, self.data.test_labels, forward=autocast)
                self._save(arm, model)
                ratio = 1.0 if self.paired else None
                return ArmResult.of(arm, history, ratio, (accuracy,), test_loss=loss, source=source)

    def _start(self, arm: Arm) -> Contender:
        """The untrained model of an arm, and how it runs."""
        model = build(self.model, seed=self.training.seed)
        match arm.mode:
            case Mode.FLOAT32 | Mode.CALIBRATED:
                return Contender(model)
            case Mode.BFLOAT16:
                return Contender(model, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
            case Mode.RECIPE:
                assert arm.recipe is not None
                return Contender(convert(model, arm.recipe(), exempt=exempt(self.model)))
            case Mode.EMULATED:
                assert arm.recipe is not None
                emulation = emulate(
                    model,
                    arm.recipe(),
                    exempt=exempt(self.model),
                    loss_scale=LossScaler(report=_unsaid),
                    master=FLOAT16,
                )
                return Contender(model, emulation=emulation)

    def _train_float32(self, arm: Arm) -> tuple[str, nn.Module, History]:
        """The training that arms in float32 share: run by the first of them, handed to the others."""
        if self.float32 is None:
            self._pace(arm)
            contender = self._start(arm)
            self.float32 = (arm.name, contender.model, self._train(arm, contender))
        return self.float32

    def _train(self, arm: Arm, contender: Contender) -> History:
        return train(
            contender.model,
            self.data,
            self.training,
            forward=contender.forward,
            emulation=contender.emulation,
            progress=self.progress(arm),
            checkpoint_path=self.path(arm),
            header=self.header(arm),
        )

    def _pace(self, arm: Arm) -> float | None:
        """An arm's step time over the baseline's, on models that are thrown away; it warms kernels and caches up."""
        idle = dataclasses.replace(self.training, lr=IDLE_RATE)
        if not self.paired or arm.mode in (Mode.FLOAT32, Mode.CALIBRATED):
            take_turns([self._start(arm)], self.data, idle, rounds=_WARM_UP_ROUNDS)
            return 1.0 if self.paired else None
        rounds = min(ROUNDS, self.steps)
        base, own = take_turns(
            [self._start(ARMS[arm.framework.baseline]), self._start(arm)], self.data, idle, rounds=rounds
        )
        return own / base

    def _calibration_batches(self) -> Iterator[torch.Tensor]:
        """The first training batches, in the order of the first epoch."""
        order = batches(len(self.data.train_labels), self.training.batch_size, epoch=0, seed=self.training.seed)
        for _, index in zip(range(_CALIBRATION_BATCHES), order, strict=False):
            yield self.data.train_inputs[torch.from_numpy(index)]

    def _save(self, arm: Arm, model: nn.Module) -> None:
        if path := self.path(arm):
            checkpoint.save(path, model.state_dict(), header=self.header(arm))
