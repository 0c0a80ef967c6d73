"""The torch operators: a linear layer's three GEMMs as a recipe has them, with fake and autograd beside each.

`octavo::linear` runs the GEMM `output`, `octavo::linear_backward` runs `grad_input` and `grad_weight`.  Both are functions: amaxes come
out, and their callers write state.  A recipe travels as text (`Recipe.cast_key`), so that an exported program needs nothing else.
Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.kernels import cpu
from octavo.recipes import Recipe, TensorSpec
from octavo.rounding import Rounding
from octavo.scaling import Current, Delayed
from octavo.torch import context
from octavo.torch.gemm import matmul, operand_dtype
from octavo.torch.state import gather

__all__ = ["KINDS", "linear"]

KINDS = {
    torch.float32: cpu.Kind.FLOAT32,
    torch.bfloat16: cpu.Kind.BFLOAT16,
    torch.float16: cpu.Kind.FLOAT16,
    torch.float64: cpu.Kind.FLOAT64,
}
"""The dtypes that a layer takes, as the kernels know them."""


def _buffer(x: Tensor) -> cpu.Buffer:
    return cpu.Buffer(x.data_ptr(), KINDS[x.dtype], x.numel())


def _inverse(scale: float) -> float:
    """1 / scale, rounded to float32, as the hardware holds it."""
    return ctypes.c_float(1.0 / scale).value


class _Cast:
    """A cell of the recipe's table, ready to cast tensors."""

    __slots__ = ("_caster", "_current", "_delayed", "_maximum")

    def __init__(self, spec: TensorSpec) -> None:
        if spec.rounding is Rounding.STOCHASTIC:
            raise ValueError(
                f"a layer has no random draws to round {spec} stochastically; use another rounding in its recipe"
            )
        self._caster = cpu.caster(spec.format, spec.rounding, spec.overflow)
        self._current = spec.scaling if isinstance(spec.scaling, Current) else None
        self._delayed = isinstance(spec.scaling, Delayed)
        self._maximum = spec.format.max

    def __call__(self, x: Tensor, delayed: float) -> tuple[Tensor, float, float]:
        """A GEMM operand: the values of x's codes, the factor that undoes its scale, and x's amax.

        delayed: the scale that the tensor's history gives, where the recipe goes by it.
        """
        x = x.resolve_neg() if x.is_neg() else x if x.is_contiguous() else x.contiguous()
        values = torch.empty(x.shape, dtype=operand_dtype())
        source, scale = _buffer(x), delayed if self._delayed else 1.0
        if self._current is not None:
            current = self._current
            scale = cpu.current_scale(cpu.amax(source), self._maximum, current.epsilon, current.power_of_two)
        return values, _inverse(scale), self._caster(source, _buffer(values), scale)


def _operand(x: Tensor, cast: _Cast | None, delayed: float) -> tuple[Tensor, float, float]:
    """As `_Cast`; where there is none, x itself, the factor 1 and no amax."""
    return (x.contiguous(), 1.0, 0.0) if cast is None else cast(x, delayed)


