"""Convolutions of images in bfloat16 with float32 sums, and the gradients of their inputs and weights: exact products of 8-bit operands.

For processors with AVX-512's bfloat16 instruction (`octavo.kernels.dots.has_dots`).  Each function is made for a shape, once, and called
with addresses.  Images are row-major, bfloat16 or float32 that bfloat16 holds; sums that fall below float32's normal numbers become
zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from octavo.kernels import convolution_loops as loops
from octavo.kernels import threads
from octavo.kernels.convolution_loops import ACROSS, DOWN, ROWS, Slot
from octavo.kernels.convolution_plan import Geometry, Plan, backward_plan, forward_plan
from octavo.kernels.dots import LANES

__all__ = ["Image", "convolution", "grad_input", "grad_weight"]

Image: TypeAlias = tuple[int, int]
"""Where an image lies, and how many bytes a number of it has: 2 or 4."""
Mode: TypeAlias = np.ndarray[Any, Any] | None
_GROUP_BYTES, _GROUP_STEPS = 5 << 17, 64
"""The weight's gradient is summed in registers over as many samples as make so many steps, if their planes fit in so much of a cache."""


def _arguments(plan: Plan, width: int, shape: Sequence[int], **words: int) -> tuple[np.ndarray[Any, Any], Any]:
    """A block of arguments for a source of that shape, and what must outlive it; width: bytes of a number of a plane."""
    kept = plan.words(width)
    block = np.zeros(Slot.END, np.int64)
    samples, channels, high, wide = shape
    phases, parts, offsets = (numbers.ctypes.data for numbers in kept)
    sizes = 0, samples, channels, high, wide, phases, len(kept[0]), parts, len(kept[1]), offsets
    block[: Slot.WEIGHT] = *sizes, *plan.step, plan.high, plan.wide
    for name, word in words.items():
        block[Slot[name]] = word
    return block, kept


def _run(kernel: Any, block: np.ndarray[Any, Any], pieces: int, work: int) -> None:
    many = min(threads.of_products(work), pieces)
    block[Slot.SCRATCH] = threads.scratch(many * int(block[Slot.SCRATCH_BYTES]))
    threads.run(kernel.ctypes, block.ctypes.data, many)


