"""Operators over scores of classes on the CPU: softmax, cross-entropy, arg-max."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from octavo.engine.kernels import checks, rows
from octavo.engine.kernels.launch import refuse
from octavo.engine.kernels.memory import contiguous, fast, from_array, lanes_for, like
from octavo.engine.storage import pool
from octavo.engine.tensor import Tensor, empty

__all__ = ["argmax", "cross_entropy", "cross_entropy_both", "cross_entropy_gradient", "softmax"]


def softmax(logarithm: bool) -> Callable[[Tensor], Tensor]:
    name = "octavo::log_softmax" if logarithm else "octavo::softmax"

    def run(x: Tensor) -> Tensor:
        checks.last_dimension(name, x)
        _floating(name, x)
        x = contiguous(x)
        out, columns = like(x), x.shape[-1]
        if fast(x):
            rows.softmax(lanes_for(x.size * 8), x.address, out.address, x.size // columns, columns, logarithm)
            return out
        refuse(f"softmax of {x.dtype} runs in NumPy")
        with np.errstate(all="ignore"):
            less = x.array - x.array.max(-1, keepdims=True)
            powers = np.exp(less)
            total = powers.sum(-1, keepdims=True)
            np.copyto(out.array, less - np.log(total) if logarithm else powers / total)
        return out

    return run


def _floating(name: str, x: Tensor) -> None:
    if x.dtype.kind != "f":
        raise ValueError(f"{name} takes floating-point scores; got {x.dtype}: convert them with .astype(numpy.float32)")


def _checked_labels(classes: int) -> Callable[[Any], None]:
    def check(block: Any) -> None:
        place, label = struct.unpack_from("<2q", block, 72)
        if place:
            struct.pack_into("<q", block, 72, 0)
            raise checks.bad_label(label, place - 1, classes)

    return check


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = _losses("octavo::cross_entropy", logits, labels, None, loss=True, gradient=False)[0]
    return loss


def cross_entropy_gradient(logits: Tensor, labels: Tensor, upstream: Tensor | None) -> Tensor:
    slope: Tensor = _losses("octavo::cross_entropy_gradient", logits, labels, upstream, loss=False, gradient=True)[1]
    return slope


def cross_entropy_both(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return _losses("octavo::cross_entropy_both", logits, labels, None, loss=True, gradient=True)


def _losses(
    name: str, logits: Tensor, labels: Tensor, upstream: Tensor | None, *, loss: bool, gradient: bool
) -> tuple[Any, Any]:
    """The mean loss, and its gradient by the logits times `upstream`, each where asked for."""
    checks.labels(name, logits, labels)
    logits = contiguous(logits)
    count, classes = logits.shape
    _floating(name, logits)
    if upstream is not None and (upstream.size, upstream.dtype) != (1, logits.dtype):
        raise ValueError(
            f"{name}: upstream is one {logits.dtype}; got {upstream.dtype} {list(upstream.shape)}: give one number"
        )
    if not fast(logits):
        refuse(f"cross-entropy of {logits.dtype} runs in NumPy")
        return _losses_by_numpy(logits.array, labels.array, upstream)
    value = empty((), logits.dtype) if loss else None
    slope = like(logits) if gradient else None
    parts = pool().take(4 * (-(-count // rows.GROUP)))
    rows.cross_entropy(
        lanes_for(logits.size * 8),
        logits.address,
        labels.address,
        0 if slope is None else slope.address,
        0 if value is None else value.address,
        parts.address,
        count,
        classes,
        0 if upstream is None else upstream.address,
        0,
        0,
        0,
        check=_checked_labels(classes),
    )
    return value, slope


def _losses_by_numpy(logits: Any, labels: Any, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    count, classes = logits.shape
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise checks.bad_label(int(labels[wrong[0]]), int(wrong[0]), classes)
    with np.errstate(all="ignore"):
        less = logits - logits.max(1, keepdims=True)
        logs = less - np.log(np.exp(less).sum(1, keepdims=True))
        slope = np.exp(logs)
    slope[np.arange(count), labels] -= 1
    slope *= (1.0 if upstream is None else float(upstream.array)) / count
    loss = -logs[np.arange(count), labels].mean(dtype=logits.dtype)
    return from_array(np.asarray(loss, logits.dtype)), from_array(slope.astype(logits.dtype))


def argmax(x: Tensor) -> Tensor:
    checks.last_dimension("octavo::argmax", x)
    x = contiguous(x)
    out = empty(x.shape[:-1], np.int64)
    if fast(x):
        rows.arg_max(lanes_for(x.size), x.address, out.address, out.size, x.shape[-1])
    else:
        refuse(f"argmax of {x.dtype} runs in NumPy")
        np.argmax(x.array, axis=-1, out=out.array)
    return out
