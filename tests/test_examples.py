"""The examples run as scripts, with the reference's flags and log lines."""

import argparse
import contextlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"

TRAIN = r"Train Epoch: 1 \[0/1437 \(0%\)\]\tLoss: \d\.\d{6}\n"
TEST = r"\nTest set: Average loss: \d\.\d{4}, Accuracy: \d+/360 \(\d+%\)\n\n"
JAX_RECIPES = ("DelayedScaling", "Float8CurrentScaling", "MXFP8BlockScaling")
RELOADED = r"Eval with reloaded checkpoint : fp8=(True|False)\n"


def torch_mnist(*flags: str, folder: Path) -> str:
    """What the script prints in a process of its own; it must succeed without a warning."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "torch_mnist.py"), *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


class Here:
    """The script run in this process, which spares the test the imports."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self._monkeypatch, self._capsys, self._folder = monkeypatch, capsys, folder

    def __call__(self, *flags: str, script: str = "torch_mnist.py") -> str:
        self._monkeypatch.chdir(self._folder)
        self._monkeypatch.setattr(sys, "argv", [script, *flags])
        with contextlib.suppress(SystemExit), torch.random.fork_rng(devices=[]):
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        out, err = self._capsys.readouterr()
        assert err == ""
        return out


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Here:
    return Here(monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize("flags", [[], ["--use-te"], ["--use-fp8"]])
def test_a_dry_run_prints_the_reference_s_lines(flags: list[str], here: Here, tmp_path: Path) -> None:
    assert re.fullmatch(TRAIN + TEST, here("--data", "digits", "--dry-run", *flags))
    assert not (tmp_path / "mnist_cnn.pt").exists()


def test_fp8_inference_calibrates_saves_and_reloads(tmp_path: Path) -> None:
    text = torch_mnist("--data", "digits", "--dry-run", "--use-fp8-infer", folder=tmp_path)
    match = re.fullmatch(TRAIN + TEST + RELOADED + TEST, text)
    assert match is not None
    assert match[1] == "True"
    state = torch.load(tmp_path / "mnist_cnn.pt", weights_only=True)
    scales = {name: value for name, value in state.items() if "scale" in name}
    assert scales
    assert any((value != 1).any() for value in scales.values())


def test_a_saved_fp8_model_tests_the_same_after_reloading(here: Here) -> None:
    text = here("--data", "digits", "--use-fp8", "--save-model", "--epochs", "1", "--batch-size", "128")
    before, after = re.findall(r"Average loss: .*", text)
    assert before == after
    assert "fp8=True" in text
    assert text.count("Train Epoch: 1 ") == 2
    assert "Train Epoch: 1 [1280/1437 (83%)]" in text


FLAGS = {
    "torch_mnist.py": {
        "batch-size": "64",
        "test-batch-size": "1000",
        "epochs": "14",
        "lr": "1.0",
        "gamma": "0.7",
        "seed": "1",
        "log-interval": "10",
        **dict.fromkeys(("use-te", "use-fp8", "use-fp8-infer", "dry-run", "save-model"), "False"),
    },
    "jax_mnist.py": {
        "batch-size": "64",
        "test-batch-size": "800",
        "epochs": "10",
        "lr": "0.01",
        "momentum": "0.9",
        "seed": "1",
        "fp8-recipe": "DelayedScaling",
        **dict.fromkeys(("use-te", "use-fp8", "dry-run"), "False"),
    },
}


@pytest.mark.parametrize("script", FLAGS)
def test_the_flags_have_the_reference_s_defaults(script: str, here: Here) -> None:
    text = " ".join(here("--help", script=script).partition("options:")[2].split())
    for flag, default in FLAGS[script].items():
        match = re.search(rf"--{flag} .*?\(default: ([^)]*)\)", text)
        assert match is not None, flag
        assert match[1] == default, flag


EPOCH = r"Epoch: {:>2} Train Loss: (\d\.\d{{6}}) Train Accuracy: (\d\.\d{{6}}) Test Loss: (\d\.\d{{6}}) Test Accuracy: (\d\.\d{{6}})\n"


@pytest.mark.parametrize("flags", [[], ["--use-te"], ["--use-fp8", "--fp8-recipe", "nvfp4"]])
def test_a_dry_run_of_jax_passes(flags: list[str], here: Here) -> None:
    assert here("--data", "digits", "--dry-run", *flags, script="jax_mnist.py") == "PASSED\n"


@pytest.mark.parametrize("flags", [["--use-te"], *(["--use-fp8", "--fp8-recipe", name] for name in JAX_RECIPES)])
def test_the_network_of_jax_learns_in_each_precision(flags: list[str], here: Here) -> None:
    """The reference's thresholds, shortened: digits for MNIST, and what five epochs of batch 16 come to."""
    shorter = ("--data", "digits", "--epochs", "5", "--batch-size", "16", "--test-batch-size", "360", "--lr", "0.02")
    text = here(*shorter, *flags, script="jax_mnist.py")
    match = re.fullmatch("".join(EPOCH.format(epoch) for epoch in range(1, 6)), text)
    assert match is not None, text
    train_loss, train_accuracy, test_loss, test_accuracy = map(float, match.groups()[-4:])
    assert train_loss < 0.5, text
    assert train_accuracy > 0.8, text
    assert test_loss < 0.3, text
    assert test_accuracy > 0.9, text


def test_a_batch_larger_than_the_data_is_one_line(here: Here) -> None:
    with pytest.raises(SystemExit, match="--batch-size 2000 exceeds the 1437 training images; give fewer"):
        runpy.run_path(str(EXAMPLES / "jax_mnist.py"))["train_and_evaluate"](
            argparse.Namespace(data="digits", batch_size=2000)
        )


@pytest.mark.parametrize("method", ["direct", "hybrid", "mxfp8"])
def test_an_emulated_dry_run_prints_the_lines_and_what_was_lost(method: str, here: Here) -> None:
    flags = ("--method", method, "--exempt", "conv1", "fc*", "--output-fused", "conv2", "--loss-scale", "1024")
    text = here("--data", "digits", "--dry-run", "--stats-every", "1", *flags, script="emulate_mnist.py")
    lines, _, table = text.partition("Tensors that lost most:\n")
    assert re.fullmatch(TRAIN + TEST.replace(r"\d+%", r"\d+\.\d+%"), lines)
    assert "conv2" in table
    assert "conv1" not in table
    assert "fc" not in table


@pytest.mark.parametrize("method", ["fp32", "direct", "hybrid"])
def test_the_residual_network_learns(method: str, here: Here) -> None:
    flags = ("--data", "digits", "--method", method, "--steps", "25", "--log-interval", "24")
    text = here(*flags, script="emulate_resnet.py")
    first, last = map(float, re.findall(r"step \d+/25  loss (\d\.\d{4})", text))
    assert last < 0.6 * first, text
    assert re.search(r"test accuracy \d+\.\d\d%\n", text)


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_enough_to_read(script: Path) -> None:
    assert len(script.read_text().splitlines()) < 180