def _rounded_up(size: int, step: int) -> int:
    return -(-size // step) * step


class _Rows:
    """A convolution by a plan: results of a sample, eight channels at a time."""

    def __init__(self, plan: Plan, shape: Sequence[int], results: int, plane: int) -> None:
        """shape: of the source; results, plane: channels of the target, and numbers of one."""
        self.samples, channels = shape[0], shape[1]
        self.taps = [np.array(part.taps) for part in plan.parts if part.taps]
        self.blocks = -(-results // ROWS), (channels + 1) // 2
        runs = [(part.rows - 1) * plan.wide + part.columns for part in plan.parts]
        end = max((max(part.offsets, default=0) + run for part, run in zip(plan.parts, runs, strict=True)), default=0)
        space = _rounded_up(self.blocks[1] * plan.numbers + max(0, end - plan.numbers) + 2 * LANES, LANES)
        own = 4 * (space + ROWS * _rounded_up(max(runs, default=0), LANES))
        sizes = {"RESULTS": results, "TARGET_PLANE": plane, "SPACE": space, "SCRATCH_BYTES": own}
        self.block, self.kept = _arguments(plan, 4, shape, **sizes)
        places = sum(len(part.taps) * part.rows * part.columns for part in plan.parts)
        self.work = shape[0] * channels * results * places

    def __call__(
        self,
        source: Image,
        weight: np.ndarray[Any, Any],
        target: int,
        factor: float = 1.0,
        bias: int = 0,
        mode: Mode = None,
    ) -> float:
        """weight: [results, channels, places of the kernel], bits of bfloat16; mode: what `octavo.kernels.cpu.nearest_words` gives.

        Returns the amax of the results before they were rounded by mode; without one, 0.
        """
        words, first = np.empty(ROWS * self.blocks[0] * self.blocks[1] * sum(map(len, self.taps)), np.uint32), 0
        for taps in self.taps:
            end = first + self.blocks[0] * self.blocks[1] * len(taps) * ROWS
            loops.pair_weights(weight, taps, words[first:end].reshape(*self.blocks, len(taps), ROWS))
            first = end
        block = self.block.copy()
        block[Slot.SOURCE], block[Slot.SOURCE_BYTES] = source
        block[Slot.WEIGHT], block[Slot.TARGET], block[Slot.BIAS] = words.ctypes.data, target, bias
        block[Slot.FACTOR : Slot.FACTOR + 1].view(np.float64)[0] = factor
        block[Slot.MODE] = 0 if mode is None else mode.ctypes.data
        _run(loops.convolve, block, self.samples, self.work)
        return float(block[Slot.AMAX : Slot.SCRATCH].view(np.float32)[0])


@functools.lru_cache(maxsize=1024)
def convolution(
    geometry: Geometry, samples: int, channels: int, results: int
) -> Callable[[Image, np.ndarray[Any, Any], int, float, int, Mode], float]:
    """A `f(source, weight, target, factor, bias, mode)`: target = factor * convolution + bias, rounded by mode; returns amax.

    source: [samples, channels, *geometry.size]; weight: the bits of bfloat16 [results, channels, KH x KW], uint16; target: the address
    of float32 [samples, results, *geometry.output]; bias: of float32 [results], or 0; mode: None or `octavo.kernels.cpu.nearest_words`;
    amax: of what was rounded, 0 without a mode.
    """
    high, wide = geometry.output
    return _Rows(forward_plan(geometry), (samples, channels, *geometry.size), results, high * wide)


@functools.lru_cache(maxsize=1024)
def grad_input(
    geometry: Geometry, samples: int, channels: int, results: int
) -> Callable[[Image, np.ndarray[Any, Any], int, float, Mode], float]:
    """A `f(grad_output, weight, target, factor, mode)`: target = factor * the gradient of the input, float32 [samples, channels, H, W].

    grad_output: [samples, results, *geometry.output]; the rest as of `convolution`.
    """
    high, wide = geometry.size
    rows = _Rows(backward_plan(geometry), (samples, results, *geometry.output), channels, high * wide)
    return lambda source, weight, target, factor, mode: rows(
        source, weight.transpose(1, 0, 2), target, factor, mode=mode
    )


@functools.lru_cache(maxsize=1024)
def grad_weight(
    geometry: Geometry, samples: int, channels: int, results: int
) -> Callable[[Image, Image, float], np.ndarray[Any, Any]]:
    """A `f(grad_output, source, factor)`: factor * the gradient of the weight, float32 [results, channels, KH x KW].

    grad_output: [samples, results, *geometry.output]; source: [samples, channels, *geometry.size].  NaN or Inf in a channel of either
    makes NaN of all gradients that it shares in.
    """
    plan = forward_plan(geometry)
    (part,) = plan.parts
    steps = -(-((part.rows - 1) * plan.wide + part.columns) // (2 * LANES))
    beyond = max(0, max(part.offsets) + 2 * LANES * steps - plan.numbers)
    space = _rounded_up(channels * plan.numbers + beyond + 2 * LANES, 2 * LANES)
    fitting = min(-(-_GROUP_STEPS // steps), _GROUP_BYTES // (2 * space + 4 * LANES * steps * results))
    many = -(-samples // max(1, fitting))
    group = -(-samples // (many + many % 2))  # an even number of groups, for an even number of threads
    count, columns = -(-samples // group), channels * len(part.taps)
    shape = count, _rounded_up(results, DOWN), _rounded_up(columns, ACROSS)
    own = 2 * (space * group + 2 * LANES * steps * shape[1] * group + 2 * LANES)
    sizes = {"RESULTS": results, "GRAD_HIGH": part.rows, "GRAD_WIDE": part.columns, "GROUP": group, "SPACE": space}
    sizes["SCRATCH_BYTES"] = own
    template, kept = _arguments(plan, 2, (samples, channels, *geometry.size), **sizes)
    work = samples * results * columns * part.rows * part.columns

    def run(grad_output: Image, source: Image, factor: float) -> np.ndarray[Any, Any]:
        partial, block = np.zeros(shape, np.float32), template.copy()
        block[Slot.SOURCE], block[Slot.SOURCE_BYTES] = source
        block[Slot.GRAD], block[Slot.GRAD_BYTES] = grad_output
        block[Slot.TARGET] = partial.ctypes.data
        _run(loops.grad_weight, block, count, work)
        total = partial[0] if count == 1 else partial.sum(0)
        total *= np.float32(factor)
        return np.ascontiguousarray(total[:results, :columns]).reshape(results, channels, -1)

    run.kept = kept  # type: ignore[attr-defined]  # the block holds its addresses
    return run
