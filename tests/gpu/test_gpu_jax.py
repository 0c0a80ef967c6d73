"""What XLA makes of a Flax layer's GEMMs on a GPU: calls of the FP8 GEMM, and the numbers that the CPU gives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo.jax import DenseGeneral, autocast
from octavo.recipes import Recipe, current_scaling, delayed_scaling, mxfp8


def gpus() -> list[Any]:
    try:
        return jax.devices("gpu")
    except RuntimeError:
        return []


pytestmark = pytest.mark.skipif(not gpus(), reason="JAX has no GPU here")
TOKENS, INPUTS, OUTPUTS = 256, 512, 128


def pieces(recipe: Recipe) -> tuple[Any, Any, Any]:
    """A jitted pass of one layer, its variables and its input, on the host."""
    layer = DenseGeneral(OUTPUTS, use_bias=False)
    with jax.default_device(jax.devices("cpu")[0]), autocast(recipe=recipe):
        x = jax.random.normal(jax.random.key(0), (TOKENS, INPUTS))
        variables = layer.init(jax.random.key(1), x)

    def loss(variables: Any, x: Any) -> Any:
        return jnp.square(layer.apply(variables, x)).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), jax.device_get(variables), jax.device_get(x)


@pytest.mark.parametrize("recipe", [delayed_scaling(), current_scaling()], ids=lambda recipe: recipe.name)
def test_xla_calls_the_fp8_gemm_three_times(recipe: Recipe) -> None:
    step, variables, x = pieces(recipe)
    with autocast(recipe=recipe):
        compiled = step.lower(*jax.device_put((variables, x), gpus()[0])).compile().as_text()
    assert compiled.count('custom_call_target="__cublas$lt$matmul$f8"') == 3, compiled


@pytest.mark.parametrize("recipe", [delayed_scaling(), current_scaling(), mxfp8()], ids=lambda recipe: recipe.name)
def test_a_pass_gives_the_numbers_of_the_cpu(recipe: Recipe) -> None:
    step, variables, x = pieces(recipe)
    with autocast(recipe=recipe):
        ours, theirs = (
            jax.device_get(step(*jax.device_put((variables, x), place))) for place in (gpus()[0], jax.devices("cpu")[0])
        )
    # Hopper's FP8 tensor cores keep 14 bits of a sum.
    tolerance = {"rtol": 2e-2, "atol": 1e-2 * float(np.abs(theirs[1][1]).max())}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)
