"""Measuring the arms that Octavo's engine trains."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from octavo.lab.arms import ARMS, Arm, ArmResult, Mode
from octavo.lab.bench import IDLE_RATE, ROUNDS, Bench
from octavo.lab.data import batches
from octavo.lab.engine_loop import Network, Prepared, Trainer, prepare
from octavo.lab.models import initial_weights

__all__ = ["EngineBench"]

_ROUND_STEPS = 10
"""Steps of a turn: a captured step is meant to be repeated, and one alone would mostly be its call."""
_TURNS_SECONDS = 2.0


@dataclass(kw_only=True, slots=True)
class EngineBench(Bench):
    """What the arms of the engine share."""

    data: Prepared = field(init=False)

    def __post_init__(self) -> None:
        self.data = prepare(self.dataset)

    def measure(self, arm: Arm) -> ArmResult:
        """Trains and tests one arm, from the same weights as every other."""
        ratio = self._pace(arm)
        history = self._start(arm).train(self.progress(arm), checkpoint_path=self.path(arm), header=self.header(arm))
        return ArmResult.of(arm, history, ratio, tuple(history.accuracies))

    def _start(self, arm: Arm, **changes: Any) -> Trainer:
        """The trainer of an arm, with its untrained network."""
        if arm.mode not in (Mode.FLOAT32, Mode.RECIPE):
            raise ValueError(f"{arm.name}: the engine trains in float32 or under a recipe; choose an arm of torch")
        recipe = None if arm.recipe is None else arm.recipe()
        network = Network(initial_weights(self.model, self.training.seed), recipe=recipe)
        return Trainer(network, self.data, dataclasses.replace(self.training, **changes), by_hand=arm.by_hand)

    def _pace(self, arm: Arm) -> float | None:
        """An arm's step time over the baseline's: the median of steps taken in turns, on the same batches, both captured."""
        if not self.paired:
            return None
        if arm.name == arm.framework.baseline:
            return 1.0
        trainers = [self._start(one, lr=IDLE_RATE) for one in (ARMS[arm.framework.baseline], arm)]
        size = self.training.batch_size
        found = batches(len(self.data.train_labels), size, epoch=0, seed=self.training.seed)
        order = np.stack([*islice(found, min(_ROUND_STEPS, self.steps))])
        rates = np.full((len(order), 1), IDLE_RATE, np.float32)
        seconds: list[list[float]] = [[], []]
        for turn in range(-(-min(ROUNDS, self.steps) // len(order)) + 1):
            for trainer, taken in zip(trainers, seconds, strict=True):
                begin = time.perf_counter()
                trainer.repeat(order, rates)
                if turn:  # the first one captures
                    taken.append(time.perf_counter() - begin)
            if sum(map(sum, seconds)) > _TURNS_SECONDS:
                break
        return statistics.median(seconds[1]) / statistics.median(seconds[0])
