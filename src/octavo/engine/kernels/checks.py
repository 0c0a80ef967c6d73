"""What operators refuse on every device, each in one place: shapes that do not fit, and settings that contradict each other."""

from __future__ import annotations

import numpy as np

from octavo.engine.kernels.memory import fast
from octavo.engine.tensor import Tensor

__all__ = [
    "adam",
    "add_matmul",
    "bad_label",
    "bad_row",
    "labels",
    "last_dimension",
    "linear",
    "masked_matmul",
    "matmul",
    "same_shape",
    "sgd",
    "sum_axis",
    "take_rows",
]


def matmul(a: Tensor, b: Tensor) -> None:
    """Raise ValueError unless [.., M, K] meets [.., K, N]."""
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"octavo::matmul multiplies [.., M, K] by [.., K, N]; got {list(a.shape)} and {list(b.shape)}")


def masked_matmul(a: Tensor, b: Tensor, mask: Tensor) -> None:
    """Raise ValueError unless [M, K] meets [K, N] and a mask [M, N]."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or mask.shape != (a.shape[0], b.shape[1]):
        raise ValueError(
            f"octavo::masked_matmul keeps [M, K] @ [K, N] where a mask [M, N] is positive; got {list(a.shape)}, {list(b.shape)} and "
            f"{list(mask.shape)}"
        )


def add_matmul(c: Tensor, a: Tensor, b: Tensor) -> None:
    """Raise ValueError unless [M, K] @ [K, N] fits [M, N]."""
    if not (a.ndim == b.ndim == c.ndim == 2 and a.shape[1] == b.shape[0] and c.shape == (a.shape[0], b.shape[1])):
        raise ValueError(
            f"octavo::add_matmul_ adds [M, K] @ [K, N] to [M, N]; got {list(a.shape)}, {list(b.shape)} and {list(c.shape)}"
        )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless [.., I] meets [I, O] and a contiguous bias [O]."""
    if weight.ndim != 2 or input.ndim < 2 or input.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"octavo::linear multiplies [.., I] by [I, O]; got {list(input.shape)} and {list(weight.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[1:] or bias.dtype != weight.dtype or not bias.is_contiguous):
        raise ValueError(
            f"octavo::linear adds a contiguous bias [{weight.shape[1]}] of {weight.dtype}; got {list(bias.shape)} of {bias.dtype}"
        )


def same_shape(gradient: Tensor, x: Tensor) -> None:
    """Raise ValueError unless ReLU's gradient has the shape of its input."""
    if gradient.shape != x.shape:
        raise ValueError(
            f"octavo::relu_gradient takes two tensors of one shape; got {list(gradient.shape)} and {list(x.shape)}"
        )


def sum_axis(x: Tensor, axis: int | None) -> None:
    """Raise ValueError unless x has that dimension; None is all."""
    if axis is not None and not -x.ndim <= axis < x.ndim:
        raise ValueError(f"octavo::sum: a tensor of shape {list(x.shape)} has no dimension {axis}")


def take_rows(x: Tensor, numbers: Tensor) -> None:
    """Raise ValueError unless x has rows and numbers are contiguous int64 [N]."""
    if x.ndim == 0 or numbers.ndim != 1 or numbers.dtype != np.int64 or not numbers.is_contiguous:
        raise ValueError(
            f"octavo::take_rows takes [rows, ..] and contiguous int64 [N]; got {list(x.shape)} and {numbers.dtype} {list(numbers.shape)}"
        )


def bad_row(place: int, number: int, rows: int) -> ValueError:
    """What is said of a number that is no row's."""
    return ValueError(f"octavo::take_rows: number {place} is {number}, and x has {rows} rows, from 0; correct it")


def labels(name: str, logits: Tensor, found: Tensor) -> None:
    """Raise ValueError unless there are scores [N, classes] and contiguous int64 labels [N]."""
    if logits.ndim != 2 or found.shape != logits.shape[:1] or logits.size == 0:
        raise ValueError(
            f"{name} takes logits [N, classes] and labels [N]; got {list(logits.shape)} and {list(found.shape)}"
        )
    if found.dtype != np.int64 or not found.is_contiguous:
        gaps = "" if found.is_contiguous else " with gaps"
        raise ValueError(
            f"{name}: labels are contiguous int64; got {found.dtype}{gaps}: convert them with numpy.ascontiguousarray(labels, numpy.int64)"
        )


def bad_label(label: int, place: int, classes: int) -> ValueError:
    """What is said of a label out of range."""
    return ValueError(
        f"octavo::cross_entropy: label {place} is {label}, and {classes} classes are 0 to {classes - 1}; correct it"
    )


def last_dimension(name: str, x: Tensor) -> None:
    """Raise ValueError where x has no last dimension, or nothing along it."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{name} is along the last dimension; a tensor of shape {list(x.shape)} has none, or nothing there"
        )


def _updated(name: str, weight: Tensor, *others: Tensor | None) -> None:
    """Raise ValueError unless all have the weight's shape and are contiguous float32."""
    for one in (weight, *others):
        if one is not None and (one.shape != weight.shape or not fast(one)):
            raise ValueError(
                f"{name} takes contiguous float32 tensors of one shape; got {one.dtype} {list(one.shape)} beside {list(weight.shape)}; "
                "convert them first"
            )


def sgd(weight: Tensor, gradient: Tensor, velocity: Tensor | None, momentum: float, nesterov: bool) -> None:
    """Raise ValueError unless the tensors are alike, and momentum and velocity come together."""
    _updated("octavo::sgd_", weight, gradient, velocity)
    if (momentum != 0) != (velocity is not None):
        raise ValueError("octavo::sgd_ keeps its momentum in velocity: give both, or neither")
    if nesterov and velocity is None:
        raise ValueError("octavo::sgd_: nesterov=True looks ahead along the momentum; give momentum and velocity too")


def adam(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, steps: Tensor) -> None:
    """Raise ValueError unless the tensors are alike, and steps is one float32."""
    _updated("octavo::adam_", weight, gradient, first, second)
    if steps.size != 1 or not fast(steps):
        raise ValueError(f"octavo::adam_: steps is one float32 number; got {steps.dtype} {list(steps.shape)}")
