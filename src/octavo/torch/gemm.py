"""The CPU's matrix products of 8-bit operands: exact products, float32 sums.

An 8-bit value fits bfloat16, and the product of two fits float32, so any GEMM that multiplies them exactly and adds in float32 is an
FP8 GEMM.  Where the processor has bfloat16 matrix units (AMX), oneMKL's `cblas_gemm_bf16bf16f32` does just that several times faster
than float32's own; elsewhere the operands are held in float32 and `torch.addmm` multiplies them.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

__all__ = ["PLAIN", "TRANSPOSED", "bf16_gemm", "dense", "inverse", "matmul", "operand_dtype"]

_ROW_MAJOR = 101
PLAIN, TRANSPOSED = 111, 112
"""How CBLAS spells whether a row-major operand is transposed."""


@functools.cache
def bf16_gemm() -> Any:
    """oneMKL's bfloat16 GEMM with float32 results from the library that PyTorch has loaded; None without AMX or without oneMKL."""
    if not torch.cpu.get_capabilities().get("amx_bf16", False):
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        gemm = library.cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    i, f, p = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    gemm.argtypes = [i, i, i, i, i, i, f, p, i, p, i, f, p, i]
    gemm.restype = None
    return gemm


def inverse(scale: float) -> float:
    """1 / scale, rounded to float32, as the hardware holds it."""
    return ctypes.c_float(1.0 / scale).value


def dense(x: torch.Tensor) -> torch.Tensor:
    """`x` in contiguous memory that holds its own values."""
    return x.resolve_neg() if x.is_neg() else x if x.is_contiguous() else x.contiguous()


def operand_dtype() -> torch.dtype:
    """What the values of 8-bit operands are held in: the dtype that `matmul` is fastest on."""
    return torch.float32 if bf16_gemm() is None else torch.bfloat16


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
    gemm = bf16_gemm()
    if gemm is None or not (a.dtype == b.dtype == torch.bfloat16) or 0 in (m, n, k):
        wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        a, b = a.to(wide), b.to(wide)
        left, right = a.t() if a_transposed else a, b.t() if b_transposed else b
        base = torch.zeros((), dtype=wide) if bias is None else bias.to(wide)
        with torch.autocast("cpu", enabled=False):
            out = torch.addmm(base, left, right, beta=0.0 if bias is None else 1.0, alpha=factor)
        return out if dtype is torch.float32 else out.to(dtype)
    out = torch.empty(m, n)
    if bias is not None:
        out.copy_(bias)
    gemm(
        _ROW_MAJOR,
        TRANSPOSED if a_transposed else PLAIN,
        TRANSPOSED if b_transposed else PLAIN,
        m,
        n,
        k,
        factor,
        a.data_ptr(),
        max(a.stride(0), a.shape[1]),
        b.data_ptr(),
        max(b.stride(0), b.shape[1]),
        0.0 if bias is None else 1.0,
        out.data_ptr(),
        n,
    )
    return out if dtype is torch.float32 else out.to(dtype)
