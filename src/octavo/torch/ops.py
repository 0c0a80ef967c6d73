"""The torch operators: a linear layer's three GEMMs as a recipe has them, with fake and autograd beside each.

`octavo::linear` runs the GEMM `output`, `octavo::linear_backward` runs `grad_input` and `grad_weight`.  Both are functions: amaxes come
out, and their callers write state.  A recipe travels as text (`Recipe.cast_key`), so that an exported program needs nothing else.
Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.kernels import cpu
from octavo.recipes import Recipe, TensorSpec
from octavo.scaling import Current, Delayed, Unscaled, amax_scale
from octavo.torch import context
from octavo.torch.gemm import matmul, operand_dtype
from octavo.torch.state import gather

__all__ = ["linear"]

INPUT, WEIGHT, OUTPUT = range(3)
"""Columns of the forward scales and histories."""
GRAD_OUTPUT, GRAD_INPUT = range(2)
"""Columns of the backward scales and histories."""


_KINDS = {
    torch.float32: cpu.Kind.FLOAT32,
    torch.bfloat16: cpu.Kind.BFLOAT16,
    torch.float16: cpu.Kind.FLOAT16,
    torch.float64: cpu.Kind.FLOAT64,
}


def _buffer(x: Tensor) -> cpu.Buffer:
    return cpu.Buffer(x.data_ptr(), _KINDS[x.dtype], x.numel())


def _scale(x: Tensor, spec: TensorSpec, delayed: float) -> float:
    """The scale to cast `x` by; `delayed` is the one that its history gives."""
    match spec.scaling:
        case Delayed():
            return delayed
        case Current():
            amax = np.array([cpu.amax(_buffer(x))], np.float32)
            return float(amax_scale(amax, spec.format.max, spec.scaling)[0])
        case Unscaled():
            return 1.0


def _operand(x: Tensor, spec: TensorSpec | None, delayed: float) -> tuple[Tensor, float, float]:
    """A GEMM operand: the values of x's codes, the factor that undoes its scale, and its amax (0 where none was taken)."""
    x = x if x.is_contiguous() else x.contiguous()
    if spec is None:
        return x, 1.0, 0.0
    scale = _scale(x, spec, delayed)
    values = torch.empty(x.shape, dtype=operand_dtype())
    amax = cpu.cast(
        _buffer(x), _buffer(values), spec.format, scale=scale, rounding=spec.rounding, overflow=spec.overflow
    )
    return values, 1.0 / scale, amax


