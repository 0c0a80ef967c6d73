"""The CPU kernel that turns codes back into GEMM operands: values times their blocks' scales, in bfloat16 or float32."""

from __future__ import annotations

import ctypes
import enum
import functools
import struct
from typing import Any

import numpy as np
from numba import carray

from octavo.formats import Format
from octavo.kernels import cpu, threads
from octavo.kernels.block_scales import per_column
from octavo.kernels.cpu import Buffer, Kind
from octavo.kernels.element import F32, I32, INF, NAN, U32, _bits, _real, _real64, compiled, kernel
from octavo.kernels.loops import BFLOAT16, _at, _atomic_add, _half_bits, _wide_vectors

__all__ = ["unpack"]


class Slot(enum.IntEnum):
    """Where each argument lies, 8 bytes each; LIFT is a float64."""

    CODES = 0
    TARGET = 1
    TARGET_KIND = 2
    ROWS = 3
    COLUMNS = 4
    HIGH = 5
    WIDE = 6
    TILE = 7
    BACK = 8
    """float32, one a block, in the layout of the codes."""
    NEXT = 9
    MAGNITUDE = 10
    SIGN = 11
    INF_CODE = 12
    NAN_CODE = 13
    UP = 14
    """How far a magnitude is shifted to lie where float32 has its exponent and mantissa; times LIFT it is the value."""
    LIFT = 15
    END = 16


# Numba takes module-level integers as constants, but not the members of an enum.
CODES, TARGET, TARGET_KIND, ROWS, COLUMNS, HIGH, WIDE, TILE, BACK = (int(slot) for slot in list(Slot)[:9])
NEXT, MAGNITUDE, SIGN_MASK, INF_CODE, NAN_CODE, UP, LIFT, END = (int(slot) for slot in list(Slot)[9:])


@compiled
def _value(code, back, magnitude, sign, inf_code, nan_code, up, lift):
    """The bits of a code's value times back, float32."""
    c = I32(code)
    a = I32(c & magnitude)
    value = _real(I32(a << up)) * lift
    value = _real(INF) if a == inf_code else value
    nan = c == nan_code or (sign != nan_code and (a == nan_code or (inf_code >= 0 and a > inf_code)))
    value = (_real(NAN) if nan else value) * back
    return U32(_bits(value)) | (U32(0x80000000) if c & sign else U32(0))


@compiled
def _to_bfloat16(codes, back, out, magnitude, sign, inf_code, nan_code, up, lift):
    _wide_vectors()
    for j in range(codes.size):
        u = _value(codes[j], back[j], magnitude, sign, inf_code, nan_code, up, lift)
        out[j] = _half_bits(u)


@compiled
def _to_float32(codes, back, out, magnitude, sign, inf_code, nan_code, up, lift):
    _wide_vectors()
    for j in range(codes.size):
        out[j] = _value(codes[j], back[j], magnitude, sign, inf_code, nan_code, up, lift)


@kernel
def _unpack(arguments):
    _wide_vectors()
    p = carray(_at(arguments), (END,), np.int64)
    rows, columns, high, wide, tile = p[ROWS], p[COLUMNS], p[HIGH], p[WIDE], p[TILE]
    magnitude, sign, inf_code, nan_code = I32(p[MAGNITUDE]), I32(p[SIGN_MASK]), I32(p[INF_CODE]), I32(p[NAN_CODE])
    up, lift = I32(p[UP]), F32(_real64(p[LIFT]))
    tiles, block_columns = (columns + tile - 1) // tile, (columns + wide - 1) // wide
    back, one, other = np.empty(tile, np.float32), np.empty(tile + 16, np.float32), np.empty(tile + 16, np.float32)
    count = ((rows + high - 1) // high) * tiles
    while True:
        item = _atomic_add(arguments + 8 * NEXT, 1)
        if item >= count:
            break
        block_row, first = item // tiles, (item % tiles) * tile
        size = min(tile, columns - first)
        n_blocks = (size + wide - 1) // wide
        scales = carray(_at(p[BACK] + 4 * (block_row * block_columns + first // wide)), (n_blocks,), np.float32)
        g = back[:size]
        per_column(scales, g, wide, one, other)
        for r in range(block_row * high, min((block_row + 1) * high, rows)):
            start = r * columns + first
            codes = carray(_at(p[CODES] + start), (size,), np.uint8)
            if p[TARGET_KIND] == BFLOAT16:
                out = carray(_at(p[TARGET] + 2 * start), (size,), np.uint16)
                _to_bfloat16(codes, g, out, magnitude, sign, inf_code, nan_code, up, lift)
            else:
                wide_out = carray(_at(p[TARGET] + 4 * start), (size,), np.uint32)
                _to_float32(codes, g, wide_out, magnitude, sign, inf_code, nan_code, up, lift)


_LAYOUT = struct.Struct(f"<{Slot.LIFT}qd")
_Arguments: Any = ctypes.c_char * _LAYOUT.size


@functools.lru_cache(maxsize=64)
def _constants(format: Format) -> tuple[float, ...]:
    return (
        (1 << format.magnitude_bits) - 1,
        format.sign_mask,
        -1 if format.inf_code is None else format.inf_code,
        -1 if format.nan_code is None else format.nan_code,
        23 - format.mantissa_bits,
        2.0 ** (127 - format.bias),
    )


def unpack(
    codes: int,
    target: Buffer,
    back: np.ndarray[Any, Any],
    shape: tuple[int, int],
    block: tuple[int, int],
    format: Format,
) -> None:
    """Write the values of the codes, uint8 [rows, columns] at that address, times their blocks' factors to target.

    target: bfloat16, rounded to nearest even, or float32; back: float32 [blocks down, blocks across] of the codes' layout; block:
    (rows, columns) of one.
    """
    rows, columns = shape
    high, wide = block
    if high == 1 and columns % wide == 0:
        rows, columns = 1, rows * columns
    if back.size == 1:  # one scale: any cut of the memory will do
        rows, columns, high, wide = 1, rows * columns, 1, rows * columns
    tile = min(columns, 4096 if back.size == 1 else wide * max(1, 4096 // wide))
    kind = int(target.kind)
    arguments = _Arguments()
    if back.size == 1 and columns > tile:  # each tile is a block of its own, with the same factor
        wide = tile
        back = np.full(-(-columns // tile), back.reshape(-1)[0], np.float32)
    words = codes, target.address, kind, rows, columns, high, wide, tile, back.ctypes.data, 0
    _LAYOUT.pack_into(arguments, 0, *words, *_constants(format))
    assert target.kind in (Kind.BFLOAT16, Kind.FLOAT32)
    many = cpu.worthwhile_threads(target.size, threads.count())
    threads.run(_unpack.ctypes, ctypes.addressof(arguments), many)