def _result(y: Tensor, cast: _Cast | None, delayed: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """A GEMM result, cast and decoded where the recipe says so, and its amax."""
    if cast is None:
        return y, 0.0
    values, factor, amax = cast(y, delayed)
    return values.float().mul_(factor).to(dtype), amax


class _Row(NamedTuple):
    """A row of the recipe's table, ready to cast."""

    left: _Cast | None
    right: _Cast | None
    result: _Cast | None


class _Table(NamedTuple):
    """A recipe's table, ready to cast."""

    output: _Row
    grad_input: _Row
    grad_weight: _Row
    grad_output_once: bool
    """Whether grad_output is cast alike in both of its GEMMs."""
    cast: tuple[bool, bool]
    """Whether input and weight are, so that the operands of `output` serve the backward pass."""


@functools.lru_cache(maxsize=256)
def _table(recipe: str) -> _Table:
    table = Recipe.from_cast_key(recipe)
    rows = (table.output, table.grad_input, table.grad_weight)
    output, grad_input, grad_weight = (
        _Row(*(None if spec is None else _Cast(spec) for spec in (row.left, row.right, row.result))) for row in rows
    )
    return _Table(
        output,
        grad_input,
        grad_weight,
        grad_output_once=table.grad_input.left == table.grad_weight.left,
        cast=(
            table.output.left is not None and table.output.left == table.grad_weight.right,
            table.output.right is not None and table.output.right == table.grad_input.right,
        ),
    )


_library = torch.library.Library("octavo", "DEF")
_library.define(
    "linear(Tensor input, Tensor weight, Tensor? bias, Tensor? kept_weight, Tensor? kept_factor, Tensor scales, "
    "Tensor grad_scales, Tensor grad_history, str recipe, ScalarType dtype, bool record) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "linear_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor facts, Tensor scales, str recipe, "
    "bool[] needs, bool record) -> (Tensor, Tensor, Tensor, Tensor)"
)


def linear(layer: Any, *arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Any]:
    """output = input @ weight.T + bias, cast as `recipe` says, of `linear(layer, input, weight, bias, kept_weight, kept_factor, scales,
    grad_scales, grad_history, recipe, dtype, record)`.

    layer: whose scales these are; input: [T, I]; weight: [O, I]; bias: [O] or None; kept_weight, kept_factor: the weight operand of an
    earlier call and, float32 [1], what undoes its scale, to use again, or None; scales: float32 [3] (input, weight, output);
    grad_scales, grad_history: float32 [2] and [steps, 2] (grad_output, grad_input), for the backward pass; recipe: a `Recipe.cast_key`;
    dtype: of the output; record: whether the backward pass takes its amaxes into row 0 of grad_history.
    Returns output [T, O]; the operands of input and weight as multiplied, empty where the recipe leaves them in high precision; and
    facts, float32 [5]: the factors that undo the scales of input and weight, the amaxes of input, weight and output.
    Eager CPU tensors are not dispatched: facts are then Python floats, and None stands for the operands that are not needed.
    """
    if torch.compiler.is_compiling():
        return torch.ops.octavo.linear.default(*arguments)  # type: ignore[no-any-return]
    return _Linear.apply(layer if _plain(arguments[0]) else None, *arguments)  # type: ignore[no-any-return, no-untyped-call]


def _forward(
    table: _Table,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept_weight: Tensor | None,
    kept_factor: Tensor | None,
    scales: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, tuple[float, ...]]:
    """`octavo::linear` but for two things: facts are Python floats, and uncast operands are there."""
    row = table.output
    s_input, s_weight, s_output = scales.tolist()
    x, x_factor, x_amax = _operand(input, row.left, s_input)
    if kept_weight is None or kept_factor is None:
        w, w_factor, w_amax = _operand(weight, row.right, s_weight)
    else:
        w, w_factor, w_amax = kept_weight.clone(), kept_factor.item(), 0.0
    wide = dtype if row.result is None else torch.float32
    y = matmul(x, w, b_transposed=True, factor=x_factor * w_factor, bias=bias, dtype=wide)
    y, y_amax = _result(y, row.result, s_output, dtype)
    return y, x, w, (x_factor, w_factor, x_amax, w_amax, y_amax)


def _linear_cpu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept_weight: Tensor | None,
    kept_factor: Tensor | None,
    scales: Tensor,
    grad_scales: Tensor,
    grad_history: Tensor,
    recipe: str,
    dtype: torch.dtype,
    record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table = _table(recipe)
    y, x, w, facts = _forward(table, input, weight, bias, kept_weight, kept_factor, scales, dtype)
    left, right, _ = table.output
    return y, torch.empty(0) if left is None else x, torch.empty(0) if right is None else w, torch.tensor(facts)


def _linear_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept_weight: Tensor | None,
    kept_factor: Tensor | None,
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


def _backward(
    table: _Table,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    factors: Sequence[float],
    scales: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, tuple[float, float]]:
    """`octavo::linear_backward` but for two things: amaxes are Python floats, and what is not wanted is None."""
    s_grad_output, s_grad_input = scales.tolist()
    x_factor, w_factor = factors[:2]
    dtype = grad_output.dtype
    grad_input = grad_weight = None
    g, g_factor, g_amax, i_amax = grad_output, 1.0, 0.0, 0.0
    if needs[0]:
        row = table.grad_input
        g, g_factor, g_amax = _operand(grad_output, row.left, s_grad_output)
        w, w_factor, _ = (weight, w_factor, 0.0) if table.cast[1] else _operand(weight, row.right, 1.0)
        grad_input = matmul(g, w, factor=g_factor * w_factor, dtype=dtype if row.result is None else torch.float32)
        grad_input, i_amax = _result(grad_input, row.result, s_grad_input, dtype)
    if needs[1]:
        row = table.grad_weight
        if not (needs[0] and table.grad_output_once):
            g, g_factor, g_amax = _operand(grad_output, row.left, s_grad_output)
        x, x_factor, _ = (input, x_factor, 0.0) if table.cast[0] else _operand(input, row.right, 1.0)
        wide = dtype if row.result is None else torch.float32
        grad_weight = matmul(g, x, a_transposed=True, factor=g_factor * x_factor, dtype=wide)
        grad_weight, _ = _result(grad_weight, row.result, 1.0, dtype)
    return grad_input, grad_weight, grad_output.sum(0) if needs[2] else None, (g_amax, i_amax)


def _linear_backward_cpu(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    facts: Tensor,
    scales: Tensor,
    recipe: str,
    needs: list[bool],
    record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_input = grad_output @ weight and grad_weight = grad_output.T @ input, cast as `recipe` says.

    grad_output: [T, O]; input: [T, I] and weight: [O, I], or their operands where the recipe casts them alike in both of their GEMMs;
    facts: of the forward pass; scales: float32 [2] (grad_output, grad_input); needs: which of grad_input, grad_weight, grad_bias are
    wanted; record: whether scales are to be updated when this backward pass ends.  Returns grad_input [T, I], grad_weight [O, I] and
    grad_bias [O], the sum of the uncast grad_output, in grad_output's dtype, empty where not wanted, and amaxes, float32 [2].
    """
    *gradients, amaxes = _backward(_table(recipe), grad_output, input, weight, facts.tolist(), scales, needs)
    if record:
        context.update_after_backward(None)
    one, two, three = (grad_output.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return one, two, three, torch.tensor(amaxes)


def _linear_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    facts: Tensor,
    scales: Tensor,
    recipe: str,
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
    """The gradients of `octavo::linear` by `octavo::linear_backward`, or, where a layer is given, both without the dispatcher.

    Then facts and amaxes are Python floats, and an operand that was not cast is None.
    """

    @staticmethod
    def forward(ctx: Any, layer: Any, *arguments: Any) -> tuple[Any, ...]:
        input, weight, bias, kept, factor, scales, ctx.grad_scales, ctx.grad_history, ctx.recipe, dtype, ctx.record = (
            arguments
        )
        table = _table(ctx.recipe)
        ctx.layer = layer
        if layer is not None:
            output, x, w, ctx.facts = _forward(table, input, weight, bias, kept, factor, scales, dtype)
            ctx.save_for_backward(x if table.cast[0] else input, w if table.cast[1] else weight)
            operand = None if table.output.right is None else w
            ctx.mark_non_differentiable(*(() if operand is None else (operand,)))
            returned: tuple[Any, ...] = (output, None, operand, ctx.facts)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                returned = torch.ops.octavo.linear.default(*arguments)
            _, x, w, facts = returned
            ctx.facts = None
            ctx.save_for_backward(x if table.cast[0] else input, w if table.cast[1] else weight, facts)
            ctx.mark_non_differentiable(x, w, facts)
        ctx.set_materialize_grads(False)
        return returned

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad_output is None:
            return (None,) * 12
        needs = ctx.needs_input_grad[1:4]
        if ctx.facts is not None:
            table = _table(ctx.recipe)
            input, weight = ctx.saved_tensors
            *gradients, amaxes = _backward(table, grad_output, input, weight, ctx.facts, ctx.grad_scales, needs)
            if ctx.record:
                context.update_after_backward(ctx.layer)
        else:
            *found, amaxes = torch.ops.octavo.linear_backward.default(
                grad_output, *ctx.saved_tensors, ctx.grad_scales, ctx.recipe, needs, ctx.record
            )
            gradients = [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
        if ctx.record:
            gather(ctx.grad_history, amaxes)
        return (None, *gradients, *(None,) * 8)


def _linear_autograd(*arguments: Any) -> Any:
    return _Linear.apply(None, *arguments)  # type: ignore[no-untyped-call]


_library.impl("linear", _linear_cpu, "CPU")
_library.impl("linear", _linear_autograd, "Autograd")
_library.impl("linear_backward", _linear_backward_cpu, "CPU")
torch.library.register_fake("octavo::linear", _linear_fake, lib=_library)
torch.library.register_fake("octavo::linear_backward", _linear_backward_fake, lib=_library)
