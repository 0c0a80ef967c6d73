"""IEEE arithmetic in integers, on bit patterns: what XLA's own floats do not keep.

XLA flushes subnormal operands and results to zero, divides by a scalar through its reciprocal, and fuses a product with the sum
after it.  Here a float32 is a uint32 and a float64 a uint64; each operation is rounded once, to nearest even.  NaN results are
positive and quiet, whatever the operands' were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from octavo.rounding import Rounding

__all__ = [
    "FLOAT32",
    "FLOAT64",
    "Floats",
    "Layout",
    "add",
    "convert",
    "divide",
    "multiply",
    "round_to",
    "unpack",
    "wide_product",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the fields of an IEEE format lie in a word of `size` bits."""

    size: int
    mantissa_bits: int

    @property
    def bias(self) -> int:
        """What is added to an exponent; the largest one."""
        return (1 << (self.size - self.mantissa_bits - 2)) - 1

    @property
    def unsigned(self) -> Any:
        """The dtype of a word."""
        return np.uint32 if self.size == 32 else np.uint64

    @property
    def floating(self) -> Any:
        """The dtype that the words are the bits of."""
        return np.float32 if self.size == 32 else np.float64

    @property
    def sign(self) -> Any:
        """The sign bit."""
        return self.unsigned(1 << (self.size - 1))

    @property
    def infinity(self) -> Any:
        """+Inf; magnitudes above it are NaN."""
        return self.unsigned((2 * self.bias + 1) << self.mantissa_bits)

    @property
    def nan(self) -> Any:
        """The NaN that results are."""
        return self.infinity | self.unsigned(1 << (self.mantissa_bits - 1))

    def bits(self, x: Any) -> Array:
        """The bits of a float array, or of a number."""
        return lax.bitcast_convert_type(jnp.asarray(x, self.floating), self.unsigned)

    def floats(self, bits: Array) -> Array:
        """The floats with those bits."""
        return lax.bitcast_convert_type(bits, self.floating)

    def magnitude(self, bits: Array) -> Array:
        """The bits without the sign."""
        return jnp.bitwise_and(bits, ~self.sign)


FLOAT32 = Layout(size=32, mantissa_bits=23)
FLOAT64 = Layout(size=64, mantissa_bits=52)


def unpack(bits: Array, layout: Layout, *, normalised: bool = True) -> tuple[Array, Array]:
    """(significand, exponent) of finite magnitudes: `significand / 2**(size - 1) * 2**exponent`, the significand 0 for zero.

    normalised: the significand's highest bit is set for subnormals too; otherwise these have the exponent of the smallest normal.
    """
    word = layout.unsigned
    magnitude = layout.magnitude(bits)
    field = (magnitude >> word(layout.mantissa_bits)).astype(jnp.int32)
    implicit = jnp.where(field > 0, layout.sign, word(0))
    significand = (magnitude << word(layout.size - 1 - layout.mantissa_bits)) & ~layout.sign | implicit
    exponent = jnp.maximum(field, 1) - layout.bias
    if not normalised:
        return significand, exponent
    zeros = lax.clz(significand)
    return significand << zeros, exponent - zeros.astype(jnp.int32)


def round_to(
    significand: Array,
    exponent: Array,
    *,
    mantissa_bits: int,
    emin: int,
    lowest: int,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    draws: Array | None = None,
) -> Array:
    """The code of a magnitude (see `unpack`) in a format without an upper end, in the significand's dtype, modulo its size.

    lowest: the exponent below which the grid gets no finer.  draws: of stochastic rounding, uint32.
    """
    word: Any = significand.dtype.type
    size = significand.dtype.itemsize * 8
    # XLA defines shifts by `size` or more, as which negative ones count: they leave nothing.
    below = size - 1 - mantissa_bits + jnp.maximum(lowest - exponent, 0)
    whole = significand >> below.astype(word)
    fraction = (significand << (size - below).astype(word)) | (significand >> (below - size).astype(word))
    half = word(1 << (size - 1))
    match rounding:
        case Rounding.NEAREST_EVEN:
            up = fraction > half - (whole & word(1))
        case Rounding.TOWARD_ZERO:
            up = jnp.zeros(fraction.shape, bool)
        case Rounding.NEAREST_AWAY:
            up = fraction >= half
        case Rounding.STOCHASTIC:
            assert draws is not None
            top = (fraction >> word(size - 32)).astype(jnp.uint32)
            up = top + draws < top
    binade: Array = (jnp.maximum(exponent, lowest) - emin).astype(word) << word(mantissa_bits)
    return jnp.add(binade + whole, up.astype(word))


def wide_product(a: Array, b: Array) -> tuple[Array, Array]:
    """(high, low) words of the product of unsigned words, by halves: XLA multiplies no wider than it holds."""
    word: Any = a.dtype.type
    half = word(a.dtype.itemsize * 4)
    mask = word((1 << int(half)) - 1)
    a_low, a_high, b_low, b_high = a & mask, a >> half, b & mask, b >> half
    low, cross, other, high = a_low * b_low, a_low * b_high, a_high * b_low, a_high * b_high
    middle = (low >> half) + (cross & mask) + (other & mask)
    return high + (cross >> half) + (other >> half) + (middle >> half), (low & mask) | (middle << half)


