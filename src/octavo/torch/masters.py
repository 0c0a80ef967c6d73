"""Master weights on the grid of a narrow format: what the optimizer wrote is rounded to it, stochastically, after each step.

Rounding to nearest would drop each update under half a last place; stochastic rounding keeps them on average (Gupta et al.,
arXiv 1502.02551), so that float16 masters (Wang et al., arXiv 1812.08011; Mellempudi et al., arXiv 1905.12334) or narrower ones do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from octavo.formats import Format
from octavo.kernels import master
from octavo.rounding import Overflow, Rounding, checked_counter

__all__ = ["round_masters"]

FIRST = 1 << 62
"""The position of the first draw: far beyond those of the layers, which may have the same seed and step."""
STRIDE = 1 << 40
"""Positions that a parameter has to itself."""


def round_masters(
    parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]], format: Format, *, seed: int, step: int
) -> None:
    """Round each parameter to `format`, stochastically, in place: to be called after the optimizer's step.

    parameters: float32 tensors of any shape on the CPU or a CUDA device, `model.parameters()` or `model.named_parameters()`.
    format: `octavo.formats.FLOAT16`, BFLOAT16, E5M2 or another of at most 16 bits, with sign and NaN, its values among float32's.
    seed, step: 0 to 2**32 - 1.

    Between two neighbours of the format, at a fraction f of the way up in magnitude, a value goes up with probability
    floor(f * 2**32) / 2**32; on the format's subnormals too.  What the format holds stays, -0 with it (the FNUZ formats have none); a
    finite value beyond the largest becomes the largest.  NaN stays, and Inf, which is NaN where the format has none.
    Element i of parameter n draws the bits of seed `(seed << 32) | step` at position 2**62 + n * 2**40 + i (`octavo.rounding`): the same on
    CPU and GPU and any number of threads, and again after resuming.  n counts as the parameters come.

    Raises ValueError for any other format, and for parameters of another dtype or kind, naming the first; then no parameter has changed.
    """
    _check_format(format)
    draws = checked_counter("seed", seed, 1 << 32) << 32 | checked_counter("step", step, 1 << 32)
    if isinstance(parameters, Tensor):
        raise ValueError("parameters is an iterable of tensors; got a single tensor: put it into a list")
    entries: list[Any] = list(parameters)
    tensors = [_checked(place, entry) for place, entry in enumerate(entries)]
    with torch.no_grad():
        for place, parameter in enumerate(tensors):
            rounded = _on_cuda if parameter.device.type == "cuda" else _on_cpu
            rounded(parameter, format, draws, FIRST + place * STRIDE)


def _check_format(format: Format) -> None:
    """Raise ValueError for a format that no master weight can have."""
    if not (format.bits <= 16 and format.signed and format.has_nan and format.emin >= -126 and format.emax <= 127):
        raise ValueError(
            f"masters have a format of at most 16 bits, with sign and NaN, within float32's range; {format.name} is none: take "
            "octavo.formats.FLOAT16, say"
        )


def _checked(place: int, entry: Tensor | tuple[str, Tensor]) -> Tensor:
    """The tensor of one entry of `parameters`.  Raises ValueError where it cannot be rounded."""
    name, parameter = (f"number {place}", entry) if isinstance(entry, Tensor) else (repr(entry[0]), entry[1])
    if type(parameter) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"masters are plain tensors; parameter {name} is a {type(parameter).__name__}: pass the tensor that it holds"
        )
    if parameter.dtype is not torch.float32:
        dtype = str(parameter.dtype).removeprefix("torch.")
        floating = parameter.is_floating_point()
        fix = "keep it in float32 (model.float()), which the rounding puts on the grid" if floating else "leave it out"
        raise ValueError(f"masters are rounded within float32; parameter {name} is {dtype}: {fix}")
    if parameter.layout is not torch.strided or parameter.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"masters are dense tensors on a CPU or a CUDA device; parameter {name} is {parameter.layout} on {parameter.device}: "
            "move it there first"
        )
    return parameter


def _on_cuda(parameter: Tensor, format: Format, seed: int, offset: int) -> None:
    from octavo.kernels import cuda  # Triton comes with it

    modes: dict[str, Any] = {"rounding": Rounding.STOCHASTIC, "overflow": Overflow.SATURATE_FINITE}
    parameter.copy_(cuda.quantize(parameter.detach(), format, **modes, seed=seed, offset=offset))


def _on_cpu(parameter: Tensor, format: Format, seed: int, offset: int) -> None:
    rows = parameter.detach().resolve_neg().contiguous()
    master.round_in_place(rows.data_ptr(), rows.numel(), format, seed=seed, offset=offset)
    if rows.data_ptr() != parameter.data_ptr():
        parameter.copy_(rows)
    else:  # autograd has to see that what it may have saved is not what it was
        torch.autograd.graph.increment_version(parameter)
