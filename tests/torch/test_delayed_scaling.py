"""Histories and scales, step by step, against a transcription of the update rule that shares no code with Octavo."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

import octavo.torch as ot
from octavo.recipes import FormatPair, Recipe, current_scaling, delayed_scaling

F32_MAX = np.float32(3.4028234663852886e38)


class Slot:
    """One tensor's history and scale, as the update rule is written down: plain NumPy float32."""

    def __init__(self, steps: int, maximum: float) -> None:
        self.history = np.zeros(steps, np.float32)
        self.scale = np.float32(1)
        self.maximum = np.float32(maximum)

    def record(self, amax: float) -> None:
        self.history[0] = max(self.history[0], np.float32(amax))

    def update(self, margin: int, algorithm: str) -> None:
        last = self.history[0]
        if last == 0:
            return
        peak = max(np.max(self.history[1:], initial=np.float32(0)), last) if algorithm == "max" else last
        if len(self.history) > 1:
            self.history = np.concatenate([np.zeros(1, np.float32), self.history[2:], [last]]).astype(np.float32)
        else:
            self.history[0] = 0
        if np.isfinite(peak) and peak > 0:
            with np.errstate(over="ignore"):
                scale = np.float32(self.maximum * np.float32(2.0**-margin)) / peak
            self.scale = scale if np.isfinite(scale) else F32_MAX


def matches(layer: ot.Linear, forward: list[Slot], backward: list[Slot]) -> None:
    for slots, history, scale in (
        (forward, layer.amax_history_forward, layer.scale_forward),
        (backward, layer.amax_history_backward, layer.scale_backward),
    ):
        for column, slot in enumerate(slots):
            np.testing.assert_array_equal(history[:, column].numpy(), slot.history)
            assert scale[column].item() == slot.scale


def step_kind(step: int) -> str:
    """Forty steps with everything mixed in."""
    special = {3: "zeros", 9: "inf", 17: "tiny", 22: "huge"}
    return special.get(step, "no_grad" if step % 7 == 5 else "eval" if step % 11 == 10 else "train")


def batch(kind: str, step: int, part: int) -> torch.Tensor:
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(100 * step + part)) * 2.0 ** (step % 9 - 4)
    if kind == "zeros":
        x.zero_()
    elif kind == "inf":
        x[2, 3] = torch.inf
    elif kind == "tiny":
        x *= 1e-40
    elif kind == "huge":
        x *= 1e30
    return x


@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("steps", [1, 4, 16])
@pytest.mark.parametrize("own_recipe", [False, True], ids=["autocast", "own"])
def test_forty_steps(margin: int, algorithm: str, steps: int, own_recipe: bool) -> None:
    recipe = delayed_scaling(margin=margin, amax_history_len=steps, amax_compute_algo=algorithm)
    layer = ot.Linear(16, 8, recipe=recipe if own_recipe else None)
    forward = [Slot(steps, 448), Slot(steps, 448), Slot(steps, 1)]
    backward = [Slot(steps, 57344), Slot(steps, 1)]
    for step in range(40):
        kind = step_kind(step)
        parts = 1 if own_recipe or step % 5 else 3  # several passes in one autocast: their amaxes accumulate
        x = [batch(kind, step, part) for part in range(parts)]
        grads = [batch("zeros" if kind == "zeros" else "train", 1000 + step, part)[:, :8] for part in range(parts)]
        layer.train(kind != "eval")
        block = nullcontext() if own_recipe else ot.autocast(recipe=recipe)
        with block, torch.no_grad() if kind == "no_grad" else nullcontext():
            ys = [layer(part) for part in x]
        if kind != "no_grad":
            torch.autograd.backward(ys, grads)
        if kind not in ("no_grad", "eval"):
            for part, grad in zip(x, grads, strict=True):
                forward[0].record(part.abs().max().item())
                forward[1].record(layer.weight.detach().abs().max().item())
                backward[0].record(grad.abs().max().item())
            for slot in (*forward, *backward):
                slot.update(margin, algorithm)
        matches(layer, forward, backward)
        with torch.no_grad():
            layer.weight += 0.01 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(step))


def test_output_and_grad_input_have_slots_where_the_recipe_casts_them() -> None:
    from dataclasses import replace

    recipe = delayed_scaling(amax_history_len=2)
    spec = recipe.output.left
    recipe = replace(
        recipe,
        output=replace(recipe.output, result=spec),
        grad_input=replace(recipe.grad_input, result=recipe.grad_input.left),
    )
    layer = ot.Linear(16, 8)
    x = torch.randn(4, 16, requires_grad=True)
    with ot.autocast(recipe=recipe):
        y = layer(x)
    y.sum().backward()
    assert layer.amax_history_forward[-1, 2] > 0
    assert layer.amax_history_backward[-1, 1] > 0


def test_e4m3_everywhere_uses_its_maximum_for_gradients() -> None:
    layer = ot.Linear(4, 4)
    with ot.autocast(recipe=delayed_scaling(fp8_format=FormatPair.E4M3)):
        y = layer(torch.ones(2, 4))
    y.backward(torch.full((2, 4), 7.0))
    assert layer.scale_backward[0].item() == np.float32(448) / np.float32(7)


