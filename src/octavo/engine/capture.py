"""A training step written down once and run many times, with no Python between its kernels.

    graph = capture(step, rows)          # step(rows) -> loss, on tensors; nothing of it runs yet
    losses = graph.run(order)            # order: [times, *rows.shape]; losses: [times, *loss.shape]

What the step reads and writes besides its inputs (weights, data, scales) is used where it lies: a graph is a view of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.engine.kernels.launch import Recorder, recorder
from octavo.engine.kernels.replay import replay
from octavo.engine.kernels.team import team
from octavo.engine.storage import Device, Pool, using
from octavo.engine.tensor import Tensor, empty, from_numpy

__all__ = ["Graph", "capture"]


class Graph:
    """A captured step: `run` repeats it.

    kernels: the names of its kernels, in order.  memory: bytes that it keeps for what it computes.
    """

    def __init__(
        self, recording: Recorder, own: Pool, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], single: bool
    ) -> None:
        self._recording, self._pool, self._single = recording, own, single
        self._inputs, self._outputs = inputs, outputs
        self.kernels = tuple(recording.names)
        self.memory = own.allocated
        lanes = [call[2] for call in recording.calls]
        self._lanes = max(lanes, default=1)
        # Two calls of lane 0 alone follow each other on it anyway.
        meets = [max(pair) > 1 for pair in zip(lanes, [*lanes[1:], self._lanes], strict=True)]
        rows = [(*call, meet) for call, meet in zip(recording.calls, meets, strict=True)]
        self._calls = np.array(rows, np.int64).reshape(-1, 4)

    def run(self, *inputs: npt.NDArray[Any] | Tensor) -> Any:
        """Run the step once for each row of the inputs, [times, *shape] of what it was captured with, of the same dtypes.

        Returns what the step returned, [times, *shape]: a tensor, or a tuple of them, whose memory is the caller's.  With one thread and
        with several the bits are the same.  Raises ValueError for inputs of other shapes, and what a kernel found wrong: then the
        steps after it have run as well.
        """
        given = [one if isinstance(one, Tensor) else from_numpy(np.ascontiguousarray(one)) for one in inputs]
        times = self._checked(given)
        results = [empty((times, *one.shape), one.dtype) for one in self._outputs]
        feeds = _table((one.address, fed.address, _nbytes(one)) for one, fed in zip(self._inputs, given, strict=True))
        leaves = _table(
            (one.address, out.address, _nbytes(one)) for one, out in zip(self._outputs, results, strict=True)
        )
        meeting = np.zeros(1, np.int64)
        addresses = [x.ctypes.data for x in (self._calls, meeting, feeds, leaves)]
        words = [
            addresses[0],
            len(self._calls),
            times,
            addresses[1],
            addresses[2],
            len(feeds),
            addresses[3],
            len(leaves),
        ]
        block = (ctypes.c_int64 * len(words))(*words)
        team().run(replay.address, ctypes.addressof(block), self._lanes, together=True)
        for storage in self._recording.changed:
            storage.version += 1
        wrong: list[ValueError] = []
        for check in self._recording.checks:  # each forgets what it reports
            try:
                check()
            except ValueError as error:
                wrong.append(error)
        if wrong:
            raise wrong[0]
        return results[0] if self._single else tuple(results)

    def _checked(self, given: list[Tensor]) -> int:
        """How many times, where the inputs are the step's."""
        wanted = [f"{one.dtype} [times{''.join(f', {n}' for n in one.shape)}]" for one in self._inputs]
        fits = len(given) == len(self._inputs) and all(
            one.ndim == own.ndim + 1 and one.shape[1:] == own.shape and one.dtype == own.dtype and one.is_contiguous
            for one, own in zip(given, self._inputs, strict=True)
        )
        if not fits or len({one.shape[0] for one in given}) > 1:
            got = ", ".join(f"{one.dtype} {list(one.shape)}" for one in given) or "nothing"
            raise ValueError(f"this graph runs on contiguous {' and '.join(wanted)}, as many times each; got {got}")
        return given[0].shape[0] if given else 1


def _nbytes(x: Tensor) -> int:
    return x.size * x.dtype.itemsize


def _table(rows: Any) -> npt.NDArray[np.int64]:
    return np.array(list(rows), np.int64).reshape(-1, 3)


def capture(step: Callable[..., Any], *inputs: Tensor) -> Graph:
    """Write down the kernels that `step(*inputs)` calls; none of them runs.

    step: a function of tensors that returns a tensor or a tuple of them; it may record gradients, call backward and update weights.  It
    is called once, with tensors of the inputs' shapes and dtypes but of no meaning: values must not decide what it does, and reading one
    raises RuntimeError, as does an operator that has no compiled kernel for its arguments.
    """
    if any(one.device is not Device.CPU for one in inputs):
        raise ValueError("capture is of steps on the CPU; on a GPU see octavo.engine.kernels.cuda")
    own, recording = Pool(Device.CPU), Recorder()
    with using(own):
        slots = tuple(empty(one.shape, one.dtype) for one in inputs)
        token = recorder.set(recording)
        try:
            returned = step(*slots)
        finally:
            recorder.reset(token)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    for one in outputs:
        if not isinstance(one, Tensor) or not one.is_contiguous:
            raise ValueError(f"a captured step returns contiguous tensors; got {type(one).__name__}")
    return Graph(recording, own, slots, outputs, not isinstance(returned, tuple))
