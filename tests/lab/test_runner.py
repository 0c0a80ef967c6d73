"""A run from its configuration: what it leaves behind, how it resumes, and what it says of whatever cannot go on."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo.checkpoint import load, save
from octavo.cli import main
from octavo.lab import config_file
from octavo.lab.data import Source
from octavo.lab.data import load as load_data
from octavo.lab.learner import Order, images, in_batches, shares
from octavo.lab.networks import start
from octavo.lab.runner import make_learner
from octavo.lab.sections import Input
from octavo.lab.training import DivergenceError

ROOT = Path(__file__).parents[2]
CONFIG = """
train_input: {data: digits, batch_size: 32}
eval_input: {data: digits, batch_size: 100}
model: {hidden_sizes: [24, 16]}
optimizer: {learning_rate: 0.02, momentum: 0.9}
runconfig: {max_steps: 12, checkpoint_steps: 4, log_steps: 4, eval_frequency: 6, save_initial_checkpoint: true}
"""


WARMED_UP = """[
  {scheduler: Linear, initial_learning_rate: 0.0, end_learning_rate: 0.02, decay_steps: 20},
  {scheduler: Constant, learning_rate: 0.02},
]"""


class Lab:
    """The command line, called in this process, with a configuration and a folder of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.run = folder, folder / "run"
        self.config = folder / "run.yaml"
        self.config.write_text(CONFIG, encoding="utf-8")
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Standard output, or the one line of an error, of `octavo arguments`, which ends with `code`."""
        self._monkeypatch.setattr(sys, "argv", ["octavo", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self._capsys.readouterr()
        assert ended.value.code == code, err
        if code:
            assert err.count("\n") == 1, err
            assert err.startswith("octavo: ")
        return str(err if code else out)

    def train(self, *overrides: str, code: int = 0) -> str:
        return self("train", str(self.config), "--model-dir", str(self.run), *overrides, code=code)

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def checkpoint(self, step: int) -> Path:
        return self.run / "checkpoints" / f"step-{step:08d}.safetensors"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lab:
    return Lab(tmp_path, monkeypatch, capsys)


def test_a_run_prints_the_runner_s_lines_and_leaves_its_files(lab: Lab) -> None:
    out = lab.train()
    assert re.search(r"^\| Train Device=cpu Step=4 Loss=\d\.\d{5} Time=\d\d:\d\d:\d\d$", out, re.M)
    assert re.search(r"^\| Eval Device=cpu Step=6 Loss=\d\.\d{5} Time=\d\d:\d\d:\d\d$", out, re.M)
    assert re.search(r"^Avg eval_metrics = \{'accuracy': 0\.\d+\}$", out, re.M)
    assert re.search(r"^Avg Eval\. Loss = \d\.\d+$", out, re.M)
    assert [line for line in out.splitlines() if line.startswith("Saving")] == [
        f"Saving checkpoint at step : {step}." for step in (0, 4, 8, 12)
    ]
    assert out.endswith("Training Completed Successfully!\n")
    assert sorted(path.name for path in lab.run.iterdir() if path.name[0] != ".") == [
        "checkpoints", "config.yaml", "metrics.jsonl", "run.json", "tensorboard",
    ]  # fmt: skip
    assert [(record["kind"], record["step"]) for record in lab.records()] == [
        ("train", 4), ("eval", 6), ("train", 8), ("train", 12), ("eval", 12),
    ]  # fmt: skip
    state = json.loads((lab.run / "run.json").read_text())
    assert (state["state"], state["step"], state["max_steps"], state["exit_code"]) == ("finished", 12, 12, 0)
    assert state["accuracy"] == lab.records()[-1]["accuracy"]
    resolved = config_file.read(lab.run / "config.yaml")
    assert resolved.hash == config_file.read(lab.config, model_dir=str(lab.run)).hash
    assert [path.name for path in sorted((lab.run / "checkpoints").iterdir())] == [
        f"step-{step:08d}.safetensors" for step in (4, 8, 12)
    ]


def test_scalars_are_on_the_board(lab: Lab) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lab.train()
    found = EventAccumulator(str(lab.run / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [4, 8, 12]
    assert [event.value for event in found.Scalars("eval/accuracy")] == pytest.approx(
        [record["accuracy"] for record in lab.records() if record["kind"] == "eval"]
    )


def test_more_steps_go_on_from_the_last_checkpoint(lab: Lab) -> None:
    lab.train()
    assert "Resuming from" in lab.train("runconfig.max_steps", "20", "runconfig.eval_frequency", "10")
    assert json.loads((lab.run / "run.json").read_text())["step"] == 20
    assert [record["step"] for record in lab.records()] == [4, 6, 8, 12, 12, 16, 20, 20]
    assert "Training Completed" in lab.train("runconfig.max_steps", "20")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "delayed_scaling", "mxfp8", "nvfp4", "direct", "hybrid"])
def test_every_kind_of_precision_learns(lab: Lab, precision: str) -> None:
    lab.train("precision", precision, "runconfig.max_steps", "150", "runconfig.eval_frequency", "150")
    assert lab.records()[-1]["accuracy"] > 0.8


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.optimizer_type", "AdamW", "optimizer.momentum", "null", "optimizer.learning_rate", "0.002"],
        ["optimizer.max_gradient_norm", "1.0"],
        ["optimizer.max_gradient_value", "0.1"],
        ["optimizer.loss_scaling_factor", "1024"],
        ["optimizer.loss_scaling_factor", "dynamic", "precision", "fp16"],
        ["optimizer.grad_accum_steps", "4", "precision", "delayed_scaling"],
        ["optimizer.learning_rate", WARMED_UP],
        ["model.activation_fn", "gelu", "model.use_bias", "false", "model.disable_softmax", "true"],
    ],
    ids=lambda overrides: overrides[0].split(".")[1] + "=" + overrides[1].split(",")[0].split("\n")[0],
)  # fmt: skip
def test_every_option_of_the_optimizer_learns(lab: Lab, overrides: list[str]) -> None:
    lab.train(*overrides, "runconfig.max_steps", "150", "runconfig.eval_frequency", "150")
    assert lab.records()[-1]["accuracy"] > 0.8


def test_one_update_is_that_of_numpy(lab: Lab) -> None:
    """Two updates of SGD with momentum and weight decay, clipped, on a network of one hidden layer, in float64 by hand."""
    config = config_file.read(
        lab.config,
        ["model.hidden_sizes", "[24]", "optimizer.max_gradient_norm", "0.5", "optimizer.weight_decay_rate", "0.01"],
    )
    data = images(config)
    learner = make_learner(config, data)
    pixels = ((data.train_images.astype(np.float64) / 255 - 0.1307) / 0.3081).reshape(len(data.train_images), -1)
    weights = {name: value.astype(np.float64) for name, value in start(config.model, config.runconfig.seed).items()}
    moments = {name: np.zeros_like(value) for name, value in weights.items()}
    for step in range(2):
        rows = np.arange(32) + 32 * step
        x, labels = pixels[rows], data.train_labels[rows]
        hidden = np.maximum(x @ weights["fc1.weight"].T + weights["fc1.bias"], 0)
        logits = hidden @ weights["fc2.weight"].T + weights["fc2.bias"]
        probabilities = np.exp(logits - logits.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        loss = -np.log(probabilities[np.arange(32), labels]).mean()
        grad = probabilities.copy()
        grad[np.arange(32), labels] -= 1
        grad /= 32
        behind = (grad @ weights["fc2.weight"]) * (hidden > 0)
        grads = {
            "fc1.weight": behind.T @ x,
            "fc1.bias": behind.sum(0),
            "fc2.weight": grad.T @ hidden,
            "fc2.bias": grad.sum(0),
        }
        norm = np.sqrt(sum((value**2).sum() for value in grads.values()))
        for name, value in grads.items():
            clipped = value * min(1, 0.5 / (norm + 1e-6)) + 0.01 * weights[name]
            moments[name] = 0.9 * moments[name] + clipped
            weights[name] = weights[name] - 0.02 * moments[name]
        assert learner.update(rows, step, 0.02, stop=False).loss == pytest.approx(loss, rel=1e-5)
    for name, tensor in learner.snapshot().tensors.items():
        if name.startswith("model."):
            np.testing.assert_allclose(tensor.numpy(), weights[name.removeprefix("model.")], rtol=1e-4, atol=1e-6)


def test_replicas_and_micro_batches_share_a_batch_without_overlap_or_loss() -> None:
    rows = np.arange(101)
    for replicas in (1, 2, 3, 4):
        for micro in (1, 2, 5):
            parts = [
                part for rank in range(replicas) for part in shares(rows, rank=rank, replicas=replicas, micro=micro)
            ]
            assert np.concatenate(parts).tolist() == rows.tolist()
            assert len(parts) == replicas * micro


def test_an_epoch_takes_every_image_once() -> None:
    order = Order(samples=100, input=Input(batch_size=32, drop_last_batch=False), seed=3)
    epochs = [np.concatenate([order.rows(step + 4 * epoch) for step in range(4)]) for epoch in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(100))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()
    plain = list(in_batches(100, Input(batch_size=32, shuffle=False), epoch=0, seed=3))
    assert np.concatenate(plain).tolist() == list(range(96))
    assert Order(samples=100, input=Input(batch_size=32), seed=3, per_epoch=2).rows(2).tolist() != plain[0].tolist()


def test_eval_takes_the_newest_checkpoint_or_the_one_given(lab: Lab) -> None:
    lab.train()
    out = lab("eval", str(lab.config), "--model-dir", str(lab.run))
    assert f"Avg Eval. Loss = {lab.records()[-1]['loss']}" in out
    early = lab("eval", str(lab.config), "--model-dir", str(lab.run), "--checkpoint-path", str(lab.checkpoint(4)))
    assert "Step=4 " in early
    assert early != out
    fewer = lab("eval", str(lab.config), "--model-dir", str(lab.run), "runconfig.eval_steps", "1")
    assert "'accuracy'" in fewer
    assert "'accuracy'" not in lab(
        "eval", str(lab.config), "--model-dir", str(lab.run), "model.compute_eval_metrics=false"
    )


def test_eval_with_nothing_to_load(lab: Lab) -> None:
    told = lab("eval", str(lab.config), "--model-dir", str(lab.run), code=1)
    assert "holds no checkpoint to evaluate; train first, or give --checkpoint_path FILE" in told
    told = lab("eval", str(lab.config), "--checkpoint-path", str(lab.folder / "none.safetensors"), code=1)
    assert "none.safetensors: no such checkpoint" in told


def test_a_run_begins_from_a_checkpoint_that_is_given(lab: Lab) -> None:
    lab.train()
    other = lab.folder / "other"
    out = lab("train", str(lab.config), "--model-dir", str(other), "--checkpoint-path", str(lab.checkpoint(8)))
    assert "Resuming from" in out
    assert "at step : 8." in out
    ends = [
        load(folder / "checkpoints" / "step-00000012.safetensors", framework="torch")[0] for folder in (lab.run, other)
    ]
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


def test_never_resume(lab: Lab) -> None:
    lab.train()
    assert "holds a run already; name another model_dir" in lab.train("--resume", "never", code=1)
    assert "--resume is one of auto, never" in lab.train("--resume", "perhaps", code=2)


def test_another_configuration_does_not_resume(lab: Lab) -> None:
    lab.train()
    before = sorted((path, path.stat().st_mtime_ns) for path in (lab.run / "checkpoints").iterdir())
    told = lab.train("optimizer.momentum", "0.5", "train_input.batch_size=16", code=1)
    assert "of another configuration" in told
    assert "optimizer.momentum 0.9 there, 0.5 here; train_input.batch_size 32 there, 16 here" in told
    assert "of another configuration" in lab.train("precision", "mxfp8", code=1)
    assert sorted((path, path.stat().st_mtime_ns) for path in (lab.run / "checkpoints").iterdir()) == before
    assert "Training Completed" in lab.train("runconfig.max_steps", "16")


def test_other_images_do_not_resume(lab: Lab) -> None:
    lab.train()
    tensors, header = load(lab.checkpoint(12), framework="torch")
    save(lab.checkpoint(12), tensors, header={**header, "data": "0" * 64}, framework="torch")
    assert "trained on other images than scikit-learn's" in lab.train("runconfig.max_steps", "16", code=1)


def test_a_checkpoint_of_another_model_lists_the_tensors_that_differ(lab: Lab) -> None:
    lab.train()
    told = lab("eval", str(lab.config), "--model-dir", str(lab.run), "model.hidden_sizes", "[24, 20]", code=1)
    assert (
        "of another model: fc2.weight [16, 24] instead of [20, 24], fc2.bias [16] instead of [20], fc3.weight [10, 16]"
        in told
    )
    told = lab("eval", str(lab.config), "--model-dir", str(lab.run), "model.hidden_sizes", "[24, 16, 8]", code=1)
    assert "fc4.weight missing" in told
    told = lab("eval", str(lab.config), "--model-dir", str(lab.run), "model.hidden_sizes", "[24]", code=1)
    assert "fc3.weight unknown" in told


def test_a_damaged_checkpoint_is_one_line_and_stays(lab: Lab) -> None:
    lab.train()
    path = lab.checkpoint(12)
    whole = path.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "truncated"),
        (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "damaged, its SHA-256 is not the one written"),
        (b"", "truncated"),
    ):
        path.write_bytes(content)
        told = lab.train("runconfig.max_steps", "16", code=1)
        assert message in told
        assert "use an earlier checkpoint" in told
        assert path.read_bytes() == content
    path.unlink()
    assert "at step : 8." in lab.train("runconfig.max_steps", "16")


def test_every_flipped_bit_of_a_small_checkpoint_is_found(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    save(path, {"x": np.arange(3, dtype=np.float32)}, header={"step": 3}, framework="numpy")
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(ValueError, match=r"small\.safetensors: ") as caught:
                load(path, framework="numpy")
            assert "\n" not in str(caught.value)


def test_a_checkpoint_from_a_newer_version(lab: Lab) -> None:
    lab.train()
    tensors, header = load(lab.checkpoint(12), framework="torch")
    save(lab.checkpoint(12), tensors, header={**header, "run_version": 9}, framework="torch")
    assert "from a newer octavo, this one reads runs of version 1" in lab.train("runconfig.max_steps", "16", code=1)
    save(lab.checkpoint(12), tensors, header={"step": 12}, framework="torch")
    assert "holds no run to go on with" in lab.train("runconfig.max_steps", "16", code=1)


@pytest.mark.parametrize(
    "overrides", [["optimizer.learning_rate", "1e30"], ["optimizer.learning_rate", "1e30", "precision", "mxfp8"]]
)
def test_nan_names_the_layer_and_leaves_the_last_checkpoint(lab: Lab, overrides: list[str]) -> None:
    told = lab.train(*overrides, code=1)
    assert re.search(
        r"training stopped at step \d+: the output of layer 'fc\d'|parameter 'fc\d|the gradient of 'fc\d", told
    )
    assert json.loads((lab.run / "run.json").read_text())["state"] == "failed"
    assert lab.checkpoint(0).exists()


def test_nan_in_the_data_is_named_as_the_input(lab: Lab) -> None:
    config = config_file.read(lab.config)
    learner = make_learner(config, images(config))
    learner.data.train_inputs[5, 0, 3, 3] = float("nan")  # type: ignore[attr-defined]
    before = {name: value.clone() for name, value in learner.snapshot().tensors.items()}
    with pytest.raises(DivergenceError, match="step 1: the input holds NaN"):
        learner.update(np.arange(32), 0, 0.1, stop=False)
    assert all(torch.equal(value, before[name]) for name, value in learner.snapshot().tensors.items())


def test_a_data_folder_that_vanishes_costs_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images are in memory: the run goes on to its end, and what comes after says that they are gone."""
    folder = lab.folder / "mnist"
    folder.mkdir()
    digits = load_data(Source.DIGITS)
    for part, pixels, labels in (
        ("train", digits.train_images, digits.train_labels),
        ("t10k", digits.test_images, digits.test_labels),
    ):
        shape = b"".join(size.to_bytes(4, "big") for size in pixels.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + shape + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + shape[:4] + labels.tobytes())
    where = ["train_input.data_dir", str(folder), "eval_input.data_dir", str(folder)]
    from octavo.lab.torch_learner import TorchLearner

    real = TorchLearner.update

    def vanishing(self: TorchLearner, *arguments: Any, **keywords: Any) -> Any:
        shutil.rmtree(folder, ignore_errors=True)
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(TorchLearner, "update", vanishing)
    assert "Training Completed" in lab.train(*where)
    monkeypatch.setattr("octavo.lab.data.MIRRORS", ())
    folder.mkdir()
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"")
    told = lab.train(*where, "runconfig.max_steps", "16", code=1)
    assert "lacks t10k-images-idx3-ubyte" in told or "lacks" in told
    assert lab.checkpoint(12).exists()


