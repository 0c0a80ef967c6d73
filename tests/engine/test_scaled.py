"""The engine's layer casts as `octavo.torch`'s does, in every recipe, and moves its scales alike."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

import octavo.torch as ot
from octavo import engine
from octavo.engine import matrices, scaled
from octavo.recipes import NAMED, Recipe, current_scaling, delayed_scaling, get_recipe
from octavo.scaling import TwoLevel
from octavo.table import Accumulator
from octavo.torch.operands import decoded
from octavo.torch.table import seed_of, table_of

TOKENS, IN, OUT = 24, 48, 32


def _draw(seed: int) -> tuple[npt.NDArray[np.float32], ...]:
    """input, weight [O, I] and grad_output, with numbers of many sizes among them."""
    rng = np.random.default_rng(seed)
    shapes = (TOKENS, IN), (OUT, IN), (TOKENS, OUT)
    return tuple(
        (rng.standard_normal(shape) * np.exp2(rng.integers(-6, 3, shape))).astype(np.float32) for shape in shapes
    )


def _pair(recipe: Recipe) -> tuple[Any, engine.Linear]:
    theirs = ot.Linear(IN, OUT, recipe=recipe)
    ours = engine.Linear(IN, OUT, recipe=recipe)
    with torch.no_grad():
        theirs.bias.copy_(torch.linspace(-1, 1, OUT))
    assert ours.bias is not None
    ours.bias.array[:] = theirs.bias.detach().numpy()
    return theirs, ours


def _one_step(theirs: Any, ours: engine.Linear, seed: int) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """(theirs, ours) of output, grad_input, grad_weight and grad_bias, on the same numbers."""
    x, w, g = _draw(seed)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(w))
    theirs.zero_grad()
    tx = torch.from_numpy(x).requires_grad_()
    ty = theirs(tx)
    ty.backward(torch.from_numpy(g))
    ours.weight.array[:] = w.T
    ours.weight.grad = None
    assert ours.bias is not None
    ours.bias.grad = None
    ex = engine.from_numpy(x.copy(), requires_grad=True)
    ey = ours(ex)
    ey.backward(engine.from_numpy(g))
    engine.update_scales(ours)
    assert ex.grad is not None
    assert ours.weight.grad is not None
    assert ours.bias.grad is not None
    return [
        (ty.detach().numpy(), ey.array),
        (tx.grad.numpy(), ex.grad.array),
        (theirs.weight.grad.numpy(), ours.weight.grad.array.T),
        (theirs.bias.grad.numpy(), ours.bias.grad.array),
    ]


@pytest.mark.parametrize("name", NAMED)
def test_every_recipe_gives_the_gradients_and_scales_of_torch(name: str) -> None:
    theirs, ours = _pair(get_recipe(name))
    assert ours.state is not None
    for seed in range(3):
        for wanted, found in _one_step(theirs, ours, seed):
            # bfloat16 results may fall on either side of a tie where float32 sums run in another order.
            loose = 2.0**-7 if _rounds_results(ours.recipe) else 3e-6
            np.testing.assert_allclose(found, wanted, rtol=0, atol=loose * np.abs(wanted).max())
        for direction, name_ in enumerate(("forward", "backward")):
            np.testing.assert_array_equal(ours.state.scales[direction].array, getattr(theirs, f"scale_{name_}").numpy())
            history = getattr(theirs, f"amax_history_{name_}").numpy()
            np.testing.assert_array_equal(ours.state.histories[direction].array, history)


def _rounds_results(recipe: Recipe | None) -> bool:
    assert recipe is not None
    rows = recipe.output, recipe.grad_input, recipe.grad_weight
    return any(row.result is not None or row.accumulator is Accumulator.BFLOAT16_OUT for row in rows)


_OPERANDS = (
    ("output", "left", "input", lambda x, w, g: x),
    ("output", "right", "weight", lambda x, w, g: w),
    ("grad_input", "left", "grad_output", lambda x, w, g: g),
    ("grad_input", "right", "weight", lambda x, w, g: w.T),
    ("grad_weight", "left", "grad_output", lambda x, w, g: g.T),
    ("grad_weight", "right", "input", lambda x, w, g: x.T),
)
"""GEMM, cell, tensor, and its operand matrix, [rows, contracted]."""


def _operand(ours: engine.Linear, matrix: Any, gemm: str, cell: str, tensor: str, number: int) -> Any:
    """A cell's operand as the engine multiplies it, its scale undone."""
    recipe, state = ours.recipe, ours.state
    assert recipe is not None
    assert state is not None
    spec = getattr(getattr(recipe, gemm), cell)
    if scaled._compiled(recipe):
        own = engine.zeros((1,))
        cast = scaled._cast(engine.from_numpy(matrix), spec, tensor, state, own.address, False)
        scale = own.array[0] if cast.scale == own.address else np.float32(1)
        return cast.values.array * (np.float32(1) / scale)
    run = matrices._Pass(recipe, state, True, 1)
    values, factor = run.operand(matrix, spec, tensor, number)
    return values * np.float32(factor)