def _signed(magnitude: Array, negative: Array, layout: Layout) -> Array:
    """The magnitude with a sign, NaN without."""
    infinite = jnp.minimum(magnitude, layout.infinity)
    return jnp.where(magnitude > layout.infinity, layout.nan, infinite | negative)


def _rounded(significand: Array, exponent: Array, layout: Layout) -> Array:
    """The magnitude that a normalised result rounds to, infinity where it overflows."""
    emin = 1 - layout.bias
    exponent = jnp.minimum(exponent, layout.bias + 1)
    code = round_to(significand, exponent, mantissa_bits=layout.mantissa_bits, emin=emin, lowest=emin)
    return jnp.where(significand == 0, layout.unsigned(0), jnp.minimum(code, layout.infinity))


def convert(bits: Array, source: Layout, target: Layout) -> Array:
    """The same numbers in another layout, rounded once where that holds less."""
    if source == target:
        return bits
    significand, exponent = unpack(bits, source)
    wide = FLOAT64.unsigned
    if source.size < target.size:
        significand = significand.astype(wide) << wide(target.size - source.size)
    emin, word = 1 - target.bias, target.unsigned
    exponent = jnp.minimum(exponent, target.bias + 1)
    code = round_to(significand, exponent, mantissa_bits=target.mantissa_bits, emin=emin, lowest=emin)
    magnitude = jnp.minimum(code, target.infinity.astype(wide)).astype(word)
    held = source.magnitude(bits)
    magnitude = jnp.where(held == 0, word(0), jnp.where(held > source.infinity, target.nan, magnitude))
    magnitude = jnp.where(held == source.infinity, target.infinity, magnitude)
    return jnp.where(bits < source.sign, magnitude, magnitude | target.sign)


def multiply(a: Array, b: Array, layout: Layout = FLOAT32) -> Array:
    """The product of two words' floats."""
    a, b = jnp.broadcast_arrays(a, b)
    word = layout.unsigned
    (significand, exponent), (other, more) = unpack(a, layout), unpack(b, layout)
    high, low = wide_product(significand, other)
    carry = high >> word(layout.size - 1)
    # What is lost of the product is kept as its last bit being set, far below where it is rounded.
    product = (high | (low != 0).astype(word)) << (word(1) - carry)
    magnitude = _rounded(product, exponent + more + carry.astype(jnp.int32), layout)
    one, two = layout.magnitude(a), layout.magnitude(b)
    larger, smaller = jnp.maximum(one, two), jnp.minimum(one, two)
    magnitude = jnp.where(larger >= layout.infinity, jnp.where(smaller == 0, layout.nan, larger), magnitude)
    return _signed(magnitude, (a ^ b) & layout.sign, layout)


def multiply_flushing(a: Array, b: Array) -> Array:
    """`multiply` for float32, in floats, except that a product under 2**-126 in magnitude may come as zero of its sign."""

    def lifted(bits: Array) -> tuple[Array, Array]:
        """(number, power of two): what is subnormal is held as a normal number and 2**-126."""
        magnitude = FLOAT32.magnitude(bits)
        subnormal = magnitude < np.uint32(1 << 23)
        number = FLOAT32.bits(magnitude.astype(jnp.float32) * np.float32(2.0**-23)) | (bits & FLOAT32.sign)
        return FLOAT32.floats(jnp.where(subnormal, number, bits)), jnp.where(
            subnormal, np.float32(2.0**-126), np.float32(1)
        )

    (one, power), (two, other) = lifted(a), lifted(b)
    return FLOAT32.bits((one * two) * power * other)


