"""The inner loops of casts in blocks: rows of a tile rounded by the factors of their blocks, or by those of their columns.

Numba needs each loop written out to make vectors of it.  Legend as in `loops.py`.
"""

from __future__ import annotations

import numpy as np

from octavo.kernels.element import (
    F32,
    I32,
    U64,
    _bits,
    _directed,
    _drawn,
    _finish,
    _is_plain,
    _nearest,
    _nearest_code,
    _nearest_plain,
    _real,
    _signed,
    compiled,
)
from octavo.kernels.loops import _half_bits
from octavo.kernels.memory import wide_vectors as _wide_vectors

__all__ = [
    "bfloat16_of",
    "round_blocks",
    "round_blocks_stochastic",
    "round_blocks_to_bfloat16",
    "round_blocks_to_codes",
    "round_directed",
    "round_nearest",
    "round_nearest_to_bfloat16",
    "round_nearest_to_codes",
    "round_stochastic",
]


@compiled
def round_nearest(x_f, factor, back, out, shift, e_min, limit, top, over, inf, zero_sign):
    """out = nearest-even(x * factor) * back, column by column."""
    _wide_vectors()
    if _is_plain(top, over, inf, zero_sign):
        for j in range(x_f.size):
            out[j] = _real(_nearest_plain(x_f[j], factor[j], shift, e_min, top)) * back[j]
        return
    for j in range(x_f.size):
        out[j] = _real(_nearest(x_f[j], factor[j], shift, e_min, limit, top, over, inf, zero_sign)) * back[j]


@compiled
def round_nearest_to_bfloat16(x_f, factor, back, out, shift, e_min, limit, top, over, inf, zero_sign):
    """The same to bfloat16, to nearest even."""
    _wide_vectors()
    if _is_plain(top, over, inf, zero_sign):
        for j in range(x_f.size):
            value = _real(_nearest_plain(x_f[j], factor[j], shift, e_min, top)) * back[j]
            out[j] = _half_bits(_bits(value))
        return
    for j in range(x_f.size):
        value = _real(_nearest(x_f[j], factor[j], shift, e_min, limit, top, over, inf, zero_sign)) * back[j]
        out[j] = _half_bits(_bits(value))


@compiled
def round_nearest_to_codes(x_f, factor, out, shift, e_min, top, m, nan_code, sign_mask):
    """out (uint8) = the codes of nearest-even(x * factor), column by column, where `_is_plain`."""
    _wide_vectors()
    drop, nan_code, sign_mask = I32(23 - m), I32(nan_code), I32(sign_mask)
    for j in range(x_f.size):
        out[j] = np.uint8(_nearest_code(x_f[j], factor[j], shift, e_min, top, drop, nan_code, sign_mask))


