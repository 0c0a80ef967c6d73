"""Windows of images as rows of a matrix, and back: by definition, as torch's convolution and slopes, with any number of threads."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional

from octavo import engine
from octavo.engine.storage import using

Array = npt.NDArray[Any]
# Images [N, H, W, C], window, stride, padding: borders of every kind, windows that lie outside, tiny images, more lanes than images.
CASES = [
    ((2, 5, 6, 3), (2, 3), 1, 0),
    ((5, 7, 6, 3), 3, 2, 1),
    ((3, 2, 2, 1), 2, 1, 0),
    ((8, 2, 2, 1), 5, 1, 3),
    ((4, 28, 28, 1), 5, 2, 2),
    ((6, 14, 14, 32), 3, 2, 1),
    ((1, 14, 14, 16), 3, 2, 1),
    ((2, 5, 5, 2), (2, 3), 1, 4),
    ((3, 9, 4, 17), (9, 1), 3, 0),
    ((64, 1, 1, 1), 1, 1, 0),
    ((0, 5, 5, 2), 3, 1, 1),
]
LARGE = ((67, 28, 28, 1), 5, 2, 2), ((67, 14, 14, 16), 3, 2, 1)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Tests set PyTorch's number of threads, which is also the engine's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(*shape: int, dtype: Any = np.float32, seed: int = 0) -> Array:
    return np.random.Generator(np.random.Philox((seed, *shape))).normal(0, 1, shape).astype(dtype)


def windows(x: Array, window: Any, stride: int, padding: int) -> Array:
    """The definition, one pixel at a time."""
    rows, columns = (window, window) if isinstance(window, int) else window
    count, height, width, channels = x.shape
    down, across = (height + 2 * padding - rows) // stride + 1, (width + 2 * padding - columns) // stride + 1
    out = np.zeros((count, down, across, rows, columns, channels), x.dtype)
    for i, j, row, column in np.ndindex(down, across, rows, columns):
        h, w = i * stride + row - padding, j * stride + column - padding
        if 0 <= h < height and 0 <= w < width:
            out[:, i, j, row, column] = x[:, h, w]
    return out.reshape(count * down * across, rows * columns * channels)


def sums(matrix: Array, shape: tuple[int, ...], window: Any, stride: int, padding: int) -> Array:
    """The definition of the transpose, in the order of the places."""
    rows, columns = (window, window) if isinstance(window, int) else window
    count, height, width, channels = shape
    down, across = (height + 2 * padding - rows) // stride + 1, (width + 2 * padding - columns) // stride + 1
    places, out = matrix.reshape(count, down, across, rows, columns, channels), np.zeros(shape, matrix.dtype)
    for i, j, row, column in np.ndindex(down, across, rows, columns):
        h, w = i * stride + row - padding, j * stride + column - padding
        if 0 <= h < height and 0 <= w < width:
            out[:, h, w] += places[:, i, j, row, column]
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_patches_and_fold_are_the_definition_to_the_bit(case: Any, dtype: Any) -> None:
    shape, *options = case
    x = (draw(*shape) * 100).astype(dtype)
    matrix = engine.patches(engine.from_numpy(x), *options)
    expected = windows(x, *options)
    assert (matrix.dtype, matrix.shape) == (expected.dtype, expected.shape)
    assert matrix.numpy().tobytes() == expected.tobytes()
    values = (draw(*expected.shape, seed=1) * 100).astype(dtype)
    images = engine.fold(engine.from_numpy(values), shape, *options)
    assert (images.dtype, images.shape) == (values.dtype, shape)
    np.testing.assert_array_equal(images.numpy(), sums(values, shape, *options))


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_any_number_of_threads_gives_the_same_bits(case: Any) -> None:
    shape, *options = case
    x, found = engine.from_numpy(draw(*shape)), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        matrix = engine.patches(x, *options)
        found.append((matrix.numpy().tobytes(), engine.fold(matrix, shape, *options).numpy().tobytes()))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_what_lies_beside_the_result_is_left_alone(count: int, threads: int) -> None:
    """Vectors are written past a row's end where more of the result follows, and nowhere else."""
    torch.set_num_threads(threads)
    x = draw(count, 6, 6, 1)
    expected = windows(x, 3, 1, 1)
    memory = np.full(expected.size + 64, 7, np.float32)
    pool = engine.Pool(engine.Device.CPU)
    size = expected.nbytes + -expected.nbytes % 64
    pool._free[size] = [(memory.ctypes.data, memory)]
    with using(pool):
        out = engine.patches(engine.from_numpy(x), 3, 1, 1)
    assert out.address == memory.ctypes.data
    assert memory[: expected.size].tobytes() == expected.tobytes()
    assert (memory[expected.size :] == 7).all()


