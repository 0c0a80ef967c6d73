"""Many steps of training a perceptron with one hidden layer in one launch, as Triton compiles them.

All programs run at once and meet three times a step: after the hidden layer, after the loss, and after the gradients.  The second
layer's weights are read until the last meeting, so the next step begins with their update.  Each number is computed as the operators
compute it, and has the bits that they give it.

Legend: samples [S, I], labels [S], order [steps * B]; weight1 [I, H], bias1 [H], weight2 [H, C], bias2 [C]; hidden [B, H], slopes [B, C]:
the loss's gradient by the scores.  B: batch, I: inputs, H: hidden, C: classes.  Capital letters are constants; a TILE is (rows, columns,
depth).
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.engine.kernels.cuda_gemm_kernels import piece_sum, pieces_of
from octavo.engine.kernels.cuda_row_kernels import exp, log, report

__all__ = ["CLASSES", "FIRST", "SCORES", "UPDATE"]

FIRST, SCORES, UPDATE = (16, 16, 64), (16, 16, 64), (32, 64, 32)
"""Tiles of the hidden layer, of the scores, and of the first layer's gradient."""
CLASSES = 16
"""The most classes: a power of two."""
_STRIDE = tl.constexpr(256)


@triton.jit
def _meet(counter, turn):
    """Wait until every program has come here for the turn-th time, and see what they wrote before."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acq_rel", scope="gpu") < turn * tl.num_programs(0):
        pass
    tl.debug_barrier()


@triton.jit
def _product(a_rows, b_columns, has_row, has_column, K, a_k, b_k, TILE: tl.constexpr):
    """A @ B, cut and added up as `gemm_kernel` does it."""
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    pieces = pieces_of(K)
    for piece in range(pieces):
        part = piece_sum(
            a_rows, b_columns, has_row, has_column, K * piece // pieces, K * (piece + 1) // pieces, a_k, b_k, TILE
        )
        found = tl.where(piece == 0, part, found + part)
    return found


@triton.jit
def _step(weight, gradient, inside, rate):
    """weight -= rate * gradient, fused: `sgd_kernel` without momentum and decay; weight: addresses."""
    tl.store(weight, tl.fma(tl.zeros_like(gradient) - rate, gradient, tl.load(weight, mask=inside)), mask=inside)


@triton.jit
def _update(weight, gradient, size, rate):
    """weight -= rate * gradient, shared out among the programs."""
    for first in range(tl.program_id(0) * _STRIDE, size, tl.num_programs(0) * _STRIDE):
        i = first + tl.arange(0, _STRIDE)
        inside = i < size
        _step(weight + i, tl.load(gradient + i, mask=inside), inside, rate)


@triton.jit
def _sample(order, place, has, samples_count, inputs):
    """Where the samples of these places begin; a number that is none is read as 0, and `_scores` reports it."""
    number = tl.load(order + place, mask=has, other=0)
    return tl.where((number < 0) | (number >= samples_count), 0, number) * inputs


@triton.jit
def _hidden_layer(samples, order, weight1, bias1, hidden, samples_count, batch, inputs, width, TILE: tl.constexpr):
    """hidden = relu(samples[order] @ weight1 + bias1)"""
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    across = tl.cdiv(width, COLUMNS)
    for tile in range(tl.program_id(0), tl.cdiv(batch, ROWS) * across, tl.num_programs(0)):
        m = tile // across * ROWS + tl.arange(0, ROWS)
        n = tile % across * COLUMNS + tl.arange(0, COLUMNS)
        has_row, has_column = m < batch, n < width
        rows = samples + _sample(order, m, has_row, samples_count, inputs)
        found = _product(rows, weight1 + n, has_row, has_column, inputs, 1, width, TILE)
        found = found + tl.load(bias1 + n, mask=has_column, other=0.0)[None, :]
        found = tl.where(found < 0, 0.0, found)
        tl.store(hidden + m[:, None] * width + n[None, :], found, mask=has_row[:, None] & has_column[None, :])


@triton.jit
def _scores(
    labels,
    order,
    weight2,
    bias2,
    hidden,
    slopes,
    losses,
    wrong,
    first,
    places,
    samples_count,
    batch,
    width,
    classes,
    share,
    TILE: tl.constexpr,
):
    """slopes: the cross-entropy's gradient by hidden @ weight2 + bias2; losses: the sum of each tile's rows."""
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    n = tl.arange(0, COLUMNS)
    has_column = n < classes
    for tile in range(tl.program_id(0), tl.cdiv(batch, ROWS), tl.num_programs(0)):
        m = tile * ROWS + tl.arange(0, ROWS)
        has_row = m < batch
        number = tl.load(order + m, mask=has_row, other=0)
        known = (number >= 0) & (number < samples_count)
        label = tl.load(labels + number, mask=has_row & known, other=0)
        bad = has_row & ((known == 0) | (label < 0) | (label >= classes))
        report(wrong, places - first - m, bad)
        score = _product(hidden + m * width, weight2 + n, has_row, has_column, width, 1, classes, TILE)
        score = score + tl.load(bias2 + n, mask=has_column, other=0.0)[None, :]
        shown = tl.where(has_column[None, :], score, float("-inf"))
        best = tl.max(shown, 1)
        best = tl.where(tl.max((shown != shown).to(tl.int32), 1) > 0, float("nan"), best)
        power = tl.where(has_column[None, :], exp(score - best[:, None]), 0.0)
        total = tl.zeros([ROWS], tl.float32)
        for j in tl.static_range(COLUMNS):  # in the order of the classes
            total = total + tl.sum(tl.where(n[None, :] == j, power, 0.0), 1)
        mine = n[None, :] == label[:, None]
        loss = best + log(total) - tl.sum(tl.where(mine, score, 0.0), 1)
        tl.store(losses + tile, tl.sum(tl.where(has_row & (bad == 0), loss, 0.0)))
        slope = tl.div_rn(power, tl.zeros_like(power) + total[:, None]) * share
        slope = tl.where(mine, slope - share, slope)
        tl.store(slopes + m[:, None] * classes + n[None, :], slope, mask=has_row[:, None] & has_column[None, :])


@triton.jit
def _first_gradient(
    samples,
    order,
    weight1,
    bias1,
    weight2,
    hidden,
    slopes,
    samples_count,
    batch,
    inputs,
    width,
    classes,
    rate,
    tile,
    TILE: tl.constexpr,
):
    """A tile of weight1 -= rate * samples[order].T @ G, with G = slopes @ weight2.T where hidden is positive, and of bias1 along."""
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    DEPTH: tl.constexpr = TILE[2]
    across = tl.cdiv(width, COLUMNS)
    m = tile // across * ROWS + tl.arange(0, ROWS)
    n = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.arange(0, 16)
    has_row, has_column, has_class = m < inputs, n < width, c < classes
    turned = tl.load(
        weight2 + n[None, :] * classes + c[:, None], mask=has_class[:, None] & has_column[None, :], other=0.0
    )
    found, sums = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([16, COLUMNS], tl.float32)
    ones = tl.full([16, DEPTH], 1.0, tl.float32)
    pieces = pieces_of(batch)
    for piece in range(pieces):
        last = batch * (piece + 1) // pieces
        part = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(batch * piece // pieces, last, DEPTH):
            k = start + tl.arange(0, DEPTH)
            has = k < last
            slope = tl.load(
                slopes + k[:, None] * classes + c[None, :], mask=has[:, None] & has_class[None, :], other=0.0
            )
            back = tl.dot(slope, turned, input_precision="ieee")
            kept = tl.load(hidden + k[:, None] * width + n[None, :], mask=has[:, None] & has_column[None, :], other=0.0)
            back = tl.where(kept > 0, back, 0.0)
            rows = samples + _sample(order, k, has, samples_count, inputs)
            a = tl.load(rows[None, :] + m[:, None], mask=has_row[:, None] & has[None, :], other=0.0)
            part = tl.dot(a, back, part, input_precision="ieee")
            sums = tl.dot(ones, back, sums, input_precision="ieee")
        found = tl.where(piece == 0, part, found + part)
    place, inside = m[:, None] * width + n[None, :], has_row[:, None] & has_column[None, :]
    _step(weight1 + place, found, inside, rate)
    r = tl.arange(0, 16) + tile // across
    once = (r == 0)[:, None] & has_column[None, :]  # each column's first tile has its bias
    _step(bias1 + r[:, None] * 0 + n[None, :], sums, once, rate)


@triton.jit
def _second_gradient(hidden, slopes, gradient2, batch, width, classes, tile, TILE: tl.constexpr):
    """A tile of hidden.T @ slopes, and with the first, after them in memory, the sums of slopes' columns."""
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    DEPTH: tl.constexpr = TILE[2]
    m = tile * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, COLUMNS)
    has_row, has_column = m < width, n < classes
    found = _product(hidden + m, slopes + n, has_row, has_column, batch, width, classes, TILE)
    tl.store(gradient2 + m[:, None] * classes + n[None, :], found, mask=has_row[:, None] & has_column[None, :])
    if tile == 0:
        r = tl.arange(0, 16)
        sums, ones = tl.zeros([16, COLUMNS], tl.float32), tl.full([16, DEPTH], 1.0, tl.float32)
        for start in range(0, batch, DEPTH):
            k = start + tl.arange(0, DEPTH)
            inside = (k < batch)[:, None] & has_column[None, :]
            slope = tl.load(slopes + k[:, None] * classes + n[None, :], mask=inside, other=0.0)
            sums = tl.dot(ones, slope, sums, input_precision="ieee")
        place = width * classes + r[:, None] * 0 + n[None, :]
        tl.store(gradient2 + place, sums, mask=(r == 0)[:, None] & has_column[None, :])