@compiled
def round_blocks(x_f, factor, back, out, wide, decoded, shift, e_min, limit, top, over, inf, zero_sign):
    """`round_nearest` of whole blocks whose width is a multiple of 16, with a block's factors in a register."""
    _wide_vectors()
    sixteenths = U64(wide // 16)
    if _is_plain(top, over, inf, zero_sign):
        for b in range(U64(x_f.size // wide)):
            f, g = factor[b], back[b] if decoded else F32(1)
            for k in range(b * sixteenths, b * sixteenths + sixteenths):
                for j in range(k * U64(16), k * U64(16) + U64(16)):
                    out[j] = _real(_nearest_plain(x_f[j], f, shift, e_min, top)) * g
        return
    for b in range(U64(x_f.size // wide)):
        f, g = factor[b], back[b] if decoded else F32(1)
        for k in range(b * sixteenths, b * sixteenths + sixteenths):
            for j in range(k * U64(16), k * U64(16) + U64(16)):
                out[j] = _real(_nearest(x_f[j], f, shift, e_min, limit, top, over, inf, zero_sign)) * g


@compiled
def round_blocks_to_bfloat16(x_f, factor, back, out, wide, decoded, shift, e_min, limit, top, over, inf, zero_sign):
    """The same to bfloat16, to nearest even."""
    _wide_vectors()
    sixteenths = U64(wide // 16)
    if _is_plain(top, over, inf, zero_sign):
        for b in range(U64(x_f.size // wide)):
            f, g = factor[b], back[b] if decoded else F32(1)
            for k in range(b * sixteenths, b * sixteenths + sixteenths):
                for j in range(k * U64(16), k * U64(16) + U64(16)):
                    value = _real(_nearest_plain(x_f[j], f, shift, e_min, top)) * g
                    out[j] = _half_bits(_bits(value))
        return
    for b in range(U64(x_f.size // wide)):
        f, g = factor[b], back[b] if decoded else F32(1)
        for k in range(b * sixteenths, b * sixteenths + sixteenths):
            for j in range(k * U64(16), k * U64(16) + U64(16)):
                value = _real(_nearest(x_f[j], f, shift, e_min, limit, top, over, inf, zero_sign)) * g
                out[j] = _half_bits(_bits(value))


@compiled
def round_blocks_to_codes(x_f, factor, out, wide, shift, e_min, top, m, nan_code, sign_mask):
    """`round_nearest_to_codes` of whole blocks whose width is a multiple of 16."""
    _wide_vectors()
    sixteenths = U64(wide // 16)
    drop, nan_code, sign_mask = I32(23 - m), I32(nan_code), I32(sign_mask)
    for b in range(U64(x_f.size // wide)):
        f = factor[b]
        for k in range(b * sixteenths, b * sixteenths + sixteenths):
            for j in range(k * U64(16), k * U64(16) + U64(16)):
                out[j] = np.uint8(_nearest_code(x_f[j], f, shift, e_min, top, drop, nan_code, sign_mask))


@compiled
def round_directed(x_f, factor, back, out, shift, e_min, limit, top, over, inf, zero_sign, half):
    """As `_directed_to_float32` of loops.py, column by column."""
    _wide_vectors()
    for j in range(x_f.size):
        out[j] = _real(_directed(x_f[j], factor[j], shift, e_min, limit, top, over, inf, zero_sign, half)) * back[j]


@compiled
def round_stochastic(x_f, factor, back, out, shift, e_min, limit, top, over, inf, zero_sign, draws):
    """As `_stochastic_to_float32` of loops.py, column by column."""
    _wide_vectors()
    if _is_plain(top, over, inf, zero_sign):
        for j in range(x_f.size):
            r, u, a = _drawn(x_f[j], factor[j], shift, e_min, _bits(top), draws[j])
            out[j] = _real(_signed(r, u, a)) * back[j]
        return
    for j in range(x_f.size):
        r, u, a = _drawn(x_f[j], factor[j], shift, e_min, limit, draws[j])
        out[j] = _real(_finish(r, u, a, top, over, inf, zero_sign)) * back[j]


@compiled
def round_blocks_stochastic(
    x_f, factor, back, out, wide, decoded, shift, e_min, limit, top, over, inf, zero_sign, draws
):
    """`round_blocks`, stochastically."""
    _wide_vectors()
    sixteenths = U64(wide // 16)
    if _is_plain(top, over, inf, zero_sign):
        for b in range(U64(x_f.size // wide)):
            f, g = factor[b], back[b] if decoded else F32(1)
            for k in range(b * sixteenths, b * sixteenths + sixteenths):
                for j in range(k * U64(16), k * U64(16) + U64(16)):
                    r, u, a = _drawn(x_f[j], f, shift, e_min, _bits(top), draws[j])
                    out[j] = _real(_signed(r, u, a)) * g
        return
    for b in range(U64(x_f.size // wide)):
        f, g = factor[b], back[b] if decoded else F32(1)
        for k in range(b * sixteenths, b * sixteenths + sixteenths):
            for j in range(k * U64(16), k * U64(16) + U64(16)):
                r, u, a = _drawn(x_f[j], f, shift, e_min, limit, draws[j])
                out[j] = _real(_finish(r, u, a, top, over, inf, zero_sign)) * g


@compiled
def bfloat16_of(x_i, out):
    """float32 bits to bfloat16, to nearest even; every NaN here is the one that rounding, or a scale, made."""
    _wide_vectors()
    for j in range(out.size):
        out[j] = _half_bits(x_i[j])
