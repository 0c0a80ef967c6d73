"""A run: updates, tests, log lines, metrics and checkpoints, so that killing it at any moment costs nothing but time."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import io
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, assert_never

import rich.console

from octavo import checkpoint
from octavo.lab import config_file
from octavo.lab.board import Board
from octavo.lab.config import Config
from octavo.lab.data import Dataset
from octavo.lab.learner import MODEL, Learner, Order, Update, fingerprint, images, in_batches
from octavo.lab.networks import start
from octavo.lab.replicas import gone_replicas, is_first, is_replica, restarts
from octavo.lab.run_folder import MetricKind, RunFolder, RunState, Status
from octavo.lab.schedules import rate
from octavo.lab.sections import Backend
from octavo.lab.training import Progress

__all__ = ["Mode", "Resume", "evaluate", "make_learner", "train"]

KIND, VERSION = "run", 1
"""Of a run's checkpoints: what their header says they are."""
_STATE_SECONDS = 2.0


class Mode(enum.Enum):
    """What to do with a configuration."""

    TRAIN = "train"
    """Update the weights."""
    EVAL = "eval"
    """Test what was trained."""
    TRAIN_AND_EVAL = "train_and_eval"
    """Train, and test every `eval_frequency` updates and at the end."""


class Resume(enum.Enum):
    """What to do with a run that the folder holds."""

    AUTO = "auto"
    """Go on from its newest checkpoint."""
    NEVER = "never"
    """Refuse."""


def make_learner(config: Config, data: Dataset, report: Callable[[str], None] = print) -> Learner:
    """The network, its optimizer and its data in the framework that the configuration names."""
    start(config.model, config.runconfig.seed)  # raises ValueError for a network that images do not train
    match config.backend:
        case Backend.TORCH:
            from octavo.lab.replicas import World
            from octavo.lab.torch_learner import TorchLearner

            return TorchLearner(config, data, World.join(config.runconfig.num_replicas), report)
        case Backend.JAX:
            from octavo.lab.jax_learner import JaxLearner

            return JaxLearner(config, data, report)
        case Backend.ENGINE:
            from octavo.lab.engine_learner import EngineLearner

            return EngineLearner(config, data)
        case _:
            assert_never(config.backend)


def train(
    config: Config,
    *,
    mode: Mode = Mode.TRAIN_AND_EVAL,
    checkpoint_path: Path | None = None,
    resume: Resume = Resume.AUTO,
    console: rich.console.Console | None = None,
) -> int:
    """Train as configured, in `config.folder`; the exit code: 0, or 128 and the number of the signal that stopped it.

    A folder that holds a run is resumed from its newest checkpoint, in which everything is that an update depends on: on a CPU the
    weights and metrics come out as if it had never stopped.  checkpoint_path: where a run begins that has no checkpoint of its own yet.
    Raises ValueError for a run of another configuration, other data, and whatever keeps it from going on; what is on disk stays whole.
    """
    folder = _folder(config, resume) if is_first() else None
    with contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(folder.lock())
        state = RunState(state=Status.RUNNING, precision=config.precision_name, backend=config.backend.value)
        if folder is not None and _failed_before(folder):
            return folder.read_state().exit_code or 1
        run = None
        try:
            data = images(config)
            learner = make_learner(config, data, _say)
            run = _Run(config=config, mode=mode, learner=learner, data=data, folder=folder, state=state)
            run.begin(checkpoint_path)
            with gone_replicas():
                code = run.go(console)
                learner.close()
                return code
        except (ValueError, OSError) as error:
            if folder is not None and not isinstance(error, ConnectionError):
                known = state if run is None else run.state
                with contextlib.suppress(ValueError):
                    failed = dataclasses.replace(known, state=Status.FAILED, error=str(error), exit_code=1)
                    folder.write_state(failed)
            raise


def evaluate(config: Config, *, checkpoint_path: Path | None = None) -> tuple[float, float]:
    """Test the newest checkpoint of `config.folder`, or the one given; prints and returns the mean loss and the accuracy.

    Raises ValueError where there is nothing to load.
    """
    if checkpoint_path is None:
        held = RunFolder(config.folder).checkpoints()
        if not held:
            raise ValueError(
                f"{config.folder} holds no checkpoint to evaluate; train first, or give --checkpoint_path FILE"
            )
        checkpoint_path = held[-1][1]
    learner = make_learner(config, images(config), _say)
    try:
        header = _load(learner, checkpoint_path, config, weights_alone=True)
        run = _Run(
            config=config, mode=Mode.EVAL, learner=learner, data=None, folder=None, state=RunState(state=Status.RUNNING)
        )
        return run.test(int(header.get("step", 0)))
    finally:
        learner.close()