def test_a_batch_larger_than_the_data(lab: Lab) -> None:
    assert "train_input.batch_size 4096 exceeds the 1437 training images" in lab.train(
        "train_input.batch_size", "4096", code=1
    )
    told = lab.train("runconfig.max_steps=null", "runconfig.num_epochs=1", "runconfig.steps_per_epoch=99", code=1)
    assert "runconfig.steps_per_epoch 99 exceeds the 44 batches" in told


def test_two_processes_do_not_train_in_one_folder(lab: Lab) -> None:
    lab.train()
    from octavo.lab.run_folder import RunFolder

    with RunFolder(lab.run).lock():
        assert "only one may" in lab.train("runconfig.max_steps", "16", code=1)


def test_a_transformer_is_not_trained_here(lab: Lab) -> None:
    told = lab.train("model={name: transformer, hidden_size: 64}", code=1)
    assert "model.name: transformer is for octavo validate and octavo compile" in told


def test_runs_are_listed_and_drawn(lab: Lab) -> None:
    lab.train()
    lab("train", str(lab.config), "--model-dir", str(lab.folder / "other"), "precision", "mxfp8")
    table = lab("runs", str(lab.folder)).splitlines()
    assert {line.split()[0] for line in table[2:]} == {"run", "other"}
    assert all("finished" in line and "12" in line for line in table[2:])
    page = lab.folder / "page.html"
    assert lab("report", str(lab.run), str(lab.folder / "other"), "--out", str(page)) == f"wrote {page}\n"
    assert "mxfp8" in page.read_text(encoding="utf-8")
    assert "no run is here" in lab("report", str(lab.folder / "nothing"), code=1)


