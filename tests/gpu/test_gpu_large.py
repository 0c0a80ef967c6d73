"""Tensors of more than 2**31 elements and bytes: the places where a 32-bit number would wrap, beside `octavo.reference`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from beside_reference import DEVICE, INTERPRETED, MARKS, assert_same, on_host

from octavo import reference
from octavo.formats import E4M3FN, E5M2
from octavo.kernels import cuda
from octavo.rounding import Rounding
from octavo.scaling import Block, Row, TwoLevel
from octavo.table import TensorSpec

NEEDED = 40 << 30
"""Bytes of device memory."""

pytestmark = [
    *MARKS,
    pytest.mark.skipif(
        INTERPRETED or torch.cuda.get_device_properties(0).total_memory < NEEDED, reason="needs a GPU of 40 GB or more"
    ),
]
ROWS, COLUMNS = (1 << 16) + 3, (1 << 15) + 16


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    """bfloat16 [ROWS, COLUMNS], 4.3 GB, its largest magnitude, 300, the last."""
    x = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device=DEVICE).normal_()
    x[-1, -1] = -300
    return x


def slices(size: int) -> list[slice]:
    """Short stretches from start to end, some about the 2**31st element."""
    return [slice(0, 5000), slice(2**31 - 2500, 2**31 + 2500), slice(size - 5000, size)]


@pytest.mark.parametrize(
    "modes", [{}, {"rounding": Rounding.STOCHASTIC, "seed": 3, "offset": 1}], ids=["even", "stochastic"]
)
def test_encode(x: torch.Tensor, modes: dict[str, Any]) -> None:
    flat, codes = x.view(-1), cuda.encode(x, E4M3FN, **modes).view(-1)
    values = cuda.decode(codes, E4M3FN)
    for part in slices(flat.numel()):
        here = {**modes, "offset": modes["offset"] + part.start} if modes else {}
        expected = reference.encode(on_host(flat[part]), E4M3FN, **here)
        assert_same(codes[part], expected)
        assert_same(values[part], reference.decode(expected, E4M3FN))


def test_amax(x: torch.Tensor) -> None:
    assert cuda.amax(x).item() == 300


def test_encode_transposed(x: torch.Tensor) -> None:
    codes, turned, amax = cuda.encode_transposed(x, E5M2)
    assert amax.item() == 300
    assert torch.equal(codes, cuda.encode(x, E5M2))
    assert all(torch.equal(turned[:, i : i + 4096], codes[i : i + 4096].t()) for i in range(0, ROWS, 4096))


@pytest.mark.parametrize("scaling", [Block(), Row(), TwoLevel(), Block(shape=(128, 128))], ids=str)
def test_blocks(x: torch.Tensor, scaling: Any) -> None:
    """The last rows alone, which the reference casts, get what they get in the whole; 128 rows are a multiple of every block's."""
    spec = TensorSpec(E4M3FN, scaling)
    cast = cuda.encode_matrix(x, spec)
    assert cast.amax.item() == 300
    start = ROWS - ROWS % 128 - 128
    last = reference.encode_matrix(on_host(x[start:]), spec)
    assert last.amax == np.float32(300)  # so that two-level scales agree
    assert_same(cast.scales[-last.scales.shape[0] :], last.scales)
    assert_same(cast.codes[start:], last.codes)
    values = cuda.decode_matrix(cast, spec)
    assert_same(values[start:], reference.decode_matrix(last, spec))
