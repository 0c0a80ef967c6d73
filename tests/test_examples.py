"""The examples run as scripts, with the reference's flags and log lines."""

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

    def __call__(self, *flags: str) -> str:
        self._monkeypatch.chdir(self._folder)
        self._monkeypatch.setattr(sys, "argv", ["torch_mnist.py", *flags])
        with contextlib.suppress(SystemExit), torch.random.fork_rng(devices=[]):
            runpy.run_path(str(EXAMPLES / "torch_mnist.py"), run_name="__main__")
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


def test_the_flags_have_the_reference_s_defaults(here: Here) -> None:
    text = " ".join(here("--help").partition("options:")[2].split())
    defaults = {
        "batch-size": "64",
        "test-batch-size": "1000",
        "epochs": "14",
        "lr": "1.0",
        "gamma": "0.7",
        "seed": "1",
        "log-interval": "10",
        **dict.fromkeys(("use-te", "use-fp8", "use-fp8-infer", "dry-run", "save-model"), "False"),
    }
    for flag, default in defaults.items():
        match = re.search(rf"--{flag} .*?\(default: ([^)]*)\)", text)
        assert match is not None, flag
        assert match[1] == default, flag


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_enough_to_read(script: Path) -> None:
    assert len(script.read_text().splitlines()) < 120
