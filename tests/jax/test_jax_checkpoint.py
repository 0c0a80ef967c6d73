"""Checkpoints: what is written loads again, in either framework, and what does not fit is refused by name."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import FrozenDict, freeze

import octavo.torch
from octavo.checkpoint import CheckpointError
from octavo.jax import DenseGeneral, LayerNormMLP, autocast, from_torch, load, save, to_torch, update_collections
from octavo.recipes import Recipe, delayed_scaling, mxfp4

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 8, 8, 3))


class Model(nn.Module):
    """One of each: a convolution, statistics of batches, a kernel over several axes, a layer norm with two dense layers, an embedding."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Conv(4, (3, 2), name="conv")(x))
        x = DenseGeneral((2, 6), axis=(1, -1), name="heads")(x)
        x = x + nn.Embed(5, 6, name="embed")(jnp.zeros(1, jnp.int32))
        return LayerNormMLP(7, name="mlp")(x)[0].sum((1, 2))


def trained(recipe: Recipe, steps: int = 3) -> Any:
    """Variables whose FP8 state has moved."""
    model = Model()
    with autocast(recipe=recipe):
        variables = jax.jit(model.init)(KEY, X)

        def loss(variables: Any) -> Any:
            y, moved = model.apply(variables, X, train=True, mutable=["batch_stats"])
            return jnp.mean(y**2), moved

        step = jax.jit(jax.grad(loss, has_aux=True))
        for _ in range(steps):
            gradients, moved = step(variables)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients["params"])
            variables = update_collections({"params": params, "fp8_metas": gradients["fp8_metas"], **moved}, variables)
    return variables


def same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.map(lambda a: a.dtype, one) == jax.tree.map(lambda a: a.dtype, other)


@pytest.mark.parametrize("recipe", [delayed_scaling(amax_history_len=6), mxfp4()], ids=lambda recipe: recipe.name)
def test_all_collections_come_back(recipe: Recipe, tmp_path: Path) -> None:
    variables = trained(recipe)
    variables["params"]["heads"] = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables["params"]["heads"])
    save(tmp_path / "model.safetensors", variables, header={"step": 3})
    like = jax.tree.map(jnp.zeros_like, variables)
    found, header = load(tmp_path / "model.safetensors", like)
    same(found, variables)
    assert header["step"] == 3
    frozen, _ = load(tmp_path / "model.safetensors", freeze(like))
    assert isinstance(frozen, FrozenDict)
    same(frozen.unfreeze(), variables)


def test_names_and_layouts_are_pytorchs() -> None:
    state = to_torch(trained(delayed_scaling(amax_history_len=6)))
    shapes = {name: value.shape for name, value in state.items()}
    assert shapes["conv.weight"] == (4, 3, 3, 2)  # out, in, height, width
    assert shapes["norm.weight"] == (4,)
    assert shapes["batch_stats.norm.mean"] == (4,)
    assert shapes["heads.weight"] == (12, 32)
    assert shapes["heads.bias"] == (12,)
    assert shapes["embed.weight"] == (5, 6)
    assert shapes["mlp.wi.dense.amax_history_forward"] == (6, 3)
    assert shapes["mlp.wo.scale_backward"] == (2,)
    assert not any("fp8_metas" in name for name in state)


def test_a_history_of_another_length_keeps_its_newest_rows(tmp_path: Path) -> None:
    """As PyTorch's own layers do when the recipe's length changes."""
    long, short = trained(delayed_scaling(amax_history_len=6)), trained(delayed_scaling(amax_history_len=3), steps=0)
    found = from_torch(to_torch(long), short)["fp8_metas"]["heads"]
    np.testing.assert_array_equal(found["x_amax_history"][1:], long["fp8_metas"]["heads"]["x_amax_history"][-2:])
    np.testing.assert_array_equal(found["x_scale"], long["fp8_metas"]["heads"]["x_scale"])
    back = from_torch(to_torch(short), long)["fp8_metas"]["heads"]["x_amax_history"]
    assert back.shape == (6,)


def test_without_fp8_state_a_checkpoint_loads_with_fresh_metadata(tmp_path: Path) -> None:
    model = octavo.torch.convert(torch.nn.Sequential(torch.nn.Linear(8, 4)), delayed_scaling())
    layer = nn.Sequential([DenseGeneral(4)])
    with autocast():
        like = layer.init(KEY, jnp.zeros((1, 8)))
    plain = {
        f"layers_{name}": value.numpy()
        for name, value in torch.nn.Sequential(torch.nn.Linear(8, 4)).state_dict().items()
    }
    found = from_torch(plain, like)
    same(found["fp8_metas"], like["fp8_metas"])
    state = {f"layers_{name}": value.numpy() for name, value in model.state_dict().items()}
    same(from_torch(state, like)["fp8_metas"], like["fp8_metas"])  # an empty history is none
    np.testing.assert_array_equal(found["params"]["layers_0"]["kernel"], plain["layers_0.weight"].T)


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    variables = trained(delayed_scaling(amax_history_len=6), steps=0)
    path = tmp_path / "model.safetensors"
    state = to_torch(variables)
    missing = {name: value for name, value in state.items() if name != "conv.bias"}
    with pytest.raises(CheckpointError, match=r"the state_dict: no tensor 'conv\.bias', which the model has"):
        from_torch(missing, variables)
    with pytest.raises(
        CheckpointError, match=r"'heads\.weight' is \[3, 3\], and the model's \[12, 32\] in PyTorch's layout"
    ):
        from_torch({**state, "heads.weight": np.zeros((3, 3), np.float32)}, variables)
    save(path, variables)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(path, variables)
