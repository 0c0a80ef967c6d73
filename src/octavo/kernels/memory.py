"""Pointers, atomic counters, prefetching and streaming for the compiled kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.kernels.vectors import I32

__all__ = [
    "address_of",
    "ask",
    "at",
    "atomic_add",
    "atomic_max",
    "fence",
    "fma",
    "keep",
    "line_in",
    "ordered_add",
    "ordered_exchange",
    "stream",
    "to_read",
    "to_write",
    "wide_vectors",
]


def _atomic(operation: str, ordering: str = "monotonic") -> Any:
    """A compiled `f(address, value)`: one atomic read-modify-write of an int64, returning what was there.

    ordering: "seq_cst" lets no other memory access move across it, for threads that hand work to each other.
    """

    @intrinsic
    def update(typing_context, address, value):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
            return builder.atomic_rmw(operation, pointer, arguments[1], ordering)

        return types.int64(types.int64, types.int64), generate

    return update


atomic_add, atomic_max = _atomic("add"), _atomic("max")
ordered_add, ordered_exchange = _atomic("add", "seq_cst"), _atomic("xchg", "seq_cst")


@intrinsic
def at(typing_context, address):
    """An int64 as the pointer it is, for `carray`."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@njit(cache=True)
def address_of(array):
    """Where an array begins, as an int64: of the unsigned number that it is, Numba would make float64 beside another.

    The array lives until it is last named, whatever is done with its address: see `keep`.
    """
    return np.int64(array.ctypes.data)


@njit(cache=True)
def line_in(array):
    """Where the first cache line begins that lies in an array, which has 64 bytes to spare: vectors there cross no line.  See `keep`."""
    address = address_of(array)
    return address + (-address & 63)


@njit(cache=True)
def keep(array):
    """Name an array whose address was in use until here."""


@intrinsic
def wide_vectors(typing_context):
    """Have LLVM use the widest vectors there are in the calling function; by itself it stops at 256 bits where AVX-512 has 512."""

    def generate(context, builder, signature, arguments):
        # llvmlite's own list of attributes has no such key, but LLVM takes any string.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def fma(typing_context, a, b, c):
    """a * b + c of float32, rounded once."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


def _prefetch_line(write: bool) -> Any:
    """A compiled `f(address)`: ask for the cache line there, to read it or to overwrite it.  Never faults."""

    @intrinsic
    def ask(typing_context, address):
        def generate(context, builder, signature, arguments):
            byte, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, int32, int32, int32])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            flags = [ir.Constant(int32, flag) for flag in (int(write), 3, 1)]  # kept in all caches; data, not code
            builder.call(function, [builder.inttoptr(arguments[0], byte), *flags])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return ask


to_read, to_write = _prefetch_line(False), _prefetch_line(True)


@njit(cache=True)
def ask(address, size):
    """Ask for so many bytes from an address on, to read them."""
    for byte in range(0, size, 64):
        to_read(address + byte)


@intrinsic
def fence(typing_context):
    """Nothing that was written before, streamed or not, is seen by another thread after what is written next."""

    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _stream_line(typing_context, source, target):
    """64 bytes from one address to another, itself a multiple of 64, past the caches: what lies there is not read first."""
    line = ir.VectorType(I32, 16)

    def generate(context, builder, signature, arguments):
        source, target = (builder.inttoptr(address, line.as_pointer()) for address in arguments)
        stored = builder.store(builder.load(source, align=1), target, align=64)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@njit(cache=True)
def stream(source, target, size):
    """Copy `size` bytes to a target that starts a cache line, past the caches; `fence` before another thread may look."""
    lines = size // 64
    for line in range(lines):
        _stream_line(source + 64 * line, target + 64 * line)
    rest = size - 64 * lines
    carray(at(target + 64 * lines), (rest,), np.uint8)[:] = carray(at(source + 64 * lines), (rest,), np.uint8)