def test_nan_and_infinity_pass() -> None:
    x = np.array([np.nan, np.inf, -np.inf, -0.0], np.float32).reshape(1, 2, 2, 1)
    matrix = engine.patches(engine.from_numpy(x), 2)
    assert matrix.numpy().tobytes() == x.tobytes()
    back = engine.fold(matrix, (1, 2, 2, 1), 2).numpy().ravel()
    np.testing.assert_array_equal(back, x.ravel())


def test_views_are_taken_in_their_order() -> None:
    x = draw(3, 2, 6, 5)
    view = engine.from_numpy(x).permute(0, 2, 3, 1)
    assert engine.patches(view, 3, 2, 1).numpy().tobytes() == windows(x.transpose(0, 2, 3, 1), 3, 2, 1).tobytes()


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("shape", "side", "stride", "padding", "outputs"),
    [((3, 9, 8, 4), 3, 2, 1, 5), ((4, 12, 12, 1), 5, 2, 2, 16), ((2, 6, 7, 3), 2, 1, 0, 7), ((2, 5, 5, 3), 3, 3, 2, 4)],
)
def test_a_convolution_and_its_gradients_are_torchs(
    shape: tuple[int, ...], side: int, stride: int, padding: int, outputs: int, dtype: Any, tolerance: float
) -> None:
    x, bias = draw(*shape, dtype=dtype), draw(outputs, dtype=dtype)
    weight = draw(side * side * shape[3], outputs, dtype=dtype)
    given = [engine.from_numpy(one, requires_grad=True) for one in (x, weight, bias)]
    out = engine.linear(engine.patches(given[0], side, stride, padding), *given[1:])

    theirs = [torch.from_numpy(one.copy()).requires_grad_() for one in (x, weight, bias)]
    kernel = theirs[1].reshape(side, side, shape[3], outputs).permute(3, 2, 0, 1)
    expected = functional.conv2d(theirs[0].permute(0, 3, 1, 2), kernel, theirs[2], stride=stride, padding=padding)
    expected = expected.permute(0, 2, 3, 1).reshape(-1, outputs)
    np.testing.assert_allclose(out.numpy(), expected.detach().numpy(), rtol=tolerance, atol=tolerance)

    upstream = draw(*out.shape, dtype=dtype, seed=2)
    out.backward(engine.from_numpy(upstream))
    expected.backward(torch.from_numpy(upstream))
    for ours, other in zip(given, theirs, strict=True):
        assert ours.grad is not None
        assert other.grad is not None
        np.testing.assert_allclose(ours.grad.numpy(), other.grad.numpy(), rtol=tolerance, atol=10 * tolerance)


def slopes(function: Any, x: Array) -> Array:
    """By central differences, in float64."""
    found = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[place] += sign * 1e-6
            ends.append(function(engine.from_numpy(moved)).item())
        found[place] = (ends[0] - ends[1]) / 2e-6
    return found


def test_gradients_of_gradients_are_slopes() -> None:
    """patches and fold are each other's transpose; squares between them make the gradient depend on x."""

    def loss(x: engine.Tensor) -> engine.Tensor:
        matrix = engine.patches(x, (3, 2), 2, 1)
        images = engine.fold(matrix * matrix, (2, 4, 5, 2), (3, 2), 2, 1)
        return (images * images).sum()

    x = engine.from_numpy(draw(2, 4, 5, 2, dtype=np.float64), requires_grad=True)
    loss(x).backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), slopes(loss, x.numpy()), rtol=1e-6, atol=1e-6)


def test_a_captured_convolution_takes_the_same_steps() -> None:
    images, labels = draw(20, 8, 8, 1), np.arange(20) % 4
    order = np.arange(40).reshape(5, 8) % 20

    def made() -> Any:
        weights = [
            engine.from_numpy(draw(*size) * np.float32(0.3), requires_grad=True) for size in ((9, 4), (36, 4), (16, 4))
        ]
        x_, y_ = engine.from_numpy(images), engine.from_numpy(labels)

        def step(rows: engine.Tensor) -> engine.Tensor:
            x = engine.take_rows(x_, rows)
            for weight in weights[:2]:
                x = engine.linear_relu(engine.patches(x, 3, 2, 1), weight).reshape(
                    8, x.shape[1] // 2, x.shape[1] // 2, 4
                )
            loss: engine.Tensor = engine.cross_entropy(
                engine.linear(x.reshape(8, -1), weights[2]), engine.take_rows(y_, rows)
            )
            loss.backward()
            with engine.no_grad():
                for weight in weights:
                    assert weight.grad is not None
                    engine.sgd_(weight, engine.unit(weight.grad), None, 0.1)
                    weight.grad = None
            return loss

        return step, weights

    step, weights = made()
    eager = [step(engine.from_numpy(rows)).item() for rows in order]
    captured, others = made()
    losses = engine.capture(captured, engine.empty((8,), np.int64)).run(order).numpy()
    assert losses.tolist() == eager
    assert losses[-1] < losses[0]
    for one, other in zip(weights, others, strict=True):
        assert one.numpy().tobytes() == other.numpy().tobytes()


