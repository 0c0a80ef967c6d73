"""The engine's examples run as scripts: log lines, equal losses, one-line errors."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "engine_mnist"
SCRIPTS = ("train_pytorch", "train_manual", "train_autograd")

BATCH = r"  Batch 100/179, Loss: (\d\.\d{4}), Acc: (\d\.\d{4})\n"
EPOCH = r"Epoch \d/2\n" + BATCH + r"  Train Loss: (\d\.\d{4}), Train Acc: (\d\.\d{4}), Test Acc: (\d\.\d{4})\n"
END = (
    r"\nFinal test accuracy: \d+\.\d\d%\nWarm-up: \d+\.\d\d s \(5 batches\)\nTraining: \d+\.\d\d s, tests apart\n"
    r"Average epoch: \d+\.\d{3} s\nPeak memory of "
)
ENGINE_END = r"tensors: \d\.\d MB, weights included, images apart\nAllocated in the last epoch: 0 bytes\n"
TORCH_END = r"the process: \d+ MB \(of its CPU tensors PyTorch keeps no count\)\n"
FLAGS = ("--data", "digits", "--batch-size", "8", "--epochs", "2", "--lr", "0.02")


def ran(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{script}.py"), *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def figures(script: str, *flags: str) -> list[float]:
    """The losses and accuracies in the log, every line of which is looked at."""
    done = ran(script, *FLAGS, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    end = TORCH_END if script == "train_pytorch" else ENGINE_END
    match = re.fullmatch(r"data: .*digits.*\n" + 2 * EPOCH + END + end, done.stdout)
    assert match is not None, done.stdout
    return [float(group) for group in match.groups()]


@pytest.fixture(scope="module")
def by_hand() -> list[float]:
    return figures("train_manual")


def test_the_three_scripts_log_the_same_run(by_hand: list[float]) -> None:
    assert by_hand[4] > 0.9
    for script in ("train_pytorch", "train_autograd"):
        assert figures(script) == pytest.approx(by_hand, abs=1.5e-4)  # the last digit of the log


def test_a_graph_logs_what_calls_log(by_hand: list[float]) -> None:
    assert figures("train_manual", "--no-graph") == by_hand


def test_fp8_learns_as_well_and_the_same_as_a_graph(by_hand: list[float]) -> None:
    found = figures("train_autograd", "--recipe", "delayed_scaling")
    assert found == figures("train_autograd", "--recipe", "delayed_scaling", "--no-graph")
    assert found != by_hand
    assert found == pytest.approx(by_hand, abs=0.02)


STEPWISE = """
import argparse, sys
import numpy as np
from octavo.lab.data import Source, batches, load
from octavo.lab.models import ModelName, initial_weights
sys.path.insert(0, sys.argv[1])
data, losses = load(Source.DIGITS), []
x = data.train_images.reshape(-1, 784).astype(np.float32) / 255
order = np.stack([*batches(len(x), 128, epoch=0, seed=1), *batches(len(x), 128, epoch=1, seed=1)])
for name in ("train_pytorch", "train_manual", "train_autograd"):
    module = __import__(name)
    wrap = getattr(module, "torch", None) or module.engine
    args = argparse.Namespace(lr=0.1, batch_size=128, graph=False, recipe=None, compile=False)
    y = data.train_labels.astype(np.int64)
    prepared = module.prepare(initial_weights(ModelName.MLP, 1), wrap.from_numpy(x), wrap.from_numpy(y), args)
    losses.append(prepared[1](order)[0].tolist())
print(losses)
"""


def test_each_step_s_loss_is_the_same_to_a_ten_thousandth() -> None:
    done = subprocess.run([sys.executable, "-c", STEPWISE, str(EXAMPLES)], capture_output=True, text=True, check=True)
    torch, *engine = json.loads(done.stdout)
    assert len(torch) == 22
    for losses in engine:
        assert losses == pytest.approx(torch, rel=1e-4)


def test_the_engine_s_scripts_import_no_framework() -> None:
    for script in SCRIPTS[1:]:
        code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import {script}; print({{'torch', 'jax'}} & {{*sys.modules}})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "set()\n"


BAD = {
    "no epochs": (("--epochs", "0"), "--batch-size is 1 to 1437, --epochs 1 or more"),
    "a batch too large": (("--batch-size", "1438"), "--batch-size is 1 to 1437"),
    "no rate": (("--lr", "nan"), "--lr above 0 and finite"),
    "a rate of words": (("--lr", "fast"), "argument --lr: invalid float value: 'fast'"),
    "a negative seed": (("--seed", "-1"), "seed must be at least 0"),
    "other data": (("--data", "cifar"), "invalid choice: 'cifar'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_flag_is_one_line(case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = BAD[case]
    for script in SCRIPTS:
        error = refused(script, ("--data", "digits", *flags), monkeypatch, capsys)
        assert message in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--recipe", "delayed_scalin"), "no recipe is called 'delayed_scalin'; did you mean 'delayed_scaling'?"),
        (("--recipe", "mxfp8"), "runs in NumPy while a step is captured"),
    ],
)
def test_a_recipe_that_cannot_be_is_one_line(
    flags: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused("train_autograd", ("--data", "digits", *flags), monkeypatch, capsys)


def test_broken_data_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (tmp_path / f"{part}-{kind}-ubyte").write_bytes(b"none")
    monkeypatch.setenv("OCTAVO_DATA", str(tmp_path))
    assert str(tmp_path) in refused("train_manual", ("--data", "mnist"), monkeypatch, capsys)


def refused(
    script: str, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What the script says on standard error, a line, as it ends with 2 and nothing printed before."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    out, error = capsys.readouterr()
    assert (ended.value.code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"{script}.py: ")
    return error


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_enough_to_read(script: str) -> None:
    assert len((EXAMPLES / f"{script}.py").read_text().splitlines()) < 120
