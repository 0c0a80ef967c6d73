"""The casts of emulated convolutions and batches of matrices on the GPU beside the CPU's, bit for bit; and a whole emulated step."""

from __future__ import annotations

import copy

import pytest
import torch
from beside_reference import DEVICE, INTERPRETED, MARKS, assert_same
from torch import nn

from octavo.recipes import NAMED
from octavo.torch import emulate
from octavo.torch.layouts import as_it_lies, cast_tensor, cells_of, matrix_on_cpu, matrix_on_device, whole_on_device
from octavo.torch.operands import Cast

pytestmark = MARKS


def cells() -> list[object]:
    """One cast for each spec of the named recipes."""
    found: dict[str, object] = {}
    for name, make in NAMED.items():
        for cast in cells_of(make().cast_key).casts:
            if cast is not None and cast.spec.format.bits <= 8:
                found.setdefault(str(cast.spec), pytest.param(cast, id=f"{name}: {cast.spec}"))
    return list(found.values())


@pytest.mark.parametrize("cast", cells())
def test_a_cast_has_the_bits_of_the_cpu(cast: Cast) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 5, 37, generator=generator) * torch.exp(4 * torch.randn(3, 5, 37, generator=generator))
    delayed, seed = torch.tensor([0.75]), (7 << 32) + 5
    if cast.whole and cast.spec.transform.value == "none":
        ours = cast_tensor(x, cast, as_it_lies(3), 0.75, seed)
        theirs = whole_on_device(x.to(DEVICE), cast, delayed.to(DEVICE), seed, False)
        assert_same(theirs.values, ours.values.numpy())
        assert float(theirs.amax) == ours.amax
        assert float(theirs.scale) == ours.scale
        return
    matrix = x.reshape(-1, 37)
    values, amax = matrix_on_cpu(matrix, cast, 0.75, seed)
    found, peak = matrix_on_device(matrix.to(DEVICE), cast, delayed.to(DEVICE), seed)
    assert_same(found, values.numpy())
    assert float(peak) == amax


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs kernels, not models")
@pytest.mark.parametrize("name", NAMED)
def test_an_emulated_step_on_the_gpu_is_near_the_cpus(name: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 64, 10)
    )
    x, y = torch.randn(16, 1, 12, 12), torch.randint(0, 10, (16,))
    losses, gradients = [], []
    for device in ("cpu", DEVICE):
        own = copy.deepcopy(model).to(device)
        with emulate(own, name, loss_scale=1024.0) as emulation:
            loss = nn.functional.cross_entropy(own(x.to(device)), y.to(device))
            emulation.scale(loss).backward()
        losses.append(loss.item())
        gradients.append(own[5].weight.grad.cpu())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert torch.nn.functional.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.98
