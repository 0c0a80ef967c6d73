"""The engine's tensor: memory shared with NumPy, torch and JAX, views, NumPy's rules of dtypes, and the pool it comes from."""

import gc
import itertools
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo import engine
from octavo.engine.storage import Pool, using
from octavo.engine.tensor import DTYPES

Array = npt.NDArray[Any]
FLOATS = [dtype for dtype in DTYPES if dtype.kind == "f"]


def numbers(*shape: int, dtype: Any = np.float32) -> Array:
    return np.arange(1, 1 + int(np.prod(shape))).reshape(shape).astype(dtype)


def strided(name: str) -> Array:
    """A writable array that is laid out in that way."""
    x = numbers(6, 8)
    match name:
        case "rows reversed":
            return x[::-1]
        case "both reversed, in steps":
            return x[::-2, ::-3]
        case "turned":
            return x.T
        case "one row everywhere":
            return np.lib.stride_tricks.as_strided(x[2], (5, 8), (0, 4))
        case "a number":
            return x[3:4, 5:6].reshape(())
        case "no rows":
            return x[:0]
        case "no columns, in steps":
            return x[::2, 8:]
        case _:
            return numbers(2, 1, 3, 1, 2)[:, :, ::-1]


LAYOUTS = (
    "rows reversed",
    "both reversed, in steps",
    "turned",
    "one row everywhere",
    "a number",
    "no rows",
    "no columns, in steps",
    "five dimensions",
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_numpy_shares_memory_both_ways(dtype: np.dtype[Any]) -> None:
    array = numbers(3, 4, dtype=dtype)
    x = engine.from_numpy(array)
    array[1, 2] = 0
    assert x[1, 2].item() == 0
    x.numpy()[2, 3] = 0
    assert array[2, 3] == 0
    assert x.address == array.ctypes.data
    assert (x.shape, x.dtype, x.device) == ((3, 4), dtype, engine.Device.CPU)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_are_taken_as_they_are(layout: str) -> None:
    array = strided(layout)
    x = engine.from_numpy(array)
    assert (x.shape, x.ndim, x.size) == (array.shape, array.ndim, array.size)
    assert x.strides == tuple(step // array.itemsize for step in array.strides)
    # The view through the tensor's own description of its memory, not the array that it was made from.
    seen = x.detach().numpy()
    np.testing.assert_array_equal(seen, array)
    assert seen.shape == array.shape
    if array.size:
        seen[...] = -seen[...] if layout != "one row everywhere" else 7
        np.testing.assert_array_equal(seen, array)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_read_any_strides(layout: str) -> None:
    array = strided(layout)
    x = engine.from_numpy(array)
    np.testing.assert_array_equal((x + x).numpy(), array + array)
    np.testing.assert_array_equal(engine.relu(-x).numpy(), np.zeros_like(array))
    np.testing.assert_array_equal(
        x.reshape(-1).numpy() if x.size else x.numpy(), array.reshape(-1) if x.size else array
    )
    np.testing.assert_array_equal(x.T.numpy(), array.T)
    assert (x * 2).is_contiguous


def test_is_contiguous_is_whether_elements_follow_each_other() -> None:
    x = engine.from_numpy(numbers(4, 6))
    assert x.is_contiguous
    assert x[1:3].is_contiguous
    assert not x[:, :3].is_contiguous
    assert not x[::2].is_contiguous
    assert not x.T.is_contiguous
    assert x[:0].T.is_contiguous


def test_dlpack_with_numpy_shares_memory_both_ways() -> None:
    x = engine.from_numpy(numbers(3, 4))
    there = np.from_dlpack(x[:, ::2])
    x.numpy()[1, 2] = 99
    assert there[1, 1] == 99
    back = engine.from_dlpack(numbers(2, 3).T)
    assert (back.shape, back.strides) == ((3, 2), (1, 3))
    array = numbers(5)
    assert engine.from_dlpack(array).address == array.ctypes.data


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dlpack_with_torch_shares_memory_both_ways(dtype: np.dtype[Any]) -> None:
    x = engine.from_numpy(numbers(3, 4, dtype=dtype))
    there = torch.from_dlpack(x.T)
    assert there.data_ptr() == x.address
    assert there.stride() == (1, 4)
    there[1, 2] = 0
    assert x[2, 1].item() == 0
    source = torch.from_numpy(numbers(3, 4, dtype=dtype))[:, 1:]
    back = engine.from_dlpack(source)
    assert back.address == source.data_ptr()
    assert back.strides == source.stride()
    np.testing.assert_array_equal(back.numpy(), source.numpy())


def test_dlpack_with_jax_gives_it_the_memory_and_copies_what_it_lends() -> None:
    aligned = engine.zeros((64,))  # JAX copies memory that does not start a cache line
    there = jax.dlpack.from_dlpack(aligned)
    assert there.unsafe_buffer_pointer() == aligned.address
    source = jax.numpy.arange(6.0).reshape(2, 3)
    back = engine.from_dlpack(source)
    np.testing.assert_array_equal(back.numpy(), np.arange(6.0, dtype=np.float32).reshape(2, 3))
    back.numpy()[...] = 0
    np.testing.assert_array_equal(np.asarray(source).ravel(), np.arange(6))


def test_numpy_takes_a_tensor_for_an_array() -> None:
    x = engine.from_numpy(numbers(2, 3))
    assert np.shares_memory(np.asarray(x), x.numpy())
    assert not np.shares_memory(np.array(x), x.numpy())
    assert np.asarray(x, np.float64).dtype == np.float64
    with pytest.raises(TypeError, match=r"octavo::add: left is a Tensor; got ndarray: wrap it with engine\.from_numpy"):
        numbers(2, 3) + x


def test_views_share_memory_and_its_version() -> None:
    x = engine.from_numpy(numbers(4, 6))
    views = [x.T, x[1], x[1, 2], x[:, None, ::-2], x.reshape(2, 12), x.permute(1, 0)[2:], x.detach(), x[..., 5]]
    engine.copy_(x, engine.zeros((4, 6)))
    assert all(view.version == x.version == 1 for view in views)
    assert not any(view.numpy().any() for view in views)
    engine.copy_(views[0][2:4], engine.full((2, 4), 5))
    assert x.version == views[3].version == 2
    assert x.numpy()[:, 2:4].tolist() == [[5, 5]] * 4
    assert not x.numpy()[:, :2].any()
    assert x.reshape(4, 6).storage is x.storage
    assert x.T.reshape(24).storage is not x.storage


KEYS: tuple[Any, ...] = (
    1,
    -1,
    np.int64(2),
    (1, 2),
    (0, 1, 2),
    ...,
    (..., 2),
    (1, ..., None),
    None,
    slice(None, None, -1),
    slice(1, 1),
    (slice(None), slice(4, None, -2), slice(1, 3)),
    (slice(-2, None), None, 0),
)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indexing_is_numpys(key: Any) -> None:
    array = numbers(3, 5, 4)
    for source in (array, array[::-1, ::2, ::-1]):
        x = engine.from_numpy(source)
        found = x[key]
        np.testing.assert_array_equal(found.numpy(), source[key])
        assert found.shape == np.shape(source[key])
        assert found.storage is x.storage


def test_a_tensor_is_walked_row_by_row() -> None:
    rows = list(engine.from_numpy(numbers(3, 2)))
    assert [row.numpy().tolist() for row in rows] == [[1, 2], [3, 4], [5, 6]]
    assert len(engine.from_numpy(numbers(3, 2))) == 3
    with pytest.raises(TypeError, match="without dimensions"):
        len(engine.zeros(()))


UFUNCS: dict[str, tuple[Callable[[Any, Any], Any], Any]] = {
    "add": (engine.add, np.add),
    "subtract": (engine.subtract, np.subtract),
    "multiply": (engine.multiply, np.multiply),
    "divide": (engine.divide, np.divide),
}


@pytest.mark.parametrize("left", DTYPES, ids=str)
@pytest.mark.parametrize("right", DTYPES, ids=str)
@pytest.mark.parametrize("name", UFUNCS)
def test_dtypes_meet_as_in_numpy(name: str, left: np.dtype[Any], right: np.dtype[Any]) -> None:
    ours, theirs = UFUNCS[name]
    a, b = numbers(3, dtype=left), numbers(2, 1, dtype=right)
    try:
        expected = theirs(a, b)
    except TypeError:
        with pytest.raises(TypeError):
            ours(engine.from_numpy(a), engine.from_numpy(b))
        return
    found = ours(engine.from_numpy(a), engine.from_numpy(b))
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [True, 2, 2.5])
def test_a_python_number_meets_a_dtype_as_in_numpy(number: Any, dtype: np.dtype[Any]) -> None:
    array = numbers(3, dtype=dtype)
    for found, expected in (
        (engine.from_numpy(array) * number, array * number),
        (number + engine.from_numpy(array), number + array),
        (number / engine.from_numpy(array), number / array),
    ):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found.numpy(), expected)


