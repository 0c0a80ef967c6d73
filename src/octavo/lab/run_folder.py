"""The folder of one run: its config, state, metrics and checkpoints, each whole at every moment and held by one process at a time."""

from __future__ import annotations

import contextlib
import datetime
import enum
import errno
import functools
import hashlib
import json
import math
import numbers
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from pydantic import AwareDatetime, TypeAdapter, ValidationError

from octavo.files import write_whole
from octavo.names import nearest

__all__ = ["VERSION", "MetricKind", "RunFolder", "RunState", "Status"]

VERSION = 1
"""Of `run.json`."""

_CONFIG, _STATE, _METRICS, _CHECKPOINTS, _LOCK = "config.yaml", "run.json", "metrics.jsonl", "checkpoints", ".lock"
_CHECKPOINT = re.compile(r"step-(\d{8}|[1-9]\d{8,})\.safetensors")
_TEMPORARY = re.compile(r"\.(?:step-\d+\.safetensors|config\.yaml|run\.json|metrics\.jsonl)\.(\d+)\.tmp")


class Status(enum.Enum):
    """How far a run is."""

    RUNNING = "running"
    """A process trains."""
    STOPPED = "stopped"
    """Asked to stop, it left a checkpoint to resume from."""
    FINISHED = "finished"
    """All steps are done."""
    FAILED = "failed"
    """An error ended it; `RunState.error` says which."""
    KILLED = "killed"
    """Its process is gone and said nothing.  Never written: readers find it."""


