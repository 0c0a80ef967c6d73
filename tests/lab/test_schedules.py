"""Schedules: every rate against torch's schedulers and Optax's schedules, the file's spellings, and one line for each mistake."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
import pydantic
import pytest
import torch
from torch.optim import lr_scheduler

from octavo.lab import schedules
from octavo.lab.schedules import LearningRate, Schedule, parse, rate

STEPS = 300
BASE = 0.2


def rates(value: object, steps: int = STEPS) -> list[float]:
    learning_rate = parse(value)
    return [rate(learning_rate, step) for step in range(steps)]


def linear(**settings: Any) -> dict[str, Any]:
    return {
        "scheduler": "Linear",
        "initial_learning_rate": BASE,
        "end_learning_rate": 0.05,
        "decay_steps": 40,
    } | settings


def torch_rates(build: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = build(optimizer)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def sequence(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.01, 1.0, total_iters=20),
        lr_scheduler.StepLR(optimizer, 10, 0.5),
        lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=0.01),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[20, 75])


INITIAL = {"initial_learning_rate": BASE}
OF_TORCH: dict[str, tuple[object, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]]] = {
    "number": (BASE, lambda each: lr_scheduler.ConstantLR(each, 1.0)),
    "constant": (
        [
            {"scheduler": "Constant", "learning_rate": BASE / 4, "decay_steps": 30},
            {"scheduler": "Constant", "learning_rate": BASE},
        ],
        lambda each: lr_scheduler.ConstantLR(each, 0.25, total_iters=30),
    ),
    "linear": (linear(), lambda each: lr_scheduler.LinearLR(each, 1.0, 0.25, total_iters=40)),
    "warm-up": (
        linear(initial_learning_rate=BASE / 10, end_learning_rate=BASE),
        lambda each: lr_scheduler.LinearLR(each, 0.1, 1.0, total_iters=40),
    ),
    "polynomial": (
        linear(scheduler="Polynomial", end_learning_rate=0.0, decay_steps=250, power=2.5),
        lambda each: lr_scheduler.PolynomialLR(each, 250, 2.5),
    ),
    "exponential": (
        {"scheduler": "Exponential", "decay_rate": 0.97, "decay_steps": 1} | INITIAL,
        lambda each: lr_scheduler.ExponentialLR(each, 0.97),
    ),
    "staircase": (
        {"scheduler": "Exponential", "decay_rate": 0.7, "decay_steps": 30, "staircase": True} | INITIAL,
        lambda each: lr_scheduler.StepLR(each, 30, 0.7),
    ),
    "step": (
        {"scheduler": "Step", "step_size": 30, "gamma": 0.7} | INITIAL,
        lambda each: lr_scheduler.StepLR(each, 30, 0.7),
    ),
    "multi-step": (
        {"scheduler": "MultiStep", "milestones": [1, 50, 51, 200], "gamma": 0.3} | INITIAL,
        lambda each: lr_scheduler.MultiStepLR(each, [1, 50, 51, 200], 0.3),
    ),
    "piecewise": (
        {"scheduler": "PiecewiseConstant", "values": [BASE, BASE / 2, BASE / 4], "boundaries": [50, 200]},
        lambda each: lr_scheduler.MultiStepLR(each, [50, 200], 0.5),
    ),
    "annealing": (
        {"scheduler": "CosineAnnealing", "T_max": 70, "eta_min": 0.01} | INITIAL,
        lambda each: lr_scheduler.CosineAnnealingLR(each, 70, eta_min=0.01),
    ),
    "lambda": (
        {"scheduler": "Lambda", "expression": "0.95 ** (step // 100) * min(1, (step + 1) / 20)"} | INITIAL,
        lambda each: lr_scheduler.LambdaLR(each, lambda step: 0.95 ** (step // 100) * min(1, (step + 1) / 20)),
    ),
    "functions": (
        {"scheduler": "Lambda", "expression": "max(exp(-step / 50), sqrt(step) % 0.3 + 1 + -cos(pi * step), .1)"}
        | INITIAL,
        lambda each: lr_scheduler.LambdaLR(
            each, lambda step: max(math.exp(-step / 50), math.sqrt(step) % 0.3 + 1 - math.cos(math.pi * step), 0.1)
        ),
    ),
    "inverse": (
        {"scheduler": "InverseExponentialTimeDecay", "step_exponent": 1.5, "decay_steps": 9, "decay_rate": 0.3}
        | INITIAL,
        lambda each: lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + 0.3 * step**1.5 / 9)),
    ),
    "inverse staircase": (
        {
            "scheduler": "InverseExponentialTimeDecay",
            "step_exponent": 1,
            "decay_steps": 9,
            "decay_rate": 0.3,
            "staircase": True,
        }
        | INITIAL,
        lambda each: lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + 0.3 * (step // 9))),
    ),
    "sequence": (
        [
            linear(initial_learning_rate=BASE / 100, end_learning_rate=BASE, decay_steps=20),
            {"scheduler": "Step", "step_size": 10, "gamma": 0.5, "decay_steps": 55} | INITIAL,
            {"scheduler": "CosineAnnealing", "T_max": 100, "eta_min": 0.01} | INITIAL,
        ],
        sequence,
    ),
}


@pytest.mark.parametrize("name", OF_TORCH)
def test_rates_are_those_of_torchs_schedulers(name: str) -> None:
    value, build = OF_TORCH[name]
    np.testing.assert_allclose(rates(value), torch_rates(build), rtol=1e-9, atol=1e-15)


OF_OPTAX: dict[str, tuple[object, Callable[[int], Any]]] = {
    "exponential": (
        {"scheduler": "Exponential", "decay_rate": 0.5, "decay_steps": 40} | INITIAL,
        optax.exponential_decay(BASE, 40, 0.5),
    ),
    "staircase": (
        {"scheduler": "Exponential", "decay_rate": 0.5, "decay_steps": 40, "staircase": True} | INITIAL,
        optax.exponential_decay(BASE, 40, 0.5, staircase=True),
    ),
    "linear": (linear(), optax.linear_schedule(BASE, 0.05, 40)),
    "polynomial": (
        linear(scheduler="Polynomial", power=2, decay_steps=250),
        optax.polynomial_schedule(BASE, 0.05, 2, 250),
    ),
    "cosine": (
        {"scheduler": "CosineDecay", "end_learning_rate": 0.05, "decay_steps": 250} | INITIAL,
        optax.cosine_decay_schedule(BASE, 250, 0.25),
    ),
    "piecewise": (
        {"scheduler": "PiecewiseConstant", "values": [0.2, 0.1, 0.3], "boundaries": [50, 200]},
        optax.piecewise_constant_schedule(0.2, {50: 0.5, 200: 3.0}),
    ),
    "sequence": (
        [
            linear(initial_learning_rate=0, end_learning_rate=0.3, decay_steps=10),
            {"scheduler": "Constant", "learning_rate": 0.3, "decay_steps": 7},
            {"scheduler": "CosineDecay", "initial_learning_rate": 0.3, "end_learning_rate": 0.03, "decay_steps": 100},
            {"scheduler": "Exponential", "initial_learning_rate": 0.03, "decay_rate": 0.9, "decay_steps": 20},
        ],
        optax.join_schedules(
            [
                optax.linear_schedule(0.0, 0.3, 10),
                optax.constant_schedule(0.3),
                optax.cosine_decay_schedule(0.3, 100, 0.1),
                optax.exponential_decay(0.03, 20, 0.9),
            ],
            [10, 17, 117],
        ),
    ),
}


@pytest.mark.parametrize("name", OF_OPTAX)
def test_rates_are_those_of_optaxs_schedules(name: str) -> None:
    value, schedule = OF_OPTAX[name]
    np.testing.assert_allclose(rates(value), [float(schedule(step)) for step in range(STEPS)], rtol=1e-6)


def test_a_cycle_is_drawn_to_the_next_multiple() -> None:
    def expected(step: int) -> float:
        """The definition in Keras's PolynomialDecay."""
        end = 40 * max(1, math.ceil(step / 40))
        return (BASE - 0.05) * (1 - step / end) ** 2 + 0.05

    found = rates(linear(scheduler="Polynomial", power=2, cycle=True))
    np.testing.assert_allclose(found, [expected(step) for step in range(STEPS)], rtol=1e-12)
    straight = rates(linear(cycle=True))
    assert straight[40] == 0.05
    assert straight[41] > 0.05


