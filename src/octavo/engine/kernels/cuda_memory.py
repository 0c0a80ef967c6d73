"""The engine's memory on the GPU: where it comes from, how it is copied, and how it meets other libraries.

CuPy takes it from the device and keeps it; under Triton's interpreter it is the host's.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import torch

from octavo.engine.kernels import cuda_element_kernels as kernels
from octavo.engine.kernels.cuda_element_kernels import BLOCK, Way
from octavo.engine.kernels.cuda_launch import INTERPRETED, At, capture, launch, stream
from octavo.engine.storage import Device, Storage
from octavo.engine.tensor import Tensor, checked_dtype, empty

__all__ = ["allocate", "contiguous", "copy", "fill", "from_dlpack", "merged", "move", "to_dlpack", "transfer"]

_LINE = 64
_DIMENSIONS = 4
_WORDS = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}
"""Integers of each size, in bytes: a copy looks at nothing else."""


@functools.cache
def _cupy() -> Any:
    try:
        import cupy
    except ModuleNotFoundError:
        raise ValueError(
            "the engine takes CUDA memory from CuPy, which is not installed: pip install cupy-cuda12x"
        ) from None
    if not cupy.cuda.is_available():
        raise ValueError("the engine's CUDA tensors need an NVIDIA GPU, and CuPy finds none; use device='cpu'")
    return cupy


def allocate(size: int) -> tuple[int, Any]:
    """(address, what keeps it alive) of so many bytes, at the start of a cache line."""
    if INTERPRETED:
        host = np.empty(size + _LINE, np.uint8)
        address = int(host.ctypes.data)
        return address + -address % _LINE, host
    memory = _cupy().cuda.alloc(size)
    return int(memory.ptr), memory


def transfer(target: int, source: int, size: int) -> None:
    """Copy bytes between host and device, after all kernels so far, and wait."""
    if INTERPRETED:
        ctypes.memmove(target, source, size)
        return
    runtime = _cupy().cuda.runtime
    runtime.memcpyAsync(target, source, size, runtime.memcpyDefault, stream())
    runtime.streamSynchronize(stream())


def move(tensor: Tensor, device: Device) -> Tensor:
    """`Tensor.to`: a contiguous copy on the other device.  Raises RuntimeError while a step is captured."""
    if capture.get() is not None:
        raise RuntimeError(
            f"a tensor moves to {device} while a step is captured, before anything of it ran; do that outside the step"
        )
    if device is Device.CUDA:
        array = np.ascontiguousarray(tensor.array)
        out = empty(tensor.shape, tensor.dtype, device=device)
        transfer(out.address, int(array.ctypes.data), array.nbytes)
        return out
    source = contiguous(tensor)
    out = empty(source.shape, source.dtype)
    transfer(out.address, source.address, source.size * source.dtype.itemsize)
    return out


def merged(shape: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[list[int], list[list[int]]]:
    """The inner three sizes of the same elements in four dimensions, and each tensor's four strides.

    Raises ValueError where dimensions that lie one inside the other do not come to so few.
    """
    dimensions: list[tuple[int, tuple[int, ...]]] = []
    for length, *steps in zip(shape, *strides, strict=True):
        if length == 1:
            continue
        if dimensions and all(outer == step * length for outer, step in zip(dimensions[-1][1], steps, strict=True)):
            length *= dimensions.pop()[0]
        dimensions.append((length, tuple(steps)))
    if len(dimensions) > _DIMENSIONS:
        raise ValueError(
            f"the GPU kernels go through {_DIMENSIONS} dimensions in strides; shape {list(shape)} has {len(dimensions)}: reshape it, or "
            "copy it in parts"
        )
    filled = [(1, (0,) * len(strides))] * (_DIMENSIONS - len(dimensions)) + dimensions
    return [length for length, _ in filled[1:]], [[steps[i] for _, steps in filled] for i in range(len(strides))]


def copy(target: Tensor, source: Tensor) -> None:
    """target = source, of one shape and dtype, any strides."""
    word = _WORDS[source.dtype.itemsize]
    lengths, (a, b) = merged(source.shape, source.strides, target.strides)
    launch(
        kernels.copy_kernel,
        -(-source.size // BLOCK),
        At(source.address, word),
        At(target.address, word),
        source.size,
        *lengths,
        *a,
        *b,
        TARGET_WAY=int(Way.FLAT if target.is_contiguous else Way.STRIDED),
        WIDTH=BLOCK,
    )


def contiguous(x: Tensor) -> Tensor:
    """x itself where its elements lie in order, else a copy."""
    if x.is_contiguous:
        return x
    out = empty(x.shape, x.dtype, device=x.device)
    copy(out, x)
    return out


def fill(address: int, size: int, value: float, dtype: np.dtype[Any]) -> None:
    """`size` numbers of that dtype from the address on = value."""
    word = _WORDS[dtype.itemsize]
    with np.errstate(over="ignore", invalid="ignore"):
        bits = int(np.asarray(value).astype(dtype).view(word))
    launch(kernels.fill_kernel, -(-size // BLOCK), At(address, word), size, bits, WIDTH=BLOCK)


class _Exported:
    """Host memory as NumPy takes it, under the interpreter; holds the storage as long as an array looks at it."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage, item = tensor.storage, tensor.dtype.itemsize
        self.__array_interface__ = {
            "data": (tensor.address, False),
            "shape": tensor.shape,
            "strides": tuple(step * item for step in tensor.strides),
            "typestr": tensor.dtype.str,
            "version": 3,
        }


def to_dlpack(tensor: Tensor, **options: Any) -> Any:
    """The tensor's memory as a DLPack capsule, from CuPy; options: as the array API has `__dlpack__`."""
    if INTERPRETED:
        return np.asarray(_Exported(tensor)).__dlpack__()
    cupy, item = _cupy(), tensor.dtype.itemsize
    whole = cupy.cuda.UnownedMemory(tensor.storage.address, tensor.storage.nbytes, tensor.storage)
    place = cupy.cuda.MemoryPointer(whole, tensor.offset)
    strides = tuple(step * item for step in tensor.strides)
    return cupy.ndarray(tensor.shape, tensor.dtype, place, strides).__dlpack__(**options)


def from_dlpack(source: Any) -> Tensor:
    """A CUDA tensor on the memory of another library's array, without a copy.  Raises ValueError for a dtype that the engine lacks."""
    if INTERPRETED:
        array: Any = torch.utils.dlpack.from_dlpack(source.__dlpack__()).numpy()
        address = int(array.ctypes.data)
    else:
        array = _cupy().from_dlpack(source)
        address = int(array.data.ptr)
    dtype = checked_dtype(array.dtype)
    strides = tuple(int(step) // dtype.itemsize for step in array.strides)
    return Tensor(Storage(Device.CUDA, address, int(array.nbytes), array), tuple(array.shape), strides, dtype)
