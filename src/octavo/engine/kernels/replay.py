"""The loop that runs a captured step again and again, on all lanes at once, with nothing of Python between its kernels."""

from __future__ import annotations

import enum

import numpy as np
from numba import carray

from octavo.engine.kernels.launch import inner, lane_kernel
from octavo.engine.kernels.team import barrier, call
from octavo.kernels.memory import at

__all__ = ["Slot", "replay"]


class Slot(enum.IntEnum):
    """Arguments, 8 bytes each."""

    CALLS = 0
    """The address of (kernel, arguments, lanes, whether all lanes meet afterwards), int64 each."""
    COUNT = 1
    TIMES = 2
    MEETING = 3
    """An int64, 0 at first."""
    FEEDS = 4
    """The address of (where to, where from at first, bytes a time), int64 each: what each time takes."""
    FED = 5
    RESULTS = 6
    """The address of (where from, where to at first, bytes a time): what each time leaves."""
    LEFT = 7
    WORDS = 8


CALLS, COUNT, TIMES, MEETING, FEEDS, FED, RESULTS, LEFT, WORDS = (int(slot) for slot in Slot)


@inner
def _copy(source, target, size):
    x, out = carray(at(source), (size,), np.uint8), carray(at(target), (size,), np.uint8)
    for i in range(size):
        out[i] = x[i]


@lane_kernel
def replay(address, lane, lanes):
    """All times, each lane in step with the others."""
    p = carray(at(address), (WORDS,), np.int64)
    calls = carray(at(p[CALLS]), (p[COUNT], 4), np.int64)
    feeds, results = carray(at(p[FEEDS]), (p[FED], 3), np.int64), carray(at(p[RESULTS]), (p[LEFT], 3), np.int64)
    turn = 0
    for time in range(p[TIMES]):
        if lane == 0:
            for i in range(p[FED]):
                _copy(feeds[i, 1] + time * feeds[i, 2], feeds[i, 0], feeds[i, 2])
        turn += 1
        barrier(p[MEETING], lanes, turn)
        for i in range(p[COUNT]):
            if lane < calls[i, 2]:
                call(calls[i, 0], (calls[i, 1], lane, calls[i, 2]))
            if calls[i, 3]:
                turn += 1
                barrier(p[MEETING], lanes, turn)
        if lane == 0:
            for i in range(p[LEFT]):
                _copy(results[i, 0], results[i, 1] + time * results[i, 2], results[i, 2])
