"""The layers of linen and NNX: what transforms and contexts do to them, what they refuse, and what XLA is given."""

import re
import subprocess
import sys
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import octavo.jax
import octavo.jax.nnx
from octavo.jax import (
    DenseGeneral,
    HighPrecisionWarning,
    LayerNorm,
    LayerNormDenseGeneral,
    LayerNormMLP,
    MeshResource,
    autocast,
    check_fp8,
    fp8_autocast,
    update_collections,
)
from octavo.recipes import current_scaling, delayed_scaling, mxfp4, mxfp6, mxfp8, rowwise_high_precision_grad_weight

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (8, 32))


class Model(nn.Module):
    """Two layers, one of them used twice, and a block with two more."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        first = DenseGeneral(32, name="fc1")
        return LayerNormMLP(48, name="mlp")(first(nn.relu(first(x))))[0]


MODEL = Model()


def loss(variables: Any, x: Any) -> Any:
    return jnp.mean(MODEL.apply(variables, x) ** 2)


def scanned(variables: Any, x: Any) -> Any:
    variables = octavo.jax.mergeable(variables)
    parts = x.reshape(4, 2, 32)
    return jax.lax.scan(lambda total, part: (total + loss(variables, part) / 4, None), 0.0, parts)[0]


def mapped(variables: Any, x: Any) -> Any:
    return jnp.mean(jax.vmap(lambda row: loss(variables, row[None]))(x))


def same(one: Any, other: Any, **tolerance: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


@pytest.mark.parametrize("transformed", [mapped, scanned, jax.checkpoint(loss)])
def test_transforms_leave_loss_gradients_and_the_next_state_as_they_are(transformed: Any) -> None:
    with autocast():
        variables = jax.jit(MODEL.init)(KEY, X)
        plain, gradients = jax.jit(jax.value_and_grad(loss))(variables, X)
        value, found = jax.jit(jax.value_and_grad(transformed))(variables, X)
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    same(found["params"], gradients["params"], rtol=2e-4, atol=2e-6)
    forward = {layer: {k: v for k, v in metas.items() if k[0] != "g"} for layer, metas in found["fp8_metas"].items()}
    same(forward["fc1"], {k: v for k, v in gradients["fp8_metas"]["fc1"].items() if k[0] != "g"}, rtol=1e-6)


class Shared(nn.Module):
    """One layer used again inside a lifted transform."""

    kind: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        if self.kind == "scan":
            broadcast = ["params", "fp8_metas"]
            turns = nn.scan(
                lambda layer, x, _: (layer(x), None),
                variable_broadcast=broadcast,
                split_rngs={"params": False},
                length=2,
            )
            return turns(DenseGeneral(32, name="fc1"), x, None)[0]
        kinds: dict[str, Any] = {"plain": DenseGeneral, "remat": nn.remat(DenseGeneral), "jit": nn.jit(DenseGeneral)}
        layer = kinds[self.kind](32, name="fc1")
        return layer(layer(x))


@pytest.mark.parametrize("kind", ["remat", "jit", "scan"])
def test_a_layer_shared_with_the_inside_of_a_transform_merges_its_states(kind: str) -> None:
    found = {}
    with autocast(recipe=delayed_scaling(amax_history_len=4)):
        variables = jax.jit(Shared("plain").init)(KEY, X)
        for one in ("plain", kind):

            @jax.jit
            @jax.grad
            def step(variables: Any, model: Any = Shared(one)) -> Any:  # noqa: B008 - of this turn
                return jnp.mean(model.apply(octavo.jax.mergeable(variables), X) ** 2)

            found[one] = step(variables)["fp8_metas"]
    same(found[kind], found["plain"], rtol=1e-6)


def test_nnx_layers_shared_with_the_inside_of_a_transform_merge_their_states() -> None:
    wanted = nnx.DiffState(0, nnx.Any(nnx.Param, octavo.jax.nnx.Fp8Meta))

    def plain(model: Any) -> Any:
        model = octavo.jax.nnx.mergeable(model)
        return jnp.mean(model(model(X)) ** 2)

    def remat(model: Any) -> Any:
        model = octavo.jax.nnx.mergeable(model)
        call = nnx.remat(lambda layer, x: layer(x))
        return jnp.mean(call(model, call(model, X)) ** 2)

    def scanned(model: Any) -> Any:
        model = octavo.jax.nnx.mergeable(model)
        return jnp.mean(jax.lax.scan(lambda x, _: (model(x), None), X, None, length=2)[0] ** 2)

    with autocast(recipe=delayed_scaling(amax_history_len=4)):
        layer = octavo.jax.nnx.DenseGeneral(32, 32, rngs=nnx.Rngs(0))
        first, *others = (
            nnx.to_pure_dict(nnx.jit(nnx.grad(loss, argnums=wanted))(layer)) for loss in (plain, remat, scanned)
        )
    assert 0 < first["x_amax_history"][-1] < 10
    for other in others:
        same(other, first, rtol=1e-5, atol=1e-7)


def test_models_under_vmap_keep_states_of_their_own() -> None:
    layer = DenseGeneral(4)
    with autocast(recipe=delayed_scaling(amax_history_len=4)):
        variables = layer.init(KEY, X)
        both = jax.tree.map(lambda a: jnp.stack([a, a]), variables)
        inputs = jnp.stack([X, 100 * X])
        step = jax.grad(lambda variables, x: jnp.mean(layer.apply(variables, x) ** 2))
        together = jax.vmap(step)(both, inputs)
        apart = [step(variables, x) for x in inputs]
    same(together["fp8_metas"], jax.tree.map(lambda *a: jnp.stack(a), *apart)["fp8_metas"], rtol=1e-6)


def test_layers_that_nn_scan_stacks_train_and_merge() -> None:
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            turns = nn.scan(
                lambda layer, x, _: (nn.relu(layer(x)), None),
                variable_axes={"params": 0, "fp8_metas": 0},
                split_rngs={"params": True},
                length=3,
            )
            return turns(DenseGeneral(32, name="fc"), x, None)[0]

    def loss(variables: Any, merge: bool) -> Any:
        return jnp.mean(Stack().apply(octavo.jax.mergeable(variables) if merge else variables, X) ** 2)

    for recipe in (delayed_scaling(amax_history_len=4), mxfp4()):
        with autocast(recipe=recipe):
            variables = jax.jit(Stack().init)(KEY, X)
            plain, merged = (jax.jit(jax.grad(loss), static_argnums=1)(variables, merge) for merge in (False, True))
        same(merged["fp8_metas"], plain["fp8_metas"], rtol=1e-6)
        after = update_collections(plain, variables)["fp8_metas"]["fc"]
        if recipe.stochastic:
            assert (after["draws"][:, 2] == 1).all()
        else:
            both = octavo.jax.merge_fp8_metas(plain["fp8_metas"], plain["fp8_metas"])["fc"]
            same(both, plain["fp8_metas"]["fc"])
            assert (after["x_scale"] != 1).all()


def test_training_neither_retraces_nor_keeps_what_it_was_given() -> None:
    traces = []

    def step(variables: Any, x: Any) -> Any:
        traces.append(1)
        gradients = jax.grad(loss)(variables, x)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients["params"])
        return update_collections({**gradients, "params": params}, variables)

    jitted = jax.jit(step, donate_argnums=0)
    with autocast():
        variables = before = jax.jit(MODEL.init)(KEY, X)
        for _ in range(3):
            variables = jitted(variables, X)
    assert len(traces) == 1
    assert before["fp8_metas"]["fc1"]["x_amax_history"].is_deleted()
    assert np.count_nonzero(variables["fp8_metas"]["fc1"]["x_amax_history"]) == 3


def test_a_function_jitted_inside_the_context_falls_back_outside_and_says_so() -> None:
    model = DenseGeneral(4)
    with autocast():
        variables = model.init(KEY, X)
        jitted = jax.jit(model.apply)
        inside = jitted(variables, X)
    with pytest.warns(HighPrecisionWarning, match="DenseGeneral keeps 'fp8_metas' but runs outside autocast"):
        outside = jitted(variables, X)
    params = variables["params"]
    np.testing.assert_allclose(outside, X @ params["kernel"] + params["bias"], rtol=1e-6)
    assert np.abs(inside - outside).max() > 1e-3
    with warnings.catch_warnings(), autocast(enabled=False):
        warnings.simplefilter("error")
        np.testing.assert_array_equal(jitted(variables, X), outside)
    decorated = fp8_autocast(fp8_recipe=delayed_scaling())(model.apply)
    np.testing.assert_array_equal(decorated(variables, X), inside)


def test_linen_and_nnx_give_the_same_numbers() -> None:
    class Nnx(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.fc1 = octavo.jax.nnx.DenseGeneral(32, 32, path="fc1", rngs=rngs)
            self.mlp = octavo.jax.nnx.LayerNormMLP(32, 48, path="mlp", rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.mlp(self.fc1(nnx.relu(self.fc1(x))))[0]

    wanted = nnx.DiffState(0, nnx.Any(nnx.Param, octavo.jax.nnx.Fp8Meta))

    @nnx.jit
    def step(model: Nnx, x: Any) -> Any:
        value, gradients = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2), argnums=wanted)(model)
        nnx.update(model, nnx.filter_state(gradients, octavo.jax.nnx.Fp8Meta))
        return value

    with autocast(recipe=delayed_scaling(amax_history_len=4)):
        model = Nnx(nnx.Rngs(0))
        variables = {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))}
        variables["fp8_metas"] = jax.jit(MODEL.init)(KEY, X)["fp8_metas"]
        for _ in range(3):
            value, gradients = jax.jit(jax.value_and_grad(loss))(variables, X)
            variables["fp8_metas"] = gradients["fp8_metas"]
            np.testing.assert_allclose(step(model, X), value, rtol=1e-6)
    metas = nnx.to_pure_dict(nnx.state(model, octavo.jax.nnx.Fp8Meta))
    same(metas["fc1"], variables["fp8_metas"]["fc1"], rtol=1e-6)
    same(metas["mlp"]["wi"]["dense"], variables["fp8_metas"]["mlp"]["wi"]["dense"], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_axes_and_features_may_be_several(dtype: Any) -> None:
    x = jax.random.normal(KEY, (3, 4, 5, 6))
    layer = DenseGeneral((2, 7), axis=(1, -1), dtype=dtype)
    with autocast(recipe=mxfp8()):
        variables = layer.init(KEY, x)
        output = layer.apply(variables, x)
        gradient = jax.grad(lambda x: layer.apply(variables, x).astype(jnp.float32).sum())(x)
    kernel = variables["params"]["kernel"]
    assert kernel.shape == (4, 6, 2, 7)
    assert (output.shape, output.dtype) == ((3, 5, 2, 7), dtype)
    assert gradient.shape == x.shape
    np.testing.assert_allclose(output.astype(jnp.float32), jnp.einsum("bihj,ijfg->bhfg", x, kernel), atol=0.3)


def test_norms_are_those_of_flax() -> None:
    for ours, flaxs in ((LayerNorm(), nn.LayerNorm()), (LayerNorm(layernorm_type="rmsnorm"), nn.RMSNorm())):
        np.testing.assert_allclose(ours.apply(ours.init(KEY, X), X), flaxs.apply(flaxs.init(KEY, X), X), rtol=1e-6)
    centred = LayerNorm(zero_centered_gamma=True)
    assert not centred.init(KEY, X)["params"]["scale"].any()
    with pytest.raises(ValueError, match="layernorm_type is one of"):
        LayerNorm(layernorm_type="layer").init(KEY, X)
    whole = LayerNorm().init(KEY, X)
    np.testing.assert_allclose(
        LayerNorm().apply(whole, jnp.arange(32)[None]), LayerNorm().apply(whole, jnp.arange(32.0)[None])
    )
    layer = LayerNormDenseGeneral(4, return_layernorm_output=False)
    assert layer.apply(layer.init(KEY, X), X)[1] is None


@pytest.mark.parametrize("recipe", [delayed_scaling(), current_scaling(), mxfp8(), mxfp6()], ids=lambda r: r.name)
def test_xla_is_given_float8_operands(recipe: Any) -> None:
    with autocast(recipe=recipe):
        variables = jax.jit(MODEL.init)(KEY, X)
        assert check_fp8(jax.value_and_grad(loss), variables, X)
        traced = jax.jit(jax.grad(loss)).trace(variables, X)
        here, elsewhere = traced.lower().as_text(), traced.lower(lowering_platforms=("cuda",)).as_text()
    formats = {"f8E4M3FN"} | ({"f8E5M2"} if recipe.name in ("delayed_scaling", "current_scaling") else set())
    assert all(f"x{name}>" in here for name in formats)
    if recipe.name in ("delayed_scaling", "current_scaling"):
        assert len(re.findall(r"dot_general.*: \(tensor<\w+xf8E4M3FN>, tensor<\w+xf8E4M3FN>\)", elsewhere)) > 0
        assert (
            len(re.findall(r"dot_general.*: \(tensor<\w+xf8E[45]M[23]\w*>, tensor<\w+xf8E[45]M[23]\w*>\)", elsewhere))
            > 2
        )


def test_check_fp8_names_the_layer_that_does_not() -> None:
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = DenseGeneral(8, name="low")(x)
            with autocast(enabled=False):
                return DenseGeneral(8, name="high")(x)

    with autocast():
        variables = Mixed().init(KEY, X)
        with pytest.raises(
            ValueError, match="high does not compute in float8: its GEMM output multiplies float32 and float32"
        ):
            check_fp8(Mixed().apply, variables, X)
        dense = nn.Dense(4)
        assert not check_fp8(dense.apply, dense.init(KEY, X), X)
    with autocast():
        layer = octavo.jax.nnx.DenseGeneral(32, 4, path="enc/fc1 (a:b)", rngs=nnx.Rngs(0))
        assert check_fp8(layer, X)
    with autocast(enabled=False), pytest.raises(ValueError, match=r"enc/fc1 \(a:b\) does not compute in float8"):
        check_fp8(layer, X)
    with autocast(recipe=rowwise_high_precision_grad_weight()):
        assert check_fp8(jax.grad(loss), jax.jit(MODEL.init)(KEY, X), X)


def test_bad_input_is_refused_by_name() -> None:
    layer = DenseGeneral(4, name="fc1")
    bare = layer.init(KEY, X)
    with autocast():
        with pytest.raises(ValueError, match=r"DenseGeneral: the collection 'fp8_metas' lacks \['grad_amax_history'"):
            layer.apply(bare, X)
        variables = layer.init(KEY, X)
        with pytest.raises(ValueError, match=r"axis=3 are no distinct axes of an input \[8, 32\]"):
            DenseGeneral(4, axis=3).init(KEY, X)
    shorter = r"grad_amax_history of the collection 'fp8_metas' has shape \(1024,\)"
    with autocast(recipe=delayed_scaling(amax_history_len=3)), pytest.raises(ValueError, match=shorter):
        layer.apply(variables, X)
    with (
        autocast(recipe=mxfp8()),
        pytest.raises(ValueError, match=r"holds \[.*'x_scale'\], left over from another recipe than mxfp8"),
    ):
        layer.apply(variables, X)
    with autocast(), pytest.raises(ValueError, match="DenseGeneral takes real numbers; got complex64"):
        layer.apply(variables, X.astype(jnp.complex64))
    for wrong, said in (
        ((), r"activations are one function or more, such as \('gelu',\); got \(\)"),
        ("gelu", "activations are one function or more"),
        (("gelo",), "got 'gelo'; did you mean 'gelu'"),
    ):
        with pytest.raises(ValueError, match=said):
            LayerNormMLP(8, activations=wrong).init(KEY, X)

    class Nested(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            with autocast(recipe=delayed_scaling(margin=3)):
                return DenseGeneral(4, name="inner")(x)

    with autocast():
        nested = Nested().init(KEY, X)
        with pytest.raises(ValueError, match="inner runs in delayed_scaling, and mergeable was called for"):
            Nested().apply(octavo.jax.mergeable(nested), X)
    with pytest.raises(ValueError, match="recipe is a Recipe such as"):
        autocast(recipe="mxfp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mesh_resource is an octavo\.jax\.MeshResource; got str"):
        autocast(mesh_resource="dp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dp_resource is the name of a mesh axis, or None; got 1"):
        MeshResource(dp_resource=1)  # type: ignore[arg-type]


def run(program: str, **environment: str) -> str:
    command = [sys.executable, "-W", "error", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin", **environment})
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_in_64_bit_mode_the_state_stays_float32_and_float64_inputs_are_cast_once() -> None:
    program = """