def _result(y: Tensor, spec: TensorSpec | None, delayed: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """A GEMM result, cast and decoded where the recipe says so, and its amax."""
    if spec is None:
        return y, 0.0
    values, factor, amax = _operand(y, spec, delayed)
    return values.float().mul_(factor).to(dtype), amax


_library = torch.library.Library("octavo", "DEF")
_library.define(
    "linear(Tensor input, Tensor weight, Tensor? bias, Tensor? kept_weight, Tensor scales, Tensor grad_scales, Tensor grad_history, "
    "str recipe, ScalarType dtype, bool record) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "linear_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor facts, Tensor scales, str recipe, bool[] cast, "
    "bool[] needs, bool record) -> (Tensor, Tensor, Tensor, Tensor)"
)


def linear(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """output = input @ weight.T + bias, cast as `recipe` says: `linear(input, weight, bias, kept_weight, scales, grad_scales,
    grad_history, recipe, dtype, record)`.

    input: [T, I]; weight: [O, I]; bias: [O] or None; kept_weight: a weight operand of an earlier call to use again, or None; scales:
    float32 [3] (input, weight, output); grad_scales, grad_history: float32 [2] and [steps, 2] (grad_output, grad_input), for the
    backward pass; recipe: a `Recipe.cast_key`; dtype: of the output; record: whether the backward pass takes its amaxes into row 0 of
    grad_history.  Returns output [T, O]; the operands of input and weight as multiplied, empty where the recipe leaves them in high
    precision; and facts, float32 [5]: the factors that undo the scales of input and weight, the amaxes of input, weight and output.
    """
    if torch.compiler.is_compiling():
        return torch.ops.octavo.linear.default(*arguments)  # type: ignore[no-any-return]
    return _Linear.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


def _linear_cpu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept_weight: Tensor | None,
    scales: Tensor,
    grad_scales: Tensor,
    grad_history: Tensor,
    recipe: str,
    dtype: torch.dtype,
    record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = Recipe.from_cast_key(recipe).output
    s_input, s_weight, s_output = scales.tolist()
    x, x_factor, x_amax = _operand(input, row.left, s_input)
    if kept_weight is None:
        w, w_factor, w_amax = _operand(weight, row.right, s_weight)
    else:
        w, w_factor, w_amax = kept_weight.clone(), 1.0 / s_weight, 0.0
    wide = dtype if row.result is None else torch.float32
    y = matmul(x, w, b_transposed=True, factor=x_factor * w_factor, bias=bias, dtype=wide)
    y, y_amax = _result(y, row.result, s_output, dtype)
    facts = torch.tensor((x_factor, w_factor, x_amax, w_amax, y_amax))
    return y, torch.empty(0) if row.left is None else x, torch.empty(0) if row.right is None else w, facts


def _linear_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept_weight: Tensor | None,
    scales: Tensor,
    grad_scales: Tensor,
    grad_history: Tensor,
    recipe: str,
    dtype: torch.dtype,
    record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row, held = Recipe.from_cast_key(recipe).output, operand_dtype()
    return (
        input.new_empty((input.shape[0], weight.shape[0]), dtype=dtype),
        input.new_empty(0) if row.left is None else input.new_empty(input.shape, dtype=held),
        input.new_empty(0) if row.right is None else weight.new_empty(weight.shape, dtype=held),
        scales.new_empty(5),
    )


def _linear_backward_cpu(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    facts: Tensor,
    scales: Tensor,
    recipe: str,
    cast: list[bool],
    needs: list[bool],
    record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_input = grad_output @ weight and grad_weight = grad_output.T @ input, cast as `recipe` says.

    grad_output: [T, O]; input: [T, I]; weight: [O, I]; facts: of the forward pass; scales: float32 [2] (grad_output, grad_input); cast:
    whether input and weight are operands already; needs: which of grad_input, grad_weight, grad_bias are wanted; record: whether the scales
    are to be updated when this backward pass ends.  Returns grad_input [T, I], grad_weight [O, I] and grad_bias [O], the sum of the uncast
    grad_output, in grad_output's dtype, empty where not wanted, and amaxes, float32 [2].
    """
    table = Recipe.from_cast_key(recipe)
    s_grad_output, s_grad_input = scales.tolist()
    x_factor, w_factor, *_ = facts.tolist()
    dtype = grad_output.dtype
    grad_input = grad_weight = None
    g_spec, g, g_factor, g_amax, i_amax = None, grad_output, 1.0, 0.0, 0.0
    if needs[0]:
        row = table.grad_input
        g_spec = row.left
        g, g_factor, g_amax = _operand(grad_output, g_spec, s_grad_output)
        w, w_factor, _ = (weight, w_factor, 0.0) if cast[1] else _operand(weight, row.right, 1.0)
        grad_input = matmul(g, w, factor=g_factor * w_factor, dtype=dtype if row.result is None else torch.float32)
        grad_input, i_amax = _result(grad_input, row.result, s_grad_input, dtype)
    if needs[1]:
        row = table.grad_weight
        if not needs[0] or row.left != g_spec:
            g, g_factor, g_amax = _operand(grad_output, row.left, s_grad_output)
        x, x_factor, _ = (input, x_factor, 0.0) if cast[0] else _operand(input, row.right, 1.0)
        wide = dtype if row.result is None else torch.float32
        grad_weight = matmul(g, x, a_transposed=True, factor=g_factor * x_factor, dtype=wide)
        grad_weight, _ = _result(grad_weight, row.result, 1.0, dtype)
    if record:
        context.update_after_backward()
    amaxes = torch.tensor((g_amax, i_amax))
    return (
        grad_output.new_empty(0) if grad_input is None else grad_input,
        grad_output.new_empty(0) if grad_weight is None else grad_weight,
        grad_output.sum(0) if needs[2] else grad_output.new_empty(0),
        amaxes,
    )


def _linear_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    facts: Tensor,
    scales: Tensor,
    recipe: str,
    cast: list[bool],
    needs: list[bool],
    record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        grad_output.new_empty((grad_output.shape[0], weight.shape[1]) if needs[0] else 0),
        grad_output.new_empty((grad_output.shape[1], input.shape[1]) if needs[1] else 0),
        grad_output.new_empty(grad_output.shape[1] if needs[2] else 0),
        scales.new_empty(2),
    )


def _plain(x: Tensor) -> bool:
    """Whether the dispatcher would only hand `x` to the CPU kernel: then it is called directly, at half the cost of a small layer."""
    return type(x) is Tensor and x.device.type == "cpu" and torch._C._len_torch_dispatch_stack() == 0


class _Linear(torch.autograd.Function):
    """The gradients of `octavo::linear` by `octavo::linear_backward`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        input, weight, _, _, _, ctx.grad_scales, ctx.grad_history, ctx.recipe, _, ctx.record = arguments
        if _plain(input):
            output, x, w, facts = _linear_cpu(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                output, x, w, facts = torch.ops.octavo.linear.default(*arguments)
        ctx.cast = _cast_once(ctx.recipe)
        ctx.save_for_backward(x if ctx.cast[0] else input, w if ctx.cast[1] else weight, facts)
        ctx.mark_non_differentiable(x, w, facts)
        ctx.set_materialize_grads(False)
        return output, x, w, facts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad_output is None:
            return (None,) * 10
        needs = ctx.needs_input_grad[:3]
        run: Any = _linear_backward_cpu if _plain(grad_output) else torch.ops.octavo.linear_backward.default
        *gradients, amaxes = run(
            grad_output, *ctx.saved_tensors, ctx.grad_scales, ctx.recipe, ctx.cast, needs, ctx.record
        )
        if ctx.record:
            gather(ctx.grad_history, amaxes)
        wanted = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return (*wanted, *(None,) * 7)


@functools.lru_cache(maxsize=256)
def _cast_once(recipe: str) -> tuple[bool, bool]:
    """Whether input and weight are cast alike in both of their GEMMs, so that the operands of the first serve the second."""
    table = Recipe.from_cast_key(recipe)
    return (
        table.output.left is not None and table.output.left == table.grad_weight.right,
        table.output.right is not None and table.output.right == table.grad_input.right,
    )


_library.impl("linear", _linear_cpu, "CPU")
_library.impl("linear", _Linear.apply, "Autograd")
_library.impl("linear_backward", _linear_backward_cpu, "CPU")
torch.library.register_fake("octavo::linear", _linear_fake, lib=_library)
torch.library.register_fake("octavo::linear_backward", _linear_backward_fake, lib=_library)
