"""Products of an emulated model as a recipe has them: `octavo::product` and `octavo::product_backward`.

They run the three GEMMs of a `Convolution` or a `MatrixProduct`: operands cast, multiplied (`octavo.torch.bilinear_sums`), results cast.
As in `octavo.torch.ops` a recipe travels as text, amaxes come out, and eager CPU tensors are not dispatched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from octavo.table import Accumulator, Gemm
from octavo.torch import context
from octavo.torch.bilinear import Product, product_from
from octavo.torch.bilinear_sums import Sums, gradients_of, multiplied, narrow_geometry
from octavo.torch.layouts import (
    GRAD_INPUT,
    GRAD_WEIGHT,
    OUTPUT,
    Cells,
    Found,
    Layout,
    as_it_lies,
    cast_tensor,
    cells_of,
    marked,
)
from octavo.torch.operands import Cast
from octavo.torch.ops import is_plain, nan_gradients
from octavo.torch.state import gather
from octavo.torch.table import seed_of
from octavo.torch.watching import looking

__all__ = ["numbers", "packed", "product"]

_library = torch.library.Library("octavo", "FRAGMENT")
_library.define(
    "product(Tensor left, Tensor right, Tensor? bias, Tensor scales, Tensor grad_scales, Tensor grad_history, Tensor draws, "
    "str recipe, str product, ScalarType dtype, bool record) -> (Tensor, Tensor)"
)
_library.define(
    "product_backward(Tensor grad_output, Tensor left, Tensor right, Tensor facts, Tensor scales, Tensor draws, str recipe, str product, "
    "bool[] needs, bool record) -> (Tensor, Tensor, Tensor, Tensor)"
)


def product(site: Any, *arguments: Any) -> tuple[Tensor, Any]:
    """The product of `product(site, left, right, bias, scales, grad_scales, grad_history, draws, recipe, product, dtype, record)`, and
    facts, float32 [5]: the scales that left and right were cast with, and the amaxes of left, right and it; Python floats where eager
    CPU tensors were not dispatched.

    site: whose scales these are; left, right: as `product`, a spelled `Product`, takes them; bias: [channels] or None; the rest as of
    `octavo.torch.ops.linear`.
    """
    if torch.compiler.is_compiling():
        return torch.ops.octavo.product.default(*arguments)  # type: ignore[no-any-return]
    left, right, bias, *rest = arguments
    if not is_plain(left):
        return torch.ops.octavo.product.default(*arguments)  # type: ignore[no-any-return]
    return _Product.apply(left, right, bias, (site, *rest))  # type: ignore[no-any-return, no-untyped-call]


def numbers(scales: Tensor) -> Sequence[Any]:
    """Scales as casts take them: floats on the CPU, tensors of one element elsewhere."""
    return scales.tolist() if scales.device.type == "cpu" else scales.split(1)


def _in_own_dtypes(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within it torch.autocast leaves dtypes alone."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _check_sums(row: Gemm, gemm: str) -> None:
    if row.accumulator not in (Accumulator.FLOAT32, Accumulator.BFLOAT16_OUT):
        raise ValueError(
            f"{row.accumulator.value} sums are emulated in linear layers only; give {gemm} Accumulator.FLOAT32 or exempt the layer"
        )


def _rounded_sum(y: Sums, row: Gemm) -> Sums:
    rounds = row.accumulator is Accumulator.BFLOAT16_OUT
    return Sums(y.values.bfloat16().to(y.values.dtype)) if rounds else y


def _stored(cells: Cells, row: Gemm, cell: int) -> Cast | None:
    """What the sums of a GEMM are stored by, if nothing comes between."""
    return None if row.accumulator is Accumulator.BFLOAT16_OUT else cells.casts[cell]


def _result(y: Sums, cells: Cells, cell: int, scale: Any, seed: int) -> tuple[Tensor, Any]:
    cast = cells.casts[cell]
    if cast is None:
        return y.values, 0.0
    if y.amax is not None:
        return marked(y.values, cast), y.amax
    found = cast_tensor(y.values, cast, as_it_lies(y.values.dim()), scale, seed, in_place=True)
    return marked(found.values, cast), found.amax


def _forward(
    cells: Cells,
    product: Product,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    scales: Tensor,
    dtype: torch.dtype,
    seed: int,
) -> tuple[Tensor, tuple[Any, ...]]:
    """The output and the facts, in Python floats or tensors of one element."""
    row = cells.recipe.output
    _check_sums(row, "output")
    s_left, s_right, s_output = numbers(scales)
    layouts = product.layouts(left.dim())
    geometry = narrow_geometry(product, [cells.casts[cell] for cell in (0, 1)], left, right)
    narrow = geometry is not None
    with _in_own_dtypes(left):
        a = cast_tensor(left, cells.casts[0], layouts[0], s_left, seed, slot=0, narrow=narrow)
        b = cast_tensor(right, cells.casts[1], layouts[1], s_right, seed, slot=1, narrow=narrow)
        if row.accumulator is Accumulator.BFLOAT16_OUT:
            sums = _rounded_sum(multiplied(product, geometry, a, b, None, None), row)
            if bias is not None:
                y = sums.values
                sums = Sums(y + bias.to(y.dtype).reshape(-1, *[1] * (y.dim() - 2)))
        else:
            sums = multiplied(product, geometry, a, b, bias, cells.casts[OUTPUT])
        y, y_amax = _result(sums, cells, OUTPUT, s_output, seed)
        return y.to(dtype), (a.scale, b.scale, a.amax, b.amax, y_amax)


def _backward(
    cells: Cells,
    product: Product,
    grad_output: Tensor,
    left: Tensor,
    right: Tensor,
    facts: Sequence[Any],
    scales: Tensor,
    needs: Sequence[bool],
    seed: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, tuple[Any, Any, Any]]:
    """The gradients wanted, float32, and the amaxes of grad_output, grad_input and grad_weight.

    left and right are cast again, by the scales of the forward pass: that costs less than the memory to keep what they were cast to.
    """
    s_grad_output, s_grad_input = numbers(scales)
    shapes = left.shape, right.shape
    layouts = product.layouts(left.dim())
    grad_left = grad_right = grad_bias = None
    left_sums: Sums | None = None
    right_sums: Sums | None = None
    g: Found | None = None
    a: Found | None = None
    b: Found | None = None
    i_amax: Any = 0.0
    w_amax: Any = 0.0
    operands = [3, 1 if cells.weight_once else 4] * needs[0] + [6, 0 if cells.input_once else 7] * needs[1]
    geometry = narrow_geometry(product, [cells.casts[cell] for cell in operands], left, right)
    narrow = geometry is not None
    if needs[0]:
        _check_sums(cells.recipe.grad_input, "grad_input")
        g = cast_tensor(grad_output, cells.casts[3], layouts[2], s_grad_output, seed, slot=2, narrow=narrow)
        b = _again(right, cells, (1, 4), (layouts[1], layouts[3]), facts[1], seed, cells.weight_once, 1, narrow)
    if needs[1]:
        _check_sums(cells.recipe.grad_weight, "grad_weight")
        a = _again(left, cells, (0, 7), (layouts[0], layouts[5]), facts[0], seed, cells.input_once, 0, narrow)
    stored = _stored(cells, cells.recipe.grad_input, GRAD_INPUT)
    if g is not None and a is not None and cells.grad_output_once:
        left_sums, right_sums = gradients_of(product, geometry, shapes, g, a, b, stored)
    else:
        if g is not None:
            left_sums, _ = gradients_of(product, geometry, shapes, g, None, b, stored)
        if a is not None:
            turned = cast_tensor(grad_output, cells.casts[6], layouts[4], s_grad_output, seed, slot=2, narrow=narrow)
            g = turned if g is None else g
            _, right_sums = gradients_of(product, geometry, shapes, turned, a, None, None)
    if left_sums is not None:
        left_sums = _rounded_sum(left_sums, cells.recipe.grad_input)
        grad_left, i_amax = _result(left_sums, cells, GRAD_INPUT, s_grad_input, seed)
    if right_sums is not None:
        right_sums = _rounded_sum(right_sums, cells.recipe.grad_weight)
        grad_right, w_amax = _result(right_sums, cells, GRAD_WEIGHT, 1.0, seed)
    if needs[2]:
        grad_bias = grad_output.sum(product.bias_axes(grad_output.dim()))
    return grad_left, grad_right, grad_bias, (0.0 if g is None else g.amax, i_amax, w_amax)


def _again(
    x: Tensor,
    cells: Cells,
    numbers: tuple[int, int],
    layouts: Sequence[Layout],
    scale: Any,
    seed: int,
    once: bool,
    slot: int,
    narrow: bool,
) -> Found:
    """An operand of the forward pass in the backward one: by the same cast, or by its other cell."""
    cell, layout = (numbers[0], layouts[0]) if once else (numbers[1], layouts[1])
    delayed = scale if once else 1.0
    return cast_tensor(x, cells.casts[cell], layout, delayed, seed, again=once, slot=slot, narrow=narrow)


def _channels(product: Product, grad_output: Tensor) -> list[int]:
    """The shape of a bias, and of its gradient."""
    summed = product.bias_axes(grad_output.dim())
    return [size for axis, size in enumerate(grad_output.shape) if axis not in summed]


def packed(amaxes: Sequence[Any], like: Tensor) -> Tensor:
    """Amaxes, floats or tensors of one element, as one tensor."""
    if all(isinstance(amax, float) for amax in amaxes):
        return torch.tensor(amaxes, dtype=torch.float32, device=like.device)
    return torch.stack([torch.as_tensor(amax, device=like.device).float().reshape(()) for amax in amaxes])


def _product_of_tensors(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    scales: Tensor,
    grad_scales: Tensor,
    grad_history: Tensor,
    draws: Tensor,
    recipe: str,
    product: str,
    dtype: torch.dtype,
    record: bool,
) -> tuple[Tensor, Tensor]:
    """`octavo::product`: the output and the facts, float32 [5]."""
    cells = cells_of(recipe)
    y, facts = _forward(cells, product_from(product), left, right, bias, scales, dtype, seed_of(draws, cells.recipe))
    return y.contiguous(), packed(facts, scales)


@torch.library.register_fake("octavo::product", lib=_library)
def _product_fake(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    scales: Tensor,
    grad_scales: Tensor,
    grad_history: Tensor,
    draws: Tensor,
    recipe: str,
    product: str,
    dtype: torch.dtype,
    record: bool,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(left.dtype, right.dtype)
    y = product_from(product).forward(left.to(wide), right.to(wide), None)
    return y.new_empty(y.shape, dtype=dtype), scales.new_empty(5)


def _product_backward_of_tensors(
    grad_output: Tensor,
    left: Tensor,
    right: Tensor,
    facts: Tensor,
    scales: Tensor,
    draws: Tensor,
    recipe: str,
    product: str,
    needs: list[bool],
    record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`octavo::product_backward`: gradients in float32 (float64 where something is), empty where not wanted, and amaxes, float32 [2]."""
    cells = cells_of(recipe)
    *gradients, amaxes = _backward(
        cells,
        product_from(product),
        grad_output,
        left,
        right,
        numbers(facts),
        scales,
        needs,
        seed_of(draws, cells.recipe),
    )
    if record:
        context.update_after_backward(None)
    one, two, three = (
        grad_output.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients
    )
    return one, two, three, packed(amaxes[:2], scales)


