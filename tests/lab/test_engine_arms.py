"""The arms of the engine: the same start, data and batches as PyTorch's and JAX's, and so the same curves and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

import octavo.jax
from octavo import checkpoint, engine
from octavo.lab import report
from octavo.lab.arms import ARMS, ArmResult, Framework
from octavo.lab.compare import CompareConfig, Comparison, arms_for, run
from octavo.lab.data import Dataset, Source, batches, load
from octavo.lab.engine_bench import EngineBench
from octavo.lab.engine_loop import Network, Trainer, evaluate, prepare
from octavo.lab.flax_models import build as build_flax
from octavo.lab.jax_loop import Trainer as JaxTrainer
from octavo.lab.jax_loop import prepare as prepare_jax
from octavo.lab.loop import evaluate as evaluate_torch
from octavo.lab.loop import prepare as prepare_torch
from octavo.lab.loop import train
from octavo.lab.models import ModelName, build, initial_weights
from octavo.lab.training import DivergenceError, Optimizer, Progress, TrainConfig
from octavo.recipes import Recipe, delayed_scaling
from octavo.torch import convert

STEPS = 100
ENGINE = ("engine-manual", "engine-autograd", "engine-fp8")
PAIRS = (
    ("torch-fp32", ENGINE[:2], 1e-4),
    ("jax-fp32", ENGINE[:2], 1e-4),
    ("torch-fp8", ENGINE[2:], 1e-3),
    ("jax-fp8", ENGINE[2:], 1e-3),
)


@pytest.fixture(scope="module")
def data() -> Dataset:
    """MNIST where OCTAVO_DATA leads to it, else the digits that scikit-learn brings."""
    return load(Source.MNIST if os.environ.get("OCTAVO_DATA") else Source.DIGITS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def comparison(data: Dataset, folder: Path) -> Comparison:
    arms = ("torch-fp32", "torch-fp8", *ENGINE)
    # At MNIST's rate the losses of the digits first rise: what one sum's last bit does then is seen within a few steps.
    lr = None if data.name == "mnist" else 0.01
    return run(CompareConfig(model=ModelName.MLP, arms=arms, steps=STEPS, lr=lr), dataset=data, folder=folder)


def by_name(comparison: Comparison) -> dict[str, ArmResult]:
    return {arm.name: arm for arm in comparison.arms}


def first_batches(data: Dataset, size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Of as many steps as the comparison has, under its seed."""
    samples = len(data.train_labels)
    epochs = (batches(samples, size, epoch=epoch, seed=1) for epoch in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), STEPS)


def config(**changes: object) -> TrainConfig:
    plain = {"optimizer": Optimizer.SGD, "lr": 0.01, "batch_size": 32, "epochs": 1, "steps": 6}
    return TrainConfig(**{**plain, **changes})


def network(name: ModelName = ModelName.MLP, recipe: Recipe | None = None) -> Network:
    return Network(initial_weights(name, 1), recipe=recipe)


def test_the_arms_of_the_engine_train_stacks_of_linear_layers() -> None:
    assert [name for name in ENGINE if ARMS[name].by_hand] == ["engine-manual"]
    assert Framework.ENGINE.baseline == "engine-autograd"
    assert set(arms_for(ModelName.MLP)) == set(arms_for(ModelName.FC)) == set(ARMS)
    assert set(arms_for(ModelName.CNN)) == set(ARMS) - set(ENGINE)


def jax_losses(data: Dataset, setting: TrainConfig, recipe: Recipe | None) -> list[float]:
    """Of the same steps in JAX, a step compiled."""
    with contextlib.nullcontext() if recipe is None else octavo.jax.autocast(recipe=recipe):
        plain, variables = build_flax(ModelName.MLP, seed=setting.seed)
        ready = prepare_jax(data)
        trainer, losses = JaxTrainer(plain, ready, setting), []
        state = trainer.start(variables)
        for rows in first_batches(data, setting.batch_size):
            state, taken = trainer.step(state, ready.train_inputs[rows], ready.train_labels[rows])
            losses.append(float(taken.loss))
    return losses


