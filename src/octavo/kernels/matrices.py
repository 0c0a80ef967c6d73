"""The CPU backend for operand matrices: every scaling, on contiguous memory, equal to `octavo.reference` bit for bit."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Any

import numpy as np

from octavo import reference
from octavo.formats import E4M3FN, Format
from octavo.kernels import blocks, cpu, threads
from octavo.kernels.arrays import library_of
from octavo.kernels.block_scales import Rule
from octavo.kernels.blocks import BlockSlot
from octavo.kernels.cpu import Buffer, Kind
from octavo.kernels.scales import current_scale
from octavo.kernels.turn import turn
from octavo.reference import Codes, block_shape, overflow_codes, reject_nan
from octavo.rounding import Rounding, require_seed
from octavo.scaling import (
    Block,
    Current,
    Delayed,
    Row,
    TwoLevel,
    Unscaled,
    scales_in_codes,
    two_level_scale,
    zero_code_limit,
)
from octavo.table import TensorSpec, Transform

__all__ = ["cast_blocks", "decode_matrix", "encode_matrix", "hadamard", "quantize_matrix", "quantize_with_amax"]

_TILE, _TALL_TILE, _NARROWEST = 4096, 32768, 256
_LAYOUT = struct.Struct(f"<{BlockSlot.TOP}q{BlockSlot.END - BlockSlot.TOP}d")
_HEAD = struct.Struct("<12q")
_SEED = struct.Struct("<Qq")
_WHOLE = struct.Struct("<3d")
_Arguments: Any = ctypes.c_char * _LAYOUT.size


def _rule(spec: TensorSpec) -> tuple[Rule, float, bool]:
    """(rule, epsilon, skip_nan) of a scaling in blocks or rows."""
    match spec.scaling:
        case Block(scale=scale, epsilon=epsilon, skip_nan=skip_nan):
            return Rule[scale.name], epsilon, skip_nan
        case Row(power_of_two=power_of_two, epsilon=epsilon):
            return Rule.POWER_OF_TWO if power_of_two else Rule.FLOAT32, epsilon, False
        case TwoLevel():
            return Rule.TWO_LEVEL, 0.0, False
        case Unscaled() | Current() | Delayed():
            raise AssertionError(f"{spec} has one scale")


@functools.lru_cache(maxsize=256)
def _constants(spec: TensorSpec) -> bytes:
    """All arguments of the kernel that the spec decides, the others 0."""
    format: Format = spec.format
    rule, epsilon, skip_nan = _rule(spec)
    finite, infinite = overflow_codes(format, spec.overflow)
    over = format.max_code if spec.rounding is Rounding.TOWARD_ZERO else finite
    return _LAYOUT.pack(
        *(0,) * BlockSlot.RULE,
        rule,
        skip_nan,
        0,
        cpu.MODES[spec.rounding],
        0,
        0,
        format.mantissa_bits,
        format.bias,
        format.emax,
        -1 if format.inf_code is None else format.inf_code,
        -1 if format.nan_code is None else format.nan_code,
        format.sign_mask,
        format.has_negative_zero,
        format.max,
        float(format.values[over]),
        float(format.values[infinite]),
        format.max,
        epsilon,
        zero_code_limit(format.max),
        1.0,
        1.0,
        1.0,
    )


def cast_blocks(
    source: Buffer,
    target: Buffer,
    scales: int,
    shape: tuple[int, int],
    spec: TensorSpec,
    *,
    upright: bool = False,
    decoded: int = 0,
    seed: int | None = None,
    offset: int = 0,
) -> float:
    """Cast a matrix whose blocks have scales of their own, write those at `scales`, and return the matrix's amax.

    source, target: [rows, columns] as `shape` says; scales: the address of float32 or uint8 [rows of blocks, blocks in a row], in the
    layout of the source; upright: the GEMM contracts the rows, so blocks stand on end; decoded: what a target that is not codes
    holds (`BlockSlot.DECODED`).  Random draws go by the place in the source.
    """
    rows, columns = shape
    across, along = block_shape(spec, *(shape[::-1] if upright else shape))
    high, wide = (along, across) if upright else (across, along)
    require_seed(spec.rounding, seed)
    arguments = _Arguments.from_buffer_copy(_constants(spec))
    if isinstance(spec.scaling, TwoLevel):
        total = cpu.amax(source)
        whole = float(two_level_scale(np.array([total], np.float32), spec.format.max, E4M3FN.max)[0])
        reciprocal = np.float32(1) / np.float32(E4M3FN.max * spec.format.max)
        _WHOLE.pack_into(arguments, 8 * BlockSlot.WHOLE, whole, total, float(reciprocal))
    if high == 1 and columns % wide == 0:
        rows, columns = 1, rows * columns  # one long row
    tile = min(
        columns, wide * max(1, (_TILE if high == 1 else max(_NARROWEST, min(_TILE, _TALL_TILE // high))) // wide)
    )
    _HEAD.pack_into(
        arguments,
        0,
        source.address,
        target.address,
        scales,
        rows,
        columns,
        high,
        wide,
        tile,
        source.kind,
        target.kind,
        0,
        0,
    )
    struct.pack_into("<q", arguments, 8 * BlockSlot.DECODED, decoded)
    _SEED.pack_into(arguments, 8 * BlockSlot.SEED, seed or 0, offset)
    many = cpu.worthwhile_threads(source.size, threads.count())
    threads.run(blocks.cast_blocks.ctypes, ctypes.addressof(arguments), many)
    peak = float(struct.unpack_from("<f", arguments, 8 * BlockSlot.AMAX)[0])
    if spec.format.nan_code is None and not peak < float("inf") and _loses(spec, peak):
        raise reject_nan(spec.format)
    return peak


def _loses(spec: TensorSpec, peak: float) -> bool:
    """Whether an amax of NaN or Inf means that a NaN met a format without one."""
    e8m0 = isinstance(spec.scaling, Block) and spec.scaling.scale.is_e8m0
    return peak != peak or e8m0


def hadamard(x: Any) -> Any:
    """`octavo.reference.hadamard` of a NumPy array or CPU tensor [rows, columns]: float32."""
    library = library_of(x)
    source = library.to_numpy(library.astype_float32(library.contiguous(x)))
    out = np.zeros((x.shape[0], -(-x.shape[1] // 16) * 16), np.float32)
    turn(source, out)
    return library.from_numpy(out)


def _one_scale(spec: TensorSpec) -> bool:
    return isinstance(spec.scaling, (Unscaled, Current, Delayed))


def _by_reference(x: Any, spec: TensorSpec) -> bool:
    """Whether the cast is rare enough to be left to the definition: float64, and skipping NaN in a format that has none."""
    skips = isinstance(spec.scaling, Block) and spec.scaling.skip_nan
    return str(x.dtype).endswith("float64") or (skips and spec.format.nan_code is None)


def encode_matrix(x: Any, spec: TensorSpec, *, scale: float = 1.0, seed: int | None = None, offset: int = 0) -> Codes:
    """`octavo.reference.encode_matrix` of a NumPy array or CPU tensor [rows, columns], with arrays of the same library."""
    return _encode(x, spec, scale, seed, offset, values=False)[0]


def quantize_matrix(x: Any, spec: TensorSpec, *, scale: float = 1.0, seed: int | None = None, offset: int = 0) -> Any:
    """The values of `encode_matrix`'s codes times their scales, float32 [rows, columns], in one pass; as `decode_matrix` of it."""
    return quantize_with_amax(x, spec, scale=scale, seed=seed, offset=offset)[0]


