"""A training step on the GPU, captured once and replayed as one CUDA graph: no Python between its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from octavo.engine.kernels.cuda_checks import zeros
from octavo.engine.kernels.cuda_launch import INTERPRETED, Capture, capture, launches
from octavo.engine.storage import Device, Pool, using

__all__ = ["Graph"]

_WARM_UP = 2
"""Calls before the capture: they compile kernels, and take from the system the memory that the step needs."""


class Graph:
    """A step, `function()` on CUDA tensors, which works on the same memory at each replay.

    Whatever differs from step to step lies in tensors that the caller changes in place: a batch, its labels, a learning rate.
    output: what the step returns; each replay writes it anew.  launches: kernels in the step.

    Making it runs the step twice: what it changes is changed.  Under Triton's interpreter, which has no graphs, a replay calls the step.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._pool, self._capture = Pool(Device.CUDA), Capture(zeros())
        with using(self._pool):
            for _ in range(_WARM_UP):
                self.output = function()
            before = launches()
            self._graph = None if INTERPRETED else self._recorded()
            self.launches = launches() - before

    def _recorded(self) -> Any:
        """The step as a CUDA graph of torch's, whose current stream Triton launches on."""
        import torch

        graph = torch.cuda.CUDAGraph()
        token = capture.set(self._capture)
        try:
            # A thread's own mode: what other threads ask of the driver meanwhile is theirs.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.output = self._function()
        finally:
            capture.reset(token)
        return graph

    def replay(self) -> None:
        """Run the step once more.  Does not wait for the GPU, so wrong labels and row numbers are kept for `check`."""
        if self._graph is not None:
            self._graph.replay()
            return
        with using(self._pool):
            before = launches()
            self.output = self._function()
            self.launches = launches() - before

    def check(self) -> None:
        """Wait for the replays.  Raises ValueError if one of them met a label or a row number out of range."""
        for look in self._capture.checks:
            look()