import jax, jax.numpy as jnp, numpy as np
from octavo import reference, recipes
from octavo.jax import DenseGeneral, autocast
x = np.random.default_rng(0).standard_normal((4, 8))
layer = DenseGeneral(3, use_bias=False)
for recipe in (recipes.delayed_scaling(), recipes.current_scaling(), recipes.mxfp4()):
    with autocast(recipe=recipe):
        for dtype in (np.float32, np.float64):
            v = layer.init(jax.random.key(0), jnp.asarray(x, dtype))
            y = layer.apply(v, jnp.asarray(x, dtype))
            g = jax.jit(jax.grad(lambda v, x: layer.apply(v, x).sum()))(v, jnp.asarray(x, dtype))
            assert y.dtype == dtype, y.dtype
            assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(g)), g
            if recipe.delayed:
                k = np.asarray(v["params"]["kernel"])
                left, right = (reference.decode(reference.encode(a, s.format), s.format).astype(float)
                               for a, s in ((x.astype(dtype), recipe.output.left), (k, recipe.output.right)))
                np.testing.assert_allclose(y, left @ right, rtol=1e-5, atol=1e-6)
"""
    run(program, JAX_ENABLE_X64="1", JAX_PLATFORMS="cpu")


def test_neither_torch_nor_numba_is_imported() -> None:
    loaded = run("import sys, octavo.jax, octavo.jax.nnx; print(*sys.modules)", JAX_PLATFORMS="cpu").split()
    assert "octavo.jax.linen" in loaded
    assert not {"torch", "numba"} & set(loaded)
