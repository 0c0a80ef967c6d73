"""Gradients: every operator's by numerical differentiation and as torch's, what the tape adds up and keeps, and operators of one's own."""

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from octavo import engine
from octavo.engine.autograd import enabled
from octavo.engine.storage import Pool, using
from octavo.engine.tensor import operators

Array = npt.NDArray[Any]
functional = torch.nn.functional
LABELS = np.array([2, 0, 4, 4, 1, 3])


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.Generator(np.random.Philox((seed, *shape))).normal(0, 1, shape)


def positive(*shape: int, seed: int = 0) -> Array:
    return np.asarray(np.abs(draw(*shape, seed=seed)) + 0.5)


@dataclass
class Case:
    """One function, of the engine's tensors and of torch's, and where it is differentiated."""

    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    inputs: tuple[Array, ...]


def pairs(name: str, ours: Any, theirs: Any, *, above: bool = False) -> Iterator[Case]:
    """A binary operator on shapes that meet in every way."""
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((3, 4), (3, 4)),
        ((3, 4), (4,)),
        ((3, 1), (1, 4)),
        ((2, 3, 4), (3, 1)),
        ((), (3,)),
        ((2, 3), ()),
        ((1, 1), (2, 2)),
        ((0, 2), (2,)),
    ]
    for left, right in shapes:
        divisor = positive(*right, seed=1) if above else draw(*right, seed=1)
        yield Case(f"{name} {left} {right}", ours, theirs, (draw(*left), divisor))