@pytest.mark.parametrize(("theirs", "ours", "tolerance"), PAIRS)
def test_the_losses_of_all_frameworks_are_the_same(
    comparison: Comparison, data: Dataset, theirs: str, ours: tuple[str, ...], tolerance: float
) -> None:
    arms = by_name(comparison)
    if theirs in arms:
        wanted = arms[theirs].losses
    else:
        recipe = ARMS[theirs].recipe
        wanted = jax_losses(data, comparison.training, recipe and recipe())
    # Sums differ in their last bit, which moves a code across a tie sooner or later, and the runs part: of six seeds on the digits
    # three, in steps 22, 50 and 80.  PyTorch's own runs part as much after an error of 1e-8 in the weights.
    steps = 20 if "fp8" in theirs and data.name != "mnist" else STEPS
    for name in ours:
        assert len(arms[name].losses) == STEPS
        np.testing.assert_allclose(arms[name].losses[:steps], wanted[:steps], rtol=tolerance)


def test_each_fp8_step_is_pytorchs_from_the_same_state(data: Dataset) -> None:
    """Along a hundred of PyTorch's steps: the same loss, the same amaxes and scales, and the same weights afterwards."""
    rate, model = 0.05, convert(build(ModelName.MLP, seed=1), delayed_scaling())
    rule = torch.optim.SGD(model.parameters(), lr=rate)
    ours, theirs = prepare(data), prepare_torch(data)
    trainer = Trainer(network(recipe=delayed_scaling()), ours, config(lr=rate))
    for rows in first_batches(data, 128):
        trainer.network.load({name: value.numpy() for name, value in model.state_dict().items()})
        found = trainer.repeat(rows[None], np.full((1, 1), rate, np.float32))[0]
        x, y = (whole[torch.from_numpy(rows)] for whole in (theirs.train_inputs, theirs.train_labels))
        rule.zero_grad()
        wanted = torch.nn.functional.nll_loss(model(x), y)
        wanted.backward()
        rule.step()
        np.testing.assert_allclose(found, wanted.item(), rtol=1e-6)
        after = trainer.network.state()
        for name, value in model.state_dict().items():
            np.testing.assert_allclose(after[name], value.numpy(), rtol=2e-6, atol=1e-6, err_msg=name)


def test_an_arm_is_set_against_float32_by_autograd(comparison: Comparison) -> None:
    arms = by_name(comparison)
    for name in ENGINE:
        assert arms[name].baseline == "engine-autograd"
        assert arms[name].difference_to_fp32 == arms[name].test_accuracy - arms["engine-autograd"].test_accuracy
        assert (arms[name].ratio_to_fp32 == 1) == (name == "engine-autograd")
    cells = {row[0]: row for row in report.rows(comparison)}
    assert all("-" not in cells[name][1:] for name in ENGINE)
    baselines = {arm["name"]: arm["baseline"] for arm in report.to_json(comparison)["arms"]}
    assert {baselines[name] for name in ENGINE} == {"engine-autograd"}
    assert report.curves(comparison).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ENGINE)
def test_a_checkpoint_of_the_engine_goes_on_in_pytorch(
    comparison: Comparison, folder: Path, data: Dataset, name: str
) -> None:
    tensors, header = checkpoint.load(folder / f"{name}.safetensors", framework="torch")
    assert (header["arm"], header["model"], header["step"]) == (name, "mlp", STEPS)
    model = build(ModelName.MLP, seed=9)
    if name == "engine-fp8":
        model = convert(model, delayed_scaling())
    assert {key: value.dtype for key, value in model.state_dict().items()} == {
        key: value.dtype for key, value in tensors.items()
    }
    model.load_state_dict(tensors)
    ready = prepare_torch(data)
    loss, accuracy = evaluate_torch(model, ready.test_inputs, ready.test_labels)
    arm = by_name(comparison)[name]
    np.testing.assert_allclose(loss, arm.test_loss, rtol=1e-4)
    assert abs(accuracy - arm.test_accuracy) <= 1.5 / len(data.test_labels)


