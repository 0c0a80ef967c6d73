"""The GPU backend's casts of operand matrices: `encode_matrix`, `decode_matrix` and `hadamard` of `octavo.reference` on CUDA tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from octavo.formats import E4M3FN
from octavo.kernels import cuda_kernels
from octavo.kernels.cuda_bits import Scales, constants, rule_constants
from octavo.kernels.cuda_casts import (
    LAUNCH,
    amax,
    amax_of,
    cast_with_amax,
    code_dtype,
    device_of,
    fast_mode,
    in_float64,
    kernel_view,
    new_state,
    scale_tensor,
    seed_words,
    source_of,
)
from octavo.reference import Codes, block_shape, reject_nan
from octavo.rounding import Overflow, Rounding
from octavo.scaling import (
    Block,
    Current,
    Delayed,
    Row,
    TwoLevel,
    Unscaled,
    amax_scale,
    two_level_scale,
)
from octavo.table import TensorSpec, Transform

__all__ = ["decode_matrix", "encode_matrix", "hadamard", "quantize_matrix"]

WHOLE = 16384
"""Up to so many elements a block is read once and kept in registers."""
CHUNK = 4096
"""Elements to a program of small blocks, and to each of its steps where a block is larger than `WHOLE`."""
ROWS, COLUMNS = 16, 128
"""Of a tile that is decoded."""
GROUPS = 128
"""Groups of 16 to a program of the Hadamard transform."""
_LARGEST = 1 << 30


def hadamard(x: Tensor) -> Tensor:
    """`octavo.reference.hadamard`: float32 [rows, columns filled up to a multiple of 16]; x: [rows, columns], not float64."""
    return _hadamard(_matrix(x)).float()


def _matrix(x: Tensor) -> Tensor:
    x = source_of(x)
    if x.ndim != 2 or x.dtype is torch.float64:
        raise ValueError(
            f"an operand matrix is two-dimensional, in float32, bfloat16 or float16; got {x.dtype} of shape "
            f"{tuple(x.shape)}: reshape it, or convert it to float32"
        )
    return x


def _hadamard(x: Tensor) -> Tensor:
    """The same in bfloat16, which holds it exactly."""
    rows, columns = x.shape
    per_row = triton.cdiv(columns, 16)
    out = torch.empty((rows, 16 * per_row), dtype=torch.bfloat16, device=x.device)
    source, kind = kernel_view(x)
    if x.numel():
        with device_of(x):
            cuda_kernels.hadamard_kernel[(triton.cdiv(rows * per_row, GROUPS),)](
                source, kernel_view(out)[0], columns, rows * per_row, per_row, KIND=kind, GROUPS=GROUPS, **LAUNCH
            )
    return out


def encode_matrix(
    x: Tensor, spec: TensorSpec, *, scale: float | Tensor = 1.0, seed: int | None = None, offset: int = 0
) -> Codes:
    """`octavo.reference.encode_matrix`: codes, scales and the amax as tensors, the amax without dimensions.

    x: [rows, columns], float32, bfloat16 or float16, its contracted axis last; scale: of delayed scaling, a tensor of one element too.
    """
    x = _matrix(x)
    if in_float64(x, spec.format):
        raise ValueError(f"{spec.format.name} holds scales, not matrices; give the spec a signed format")
    if spec.transform is Transform.HADAMARD:
        x = _hadamard(x)
    words = seed_words(spec.rounding, seed, offset, x.numel())
    match spec.scaling:
        case Block() | Row() | TwoLevel():
            cast, state = _encode_blocks(x, spec, words)
            rounded = state[1]
        case Unscaled() | Current() | Delayed():
            cast, state = _encode_whole(x, spec, scale, words)
            rounded = state[0]
    if not spec.format.has_nan and int(rounded) > 0x7F800000:
        raise reject_nan(spec.format)
    return cast


def _grid(x: Tensor, spec: TensorSpec) -> tuple[int, int, tuple[int, int]]:
    """Rows and columns of a block, and how many blocks there are down and along."""
    across, along = block_shape(spec, *x.shape)
    return across, along, (triton.cdiv(x.shape[0], across), triton.cdiv(x.shape[1], along))


def _encode_whole(x: Tensor, spec: TensorSpec, given: float | Tensor, words: dict[str, int]) -> tuple[Codes, Tensor]:
    """One scale for the matrix: where it follows from the matrix itself, x is read twice."""
    scale = torch.ones(1, device=x.device)
    match spec.scaling:
        case Current() as scaling:
            scale = amax_scale(amax(x).reshape(1), spec.format.max, scaling)
        case Delayed():
            scale = scale_tensor(given, x)
    codes, state = cast_with_amax(x, spec.format, scale, spec.rounding, spec.overflow, words)
    scales = (torch.ones_like(scale) / scale).expand(_grid(x, spec)[2])
    return Codes(*_as_any(codes, scales, amax_of(state))), state


def _as_any(*tensors: Any) -> Any:
    """`Codes` is written in NumPy's types."""
    return tensors


