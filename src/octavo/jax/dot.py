"""A linear layer's three GEMMs as a recipe's table has them, and their gradients.

T tokens, I input features, O output features.  Flax's kernel is [I, O], the transpose of the weight that the table speaks of.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from octavo.jax.mesh import max_over_mesh, summed_like
from octavo.jax.operands import Operand, amax_for, as_decoded, cast, seed_words
from octavo.jax.products import check_accumulator, product
from octavo.jax.state import larger, tensors_of
from octavo.recipes import Recipe
from octavo.scaling import Block, BlockScale
from octavo.table import TensorSpec

__all__ = ["SCOPE", "Plan", "linear", "scope_of"]

SCOPE = "octavo"
"""What the name scopes of GEMMs begin with: `octavo:<layer>:<gemm>` where the recipe casts both operands."""


def scope_of(layer: str, gemm: str) -> Any:
    """The name scope of a layer's GEMM: whatever the layer is called, one part of a path."""
    return jax.named_scope(f"{SCOPE}:{quote(layer, safe='')}:{gemm}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a layer's GEMMs before they run.  Raises ValueError for sums that XLA does not form."""

    recipe: Recipe
    layer: str
    """Its path."""
    dtype: Any
    """Of the output."""
    axes: tuple[str, ...] = ()
    """The mesh axes over which amaxes are taken, inside `shard_map`."""
    input_once: bool = field(init=False)
    """Whether one cast of a tensor serves both of its GEMMs; so for the two below."""
    weight_once: bool = field(init=False)
    grad_output_once: bool = field(init=False)

    def __post_init__(self) -> None:
        recipe = self.recipe
        for gemm in ("output", "grad_input", "grad_weight"):
            check_accumulator(getattr(recipe, gemm).accumulator, f"{self.layer}, {recipe.name}.{gemm}")
        object.__setattr__(self, "input_once", _once(recipe.output.left, recipe.grad_weight.right))
        object.__setattr__(self, "weight_once", _once(recipe.output.right, recipe.grad_input.right))
        object.__setattr__(self, "grad_output_once", _once(recipe.grad_input.left, recipe.grad_weight.left))

    def scope(self, gemm: str) -> Any:
        """The name scope of a GEMM."""
        row = getattr(self.recipe, gemm)
        whole = row.left is not None and row.right is not None
        return scope_of(self.layer, gemm) if whole else jax.named_scope(gemm)


def _once(one: TensorSpec | None, other: TensorSpec | None) -> bool:
    if one is None or one != other or not one.cast_once:
        return False
    return not (isinstance(one.scaling, Block) and one.scaling.scale is BlockScale.FLOAT32)


class _Held(NamedTuple):
    """What the forward pass holds for the backward pass."""

    input: Any
    """The operand, or the input itself."""
    kernel: Any
    scales: dict[str, Array]
    seed: Array | None
    grad_input: tuple[()] | None
    """() where the input has a gradient to get, None where it has not."""
    amaxes: dict[str, Array]
    """Of the forward tensors with delayed scaling."""
    like: Any
    """The arguments, as far as gradients have to look like them."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear(
    plan: Plan,
    input: Array,
    kernel: Array,
    bias: Array | None,
    scales: dict[str, Array],
    draws: Array | None,
    amaxes: Array | None,
) -> tuple[Array, Array | None]:
    """output = input @ kernel + bias in plan.dtype, its operands cast as plan.recipe says; and amaxes, for the layer's next call.

    input: [T, I]; kernel: [I, O]; bias: [O] or None, added in float32; scales: float32 [1] of each tensor with delayed scaling, by its
    name in the table; draws: float32 [4], of recipes that round stochastically; amaxes: `octavo.jax.state.opened`, whose gradient is
    the amaxes of the tensors with delayed scaling, or the larger ones of later calls.
    scales and draws have no gradient; grad_bias is the sum of the uncast grad_output.
    """
    return _output(plan, input, kernel, bias, scales, seed_words(draws, advance=False))[0], amaxes


def _scale(scales: dict[str, Array], tensor: str) -> Array | None:
    return scales[tensor].reshape(()) if tensor in scales else None


@functools.partial(jax.jit, static_argnames="plan", inline=True)
def _output(
    plan: Plan, input: Array, kernel: Array, bias: Array | None, scales: dict[str, Array], seed: Array | None
) -> tuple[Array, Operand, Operand, Array]:
    """The output, the operands, and the result before its cast."""
    row = plan.recipe.output
    with plan.scope("output"):
        how: Any = {"seed": seed, "axes": plan.axes}
        left = cast(input, row.left, axis=1, scale=_scale(scales, "input"), number=0, **how)
        right = cast(kernel, row.right, axis=0, scale=_scale(scales, "weight"), number=1, **how)
        wide = product(left, right, row.accumulator)
        y = wide if bias is None else wide + bias.astype(jnp.float32)
        output = as_decoded(y, row.result, dtype=plan.dtype, scale=_scale(scales, "output"), number=2, **how)
    return output, left, right, y


def _forward(plan: Plan, *arguments: Any) -> tuple[tuple[Array, Array | None], _Held]:
    perturbed = arguments[0].perturbed
    input, kernel, bias, scales, draws, amaxes = jax.tree.map(
        lambda argument: argument.value, arguments, is_leaf=lambda x: hasattr(x, "perturbed")
    )
    seed = seed_words(draws, advance=True)
    output, left, right, y = _output(plan, input, kernel, bias, scales, seed)
    gathered = _gathered(plan, {"input": input, "weight": kernel, "output": y}, scales)
    held = _Held(
        input=left if plan.input_once else input,
        kernel=right if plan.weight_once else kernel,
        scales=scales,
        seed=seed,
        grad_input=() if perturbed else None,
        amaxes=gathered,
        like=(input[:0], kernel[:0], None if bias is None else bias[:0], amaxes),
    )
    return (output, amaxes), held


def _gathered(plan: Plan, tensors: dict[str, Any], scales: dict[str, Array]) -> dict[str, Array]:
    """The amaxes of those tensors whose scaling is delayed, over the mesh; scales: by which to tell the states apart under `vmap`."""
    held = {name: x for name, x in tensors.items() if name in plan.recipe.maxima}
    return {name: max_over_mesh(amax_for(x, scales[name]), plan.axes) for name, x in held.items()}


def _backward(plan: Plan, held: _Held, gradients: tuple[Any, Any]) -> tuple[Any, ...]:
    grad_output, later = gradients
    if isinstance(grad_output, SymbolicZero):
        aval: Any = grad_output.aval
        grad_output = jnp.zeros(aval.shape, aval.dtype)
    input_like, kernel_like, bias_like, _ = held.like
    found = _gradients(plan, held, grad_output, None if isinstance(later, SymbolicZero) else later)
    return (
        None if found.input is None else summed_like(found.input, input_like),
        summed_like(found.kernel, kernel_like),
        None if found.bias is None else summed_like(found.bias, bias_like),
        None,
        None,
        found.amaxes,
    )


class _Gradients(NamedTuple):
    """What the backward pass finds, None where it is not wanted."""

    input: Array | None
    kernel: Array
    bias: Array | None
    amaxes: Array | None


@functools.partial(jax.jit, static_argnames="plan", inline=True)
def _gradients(plan: Plan, held: _Held, grad_output: Array, later: Array | None) -> _Gradients:
    input_like, kernel_like, bias_like, amaxes_like = held.like
    grad_input, y, once = _grad_input(plan, held, grad_output, input_like.dtype)
    grad_kernel = _grad_kernel(plan, held, grad_output, once).astype(kernel_like.dtype)
    grad_bias = amaxes = None
    if bias_like is not None:
        wide = jnp.promote_types(grad_output.dtype, jnp.float32)
        grad_bias = jnp.sum(grad_output, 0, dtype=wide).astype(bias_like.dtype)
    if amaxes_like is not None:
        gathered = {**held.amaxes, **_gathered(plan, {"grad_output": grad_output, "grad_input": y}, held.scales)}
        ran = jnp.ones((), jnp.float32)
        amaxes = jnp.stack([*(gathered[tensor] for tensor in tensors_of(plan.recipe)), ran])
        amaxes = amaxes if later is None else larger(amaxes, later)
    return _Gradients(grad_input, grad_kernel, grad_bias, amaxes)


def _grad_input(
    plan: Plan, held: _Held, grad_output: Array, dtype: Any
) -> tuple[Array | None, Array | None, Operand | None]:
    """grad_input; the same before its cast; the operand of grad_output."""
    row = plan.recipe.grad_input
    if held.grad_input is None:
        return None, jnp.zeros((), jnp.float32), None
    with plan.scope("grad_input"):
        how: Any = {"seed": held.seed, "axes": plan.axes}
        left = cast(grad_output, row.left, axis=1, scale=_scale(held.scales, "grad_output"), number=3, **how)
        right = (
            held.kernel.turned()
            if plan.weight_once
            else cast(held.kernel, row.right, axis=1, scale=_scale(held.scales, "weight"), number=4, **how)
        )
        y = product(left, right, row.accumulator)
        scale = _scale(held.scales, "grad_input")
        return as_decoded(y, row.result, dtype=dtype, scale=scale, number=5, **how), y, left


def _grad_kernel(plan: Plan, held: _Held, grad_output: Array, once: Operand | None) -> Array:
    """grad_weight, transposed."""
    row = plan.recipe.grad_weight
    with plan.scope("grad_weight"):
        how: Any = {"seed": held.seed, "axes": plan.axes}
        left = (
            once.turned()
            if once is not None and plan.grad_output_once
            else cast(grad_output, row.left, axis=0, scale=_scale(held.scales, "grad_output"), number=6, **how)
        )
        right = (
            held.input.turned()
            if plan.input_once
            else cast(held.input, row.right, axis=0, scale=_scale(held.scales, "input"), number=7, **how)
        )
        if right.scale is not None and "weight" in held.amaxes:
            right = replace(right, scale=_after(held.amaxes["weight"], right.scale))
        if row.result is None:
            return product(right, left, row.accumulator)
        return as_decoded(product(left, right, row.accumulator), row.result, dtype=jnp.float32, number=8, **how).T


def _after(amax: Array, scale: Array) -> Array:
    """The scale, which on processors waits for the amax, never -1: the gradient of the weight then comes after all that reads the weight.

    Else XLA, which orders by what depends on what, has a donated weight copied before it is updated in place.
    """
    wait = lambda amax, scale: jnp.where(amax == -1, np.float32(1), scale)  # noqa: E731
    found: Array = lax.platform_dependent(amax, scale, cpu=wait, default=lambda _, scale: scale)
    return found


linear.defvjp(_forward, _backward, symbolic_zeros=True)
