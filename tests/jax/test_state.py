"""The metadata of delayed scaling against a transcription of Transformer Engine's rule, and how states merge."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze

from octavo.jax import DenseGeneral, autocast, merge_fp8_metas, mergeable, update_collections, update_fp8_metas
from octavo.recipes import Recipe, delayed_scaling, mxfp4

LENGTH = 5


class Rule:
    """Section by section what one tensor's metadata does, in NumPy."""

    def __init__(self, maximum: float, recipe: Recipe) -> None:
        assert recipe.delayed is not None
        self.maximum, self.delayed = maximum, recipe.delayed
        self.scale, self.history = np.float32(1), np.zeros(recipe.delayed.history, np.float32)

    def quantise(self, *tensors: Any) -> None:
        for x in tensors:
            self.history[0] = np.maximum(self.history[0], np.abs(x).max(initial=np.float32(0)))
        algorithm = self.delayed.algorithm
        if callable(algorithm):
            m = np.asarray(algorithm(self.history[:, None]))[0]
        else:
            m = self.history.max() if algorithm.value == "max" else self.history[0]
        if m > 0 and np.isfinite(m):
            with np.errstate(over="ignore"):
                scale = np.float32(self.maximum) / m / np.float32(2**self.delayed.margin)
            self.scale = scale if np.isfinite(scale) else np.finfo(np.float32).max
        self.history = np.roll(self.history, -1)
        self.history[0] = 0


def second_largest(history: Any) -> Any:
    return history.max(0) * 0.5


def batches() -> list[tuple[str, Any]]:
    """40 steps: (what is done, input)."""
    rng, steps = np.random.default_rng(1), []
    for number in range(40):
        size = {3: 0.0, 7: np.inf, 11: 1e30, 12: 1e30, 17: 1e-41, 18: 1e-41, 23: 1e-20, 29: np.nan}.get(number, 1.0)
        x = rng.standard_normal((6, 8)).astype(np.float32)
        if np.isfinite(size):
            x = (x * np.float32(size)).astype(np.float32)
        else:
            x[0, 0] = size
        steps.append(({5: "evaluate", 20: "evaluate", 30: "no gradient"}.get(number, "train"), x))
    return steps


@pytest.mark.parametrize(
    "settings",
    [{}, {"margin": 3}, {"amax_compute_algo": "most_recent"}, {"amax_compute_algo": second_largest}],
    ids=["max", "margin", "most recent", "function"],
)
def test_metadata_follows_the_rule_over_40_steps(settings: dict[str, Any]) -> None:
    recipe = delayed_scaling(amax_history_len=LENGTH, **settings)
    layer, steps = DenseGeneral(4, use_bias=False), batches()
    with autocast(recipe=recipe):
        variables = layer.init(jax.random.key(0), steps[0][1])
        g = np.linspace(-3, 2, 24, dtype=np.float32).reshape(6, 4)
        train = jax.jit(jax.grad(lambda variables, x, size: jnp.sum(layer.apply(variables, x) * g * size)))
        evaluate = jax.jit(layer.apply)
        rules = {name: Rule(maximum, recipe) for name, maximum in (("x", 448.0), ("kernel", 448.0), ("grad", 57344.0))}
        for number, (what, x) in enumerate(steps):
            size = np.float32(2.0) ** (number % 7)
            if what == "evaluate":
                evaluate(variables, x)
                continue
            if what == "no gradient":
                size = np.float32(0)
            gradients = train(variables, x, size)
            kernel = np.asarray(variables["params"]["kernel"])
            for name, tensor in (("x", x), ("kernel", kernel), ("grad", g * size)):
                rules[name].quantise(tensor)
                metas = gradients["fp8_metas"]
                np.testing.assert_array_equal(
                    metas[f"{name}_amax_history"], rules[name].history, err_msg=f"{number} {name}"
                )
                np.testing.assert_array_equal(metas[f"{name}_scale"], [rules[name].scale], err_msg=f"{number} {name}")
            variables = update_collections({"fp8_metas": gradients["fp8_metas"]}, variables)