@triton.jit
def _gradients(
    samples,
    order,
    weight1,
    bias1,
    weight2,
    hidden,
    slopes,
    gradient2,
    samples_count,
    batch,
    inputs,
    width,
    classes,
    rate,
    FIRST_TILE: tl.constexpr,
    SECOND_TILE: tl.constexpr,
):
    """The tiles of both layers, shared out among the programs."""
    first_tiles = tl.cdiv(inputs, FIRST_TILE[0]) * tl.cdiv(width, FIRST_TILE[1])
    tiles = first_tiles + tl.cdiv(width, SECOND_TILE[0])
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        if tile < first_tiles:
            _first_gradient(
                samples,
                order,
                weight1,
                bias1,
                weight2,
                hidden,
                slopes,
                samples_count,
                batch,
                inputs,
                width,
                classes,
                rate,
                tile,
                FIRST_TILE,
            )
        else:
            _second_gradient(hidden, slopes, gradient2, batch, width, classes, tile - first_tiles, SECOND_TILE)


@triton.jit
def mlp_kernel(
    samples,
    labels,
    order,
    weight1,
    bias1,
    weight2,
    bias2,
    hidden,
    slopes,
    gradient2,
    losses,
    counter,
    wrong,
    steps,
    samples_count,
    batch,
    inputs,
    width,
    classes,
    rate,
    share,
    HIDDEN_TILE: tl.constexpr,
    SCORES_TILE: tl.constexpr,
    UPDATE_TILE: tl.constexpr,
):
    """Steps of SGD; order, of which step s takes the s-th B; gradient2: [H * C + C]; losses: [steps, tiles of rows], sums of rows'."""
    for step in range(steps):
        turn, now = 3 * step, order + step * batch
        if step > 0:
            _update(weight2, gradient2, width * classes, rate)
            _update(bias2, gradient2 + width * classes, classes, rate)
        _hidden_layer(samples, now, weight1, bias1, hidden, samples_count, batch, inputs, width, HIDDEN_TILE)
        _meet(counter, turn + 1)
        _scores(
            labels,
            now,
            weight2,
            bias2,
            hidden,
            slopes,
            losses + step * tl.cdiv(batch, SCORES_TILE[0]),
            wrong,
            step * batch,
            steps * batch,
            samples_count,
            batch,
            width,
            classes,
            share,
            SCORES_TILE,
        )
        _meet(counter, turn + 2)
        _gradients(
            samples,
            now,
            weight1,
            bias1,
            weight2,
            hidden,
            slopes,
            gradient2,
            samples_count,
            batch,
            inputs,
            width,
            classes,
            rate,
            UPDATE_TILE,
            SCORES_TILE,
        )
        _meet(counter, turn + 3)
    _update(weight2, gradient2, width * classes, rate)
    _update(bias2, gradient2 + width * classes, classes, rate)