def _held(spec: TensorSpec) -> Scales:
    """What the scales are held in."""
    match spec.scaling:
        case Block() as block if block.scale.is_e8m0:
            return Scales.E8M0
        case TwoLevel():
            return Scales.TWO_LEVEL
        case Unscaled() | Current() | Delayed() | Row() | Block():
            return Scales.FLOAT32


def _tile(across: int, along: int, fours: bool) -> tuple[int, ...]:
    """How a program goes through blocks of that size (TILE of the kernel); fours: whether columns and offset are multiples of 4."""
    wide = triton.next_power_of_2(along)
    size = wide * triton.next_power_of_2(across)
    if size > _LARGEST:
        raise ValueError(
            f"the GPU kernels take blocks of at most 2**30 elements, sides rounded up to powers of two; got {across} by {along}: "
            "choose smaller ones"
        )
    chunk = size if size <= WHOLE else CHUNK
    return max(CHUNK // chunk, 1), chunk, size // chunk, wide, int(fours and wide >= 4)


def _encode_blocks(x: Tensor, spec: TensorSpec, words: dict[str, int]) -> tuple[Codes, Tensor]:
    """A scale for each block, in one kernel."""
    (rows, columns), (across, along, blocks) = x.shape, _grid(x, spec)
    codes, state = torch.empty_like(x, dtype=code_dtype(spec.format)), new_state(x)
    scales = torch.empty(blocks, dtype=torch.float32 if _held(spec) is Scales.FLOAT32 else torch.uint8, device=x.device)
    source, kind = kernel_view(x)
    if x.numel():
        whole = scales
        if isinstance(spec.scaling, TwoLevel):
            whole = two_level_scale(amax(x).reshape(1), spec.format.max, E4M3FN.max)
        fours = columns % 4 == 0 and words["offset"] % 4 == 0 and (along >= columns or along % 4 == 0)
        tile = _tile(min(across, rows), min(along, columns), fours)
        with device_of(x):
            cuda_kernels.blocks_kernel[(triton.cdiv(math.prod(blocks), tile[0]),)](
                source,
                codes,
                scales,
                state,
                whole,
                rows,
                columns,
                across,
                along,
                **words,
                FORMAT=constants(spec.format, spec.overflow, spec.rounding),
                RULE=rule_constants(spec),
                MODE=fast_mode(spec.format, spec.rounding, spec.overflow, x.device),
                KIND=kind,
                TILE=tile,
                num_warps=8 if tile[1] > CHUNK else 4,
                **LAUNCH,
            )
    return Codes(*_as_any(codes, scales, amax_of(state))), state


def decode_matrix(cast: Codes, spec: TensorSpec) -> Tensor:
    """`octavo.reference.decode_matrix`: the values of `encode_matrix`'s codes times their scales, float32 [rows, columns]."""
    codes, scales, peak = _as_any(*cast)
    across, along, _ = _grid(codes, spec)
    held = _held(spec)
    maximum = spec.format.max if held is Scales.TWO_LEVEL else 1.0
    rows, columns = codes.shape
    out = torch.empty_like(codes, dtype=torch.float32)
    if codes.numel():
        with device_of(codes):
            cuda_kernels.decode_matrix_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS),)](
                codes,
                scales.contiguous(),
                peak.reshape(1) if held is Scales.TWO_LEVEL else codes,
                out,
                rows,
                columns,
                across,
                along,
                float(np.float32(1) / np.float32(E4M3FN.max * maximum)),
                FORMAT=constants(spec.format, Overflow.SATURATE, Rounding.NEAREST_EVEN),
                SCALES=int(held),
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                **LAUNCH,
            )
    return out


def quantize_matrix(
    x: Tensor, spec: TensorSpec, *, scale: float | Tensor = 1.0, seed: int | None = None, offset: int = 0
) -> Tensor:
    """`decode_matrix(encode_matrix(x, ...))`: float32."""
    return decode_matrix(encode_matrix(x, spec, scale=scale, seed=seed, offset=offset), spec)
