"""The engine's operators on CUDA, beside the CPU's kernels bit for bit where the order of sums is fixed, and beside float64 elsewhere."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from beside_reference import INTERPRETED, MARKS
from chained import chained_dot, fused, fused_once

from octavo import engine, reference
from octavo.engine import Device, Tensor, from_numpy
from octavo.formats import E4M3FN, E5M2, E8M0FNU
from octavo.rounding import Overflow, Rounding

if not INTERPRETED and importlib.util.find_spec("cupy") is None:
    pytest.skip("CuPy is not installed", allow_module_level=True)

from octavo.engine.kernels import cuda, cuda_casts, cuda_checks, cuda_launch, cuda_mlp, cuda_products
from octavo.engine.kernels.cuda_graph import Graph

pytestmark = MARKS
GENERATOR = np.random.default_rng(0)
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3e38, -1e-38], np.float32)
Array = npt.NDArray[Any]


@pytest.fixture(autouse=True)
def the_order_of_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Sums along K as the device has them, unless a test is of the interpreter's own order."""
    if not INTERPRETED or "numpys_order" in request.fixturenames:
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", chained_dot)
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", fused_once)
        yield


@pytest.fixture
def numpys_order() -> None:
    """Leaves the interpreter's dot product alone."""


def normal(*shape: int) -> Array:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def on(device: str, *values: Any) -> list[Any]:
    """Arrays as tensors there, other values as they are."""
    return [from_numpy(np.array(one)).to(device) if isinstance(one, np.ndarray) else one for one in values]


def results(found: Any) -> list[Array]:
    return [one.numpy() for one in (found if isinstance(found, tuple) else (found,))]


def assert_bits(ours: Array, theirs: Array) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    bits = f"u{ours.dtype.itemsize}"
    same = np.ascontiguousarray(ours).view(bits) == np.ascontiguousarray(theirs).view(bits)
    if ours.dtype.kind == "f":
        same |= np.isnan(ours) & np.isnan(theirs)
    assert same.all(), [(tuple(i), ours[tuple(i)], theirs[tuple(i)]) for i in np.argwhere(~same)[:5]]


def same_on_both(function: Callable[..., Any], *values: Any) -> None:
    """The same bits on the GPU as on the CPU."""
    for ours, theirs in zip(
        results(function(*on("cuda", *values))), results(function(*on("cpu", *values))), strict=True
    ):
        assert_bits(ours, theirs)


def near(ours: Array, exact: Array, *, against: Any = None) -> None:
    """Within 1e-6 of the exact values, relative to the largest among them or to what was added up."""
    size = np.abs(exact).max() if against is None else against
    assert (np.abs(ours - exact) <= 1e-6 * size).all(), np.abs(ours - exact).max()


@pytest.mark.parametrize(
    "operator", [engine.add, engine.subtract, engine.multiply, engine.divide], ids=lambda one: one.name
)
def test_arithmetic_of_all_pairs_and_broadcasts(operator: Any) -> None:
    pairs = np.array(list(itertools.product(SPECIAL, SPECIAL)), np.float32)
    same_on_both(operator, pairs[:, 0], pairs[:, 1])
    x, row = normal(37, 50), normal(50)
    for other in (x[::-1] * 2, row, normal(1), normal(37, 1), np.array(3, np.float32), normal(3, 1, 1)):
        same_on_both(operator, x, other)
        same_on_both(operator, other, x)
    same_on_both(operator, x.astype(np.float64), row.astype(np.float64))
    same_on_both(lambda a: operator(a.T, a[1, :37]), x)
    same_on_both(lambda a: operator(a, engine.full((), 2, device=a.device)), x)


def test_arithmetic_says_what_does_not_fit() -> None:
    x, y, z = on("cuda", normal(3, 4), normal(3), normal(4).astype(np.float64))
    with pytest.raises(ValueError, match=r"octavo::add: shapes \[3, 4\] and \[3\] do not broadcast; reshape one"):
        x + y
    with pytest.raises(
        ValueError, match="octavo::multiply takes float32, or float64, on CUDA; got float32 and float64"
    ):
        x * z
    with pytest.raises(ValueError, match="on cpu and the tensors before it on cuda; move one"):
        engine.add(x, from_numpy(normal(3, 4)))
    with pytest.raises(
        ValueError, match=r"go through 4 dimensions in strides; shape \[2, 2, 2, 2, 2\] has 5: reshape it"
    ):
        on("cuda", normal(2, 2, 2, 2, 2))[0].T.reshape(-1)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int32", "uint8", "bool"])
