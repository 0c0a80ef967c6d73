"""Replicas started by torchrun, for real: they follow one process, agree on every scale, and survive one of them being killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo.checkpoint import load

STEPS = 12
CONFIG = f"""
train_input: {{data: digits, batch_size: 32}}
eval_input: {{data: digits, batch_size: 100}}
model: {{hidden_sizes: [48, 32]}}
optimizer: {{learning_rate: 0.02, momentum: 0.9}}
runconfig: {{max_steps: {STEPS}, checkpoint_steps: 4, log_steps: 1, eval_frequency: 6}}
"""


def command(folder: Path, *arguments: str) -> list[str]:
    config = folder.with_suffix(".yaml")
    config.write_text(CONFIG, encoding="utf-8")
    return [sys.executable, "-m", "octavo.cli", "train", str(config), "--model-dir", str(folder), *arguments]


def trained(folder: Path, *arguments: str) -> Path:
    """A run that has ended; its folder."""
    done = subprocess.run(command(folder, *arguments), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def losses(folder: Path) -> dict[tuple[str, int], float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(record["kind"], record["step"]): record["loss"] for record in records}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder / "checkpoints" / f"step-{STEPS:08d}.safetensors", framework="torch")[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one process, by precision."""
    folder = tmp_path_factory.mktemp("alone")
    return {word: trained(folder / word, "precision", word) for word in ("fp32", "delayed_scaling")}


@pytest.mark.parametrize(
    ("replicas", "precision", "tolerance", "more"),
    [
        (2, "fp32", 1e-5, ["optimizer.grad_accum_steps", "2"]),
        (2, "delayed_scaling", 1e-4, []),
        (2, "delayed_scaling", 1e-4, ["runconfig.parallel", "fsdp2"]),
        (4, "fp32", 1e-5, []),
        (4, "delayed_scaling", 1e-4, []),
    ],
)
def test_replicas_follow_one(
    alone: dict[str, Path], tmp_path: Path, replicas: int, precision: str, tolerance: float, more: list[str]
) -> None:
    folder = trained(tmp_path / "run", "precision", precision, "runconfig.num_replicas", str(replicas), *more)
    mine, theirs = losses(folder), losses(alone[precision])
    assert mine.keys() == theirs.keys()
    for place, loss in mine.items():
        assert loss == pytest.approx(theirs[place], rel=tolerance), place
    assert weights(folder).keys() == weights(alone[precision]).keys()


def test_two_agents_as_on_two_machines_train_one_run(alone: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    agent += [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=octavo", "--max-restarts=3", "--module"]
    train = [*command(folder, "precision", "delayed_scaling", "runconfig.num_replicas", "2")[2:]]
    agents = [
        subprocess.Popen([*agent, *train], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    told = [process.communicate(timeout=300)[1] for process in agents]
    assert [process.returncode for process in agents] == [0, 0], told
    for place, loss in losses(alone["delayed_scaling"]).items():
        assert losses(folder)[place] == pytest.approx(loss, rel=1e-4), place


SCALES = """
import json, os, sys
import torch
import octavo.torch.context as context
from octavo.lab import config_file
from octavo.lab.learner import images
from octavo.lab.runner import make_learner

calls, real = [], torch.distributed.all_reduce
def counted(tensor, *arguments, **keywords):
    calls.append(keywords.get("op"))
    return real(tensor, *arguments, **keywords)
torch.distributed.all_reduce = counted
config = config_file.read(sys.argv[1], ["precision", "delayed_scaling"], num_replicas=2)
learner = make_learner(config, images(config))
import numpy as np
for step in range(3):
    learner.update(np.arange(32) + 32 * step, step, 0.05, stop=False)
calls.clear()
learner.update(np.arange(32), 3, 0.05, stop=False)
state = {name: value.tolist() for name, value in learner.network.state_dict().items() if "scale" in name or "amax" in name}
found = {"reductions": calls.count(torch.distributed.ReduceOp.MAX), "state": state}
open(sys.argv[2] + os.environ["RANK"], "w").write(json.dumps(found))
learner.close()
sys.stdout.flush()
os._exit(0)
"""


def test_ranks_hold_equal_scales_and_reduce_amaxes_once_a_step(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "scales.py").write_text(SCALES, encoding="utf-8")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(tmp_path / "scales.py"), str(tmp_path / "config.yaml"), str(tmp_path / "rank")]
    subprocess.run([*run, *arguments], check=True, capture_output=True, timeout=300)
    one, two = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1))
    assert one == two
    assert one["reductions"] == 1
    assert any(
        value != 1 for name, scales in one["state"].items() if name.endswith("scale_forward") for value in scales
    )


def test_one_of_two_replicas_is_killed_and_the_job_ends_as_if_not(tmp_path: Path) -> None:
    precision = ["precision", "delayed_scaling", "runconfig.num_replicas", "2", "runconfig.max_steps", "600"]
    often = [
        *precision,
        "runconfig.checkpoint_steps",
        "200",
        "runconfig.log_steps",
        "100",
        "runconfig.eval_frequency",
        "600",
    ]
    whole = subprocess.run(
        command(tmp_path / "whole", *often), capture_output=True, text=True, timeout=300, check=False
    )
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        command(tmp_path / "killed", *often), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "Step=300 " in line:
            break
    killed = replicas_of(process.pid)[-1]
    os.kill(killed, signal.SIGKILL)
    rest, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert "Resuming from" in rest
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    ends = [
        load(tmp_path / name / "checkpoints" / "step-00000600.safetensors", framework="torch")[0]
        for name in ("killed", "whole")
    ]
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


def replicas_of(launcher: int) -> list[int]:
    """The processes that a launcher has started, the last rank last."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {}
    for child in children:
        found = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{child}/environ").read_bytes())
        if found:
            ranks[int(found[1])] = int(child)
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_replicas_asked_to_stop_leave_a_checkpoint(tmp_path: Path, number: int, code: int) -> None:
    folder = tmp_path / "run"
    long = [
        "runconfig.num_replicas",
        "2",
        "runconfig.max_steps",
        "1000000",
        "runconfig.checkpoint_steps",
        "0",
        "runconfig.eval_frequency",
        "100000",
    ]
    process = subprocess.Popen(command(folder, *long), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "Step=20 " in line:
            break
    process.send_signal(number)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == code, told
    assert json.loads((folder / "run.json").read_text())["state"] == "stopped"
    assert len(list((folder / "checkpoints").iterdir())) == 1
    assert "Traceback" not in told


def test_an_error_of_replicas_is_one_line_and_not_repeated(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path / "run", "runconfig.num_replicas", "2", "optimizer.learning_rate", "1e30"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("octavo: training stopped")]
    assert len(done.stderr.splitlines()) == 1, done.stderr
