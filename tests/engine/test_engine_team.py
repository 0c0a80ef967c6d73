"""The engine's threads: every lane runs once, asleep or awake, together or not, from many threads of a program and after a fork."""

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from numba import carray, cfunc, types

from octavo import engine
from octavo.engine.kernels import team as teams
from octavo.engine.kernels.team import ASLEEP, HEAD, STATE, WORKER, Team, barrier, team
from octavo.kernels.memory import at, ordered_add

Words = npt.NDArray[np.int64]
LINE = 8
"""int64 words of a cache line: each lane's counts have one to themselves."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Tests set PyTorch's number of threads, which is also the engine's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@cfunc(types.void(types.int64, types.int64, types.int64))
def count(address, lane, lanes):  # type: ignore[no-untyped-def]
    """Each lane counts its calls, and adds up the lanes it was told of."""
    ordered_add(address + 64 * lane, 1)
    ordered_add(address + 64 * lane + 8, lanes)


@cfunc(types.void(types.int64, types.int64, types.int64))
def pass_on(address, lane, lanes):  # type: ignore[no-untyped-def]
    """Three rounds in which each lane takes its neighbour's number and adds 1; word 0 of the memory is where they meet."""
    words = carray(at(address), (LINE * (lanes + 1),), np.int64)
    for turn in range(3):
        taken = words[LINE * (1 + (lane + 1) % lanes)]
        barrier(address, lanes, 2 * turn + 1)
        words[LINE * (1 + lane)] = taken + 1
        barrier(address, lanes, 2 * turn + 2)


def words(lanes: int) -> Words:
    """Zeros for so many lanes and one more, from the start of a cache line."""
    memory = np.zeros(LINE * (lanes + 2), np.int64)
    first = -memory.ctypes.data % 64 // 8
    return memory[first : first + LINE * (lanes + 1)]


def address(memory: Words) -> int:
    return int(memory.ctypes.data)


def until_asleep(own: Team) -> None:
    """Return when all of a team's threads sleep: they do so by themselves when no work comes."""
    first = (own._address - own._memory.ctypes.data) // 8 + HEAD
    while not all(own._memory[first + worker * WORKER + STATE] == ASLEEP for worker in range(own.size - 1)):
        os.sched_yield()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_each_lane_runs_once(size: int) -> None:
    own, times = Team(size), 300
    for lanes in range(1, size + 1):
        memory = words(lanes)
        for _ in range(times):
            own.run(count.address, address(memory), lanes)
        assert memory[::LINE][:lanes].tolist() == [times] * lanes
        assert memory[1::LINE][:lanes].tolist() == [times * lanes] * lanes
        assert not memory[LINE * lanes :].any()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_lanes_that_wait_for_each_other_meet(size: int) -> None:
    own = Team(size)
    for lanes in range(2, size + 1):
        for _ in range(5):
            memory = words(lanes)
            start = np.arange(lanes) * 10
            memory[LINE::LINE] = start
            own.run(pass_on.address, address(memory), lanes, together=True)
            assert memory[LINE::LINE].tolist() == (np.roll(start, -3) + 3).tolist()


@pytest.mark.parametrize("size", [2, 3])
def test_threads_fall_asleep_and_are_woken(size: int) -> None:
    own, memory = Team(size), words(size)
    for times in range(1, 16):
        until_asleep(own)
        met = words(size)
        own.run(pass_on.address, address(met), size, together=True)  # all of them have to come
        assert met[LINE::LINE].tolist() == [3] * size
        own.run(count.address, address(memory), size)
        assert memory[::LINE][:size].tolist() == [times] * size


def test_no_job_is_missed_by_a_thread_that_falls_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        met = words(2)
        for patience in (50, 100, 200, 400):  # about as long as the next job takes to come
            monkeypatch.setattr(teams, "PATIENCE", patience)
            for _ in range(400):
                met[:] = 0
                own.run(pass_on.address, address(met), 2, together=True)
                done.append(met[LINE::LINE].tolist())

    own, done = Team(2), list[list[int]]()
    caller = threading.Thread(target=work, daemon=True)
    caller.start()
    caller.join(60)  # a job whose thread sleeps on never ends
    assert done == [[3, 3]] * 1600


