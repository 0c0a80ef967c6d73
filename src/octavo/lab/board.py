"""A run's metrics for TensorBoard, where that is installed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Board"]


class Board:
    """Scalars such as `train/loss` in the folder `tensorboard` of a run; what an earlier process wrote past `step` is hidden.

    Nothing is written where folder is None, or tensorboard or torch is not installed.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self._writer: Any = None
        if (
            folder is None
            or importlib.util.find_spec("tensorboard") is None
            or importlib.util.find_spec("torch") is None
        ):
            return
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds each value that is a finite number."""
        for name, value in values.items():
            if self._writer is not None and value is not None and math.isfinite(value):
                self._writer.add_scalar(f"{kind}/{name}", value, step)
