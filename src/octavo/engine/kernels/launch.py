"""How a compiled kernel is called from Python, or written down to be called again."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from numba import njit

from octavo.engine.kernels.team import team
from octavo.kernels.native import native

__all__ = ["Kernel", "Recorder", "inner", "lane_kernel", "recorder", "refuse"]

inner: Any = njit(nogil=True, error_model="numpy")
"""For what a kernel calls: compiled with it, and kept on disk as part of it."""
lane_kernel = native(3)
"""For a function of (arguments, lane, lanes), which a team runs."""


class Recorder:
    """The calls that a captured step makes: (kernel, arguments, lanes), their names, and the memory that the arguments lie in.

    checks: what to look at after each run, and raises if it went wrong.  changed: storages that the step writes in place.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self.names: list[str] = []
        self.memory: list[Any] = []
        self.checks: list[Callable[[], None]] = []
        self.changed: list[Any] = []


recorder: ContextVar[Recorder | None] = ContextVar("octavo_engine_recorder", default=None)


class Kernel:
    """A `lane_kernel` that is called from Python; layout: of its arguments, as `struct` spells it."""

    __slots__ = ("_block", "_function", "_layout", "name")

    def __init__(self, name: str, function: Any, layout: str) -> None:
        self.name, self._function, self._layout = name, function, struct.Struct(layout)
        self._block: Any = ctypes.c_char * self._layout.size

    def __call__(self, lanes: int, *arguments: Any, check: Callable[[Any], None] | None = None) -> None:
        """Run on so many lanes and wait; while a step is captured, write the call down and run nothing.

        check: called with the arguments' memory afterwards, in which the kernel may have left word of an error.
        """
        recording = recorder.get()
        # A block of its own for each call: two threads of a program may call at once.
        block = self._block.from_buffer_copy(self._layout.pack(*arguments))
        address = ctypes.addressof(block)
        if recording is None:
            team().run(self._function.address, address, lanes)
            if check is not None:
                check(block)
            return
        recording.calls.append((self._function.address, address, lanes))
        recording.names.append(self.name)
        recording.memory.append(block)
        if check is not None:
            recording.checks.append(functools.partial(check, block))


def refuse(what: str) -> None:
    """Raise RuntimeError where a step is being captured, which only writes compiled kernels down."""
    if recorder.get() is not None:
        raise RuntimeError(
            f"{what} while a step is captured, before anything of it ran; do that outside the step, or run it uncaptured"
        )
