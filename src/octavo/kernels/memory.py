"""Pointers and atomic counters for the compiled kernels."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["at", "atomic_add", "atomic_max"]


def _atomic(operation: str) -> Any:
    """A compiled `f(address, value)`: one atomic read-modify-write of an int64, returning what was there."""

    @intrinsic
    def update(typing_context, address, value):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
            return builder.atomic_rmw(operation, pointer, arguments[1], "monotonic")

        return types.int64(types.int64, types.int64), generate

    return update


atomic_add, atomic_max = _atomic("add"), _atomic("max")


@intrinsic
def at(typing_context, address):
    """An int64 as the pointer it is, for `carray`."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate
