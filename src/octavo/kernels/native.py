"""Functions for native callers, compiled when they are first needed, with a word to whoever waits."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba import cfunc, types

__all__ = ["Native", "native"]

PATIENCE = 1.0
"""Seconds after which a person is told what is going on: what Numba finds on disk takes less."""


class Native:
    """A C function of so many int64 that returns nothing: `address` of it, and `ctypes` to call it from Python.

    Compiled at the first look at either, and kept on disk by Numba.
    """

    def __init__(self, function: Callable[..., None], parameters: int) -> None:
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self._function, self._parameters = function, parameters

    @functools.cached_property
    def _compiled(self) -> Any:
        signature = types.void(*[types.int64] * self._parameters)
        with _word_to_whoever_waits():
            return cfunc(signature, cache=True, error_model="numpy")(self._function)

    @functools.cached_property
    def ctypes(self) -> Any:
        """The function as ctypes has it."""
        return self._compiled.ctypes

    @functools.cached_property
    def address(self) -> int:
        """Where the function lies."""
        return int(self._compiled.address)


def native(parameters: int) -> Callable[[Callable[..., None]], Native]:
    """Decorate a function of so many int64 to be a `Native`."""
    return functools.partial(Native, parameters=parameters)


@functools.cache
def _tell() -> None:
    """Once a process, and on a terminal alone: logs and pipes keep what they ask for."""
    if sys.stderr is not None and sys.stderr.isatty():
        print("octavo: compiling for this processor, which is done once and takes up to a minute", file=sys.stderr)


@contextmanager
def _word_to_whoever_waits() -> Iterator[None]:
    timer = threading.Timer(PATIENCE, _tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