CASES = [
    *pairs("add", engine.add, torch.add),
    *pairs("subtract", engine.subtract, torch.sub),
    *pairs("multiply", engine.multiply, torch.mul),
    *pairs("divide", engine.divide, torch.div, above=True),
    Case("minus", lambda x: -x, torch.neg, (draw(3),)),
    Case("numbers", lambda x: 2 / (1 - 3 * x + 20), lambda x: 2 / (1 - 3 * x + 20), (draw(3, 2),)),
    Case("exp", engine.exp, torch.exp, (draw(3, 4),)),
    Case("log", engine.log, torch.log, (positive(3, 4),)),
    Case("relu", engine.relu, torch.relu, (np.array([[-1.0, 2, -3], [4, 0.5, -0.5]]),)),
    Case("relu of a turned view", lambda x: engine.relu(x.T), lambda x: torch.relu(x.T), (draw(3, 4),)),
    Case("matmul", engine.matmul, torch.matmul, (draw(3, 5), draw(5, 2))),
    Case(
        "matmul of views",
        lambda a, b: a.T @ b[::2],
        lambda a, b: a.T @ b[torch.tensor([0, 2, 4])],
        (draw(3, 4), draw(5, 2)),
    ),
    Case("matmul in batches", engine.matmul, torch.matmul, (draw(2, 1, 3, 5), draw(4, 5, 2))),
    Case("matmul of one by many", engine.matmul, torch.matmul, (draw(3, 5), draw(2, 5, 2))),
    Case("linear", engine.linear, lambda x, w, b: functional.linear(x, w.T, b), (draw(4, 3), draw(3, 5), draw(5))),
    Case("linear without a bias", engine.linear, lambda x, w: functional.linear(x, w.T), (draw(4, 3), draw(3, 5))),
    Case(
        "linear of tokens",
        engine.linear,
        lambda x, w, b: functional.linear(x, w.T, b),
        (draw(2, 3, 4), draw(4, 5), draw(5)),
    ),
    Case(
        "linear of a turned view",
        lambda x, w, b: engine.linear(x.T, w.T, b),
        lambda x, w, b: functional.linear(x.T, w, b),
        (draw(3, 4), draw(5, 3), draw(5)),
    ),
    Case(
        "linear_relu",
        engine.linear_relu,
        lambda x, w, b: torch.relu(functional.linear(x, w.T, b)),
        (draw(2, 4, 3), draw(3, 5), draw(5)),
    ),
    Case("sum", lambda x: x.sum(), torch.sum, (draw(3, 4),)),
    *(
        Case(f"sum along {axis}", lambda x, axis=axis: x.sum(axis), lambda x, axis=axis: x.sum(axis), (draw(2, 3, 4),))
        for axis in (0, 1, 2, -1, -3)
    ),
    Case("softmax", engine.softmax, lambda x: torch.softmax(x, -1), (draw(2, 3, 4),)),
    Case("log_softmax", engine.log_softmax, lambda x: torch.log_softmax(x, -1), (draw(5, 4),)),
    Case(
        "cross_entropy",
        lambda x: engine.cross_entropy(x, engine.from_numpy(LABELS)),
        lambda x: functional.cross_entropy(x, torch.from_numpy(LABELS)),
        (draw(6, 5),),
    ),
    Case(
        "cross_entropy, scaled",
        lambda x: engine.cross_entropy(x, engine.from_numpy(LABELS)) * -3.0,
        lambda x: functional.cross_entropy(x, torch.from_numpy(LABELS)) * -3.0,
        (draw(6, 5),),
    ),
    Case("permute", lambda x: x.permute(2, 0, 1) * 1.5, lambda x: x.permute(2, 0, 1) * 1.5, (draw(2, 3, 4),)),
    Case("reshape", lambda x: x.reshape(6, -1), lambda x: x.reshape(6, -1), (draw(2, 3, 4),)),
    Case("reshape of a turned view", lambda x: x.T.reshape(6), lambda x: x.T.reshape(6), (draw(2, 3),)),
    Case("index", lambda x: x[1], lambda x: x[1], (draw(3, 4),)),
    Case("index of one", lambda x: x[-1, 2], lambda x: x[-1, 2], (draw(3, 4),)),
    Case("index in steps", lambda x: x[1:, None, ::2], lambda x: x[1:, None, ::2], (draw(3, 4),)),
    Case("index of a view", lambda x: x.T[1:3][0], lambda x: x.T[1:3][0], (draw(3, 4),)),
    *(
        Case(
            f"patches {window}, stride {stride}, padding {padding}",
            lambda x, options=(window, stride, padding): engine.patches(x, *options),
            lambda x, options=(window, stride, padding): unfolded(x, *options),
            (draw(2, 5, 6, 3),),
        )
        for window, stride, padding in (((2, 3), 1, 0), ((3, 3), 2, 1), ((1, 1), 1, 2), ((5, 6), 1, 0))
    ),
    Case(
        "fold",
        lambda x: engine.fold(x, (2, 5, 6, 3), (3, 2), 2, 1),
        lambda x: folded(x, (2, 5, 6, 3), (3, 2), 2, 1),
        (draw(2 * 3 * 4, 3 * 2 * 3),),
    ),
    Case("used twice", lambda x: x * x + x, lambda x: x * x + x, (draw(3),)),
    Case("beside itself", lambda x: x @ x + x.T, lambda x: x @ x + x.T, (draw(3, 3),)),
    Case("a diamond", lambda x: diamond(x, engine.exp), lambda x: diamond(x, torch.exp), (draw(2, 3),)),
    Case(
        "attention",
        lambda q, k, v: engine.softmax(q @ k.permute(0, 2, 1) * 0.5) @ v,
        lambda q, k, v: torch.softmax(q @ k.permute(0, 2, 1) * 0.5, -1) @ v,
        (draw(2, 3, 4), draw(2, 5, 4), draw(2, 5, 4, seed=1)),
    ),
]


def diamond(x: Any, exp: Any) -> Any:
    """Paths of several lengths from one tensor."""
    y = exp(x * 0.5)
    z = y * x
    return (y + z * y) / (x * x + 1) - z.sum()


def unfolded(x: torch.Tensor, window: tuple[int, int], stride: int, padding: int) -> torch.Tensor:
    """Images [N, H, W, C] as torch's windows, in the engine's order."""
    columns = functional.unfold(x.permute(0, 3, 1, 2), window, stride=stride, padding=padding)
    return columns.reshape(x.shape[0], x.shape[3], -1, columns.shape[2]).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)


