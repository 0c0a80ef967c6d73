"""What a comparison leaves behind: `results.json`, `curves.png` and a self-contained `report.html`."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import enum
import importlib.metadata
import importlib.resources
import io
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from octavo.files import write_whole
from octavo.lab.compare import Comparison

__all__ = ["HEADINGS", "curves", "environment", "rows", "to_json", "write", "write_results"]

HEADINGS = ("arm", "final loss", "test accuracy", "vs float32", "s/epoch", "ratio")
"""The columns of `rows`."""

# Okabe and Ito's palette, which colour-blind readers can tell apart; line styles repeat the distinction.
_COLOURS = ("#7f7f7f", "#e69f00", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """The table's cells as text: accuracy in per cent, its difference to float32 in points, ratio of training time."""
    return [
        (
            arm.name,
            f"{arm.final_loss:.4f}",
            f"{arm.test_accuracy:.2%}",
            "-" if arm.difference_to_fp32 is None else f"{100 * arm.difference_to_fp32:+.2f}",
            f"{arm.seconds_per_epoch:.3g}",
            "-" if arm.ratio_to_fp32 is None else f"{arm.ratio_to_fp32:.2f}",
        )
        for arm in comparison.arms
    ]


def environment() -> dict[str, str | int]:
    """Hardware, system and versions: what a number in the report depends on.  No names of hosts, users or folders."""
    versions = {name: _version(name) for name in ("octavo", "torch", "numba", "numpy")}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": _processor(),
        "cores": os.cpu_count() or 1,
        "torch threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The processor's marketing name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON: arms (accuracies and differences are fractions), environment, config, data."""
    config = {**_plain(comparison.training), "model": comparison.config.model.value, "arms": comparison.config.arms}
    return {
        "arms": [dataclasses.asdict(arm) for arm in comparison.arms],
        "environment": environment(),
        "config": config,
        "data": {**comparison.data, "steps per epoch": comparison.steps_per_epoch},
    }


def _plain(config: Any) -> dict[str, Any]:
    """A config as a dict, its Enum members as their values."""
    fields = dataclasses.asdict(config)
    return {name: value.value if isinstance(value, enum.Enum) else value for name, value in fields.items()}


def write_results(folder: Path, comparison: Comparison) -> None:
    """Writes `results.json` with the arms so far; a crash leaves the file of before."""
    text = json.dumps(to_json(comparison), indent=1, allow_nan=False)
    write_whole(folder / "results.json", text.encode())


def write(folder: Path, comparison: Comparison) -> None:
    """Writes all three files into `folder`, which exists."""
    write_results(folder, comparison)
    picture = curves(comparison)
    write_whole(folder / "curves.png", picture)
    write_whole(folder / "report.html", _page(comparison, picture).encode())


def _page(comparison: Comparison, picture: bytes) -> str:
    source = importlib.resources.files("octavo.lab").joinpath("report.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    facts = to_json(comparison)
    return template.render(
        headings=HEADINGS,
        rows=rows(comparison),
        arms=comparison.arms,
        picture=base64.b64encode(picture).decode(),
        tables={"Run": {**facts["config"], **facts["data"]}, "Machine": facts["environment"]},
        data=comparison.data,
        model=comparison.config.model.value,
    )


def curves(comparison: Comparison) -> bytes:
    """A PNG with two panels: smoothed training loss over the epochs, and test accuracy."""
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    for axes in (loss, accuracy):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    _draw_losses(loss, comparison)
    _draw_accuracies(accuracy, comparison)
    count = comparison.data["training images"]
    figure.suptitle(f"{comparison.config.model.value} on {comparison.data['name']}, {count:,} training images")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_losses(axes: Axes, comparison: Comparison) -> None:
    """Log loss against epochs; an arm that shares another's training would only cover its line."""
    for number, arm in enumerate(comparison.arms):
        if arm.trained_as is not None:
            continue
        window = max(1, len(arm.losses) // 30)
        epochs = (np.arange(len(arm.losses) - window + 1) + (window + 1) / 2) / comparison.steps_per_epoch
        axes.plot(epochs, _smoothed(arm.losses, window), label=arm.name, **_line(number))
    axes.set(xlabel="epoch", ylabel="training loss, running mean", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)


def _draw_accuracies(axes: Axes, comparison: Comparison) -> None:
    """Per cent against epochs, or against the arms where no arm was tested twice."""
    longest = max((len(arm.accuracies) for arm in comparison.arms), default=1)
    for number, arm in enumerate(comparison.arms):
        percent = 100 * np.asarray(arm.accuracies)
        marker: dict[str, Any] = {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 6}
        if longest == 1:
            axes.plot([number], percent, **{**_line(number), **marker, "markersize": 10})
            axes.annotate(
                f"{percent[-1]:.2f}", (number, percent[-1]), xytext=(0, 10), textcoords="offset points", ha="center"
            )
        else:
            epochs = np.arange(longest - len(percent), longest) + 1
            axes.plot(epochs, percent, label=f"{arm.name}  {percent[-1]:.2f} %", **_line(number), **marker)
    axes.set_ylabel("test accuracy, %")
    if longest == 1:
        axes.set_xticks(range(len(comparison.arms)), [arm.name.removeprefix("torch-") for arm in comparison.arms])
        axes.margins(x=0.15, y=0.3)
    else:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, loc="lower right")


def _line(number: int) -> dict[str, Any]:
    """The look of arm `number`: the first is a broad pale line, so that those that follow it closely show on top."""
    width = 4.0 if number == 0 else 1.6
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _STYLES[number % len(_STYLES)],
        "linewidth": width,
        "alpha": 0.55 if number == 0 else 1.0,
    }


def _smoothed(values: Sequence[float], window: int) -> npt.NDArray[np.float64]:
    """The running mean: [len(values) - window + 1]."""
    return np.convolve(np.asarray(values), np.full(window, 1 / window), mode="valid")
