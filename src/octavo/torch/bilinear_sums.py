"""The sums of a product's three GEMMs: convolutions of narrow operands by kernels of bfloat16, all others by PyTorch in float32."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.convolution_plan import Geometry
from octavo.kernels.cpu import nearest_words
from octavo.kernels.dots import has_dots
from octavo.rounding import Rounding
from octavo.scaling import Unscaled
from octavo.table import Transform
from octavo.torch.bilinear import Convolution, Product
from octavo.torch.gemm import inverse
from octavo.torch.layouts import Found, fits_bfloat16
from octavo.torch.operands import Cast
from octavo.torch.watching import watch

__all__ = ["Sums", "gradients_of", "multiplied", "narrow_geometry"]


def narrow_geometry(product: Product, casts: Sequence[Cast | None], left: Tensor, right: Tensor) -> Geometry | None:
    """The convolution of operands that these casts make, where they fit bfloat16 and kernels take it; None where PyTorch multiplies."""
    return _geometry_of(product, left, right) if all(fits_bfloat16(cast) for cast in casts) else None


class Sums(NamedTuple):
    """What a product sums to."""

    values: Tensor
    amax: float | None = None
    """Where the sums were stored by a cast at once, their amax before it."""


def multiplied(
    product: Product, geometry: Geometry | None, a: Found, b: Found, bias: Tensor | None, stored: Cast | None
) -> Sums:
    """The sums of the forward pass; geometry: of a convolution whose operands are narrow; stored: by what they will be cast."""
    if geometry is not None:
        return _convolve(geometry, a, b, bias, stored)
    wide = torch.promote_types(a.values.dtype, b.values.dtype)
    return Sums(product.forward(a.values.to(wide), b.values.to(wide), None if bias is None else bias.to(wide)))


def gradients_of(
    product: Product,
    geometry: Geometry | None,
    shapes: tuple[Sequence[int], Sequence[int]],
    g: Found,
    a: Found | None,
    b: Found | None,
    stored: Cast | None,
) -> tuple[Sums | None, Sums | None]:
    """The sums of the backward pass: the gradient of left where there is b, that of right where there is a; stored: of left's."""
    if geometry is not None:
        left = None if b is None else _grad_input(geometry, g, b, stored)
        return left, None if a is None else _grad_weight(geometry, g, a, shapes[1])
    wide = g.values.dtype
    for operand in (a, b):
        wide = wide if operand is None else torch.promote_types(wide, operand.values.dtype)
    grad = g.values.to(wide)
    if a is not None and b is not None:
        one, other = product.grads(grad, a.values.to(wide), b.values.to(wide), shapes)
        return Sums(one), Sums(other)
    left = None if b is None else Sums(product.grad_left(grad, b.values.to(wide), shapes[0]))
    return left, None if a is None else Sums(product.grad_right(grad, a.values.to(wide), shapes[1]))


def _geometry_of(product: Product, left: Tensor, right: Tensor) -> Geometry | None:
    """Of two-dimensional convolutions of one group, of float32, bfloat16 and float16 CPU tensors in row-major order."""
    if not isinstance(product, Convolution) or not has_dots() or product.transposed or product.groups != 1:
        return None
    if left.dim() != 4 or left.device.type != "cpu" or torch.float64 in (left.dtype, right.dtype):
        return None
    if not left.is_contiguous() or left.shape[1] != right.shape[1] or 0 in (left.numel(), right.numel()):
        return None
    geometry = _geometry(product, tuple(left.shape[2:]), tuple(right.shape[2:]))
    return geometry if min(geometry.output) > 0 else None  # else PyTorch says what is wrong


@functools.cache
def _kernels() -> Any:
    """Compiled when the first convolution wants them."""
    from octavo.kernels import convolution

    return convolution


@functools.lru_cache(maxsize=1024)
def _geometry(product: Convolution, size: tuple[int, int], kernel: tuple[int, int]) -> Geometry:
    pairs: Any = product.stride, product.padding, product.dilation
    return Geometry(size, kernel, *pairs)


def _bits(weight: Tensor) -> np.ndarray[Any, Any]:
    """[O, C, KH x KW], uint16."""
    found: np.ndarray[Any, Any] = weight.bfloat16().flatten(2).view(torch.int16).numpy().view(np.uint16)
    return found


def _factor(*operands: Found) -> float:
    """What undoes the scales of both."""
    one, other = (inverse(float(operand.scale)) for operand in operands)
    return one * other


def _image(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.element_size()


def _mode(stored: Cast | None) -> np.ndarray[Any, Any] | None:
    """How the kernels round sums that this cast stores; None where they leave it to the cast."""
    if stored is None or stored.caster is None or watch.look is not None:
        return None
    spec = stored.spec
    plain = isinstance(spec.scaling, Unscaled) and spec.transform is Transform.NONE and spec.format.signed
    if not plain or spec.rounding is not Rounding.NEAREST_EVEN or spec.format.nan_code is None:
        return None
    return nearest_words(spec.format, spec.overflow)


def _convolve(geometry: Geometry, left: Found, right: Found, bias: Tensor | None, stored: Cast | None) -> Sums:
    """The output of narrow operands, float32 [N, O, H, W]."""
    x, w = left.values, right.values
    y, mode = torch.empty(x.shape[0], w.shape[0], *geometry.output), _mode(stored)
    base = None if bias is None else bias.float().contiguous()
    run = _kernels().convolution(geometry, x.shape[0], x.shape[1], w.shape[0])
    added = 0 if base is None else base.data_ptr()
    amax = run(_image(x), _bits(w), y.data_ptr(), _factor(left, right), added, mode)
    return Sums(y, None if mode is None else amax)


def _grad_input(geometry: Geometry, grad: Found, right: Found, stored: Cast | None) -> Sums:
    """The gradient of the input, float32 [N, C, H, W]."""
    g, w = grad.values, right.values
    found, mode = torch.empty(g.shape[0], w.shape[1], *geometry.size), _mode(stored)
    run = _kernels().grad_input(geometry, g.shape[0], w.shape[1], w.shape[0])
    amax = run(_image(g), _bits(w), found.data_ptr(), _factor(grad, right), mode)
    return Sums(found, None if mode is None else amax)


def _grad_weight(geometry: Geometry, grad: Found, left: Found, shape: Sequence[int]) -> Sums:
    """The gradient of the weight, float32, of that shape."""
    g, x = grad.values, left.values
    run = _kernels().grad_weight(geometry, x.shape[0], x.shape[1], shape[0])
    return Sums(torch.from_numpy(run(_image(g), _image(x), _factor(grad, left))).view(*shape))
