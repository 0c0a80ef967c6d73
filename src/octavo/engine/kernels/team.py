"""Threads that wait for work awake: a kernel reaches all of them in about a microsecond.

A kernel of the engine is a C function of three numbers: the address of its arguments, which lane it is, and how many there are.  What
a lane computes depends on these alone, so results do not depend on which thread runs it, or whether several do.
"""

from __future__ import annotations

import os
import platform
import threading
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.kernels import threads
from octavo.kernels.memory import at, atomic_max, ordered_add, ordered_exchange
from octavo.kernels.products import caller

__all__ = ["Team", "barrier", "call", "team"]

SEQUENCE, DONE, KERNEL, ARGUMENTS, LANES = 0, 8, 16, 17, 18
HEAD, WORKER, CLAIMED, STATE, SEEN = 24, 16, 0, 8, 9
"""int64 words of a team's memory: a job's, then WORKER words for each thread, on cache lines of their own."""
AWAKE, ASLEEP = 0, 1
PATIENCE = 6000
"""How often a thread looks for work before it sleeps: one or two milliseconds, most of which it leaves to others."""
LONG = 2000
"""How often a thread that waits for others looks before it gives way: their core may be busy with something else."""

call: Any = caller("ppp")
"""call(kernel, (arguments, lane, lanes))"""


@intrinsic
def look(typing_context, address):
    """The int64 there now, read before whatever is read next."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def rest(typing_context):
    """Leave the core's units to others for some cycles."""

    def generate(context, builder, signature, arguments):
        int32 = ir.IntType(32)
        match platform.machine().lower():
            case "x86_64" | "amd64":
                hint, numbers = "llvm.x86.sse2.pause", []
            case "aarch64" | "arm64":
                hint, numbers = "llvm.aarch64.hint", [ir.Constant(int32, 1)]  # yield
            case _:
                return context.get_dummy_value()
        form = ir.FunctionType(ir.VoidType(), [int32] * len(numbers))
        builder.call(cgutils.get_or_insert_function(builder.module, form, hint), numbers)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def give_way(typing_context):
    """Let another thread have the core, where the system has a call for that."""

    def generate(context, builder, signature, arguments):
        if hasattr(os, "sched_yield"):
            form = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, form, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


_compiled: Any = njit(cache=True, nogil=True, error_model="numpy")


@_compiled
def _await(address: int, count: int) -> None:
    """Wait until the int64 there is at least `count`: awake at first, then leaving the core to whoever wants it."""
    waited = 0
    while look(address) < count:
        rest()
        waited += 1
        if waited > LONG:
            give_way()


@_compiled
def barrier(address: int, lanes: int, turn: int) -> None:
    """Wait until each of `lanes` lanes has come here for the `turn`-th time, from 1; address: an int64 that was 0 before the first."""
    ordered_add(address, 1)
    _await(address, lanes * turn)


@_compiled
def _finish(memory: int) -> None:
    """Run lane 0, then the lanes that no thread has begun, and wait for the others."""
    p = carray(at(memory), (HEAD,), np.int64)
    kernel, arguments, lanes, job = p[KERNEL], p[ARGUMENTS], p[LANES], p[SEQUENCE]
    call(kernel, (arguments, np.int64(0), lanes))
    for w in range(lanes - 1):
        if atomic_max(memory + 8 * (HEAD + w * WORKER + CLAIMED), job) < job:
            call(kernel, (arguments, np.int64(w + 1), lanes))
            ordered_add(memory + 8 * DONE, 1)
    _await(memory + 8 * DONE, lanes - 1)


@_compiled
def _begin(memory: int, workers: int, kernel: int, arguments: int, lanes: int) -> int:
    """Hand a job to the threads; returns a bit for each that sleeps and has to be woken.  Awake, they finish it before this returns."""
    p = carray(at(memory), (HEAD,), np.int64)
    job = p[SEQUENCE] + 1
    for w in range(lanes - 1, workers):
        atomic_max(memory + 8 * (HEAD + w * WORKER + CLAIMED), job)
    p[KERNEL], p[ARGUMENTS], p[LANES] = kernel, arguments, lanes
    ordered_exchange(memory + 8 * DONE, 0)
    ordered_add(memory + 8 * SEQUENCE, 1)
    asleep = 0
    for w in range(lanes - 1):
        if ordered_exchange(memory + 8 * (HEAD + w * WORKER + STATE), AWAKE) == ASLEEP:
            asleep |= 1 << w
    if not asleep:
        _finish(memory)
    return asleep