def folded(
    matrix: torch.Tensor, shape: tuple[int, ...], window: tuple[int, int], stride: int, padding: int
) -> torch.Tensor:
    """Its transpose, by torch."""
    columns = matrix.reshape(shape[0], -1, window[0] * window[1], shape[3]).permute(0, 3, 2, 1).flatten(1, 2)
    return functional.fold(columns, shape[1:3], window, stride=stride, padding=padding).permute(0, 2, 3, 1)


def by_name(case: Case) -> str:
    return case.name


def gradients(case: Case, dtype: Any) -> tuple[Array, Array, list[Array]]:
    """(outcome, the gradient it is given, the gradients of the inputs), by the engine."""
    given = [engine.from_numpy(x.astype(dtype), requires_grad=True) for x in case.inputs]
    out = case.ours(*given)
    upstream = draw(*out.shape, seed=9).astype(dtype)
    out.backward(engine.from_numpy(upstream))
    found = []
    for one in given:
        assert one.grad is not None
        assert (one.grad.shape, one.grad.dtype) == (one.shape, one.dtype)
        found.append(one.grad.numpy())
    return out.numpy(), upstream, found


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_gradients_are_the_slopes(case: Case) -> None:
    _, upstream, found = gradients(case, np.float64)
    step = 1e-6
    for number, x in enumerate(case.inputs):
        slopes = np.zeros_like(x)
        for place in np.ndindex(*x.shape):
            ends = []
            for sign in (1, -1):
                moved = [one.copy() for one in case.inputs]
                moved[number][place] += sign * step
                ends.append((case.ours(*(engine.from_numpy(one) for one in moved)).numpy() * upstream).sum())
            slopes[place] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(found[number], slopes, rtol=1e-7, atol=2e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 2e-6)], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_gradients_are_torchs(case: Case, dtype: Any, tolerance: float) -> None:
    out, upstream, found = gradients(case, dtype)
    given = [torch.from_numpy(x.astype(dtype)).requires_grad_() for x in case.inputs]
    expected = case.theirs(*given)
    expected.backward(torch.from_numpy(upstream))
    np.testing.assert_allclose(out, expected.detach().numpy(), rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(found, given, strict=True):
        assert theirs.grad is not None
        scale = max(1.0, float(np.abs(theirs.grad.numpy()).max(initial=0)))
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=tolerance, atol=4 * tolerance * scale)


def taken(node: Any) -> set[str]:
    """The names of the operators that made a tensor."""
    return {node.operator.name}.union(*(taken(edge[0]) for edge in node.edges if edge is not None and edge[1] >= 0))


def test_every_operator_with_a_gradient_is_among_the_cases() -> None:
    called: set[str] = set()
    for case in CASES:
        out = case.ours(*(engine.from_numpy(x, requires_grad=True) for x in case.inputs))
        called |= taken(out.node[0])
    assert called == {
        name for name, one in operators.items() if name.startswith("octavo::") and one.backward is not None
    }


def leaf(*values: float, dtype: Any = np.float32) -> engine.Tensor:
    return engine.from_numpy(np.array(values, dtype), requires_grad=True)


def grad(x: engine.Tensor) -> Any:
    assert x.grad is not None
    return x.grad.numpy().tolist()


def test_a_gradient_of_one_number_starts_from_one() -> None:
    x = leaf(1, 2, 3)
    (x * x).sum().backward()
    assert grad(x) == [2, 4, 6]
    y = leaf(3)
    (y * y).backward()
    assert grad(y) == [6]


def test_passes_add_up_until_grad_is_cleared() -> None:
    x = leaf(1, 2)
    for times in (1, 2, 3):
        (x * 3.0).sum().backward()
        assert grad(x) == [3 * times] * 2
    x.grad = None
    (x * x).sum().backward()
    assert grad(x) == [2, 4]


