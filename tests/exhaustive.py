"""Every float32 bit pattern through every 8-bit format, to nearest even, against ml_dtypes; and every product of two values.

    python tests/exhaustive.py                              all 2**32 patterns, all formats of 8 bits, Numba and XLA: over an hour
    python tests/exhaustive.py --formats float8_e5m2 --blocks 2 --backends numba

Prints a line for each cast, and one for each format's products with all signed formats: held in bfloat16 and multiplied in float32 they
are to be exact.  Exits with 1 where a code or a product differs.  E3M4FN, which ml_dtypes lacks, is that library's E3M4 below 15.5, and
E3M4 of x/2 one exponent step higher from there on; its overflow is written out by hand.  Saturating casts, which run loops of their
own, are held to the same codes, with the largest one where |x| exceeds its value.
"""

from __future__ import annotations

import argparse
import enum
import sys
from collections.abc import Callable
from typing import TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import octavo
from octavo.formats import E3M4FN, FORMATS, Format, get_format

Floats: TypeAlias = npt.NDArray[np.float32]
Codes: TypeAlias = npt.NDArray[np.uint8]
Encode: TypeAlias = Callable[[Floats, Format], Codes | Floats]

BLOCK = 1 << 24
"""Patterns in a block; 256 of them are all there are."""
EIGHT_BITS = [format for format in FORMATS.values() if format.bits == 8]
FACTORS = [format for format in FORMATS.values() if format.signed]
"""The formats that GEMMs multiply."""


class Backend(enum.Enum):
    """What casts."""

    NUMBA = "numba"
    """`octavo.encode` of NumPy arrays under `Overflow.NONE`."""
    SATURATED = "saturated"
    """The same under `Overflow.SATURATE`, for signed formats."""
    VALUES = "values"
    """`octavo.quantize` of NumPy arrays under `Overflow.SATURATE`, for signed formats."""
    XLA = "xla"
    """`octavo.kernels.xla` under `jax.jit` and `Overflow.NONE`."""

    @property
    def saturates(self) -> bool:
        """Whether what is too large becomes the largest value."""
        return self in (Backend.SATURATED, Backend.VALUES)

    def encode(self) -> Encode:
        """Its cast to nearest even."""
        match self:
            case Backend.NUMBA:
                return lambda x, format: octavo.encode(x, format, overflow=octavo.Overflow.NONE)
            case Backend.SATURATED:
                return lambda x, format: octavo.encode(x, format)
            case Backend.VALUES:
                return lambda x, format: octavo.quantize(x, format)
            case Backend.XLA:
                return xla_encode()


def xla_encode() -> Encode:
    import jax

    from octavo.kernels import xla

    def encode(x: jax.Array, format: Format) -> jax.Array:
        return xla.encode(x, format, overflow=octavo.Overflow.NONE)

    compiled = jax.jit(encode, static_argnums=1)
    return lambda x, format: np.asarray(compiled(x, format))


def e3m4fn(x: Floats) -> Codes:
    """The codes of x in E3M4FN, from ml_dtypes' E3M4."""
    low = x.astype(ml_dtypes.float8_e3m4).view(np.uint8)
    high = (x / 2).astype(ml_dtypes.float8_e3m4).view(np.uint8) + np.uint8(0x10)
    codes = np.where(np.abs(x) < 15.5, low, high)
    return np.where(np.abs(x) <= 30.5, codes, np.uint8(0x7F))  # 30.5 is a tie, and 30 is even; NaN is not <= either


def expected(x: Floats, format: Format) -> Codes:
    """The codes that ml_dtypes gives x."""
    with np.errstate(all="ignore"):
        if format is E3M4FN:
            return e3m4fn(x)
        return x.astype(getattr(ml_dtypes, format.name)).view(np.uint8)


def block_of(number: int, format: Format) -> Floats:
    """The patterns number * 2**24 and on, as float32; zeros for the NaNs where the format has none."""
    x = np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return x if format.has_nan else np.where(np.isnan(x), np.float32(0), x)


def saturated(x: Floats, codes: Codes, format: Format) -> Codes:
    """The codes of x under `Overflow.SATURATE`, from those under `Overflow.NONE`."""
    largest = np.where(np.signbit(x), np.uint8(format.max_code | format.sign_mask), np.uint8(format.max_code))
    return np.where(np.abs(x) > format.max, largest, codes)


def mismatches(ours: Codes | Floats, theirs: Codes, format: Format) -> npt.NDArray[np.intp]:
    """Where our codes are not theirs, or our values not those of their codes, bit for bit, all NaN being one."""
    if ours.dtype == np.float32:
        due = exact_values(format).astype(np.float32)[theirs]
        different = np.flatnonzero(ours.view(np.uint32) != due.view(np.uint32))
        return different[~(np.isnan(ours[different]) & np.isnan(due[different]))]
    different = np.flatnonzero(ours != theirs)
    both_nan = np.isnan(format.values[ours[different]]) & np.isnan(format.values[theirs[different]])
    return different[~both_nan]


