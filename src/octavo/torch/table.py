"""A recipe's table, ready to cast: each cell a cast, each row three, and the passes that run as one chain of kernels."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.kernels import cpu
from octavo.kernels.scales import current_scale
from octavo.recipes import Recipe, TensorSpec
from octavo.rounding import Rounding
from octavo.scaling import Current, Delayed
from octavo.torch import fused
from octavo.torch.gemm import inverse, operand_dtype

__all__ = ["KINDS", "Cast", "Row", "Table", "backward_pass", "operand", "output_pass", "result", "table_of"]

KINDS = {
    torch.float32: cpu.Kind.FLOAT32,
    torch.bfloat16: cpu.Kind.BFLOAT16,
    torch.float16: cpu.Kind.FLOAT16,
    torch.float64: cpu.Kind.FLOAT64,
}
"""The dtypes that a layer takes, as the kernels know them."""


def _buffer(x: Tensor) -> cpu.Buffer:
    return cpu.Buffer(x.data_ptr(), KINDS[x.dtype], x.numel())


class Cast:
    """A cell of the recipe's table, ready to cast tensors."""

    __slots__ = ("_maximum", "caster", "current", "delayed")

    def __init__(self, spec: TensorSpec) -> None:
        if spec.rounding is Rounding.STOCHASTIC:
            raise ValueError(
                f"a layer has no random draws to round {spec} stochastically; use another rounding in its recipe"
            )
        self.caster = cpu.caster(spec.format, spec.rounding, spec.overflow)
        self.current = spec.scaling if isinstance(spec.scaling, Current) else None
        self.delayed = isinstance(spec.scaling, Delayed)
        self._maximum = spec.format.max

    def __call__(self, x: Tensor, delayed: float) -> tuple[Tensor, float, float]:
        """A GEMM operand: the values of x's codes, the factor that undoes its scale, and x's amax.

        delayed: the scale that the tensor's history gives, where the recipe goes by it.
        """
        x = fused.dense(x)
        values = torch.empty(x.shape, dtype=operand_dtype())
        source, scale = _buffer(x), delayed if self.delayed else 1.0
        if self.current is not None:
            current = self.current
            scale = current_scale(cpu.amax(source), self._maximum, current.epsilon, current.power_of_two)
        return values, inverse(scale), self.caster(source, _buffer(values), scale)


def operand(x: Tensor, cast: Cast | None, delayed: float) -> tuple[Tensor, float, float]:
    """As `Cast`; where there is none, x itself, the factor 1 and no amax."""
    return (x.contiguous(), 1.0, 0.0) if cast is None else cast(x, delayed)


def result(y: Tensor, cast: Cast | None, delayed: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """A GEMM result, cast and decoded where the recipe says so, and its amax."""
    if cast is None:
        return y, 0.0
    values, factor, amax = cast(y, delayed)
    return values.float().mul_(factor).to(dtype), amax


class Row(NamedTuple):
    """A row of the recipe's table, ready to cast."""

    left: Cast | None
    right: Cast | None
    result: Cast | None


class Table(NamedTuple):
    """A recipe's table, ready to cast."""

    output: Row
    grad_input: Row
    grad_weight: Row
    grad_output_once: bool
    """Whether grad_output is cast alike in both of its GEMMs."""
    cast: tuple[bool, bool]
    """Whether input and weight are, so that the operands of `output` serve the backward pass."""
    fuses: tuple[bool, bool]
    """Whether the forward pass and the backward pass are one chain of kernels, where the machine and the tensors allow it."""
    recipe: str
    """Its `cast_key`."""


@functools.lru_cache(maxsize=256)
def table_of(recipe: str) -> Table:
    table = Recipe.from_cast_key(recipe)
    rows = (table.output, table.grad_input, table.grad_weight)
    output, grad_input, grad_weight = (
        Row(*(None if spec is None else Cast(spec) for spec in (row.left, row.right, row.result))) for row in rows
    )
    once = table.grad_input.left == table.grad_weight.left
    cast = (
        table.output.left is not None and table.output.left == table.grad_weight.right,
        table.output.right is not None and table.output.right == table.grad_input.right,
    )
    fuses = (
        _fuses(output.left, output.right) and output.result is None,
        _fuses(grad_input.left) and once and all(cast) and grad_input.result is None and grad_weight.result is None,
    )
    return Table(output, grad_input, grad_weight, once, cast, fuses, recipe)


def _fuses(*casts: Cast | None) -> bool:
    """Whether casts can be links of a chain: those that round in float32 can."""
    return all(cast is not None and cast.caster.format.signed for cast in casts)


@functools.lru_cache(maxsize=1024)
def output_pass(recipe: str, t: int, i: int, o: int, x: torch.dtype, w: torch.dtype, many: int) -> fused.Pass:
    """The GEMM `output` and its casts in one call."""
    left, right, _ = table_of(recipe).output
    assert left is not None
    assert right is not None
    operands = (
        fused.Operand(left.caster, left.current, KINDS[x], t * i),
        fused.Operand(right.caster, right.current, KINDS[w], o * i),
    )
    return fused.Pass(operands, (fused.Shape(t, o, i, False, True, (0, 1)),), many)


@functools.lru_cache(maxsize=1024)
def backward_pass(
    recipe: str, t: int, i: int, o: int, g: torch.dtype, needs: tuple[bool, bool], many: int
) -> fused.Pass:
    """The GEMMs `grad_input` and `grad_weight`, those needed, and the cast of grad_output in one call."""
    left = table_of(recipe).grad_input.left
    assert left is not None
    products = fused.Shape(t, i, o, False, False, (0,)), fused.Shape(o, i, t, True, False, (0,))
    needed = tuple(product for product, need in zip(products, needs, strict=True) if need)
    return fused.Pass((fused.Operand(left.caster, left.current, KINDS[g], t * o),), needed, many)
