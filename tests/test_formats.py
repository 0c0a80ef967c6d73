"""Formats: every row against the literal table, every code against ml_dtypes."""

import dataclasses
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import octavo
from octavo import formats, reference
from octavo.formats import FORMATS, Format, Specials, get_format
from octavo.rounding import Overflow

NEGATIVE = 0x80


class Row(NamedTuple):
    """What the specifications say of one format; codes without their sign."""

    name: str
    bits: tuple[int, int, int]
    bias: int
    max: float
    max_code: int
    tiny: float
    smallest_subnormal: float
    inf: int | None
    nans: tuple[int, ...]
    negative_zero: bool
    emax: int


# fmt: off
ROWS = (
    Row("float8_e4m3fn", (1, 4, 3), 7, 448.0, 0x7E, 2.0**-6, 2.0**-9, None, (0x7F,), True, 8),
    Row("float8_e5m2", (1, 5, 2), 15, 57344.0, 0x7B, 2.0**-14, 2.0**-16, 0x7C, (0x7D, 0x7E, 0x7F), True, 15),
    Row("float8_e3m4", (1, 3, 4), 3, 15.5, 0x6F, 2.0**-2, 2.0**-6, 0x70, tuple(range(0x71, 0x80)), True, 3),
    Row("float8_e3m4fn", (1, 3, 4), 3, 30.0, 0x7E, 2.0**-2, 2.0**-6, None, (0x7F,), True, 4),
    Row("float8_e4m3", (1, 4, 3), 7, 240.0, 0x77, 2.0**-6, 2.0**-9, 0x78, tuple(range(0x79, 0x80)), True, 7),
    Row("float8_e4m3fnuz", (1, 4, 3), 8, 240.0, 0x7F, 2.0**-7, 2.0**-10, None, (), False, 7),
    Row("float8_e5m2fnuz", (1, 5, 2), 16, 57344.0, 0x7F, 2.0**-15, 2.0**-17, None, (), False, 15),
    Row("float8_e4m3b11fnuz", (1, 4, 3), 11, 30.0, 0x7F, 2.0**-10, 2.0**-13, None, (), False, 4),
    Row("float8_e8m0fnu", (0, 8, 0), 127, 2.0**127, 0xFE, 2.0**-127, 2.0**-127, None, (0xFF,), False, 127),
    Row("float6_e2m3fn", (1, 2, 3), 1, 7.5, 0x1F, 1.0, 2.0**-3, None, (), True, 2),
    Row("float6_e3m2fn", (1, 3, 2), 3, 28.0, 0x1F, 2.0**-2, 2.0**-4, None, (), True, 4),
    Row("float4_e2m1fn", (1, 2, 1), 1, 6.0, 0x7, 1.0, 2.0**-1, None, (), True, 2),
)
# fmt: on
PEERS = [row.name for row in ROWS if hasattr(ml_dtypes, row.name)]


def same_floats(left: np.ndarray, right: np.ndarray) -> bool:
    """Equal bit for bit, all NaNs being one."""
    nan = np.isnan(left) & np.isnan(right)
    return bool(np.all(nan | (left.view(np.uint32) == right.view(np.uint32))))


