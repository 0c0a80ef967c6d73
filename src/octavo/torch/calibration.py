"""Fixed scales from data: what is kept of the tensors that pass by, and the largest magnitude that a scale should serve."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from octavo.casts import quantize
from octavo.kernels import matrices
from octavo.rounding import Overflow
from octavo.table import TensorSpec, Transform
from octavo.torch import context
from octavo.torch.quantized import QuantizedLayer, check_input, has_fixed_scale, scale_for

__all__ = ["Calibration", "Magnitudes", "calibrate_layers", "check_clipping", "run_batch"]


class Calibration(enum.Enum):
    """Which magnitude of a tensor its fixed scale takes to the format's largest value."""

    MAX = "max"
    """The largest one seen."""
    PERCENTILE = "percentile"
    """That which a given percentage of all elements does not pass, zeros among them; what does pass it saturates."""
    MEAN_SQUARED_ERROR = "mean-squared-error"
    """Of the 96 from the largest one downwards, 16 to an octave, that whose cast has the least squared error over all elements."""


_FINE = 16
"""A bin of the histogram holds the magnitudes whose float32 patterns agree but for this many low bits: 128 bins to an octave."""
_BINS = 0x7F800000 >> _FINE
_STEPS_PER_OCTAVE, _OCTAVES = 16, 6


class Magnitudes:
    """What calibration keeps of a tensor, over all batches: its amax and, where asked, a histogram of its magnitudes.

    amax: float; counts, sums: of the magnitudes of each bin, int64 and float64 [32640], 510 KiB in all, or None.
    """

    def __init__(self, place: str, spec: TensorSpec | None, calibration: Calibration) -> None:
        """place: the tensor's name in errors; spec: how it is cast, where it is."""
        self.place, self.spec, self.calibration = place, spec, calibration
        self.batches, self.amax = 0, 0.0
        binned = has_fixed_scale(spec) and calibration is not Calibration.MAX
        self.counts: npt.NDArray[np.int64] | None = np.zeros(_BINS, np.int64) if binned else None
        self.sums: npt.NDArray[np.float64] | None = np.zeros(_BINS, np.float64) if binned else None

    def add(self, x: Tensor) -> None:
        """Take in a tensor of any shape.  Raises ValueError for NaN and Inf, in float32, naming the place."""
        self.batches += 1
        if not x.numel():
            return
        magnitudes = x.detach().abs().float()
        amax = magnitudes.amax().item()
        if not math.isfinite(amax):
            raise ValueError(
                f"{self.place} holds {amax} during calibration; clean the data, or the weights, first (float32's range is the limit)"
            )
        self.amax = max(self.amax, amax)
        if self.counts is None or self.sums is None:
            return
        values = magnitudes.cpu().contiguous().numpy().reshape(-1)
        bins = values.view(np.int32) >> _FINE
        self.counts += np.bincount(bins, minlength=_BINS)
        self.sums += np.bincount(bins, weights=values, minlength=_BINS)

    def clip(self, percentile: float) -> float:
        """The magnitude that a scale should serve, at most the amax; percentile: of `Calibration.PERCENTILE`."""
        match self.calibration:
            case Calibration.MAX:
                return self.amax
            case Calibration.PERCENTILE:
                return self._percentile(percentile)
            case Calibration.MEAN_SQUARED_ERROR:
                return self._least_error()

    def _percentile(self, percentile: float) -> float:
        """The upper end of the bin of the percentile, which is at most 1/128 above it; the amax where the percentile is 0."""
        assert self.counts is not None
        below = np.cumsum(self.counts)
        if not below[-1]:
            return self.amax
        bin = int(np.searchsorted(below, math.floor(percentile / 100 * (int(below[-1]) - 1)), side="right"))
        end = np.array([(bin + 1) << _FINE], np.int32).view(np.float32)[0]
        return min(float(end), self.amax) if bin else self.amax

    def _least_error(self) -> float:
        """The candidate of least squared error, the largest of several; each bin stands for its elements by their mean."""
        spec = self.spec
        assert spec is not None
        assert self.counts is not None
        assert self.sums is not None
        if not self.amax:
            return 0.0
        used = np.flatnonzero(self.counts)
        counts = self.counts[used]
        means = (self.sums[used] / counts).astype(np.float32)
        candidates = self.amax * 2.0 ** (-np.arange(_STEPS_PER_OCTAVE * _OCTAVES) / _STEPS_PER_OCTAVE)
        errors = []
        for candidate in candidates:
            scale = scale_for(spec, float(candidate))
            cast = quantize(means, spec.format, scale=scale, rounding=spec.rounding, overflow=spec.overflow)
            errors.append(float(np.sum(counts * (cast.astype(np.float64) - means) ** 2)))
        return float(candidates[int(np.argmin(errors))])


