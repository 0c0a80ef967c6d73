"""What quantising cost: loss and accuracy of a model before and after, and how much of each layer's output is noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.torch.calibration import run_batch
from octavo.torch.quantized import QuantizedLayer

__all__ = ["AccuracyReport", "Score", "compare_accuracy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One model on labelled data."""

    loss: float
    """Mean cross entropy, in nats."""
    accuracy: float
    """The fraction of labels that the largest logit names, 0 to 1."""
    weight_bytes: int
    """Of all parameters and buffers, each counted once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyReport:
    """What `compare_accuracy` found."""

    samples: int
    """Labels compared."""
    before: Score
    after: Score
    sqnr: Mapping[str, float]
    """Of each quantised layer, in the model's order: 10 log10(sum of squares of its output before / of the difference after), in dB;
    inf where nothing differs, NaN where no batch reached it."""

    def describe(self) -> str:
        """The report as aligned text: both models, then a line for each layer."""
        one, other = self.before, self.after
        ratio = other.weight_bytes / one.weight_bytes if one.weight_bytes else math.nan
        rows = [
            ("", "before", "after", "change"),
            ("loss", f"{one.loss:.4f}", f"{other.loss:.4f}", f"{other.loss - one.loss:+.4f}"),
            (
                "accuracy",
                f"{one.accuracy:.2%}",
                f"{other.accuracy:.2%}",
                f"{100 * (other.accuracy - one.accuracy):+.2f}",
            ),
            ("weight bytes", f"{one.weight_bytes:,}", f"{other.weight_bytes:,}", f"x {ratio:.2f}"),
        ]
        layers = [("layer", "SQNR"), *((name or "(model)", f"{noise:.1f} dB") for name, noise in self.sqnr.items())]
        parts = [f"{self.samples:,} samples", _aligned(rows)]
        return "\n".join([*parts, "", _aligned(layers)] if self.sqnr else parts)


def _aligned(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows of cells as text, the first column to the left."""
    table = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in table
    )


@dataclass(slots=True)
class _Total:
    """Sums over batches of one model."""

    loss: float = 0.0
    hits: int = 0
    labels: int = 0

    def add(self, logits: Any, labels: Any) -> None:
        """Take in a batch."""
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 2:
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"a model that is scored returns logits [samples, classes, ...]; got {shape}: wrap it in one that does"
            )
        if not isinstance(labels, Tensor) or labels.dtype is not torch.int64:
            raise ValueError(
                f"labels are int64 classes; got {getattr(labels, 'dtype', type(labels).__name__)}: convert them (labels.long())"
            )
        self.loss += F.cross_entropy(logits.double(), labels, reduction="sum").item()
        self.hits += int((logits.argmax(1) == labels).sum())
        self.labels += labels.numel()

    def score(self, model: nn.Module) -> Score:
        """The means over all labels."""
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return Score(loss=self.loss / self.labels, accuracy=self.hits / self.labels, weight_bytes=held)


@dataclass(slots=True)
class _Noise:
    """Sums of squares over a layer's outputs, and over what they differ by."""

    signal: float = 0.0
    error: float = 0.0
    calls: int = 0

    def add(self, before: list[Tensor], after: list[Tensor], name: str) -> None:
        """Take in a batch."""
        if len(before) != len(after):
            raise ValueError(
                f"{name} ran {len(before)} times before and {len(after)} after; give models of one structure"
            )
        for x, y in zip(before, after, strict=True):
            self.signal += x.double().square().sum().item()
            self.error += (x.double() - y.double()).square().sum().item()
            self.calls += 1

    @property
    def decibels(self) -> float:
        """Signal over error."""
        if not self.calls:
            return math.nan
        if not self.error:
            return math.inf
        ratio = self.signal / self.error
        return 10 * math.log10(ratio) if ratio else -math.inf


class _Outputs:
    """What some modules of a model give out while a batch runs, in order."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.seen: dict[str, list[Tensor]] = {name: [] for name in names}
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in self.seen:
            if name not in modules:
                raise ValueError(f"the model before has no module {name!r}; give the one that was quantised")
        self.handles = [modules[name].register_forward_hook(self._hook(name)) for name in self.seen]

    def _hook(self, name: str) -> Any:
        return lambda module, inputs, output: self.seen[name].append(output.detach())

    def take(self) -> dict[str, list[Tensor]]:
        """What was seen since the last call."""
        taken, self.seen = self.seen, {name: [] for name in self.seen}
        return taken


def compare_accuracy(before: nn.Module, after: nn.Module, batches: Iterable[Any]) -> AccuracyReport:
    """Loss, top-1 accuracy and size of two classifiers, and the noise in each quantised layer's output.

    before: the model in high precision; after: what `quantize_model` made of it; batches: (inputs, labels), inputs as of
    `quantize_model`, labels int64.  Both run in eval mode on the same batches, each on its own activations, so that a layer's noise
    holds that of the layers before it.  A layer into which a batch norm was folded is compared with that norm.
    Training modes are as before.  NaN propagates into the figures.
    Raises ValueError for no label, a batch that is no pair, outputs that are no logits, labels of another dtype, and models of
    different structure.
    """
    places = {name: module.norm or name for name, module in after.named_modules() if isinstance(module, QuantizedLayer)}
    modes = [(module, module.training) for model in (before, after) for module in model.modules()]
    watched: list[_Outputs] = []
    totals = _Total(), _Total()
    noise = {name: _Noise() for name in places}
    try:
        for model in (before, after):
            model.eval()
            watched.append(_Outputs(model, places.values()))
        with torch.no_grad():
            for batch in batches:
                inputs, labels = _pair(batch)
                for model, total in zip((before, after), totals, strict=True):
                    total.add(run_batch(model, inputs), labels)
                one, other = (outputs.take() for outputs in watched)
                for name, place in places.items():
                    noise[name].add(one[place], other[place], name)
    finally:
        for outputs in watched:
            for handle in outputs.handles:
                handle.remove()
        for module, training in modes:
            module.training = training
    if not totals[0].labels:
        raise ValueError("a comparison needs at least one label; got none")
    return AccuracyReport(
        samples=totals[0].labels,
        before=totals[0].score(before),
        after=totals[1].score(after),
        sqnr={name: found.decibels for name, found in noise.items()},
    )


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(f"a batch is (inputs, labels); got {type(batch).__name__}: give a DataLoader of pairs")
    return batch[0], batch[1]