def test_the_table_lists_every_format_and_only_e3m4fn_is_unknown_to_ml_dtypes() -> None:
    assert [row.name for row in ROWS] == list(FORMATS)
    assert set(FORMATS) - set(PEERS) == {"float8_e3m4fn"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_format_is_its_row(row: Row) -> None:
    format = get_format(row.name)
    assert (int(format.signed), format.exponent_bits, format.mantissa_bits) == row.bits
    assert format.bits == sum(row.bits)
    assert (format.bias, format.max, format.max_code) == (row.bias, row.max, row.max_code)
    assert (format.tiny, format.smallest_subnormal) == (row.tiny, row.smallest_subnormal)
    assert (format.inf_code, format.has_inf) == (row.inf, row.inf is not None)
    assert format.has_negative_zero is row.negative_zero
    assert format.emax == row.emax


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_special_codes_are_those_of_the_row(row: Row) -> None:
    format = get_format(row.name)
    sign = 1 << (format.bits - 1) if format.signed else 0
    nans = {code | side for code in row.nans for side in (0, sign)}
    if "uz" in row.name:
        nans = {NEGATIVE}
    infinities = set() if row.inf is None else {row.inf, row.inf | sign}
    assert set(np.flatnonzero(np.isnan(format.values))) == nans
    assert set(np.flatnonzero(np.isinf(format.values))) == infinities
    assert format.has_nan is bool(nans)
    assert (format.nan_code in nans) if nans else (format.nan_code is None)
    assert format.sign_mask == sign
    if row.negative_zero:
        assert format.values[sign] == 0
        assert np.signbit(format.values[sign])
    zeros = set(np.flatnonzero(format.values == 0))
    assert zeros == (set() if not format.signed else {0, sign} if row.negative_zero else {0})


@pytest.mark.parametrize("name", PEERS)
def test_every_code_means_what_it_means_in_ml_dtypes(name: str) -> None:
    format = get_format(name)
    codes = np.arange(1 << format.bits, dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        theirs = codes.view(getattr(ml_dtypes, name)).astype(np.float32)
    assert same_floats(np.array(format.values), theirs)


@pytest.mark.parametrize("name", PEERS)
def test_finfo_agrees(name: str) -> None:
    format = get_format(name)
    theirs = ml_dtypes.finfo(getattr(ml_dtypes, name))
    assert (format.bits, format.exponent_bits, format.mantissa_bits) == (theirs.bits, theirs.nexp, theirs.nmant)
    for ours, name_there in (
        ("max", "max"),
        ("eps", "eps"),
        ("tiny", "tiny"),
        ("smallest_subnormal", "smallest_subnormal"),
    ):
        assert getattr(format, ours) == float(getattr(theirs, name_there)), ours
    assert format.emax == theirs.maxexp - 1


def test_every_code_of_e3m4fn_follows_the_formula_of_its_fields() -> None:
    format = octavo.formats.E3M4FN
    for code in range(256):
        exponent, mantissa = (code >> 4) & 0b111, code & 0b1111
        value = mantissa / 64 if exponent == 0 else (16 + mantissa) / 16 * 2.0 ** (exponent - 3)
        if code & 0x7F == 0x7F:
            assert np.isnan(format.values[code])
        else:
            assert format.values[code] == value * (-1 if code & NEGATIVE else 1)
            assert np.signbit(format.values[code]) == bool(code & NEGATIVE)


@pytest.mark.parametrize("name", FORMATS)
def test_magnitudes_grow_with_their_codes(name: str) -> None:
    format = get_format(name)
    magnitudes = format.values[: format.max_code + 1]
    assert np.all(np.diff(magnitudes.astype(np.float64)) > 0)
    assert magnitudes[-1] == format.max


@pytest.mark.parametrize("name", FORMATS)
def test_the_values_are_one_read_only_float32_table(name: str) -> None:
    format = get_format(name)
    assert format.values is format.values
    assert (format.values.dtype, format.values.shape) == (np.float32, (1 << format.bits,))
    with pytest.raises(ValueError, match="read-only"):
        format.values[0] = 1


def test_get_format_gives_the_same_object_each_time() -> None:
    assert octavo.get_format("float8_e4m3fn") is octavo.formats.E4M3FN
    for name, format in FORMATS.items():
        assert get_format(name) is format
        assert getattr(octavo.formats, name.partition("_")[2].upper()) is format


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [
        ("float8_e4m3fm", "float8_e4m3fn"),
        ("float8_e5m3", "float8_e5m2"),
        ("e8m0fnu", "float8_e8m0fnu"),
        ("float4_e2m1", "float4_e2m1fn"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(mistyped: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"no format is called '{mistyped}'; did you mean '{meant}'\\?") as error:
        get_format(mistyped)
    assert "\n" not in str(error.value)


def test_a_name_like_no_other_suggests_nothing() -> None:
    with pytest.raises(ValueError, match=r"no format is called 'zzz' \(`octavo formats` lists them\)"):
        get_format("zzz")


@pytest.mark.parametrize(
    ("exponent_bits", "mantissa_bits", "signed"), [(8, 11, True), (10, 9, True), (8, 12, False), (0, 0, False)]
)
def test_a_format_wider_or_narrower_than_any_is_refused(exponent_bits: int, mantissa_bits: int, signed: bool) -> None:
    with pytest.raises(ValueError, match=r"wide has \d+: give it fewer exponent or mantissa bits") as error:
        Format(
            name="wide",
            exponent_bits=exponent_bits,
            mantissa_bits=mantissa_bits,
            bias=15,
            specials=Specials.IEEE,
            signed=signed,
        )
    assert "\n" not in str(error.value)


def test_a_format_is_frozen_and_equal_to_its_copy() -> None:
    copy = dataclasses.replace(octavo.formats.E5M2)
    assert copy == octavo.formats.E5M2
    assert hash(copy) == hash(octavo.formats.E5M2)
    assert len({*FORMATS.values(), copy}) == len(FORMATS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        copy.bias = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("format", "dtype"), [(formats.BFLOAT16, ml_dtypes.bfloat16), (formats.FLOAT16, np.float16)], ids=["bf16", "fp16"]
)
def test_wide_formats_are_those_of_their_dtypes(format: Format, dtype: Any) -> None:
    info = ml_dtypes.finfo(dtype)
    assert (format.max, format.tiny) == (float(info.max), float(info.tiny))
    assert (format.smallest_subnormal, format.eps) == (float(info.smallest_subnormal), float(info.eps))
    x = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        want = x.astype(dtype).astype(np.float32)
    codes = reference.encode(x, format, overflow=Overflow.NONE)
    np.testing.assert_array_equal(reference.decode(codes, format), want)


def test_tf32_is_float32_with_ten_bits_of_mantissa() -> None:
    tf32 = formats.TF32
    assert (tf32.bits, tf32.max, tf32.smallest_subnormal) == (19, (2 - 2.0**-10) * 2.0**127, 2.0**-136)
    assert get_format("tf32") is tf32
