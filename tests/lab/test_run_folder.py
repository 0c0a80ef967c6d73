"""The folder of a run: whole at every moment, read back as written, and trained in by one process at a time."""

import dataclasses
import datetime
import json
import math
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from octavo.lab import run_folder
from octavo.lab.run_folder import MetricKind, RunFolder, RunState, Status

LOSING = {"step": 20, "kind": "train", "loss": 2.25, "learning_rate": 0.1, "loss_scale": None}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def child(program: str, *arguments: object) -> subprocess.Popen[str]:
    """A process whose output and errors are read from its stdout."""
    start = "import os, sys, time\nfrom octavo.lab.run_folder import *\nfolder = RunFolder.open(sys.argv[1])\n"
    command = [sys.executable, "-c", start + program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def strict(text: str) -> dict:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_create_makes_parents_and_refuses_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a" / "b")
    assert not folder.is_run
    assert folder.path.joinpath("checkpoints").is_dir()
    assert RunFolder.create(folder.path) == folder
    folder.write_state(RunState(state=Status.RUNNING))
    with pytest.raises(ValueError, match="holds a run; resume it or choose another"):
        RunFolder.create(folder.path)
    assert RunFolder.open(folder.path) == folder


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run is here \(there is no run.json\); octavo runs lists"):
        RunFolder.open(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /sys, where nobody can make a folder")
def test_create_says_where_it_cannot_write() -> None:
    with pytest.raises(ValueError, match=r"^/sys/run: cannot be written \(.+\); choose a writable folder$"):
        RunFolder.create("/sys/run")


def test_create_says_that_a_file_is_in_the_way(tmp_path: Path) -> None:
    tmp_path.joinpath("run").write_text("a file")
    with pytest.raises(ValueError, match="cannot be written"):
        RunFolder.create(tmp_path / "run")


def test_the_config_comes_back_as_written(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"config.yaml: cannot be read \(No such file or directory\)"):
        folder.config()
    folder.write_config("model: {name: fc}\n# größer\n")
    assert folder.config() == "model: {name: fc}\n# größer\n"
    assert folder.path.joinpath("config.yaml").read_bytes() == "model: {name: fc}\n# größer\n".encode()
    folder.path.joinpath("config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="it is not UTF-8"):
        folder.config()


FULL = RunState(
    state=Status.FAILED,
    step=40,
    max_steps=1000,
    loss=0.5,
    accuracy=0.9,
    eval_loss=0.6,
    precision="fp8_current",
    backend="torch",
    error="NaN in\n  fc1.weight",
    exit_code=1,
)


def test_a_state_comes_back_stamped(folder: RunFolder) -> None:
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    folder.write_state(dataclasses.replace(FULL, pid=1, host_hash="elsewhere"))
    read = folder.read_state()
    assert (read.pid, read.error) == (os.getpid(), "NaN in fc1.weight")
    assert before <= read.updated <= datetime.datetime.now(datetime.UTC)
    started = FULL.started.replace(microsecond=0)
    same = {"pid": read.pid, "host_hash": read.host_hash, "updated": read.updated}
    assert read == dataclasses.replace(FULL, error="NaN in fc1.weight", started=started, **same)


def test_run_json_is_strict_and_names_no_host(folder: RunFolder) -> None:
    folder.write_state(dataclasses.replace(FULL, loss=math.nan, eval_loss=math.inf))
    text = folder.path.joinpath("run.json").read_text()
    fields = strict(text)
    assert list(fields) == [
        *("version", "state", "step", "max_steps", "loss", "accuracy", "eval_loss", "precision", "backend"),
        *("started", "updated", "pid", "host_hash", "error", "exit_code"),
    ]
    assert (fields["version"], fields["state"], fields["loss"], fields["eval_loss"]) == (1, "failed", None, "Infinity")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", fields["updated"])
    assert re.fullmatch("[0-9a-f]{16}", fields["host_hash"])
    assert platform.node() not in text
    assert (folder.read_state().loss, folder.read_state().eval_loss) == (None, math.inf)


def test_killed_is_found_and_never_written(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="cannot say that it was killed; write stopped or failed"):
        folder.write_state(RunState(state=Status.KILLED))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, Status.KILLED),
        ({"state": "stopped"}, Status.STOPPED),
        ({"host_hash": "0123456789abcdef"}, Status.RUNNING),
        ({"pid": os.getpid()}, Status.RUNNING),
        ({"pid": 1 << 70}, Status.KILLED),
    ],
    ids=["dead", "stopped", "another machine", "alive", "no such number"],
)
def test_a_run_whose_process_is_gone_was_killed(folder: RunFolder, dead: int, change: dict, found: Status) -> None:
    folder.write_state(RunState(state=Status.RUNNING))
    path = folder.path / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": dead, **change}))
    assert folder.read_state().state is found