def divide(a: Array, b: Array, layout: Layout = FLOAT32) -> Array:
    """The quotient of two words' floats, by long division."""
    a, b = jnp.broadcast_arrays(a, b)
    word = layout.unsigned
    (significand, exponent), (other, less) = unpack(a, layout), unpack(b, layout)
    rest, divisor = (x >> word(layout.size - 1 - layout.mantissa_bits) for x in (significand, other))
    short = (rest < divisor).astype(word)
    steps = layout.mantissa_bits + 3  # as many bits as the mantissa, the implicit one, and two to round by

    def step(_: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        quotient, rest = state
        fits = rest >= divisor
        rest = jnp.where(fits, rest - divisor, rest) << word(1)
        return (quotient << word(1)) | fits.astype(word), rest

    zero = (rest ^ divisor) & word(0)  # which varies over a mesh as the loop's results do
    quotient, rest = lax.fori_loop(0, steps, step, (zero, (rest << short) | zero))
    quotient = quotient << word(layout.size - steps) | (rest != 0).astype(word)
    magnitude = _rounded(quotient, exponent - less - short.astype(jnp.int32), layout)
    one, two, zero = layout.magnitude(a), layout.magnitude(b), word(0)
    infinite = (one == layout.infinity) | (two == zero)
    magnitude = jnp.where((one == zero) | (two == layout.infinity), zero, magnitude)
    magnitude = jnp.where(infinite, layout.infinity, magnitude)
    undefined = (one == two) & ((one == zero) | (one == layout.infinity))
    undefined |= jnp.maximum(one, two) > layout.infinity
    return _signed(jnp.where(undefined, layout.nan, magnitude), (a ^ b) & layout.sign, layout)


_LIFT = 64


def add(a: Array, b: Array) -> Array:
    """The sum of two words' float32s; where a subnormal can enter, it is that of the operands times 2**64."""

    def lifted(bits: Array) -> Array:
        magnitude = FLOAT32.magnitude(bits)
        tiny = magnitude.astype(jnp.float32) * np.float32(2.0 ** (_LIFT - 149))
        large = FLOAT32.floats(magnitude + np.uint32(_LIFT << 23))
        value = jnp.where(magnitude < np.uint32(1 << 23), tiny, large)
        return FLOAT32.floats(FLOAT32.bits(value) | (bits & FLOAT32.sign))

    small = jnp.maximum(FLOAT32.magnitude(a), FLOAT32.magnitude(b)) < FLOAT32.bits(2.0**-60)
    total = FLOAT32.bits(lifted(a) + lifted(b))
    magnitude = FLOAT32.magnitude(total)
    tiny = (FLOAT32.floats(magnitude) * np.float32(2.0 ** (149 - _LIFT))).astype(jnp.uint32)
    normal = magnitude >= np.uint32((_LIFT + 1) << 23)
    lowered = jnp.where(normal, magnitude - np.uint32(_LIFT << 23), tiny) | (total & FLOAT32.sign)
    return jnp.where(small, lowered, FLOAT32.bits(FLOAT32.floats(a) + FLOAT32.floats(b)))


class Floats:
    """A float32 array whose arithmetic is that of this module, enough of it for the rules of `octavo.scaling`."""

    __slots__ = ("bits",)

    def __init__(self, bits: Array) -> None:
        self.bits = bits

    @classmethod
    def of(cls, x: Any) -> Floats:
        """A float32 array, or a number."""
        return x if isinstance(x, Floats) else cls(FLOAT32.bits(x))

    @property
    def array(self) -> Array:
        """The same as an array of JAX."""
        return FLOAT32.floats(self.bits)

    def __array_namespace__(self) -> Any:
        return _Namespace

    def __mul__(self, other: Any) -> Floats:
        return Floats(multiply(self.bits, Floats.of(other).bits))

    def __truediv__(self, other: Any) -> Floats:
        return Floats(divide(self.bits, Floats.of(other).bits))

    def __rtruediv__(self, other: Any) -> Floats:
        return Floats.of(other) / self

    def __lt__(self, other: Any) -> Array:
        one, two = self.bits, Floats.of(other).bits
        number = jnp.maximum(FLOAT32.magnitude(one), FLOAT32.magnitude(two)) <= FLOAT32.infinity
        return jnp.logical_and(number, _ordered(one) < _ordered(two))

    def __gt__(self, other: Any) -> Array:
        return Floats.of(other) < self

    def __le__(self, other: Any) -> Array:
        equal = _ordered(self.bits) == _ordered(Floats.of(other).bits)
        number = FLOAT32.magnitude(self.bits) <= FLOAT32.infinity
        return jnp.logical_or(self < other, jnp.logical_and(equal, number))

    def view(self, dtype: Any) -> Array:
        """The bits as another type of the same size."""
        return lax.bitcast_convert_type(self.bits, dtype)


def _ordered(bits: Array) -> Array:
    """Integers in the order of the numbers."""
    magnitude = lax.bitcast_convert_type(FLOAT32.magnitude(bits), jnp.int32)
    return jnp.where(bits < FLOAT32.sign, magnitude, -magnitude)


class _Namespace:
    """jax.numpy for `Floats` as well."""

    int32, float32, zeros_like = jnp.int32, jnp.float32, jnp.zeros_like

    @staticmethod
    def full_like(x: Floats, value: float) -> Floats:
        return Floats(jnp.full_like(x.bits, FLOAT32.bits(value)))

    @staticmethod
    def ones_like(x: Floats) -> Floats:
        return _Namespace.full_like(x, 1.0)

    @staticmethod
    def isfinite(x: Floats) -> Array:
        return jnp.less(FLOAT32.magnitude(x.bits), FLOAT32.infinity)

    @staticmethod
    def where(condition: Array, x: Any, y: Any) -> Any:
        if isinstance(x, Floats) or isinstance(y, Floats):
            return Floats(jnp.where(condition, Floats.of(x).bits, Floats.of(y).bits))
        return jnp.where(condition, x, y)
