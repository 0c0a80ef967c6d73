"""`octavo::linear` and `octavo::linear_backward` on a CUDA device.

The casts are those of `octavo.kernels.cuda`, bit for bit the CPU's.  Two operands in E4M3FN and E5M2 with one scale a tensor go to FP8
tensor cores where the device has them, whose sums are then the processor's own; every other product is emulated, in float32, as
`octavo.torch.products` defines it.  Nothing waits for the device but stochastic recipes, whose seed the kernels take as a number, and
the formats without NaN.  Under `TRITON_INTERPRET=1` `forward` and `backward` take CPU tensors.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.formats import E4M3FN, E5M2, Format
from octavo.table import Accumulator
from octavo.torch import context
from octavo.torch.device_operands import Matrix, cast_both, cast_one, held_again
from octavo.torch.operands import Cast
from octavo.torch.table import Table, seed_of, table_of

__all__ = ["Cores", "backward", "forward", "linear_backward_cuda", "linear_cuda", "tensor_cores"]

_FP8 = {E4M3FN: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
"""The formats that tensor cores multiply."""
_ALIGNED = 16
"""The contracted axis and the columns of such a product are multiples of it."""
_HOPPER = (Accumulator.HOPPER_FAST, Accumulator.HOPPER_SPLIT)


class Cores(enum.Enum):
    """Which FP8 tensor cores a device has."""

    NONE = enum.auto()
    FP8 = enum.auto()
    HOPPER = enum.auto()
    """Those that add up as `Accumulator.HOPPER_FAST` and `HOPPER_SPLIT` have it."""


@functools.cache
def tensor_cores(device: torch.device) -> Cores:
    """Those of `device`; NONE of one that is not NVIDIA's."""
    if device.type != "cuda" or torch.version.cuda is None:
        return Cores.NONE
    capability = torch.cuda.get_device_capability(device)
    return Cores.NONE if capability < (8, 9) else Cores.HOPPER if capability[0] == 9 else Cores.FP8


