"""Where tensors lie: memory that is taken once and used again, and a count of the changes made to it."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np

__all__ = ["Device", "Pool", "Storage", "pool", "using"]

_LINE = 64


class Device(enum.Enum):
    """Where a tensor lies and its operators run."""

    CPU = "cpu"
    """Host memory; kernels compiled by Numba, and NumPy."""
    CUDA = "cuda"
    """Memory of the current NVIDIA GPU; kernels compiled by Triton."""

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(f"a device is {' or '.join(one.value for one in cls)}; got {value!r}")


class Storage:
    """Some bytes on a device.

    address: of the first.  version: how often an operator changed them in place; views share it.  owner: what keeps the memory alive.
    """

    __slots__ = ("_pool", "address", "device", "nbytes", "owner", "version")

    def __init__(self, device: Device, address: int, nbytes: int, owner: Any, pool: Pool | None = None) -> None:
        self.device, self.address, self.nbytes, self.owner, self._pool = device, address, nbytes, owner, pool
        self.version = 0

    def __del__(self) -> None:
        if self._pool is not None:
            self._pool.give_back(self)


class Pool:
    """Memory of one device, which keeps what tensors leave for those that come.

    allocated: bytes taken from the system so far.  in_use, peak: bytes that tensors hold now, and the most they ever held.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.allocated = self.in_use = self.peak = 0
        self._free: dict[int, list[tuple[int, Any]]] = {}

    def take(self, nbytes: int) -> Storage:
        """That many bytes, of any content, at the start of a cache line."""
        size = max(_LINE, nbytes + -nbytes % _LINE)
        free = self._free.get(size)
        if free:
            address, owner = free.pop()
        else:
            address, owner = _allocate(self.device, size)
            self.allocated += size
        self.in_use += size
        self.peak = max(self.peak, self.in_use)
        return Storage(self.device, address, size, owner, self)

    def give_back(self, storage: Storage) -> None:
        """Keep a storage's memory for later."""
        self.in_use -= storage.nbytes
        self._free.setdefault(storage.nbytes, []).append((storage.address, storage.owner))

    def reset_peak(self) -> None:
        """Count the peak from now on."""
        self.peak = self.in_use


def _allocate(device: Device, size: int) -> tuple[int, Any]:
    match device:
        case Device.CPU:
            memory = np.empty(size + _LINE, np.uint8)
            address = int(memory.ctypes.data)
            return address + -address % _LINE, memory
        case Device.CUDA:
            from octavo.engine.kernels import cuda

            return cuda.allocate(size)


_pools = {device: Pool(device) for device in Device}
_private: ContextVar[Pool | None] = ContextVar("octavo_engine_pool", default=None)


def pool(device: Device = Device.CPU) -> Pool:
    """The pool that new tensors of a device come from."""
    private = _private.get()
    return private if private is not None and private.device is device else _pools[device]


@contextlib.contextmanager
def using(own: Pool) -> Iterator[Pool]:
    """Inside, new tensors of that pool's device come from it."""
    token = _private.set(own)
    try:
        yield own
    finally:
        _private.reset(token)
