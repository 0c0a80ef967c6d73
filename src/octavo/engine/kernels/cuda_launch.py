"""How the engine's Triton kernels are called: on the GPU, or, under `TRITON_INTERPRET=1`, in host memory by Triton's interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import triton

from octavo.engine.kernels import cuda_element_kernels
from octavo.engine.storage import Storage
from octavo.engine.tensor import Tensor

__all__ = ["INTERPRETED", "At", "Capture", "capture", "launch", "launches", "processors", "stream"]

INTERPRETED = not isinstance(cuda_element_kernels.fill_kernel, triton.JITFunction)
_OPTIONS: dict[str, Any] = {} if INTERPRETED else {"enable_fp_fusion": False}
"""What every launch says: that products and sums are rounded one by one."""
_made = 0


@dataclass(slots=True)
class Capture:
    """What a step that is being captured leaves beside its kernels.

    words: int32 zeros, in which its kernels report what is wrong, each in its own.  checks: what looks at them later, and raises.
    """

    words: Storage
    checks: list[Callable[[], None]] = field(default_factory=list)


capture: ContextVar[Capture | None] = ContextVar("octavo_engine_cuda_capture", default=None)


class At(NamedTuple):
    """Numbers of a dtype from an address on: how a kernel is told of memory that is no tensor's, or that it sees otherwise."""

    address: int
    dtype: str


class _Pointer:
    """What Triton asks of an argument that is memory."""

    __slots__ = ("_address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self._address


class _Element:
    """The one element at an address, as NumPy takes it: the interpreter wants a tensor of torch, and of that no more than where it is."""

    __slots__ = ("__array_interface__",)

    def __init__(self, address: int, dtype: np.dtype[Any]) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (1,), "typestr": dtype.str, "version": 3}


@functools.cache
def _torch_dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = At(value.address, value.dtype.name)
    if not isinstance(value, At):
        return value
    if INTERPRETED:
        return torch.from_numpy(np.asarray(_Element(value.address, np.dtype(value.dtype))))
    return _Pointer(value.address, _torch_dtype(value.dtype))


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run so many programs of a kernel; tensors and `At` go as addresses, and the caller sees to it that they are contiguous."""
    global _made
    if programs:
        _made += 1
        kernel[(programs,)](*map(_argument, arguments), **constants, **_OPTIONS)


def launches() -> int:
    """How many kernels this process has launched so far, or written down while it captured."""
    return _made


def stream() -> int:
    """The CUDA stream that kernels are launched on."""
    driver = triton.runtime.driver.active
    found: int = driver.get_current_stream(driver.get_current_device())
    return found


@functools.cache
def processors() -> int:
    """How many multiprocessors the GPU has; one under the interpreter, which runs programs one after the other."""
    if INTERPRETED:
        return 1
    driver = triton.runtime.driver.active
    found: int = driver.utils.get_device_properties(driver.get_current_device())["multiprocessor_count"]
    return found