def check_clipping(specs: Mapping[str, TensorSpec | None], calibration: Calibration, percentile: float) -> None:
    """Raise ValueError for settings that cannot be meant; specs: of the tensors that may be clipped, by name."""
    if not isinstance(calibration, Calibration):
        raise ValueError(f"calibration is a member of Calibration; got {calibration!r}: write Calibration.MAX, say")
    if not 0 < percentile <= 100:
        raise ValueError(f"a percentile is above 0 and at most 100; got {percentile}")
    for name, spec in specs.items():
        clips = has_fixed_scale(spec) and calibration is not Calibration.MAX
        if clips and spec is not None and spec.overflow is Overflow.NONE:
            raise ValueError(
                f"{calibration.value} calibration clips, and the recipe turns what is clipped of {name} into Inf or NaN; write "
                "overflow=Overflow.SATURATE there, or use Calibration.MAX"
            )


def run_batch(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: of a tuple or list its first element; a dict is passed by keyword."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Watch:
    """A layer in high precision, the quantised one that will take its place, and what is seen of its input and its output."""

    layer: nn.Module
    quantized: QuantizedLayer
    input: Magnitudes
    output: Magnitudes

    def before(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Take in the layer's input."""
        self._take(self.input, check_input(self.input.place, inputs[0] if inputs else named.get("input")))

    def after(self, _: nn.Module, inputs: Any, output: Tensor) -> None:
        """Take in its output."""
        self._take(self.output, output)

    def _take(self, seen: Magnitudes, x: Tensor) -> None:
        spec = seen.spec
        if has_fixed_scale(spec) and spec.transform is Transform.HADAMARD and x.numel():
            x = matrices.hadamard(self.quantized.lay(x.detach(), spec, self.quantized.groups).cpu().contiguous())
        seen.add(x)


def calibrate_layers(
    model: nn.Module,
    layers: Mapping[str, tuple[nn.Module, QuantizedLayer]],
    batches: Iterable[Any],
    calibration: Calibration,
    percentile: float,
) -> None:
    """Set the fixed scales of quantised layers from one pass of the model, in high precision and without gradients.

    layers: those of the model and the ones that will take their places, by name.
    Raises ValueError, naming the tensor, for NaN, Inf, integers and complex numbers, and for a scale that no batch has data for.
    """
    watches = [
        _Watch(
            layer=layer,
            quantized=new,
            input=Magnitudes(f"{name}.input", new.row.left, calibration),
            output=Magnitudes(f"{name}.output", new.row.result, calibration),
        )
        for name, (layer, new) in layers.items()
    ]
    handles = []
    for watch in watches:
        handles.append(watch.layer.register_forward_pre_hook(watch.before, with_kwargs=True))
        handles.append(watch.layer.register_forward_hook(watch.after))
    try:
        with torch.no_grad(), context.autocast(enabled=False):
            for batch in batches:
                run_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for watch in watches:
        for seen, scale in ((watch.input, watch.quantized.input_scale), (watch.output, watch.quantized.output_scale)):
            if seen.spec is None or scale is None:
                continue
            if not seen.batches:
                raise ValueError(
                    f"no batch reached {seen.place}, so it has no scale; give batches that do, or exempt it"
                )
            scale.fill_(scale_for(seen.spec, seen.clip(percentile)))
