"""`encode`, `decode`, `quantize`, `amax`: the public casts, one contract for NumPy arrays and CPU torch tensors."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np

from octavo import reference
from octavo.formats import Format
from octavo.kernels import cpu
from octavo.kernels.arrays import library_of
from octavo.rounding import Overflow, Rounding

__all__ = ["amax", "decode", "encode", "quantize"]

A = TypeVar("A")


def encode(
    x: A,
    format: Format,
    *,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow = Overflow.SATURATE,
    seed: int | None = None,
    offset: int = 0,
) -> A:
    """The codes of `x` in `format`: uint8, same shape and library.

    x: float32, float64, float16 or bfloat16, any shape and strides.  It is rounded once, from its own dtype; subnormals are kept, -0
    too where the format has it.  NaN gives the format's NaN, and ValueError where it has none.  E8M0, without sign and zero, takes
    negative numbers as NaN, and zero as its smallest value (as NaN under `Overflow.NONE`).
    seed, offset: for stochastic rounding, which needs a seed; element i of the flattened x draws the bits of position offset + i.
    Source: OFP8 v1.0 and OCP MX v1.0 for the formats, `docs/numerics.md` for rounding and overflow.
    """
    library = library_of(x)
    source = library.contiguous(x)
    codes = library.empty_like(source, cpu.Kind.CODES)
    _cast(library, source, codes, format, rounding=rounding, overflow=overflow, seed=seed, offset=offset)
    return codes  # type: ignore[no-any-return]


def decode(codes: A, format: Format) -> A:
    """The values of `codes`, exact: float32, same shape and library.

    codes: uint8, any shape.  Raises ValueError for another dtype, or a code beyond the format's bits.
    """
    library = library_of(codes)
    if str(codes.dtype).rpartition(".")[2] != "uint8":  # type: ignore[attr-defined]
        raise ValueError(f"codes are uint8; got {codes.dtype}: `octavo.encode` makes them")  # type: ignore[attr-defined]
    values = reference.decode(library.to_numpy(library.contiguous(codes)), format)
    return library.from_numpy(np.asarray(values))  # type: ignore[no-any-return]


def quantize(
    x: A,
    format: Format,
    *,
    scale: float = 1.0,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow = Overflow.SATURATE,
    seed: int | None = None,
    offset: int = 0,
) -> A:
    """`decode(encode(x * scale)) / scale`, in x's dtype, shape and library, in one pass over memory.

    Product and quotient are float32 (float64 for a float64 x); the quotient is rounded to x's dtype.  scale: positive and finite.
    The rest as in `encode`.  Not differentiable: the result carries no gradient.
    """
    library = library_of(x)
    source = library.contiguous(x)
    with np.errstate(over="ignore", under="ignore"):
        used = float(scale if str(source.dtype).endswith("float64") else np.float32(scale))
    if not (0 < used < math.inf):
        raise ValueError(f"a scale is positive and finite (in float32, unless x is float64); got {scale}")
    result = library.empty_like(source, None)
    modes: dict[str, Any] = {"rounding": rounding, "overflow": overflow, "seed": seed, "offset": offset}
    _cast(library, source, result, format, scale=used, divisor=used, **modes)
    return result  # type: ignore[no-any-return]


def amax(x: Any) -> float:
    """The largest magnitude in `x`: 0 of an empty array, NaN if x holds NaN."""
    library = library_of(x)
    source = library.contiguous(x)
    return cpu.amax(_floats(library, source))


def _floats(library: Any, x: Any) -> cpu.Buffer:
    buffer: cpu.Buffer = library.buffer(x)
    if buffer.kind is cpu.Kind.CODES:
        raise ValueError("a cast takes float32, float64, float16 or bfloat16; got uint8: convert it to float32 first")
    return buffer


def _cast(library: Any, source: Any, target: Any, format: Format, **modes: Any) -> None:
    cpu.cast(_floats(library, source), library.buffer(target), format, **modes)