def test_a_killed_process_that_its_parent_has_not_asked_after_is_dead(folder: RunFolder) -> None:
    folder.write_state(RunState(state=Status.STOPPED))
    process = child(
        "folder.write_state(RunState(state=Status.RUNNING))\nprint('up', flush=True)\ntime.sleep(60)", folder.path
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert folder.read_state().state is Status.RUNNING
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert folder.read_state().state is Status.KILLED
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version": 2, "state": "dreaming"}', r"run\.json: from a newer octavo, this one reads version 1; upgrade"),
        ('{"version": 1, "state": "dreaming"}', r"not the state of a run \(state: Input should be 'running'"),
        ('{"version": 1, "state": "running", "step": "x"}', r"not the state of a run \(step: Input should be"),
        ('{"version": 1, "state": "running", "updated": "2026-01-01"}', r"not the state of a run \(updated: "),
        ('{"state": "running"}', r"not the state of a run \(KeyError: 'version'\)"),
        ('{"version": "1", "state": "running"}', r"not the state of a run \(TypeError"),
        ("[]", r"not the state of a run \(TypeError"),
        ("3", r"not the state of a run \(AttributeError"),
        ('{"version": 1', r"not the state of a run \(JSONDecodeError"),
        ("", r"not the state of a run \(JSONDecodeError"),
    ],
)
def test_what_is_no_state_is_named_in_one_line(folder: RunFolder, text: str, message: str) -> None:
    folder.path.joinpath("run.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        folder.read_state()
    assert "\n" not in str(caught.value)


def test_checkpoints_are_sorted_by_step_and_nothing_else_is_one(folder: RunFolder) -> None:
    steps = [100_000_000, 0, 99_999_999, 40]
    for step in steps:
        folder.checkpoint_path(step).write_bytes(b"x")
    foreign = [
        "step-40.safetensors",
        "step-000000040.safetensors",
        "step-00000040.pt",
        ".step-00000041.safetensors.1.tmp",
    ]
    for name in foreign:
        folder.path.joinpath("checkpoints", name).write_bytes(b"x")
    found = folder.checkpoints()
    assert [step for step, _ in found] == sorted(steps)
    names = [path.name for _, path in found]
    assert names == [f"step-{step}.safetensors" for step in ("00000000", "00000040", "99999999", "100000000")]
    with pytest.raises(ValueError, match="0 or more; got -1"):
        folder.checkpoint_path(-1)


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).checkpoints() == []
    RunFolder(tmp_path).prune(1)


@pytest.mark.parametrize(("keep", "left"), [(1, [60]), (2, [40, 60]), (3, [20, 40, 60]), (9, [20, 40, 60])])
def test_prune_keeps_the_newest(folder: RunFolder, keep: int, left: list[int]) -> None:
    for step in (40, 60, 20):
        folder.checkpoint_path(step).write_bytes(b"x")
    folder.prune(keep)
    assert [step for step, _ in folder.checkpoints()] == left


def test_prune_keeps_at_least_one(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="at least one checkpoint to resume from; got keep=0"):
        folder.prune(0)


def test_prune_removes_what_dead_writers_left_and_nothing_else(folder: RunFolder, dead: int) -> None:
    inside = folder.path / "checkpoints"
    gone = [inside / f".step-00000060.safetensors.{dead}.tmp", folder.path / f".run.json.{dead}.tmp"]
    stays = [inside / f".step-00000060.safetensors.{os.getpid()}.tmp", inside / f".mine.{dead}.tmp", inside / "notes"]
    for path in (*gone, *stays):
        path.write_bytes(b"half")
    folder.prune(1)
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in stays)


def test_what_a_killed_writer_of_a_checkpoint_leaves_is_pruned(folder: RunFolder) -> None:
    folder.write_state(RunState(state=Status.STOPPED))
    # Killed in the sync, that is between the writing of the temporary file and the renaming of it.
    program = """
import octavo.files
octavo.files.os.fsync = lambda _: os.kill(os.getpid(), 9)
octavo.files.write_whole(folder.checkpoint_path(40), b"weights")
"""
    process = child(program, folder.path)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (left,) = folder.path.joinpath("checkpoints").iterdir()
    assert left.name == f".step-00000040.safetensors.{process.pid}.tmp"
    assert folder.checkpoints() == []
    folder.prune(1)
    assert not left.exists()


