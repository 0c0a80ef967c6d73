"""`Tensor`: strided numbers on a device, which the engine's operators take and give."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from octavo.engine.storage import Device, Storage, pool

if TYPE_CHECKING:
    from octavo.engine.autograd import Node

__all__ = ["DTYPES", "Tensor", "empty", "from_dlpack", "from_numpy", "full", "zeros"]

DTYPES = tuple(np.dtype(name) for name in ("float32", "float64", "float16", "int64", "int32", "uint8", "bool"))
"""What a tensor may hold."""
FLOAT32, _HELD = DTYPES[0], frozenset(DTYPES)

# Operators by name, which `octavo.engine.operators` fills: a tensor's methods call them, and they are written on tensors.
operators: dict[str, Any] = {}


class _View:
    """Memory as NumPy takes it; holds the storage as long as an array looks at it."""

    __slots__ = ("__array_interface__", "storage")

    def __init__(self, storage: Storage, interface: dict[str, Any]) -> None:
        self.storage, self.__array_interface__ = storage, interface


class Tensor:
    """Numbers of one dtype, in any strides, on one device.

    shape: any number of dimensions, sizes 0 among them.  strides: in elements, as many as dimensions; negative and 0 are allowed.
    dtype: a NumPy dtype out of `DTYPES`; operators follow NumPy's rules where two meet.
    requires_grad: whether `backward` puts a gradient, of this shape and dtype, into `grad`.
    Views share memory and its version, so that a change in place is noticed wherever it matters.
    """

    __slots__ = (
        "__weakref__",
        "_array",
        "dtype",
        "grad",
        "node",
        "offset",
        "requires_grad",
        "shape",
        "storage",
        "strides",
    )

    def __init__(
        self, storage: Storage, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any], offset: int = 0
    ) -> None:
        self.storage, self.shape, self.strides, self.dtype, self.offset = storage, shape, strides, dtype, offset
        self.requires_grad = False
        self.grad: Tensor | None = None
        self.node: tuple[Node, int] | None = None
        self._array: npt.NDArray[Any] | None = None

    @property
    def address(self) -> int:
        """Of the first element, on the tensor's device."""
        return self.storage.address + self.offset

    @property
    def device(self) -> Device:
        """Where it lies."""
        return self.storage.device

    @property
    def version(self) -> int:
        """How often its memory was changed in place."""
        return self.storage.version

    @property
    def ndim(self) -> int:
        """How many dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after the other, the last dimension innermost."""
        if self.strides == strides_of(self.shape) or self.size == 0:
            return True
        ideal = strides_of(self.shape)
        return all(n == 1 or have == want for n, have, want in zip(self.shape, self.strides, ideal, strict=True))

    @property
    def array(self) -> npt.NDArray[Any]:
        """The same memory as a NumPy array.  Raises ValueError where it is not the host's."""
        if self._array is None:
            if self.device is not Device.CPU:
                raise ValueError(f"this tensor is on {self.device}, where NumPy cannot look; copy it with .numpy()")
            item = self.dtype.itemsize
            interface = {
                "data": (self.address, False),
                "shape": self.shape,
                "strides": tuple(stride * item for stride in self.strides),
                "typestr": self.dtype.str,
                "version": 3,
            }
            self._array = np.asarray(_View(self.storage, interface))
        return self._array

    def numpy(self) -> npt.NDArray[Any]:
        """The values: the tensor's own memory on the CPU, a copy from elsewhere.  Refused while a graph is captured."""
        from octavo.engine.kernels.launch import refuse

        refuse("a tensor's values are read")
        return self.array if self.device is Device.CPU else self.to(Device.CPU).array

    def item(self) -> Any:
        """The only element, as a Python number.  Raises ValueError where there are more, or none."""
        if self.size != 1:
            raise ValueError(f"item() is of a tensor with one element; this one has shape {list(self.shape)}")
        return self.numpy().reshape(()).item()

    def to(self, device: Device | str) -> Tensor:
        """The same values on that device: this tensor where it is there already.  Carries no gradient."""
        target = Device(device)
        if target is self.device:
            return self
        from octavo.engine.kernels import cuda

        return cuda.move(self, target)

    def detach(self) -> Tensor:
        """A view that no gradient flows through."""
        return Tensor(self.storage, self.shape, self.strides, self.dtype, self.offset)

    def backward(self, gradient: Tensor | None = None, *, retain: bool = False) -> None:
        """Add the gradient of this tensor to `grad` of all that require it: see `octavo.engine.autograd.backward`."""
        from octavo.engine.autograd import backward

        backward(self, gradient, retain=retain)

    def __dlpack__(self, **options: Any) -> Any:
        if self.requires_grad:
            raise BufferError("this tensor requires gradients, which do not travel; hand over its detach()")
        if self.device is Device.CPU:
            return self.array.__dlpack__(**options)
        from octavo.engine.kernels import cuda

        return cuda.to_dlpack(self, **options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0) if self.device is Device.CPU else (2, 0)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        flags = "" if self.device is Device.CPU else f", device={self.device}"
        flags += ", requires_grad=True" if self.requires_grad else ""
        values = np.array2string(self.numpy(), separator=", ", prefix="Tensor(", threshold=100)
        return f"Tensor({values}, dtype={self.dtype}{flags})"

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a tensor without dimensions")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    # NumPy must not take `array + tensor` for an array of tensors.
    __array_ufunc__ = None
    __hash__ = object.__hash__

    def __add__(self, other: Any) -> Tensor:
        return _call("add", self, other)

    def __radd__(self, other: Any) -> Tensor:
        return _call("add", other, self)

    def __sub__(self, other: Any) -> Tensor:
        return _call("subtract", self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return _call("subtract", other, self)

    def __mul__(self, other: Any) -> Tensor:
        return _call("multiply", self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return _call("multiply", other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return _call("divide", self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return _call("divide", other, self)

    def __neg__(self) -> Tensor:
        return _call("multiply", self, -1.0) if self.dtype.kind == "f" else _call("subtract", 0, self)

    def __matmul__(self, other: Any) -> Tensor:
        return _call("matmul", self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return _call("matmul", other, self)

    def __getitem__(self, key: Any) -> Tensor:
        return _call("index", self, key)

    @property
    def T(self) -> Tensor:
        """The view with its dimensions in reverse order."""
        if self.node is None and not self.requires_grad:
            return Tensor(self.storage, self.shape[::-1], self.strides[::-1], self.dtype, self.offset)
        return _call("permute", self, tuple(reversed(range(self.ndim))))

    def permute(self, *axes: int) -> Tensor:
        """The view whose dimension i is this one's `axes[i]`."""
        return _call("permute", self, axes)

    def reshape(self, *shape: int) -> Tensor:
        """The elements in that shape, one -1 standing for what remains: a view where they lie in order, else a copy."""
        return _call("reshape", self, shape)

    def sum(self, axis: int | None = None) -> Tensor:
        """The sum of all elements, or along one dimension, which goes."""
        return _call("sum", self, axis)


def _call(name: str, left: Any, right: Any) -> Tensor:
    operator = operators[f"octavo::{name}"]
    if name not in ("index", "permute", "reshape", "sum"):
        left, right = (_as_tensor(left, right), _as_tensor(right, left))
    result: Tensor = operator(left, right)
    return result


def _as_tensor(value: Any, beside: Any) -> Any:
    """A Python number as a tensor of the other operand's dtype and device; others as they are."""
    if isinstance(value, (int, float)) and isinstance(beside, Tensor):
        number = float(value) if isinstance(value, float) else value  # NumPy's own float64 would widen the result
        return full((), number, dtype=np.result_type(beside.dtype, number), device=beside.device)
    return value


@functools.lru_cache(maxsize=4096)
def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of contiguous memory, in elements."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def checked_dtype(dtype: Any) -> np.dtype[Any]:
    """As NumPy's; raises ValueError for one that the engine does not hold."""
    if dtype.__class__ is np.dtype and dtype in _HELD:
        return dtype
    found: np.dtype[Any] = np.dtype(dtype)
    if found not in _HELD:
        raise ValueError(
            f"a tensor holds {', '.join(str(one) for one in DTYPES)}; got {found}: convert it first (.astype)"
        )
    return found


def empty(shape: Sequence[int], dtype: npt.DTypeLike = np.float32, *, device: Device | str = Device.CPU) -> Tensor:
    """A contiguous tensor of any content."""
    shape, kind = tuple(shape), FLOAT32 if dtype is np.float32 else checked_dtype(dtype)
    if shape and min(shape) < 0:
        raise ValueError(f"sizes of a tensor are 0 or more; got shape {list(shape)}")
    place = device if device.__class__ is Device else Device(device)
    storage = pool(place).take(math.prod(shape) * kind.itemsize)
    return Tensor(storage, shape, strides_of(shape), kind)


def full(
    shape: Sequence[int], value: float, dtype: npt.DTypeLike = np.float32, *, device: Device | str = Device.CPU
) -> Tensor:
    """A contiguous tensor of that value everywhere."""
    found: Tensor = operators["octavo::full"](tuple(shape), value, checked_dtype(dtype), Device(device))
    return found


def zeros(shape: Sequence[int], dtype: npt.DTypeLike = np.float32, *, device: Device | str = Device.CPU) -> Tensor:
    """A contiguous tensor of zeros."""
    return full(shape, 0, dtype, device=device)


def from_numpy(array: npt.NDArray[Any], *, requires_grad: bool = False) -> Tensor:
    """A tensor on the array's own memory, in its shape and strides: what is written to one is seen in the other.

    Raises ValueError for a dtype out of `DTYPES`'s reach, for memory that may not be written, and for strides that are no whole
    number of elements.
    """
    if not isinstance(array, np.ndarray):
        raise ValueError(f"from_numpy takes a NumPy array; got {type(array).__name__}: wrap it in numpy.asarray")
    dtype = checked_dtype(array.dtype)
    if requires_grad and dtype.kind != "f":
        raise ValueError(f"gradients are of floating-point tensors; got {dtype}: convert it first (.astype)")
    if not array.flags.writeable:
        raise ValueError("this array is read-only, and a tensor may be written; hand over array.copy()")
    if any(stride % dtype.itemsize for stride in array.strides):
        raise ValueError(f"strides {array.strides} are no whole elements of {dtype}; hand over array.copy()")
    storage = Storage(Device.CPU, int(array.ctypes.data), array.nbytes, array)
    strides = tuple(stride // dtype.itemsize for stride in array.strides)
    found = Tensor(storage, array.shape, strides, dtype)
    found._array, found.requires_grad = array, requires_grad
    return found


def from_dlpack(source: Any) -> Tensor:
    """A tensor on the memory of an array of NumPy, PyTorch, JAX, CuPy or another library that speaks DLPack.

    On the CPU without a copy; memory that its library does not let others write (JAX's) is copied.
    """
    if not hasattr(source, "__dlpack_device__"):
        raise ValueError(
            f"from_dlpack takes an array that speaks DLPack; got {type(source).__name__}: use from_numpy(numpy.asarray(...))"
        )
    kind, _ = source.__dlpack_device__()
    if kind != 1:
        from octavo.engine.kernels import cuda

        return cuda.from_dlpack(source)
    array = np.from_dlpack(source)
    return from_numpy(array if array.flags.writeable else array.copy())
