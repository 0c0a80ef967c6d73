"""A recipe's three GEMMs by NumPy, for the tables that no compiled kernel of the engine takes: blocks, rows, transforms, random draws.

T tokens, I input features, O output features; an operand matrix is [rows, contracted].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import numpy.typing as npt

from octavo.engine.kernels import gemm
from octavo.engine.kernels.launch import refuse
from octavo.engine.tensor import Tensor, empty, from_numpy
from octavo.formats import BFLOAT16, FLOAT16, Format
from octavo.kernels import matrices, sums
from octavo.recipes import Recipe
from octavo.scaling import Block, BlockScale, Current, Delayed, Row, Unscaled
from octavo.table import Accumulator, Gemm, TensorSpec, Transform

if TYPE_CHECKING:
    from octavo.engine.scaled import Scales

__all__ = ["backward", "forward"]

Matrix = npt.NDArray[np.float32]
Operand = tuple[Matrix, float]
"""Values, and what their products are to be multiplied with."""
_ROWS = ("output", "grad_input", "grad_weight")


def _rounded(x: Matrix, format: Format) -> Matrix:
    """x to nearest even in a format of more than 8 bits, finite overflow to Inf."""
    if format is BFLOAT16:
        return x.astype(ml_dtypes.bfloat16).astype(np.float32)
    if format is FLOAT16:
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    drop = 23 - format.mantissa_bits
    bits = np.ascontiguousarray(x).view(np.int32)
    rounded = ((bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) & -(1 << drop)).view(np.float32)
    return np.where(np.isnan(x), x, rounded)


class _Pass:
    """One pass through a layer: its scales, and the seed of its draws."""

    def __init__(self, recipe: Recipe, scales: Scales, train: bool, step: int) -> None:
        refuse(f"the recipe {recipe.name} runs in NumPy")
        self.recipe, self.scales, self.train = recipe, scales, train
        self.seed = (scales.seed & 0xFFFFFFFF) << 32 | (step & 0xFFFFFFFF)

    def operand(self, x: Matrix, spec: TensorSpec | None, tensor: str, number: int) -> Operand:
        """x, [rows, contracted], as a GEMM takes it, and what is left to multiply its products with."""
        if spec is None:
            return x, 1.0
        direction, column = self.scales.place(tensor) if tensor != "grad_weight" else (0, 0)
        if spec.format.bits > 8:
            return _rounded(x, spec.format), 1.0
        scale = float(self.scales.scales[direction].array[column]) if isinstance(spec.scaling, Delayed) else 1.0
        seed = self.seed if self.recipe.stochastic else None
        found = matrices.encode_matrix(np.ascontiguousarray(x), spec, scale=scale, seed=seed, offset=number << 56)
        if self.train and isinstance(spec.scaling, Delayed):
            cell = self.scales.amaxes[direction].array
            cell[column] = max(cell[column], int(np.float32(found.amax).view(np.int32)))
        if isinstance(spec.scaling, (Unscaled, Current, Delayed)):
            factor = float(found.scales.reshape(-1)[0]) if found.scales.size else 1.0
            return spec.format.values[found.codes].astype(np.float32), factor
        decoded: Matrix = matrices.decode_matrix(found, spec)
        return decoded, 1.0

    def product(
        self, name: str, left: Operand, right: Operand, tensors: tuple[str, str, str], bias: Tensor | None = None
    ) -> Matrix:
        """left @ right.T by a row of the table, cast as its result cell has it; left, right: what they make of `operand`."""
        row: Gemm = getattr(self.recipe, name)
        y = _sums(left[0], right[0], row.accumulator, left[1] * right[1])
        if row.accumulator is Accumulator.BFLOAT16_OUT:
            y = _rounded(y, BFLOAT16)
        if bias is not None:
            y += bias.array
        if row.result is not None:
            values, factor = self.operand(y, row.result, tensors[2], 3 * _ROWS.index(name) + 2)
            y = values * np.float32(factor)
        return y

    def shared(
        self, x: Matrix, cells: tuple[TensorSpec | None, TensorSpec | None], tensor: str, numbers: tuple[int, int]
    ) -> Operand:
        """x for the second of its GEMMs, which contracts its rows: x.T, cast for the first where both ask for the same codes.

        x: as its first GEMM takes it, [rows, contracted].  It matters where codes are drawn at random.
        """
        one, other = cells
        if one is not None and one == other and one.cast_once and _simple(one):
            values, factor = self.operand(x, one, tensor, numbers[0])
            return values.T, factor
        return self.operand(x.T, other, tensor, numbers[1])


def _simple(spec: TensorSpec) -> bool:
    """Whether a cast comes to values with at most one factor, in a format of at most 8 bits, without a transform."""
    apart = isinstance(spec.scaling, Row) or (
        isinstance(spec.scaling, Block) and spec.scaling.scale is BlockScale.FLOAT32
    )
    return spec.format.bits <= 8 and not apart and spec.transform is Transform.NONE


def _sums(a: Matrix, b: Matrix, accumulator: Accumulator, factor: float) -> Matrix:
    """factor * a @ b.T, added up as the accumulator does."""
    if accumulator in (Accumulator.HOPPER_FAST, Accumulator.HOPPER_SPLIT):
        return sums.matmul(np.ascontiguousarray(a), np.ascontiguousarray(b), accumulator) * np.float32(factor)
    out = empty((a.shape[0], b.shape[0]))
    gemm.product(from_numpy(_writable(a)), from_numpy(_writable(b)).T, out, alpha=factor)
    return out.array


def _writable(x: Matrix) -> Matrix:
    return x if x.flags.writeable else x.copy()


def forward(
    recipe: Recipe, scales: Scales, input: Tensor, weight: Tensor, bias: Tensor | None, train: bool, step: int
) -> tuple[Tensor, ...]:
    """The GEMM `output`; nothing else is kept: the backward pass casts again."""
    run, row = _Pass(recipe, scales, train, step), recipe.output
    left = run.operand(input.array, row.left, "input", 0)
    right = run.operand(weight.array.T, row.right, "weight", 1)
    output = run.product("output", left, right, ("input", "weight", "output"), bias)
    return from_numpy(output), empty((0,)), empty((0,)), empty((0,))


def backward(
    recipe: Recipe,
    scales: Scales,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    train: bool,
    step: int,
    *,
    needs_input: bool,
) -> tuple[Tensor | None, Tensor]:
    """(grad_input or None, grad_weight)."""
    run, first, second = _Pass(recipe, scales, train, step), recipe.grad_input, recipe.grad_weight
    g = grad_output.array
    grad_input = None
    if needs_input:
        left = run.operand(g, first.left, "grad_output", 3)
        right = run.shared(weight.array.T, (recipe.output.right, first.right), "weight", (1, 4))
        grad_input = from_numpy(run.product("grad_input", left, right, ("grad_output", "weight", "grad_input")))
        turned = run.shared(g, (first.left, second.left), "grad_output", (3, 6))
    else:
        turned = run.operand(g.T, second.left, "grad_output", 6)
    across = run.shared(input.array, (recipe.output.left, second.right), "input", (0, 7))
    # [O, I] in the table's terms: the weight of a layer that lies outputs first.
    found = run.product("grad_weight", turned, across, ("grad_output", "input", "grad_weight"))
    return grad_input, from_numpy(np.ascontiguousarray(found.T))
