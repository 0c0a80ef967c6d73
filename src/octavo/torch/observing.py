"""Statistics and dumps of the tensors of an emulated model, at chosen steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from octavo.diagnose.dumps import Dumps
from octavo.diagnose.records import Writer
from octavo.diagnose.statistics import measure
from octavo.scaling import Current, Delayed, Unscaled
from octavo.table import TensorSpec
from octavo.torch.watching import Look

__all__ = ["Observer"]

_TENSORS = (
    "input",
    "weight",
    "output",
    "grad_output",
    "weight.grad_input",
    "grad_input",
    "grad_output.grad_weight",
    "input.grad_weight",
    "grad_weight",
)
"""What the tensor of each cell is called; one that a second GEMM casts anew has that GEMM's name behind it."""

_GRAD_OUTPUT, _TURNED = 3, 6
"""Its cells in the two gradients."""


@dataclass(kw_only=True, slots=True)
class Observer:
    """What is written of which steps: statistics to `writers` every `every` steps, tensors by `dumps`."""

    every: int
    writers: tuple[Writer, ...]
    dumps: tuple[Dumps, ...]
    seen: set[tuple[int, str, int]] = field(default_factory=set, init=False)
    """(step, site, cell) of the newest step."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"statistics are taken every 1 or more steps; got {self.every}: write every=100")

    def look(self, step: int, site: str) -> Look | None:
        """What is to see the tensors of a site in a step."""
        due = bool(self.writers) and step % self.every == 0
        if not due and not any(_may_want(dumps, step) for dumps in self.dumps):
            return None

        def look(cell: int, spec: TensorSpec, before: Tensor, after: Callable[[], Tensor], scale: float) -> None:
            if (step, site, cell) in self.seen:
                return
            self.seen = {entry for entry in self.seen if entry[0] == step} | {(step, site, cell)}
            first = cell == _TURNED and (step, site, _GRAD_OUTPUT) not in self.seen  # grad_input was not wanted
            name = _TENSORS[_GRAD_OUTPUT if first else cell]
            wanted = [dumps for dumps in self.dumps if dumps.wants(step, site, name)]
            x = _array(before) if due or wanted else None
            if x is None:
                return
            for dumps in wanted:
                dumps.write(step, site, name, x)
            if due:
                known = scale if isinstance(spec.scaling, (Unscaled, Current, Delayed)) else None
                found = measure(x, _array(after()), spec.format, known)
                for writer in self.writers:
                    writer.write(step, site, name, found)

        return look


def _may_want(dumps: Dumps, step: int) -> bool:
    return step % dumps.every == 0 if dumps.every is not None else step in (dumps.steps or ())


def _array(x: Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = x.detach().float().cpu().numpy()
    return array
