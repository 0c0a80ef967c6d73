"""What measuring an arm needs in any framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.console

from octavo.lab.arms import Arm, ArmResult
from octavo.lab.data import Dataset
from octavo.lab.models import ModelName
from octavo.lab.training import Progress, TrainConfig

__all__ = ["IDLE_RATE", "ROUNDS", "Bench"]

IDLE_RATE = 1e-6
"""The learning rate while arms are timed: that must not diverge, whatever rate the user asks for, and a step's time is the same."""
ROUNDS = 150
"""Steps, at most, by which arms are timed in turns."""


@dataclass(kw_only=True, slots=True)
class Bench(ABC):
    """What the arms of one framework share.  paired: whether they are timed against their float32 arm."""

    model: ModelName
    training: TrainConfig
    dataset: Dataset
    folder: Path | None
    console: rich.console.Console | None
    paired: bool

    @abstractmethod
    def measure(self, arm: Arm) -> ArmResult:
        """Trains and tests one arm, from the same weights as every other."""

    @property
    def steps(self) -> int:
        """Steps of a whole run."""
        return sum(self.training.epoch_steps(len(self.dataset.train_labels)))

    def progress(self, arm: Arm) -> Progress:
        return Progress(arm.name, steps=self.steps, console=self.console)

    def path(self, arm: Arm) -> Path | None:
        """Where the arm's checkpoint goes."""
        return self.folder and self.folder / f"{arm.name}.safetensors"

    def header(self, arm: Arm) -> dict[str, Any]:
        """What the arm's checkpoint says of itself."""
        return {"arm": arm.name, "model": self.model.value, "data": self.dataset.name, "seed": self.training.seed}