@contextlib.contextmanager
def _in_float32(device: torch.device) -> Iterator[None]:
    """Within it, products of float32 are float32's: neither TF32's nor of torch.autocast's dtype."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision if device.type == "cuda" else "ieee"
    if before != "ieee":
        matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "ieee":
            matmul.fp32_precision = before


def _for_cores(left: Matrix, right: Matrix) -> bool:
    """Whether FP8 tensor cores multiply these two: one scale each, not E5M2 both, and something to multiply."""
    formats = left.format, right.format
    return (
        all(format in _FP8 for format in formats)
        and formats != (E5M2, E5M2)
        and all(one.factor is not None and one.rows is None and one.blocks is None for one in (left, right))
        and 0 not in (*left.held.shape, *right.held.shape)
    )


def _filled(codes: Tensor, format: Format | None, rows: int) -> Tensor:
    """Codes in row-major memory, filled up with zeros: rows to a multiple of `rows`, columns to one of 16."""
    assert format is not None
    down, along = -codes.shape[0] % rows, -codes.shape[1] % _ALIGNED
    return (F.pad(codes, (0, along, 0, down)) if down or along else codes).contiguous().view(_FP8[format])


def _on_cores(left: Matrix, right: Matrix, accumulator: Accumulator, dtype: torch.dtype) -> Tensor:
    """`left @ right.T` by FP8 tensor cores, scales undone, in float32 or bfloat16."""
    assert left.factor is not None
    assert right.factor is not None
    y = torch._scaled_mm(
        _filled(left.held, left.format, 1),
        _filled(right.held, right.format, _ALIGNED).t(),
        scale_a=left.factor,
        scale_b=right.factor,
        out_dtype=dtype,
        use_fast_accum=accumulator is Accumulator.HOPPER_FAST,
    )
    return y[:, : right.held.shape[0]].contiguous()


def _emulated(left: Matrix, right: Matrix) -> Tensor:
    """`left @ right.T` in float32 sums, float64 where an operand is; scales undone in the order of `octavo.torch.products`."""
    a, b = left.values, right.values
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    with _in_float32(a.device):
        bare = left.blocks is None and right.blocks is None
        y = a.to(wide) @ b.to(wide).t() if bare else _by_blocks(left, right, a.float(), b.float())
    factors = [one.factor for one in (left, right) if one.factor is not None]
    if factors:
        y.mul_(math.prod(factors))
    if left.rows is not None:
        y.mul_(left.rows[:, None])
    if right.rows is not None:
        y.mul_(right.rows)
    return y


def _by_blocks(left: Matrix, right: Matrix, a: Tensor, b: Tensor) -> Tensor:
    """The sum over the contracted axis with the float32 scales of blocks in it: float32 [M, N]."""
    steps = {one.block[1] for one in (left, right) if one.blocks is not None}
    if len(steps) > 1:
        raise ValueError(
            f"blocks along the contracted axis are {sorted(steps)} long in the two operands of a GEMM; give both the same length"
        )
    step = steps.pop()
    y = torch.zeros(a.shape[0], b.shape[0], device=a.device)
    for number, first in enumerate(range(0, a.shape[1], step)):
        part = a[:, first : first + step] @ b[:, first : first + step].t()
        if left.blocks is not None:
            part.mul_(left.blocks[:, number].repeat_interleave(left.block[0])[: a.shape[0], None])
        if right.blocks is None:
            y.add_(part)
        else:
            y.addcmul_(part, right.blocks[:, number].repeat_interleave(right.block[0])[: b.shape[0]])
    return y


def _product(
    left: Matrix,
    right: Matrix,
    accumulator: Accumulator,
    cores: Cores,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """`left @ right.T + bias` of two operand matrices [M, K] and [N, K], scales undone: [M, N], of dtype."""
    native = cores is not Cores.NONE and _for_cores(left, right)
    if accumulator in _HOPPER and not (native and cores is Cores.HOPPER):
        raise ValueError(
            f"{accumulator.value} sums of these operands are emulated on the CPU only; on other devices give the GEMM Accumulator.FLOAT32"
        )
    short = accumulator is Accumulator.BFLOAT16_OUT
    if native:
        narrow = short or (bias is None and dtype is torch.bfloat16)
        y = _on_cores(left, right, accumulator, torch.bfloat16 if narrow else torch.float32)
    else:
        y = _emulated(left, right)
    if short:
        y = y.bfloat16()
    if bias is not None:
        y = (y.float() if y.dtype is torch.bfloat16 else y).add_(bias)
    return y.to(dtype)


def _result(
    y: Tensor, cast: Cast | None, delayed: Tensor | None, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """A GEMM result, cast and decoded where the recipe says so, and its amax."""
    if cast is None:
        return y, None
    found = cast_one(y, cast, delayed, seed)
    values = found.values.float()
    if found.factor is not None:
        values = values * found.factor
    if found.rows is not None:
        values = values * found.rows[:, None]
    if found.blocks is not None:
        (across, along), (rows, columns) = found.block, y.shape
        values = values * found.blocks.repeat_interleave(across, 0)[:rows].repeat_interleave(along, 1)[:, :columns]
    return values.to(dtype), found.amax


def _packed(*numbers: tuple[Tensor | None, float], like: Tensor) -> Tensor:
    """A tensor of these, each with what stands for it where it is None."""
    return torch.cat([like.new_full((1,), other) if x is None else x.reshape(1) for x, other in numbers])


def forward(
    table: Table,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept_weight: Tensor | None,
    kept_factor: Tensor | None,
    scales: Tensor,
    dtype: torch.dtype,
    seed: int,
    cores: Cores,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `octavo::linear` returns, by these tensor cores."""
    row = table.output
    left = cast_one(input, row.left, scales[0:1], seed)
    if kept_weight is None or kept_factor is None or row.right is None or not row.right.simple:
        right = cast_one(weight, row.right, scales[1:2], seed)
    else:
        right = held_again(
            kept_weight.clone(), row.right, kept_factor.clone()
        )  # an operator returns none of its arguments
    wide = dtype if row.result is None else torch.float32
    y = _product(left, right, row.accumulator, cores, bias=bias, dtype=wide)
    y, y_amax = _result(y, row.result, scales[2:3], seed, dtype)
    facts = (left.factor, 1.0), (right.factor, 1.0), (left.amax, 0.0), (right.amax, 0.0), (y_amax, 0.0)
    return (
        y,
        left.held if row.left is not None and row.left.simple else input.new_empty(0),
        right.held if row.right is not None and row.right.simple else input.new_empty(0),
        _packed(*facts, like=scales),
    )