def test_fills_moves_and_copies_of_every_dtype(dtype: str) -> None:
    filled = engine.full((3, 5), 1, dtype, device="cuda")
    assert_bits(filled.numpy(), np.full((3, 5), 1, dtype))
    x = GENERATOR.integers(0, 100, (6, 5, 4)).astype(dtype)
    same_on_both(lambda a: a.permute(2, 0, 1).reshape(4, 30), x)
    same_on_both(lambda a: a[1:5:2, ::-1], x)
    (target,) = on("cuda", x)
    engine.copy_(target[:, 1], target[:, 0])
    expected = x.copy()
    expected[:, 1] = expected[:, 0]
    assert_bits(target.numpy(), expected)
    assert target.version == 1
    assert engine.zeros((0, 3), dtype, device="cuda").numpy().shape == (0, 3)


def test_full_rounds_as_numpy() -> None:
    for value in (0.1, 1e40, -0.0, np.nan):
        with np.errstate(over="ignore"):
            assert_bits(engine.full((2,), value, device="cuda").numpy(), np.full(2, value, np.float32))
    assert engine.full((), 0.1, np.float64, device="cuda").item() == 0.1


def test_relu_and_its_gradient() -> None:
    x = np.concatenate([SPECIAL, normal(2000)])
    same_on_both(engine.relu, x)
    for given in (x, x[::-1]):
        same_on_both(engine.operator("octavo::relu_gradient"), normal(x.size), given)


@pytest.mark.parametrize("function", [engine.exp, engine.log], ids=lambda one: one.name)
def test_exp_and_log(function: Any) -> None:
    x = np.abs(normal(1000)) * 20
    exact = getattr(np, function.name.removeprefix("octavo::"))(x.astype(np.float64))
    np.testing.assert_allclose(function(*on("cuda", x)).numpy(), exact, rtol=1e-6)
    same_on_both(function, SPECIAL[[0, 2, 4]])


SHAPES = [(1, 1, 1), (5, 3, 4), (33, 401, 20), (16, 800, 32), (70, 90, 130), (3, 0, 4)]


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_products_have_the_cpus_bits(m: int, k: int, n: int) -> None:
    a, b, bias, mask = normal(m, k), normal(k, n), normal(n), normal(m, n)
    same_on_both(engine.matmul, a, b)
    same_on_both(lambda x, y: x.T @ y.T, normal(k, m), normal(n, k))
    same_on_both(engine.linear_relu, a, b, bias)
    same_on_both(engine.masked_matmul, a, b, mask)

    def added(c: Tensor, x: Tensor, y: Tensor) -> Tensor:
        engine.add_matmul_(c, x, y, 0.3)
        return c

    same_on_both(added, mask, a, b)


def test_products_with_nan_and_inf() -> None:
    a, b = normal(8, 20), normal(20, 12)
    a[0, 3], a[1, 4], b[5, 6] = np.nan, np.inf, -np.inf
    same_on_both(engine.linear_relu, a, b, normal(12))


def test_a_linear_layer_of_any_number_of_dimensions() -> None:
    same_on_both(engine.linear, normal(2, 3, 7), normal(7, 5), normal(5))
    same_on_both(engine.matmul, normal(2, 3, 7), normal(7, 5))
    with pytest.raises(ValueError, match=r"octavo::linear multiplies \[.., I\] by \[I, O\]; got \[2, 3\] and \[4, 5\]"):
        engine.linear(*on("cuda", normal(2, 3), normal(4, 5)))
    with pytest.raises(ValueError, match="on CUDA, products are of float32; got float64 and float64"):
        engine.matmul(*on("cuda", np.ones((2, 2)), np.ones((2, 2))))
    with pytest.raises(ValueError, match="takes one matrix on the right"):
        engine.matmul(*on("cuda", normal(2, 3, 4), normal(2, 4, 3)))


@pytest.mark.usefixtures("numpys_order")
def test_products_beside_float64() -> None:
    a, b, bias = normal(40, 500), normal(500, 70), normal(70)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    against = np.abs(a) @ np.abs(b)
    near(engine.linear(*on("cuda", a, b, bias)).numpy(), exact + bias, against=against)
    near(engine.matmul(*on("cuda", a, b)).numpy(), exact, against=against)