def quantize_with_amax(
    x: Any, spec: TensorSpec, *, scale: float = 1.0, seed: int | None = None, offset: int = 0
) -> tuple[Any, float]:
    """`quantize_matrix`, and the amax of x, as its transform left it."""
    codes, values = _encode(x, spec, scale, seed, offset, values=True)
    return values, float(codes.amax)


def _encode(
    x: Any, spec: TensorSpec, scale: float, seed: int | None, offset: int, *, values: bool
) -> tuple[Codes, Any]:
    """The codes and no values, or the values and no codes."""
    library = library_of(x)
    if _by_reference(x, spec):
        known = x if str(x.dtype).endswith("float64") else library.astype_float32(x)
        cast = reference.encode_matrix(
            library.to_numpy(library.contiguous(known)), spec, scale=scale, seed=seed, offset=offset
        )
        decoded = library.from_numpy(reference.decode_matrix(cast, spec)) if values else None
        return Codes(library.from_numpy(cast.codes), library.from_numpy(cast.scales), cast.amax), decoded
    if spec.transform is Transform.HADAMARD:
        x = hadamard(x)
    x = library.contiguous(x)
    source = library.buffer(x)
    if source.kind is Kind.CODES:
        raise ValueError("a cast takes float32, float64, float16 or bfloat16; got uint8: convert it to float32 first")
    out = library.empty_like(x, Kind.FLOAT32 if values else Kind.CODES)
    target = library.buffer(out)
    rows, columns = x.shape
    across, along = block_shape(spec, rows, columns)
    grid = -(-rows // across), -(-columns // along)
    if _one_scale(spec):
        scales, amax = _one(source, target, spec, grid, scale, seed, offset)
    else:
        scales = np.empty(grid, np.uint8 if scales_in_codes(spec.scaling) else np.float32)
        amax = 0.0
        if source.size:
            decoded = 2 if values else 0
            amax = cast_blocks(
                source, target, scales.ctypes.data, (rows, columns), spec, decoded=decoded, seed=seed, offset=offset
            )
    cast = Codes(None if values else out, library.from_numpy(scales), np.float32(amax))  # type: ignore[arg-type]
    return cast, out if values else None


def _one(
    source: Buffer, target: Buffer, spec: TensorSpec, grid: tuple[int, int], scale: float, seed: int | None, offset: int
) -> tuple[Any, float]:
    """The cast of a tensor with one scale: what decoding multiplies with, [1, 1] or of the empty grid, and the amax."""
    if isinstance(spec.scaling, Current):
        scale = current_scale(cpu.amax(source), spec.format.max, spec.scaling.epsilon, spec.scaling.power_of_two)
    elif isinstance(spec.scaling, Unscaled):
        scale = 1.0
    back = np.float32(1) / np.float32(scale)
    amax = cpu.cast(
        source,
        target,
        spec.format,
        scale=scale,
        rounding=spec.rounding,
        overflow=spec.overflow,
        seed=seed,
        offset=offset,
    )
    if target.kind is not Kind.CODES:
        values = np.ctypeslib.as_array((ctypes.c_float * target.size).from_address(target.address))
        with np.errstate(all="ignore"):
            np.multiply(values, back, out=values)
    return np.full(grid, back, np.float32), amax


def decode_matrix(cast: Codes, spec: TensorSpec) -> Any:
    """`octavo.reference.decode_matrix`, of arrays of NumPy or of CPU tensors."""
    library = library_of(cast.codes)
    codes, scales = library.to_numpy(cast.codes), library.to_numpy(cast.scales)
    return library.from_numpy(reference.decode_matrix(Codes(codes, scales, np.float32(cast.amax)), spec))