def test_a_retained_graph_may_be_walked_again() -> None:
    x = leaf(1, 2)
    y = engine.exp(x) * x
    loss = y.sum()
    loss.backward(retain=True)
    once = np.array(grad(x))
    loss.backward(retain=True)
    np.testing.assert_array_equal(grad(x), 2 * once)
    y.backward(engine.full((2,), 1))
    np.testing.assert_allclose(grad(x), 3 * once, rtol=1e-6)
    with pytest.raises(
        RuntimeError, match=r"octavo::multiply: its saved tensors are gone.*give the first call retain=True"
    ):
        loss.backward()


def test_a_pass_from_the_middle_leaves_the_rest() -> None:
    x = leaf(1, 2)
    y = x * 2.0
    z = y * y
    y.backward(engine.full((2,), 5), retain=True)
    assert grad(x) == [10, 10]
    z.backward(engine.full((2,), 1))
    assert grad(x) == [10 + 8, 10 + 16]


def test_only_tensors_that_require_a_gradient_have_one() -> None:
    x, weight, other = leaf(1, 2), leaf(3, 4), engine.from_numpy(np.array([5.0, 6.0], np.float32))
    (x * other + weight.detach() * x).sum().backward()
    assert grad(x) == [8, 10]
    assert other.grad is None
    assert weight.grad is None
    assert not weight.detach().requires_grad


def test_nothing_is_recorded_inside_no_grad() -> None:
    x = leaf(1, 2)
    with engine.no_grad():
        assert not enabled()
        y = x * 2.0
        with engine.no_grad():
            pass
        assert not enabled()
    assert enabled()
    assert y.node is None
    z = (y * x).sum()
    z.backward()
    assert grad(x) == [2, 4]
    with pytest.raises(KeyError), engine.no_grad():
        raise KeyError
    assert enabled()


def test_gradients_are_not_themselves_recorded() -> None:
    x = leaf(1, 2)
    (x * x).sum().backward()
    assert x.grad is not None
    assert x.grad.node is None
    assert not x.grad.requires_grad


def test_a_gradient_has_the_dtype_of_its_tensor() -> None:
    x, y = leaf(1, 2), leaf(3, 4, dtype=np.float64)
    out = x * y + engine.relu(x)
    assert out.dtype == np.float64
    out.sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert (x.grad.dtype, y.grad.dtype) == (np.float32, np.float64)
    assert grad(x) == [4, 5]
    assert grad(y) == [1, 2]
    logits = engine.from_numpy(draw(6, 5).astype(np.float32), requires_grad=True)
    (engine.cross_entropy(logits, engine.from_numpy(LABELS)) * engine.full((), 2, np.float64)).backward()
    theirs = torch.from_numpy(logits.numpy()).double().requires_grad_()
    (functional.cross_entropy(theirs, torch.from_numpy(LABELS)) * 2).backward()
    assert theirs.grad is not None
    np.testing.assert_allclose(grad(logits), theirs.grad.numpy(), rtol=0, atol=1e-7)


def test_dividing_by_small_and_large_numbers_keeps_the_gradient() -> None:
    x, y = leaf(1e-25, 1e25), leaf(1e-25, 1e25)
    (x / y).sum().backward()
    np.testing.assert_allclose(grad(y), [-1e25, -1e-25], rtol=1e-6)


def test_a_long_chain_is_walked_and_left() -> None:
    x = leaf(1)
    y = x
    for _ in range(5_000):
        y = y + 1.0
    y.backward()
    assert grad(x) == [1]
    del y


def test_views_carry_gradients_to_what_they_look_at() -> None:
    x = engine.from_numpy(draw(4, 6), requires_grad=True)
    (x[1:3].T.reshape(12) * x.reshape(24)[:12]).sum().backward()
    theirs = torch.from_numpy(x.numpy()).requires_grad_()
    (theirs[1:3].T.reshape(12) * theirs.reshape(24)[:12]).sum().backward()
    assert theirs.grad is not None
    np.testing.assert_allclose(grad(x), theirs.grad.numpy(), rtol=1e-14)