@torch.library.register_fake("octavo::product_backward", lib=_library)
def _product_backward_fake(
    grad_output: Tensor,
    left: Tensor,
    right: Tensor,
    facts: Tensor,
    scales: Tensor,
    draws: Tensor,
    recipe: str,
    product: str,
    needs: list[bool],
    record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if torch.float64 in (grad_output.dtype, left.dtype, right.dtype) else torch.float32
    return (
        grad_output.new_empty(left.shape if needs[0] else 0, dtype=wide if needs[0] else grad_output.dtype),
        grad_output.new_empty(right.shape if needs[1] else 0, dtype=wide if needs[1] else grad_output.dtype),
        grad_output.new_empty(_channels(product_from(product), grad_output) if needs[2] else 0),
        scales.new_empty(2),
    )


class _Product(torch.autograd.Function):
    """The gradients of `octavo::product`, or, where a site is given, all of it without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, bias: Tensor | None, others: Any) -> Any:
        site, scales, ctx.grad_scales, ctx.grad_history, draws, ctx.recipe, ctx.product, dtype, ctx.record = others
        ctx.site, ctx.draws = site, draws
        ctx.dtypes = left.dtype, right.dtype, bias is not None and bias.dtype
        ctx.set_materialize_grads(False)
        if site is not None:
            cells = cells_of(ctx.recipe)
            ctx.seed, ctx.look = seed_of(draws, cells.recipe), site.look()
            with looking(ctx.look):
                y, ctx.facts = _forward(cells, product_from(ctx.product), left, right, bias, scales, dtype, ctx.seed)
            ctx.save_for_backward(left, right)
            return y, ctx.facts
        with torch._C._AutoDispatchBelowAutograd():
            y, facts = torch.ops.octavo.product.default(left, right, bias, *others[1:])
        ctx.save_for_backward(left, right, facts)
        ctx.mark_non_differentiable(facts)
        return y, facts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad_output is None:
            return (None,) * 4
        return context.differentiated_once(_gradients, ctx, grad_output)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    left, right, *tensor_facts = ctx.saved_tensors
    if ctx.site is not None:
        cells = cells_of(ctx.recipe)
        product = product_from(ctx.product)
        try:
            with looking(ctx.look):
                *gradients, amaxes = _backward(
                    cells, product, grad_output, left, right, ctx.facts, ctx.grad_scales, needs, ctx.seed
                )
            ctx.site.took_gradients(amaxes)
        except ValueError as error:
            ctx.site.refused_gradient(error)
            gradients = nan_gradients(grad_output, (left.shape, right.shape, _channels(product, grad_output)), needs)
            amaxes = 0.0, 0.0, 0.0
        if ctx.record:
            context.update_after_backward(ctx.site)
    else:
        *found, amaxes = torch.ops.octavo.product_backward.default(
            grad_output,
            left,
            right,
            tensor_facts[0],
            ctx.grad_scales,
            ctx.draws,
            ctx.recipe,
            ctx.product,
            needs,
            ctx.record,
        )
        gradients = [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
    if ctx.record:
        gather(ctx.grad_history, amaxes[:2])
    return (
        *(None if x is None else x.to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True)),
        None,
    )


def _product_autograd(left: Tensor, right: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    return _Product.apply(left, right, bias, (None, *rest))  # type: ignore[no-untyped-call]


for _device in ("CPU", "CUDA"):
    _library.impl("product", _product_of_tensors, _device)
    _library.impl("product_backward", _product_backward_of_tensors, _device)
_library.impl("product", _product_autograd, "Autograd")
