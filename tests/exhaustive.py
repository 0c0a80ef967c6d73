"""Every float32 bit pattern through every 8-bit format, to nearest even, against ml_dtypes.

    python tests/exhaustive.py                              all 2**32 patterns, all formats of 8 bits: about half an hour
    python tests/exhaustive.py --formats float8_e5m2 --blocks 2

Prints one line for each format and exits with 1 where a code differs.  E3M4FN, which ml_dtypes lacks, is that library's E3M4
below 15.5, and E3M4 of x/2 one exponent step higher from there on; its overflow is written out by hand.
"""

from __future__ import annotations

import argparse
import sys

import ml_dtypes
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import octavo
from octavo.formats import E3M4FN, FORMATS, Format, get_format

BLOCK = 1 << 24
"""Patterns in a block; 256 of them are all there are."""


def e3m4fn(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The codes of x in E3M4FN, from ml_dtypes' E3M4."""
    low = x.astype(ml_dtypes.float8_e3m4).view(np.uint8)
    high = (x / 2).astype(ml_dtypes.float8_e3m4).view(np.uint8) + np.uint8(0x10)
    codes = np.where(np.abs(x) < 15.5, low, high)
    return np.where(np.abs(x) <= 30.5, codes, np.uint8(0x7F))  # 30.5 is a tie, and 30 is even; NaN is not <= either


def expected(x: npt.NDArray[np.float32], format: Format) -> npt.NDArray[np.uint8]:
    """The codes that ml_dtypes gives x."""
    with np.errstate(all="ignore"):
        if format is E3M4FN:
            return e3m4fn(x)
        return x.astype(getattr(ml_dtypes, format.name)).view(np.uint8)


def block_of(number: int, format: Format) -> npt.NDArray[np.float32]:
    """The patterns number * 2**24 and on, as float32; zeros for the NaNs where the format has none."""
    x = np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return x if format.has_nan else np.where(np.isnan(x), np.float32(0), x)


def mismatches(x: npt.NDArray[np.float32], format: Format) -> npt.NDArray[np.intp]:
    """Where the codes of x differ, all NaN codes being one."""
    ours, theirs = octavo.encode(x, format, overflow=octavo.Overflow.NONE), expected(x, format)
    different = np.flatnonzero(ours != theirs)
    both_nan = np.isnan(format.values[ours[different]]) & np.isnan(format.values[theirs[different]])
    return different[~both_nan]


def spread(blocks: int) -> list[int]:
    """That many of the 256 blocks, evenly apart, so that a few of them see both signs and all sizes."""
    return [(256 * i + 128) // blocks for i in range(blocks)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Every float32 bit pattern through every 8-bit format, against ml_dtypes."
    )
    names = [format.name for format in FORMATS.values() if format.bits == 8]
    parser.add_argument("--formats", nargs="+", default=names, metavar="NAME", help=f"of {', '.join(FORMATS)}")
    parser.add_argument(
        "--blocks", type=int, default=256, metavar="N", help="of 256 blocks of 2**24 patterns (default: all)"
    )
    chosen = parser.parse_args()
    try:
        chosen.formats = [get_format(name) for name in chosen.formats]
    except ValueError as error:
        parser.error(str(error))
    if not 1 <= chosen.blocks <= 256:
        parser.error(f"--blocks is from 1 to 256; got {chosen.blocks}")
    return chosen


def main() -> int:
    chosen, console, failed = arguments(), Console(), False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for format in chosen.formats:
            wrong, first = 0, ""
            for number in progress.track(spread(chosen.blocks), description=format.name):
                x = block_of(number, format)
                found = mismatches(x, format)
                wrong += found.size
                if found.size and not first:
                    bits = x[found[0]].view(np.uint32)
                    first = f", the first at {x[found[0]]!r} (0x{bits:08x})"
            failed |= wrong > 0
            console.print(
                f"{format.name:20} {chosen.blocks * BLOCK:>13,} patterns  {wrong:,} mismatches{first}",
                highlight=False,
                soft_wrap=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
