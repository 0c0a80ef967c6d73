"""The engine's operators over numbers one by one, on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from octavo.engine.kernels import checks
from octavo.engine.kernels import cuda_element_kernels as kernels
from octavo.engine.kernels.cuda_element_kernels import BLOCK, Operation, Way
from octavo.engine.kernels.cuda_launch import launch
from octavo.engine.kernels.cuda_memory import contiguous, copy, fill, merged
from octavo.engine.kernels.memory import fast
from octavo.engine.storage import Device
from octavo.engine.tensor import Tensor, empty

__all__ = ["adam", "arithmetic", "copy_", "full", "relu", "relu_gradient", "sgd", "unary"]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def like(x: Tensor) -> Tensor:
    return empty(x.shape, x.dtype, device=x.device)


def programs(size: int) -> int:
    return -(-size // BLOCK)


def full(shape: tuple[int, ...], value: float, dtype: Any, device: Device) -> Tensor:
    out = empty(shape, dtype, device=device)
    fill(out.address, out.size, value, out.dtype)
    return out


def floating(name: str, *tensors: Tensor) -> None:
    """Raise ValueError unless all are float32, or all float64."""
    dtypes = {one.dtype for one in tensors}
    if len(dtypes) != 1 or not dtypes.issubset(_FLOATS):
        found = " and ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(f"octavo::{name} takes float32, or float64, on CUDA; got {found}: convert on the CPU first")


def _way(x: Tensor, shape: tuple[int, ...]) -> tuple[Way, tuple[int, ...]]:
    """How x is read where a result of that shape is written, and its strides there."""
    missing = len(shape) - x.ndim
    strides = (0,) * missing + tuple(
        0 if length == 1 else step for length, step in zip(x.shape, x.strides, strict=True)
    )
    if x.size == 1:
        return Way.ONE, (0,) * len(shape)
    return (Way.FLAT if x.shape == shape and x.is_contiguous else Way.STRIDED), strides


def arithmetic(operation: Operation) -> Callable[[Tensor, Tensor], Tensor]:
    """left and right, broadcast, in any strides."""
    name = operation.name.lower()

    def run(left: Tensor, right: Tensor) -> Tensor:
        floating(name, left, right)
        try:
            shape = np.broadcast_shapes(left.shape, right.shape)
        except ValueError:
            raise ValueError(
                f"octavo::{name}: shapes {list(left.shape)} and {list(right.shape)} do not broadcast; reshape one of them"
            ) from None
        out = empty(shape, left.dtype, device=left.device)
        (a_way, a_strides), (b_way, b_strides) = _way(left, shape), _way(right, shape)
        lengths, steps = [1, 1, 1], [[0] * 4] * 2
        if Way.STRIDED in (a_way, b_way):
            lengths, steps = merged(shape, a_strides, b_strides)
        launch(
            kernels.arithmetic_kernel,
            programs(out.size),
            left,
            right,
            out,
            out.size,
            *lengths,
            *steps[0],
            *steps[1],
            OPERATION=int(operation),
            A_WAY=int(a_way),
            B_WAY=int(b_way),
            WIDTH=BLOCK,
        )
        return out

    return run


def unary(operation: Operation) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        floating(operation.name.lower(), x)
        x = contiguous(x)
        out = like(x)
        launch(kernels.unary_kernel, programs(x.size), x, out, x.size, OPERATION=int(operation), WIDTH=BLOCK)
        return out

    return run


def relu(x: Tensor) -> Tensor:
    floating("relu", x)
    x = contiguous(x)
    out = like(x)
    launch(kernels.relu_kernel, programs(x.size), x, out, x.size, WIDTH=BLOCK)
    return out


def relu_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    floating("relu_gradient", gradient, x)
    checks.same_shape(gradient, x)
    gradient, x = contiguous(gradient), contiguous(x)
    out = like(x)
    launch(kernels.relu_gradient_kernel, programs(x.size), gradient, x, out, x.size, WIDTH=BLOCK)
    return out


def copy_(target: Tensor, source: Tensor) -> None:
    if target.shape != source.shape or target.dtype != source.dtype:
        raise ValueError(
            f"octavo::copy_ takes two tensors of one shape and, on CUDA, one dtype; got {target.dtype} {list(target.shape)} and "
            f"{source.dtype} {list(source.shape)}"
        )
    copy(target, source)


def _rate(rate: Any, weight: Tensor) -> tuple[Tensor, float, bool]:
    """A learning rate as the kernels take it: where it lies, or the number, and which of the two."""
    if not isinstance(rate, Tensor):
        return weight, float(np.float32(rate)), False
    if rate.size != 1 or not fast(rate) or rate.device is not weight.device:
        raise ValueError(
            f"a learning rate is a number, or one float32 on {weight.device}; got {rate.dtype} {list(rate.shape)} on {rate.device}"
        )
    return rate, 0.0, True


def _floats(*values: float) -> tuple[float, ...]:
    """The numbers as float32 has them."""
    return tuple(float(np.float32(value)) for value in values)


def sgd(
    weight: Tensor, gradient: Tensor, velocity: Tensor | None, rate: Any, momentum: float, decay: float, nesterov: bool
) -> None:
    gradient = contiguous(gradient)
    checks.sgd(weight, gradient, velocity, momentum, nesterov)
    place, number, by_address = _rate(rate, weight)
    launch(
        kernels.sgd_kernel,
        programs(weight.size),
        weight,
        gradient,
        weight if velocity is None else velocity,
        place,
        weight.size,
        number,
        *_floats(momentum, decay),
        BY_ADDRESS=by_address,
        MOMENTUM=velocity is not None,
        NESTEROV=bool(nesterov),
        WIDTH=BLOCK,
    )


def adam(
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
    launch(kernels.advance_kernel, 1, steps)
    place, number, by_address = _rate(rate, weight)
    one = np.float32(1)
    rest1, rest2 = (float(one - np.float32(beta)) for beta in (beta1, beta2))
    narrow1, narrow2, *others = _floats(beta1, beta2, epsilon, decay)
    launch(
        kernels.adam_kernel,
        programs(weight.size),
        weight,
        gradient,
        first,
        second,
        steps,
        place,
        weight.size,
        number,
        narrow1,
        rest1,
        narrow2,
        rest2,
        *others,
        BETA1=float(beta1),
        BETA2=float(beta2),
        BY_ADDRESS=by_address,
        WIDTH=BLOCK,
    )
