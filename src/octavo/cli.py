"""The command line, a thin skin: each command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo import cli_runs
from octavo.names import nearest

if TYPE_CHECKING:
    from octavo.lab.compare import CompareConfig, Comparison

__all__ = ["app", "main"]

app = typer.Typer(
    help="Train neural networks in 8 bits: compare precisions on MNIST, run, resume and inspect trainings, list formats and recipes.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

# click's UsageError, from which BadParameter derives; where it lives depends on the version of typer.
_USAGE: tuple[type[BaseException], ...] = typer.BadParameter.__mro__[1:2]
_EXTRAS = ("torch", "safetensors", "pooch", "matplotlib", "sklearn", "jinja2", "pydantic", "yaml")


class _UnknownName(ValueError):
    """The command line names something that there is not."""


def main() -> None:
    """Runs the command line.

    Exit codes: 0 done; 1 an error of data, files or training; 2 an error on the command line; 130 stopped by Ctrl-C.
    """
    try:
        code = app(standalone_mode=False)
    except _USAGE as error:
        usage: Any = error
        _fail(usage.format_message(), 2)
    except _UnknownName as error:
        _fail(str(error), 2)
    except typer.Abort:
        _fail("stopped", 130)
    except (ValueError, OSError) as error:
        _fail(str(error), 1)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        _fail(f"this command needs {error.name}; pip install 'octavo[lab]'", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    """One line on standard error, whatever the message holds, and the exit."""
    print(f"octavo: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _version(asked: bool) -> None:
    if asked:
        import importlib.metadata

        typer.echo(f"octavo {importlib.metadata.version('octavo')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def compare(
    data: Annotated[str, typer.Option(metavar="auto|mnist|digits", help="The images; auto: MNIST if found.")] = "auto",
    model: Annotated[str, typer.Option(metavar="cnn|mlp|fc", help="The network.")] = "mlp",
    arms: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Which arms to run: torch-..., jax-... or engine-...; 'all' that train the model; default: the first five.",
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: by model and number of images.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop each arm after so many steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a step; default: by model.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default: by model.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, batches and dropout.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for results, picture, report, checkpoints.")] = Path("runs/compare"),
) -> int:
    """Train one network side by side in float32, BF16 and FP8, and print and save what came of it."""
    folder = _writable(out)
    done: list[Comparison] = []
    try:
        config = _config(data, model, arms, epochs=epochs, steps=steps, batch_size=batch_size, lr=lr, seed=seed)
        _compare(config, folder, done)
    except KeyboardInterrupt:
        what = "results so far are" if done else "no arm was done; checkpoints, if any, are"
        print(f"octavo: stopped; {what} in {out}", file=sys.stderr)
        return 130
    return 0


def _config(
    data: str,
    model: str,
    arms: str | None,
    *,
    epochs: int | None,
    steps: int | None,
    batch_size: int | None,
    lr: float | None,
    seed: int,
) -> CompareConfig:
    """The flags as a config; raises `_UnknownName` with the nearest name."""
    from octavo.lab.arms import ARMS, DEFAULT_ARMS
    from octavo.lab.compare import CompareConfig, arms_for
    from octavo.lab.data import Source
    from octavo.lab.models import ModelName

    _require("model", model, (name.value for name in ModelName))
    chosen = {None: DEFAULT_ARMS, "all": arms_for(ModelName(model))}.get(arms)
    names = chosen if chosen is not None else tuple(name.strip() for name in str(arms).split(",") if name.strip())
    for name in names:
        _require("arm", name, ARMS)
    _require("data set", data, (source.value for source in Source))
    return CompareConfig(
        source=Source(data),
        model=ModelName(model),
        arms=names,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
    )


def _compare(config: CompareConfig, folder: Path, done: list[Comparison]) -> None:
    """Runs the comparison; what came of each arm is written at once and appended to `done`."""
    from octavo.lab import report
    from octavo.lab.compare import run
    from octavo.lab.data import load

    dataset = load(config.source)
    training = config.training(len(dataset.train_labels))
    print(f"data:  {dataset.source}")
    images = f"{len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images"
    length = f"{training.steps} steps" if training.steps else f"{training.epochs} epochs"
    print(
        f"model: {config.model.value}, {images}, {length}, batch {training.batch_size}, seed {training.seed}\n",
        flush=True,
    )

    def keep(comparison: Comparison) -> None:
        report.write_results(folder, comparison)
        done.append(comparison)

    comparison = run(config, dataset=dataset, folder=folder, on_result=keep)
    report.write(folder, comparison)
    print(_aligned(report.HEADINGS, report.rows(comparison)))
    for arm in comparison.arms:
        if arm.trained_as:
            print(f"\n{arm.name} shares the training of {arm.trained_as}: its loss and seconds are those.")
    print(f"\nwrote {', '.join(str(folder / name) for name in ('results.json', 'curves.png', 'report.html'))}")


@app.command()
def formats(name: Annotated[str | None, typer.Argument(help="One format; default: all.")] = None) -> None:
    """Print the number formats: what their bits mean and where their range ends."""
    from octavo.formats import FORMATS

    if name is not None:
        _require("format", name, FORMATS)
    headings = ("name", "S.E.M", "bias", "max", "smallest normal", "smallest subnormal", "Inf", "NaN", "-0")
    lines = [
        (
            format.name,
            f"{int(format.signed)}.{format.exponent_bits}.{format.mantissa_bits}",
            str(format.bias),
            _number(format.max),
            _number(format.tiny),
            _number(format.smallest_subnormal) if format.smallest_subnormal < format.tiny else "none",
            *("yes" if has else "no" for has in (format.has_inf, format.has_nan, format.has_negative_zero)),
        )
        for format in FORMATS.values()
        if name in (None, format.name)
    ]
    print(_aligned(headings, lines))


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="One recipe; default: all.")] = None) -> None:
    """Print the recipes: how each of a layer's three GEMMs casts its operands and its result."""
    from octavo.recipes import NAMED

    if name is not None:
        _require("recipe", name, NAMED)
    print("\n\n".join(make().describe() for key, make in NAMED.items() if name in (None, key)))


cli_runs.add(app)


def _require(kind: str, word: str, choices: Iterable[str]) -> None:
    """Raises `_UnknownName` unless `word` is one of `choices`."""
    known = list(choices)
    if word not in known:
        raise _UnknownName(f"unknown {kind} {word!r}{nearest(word, known) or '; choose from ' + ', '.join(known)}")


def _writable(folder: Path) -> Path:
    """Creates `folder` and tries it, because finding out after the training would be late."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to --out {folder}: {error.strerror}; choose another folder") from None
    return folder


def _number(value: float) -> str:
    """Small and huge values as powers of two, which all of the formats' bounds are; others plainly."""
    mantissa, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if mantissa == 0.5 and not 1 <= value < 1e6 else f"{value:g}"


def _aligned(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in plain text, the first column to the left and the others to the right."""
    table = [headings, *lines]
    widths = [max(len(line[column]) for line in table) for column in range(len(headings))]
    text = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in table
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


if __name__ == "__main__":
    main()
