"""Collections of variables: taking over the next state that gradients carry, and merging that of micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax import Array

from octavo.jax.context import current
from octavo.jax.state import AMAXES, FP8_COLLECTION, amaxes_of, check, larger
from octavo.kernels.xla_floats import FLOAT32
from octavo.recipes import Recipe

__all__ = ["merge_fp8_metas", "mergeable", "update_collections", "update_fp8_metas"]


def update_fp8_metas(collections: Any) -> Any:
    """Gradients with the collection `fp8_metas` ready to be the next state, as Transformer Engine's older API asks for.

    Here they are so as they come out of the backward pass, and are returned as they are.  Raises ValueError for what holds no collections.
    """
    _require_mapping(collections)
    return collections


def update_collections(new: Any, old: Any) -> Any:
    """`old` with the collections of `new` in the place of its own: a dict, or a FrozenDict where old is one.

    new, old: collections by their names, such as `{"params": ..., "fp8_metas": ...}`; of `fp8_metas`, tensors whose layer had no part in
    the loss, and whose gradient is therefore 0, stay as they were.  Raises ValueError for what holds no collections.
    """
    for collections in (new, old):
        _require_mapping(collections)
    merged = {**old, **new}
    if FP8_COLLECTION in new and FP8_COLLECTION in old:
        merged[FP8_COLLECTION] = _kept(new[FP8_COLLECTION], old[FP8_COLLECTION])
    return FrozenDict(merged) if isinstance(old, FrozenDict) else merged


def merge_fp8_metas(one: Any, other: Any) -> Any:
    """The next state of two micro-batches that began with the same: of their collections `fp8_metas`, or of one layer's.

    Amaxes are the larger of both, NaN the largest of all; a scale is that of the side with the larger newest amax, of equal ones the
    smaller.  Draws are those of the later step.  one, other: mappings of like structure; the result is a dict.
    """
    _require_mapping(one)
    merged: dict[str, Any] = {}
    for name, mine in one.items():
        theirs = other[name]
        if isinstance(mine, Mapping):
            merged[name] = merge_fp8_metas(mine, theirs)
        elif name.endswith("_amax_history"):
            merged[name] = larger(mine, theirs)
        elif name.endswith("_scale"):
            history = f"{name.removesuffix('_scale')}_amax_history"
            newest, their_newest = (_bits(side[history])[..., -1:] for side in (one, other))
            merged[name] = _merged_scale(mine, theirs, newest, their_newest)
        else:
            assert name == "draws", name
            later = [draws[..., 2:3] + draws[..., 3:] * 65536 for draws in (mine, theirs)]
            merged[name] = jnp.where(later[0] >= later[1], mine, theirs)
    return merged


def mergeable(variables: Any) -> Any:
    """Variables for a loss in which layers run several times, so that their states merge as in `merge_fp8_metas` and do not add up.

    For a model that is applied more than once, as to the micro-batches of a `lax.scan`, and for a layer that is used both outside and
    inside of `nn.remat`, `nn.jit` or another transform, or in a `nn.scan` that broadcasts it.  Several calls of a layer in one trace
    merge by themselves.  variables: collections by name; the result is a dict, for use inside the differentiated function and inside
    `autocast`, whose recipe is to be that of each layer with metadata.
    """
    _require_mapping(variables)
    frame = current()
    if frame is None or not frame.enabled or FP8_COLLECTION not in variables:
        return dict(variables)
    return {**variables, FP8_COLLECTION: _with_amaxes(variables[FP8_COLLECTION], frame.recipe, "")}


def _with_amaxes(metas: Mapping[str, Any], recipe: Recipe, path: str) -> dict[str, Any]:
    if all(isinstance(value, Mapping) for value in metas.values()):
        return {name: _with_amaxes(value, recipe, f"{path}.{name}".lstrip(".")) for name, value in metas.items()}
    own = {name: value for name, value in metas.items() if name != AMAXES}
    check(jax.tree.map(lambda array: array[(0,) * _stacked(own)], own), recipe, path)
    return own | {AMAXES: amaxes_of(recipe, own, _stacked(own))}


def _stacked(metas: Mapping[str, Any]) -> int:
    """How many axes of layers, as `nn.scan` and `nn.vmap` stack them, a layer's metadata has before its own."""
    return max(jnp.ndim(array) for array in metas.values()) - 1


def _require_mapping(collections: Any) -> None:
    if not isinstance(collections, Mapping):
        raise ValueError(f"collections are a dict or a FrozenDict by name; got {type(collections).__name__}")


def _bits(amaxes: Array) -> Array:
    return FLOAT32.magnitude(FLOAT32.bits(amaxes)).astype(jnp.int32)


def _merged_scale(mine: Array, theirs: Array, newest: Array, their_newest: Array) -> Array:
    # A scale of 0 is the gradient of a layer that had no part in the loss.
    smaller = jnp.where(mine == 0, theirs, jnp.where(theirs == 0, mine, jnp.minimum(mine, theirs)))
    return jnp.where(newest > their_newest, mine, jnp.where(newest < their_newest, theirs, smaller))


def _kept(new: Any, old: Any) -> Any:
    """New metadata, but the old of tensors whose new scale is 0."""
    kept: dict[str, Any] = {}
    for name, value in new.items():
        if isinstance(value, Mapping):
            kept[name] = _kept(value, old[name]) if name in old else value
        else:
            kept[name] = jnp.where(_touched(new, name), value, old[name]) if name in old else value
    return type(new)(kept) if isinstance(new, FrozenDict) else kept


def _touched(metas: Mapping[str, Any], name: str) -> Any:
    """Whether a backward pass wrote what stands under a name, bool [..., 1]: scales are positive, and steps of draws at least 1."""
    if name == "draws":
        return jnp.any(metas[name][..., 2:] > np.float32(0), -1, keepdims=True)
    return metas[f"{name.removesuffix('_scale').removesuffix('_amax_history')}_scale"] != 0
