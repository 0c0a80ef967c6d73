"""How a GPU kernel reports wrong numbers: in a word of memory, which the host looks at once the kernel is done.

An operator that runs by itself is waited for, and raises as on the CPU.  One in a captured step is not: its word keeps what went wrong
in any replay, until `Graph.check` looks.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np

from octavo.engine.kernels.cuda_launch import At, Capture, capture
from octavo.engine.kernels.cuda_memory import fill, transfer
from octavo.engine.storage import Device, Storage, pool

__all__ = ["WORDS", "settle", "word", "zeros"]

WORDS = 64
"""How many operators of a captured step may report."""
_SIZE = 4


def zeros() -> Storage:
    """Words that report nothing."""
    storage = pool(Device.CUDA).take(_SIZE * WORDS)
    fill(storage.address, WORDS, 0, np.dtype(np.int32))
    return storage


_alone = functools.cache(zeros)


def _of_capture(recording: Capture) -> At:
    taken = len(recording.checks)
    if taken == WORDS:
        raise ValueError(
            f"a captured step checks the numbers of at most {WORDS} operators, such as cross_entropy; capture it in parts"
        )
    return At(recording.words.address + _SIZE * taken, "int32")


def word() -> At:
    """Where the next kernel may report: an int32, 0 so far."""
    recording = capture.get()
    return At(_alone().address, "int32") if recording is None else _of_capture(recording)


def settle(place: At, explain: Callable[[int], ValueError]) -> None:
    """Raise `explain(rank)` if the kernel reported that rank at the word: now, or later where a step is captured."""
    recording = capture.get()
    if recording is None:
        _look(place, explain)
    else:
        recording.checks.append(functools.partial(_look, place, explain))


def _look(place: At, explain: Callable[[int], ValueError]) -> None:
    rank = ctypes.c_int32()
    transfer(ctypes.addressof(rank), place.address, _SIZE)
    if rank.value:
        transfer(place.address, ctypes.addressof(ctypes.c_int32()), _SIZE)
        raise explain(rank.value)
