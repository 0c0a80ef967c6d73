"""A captured step runs the same kernels on the same numbers as the step itself, without Python between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import octavo.engine as engine
from octavo.engine import Tensor
from octavo.kernels import threads
from octavo.recipes import current_scaling, delayed_scaling, mxfp8

rng = np.random.default_rng(7)
IMAGES = rng.random((96, 20), np.float32)
LABELS = rng.integers(0, 5, 96)
ORDER = rng.permutation(96).reshape(6, 16)
START = [rng.standard_normal(shape).astype(np.float32) * np.float32(0.3) for shape in ((20, 12), (12,), (12, 5), (5,))]

Step = Callable[..., Any]


def _manual() -> tuple[Step, list[Tensor]]:
    w1, b1, w2, b2 = weights = [engine.from_numpy(array.copy()) for array in START]
    images, labels = engine.from_numpy(IMAGES), engine.from_numpy(LABELS)

    def step(rows: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        x, y = engine.take_rows(images, rows), engine.take_rows(labels, rows)
        hidden = engine.linear_relu(x, w1, b1)
        logits = engine.linear(hidden, w2, b2)
        loss, grad_logits = engine.cross_entropy_both(logits, y)
        grad_hidden = engine.masked_matmul(grad_logits, w2.T, hidden)
        for weight, grad in (
            (w2, engine.matmul(hidden.T, grad_logits)),
            (b2, grad_logits.sum(0)),
            (w1, engine.matmul(x.T, grad_hidden)),
            (b1, grad_hidden.sum(0)),
        ):
            engine.sgd_(weight, grad, None, rate)
        return loss, engine.argmax(logits)

    return step, weights


def _automatic(recipe: Any) -> tuple[Step, list[Tensor]]:
    layers = [
        engine.Linear(*array.shape, recipe=recipe, weight=engine.from_numpy(array.copy())) for array in START[::2]
    ]
    weights = [parameter for layer in layers for parameter in layer.parameters()]
    velocities = [engine.zeros(weight.shape) for weight in weights]
    images, labels = engine.from_numpy(IMAGES), engine.from_numpy(LABELS)

    def step(rows: Tensor, rate: Tensor) -> Tensor:
        x, y = engine.take_rows(images, rows), engine.take_rows(labels, rows)
        loss = engine.cross_entropy(layers[1](engine.relu(layers[0](x))), y)
        loss.backward()
        engine.update_scales(*layers)
        with engine.no_grad():
            for weight, velocity in zip(weights, velocities, strict=True):
                engine.sgd_(weight, weight.grad, velocity, rate, momentum=0.9)
                weight.grad = None
        return loss

    return step, weights + [scale for layer in layers if layer.state for scale in layer.state.scales]


STEPS = {
    "manual": _manual,
    "autograd": lambda: _automatic(None),
    "delayed": lambda: _automatic(delayed_scaling(amax_history_len=3)),
    "current": lambda: _automatic(current_scaling()),
}
RATES = np.linspace(0.5, 0.1, len(ORDER), dtype=np.float32)[:, None]


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_a_graph_repeats_the_step_bit_for_bit(name: str, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count", lambda: lanes)
    step, state = STEPS[name]()
    expected = [step(engine.from_numpy(rows), engine.from_numpy(rate)) for rows, rate in zip(ORDER, RATES, strict=True)]
    again, own = STEPS[name]()
    graph = engine.capture(again, engine.from_numpy(ORDER[0]), engine.from_numpy(RATES[0]))
    found = graph.run(ORDER, RATES)
    for i, outputs in enumerate(zip(*[one if isinstance(one, tuple) else (one,) for one in expected], strict=True)):
        result = found[i] if isinstance(found, tuple) else found
        np.testing.assert_array_equal(result.array, np.stack([one.array for one in outputs]))
    for one, other in zip(state, own, strict=True):
        np.testing.assert_array_equal(one.array, other.array)


def test_capturing_runs_nothing() -> None:
    step, weights = _manual()
    before = [weight.array.copy() for weight in weights]
    graph = engine.capture(step, engine.from_numpy(ORDER[0]), engine.from_numpy(RATES[0]))
    for weight, array in zip(weights, before, strict=True):
        np.testing.assert_array_equal(weight.array, array)
    assert graph.kernels.count("gemm") == 5
    assert graph.kernels.count("sgd") == 4


def test_a_run_allocates_its_results_alone() -> None:
    step, _ = _automatic(delayed_scaling())
    graph = engine.capture(step, engine.from_numpy(ORDER[0]), engine.from_numpy(RATES[0]))
    graph.run(ORDER, RATES)
    before, memory = engine.pool().allocated, graph.memory
    graph.run(ORDER, RATES)
    assert engine.pool().allocated == before
    assert graph.memory == memory


def test_changes_by_a_run_are_counted() -> None:
    step, weights = _manual()
    graph = engine.capture(step, engine.from_numpy(ORDER[0]), engine.from_numpy(RATES[0]))
    versions = [weight.version for weight in weights]
    graph.run(ORDER, RATES)
    assert all(weight.version > version for weight, version in zip(weights, versions, strict=True))


def _with(change: Callable[[Tensor], Any]) -> Step:
    return lambda x: change(engine.relu(x))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (_with(lambda y: y.numpy()), "values are read while a step is captured"),
        (_with(lambda y: y.sum()), "this sum runs in NumPy"),
        (_with(engine.exp), "exp runs in NumPy while a step is captured"),
        (
            _with(lambda y: engine.Linear(4, 3, recipe=mxfp8())(y)),
            "recipe mxfp8 runs in NumPy while a step is captured",
        ),
    ],
)
def test_what_cannot_be_captured_says_so(step: Step, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        engine.capture(step, engine.zeros((2, 4)))


def test_a_step_returns_tensors() -> None:
    with pytest.raises(ValueError, match=r"returns contiguous tensors; got float"):
        engine.capture(lambda x: 1.0, engine.zeros((2,)))


@pytest.mark.parametrize(
    "inputs", [(ORDER,), (ORDER[:, :8], RATES), (ORDER.astype(np.int32), RATES), (ORDER, RATES[:2])]
)
def test_a_graph_takes_what_it_was_captured_with(inputs: tuple[Any, ...]) -> None:
    step, _ = _manual()
    graph = engine.capture(step, engine.from_numpy(ORDER[0]), engine.from_numpy(RATES[0]))
    with pytest.raises(ValueError, match=r"int64 \[times, 16\] and float32 \[times, 1\], as many times each; got"):
        graph.run(*inputs)


def test_a_wrong_label_in_a_run_is_named() -> None:
    step, _ = _manual()
    graph = engine.capture(step, engine.from_numpy(ORDER[0]), engine.from_numpy(RATES[0]))
    bad = ORDER.copy()
    bad[2, 5] = 96
    with pytest.raises(ValueError, match="take_rows: number 5 is 96, and x has 96 rows"):
        graph.run(bad, RATES)
    graph.run(ORDER, RATES)  # the error is not remembered
