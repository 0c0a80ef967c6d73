"""How the CPU kernels see arrays: one row for each library whose arrays they take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from octavo.kernels.cpu import Buffer, Kind

__all__ = ["Library", "library_of"]

_KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "float32": Kind.FLOAT32,
        "bfloat16": Kind.BFLOAT16,
        "float16": Kind.FLOAT16,
        "float64": Kind.FLOAT64,
        "uint8": Kind.CODES,
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """What the kernels ask of an array library.

    `contiguous` gives the same elements in row-major memory without gradients; `empty_like(x, kind)` gives uninitialised memory
    of x's shape, of x's own dtype where `kind` is None; `from_numpy` and `to_numpy` share memory.
    """

    contiguous: Callable[[Any], Any]
    empty_like: Callable[[Any, Kind | None], Any]
    address: Callable[[Any], int]
    size: Callable[[Any], int]
    from_numpy: Callable[[Any], Any]
    to_numpy: Callable[[Any], Any]
    astype_float32: Callable[[Any], Any]

    def buffer(self, x: Any) -> Buffer:
        """A contiguous array as the kernels take it.  Raises ValueError for a dtype that is no float."""
        name = str(x.dtype).rpartition(".")[2]
        if name not in _KINDS:
            raise ValueError(
                f"a cast takes float32, float64, float16 or bfloat16; got {x.dtype}: convert it to float32 first"
            )
        return Buffer(self.address(x), _KINDS[name], self.size(x))


def _numpy() -> Library:
    return Library(
        contiguous=lambda x: np.asarray(x, order="C"),
        empty_like=lambda x, kind: np.empty(
            x.shape, x.dtype if kind is None else kind.name.lower().replace("codes", "uint8")
        ),
        address=lambda x: int(x.ctypes.data),
        size=lambda x: int(x.size),
        from_numpy=lambda x: x,
        to_numpy=lambda x: x,
        astype_float32=lambda x: x.astype(np.float32, copy=False),
    )


def _torch() -> Library:
    torch = sys.modules["torch"]

    def contiguous(x: Any) -> Any:
        if x.device.type != "cpu":
            raise ValueError(f"these casts run on the CPU, and the tensor is on {x.device}; move it first (x.cpu())")
        return x.detach().resolve_neg().contiguous()

    return Library(
        contiguous=contiguous,
        empty_like=lambda x, kind: torch.empty(
            x.shape,
            dtype=x.dtype if kind is None else getattr(torch, kind.name.lower().replace("codes", "uint8")),
            device="cpu",
        ),
        address=lambda x: int(x.data_ptr()),
        size=lambda x: int(x.numel()),
        from_numpy=torch.from_numpy,
        to_numpy=lambda x: x.numpy(),
        astype_float32=lambda x: x.float(),
    )


_LIBRARIES: Mapping[str, Callable[[], Library]] = MappingProxyType({"numpy": _numpy, "torch": _torch})


def library_of(x: Any) -> Library:
    """The row for the library that `x` belongs to.  Raises ValueError where there is none."""
    root = type(x).__module__.partition(".")[0]
    if root not in _LIBRARIES:
        raise ValueError(
            f"octavo casts arrays of {' and '.join(_LIBRARIES)}; got {type(x).__name__}: wrap it in numpy.asarray"
        )
    return _LIBRARIES[root]()
