"""What the layers of linen and NNX have in common: a dense layer over any axes, in the recipe of the active `autocast`."""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import tracers
from jax import Array, lax

from octavo.jax.context import HighPrecisionWarning, current
from octavo.jax.dot import Plan, linear, scope_of
from octavo.jax.mesh import check_batch, check_mesh, check_parameter
from octavo.jax.state import AMAXES, FP8_COLLECTION, NAMES, check, fresh, merged, opened, tensors_of
from octavo.recipes import Recipe

__all__ = ["Shape", "contracted", "dense", "dense_kernel_init", "fresh_metas", "tuple_of"]


class Shape(NamedTuple):
    """Of a dense layer: the sizes that it contracts and those that take their place."""

    inputs: tuple[int, ...]
    features: tuple[int, ...]

    @property
    def flat(self) -> tuple[int, int]:
        """As a matrix."""
        return math.prod(self.inputs), math.prod(self.features)


def tuple_of(sizes: int | Sequence[int]) -> tuple[int, ...]:
    """One size or several, as a tuple."""
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)


def contracted(axis: int | Sequence[int], shape: tuple[int, ...], layer: str) -> tuple[int, ...]:
    """The axes of an input of that shape, none negative.  Raises ValueError for one that it has not."""
    found = tuple_of(axis)
    if any(not -len(shape) <= one < len(shape) for one in found) or len({one % len(shape) for one in found}) < len(
        found
    ):
        raise ValueError(
            f"{layer}: axis={axis!r} are no distinct axes of an input {list(shape)}; name those to contract"
        )
    return tuple(one % len(shape) for one in found)


def dense_kernel_init(init: Callable[..., Any], shape: Shape) -> Callable[..., Any]:
    """An initialiser of the kernel [*inputs, *features] by one that sees it as a matrix, so that its fan-in is right."""
    return lambda key, _, dtype: jnp.reshape(init(key, shape.flat, dtype), (*shape.inputs, *shape.features))


def fresh_metas(layer: str) -> dict[str, Any]:
    """The metadata that a layer made now starts with: none outside an enabled `autocast`."""
    frame = current()
    return fresh(frame.recipe, layer) if frame is not None and frame.enabled else {}


def dense(
    x: Any,
    kernel: Any,
    bias: Any,
    *,
    axes: tuple[int, ...],
    shape: Shape,
    layer: str,
    dtype: Any,
    metas: Mapping[str, Any],
    owner: Any,
    kernel_axes: Sequence[str | None] = (),
    bias_axes: Sequence[str | None] = (),
) -> Array:
    """`x` with its axes contracted with the kernel's first ones, plus bias: [*the other axes of x, *features], in the dtype of x.

    x: any number of dimensions, converted to dtype where that is given; kernel: [*inputs, *features], cast from its own dtype; bias:
    [*features] or None; metas: the layer's metadata; owner: whom it belongs to, for as long as it is the same.
    Outside an enabled `autocast` in high precision; with metadata, and no `autocast` at all, HighPrecisionWarning says so.
    Raises ValueError where metadata is not that of the recipe, or shapes do not fit the mesh.
    """
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise ValueError(f"{layer} takes real numbers; got {x.dtype}: give the real and the imaginary part as features")
    x = x if dtype is None else x.astype(dtype)
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    others = [one for one in range(x.ndim) if one not in axes]
    leading = tuple(x.shape[one] for one in others)
    rows = jnp.transpose(x, (*others, *axes)).reshape(-1 if x.size else math.prod(leading), shape.flat[0])
    matrix, flat = kernel.reshape(shape.flat), None if bias is None else bias.reshape(-1)
    frame = current()
    if frame is None or not frame.enabled:
        if frame is None and metas:
            _warn(layer)
        return _high_precision(rows, matrix, flat, layer).reshape(*leading, *shape.features)
    check_mesh(layer, frame.mesh_resource)
    check_parameter(layer, "kernel", kernel_axes, kernel.shape, frame.mesh_resource)
    check_parameter(layer, "bias", bias_axes, shape.features, frame.mesh_resource)
    if 0 in others and not hasattr(x, "batch_dim"):  # of an example under vmap the first axis is no batch
        check_batch(layer, x.shape[0], frame.mesh_resource)
    check(metas, frame.recipe, layer)
    plan = _plan(frame.recipe, layer, rows.dtype, frame.mesh_resource.axes)
    scales = {tensor: metas[f"{NAMES[tensor]}_scale"] for tensor in tensors_of(frame.recipe)}
    held = dict(metas)
    amaxes = _amaxes(owner, frame.recipe, held)
    y, amaxes = linear(plan, rows, matrix, flat, scales, metas.get("draws"), amaxes)
    _pass_on(owner, frame.recipe, held, amaxes)
    return y.reshape(*leading, *shape.features)


def _warn(layer: str) -> None:
    warnings.warn(
        f"{layer} keeps {FP8_COLLECTION!r} but runs outside autocast, and so in high precision; call it inside octavo.jax.autocast, or "
        "inside autocast(enabled=False) if that is meant",
        HighPrecisionWarning,
        stacklevel=2,
    )


def _high_precision(x: Array, kernel: Array, bias: Array | None, layer: str) -> Array:
    with scope_of(layer, "output"):
        y = lax.dot_general(x, kernel.astype(x.dtype), (((1,), (0,)), ((), ())))
    return y if bias is None else y + bias.astype(x.dtype)


@functools.lru_cache(maxsize=1024)
def _plan(recipe: Recipe, layer: str, dtype: Any, axes: tuple[str, ...]) -> Plan:
    return Plan(recipe=recipe, layer=layer, dtype=dtype, axes=axes)


_calls: dict[tuple[int, int], tuple[Any, Any, Recipe, Any, Array]] = {}
"""By the identity of metadata and whom it belongs to: weak references to both, the recipe, the trace, the last call's amaxes."""


def _amaxes(owner: Any, recipe: Recipe, metas: dict[str, Any]) -> Array | None:
    """What a call hands its amaxes back by: what the last call with the same variables in the same trace left, so that they merge."""
    if not metas:
        return None
    first = _first(metas)
    found = _calls.get((id(owner), id(first)))
    if (
        found is not None
        and found[0]() is owner
        and found[1]() is first
        and found[2] == recipe
        and found[3] == tracers.current_trace()
    ):
        return found[4]
    if AMAXES in metas:
        return merged(metas[AMAXES].array)
    return opened(recipe, metas)


def _first(metas: Mapping[str, Any]) -> Any:
    """The array that stands for a layer's metadata; None where there is none."""
    return next((value for name, value in metas.items() if name != AMAXES), None)


def _pass_on(owner: Any, recipe: Recipe, metas: dict[str, Any], amaxes: Array | None) -> None:
    """Leave amaxes to the next call.  Variables that are not traced have no gradient, and so none."""
    first = _first(metas)
    if amaxes is None or not isinstance(first, jax.core.Tracer):
        return
    key = id(owner), id(first)
    gone = weakref.ref(owner, lambda _: _calls.pop(key, None))
    _calls[key] = (gone, weakref.ref(first), recipe, tracers.current_trace(), amaxes)
