"""The engine's operators on the CPU: compiled kernels for float32 in contiguous memory, NumPy for the rest."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from octavo.engine.kernels import checks, elements, gemm, rows
from octavo.engine.kernels.classes import argmax, cross_entropy, cross_entropy_both, cross_entropy_gradient, softmax
from octavo.engine.kernels.launch import refuse
from octavo.engine.kernels.memory import FLOAT32, contiguous, fast, from_array, lanes_for, like
from octavo.engine.kernels.norms import unit
from octavo.engine.kernels.patches import fold, patches, take_runs
from octavo.engine.storage import Device
from octavo.engine.tensor import Tensor, empty, strides_of

__all__ = ["KERNELS"]


def _full(shape: tuple[int, ...], value: float, dtype: Any, device: Device) -> Tensor:
    if device is Device.CUDA:
        from octavo.engine.kernels import cuda

        made: Tensor = cuda.kernel("full")(shape, value, dtype, device)
        return made
    out = empty(shape, dtype)
    if dtype == FLOAT32:
        elements.fill(lanes_for(out.size), out.address, out.size, float(value))
    else:
        refuse(f"a tensor of {dtype} is filled")
        out.array.fill(value)
    return out


def _arithmetic(number: int, ufunc: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def run(left: Tensor, right: Tensor) -> Tensor:
        if fast(left, right) and (left.shape == right.shape or (right.size == 1 and right.ndim <= left.ndim)):
            out = like(left)
            one = left.shape != right.shape
            elements.arithmetic(lanes_for(out.size), left.address, right.address, out.address, out.size, number, one)
            return out
        refuse(f"{ufunc.__name__} runs in NumPy (float32 tensors of one shape run compiled)")
        return _by_numpy(ufunc, left, right)

    return run


def _by_numpy(ufunc: Any, *tensors: Tensor) -> Tensor:
    """A NumPy function of tensors of any strides, broadcast, by its own rules of dtypes, into the engine's memory."""
    try:
        shape = np.broadcast_shapes(*(one.shape for one in tensors))
    except ValueError:
        shapes = " and ".join(str(list(one.shape)) for one in tensors)
        raise ValueError(f"octavo::{ufunc.__name__}: shapes {shapes} do not broadcast; reshape one of them") from None
    dtype = ufunc.resolve_dtypes((*(one.dtype for one in tensors), *[None] * ufunc.nout))[-1]
    out = empty(shape, dtype)
    with np.errstate(all="ignore"):
        ufunc(*(one.array for one in tensors), out=out.array)
    return out


def _unary(ufunc: Any) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        refuse(f"{ufunc.__name__} runs in NumPy")
        return _by_numpy(ufunc, x)

    return run


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    checks.matmul(a, b)
    return _product(a, b)


def _product(
    a: Tensor, b: Tensor, *, bias: Tensor | None = None, relu: bool = False, mask: Tensor | None = None
) -> Tensor:
    if a.ndim == b.ndim == 2 and a.dtype == b.dtype == FLOAT32 and (mask is None or mask.dtype == FLOAT32):
        out = empty((a.shape[0], b.shape[1]), a.dtype)
        gemm.product(a, b, out, bias=bias, relu=relu, mask=mask)
        return out
    refuse(f"a product of {a.dtype} and {b.dtype} with {a.ndim} and {b.ndim} dimensions runs in NumPy")
    try:
        leading = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ValueError(
            f"octavo::matmul: the leading dimensions of {list(a.shape)} and {list(b.shape)} do not broadcast; reshape one of them"
        ) from None
    out = empty((*leading, a.shape[-2], b.shape[-1]), np.result_type(a.dtype, b.dtype))
    with np.errstate(all="ignore"):
        np.matmul(a.array, b.array, out=out.array)
        if bias is not None:
            np.add(out.array, bias.array, out=out.array)

    if relu:
        np.maximum(out.array, 0, out=out.array)
    if mask is not None:
        out.array[~(mask.array > 0)] = 0
    return out


