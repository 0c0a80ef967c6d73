"""A perceptron with one hidden layer, trained for many steps in one launch: nothing returns to Python, or to the driver, between them."""

from __future__ import annotations

from typing import Any

import numpy as np

from octavo.engine.kernels import checks
from octavo.engine.kernels import cuda_mlp_kernels as kernels
from octavo.engine.kernels.cuda_checks import settle, word
from octavo.engine.kernels.cuda_launch import INTERPRETED, launch, processors
from octavo.engine.kernels.cuda_memory import fill
from octavo.engine.kernels.cuda_mlp_kernels import CLASSES, FIRST, SCORES, UPDATE
from octavo.engine.kernels.cuda_rows import _number, sum_
from octavo.engine.storage import Device
from octavo.engine.tensor import Tensor, empty

__all__ = ["train"]

_TOGETHER: dict[str, Any] = {} if INTERPRETED else {"launch_cooperative_grid": True}
"""All programs wait for each other, so all of them have to run at once."""


def _checked(samples: Tensor, labels: Tensor, order: Tensor, weights: tuple[Tensor, ...], batch: int) -> None:
    """Raise ValueError unless shapes, dtypes and places fit each other."""
    shapes = ", ".join(str(list(one.shape)) for one in (samples, labels, order, *weights))
    weight1, bias1, weight2, bias2 = weights
    inputs, width, classes = samples.shape[-1], weight1.shape[-1], weight2.shape[-1]
    fits = (
        samples.ndim == 2
        and labels.shape == samples.shape[:1]
        and order.ndim == 1
        and weight1.shape == (inputs, width)
        and bias1.shape == (width,)
        and weight2.shape == (width, classes)
        and bias2.shape == (classes,)
    )
    if not fits:
        raise ValueError(
            "train takes samples [S, I], labels [S], order [steps * B] and weights [I, H], [H], [H, C], [C]; got "
            + shapes
        )
    for one in (samples, labels, order, *weights):
        dtype = np.int64 if one is labels or one is order else np.float32
        if one.dtype != dtype or not one.is_contiguous or one.device is not Device.CUDA:
            raise ValueError(
                f"train takes contiguous tensors on cuda, float32, and int64 labels and order; got {one.dtype} {list(one.shape)} on "
                f"{one.device}"
            )
    if batch < 1 or order.size == 0 or order.size % batch:
        raise ValueError(f"order holds whole batches of {batch}; it has {order.size} numbers: leave out the rest")
    if classes > CLASSES:
        raise ValueError(f"train takes up to {CLASSES} classes; got {classes}: train it by operators")


def train(
    samples: Tensor,
    labels: Tensor,
    order: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    batch: int,
    rate: float,
) -> Tensor:
    """SGD without momentum, a step for each `batch` numbers of order; changes the weights, returns the mean losses, float32 [steps].

    samples: float32 [S, I], labels: int64 [S], order: int64 [steps * batch], which samples each step takes; weights: float32 [I, H], [H],
    [H, C], [C], of relu(x @ weight1 + bias1) @ weight2 + bias2.  All on CUDA.  They come to the bits that the operators come to, step by
    step, and NaN and Inf go through as there.  Raises ValueError for what does not fit, and, with the weights already changed, for a
    number that is no sample's and a label out of range.
    """
    _checked(samples, labels, order, weights, batch)
    width, classes = weights[2].shape
    steps, device = order.size // batch, samples.device
    tiles = -(-batch // SCORES[0])
    hidden, slopes = empty((batch, width), device=device), empty((batch, classes), device=device)
    gradient2, losses = empty(((width + 1) * classes,), device=device), empty((steps, tiles), device=device)
    counter = empty((1,), np.int32, device=device)
    fill(counter.address, 1, 0, counter.dtype)
    report = word()
    launch(
        kernels.mlp_kernel,
        processors(),
        samples,
        labels,
        order,
        *weights,
        hidden,
        slopes,
        gradient2,
        losses,
        counter,
        report,
        steps,
        samples.shape[0],
        batch,
        samples.shape[1],
        width,
        classes,
        float(np.float32(rate)),
        float(np.float32(1) / np.float32(batch)),
        HIDDEN_TILE=FIRST,
        SCORES_TILE=SCORES,
        UPDATE_TILE=UPDATE,
        **_TOGETHER,
    )
    for one in weights:
        one.storage.version += 1

    def explain(rank: int) -> ValueError:
        place = order.size - rank
        number = _number(order, place)
        if not 0 <= number < samples.shape[0]:
            return ValueError(f"train: number {place} of order is {number}, and there are {samples.shape[0]} samples")
        return checks.bad_label(_number(labels, number), number, classes)

    settle(report, explain)
    return sum_(losses, 1) / float(batch)