class Twice(nn.Module):
    """One layer used twice in a pass, and one that the loss never sees."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        shared = DenseGeneral(8, name="shared")
        DenseGeneral(3, name="unused")(x)
        y = nn.relu(shared(x))
        self.sow("intermediates", "second", y)
        return shared(y * 3)


def test_a_layer_used_twice_takes_the_larger_amax_and_one_without_part_in_the_loss_keeps_its_state() -> None:
    model, x = Twice(), jax.random.normal(jax.random.key(0), (4, 8))
    with autocast():
        variables = model.init(jax.random.key(1), x)
        second = model.apply(variables, x, mutable="intermediates")[1]["intermediates"]["second"][0] * 3
        for transform in (jax.jit, lambda f: f):
            gradients = transform(jax.grad(lambda v: jnp.sum(model.apply(v, x) ** 2)))(variables)
            shared = gradients["fp8_metas"]["shared"]
            assert shared["x_amax_history"][-1] == max(jnp.abs(x).max(), jnp.abs(second).max())
            assert shared["kernel_amax_history"][-1] == jnp.abs(variables["params"]["shared"]["kernel"]).max()
            assert shared["x_scale"] == 448 / shared["x_amax_history"][-1]
            after = update_collections(gradients, variables)["fp8_metas"]["unused"]
            jax.tree.map(np.testing.assert_array_equal, after, variables["fp8_metas"]["unused"])


def test_micro_batches_merge_to_the_state_of_the_whole_batch() -> None:
    layer, x = DenseGeneral(5), jax.random.normal(jax.random.key(0), (8, 6)) * jnp.arange(1, 9)[:, None]
    recipe = delayed_scaling(amax_history_len=3)
    with autocast(recipe=recipe):
        variables = layer.init(jax.random.key(1), x)
        variables = {**variables, "fp8_metas": jax.tree.map(lambda a: a * 1.5, variables["fp8_metas"])}

        def loss(variables: Any, x: Any) -> Any:
            return jnp.sum(layer.apply(variables, x) ** 2)

        def scanned(variables: Any) -> Any:
            variables = mergeable(variables)
            return jax.lax.scan(lambda total, part: (total + loss(variables, part), None), 0.0, x.reshape(4, 2, 6))[0]

        whole = jax.grad(loss)(variables, x)
        inside = jax.jit(jax.grad(scanned))(variables)
        parts = [jax.grad(loss)(variables, part)["fp8_metas"] for part in x.reshape(4, 2, 6)]
        merged = parts[0]
        for part in parts[1:]:
            merged = merge_fp8_metas(merged, part)
    jax.tree.map(np.testing.assert_array_equal, inside["fp8_metas"], whole["fp8_metas"])
    jax.tree.map(np.testing.assert_array_equal, merged, dict(whole["fp8_metas"]))
    np.testing.assert_allclose(inside["params"]["kernel"], whole["params"]["kernel"], rtol=1e-5, atol=1e-4)


def test_merging_takes_the_scale_of_the_larger_newest_amax_and_nan_is_the_largest() -> None:
    def state(newest: float, scale: float) -> Any:
        history = jnp.array([0, 1, newest], jnp.float32)
        return {"layer": {"x_amax_history": history, "x_scale": jnp.array([scale], jnp.float32)}}

    for one, other, scale in (
        (state(2, 7), state(3, 9), 9),
        (state(np.nan, 7), state(3, 9), 7),
        (state(3, 7), state(3, 5), 5),
        (state(0, 0), state(0, 5), 5),
    ):
        assert (
            merge_fp8_metas(one, other)["layer"]["x_scale"] == merge_fp8_metas(other, one)["layer"]["x_scale"] == scale
        )


def test_draws_differ_by_layer_and_by_step_and_carry_over_16_bits() -> None:
    model, x = Twice(), jax.random.normal(jax.random.key(0), (4, 8))
    with autocast(recipe=mxfp4()):
        variables = model.init(jax.random.key(1), x)
        metas = variables["fp8_metas"]
        assert not np.array_equal(metas["shared"]["draws"], metas["unused"]["draws"])
        start = metas["shared"]["draws"]
        metas["shared"]["draws"] = jnp.array([*start[:2], 65535, 4], jnp.float32)
        step = jax.jit(jax.grad(lambda v: jnp.sum(model.apply(v, x) ** 2)))
        after = step(variables)
        np.testing.assert_array_equal(after["fp8_metas"]["shared"]["draws"], [*start[:2], 0, 5])
        again = step({**variables, "fp8_metas": {**metas, "shared": after["fp8_metas"]["shared"]}})
        assert not np.array_equal(after["params"]["shared"]["kernel"], again["params"]["shared"]["kernel"])


def test_collections_keep_their_kind() -> None:
    old = {"params": {"w": 1}, "extra": 2}
    assert update_collections({"params": {"w": 3}}, old) == {"params": {"w": 3}, "extra": 2}
    assert isinstance(update_collections({"params": {"w": 3}}, freeze(old)), FrozenDict)
    assert update_fp8_metas(old) is old
    with pytest.raises(ValueError, match="collections are a dict or a FrozenDict by name; got list"):
        update_collections([], old)
