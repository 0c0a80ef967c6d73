"""Convolutions of bfloat16 images against PyTorch's in float64: every sum exact, so that they agree to the bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo import reference
from octavo.formats import E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ
from octavo.kernels import cpu
from octavo.kernels.convolution_plan import Geometry
from octavo.kernels.dots import has_dots
from octavo.rounding import Overflow

pytestmark = pytest.mark.skipif(not has_dots(), reason="this processor has no AVX-512 bfloat16 instruction")


def _geometries(count: int) -> list[Geometry]:
    draw, found = random.Random(0), list[Geometry]()
    while len(found) < count:
        pairs = [
            tuple(draw.randint(low, high) for _ in range(2)) for low, high in ((4, 36), (1, 5), (1, 3), (0, 4), (1, 3))
        ]
        geometry = Geometry(*pairs)
        if min(geometry.output) > 0:
            found.append(geometry)
    return found


GEOMETRIES = [
    Geometry((28, 28), (3, 3), (1, 1), (1, 1), (1, 1)),
    Geometry((28, 28), (3, 3), (2, 2), (1, 1), (1, 1)),
    Geometry((14, 14), (1, 1), (2, 2), (0, 0), (1, 1)),
    Geometry((7, 7), (7, 7), (1, 1), (0, 0), (1, 1)),
    Geometry((1, 50), (1, 5), (1, 1), (0, 2), (1, 1)),
    *_geometries(40),
]


def _whole(*shape: int, seed: int) -> Tensor:
    """Small whole numbers: their products and sums are exact in float32, in whatever order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _bits(weight: Tensor) -> np.ndarray[Any, Any]:
    return weight.flatten(2).view(torch.int16).numpy().view(np.uint16)


def _image(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.element_size()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("samples", "channels", "results"), [(1, 1, 1), (3, 5, 9), (5, 16, 16)])
def test_all_three_equal_float64(geometry: Geometry, samples: int, channels: int, results: int) -> None:
    from octavo.kernels import convolution

    x, w = _whole(samples, channels, *geometry.size, seed=1), _whole(results, channels, *geometry.kernel, seed=2)
    exact_x, exact_w = x.double().requires_grad_(), w.double().requires_grad_()
    exact = torch.nn.functional.conv2d(exact_x, exact_w, None, geometry.stride, geometry.padding, geometry.dilation)
    g, bias = _whole(*exact.shape, seed=3), _whole(results, seed=4).float()
    exact.backward(g.double())
    sizes = geometry, samples, channels, results
    y, grad_x = torch.full(exact.shape, torch.nan), torch.full(x.shape, torch.nan)
    for image, grad in ((x, g), (x.float(), g.float())):
        convolution.convolution(*sizes)(_image(image), _bits(w), y.data_ptr(), 0.5, bias.data_ptr(), None)
        assert torch.equal(y.double(), exact.detach() * 0.5 + bias.double()[:, None, None])
        convolution.grad_input(*sizes)(_image(grad), _bits(w), grad_x.data_ptr(), 2.0, None)
        assert exact_x.grad is not None
        assert torch.equal(grad_x.double(), exact_x.grad * 2)
        grad_w = convolution.grad_weight(*sizes)(_image(grad), _image(image), 0.25)
        assert exact_w.grad is not None
        assert torch.equal(torch.from_numpy(grad_w).double(), exact_w.grad.flatten(2) / 4)


def test_bits_do_not_depend_on_threads() -> None:
    from octavo.kernels import convolution

    torch.manual_seed(0)
    geometry, sizes = GEOMETRIES[0], (64, 16, 16)
    x, g, w = torch.randn(64, 16, 28, 28).bfloat16(), torch.randn(64, 16, 28, 28).bfloat16(), torch.randn(16, 16, 3, 3)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, grad_x, bits = torch.empty(x.shape), torch.empty(x.shape), _bits(w.bfloat16())
            convolution.convolution(geometry, *sizes)(_image(x), bits, y.data_ptr(), 1.0, 0, None)
            convolution.grad_input(geometry, *sizes)(_image(g), bits, grad_x.data_ptr(), 1.0, None)
            grad_w = torch.from_numpy(convolution.grad_weight(geometry, *sizes)(_image(g), _image(x), 1.0))
            found.append((y, grad_x, grad_w))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("format", [E4M3FN, E5M2, E4M3FNUZ, E5M2FNUZ], ids=lambda format: format.name)
@pytest.mark.parametrize("overflow", Overflow)
def test_results_are_rounded_as_the_reference_rounds_them(format: Any, overflow: Overflow) -> None:
    from octavo.kernels import convolution

    geometry = Geometry((28, 14), (1, 1), (1, 1), (0, 0), (1, 1))
    x = (torch.randn(2, 1, 28, 14, generator=torch.Generator().manual_seed(0)) * 3).exp().bfloat16()
    x[0, 0, 0, :8] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-30, 3e38, -3e38])
    x[1] *= torch.where(torch.rand(28, 14) < 0.5, -1, 1)
    y, one = torch.full((2, 1, 28, 14), torch.nan), np.array([[[0x3F80]]], np.uint16)
    mode = cpu.nearest_words(format, overflow)
    run = convolution.convolution(geometry, 2, 1, 1)
    assert np.isnan(run(_image(x), one, y.data_ptr(), 1.0, 0, mode))
    # A sum begins at +0, so that none is -0 but for what is rounded to it.
    values = (x.float() + 0.0).numpy()
    expected = reference.quantize(values, format, overflow=overflow)
    np.testing.assert_array_equal(y.numpy(), expected)
    there = ~np.isnan(expected)  # the sign of a NaN is the processor's
    np.testing.assert_array_equal(np.signbit(y.numpy())[there], np.signbit(expected)[there])
    finite = torch.nan_to_num(x.float(), 1.0, 1.0, 1.0).bfloat16()
    assert run(_image(finite), one, y.data_ptr(), 0.5, 0, mode) == float(finite.float().abs().max()) / 2


def test_products_smaller_than_normal_numbers_are_zero() -> None:
    from octavo.kernels import convolution

    geometry = Geometry((1, 1), (1, 1), (1, 1), (0, 0), (1, 1))
    x, w = torch.full((1, 1, 1, 1), 2.0**-100).bfloat16(), torch.full((1, 1, 1, 1), 2.0**-30).bfloat16()
    y = torch.full((1, 1, 1, 1), torch.nan)
    convolution.convolution(geometry, 1, 1, 1)(_image(x), _bits(w), y.data_ptr(), 1.0, 0, None)
    assert y.item() == 0.0
