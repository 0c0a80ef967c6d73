"""The commands of runs: train, eval, validate, compile, runs, report."""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from octavo.lab.config import Config

__all__ = ["add"]

ConfigFile = Annotated[Path, typer.Argument(help="The YAML file.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="section.key value ..., as optimizer.learning_rate 0.01", metavar="[KEY VALUE]..."),
]
Setting = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")]
Folder = Annotated[Path | None, typer.Option("--model-dir", "--model_dir", help="Default: what the file says.")]
Start = Annotated[
    Path | None, typer.Option("--checkpoint-path", "--checkpoint_path", help="A checkpoint to begin from.")
]
Replicas = Annotated[
    int | None, typer.Option("--num-replicas", "--num_replicas", min=1, help="Processes that train together.")
]


def add(app: typer.Typer) -> None:
    """Give `app` the commands."""
    for command in (train, evaluate, validate, compile_, runs, report):
        app.command(command.__name__.rstrip("_").replace("evaluate", "eval"))(command)


def _configured(
    path: Path,
    overrides: list[str] | None,
    settings: list[str] | None,
    folder: Path | None,
    replicas: int | None = None,
) -> Config:
    from octavo.lab import commands

    changes = [*(overrides or []), *(settings or [])]
    return commands.configured(path, changes, model_dir=folder and str(folder), num_replicas=replicas)


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    settings: Setting = None,
    model_dir: Folder = None,
    checkpoint_path: Start = None,
    num_replicas: Replicas = None,
    multireplica: Annotated[bool, typer.Option(help="Two replicas, unless --num-replicas says.")] = False,
    resume: Annotated[str, typer.Option(metavar="auto|never", help="What to do with a run that is there.")] = "auto",
    mode: Annotated[str, typer.Option(metavar="train|train_and_eval", help="Whether to test, too.")] = "train_and_eval",
) -> int:
    """Train as a YAML file says; killed at any moment, the same command goes on where it was."""
    from octavo.lab import commands
    from octavo.lab.runner import Mode, Resume

    replicas = num_replicas or (2 if multireplica else None)
    chosen = _configured(config, overrides, settings, model_dir, replicas)
    return commands.run(
        chosen,
        Mode(_one_of("mode", mode, ("train", "train_and_eval"))),
        checkpoint_path=checkpoint_path,
        resume=Resume(_one_of("resume", resume, [word.value for word in Resume])),
        command=["--module", "octavo.cli", *sys.argv[1:]],
    )


def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    settings: Setting = None,
    model_dir: Folder = None,
    checkpoint_path: Annotated[
        Path | None, typer.Option("--checkpoint-path", "--checkpoint_path", help="Default: the run's newest.")
    ] = None,
) -> int:
    """Test what a run trained: its newest checkpoint, or the one given."""
    from octavo.lab import commands
    from octavo.lab.runner import Mode

    chosen = _configured(config, overrides, settings, model_dir, 1)
    return commands.run(chosen, Mode.EVAL, checkpoint_path=checkpoint_path, command=sys.argv)


def validate(
    config: ConfigFile,
    overrides: Overrides = None,
    settings: Setting = None,
    target: Annotated[str, typer.Option(metavar="cpu|sm80|sm89|sm90|sm100|gfx942", help="The chip.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which kernel each GEMM would run in on a chip, whether that is 8-bit and why not, and what it would gain."""
    with _uncollected():
        from octavo.lab import commands

        print(commands.validated(_configured(config, overrides, settings, None), target, json=json))


def compile_(
    config: ConfigFile,
    overrides: Overrides = None,
    settings: Setting = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: model.pt2 in the run's folder.")] = None,
    backend: Annotated[str | None, typer.Option(metavar="torch|jax", help="Default: what the file says.")] = None,
    aot: Annotated[
        bool, typer.Option("--aot", help="Add machine code by AOTInductor; it needs a C++ compiler.")
    ] = False,
) -> None:
    """Write a training step and inference as graphs that run without this configuration's code."""
    from octavo.lab import commands

    overrides = [*(overrides or []), *([] if backend is None else ["backend", backend])]
    print(commands.compiled(_configured(config, overrides, settings, None), out, aot=aot))


def runs(folder: Annotated[Path, typer.Argument(help="Where to look, at any depth.")] = Path("runs")) -> None:
    """List runs: how far each is, its loss and its accuracy."""
    from octavo.lab.run_report import list_runs

    print(list_runs(folder))


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="DIR...")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")] = Path("report.html"),
) -> None:
    """Draw several runs into one HTML page."""
    from octavo.lab.run_report import write_report

    print(f"wrote {write_report(folders, out)}")


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is looked for within it, nor as a process ends that loads PyTorch for it alone: that takes half a second."""
    was_on = gc.isenabled()
    gc.disable()
    if "torch" not in sys.modules:
        atexit.register(gc.freeze)
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _one_of(flag: str, word: str, choices: list[str] | tuple[str, ...]) -> str:
    if word not in choices:
        raise typer.BadParameter(f"--{flag} is one of {', '.join(choices)}; got {word!r}")
    return word