def test_metrics_come_back_as_logged_and_are_strict_json(folder: RunFolder) -> None:
    assert folder.metrics() == []
    folder.log_metrics(LOSING)
    folder.log_metrics({"step": 40, "kind": MetricKind.EVAL, "loss": math.inf, "accuracy": math.nan})
    folder.log_metrics({"step": np.int64(60).item(), "kind": "train", "loss": np.float32(0.5), "loss_scale": -math.inf})
    text = folder.path.joinpath("metrics.jsonl").read_text()
    assert text == (
        '{"step": 20, "kind": "train", "loss": 2.25, "learning_rate": 0.1, "loss_scale": null}\n'
        '{"step": 40, "kind": "eval", "loss": "Infinity", "accuracy": null}\n'
        '{"step": 60, "kind": "train", "loss": 0.5, "loss_scale": "-Infinity"}\n'
    )
    assert all(strict(line) for line in text.splitlines())
    assert folder.metrics() == [
        LOSING,
        {"step": 40, "kind": "eval", "loss": math.inf, "accuracy": None},
        {"step": 60, "kind": "train", "loss": 0.5, "loss_scale": -math.inf},
    ]


def test_synced_metrics_are_as_they_were_and_need_not_be_there(folder: RunFolder) -> None:
    folder.sync_metrics()
    assert folder.metrics() == []
    folder.log_metrics(LOSING)
    folder.sync_metrics()
    assert folder.metrics() == [LOSING]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"kind": "train"}, "has a step, 0 or more; got None"),
        ({"step": -1, "kind": "train"}, "got -1"),
        ({"step": 1.5, "kind": "train"}, "got 1.5"),
        ({"step": 1, "kind": "trian"}, "not 'trian'; did you mean 'train'?"),
        ({"step": 1}, "not 'None'"),
        ({"step": 1, "kind": "eval", "loss": [1.0]}, "loss: numbers, strings and None can be logged, got list"),
        ({"step": 1, "kind": "eval", "loss": 1j}, "got complex"),
    ],
)
def test_what_is_no_metric_is_refused_before_anything_is_written(folder: RunFolder, record: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        folder.log_metrics(record)
    assert not folder.path.joinpath("metrics.jsonl").exists()


@pytest.fixture
def five(folder: RunFolder) -> RunFolder:
    """Lines of the steps 10, 20, 20, 30 and 40."""
    for step, kind in ((10, "train"), (20, "train"), (20, "eval"), (30, "train"), (40, "train")):
        folder.log_metrics({"step": step, "kind": kind, "loss": step / 7})
    return folder


@pytest.mark.parametrize(("step", "left"), [(0, 0), (9, 0), (10, 1), (20, 3), (25, 3), (39, 4), (40, 5), (99, 5)])
@pytest.mark.parametrize("torn", [b"", b'{"step": 50, "ki', b"{", b"\0" * 40], ids=["whole", "torn", "brace", "zeros"])
def test_truncation_keeps_the_lines_up_to_the_step(five: RunFolder, step: int, left: int, torn: bytes) -> None:
    path = five.path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert len(five.metrics()) == 5
    five.truncate_metrics(step)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:left])


def test_truncation_writes_only_where_something_goes(five: RunFolder) -> None:
    path = five.path / "metrics.jsonl"
    before = path.stat()
    five.truncate_metrics(40)
    assert path.stat() == before
    five.truncate_metrics(30)
    assert path.stat().st_ino != before.st_ino


def test_truncation_of_nothing_is_nothing(folder: RunFolder) -> None:
    folder.truncate_metrics(10)
    assert not folder.path.joinpath("metrics.jsonl").exists()


@pytest.mark.parametrize("bad", [b"{", b"3", b'{"step": 3}', b'{"step": "3", "kind": "train"}', b"\xff", b""])
def test_a_bad_line_between_others_is_named(five: RunFolder, bad: bytes) -> None:
    path = five.path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], bad, *lines[2:], b""]))
    for read in (five.metrics, lambda: five.truncate_metrics(20)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl:3: a line of metrics is JSON with step and kind"):
            read()


def test_a_killed_process_leaves_whole_lines_and_the_rest_is_dropped(folder: RunFolder) -> None:
    folder.write_state(RunState(state=Status.STOPPED))
    program = """
step = 0
while True:
    step += 1
    folder.log_metrics({"step": step, "kind": "train", "loss": 1 / step})
    if step == 300:
        print("on", flush=True)
"""
    process = child(program, folder.path)
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    process.kill()
    process.communicate()
    path = folder.path / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-9])  # as a power cut would: the last line in part
    folder.truncate_metrics(10**9)
    lines = folder.metrics()
    assert len(lines) == content.count(b"\n") - 1 >= 299
    assert lines == [{"step": step, "kind": "train", "loss": 1 / step} for step in range(1, len(lines) + 1)]
    assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:-1])


