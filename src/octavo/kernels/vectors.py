"""Terms of LLVM that the hand-written inner loops share: numbers, pointers, splats and loops."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

__all__ = ["I32", "I64", "loop", "number", "pointer", "same", "splat"]

I64, I32 = ir.IntType(64), ir.IntType(32)


def number(value: int) -> Any:
    """An int64."""
    return ir.Constant(I64, value)


def same(kind: Any, value: float) -> Any:
    """A constant in each lane of a vector of that kind."""
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)


def splat(builder: Any, value: Any, kind: Any) -> Any:
    """A value in each lane of a vector of that kind."""
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, nothing, same(ir.VectorType(I32, kind.count), 0))


def pointer(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """Where something of that kind lies, `offset` bytes past an address."""
    return builder.inttoptr(builder.add(address, number(offset)) if offset else address, kind.as_pointer())


def loop(builder: Any, count: Any, carried: list[Any], body: Any) -> list[Any]:
    """`carried = body(step, carried)` for step in 0 .. count - 1; what is carried at the end."""
    entry = builder.block
    head, end = builder.append_basic_block("step"), builder.append_basic_block("stepped")
    builder.cbranch(builder.icmp_signed(">", count, number(0)), head, end)
    builder.position_at_end(head)
    step = builder.phi(I64)
    now = [builder.phi(value.type) for value in carried]
    after = body(step, now)
    following, last = builder.add(step, number(1)), builder.block
    step.add_incoming(number(0), entry)
    step.add_incoming(following, last)
    for phi, first, value in zip(now, carried, after, strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(value, last)
    builder.cbranch(builder.icmp_signed("<", following, count), head, end)
    builder.position_at_end(end)
    found = []
    for first, value in zip(carried, after, strict=True):
        phi = builder.phi(first.type)
        phi.add_incoming(first, entry)
        phi.add_incoming(value, last)
        found.append(phi)
    return found