def test_what_was_saved_is_freed_by_backward() -> None:
    own = Pool(engine.Device.CPU)
    gc.disable()  # the tape has no cycles
    try:
        with using(own):
            x = engine.from_numpy(draw(50, 60), requires_grad=True)
            hidden = engine.exp(x)
            alive = weakref.ref(hidden)
            loss = (engine.softmax(hidden * hidden) * hidden).sum()
            del hidden
            assert alive() is not None
            assert own.in_use >= 4 * x.size * 8
            loss.backward()
            assert alive() is None
            x.grad = None
            assert own.in_use == 64  # the loss
            # A tape that nobody walks goes with its outcome.
            loss = (engine.exp(x) * x).sum()
            del loss
            assert own.in_use == 0
    finally:
        gc.enable()


@pytest.fixture
def library() -> Iterator[engine.Library]:
    """A library whose operators are gone afterwards."""
    yield engine.Library("mine")
    for name in [name for name in operators if name.startswith("mine::")]:
        del operators[name]


def test_the_example_of_the_docstring_runs(library: engine.Library) -> None:
    library.define("scale(Tensor x, float by) -> Tensor")
    library.impl("scale", lambda x, by: engine.multiply(x, engine.full((), by)), device="cpu")
    engine.register(
        "mine::scale", lambda gradients, saved: (engine.multiply(gradients[0], engine.full((), saved[1])), None)
    )
    x = leaf(1, 2)
    found = engine.operator("mine::scale")(x, by=3.0)
    assert found.numpy().tolist() == [3, 6]
    found.sum().backward()
    assert grad(x) == [3, 3]


def test_an_operator_with_several_outputs(library: engine.Library) -> None:
    split = library.define("mine::parts(Tensor x, int at, Tensor? shift=None) -> (Tensor, Tensor)")
    seen: list[list[bool]] = []

    def parts(x: engine.Tensor, at: int, shift: engine.Tensor | None) -> tuple[engine.Tensor, engine.Tensor]:
        moved = x + (0.0 if shift is None else shift)
        return moved[:at] * 1.0, moved[at:] * 2.0

    def backward(gradients: Any, saved: Any) -> Any:
        x, at, shift = saved
        seen.append([one is None for one in gradients])
        whole = engine.zeros(x.shape)
        for part, gradient, factor in ((whole[:at], gradients[0], 1.0), (whole[at:], gradients[1], 2.0)):
            if gradient is not None:
                engine.copy_(part, gradient * factor)
        return whole, None, whole if shift is not None else None

    library.impl("parts", parts)
    engine.register(split, backward)
    x, shift = leaf(1, 2, 3), leaf(10, 20, 30)
    first, second = split(x, 2)
    assert (first.numpy().tolist(), second.numpy().tolist()) == ([1, 2], [6])
    second.sum().backward(retain=True)
    assert grad(x) == [0, 0, 2]
    (first.sum() * 5.0 + second.sum()).backward()
    assert grad(x) == [5, 5, 4]
    x.grad = None
    first, second = split(x, 1, shift=shift)
    (first * 3.0).sum().backward()
    assert grad(x) == grad(shift) == [3, 0, 0]
    assert seen == [[True, False], [False, False], [False, True]]


def test_a_gradient_may_be_none_where_nothing_flows(library: engine.Library) -> None:
    step = library.define("step(Tensor x, Tensor y) -> Tensor")
    library.impl(step.name, lambda x, y: engine.from_numpy((x.numpy() > 0) * y.numpy()))
    engine.register(step, lambda gradients, saved: (None, gradients[0]))
    x, y = leaf(1, -2), leaf(3, 4)
    step(x * 2.0, y).sum().backward()
    assert x.grad is None
    assert grad(y) == [1, 1]