def test_a_float64_of_numpy_does_not_widen_float32() -> None:
    x = engine.from_numpy(numbers(3))
    assert (x * np.sqrt(2)).dtype == (np.sqrt(2) * x).dtype == np.float32


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != np.bool_], ids=str)
def test_minus_keeps_the_dtype(dtype: np.dtype[Any]) -> None:
    array = numbers(3, dtype=dtype)
    found = (-engine.from_numpy(array)).numpy()
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, -array)
    assert np.signbit((-engine.zeros((2,))).numpy()).all()


def test_fills_and_shapes_without_elements() -> None:
    np.testing.assert_array_equal(engine.full((2, 3), 0.1).numpy(), np.full((2, 3), 0.1, np.float32))
    np.testing.assert_array_equal(engine.full((2,), -3, np.int64).numpy(), [-3, -3])
    assert engine.zeros((), np.float64).item() == 0.0
    nothing = engine.zeros((3, 0, 2))
    assert (nothing.shape, nothing.size, nothing.is_contiguous) == ((3, 0, 2), 0, True)
    assert (nothing + 1).shape == (3, 0, 2)
    assert nothing.reshape(0).shape == (0,)
    assert nothing.sum().item() == 0.0
    assert nothing.sum(1).numpy().tolist() == [[0, 0]] * 3


