"""Measuring the arms that JAX trains."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

import octavo.jax
from octavo.lab.arms import ARMS, Arm, ArmResult, Mode
from octavo.lab.bench import IDLE_RATE, ROUNDS, Bench
from octavo.lab.flax_models import build
from octavo.lab.jax_loop import Prepared, Trainer, prepare

__all__ = ["JaxBench"]

_UNTIMED_ROUNDS = 3
_TURNS_SECONDS = 2.0


@dataclass(kw_only=True, slots=True)
class JaxBench(Bench):
    """What the arms of JAX share."""

    data: Prepared = field(init=False)

    def __post_init__(self) -> None:
        self.data = prepare(self.dataset)

    def measure(self, arm: Arm) -> ArmResult:
        """Trains and tests one arm, from the same weights as every other."""
        ratio = self._pace(arm)
        with self._context(arm):
            trainer, variables = self._start(arm)
            _, history = trainer.train(
                variables, self.progress(arm), checkpoint_path=self.path(arm), header=self.header(arm)
            )
        return ArmResult.of(arm, history, ratio, tuple(history.accuracies))

    def _context(self, arm: Arm) -> contextlib.AbstractContextManager[object]:
        """The context that an arm's model is made, trained and tested in."""
        match arm.mode:
            case Mode.FLOAT32 | Mode.BFLOAT16:
                return contextlib.nullcontext()
            case Mode.RECIPE:
                assert arm.recipe is not None
                return octavo.jax.autocast(recipe=arm.recipe())
            case Mode.CALIBRATED | Mode.EMULATED:
                raise ValueError(f"{arm.name}: calibration and emulation are PyTorch's; choose a jax arm with a recipe")

    def _start(self, arm: Arm, **changes: Any) -> tuple[Trainer, Any]:
        """The trainer and the untrained variables of an arm."""
        dtype = jnp.bfloat16 if arm.mode is Mode.BFLOAT16 else jnp.float32
        network, variables = build(self.model, seed=self.training.seed, dtype=dtype)
        return Trainer(network, self.data, dataclasses.replace(self.training, **changes)), variables

    def _pace(self, arm: Arm) -> float | None:
        """An arm's step time over float32's: the median of steps taken in turns, on the same batch, both compiled."""
        if not self.paired:
            return None
        if arm.name == arm.framework.baseline:
            return 1.0
        x, y = (values[: self.training.batch_size] for values in (self.data.train_inputs, self.data.train_labels))
        runs: list[list[Any]] = []
        for one in (ARMS[arm.framework.baseline], arm):
            with self._context(one):
                trainer, variables = self._start(one, lr=IDLE_RATE)
                state = trainer.start(variables)
                runs.append([trainer.step.lower(state, x, y).compile(), state])
        seconds: list[list[float]] = [[], []]
        for turn in range(min(ROUNDS, self.steps) + _UNTIMED_ROUNDS):
            for run, taken in zip(runs, seconds, strict=True):
                begin = time.perf_counter()
                run[1], found = run[0](run[1], x, y)
                jax.block_until_ready(found)
                if turn >= _UNTIMED_ROUNDS:
                    taken.append(time.perf_counter() - begin)
            if sum(map(sum, seconds)) > _TURNS_SECONDS:
                break
        return statistics.median(seconds[1]) / statistics.median(seconds[0])
