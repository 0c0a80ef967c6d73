"""The metadata of delayed scaling and of random draws: the collection `fp8_metas`, and how gradients carry its next state.

Of each tensor that a recipe scales with delay a layer keeps `<tensor>_scale`, float32 [1], ones at first, and `<tensor>_amax_history`,
float32 [steps], zeros at first; row 0 gathers, the last row is the newest.  Recipes that round stochastically keep `draws`, float32
[4]: the 16-bit words of a seed and of a step, low words first.  A backward pass returns the next state as the gradient of the state.

Within one pass a layer may run several times: its amaxes travel from call to call, each taking the maximum.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.fp8_ops import fm32
from jax import Array, lax

from octavo.kernels.xla_floats import FLOAT32
from octavo.recipes import Recipe
from octavo.scaling import FLOAT32_MAX, AmaxAlgorithm, Delayed

__all__ = [
    "AMAXES",
    "FP8_COLLECTION",
    "NAMES",
    "Amaxes",
    "amaxes_of",
    "check",
    "fresh",
    "fresh_draws",
    "larger",
    "merged",
    "next_state",
    "opened",
    "tensors_of",
]

FP8_COLLECTION = "fp8_metas"
"""The collection that the metadata of a layer is in."""
AMAXES = "amaxes"
"""The name under which `mergeable` adds the array that amaxes travel by."""
NAMES: Mapping[str, str] = {
    "input": "x",
    "weight": "kernel",
    "output": "output",
    "grad_output": "grad",
    "grad_input": "grad_input",
}
"""What a tensor is called in the metadata."""


def tensors_of(recipe: Recipe) -> tuple[str, ...]:
    """The tensors that have delayed scales, in the order of `NAMES`."""
    return tuple(tensor for tensor in NAMES if tensor in recipe.maxima)


def fresh(recipe: Recipe, layer: str) -> dict[str, Any]:
    """The metadata that a layer starts with; layer: its path, which seeds its random draws."""
    metas: dict[str, Any] = {}
    for tensor in tensors_of(recipe):
        assert recipe.delayed is not None
        metas[f"{NAMES[tensor]}_scale"] = jnp.ones(1, jnp.float32)
        metas[f"{NAMES[tensor]}_amax_history"] = jnp.zeros(recipe.delayed.history, jnp.float32)
    if recipe.stochastic:
        metas["draws"] = jnp.array(fresh_draws(layer), jnp.float32)
    return metas


def fresh_draws(layer: str) -> list[int]:
    """The words of the seed of a layer, its path's CRC, and of step 0."""
    seed = zlib.crc32(layer.encode())
    return [seed & 0xFFFF, seed >> 16, 0, 0]


