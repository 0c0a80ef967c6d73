"""The three GEMMs of a layer under every named recipe, and the codes of their operands, against the NumPy reference."""

import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import octavo.jax
from octavo import reference
from octavo.formats import E2M1FN, E3M4FN, E4M3FN, E5M2FNUZ, FORMATS, Format
from octavo.jax import operands, products
from octavo.jax.dot import Plan, linear
from octavo.jax.state import fresh, opened, tensors_of
from octavo.recipes import NAMED, Recipe, delayed_scaling, get_recipe, on_hopper
from octavo.rounding import Overflow
from octavo.scaling import Block, BlockScale, Current, Delayed, Row
from octavo.table import Accumulator, Gemm, TensorSpec

T, I, O = 40, 150, 36  # noqa: E741
SEED = zlib.crc32(b"fc1") << 32 | 1
SCALES = {"input": 3.7, "weight": 100.0, "grad_output": 511.0}
SIGNED = [format for format in FORMATS.values() if format.signed]


def data() -> tuple[Any, Any, Any, Any]:
    """input [T, I], kernel [I, O], bias [O], grad_output [T, O]."""
    rng = np.random.default_rng(0)
    shapes = (T, I), (I, O), (O,), (T, O)
    return tuple((rng.standard_normal(shape) * 2.0**-i).astype(np.float32) for i, shape in enumerate(shapes))


def expected(matrix: Any, spec: TensorSpec | None, tensor: str, number: int) -> Any:
    """A matrix, contracted axis last, as the reference casts and decodes it, float64."""
    if spec is None:
        return matrix.astype(np.float64)
    modes = {"scale": SCALES.get(tensor, 1.0), "seed": SEED, "offset": number << 56}
    return reference.decode_matrix(reference.encode_matrix(matrix, spec, **modes), spec).astype(np.float64)


def product(left: Any, right: Any, spec: TensorSpec | None, tensor: str, number: int) -> Any:
    wide = min(left.shape[1], right.shape[1])
    y = (left[:, :wide] @ right[:, :wide].T).astype(np.float32)
    return expected(y, spec, tensor, number) if spec else y


def three_gemms(recipe: Recipe) -> tuple[Any, Any, Any]:
    """output, grad_input, grad_weight transposed, from the table alone."""
    x, kernel, bias, g = data()
    weight, first, second, third = kernel.T, recipe.output, recipe.grad_input, recipe.grad_weight
    y = expected(x, first.left, "input", 0) @ expected(weight, first.right, "weight", 1).T + bias
    y = expected(y.astype(np.float32), first.result, "output", 2) if first.result else y
    w = expected(weight.T, second.right, "weight", 4)
    left = expected(g, second.left, "grad_output", 3)
    grad_input = product(left, w, second.result, "grad_input", 5)
    once = third.left is not None and third.left == second.left and third.left.cast_once
    turned = left.T if once else expected(np.ascontiguousarray(g.T), third.left, "grad_output", 6)
    x_turned = expected(np.ascontiguousarray(x.T), third.right, "input", 7)
    return y, grad_input, product(turned, x_turned, third.result, "grad_weight", 8).T


def run(recipe: Recipe, dtype: Any = jnp.float32) -> tuple[Any, ...]:
    x, kernel, bias, g = (jnp.asarray(array) for array in data())
    metas = fresh(recipe, "fc1")
    scales = {tensor: jnp.full(1, SCALES[tensor], jnp.float32) for tensor in tensors_of(recipe)}
    plan = Plan(recipe=recipe, layer="fc1", dtype=dtype)

    @jax.jit
    def pass_(x: Any, kernel: Any, bias: Any, g: Any) -> Any:
        amaxes = opened(recipe, metas)
        y, pull = jax.vjp(lambda *a: linear(plan, *a, scales, metas.get("draws"), amaxes)[0], x, kernel, bias)
        return y, *pull(g.astype(y.dtype))

    return tuple(np.asarray(array, np.float64) for array in pass_(x.astype(dtype), kernel, bias, g))


@pytest.mark.parametrize("name", NAMED)
def test_every_named_recipe_computes_what_the_reference_casts(name: str) -> None:
    recipe = get_recipe(name)
    found, wanted = run(recipe), three_gemms(recipe)
    for mine, theirs in zip(found[:3], wanted, strict=True):
        if recipe.output.result is None:
            assert np.abs(mine - theirs).max() <= 2e-6 * np.abs(theirs).max()
        else:  # a sum next to a rounding boundary may land on either side of it
            assert np.mean(mine != theirs) < 1e-3
    np.testing.assert_allclose(found[3], data()[3].sum(0), rtol=1e-5)


def custom(spec: TensorSpec, **rows: Any) -> Recipe:
    return Recipe(
        output=Gemm(left=spec, right=spec, **rows), grad_input=Gemm(left=spec, right=spec), grad_weight=Gemm()
    )


@pytest.mark.parametrize("format", [E4M3FN, E5M2FNUZ, E3M4FN, E2M1FN], ids=lambda format: format.name)
@pytest.mark.parametrize(
    "scaling",
    [Current(), Row(), Block(shape=(1, 32), scale=BlockScale.FLOOR), Block(shape=(16, 48), scale=BlockScale.FLOAT32)],
    ids=lambda scaling: type(scaling).__name__,
)
def test_every_format_and_scaling_multiplies_as_the_reference(format: Format, scaling: Any) -> None:
    recipe = custom(TensorSpec(format, scaling))
    for mine, theirs in zip(run(recipe)[:3], three_gemms(recipe), strict=True):
        assert np.abs(mine - theirs).max() <= 2e-6 * np.abs(theirs).max()


