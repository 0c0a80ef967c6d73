"""The innermost loop of a matrix product: a tile of the result held in vector registers.

LLVM lays out registers well but does not find this loop by itself, so it is written in its terms.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.kernels.vectors import splat

__all__ = ["COLUMNS", "LANES", "ROWS", "VECTORS", "tile_of", "turn"]

_FEATURES = binding.get_host_cpu_features()
_WIDE = bool(_FEATURES.get("avx512f", False))
LANES = 16 if _WIDE else 8
"""float32 numbers in a vector of this processor, and at least in the code for it: narrower ones are split."""
VECTORS = 2
"""Vectors along a row of the tile."""
ROWS = 14 if _WIDE else 6
"""Rows of the tile, so that it, a row of B and a number of A fit the registers: 32 of them, or 16."""
COLUMNS = LANES * VECTORS

_I64, _I32 = ir.IntType(64), ir.IntType(32)


def tile_of(rows: int) -> Any:
    """A compiled `tile(a, a_m, a_k, b, b_k, c, c_m, k, alpha, add)` for that many rows of COLUMNS numbers.

    C[m, n] = alpha * sum over k of A[m, k] * B[k, n], plus C[m, n] where `add`; each sum in the order of k, every product and sum rounded
    once (fused).  a, b, c: addresses; a_m, a_k, b_k, c_m: the bytes from one m or k to the next; numbers along n lie side by side.
    """
    real, size = ir.FloatType(), 4
    vector = ir.VectorType(real, LANES)
    zero = ir.Constant(vector, [ir.Constant(real, 0.0)] * LANES)
    cells = [(m, j) for m in range(rows) for j in range(VECTORS)]

    @intrinsic
    def tile(typing_context, a, a_m, a_k, b, b_k, c, c_m, k, alpha, add):
        signature = types.void(*[types.int64] * 8, types.float32, types.boolean)

        def generate(context, builder, signature, arguments):
            a, a_m, a_k, b, b_k, c, c_m, k, alpha, add = arguments
            form = ir.FunctionType(vector, [vector] * 3)
            fma = cgutils.get_or_insert_function(builder.module, form, f"llvm.fma.v{LANES}f32")

            def place(row: Any, j: int) -> Any:
                moved = builder.add(row, ir.Constant(_I64, j * size * LANES))
                return builder.inttoptr(moved, vector.as_pointer())

            entry = builder.block
            starts = [builder.add(a, builder.mul(a_m, ir.Constant(_I64, m))) for m in range(rows)]
            loop, done = builder.append_basic_block("along_k"), builder.append_basic_block("summed")
            builder.cbranch(builder.icmp_signed(">", k, ir.Constant(_I64, 0)), loop, done)

            builder.position_at_end(loop)
            step, row, moved = (builder.phi(_I64) for _ in range(3))
            for number, start in ((step, ir.Constant(_I64, 0)), (row, b), (moved, ir.Constant(_I64, 0))):
                number.add_incoming(start, entry)
            sums = {cell: builder.phi(vector) for cell in cells}
            across = [builder.load(place(row, j), align=size) for j in range(VECTORS)]
            added = {}
            for m in range(rows):
                address = builder.inttoptr(builder.add(starts[m], moved), real.as_pointer())
                down = splat(builder, builder.load(address, align=size), vector)
                for j in range(VECTORS):
                    added[m, j] = builder.call(fma, [down, across[j], sums[m, j]])
            following = builder.add(step, ir.Constant(_I64, 1))
            step.add_incoming(following, loop)
            row.add_incoming(builder.add(row, b_k), loop)
            moved.add_incoming(builder.add(moved, a_k), loop)
            for cell in cells:
                sums[cell].add_incoming(zero, entry)
                sums[cell].add_incoming(added[cell], loop)
            builder.cbranch(builder.icmp_signed("<", following, k), loop, done)

            builder.position_at_end(done)
            found = {}
            for cell in cells:
                found[cell] = builder.phi(vector)
                found[cell].add_incoming(zero, entry)
                found[cell].add_incoming(added[cell], loop)
            factor = splat(builder, alpha, vector)
            rows_of_c = [builder.add(c, builder.mul(c_m, ir.Constant(_I64, m))) for m in range(rows)]
            with builder.if_else(add) as (onto, anew):
                with onto:
                    for m, j in cells:
                        target = place(rows_of_c[m], j)
                        product = builder.fmul(factor, found[m, j])
                        builder.store(builder.fadd(builder.load(target, align=size), product), target, align=size)
                with anew:
                    for m, j in cells:
                        product = builder.fmul(factor, found[m, j])
                        builder.store(product, place(rows_of_c[m], j), align=size)
            return context.get_dummy_value()

        return signature, generate

    return tile


@intrinsic
def turn(typing_context, source, pitch, rows, target, target_pitch):
    """target[i, j] = source[j, i] of LANES by LANES float32; pitches: bytes from row to row.

    Of the source's rows the first `rows` are there; the last of them stands for those that are not.
    """
    signature = types.void(*[types.int64] * 5)
    vector = ir.VectorType(ir.FloatType(), LANES)

    def generate(context, builder, signature, arguments):
        source, pitch, rows, target, target_pitch = arguments

        def at_row(base: Any, number: Any, step: Any) -> Any:
            return builder.inttoptr(builder.add(base, builder.mul(number, step)), vector.as_pointer())

        last = builder.sub(rows, ir.Constant(_I64, 1))
        held = []
        for j in range(LANES):
            number = ir.Constant(_I64, j)
            there = builder.select(builder.icmp_signed("<", number, last), number, last)
            held.append(builder.load(at_row(source, there, pitch), align=4))
        # Exchange the off-diagonal quarters of ever smaller squares.
        width = LANES // 2
        while width:
            for j in range(LANES):
                if not j & width:
                    one, other = held[j], held[j + width]
                    upper = [i if not i & width else LANES + i - width for i in range(LANES)]
                    lower = [i + width if not i & width else LANES + i for i in range(LANES)]
                    held[j] = _shuffled(builder, one, other, upper)
                    held[j + width] = _shuffled(builder, one, other, lower)
            width //= 2
        for j in range(LANES):
            builder.store(held[j], at_row(target, ir.Constant(_I64, j), target_pitch), align=4)
        return context.get_dummy_value()

    return signature, generate


def _shuffled(builder: Any, one: Any, other: Any, places: list[int]) -> Any:
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(_I32, LANES), places))