def backward(
    table: Table,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    facts: Tensor,
    scales: Tensor,
    needs: Sequence[bool],
    seed: int,
    cores: Cores,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `octavo::linear_backward` returns, by these tensor cores."""
    dtype, scale = grad_output.dtype, scales[0:1]
    grad_input = grad_weight = grad_output.new_empty(0)
    g = turned = i_amax = None
    if needs[0] and needs[1] and table.grad_output_once:
        left = table.grad_input.left
        assert left is not None
        if left.whole:
            g, turned = cast_both(grad_output, left, scale, seed)
        else:
            g = cast_one(grad_output, left, scale, seed)
            turned = g.turned()
    if needs[0]:
        row = table.grad_input
        g = cast_one(grad_output, row.left, scale, seed) if g is None else g
        if table.cast[1]:
            w = held_again(weight, table.output.right, facts[1:2]).turned()
        else:
            w = cast_one(weight, row.right, None, seed, turned=True)
        grad_input = _product(g, w, row.accumulator, cores, dtype=dtype if row.result is None else torch.float32)
        grad_input, i_amax = _result(grad_input, row.result, scales[1:2], seed, dtype)
    if needs[1]:
        row = table.grad_weight
        turned = cast_one(grad_output, row.left, scale, seed, turned=True) if turned is None else turned
        g = turned if g is None else g
        if table.cast[0]:
            x = held_again(input, table.output.left, facts[0:1]).turned()
        else:
            x = cast_one(input, row.right, None, seed, turned=True)
        grad_weight = _product(turned, x, row.accumulator, cores, dtype=dtype if row.result is None else torch.float32)
        grad_weight, _ = _result(grad_weight, row.result, None, seed, dtype)
    grad_bias = grad_output.sum(0) if needs[2] else grad_output.new_empty(0)
    g_amax = None if g is None else g.amax
    return grad_input, grad_weight, grad_bias, _packed((g_amax, 0.0), (i_amax, 0.0), like=scales)


def linear_cuda(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept_weight: Tensor | None,
    kept_factor: Tensor | None,
    scales: Tensor,
    grad_scales: Tensor,
    grad_history: Tensor,
    draws: Tensor,
    recipe: str,
    dtype: torch.dtype,
    record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`octavo::linear` on a CUDA device: arguments and results as of `octavo.torch.ops.linear`, operands as `held_dtype` has them."""
    table = table_of(recipe)
    cores, seed = tensor_cores(input.device), seed_of(draws, table)
    return forward(table, input, weight, bias, kept_weight, kept_factor, scales, dtype, seed, cores)


def linear_backward_cuda(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    facts: Tensor,
    scales: Tensor,
    draws: Tensor,
    recipe: str,
    needs: list[bool],
    record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`octavo::linear_backward` on a CUDA device, whose arguments and results are the CPU's."""
    table = table_of(recipe)
    cores, seed = tensor_cores(grad_output.device), seed_of(draws, table)
    found = backward(table, grad_output, input, weight, facts, scales, needs, seed, cores)
    if record:
        context.update_after_backward(None)
    return found
