"""A recipe's table, ready to cast: each cell a cast, each row three, and the passes that run as one chain of kernels."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.table import Accumulator, Gemm, Recipe, TensorSpec
from octavo.torch import fused
from octavo.torch.operands import KINDS, Cast, Operand, Packed, decoded, plain

__all__ = [
    "Row",
    "Table",
    "backward_pass",
    "bytes_of",
    "held_input",
    "input_of",
    "operand",
    "output_pass",
    "result",
    "seed_of",
    "table_of",
]


def operand(x: Tensor, cast: Cast | None, delayed: float, seed: int, *, last: bool) -> Operand:
    """x as a GEMM takes it; last: whether the GEMM contracts x's last axis."""
    return plain(x, last) if cast is None else cast(x, delayed, seed)


def result(y: Tensor, cast: Cast | None, delayed: float, seed: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """A GEMM result, cast and decoded where the recipe says so, and its amax."""
    if cast is None:
        return y, 0.0
    found = cast(y, delayed, seed)
    return decoded(found).to(dtype), found.amax


class Row(NamedTuple):
    """A row of the recipe's table, ready to cast."""

    left: Cast | None
    right: Cast | None
    result: Cast | None
    accumulator: Accumulator


class Table(NamedTuple):
    """A recipe's table, ready to cast."""

    output: Row
    grad_input: Row
    grad_weight: Row
    grad_output_once: bool
    """Whether grad_output is cast alike in both of its GEMMs."""
    cast: tuple[bool, bool]
    """Whether input and weight are, into values with at most one factor, so that the operands of `output` serve the backward pass."""
    fuses: tuple[bool, bool]
    """Whether the forward pass and the backward pass are one chain of kernels, where the machine and the tensors allow it."""
    stochastic: bool
    """Whether any cell draws at random."""
    recipe: str
    """Its `cast_key`."""


@functools.lru_cache(maxsize=256)
def table_of(recipe: str) -> Table:
    table = Recipe.from_cast_key(recipe)
    rows = (table.output, table.grad_input, table.grad_weight)
    output, grad_input, grad_weight = (_row(row, number) for number, row in enumerate(rows))
    first = grad_input.left
    once = _shared(table.grad_input.left, table.grad_weight.left) and first is not None and first.simple
    cast = (
        _shared(table.output.left, table.grad_weight.right) and output.left is not None and output.left.simple,
        _shared(table.output.right, table.grad_input.right) and output.right is not None and output.right.simple,
    )
    plain_sums = [row.accumulator is Accumulator.FLOAT32 and row.result is None for row in rows]
    fuses = (
        _fuses(output.left, output.right) and plain_sums[0],
        _fuses(grad_input.left) and once and all(cast) and plain_sums[1] and plain_sums[2],
    )
    return Table(output, grad_input, grad_weight, once, cast, fuses, table.stochastic, recipe)


_UPRIGHT = (False, False), (False, True), (True, True)
"""Of each GEMM, whether it contracts the rows of its left and its right tensor as they lie in memory."""


def _row(row: Gemm, number: int) -> Row:
    specs, upright = (row.left, row.right, row.result), (*_UPRIGHT[number], False)
    left, right, result = (
        None if spec is None else Cast(spec, upright=stands, number=3 * number + place)
        for place, (spec, stands) in enumerate(zip(specs, upright, strict=True))
    )
    return Row(left, right, result, row.accumulator)


def _shared(one: TensorSpec | None, other: TensorSpec | None) -> bool:
    """Whether two cells of a tensor ask for the same codes."""
    return one == other and one is not None and one.cast_once


def _fuses(*casts: Cast | None) -> bool:
    """Whether casts can be links of a chain: those to nearest with one scale can."""
    return all(cast is not None and cast.whole and not cast.stochastic and cast.caster is not None for cast in casts)


def _link(cast: Cast | None, dtype: torch.dtype, size: int) -> fused.Operand:
    """A cast of a chain."""
    assert cast is not None
    assert cast.caster is not None
    return fused.Operand(cast.caster, cast.current, KINDS[dtype], size)


@functools.lru_cache(maxsize=1024)
def output_pass(recipe: str, t: int, i: int, o: int, x: torch.dtype, w: torch.dtype, many: int) -> fused.Pass:
    """The GEMM `output` and its casts in one call."""
    left, right = table_of(recipe).output[:2]
    operands = _link(left, x, t * i), _link(right, w, o * i)
    return fused.Pass(operands, (fused.Shape(t, o, i, False, True, (0, 1)),), many)


@functools.lru_cache(maxsize=1024)
def backward_pass(
    recipe: str, t: int, i: int, o: int, g: torch.dtype, needs: tuple[bool, bool], many: int
) -> fused.Pass:
    """The GEMMs `grad_input` and `grad_weight`, those needed, and the cast of grad_output in one call."""
    left = table_of(recipe).grad_input.left
    products = fused.Shape(t, i, o, False, False, (0,)), fused.Shape(o, i, t, True, False, (0,))
    needed = tuple(product for product, need in zip(products, needs, strict=True) if need)
    return fused.Pass((_link(left, g, t * o),), needed, many)


def seed_of(draws: Tensor, table: Table | Recipe) -> int:
    """The seed of this pass, from a layer's seed and step; 0 where the recipe draws nothing."""
    if not table.stochastic:
        return 0
    seed, step = draws.tolist()
    return int((seed & 0xFFFFFFFF) << 32 | (step & 0xFFFFFFFF))


PACK = 1 << 20
"""From so many elements on, an activation is held in codes: for fewer, turning them back costs more time than it saves memory."""


def held_input(table: Table, input: Tensor, operand: Operand, seed: int) -> tuple[Tensor, Operand | Packed | None]:
    """What is held of the input for grad_weight: a tensor, and what makes an operand of it again (None: the cast, or nothing)."""
    cast = table.grad_weight.right
    if cast is None or cast.caster is None:
        return input, None
    if not table.cast[0]:
        packed = cast.pack(input, 1.0, seed)
        return packed.codes, packed._replace(codes=_NOTHING)
    if input.numel() < PACK:
        return operand.values, Operand(_NOTHING, False, operand.factor)
    codes = cast.codes_of(operand.values)
    return codes, cast.packed(_NOTHING, Operand(_NOTHING, False, operand.factor), codes.shape)


def input_of(table: Table, held: Tensor, how: Operand | Packed | None) -> Tensor | Operand:
    """The operand of grad_weight again, or the input itself where it is not cast."""
    if how is None:
        return held
    if isinstance(how, Operand):
        return Operand(held, False, how.factor)
    cast = table.grad_weight.right
    assert cast is not None
    return cast.unpack(how._replace(codes=held))


def bytes_of(held: Tensor, how: Operand | Packed | None) -> int:
    """Bytes that `held_input` holds."""
    return held.numel() * held.element_size() + (how.nbytes if isinstance(how, Packed) else 0)


_NOTHING = torch.empty(0)
