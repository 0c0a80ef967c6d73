"""Runs side by side: a table of those that there are, and a self-contained page that draws some of them."""

from __future__ import annotations

import base64
import datetime
import importlib.resources
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.files import write_whole
from octavo.lab.run_folder import MetricKind, RunFolder, RunState
from octavo.names import nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["HEADINGS", "find", "list_runs", "write_report"]

HEADINGS = ("run", "state", "step", "loss", "accuracy", "precision", "backend", "updated")
"""The columns of `list_runs`."""

# Okabe and Ito's palette, which colour-blind readers can tell apart; line styles repeat the distinction.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7f7f7f", "#000000")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_NAMED = 5
_UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def find(root: Path, on_error: Callable[[OSError], object] | None = None) -> list[Path]:
    """The folders at and below `root` that hold a run, in order of name.

    Links, folders whose name begins with a dot, and the checkpoints of a run are not searched.  on_error is told of each folder that
    cannot be listed.
    """
    found = []
    for name, folders, _ in os.walk(root, onerror=on_error):
        held = RunFolder(Path(name)).is_run
        folders[:] = [one for one in folders if not one.startswith(".") and not (held and one == "checkpoints")]
        if held:
            found.append(Path(name))
    return sorted(found)


def list_runs(root: Path, *, now: datetime.datetime | None = None) -> str:
    """A table of the runs at and below `root`, the newest update first, and under it why those that failed did.

    Accuracy is in per cent; ages are counted from `now`, which is the time of the call.  A run that cannot be read is in the table as
    unreadable, and a folder that cannot be listed is named under it.  Raises ValueError where `root` is no folder.
    """
    if not root.is_dir():
        beside = [one.name for one in root.absolute().parent.glob("*") if one.is_dir()]
        raise ValueError(f"{root}: runs are looked for in a folder, there is none{nearest(root.name, beside)}")
    now = now or datetime.datetime.now(datetime.UTC)
    lines: list[tuple[datetime.datetime, tuple[str, ...]]] = []
    remarks: list[str] = []
    for path in find(root, lambda error: remarks.append(f"{error.filename}: cannot be listed ({error.strerror})")):
        name = path.absolute().name if path == root else str(path.relative_to(root))
        try:
            state = RunFolder(path).read_state()
        except ValueError as error:
            lines.append((datetime.datetime.min.replace(tzinfo=datetime.UTC), (name, "unreadable", *("-",) * 6)))
            remarks.append(str(error))
            continue
        lines.append((state.updated, _line(name, state, now)))
        if state.error is not None:
            remarks.append(f"{name}: {state.error}")
    if not lines:
        return "\n".join([f"no run in {root}; octavo train CONFIG starts one", *remarks])
    lines.sort(key=lambda line: line[0], reverse=True)
    return "\n".join([_table([cells for _, cells in lines]), *([""] if remarks else []), *remarks])


def _line(name: str, state: RunState, now: datetime.datetime) -> tuple[str, ...]:
    return (
        name,
        state.state.value,
        _progress(state),
        _number(state.loss),
        _percent(state.accuracy),
        state.precision or "-",
        state.backend or "-",
        _age(now - state.updated),
    )


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    """Aligned text under `HEADINGS`, words to the left and numbers to the right."""
    table = [HEADINGS, *lines]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADINGS))]
    numbers = slice(2, 5)
    texts = []
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        cells[numbers] = [cell.rjust(width) for cell, width in zip(line[numbers], widths[numbers], strict=True)]
        texts.append("  ".join(cells).rstrip())
    return "\n".join([texts[0], "-" * (sum(widths) + 2 * len(widths) - 2), *texts[1:]])


def _progress(state: RunState) -> str:
    return str(state.step) if state.max_steps is None else f"{state.step}/{state.max_steps}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1000 else "NaN" if math.isnan(value) else f"{value:.4g}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.2%}"


