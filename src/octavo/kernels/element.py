"""What one number becomes: the bodies that the compiled loops inline, and how they are compiled.

Legend: m is the format's mantissa bits; an `e` is a float32's exponent field left in place.  Adding and subtracting 2**(e + 23 - m)
rounds to nearest even at bit m, subnormals included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from octavo.kernels.native import native

__all__ = [
    "F32",
    "I32",
    "INF",
    "MAGNITUDE",
    "NAN",
    "SIGN",
    "U16",
    "U32",
    "U64",
    "compiled",
    "inlined",
    "kernel",
]

I32, F32, U16, U32, U64 = np.int32, np.float32, np.uint16, np.uint32, np.uint64
MAGNITUDE, SIGN, INF, NAN = I32(0x7FFFFFFF), I32(-0x80000000), I32(0x7F800000), I32(0x7FC00000)

compiled: Any = njit(cache=True, nogil=True, error_model="numpy", boundscheck=False)
inlined: Any = njit(inline="always")
"""For a body with a branch that the loop around it has to be split at: LLVM inlines too late for that, and then has no vectors."""
kernel = native(1)
"""For a function of the address of its arguments, which any thread pool can run."""


@compiled
def _bits(value):
    return np.float32(value).view(np.int32)


@compiled
def _real(bits):
    return np.int32(bits).view(np.float32)


@compiled
def _bits64(value):
    return np.float64(value).view(np.int64)


@compiled
def _real64(bits):
    return np.int64(bits).view(np.float64)


@compiled
def _magnitude64(value):
    return _bits64(value) & 0x7FFFFFFFFFFFFFFF


@compiled
def _finish(rounded, u, a, top, over, inf, zero_sign):
    """The bits of a rounded magnitude after overflow, Inf, NaN and the sign; `u` and `a` are the value's bits with and without it."""
    r = over if rounded > top else rounded
    r = inf if a == INF else r
    r = _real(NAN) if a > INF else r
    sign = I32(u & SIGN)
    sign = I32(sign & zero_sign) if r == F32(0) else sign
    return I32(_bits(r) | sign)


@compiled
def _is_plain(top, over, inf, zero_sign):
    """Whether what is too large, and Inf, become the largest value, and -0 stays: then there is less to do."""
    return over == top and inf == top and zero_sign == SIGN


@compiled
def _signed(rounded, u, a):
    """`_finish` where `_is_plain` says so, of a magnitude that was clipped before it was rounded."""
    return I32(_bits(_real(NAN) if a > INF else rounded) | I32(u & SIGN))


@compiled
def _nearest(x, scale, shift, e_min, limit, top, over, inf, zero_sign):
    """One float32, scaled and rounded to nearest even at bit m: the bits of the result."""
    u = _bits(x * scale)
    a = I32(u & MAGNITUDE)
    c = I32(min(a, limit))
    magic = _real(max(I32(c & INF), e_min) + shift)
    return _finish((_real(c) + magic) - magic, u, a, top, over, inf, zero_sign)


@compiled
def _nearest_plain(x, scale, shift, e_min, top):
    """The same where `_is_plain` says so, clipped before it is rounded."""
    u = _bits(x * scale)
    a = _real(I32(u & MAGNITUDE))
    c = top if a > top else a
    magic = _real(max(I32(_bits(c) & INF), e_min) + shift)
    return _signed((c + magic) - magic, u, _bits(a))


@compiled
def _nearest_code(x, scale, shift, e_min, top, drop, nan_code, sign_mask):
    """The code of `_nearest_plain`: whole last places, as the sum with `magic` holds them, above where the binade's own codes begin."""
    u = _bits(x * scale)
    a = _real(I32(u & MAGNITUDE))
    c = top if a > top else a
    e = max(I32(_bits(c) & INF), e_min)
    magic = I32(e + shift)
    code = (_bits(c + _real(magic)) - magic) + ((e - e_min) >> drop)
    return nan_code if a != a else I32(code | ((u >> I32(31)) & sign_mask))


@inlined
def _parts(x, scale, shift, e_min, limit):
    """(bits, magnitude, number of whole last places, fraction of one, what a last place is worth) of a scaled float32."""
    up_m = I32((23 << 23) - shift)
    u = _bits(x * scale)
    a = I32(u & MAGNITUDE)
    c = I32(min(a, limit))
    e = max(I32(c & INF), e_min)
    in_ulps = _real(c) * _real(I32(254 << 23) - e + up_m)
    whole = np.floor(in_ulps)
    return u, a, whole, in_ulps - whole, _real(e - up_m)


@inlined
def _directed(x, scale, shift, e_min, limit, top, over, inf, zero_sign, half):
    """As `_nearest`, but up where fraction >= half."""
    u, a, whole, fraction, ulp = _parts(x, scale, shift, e_min, limit)
    whole += F32(1) if fraction >= half else F32(0)
    return _finish(whole * ulp, u, a, top, over, inf, zero_sign)


@inlined
def _drawn(x, scale, shift, e_min, limit, draw):
    """As `_directed`, but up where fraction * 2**32 + draw carries, and without `_finish`, whose first three arguments are returned."""
    u, a, whole, fraction, ulp = _parts(x, scale, shift, e_min, limit)
    likelihood = U32(fraction * F32(4294967296.0))
    whole += F32(1) if U32(likelihood + draw) < likelihood else F32(0)
    return whole * ulp, u, a