def test_it_prints_as_numbers() -> None:
    x = engine.from_numpy(np.array([1.5, np.nan], np.float32), requires_grad=True)
    assert repr(x) == "Tensor([1.5, nan], dtype=float32, requires_grad=True)"
    assert float(x[0]) == 1.5
    assert bool(engine.full((1, 1), 3))


@given(st.lists(st.tuples(st.integers(1, 3000), st.booleans()), max_size=60))
def test_the_pool_counts_what_it_gave_and_gives_it_again(requests: list[tuple[int, bool]]) -> None:
    own, held = Pool(engine.Device.CPU), []
    sizes: list[int] = []
    peak = 0
    for nbytes, keep in requests:
        held.append(own.take(nbytes))
        sizes.append(nbytes + -nbytes % 64)
        assert held[-1].nbytes == sizes[-1]
        assert held[-1].address % 64 == 0
        peak = max(peak, sum(sizes))
        if not keep:
            held.pop(), sizes.pop()
        assert own.in_use == sum(sizes)
    places = sorted((one.address, one.nbytes) for one in held)
    assert all(first + size <= second for (first, size), (second, _) in itertools.pairwise(places))
    assert own.peak == peak
    taken = own.allocated
    held.clear()
    assert own.in_use == 0
    held.extend(own.take(nbytes) for nbytes in sizes)
    assert own.allocated == taken
    own.reset_peak()
    assert own.peak == own.in_use == sum(sizes)


