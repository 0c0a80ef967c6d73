"""What the bits mean: one frozen `Format` per row, everything else derived from it.

Names follow ml_dtypes (`float8_e4m3fn`: 4 exponent bits, 3 mantissa bits, finite, with NaN).  Sources: OCP 8-bit Floating
Point Specification (OFP8) v1.0 for E4M3FN and E5M2; OCP Microscaling Formats (MX) v1.0 for E8M0, FP6 and FP4; Noune et al.,
arXiv 2206.02915, for the FNUZ rows; Kuzmin et al. and the FP8 emulation toolkit for E3M4.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from octavo.names import nearest

__all__ = [
    "BFLOAT16",
    "E2M1FN",
    "E2M3FN",
    "E3M2FN",
    "E3M4",
    "E3M4FN",
    "E4M3",
    "E4M3B11FNUZ",
    "E4M3FN",
    "E4M3FNUZ",
    "E5M2",
    "E5M2FNUZ",
    "E8M0FNU",
    "FLOAT16",
    "FORMATS",
    "TF32",
    "WIDE_FORMATS",
    "Format",
    "Specials",
    "get_format",
]


class Specials(enum.Enum):
    """Which codes are not ordinary numbers."""

    IEEE = "ieee"
    """The top exponent holds Inf (mantissa 0) and NaN (the rest), as in IEEE 754."""
    NAN_ONLY = "fn"
    """All magnitude bits set is NaN, there is no Inf; the rest of the top exponent holds numbers (the suffix `fn`)."""
    UNSIGNED_ZERO = "fnuz"
    """The code of -0 is the only NaN; there is neither Inf nor -0 (the suffix `fnuz`)."""
    FINITE = "finite"
    """Every code is a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A floating-point format of at most 19 bits: sign, exponent, mantissa, from the highest bit down.

    Codes are held in the low `bits` of a uint8, wider ones of a uint32.  A magnitude with exponent field e > 0 and mantissa field m is
    worth `2**(e - bias) * (1 + m / 2**mantissa_bits)`; with e = 0 it is the subnormal `2**(1 - bias) * m / 2**mantissa_bits`.
    An unsigned format (E8M0) has neither sign nor zero: its code c is worth `2**(c - bias)`.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials
    signed: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 19:
            raise ValueError(
                f"a format has 1 to 19 bits; {self.name} has {self.bits}: give it fewer exponent or mantissa bits"
            )

    def __hash__(self) -> int:
        return hash(self.name)  # formats key the caches of every cast

    @property
    def bits(self) -> int:
        """Bits a code takes, sign included."""
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def magnitude_bits(self) -> int:
        """Bits of a code without its sign."""
        return self.exponent_bits + self.mantissa_bits

    @property
    def sign_mask(self) -> int:
        """The sign bit of a code, 0 where the format is unsigned."""
        return 1 << self.magnitude_bits if self.signed else 0

    @property
    def emin(self) -> int:
        """The exponent of the smallest normal value with exponent field 1, below which the grid no longer gets finer."""
        return 1 - self.bias

    @property
    def max_code(self) -> int:
        """The code of `max`."""
        top = (1 << self.magnitude_bits) - 1
        match self.specials:
            case Specials.IEEE:
                return top - (1 << self.mantissa_bits)
            case Specials.NAN_ONLY:
                return top - 1
            case Specials.UNSIGNED_ZERO | Specials.FINITE:
                return top

    @property
    def max(self) -> float:
        """The largest finite value."""
        return self._magnitude(self.max_code)

    @property
    def emax(self) -> int:
        """The exponent of `max`: floor(log2(max))."""
        return (self.max_code >> self.mantissa_bits) - self.bias

    @property
    def tiny(self) -> float:
        """The smallest normal value; of E8M0, which has no subnormals, the smallest value."""
        return 2.0**self.emin if self.signed else 2.0**-self.bias

    @property
    def smallest_subnormal(self) -> float:
        """The smallest value above zero."""
        return 2.0 ** (self.emin - self.mantissa_bits) if self.signed else self.tiny

    @property
    def eps(self) -> float:
        """The gap between 1 and the next larger value."""
        return 2.0**-self.mantissa_bits

    @property
    def has_inf(self) -> bool:
        """Whether a code means infinity."""
        return self.specials is Specials.IEEE

    @property
    def has_nan(self) -> bool:
        """Whether a code means NaN."""
        return self.specials is not Specials.FINITE

    @property
    def has_negative_zero(self) -> bool:
        """Whether -0 and +0 are different codes."""
        return self.signed and self.specials is not Specials.UNSIGNED_ZERO

    @property
    def inf_code(self) -> int | None:
        """The code of +Inf, or None."""
        return self.max_code + 1 if self.has_inf else None

    @property
    def nan_code(self) -> int | None:
        """The code that NaN is encoded as (all magnitude bits set, -0 in the FNUZ formats), or None."""
        match self.specials:
            case Specials.IEEE | Specials.NAN_ONLY:
                return (1 << self.magnitude_bits) - 1
            case Specials.UNSIGNED_ZERO:
                return self.sign_mask
            case Specials.FINITE:
                return None

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """What each code decodes to: float32 [2**bits], read-only.  The whole meaning of the format."""
        return _values(self)

    def _magnitude(self, code: int) -> float:
        """The value of a code without its sign, specials aside."""
        exponent, mantissa = code >> self.mantissa_bits, code & ((1 << self.mantissa_bits) - 1)
        if exponent == 0 and self.signed:
            return mantissa * self.smallest_subnormal
        return (1 + mantissa * self.eps) * 2.0 ** (exponent - self.bias)