def test_callable_algorithm_takes_the_plain_path() -> None:
    """It always rolls, zeros included, and its peaks are what the function says."""
    layer = ot.Linear(4, 4, bias=False)
    recipe = delayed_scaling(amax_history_len=3, amax_compute_algo=lambda history: history.amax(0) * 2)
    for amax in (3.0, 0.0):
        with ot.autocast(recipe=recipe):
            layer(torch.full((1, 4), amax))
    assert layer.amax_history_forward[:, 0].tolist() == [0.0, 3.0, 0.0]
    assert layer.scale_forward[0].item() == np.float32(448) / np.float32(6)


def test_nested_autocast_updates_once_on_leaving_the_outermost() -> None:
    layer = ot.Linear(4, 4)
    recipe = delayed_scaling(amax_history_len=4)
    with ot.autocast(recipe=recipe):
        with ot.autocast(recipe=recipe):
            layer(torch.ones(1, 4))
        assert layer.scale_forward[0] == 1
        layer(torch.full((1, 4), 2.0))
    assert layer.amax_history_forward[:, 0].tolist() == [0.0, 0.0, 0.0, 2.0]


def test_an_error_inside_leaves_no_residue() -> None:
    layer = ot.Linear(4, 4)
    recipe = delayed_scaling(amax_history_len=4)

    def interrupted() -> None:
        with ot.autocast(recipe=recipe):
            layer(torch.full((1, 4), 9.0))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert not layer.amax_history_forward.any()
    assert layer.scale_forward.tolist() == [1, 1, 1]
    assert layer(torch.ones(1, 4)).equal(torch.nn.functional.linear(torch.ones(1, 4), layer.weight, layer.bias))


def test_microbatches_share_one_weight_cast() -> None:
    recipe = delayed_scaling(amax_history_len=4)
    layer, twin = ot.Linear(16, 8), ot.Linear(16, 8)
    twin.load_state_dict(layer.state_dict())
    xs = [torch.randn(4, 16) for _ in range(3)]
    with ot.autocast(recipe=recipe):
        ys = [layer(x, is_first_microbatch=i == 0) for i, x in enumerate(xs)]
        expected = [twin(x) for x in xs]
    for y, z in zip(ys, expected, strict=True):
        assert y.equal(z)
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    torch.autograd.backward(expected, [torch.ones_like(y) for y in ys])
    assert layer.weight.grad is not None
    assert layer.weight.grad.equal(twin.weight.grad)


@pytest.mark.parametrize("recipe", [delayed_scaling(amax_history_len=4), current_scaling()], ids=["delayed", "current"])
@pytest.mark.parametrize("own_recipe", [False, True], ids=["autocast", "own"])
def test_a_kept_weight_keeps_its_scale(recipe: Recipe, own_recipe: bool) -> None:
    """Micro-batches in blocks of their own: the weight's scale may move in between, its codes may not."""
    layer = ot.Linear(16, 8, bias=False, recipe=recipe if own_recipe else None)
    with torch.no_grad():
        layer.weight *= 1e-3
    x = torch.randn(4, 16)
    outputs = []
    for first in (True, False, False):
        with nullcontext() if own_recipe else ot.autocast(recipe=recipe):
            outputs.append(layer(x, is_first_microbatch=first))
    exact = torch.nn.functional.linear(x, layer.weight)
    for y in outputs[1:]:
        assert ((y - exact).norm() / (outputs[0] - exact).norm()).item() < 1.5


def test_an_uncast_weight_needs_no_keeping() -> None:
    recipe = Recipe.from_tensors(input=current_scaling().output.left)
    layer, x = ot.Linear(4, 4, recipe=recipe), torch.randn(2, 4)
    assert layer(x, is_first_microbatch=True).equal(layer(x, is_first_microbatch=False))


def test_layers_left_out_of_a_backward_pass_stay_as_they_are() -> None:
    recipe = delayed_scaling(amax_history_len=3, amax_compute_algo=lambda history: history.amax(0))
    used, unused = ot.Linear(4, 4, recipe=recipe), ot.Linear(4, 4, recipe=recipe)
    for layer in (used, unused):
        layer(torch.ones(1, 4)).sum().backward()
    before = unused.amax_history_backward.clone()
    used(torch.ones(1, 4)).sum().backward()
    assert unused.amax_history_backward.equal(before)


def test_microbatch_without_a_kept_weight_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="no call with True came before"), ot.autocast():
        ot.Linear(4, 4)(torch.ones(1, 4), is_first_microbatch=False)


def test_a_block_that_fails_after_its_backward_pass_leaves_nothing_to_the_next() -> None:
    recipe = delayed_scaling(amax_history_len=4)
    layer = ot.Linear(4, 4, recipe=recipe)

    def fails() -> None:
        with ot.autocast(recipe=recipe):
            layer(torch.ones(2, 4)).sum().backward()
            raise RuntimeError("after the backward pass")

    with pytest.raises(RuntimeError, match="after the backward pass"):
        fails()
    before = layer.amax_history_backward.clone()
    with ot.autocast(recipe=recipe):
        y = layer(torch.ones(2, 4))
    assert torch.equal(layer.amax_history_backward, before)
    y.sum().backward()
    assert not torch.equal(layer.amax_history_backward, before)
