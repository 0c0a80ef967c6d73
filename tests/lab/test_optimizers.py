"""Optimizers: torch's defaults, one line for each mistake, and Optax's rules step for step with torch's."""

import inspect
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from octavo.lab.optimizers import OptimizerKind, OptimizerRule, optax_optimizer, rule, torch_optimizer, with_rate

STEPS = 50
RATES = [0.05 / (1 + 0.1 * step) for step in range(STEPS)]
RULES = (
    rule("SGD", momentum=0.0),
    rule("SGD"),
    rule("SGD", nesterov=True, weight_decay=0.01),
    rule("Adam"),
    rule("Adam", betas=[0.8, 0.95], eps=1e-3, weight_decay=0.01),
    rule("AdamW"),
    rule("AdamW", beta2=0.99, weight_decay=0.1),
    rule("Adadelta"),
    rule("Adadelta", rho=0.95, eps=1e-4, weight_decay=0.01),
    rule("Adagrad"),
    rule("Adagrad", lr_decay=0.01, initial_accumulator_value=0.1, eps=1e-3, weight_decay=0.01),
    rule("Adamax"),
    rule("Adamax", beta1=0.8, eps=1e-3, weight_decay=0.01),
    rule("RMSprop"),
    rule("RMSprop", alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=0.01),
    rule("RMSprop", centered=True, momentum=0.5),
)
every_rule = pytest.mark.parametrize("chosen", RULES, ids=lambda chosen: f"{chosen.kind.value}-{RULES.index(chosen)}")


def start() -> dict[str, np.ndarray]:
    draws = np.random.default_rng(1)
    return {
        "weight": (1 + draws.random((4, 6))).astype(np.float32),
        "bias": (-1 - draws.random(6)).astype(np.float32),
    }


def gradients(step: int, values: dict[str, Any]) -> dict[str, np.ndarray]:
    """Of a noisy quadratic, in float64; some entries are so small that they show where eps is added, and one is zero."""
    draws = np.random.default_rng([2, step])
    found = {}
    for name, value in sorted(values.items()):  # a JAX tree comes back in this order
        slope = np.asarray(value, np.float64) * np.linspace(0.1, 1, np.size(value)).reshape(np.shape(value))
        slope += draws.normal(size=np.shape(value))
        slope[..., 0] *= 1e-9
        slope[..., 1] = 0
        found[name] = slope.astype(np.float32)
    return found


def torch_path(chosen: OptimizerRule) -> list[dict[str, np.ndarray]]:
    parameters = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in start().items()}
    optimizer = torch_optimizer(chosen, parameters.values(), RATES[0])
    path = []
    for step, lr in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = lr
        found = gradients(step, {name: value.detach().numpy() for name, value in parameters.items()})
        for name, value in parameters.items():
            value.grad = torch.from_numpy(found[name])
        optimizer.step()
        path.append({name: value.detach().numpy().copy() for name, value in parameters.items()})
    return path


@every_rule
def test_optax_follows_torch_step_for_step(chosen: OptimizerRule) -> None:
    optimizer = optax_optimizer(chosen)
    traces = []

    @jax.jit
    def step_of(params: Any, state: Any, found: Any) -> tuple[Any, Any]:
        traces.append(params)
        updates, state = optimizer.update(found, state, params)
        return optax.apply_updates(params, updates), state

    params: Any = {name: jnp.asarray(value) for name, value in start().items()}
    state = optimizer.init(params)
    for step, (lr, expected) in enumerate(zip(RATES, torch_path(chosen), strict=True)):
        params, state = step_of(params, with_rate(state, lr), gradients(step, params))
        for name, value in expected.items():
            # Weights start at 1 ... 2 and some pass through 0: an absolute error of a few roundings of 1.
            np.testing.assert_allclose(params[name], value, rtol=1e-5, atol=1e-6, err_msg=f"{name}, step {step}")
    assert len(traces) == 1


@pytest.mark.parametrize("kind", OptimizerKind)
def test_defaults_are_those_of_torch_but_for_the_momentum_of_sgd(kind: OptimizerKind) -> None:
    optimizer = torch_optimizer(rule(kind.value.upper()), [torch.nn.Parameter(torch.zeros(1))], 0.5)
    assert type(optimizer) is getattr(torch.optim, kind.value)
    theirs = {key: each.default for key, each in inspect.signature(type(optimizer)).parameters.items()}
    expected = theirs | {"lr": 0.5} | ({"momentum": 0.9} if kind is OptimizerKind.SGD else {})
    del expected["params"]
    group = optimizer.param_groups[0]
    differing = {key for key, value in expected.items() if group[key] != value}
    assert differing <= ({"decoupled_weight_decay"} if kind is OptimizerKind.ADAMW else set())


