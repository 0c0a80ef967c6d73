"""A page that shows where casts hurt: the worst tensors, how they fared over the steps, and how their exponents meet the format."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.diagnose.records import HEADINGS, Record, rows, worst
from octavo.files import write_whole
from octavo.formats import FORMATS, WIDE_FORMATS, Format

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["picture", "write"]

LISTED, DRAWN = 20, 8
"""How many of the worst tensors the table has, and how many of those the picture."""

# Okabe and Ito's palette, which colour-blind readers can tell apart; line styles repeat the distinction.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7f7f7f", "#000000")
_STYLES = ("-", "--", "-.", ":")

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Octavo: what casts lose</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.5rem; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #ddd; }
  th:nth-child(-n+4), td:nth-child(-n+4) { text-align: left; }
  th:first-child, td:first-child { padding-left: 0; }
  img { max-width: 100%; height: auto; margin: 1rem 0; }
</style>
</head>
<body>
<h1>What casts lose: {{ listed }} of {{ tensors }} {{ "tensor" if tensors == 1 else "tensors" }}, worst first</h1>
<p>From {{ "{:,}".format(casts) }} {{ "cast" if casts == 1 else "casts" }}, steps {{ first }} to {{ last }}. Each tensor is shown at
the step that hurt it most: one that held NaN or Inf comes first, then what counts is noise over signal in power and the fractions
that underflow and overflow, added up. Underflow is the share of the nonzero elements that became 0; overflow the share of the finite
ones that lie beyond the format's largest value, or became Inf or NaN. SQNR is the power of the signal over that of the noise.</p>
<table>
<thead><tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table>
<img src="data:image/png;base64,{{ picture }}" alt="SQNR and underflow over the steps, and the exponents of the worst tensors">
<p>The lower panel shows how the exponents of a tensor are spread before the cast, at the step in the table. The grey bar is what
its format holds at its scale, the paler end subnormal numbers; what lies more than 1 to the left of it becomes 0, what lies to the
right overflows. There is no bar where a tensor has more than one scale.</p>
</body>
</html>
"""


def write(path: str | os.PathLike[str], records: Sequence[Record]) -> None:
    """Writes one HTML page about `records` that needs no other file: at every moment the old page, if any, or the new one.

    Raises ImportError where jinja2 or matplotlib is not installed, ValueError without records and for a path that cannot be written.
    """
    if not records:
        raise ValueError("a page shows records of casts; got none: record some steps first")
    try:
        import jinja2

        image = picture(records)
    except ImportError:
        raise ImportError(
            "pages are made by jinja2 and matplotlib, one of which is not installed; pip install 'octavo[lab]'"
        ) from None
    shown = worst(records, LISTED)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_TEMPLATE)
    text = template.render(
        headings=HEADINGS,
        rows=rows(shown),
        listed=len(shown),
        tensors=len({(record.module, record.tensor) for record in records}),
        casts=len(records),
        first=min(record.step for record in records),
        last=max(record.step for record in records),
        picture=base64.b64encode(image).decode(),
    )
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); choose a writable folder") from None


def picture(records: Sequence[Record]) -> bytes:
    """A PNG of the worst tensors: SQNR and underflow over the steps, and under them exponents against each format's range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = worst(records, DRAWN)
    figure = Figure(figsize=(11, 5.5 + 0.5 * len(chosen)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(4, 1.5 + 0.5 * len(chosen))).flat
    sqnr, underflow = upper.subplots(1, 2)
    exponents = lower.subplots()
    for axes in (sqnr, underflow, exponents):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    _draw_steps(sqnr, records, chosen, "sqnr_db", 1.0)
    _draw_steps(underflow, records, chosen, "underflow", 100.0)
    sqnr.set(xlabel="step", ylabel="SQNR, dB")
    underflow.set(xlabel="step", ylabel="underflow, % of nonzero elements")
    _draw_exponents(exponents, chosen)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _label(record: Record) -> str:
    name = f"{record.module}.{record.tensor}" if record.module else record.tensor
    return (name if len(name) <= 40 else f"…{name[-39:]}").replace("$", r"\$")  # a $ would start a formula


def _draw_steps(axes: Axes, records: Sequence[Record], chosen: Sequence[Record], field: str, unit: float) -> None:
    """One line for each chosen tensor; what is not finite leaves a gap."""
    from matplotlib.ticker import MaxNLocator

    for number, one in enumerate(chosen):
        own = [record for record in records if (record.module, record.tensor) == (one.module, one.tensor)]
        own.sort(key=lambda record: record.step)
        values = [unit * getattr(record.statistics, field) for record in own]
        axes.plot(
            [record.step for record in own],
            [value if math.isfinite(value) else math.nan for value in values],
            color=_COLOURS[number % len(_COLOURS)],
            linestyle=_STYLES[number % len(_STYLES)],
            marker="o" if len(own) < 30 else None,
            markersize=4,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_exponents(axes: Axes, chosen: Sequence[Record]) -> None:
    """A row for each tensor, worst on top: a bar from 2**e to 2**(e + 1) as high as that exponent is frequent, over the format's range."""
    for number, record in enumerate(chosen):
        floor = len(chosen) - 1 - number
        statistics = record.statistics
        if statistics.scale is not None and statistics.format in (known := {**FORMATS, **WIDE_FORMATS}):
            _draw_range(axes, known[statistics.format], statistics.scale, floor)
        highest = max((count for _, count in statistics.exponents), default=1)
        axes.bar(
            [exponent for exponent, _ in statistics.exponents],
            [0.8 * count / highest for _, count in statistics.exponents],
            width=1.0,
            bottom=floor,
            align="edge",
            color=_COLOURS[number % len(_COLOURS)],
        )
    axes.set_yticks([len(chosen) - 1 - number for number in range(len(chosen))], [_label(one) for one in chosen])
    for number, text in enumerate(axes.get_yticklabels()):
        text.set_color(_COLOURS[number % len(_COLOURS)])
        text.set_verticalalignment("bottom")
    axes.set(xlabel="log2 |x| before the cast", ylim=(-0.1, len(chosen)))


def _draw_range(axes: Axes, format: Format, scale: float, floor: int) -> None:
    """What the format holds at that scale."""
    smallest, normal, largest = (
        math.log2(value) - math.log2(scale) for value in (format.smallest_subnormal, format.tiny, format.max)
    )
    style: dict[str, Any] = {"height": 0.9, "align": "edge", "zorder": 0.5}
    axes.barh(floor, normal - smallest, left=smallest, color="#f2f2f2", **style)
    axes.barh(floor, largest - normal, left=normal, color="#e2e2e2", **style)