@pytest.mark.parametrize("scheduler", ["Linear", "Polynomial", "CosineDecay"])
def test_both_ends_are_exact_and_the_last_one_stays(scheduler: str) -> None:
    found = rates(linear(scheduler=scheduler, initial_learning_rate=0.3, end_learning_rate=0.1, decay_steps=7))
    assert found[0] == 0.3
    assert set(found[7:]) == {0.1}


@pytest.mark.parametrize(
    "spelt",
    [
        linear(scheduler="linear"),
        linear(scheduler="LinearLR"),
        linear(scheduler="linear_lr"),
        {"LinearLR": {key: value for key, value in linear().items() if key != "scheduler"}},
        {("total_iters" if key == "decay_steps" else key): value for key, value in linear().items()},
        {("steps" if key == "decay_steps" else key): value for key, value in linear().items()},
    ],
)
def test_every_spelling_is_read(spelt: object) -> None:
    assert parse(spelt) == parse(linear())


@pytest.mark.parametrize("name", ["CosineDecayLR", "cosine_decay", "cosine-decay", "COSINEDECAY", "Cosine Decay"])
def test_names_of_two_words_are_read(name: str) -> None:
    read = parse({"scheduler": name, "initial_learning_rate": 0.1, "decay_steps": 5})
    assert isinstance(read, schedules.CosineDecay)