def test_fused_products_round_once() -> None:
    a, b, c = (normal(20_000) * 10.0 ** GENERATOR.integers(-3, 4, 20_000) for _ in range(3))
    a, b, c = (one.astype(np.float32) for one in (a, b, c))
    c[::2] = -(a * b)[::2]
    from fractions import Fraction

    for x, y, z, found in zip(a[:400], b[:400], c[:400], fused(a, b, c)[:400], strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        below, above = (abs(Fraction(float(np.nextafter(found, np.float32(way)))) - exact) for way in (-np.inf, np.inf))
        assert abs(Fraction(float(found)) - exact) <= min(below, above)


def scores(rows: int, columns: int) -> Array:
    x = normal(rows, columns) * 5
    x[0, 0] = 90
    if rows > 2:
        x[1, columns // 2], x[2, -1] = np.nan, -np.inf
    return x


@pytest.mark.parametrize("shape", [(1, 1), (5, 10), (150, 10), (4, 17)])
def test_softmax_cross_entropy_and_arg_max(shape: tuple[int, int]) -> None:
    x, labels = scores(*shape), GENERATOR.integers(0, shape[1], shape[0])
    same_on_both(engine.softmax, x)
    same_on_both(engine.argmax, x)
    same_on_both(lambda a, b: engine.cross_entropy_both(a, b)[1], x, labels)
    upstream = engine.operator("octavo::cross_entropy_gradient")
    same_on_both(upstream, x, labels, np.array(0.3, np.float32))
    x = np.where(np.isfinite(x), x, 0)
    wide = x.astype(np.float64)
    logs = wide - wide.max(1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(1, keepdims=True))
    np.testing.assert_allclose(engine.log_softmax(*on("cuda", x)).numpy(), logs, rtol=1e-6, atol=1e-5)
    exact = -logs[np.arange(shape[0]), labels].mean()
    for loss in (engine.cross_entropy(*on("cuda", x, labels)), engine.cross_entropy_both(*on("cuda", x, labels))[0]):
        near(loss.numpy(), exact, against=max(exact, 10.0))


def test_labels_out_of_range_are_reported_as_on_the_cpu() -> None:
    x = normal(200, 10)
    for label, place in ((10, 3), (-1, 199)):
        labels = np.zeros(200, np.int64)
        labels[place] = label
        for device in ("cpu", "cuda"):
            message = f"octavo::cross_entropy: label {place} is {label}, and 10 classes are 0 to 9; correct it"
            with pytest.raises(ValueError, match=message):
                engine.cross_entropy(*on(device, x, labels))
    assert np.isfinite(engine.cross_entropy(*on("cuda", x, np.zeros(200, np.int64))).item())
    with pytest.raises(ValueError, match=r"takes logits \[N, classes\] and labels \[N\]; got \[200, 10\] and \[3\]"):
        engine.cross_entropy(*on("cuda", x, np.zeros(3, np.int64)))
    with pytest.raises(ValueError, match="octavo::softmax takes float32 on CUDA; got float64"):
        engine.softmax(*on("cuda", x.astype(np.float64)))


def test_sums() -> None:
    x = normal(130, 70)
    same_on_both(lambda a: a.sum(0), x)
    wide, (tensor,) = x.astype(np.float64), on("cuda", x)
    for axis in (None, 0, 1, -1):
        near(tensor.sum(axis).numpy(), wide.sum(axis), against=np.abs(wide).sum(axis))
    cube = normal(5, 6, 7)
    near(on("cuda", cube)[0].sum(1).numpy(), cube.astype(np.float64).sum(1), against=np.abs(cube).sum(1))
    near(on("cuda", cube)[0].permute(2, 0, 1).sum().numpy(), cube.astype(np.float64).sum(), against=np.abs(cube).sum())
    long = normal(20_000)
    near(on("cuda", long)[0].sum().numpy(), long.astype(np.float64).sum(), against=np.abs(long).sum())
    with pytest.raises(ValueError, match=r"octavo::sum: a tensor of shape \[130, 70\] has no dimension 2"):
        tensor.sum(2)


def test_rows_by_number() -> None:
    numbers = GENERATOR.integers(0, 12, 9)
    for x in (normal(12, 33), normal(12), GENERATOR.integers(0, 255, (12, 3, 3)).astype(np.uint8)):
        same_on_both(engine.take_rows, x, numbers)
    numbers[4] = 12
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError, match="octavo::take_rows: number 4 is 12, and x has 12 rows, from 0"):
            engine.take_rows(*on(device, normal(12, 3), numbers))


@pytest.mark.parametrize("by_tensor", [False, True])
@pytest.mark.parametrize(("momentum", "decay", "nesterov"), [(0.0, 0.0, False), (0.9, 1e-3, False), (0.9, 0.01, True)])
def test_sgd(momentum: float, decay: float, nesterov: bool, by_tensor: bool) -> None:
    def updated(weight: Tensor, gradient: Tensor, rate: Any) -> tuple[Tensor, ...]:
        velocity = engine.zeros(weight.shape, device=weight.device) if momentum else None
        for _ in range(3):
            engine.sgd_(weight, gradient, velocity, rate, momentum, decay, nesterov)
        assert weight.version == 3
        return (weight,) if velocity is None else (weight, velocity)

    same_on_both(updated, normal(40, 30), normal(40, 30), np.full(1, 0.1, np.float32) if by_tensor else 0.1)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_adam(decay: float) -> None:
    def updated(weight: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        first, second = (engine.zeros(weight.shape, device=weight.device) for _ in range(2))
        steps = engine.zeros((1,), device=weight.device)
        for _ in range(5):
            engine.adam_(weight, gradient, first, second, steps, 1e-3, decay=decay)
        return weight, first, second, steps

    same_on_both(updated, normal(40, 30), normal(40, 30))


def test_updates_say_what_they_take() -> None:
    weight, gradient = on("cuda", normal(4, 3), normal(3, 4))
    with pytest.raises(
        ValueError, match=r"octavo::sgd_ takes contiguous float32 tensors of one shape; got float32 \[3, 4\]"
    ):
        engine.sgd_(weight, gradient, None, 0.1)
    with pytest.raises(ValueError, match="keeps its momentum in velocity: give both, or neither"):
        engine.sgd_(weight, weight, None, 0.1, 0.9)
    with pytest.raises(ValueError, match=r"a learning rate is a number, or one float32 on cuda; got float32 .* on cpu"):
        engine.sgd_(weight, weight, None, from_numpy(normal(1)))


@pytest.mark.parametrize("format", [E4M3FN, E5M2], ids=lambda one: one.name)
@pytest.mark.parametrize("rounding", [Rounding.NEAREST_EVEN, Rounding.STOCHASTIC])
def test_casts(format: Any, rounding: Rounding) -> None:
    x, scale = np.concatenate([SPECIAL, normal(3000) * 100]), np.float32(1.7)
    modes: dict[str, Any] = {"rounding": rounding, "overflow": Overflow.SATURATE, "seed": 5, "offset": 3}
    codes, amax = cuda_casts.encode(*on("cuda", x, np.full(1, scale)), cuda_casts.Modes(format=format, **modes))
    assert_bits(codes.numpy(), reference.encode(x * scale, format, **modes))
    assert np.isnan(amax.item())
    assert_bits(cuda_casts.decode(codes, format).numpy(), reference.decode(codes.numpy(), format))


def test_a_product_is_cast_as_it_is_made() -> None:
    a, b, bias, scale = normal(20, 30), normal(30, 40), normal(40), np.full(1, 3.0, np.float32)
    modes = cuda_casts.Modes(format=E4M3FN, rounding=Rounding.STOCHASTIC, seed=7)
    out, codes = engine.empty((20, 40), device="cuda"), engine.empty((20, 40), np.uint8, device="cuda")
    amax, (scale_, *operands) = engine.empty((1,), device="cuda"), on("cuda", scale, a, b, bias)
    cast = cuda_casts.Cast(modes=modes, scale=scale_, codes=codes, amax=amax)
    cuda_products.product(operands[0], operands[1], out, bias=operands[2], relu=True, cast=cast)
    expected = engine.linear_relu(*on("cpu", a, b, bias)).numpy()
    assert_bits(out.numpy(), expected)
    assert_bits(codes.numpy(), reference.encode(expected * scale, E4M3FN, rounding=Rounding.STOCHASTIC, seed=7))
    assert amax.item() == np.abs(expected).max()
    with pytest.raises(ValueError, match="cast to signed formats of at most 8 bits with NaN; got float8_e8m0fnu"):
        cuda_casts.Modes(format=E8M0FNU)


def test_a_product_over_the_scales_of_its_operands() -> None:
    a, b, one, other = normal(6, 8), normal(8, 5), np.full(1, 3, np.float32), np.full(1, 7, np.float32)
    out, (x, y, x_scale, y_scale) = engine.empty((6, 5), device="cuda"), on("cuda", a, b, one, other)
    cuda_products.product(x, y, out, scales=(x_scale, y_scale))
    factor = np.float32(np.float64(np.float32(1) / one[0]) * np.float64(np.float32(1) / other[0]))
    assert_bits(out.numpy(), engine.matmul(*on("cpu", a, b)).numpy() * factor)


INPUTS, HIDDEN, CLASSES, BATCH, STEPS, SAMPLES = 70, 40, 10, 24, 2, 90


def data() -> tuple[Array, Array, Array]:
    order = GENERATOR.permutation(SAMPLES)[: BATCH * STEPS].astype(np.int64)
    return GENERATOR.random((SAMPLES, INPUTS)).astype(np.float32), GENERATOR.integers(0, CLASSES, SAMPLES), order


def weights() -> list[Array]:
    return [normal(*shape) * np.float32(0.1) for shape in ((INPUTS, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,))]


def step(parameters: list[Tensor], x: Tensor, labels: Tensor) -> Tensor:
    hidden = engine.linear_relu(x, parameters[0], parameters[1])
    loss: Tensor = engine.cross_entropy(engine.linear(hidden, parameters[2], parameters[3]), labels)
    loss.backward()
    with engine.no_grad():
        for one in parameters:
            assert one.grad is not None
            engine.sgd_(one, one.grad, None, 0.1)
            one.grad = None
    return loss.detach()


def trained(
    device: str, start: list[Array], samples: Array, labels: Array, order: Array
) -> tuple[list[Tensor], list[float]]:
    """The weights and losses of a perceptron trained by operators."""
    x, y, numbers = on(device, samples, labels, order)
    parameters, losses = on(device, *start), []
    for one in parameters:
        one.requires_grad = True
    for first in range(0, order.size, BATCH):
        batch = numbers[first : first + BATCH]
        losses.append(step(parameters, engine.take_rows(x, batch), engine.take_rows(y, batch)).item())
    return parameters, losses


def test_training_has_the_cpus_bits_and_takes_no_new_memory() -> None:
    start, samples, labels, order = weights(), *data()
    trained("cuda", start, samples, labels, order)
    before, made = engine.pool(Device.CUDA).allocated, cuda_launch.launches()
    ours, our_losses = trained("cuda", start, samples, labels, order)
    assert engine.pool(Device.CUDA).allocated == before
    assert cuda_launch.launches() - made > 10 * STEPS
    theirs, their_losses = trained("cpu", start, samples, labels, order)
    np.testing.assert_allclose(our_losses, their_losses, rtol=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        assert_bits(one.numpy(), other.numpy())


@pytest.mark.parametrize("batch", [BATCH, 16])
def test_the_persistent_kernel_has_the_operators_bits(batch: int) -> None:
    start, (samples, labels, order) = weights(), data()
    parameters = on("cuda", *start)
    cuda_checks.word()  # filled once in a process
    made = cuda_launch.launches()
    losses = cuda_mlp.train(*on("cuda", samples, labels, order), tuple(parameters), batch=batch, rate=0.1)
    assert cuda_launch.launches() - made == 5
    theirs, expected = on("cpu", *start), []
    for one in theirs:
        one.requires_grad = True
    for first in range(0, order.size, batch):
        numbers = order[first : first + batch]
        expected.append(step(theirs, *on("cpu", samples[numbers], labels[numbers])).item())
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-6)
    for one, other in zip(parameters, theirs, strict=True):
        assert_bits(one.numpy(), other.numpy())
        assert one.version == 1


@pytest.mark.skipif(not INTERPRETED, reason="programs take turns under the interpreter alone")
def test_the_persistent_kernels_programs_depend_on_each_other_only_where_they_meet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime.interpreter import interpreter_builder

    from octavo.engine.kernels import cuda_mlp_kernels

    start, (samples, labels, order) = weights(), data()

    def trained_by(programs: Iterable[int]) -> list[Array]:
        """Between two meetings, the programs run one after the other in that order."""
        parameters, every = on("cuda", *start), list(programs)

        def in_turns(phase: Any) -> Callable[..., None]:
            def run(*arguments: Any) -> None:
                for program in every:
                    interpreter_builder.set_grid_dim(len(every), 1, 1)
                    interpreter_builder.set_grid_idx(program, 0, 0)
                    phase(*arguments)
                interpreter_builder.set_grid_dim(1, 1, 1)
                interpreter_builder.set_grid_idx(0, 0, 0)

            return run

        with monkeypatch.context() as patch:
            for name in ("_update", "_hidden_layer", "_scores", "_gradients"):
                patch.setattr(cuda_mlp_kernels, name, in_turns(getattr(cuda_mlp_kernels, name)))
            losses = cuda_mlp.train(*on("cuda", samples, labels, order), tuple(parameters), batch=BATCH, rate=0.1)  # type: ignore[arg-type]
        return results((*parameters, losses))

    alone = trained_by(range(1))
    for programs in (range(3), reversed(range(3)), reversed(range(40))):
        for one, other in zip(trained_by(programs), alone, strict=True):
            assert_bits(one, other)


def test_the_persistent_kernel_says_what_does_not_fit() -> None:
    start, (samples, labels, order) = weights(), data()
    parameters = tuple(on("cuda", *start))
    x, y, numbers = on("cuda", samples, labels, order)
    with pytest.raises(ValueError, match=r"order holds whole batches of 25; it has 48 numbers"):
        cuda_mlp.train(x, y, numbers, parameters, batch=25, rate=0.1)
    with pytest.raises(
        ValueError, match=r"train takes samples \[S, I\], .* got \[90, 70\], \[90\], \[48\], \[40, 70\]"
    ):
        cuda_mlp.train(x, y, numbers, (parameters[0].T, *parameters[1:]), batch=BATCH, rate=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"train takes contiguous tensors on cuda, .* got int64 \[90\] on cpu"):
        cuda_mlp.train(x, from_numpy(labels), numbers, parameters, batch=BATCH, rate=0.1)  # type: ignore[arg-type]
    wrong_order, wrong_labels = order.copy(), labels.copy()
    wrong_order[30], wrong_labels[order[40]] = SAMPLES, 10
    with pytest.raises(ValueError, match="train: number 30 of order is 90, and there are 90 samples"):
        cuda_mlp.train(x, y, *on("cuda", wrong_order), parameters, batch=BATCH, rate=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"label {order[40]} is 10, and 10 classes are 0 to 9"):
        cuda_mlp.train(x, *on("cuda", wrong_labels), numbers, parameters, batch=BATCH, rate=0.1)  # type: ignore[arg-type]


def test_a_replayed_graph_steps_as_the_operators_do() -> None:
    start, (samples, labels, _) = weights(), data()
    x, y, *parameters = on("cuda", samples[:BATCH], labels[:BATCH], *start)
    theirs = on("cpu", *start)
    for one in (*parameters, *theirs):
        one.requires_grad = True
    graph = Graph(lambda: step(parameters, x, y))
    graph.replay()
    graph.check()
    assert graph.launches > 8
    expected = [step(theirs, *on("cpu", samples[:BATCH], labels[:BATCH])).item() for _ in range(3)]
    np.testing.assert_allclose(graph.output.item(), expected[-1], rtol=1e-6)
    for one, other in zip(parameters, theirs, strict=True):
        assert_bits(one.numpy(), other.numpy())
    engine.copy_(y, *on("cuda", np.full(BATCH, 10)))

    def late() -> None:
        graph.replay()
        graph.check()

    with pytest.raises(ValueError, match="label 0 is 10, and 10 classes are 0 to 9"):
        late()


def test_a_captured_step_moves_no_tensor() -> None:
    (x,) = on("cuda", normal(3))
    token = cuda_launch.capture.set(cuda_launch.Capture(cuda_checks.zeros()))
    try:
        with pytest.raises(RuntimeError, match="a tensor moves to cpu while a step is captured"):
            x.numpy()
    finally:
        cuda_launch.capture.reset(token)


def test_dlpack_both_ways() -> None:
    torch = pytest.importorskip("torch")
    x = normal(4, 6)
    (tensor,) = on("cuda", x)
    shown = torch.utils.dlpack.from_dlpack(tensor.T.__dlpack__())
    assert_bits(shown.cpu().numpy(), x.T)
    back = cuda.from_dlpack(shown[1:])
    assert (back.device, back.shape, back.strides) == (Device.CUDA, (5, 4), (1, 6))
    assert_bits(back.numpy(), x.T[1:])
    engine.copy_(back, engine.zeros((5, 4), device="cuda"))
    assert not tensor.numpy()[:, 1:].any()


def test_an_operator_without_a_kernel_says_so() -> None:
    with pytest.raises(
        ValueError, match=r"octavo::softmx has no CUDA kernel; did you mean 'softmax'\?; move its tensors"
    ):
        cuda.kernel("softmx")