def test_the_rate_is_nan_until_it_is_set() -> None:
    optimizer = optax_optimizer(rule("SGD"))
    params = jnp.ones(2)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert np.isnan(updates).all()
    updates, _ = optimizer.update(params, with_rate(state, 0.5), params)
    np.testing.assert_array_equal(updates, -0.5 * np.float32(1.9))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("NAdam", {}), ("RAdam", {}), ("Adam", {"amsgrad": True}), ("AdamW", {"amsgrad": True})],
)
def test_what_differs_between_the_two_is_refused_for_jax(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^rules for JAX agree with torch, got {name}: .*; use Adam, or .*torch$"):
        optax_optimizer(rule(name, **settings))


def test_names_of_a_file_are_brought_to_torchs() -> None:
    assert rule("adamw", weight_decay_rate=0.1, beta1=0.5) == rule("AdamW", weight_decay=0.1, betas=(0.5, 0.999))
    assert rule("sgd", weight_decay_rate=0).settings == {"momentum": 0.9, "nesterov": False, "weight_decay": 0}
    with pytest.raises(TypeError):
        rule("SGD").settings["momentum"] = 0.5  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("AdmW", {}, "got 'AdmW'; did you mean 'AdamW'?"),
        ("LBFGS", {}, "optimizer must be one of SGD, Adam, AdamW, "),
        ("SGD", {"momentun": 0.5}, "got 'momentun'; did you mean 'momentum'?"),
        ("SGD", {"beta1": 0.5}, "SGD takes momentum, nesterov, weight_decay, got 'beta1'"),
        ("Adam", {"momentum": 0.9}, "Adam takes betas, eps, weight_decay, amsgrad, got 'momentum'"),
        ("Adam", {"weight_decay": 0, "weight_decay_rate": 0}, "takes weight_decay once"),
        ("Adam", {"betas": [0.9, 0.99], "beta2": 0.99}, "got betas and beta2; leave one of them out"),
        ("Adam", {"betas": [0.9]}, "betas of Adam must be 2 numbers, got (0.9,); give [0.9, 0.999]"),
        ("Adam", {"betas": 0.9}, "betas of Adam must be 2 numbers, got 0.9"),
        ("Adam", {"beta2": 1.0}, "betas of Adam must be at least 0 and below 1, got 1.0"),
        ("Adam", {"beta2": "0.9"}, "betas of Adam must be at least 0 and below 1, got '0.9'"),
        ("Adam", {"eps": float("nan")}, "eps of Adam must be finite and at least 0, got nan; give 1e-08"),
        ("Adam", {"eps": True}, "eps of Adam must be finite and at least 0, got True"),
        ("Adam", {"amsgrad": 1}, "amsgrad of Adam must be true or false, got 1; give false"),
        ("Adagrad", {"lr_decay": float("inf")}, "lr_decay of Adagrad must be finite and at least 0, got inf"),
        ("RMSprop", {"weight_decay_rate": -1}, "weight_decay of RMSprop must be finite and at least 0, got -1"),
        ("SGD", {"nesterov": True, "momentum": 0}, "nesterov of SGD needs momentum above 0"),
    ],
)
def test_a_mistake_is_told_in_one_line(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        rule(name, **settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rule_made_by_hand_is_complete() -> None:
    with pytest.raises(ValueError, match=r"^SGD needs momentum, nesterov, weight_decay, got .* nesterov, weight_decay"):
        OptimizerRule(kind=OptimizerKind.SGD, settings={"momentum": 0.5})


@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf")])
def test_torch_takes_a_finite_rate(lr: float) -> None:
    with pytest.raises(ValueError, match="lr must be finite and at least 0"):
        torch_optimizer(rule("SGD"), [torch.nn.Parameter(torch.zeros(1))], lr)


@pytest.mark.parametrize("module", ["optimizers", "schedules"])
def test_importing_loads_no_framework(module: str) -> None:
    script = f"import sys, octavo.lab.{module}; print({{'torch', 'jax', 'optax', 'flax'}} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"
