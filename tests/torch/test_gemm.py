"""Products of bfloat16 operands with float32 sums, by each of the processor's ways to multiply them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from octavo.torch import gemm

SIZES = [
    (1, 1, 1),
    (7, 5, 13),
    (33, 65, 129),
    (128, 256, 784),
    (64, 128, 2050),
    (1100, 70, 48),
    (16, 16, 16),
    (3, 200, 1),
]


@pytest.fixture(params=["oneMKL", "tiles", "float32"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each way that this processor has; oneMKL's needs no AMX to be right."""
    has = torch.cpu.get_capabilities()
    units = {"oneMKL": gemm.by_onemkl, "tiles": gemm.by_tiles, "float32": lambda: None}[request.param]()
    if request.param == "tiles" and not has.get("avx512_bf16", False):
        pytest.skip("this processor has no bfloat16 products in AVX-512")
    if units is None and request.param != "float32":
        pytest.skip(f"this PyTorch brings no bfloat16 product of {request.param}")
    monkeypatch.setattr(gemm, "units", lambda: units)
    before = torch.get_num_threads()
    yield request.param
    torch.set_num_threads(before)


def integers(*shape: int) -> torch.Tensor:
    """Whole numbers whose products and sums are exact in float32, in any order."""
    return torch.randint(-16, 17, shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_exact_sums_come_out_exact(
    way: str, size: tuple[int, int, int], a_transposed: bool, b_transposed: bool
) -> None:
    m, n, k = size
    a, b = integers(*((k, m) if a_transposed else (m, k))), integers(*((n, k) if b_transposed else (k, n)))
    bias = torch.arange(n) - 3.0
    exact = (a.double().t() if a_transposed else a.double()) @ (b.double().t() if b_transposed else b.double())
    for threads in (1, 2):
        torch.set_num_threads(threads)
        turns = {"a_transposed": a_transposed, "b_transposed": b_transposed}
        assert torch.equal(gemm.matmul(a, b, **turns), exact.float())
        assert torch.equal(gemm.matmul(a, b, **turns, factor=0.25, bias=bias), (exact / 4 + bias).float())


def test_the_bits_do_not_depend_on_the_threads(way: str) -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 1500, generator=draw).bfloat16(), torch.randn(1500, 257, generator=draw).bfloat16()
    outputs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outputs.append(gemm.matmul(a, b))
    assert way != "tiles" or torch.equal(*outputs)
    torch.testing.assert_close(outputs[1].double(), a.double() @ b.double(), rtol=1e-4, atol=1e-3)


def test_rows_apart_in_memory(way: str) -> None:
    wide = integers(40, 100)
    a, b = wide[:, 3:33], integers(30, 20)
    assert torch.equal(gemm.matmul(a, b), (a.double() @ b.double()).float())
    assert torch.equal(
        gemm.matmul(a, integers(40, 20), a_transposed=True), (a.double().t() @ integers(40, 20).double()).float()
    )


def test_nan_and_infinity_stay_in_their_rows(way: str) -> None:
    a, b = integers(4, 9), integers(9, 6)
    a[1, 8], a[2, 0] = torch.nan, torch.inf
    b[0] = 1
    found = gemm.matmul(a, b)
    assert found[1].isnan().all()
    assert found[2].isinf().all()
    assert torch.equal(found[[0, 3]], (a.double() @ b.double()).float()[[0, 3]])
