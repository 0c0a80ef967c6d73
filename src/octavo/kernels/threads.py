"""Running a compiled CPU kernel on several threads, on a pool that already exists.

Two OpenMP pools on one machine spin against each other, so where PyTorch is loaded its own pool is used, through libgomp's public
entry point; elsewhere Python threads do (the kernels hold no GIL).
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

__all__ = ["count", "gomp", "of_products", "run", "scratch"]

SERIAL = 1 << 20
"""Below this many multiply-adds waking a second thread costs more than it saves."""


def count() -> int:
    """Threads a kernel may use: PyTorch's setting where it is loaded, else OMP_NUM_THREADS, else the cores given to us."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else _default_count()


@functools.cache
def _default_count() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def of_products(multiply_adds: int) -> int:
    """How many of those threads a matrix product or a convolution is worth."""
    return 1 if multiply_adds < SERIAL else count()


@functools.cache
def gomp() -> Any:
    """libgomp as PyTorch has loaded it, or None where PyTorch brings another OpenMP."""
    try:
        library = ctypes.CDLL("libgomp.so.1")
    except OSError:
        return None
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="octavo")


if hasattr(os, "register_at_fork"):  # a forked child has the pool, but not its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def run(kernel: Any, arguments: int, threads: int) -> None:
    """Call `kernel(arguments)` once on each of `threads` threads and wait.

    kernel: a ctypes function of one pointer whose calls share out the work among themselves; arguments: that pointer.
    """
    if threads <= 1:
        kernel(arguments)
    elif "torch" in sys.modules and (library := gomp()) is not None:
        library.GOMP_parallel(ctypes.cast(kernel, ctypes.c_void_p), arguments, threads, 0)
    else:
        others = [_pool(threads - 1).submit(kernel, arguments) for _ in range(threads - 1)]
        kernel(arguments)
        for other in others:
            other.result()


class _Scratch(threading.local):
    memory: Any = np.empty(0, np.uint8)


_own = _Scratch()


def scratch(size: int) -> int:
    """The address of that many bytes, at the start of a cache line, which the calling thread may use until it asks again."""
    if _own.memory.size < size + 64:
        _own.memory = np.empty(size + 64, np.uint8)
    address = int(_own.memory.ctypes.data)
    return address + -address % 64
