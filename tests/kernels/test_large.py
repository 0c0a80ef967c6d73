"""Parts of the CPU's kernels that only large arrays or unusual widths reach: streamed results, peaks of rows, long runs of draws."""

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from octavo import reference
from octavo.formats import E4M3FN, E5M2
from octavo.kernels import cpu, matrices
from octavo.kernels.arrays import library_of
from octavo.kernels.loops import STREAMED, TILE
from octavo.kernels.peaks import peaks_of_rows
from octavo.kernels.philox import SLACK, draw, fill_random, room
from octavo.rounding import Rounding, random_bits
from octavo.scaling import Block, BlockScale, Row, Scaling
from octavo.table import TensorSpec

CANARY = 0xABCDEF01


@pytest.mark.parametrize("first", [0, 1, 7 << 20, (1 << 32) - 100, (1 << 32) - 1, (1 << 32) + 3, (1 << 45) - 9])
@pytest.mark.parametrize("seed", [0, 3, (1 << 64) - 1])
def test_draws_are_philox_and_no_more_is_written_than_said(first: int, seed: int) -> None:
    for blocks in [*range(1, 60), 96, 97, 200]:
        words = np.full(4 * blocks + SLACK + 1, CANARY, np.uint32)
        fill_random(words.ctypes.data, blocks, first, np.uint64(seed))
        np.testing.assert_array_equal(words[: 4 * blocks], random_bits(seed, 4 * first, 4 * blocks))
        assert words[-1] == CANARY


@pytest.mark.parametrize("place", [*range(5), (1 << 34) - 5, (1 << 62) + 3])
def test_elements_draw_by_their_place_in_the_room_that_they_need(place: int) -> None:
    for size in [*range(1, 30), TILE, 385, 1023]:
        words = np.full(room(size) + 1, CANARY, np.uint32)
        first = (draw(words.ctypes.data, size, place, np.uint64(7)) - words.ctypes.data) // 4
        np.testing.assert_array_equal(words[first : first + size], random_bits(7, place, size))
        assert words[-1] == CANARY


@pytest.mark.parametrize("wide", [16, 32, 48, 64, 80, 96, 128, 144, 256, 320, 1024])
def test_peaks_are_the_largest_magnitudes_of_any_bits(wide: int) -> None:
    rng = np.random.default_rng(wide)
    for count in (1, 2, 15, 16, 17, 33, 64):
        bits = rng.integers(0, 1 << 32, count * wide, np.uint32).view(np.int32)
        found, parts = np.full(count, CANARY - (1 << 32), np.int32), np.empty(bits.size // 16, np.int32)
        peaks_of_rows(bits, found, wide, parts)
        np.testing.assert_array_equal(found, (bits & 0x7FFFFFFF).reshape(count, wide).max(1))


def placed(size: int, dtype: Any, shift: int) -> Any:
    """Uninitialised memory `shift` bytes past a multiple of 64."""
    dtype = np.dtype(dtype)
    memory = np.empty(size * dtype.itemsize + 128, np.uint8)
    start = -memory.ctypes.data % 64 + shift
    return memory[start : start + size * dtype.itemsize].view(dtype)


@pytest.mark.parametrize("shift", [0, 4], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("into", ["float32", "bfloat16", "float16", "uint8"])
def test_results_beyond_the_caches_are_ml_dtypes_s(kind: str, into: str, shift: int) -> None:
    dtype = np.dtype(getattr(ml_dtypes, into, into))
    size = STREAMED // dtype.itemsize + 3 * TILE + 37
    rng = np.random.default_rng(1)
    some = (rng.standard_normal(100_003) * 30).astype(getattr(ml_dtypes, kind, kind))
    x = np.resize(some, size)
    found = placed(size, dtype, shift)
    library = library_of(x)
    peak = cpu.cast(library.buffer(x), library.buffer(found), E4M3FN, scale=2.0)
    assert peak == np.abs(some.astype(np.float32)).max()
    want = np.clip(some.astype(np.float32) * 2, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    want = want.view(np.uint8) if into == "uint8" else want.astype(dtype)
    same = found.view(np.uint8).reshape(size, -1) == np.resize(want, size).view(np.uint8).reshape(size, -1)
    assert same.all()


@pytest.mark.parametrize(
    "rounding", [mode for mode in Rounding if mode is not Rounding.NEAREST_EVEN], ids=lambda mode: mode.name
)
def test_every_rounding_beyond_the_caches_is_the_reference_s(rounding: Rounding) -> None:
    size = STREAMED // 4 + 1001
    x = np.random.default_rng(2).standard_normal(size).astype(np.float32)
    found, library = placed(size, np.float32, 0), library_of(x)
    cpu.cast(library.buffer(x), library.buffer(found), E5M2, scale=3.0, divisor=3.0, rounding=rounding, seed=4)
    for place in (0, size // 2, size - 5000):
        part = x[place : place + 5000] * np.float32(3)
        want = reference.quantize(part, E5M2, rounding=rounding, seed=4, offset=place) / np.float32(3)
        np.testing.assert_array_equal(found[place : place + 5000], want)


MX = Block(shape=(1, 32), scale=BlockScale.RCEIL)


@pytest.mark.parametrize(
    ("scaling", "upright"),
    [(MX, False), (MX, True), (Block(shape=(1, 128)), False), (Block(shape=(128, 128)), False), (Row(), False)],
    ids=["MX", "MX along columns", "1x128", "128x128", "rows"],
)
@pytest.mark.parametrize("rounding", [Rounding.NEAREST_EVEN, Rounding.STOCHASTIC], ids=lambda mode: mode.name)
@pytest.mark.parametrize("target", ["float32", "bfloat16", "uint8"])
def test_blocks_beyond_the_caches_are_those_of_their_parts(
    scaling: Scaling, upright: bool, target: str, rounding: Rounding
) -> None:
    spec, columns = TensorSpec(E4M3FN, scaling, rounding), 4096
    rows = STREAMED // (columns * (1 if target == "uint8" else 2)) + 256
    some = np.random.default_rng(3).standard_normal((256, columns)).astype(np.float32)
    x = np.concatenate(list(itertools.repeat(some, rows // 256)))
    library, dtype = library_of(x), getattr(ml_dtypes, target, target)
    found, want = placed(x.size, dtype, 0), np.empty(some.size, dtype)
    scales, scales_of_some = np.zeros(x.shape, np.float32), np.zeros(some.shape, np.float32)

    def cast(source: Any, into: Any, scales: Any, offset: int) -> None:
        how: dict[str, Any] = {"upright": upright, "decoded": 0 if target == "uint8" else 2}
        how |= {"seed": 5, "offset": offset}
        matrices.cast_blocks(
            library.buffer(source), library.buffer(into), scales.ctypes.data, source.shape, spec, **how
        )

    cast(x, found, scales, 0)
    whole = found.view(np.uint8).reshape(rows // 256, -1)
    for part in range(rows // 256) if rounding is Rounding.NEAREST_EVEN else (0, 7, rows // 256 - 1):
        cast(some, want, scales_of_some, part * some.size)
        assert (whole[part] == want.view(np.uint8)).all()