@_compiled
def _serve(memory: int, worker: int, patience: int) -> None:
    """Take jobs until none came for a while."""
    own = memory + 8 * (HEAD + worker * WORKER)
    p, seen = carray(at(memory), (HEAD,), np.int64), carray(at(own + 8 * SEEN), (1,), np.int64)
    idle = 0
    while True:
        job = look(memory + 8 * SEQUENCE)
        if job != seen[0]:
            seen[0], idle = job, 0
            # Whoever claims a lane first runs it, and a job with a claimed lane is not over: its words stay as they are.
            if atomic_max(own + 8 * CLAIMED, job) < job:
                call(p[KERNEL], (p[ARGUMENTS], np.int64(worker + 1), p[LANES]))
                ordered_add(memory + 8 * DONE, 1)
            continue
        rest()
        idle += 1
        if idle > LONG:
            give_way()
        if idle > patience:
            ordered_exchange(own + 8 * STATE, ASLEEP)
            late = look(memory + 8 * SEQUENCE) != seen[0]
            if not late or ordered_exchange(own + 8 * STATE, AWAKE) == AWAKE:
                return
            idle = 0


class Team:
    """The calling thread and `size - 1` others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = np.zeros(HEAD + (size - 1) * WORKER + 8, np.int64)
        self._address = self._memory.ctypes.data + -self._memory.ctypes.data % 64
        self._wake = [threading.Semaphore(0) for _ in range(size - 1)]
        self._free = threading.Lock()
        for worker in range(size - 1):
            arguments = (self._memory, self._address, worker, self._wake[worker])
            self._word(worker, STATE, ASLEEP)
            threading.Thread(target=_work, args=arguments, daemon=True, name=f"octavo-engine-{worker + 1}").start()

    def _word(self, worker: int, slot: int, value: int) -> None:
        first = (self._address - self._memory.ctypes.data) // 8
        self._memory[first + HEAD + worker * WORKER + slot] = value

    def run(self, kernel: int, arguments: int, lanes: int, *, together: bool = False) -> None:
        """Call `kernel(arguments, lane, lanes)` for each lane and wait.  together: they wait for each other inside."""
        if lanes == 1:
            _alone(kernel, arguments, 1)
        elif lanes > self.size:  # written down when kernels had more threads
            team(lanes).run(kernel, arguments, lanes, together=together)
        elif self._free.acquire(blocking=together):
            try:
                asleep = _begin(self._address, self.size - 1, kernel, arguments, lanes)
                if asleep:
                    for worker, wake in enumerate(self._wake):
                        if asleep >> worker & 1:
                            wake.release()
                    _finish(self._address)
            finally:
                self._free.release()
        else:  # another thread of the program has the team
            _alone(kernel, arguments, lanes)


def _work(memory: Any, address: int, worker: int, wake: threading.Semaphore) -> None:
    while True:
        wake.acquire()
        _serve(address, worker, PATIENCE)


@_compiled
def _alone(kernel: int, arguments: int, lanes: int) -> None:
    for lane in range(lanes):
        call(kernel, (arguments, np.int64(lane), lanes))


_teams: dict[int, Team] = {}
_making = threading.Lock()

if hasattr(os, "register_at_fork"):  # a forked child has the memory of a team, but not its threads
    os.register_at_fork(after_in_child=_teams.clear)


def team(size: int = 0) -> Team:
    """The process's team of that size, or of as many threads as kernels may use (`octavo.kernels.threads.count`)."""
    size = size or threads.count()
    found = _teams.get(size)
    if found is None:
        with _making:
            found = _teams.get(size) or _teams.setdefault(size, Team(size))
    return found