def test_the_output_has_the_dtype_of_the_activations_and_bfloat16_out_rounds_before_the_bias() -> None:
    recipe = delayed_scaling()
    y = run(recipe, jnp.bfloat16)[0]
    assert np.array_equal(y, np.asarray(jnp.asarray(y, jnp.bfloat16), np.float64))
    x, kernel, bias, _ = data()
    spec = TensorSpec(E4M3FN, Current())
    exact = expected(x, spec, "input", 0) @ expected(kernel.T, spec, "weight", 1).T
    rounded = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float32)
    found = run(custom(spec, accumulator=Accumulator.BFLOAT16_OUT))[0]
    assert np.mean(found == (rounded + bias).astype(np.float32)) > 0.99


def test_sums_of_hopper_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fc1, delayed_scaling.output: hopper-fast sums are emulated by octavo.torch"):
        run(on_hopper(delayed_scaling()))


def test_a_format_that_the_backend_cannot_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend here lacks one: the compiler's refusal is put in its place."""

    def refuses(*_: Any) -> None:
        raise NotImplementedError("unsupported element type")

    operands.carrier.cache_clear()
    monkeypatch.setattr(operands.lax, "bitcast_convert_type", refuses)
    with pytest.raises(
        ValueError,
        match=r"XLA holds no float8_e5m2fnuz on the backend cpu, which float8_e5m2fnuz needs; choose a recipe with",
    ):
        operands.carrier(E5M2FNUZ)
    monkeypatch.undo()
    operands.carrier.cache_clear()


def hard_values(format: Format) -> Any:
    """Every code, every tie between two, their neighbours, specials, subnormals and random bit patterns: float32 [2, n]."""
    values = np.unique(format.values[np.isfinite(format.values)].astype(np.float64))
    near = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    rng = np.random.default_rng(0)
    parts = [
        near,
        np.nextafter(near, np.float32(np.inf)),
        np.nextafter(near, np.float32(-np.inf)),
        np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-45, 1.2e-38, 3.4e38], np.float32),
        rng.integers(0, 1 << 32, 5000, dtype=np.uint32).view(np.float32),
    ]
    x = np.concatenate(parts)
    return x[: len(x) // 2 * 2].reshape(2, -1)


@pytest.mark.parametrize("format", SIGNED, ids=lambda format: format.name)
@pytest.mark.parametrize("overflow", Overflow, ids=lambda overflow: overflow.value)
def test_casts_give_the_codes_of_the_reference(format: Format, overflow: Overflow) -> None:
    spec = TensorSpec(format, Delayed(), overflow=overflow)
    cast = jax.jit(lambda x, scale: operands.cast(x, spec, axis=0, scale=scale).values)
    x32 = hard_values(format)
    x32 = x32 if format.has_nan else np.where(np.isnan(x32), np.float32(1), x32)
    for dtype in (np.float32, jnp.bfloat16, np.float16) if overflow is Overflow.SATURATE else (np.float32,):
        for scale in (1.0, 3.0, 2.0**-20, 1.37 * 2.0**120, 3.4028235e38):
            with np.errstate(over="ignore", invalid="ignore"):
                x = x32.astype(dtype)
                scaled = x.astype(np.float32) * np.float32(scale)
            codes = reference.encode(scaled, format, overflow=overflow)
            held = cast(jnp.asarray(x), jnp.float32(scale))
            values = np.asarray(held, np.float32)
            np.testing.assert_array_equal(values, format.values[codes])
            if held.dtype.name == format.name:
                np.testing.assert_array_equal(np.asarray(held).view(np.uint8), codes)


def test_the_amax_of_subnormals_and_of_nan_is_exact() -> None:
    for values in ([1e-40, -3e-41, 0.0], [0.0, -0.0], [1.0, -7.5, 1e-45], [np.inf, 3.0]):
        x = np.array(values * 9, np.float32)
        assert np.float32(jax.jit(operands.amax)(x)) == np.abs(x).max()
    assert np.isnan(jax.jit(operands.amax)(np.array([1.0, np.nan], np.float32)))


@pytest.mark.parametrize(
    "dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3b11fnuz, jnp.float8_e5m2fnuz], ids=str
)
def test_every_code_widens_as_ml_dtypes_has_it(dtype: Any) -> None:
    codes = np.arange(256, dtype=np.uint8).view(dtype)
    wide = np.asarray(products.widened_float8(jnp.asarray(codes)))
    np.testing.assert_array_equal(wide, codes.astype(np.float32))
    there = ~np.isnan(wide)
    np.testing.assert_array_equal(np.signbit(wide)[there], np.signbit(codes.astype(np.float32))[there])


def test_a_donated_weight_is_updated_in_place() -> None:
    layer = octavo.jax.DenseGeneral(48)
    x = jnp.ones((16, 32))

    def step(variables: Any) -> Any:
        gradients = jax.grad(lambda variables: layer.apply(variables, x).sum())(variables)
        params = jax.tree.map(lambda value, gradient: value - 0.1 * gradient, variables["params"], gradients["params"])
        return {**gradients, "params": params}

    with octavo.jax.autocast(recipe=delayed_scaling()):
        variables = layer.init(jax.random.key(0), x)
        compiled = jax.jit(step, donate_argnums=0).lower(variables).compile().as_text()
    assert "f32[32,48]" in compiled
    assert not re.search(r"f32\[32,48\]\S* copy\(", compiled)