def test_inside_using_tensors_come_from_that_pool() -> None:
    own, before = Pool(engine.Device.CPU), engine.pool().allocated
    with using(own):
        assert engine.pool() is own
        x = engine.zeros((100,))
        assert own.in_use == 448
    assert engine.pool() is not own
    assert engine.pool().allocated == before
    del x
    assert own.in_use == 0


def train(steps: int, seen: Callable[[], None]) -> None:
    """A perceptron of two layers on random numbers."""
    draw = np.random.Generator(np.random.Philox(3))
    sizes = ((20, 30), (30,), (30, 10), (10,))
    weights = [engine.from_numpy(draw.normal(0, 0.3, size).astype(np.float32), requires_grad=True) for size in sizes]
    speeds = [engine.zeros(weight.shape) for weight in weights]
    data = engine.from_numpy(draw.normal(0, 1, (256, 20)).astype(np.float32))
    labels = engine.from_numpy(draw.integers(0, 10, 256))
    for step in range(steps):
        rows = engine.from_numpy(draw.permutation(256)[:32])
        hidden = engine.linear_relu(engine.take_rows(data, rows), weights[0], weights[1])
        loss = engine.cross_entropy(
            engine.linear(hidden, weights[2], weights[3]), labels[32 * (step % 8) : 32 * (step % 8) + 32]
        )
        loss.backward()
        with engine.no_grad():
            for weight, speed in zip(weights, speeds, strict=True):
                assert weight.grad is not None
                engine.sgd_(weight, weight.grad, speed, 0.1, momentum=0.9, decay=1e-4)
                weight.grad = None
        seen()


def test_a_training_loop_allocates_nothing_after_its_first_step() -> None:
    own = Pool(engine.Device.CPU)
    counts: list[tuple[int, int, int]] = []
    gc.disable()  # nothing of the engine waits for the collector
    try:
        with using(own):
            train(12, lambda: counts.append((own.allocated, own.in_use, own.peak)))
    finally:
        gc.enable()
    assert len(set(counts[1:])) == 1
    assert counts[-1][0] == counts[0][0]
    assert own.in_use == 0


def test_an_array_keeps_memory_that_its_tensor_left() -> None:
    own = Pool(engine.Device.CPU)
    with using(own):
        x = engine.full((16,), 3)
        kept = x.numpy()[4:8]
        lent = np.from_dlpack(engine.full((16,), 4))
        passed = torch.from_dlpack(engine.full((16,), 5))
        del x
        for _ in range(8):
            engine.zeros((16,))
        assert kept.tolist() == [3] * 4
        assert lent.tolist() == [4] * 16
        assert passed.tolist() == [5] * 16
        assert own.in_use == 3 * 64
        del kept, lent, passed
        assert own.in_use == 0


def test_a_view_keeps_the_array_it_looks_at() -> None:
    class Owner(np.ndarray[Any, Any]):
        pass

    array = numbers(4, 4).view(Owner)
    alive = weakref.ref(array)
    row = engine.from_numpy(array)[2]
    del array
    assert alive() is not None
    assert row.numpy().tolist() == [9, 10, 11, 12]
    del row
    assert alive() is None


def test_a_tensor_dies_when_it_is_left() -> None:
    x = engine.zeros((4,))
    x.numpy()
    alive = weakref.ref(x)
    del x
    assert alive() is None


def test_the_engine_imports_no_framework() -> None:
    program = (
        "import sys, numpy as np\n"
        "from octavo import engine\n"
        "x = engine.from_numpy(np.ones((2, 3), np.float32), requires_grad=True)\n"
        "engine.cross_entropy(engine.linear_relu(x, x.T), engine.from_numpy(np.array([0, 1]))).backward()\n"
        "print(x.grad.shape, *[name for name in ('torch', 'jax', 'triton', 'cupy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 3)"
