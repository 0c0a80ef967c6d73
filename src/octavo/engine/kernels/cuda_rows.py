"""The engine's operators over rows on the GPU: softmax, cross-entropy, arg-max, sums, and rows by number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from octavo.engine.kernels import checks
from octavo.engine.kernels import cuda_row_kernels as kernels
from octavo.engine.kernels.cuda_checks import settle, word
from octavo.engine.kernels.cuda_elements import floating, like
from octavo.engine.kernels.cuda_launch import At, launch
from octavo.engine.kernels.cuda_memory import contiguous
from octavo.engine.kernels.cuda_row_kernels import PARTS, ROWS, WIDTH
from octavo.engine.tensor import Tensor, empty

__all__ = ["argmax", "cross_entropy", "cross_entropy_both", "cross_entropy_gradient", "softmax", "sum_", "take_rows"]

_UNROLL = 8
_WIDE = 1024
"""Numbers that a program adds up at a time where the order is its own."""


def _rows(name: str, x: Tensor) -> Tensor:
    """x, contiguous.  Raises ValueError where it has no last dimension, or nothing there, or no float32."""
    checks.last_dimension(f"octavo::{name}", x)
    if x.dtype != np.float32:
        raise ValueError(f"octavo::{name} takes float32 on CUDA; got {x.dtype}: convert it on the CPU first")
    return contiguous(x)


def softmax(logarithm: bool) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        x = _rows("log_softmax" if logarithm else "softmax", x)
        out, columns = like(x), x.shape[-1]
        count = x.size // columns
        launch(kernels.softmax_kernel, -(-count // ROWS), x, out, count, columns, LOGARITHM=logarithm, LANES=ROWS)
        return out

    return run


def argmax(x: Tensor) -> Tensor:
    x = _rows("argmax", x)
    out = empty(x.shape[:-1], np.int64, device=x.device)
    launch(kernels.arg_max_kernel, -(-out.size // ROWS), x, out, out.size, x.shape[-1], LANES=ROWS)
    return out


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    found: Tensor = _losses("octavo::cross_entropy", logits, labels, None, loss=True, gradient=False)[0]
    return found


def cross_entropy_gradient(logits: Tensor, labels: Tensor, upstream: Tensor | None) -> Tensor:
    found: Tensor = _losses("octavo::cross_entropy_gradient", logits, labels, upstream, loss=False, gradient=True)[1]
    return found


def cross_entropy_both(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return _losses("octavo::cross_entropy_both", logits, labels, None, loss=True, gradient=True)


def _losses(
    name: str, logits: Tensor, labels: Tensor, upstream: Tensor | None, *, loss: bool, gradient: bool
) -> tuple[Any, Any]:
    """The mean loss, and its gradient by the logits times `upstream`, each where asked for."""
    checks.labels(name, logits, labels)
    logits = _rows(name.removeprefix("octavo::"), logits)
    count, classes = logits.shape
    programs = -(-count // ROWS)
    parts = empty((programs,), logits.dtype, device=logits.device) if loss else logits
    slope = like(logits) if gradient else logits
    report = word()
    launch(
        kernels.cross_entropy_kernel,
        programs,
        logits,
        labels,
        slope,
        parts,
        logits if upstream is None else upstream,
        report,
        count,
        classes,
        float(np.float32(1) / np.float32(count)),
        GRADIENT=gradient,
        LOSS=loss,
        UPSTREAM=upstream is not None,
        LANES=ROWS,
    )
    value = _total(parts, parts.size, over=count) if loss else None
    settle(report, lambda rank: checks.bad_label(_number(labels, count - rank), count - rank, classes))
    return value, slope if gradient else None


def _number(numbers: Tensor, place: int) -> int:
    """One number of a vector on the device."""
    return int(Tensor(numbers.storage, (), (), numbers.dtype, numbers.offset + 8 * place).item())


def _total(x: Tensor, size: int, *, over: int | None = None) -> Tensor:
    """The sum of x, contiguous, and over that number for a mean."""
    programs = min(PARTS, -(-size // (4 * _WIDE)))
    if programs > 1:
        parts = empty((programs,), x.dtype, device=x.device)
        launch(kernels.total_kernel, programs, x, parts, size, 1, MEAN=False, LANES=_WIDE)
        x, size = parts, programs
    out = empty((), x.dtype, device=x.device)
    launch(kernels.total_kernel, 1, x, out, size, 1 if over is None else over, MEAN=over is not None, LANES=_WIDE)
    return out


def sum_(x: Tensor, axis: int | None) -> Tensor:
    floating("sum", x)
    checks.sum_axis(x, axis)
    x = contiguous(x)
    if axis is None:
        return _total(x, x.size)
    axis %= x.ndim
    out = empty((*x.shape[:axis], *x.shape[axis + 1 :]), x.dtype, device=x.device)
    inner = int(np.prod(x.shape[axis + 1 :], dtype=np.int64))
    launch(
        kernels.axis_sum_kernel,
        -(-out.size // WIDTH),
        x,
        out,
        out.size,
        x.shape[axis],
        inner,
        LANES=WIDTH,
        UNROLL=_UNROLL,
        num_warps=WIDTH // 32,
    )
    return out


def take_rows(x: Tensor, numbers: Tensor) -> Tensor:
    checks.take_rows(x, numbers)
    x = contiguous(x)
    count, rows = numbers.size, x.shape[0]
    out = empty((count, *x.shape[1:]), x.dtype, device=x.device)
    size = out.size // max(1, count) * x.dtype.itemsize
    item = 4 if size % 4 == 0 and x.address % 4 == 0 else 1
    source, target = (At(one.address, "int32" if item == 4 else "int8") for one in (x, out))
    report, words = word(), size // item
    programs = -(-count * words // _WIDE)
    launch(kernels.take_rows_kernel, programs, source, numbers, target, report, rows, words, count, LANES=_WIDE)

    def explain(rank: int) -> ValueError:
        place = count - rank
        return checks.bad_row(place, _number(numbers, place), rows)

    settle(report, explain)
    return out