def test_more_lanes_than_threads_find_a_larger_team() -> None:
    own, memory, met = Team(2), words(4), words(3)
    own.run(count.address, address(memory), 4)
    assert memory[::LINE][:4].tolist() == [1] * 4
    own.run(pass_on.address, address(met), 3, together=True)
    assert met[LINE::LINE].tolist() == [3] * 3


def test_many_threads_share_a_team() -> None:
    own, times, callers = Team(3), 60, 6

    def call(_: int) -> list[int]:
        memory = words(3)
        for turn in range(times):
            if turn % 20 == 0:
                met = words(3)
                own.run(pass_on.address, address(met), 3, together=True)
                assert met[LINE::LINE].tolist() == [3] * 3
            own.run(count.address, address(memory), 3)
        found: list[int] = memory[::LINE][:3].tolist()
        return found

    with ThreadPoolExecutor(callers) as pool:
        assert list(pool.map(call, range(callers))) == [[times] * 3] * callers


def test_many_threads_compute_the_same_as_one() -> None:
    draw = np.random.Generator(np.random.Philox(1))
    data = engine.from_numpy(draw.normal(0, 1, (128, 96)).astype(np.float32))
    labels = engine.from_numpy(draw.integers(0, 200, 128))
    start = draw.normal(0, 0.1, (96, 200)).astype(np.float32)

    def train(_: int) -> bytes:
        weight = engine.from_numpy(start.copy(), requires_grad=True)
        velocity = engine.zeros(weight.shape)
        for _ in range(10):
            engine.cross_entropy(data @ weight, labels).backward()
            with engine.no_grad():
                assert weight.grad is not None
                engine.sgd_(weight, weight.grad, velocity, 0.5, momentum=0.9)
            weight.grad = None
        return weight.numpy().tobytes()

    alone = train(0)
    gc.collect()
    held = engine.pool().in_use
    for count_ in (1, 2, 3):
        torch.set_num_threads(count_)
        assert train(0) == alone
        with ThreadPoolExecutor(5) as pool:
            assert set(pool.map(train, range(10))) == {alone}
    gc.collect()
    assert engine.pool().in_use == held


def test_a_thread_records_for_itself() -> None:
    x = engine.from_numpy(np.ones(3, np.float32), requires_grad=True)
    with engine.no_grad(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: (x * 2.0).node is not None).result()
        assert (x * 2.0).node is None


def test_the_team_has_as_many_threads_as_kernels_may_use() -> None:
    for size in (1, 3, 2):
        torch.set_num_threads(size)
        assert team().size == size
        assert team() is team() is teams._teams[size]


def run(program: str, **variables: str) -> str:
    """Run Python in a process of its own, without torch: the engine's threads are those of OMP_NUM_THREADS."""
    environment: dict[str, Any] = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


MAKE_PRODUCT = """
import os, sys
import numpy as np
from octavo import engine
from octavo.engine.kernels.team import team

def product():
    x = np.random.Generator(np.random.Philox(0)).normal(0, 1, (200, 300)).astype(np.float32)
    a = engine.from_numpy(x)
    return (a @ a.T).numpy().tobytes() + (a * 3.0).numpy().tobytes()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("threads", ["1", "3"])
def test_a_forked_process_computes_the_same(threads: str) -> None:
    program = (
        MAKE_PRODUCT
        + """
expected, before = product(), team()
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        same = all(product() == expected for _ in range(5))
        os._exit(0 if same and team() is not before and team().size == before.size else 1)
    children.append(child)
    assert product() == expected
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
assert team() is before
print("done", before.size)
"""
    )
    assert run(program, OMP_NUM_THREADS=threads) == f"done {threads}"


def test_threads_that_begin_at_once_find_one_team_and_a_process_ends_under_their_eyes() -> None:
    program = (
        MAKE_PRODUCT
        + """
import threading
start, found = threading.Barrier(8), []

def begin():
    start.wait()
    found.append((id(team()), product()))

callers = [threading.Thread(target=begin) for _ in range(8)]
for caller in callers: caller.start()
for caller in callers: caller.join()
print(len(found), len(set(found)), sum(one.name.startswith("octavo-engine") for one in threading.enumerate()))
"""
    )
    assert run(program, OMP_NUM_THREADS="4") == "8 1 3"
