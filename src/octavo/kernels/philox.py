"""Random words by counter: Philox4x32-10, several counters to a vector (Salmon et al., Parallel Random Numbers, SC 2011)."""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.kernels.element import U64, compiled
from octavo.kernels.memory import wide_vectors
from octavo.kernels.vectors import I32, I64, loop, number, pointer, same, splat

__all__ = ["SLACK", "draw", "fill_random", "room"]

LANES = 8
"""Counters in a vector, 64 bits each."""
ABREAST = 6 if binding.get_host_cpu_features().get("avx512f", False) else 1
"""Vectors at work at a time, as a round waits for the products of the last: what the registers hold."""
SLACK = 4 * (LANES - 1)
"""Words that `fill_random` may write past the last block it was asked for."""
ROUNDS = 10
FACTORS, STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
"""What each round multiplies with, and what it adds to the keys."""
WORD = 0xFFFFFFFF
_LONGS, _WORDS = ir.VectorType(I64, LANES), ir.VectorType(I32, 2 * LANES)


def _product(builder: Any, words: Any, factor: int) -> Any:
    """Words times a factor, 64 bits.  The lower halves alone are read; the upper ones may hold anything, so nothing masks them after."""
    return builder.mul(builder.and_(words, same(_LONGS, WORD)), same(_LONGS, factor))


def _upper(builder: Any, longs: Any) -> Any:
    return builder.lshr(longs, same(_LONGS, 32))


def _mixed(builder: Any, *longs: Any) -> Any:
    first, *rest = longs
    for other in rest:
        first = builder.xor(first, other)
    return first


def _last_round(builder: Any, product: Any, word: Any, key: Any) -> Any:
    """The last round's two words of one product, packed: its upper half mixed with word and key below, its lower half above."""
    form = ir.FunctionType(_LONGS, [_LONGS] * 3)
    turn = cgutils.get_or_insert_function(builder.module, form, f"llvm.fshl.v{LANES}i64")
    turned = builder.call(turn, [product, product, same(_LONGS, 32)])
    mixed = builder.bitcast(_mixed(builder, turned, word, key), _WORDS)
    lanes = [lane + 2 * LANES * (lane % 2) for lane in range(2 * LANES)]
    packed = builder.shuffle_vector(mixed, builder.bitcast(turned, _WORDS), ir.Constant(_WORDS, lanes))
    return builder.bitcast(packed, _LONGS)


def _block(builder: Any, counters: list[Any], above: Any, keys: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Philox of vectors of counters, whose upper words are `above`, round by round: of each the words (0, 1) and (2, 3), packed."""
    states = [(counter, above, same(_LONGS, 0), same(_LONGS, 0)) for counter in counters]
    for k0, k1 in keys[:-1]:
        for place, (c0, c1, c2, c3) in enumerate(states):
            p0, p1 = _product(builder, c0, FACTORS[0]), _product(builder, c2, FACTORS[1])
            one = _mixed(builder, _upper(builder, p1), c1, k0)
            states[place] = one, p1, _mixed(builder, _upper(builder, p0), c3, k1), p0
    k0, k1 = keys[-1]
    packed = []
    for c0, c1, c2, c3 in states:
        p0, p1 = _product(builder, c0, FACTORS[0]), _product(builder, c2, FACTORS[1])
        packed.append((_last_round(builder, p1, c1, k0), _last_round(builder, p0, c3, k1)))
    return packed


@intrinsic
def _fill(typing_context, out, first, steps, rest, seed):
    """The words of `steps` times ABREAST * LANES counters from `first` on, then of `rest` times LANES, to the address out.

    The counters' upper 32 bits are taken to be those of the first: what depends on them alone is then worked out once.
    """
    signature = types.void(*[types.int64] * 4, types.uint64)

    def generate(context, builder, signature, arguments):
        out, first, steps, rest, seed = arguments
        pair, keys = [builder.and_(seed, number(WORD)), builder.lshr(seed, number(32))], []
        for _ in range(ROUNDS):
            keys.append(tuple(splat(builder, key, _LONGS) for key in pair))
            pair = [builder.and_(builder.add(key, number(s)), number(WORD)) for key, s in zip(pair, STEPS, strict=True)]

        def of(abreast: int) -> Any:
            def body(step: Any, carried: list[Any]) -> list[Any]:
                out, counters = carried
                starts = [builder.add(counters, same(_LONGS, LANES * a)) for a in range(abreast)]
                for place, (low, high) in enumerate(_block(builder, starts, above, keys)):
                    for half in range(2):
                        lanes = [lane for i in range(LANES // 2) for lane in (i, LANES + i)]
                        lanes = ir.Constant(ir.VectorType(I32, LANES), [lane + LANES // 2 * half for lane in lanes])
                        target = pointer(builder, out, 16 * LANES * place + 8 * LANES * half, _LONGS)
                        builder.store(builder.shuffle_vector(low, high, lanes), target, align=8)
                moved = builder.add(out, number(16 * LANES * abreast))
                return [moved, builder.add(counters, same(_LONGS, LANES * abreast))]

            return body

        above = splat(builder, builder.lshr(first, number(32)), _LONGS)
        counters = builder.add(splat(builder, first, _LONGS), ir.Constant(_LONGS, list(range(LANES))))
        carried = loop(builder, steps, [out, counters], of(ABREAST))
        loop(builder, rest, carried, of(1))
        return context.get_dummy_value()

    return signature, generate


@compiled
def fill_random(address, blocks, first, seed):
    """Philox4x32-10 at an address: four uint32 words for each of `blocks` counters from `first` on.  Up to SLACK words more are written."""
    wide_vectors()
    vectors = (blocks + LANES - 1) // LANES
    if (first + blocks) >> 32 != first >> 32:  # once in 2**34 words: one by one, each with the upper word that it has
        for b in range(blocks):
            _fill(address + 16 * b, first + b, 0, 1, U64(seed))
        return
    _fill(address, first, vectors // ABREAST, vectors % ABREAST, U64(seed))


@compiled
def room(size):
    """How many words of memory `draw` needs for so many elements: three more before them, three after, to fill blocks, and SLACK."""
    return size + 6 + SLACK


@compiled
def draw(address, size, place, seed):
    """Write the words of the `size` elements from `place` on, in blocks of four, at an address; where the first of them lies."""
    lane = place & 3
    fill_random(address, (size + lane + 3) // 4, place >> 2, seed)
    return address + 4 * lane