def exact_values(format: Format) -> npt.NDArray[np.float64]:
    """What each code is worth: by ml_dtypes, and by octavo of the format that it lacks."""
    if format is E3M4FN:
        return format.values.astype(np.float64)
    return np.arange(1 << format.bits, dtype=np.uint8).view(getattr(ml_dtypes, format.name)).astype(np.float64)


def inexact_products(left: Format, right: Format) -> int:
    """How many products, of operands held in bfloat16 and multiplied in float32, are not float64's, which are exact."""
    a, b = (format.values.astype(ml_dtypes.bfloat16).astype(np.float32) for format in (left, right))
    with np.errstate(invalid="ignore"):  # 0 * Inf
        ours, exact = np.multiply.outer(a, b), np.multiply.outer(exact_values(left), exact_values(right))
    same = (ours == exact) & (np.signbit(ours) == np.signbit(exact)) | np.isnan(ours) & np.isnan(exact)
    return int(np.count_nonzero(~same))


def spread(blocks: int) -> list[int]:
    """That many of the 256 blocks, evenly apart, so that a few of them see both signs and all sizes."""
    return [(256 * i + 128) // blocks for i in range(blocks)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Every float32 bit pattern through every 8-bit format, against ml_dtypes, and every product of two values."
    )
    names, backends = [format.name for format in EIGHT_BITS], [backend.value for backend in Backend]
    parser.add_argument("--formats", nargs="+", default=names, metavar="NAME", help=f"of {', '.join(FORMATS)}")
    parser.add_argument(
        "--blocks", type=int, default=256, metavar="N", help="of 256 blocks of 2**24 patterns (default: all)"
    )
    parser.add_argument(
        "--backends", nargs="+", default=backends, choices=backends, metavar="NAME", help=f"of {', '.join(backends)}"
    )
    chosen = parser.parse_args()
    try:
        chosen.formats = [get_format(name) for name in chosen.formats]
    except ValueError as error:
        parser.error(str(error))
    if not 1 <= chosen.blocks <= 256:
        parser.error(f"--blocks is from 1 to 256; got {chosen.blocks}")
    chosen.backends = [Backend(name) for name in chosen.backends]
    return chosen


def check_casts(
    format: Format, blocks: int, encoders: dict[Backend, Encode], progress: Progress, console: Console
) -> bool:
    """Whether every code is ml_dtypes'; prints a line for each backend."""
    encoders = {backend: encode for backend, encode in encoders.items() if format.signed or not backend.saturates}
    wrong, first = dict.fromkeys(encoders, 0), dict.fromkeys(encoders, "")
    task = progress.add_task(format.name, total=blocks)
    for number in spread(blocks):
        x = block_of(number, format)
        theirs = expected(x, format)
        clipped = saturated(x, theirs, format) if any(backend.saturates for backend in encoders) else theirs
        for backend, encode in encoders.items():
            found = mismatches(encode(x, format), clipped if backend.saturates else theirs, format)
            wrong[backend] += found.size
            if found.size and not first[backend]:
                bits = x[found[0]].view(np.uint32)
                first[backend] = f", the first at {x[found[0]]!r} (0x{bits:08x})"
        progress.advance(task)
    progress.remove_task(task)
    for backend in encoders:
        count = f"{blocks * BLOCK:>13,} patterns  {wrong[backend]:,} mismatches{first[backend]}"
        console.print(f"{backend.value:9}  {format.name:20}  {count}", highlight=False, soft_wrap=True)
    return not any(wrong.values())


def check_products(left: Format, console: Console) -> bool:
    """Whether every product with a signed format is exact; prints a line."""
    inexact = {right.name: inexact_products(left, right) for right in FACTORS}
    wrong = ", ".join(f"{count:,} of {name}" for name, count in inexact.items() if count)
    pairs = sum(1 << left.bits + right.bits for right in FACTORS)
    count = f"{pairs:>13,} pairs     {sum(inexact.values()):,} mismatches{wrong and f': {wrong}'}"
    console.print(f"products   {left.name:20}  {count}", highlight=False, soft_wrap=True)
    return not wrong


def main() -> int:
    chosen, console = arguments(), Console()
    encoders = {backend: backend.encode() for backend in chosen.backends}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        right = [check_casts(format, chosen.blocks, encoders, progress, console) for format in chosen.formats]
        right += [check_products(format, console) for format in chosen.formats if format in FACTORS]
    return int(not all(right))


if __name__ == "__main__":
    sys.exit(main())