@pytest.fixture
def small_disk(five: RunFolder) -> Iterator[RunFolder]:
    """No file may grow past ten bytes more than the metrics have, and they have more than a state."""
    for step in range(50, 70):
        five.log_metrics({"step": step, "kind": "train", "loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (five.path.joinpath("metrics.jsonl").stat().st_size + 10, hard))
    yield five
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_that_does_not_fit_leaves_nothing_of_itself(small_disk: RunFolder) -> None:
    before = small_disk.path.joinpath("metrics.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match=r"metrics.jsonl: cannot be written \(File too large\); free some space and resume"
    ):
        small_disk.log_metrics(LOSING)
    assert small_disk.path.joinpath("metrics.jsonl").read_bytes() == before


def test_a_state_that_does_not_fit_leaves_the_old_one(small_disk: RunFolder) -> None:
    small_disk.write_state(RunState(state=Status.RUNNING))
    before = small_disk.path.joinpath("run.json").read_bytes()
    with pytest.raises(ValueError, match=r"run.json: cannot be written \(File too large\); free some space and resume"):
        small_disk.write_state(RunState(state=Status.FAILED, error="x" * 9999))
    with pytest.raises(ValueError, match=r"config.yaml: cannot be written"):
        small_disk.write_config("x" * 9999)
    assert small_disk.path.joinpath("run.json").read_bytes() == before
    assert not [path for path in small_disk.path.iterdir() if path.suffix == ".tmp"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without space")
def test_a_full_disk_is_told_in_one_line(folder: RunFolder) -> None:
    folder.path.joinpath("metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        ValueError, match=r"\(No space left on device\); free some space and resume, what was there is whole$"
    ):
        folder.log_metrics(LOSING)


def test_a_folder_that_is_gone_is_told_in_one_line(folder: RunFolder) -> None:
    folder.path.joinpath("checkpoints").rmdir()
    folder.path.rmdir()
    for write in (
        lambda: folder.log_metrics(LOSING),
        lambda: folder.write_state(FULL),
        lambda: folder.lock().__enter__(),
    ):
        with pytest.raises(
            ValueError, match=r"No such file or directory\); the folder is gone: bring it back and resume$"
        ):
            write()


def test_a_folder_that_became_read_only_is_told_and_stays_as_it_was() -> None:
    # Not tmp_path: its parents are closed to the user that a superuser has to become to be refused.
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = RunFolder.create(Path(parent) / "run")
        folder.log_metrics(LOSING)
        folder.write_state(RunState(state=Status.RUNNING))
        before = {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
        program = """
for path in (folder.path / "metrics.jsonl", folder.path):
    path.chmod(0o555 if path.is_dir() else 0o444)
if os.geteuid() == 0:
    os.seteuid(65534)
writes = (
    lambda: folder.write_state(RunState(state=Status.FINISHED)),
    lambda: folder.log_metrics({"step": 1, "kind": "train"}),
    lambda: folder.lock().__enter__(),
    lambda: RunFolder.create(folder.path / "below"),
)
for write in writes:
    try:
        write()
    except ValueError as error:
        print(error)
"""
        output, _ = child(program, folder.path).communicate()
        ends = [line.removeprefix(str(folder.path)) for line in output.splitlines()]
        said = ": cannot be written (Permission denied); choose a writable folder"
        assert ends == [f"/{name}{said}" for name in ("run.json", "metrics.jsonl", ".lock", "below")]
        assert {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()} == before
        folder.path.chmod(0o755)


def test_one_process_trains_in_a_folder_until_it_is_gone(folder: RunFolder) -> None:
    folder.write_state(RunState(state=Status.STOPPED))
    process = child("with folder.lock():\n    print('held', flush=True)\n    time.sleep(60)", folder.path)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=f"process {process.pid} trains here, only one may; stop it"),
            folder.lock(),
        ):
            raise AssertionError("two processes train")
    finally:
        process.kill()
        process.communicate()
    with folder.lock():
        assert folder.path.joinpath(".lock").read_text() == f"{os.getpid()}\n"


def test_a_lock_is_given_back_after_an_error_too_and_is_held_once(folder: RunFolder) -> None:
    with pytest.raises(KeyError), folder.lock():
        raise KeyError
    with folder.lock(), pytest.raises(ValueError, match=f"process {os.getpid()} trains here"), folder.lock():
        raise AssertionError("held twice")


def test_a_later_refusal_reads_the_pid_of_the_holder_and_no_older_one(folder: RunFolder) -> None:
    folder.path.joinpath(".lock").write_text("123456789012\n")
    with folder.lock():
        assert folder.path.joinpath(".lock").read_text() == f"{os.getpid()}\n"


def test_no_framework_is_loaded() -> None:
    program = "import sys, octavo.lab.run_folder, octavo.lab.run_report; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "jax", "numba", "matplotlib", "jinja2"} & set(output.split())
    assert run_folder.VERSION == 1
