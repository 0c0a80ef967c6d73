"""The engine's matrix products on the GPU, and what follows them in the same kernel."""

from __future__ import annotations

import numpy as np

from octavo.engine.kernels import checks
from octavo.engine.kernels import cuda_gemm_kernels as kernels
from octavo.engine.kernels.cuda_casts import Cast
from octavo.engine.kernels.cuda_gemm_kernels import LARGE, SMALL
from octavo.engine.kernels.cuda_launch import At, launch, processors
from octavo.engine.kernels.cuda_memory import contiguous, fill
from octavo.engine.tensor import Tensor, empty

__all__ = ["add_matmul", "linear", "linear_relu", "masked_matmul", "matmul", "product", "reshape"]

_NO_FORMAT = (-1,)
_FAR = 1 << 31


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    alpha: float = 1.0,
    add: bool = False,
    bias: Tensor | None = None,
    relu: bool = False,
    mask: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    cast: Cast | None = None,
) -> None:
    """out = alpha * a @ b (+ out) (+ bias), then ReLU, then 0 where mask is not positive; over `scales`, one float32 each; and cast.

    a: [M, K], b: [K, N], any strides; out, mask: [M, N] with rows contiguous; bias: [N]; float32 all.
    """
    if a.dtype != np.float32 or b.dtype != np.float32 or out.dtype != np.float32:
        raise ValueError(
            f"on CUDA, products are of float32; got {a.dtype} and {b.dtype}: convert them on the CPU first"
        )
    (m, k), n = a.shape, b.shape[1]
    if k * max(a.strides[1], b.strides[0]) >= _FAR:
        raise ValueError(
            f"the GPU's products reach {_FAR} elements along K; got strides {a.strides} and {b.strides} over {k}: "
            "multiply contiguous parts"
        )
    large = -(-m // LARGE[0]) * -(-n // LARGE[1])
    tile = LARGE if large >= processors() and min(m, n) >= LARGE[0] else SMALL
    words = (0, 0, 0)
    if cast is not None:
        words = cast.modes.words(out.size)
        fill(cast.amax.address, 1, 0, cast.amax.dtype)
    one, other = (a, a) if scales is None else scales
    launch(
        kernels.gemm_kernel,
        -(-m // tile[0]) * -(-n // tile[1]),
        a,
        b,
        out,
        a if bias is None else bias,
        a if mask is None else mask,
        one,
        other,
        At(a.address, "uint8") if cast is None else cast.codes,
        a if cast is None else cast.scale,
        At(a.address if cast is None else cast.amax.address, "int32"),
        m,
        n,
        k,
        *a.strides,
        *b.strides,
        out.strides[0],
        0 if mask is None else mask.strides[0],
        float(np.float32(alpha)),
        *words,
        ADD=add,
        BIAS=bias is not None,
        RELU=relu,
        MASK=mask is not None,
        SCALED=scales is not None,
        **({"FORMAT": _NO_FORMAT, "MODE": 0} if cast is None else cast.modes.constants),
        TILE=tile,
    )


def _fresh(a: Tensor, b: Tensor) -> Tensor:
    return empty((a.shape[0], b.shape[1]), a.dtype, device=a.device)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    checks.matmul(a, b)
    if b.ndim != 2:
        raise ValueError(
            f"octavo::matmul on CUDA takes one matrix on the right; got {list(b.shape)}: go through the matrices one by one"
        )
    flat = a if a.ndim == 2 else reshape(a, (-1, a.shape[-1]))
    out = _fresh(flat, b)
    product(flat, b, out)
    return out if a.ndim == 2 else reshape(out, (*a.shape[:-1], b.shape[1]))


def masked_matmul(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    checks.masked_matmul(a, b, mask)
    out = _fresh(a, b)
    product(a, b, out, mask=contiguous(mask))
    return out


def add_matmul(c: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    checks.add_matmul(c, a, b)
    if c.strides[1] != 1 and c.shape[1] > 1:
        raise ValueError(f"octavo::add_matmul_ on CUDA adds to contiguous rows; got strides {c.strides}: add to a copy")
    product(a, b, c, alpha=alpha, add=True)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool = False) -> Tensor:
    checks.linear(input, weight, bias)
    flat = input if input.ndim == 2 else reshape(input, (-1, input.shape[-1]))
    out = _fresh(flat, weight)
    product(flat, weight, out, bias=bias, relu=relu)
    return out if input.ndim == 2 else reshape(out, (*input.shape[:-1], weight.shape[1]))


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(input, weight, bias, relu=True)


def reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    from octavo.engine.kernels.cpu import KERNELS

    found: Tensor = KERNELS["reshape"](contiguous(x), shape)
    return found