def _age(age: datetime.timedelta) -> str:
    """Whole units of the largest kind that fits; a clock that is behind makes no negative ages."""
    for seconds, unit in _UNITS:
        if count := int(age.total_seconds()) // seconds if age.total_seconds() > 0 else 0:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What the page shows of a run.  keys: its config, flat, as text."""

    name: str
    state: RunState
    metrics: Sequence[Mapping[str, Any]]
    config: str
    keys: Mapping[str, str]

    def series(self, kind: MetricKind, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric; NaN for what is not finite, so that a curve has a gap there."""
        records = [record for record in self.metrics if record["kind"] == kind.value and key in record]
        values = [record[key] for record in records]
        finite = [value if isinstance(value, float | int) and math.isfinite(value) else math.nan for value in values]
        return [record["step"] for record in records], finite

    def last(self, kind: MetricKind, key: str) -> float | None:
        """The last value of one metric, NaN too; None where there is none."""
        found = (one[key] for one in reversed(self.metrics) if one["kind"] == kind.value and key in one)
        return next((math.nan if value is None else value for value in found), None)

    def best_accuracy(self) -> float | None:
        """The highest accuracy of all evaluations."""
        return max((value for value in self.series(MetricKind.EVAL, "accuracy")[1] if value >= 0), default=None)


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Writes one HTML page about the runs in `folders` that needs no other file, and returns its path.

    out: the page, or a folder that there is, in which it is report.html; missing parents are made.  At every moment there is the old
    page, if any, or the new one.  Raises ValueError, in one line, for a folder that is no run, that cannot be read or is given twice, and
    for a path that cannot be written; ModuleNotFoundError where jinja2, matplotlib or yaml is not installed.
    """
    if not folders:
        raise ValueError("a report shows at least one run; got none: octavo runs lists those that there are")
    runs = _load(folders)
    path = out / "report.html" if out.is_dir() else out
    page = _page(runs).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); choose a writable folder") from None
    return path


def _load(folders: Sequence[Path]) -> list[_Run]:
    absolute = [Path(os.path.abspath(folder)) for folder in folders]
    for folder, path in zip(folders, absolute, strict=True):
        if not RunFolder(path).is_run:
            raise ValueError(f"{folder}: a report shows runs, no run is here{_near(path)}")
        if absolute.count(path) > 1:
            raise ValueError(f"{folder}: named {absolute.count(path)} times; name each run once")
    above = Path(os.path.commonpath([path.parent for path in absolute]))
    return [_run(str(path.relative_to(above)), RunFolder(path)) for path in absolute]


def _run(name: str, folder: RunFolder) -> _Run:
    import yaml

    config = folder.config()
    try:
        keys = _flat(yaml.safe_load(config))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder.path / 'config.yaml'}: not YAML ({reason}); restore the file") from None
    return _Run(name=name, state=folder.read_state(), metrics=folder.metrics(), config=config, keys=keys)


def _near(path: Path) -> str:
    """The end of an error: runs below `path`, or the one beside it that was probably meant."""
    if below := find(path):
        names = ", ".join(str(run.relative_to(path)) for run in below[:_NAMED])
        return f"; the runs below it are {names}{', ...' if len(below) > _NAMED else ''}"
    beside = [one.name for one in path.parent.glob("*") if RunFolder(one).is_run]
    return nearest(path.name, beside) or "; octavo runs lists those that there are"


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """{"model.depth": "10", ...}: every leaf as JSON spells it; a list without mappings is a leaf."""
    match value:
        case dict() if value:
            parts = value.items()
        case list() if any(isinstance(one, dict) for one in value):
            parts = dict(enumerate(value)).items()
        case _:
            return {key: json.dumps(value, ensure_ascii=False, default=str)}
    return {
        inner: text for name, one in parts for inner, text in _flat(one, f"{key}.{name}" if key else f"{name}").items()
    }


def _differing(runs: Sequence[_Run]) -> dict[str, list[str]]:
    """Key -> each run's value, for the keys whose values are not all the same; "-" where a run lacks one."""
    keys = dict.fromkeys(key for run in runs for key in run.keys)
    values = {key: [run.keys.get(key, "-") for run in runs] for key in keys}
    return {key: each for key, each in values.items() if len(set(each)) > 1}


