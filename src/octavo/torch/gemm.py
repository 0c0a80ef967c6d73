"""The CPU's matrix products of 8-bit operands: exact products, float32 sums.

An 8-bit value fits bfloat16, and the product of two fits float32, so any GEMM that multiplies them exactly and adds in float32 is an
FP8 GEMM.  Processors with bfloat16 units do just that several times faster than float32's own products: those with AMX through oneMKL,
those with AVX-512's bfloat16 instruction through oneDNN's tiles, both as PyTorch brings them.  Elsewhere the operands are held in
float32 and `torch.addmm` multiplies them.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch

from octavo.kernels import products, threads
from octavo.kernels.products import PLAIN, TRANSPOSED, Product

__all__ = ["Units", "arguments", "dense", "inverse", "matmul", "operand_dtype", "threads_for", "units"]

_ARGUMENTS = struct.Struct("<14qd4q")
_TILES = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"
"""at::native::cpublas::brgemm of bfloat16 operands, as the linker knows it."""


class Units(NamedTuple):
    """What multiplies bfloat16 matrices with float32 sums."""

    address: int
    """Of the function that `kernels` call."""
    kernels: tuple[Any, ...]
    """Kernels of `octavo.kernels.products` that make a product, one after the other."""


@functools.cache
def units() -> Units | None:
    """Those of this processor, as far as the PyTorch that is loaded can use them; None without any."""
    has = torch.cpu.get_capabilities()
    if has.get("amx_bf16", False):
        return by_onemkl()
    return by_tiles() if has.get("avx512_bf16", False) else None


def by_onemkl() -> Units | None:
    """oneMKL's product, which is right on any processor and fast on AMX; None where PyTorch was built without it."""
    return _units("cblas_gemm_bf16bf16f32", products.product)


def by_tiles() -> Units | None:
    """Products of tiles by oneDNN, for processors with AVX-512's bfloat16 instruction; None where PyTorch has no such function."""
    return _units(_TILES, products.pack, products.multiply)


def _units(name: str, *kernels: Any) -> Units | None:
    try:
        function = getattr(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")), name)
    except (OSError, AttributeError):
        return None
    return Units(ctypes.cast(function, ctypes.c_void_p).value or 0, kernels)


def inverse(scale: float) -> float:
    """1 / scale, rounded to float32, as the hardware holds it."""
    return ctypes.c_float(1.0 / scale).value


def dense(x: torch.Tensor) -> torch.Tensor:
    """`x` in contiguous memory that holds its own values."""
    return x.resolve_neg() if x.is_neg() else x if x.is_contiguous() else x.contiguous()


def operand_dtype() -> torch.dtype:
    """What the values of 8-bit operands are held in: the dtype that `matmul` is fastest on."""
    return torch.float32 if units() is None else torch.bfloat16


def threads_for(m: int, n: int, k: int) -> int:
    """How many threads the kernels of a product are worth; oneMKL's takes what it wants, and is called once."""
    found = units()
    alone = found is None or len(found.kernels) == 1
    return 1 if alone else threads.of_products(m * n * k)


def arguments(
    sizes: tuple[int, int, int],
    transposed: tuple[bool, bool],
    strides: tuple[int, int],
    addresses: tuple[int, int, int, int] = (0, 0, 0, 0),
    *,
    casts: tuple[int, int] = (0, 0),
    factor: float = 1.0,
    scratch: int = 0,
) -> bytes:
    """A `Product` block: m, n, k; of A and B whether they are transposed, and their strides; where A, B, C and the bias lie."""
    found = units()
    assert found is not None
    orders = [TRANSPOSED if turned else PLAIN for turned in transposed]
    return _ARGUMENTS.pack(
        found.address, *orders, *sizes, *strides, *casts, *addresses, factor, scratch, *[0] * (Product.WORDS - 16)
    )


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    a_transposed: bool = False,
    b_transposed: bool = False,
    factor: float = 1.0,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`factor * (a @ b) + bias`, added up in float32 and rounded once to `dtype`.

    a: [M, K], or [K, M] where `a_transposed`; b: [K, N], or [N, K] where `b_transposed`; rows contiguous; bias: [N].
    Returns [M, N].
    Operands that are not both bfloat16 are multiplied in float32, or in float64 where one of them, uncast, is float64.
    """
    m, k = a.shape[::-1] if a_transposed else a.shape
    n = b.shape[0] if b_transposed else b.shape[1]
    found = units()
    if found is None or not (a.dtype == b.dtype == torch.bfloat16) or 0 in (m, n, k):
        wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        a, b = a.to(wide), b.to(wide)
        left, right = a.t() if a_transposed else a, b.t() if b_transposed else b
        base = torch.zeros((), dtype=wide) if bias is None else bias.to(wide)
        with torch.autocast("cpu", enabled=False):
            out = torch.addmm(base, left, right, beta=0.0 if bias is None else 1.0, alpha=factor)
        return out if dtype is torch.float32 else out.to(dtype)
    out, many = torch.empty(m, n), threads_for(m, n, k)
    added = None if bias is None else bias.float().contiguous()
    block = arguments(
        (m, n, k),
        (a_transposed, b_transposed),
        (max(a.stride(0), a.shape[1]), max(b.stride(0), b.shape[1])),
        (a.data_ptr(), b.data_ptr(), out.data_ptr(), 0 if added is None else added.data_ptr()),
        factor=factor,
        scratch=0 if len(found.kernels) == 1 else threads.scratch(products.scratch_bytes(m, k, a_transposed, many)),
    )
    memory = ctypes.create_string_buffer(block, len(block))
    for kernel in found.kernels:
        threads.run(kernel.ctypes, ctypes.addressof(memory), many)
    return out if dtype is torch.float32 else out.to(dtype)
