"""What the engine's operators compute on the CPU: torch's numbers, float64 definitions, NaN and Inf, and updates as torch.optim's."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from numba import njit

from octavo import engine
from octavo.engine import ops
from octavo.engine.kernels import rows
from octavo.engine.storage import Pool, using

Array = npt.NDArray[Any]
F32 = np.float32
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-127), 3.4e38, -3.4e38], F32)
SIZES = (1, 15, 16, 17, 333)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Tests set PyTorch's number of threads, which is also the engine's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(*shape: int, dtype: Any = F32, seed: int = 0) -> Array:
    return np.random.Generator(np.random.Philox((seed, *shape))).normal(0, 1, shape).astype(dtype)


def tensors(*arrays: Array) -> list[engine.Tensor]:
    return [engine.from_numpy(array) for array in arrays]


def assert_same(found: engine.Tensor, expected: Any) -> None:
    """Equal to the bit, but for which NaN."""
    expected = np.asarray(expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(found.numpy(), expected)
    if expected.dtype.kind == "f":
        np.testing.assert_array_equal(
            np.signbit(found.numpy()) & ~np.isnan(expected), np.signbit(expected) & ~np.isnan(expected)
        )


def on_each(threads: tuple[int, ...], compute: Callable[[], list[engine.Tensor]]) -> list[Array]:
    """What it computes with so many threads, which must be the same bits."""
    found = []
    for count in threads:
        torch.set_num_threads(count)
        found.append([one.numpy().copy() for one in compute()])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert one.tobytes() == two.tobytes()
    return found[0]


BINARY: dict[str, tuple[Any, Any]] = {
    "add": (engine.add, torch.add),
    "subtract": (engine.subtract, torch.sub),
    "multiply": (engine.multiply, torch.mul),
    "divide": (engine.divide, torch.div),
}


@pytest.mark.parametrize("dtype", [F32, np.float64], ids=lambda x: x.__name__)
@pytest.mark.parametrize("name", BINARY)
def test_arithmetic_is_torchs_to_the_bit(name: str, dtype: Any) -> None:
    ours, theirs = BINARY[name]
    a, b = (array.ravel().astype(dtype) for array in np.meshgrid(SPECIAL, SPECIAL))
    assert_same(ours(*tensors(a, b)), theirs(torch.from_numpy(a), torch.from_numpy(b)).numpy())
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((size,), (size,)) for size in SIZES]
    shapes += [
        ((5, 7), ()),
        ((5, 7), (1, 1)),
        ((), (5, 7)),
        ((5, 7), (7,)),
        ((5, 1), (3, 1, 7)),
        ((0, 3), (3,)),
        ((2, 3), (1, 1, 1)),
    ]
    for left, right in shapes:
        a, b = draw(*left, dtype=dtype), draw(*right, dtype=dtype, seed=1)
        assert_same(ours(*tensors(a, b)), theirs(torch.from_numpy(a), torch.from_numpy(b)).numpy())


def test_large_tensors_are_shared_out_and_give_the_same_bits() -> None:
    a, b = draw(70001), draw(70001, seed=1)
    x, y = tensors(a, b)
    found = on_each(
        (1, 2, 3),
        lambda: [x + y, x - y, x * 0.1, x / y, engine.relu(x), ops.relu_gradient(y, x), engine.full(x.shape, 0.1)],
    )
    gradient = np.where(a > 0, b, 0)
    for one, expected in zip(
        found, [a + b, a - b, a * F32(0.1), a / b, np.maximum(a, 0), gradient, np.full_like(a, 0.1)], strict=True
    ):
        np.testing.assert_array_equal(one, expected)


@pytest.mark.parametrize("dtype", [F32, np.float64, np.float16], ids=lambda x: x.__name__)
def test_exp_and_log_are_torchs(dtype: Any) -> None:
    with np.errstate(over="ignore"):
        x = np.concatenate([draw(100, dtype=np.float64) * 4, SPECIAL, [1e4, -1e4]]).astype(dtype)
    for ours, theirs in ((engine.exp, torch.exp), (engine.log, torch.log)):
        found, expected = ours(engine.from_numpy(x)), theirs(torch.from_numpy(x)).numpy()
        assert found.dtype == dtype
        np.testing.assert_allclose(
            found.numpy(), expected, rtol=4 * np.finfo(dtype).eps, atol=np.finfo(dtype).smallest_subnormal
        )


@pytest.mark.parametrize("dtype", [F32, np.float64, np.float16, np.int64], ids=lambda x: x.__name__)
def test_relu_and_its_gradient_are_torchs(dtype: Any) -> None:
    x = (SPECIAL if dtype is F32 else draw(50) * 3).astype(dtype)
    gradient = np.arange(1, x.size + 1).astype(dtype)
    np.testing.assert_array_equal(engine.relu(engine.from_numpy(x)).numpy(), torch.relu(torch.from_numpy(x)).numpy())
    found = ops.relu_gradient(*tensors(gradient, x))
    assert_same(found, np.where(x > 0, gradient, dtype(0)))


@pytest.mark.parametrize("dtype", [F32, np.float64], ids=lambda x: x.__name__)
def test_the_gradient_of_relu_is_zero_where_the_mask_is_off_whatever_comes(dtype: Any) -> None:
    gradient = np.array([np.inf, np.nan, -np.inf, 5, 6, 7], dtype)
    x = np.array([-1, 0, np.nan, -0.0, 1, np.inf], dtype)
    assert_same(ops.relu_gradient(*tensors(gradient, x)), np.array([0, 0, 0, 0, 6, 7], dtype))


def test_sums_down_the_columns_are_in_the_order_of_the_rows() -> None:
    for shape in ((1, 1), (7, 16), (300, 33), (3, 0), (0, 5), (2000, 100)):
        x = draw(*shape)
        expected = np.zeros(shape[1], F32)
        for row in x:
            expected = expected + row
        (found,) = on_each((1, 2, 3), lambda x=x: [engine.from_numpy(x).sum(0)])
        np.testing.assert_array_equal(found, expected)
    wide = draw(40, 50)
    np.testing.assert_array_equal(
        engine.from_numpy(wide[::-2, 3:20]).sum(0).numpy(), np.add.accumulate(wide[::-2, 3:20])[-1]
    )


@pytest.mark.parametrize("dtype", [F32, np.float64, np.int32], ids=lambda x: x.__name__)
def test_sums_along_any_dimension(dtype: Any) -> None:
    x = (10 * draw(4, 5, 6)).astype(dtype)
    for source in (x, x[::-1, :, ::2]):
        for axis in (None, 0, 1, 2, -1, -3):
            found = engine.from_numpy(source).sum(axis)
            assert found.dtype == dtype
            np.testing.assert_allclose(found.numpy(), source.sum(axis, dtype=np.float64), rtol=1e-5, atol=1e-4)
    assert np.isnan(engine.from_numpy(SPECIAL).sum().item())


@njit
def _exponentials(x: Array, out: Array) -> None:
    for i in range(x.size):
        out[i] = rows.exp(x[i])


def ulps(found: Array, exact: Array) -> Array:
    """How far float32 numbers are from float64 ones, in steps of float32 there."""
    away: Array = np.abs(found.astype(np.float64) - exact) / np.spacing(exact.astype(F32)).astype(np.float64)
    return away


def test_exp_is_within_two_ulp() -> None:
    first, last = (int(F32(x).view(np.int32)) & 0x7FFFFFFF for x in (-(2.0**-30), -87.3))
    x = -np.arange(first, last, 601, dtype=np.int32).view(F32)
    found = np.empty_like(x)
    _exponentials(x, found)
    assert ulps(found, np.exp(x.astype(np.float64))).max() < 2
    positive = np.linspace(0, 88, 100001, dtype=F32)
    found = np.empty_like(positive)
    _exponentials(positive, found)
    assert ulps(found, np.exp(positive.astype(np.float64))).max() < 2
    edges = np.array([0.0, -0.0, -87.4, -np.inf, np.nan, -3e38], F32)
    found = np.empty_like(edges)
    _exponentials(edges, found)
    np.testing.assert_array_equal(found, np.array([1, 1, 0, 0, np.nan, 0], F32))


def test_softmax_is_that_exponential_where_the_rest_is_too_small_to_count() -> None:
    x = np.linspace(-87.3, -17.5, 4096, dtype=F32)
    found = engine.softmax(engine.from_numpy(np.stack([x, np.zeros_like(x)], 1))).numpy()
    np.testing.assert_array_equal(found[:, 1], 1)
    assert ulps(found[:, 0], np.exp(x.astype(np.float64))).max() < 2


@pytest.mark.parametrize("dtype", [F32, np.float64, np.float16], ids=lambda x: x.__name__)
@pytest.mark.parametrize("shape", [(1, 1), (5, 10), (3, 4, 33), (1, 3000), (2, 1, 0, 4)], ids=str)
def test_softmax_and_its_logarithm_are_torchs(shape: tuple[int, ...], dtype: Any) -> None:
    x = draw(*shape, dtype=dtype) * dtype(3)
    exact = torch.from_numpy(x.astype(np.float64))
    eps = float(np.finfo(dtype).eps)
    for ours, theirs in ((engine.softmax, torch.softmax), (engine.log_softmax, torch.log_softmax)):
        for source, expected in ((x, theirs(exact, -1)), (x[::-1], theirs(exact, -1).flip(0))):
            found = ours(engine.from_numpy(source))
            assert (found.dtype, found.shape) == (dtype, shape)
            np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=16 * eps, atol=8 * eps)


def test_softmax_of_infinities_is_torchs() -> None:
    x = np.array(
        [[-np.inf, 1, 2], [-np.inf] * 3, [np.inf, 0, 1], [np.nan, 0, 1], [0, -np.inf, -np.inf], [1, 2, np.nan]], F32
    )
    for dtype in (F32, np.float64):
        source = x.astype(dtype)
        for ours, theirs in ((engine.softmax, torch.softmax), (engine.log_softmax, torch.log_softmax)):
            expected = theirs(torch.from_numpy(source), -1).numpy()
            np.testing.assert_allclose(ours(engine.from_numpy(source)).numpy(), expected, rtol=1e-6)


def test_large_scores_lose_nothing() -> None:
    x = np.array([[3e4, 3e4, 3e4 - 2], [-1e5, -1e5 - 1, -1e5 + 0.5]], F32)
    expected = torch.log_softmax(torch.from_numpy(x).double(), -1).numpy()
    np.testing.assert_allclose(engine.log_softmax(engine.from_numpy(x)).numpy(), expected, rtol=1e-6)
    loss = engine.cross_entropy(*tensors(x, np.array([1, 2])))
    assert loss.item() == pytest.approx(-(expected[0, 1] + expected[1, 2]) / 2, rel=1e-6)


def exact_loss(logits: Array, labels: Array) -> tuple[float, Array]:
    """The mean cross-entropy and its gradient, in float64."""
    x = torch.from_numpy(logits.astype(np.float64)).requires_grad_()
    loss = torch.nn.functional.cross_entropy(x, torch.from_numpy(labels))
    loss.backward()
    assert x.grad is not None
    return loss.item(), x.grad.numpy()


@pytest.mark.parametrize("dtype", [F32, np.float64], ids=lambda x: x.__name__)
@pytest.mark.parametrize("shape", [(1, 1), (3, 10), (64, 10), (65, 7), (1000, 37), (200, 1000)], ids=str)
def test_cross_entropy_is_torchs_on_any_threads(shape: tuple[int, int], dtype: Any) -> None:
    logits = draw(*shape, dtype=dtype) * dtype(3)
    labels = np.random.Generator(np.random.Philox(1)).integers(0, shape[1], shape[0])
    x, y = tensors(logits, labels)
    upstream = engine.full((), 0.37, dtype)

    def compute() -> list[engine.Tensor]:
        both = engine.cross_entropy_both(x, y)
        return [
            engine.cross_entropy(x, y),
            *both,
            ops.cross_entropy_gradient(x, y),
            ops.cross_entropy_gradient(x, y, upstream),
        ]

    loss, loss_too, gradient, gradient_too, scaled = on_each((1, 2, 3), compute)
    value, slope = exact_loss(logits, labels)
    eps = float(np.finfo(dtype).eps)
    assert loss == loss_too == pytest.approx(value, rel=16 * eps, abs=eps)
    assert loss.dtype == gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, gradient_too)
    np.testing.assert_allclose(gradient, slope, rtol=16 * eps, atol=2 * eps / shape[0])
    np.testing.assert_allclose(scaled, 0.37 * slope, rtol=16 * eps, atol=2 * eps / shape[0])


def test_the_mean_loss_is_summed_in_groups() -> None:
    logits, labels = draw(1000, 40), np.arange(1000) % 40
    x, y = tensors(logits, labels)
    (loss,) = on_each((1, 2, 3, 4), lambda: [engine.cross_entropy(x, y)])
    each = [F32(engine.cross_entropy(x[i : i + 1], y[i : i + 1]).item()) for i in range(1000)]
    total = F32(0)
    for group in range(0, 1000, 64):
        part = F32(0)
        for one in each[group : group + 64]:
            part += one
        total += part
    assert loss == total / F32(1000)


def test_infinite_scores_make_infinite_losses() -> None:
    logits = np.array([[0, -np.inf], [1, 2]], F32)
    for dtype in (F32, np.float64):
        x, bad, good = tensors(logits.astype(dtype), np.array([1, 0]), np.array([0, 1]))
        assert engine.cross_entropy(x, bad).item() == math.inf
        loss, gradient = engine.cross_entropy_both(x, good)
        value, slope = exact_loss(logits, np.array([0, 1]))
        assert loss.item() == pytest.approx(value, rel=1e-6)
        np.testing.assert_allclose(gradient.numpy(), slope, rtol=1e-6)
        assert math.isnan(engine.cross_entropy(x * math.nan, good).item())


@pytest.mark.parametrize("dtype", [F32, np.float64, np.int64, np.uint8], ids=lambda x: x.__name__)
def test_argmax_is_numpys(dtype: Any) -> None:
    x = (3 * draw(40, 30)).round().clip(-9, 9)
    x = np.abs(x) if dtype is np.uint8 else x
    for source in (x.astype(dtype), x.astype(dtype)[:, ::-1], x.astype(dtype).reshape(2, 20, 30)):
        assert_same(engine.argmax(engine.from_numpy(source)), np.argmax(source, -1))


@pytest.mark.parametrize("dtype", [F32, np.float64], ids=lambda x: x.__name__)
def test_argmax_takes_the_first_of_equals_and_of_nan(dtype: Any) -> None:
    nan, inf = np.nan, np.inf
    x = np.array([[1, 3, 3], [nan, 5, nan], [1, nan, inf], [-inf, -inf, -inf], [inf, inf, 0], [0.0, -0.0, 0]], dtype)
    assert engine.argmax(engine.from_numpy(x)).numpy().tolist() == [1, 0, 1, 0, 0, 0]
    large = draw(3000, 12)
    (found,) = on_each((1, 2, 3), lambda: [engine.argmax(engine.from_numpy(large))])
    np.testing.assert_array_equal(found, large.argmax(-1))


@pytest.mark.parametrize("dtype", [F32, np.float64, np.uint8, np.bool_], ids=lambda x: x.__name__)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (9, 2, 7), (4, 0), (300, 200)], ids=str)
def test_take_rows_takes_rows(shape: tuple[int, ...], dtype: Any) -> None:
    x = (9 * draw(*shape)).astype(dtype)
    numbers = np.random.Generator(np.random.Philox(5)).integers(0, shape[0], 400)
    for source in (x, x[::-1]):
        (found,) = on_each((1, 2), lambda source=source: [engine.take_rows(*tensors(source, numbers))])
        np.testing.assert_array_equal(found, source[numbers])
        assert_same(engine.take_rows(*tensors(source, numbers[:0])), source[:0])


def test_copy_converts_and_reads_what_it_overwrites_first() -> None:
    x = engine.from_numpy(np.arange(6.0, dtype=F32))
    engine.copy_(x[1:], x[:-1])
    assert x.numpy().tolist() == [0, 0, 1, 2, 3, 4]
    target = engine.zeros((2, 3), np.float64)
    engine.copy_(target.T, engine.from_numpy(np.arange(6, dtype=np.int32).reshape(3, 2)))
    assert target.numpy().tolist() == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize("dtype", [F32, np.float64], ids=lambda x: x.__name__)
@pytest.mark.parametrize("leading", [(5,), (2, 3), (2, 0, 3)], ids=str)
def test_linear_is_torchs(leading: tuple[int, ...], dtype: Any) -> None:
    input, weight, bias = draw(*leading, 20, dtype=dtype), draw(20, 7, dtype=dtype), draw(7, dtype=dtype)
    given = [torch.from_numpy(one) for one in (input, weight.T, bias)]
    for ours, after in ((engine.linear, lambda x: x), (engine.linear_relu, torch.relu)):
        for count in (2, 3):
            found = ours(*tensors(input, weight, bias)[:count])
            expected = after(torch.nn.functional.linear(*given[:count])).numpy()
            assert (found.shape, found.dtype) == (expected.shape, dtype)
            np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=32 * np.finfo(dtype).eps)


def test_linear_relu_lets_nan_through() -> None:
    input = np.array([[np.nan, 1], [-np.inf, 0], [np.inf, 0]], F32)
    for dtype in (F32, np.float64):
        found = engine.linear_relu(*tensors(input.astype(dtype), np.ones((2, 1), dtype), np.ones(1, dtype)))
        np.testing.assert_array_equal(found.numpy(), [[np.nan], [0], [np.inf]])


SGD = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.01},
    {"lr": 0.05, "momentum": 0.9},
    {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
]
SHAPE = (101, 37)


def slopes(weight: Array, step: int) -> Array:
    """A gradient that depends on the weight and on the step."""
    slope: Array = (weight - draw(*SHAPE, seed=step)).astype(F32)
    return slope


@pytest.mark.parametrize("options", SGD, ids=lambda x: "-".join(list(x)[1:]) or "plain")
@pytest.mark.parametrize("rate", ["number", "tensor"])
def test_sgd_is_torchs(options: dict[str, Any], rate: str) -> None:
    theirs = torch.nn.Parameter(torch.from_numpy(draw(*SHAPE)))
    optimiser = torch.optim.SGD([theirs], **options)
    weight = engine.from_numpy(draw(*SHAPE))
    velocity = engine.zeros(SHAPE) if "momentum" in options else None
    given = engine.full((1,), options["lr"]) if rate == "tensor" else options["lr"]
    for step in range(20):
        theirs.grad = torch.from_numpy(slopes(theirs.detach().numpy(), step))
        optimiser.step()
        gradient = engine.from_numpy(slopes(weight.numpy(), step))
        momentum, decay = options.get("momentum", 0), options.get("weight_decay", 0)
        assert engine.sgd_(weight, gradient, velocity, given, momentum, decay, "nesterov" in options) is None
    np.testing.assert_allclose(weight.numpy(), theirs.detach().numpy(), rtol=1e-6, atol=1e-6)
    assert weight.version == 20


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.01}, {"betas": (0.5, 0.9), "eps": 1e-3}], ids=["plain", "decay", "betas"]
)
@pytest.mark.parametrize("rate", ["number", "tensor"])
def test_adam_is_torchs(options: dict[str, Any], rate: str) -> None:
    theirs = torch.nn.Parameter(torch.from_numpy(draw(*SHAPE)))
    optimiser = torch.optim.Adam([theirs], lr=0.01, **options)
    weight, steps = engine.from_numpy(draw(*SHAPE)), engine.zeros((1,))
    moments = engine.zeros(SHAPE), engine.zeros(SHAPE)
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    given = engine.full((), 0.01) if rate == "tensor" else 0.01
    for step in range(20):
        theirs.grad = torch.from_numpy(slopes(theirs.detach().numpy(), step))
        optimiser.step()
        gradient = engine.from_numpy(slopes(weight.numpy(), step))
        engine.adam_(
            weight,
            gradient,
            *moments,
            steps,
            given,
            beta1,
            beta2,
            options.get("eps", 1e-8),
            options.get("weight_decay", 0),
        )
    np.testing.assert_allclose(weight.numpy(), theirs.detach().numpy(), rtol=1e-6, atol=1e-6)
    assert steps.item() == 20
    assert weight.version == steps.version == moments[0].version == moments[1].version == 20


def test_updates_are_the_same_on_any_threads_and_take_any_gradient() -> None:
    start, slope = draw(300, 301), draw(301, 300).T

    def compute() -> list[engine.Tensor]:
        weights = [engine.from_numpy(start.copy()) for _ in range(2)]
        state, steps = [engine.zeros(start.shape) for _ in range(3)], engine.zeros((1,))
        for _ in range(3):
            engine.sgd_(weights[0], engine.from_numpy(slope), state[0], 0.1, 0.9)
            engine.adam_(weights[1], engine.from_numpy(slope), state[1], state[2], steps, 0.1)
        return [*weights, *state]

    plain, adam, velocity, *_ = on_each((1, 2, 3), compute)
    expected = start - F32(0.1) * slope
    np.testing.assert_allclose(velocity, slope * F32(2.71), rtol=1e-6)
    np.testing.assert_allclose(plain, expected - F32(0.1) * F32(4.61) * slope, rtol=0, atol=4e-6)
    np.testing.assert_allclose(adam, start - F32(0.3) * np.sign(slope), rtol=0, atol=2e-3)


def test_nothing_is_left_in_the_pool_by_operators() -> None:
    own = Pool(engine.Device.CPU)
    with using(own):
        x = engine.from_numpy(draw(100, 60))
        y = engine.from_numpy(np.arange(100) % 60)
        for result in (
            engine.cross_entropy_both(x, y),
            engine.matmul(x, x.T),
            x.T.reshape(-1),
            engine.argmax(x),
            x.sum(1),
        ):
            del result
        assert own.in_use == 0