def _say(line: str) -> None:
    if is_first():
        print(line, flush=True)


def _folder(config: Config, resume: Resume) -> RunFolder:
    """The run's folder, made or found."""
    there = RunFolder(config.folder)
    if not there.is_run:
        there = RunFolder.create(config.folder)
    elif resume is Resume.NEVER and not restarts():
        raise ValueError(
            f"{config.folder} holds a run already; name another model_dir, or resume it with --resume auto"
        )
    return there


def _failed_before(folder: RunFolder) -> bool:
    """Whether torchrun starts anew what an error of the user's ended: it would end there again."""
    return bool(restarts()) and folder.is_run and folder.read_state().state is Status.FAILED


def _load(learner: Learner, path: Path, config: Config, *, weights_alone: bool = False) -> dict[str, Any]:
    """Have the learner go on from a file, whose header is returned."""
    tensors, header = checkpoint.load(path, framework=learner.framework)
    if header.get("kind") != KIND and not weights_alone:
        raise ValueError(f"{path}: holds no run to go on with; give a checkpoint that octavo train wrote")
    if header.get("kind") != KIND:
        tensors = {MODEL + name: value for name, value in tensors.items()}
    if header.get("run_version", VERSION) > VERSION:
        raise ValueError(f"{path}: from a newer octavo, this one reads runs of version {VERSION}; upgrade octavo")
    if not weights_alone and header["backend"] != config.backend.value:
        raise ValueError(
            f"{path}: trained with backend {header['backend']}, not {config.backend.value}; write that one"
        )
    try:
        learner.restore(tensors, None if weights_alone else header["facts"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return header


@dataclass(kw_only=True, slots=True)
class _Run:
    """One process's part of a run.  folder: None for all replicas but the first, which do not write."""

    config: Config
    mode: Mode
    learner: Learner
    data: Dataset | None
    folder: RunFolder | None
    state: RunState
    order: Order | None = field(default=None)
    fingerprint: str = ""
    saved: int = -1
    written: float = 0.0

    def begin(self, checkpoint_path: Path | None) -> None:
        """Find the step to go on from, and bring the folder to it."""
        assert self.data is not None
        config = self.config
        self.order = Order(
            samples=len(self.data.train_labels),
            input=config.train_input,
            seed=config.runconfig.seed,
            per_epoch=config.runconfig.steps_per_epoch,
        )
        self.fingerprint = fingerprint(self.data)
        total = config.runconfig.total_steps(self.order.updates_in_an_epoch)
        _say(f"data: {self.data.source}")
        held = RunFolder(config.folder).checkpoints()
        step, path = held[-1] if held else (0, checkpoint_path)
        if path is not None:
            step = self._resume(path)
            _say(f"Resuming from {path} at step : {step}.")
        if held:
            self.saved = step
        self.state = dataclasses.replace(self.state, step=step, max_steps=total)
        if self.folder is not None:
            self.folder.truncate_metrics(step)
            self.folder.prune(config.runconfig.keep_checkpoints)
            self.folder.write_config(config_file.dump(config))
            self.folder.write_state(self.state)

    def _resume(self, path: Path) -> int:
        header = checkpoint.read_header(path)
        theirs, ours = header.get("config", {}), self.config.deciding
        differing = [
            f"{key} {theirs.get(key)} there, {ours.get(key)} here"
            for key in sorted({*theirs, *ours})
            if header.get("kind") == KIND and theirs.get(key) != ours.get(key)
        ]
        if differing:
            raise ValueError(
                f"{path}: of another configuration ({'; '.join(differing[:5])}); change it back, or name another model_dir"
            )
        if header.get("data", self.fingerprint) != self.fingerprint:
            raise ValueError(
                f"{path}: trained on other images than {self.data and self.data.source}; give the same data"
            )
        return int(_load(self.learner, path, self.config)["step"])

    def go(self, console: rich.console.Console | None) -> int:
        """Take all updates that are left; the exit code."""
        options, total = self.config.runconfig, self.state.max_steps or 0
        assert self.order is not None
        progress = Progress(self.config.precision_name, steps=total - self.state.step, console=_quiet(console))
        with (
            _asked() as asked,
            progress,
            Board(None if self.folder is None else self.folder.path, self.state.step) as board,
        ):
            if options.save_initial_checkpoint and self.state.step == 0:
                self.save()
            while self.state.step < total:
                step = self.state.step
                rows, learning_rate = self.order.rows(step), rate(self.config.optimizer.learning_rate, step)
                update = self.learner.update(rows, step, learning_rate, stop=asked.signal is not None)
                self.state = dataclasses.replace(self.state, step=step + 1, loss=update.loss)
                progress.step(update.loss, len(rows), None)
                self._after(update, learning_rate, board)
                if update.stop or (not is_replica() and asked.signal is not None):
                    return self._stop(asked.signal or signal.SIGTERM)
        self._write_state(Status.FINISHED)
        _say("Training Completed Successfully!")
        return 0

    def _after(self, update: Update, learning_rate: float, board: Board) -> None:
        """What is due after an update: a log line, a test, a checkpoint, in this order."""
        options, step = self.config.runconfig, self.state.step
        last = step == self.state.max_steps

        def due(every: int | None) -> bool:
            return last or bool(every and step % every == 0)

        if due(options.log_steps):
            clock = time.strftime("%H:%M:%S")
            _say(f"| Train Device={self.learner.device} Step={step} Loss={update.loss:.5f} Time={clock}")
            self._record(
                board, MetricKind.TRAIN, loss=update.loss, learning_rate=learning_rate, loss_scale=update.loss_scale
            )
        if self.mode is Mode.TRAIN_AND_EVAL and due(options.eval_frequency):
            self._test(board)
        if due(options.checkpoint_steps):
            self.save()
        if time.monotonic() - self.written > _STATE_SECONDS:
            self._write_state(Status.RUNNING)

    def _test(self, board: Board) -> None:
        loss, accuracy = self.test(self.state.step)
        self.state = dataclasses.replace(self.state, eval_loss=loss, accuracy=accuracy)
        self._record(board, MetricKind.EVAL, loss=loss, accuracy=accuracy)

    def test(self, step: int) -> tuple[float, float]:
        """The mean loss and the accuracy on the test data, said aloud."""
        section, options = self.config.eval_input, self.config.runconfig
        parts = list(in_batches(self.learner.test_samples, section, epoch=0, seed=options.seed))[: options.eval_steps]
        loss, accuracy = self.learner.test(parts)
        clock = time.strftime("%H:%M:%S")
        _say(f"| Eval Device={self.learner.device} Step={step} Loss={loss:.5f} Time={clock}")
        if self.config.model.compute_eval_metrics:
            _say(f"Avg eval_metrics = {{'accuracy': {accuracy}}}")
        _say(f"Avg Eval. Loss = {loss}")
        return loss, accuracy

    def _record(self, board: Board, kind: MetricKind, **values: Any) -> None:
        if self.folder is not None:
            self.folder.log_metrics({"step": self.state.step, "kind": kind.value, **values})
            board.add(kind.value, self.state.step, values)

    def save(self) -> None:
        """Write a checkpoint of all that the next update depends on."""
        step = self.state.step
        tensors, facts = self.learner.snapshot()
        if self.folder is not None:
            _say(f"Saving checkpoint at step : {step}.")
            header = {
                "kind": KIND,
                "run_version": VERSION,
                "step": step,
                "backend": self.config.backend.value,
                "config": self.config.deciding,
                "hash": self.config.hash,
                "data": self.fingerprint,
                "facts": facts,
            }
            self.folder.sync_metrics()
            path = self.folder.checkpoint_path(step)
            checkpoint.save(path, tensors, header=header, framework=self.learner.framework)
            self.folder.prune(self.config.runconfig.keep_checkpoints)
        self.saved = step

    def _stop(self, number: int) -> int:
        """Leave a checkpoint behind; the exit code."""
        if self.saved < self.state.step:
            self.save()
        code = 128 + number
        self._write_state(Status.STOPPED, exit_code=code)
        if self.folder is not None:
            name = signal.Signals(number).name
            print(f"octavo: stopped by {name} at step {self.state.step}; the same command goes on", file=sys.stderr)
        return code

    def _write_state(self, status: Status, exit_code: int | None = None) -> None:
        self.written = time.monotonic()
        if self.folder is not None:
            done = 0 if status is Status.FINISHED else exit_code
            self.state = dataclasses.replace(self.state, state=status, exit_code=done)
            self.folder.write_state(self.state)


def _quiet(console: rich.console.Console | None) -> rich.console.Console | None:
    """Where progress is drawn: nowhere, for all replicas but the first."""
    return console if is_first() else rich.console.Console(file=io.StringIO())


@dataclass(slots=True)
class _Asked:
    """The signal that asked to stop, once one has."""

    signal: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT and not is_replica():
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step
        self.signal = number


@contextlib.contextmanager
def _asked() -> Iterator[_Asked]:
    """Have SIGTERM and Ctrl-C wait for the end of the update; in a thread, which gets no signals, nothing."""
    asked = _Asked()
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT) if main}
    try:
        yield asked
    finally:
        for number, action in before.items():
            signal.signal(number, action)
