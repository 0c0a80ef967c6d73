"""The comparison: every arm on the same start, data and batches, set against float32."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo.lab import checkpoint, torch_bench
from octavo.lab.arms import ARMS, DEFAULT_ARMS, ArmResult, Framework, Mode
from octavo.lab.compare import CompareConfig, Comparison, run
from octavo.lab.data import Dataset, Source, load
from octavo.lab.models import ModelName, build, exempt
from octavo.lab.training import DivergenceError, Optimizer
from octavo.recipes import NAMED
from octavo.torch import convert

torch.set_num_threads(min(2, torch.get_num_threads()))

BASELINE = Framework.TORCH.baseline
CONFIG = CompareConfig(source=Source.DIGITS, model=ModelName.MLP, steps=12)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load(Source.DIGITS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def comparison(digits: Dataset, folder: Path) -> Comparison:
    return run(CONFIG, dataset=digits, folder=folder)


def by_name(comparison: Comparison) -> dict[str, ArmResult]:
    return {arm.name: arm for arm in comparison.arms}


def test_the_arms_are_those_that_the_command_promises() -> None:
    assert list(DEFAULT_ARMS) == ["torch-fp32", "torch-bf16", "torch-fp8", "torch-fp8-current", "torch-fp8-infer"]
    jax = [name for name, arm in ARMS.items() if arm.framework is Framework.JAX]
    assert jax == ["jax-fp32", "jax-bf16", "jax-fp8", "jax-fp8-current", "jax-mxfp8"]
    engine = [name for name, arm in ARMS.items() if arm.framework is Framework.ENGINE]
    assert engine == ["engine-manual", "engine-autograd", "engine-fp8"]
    assert len(ARMS) == len(DEFAULT_ARMS) + len(NAMED) - 2 + len(jax) + len(engine)  # two of the first are recipes
    assert {framework.baseline for framework in Framework} <= set(ARMS)
    assert ARMS["torch-bf16"].mode is Mode.BFLOAT16
    assert {arm.recipe().name for arm in ARMS.values() if arm.recipe is not None} == set(NAMED)
    assert all(
        (arm.recipe is not None) == (arm.mode in (Mode.RECIPE, Mode.EMULATED, Mode.CALIBRATED)) for arm in ARMS.values()
    )


def test_every_arm_runs_the_same_steps_and_is_set_against_float32(comparison: Comparison) -> None:
    arms = by_name(comparison)
    assert list(arms) == list(DEFAULT_ARMS)
    base = arms[BASELINE]
    for arm in arms.values():
        assert len(arm.losses) == 12
        assert 0 < arm.test_accuracy <= 1
        assert arm.accuracies[-1] == arm.test_accuracy
        assert arm.ratio_to_fp32 is not None
        assert (arm.ratio_to_fp32 == 1) == (arm.name in (BASELINE, "torch-fp8-infer"))
        assert arm.difference_to_fp32 == arm.test_accuracy - base.test_accuracy


def test_every_arm_starts_from_the_same_weights_and_batches_but_computes_in_its_own_precision(
    comparison: Comparison,
) -> None:
    first = {arm.name: arm.losses[0] for arm in comparison.arms}
    np.testing.assert_allclose(list(first.values()), first[BASELINE], rtol=0.05)
    assert len({first[name] for name in ("torch-fp32", "torch-bf16", "torch-fp8-current")}) == 3


def test_the_calibrated_arm_shares_the_float32_training(comparison: Comparison) -> None:
    arms = by_name(comparison)
    infer = arms["torch-fp8-infer"]
    assert infer.trained_as == BASELINE
    assert infer.losses == arms[BASELINE].losses
    assert len(infer.accuracies) == 1
    assert infer.test_loss != arms[BASELINE].test_loss
    assert all(arm.trained_as is None for name, arm in arms.items() if name != "torch-fp8-infer")


@pytest.mark.parametrize("name", DEFAULT_ARMS)
def test_every_arm_leaves_a_checkpoint_that_loads_into_its_model(
    comparison: Comparison, folder: Path, name: str
) -> None:
    state, header = checkpoint.load(folder / f"{name}.safetensors")
    assert (header["arm"], header["model"], header["data"], header["seed"]) == (name, "mlp", "digits", 1)
    model = build(ModelName.MLP, seed=2)
    if ARMS[name].recipe is not None:
        model = convert(model, ARMS[name].recipe(), exempt=exempt(ModelName.MLP))
    model.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_comparison_repeats_bit_for_bit(digits: Dataset, comparison: Comparison) -> None:
    again = by_name(run(CONFIG, dataset=digits))
    for name, arm in by_name(comparison).items():
        assert again[name].losses == arm.losses, name
        assert (again[name].test_loss, again[name].accuracies) == (arm.test_loss, arm.accuracies), name


@pytest.mark.parametrize(("model", "steps"), [(ModelName.CNN, 2), (ModelName.FC, 3)])
def test_every_arm_runs_every_model(digits: Dataset, model: ModelName, steps: int) -> None:
    small = dataclasses.replace(digits, test_images=digits.test_images[:20], test_labels=digits.test_labels[:20])
    comparison = run(dataclasses.replace(CONFIG, model=model, steps=steps, batch_size=16), dataset=small)
    assert [len(arm.losses) for arm in comparison.arms] == [steps] * len(DEFAULT_ARMS)


def test_without_the_baseline_there_is_no_ratio_and_the_calibrated_arm_trains_itself(
    digits: Dataset, tmp_path: Path, comparison: Comparison
) -> None:
    config = dataclasses.replace(CONFIG, arms=("torch-fp8-infer",))
    (infer,) = run(config, dataset=digits, folder=tmp_path).arms
    assert (infer.ratio_to_fp32, infer.difference_to_fp32, infer.trained_as) == (None, None, None)
    assert infer.losses == by_name(comparison)["torch-fp8-infer"].losses
    assert [path.name for path in tmp_path.iterdir()] == ["torch-fp8-infer.safetensors"]


def test_the_baseline_may_come_last(digits: Dataset, tmp_path: Path, comparison: Comparison) -> None:
    config = dataclasses.replace(CONFIG, arms=("torch-fp8-infer", "torch-fp32"))
    infer, base = run(config, dataset=digits, folder=tmp_path).arms
    assert (infer.trained_as, base.trained_as) == (None, "torch-fp8-infer")
    assert base.losses == by_name(comparison)[BASELINE].losses
    assert infer.difference_to_fp32 == infer.test_accuracy - base.test_accuracy
    assert checkpoint.load(tmp_path / "torch-fp32.safetensors")[1]["arm"] == "torch-fp32"


def test_results_are_handed_over_after_each_arm(digits: Dataset) -> None:
    seen: list[list[str]] = []
    config = dataclasses.replace(CONFIG, arms=("torch-fp32", "torch-bf16"), steps=2)
    run(config, dataset=digits, on_result=lambda so_far: seen.append([arm.name for arm in so_far.arms]))
    assert seen == [["torch-fp32"], ["torch-fp32", "torch-bf16"]]


def test_an_arm_that_diverges_is_named(digits: Dataset) -> None:
    with pytest.raises(DivergenceError, match=r"^torch-fp32: training stopped at step \d+: "):
        run(dataclasses.replace(CONFIG, lr=1e30), dataset=digits)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (("torch-fp9",), "unknown arm 'torch-fp9'; did you mean 'torch-fp8'"),
        (("zzz",), "unknown arm 'zzz'; the arms are torch-fp32, "),
        (("torch-fp8", "torch-fp8"), "arm 'torch-fp8' is named 2 times"),
        ((), "at least one arm"),
    ],
)
def test_arms_that_make_no_sense_are_refused(arms: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompareConfig(arms=arms)


def test_a_batch_larger_than_the_data_is_refused_before_anything_runs(digits: Dataset) -> None:
    with pytest.raises(ValueError, match="batch_size 2000 exceeds the 1437 training samples"):
        run(dataclasses.replace(CONFIG, batch_size=2000), dataset=digits)


@pytest.mark.parametrize(
    ("given", "samples", "epochs", "steps"),
    [
        ({}, 60_000, 5, None),
        ({}, 1437, 40, None),
        ({"epochs": 2}, 60_000, 2, None),
        ({"steps": 1000}, 60_000, 3, 1000),
        ({"steps": 1000, "epochs": 1}, 60_000, 1, 1000),
        ({"steps": 5, "batch_size": 10_000}, 1437, 5, 5),
    ],
)
def test_epochs_follow_from_what_is_given(given: dict[str, int], samples: int, epochs: int, steps: int | None) -> None:
    training = CompareConfig(**given).training(samples)
    assert (training.epochs, training.steps) == (epochs, steps)


def test_each_model_trains_as_its_reference_does() -> None:
    cnn = CompareConfig(model=ModelName.CNN).training(60_000)
    assert (cnn.optimizer, cnn.lr, cnn.last_lr, cnn.batch_size, cnn.epochs) == (Optimizer.ADADELTA, 1.0, 0.01, 64, 1)
    mlp = CompareConfig(model=ModelName.MLP).training(60_000)
    assert (mlp.optimizer, mlp.lr, mlp.last_lr, mlp.batch_size) == (Optimizer.SGD, 0.1, 1.0, 128)
    assert CompareConfig(lr=0.5).training(60_000).lr == 0.5


def test_calibration_reads_training_images_only(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[torch.Tensor] = []
    calibrate = torch_bench.calibrate

    def watched(model, inputs, recipe=None):
        batches = list(inputs)
        fed.extend(batches)
        return calibrate(model, batches, recipe)

    monkeypatch.setattr(torch_bench, "calibrate", watched)
    run(dataclasses.replace(CONFIG, arms=("torch-fp8-infer",), steps=2), dataset=digits)
    training = {image.tobytes() for image in torch_bench.prepare(digits).train_inputs.numpy()}
    assert fed
    assert all(image.tobytes() in training for batch in fed for image in batch.numpy())


def test_every_recipe_is_an_arm_that_learns(digits: Dataset) -> None:
    small = dataclasses.replace(digits, test_images=digits.test_images[:100], test_labels=digits.test_labels[:100])
    arms = tuple(ARMS)
    for arm in run(dataclasses.replace(CONFIG, arms=arms, epochs=1, steps=None), dataset=small).arms:
        assert arm.test_accuracy > 0.5, arm.name
