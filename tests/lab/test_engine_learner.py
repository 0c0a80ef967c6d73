"""Training in the engine: what PyTorch trains to, resumed to the bit, and with one line for what the engine does not do."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo import checkpoint
from octavo.lab.config import Config
from octavo.lab.data import Dataset, Source, load
from octavo.lab.engine_learner import EngineLearner
from octavo.lab.learner import Order
from octavo.lab.networks import torch_network
from octavo.lab.replicas import World
from octavo.lab.runner import evaluate, train
from octavo.lab.torch_learner import TorchLearner
from octavo.lab.training import DivergenceError
from octavo.torch import convert

STEPS = 30
SGD: dict[str, Any] = {"optimizer_type": "SGD", "momentum": 0.9, "learning_rate": 0.02}
ADAM: dict[str, Any] = {"optimizer_type": "Adam", "learning_rate": 0.001}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load(Source.DIGITS)


def config(precision: Any = "fp32", *, backend: str = "engine", **sections: Any) -> Config:
    given: dict[str, Any] = {
        "train_input": {"batch_size": 64},
        "model": {"hidden_sizes": [48, 32]},
        "optimizer": SGD,
        "runconfig": {"seed": 7},
    }
    return Config.model_validate(given | {"precision": precision, "backend": backend} | sections)


def run(learner: Any, steps: range, samples: int = 1024) -> list[float]:
    """The losses of those updates; the rate changes from one to the next."""
    options = learner.config
    order = Order(samples=samples, input=options.train_input, seed=options.runconfig.seed)
    rate = options.optimizer.learning_rate
    return [learner.update(order.rows(step), step, rate / (1 + step / STEPS), stop=False).loss for step in steps]


def pair(data: Dataset, precision: Any = "fp32", **sections: Any) -> tuple[EngineLearner, TorchLearner]:
    theirs = TorchLearner(config(precision, backend="torch", **sections), data, World(device=torch.device("cpu")))
    return EngineLearner(config(precision, **sections), data), theirs


def equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)
        assert value.dtype == other[name].dtype


@pytest.mark.parametrize(
    ("precision", "sections", "tolerance"),
    [
        ("fp32", {}, 1e-5),
        ("fp32", {"optimizer": SGD | {"momentum": 0.0, "weight_decay_rate": 0.01}}, 1e-5),
        ("fp32", {"optimizer": SGD | {"nesterov": True, "weight_decay_rate": 0.01}}, 1e-5),
        ("fp32", {"optimizer": ADAM | {"weight_decay_rate": 0.01, "betas": [0.8, 0.99]}}, 1e-5),
        ("fp32", {"optimizer": SGD | {"grad_accum_steps": 4, "max_gradient_value": 0.01}}, 1e-5),
        ("fp32", {"optimizer": ADAM | {"grad_accum_steps": 2, "max_gradient_norm": 0.5}}, 1e-5),
        ("fp32", {"model": {"name": "mlp"}}, 1e-5),
        (
            "fp32",
            {
                "model": {"depth": 2, "use_bias": False, "disable_softmax": True},
                "train_input": {"batch_size": 64, "to_float16": True},
            },
            1e-5,
        ),
        ("delayed_scaling", {}, 1e-4),
        ("delayed_scaling", {"exempt": ["fc3"], "optimizer": SGD | {"grad_accum_steps": 4}}, 1e-4),
        ("current_scaling", {}, 1e-4),
        ("mxfp8", {}, 1e-4),
    ],
)
def test_losses_are_those_of_pytorch(
    digits: Dataset, precision: str, sections: dict[str, Any], tolerance: float
) -> None:
    ours, theirs = pair(digits, precision, **sections)
    found, wanted = run(ours, range(STEPS)), run(theirs, range(STEPS))
    assert found[-1] < 0.8 * found[0]
    np.testing.assert_allclose(found, wanted, rtol=tolerance)
    parts = [np.arange(0, 100), np.arange(100, 133)]
    before = ours.snapshot().tensors
    np.testing.assert_allclose(ours.test(parts)[0], theirs.test(parts)[0], rtol=10 * tolerance)
    assert ours.test(parts)[1] == theirs.test(parts)[1]
    equal(before, ours.snapshot().tensors)


@pytest.mark.parametrize("precision", ["fp32", "delayed_scaling", "current_scaling", "nvfp4"])
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_a_resumed_learner_goes_on_bit_for_bit(
    digits: Dataset, precision: str, optimizer: dict[str, Any], tmp_path: Path
) -> None:
    whole = EngineLearner(config(precision, optimizer=optimizer), digits)
    run(whole, range(3))
    tensors, facts = whole.snapshot()
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, tensors, header={"facts": facts}, framework=whole.framework)
    wanted = run(whole, range(3, 8))
    resumed = EngineLearner(config(precision, optimizer=optimizer, runconfig={"seed": 7}), digits)
    run(resumed, range(5))  # of which nothing must stay
    tensors, header = checkpoint.load(path, framework=resumed.framework)
    resumed.restore(tensors, header["facts"])
    equal(resumed.snapshot().tensors, tensors)
    assert run(resumed, range(3, 8)) == wanted
    equal(resumed.snapshot().tensors, whole.snapshot().tensors)


def test_a_snapshot_has_the_names_and_layouts_of_pytorchs(digits: Dataset) -> None:
    for precision, optimizer in (("delayed_scaling", SGD), ("fp32", ADAM)):
        ours, theirs = pair(digits, precision, optimizer=optimizer)
        run(ours, range(3))
        run(theirs, range(3))
        found, wanted = ours.snapshot().tensors, theirs.snapshot().tensors
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype == value.numpy().dtype, name
            np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)
    ours.restore({name: value.numpy() for name, value in wanted.items()}, {"scaler": None})
    np.testing.assert_allclose(run(ours, range(3, 6)), run(theirs, range(3, 6)), rtol=1e-6)


def test_weights_alone_go_on_with_fresh_scales_and_another_history(digits: Dataset) -> None:
    longer = EngineLearner(config({"recipe": "delayed_scaling", "amax_history_len": 8}), digits)
    run(longer, range(6))
    tensors = longer.snapshot().tensors
    shorter = EngineLearner(config({"recipe": "delayed_scaling", "amax_history_len": 4}), digits)
    shorter.restore(tensors, None)
    history, whole = (one["model.fc1.amax_history_forward"] for one in (shorter.snapshot().tensors, tensors))
    np.testing.assert_array_equal(history[1:], whole[-3:])
    weights = {name: value for name, value in tensors.items() if name.endswith((".weight", ".bias"))}
    shorter.restore(weights, None)
    assert (shorter.snapshot().tensors["model.fc1.scale_forward"] == 1).all()
    with pytest.raises(ValueError, match=r"of another model: .*fc1\.weight"):
        EngineLearner(config(model={"hidden_sizes": [40, 32]}), digits).restore(weights, None)


def settings(folder: Path, **sections: Any) -> Config:
    runconfig = {"seed": 7, "model_dir": str(folder), "max_steps": 6, "checkpoint_steps": 2, "log_steps": 1}
    return config(
        "delayed_scaling", **{"train_input": {"batch_size": 64, "data": "digits"}, **sections}, runconfig=runconfig
    )


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eval_input = {"data": "digits", "batch_size": 64}
    assert train(settings(tmp_path / "whole", eval_input=eval_input)) == 0
    assert train(settings(tmp_path / "cut", eval_input=eval_input)) == 0
    for kept in sorted((tmp_path / "cut" / "checkpoints").iterdir())[1:]:
        kept.unlink()  # as if it had been killed after its second update
    assert train(settings(tmp_path / "cut", eval_input=eval_input)) == 0
    assert "at step : 2." in capsys.readouterr().out
    last = "checkpoints/step-00000006.safetensors"
    one, other = (checkpoint.load(tmp_path / name / last, framework="numpy")[0] for name in ("whole", "cut"))
    equal(one, other)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()
    loss, accuracy = evaluate(settings(tmp_path / "whole", eval_input=eval_input))
    # The same file in PyTorch.
    model = convert(torch_network(settings(tmp_path).model, 1), settings(tmp_path).recipe).eval()
    tensors, _ = checkpoint.load(tmp_path / "whole" / last, framework="torch")
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    test = load(Source.DIGITS)
    pixels = torch.from_numpy(test.test_images.astype(np.float32) / np.float32(255)).sub_(0.1307).div_(0.3081)
    with torch.no_grad():
        output = model(pixels)
    labels = torch.from_numpy(test.test_labels.astype(np.int64))
    np.testing.assert_allclose(loss, torch.nn.functional.nll_loss(output, labels).item(), rtol=1e-4)
    assert abs(accuracy - (output.argmax(1) == labels).float().mean().item()) < 2e-3


@pytest.mark.parametrize(
    ("precision", "sections", "key"),
    [
        ("fp32", {"model": {"name": "cnn"}}, "model.name must be fc_mnist or mlp .* got cnn"),
        ("fp32", {"model": {"activation_fn": "gelu"}}, "model.activation_fn must be relu .* got gelu"),
        ("fp32", {"model": {"dropout": 0.2}}, r"model.dropout must be 0 .* got 0\.2"),
        ("bf16", {}, "precision must be fp32 or a recipe .* got bf16"),
        ("fp16", {}, "precision must be fp32 or a recipe .* got fp16"),
        (
            "fp32",
            {"optimizer": {"optimizer_type": "AdamW"}},
            "optimizer.optimizer_type must be SGD or Adam .* got AdamW",
        ),
        ("fp32", {"optimizer": ADAM | {"amsgrad": True}}, "optimizer.amsgrad must be false .* got true"),
        (
            "fp32",
            {"optimizer": {"loss_scaling_factor": "dynamic"}},
            "optimizer.loss_scaling_factor must be 1 .* got dynamic",
        ),
        ("fp32", {"runconfig": {"num_replicas": 2}}, "runconfig.num_replicas must be 1 .* got 2"),
    ],
)
def test_what_the_engine_does_not_do_is_one_line(
    digits: Dataset, precision: str, sections: dict[str, Any], key: str
) -> None:
    with pytest.raises(ValueError, match=f"^{key}; change it, or write backend: torch, or jax$") as told:
        EngineLearner(config(precision, **sections), digits)
    assert "\n" not in str(told.value)


def test_an_exempt_pattern_that_fits_nothing_is_named(digits: Dataset) -> None:
    with pytest.raises(ValueError, match="exempt 'fc9' fits no linear layer"):
        EngineLearner(config("mxfp8", exempt=["fc9"]), digits)


def test_nan_and_inf_stop_an_update_by_name_and_leave_the_weights(digits: Dataset) -> None:
    learner = EngineLearner(config(), digits)
    tensors = learner.snapshot().tensors

    def spoilt(**values: float) -> EngineLearner:
        changed = {name: value.copy() for name, value in tensors.items()}
        for name, value in values.items():
            changed[f"model.{name.replace('_', '.')}"].flat[0] = value
        learner.restore(changed, {"scaler": None})
        return learner

    for values, what in (
        ({"fc2_weight": np.nan}, "parameter 'fc2.weight'"),
        ({"fc1_bias": 1e30, "fc2_weight": 1e30}, "the output of layer 'fc2'"),
    ):
        before = spoilt(**values).snapshot().tensors
        with pytest.raises(
            DivergenceError, match=rf"^training stopped at step 5: {re.escape(what)} holds NaN or Inf; lower"
        ):
            learner.update(np.arange(64), 4, 0.1, stop=False)
        equal({name: one for name, one in before.items() if "scale" not in name}, learner.snapshot().tensors)
    unchecked = EngineLearner(config(runconfig={"check_loss_values": False}), digits)
    unchecked.restore(spoilt(fc2_weight=np.nan).snapshot().tensors, {"scaler": None})
    assert np.isnan(unchecked.update(np.arange(64), 0, 0.1, stop=True).loss)


def test_neither_learner_nor_arms_load_a_framework() -> None:
    program = "import sys, octavo.lab.engine_learner, octavo.lab.engine_bench; print(*sys.modules)"
    command = [sys.executable, "-W", "error", "-c", program]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "octavo.engine" in loaded
    assert not {"torch", "jax", "flax"} & set(loaded)