def check(metas: Mapping[str, Any], recipe: Recipe, layer: str) -> None:
    """Raise ValueError where a layer's metadata is not what the recipe keeps."""
    wanted = jax.eval_shape(lambda: fresh(recipe, layer))
    remedy = f"initialise the variables inside this autocast, or take {FP8_COLLECTION!r} from such variables"
    if missing := sorted(wanted.keys() - metas.keys()):
        raise ValueError(
            f"{layer}: the collection {FP8_COLLECTION!r} lacks {missing}, which {recipe.name} keeps; {remedy}"
        )
    if extra := sorted(metas.keys() - wanted.keys() - {AMAXES}):
        raise ValueError(
            f"{layer}: the collection {FP8_COLLECTION!r} holds {extra}, left over from another recipe than {recipe.name}; {remedy}"
        )
    if AMAXES in metas and metas[AMAXES].recipe != recipe:
        raise ValueError(
            f"{layer} runs in {recipe.name}, and mergeable was called for {metas[AMAXES].recipe.name}; call it inside the autocast that "
            "the layer runs in, which for this cannot be one within the model"
        )
    for name, array in wanted.items():
        if jnp.shape(metas[name]) != array.shape:
            raise ValueError(
                f"{layer}: {name} of the collection {FP8_COLLECTION!r} has shape {jnp.shape(metas[name])}, and {recipe.name} keeps "
                f"{array.shape}: it is left over from another recipe; {remedy}"
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def opened(recipe: Recipe, metas: dict[str, Array]) -> Array:
    """What a layer's calls hand their amaxes back by, zeros, float32 [tensors + 1], the last entry for having run at all.

    Its gradient, the maximum over the calls, becomes that of `metas`: the next state.
    """
    # Zeros made from the state: under vmap there is then one array for each state, and no sum over all.
    state = next(iter(metas.values()), jnp.zeros(1, jnp.float32))
    zero = FLOAT32.floats(FLOAT32.bits(state[:1]) & np.uint32(0))
    return jnp.broadcast_to(zero, (len(tensors_of(recipe)) + 1,))


def _opened_forward(recipe: Recipe, metas: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    return opened(recipe, metas), metas


def _opened_backward(recipe: Recipe, metas: dict[str, Array], amaxes: Array) -> tuple[dict[str, Array]]:
    return (next_state(recipe, metas, amaxes),)


opened.defvjp(_opened_forward, _opened_backward)


def _converted(dtype: Any, back: Any) -> Callable[[Array], Array]:
    """A conversion whose gradient is converted back, which those of extended dtypes are not by themselves."""
    convert = jax.custom_vjp(lambda x: lax.convert_element_type(x, dtype))
    convert.defvjp(lambda x: (convert(x), None), lambda _, gradient: (lax.convert_element_type(gradient, back),))
    return convert


merging = _converted(fm32, jnp.float32)
"""Amaxes in a dtype whose gradients add up to their maximum, as a `lax.scan` needs it that closes over them."""
merged = _converted(jnp.float32, fm32)
"""Such amaxes as the numbers that they are."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["recipe"])
@dataclass(frozen=True)
class Amaxes:
    """What amaxes travel by from outside of the transforms that a layer runs in, and the recipe that it was made for."""

    array: Any
    recipe: Recipe


def amaxes_of(recipe: Recipe, metas: dict[str, Array], stacked: int = 0) -> Amaxes:
    """`opened`, for layers whose metadata has `stacked` axes more."""
    make = functools.partial(opened, recipe)
    for _ in range(stacked):
        make = jax.vmap(make)
    return Amaxes(merging(make(metas)), recipe)


def larger(one: Array, other: Array) -> Array:
    """The larger of two arrays of amaxes, NaN the largest of all; subnormal ones count."""
    bits = [FLOAT32.magnitude(FLOAT32.bits(x)).astype(jnp.int32) for x in (one, other)]
    return jnp.maximum(*bits).view(jnp.float32)


def next_state(recipe: Recipe, metas: Mapping[str, Array], amaxes: Array) -> dict[str, Array]:
    """The metadata after a pass, from that before it and its amaxes, float32 [tensors + 1], 0 where there was none.

    history[0] = max(history[0], amax); peak = max(history) or history[0]; scale = MAX / peak / 2**margin, unchanged where peak is 0,
    Inf or NaN, FLT_MAX where it overflows; then the history rolls by -1 and history[0] = 0.  (Transformer Engine, JAX.)
    """
    after = {}
    for number, tensor in enumerate(tensors_of(recipe)):
        assert recipe.delayed is not None
        name = NAMES[tensor]
        after[f"{name}_amax_history"], after[f"{name}_scale"] = _rolled(
            metas[f"{name}_amax_history"],
            metas[f"{name}_scale"],
            amaxes[number],
            recipe.maxima[tensor],
            recipe.delayed,
        )
    if "draws" in metas:
        after["draws"] = _stepped(metas["draws"], amaxes[-1])
    return after


def _rolled(history: Array, scale: Array, amax: Array, maximum: float, scaling: Delayed) -> tuple[Array, Array]:
    """The next (history, scale) of a tensor; amaxes are compared as integers, so that subnormal ones count."""
    bits = history.view(jnp.int32)
    new = jnp.maximum(bits[0], FLOAT32.magnitude(FLOAT32.bits(amax)).astype(jnp.int32))
    match scaling.algorithm:
        case AmaxAlgorithm.MAX:
            peak = jnp.maximum(jnp.max(bits), new)
        case AmaxAlgorithm.MOST_RECENT:
            peak = new
        case algorithm:
            seen = bits.at[0].set(new).view(jnp.float32)[:, None]
            peak = jnp.asarray(algorithm(seen), jnp.float32).reshape(()).view(jnp.int32)
    usable = (peak > 0) & (peak < int(FLOAT32.infinity))
    target, small = np.float32(maximum * 2.0**-scaling.margin), peak < 1 << 23
    # A subnormal peak is an integer times 2**-149.
    ratio = target / jnp.where(small, peak.astype(jnp.float32), peak.view(jnp.float32))
    ratio = jnp.where(small, ratio * np.float32(2.0**75) * np.float32(2.0**74), ratio)
    ratio = jnp.where(ratio < jnp.inf, ratio, np.float32(FLOAT32_MAX))
    length = history.shape[0]
    rolled = jnp.concatenate([jnp.zeros_like(bits[:1]), bits[2:], new[None]]) if length > 1 else jnp.zeros_like(bits)
    return rolled.view(jnp.float32), jnp.where(usable, ratio, scale)


def _stepped(draws: Array, ran: Array) -> Array:
    """The draws one step on, if the layer ran."""
    step = jnp.where(ran > 0, np.float32(1), np.float32(0))
    low = draws[2] + step
    carry = jnp.where(low == 65536, np.float32(1), np.float32(0))
    high = draws[3] + carry
    words = jnp.stack([draws[0], draws[1], low - carry * 65536, jnp.where(high == 65536, np.float32(0), high)])
    return words.astype(jnp.float32)
