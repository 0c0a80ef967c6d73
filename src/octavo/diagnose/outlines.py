"""What common operators return on the meta device, by rules of our own: PyTorch's load its compiler first, which takes a second."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

__all__ = ["outlined"]

_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_aten = torch.ops.aten


def outlined(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What `operator(*args, **kwargs)` returns: on the meta device, with PyTorch's shapes, dtypes and strides, outside of autograd.

    operator: an overload of `torch.ops.aten`.  In-place operators return their first argument.
    None where no rule covers the call, among them every call that PyTorch refuses: its own operator has to run, or to say why not.
    """
    rule = _RULES.get(operator)
    if rule is None or not all(x.is_meta and x.layout is torch.strided for x in args if isinstance(x, Tensor)):
        return None
    return rule(*args, **kwargs)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _floats(*tensors: Tensor) -> bool:
    """Whether they share one floating-point dtype, so that nothing is promoted."""
    return tensors[0].dtype in _FLOATS and all(x.dtype == tensors[0].dtype for x in tensors)


def _like(x: Tensor) -> Tensor | None:
    """Of x's shape and dtype, its axes in the order in which x has them in memory, without gaps; None where that order is in doubt."""
    if x.is_contiguous():
        return _empty(x.shape, x.dtype)
    if min(x.shape) < 2 or len(set(x.stride())) < x.dim() or min(x.stride()) < 1:
        return None
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return _empty([x.shape[axis] for axis in order], x.dtype).permute([order.index(axis) for axis in range(x.dim())])


def _same(x: Tensor, *_options: Any, **_named: Any) -> Tensor | None:
    """Of what maps each number by itself."""
    return _like(x) if _floats(x) else None


def _changed(x: Tensor, other: object) -> Tensor | None:
    return x if _floats(x) and isinstance(other, int | float) else None


def _empty_like(x: Tensor, **options: Any) -> Tensor | None:
    return None if any(options.values()) else _same(x)


def _triangle(x: Tensor, diagonal: int = 0) -> Tensor | None:
    return _empty(x.shape, x.dtype) if x.is_contiguous() and x.dim() > 1 else None


def _scaled(x: Tensor, other: object) -> Tensor | None:
    return _same(x) if isinstance(other, int | float) else None


def _paired(x: Tensor, y: Any, *, alpha: float = 1) -> Tensor | None:
    """Of what maps pairs of numbers."""
    if not isinstance(y, Tensor):
        return _scaled(x, y)
    return _spread(x.dtype, x, y) if _floats(x, y) and isinstance(alpha, int | float) else None


def _chosen(condition: Tensor, x: Tensor, y: Tensor) -> Tensor | None:
    """Of `where`."""
    return _spread(x.dtype, condition, x, y) if condition.dtype == torch.bool and _floats(x, y) else None


def _spread(dtype: torch.dtype, *tensors: Tensor) -> Tensor | None:
    """Contiguous, in the shape of the largest of `tensors`, to which the others spread."""
    shape = max((x.shape for x in tensors), key=lambda shape: (len(shape), math.prod(shape)))
    fits = all(x.is_contiguous() and _spreads(x.shape, shape) for x in tensors)
    return _empty(shape, dtype) if fits else None