@functools.cache
def _values(format: Format) -> npt.NDArray[np.float32]:
    code = np.arange(1 << format.bits)
    magnitude = code & ((1 << format.magnitude_bits) - 1)
    exponent, mantissa = magnitude >> format.mantissa_bits, magnitude & ((1 << format.mantissa_bits) - 1)
    normal = np.ldexp(1 + mantissa * format.eps, exponent - format.bias)
    subnormal = (exponent == 0) & format.signed
    value = np.where(subnormal, mantissa * format.smallest_subnormal, normal)
    special = code == format.nan_code
    value = np.where(special | (magnitude > format.max_code), np.nan, value)
    if format.inf_code is not None:
        value = np.where(magnitude == format.inf_code, np.inf, value)
    sign = np.where(code & format.sign_mask, -1.0, 1.0)
    table: npt.NDArray[np.float32] = np.copysign(value, sign).astype(np.float32)
    table.flags.writeable = False
    return table


def _row(
    name: str, exponent_bits: int, mantissa_bits: int, bias: int, specials: Specials, signed: bool = True
) -> Format:
    return Format(
        name=name,
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        bias=bias,
        specials=specials,
        signed=signed,
    )


E4M3FN = _row("float8_e4m3fn", 4, 3, 7, Specials.NAN_ONLY)
E5M2 = _row("float8_e5m2", 5, 2, 15, Specials.IEEE)
E3M4 = _row("float8_e3m4", 3, 4, 3, Specials.IEEE)
E3M4FN = _row("float8_e3m4fn", 3, 4, 3, Specials.NAN_ONLY)
E4M3 = _row("float8_e4m3", 4, 3, 7, Specials.IEEE)
E4M3FNUZ = _row("float8_e4m3fnuz", 4, 3, 8, Specials.UNSIGNED_ZERO)
E5M2FNUZ = _row("float8_e5m2fnuz", 5, 2, 16, Specials.UNSIGNED_ZERO)
E4M3B11FNUZ = _row("float8_e4m3b11fnuz", 4, 3, 11, Specials.UNSIGNED_ZERO)
E8M0FNU = _row("float8_e8m0fnu", 8, 0, 127, Specials.NAN_ONLY, signed=False)
E2M3FN = _row("float6_e2m3fn", 2, 3, 1, Specials.FINITE)
E3M2FN = _row("float6_e3m2fn", 3, 2, 3, Specials.FINITE)
E2M1FN = _row("float4_e2m1fn", 2, 1, 1, Specials.FINITE)

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        row.name: row
        for row in (
            E4M3FN,
            E5M2,
            E3M4,
            E3M4FN,
            E4M3,
            E4M3FNUZ,
            E5M2FNUZ,
            E4M3B11FNUZ,
            E8M0FNU,
            E2M3FN,
            E3M2FN,
            E2M1FN,
        )
    }
)
"""Every format of at most 8 bits by its name."""

BFLOAT16 = _row("bfloat16", 8, 7, 127, Specials.IEEE)
FLOAT16 = _row("float16", 5, 10, 15, Specials.IEEE)
TF32 = _row("tf32", 8, 10, 127, Specials.IEEE)

WIDE_FORMATS: Mapping[str, Format] = MappingProxyType({row.name: row for row in (BFLOAT16, FLOAT16, TF32)})
"""The wider formats, by name, that a recipe may name beside those: IEEE 754 binary16, and float32 with its mantissa cut."""


def get_format(name: str) -> Format:
    """The format of that name, the same object each time.  Raises ValueError, with the nearest name, for any other."""
    found = FORMATS.get(name) or WIDE_FORMATS.get(name)
    if found is None:
        raise ValueError(
            f"no format is called {name!r}{nearest(name, (*FORMATS, *WIDE_FORMATS))} (`octavo formats` lists them)"
        )
    return found
