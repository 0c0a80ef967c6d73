"""The engine's GPU kernels over numbers one by one, as Triton compiles them: arithmetic, copies, ReLU, and what updates weights.

Each product and each sum is rounded by itself, or fused, where the CPU's kernels do so, and in their order: the bits are the same.

Legend: size elements; n1 to n3: the inner three of four dimensions; a0 to a3: strides of `a` in elements.  Capital letters are constants.
"""

from __future__ import annotations

import enum

import triton
import triton.language as tl

__all__ = ["BLOCK", "Operation", "Way"]

BLOCK = 1024
"""Elements to a program."""


class Operation(enum.IntEnum):
    """What two numbers, or one, become."""

    ADD = 0
    SUBTRACT = 1
    MULTIPLY = 2
    DIVIDE = 3
    EXP = 4
    LOG = 5


class Way(enum.IntEnum):
    """How a tensor's elements are found from the result's."""

    FLAT = 0
    """One after the other."""
    ONE = 1
    """The same for all."""
    STRIDED = 2


# A kernel takes module-level integers only as tl.constexpr.
_ADD, _SUBTRACT, _MULTIPLY, _DIVIDE, _EXP, _LOG = (tl.constexpr(int(one)) for one in Operation)
_FLAT, _ONE, _STRIDED = (tl.constexpr(int(way)) for way in Way)


@triton.jit
def _elements(size, WIDTH: tl.constexpr):
    """This program's elements, int64, and whether they are there."""
    i = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    return i, i < size


