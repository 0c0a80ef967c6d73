"""Real processes, killed at random and at chosen moments, interrupted, and out of disk: what resumes ends with the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from octavo.checkpoint import load

STEPS = 48
CONFIG = f"""
train_input: {{data: digits, batch_size: 32}}
eval_input: {{data: digits, batch_size: 100}}
model: {{hidden_sizes: [24, 16], dropout: 0.2}}
optimizer:
  learning_rate: {{scheduler: CosineDecay, initial_learning_rate: 0.05, decay_steps: {STEPS}}}
  momentum: 0.9
  max_gradient_norm: 1.0
  loss_scaling_factor: dynamic
  steps_per_increase: 7
  grad_accum_steps: 2
runconfig: {{max_steps: {STEPS}, checkpoint_steps: 3, keep_checkpoints: 2, log_steps: 2, eval_frequency: 8}}
precision: {{recipe: delayed_scaling, amax_history_len: 4}}
"""
"""A checkpoint every few milliseconds, and state of every kind: momenta, a loss scale, amax histories, dropout, a falling rate."""

PROLOGUE = """
import os, signal, sys
sys.argv, out = {argv!r}, open({log!r}, "a")
os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
{before}
from octavo.cli import main
main()
"""

DIES = """
import octavo.files
def die(): os.kill(os.getpid(), signal.SIGKILL)
"""
IN_THE_MIDDLE_OF_A_FILE = (
    DIES
    + """
class Half:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def write(self, content):
        global left
        left -= 1
        if left == 0: self.file.write(content[: len(content) // 2]); self.file.flush(); die()
        return self.file.write(content)
    def __getattr__(self, name): return getattr(self.file, name)
octavo.files.open = lambda *arguments: Half(open(*arguments))
"""
)
AT_A_CALL = (
    DIES
    + """
real = os.{call}
def killed(*arguments):
    global left
    left -= 1
    if left == 0 and {before_it}: die()
    result = real(*arguments)
    if left == 0: die()
    return result
os.{call} = killed
"""
)

MOMENTS = {
    **{f"half-written-{turn}": f"left = {turn}" + IN_THE_MIDDLE_OF_A_FILE for turn in (3, 9, 16)},
    **{
        f"{'before' if before else 'after'}-{call}-{turn}": f"left = {turn}"
        + AT_A_CALL.format(call=call, before_it=before)
        for call, before, turn in (
            ("replace", True, 5),
            ("replace", False, 8),
            ("fsync", True, 13),
            ("fsync", False, 22),
            ("unlink", True, 2),
        )
    },
}
"""Where a process dies: while a file is half written, before and after it takes its name, before the oldest checkpoint goes."""
RANDOM = 12

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["octavo.lab.runner", "octavo.lab.torch_learner", "octavo.lab.board", "sklearn.datasets"]
)


def start(folder: Path, *arguments: str, before: str = "") -> BaseProcess:
    """`octavo train` in a process of its own, which is forked from one that has imported everything."""
    config = folder.with_suffix(".yaml")
    config.write_text(CONFIG, encoding="utf-8")
    argv = ["octavo", "train", str(config), "--model-dir", str(folder), *arguments]
    code = PROLOGUE.format(argv=argv, log=str(folder.with_suffix(".log")), before=before)
    process = context.Process(target=exec, args=(code, {"__name__": "a run"}))
    process.start()
    return process


def finish(folder: Path, *arguments: str, before: str = "") -> int:
    process = start(folder, *arguments, before=before)
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, object], bytes]:
    tensors, header = load(folder / "checkpoints" / f"step-{STEPS:08d}.safetensors", framework="torch")
    return tensors, header, (folder / "metrics.jsonl").read_bytes()


def assert_equal(folder: Path, whole: Path) -> None:
    """Weights, optimizer, scales, loss scale and metrics of one run are those of another, bit for bit."""
    (mine, header, metrics), (theirs, their_header, their_metrics) = outcome(folder), outcome(whole)
    assert header == their_header
    assert metrics == their_metrics
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.numpy().tobytes() == theirs[name].numpy().tobytes(), name
    assert json.loads((folder / "run.json").read_text())["state"] == "finished"
    held = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert held == [f"step-{step:08d}.safetensors" for step in (STEPS - 3, STEPS)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert finish(folder) == 0, folder.with_suffix(".log").read_text()
    return folder


def test_a_run_repeats_itself(whole: Path, tmp_path: Path) -> None:
    assert finish(tmp_path / "again") == 0
    assert_equal(tmp_path / "again", whole)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_chosen_moment(moment: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert finish(folder, before=MOMENTS[moment]) == -signal.SIGKILL
    assert finish(folder) == 0
    assert_equal(folder, whole)


@pytest.mark.parametrize("seed", range(RANDOM))
def test_killed_at_a_random_moment(seed: int, whole: Path, tmp_path: Path) -> None:
    """Killed again and again, each time after somewhat more time, until it is done."""
    folder, kills, generator = tmp_path / "run", 0, random.Random(seed)
    while True:
        process = start(folder)
        process.join(generator.uniform(0, 0.25) * (kills + 1))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
        kills += 1
    assert process.exitcode == 0, folder.with_suffix(".log").read_text()
    assert kills
    assert_equal(folder, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_leaves_a_checkpoint(number: int, code: int, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ask = f"""
import octavo.lab.torch_learner as learner
real = learner.TorchLearner.update
def update(self, rows, step, rate, *, stop):
    if step == 10: os.kill(os.getpid(), {int(number)})
    return real(self, rows, step, rate, stop=stop)
learner.TorchLearner.update = update
"""
    assert finish(folder, "--set", "runconfig.checkpoint_steps=0", before=ask) == code
    state = json.loads((folder / "run.json").read_text())
    assert (state["state"], state["step"], state["exit_code"]) == ("stopped", 11, code)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000011.safetensors"]
    assert f"stopped by {signal.Signals(number).name} at step 11" in folder.with_suffix(".log").read_text()
    assert finish(folder) == 0
    assert_equal(folder, whole)


def mounted(tmp_path: Path, mount: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`octavo train` in a mount namespace of its own, after the command `mount`."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs unshare and user namespaces, to mount a small disk")
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    train = [sys.executable, "-m", "octavo.cli", "train", str(config), "--model-dir", str(tmp_path / "disk" / "run")]
    script = f'{mount} && shift 0 && "$@"; code=$?; ls "{tmp_path}/disk/run/checkpoints" >&2; exit $code'
    command = [unshare, "-rm", "sh", "-c", script, "sh", *train, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ})


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    found = mounted(tmp_path, f'mount -t tmpfs -o size=500k none "{disk}"', "--set", "runconfig.keep_checkpoints=40")
    assert found.returncode == 1
    told, *held = found.stderr.strip().splitlines()
    assert told.startswith("octavo: ")
    assert "No space left on device" in told
    assert held
    assert all(name.startswith("step-") for name in held)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "run").mkdir(parents=True)
    found = mounted(tmp_path, f'mount --bind "{disk}" "{disk}" && mount -o remount,ro,bind "{disk}"')
    assert found.returncode == 1
    told = found.stderr.strip().splitlines()[0]
    assert told.startswith("octavo: ")
    assert "Read-only file system" in told