def test_a_configuration_is_validated_and_compiled(lab: Lab) -> None:
    found = json.loads(lab("validate", str(lab.config), "precision", "delayed_scaling", "--target", "sm90", "--json"))
    assert found
    assert "fc1" in lab("validate", str(lab.config))
    assert "did you mean 'sm90'?" in lab("validate", str(lab.config), "--target", "sm91", code=1)
    lab.train()
    out = lab.folder / "model.pt2"
    told = lab("compile", str(lab.config), "-o", str(out), f"runconfig.model_dir={lab.run}")
    assert str(out) in told
    from octavo.lab.compiled import load_compiled

    config = config_file.read(lab.config, model_dir=str(lab.run))
    learner = make_learner(config, images(config))
    learner.restore(load(lab.checkpoint(12), framework="torch")[0], None)
    x = learner.data.test_inputs[:32]  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.equal(load_compiled(out).infer(x), learner.network.eval()(x))  # type: ignore[attr-defined]


def example(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "examples" / "fc_mnist" / "run.py"
    return subprocess.run(
        [sys.executable, "-W", "error", str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=300,
    )


def test_the_example_has_the_runner_s_flags(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text(CONFIG, encoding="utf-8")
    done = example("-p", str(params), "-m", "train_and_eval", "-o", "out", "runconfig.max_steps", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("Training Completed Successfully!\n")
    done = example("--params", str(params), "--mode", "eval", "--model_dir", "out", cwd=tmp_path)
    assert "Avg Eval. Loss = " in done.stdout, done.stderr
    done = example("--params", str(params), "--validate_only", "--target", "sm90", cwd=tmp_path)
    assert "sm90, NVIDIA H100" in done.stdout, done.stderr
    assert not (tmp_path / "model_dir").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--validate_only", "--compile_only"], "not allowed with argument"),
        (["--cs_ip", "10.0.0.1"], "octavo: --cs_ip 10.0.0.1: no Cerebras system can be reached from here"),
        (["--mode", "eval"], "holds no checkpoint to evaluate"),
        (["--mode", "evaluate"], "invalid choice: 'evaluate'"),
        (["--num_replicas", "64"], "batch_size 32 must be a multiple of 64 replicas"),
        (["--validate_only", "--target", "sm91"], "did you mean 'sm90'?"),
    ],
)
def test_the_example_answers_mistakes_in_a_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text(CONFIG, encoding="utf-8")
    done = example("--params", str(params), *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
