"""Checkpoints: what goes in comes out, and a bad file or a crash costs nothing."""

import json
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from octavo.files import write_whole
from octavo.lab.checkpoint import VERSION, CheckpointError, load, save

HEADER = {"epoch": 3, "step": 40, "arm": "torch-fp8", "nested": {"lr": 0.1, "names": ["a", "b"]}}


def example() -> dict[str, torch.Tensor]:
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "weight": weight,
        "tied": weight,
        "transposed": weight.T,
        "bf16": torch.tensor([1.5, -0.0, float("inf")], dtype=torch.bfloat16),
        "codes": torch.tensor([0, 127, 255], dtype=torch.uint8),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def test_load_gives_back_the_tensors_and_the_header_that_save_took(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, example(), header=HEADER)
    state, header = load(path)
    assert header == HEADER
    assert state.keys() == example().keys()
    for name, tensor in example().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor.detach()), name
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_any_reader_of_safetensors_can_open_the_file(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", example(), header={})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "model.safetensors")["weight"], example()["weight"])


@pytest.mark.parametrize("kept", [0, 1, 8, 100, -1])
def test_a_truncated_file_is_one_line_that_names_it(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.safetensors"
    save(path, example(), header=HEADER)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: truncated") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def foreign_files() -> dict[str, bytes]:
    tensors = {"x": torch.zeros(1)}
    newer = json.dumps({"format": "octavo", "version": VERSION + 1, "header": {}})
    return {
        "random bytes": bytes(range(256)) * 4,
        "a pickle": pickle.dumps({"x": 1}),
        "plain safetensors": safetensors.torch.save(tensors),
        "other metadata": safetensors.torch.save(tensors, metadata={"format": "pt"}),
        "not JSON": safetensors.torch.save(tensors, metadata={"octavo": "{"}),
        "not an object": safetensors.torch.save(tensors, metadata={"octavo": "[1]"}),
        "no header": safetensors.torch.save(tensors, metadata={"octavo": '{"format": "octavo", "version": 1}'}),
        "a newer version": safetensors.torch.save(tensors, metadata={"octavo": newer}),
    }


@pytest.mark.parametrize("what", foreign_files())
def test_a_foreign_file_is_one_line_that_names_it(tmp_path: Path, what: str) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(foreign_files()[what])
    with pytest.raises(CheckpointError, match=r"file\.safetensors: ") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert ("upgrade octavo" in str(caught.value)) == (what == "a newer version")


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("state", "header", "message"),
    [
        ({"extra": b"pickled"}, {}, "'extra' is a bytes"),
        ({}, {"path": Path("x")}, "header must be plain JSON"),
        ({}, {"loss": float("nan")}, "header must be plain JSON"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_the_old_file_stays(
    tmp_path: Path, state: dict, header: dict, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    save(path, example(), header=HEADER)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        save(path, state, header=header)
    assert load(path)[1] == HEADER


def test_a_folder_that_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be written \(No such file or directory\)"):
        save(tmp_path / "absent" / "model.safetensors", example(), header={})


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    write_whole(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


KILLED_WHILE_SAVING = """
import os, signal, sys, torch
from octavo.lab import checkpoint
path, moment = sys.argv[1:]
checkpoint.save(path, {"x": torch.zeros(1000)}, header={"epoch": 1})
setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
checkpoint.save(path, {"x": torch.ones(1000)}, header={"epoch": 2})
"""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_sigkill_in_the_middle_of_a_save_leaves_the_old_checkpoint_whole(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "model.safetensors"
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, str(path), moment], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    state, header = load(path)
    assert header == {"epoch": 1}
    assert torch.equal(state["x"], torch.zeros(1000))