def _spreads(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of that shape can be expanded to `to`."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


def _normalized(x: Tensor, axis: int, other: object = None) -> Tensor | None:
    """Of softmax and its logarithm; other: a wish for another dtype."""
    fits = _floats(x) and x.is_contiguous() and x.dim() > 0 and -x.dim() <= axis < x.dim()
    return _empty(x.shape, x.dtype) if fits and not other else None


def _mm(x: Tensor, y: Tensor) -> Tensor | None:
    fits = _floats(x, y) and x.dim() == y.dim() == 2 and x.shape[1] == y.shape[0]
    return _empty((x.shape[0], y.shape[1]), x.dtype) if fits else None


def _addmm(bias: Tensor, x: Tensor, y: Tensor, **_factors: Any) -> Tensor | None:
    product = _mm(x, y)
    fits = product is not None and _floats(bias, x) and _spreads(bias.shape, product.shape)
    return product if fits else None


def _bmm(x: Tensor, y: Tensor) -> Tensor | None:
    fits = _floats(x, y) and x.dim() == y.dim() == 3 and x.shape[0] == y.shape[0] and x.shape[2] == y.shape[1]
    return _empty((x.shape[0], x.shape[1], y.shape[2]), x.dtype) if fits else None


def _places(sizes: Sequence[int], kernel: Sequence[int], *modes: Sequence[int]) -> list[int] | None:
    """How often a kernel fits along each axis; modes: stride, padding, dilation.  None where it does not, or a mode has another length."""
    if any(len(mode) != len(sizes) for mode in (kernel, *modes)) or min(*kernel, *modes[0], *modes[2]) < 1:
        return None
    found = []
    for size, width, stride, padding, dilation in zip(sizes, kernel, *modes, strict=True):
        found.append((size + 2 * padding - dilation * (width - 1) - 1) // stride + 1)
    return found if min(found) > 0 and min(modes[1]) >= 0 else None


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor | None:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if transposed or not _floats(*tensors) or not all(one.is_contiguous() and one.numel() for one in tensors):
        return None
    outputs, channels, *kernel = weight.shape
    if x.dim() != weight.dim() or x.dim() < 3 or x.shape[1] != channels * groups or outputs % groups:
        return None
    if bias is not None and bias.shape != (outputs,):
        return None
    places = _places(x.shape[2:], kernel, stride, padding, dilation)
    return None if places is None else _empty((x.shape[0], outputs, *places), x.dtype)


def _max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor] | None:
    if ceil_mode or not _floats(x) or x.dim() != 4 or not x.is_contiguous() or not x.numel():
        return None
    places = _places(x.shape[2:], kernel, stride or kernel, padding, dilation)
    if places is None or any(2 * more > width for more, width in zip(padding, kernel, strict=True)):
        return None
    shape = (*x.shape[:2], *places)
    return _empty(shape, x.dtype), _empty(shape, torch.int64)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    tensors = [one for one in (weight, bias) if one is not None]
    kept = x.dim() - len(shape)
    if x.dtype != torch.float32 or not x.is_contiguous() or not shape or kept < 0 or x.shape[kept:] != tuple(shape):
        return None
    if any(one.dtype != x.dtype or one.shape != tuple(shape) for one in tensors):
        return None
    moments = (*x.shape[:kept], *(1 for _ in shape))
    return _empty(x.shape, x.dtype), _empty(moments, x.dtype), _empty(moments, x.dtype)


def _embedding(weight: Tensor, places: Tensor, *_options: Any) -> Tensor | None:
    fits = weight.dim() == 2 and places.dtype == torch.int64
    return _empty((*places.shape, weight.shape[1]), weight.dtype) if fits else None


def _arange(end: object, *, device: Any = None, **options: Any) -> Tensor | None:
    if not isinstance(end, int) or end < 0 or device is None or any(options.values()):
        return None
    return _empty((end,), torch.int64) if torch.device(device).type == "meta" else None


_RULES: Mapping[Any, Callable[..., Any]] = MappingProxyType(
    {
        **dict.fromkeys((_aten.relu.default, _aten.gelu.default, _aten.silu.default), _same),
        **dict.fromkeys((_aten.tanh.default, _aten.sigmoid.default, _aten.elu.default), _same),
        **dict.fromkeys((_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor), _paired),
        **dict.fromkeys((_aten.mul.Scalar, _aten.div.Scalar), _scaled),
        **dict.fromkeys((_aten.mul_.Scalar, _aten.div_.Scalar), _changed),
        **dict.fromkeys((_aten._softmax.default, _aten._log_softmax.default, _aten._safe_softmax.default), _normalized),
        _aten.empty_like.default: _empty_like,
        _aten.tril.default: _triangle,
        _aten.where.self: _chosen,
        _aten.mm.default: _mm,
        _aten.addmm.default: _addmm,
        _aten.bmm.default: _bmm,
        _aten.convolution.default: _convolution,
        _aten.max_pool2d_with_indices.default: _max_pool,
        _aten.native_layer_norm.default: _layer_norm,
        _aten.embedding.default: _embedding,
        _aten.arange.default: _arange,
    }
)
"""By operator: what its rule takes is what the operator takes."""
