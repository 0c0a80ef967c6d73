"""The JAX front end: Flax layers that train and run in 8 bits, on operands of `float8_*`.

with octavo.jax.autocast(recipe=octavo.recipes.delayed_scaling()):
    variables = model.init(key, x)
    loss, grads = jax.value_and_grad(loss_of)(variables, x, y)
params = optimise(variables["params"], grads["params"])
variables = octavo.jax.update_collections({"params": params, "fp8_metas": grads["fp8_metas"]}, variables)
"""

from octavo.jax.check import check_fp8
from octavo.jax.checkpoint import from_torch, load, save, to_torch
from octavo.jax.collections import merge_fp8_metas, mergeable, update_collections, update_fp8_metas
from octavo.jax.context import HighPrecisionWarning, autocast, fp8_autocast
from octavo.jax.linen import DenseGeneral, LayerNorm, LayerNormDenseGeneral, LayerNormMLP
from octavo.jax.mesh import MeshResource, ShardingResource
from octavo.jax.norm import Normalization
from octavo.jax.state import FP8_COLLECTION

__all__ = [
    "FP8_COLLECTION",
    "DenseGeneral",
    "HighPrecisionWarning",
    "LayerNorm",
    "LayerNormDenseGeneral",
    "LayerNormMLP",
    "MeshResource",
    "Normalization",
    "ShardingResource",
    "autocast",
    "check_fp8",
    "fp8_autocast",
    "from_torch",
    "load",
    "merge_fp8_metas",
    "mergeable",
    "save",
    "to_torch",
    "update_collections",
    "update_fp8_metas",
]
