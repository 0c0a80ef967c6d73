"""Casts of tensors of any rank: how each lies as the operand matrices of a GEMM, and its values in float32 once it is cast.

Products that are not those of a linear layer (convolutions, batches of matrices) run on these values, in PyTorch's own operators, or on
narrow ones (`octavo.torch.bilinear_sums`).
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.kernels import cpu, matrices
from octavo.reference import block_shape
from octavo.scaling import Block, TwoLevel, Unscaled, amax_scale
from octavo.table import Recipe, TensorSpec, Transform
from octavo.torch.gemm import dense
from octavo.torch.operands import KINDS, Cast
from octavo.torch.watching import watch

__all__ = [
    "GRAD_INPUT",
    "GRAD_WEIGHT",
    "OUTPUT",
    "Cells",
    "Found",
    "Layout",
    "as_it_lies",
    "carry_mark",
    "cast_tensor",
    "cells_of",
    "fits_bfloat16",
    "is_marked",
    "marked",
    "matrix_on_cpu",
    "matrix_on_device",
    "whole_on_device",
]


class Layout(NamedTuple):
    """How a tensor lies as operand matrices [batch, rows, contracted]."""

    order: tuple[int, ...]
    """The tensor's axes, once `split` is: those of the batch, those of the rows, the contracted one."""
    batch: int
    """How many of them make the batch."""
    split: tuple[int, int] | None = None
    """(axis, groups): an axis that is cut into [groups, rest] first."""

    def lay(self, x: Tensor) -> Tensor:
        """x as [batch, rows, contracted]."""
        if self.split is not None:
            x = x.unflatten(self.split[0], (self.split[1], -1))
        x = x.permute(self.order)
        batch = math.prod(x.shape[: self.batch])
        return x.reshape(batch, math.prod(x.shape[self.batch : -1]), x.shape[-1])

    def back(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        """Matrices in the layout of a tensor of that shape; the contracted axis may have grown."""
        sizes = list(shape)
        if self.split is not None:
            axis, groups = self.split
            sizes[axis : axis + 1] = [groups, sizes[axis] // groups]
        laid = [sizes[axis] for axis in self.order]
        x = matrices.reshape(*laid[:-1], matrices.shape[-1])
        x = x.permute([self.order.index(axis) for axis in range(len(self.order))])
        return x if self.split is None else x.flatten(self.split[0], self.split[0] + 1)


@functools.lru_cache(maxsize=64)
def as_it_lies(rank: int) -> Layout:
    """Of a tensor that is contracted along no axis: a matrix of rows along its last one."""
    return Layout(tuple(range(rank)), 0)


OUTPUT, GRAD_INPUT, GRAD_WEIGHT = 2, 5, 8
"""The numbers of the three results' cells."""


class Cells(NamedTuple):
    """The nine cells of a recipe's table as casts of matrices that lie [rows, contracted], and what they have in common."""

    casts: tuple[Cast | None, ...]
    """By number, 3 * row + place."""
    recipe: Recipe
    grad_output_once: bool
    """Whether grad_output is cast alike in both of its GEMMs."""
    input_once: bool
    weight_once: bool


@functools.lru_cache(maxsize=256)
def cells_of(recipe: str) -> Cells:
    """The cells of the recipe of that `cast_key`."""
    table = Recipe.from_cast_key(recipe)
    specs = [spec for *_, spec in table.cells()]
    casts = tuple(
        None if spec is None else Cast(spec, upright=False, number=number) for number, spec in enumerate(specs)
    )

    def once(one: int, other: int) -> bool:
        spec = specs[one]
        return spec == specs[other] and (spec is None or spec.cast_once)

    return Cells(casts, table, once(3, 6), once(0, 7), once(1, 4))


class Found(NamedTuple):
    """What a cast made of a tensor."""

    values: Tensor
    """Scales undone, float32 (float64 of a float64 tensor), in the tensor's shape; of a narrow cast as that says."""
    amax: float | Tensor = 0.0
    """Of the tensor; 0 where it was not looked for."""
    scale: float | Tensor = 1.0
    """The one that elements were multiplied with, of casts that have one."""

    @property
    def undone(self) -> Tensor:
        """The values of a narrow cast with the tensor's scale undone, float32; those of another as they are."""
        return self.values.float().div_(self.scale) if self.values.dtype is torch.bfloat16 else self.values


class _Scratch(threading.local):
    """Memory of this thread, by slot: fresh memory would cost a cast more than its arithmetic."""

    def __init__(self) -> None:
        self.slots: dict[int, Tensor] = {}

    def like(self, x: Tensor, slot: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory laid out as x is, which is dense; of a dtype no wider than float32."""
        held = self.slots.get(slot)
        if held is None or held.numel() < x.numel():
            self.slots[slot] = held = torch.empty(x.numel())
        return held.view(dtype).as_strided(x.shape, x.stride())


_scratch = _Scratch()


def cast_tensor(
    x: Tensor,
    cast: Cast | None,
    layout: Layout,
    delayed: float | Tensor,
    seed: int,
    *,
    again: bool = False,
    in_place: bool = False,
    slot: int | None = None,
    narrow: bool = False,
) -> Found:
    """x cast, by a cell of a recipe or not at all.

    delayed: the scale that a history gives, a float or, on other devices than the CPU, float32 [1].  again: x was cast before, and
    delayed is the scale of that cast, of whatever kind.  in_place: nobody else needs x, whose memory the values may take.  slot: the
    values are needed only until this thread asks for that slot again.  narrow: in row-major order, the tensor's one scale not
    undone, as bfloat16, or float32 where x was marked; for CPU tensors and casts that are `fits_bfloat16`.
    A Hadamard transform is not undone: the contracted axis is then filled up to a multiple of 16.
    x itself comes back, with amax 0, where it was `marked` with this very cast.
    """
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    if cast is None:
        return Found(x.to(wide))
    if is_marked(x, cast) and watch.look is None:
        return Found(dense(x.float() if x.dtype is torch.float16 else x) if narrow else x)
    if x.dtype not in KINDS:
        raise ValueError(f"{cast.spec} casts float32, float64, bfloat16 and float16; got {x.dtype}: convert it first")
    if cast.spec.format.bits > 8:
        operand = cast(x, 1.0)
        found = Found(operand.values.to(wide), operand.amax)
    elif cast.whole and cast.spec.transform is Transform.NONE:
        if x.device.type == "cpu":
            found = _whole(x, cast, delayed, seed, again, in_place and watch.look is None, slot, narrow)
        else:
            found = whole_on_device(x, cast, delayed, seed, again)
    else:
        found = _laid(x, cast, layout, delayed, seed, slot, narrow)
    if watch.look is not None and not again and cast.spec.transform is Transform.NONE:
        watch.look(cast.number, cast.spec, x, lambda: found.undone, float(found.scale))
    return found


def fits_bfloat16(cast: Cast | None) -> bool:
    """Whether bfloat16 holds what the cast makes of a tensor, but for one scale of it all: then `cast_tensor` takes it narrow."""
    if cast is None or cast.spec.format.bits > 8 or cast.spec.transform is not Transform.NONE:
        return False
    return cast.folded and not isinstance(cast.spec.scaling, TwoLevel)


def marked(x: Tensor, cast: Cast | None) -> Tensor:
    """x, which holds values of the cast's format as they are, marked so: casting it again changes nothing."""
    if cast is not None and isinstance(cast.spec.scaling, Unscaled) and not x.is_inference():
        x._octavo_cast = (cast.spec.format, cast.spec.overflow, x._version)  # type: ignore[attr-defined]
    return x


def is_marked(x: Tensor, cast: Cast) -> bool:
    """Whether x is known to hold what the cast would make of it, and nobody has written to it since."""
    mark = getattr(x, "_octavo_cast", None)
    if mark is None or not isinstance(cast.spec.scaling, Unscaled) or cast.spec.transform is not Transform.NONE:
        return False
    return bool(mark == (cast.spec.format, cast.spec.overflow, x._version))


def carry_mark(x: Tensor, y: Tensor, version: int) -> None:
    """Mark y as x was at that version: y holds no other values than x and zero."""
    mark = getattr(x, "_octavo_cast", None)
    if mark is not None and mark[2] == version and not y.is_inference():
        y._octavo_cast = (*mark[:2], y._version)  # type: ignore[attr-defined]


def _whole(
    x: Tensor,
    cast: Cast,
    delayed: float | Tensor,
    seed: int,
    again: bool,
    in_place: bool,
    slot: int | None,
    narrow: bool,
) -> Found:
    """One scale, in one pass over memory."""
    # Draws go by the place in row-major order; without them any dense order does.
    x = dense(x) if narrow or cast.stochastic or not _is_dense(x) or x.is_neg() else x
    if narrow:
        values = torch.empty_like(x, dtype=torch.bfloat16) if slot is None else _scratch.like(x, slot, torch.bfloat16)
    elif in_place and x.dtype in (torch.float32, torch.float64):
        values = x
    elif slot is not None and x.dtype is not torch.float64:
        values = _scratch.like(x, slot)
    else:
        values = torch.empty_like(x, dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)
    scale = float(delayed) if again else cast.scale_of(x, float(delayed))
    source = cpu.Buffer(x.data_ptr(), KINDS[x.dtype], x.numel())
    target = cpu.Buffer(values.data_ptr(), KINDS[values.dtype], x.numel())
    assert cast.caster is not None
    undo = 1.0 if narrow else scale
    return Found(values, cast.caster(source, target, scale, undo, seed, cast.number << 56), scale)


def _is_dense(x: Tensor) -> bool:
    """Whether x fills its memory, its axes in whatever order."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def whole_on_device(x: Tensor, cast: Cast, delayed: float | Tensor, seed: int, again: bool) -> Found:
    """A cast with one scale on another device than the CPU: the CPU's bits."""
    from octavo.kernels import cuda, cuda_casts

    spec, scale = cast.spec, delayed if cast.delayed or again else 1.0
    modes: dict[str, Any] = {"rounding": spec.rounding, "overflow": spec.overflow}
    x = x.contiguous() if x.dtype is torch.float64 else x.float().contiguous()
    if cast.current is not None and not again:
        scale = amax_scale(cuda.amax(x).reshape(1).float(), spec.format.max, cast.current)
    if x.dtype is torch.float64:
        values = cuda.quantize(x, spec.format, scale=float(scale), seed=seed, offset=cast.number << 56, **modes)
        return Found(values, cuda.amax(x), scale)
    words = cuda_casts.seed_words(spec.rounding, seed, cast.number << 56, x.numel())
    source = cuda_casts.source_of(x)
    values, state = cuda_casts.cast_with_amax(source, spec.format, scale, **modes, words=words, codes=False)
    return Found(values, cuda_casts.amax_of(state), scale)


def _laid(
    x: Tensor, cast: Cast, layout: Layout, delayed: float | Tensor, seed: int, slot: int | None, narrow: bool
) -> Found:
    """Scales of rows or blocks, or a transform: as matrices, whose blocks end where each of them does."""
    if x.dtype is torch.float64:
        raise ValueError(
            f"{cast.spec} takes float32, bfloat16 and float16; got float64: convert the model (model.float())"
        )
    if not x.numel():
        return Found(x.float())
    if x.device.type == "cpu" and (found := _standing(x, cast, layout, slot, narrow)) is not None:
        return found
    laid = layout.lay(x)
    batch, rows, columns = laid.shape
    across = block_shape(cast.spec, rows, columns)[0] if rows and not cast.whole else 1
    short = -rows % across if batch > 1 else 0
    if short:
        laid = torch.nn.functional.pad(laid, (0, 0, 0, short))
    flat = laid.reshape(-1, columns).contiguous()
    values, amax = (matrix_on_cpu if x.device.type == "cpu" else matrix_on_device)(flat, cast, delayed, seed)
    if watch.look is not None and cast.spec.transform is not Transform.NONE and x.device.type == "cpu":
        watch.look(cast.number, cast.spec, matrices.hadamard(flat), lambda: values, 1.0)
    back = layout.back(values.reshape(batch, rows + short, -1)[:, :rows], x.shape)
    if narrow:
        back = back.bfloat16()
    return Found(back.contiguous(), amax)  # as PyTorch's operators write what comes of it


def _standing(x: Tensor, cast: Cast, layout: Layout, slot: int | None, narrow: bool) -> Found | None:
    """The same where x need not be turned, because its blocks stand on end in it as it lies; None where it has to be."""
    scaling = cast.spec.scaling
    if layout.split is not None or cast.stochastic or cast.spec.transform is not Transform.NONE:
        return None
    if not isinstance(scaling, Block) or scaling.shape[0] != 1 or not scaling.padding or not x.is_contiguous():
        return None
    axis, long = layout.order[-1], scaling.shape[1]
    outer, size, inner = math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :])
    if inner == 1 or (outer > 1 and size > long and size % long):
        return None
    spec = _shortened(cast.spec, min(long, size))
    held = torch.bfloat16 if narrow else torch.float32
    values = torch.empty_like(x, dtype=held) if slot is None else _scratch.like(x, slot, held)
    scales = torch.empty((-(-outer * size // min(long, size)), inner))
    amax = matrices.cast_blocks(
        cpu.Buffer(x.data_ptr(), KINDS[x.dtype], x.numel()),
        cpu.Buffer(values.data_ptr(), KINDS[held], x.numel()),
        scales.data_ptr(),
        (outer * size, inner),
        spec,
        upright=True,
        decoded=2,
    )
    return Found(values, amax)


@functools.lru_cache(maxsize=256)
def _shortened(spec: TensorSpec, long: int) -> TensorSpec:
    """The same with blocks of that length."""
    return replace(spec, scaling=replace(spec.scaling, shape=(1, long)))  # type: ignore[arg-type]


def matrix_on_cpu(matrix: Tensor, cast: Cast, delayed: float | Tensor, seed: int) -> tuple[Tensor, float]:
    """The values that an operand matrix is cast to, and its amax."""
    draws = seed if cast.stochastic else None
    return matrices.quantize_with_amax(
        matrix, cast.spec, scale=float(delayed) if cast.delayed else 1.0, seed=draws, offset=cast.number << 56
    )


def matrix_on_device(matrix: Tensor, cast: Cast, delayed: float | Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The same on another device than the CPU."""
    from octavo.kernels import cuda

    draws = seed if cast.stochastic else None
    codes: Any = cuda.encode_matrix(
        matrix, cast.spec, scale=delayed if cast.delayed else 1.0, seed=draws, offset=cast.number << 56
    )
    return cuda.decode_matrix(codes, cast.spec), codes.amax