class MetricKind(enum.StrEnum):
    """What a line of metrics is about."""

    TRAIN = "train"
    """A training step."""
    EVAL = "eval"
    """An evaluation."""


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@functools.cache
def _host() -> str:
    """16 hexadecimal digits that tell this machine from others without naming it."""
    file = Path("/etc/machine-id")
    machine = file.read_bytes() if file.is_file() else b""
    return hashlib.blake2b(machine + platform.node().encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """Where a run stands.  A later state is `dataclasses.replace(state, step=..., loss=...)`; `updated`, `pid` and `host_hash` are
    stamped by `RunFolder.write_state`.

    step, max_steps: training steps done and wanted.  loss, eval_loss: the last ones; accuracy: the last one, a fraction; None before
    the first, and for NaN.  precision, backend: names.  started, updated: UTC.  pid, host_hash: the process that trains and a hash for
    its machine.  error: one line; exit_code: of the process.
    """

    state: Status
    step: int = 0
    max_steps: int | None = None
    loss: float | None = None
    accuracy: float | None = None
    eval_loss: float | None = None
    precision: str | None = None
    backend: str | None = None
    started: AwareDatetime = field(default_factory=_now)
    updated: AwareDatetime = field(default_factory=_now)
    pid: int = field(default_factory=os.getpid)
    host_hash: str = field(default_factory=_host)
    error: str | None = None
    exit_code: int | None = None


_STATES: TypeAdapter[RunState] = TypeAdapter(RunState)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run.  `create` and `open` check it; `RunFolder(path)` does not.

        config.yaml      the resolved config
        run.json         the `RunState`
        metrics.jsonl    one strict JSON object a line, without times, so that two equal runs have equal files
        checkpoints/     step-00000040.safetensors, ...

    Every method raises ValueError, in one line that names the path, the reason and the fix, for what cannot be read or written; what was
    there stays whole, on a full disk too.
    """

    path: Path

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Self:
        """Makes the folder of a new run and tries to write in it; missing parents are made.  Refuses a folder that holds a run."""
        folder = cls(Path(path))
        if folder.is_run:
            raise ValueError(f"{path}: a new run needs its own folder, this holds a run; resume it or choose another")
        with _writing(folder.path):
            (folder.path / _CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder.path).close()
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """The folder of a run that there is."""
        folder = cls(Path(path))
        if not folder.is_run:
            raise ValueError(f"{path}: no run is here (there is no {_STATE}); octavo runs lists those that there are")
        return folder

    @property
    def is_run(self) -> bool:
        """Whether a state was ever written here."""
        return os.path.lexists(self.path / _STATE)

    def write_config(self, text: str) -> None:
        """Writes the resolved config, in one step."""
        with _writing(self.path / _CONFIG):
            write_whole(self.path / _CONFIG, text.encode())

    def config(self) -> str:
        """The resolved config as it was written."""
        with _reading(self.path / _CONFIG):
            return (self.path / _CONFIG).read_text(encoding="utf-8")

    def write_state(self, state: RunState) -> None:
        """Writes `run.json` in one step, stamped with the time, the process and the machine; an error is brought to one line."""
        if state.state is Status.KILLED:
            raise ValueError("a run cannot say that it was killed; write stopped or failed")
        error = None if state.error is None else " ".join(state.error.split())
        stamped = replace(state, updated=_now(), pid=os.getpid(), host_hash=_host(), error=error)
        fields = {"version": VERSION, **asdict(stamped), "state": stamped.state.value}
        for name in ("started", "updated"):
            fields[name] = fields[name].astimezone(datetime.UTC).isoformat(timespec="seconds")
        with _writing(self.path / _STATE):
            write_whole(self.path / _STATE, _json(fields))

    def read_state(self) -> RunState:
        """The last state written; KILLED for one that runs in a process that this machine no longer has.

        Of a process on another machine, or on Windows, nothing can be found out: RUNNING stays.
        """
        path = self.path / _STATE
        with _reading(path):
            content = path.read_bytes()
        try:
            fields = json.loads(content)
            newer = fields.pop("version") > VERSION
            if not newer:
                state = _STATES.validate_python({name: _loaded(value) for name, value in fields.items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not the state of a run ({_flaw(error)}); remove the file") from None
        if newer:
            raise ValueError(f"{path}: from a newer octavo, this one reads version {VERSION}; upgrade octavo")
        gone = state.state is Status.RUNNING and state.host_hash == _host() and not _alive(state.pid)
        return replace(state, state=Status.KILLED) if gone else state

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after `step` steps goes."""
        if step < 0:
            raise ValueError(f"a checkpoint's step is 0 or more; got {step}: give the number of steps done")
        return self.path / _CHECKPOINTS / f"step-{step:08d}.safetensors"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, file) of each checkpoint, the oldest first; half-written and foreign files are none."""
        names = (path.name for path in self._files(self.path / _CHECKPOINTS))
        steps = sorted(int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name)))
        return [(step, self.checkpoint_path(step)) for step in steps]

    def prune(self, keep: int) -> None:
        """Removes all but the newest `keep` checkpoints, oldest first, and what writers that died left half written."""
        if keep < 1:
            raise ValueError(f"a run keeps at least one checkpoint to resume from; got keep={keep}: give 1 or more")
        old = [path for _, path in self.checkpoints()[:-keep]]
        left = [
            path
            for folder in (self.path / _CHECKPOINTS, self.path)
            for path in self._files(folder)
            if (match := _TEMPORARY.fullmatch(path.name)) and not _alive(int(match[1]))
        ]
        for path in (*old, *left):
            with _writing(path):
                path.unlink(missing_ok=True)

    def _files(self, folder: Path) -> list[Path]:
        with _reading(folder):
            return list(folder.iterdir()) if folder.is_dir() else []

    def log_metrics(self, record: Mapping[str, Any]) -> None:
        """Appends one line in one system call; nothing of it stays where it does not fit on the disk.

        record: step, an int; kind, a `MetricKind`; and numbers, strings or None by name.  NaN is written as null, Inf as "Infinity".
        """
        step, kind = record.get("step"), str(record.get("kind"))
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"a line of metrics has a step, 0 or more; got {step!r}: give the number of steps done")
        if kind not in (kinds := [one.value for one in MetricKind]):
            raise ValueError(f"a line of metrics is of kind train or eval, not {kind!r}{nearest(kind, kinds)}")
        line = _json(record)
        with _writing(self.path / _METRICS):
            _append(self.path / _METRICS, line)

    def sync_metrics(self) -> None:
        """Has the lines so far survive a power cut: to be called before a checkpoint that counts on them."""
        path = self.path / _METRICS
        if path.exists():
            with _writing(path), open(path, "rb") as file:
                os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """The lines in order, [] before the first; a torn last line is left out.  "Infinity" is inf again; NaN was null and is None."""
        return [
            {name: _loaded(value) for name, value in self._parsed(number, line).items()}
            for number, line in enumerate(self._whole_lines()[0], 1)
        ]

    def truncate_metrics(self, step: int) -> None:
        """Drops the lines past `step`, and a last line that a killed process tore, before a run resumes from `step`.

        Lines of `step` itself stay: what belongs to a step is logged before its checkpoint is written.
        """
        lines, torn = self._whole_lines()
        kept = [line for number, line in enumerate(lines, 1) if self._parsed(number, line)["step"] <= step]
        if torn or len(kept) < len(lines):
            with _writing(self.path / _METRICS):
                write_whole(self.path / _METRICS, b"".join(kept))

    def _whole_lines(self) -> tuple[list[bytes], bool]:
        """The lines that end as lines do, and whether anything follows them."""
        path = self.path / _METRICS
        with _reading(path):
            *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
        return [line + b"\n" for line in lines], bool(last)

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if isinstance(record["step"], int) and record["kind"] in list(MetricKind):
                return dict(record)
        except (KeyError, TypeError, ValueError):
            pass
        path = self.path / _METRICS
        raise ValueError(f"{path}:{number}: a line of metrics is JSON with step and kind, this is not; remove the line")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for the process that trains in it; ValueError, naming the process, where another one does.

        The system releases the lock when its process and the children that it forked are gone, however they end.
        """
        path = self.path / _LOCK
        with _writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _locked(path, descriptor):
                pid = path.read_text(encoding="utf-8", errors="replace").strip() or "(unknown)"
                raise ValueError(f"{self.path}: process {pid} trains here, only one may; stop it or go elsewhere")
            with _writing(path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
            yield
        finally:
            os.close(descriptor)


def _flaw(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{type(error).__name__}: {error}"


def _json(record: Mapping[str, Any]) -> bytes:
    """One line of strict JSON."""
    return json.dumps({name: _spelled(name, value) for name, value in record.items()}, allow_nan=False).encode() + b"\n"


def _spelled(name: str, value: Any) -> str | int | float | None:
    """A value as strict JSON has it; numbers of NumPy are numbers."""
    match value:
        case None | bool() | str():
            return value
        case numbers.Integral():
            return int(value)
        case numbers.Real():
            number = float(value)
            if math.isfinite(number):
                return number
            return None if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    raise ValueError(f"{name}: numbers, strings and None can be logged, got {type(value).__name__}; give a number")


def _loaded(value: Any) -> Any:
    """What `_spelled` was given; NaN is None."""
    return float(value) if value in ("Infinity", "-Infinity") else value


def _append(path: Path, line: bytes) -> None:
    """Adds `line`, or leaves the file as it was and raises OSError."""
    with open(path, "ab", buffering=0) as file:
        before, rest = file.tell(), line
        try:
            while rest:  # a second turn only where the disk is full: it says so
                rest = rest[file.write(rest) :]
        except OSError:
            if len(rest) < len(line):
                file.truncate(before)
            raise


def _locked(path: Path, descriptor: int) -> bool:
    """Locks an open file, unless another process has."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # a locked byte cannot be read there: take one past the text
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    with _writing(path):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _alive(pid: int) -> bool:
    """Whether a process of this machine has that number and has not ended.  True on Windows, where asking would end it."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's process, or a system without /proc
        return True
    return status.rpartition(")")[2].split()[0] != "Z"  # ended, and its parent has not asked


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors of the system as one line with a fix."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error}); {_remedy(error)}") from None


def _remedy(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return "free some space and resume, what was there is whole"
        case errno.ENOENT | errno.ESTALE:
            return "the folder is gone: bring it back and resume"
        case _:
            return "choose a writable folder"


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"{path}: cannot be read ({reason}); check the path and its permissions") from None