def test_the_keys_of_newer_files_are_read() -> None:
    older = {"scheduler": "PiecewiseConstant", "values": [0.1, 0.2], "boundaries": [5]}
    newer = {"scheduler": "PiecewiseConstantLR", "learning_rates": [0.1, 0.2], "milestones": [5]}
    assert parse(newer) == parse(older)


class Config(pydantic.BaseModel):
    """A strict model that holds both types, as a configuration does."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)
    learning_rate: LearningRate
    first: Schedule | None = None


@pytest.mark.parametrize("value", [value for value, _ in (OF_TORCH | OF_OPTAX).values()])
def test_a_field_reads_what_parse_reads_and_survives_a_file(value: object) -> None:
    config = Config(learning_rate=value, first=linear())  # type: ignore[arg-type]
    assert config.learning_rate == parse(value)
    assert Config(**config.model_dump(mode="json")) == config


LAMBDA = {"scheduler": "Lambda", "initial_learning_rate": 0.1}
MISTAKES: dict[str, tuple[object, str]] = {
    "bool": (True, "got True"),
    "nothing": (None, "got None"),
    "text": ("1e-3", "got '1e-3'; write 0.001"),
    "negative": (-0.1, "learning_rate must be finite and at least 0, got -0.1"),
    "nan": (math.nan, "learning_rate must be finite and at least 0, got nan"),
    "infinite": (math.inf, "learning_rate must be finite and at least 0, got inf"),
    "huge": (10**400, "learning_rate must be finite and at least 0"),
    "empty": ([], "a list of schedules must hold one at least"),
    "number in a list": ([0.1, 0.2], "a schedule must be a mapping, got 0.1"),
    "no name": ({"decay_steps": 3}, "scheduler must be one of"),
    "name": (linear(scheduler="Linaer"), "got 'Linaer'; did you mean 'Linear'?"),
    "key": (linear(decay_step=3), "got 'decay_step'; did you mean 'decay_steps'?"),
    "key for another": (linear(decay_rate=3), "Linear takes decay_steps, "),
    "number for a key": (linear() | {5: 3}, "got '5'"),
    "missing": (
        {"scheduler": "Step", "step_size": 4, "gamma": 0.5},
        "Step needs initial_learning_rate, got step_size, gamma",
    ),
    "twice": (linear(total_iters=3), "Linear takes decay_steps once, got it as total_iters too"),
    "number as text": (linear(end_learning_rate="1e-5"), "got '1e-5'; write 1.0e-05"),
    "bool for a number": (
        linear(end_learning_rate=True),
        "end_learning_rate of Linear must be a valid number, got True",
    ),
    "number for a bool": (linear(cycle=1), "cycle of Linear must be a valid boolean, got 1"),
    "no steps": (linear(decay_steps=0), "decay_steps of Linear must be greater than or equal to 1, got 0"),
    "half a step": (linear(decay_steps=1.5), "decay_steps of Linear must be a valid integer, got 1.5"),
    "negative initial": (
        linear(initial_learning_rate=-1),
        "initial_learning_rate of Linear must be greater than or equal to 0",
    ),
    "infinite end": (
        linear(end_learning_rate=math.inf),
        "end_learning_rate of Linear must be a finite number, got inf",
    ),
    "counts": (
        {"scheduler": "PiecewiseConstant", "values": [0.1], "boundaries": [3]},
        "PiecewiseConstant needs one value more than boundaries, got 1 values and 1 boundaries; give 2 values",
    ),
    "order": (
        {"scheduler": "MultiStep", "initial_learning_rate": 1, "gamma": 0.1, "milestones": [5, 5]},
        "milestones of MultiStep must increase, got [5, 5]",
    ),
    "value": (
        {"scheduler": "PiecewiseConstant", "values": [0.1, "b"], "boundaries": [3]},
        "values[1] of PiecewiseConstant must be a valid number, got 'b'",
    ),
    "no length": (
        [linear(), {"scheduler": "Constant", "learning_rate": 1}, linear()],
        "need decay_steps, got Constant, number 2 of 3, without",
    ),
    "call": (LAMBDA | {"expression": "__import__('os')"}, "__import__('os') is none of"),
    "attribute": (LAMBDA | {"expression": "step.real"}, "step.real is none of"),
    "other name": (LAMBDA | {"expression": "epoch"}, "epoch is none of"),
    "condition": (LAMBDA | {"expression": "1 if step else 2"}, "1 if step else 2 is none of"),
    "lambda": (LAMBDA | {"expression": "lambda: 1"}, "lambda: 1 is none of"),
    "boolean": (LAMBDA | {"expression": "True"}, "True is none of"),
    "imaginary": (LAMBDA | {"expression": "1j"}, "1j is none of"),
    "starred": (LAMBDA | {"expression": "min(*[1, 2])"}, "is none of"),
    "arguments": (LAMBDA | {"expression": "sqrt(1, 2)"}, "sqrt(1, 2) is none of"),
    "bomb": (LAMBDA | {"expression": "9 ** 9 ** 9 ** 9"}, "math range error"),
    "no value": (LAMBDA | {"expression": "1 / step"}, "with a value at step 0, got '1 / step'"),
    "statements": (LAMBDA | {"expression": "1; 2"}, "must be an expression in step"),
    "unfinished": (LAMBDA | {"expression": "sqrt(step"}, "must be an expression in step"),
    "deep": (LAMBDA | {"expression": "(" * 500 + "1" + ")" * 500}, "it has 1001 characters, of at most 200"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(name: str) -> None:
    value, words = MISTAKES[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse(value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(pydantic.ValidationError) as refused:
        Config(learning_rate=value)  # type: ignore[arg-type]
    assert [str(error["ctx"]["error"]) for error in refused.value.errors()] == [str(caught.value)]


@pytest.mark.parametrize(
    ("value", "step", "words"),
    [
        (LAMBDA | {"expression": "3 - step"}, 4, "Lambda at its step 4 must be finite and at least 0, got -0.1"),
        (LAMBDA | {"expression": "sqrt(3 - step)"}, 4, "Lambda at its step 4 must be finite and at least 0, got math"),
        (LAMBDA | {"expression": "1e999"}, 0, "got inf"),
        (
            [linear(), {"scheduler": "Exponential", "decay_rate": 1e300, "decay_steps": 1} | INITIAL],
            45,
            "Exponential at its step 5",
        ),
        (0.1, -1, "step counts from 0, got -1"),
    ],
)
def test_a_rate_that_is_none_is_an_error(value: object, step: int, words: str) -> None:
    learning_rate = parse(value)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        rate(learning_rate, step)
    assert words in str(caught.value)


def test_a_list_put_together_by_hand_is_checked_too() -> None:
    endless = schedules.Constant(learning_rate=0.1)
    with pytest.raises(ValueError, match="number 1 of 2"):
        rate([endless, endless], 0)
    with pytest.raises(ValueError, match="hold one at least"):
        rate([], 0)
    assert rate([endless], 10**9) == 0.1