def _add_matmul(c: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    checks.add_matmul(c, a, b)
    if a.dtype == b.dtype == c.dtype == FLOAT32 and c.strides[1] == 1:
        gemm.product(a, b, c, alpha=alpha, add=True)
    else:
        refuse("a product runs in NumPy")
        c.array[...] += (a.array @ b.array) * alpha


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool = False) -> Tensor:
    checks.linear(input, weight, bias)
    flat = input if input.ndim == 2 else _reshape(input, (-1, input.shape[-1]))
    out = _product(flat, weight, bias=bias, relu=relu)
    return out if input.ndim == 2 else _reshape(out, (*input.shape[:-1], weight.shape[1]))


def _linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(input, weight, bias, relu=True)


def _masked_matmul(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    checks.masked_matmul(a, b, mask)
    return _product(a, b, mask=contiguous(mask))


def _relu(x: Tensor) -> Tensor:
    if fast(x):
        out = like(x)
        elements.relu(lanes_for(x.size), x.address, out.address, x.size)
        return out
    refuse("relu of this dtype or stride runs in NumPy")
    out = like(x)
    np.maximum(x.array, np.zeros((), x.dtype), out=out.array)
    return out


def _relu_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    checks.same_shape(gradient, x)
    gradient, x = contiguous(gradient), contiguous(x)
    out = like(gradient)
    if fast(gradient, x):
        elements.relu_gradient(lanes_for(x.size), gradient.address, x.address, out.address, x.size)
    else:
        refuse("relu's gradient of this dtype runs in NumPy")
        np.copyto(out.array, np.where(x.array > 0, gradient.array, np.zeros((), gradient.dtype)))
    return out


def _sum(x: Tensor, axis: int | None) -> Tensor:
    if axis == 0 and x.ndim == 2 and x.dtype == FLOAT32 and x.strides[1] == 1:
        out = empty(x.shape[1:], x.dtype)
        rows.column_sums(lanes_for(x.size // 4), x.address, out.address, *x.shape, 4 * x.strides[0])
        return out
    refuse("this sum runs in NumPy (float32 matrices down their columns run compiled)")
    checks.sum_axis(x, axis)
    return from_array(np.sum(x.array, axis=axis, dtype=x.dtype))


def _permute(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    axes = tuple(axes)
    if sorted(axes) != list(range(x.ndim)):
        raise ValueError(f"octavo::permute takes each of {x.ndim} dimensions once; got {axes}")
    return Tensor(x.storage, tuple(x.shape[i] for i in axes), tuple(x.strides[i] for i in axes), x.dtype, x.offset)


def _reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    known = 1
    for length in shape:
        known *= length if length != -1 else 1
    full = tuple((x.size // known if known else 0) if length == -1 else length for length in shape)
    size = 1
    for length in full:
        size *= length
    if size != x.size or min(full, default=0) < 0:
        raise ValueError(f"octavo::reshape: {x.size} elements of shape {list(x.shape)} do not fill {list(shape)}")
    if not x.is_contiguous:
        x = contiguous(x)
    return Tensor(x.storage, full, strides_of(full), x.dtype, x.offset)


def _index(x: Tensor, key: Any) -> Tensor:
    keys = key if isinstance(key, tuple) else (key,)
    if any(
        isinstance(one, bool) or not isinstance(one, (int, np.integer, slice, type(None), type(...))) for one in keys
    ):
        raise ValueError(
            "octavo::index takes integers, slices, None and ...; for rows by number use engine.take_rows(x, rows)"
        )
    try:
        view = np.lib.stride_tricks.as_strided(np.empty(0, x.dtype), x.shape, [s * x.dtype.itemsize for s in x.strides])
        chosen = view[keys if ... in keys else (*keys, ...)]  # a view, also of one element
    except IndexError as error:
        raise ValueError(f"octavo::index: shape {list(x.shape)}: {error}") from None
    offset = (chosen.__array_interface__["data"][0] - view.__array_interface__["data"][0]) if chosen.size else 0
    strides = tuple(stride // x.dtype.itemsize for stride in chosen.strides)
    return Tensor(x.storage, chosen.shape, strides, x.dtype, x.offset + offset)


def _take_rows(x: Tensor, numbers: Tensor) -> Tensor:
    checks.take_rows(x, numbers)
    x = contiguous(x)
    out = empty((numbers.size, *x.shape[1:]), x.dtype)
    size = out.size // max(1, numbers.size) * x.dtype.itemsize

    def check(block: Any) -> None:
        place, number = struct.unpack_from("<2q", block, 48)
        if place:
            struct.pack_into("<q", block, 48, 0)
            raise checks.bad_row(place - 1, number, x.shape[0])

    rows.take_rows(
        lanes_for(out.size), x.address, x.shape[0], size, numbers.address, numbers.size, out.address, 0, 0, check=check
    )
    return out


def _copy(target: Tensor, source: Tensor) -> None:
    if target.shape != source.shape:
        raise ValueError(
            f"octavo::copy_ takes two tensors of one shape; got {list(target.shape)} and {list(source.shape)}"
        )
    if not np.can_cast(source.dtype, target.dtype, "same_kind"):
        raise ValueError(
            f"octavo::copy_ does not turn {source.dtype} into {target.dtype}; convert source first, as NumPy: .numpy().astype(...)"
        )
    refuse("a tensor is copied")
    with np.errstate(over="ignore"):
        np.copyto(target.array, source.array)


def _rate(rate: Any) -> tuple[float, int]:
    """A learning rate as the kernels take it: a number, or the address of one in memory."""
    if not isinstance(rate, Tensor):
        return float(rate), 0
    if rate.size != 1 or rate.dtype != FLOAT32 or rate.device is not Device.CPU:
        raise ValueError(
            f"rate is a number, or a tensor of one float32 on cpu; got {rate.dtype} {list(rate.shape)} on {rate.device}: convert it first"
        )
    return 0.0, rate.address


def _sgd(
    weight: Tensor, gradient: Tensor, velocity: Tensor | None, rate: Any, momentum: float, decay: float, nesterov: bool
) -> None:
    gradient = contiguous(gradient)
    checks.sgd(weight, gradient, velocity, momentum, nesterov)
    speed = 0 if velocity is None else velocity.address
    elements.sgd(
        lanes_for(weight.size),
        weight.address,
        gradient.address,
        speed,
        weight.size,
        bool(nesterov),
        *_rate(rate),
        float(momentum),
        float(decay),
    )


def _adam(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
    rate: Any,
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: float,
) -> None:
    gradient = contiguous(gradient)
    checks.adam(weight, gradient, first, second, steps)
    elements.arithmetic(1, steps.address, _ONE.address, steps.address, 1, 0, 1)
    moments = weight.address, gradient.address, first.address, second.address
    elements.adam(
        lanes_for(weight.size), *moments, steps.address, weight.size, *_rate(rate), beta1, beta2, epsilon, decay
    )


_ONE = from_array(np.ones(1, np.float32))
KERNELS: dict[str, Callable[..., Any]] = {
    "full": _full,
    "add": _arithmetic(0, np.add),
    "subtract": _arithmetic(1, np.subtract),
    "multiply": _arithmetic(2, np.multiply),
    "divide": _arithmetic(3, np.divide),
    "exp": _unary(np.exp),
    "log": _unary(np.log),
    "matmul": _matmul,
    "masked_matmul": _masked_matmul,
    "add_matmul_": _add_matmul,
    "linear": _linear,
    "linear_relu": _linear_relu,
    "relu": _relu,
    "relu_gradient": _relu_gradient,
    "sum": _sum,
    "softmax": softmax(False),
    "log_softmax": softmax(True),
    "cross_entropy": cross_entropy,
    "cross_entropy_gradient": cross_entropy_gradient,
    "cross_entropy_both": cross_entropy_both,
    "argmax": argmax,
    "permute": _permute,
    "reshape": _reshape,
    "index": _index,
    "take_rows": _take_rows,
    "take_runs": take_runs,
    "patches": patches,
    "fold": fold,
    "unit": unit,
    "copy_": _copy,
    "sgd_": _sgd,
    "adam_": _adam,
}
"""Operator -> its kernel."""
