"""The largest magnitudes of blocks that lie side by side, sixteen blocks at a time."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from octavo.kernels.element import I32, MAGNITUDE, compiled
from octavo.kernels.memory import address_of, wide_vectors
from octavo.kernels.vectors import loop, number, pointer, same

__all__ = ["peaks_of_rows"]

ABREAST = 16
"""Blocks at a time, and lanes of a vector."""
_WORDS = ir.VectorType(ir.IntType(32), ABREAST)


def _larger(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.icmp_signed(">", one, other), one, other)


def _gathered(builder: Any, held: list[Any]) -> Any:
    """Lane i of the result is the largest lane of held[i]: halves of vectors, then quarters, are put side by side and compared."""
    width = ABREAST // 2
    while width:
        ours = [lane if not lane & width else ABREAST + lane - width for lane in range(ABREAST)]
        theirs = [lane + width if not lane & width else ABREAST + lane for lane in range(ABREAST)]
        merged = []
        for one, other in zip(held[:width], held[width:], strict=True):
            halves = (builder.shuffle_vector(one, other, ir.Constant(_WORDS, lanes)) for lanes in (ours, theirs))
            merged.append(_larger(builder, *halves))
        held, width = merged, width // 2
    return held[0]


def _peaks_abreast(vectors: int) -> Any:
    """A compiled `f(source, out, groups)`: out[b] = the largest magnitude of block b, as bits, for ABREAST * groups blocks.

    vectors: a block's float32 numbers, in sixteens; source, out: addresses, out of int32.
    """

    @intrinsic
    def peaks(typing_context, source, out, groups):
        def generate(context, builder, signature, arguments):
            source, out, groups = arguments
            magnitude, width = same(_WORDS, 0x7FFFFFFF), 4 * ABREAST

            def group(step: Any, carried: list[Any]) -> list[Any]:
                source, out = carried
                held = []
                for block in range(ABREAST):
                    places = (width * (vectors * block + j) for j in range(vectors))
                    found = [builder.load(pointer(builder, source, place, _WORDS), align=4) for place in places]
                    found = [builder.and_(values, magnitude) for values in found]
                    held.append(functools.reduce(functools.partial(_larger, builder), found))
                builder.store(_gathered(builder, held), pointer(builder, out, 0, _WORDS), align=4)
                return [builder.add(source, number(width * vectors * ABREAST)), builder.add(out, number(width))]

            loop(builder, groups, [source, out], group)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return peaks


_of_16, _of_32, _of_64, _of_128 = (_peaks_abreast(vectors) for vectors in (1, 2, 4, 8))


@compiled
def peaks_of_rows(x_i, blocks, wide, parts):
    """blocks[b] = the largest magnitude among the `wide` numbers of block b, a multiple of 16.

    x_i: float32 bits, all blocks in a row; parts: memory to work in, as long as x_i has sixteens.
    """
    wide_vectors()
    unit = 128 if wide % 128 == 0 else 64 if wide % 64 == 0 else 32 if wide % 32 == 0 else 16
    found = blocks if unit == wide else parts[: x_i.size // unit]
    source, out, groups = address_of(x_i), address_of(found), found.size // ABREAST
    if unit == 128:
        _of_128(source, out, groups)
    elif unit == 64:
        _of_64(source, out, groups)
    elif unit == 32:
        _of_32(source, out, groups)
    else:
        _of_16(source, out, groups)
    for b in range(ABREAST * groups, found.size):
        peak = I32(0)
        for j in range(unit * b, unit * b + unit):
            peak = max(peak, I32(x_i[j] & MAGNITUDE))
        found[b] = peak
    if unit == wide:
        return
    each = wide // unit
    for b in range(blocks.size):
        peak = I32(0)
        for j in range(each * b, each * b + each):
            peak = max(peak, found[j])
        blocks[b] = peak