@pytest.mark.parametrize(("name", "recipe"), [("torch-fp32", None), ("torch-fp8", delayed_scaling())])
def test_a_checkpoint_of_pytorch_goes_on_in_the_engine(
    comparison: Comparison, folder: Path, data: Dataset, name: str, recipe: Recipe | None
) -> None:
    tensors, _ = checkpoint.load(folder / f"{name}.safetensors", framework="numpy")
    ours = network(recipe=recipe)
    ours.load(tensors)
    held = ours.state()
    assert held.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(held[key], value, err_msg=key)
    ready = prepare(data)
    found = evaluate(ours, ready.test_inputs, ready.test_labels)
    arm = by_name(comparison)[name]
    np.testing.assert_allclose(found[0], arm.test_loss, rtol=1e-4)
    assert abs(found[1] - arm.test_accuracy) <= 1.5 / len(data.test_labels)
    for key, value in ours.state().items():  # testing moves nothing
        np.testing.assert_array_equal(value, held[key], err_msg=key)


def test_inputs_are_normalised_to_the_bits_of_pytorchs(data: Dataset) -> None:
    ours, theirs = prepare(data), prepare_torch(data)
    for name in ours._fields:
        wanted = getattr(theirs, name).flatten(1 if name.endswith("inputs") else 0).numpy()
        np.testing.assert_array_equal(getattr(ours, name).array, wanted)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("name", [ModelName.MLP, ModelName.FC])