def test_a_kernel_may_use_operators_that_have_no_gradient(library: engine.Library) -> None:
    hard = library.define("hard(Tensor x) -> Tensor")

    def kernel(x: engine.Tensor) -> engine.Tensor:
        assert not enabled()
        target = engine.zeros(x.shape)
        target.numpy()[np.arange(len(x)), engine.argmax(x).numpy()] = 1
        return target

    library.impl("hard", kernel)
    engine.register(hard, lambda gradients, saved: [gradients[0] * saved[1]], saves_outputs=True)
    x = engine.from_numpy(draw(3, 4).astype(np.float32), requires_grad=True)
    hard(x).sum().backward()
    np.testing.assert_array_equal(np.array(grad(x)).argmax(1), x.numpy().argmax(1))
    assert enabled()


def test_outputs_that_are_no_real_numbers_carry_no_gradient(library: engine.Library) -> None:
    ranked = library.define("ranked(Tensor x) -> (Tensor, Tensor)")
    library.impl(
        "ranked", lambda x: tuple(engine.from_numpy(one) for one in (np.sort(x.numpy()), np.argsort(x.numpy())))
    )
    engine.register(
        ranked,
        lambda gradients, saved: [engine.from_numpy(gradients[0].numpy()[np.argsort(saved[2].numpy())])],
        saves_outputs=True,
    )
    x = leaf(3, 1, 2)
    values, places = ranked(x)
    assert places.node is None
    (values * engine.from_numpy(np.array([10, 20, 30], np.float32))).sum().backward()
    assert grad(x) == [30, 10, 20]


def test_defaults_are_of_the_kind_they_are_given_for(library: engine.Library) -> None:
    made = library.define("f(Tensor x, int n=3, float by=2, bool up=True, Tensor? y=None, object how=None) -> Tensor")
    seen: list[Any] = []
    library.impl("f", lambda *given: seen.append(given[1:]) or given[0])
    made(engine.zeros((1,)))
    assert [(type(one), one) for one in seen[0]] == [
        (int, 3),
        (float, 2.0),
        (bool, True),
        (type(None), None),
        (type(None), None),
    ]
    made(engine.zeros((1,)), 7, how="so", up=False)
    assert seen[1] == (7, 2.0, False, None, "so")


def test_arguments_without_names_are_numbered(library: engine.Library) -> None:
    made = library.define("g(Tensor, Tensor) -> Tensor")
    library.impl("g", lambda a, b: a - b)
    assert [one.name for one in made.arguments] == ["argument_0", "argument_1"]
    assert made(argument_1=engine.full((), 1), argument_0=engine.full((), 5)).item() == 4


def test_a_training_run_is_torchs() -> None:
    sizes = [(12, 16), (16,), (16, 5), (5,)]
    start = [0.4 * draw(*size) for size in sizes]
    rows, labels = draw(40, 12), np.arange(40) % 5
    ours = [engine.from_numpy(one.copy(), requires_grad=True) for one in start]
    theirs = [torch.from_numpy(one.copy()).requires_grad_() for one in start]
    losses = []
    for _ in range(10):
        hidden = engine.linear_relu(engine.from_numpy(rows), ours[0], ours[1])
        loss = engine.cross_entropy(engine.linear(hidden, ours[2], ours[3]), engine.from_numpy(labels))
        loss.backward()
        out = torch.relu(torch.from_numpy(rows) @ theirs[0] + theirs[1]) @ theirs[2] + theirs[3]
        expected = functional.cross_entropy(out, torch.from_numpy(labels))
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        losses.append(loss.item())
        with engine.no_grad(), torch.no_grad():
            for one, other in zip(ours, theirs, strict=True):
                assert one.grad is not None
                assert other.grad is not None
                engine.copy_(one, one - one.grad * 0.5)
                other -= 0.5 * other.grad
                one.grad = other.grad = None
    assert all(later < sooner for sooner, later in itertools.pairwise(losses))
