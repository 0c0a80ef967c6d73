"""Emulated convolutions on the kernels of bfloat16, beside PyTorch's own in float32 on the same casts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octavo.kernels.dots import has_dots
from octavo.recipes import NAMED
from octavo.torch import bilinear_sums, emulate

pytestmark = pytest.mark.skipif(not has_dots(), reason="this processor has no AVX-512 bfloat16 instruction")
NARROW = {"delayed_scaling", "current_scaling", "block_scaling", "mxfp8", "mxfp6", "mxfp4", "direct", "hybrid"}
"""Recipes whose operands bfloat16 holds but for one scale."""


def _passes(recipe: str, layer: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    emulation = emulate(model, recipe)
    found = []
    for _ in range(2):
        input = x.clone().requires_grad_()
        y = model(input)
        y.square().mean().backward()
        found += [y.detach(), input.grad, *(parameter.grad.clone() for parameter in model.parameters())]
        model.zero_grad()
    emulation.remove()
    return found


@pytest.mark.parametrize("recipe", sorted(NAMED))
@pytest.mark.parametrize(
    "settings", [{"padding": 1}, {"stride": 2, "padding": 1, "bias": False}, {"dilation": 2}], ids=str
)
def test_kernels_and_pytorch_agree(recipe: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    x, layer = torch.randn(4, 6, 12, 11), nn.Conv2d(6, 10, 3, **settings)
    calls = []
    kernels = bilinear_sums._convolve
    monkeypatch.setattr(bilinear_sums, "_convolve", lambda *given: calls.append(given) or kernels(*given))
    ours = _passes(recipe, layer, x)
    assert bool(calls) == (recipe in NARROW)
    monkeypatch.setattr(bilinear_sums, "has_dots", lambda: False)
    theirs = _passes(recipe, layer, x)
    # A result that is stored in 8 bits may fall on the other side of a tie, a few steps of the format away at most.
    loose = recipe == "direct"
    for one, other in zip(ours, theirs, strict=True):
        assert torch.linalg.vector_norm(one - other) <= (0.05 if loose else 1e-5) * torch.linalg.vector_norm(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recipe", ["delayed_scaling", "hybrid", "mxfp8"])
def test_narrow_inputs_are_taken_too(recipe: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    x, layer = torch.randn(2, 3, 8, 8).to(dtype), nn.Conv2d(3, 5, 3).to(dtype)
    ours = _passes(recipe, layer, x)
    monkeypatch.setattr(bilinear_sums, "has_dots", lambda: False)
    for one, other in zip(ours, _passes(recipe, layer, x), strict=True):
        assert one.dtype is other.dtype is dtype
        assert torch.linalg.vector_norm((one - other).float()) <= 1e-2 * torch.linalg.vector_norm(other.float())


def test_channels_last_stays_pytorchs() -> None:
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Conv2d(3, 16, 3))
    emulation = emulate(model, "hybrid")
    assert model(x).is_contiguous(memory_format=torch.channels_last)
    emulation.remove()
