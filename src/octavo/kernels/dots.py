"""Inner loops of convolutions over bfloat16 numbers with float32 sums, a tile of the result held in vector registers.

Each step is AVX-512's `vdpbf16ps`: 16 sums take two products each, exact as products of 8-bit values are; what falls below float32's
normal numbers becomes zero.  LLVM lays out registers well but does not find these loops by itself, so they are written in its terms.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.kernels.vectors import I32, I64, loop, number, pointer, same, splat

__all__ = [
    "LANES",
    "has_dots",
    "move_row",
    "round_row",
    "rows_tile",
    "shifts_tile",
    "spread_pairs",
    "spread_row",
    "spread_wide_pairs",
    "spread_wide_row",
]

LANES = 16
"""float32 numbers in a vector."""
_I16 = ir.IntType(16)
_REAL = ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(I32, LANES)


class _BFloat(ir.HalfType):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


@functools.cache
def has_dots() -> bool:
    """Whether this processor has the instruction."""
    return bool(binding.get_host_cpu_features().get("avx512bf16", False))


def _dot(builder: Any, sums: Any, one: Any, other: Any) -> Any:
    """sums + one . other, pair by pair; one, other: 16 words of two bfloat16 numbers each."""
    form = ir.FunctionType(_REAL, [_REAL, _PAIRS, _PAIRS])
    function = cgutils.get_or_insert_function(builder.module, form, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(function, [sums, builder.bitcast(one, _PAIRS), builder.bitcast(other, _PAIRS)])


def rows_tile(rows: int, vectors: int) -> Any:
    """A compiled `tile(x, plane, planes, offsets, taps, w, out, pitch)`: `rows` channels of 16 * `vectors` neighbouring results.

    out[r, p] = sum over planes c and taps t of w[c, t, r] . x[c * plane + offsets[t] + 4 p].  x, offsets, w, out: addresses; plane, pitch
    and the offsets, int64, in bytes; x and w hold words of two bfloat16 numbers, out float32.
    """

    @intrinsic
    def tile(typing_context, x, plane, planes, offsets, taps, w, out, pitch):
        def generate(context, builder, signature, arguments):
            x, plane, planes, offsets, taps, w, out, pitch = arguments
            cells = [(r, j) for r in range(rows) for j in range(vectors)]

            def along_taps(step: Any, carried: list[Any]) -> list[Any]:
                here, w, *sums = carried
                offset = builder.load(
                    builder.inttoptr(builder.add(offsets, builder.shl(step, number(3))), I64.as_pointer())
                )
                start = builder.add(here, offset)
                across = [builder.load(pointer(builder, start, 64 * j, _WORDS), align=2) for j in range(vectors)]
                added = []
                for r in range(rows):
                    word = splat(builder, builder.load(pointer(builder, w, 4 * r, I32), align=4), _WORDS)
                    added += [_dot(builder, sums[r * vectors + j], across[j], word) for j in range(vectors)]
                return [here, builder.add(w, number(4 * rows)), *added]

            def along_planes(step: Any, carried: list[Any]) -> list[Any]:
                here, w, *sums = loop(builder, taps, carried, along_taps)
                return [builder.add(here, plane), w, *sums]

            start = [x, w, *[same(_REAL, 0)] * len(cells)]
            _, _, *sums = loop(builder, planes, start, along_planes)
            for (r, j), found in zip(cells, sums, strict=True):
                row = builder.add(out, builder.mul(pitch, number(r)))
                builder.store(found, pointer(builder, row, 64 * j, _REAL), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return tile


def shifts_tile(rows: int, columns: int) -> Any:
    """A compiled `tile(g, g_row, g_sample, x, offsets, x_sample, samples, steps, out, pitch)`: rows by columns results.

    out[r, j] += sum over samples n and 32 * steps numbers p of g[n, r, p] * x[n, offsets[j] + 2 p].  g, x, offsets, out: addresses;
    g_row, g_sample, x_sample, pitch and the offsets, int64, in bytes; g and x hold bfloat16 numbers, out float32.
    """

    @intrinsic
    def tile(typing_context, g, g_row, g_sample, x, offsets, x_sample, samples, steps, out, pitch):
        def generate(context, builder, signature, arguments):
            g, g_row, g_sample, x, offsets, x_sample, samples, steps, out, pitch = arguments
            shifts = [builder.load(pointer(builder, offsets, 8 * j, I64)) for j in range(columns)]
            downs = [builder.mul(g_row, number(r)) for r in range(rows)]

            def along(step: Any, carried: list[Any]) -> list[Any]:
                g, x, *sums = carried
                down = [
                    builder.load(builder.inttoptr(builder.add(g, moved), _WORDS.as_pointer()), align=2)
                    for moved in downs
                ]
                added = list(sums)
                for j in range(columns):
                    across = builder.load(builder.inttoptr(builder.add(x, shifts[j]), _WORDS.as_pointer()), align=2)
                    for r in range(rows):
                        added[r * columns + j] = _dot(builder, sums[r * columns + j], down[r], across)
                return [builder.add(g, number(64)), builder.add(x, number(64)), *added]

            def over_samples(step: Any, carried: list[Any]) -> list[Any]:
                g, x, *sums = carried
                _, _, *added = loop(builder, steps, [g, x, *sums], along)
                return [builder.add(g, g_sample), builder.add(x, x_sample), *added]

            _, _, *sums = loop(builder, samples, [g, x, *[same(_REAL, 0)] * (rows * columns)], over_samples)
            form = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _REAL])
            reduce = cgutils.get_or_insert_function(builder.module, form, "llvm.vector.reduce.fadd.v16f32")
            for place, found in enumerate(sums):
                r, j = divmod(place, columns)
                row = builder.add(out, builder.mul(pitch, number(r)))
                target = pointer(builder, row, 4 * j, ir.FloatType())
                total = builder.call(reduce, [ir.Constant(ir.FloatType(), 0.0), found], fastmath=("reassoc",))
                builder.store(builder.fadd(builder.load(target, align=4), total), target, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return tile


def _mask(builder: Any, left: Any, lanes: int) -> Any:
    """Which of so many lanes are among the first `left`."""
    kind = ir.VectorType(I32, lanes)
    places = ir.Constant(kind, list(range(lanes)))
    return builder.icmp_signed("<", places, splat(builder, builder.trunc(left, I32), kind))


def _masked_load(builder: Any, address: Any, kind: Any, mask: Any, name: str, align: int) -> Any:
    form = ir.FunctionType(kind, [kind.as_pointer(), I32, mask.type, kind])
    function = cgutils.get_or_insert_function(builder.module, form, f"llvm.masked.load.{name}.p0")
    where = builder.inttoptr(address, kind.as_pointer())
    return builder.call(function, [where, ir.Constant(I32, align), mask, same(kind, 0)])


def _numbers(builder: Any, base: Any, step: Any, count: Any, lanes: int, wide: bool) -> Any:
    """The step-th `lanes` of so many bfloat16 numbers, as words, or of float32 that bfloat16 holds; zero past the end."""
    kind = ir.VectorType(I32 if wide else _I16, lanes)
    size = 4 if wide else 2
    left = builder.sub(count, builder.mul(step, number(lanes)))
    address = builder.add(base, builder.mul(step, number(size * lanes)))
    form = f"v{lanes}i{8 * size}"
    found = _masked_load(builder, address, kind, _mask(builder, left, lanes), form, size)
    words = ir.VectorType(I32, lanes)
    return builder.lshr(found, same(words, 16)) if wide else builder.zext(found, words)


def _spread_pairs(wide: bool) -> Any:
    """A compiled `f(low, high, both, out, count)`: words of the numbers low[i] and high[i] for i < count, then zeros up to a multiple
    of 16.

    low, high, out: addresses; both: 1, or 0 for zero in the place of high's; wide: of float32 that bfloat16 holds, and not of bfloat16.
    """

    @intrinsic
    def spread(typing_context, low, high, both, out, count):
        def generate(context, builder, signature, arguments):
            low, high, both, out, count = arguments
            kept = splat(builder, builder.trunc(builder.neg(both), I32), _WORDS)

            def body(step: Any, carried: list[Any]) -> list[Any]:
                one, other = (_numbers(builder, base, step, count, LANES, wide) for base in (low, high))
                other = builder.and_(builder.shl(other, same(_WORDS, 16)), kept)
                word = builder.or_(one, other)
                target = builder.add(out, builder.mul(step, number(4 * LANES)))
                builder.store(word, builder.inttoptr(target, _WORDS.as_pointer()), align=4)
                return []

            loop(builder, builder.ashr(builder.add(count, number(LANES - 1)), number(4)), [], body)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return spread


def _spread_row(wide: bool) -> Any:
    """A compiled `f(source, out, count)`: bfloat16 numbers for i < count, then zeros up to a multiple of 32; the rest as above."""
    lanes = LANES if wide else 2 * LANES

    @intrinsic
    def spread(typing_context, source, out, count):
        def generate(context, builder, signature, arguments):
            source, out, count = arguments
            kind = ir.VectorType(_I16, lanes)

            def body(step: Any, carried: list[Any]) -> list[Any]:
                values = builder.trunc(_numbers(builder, source, step, count, lanes, wide), kind)
                target = builder.add(out, builder.mul(step, number(2 * lanes)))
                builder.store(values, builder.inttoptr(target, kind.as_pointer()), align=2)
                return []

            loop(builder, builder.sdiv(builder.add(count, number(lanes - 1)), number(lanes)), [], body)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return spread


spread_pairs, spread_wide_pairs = _spread_pairs(False), _spread_pairs(True)
spread_row, spread_wide_row = _spread_row(False), _spread_row(True)


def _rounded(builder: Any, values: Any, words: list[Any]) -> tuple[Any, Any]:
    """Values to nearest even as `element._nearest` has them, and their magnitudes; words: as of `round_row`, in each lane."""
    shift, least, limit, top, over, infinite, zero_sign = words
    top, over, infinite = (builder.bitcast(word, _REAL) for word in (top, over, infinite))

    inf = same(_WORDS, 0x7F800000)
    bits = builder.bitcast(values, _WORDS)
    a = builder.and_(bits, same(_WORDS, 0x7FFFFFFF))
    c = builder.select(builder.icmp_signed("<", a, limit), a, limit)
    e = builder.and_(c, inf)
    e = builder.add(builder.select(builder.icmp_signed(">", e, least), e, least), shift)
    magic = builder.bitcast(e, _REAL)
    r = builder.fsub(builder.fadd(builder.bitcast(c, _REAL), magic), magic)
    r = builder.select(builder.fcmp_ordered(">", r, top), over, r)
    r = builder.select(builder.icmp_signed("==", a, inf), infinite, r)
    r = builder.select(builder.icmp_signed(">", a, inf), builder.bitcast(same(_WORDS, 0x7FC00000), _REAL), r)
    sign = builder.and_(bits, same(_WORDS, -0x80000000))
    zero = builder.fcmp_ordered("==", r, same(_REAL, 0))
    sign = builder.select(zero, builder.and_(sign, zero_sign), sign)
    return builder.bitcast(builder.or_(builder.bitcast(r, _WORDS), sign), _REAL), a


def _move_row(rounds: bool) -> Any:
    """A compiled `f(source, out, count, factor, bias, words, peaks)`: out[i] = source[i] * factor + bias for i < count, nothing beyond.

    source, out: addresses of float32.  rounds: to nearest even, as the int32 at address words say (shift, e_min, limit, top, over, inf,
    zero_sign of `octavo.kernels.element`); the int32[16] at peaks become the largest magnitudes before that, as bits.
    """

    @intrinsic
    def move(typing_context, source, out, count, factor, bias, words, peaks):
        def generate(context, builder, signature, arguments):
            source, out, count, factor, bias, words, peaks = arguments
            factors, biases = splat(builder, factor, _REAL), splat(builder, bias, _REAL)
            modes, carried = [], []
            if rounds:
                found = [builder.load(pointer(builder, words, 4 * i, I32), align=4) for i in range(7)]
                modes = [splat(builder, word, _WORDS) for word in found]
                carried = [builder.load(builder.inttoptr(peaks, _WORDS.as_pointer()), align=4)]

            def body(step: Any, carried: list[Any]) -> list[Any]:
                moved = builder.mul(step, number(4 * LANES))
                mask = _mask(builder, builder.sub(count, builder.mul(step, number(LANES))), LANES)
                values = builder.load(builder.inttoptr(builder.add(source, moved), _REAL.as_pointer()), align=4)
                values = builder.fadd(builder.fmul(values, factors), biases)
                after = []
                if rounds:
                    values, magnitudes = _rounded(builder, values, modes)
                    magnitudes = builder.select(mask, magnitudes, same(_WORDS, 0))
                    larger = builder.icmp_signed(">", magnitudes, carried[0])
                    after = [builder.select(larger, magnitudes, carried[0])]
                form = ir.FunctionType(ir.VoidType(), [_REAL, _REAL.as_pointer(), I32, mask.type])
                function = cgutils.get_or_insert_function(builder.module, form, "llvm.masked.store.v16f32.p0")
                target = builder.inttoptr(builder.add(out, moved), _REAL.as_pointer())
                builder.call(function, [values, target, ir.Constant(I32, 4), mask])
                return after

            steps = builder.ashr(builder.add(count, number(LANES - 1)), number(4))
            for peak in loop(builder, steps, carried, body):
                builder.store(peak, builder.inttoptr(peaks, _WORDS.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3, types.float32, types.float32, types.int64, types.int64), generate

    return move


move_row, round_row = _move_row(False), _move_row(True)