@pytest.mark.parametrize("shape", [(1,), (15,), (16,), (33, 7), (0,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 1e-44], ids=str)
def test_unit_is_the_rounded_quotient(shape: tuple[int, ...], scale: float) -> None:
    x = (draw(*shape) * np.float64(scale)).astype(np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).sum()) if wide.any() else wide
    found = engine.unit(engine.from_numpy(x)).numpy()
    # The sum's order and the reciprocal are an ulp of float64: a tie of float32 may fall to either side.
    np.testing.assert_allclose(found, expected, rtol=2.0**-23, atol=2.0**-149)
    np.testing.assert_allclose(engine.unit(engine.from_numpy(wide)).numpy(), expected, rtol=1e-14)


def test_unit_of_special_numbers() -> None:
    def of(*values: float) -> list[float]:
        found: list[float] = engine.unit(engine.from_numpy(np.array(values, np.float32))).numpy().tolist()
        return found

    assert of(0, -0.0, 0) == [0, 0, 0]
    assert of(3, -4) == pytest.approx([0.6, -0.8])
    assert np.isnan(of(1, np.nan)).all()
    assert np.isnan(of(1, np.inf)).tolist() == [False, True]
    assert of(1, np.inf)[0] == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_runs_are_slices(threads: int) -> None:
    torch.set_num_threads(threads)
    x = draw(90, 28)
    flat, starts = x.ravel(), np.array([0, 1, 29, 28 * 89, 0, *range(60)])
    found = engine.take_runs(engine.from_numpy(x), engine.from_numpy(starts), 28)
    assert found.numpy().tobytes() == np.stack([flat[one : one + 28] for one in starts]).tobytes()
    long = engine.take_runs(engine.from_numpy(x), engine.from_numpy(starts[5:]), 2000).numpy()
    assert long.tobytes() == np.stack([flat[one : one + 2000] for one in starts[5:]]).tobytes()


IMAGES = engine.zeros((2, 4, 4, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: engine.patches(engine.zeros((4, 4)), 2), r"takes images \[N, H, W, C\]; got a shape \[4, 4\]"),
        (lambda: engine.patches(IMAGES, 5), "a window of 5 x 5 is larger than 4 x 4 pixels with padding 0; pad more"),
        (lambda: engine.patches(IMAGES, (1, 6), 1, 0), "a window of 1 x 6 is larger"),
        (lambda: engine.patches(IMAGES, 0), "a window and a stride from 1 and a padding from 0; got 0 x 0, 1 and 0"),
        (lambda: engine.patches(IMAGES, 2, 0), "got 2 x 2, 0 and 0"),
        (lambda: engine.patches(IMAGES, 2, 1, -1), "got 2 x 2, 1 and -1"),
        (lambda: engine.patches(IMAGES, (1, 2, 3)), r"a window is one number or \(rows, columns\); got \(1, 2, 3\)"),
        (lambda: engine.patches(IMAGES, 2.5), r"a window is one number or \(rows, columns\); got 2.5"),
        (
            lambda: engine.fold(engine.zeros((18, 11)), (2, 4, 4, 3), 2),
            r"images \[2, 4, 4, 3\] of a matrix \[18, 12\]; got \[18, 11\]",
        ),
        (lambda: engine.fold(engine.zeros((18, 12)), (2, 4, 4), 2), r"takes images \[N, H, W, C\]"),
        (
            lambda: engine.take_runs(engine.zeros((9,)), engine.from_numpy(np.array([0, 7])), 3),
            "start 1 is 7, and a run of 3 begins from 0 to 6",
        ),
        (lambda: engine.take_runs(engine.zeros((9,)), engine.from_numpy(np.array([-1])), 3), "start 0 is -1"),
        (lambda: engine.take_runs(engine.zeros((9,)), engine.zeros((2,)), 3), "contiguous int64 starts"),
        (
            lambda: engine.take_runs(engine.zeros((9,), np.int64), engine.zeros((2,), np.int64), 3),
            "takes float32 numbers",
        ),
        (lambda: engine.unit(engine.zeros((2,), np.int64)), "takes floating-point numbers; got int64"),
        (
            lambda: engine.unit(engine.from_numpy(np.ones(2, np.float32), requires_grad=True)),
            "octavo::unit has no gradient",
        ),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_cannot_be_captured_says_so() -> None:
    for call in (
        lambda: engine.patches(engine.zeros((1, 4, 4, 1), np.int64), 2),
        lambda: engine.fold(engine.empty((9, 4), np.float64), (1, 4, 4, 1), 2),
    ):
        with pytest.raises(RuntimeError, match="while a step is captured"):
            engine.capture(lambda call=call: call())