def _page(runs: Sequence[_Run]) -> str:
    import jinja2

    source = importlib.resources.files("octavo.lab").joinpath("run_report.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    rows = [
        (
            run.name,
            run.state.state.value,
            run.state.precision or "-",
            run.state.backend or "-",
            _progress(run.state),
            _number(run.last(MetricKind.TRAIN, "loss")),
            _number(run.last(MetricKind.EVAL, "loss")),
            _percent(run.best_accuracy()),
        )
        for run in runs
    ]
    return template.render(
        runs=runs,
        rows=rows,
        differing=_differing(runs),
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        picture=base64.b64encode(_picture(runs)).decode(),
    )


def _picture(runs: Sequence[_Run]) -> bytes:
    """A PNG with three panels over the training steps: losses on a log scale, accuracies of evaluations, learning rates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = -(-len(runs) // 3)
    figure = Figure(figsize=(11, 5.6 + 0.25 * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplot_mosaic([["loss", "accuracy"], ["loss", "rate"]], sharex=True, width_ratios=(1.2, 1))
    for axes in panels.values():
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    _draw_losses(panels["loss"], runs)
    _draw_accuracies(panels["accuracy"], runs)
    _draw_rates(panels["rate"], runs)
    if not any(run.metrics for run in runs):
        panels["rate"].set_xlim(0, max(run.state.max_steps or 1 for run in runs))
    handles = [Line2D([], [], marker=_marker(number), **_look(number)) for number in range(len(runs))]
    names = [_label(run.name) for run in runs]
    figure.legend(handles, names, loc="outside lower center", ncols=-(-len(runs) // rows), frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_losses(axes: Axes, runs: Sequence[_Run]) -> None:
    """Training as lines, evaluation as points; 0 has no place on a log scale and leaves a gap."""
    import numpy as np

    drawn = False
    for number, run in enumerate(runs):
        for kind in MetricKind:
            steps, values = run.series(kind, "loss")
            positive = np.array([value if value > 0 else math.nan for value in values])
            drawn |= bool(np.isfinite(positive).any())
            match kind:
                case MetricKind.TRAIN:
                    axes.plot(steps, positive, marker="." if len(steps) == 1 else None, **_look(number))
                case MetricKind.EVAL:
                    axes.plot(steps, positive, **{**_look(number), "linestyle": "", "marker": _marker(number)})
    axes.set(xlabel="step", ylabel="loss: training (lines), evaluation (points)")
    _finish(axes, drawn)
    if drawn:
        _scale_to_powers(axes)


def _scale_to_powers(axes: Axes) -> None:
    """A log scale whose ticks are plain numbers, few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_accuracies(axes: Axes, runs: Sequence[_Run]) -> None:
    drawn = False
    for number, run in enumerate(runs):
        steps, values = run.series(MetricKind.EVAL, "accuracy")
        drawn |= any(map(math.isfinite, values))
        axes.plot(steps, [100 * value for value in values], marker=_marker(number), **_look(number))
    axes.set(ylabel="evaluation accuracy, %")
    _finish(axes, drawn)


def _draw_rates(axes: Axes, runs: Sequence[_Run]) -> None:
    drawn = False
    for number, run in enumerate(runs):
        steps, values = run.series(MetricKind.TRAIN, "learning_rate")
        drawn |= any(map(math.isfinite, values))
        axes.plot(steps, values, marker="." if len(steps) == 1 else None, **_look(number))
    axes.set(xlabel="step", ylabel="learning rate")
    axes.ticklabel_format(axis="y", useOffset=False)
    _finish(axes, drawn)
    if drawn:
        axes.set_ylim(bottom=0)


def _finish(axes: Axes, drawn: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not drawn:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", color="#666666")


def _look(number: int) -> dict[str, Any]:
    """The look of run `number`: the first is a broad pale line, so that those that follow it closely show on top."""
    rounds = number // len(_COLOURS)
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _STYLES[(number + rounds) % len(_STYLES)],
        "linewidth": 4.0 if number == 0 else 1.6,
        "alpha": 0.55 if number == 0 else 1.0,
        "markersize": 4.5,
    }


def _marker(number: int) -> str:
    return _MARKERS[number % len(_MARKERS)]


def _label(name: str) -> str:
    """A name that fits, as a legend takes it: a $ would start a formula, and what begins with _ is left out."""
    short = name if len(name) <= 40 else f"…{name[-39:]}"
    return f"{' ' if short.startswith('_') else ''}{short}".replace("$", r"\$")
