"""The torch operators: a linear layer's three GEMMs as a recipe has them, with fake and autograd beside each.

`octavo::linear` runs the GEMM `output`, `octavo::linear_backward` runs `grad_input` and `grad_weight`.  Both are functions: amaxes come
out, and their callers write state.  A recipe travels as text (`Recipe.cast_key`), so that an exported program needs nothing else.
Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from octavo.kernels import threads
from octavo.torch import context, fused
from octavo.torch.device import linear_backward_cuda, linear_cuda
from octavo.torch.device_operands import held_dtype
from octavo.torch.gemm import dense
from octavo.torch.operands import Operand
from octavo.torch.products import product
from octavo.torch.state import gather
from octavo.torch.table import (
    Table,
    backward_pass,
    bytes_of,
    held_input,
    input_of,
    operand,
    output_pass,
    result,
    seed_of,
    table_of,
)
from octavo.torch.watching import looking, watch

__all__ = ["is_plain", "linear", "nan_gradients"]

_NOBODY = contextlib.nullcontext()
"""Nobody looks at what is cast."""
_library = torch.library.Library("octavo", "DEF")
_library.define(
    "linear(Tensor input, Tensor weight, Tensor? bias, Tensor? kept_weight, Tensor? kept_factor, Tensor scales, "
    "Tensor grad_scales, Tensor grad_history, Tensor draws, str recipe, ScalarType dtype, bool record) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "linear_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor facts, Tensor scales, Tensor draws, str recipe, "
    "bool[] needs, bool record) -> (Tensor, Tensor, Tensor, Tensor)"
)


def linear(layer: Any, keep: bool, *arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Any]:
    """output = input @ weight.T + bias, cast as `recipe` says, of `linear(layer, keep, input, weight, bias, kept_weight, kept_factor,
    scales, grad_scales, grad_history, draws, recipe, dtype, record)`.

    layer: whose scales these are; keep: whether the weight operand is wanted for later calls; input: [T, I]; weight: [O, I]; bias: [O]
    or None; kept_weight, kept_factor: the weight operand of an earlier call and, float32 [1], what undoes its scale, to use again, or
    None; scales: float32 [3] (input, weight, output); grad_scales, grad_history: float32 [2] and [steps, 2] (grad_output, grad_input),
    for the backward pass; draws: int64 [2], the layer's seed and step, for stochastic rounding; recipe: a `Recipe.cast_key`; dtype: of
    the output; record: whether the backward pass takes its amaxes into row 0 of grad_history.
    Returns output [T, O]; the operands of input and weight as multiplied, empty where the recipe leaves them in high precision; and
    facts, float32 [5]: the factors that undo the scales of input and weight, the amaxes of input, weight and output.
    Eager CPU tensors are not dispatched: facts are then Python floats, and None stands for the operands that are not needed.
    """
    if torch.compiler.is_compiling():
        return torch.ops.octavo.linear.default(*arguments)  # type: ignore[no-any-return]
    input, weight, bias, *rest = arguments
    return _Linear.apply(input, weight, bias, (layer if is_plain(input) else None, keep, *rest))  # type: ignore[no-any-return, no-untyped-call]


def _forward(
    table: Table,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept_weight: Tensor | None,
    kept_factor: Tensor | None,
    scales: Tensor,
    dtype: torch.dtype,
    seed: int,
) -> tuple[Tensor, Operand, Operand, tuple[float, ...]]:
    """`octavo::linear` but for two things: facts are Python floats, and uncast operands are there."""
    row = table.output
    s_input, s_weight, s_output = scales.tolist()
    (t, i), o = input.shape, weight.shape[0]
    if (
        table.fuses[0]
        and kept_weight is None
        and watch.look is None
        and fused.ready(t * i * o, input.dtype, weight.dtype)
    ):
        input, weight = dense(input), dense(weight)
        x, w = torch.empty(t, i, dtype=torch.bfloat16), torch.empty(o, i, dtype=torch.bfloat16)
        y = torch.empty(t, o)
        base = None if bias is None else bias.float().contiguous()
        (x_factor, x_amax), (w_factor, w_amax) = output_pass(
            table.recipe, t, i, o, input.dtype, weight.dtype, threads.count()
        )(
            ((input.data_ptr(), x.data_ptr(), s_input), (weight.data_ptr(), w.data_ptr(), s_weight)),
            ((x.data_ptr(), w.data_ptr(), y.data_ptr(), 0 if base is None else base.data_ptr(), 1.0),),
        )
        facts = (x_factor, w_factor, x_amax, w_amax, 0.0)
        return (
            y if dtype is torch.float32 else y.to(dtype),
            Operand(x, True, x_factor),
            Operand(w, True, w_factor),
            facts,
        )
    left = operand(input, row.left, s_input, seed, last=True)
    if kept_weight is None or kept_factor is None:
        right = operand(weight, row.right, s_weight, seed, last=True)
    else:
        right = Operand(kept_weight.clone(), True, kept_factor.item())
    wide = dtype if row.result is None else torch.float32
    y = product(left, right, row.accumulator, bias=bias, dtype=wide)
    y, y_amax = result(y, row.result, s_output, seed, dtype)
    return y, left, right, (left.factor, right.factor, left.amax, right.amax, y_amax)


def _linear_cpu(
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
    table = table_of(recipe)
    y, x, w, facts = _forward(
        table, input, weight, bias, kept_weight, kept_factor, scales, dtype, seed_of(draws, table)
    )
    left, right = table.output[:2]
    return (
        y,
        x.values if left is not None and left.simple else torch.empty(0),
        w.values if right is not None and right.simple else torch.empty(0),
        torch.tensor(facts),
    )


def _linear_fake(
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
    held = [
        x.new_empty(x.shape, dtype=held_dtype(cast, x.device.type))
        if cast is not None and cast.simple
        else input.new_empty(0)
        for x, cast in zip((input, weight), table_of(recipe).output[:2], strict=True)
    ]
    output = input.new_empty((input.shape[0], weight.shape[0]), dtype=dtype)
    return output, held[0], held[1], scales.new_empty(5)


def _backward(
    table: Table,
    grad_output: Tensor,
    input: Tensor | Operand | None,
    weight: Tensor | Operand,
    scales: Tensor,
    needs: Sequence[bool],
    seed: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, tuple[float, float, float]]:
    """`octavo::linear_backward` but for two things: amaxes are Python floats, and what is not wanted is None."""
    s_grad_output, s_grad_input = scales.tolist()
    dtype = grad_output.dtype
    grad_input = grad_weight = None
    g, i_amax, w_amax = Operand(grad_output), 0.0, 0.0
    grad_bias = grad_output.sum(0) if needs[2] else None
    if (
        table.fuses[1]
        and watch.look is None
        and isinstance(weight, Operand)
        and (input is None or isinstance(input, Operand))
    ):
        found = _fused_backward(table, grad_output, input, weight, s_grad_output, needs)
        if found is not None:
            return found[0], found[1], grad_bias, (found[2], 0.0, 0.0)
    if needs[0]:
        row = table.grad_input
        g = operand(grad_output, row.left, s_grad_output, seed, last=True)
        w = weight if isinstance(weight, Operand) else operand(weight, row.right, 1.0, seed, last=False)
        grad_input = product(g, w, row.accumulator, dtype=dtype if row.result is None else torch.float32)
        grad_input, i_amax = result(grad_input, row.result, s_grad_input, seed, dtype)
    if needs[1]:
        assert input is not None
        row = table.grad_weight
        once = needs[0] and table.grad_output_once
        turned = g._replace(last=False) if once else operand(grad_output, row.left, s_grad_output, seed, last=False)
        g = g if needs[0] else turned
        x = input if isinstance(input, Operand) else operand(input, row.right, 1.0, seed, last=False)
        grad_weight = product(turned, x, row.accumulator, dtype=dtype if row.result is None else torch.float32)
        grad_weight, w_amax = result(grad_weight, row.result, 1.0, seed, dtype)
    return grad_input, grad_weight, grad_bias, (g.amax, i_amax, w_amax)


def _fused_backward(
    table: Table, grad_output: Tensor, input: Operand | None, weight: Operand, scale: float, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, float] | None:
    """grad_input, grad_weight and grad_output's amax by one chain of kernels, or None where it cannot be."""
    (t, o), i = grad_output.shape, weight.values.shape[1]
    if not (needs[0] or needs[1]) or not fused.ready(t * i * o, grad_output.dtype):
        return None
    dtype, grad_output = grad_output.dtype, dense(grad_output)
    grad_input = grad_weight = None
    g = torch.empty(t, o, dtype=torch.bfloat16)
    products = []
    if needs[0]:
        grad_input = torch.empty(t, i)
        products.append((g.data_ptr(), weight.values.data_ptr(), grad_input.data_ptr(), 0, weight.factor))
    if needs[1]:
        assert input is not None
        grad_weight = torch.empty(o, i)
        products.append((g.data_ptr(), input.values.data_ptr(), grad_weight.data_ptr(), 0, input.factor))
    run = backward_pass(table.recipe, t, i, o, dtype, (needs[0], needs[1]), threads.count())
    ((_, amax),) = run(((grad_output.data_ptr(), g.data_ptr(), scale),), products)
    if dtype is not torch.float32:
        grad_input, grad_weight = (x if x is None else x.to(dtype) for x in (grad_input, grad_weight))
    return grad_input, grad_weight, amax