@pytest.mark.parametrize("name", NAMED)
def test_every_recipe_gives_the_operands_of_torch_bit_for_bit(name: str) -> None:
    ours = engine.Linear(IN, OUT, recipe=get_recipe(name))
    assert ours.recipe is not None
    table = table_of(ours.recipe.cast_key)
    seed = seed_of(torch.tensor([0, 1]), table)
    tensors = dict(zip(("input", "weight", "grad_output"), _draw(5), strict=True))
    for place, (gemm, cell, tensor, laid) in enumerate(_OPERANDS):
        cast = getattr(getattr(table, gemm), cell)
        if cast is None:
            continue
        theirs = cast(torch.from_numpy(tensors[tensor]), 1.0, seed)
        wanted = decoded(theirs)
        matrix = np.ascontiguousarray(laid(*tensors.values()))
        found = _operand(ours, matrix, gemm, cell, tensor, 3 * (place // 2) + place % 2)
        wanted = (wanted if theirs.last else wanted.t()).numpy()
        # Two scales to an element may be undone in either order.
        rounding = 3e-7 if isinstance(cast.spec.scaling, TwoLevel) else 0
        np.testing.assert_allclose(found, wanted, rtol=rounding, atol=0, err_msg=f"{gemm}.{cell}")


def test_a_delayed_cast_is_that_of_ml_dtypes() -> None:
    """An oracle that shares no code: scale, clip, round."""
    ours = engine.Linear(IN, OUT, recipe=delayed_scaling())
    assert ours.state is not None
    for seed in (1, 2):
        x, w, _ = _draw(seed)
        ours.weight.array[:] = w.T
        scale = ours.state.scales[0].array[0]
        _, values, *_ = scaled._forward(
            engine.from_numpy(x), ours.weight, ours.bias, ours.state.scales[0], ours, True, 1
        )
        clipped = np.clip(x * scale, -448, 448).astype(np.float32)
        np.testing.assert_array_equal(values.array, clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
        engine.update_scales(ours)
        peak = np.abs(_draw(1)[0]).max() if seed == 1 else max(np.abs(_draw(s)[0]).max() for s in (1, 2))
        assert ours.state.scales[0].array[0] == np.float32(448) / peak


def test_micro_batches_merge_their_amaxes() -> None:
    ours = engine.Linear(2, 2, recipe=delayed_scaling(amax_history_len=4))
    assert ours.state is not None
    for size in (3.0, 7.0, 5.0):
        ours(engine.full((2, 2), size)).backward(engine.full((2, 2), size / 10))
    engine.update_scales(ours)
    assert ours.state.histories[0].array[-1, 0] == 7.0
    assert ours.state.scales[0].array[0] == np.float32(448 / 7)
    assert ours.state.histories[1].array[-1, 0] == np.float32(0.7)


def test_testing_moves_no_scale() -> None:
    ours = engine.Linear(4, 3, recipe=delayed_scaling())
    assert ours.state is not None
    ours.training = False
    ours(engine.full((2, 4), 9.0))
    ours.training = True
    with engine.no_grad():
        ours(engine.full((2, 4), 9.0))
    engine.update_scales(ours)
    assert ours.state.scales[0].array.tolist() == [1, 1, 1]


@pytest.mark.parametrize("recipe", [delayed_scaling(), current_scaling()], ids=["delayed", "current"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_leave_scales_as_they_were(recipe: Recipe, bad: float) -> None:
    ours = engine.Linear(4, 3, recipe=recipe)
    assert ours.state is not None
    x = np.ones((2, 4), np.float32)
    x[0, 1] = bad
    out = ours(engine.from_numpy(x))
    assert np.isnan(out.array[0]).all() == np.isnan(bad)
    assert np.isfinite(out.array[1]).all()
    engine.update_scales(ours)
    assert ours.state.scales[0].array[0] == 1


def test_scales_may_not_move_before_the_backward_pass() -> None:
    ours = engine.Linear(4, 3, recipe=delayed_scaling())
    out = ours(engine.full((2, 4), 1.0))
    engine.update_scales(ours)
    with pytest.raises(RuntimeError, match="scaled::linear: scale was changed in place"):
        out.backward(engine.full((2, 3), 1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: engine.Linear(4, 3, weight=engine.zeros((3, 4))),
            r"takes a float32 weight \[4, 3\]; got float32 \[3, 4\]",
        ),
        (
            lambda: engine.Linear(4, 3, recipe=current_scaling())(engine.zeros((2, 5))),
            r"takes float32 \[.., 4\]; got float32",
        ),
        (
            lambda: engine.Linear(4, 3, recipe=current_scaling())(engine.zeros((2, 4), np.float64)),
            r"takes float32 \[.., 4\]; got float64",
        ),
    ],
)
def test_wrong_shapes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_leading_dimensions_are_kept() -> None:
    ours = engine.Linear(4, 3, recipe=delayed_scaling())
    x = engine.from_numpy(np.ones((2, 5, 4), np.float32), requires_grad=True)
    y = ours(x)
    assert y.shape == (2, 5, 3)
    y.backward(engine.full((2, 5, 3), 1.0))
    assert x.grad is not None
    assert x.grad.shape == (2, 5, 4)
