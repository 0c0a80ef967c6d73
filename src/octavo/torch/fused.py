"""A layer's pass in one native call, for recipes with one scale a tensor: its casts and products as a chain of kernels.

Calling kernels one by one costs a small layer more in Python than they take; a chain is laid out once for each shape.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from octavo.kernels import chain, cpu, loops, products, threads
from octavo.kernels.chain import Between, Head, Step
from octavo.kernels.loops import Slot
from octavo.kernels.products import Product
from octavo.scaling import Current
from octavo.torch import gemm

__all__ = ["Operand", "Pass", "Shape", "ready"]

_MOST_STEPS = 10
_START = 8 * (len(Head) + Step.WORDS * _MOST_STEPS)
_WAYS = struct.Struct("<2q")
_PRODUCT_WAYS = struct.Struct("<4qdq")
_DOUBLE, _FLOAT, _WORD = struct.Struct("<d"), struct.Struct("<f"), struct.Struct("<q")


class Operand(NamedTuple):
    """A tensor to cast: by what, from what, how many elements."""

    caster: cpu.Caster
    current: Current | None
    kind: cpu.Kind
    size: int


class Shape(NamedTuple):
    """A product C[m, n] = A @ B: whether each operand is transposed, and which operands of the pass (by number) were cast in it."""

    m: int
    n: int
    k: int
    a_transposed: bool
    b_transposed: bool
    cast: tuple[int, ...]


def ready(size: int, *dtypes: torch.dtype) -> bool:
    """Whether products of that size (0 is none) and tensors of these dtypes can be chained on this machine."""
    return size > 0 and torch.float64 not in dtypes and gemm.units() is not None and threads.gomp() is not None


class Pass:
    """A chain for given shapes.  Call it with the addresses; each call works on a copy of the memory laid out here."""

    def __init__(self, operands: Sequence[Operand], shapes: Sequence[Shape], many: int) -> None:
        self._memory = bytearray(_START)
        self._steps: list[tuple[int, int, int]] = []
        self._casts: list[int] = []
        self._scratch = 0
        self._amaxes: list[int | None] = []
        for operand in operands:
            self._add_operand(operand, many)
        self._products = [self._add_product(shape, many) for shape in shapes]
        parallel = ctypes.cast(threads.gomp().GOMP_parallel, ctypes.c_void_p).value
        struct.pack_into("<2q", self._memory, 0, parallel, len(self._steps))
        for number, step in enumerate(self._steps):
            struct.pack_into("<3q", self._memory, 8 * (len(Head) + Step.WORDS * number), *step)
        self._copy: Any = ctypes.c_char * len(self._memory)
        self._run = chain.chain.ctypes

    def _add(self, kernel: Any, arguments: bytes, many: int) -> int:
        """Append a step and its arguments; returns where they lie."""
        place = len(self._memory)
        self._memory += arguments
        self._steps.append((kernel.address, place, many))
        return place

    def _add_operand(self, operand: Operand, many: int) -> None:
        many = cpu.worthwhile_threads(operand.size, many)
        amax = None
        if operand.current is not None:
            amax = self._add(loops.amax, cpu.amax_arguments(operand.kind, operand.size), many)
            place = len(self._memory)
            following = place + 8 * len(Between)
            scaling = operand.current
            words = amax - place, following - place, operand.caster.format.max, scaling.epsilon, scaling.power_of_two
            self._add(chain.between, struct.pack("<2q2dq", *words), 1)
        cast = operand.caster.arguments(operand.kind, operand.size, cpu.Kind.BFLOAT16)
        self._casts.append(self._add(loops.cast32, cast, many))
        self._amaxes.append(amax)

    def _add_product(self, shape: Shape, many: int) -> int:
        place = len(self._memory)
        strides = shape.m if shape.a_transposed else shape.k, shape.k if shape.b_transposed else shape.n
        first, second = [self._casts[number] - place for number in shape.cast] + [0] * (2 - len(shape.cast))
        sizes, units = (shape.m, shape.n, shape.k), gemm.units()
        assert units is not None
        self._memory += gemm.arguments(sizes, (shape.a_transposed, shape.b_transposed), strides, casts=(first, second))
        many = min(many, gemm.threads_for(*sizes))
        self._steps += [(kernel.address, place, many) for kernel in units.kernels]
        if len(units.kernels) > 1:
            needed = products.scratch_bytes(shape.m, shape.k, shape.a_transposed, many)
            self._scratch = max(self._scratch, needed)
        return place

    def __call__(
        self, ways: Sequence[tuple[int, int, float]], places: Sequence[tuple[int, int, int, int, float]]
    ) -> list[tuple[float, float]]:
        """Run it, and return (the factor that undoes the scale, amax) of each operand.

        ways: of each operand its address, where its bfloat16 values go, and its scale unless that is current; places: of each product the
        addresses of A, B and C, that of the bias or 0, and a factor beside the scales of what was cast in this pass.
        """
        memory = self._copy.from_buffer_copy(self._memory)
        for place, amax, (source, target, scale) in zip(self._casts, self._amaxes, ways, strict=True):
            _WAYS.pack_into(memory, place, source, target)
            if amax is None:
                _DOUBLE.pack_into(memory, place + 8 * Slot.SCALE, scale)
            else:
                _WORD.pack_into(memory, amax, source)
        scratch = threads.scratch(self._scratch) if self._scratch else 0
        for place, product in zip(self._products, places, strict=True):
            _PRODUCT_WAYS.pack_into(memory, place + 8 * Product.A, *product, scratch)
        self._run(ctypes.addressof(memory))
        return [
            (
                gemm.inverse(_DOUBLE.unpack_from(memory, place + 8 * Slot.SCALE)[0]),
                _FLOAT.unpack_from(memory, place + 8 * Slot.AMAX)[0],
            )
            for place in self._casts
        ]