def _linear_backward_cpu(
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
    """grad_input = grad_output @ weight and grad_weight = grad_output.T @ input, cast as `recipe` says.

    grad_output: [T, O]; input: [T, I] and weight: [O, I], or their operands where the recipe casts them alike in both of their GEMMs;
    facts: of the forward pass; scales: float32 [2] (grad_output, grad_input); needs: which of grad_input, grad_weight, grad_bias are
    wanted; record: whether scales are to be updated when this backward pass ends.  Returns grad_input [T, I], grad_weight [O, I] and
    grad_bias [O], the sum of the uncast grad_output, in grad_output's dtype, empty where not wanted, and amaxes, float32 [2].
    """
    table = table_of(recipe)
    x_factor, w_factor, *_ = facts.tolist()
    x = Operand(input, False, x_factor) if table.cast[0] else input
    w = Operand(weight, False, w_factor) if table.cast[1] else weight
    *gradients, amaxes = _backward(table, grad_output, x, w, scales, needs, seed_of(draws, table))
    if record:
        context.update_after_backward(None)
    one, two, three = (grad_output.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return one, two, three, torch.tensor(amaxes[:2])


def _linear_backward_fake(
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
    return (
        grad_output.new_empty((grad_output.shape[0], weight.shape[1]) if needs[0] else 0),
        grad_output.new_empty((grad_output.shape[1], input.shape[1]) if needs[1] else 0),
        grad_output.new_empty(grad_output.shape[1] if needs[2] else 0),
        scales.new_empty(2),
    )


def is_plain(x: Tensor) -> bool:
    """Whether the dispatcher would only hand `x` to the CPU kernel: then it is called directly, at half the cost of a small layer."""
    return (
        type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and torch._C._len_torch_dispatch_stack() == 0
    )


class _Linear(torch.autograd.Function):
    """The gradients of `octavo::linear` by `octavo::linear_backward`, or, where a layer is given, both without the dispatcher.

    Then facts and amaxes are Python floats, and an operand that was not cast is None.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, others: Any) -> tuple[Any, ...]:
        # One argument for all that has no gradient: torch looks at each.
        layer, keep, kept, factor, scales, ctx.grad_scales, ctx.grad_history, draws, ctx.recipe, dtype, ctx.record = (
            others
        )
        table = table_of(ctx.recipe)
        ctx.layer, ctx.draws = layer, draws
        ctx.set_materialize_grads(False)
        if layer is not None:
            ctx.seed = seed_of(draws, table)
            ctx.look = layer.look()
            with looking(ctx.look) if ctx.look is not None else _NOBODY:
                output, x, w, facts = _forward(table, input, weight, bias, kept, factor, scales, dtype, ctx.seed)
            held, ctx.input = held_input(table, input, x, ctx.seed) if ctx.needs_input_grad[1] else (None, None)
            ctx.weight = w.factor if table.cast[1] else None
            ctx.save_for_backward(held, w.values if table.cast[1] else weight)
            if held is not None:
                layer.progress.held = bytes_of(held, ctx.input), input.numel() * input.element_size()
            if not keep or table.output.right is None or not table.output.right.simple:
                return output, None, None, facts
            ctx.mark_non_differentiable(w.values)
            return output, None, w.values, facts
        with torch._C._AutoDispatchBelowAutograd():
            returned: tuple[Tensor, ...] = torch.ops.octavo.linear.default(input, weight, bias, *others[2:])
        _, x_values, w_values, tensor_facts = returned
        ctx.save_for_backward(x_values if table.cast[0] else input, w_values if table.cast[1] else weight, tensor_facts)
        ctx.mark_non_differentiable(*returned[1:])
        return returned

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad_output is None:
            return (None,) * 4
        return context.differentiated_once(_gradients, ctx, grad_output)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    if ctx.layer is not None:
        table = table_of(ctx.recipe)
        held, weight = ctx.saved_tensors
        w = weight if ctx.weight is None else Operand(weight, False, ctx.weight)
        x = None if held is None else input_of(table, held, ctx.input)
        try:
            with looking(ctx.look) if ctx.look is not None else _NOBODY:
                *gradients, amaxes = _backward(table, grad_output, x, w, ctx.grad_scales, needs, ctx.seed)
            ctx.layer.took_gradients(amaxes)
        except ValueError as error:
            ctx.layer.refused_gradient(error)
            shapes = (len(grad_output), weight.shape[1]), weight.shape, weight.shape[:1]
            gradients, amaxes = nan_gradients(grad_output, shapes, needs), (0.0, 0.0, 0.0)
        if ctx.record:
            context.update_after_backward(ctx.layer)
    else:
        *found, amaxes = torch.ops.octavo.linear_backward.default(
            grad_output, *ctx.saved_tensors, ctx.grad_scales, ctx.draws, ctx.recipe, needs, ctx.record
        )
        gradients = [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
    if ctx.record:
        gather(ctx.grad_history, amaxes[:2])
    return (*gradients, None)


def nan_gradients(like: Tensor, shapes: Sequence[Sequence[int]], needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients that make a loss scale skip the step."""
    return [like.new_full(shape, torch.nan) if need else None for shape, need in zip(shapes, needs, strict=True)]


def _linear_autograd(*arguments: Any) -> Any:
    input, weight, bias, *rest = arguments
    return _Linear.apply(input, weight, bias, (None, False, *rest))  # type: ignore[no-untyped-call]


_library.impl("linear", _linear_cpu, "CPU")
_library.impl("linear", linear_cuda, "CUDA")
_library.impl("linear", _linear_autograd, "Autograd")
_library.impl("linear_backward", _linear_backward_cpu, "CPU")
_library.impl("linear_backward", linear_backward_cuda, "CUDA")
torch.library.register_fake("octavo::linear", _linear_fake, lib=_library)
torch.library.register_fake("octavo::linear_backward", _linear_backward_fake, lib=_library)