def test_a_step_is_pytorchs_with_a_falling_rate_too(data: Dataset, name: ModelName, by_hand: bool) -> None:
    setting = config(last_lr=0.1, steps=20)
    ours = network(name)
    history = Trainer(ours, prepare(data), setting, by_hand=by_hand).train(Progress("", steps=20))
    theirs = build(name, seed=1)
    wanted = train(theirs, prepare_torch(data), setting)
    np.testing.assert_allclose(history.losses, wanted.losses, rtol=1e-5)
    np.testing.assert_allclose(history.test_losses, wanted.test_losses, rtol=1e-5)
    assert [steps for steps, _ in history.epochs] == [steps for steps, _ in wanted.epochs] == [20]
    for key, value in theirs.state_dict().items():
        np.testing.assert_allclose(ours.state()[key], value.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", [None, delayed_scaling()], ids=["fp32", "fp8"])
def test_a_run_repeats_bit_for_bit_captured_or_not(data: Dataset, recipe: Recipe | None) -> None:
    order = np.random.Generator(np.random.Philox(0)).integers(0, 1000, (7, 32))
    rates = np.full((7, 1), 0.01, np.float32)
    captured, again, eager = (network(recipe=recipe) for _ in range(3))
    first, second, third = (Trainer(one, prepare(data), config()) for one in (captured, again, eager))
    losses = first.repeat(order, rates)
    np.testing.assert_array_equal(
        np.concatenate([second.repeat(order[:3], rates[:3]), second.repeat(order[3:], rates[3:])]), losses
    )
    one_by_one = [
        third.step(engine.from_numpy(rows.copy()), engine.from_numpy(rates[0].copy())).item() for rows in order
    ]
    np.testing.assert_array_equal(np.array(one_by_one, np.float32), losses)
    for other in (again, eager):
        for key, value in captured.state().items():
            np.testing.assert_array_equal(other.state()[key], value, err_msg=key)


def test_every_arm_runs_the_larger_network_and_needs_no_other(data: Dataset) -> None:
    small = dataclasses.replace(data, test_images=data.test_images[:20], test_labels=data.test_labels[:20])
    ended = run(CompareConfig(model=ModelName.FC, arms=ENGINE, steps=3, batch_size=16), dataset=small)
    assert [len(arm.losses) for arm in ended.arms] == [3, 3, 3]
    (alone,) = run(CompareConfig(model=ModelName.FC, arms=ENGINE[2:], steps=3, batch_size=16), dataset=small).arms
    assert (alone.ratio_to_fp32, alone.difference_to_fp32) == (None, None)
    assert alone.losses == ended.arms[2].losses


@pytest.mark.parametrize("by_hand", [False, True])
def test_nan_and_inf_stop_training_by_name_and_write_no_checkpoint(
    data: Dataset, tmp_path: Path, by_hand: bool
) -> None:
    path = tmp_path / "arm.safetensors"

    def told(setting: TrainConfig, spoilt: Network, ready: object) -> str:
        with pytest.raises(DivergenceError, match=r"lower the learning rate \(--lr\) or look at the data$") as error:
            Trainer(spoilt, ready, setting, by_hand=by_hand).train(Progress("", steps=6), checkpoint_path=path)
        assert not path.exists()
        return str(error.value)

    ready = prepare(data)
    message = told(config(lr=3e38), network(), ready)
    assert re.match(r"training stopped at step [12]: (parameter 'fc\d\.weight' holds Inf|the loss holds NaN) ", message)
    bad = network()
    bad.layers["fc2"].bias.array[3] = np.nan
    assert "step 1: parameter 'fc2.bias' holds NaN (1 of 10 elements)" in told(config(), bad, ready)
    huge = network()
    huge.layers["fc2"].weight.array[:] = 3e38
    assert "step 1: the loss holds" in told(config(), huge, ready)


@pytest.mark.parametrize("recipe", [None, delayed_scaling()], ids=["fp32", "fp8"])
def test_a_bad_pixel_is_found_in_the_step_that_meets_it(data: Dataset, recipe: Recipe | None) -> None:
    ready = prepare(data)
    order = [*batches(len(data.train_labels), 32, epoch=0, seed=1)]
    ready.train_inputs.array[order[4][7], 300] = np.inf
    with pytest.raises(
        DivergenceError, match=r"^training stopped at step 5: the input holds Inf \(1 of 25088 elements\)"
    ):
        Trainer(network(recipe=recipe), ready, config()).train(Progress("", steps=6))


def test_what_the_engine_does_not_train_is_said_before_anything_runs(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^arm 'engine-fp8' trains networks of linear layers, .* choose --model mlp, or fc$"
    ):
        CompareConfig(model=ModelName.CNN, arms=("torch-fp32", "engine-fp8"))
    with pytest.raises(ValueError, match=r"train by sgd, got adadelta; take an arm of torch or jax"):
        Trainer(network(), prepare(data), config(optimizer=Optimizer.ADADELTA))
    with pytest.raises(ValueError, match="gradients by hand are in float32"):
        Trainer(network(recipe=delayed_scaling()), prepare(data), config(), by_hand=True)
    bench = EngineBench(
        model=ModelName.MLP, training=config(), dataset=data, folder=tmp_path, console=None, paired=False
    )
    with pytest.raises(ValueError, match=r"^torch-bf16: the engine trains in float32 or under a recipe"):
        bench.measure(ARMS["torch-bf16"])
    nothing = engine.zeros((0, 784)), engine.zeros((0,), np.int64)
    with pytest.raises(ValueError, match="the batch of inputs is empty"):
        evaluate(network(), *nothing)


def test_a_history_of_another_length_keeps_the_newest_steps() -> None:
    long, short = (
        network(recipe=delayed_scaling(amax_history_len=8)),
        network(recipe=delayed_scaling(amax_history_len=3)),
    )
    state = long.state()
    state["fc1.amax_history_forward"] = np.arange(24, dtype=np.float32).reshape(8, 3)
    short.load(state)
    np.testing.assert_array_equal(short.state()["fc1.amax_history_forward"], [[0, 1, 2], [18, 19, 20], [21, 22, 23]])
    long.load(short.state())
    np.testing.assert_array_equal(
        long.state()["fc1.amax_history_forward"][[0, -2, -1]], [[0, 1, 2], [18, 19, 20], [21, 22, 23]]
    )
    assert not torch.from_numpy(long.state()["fc1.amax_history_forward"])[1:6].any()
