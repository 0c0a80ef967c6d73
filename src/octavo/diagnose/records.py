"""Where statistics of casts go: JSON lines, TensorBoard or memory; and which of them to look at first."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from octavo.diagnose.statistics import TensorStatistics

__all__ = [
    "HEADINGS",
    "JsonLines",
    "Memory",
    "Record",
    "TensorBoard",
    "Writer",
    "harm",
    "read_json_lines",
    "rows",
    "table",
    "worst",
]


@dataclass(frozen=True, slots=True)
class Record:
    """The statistics of one cast."""

    step: int
    """The training step."""
    module: str
    """The layer's name in its model, "" where the model is the layer."""
    tensor: str
    """Which of its tensors: `input`, `weight`, `grad_output`, ..."""
    statistics: TensorStatistics


class Writer(Protocol):
    """What takes records, one cast at a time."""

    def write(self, step: int, module: str, tensor: str, statistics: TensorStatistics) -> None:
        """Keeps one record."""

    def close(self) -> None:
        """Nothing is written after this; closing twice is closing once."""


class _Closing:
    """A writer as a context manager, which closes it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is written after this."""


class Memory(_Closing):
    """Keeps records in a list; `close` leaves them there."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, step: int, module: str, tensor: str, statistics: TensorStatistics) -> None:
        """Keeps one record."""
        self.records.append(Record(int(step), module, tensor, statistics))


class JsonLines(_Closing):
    """Appends one strict JSON object a line to a file, for `read_json_lines`; each line is in the file when `write` returns.

    A line holds step, module, tensor and the fields of `TensorStatistics`.  NaN, and a scale that is not one number, is null; Inf is
    "Infinity".  Folders that are missing are made.  Several processes may append to one file.
    Raises ValueError for a path that cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written ({error.strerror}); choose a writable file") from None

    def write(self, step: int, module: str, tensor: str, statistics: TensorStatistics) -> None:
        """Appends one line.  Raises ValueError once closed."""
        spelled = {name: _spelled(value) for name, value in asdict(statistics).items()}
        line = {"step": int(step), "module": module, "tensor": tensor, **spelled}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")  # unbuffered: one system call a line

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _spelled(value: Any) -> Any:
    """A field as strict JSON has it."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def read_json_lines(path: str | os.PathLike[str]) -> list[Record]:
    """The records that `JsonLines` wrote, in order.

    Raises FileNotFoundError where there is no such file, and ValueError, naming the line, for what is no record.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            records.append(_record(json.loads(line)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: cut off, or no record of a cast ({error!r}); remove the line") from None
    return records


def _record(line: dict[str, Any]) -> Record:
    step, module, tensor = line.pop("step"), line.pop("module"), line.pop("tensor")
    wanted = {field.name for field in fields(TensorStatistics)}
    if line.keys() != wanted:
        raise ValueError(f"its fields are not {', '.join(sorted(wanted))}")
    for name in ("count", "nan", "inf", "zeros"):
        line[name] = int(line[name])
    for name in ("amax", "underflow", "overflow", "sqnr_db"):
        line[name] = math.nan if line[name] is None else float(line[name])
    line["exponents"] = tuple((int(exponent), int(count)) for exponent, count in line["exponents"])
    return Record(int(step), str(module), str(tensor), TensorStatistics(**line))


class TensorBoard(_Closing):
    """Writes to TensorBoard: scalars `module/tensor/underflow` and so on, and the exponents as a histogram, `module/tensor/exponents`.

    writer: a `SummaryWriter` (anything with its add_scalar and add_histogram_raw), which `close` leaves open; or a folder, for a new
    one, which needs torch and tensorboard.  Scalars are amax, nan, inf, underflow, overflow, sqnr_db and scale, each where it is a
    finite number; there is no histogram of a tensor that holds no finite number but 0.
    Raises ImportError where tensorboard is not installed, ValueError for a folder that cannot be written.
    """

    SCALARS = ("amax", "nan", "inf", "underflow", "overflow", "sqnr_db", "scale")
    """The fields of `TensorStatistics` that are curves."""

    def __init__(self, writer: Any) -> None:
        self._owned = isinstance(writer, (str, os.PathLike))
        self._writer = _summary_writer(writer) if self._owned else writer
        for method in ("add_scalar", "add_histogram_raw"):
            if not hasattr(self._writer, method):
                raise ValueError(
                    f"a TensorBoard writer has add_scalar and add_histogram_raw; got {type(writer).__name__}: give a SummaryWriter "
                    "or a folder"
                )

    def write(self, step: int, module: str, tensor: str, statistics: TensorStatistics) -> None:
        """Adds the scalars and the histogram of one cast at `step`."""
        place = f"{module}/{tensor}" if module else tensor
        for name in self.SCALARS:
            value = getattr(statistics, name)
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(f"{place}/{name}", value, int(step))
        if statistics.exponents:
            self._writer.add_histogram_raw(f"{place}/exponents", **_histogram(statistics), global_step=int(step))

    def close(self) -> None:
        """Closes the writer if it was made here."""
        if self._owned:
            self._writer.close()


def _summary_writer(folder: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "files for TensorBoard are written by torch and tensorboard, one of which is not installed; pip install torch tensorboard"
        ) from None
    try:
        return SummaryWriter(os.fspath(folder))
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); choose a writable folder") from None


def _histogram(statistics: TensorStatistics) -> dict[str, Any]:
    """What add_histogram_raw takes: a bucket for each exponent, half to either side of it, after an empty one that marks the left edge."""
    counts = dict(statistics.exponents)
    lowest, highest = min(counts), max(counts)
    held = [counts.get(exponent, 0) for exponent in range(lowest, highest + 1)]
    return {
        "min": float(lowest),
        "max": float(highest),
        "num": sum(held),
        "sum": float(sum(exponent * count for exponent, count in counts.items())),
        "sum_squares": float(sum(exponent**2 * count for exponent, count in counts.items())),
        "bucket_limits": [lowest - 0.5 + place for place in range(len(held) + 1)],
        "bucket_counts": [0, *held],
    }


def harm(statistics: TensorStatistics) -> float:
    """How much a cast hurts: noise over signal in power, and the fractions that underflow and overflow, added up; unknown ones are 0."""
    parts = (10 ** (-statistics.sqnr_db / 10), statistics.underflow, statistics.overflow)
    return sum(part for part in parts if not math.isnan(part))


def worst(records: Iterable[Record], count: int = 10) -> list[Record]:
    """The `count` tensors that casts hurt most, worst first, each at the step that hurt it most.

    Tensors that held NaN or Inf before the cast come first; then what counts is `harm`.  Equal ones keep the order of `records`.
    """
    kept: dict[tuple[str, str], Record] = {}
    for record in records:
        place = (record.module, record.tensor)
        if place not in kept or _order(record) > _order(kept[place]):
            kept[place] = record
    return sorted(kept.values(), key=_order, reverse=True)[:count]


def _order(record: Record) -> tuple[bool, float]:
    statistics = record.statistics
    return statistics.nan + statistics.inf > 0, harm(statistics)


HEADINGS = ("step", "module", "tensor", "format", "amax", "underflow %", "overflow %", "SQNR dB")
"""The columns of `rows`."""


def rows(records: Iterable[Record]) -> list[tuple[str, ...]]:
    """The table's cells as text; "-" where there is no number, and for the module of a model that is one layer."""
    return [
        (
            str(record.step),
            record.module or "-",
            record.tensor,
            record.statistics.format,
            f"{record.statistics.amax:.4g}",
            _percent(record.statistics.underflow),
            _percent(record.statistics.overflow),
            "-" if math.isnan(record.statistics.sqnr_db) else f"{record.statistics.sqnr_db:.1f}",
        )
        for record in records
    ]


def _percent(fraction: float) -> str:
    """In per cent, with digits enough to tell a few elements of many from none."""
    if math.isnan(fraction):
        return "-"
    return f"{100 * fraction:.2f}" if fraction == 0 or fraction >= 0.0001 else f"{100 * fraction:.1g}"


def table(records: Iterable[Record]) -> str:
    """The records as aligned text, a line each under `HEADINGS`, in the order they come: `table(worst(records))`."""
    lines = [HEADINGS, *rows(records)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    words = slice(1, 4)
    texts = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[words] = [cell.ljust(width) for cell, width in zip(line[words], widths[words], strict=True)]
        texts.append("  ".join(cells))
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])