@triton.jit
def _place(i, n1, n2, n3, s0, s1, s2, s3):
    """Where element i lies, by strides."""
    rest = i // n3
    outer = rest // n2
    return (outer // n1) * s0 + (outer % n1) * s1 + (rest % n2) * s2 + (i % n3) * s3


@triton.jit
def _operand(x, i, inside, n1, n2, n3, s0, s1, s2, s3, WAY: tl.constexpr):
    """The numbers that meet elements i."""
    if WAY == _FLAT:
        value = tl.load(x + i, mask=inside)
    elif WAY == _ONE:
        value = tl.load(x + i * 0, mask=inside)
    else:
        value = tl.load(x + _place(i, n1, n2, n3, s0, s1, s2, s3), mask=inside)
    return value


@triton.jit
def quotient(a, b):
    """a / b, rounded to nearest."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def arithmetic_kernel(
    a,
    b,
    out,
    size,
    n1,
    n2,
    n3,
    a0,
    a1,
    a2,
    a3,
    b0,
    b1,
    b2,
    b3,
    OPERATION: tl.constexpr,
    A_WAY: tl.constexpr,
    B_WAY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out, contiguous, from a and b, broadcast by strides of 0."""
    i, inside = _elements(size, WIDTH)
    left = _operand(a, i, inside, n1, n2, n3, a0, a1, a2, a3, A_WAY)
    right = _operand(b, i, inside, n1, n2, n3, b0, b1, b2, b3, B_WAY)
    if OPERATION == _ADD:
        found = left + right
    elif OPERATION == _SUBTRACT:
        found = left - right
    elif OPERATION == _MULTIPLY:
        found = left * right
    else:
        found = quotient(left, right)
    tl.store(out + i, found, mask=inside)


@triton.jit
def unary_kernel(x, out, size, OPERATION: tl.constexpr, WIDTH: tl.constexpr):
    """Through float64, so that float32 results are rounded once."""
    i, inside = _elements(size, WIDTH)
    value = tl.load(x + i, mask=inside).to(tl.float64)
    found = tl.exp(value) if OPERATION == _EXP else tl.log(value)
    tl.store(out + i, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def copy_kernel(
    source, target, size, n1, n2, n3, a0, a1, a2, a3, b0, b1, b2, b3, TARGET_WAY: tl.constexpr, WIDTH: tl.constexpr
):
    """target, of strides b, = source, of strides a."""
    i, inside = _elements(size, WIDTH)
    value = tl.load(source + _place(i, n1, n2, n3, a0, a1, a2, a3), mask=inside)
    place = i if TARGET_WAY == _FLAT else _place(i, n1, n2, n3, b0, b1, b2, b3)
    tl.store(target + place, value, mask=inside)


@triton.jit(do_not_specialize=["bits"])
def fill_kernel(out, size, bits, WIDTH: tl.constexpr):
    """out, seen as integers, = bits."""
    i, inside = _elements(size, WIDTH)
    tl.store(out + i, tl.zeros([WIDTH], out.dtype.element_ty) + bits.to(out.dtype.element_ty), mask=inside)


@triton.jit
def relu_kernel(x, out, size, WIDTH: tl.constexpr):
    """NaN stays, -0 too."""
    i, inside = _elements(size, WIDTH)
    value = tl.load(x + i, mask=inside)
    tl.store(out + i, tl.where(value < 0, 0, value), mask=inside)


@triton.jit
def relu_gradient_kernel(gradient, x, out, size, WIDTH: tl.constexpr):
    i, inside = _elements(size, WIDTH)
    value = tl.load(gradient + i, mask=inside)
    tl.store(out + i, tl.where(tl.load(x + i, mask=inside) > 0, value, 0), mask=inside)


@triton.jit
def sgd_kernel(
    weight,
    gradient,
    velocity,
    rate_at,
    size,
    rate,
    momentum,
    decay,
    BY_ADDRESS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The rate is a number or, BY_ADDRESS, lies at rate_at."""
    i, inside = _elements(size, WIDTH)
    w = tl.load(weight + i, mask=inside)
    by = tl.load(rate_at) if BY_ADDRESS else rate
    step = tl.fma(tl.zeros_like(w) + decay, w, tl.load(gradient + i, mask=inside))
    if MOMENTUM:
        v = momentum * tl.load(velocity + i, mask=inside) + step
        tl.store(velocity + i, v, mask=inside)
        step = tl.fma(tl.zeros_like(w) + momentum, v, step) if NESTEROV else v
    tl.store(weight + i, tl.fma(tl.zeros_like(w) - by, step, w), mask=inside)


@triton.jit
def advance_kernel(steps):
    """Count one more, in place."""
    tl.store(steps, tl.load(steps) + 1)


@triton.jit
def _power(BASE: tl.constexpr, exponent):
    """BASE ** exponent in float64; exponent: int32, not negative."""
    found, base = tl.full([], 1.0, tl.float64), tl.full([], BASE, tl.float64)
    for _ in tl.static_range(31):
        found = tl.where((exponent & 1) == 1, found * base, found)
        base = base * base
        exponent = exponent >> 1
    return found


@triton.jit
def adam_kernel(
    weight,
    gradient,
    first,
    second,
    steps,
    rate_at,
    size,
    rate,
    beta1,
    rest1,
    beta2,
    rest2,
    epsilon,
    decay,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BY_ADDRESS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """steps: this one included; beta1, beta2, and 1 less each, in float32, BETA1 and BETA2 in float64."""
    i, inside = _elements(size, WIDTH)
    t = tl.load(steps).to(tl.int32)
    by = tl.load(rate_at) if BY_ADDRESS else tl.full([], rate, tl.float32)
    step = (by.to(tl.float64) / (1.0 - _power(BETA1, t))).to(tl.float32)
    root = tl.sqrt(1.0 - _power(BETA2, t)).to(tl.float32)
    w = tl.load(weight + i, mask=inside)
    grad = tl.load(gradient + i, mask=inside) + decay * w
    m = beta1 * tl.load(first + i, mask=inside) + rest1 * grad
    v = beta2 * tl.load(second + i, mask=inside) + rest2 * grad * grad
    tl.store(first + i, m, mask=inside)
    tl.store(second + i, v, mask=inside)
    below = tl.div_rn(tl.sqrt_rn(v), root) + epsilon
    tl.store(weight + i, w - tl.div_rn(step * m, below), mask=inside)
