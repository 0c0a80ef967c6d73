"""Recipes: which cell of the table casts how, and which tables are refused."""

import dataclasses
from typing import Any

import pytest

import octavo
from octavo.formats import E4M3FN, E5M2, E8M0FNU, FORMATS
from octavo.recipes import (
    NAMED,
    Accumulator,
    FormatPair,
    Gemm,
    Recipe,
    TensorSpec,
    current_scaling,
    delayed_scaling,
    get_recipe,
)
from octavo.rounding import Overflow, Rounding
from octavo.scaling import AmaxAlgorithm, Current, Delayed, Scaling, Unscaled

GEMMS = ("output", "grad_input", "grad_weight")
TENSORS = {
    "input": {("output", "left"), ("grad_weight", "right")},
    "weight": {("output", "right"), ("grad_input", "right")},
    "grad_output": {("grad_input", "left"), ("grad_weight", "left")},
    "output": {("output", "result")},
    "grad_input": {("grad_input", "result")},
    "grad_weight": {("grad_weight", "result")},
}
SPEC = TensorSpec(E4M3FN, Current())


def table(recipe: Recipe) -> list[list[TensorSpec | None]]:
    """The three rows of (left, right, result)."""
    rows = (recipe.output, recipe.grad_input, recipe.grad_weight)
    return [[row.left, row.right, row.result] for row in rows]


def expected_table(scaling: Scaling, backward: octavo.Format) -> list[list[TensorSpec | None]]:
    forward, gradient = TensorSpec(E4M3FN, scaling), TensorSpec(backward, scaling)
    return [[forward, forward, None], [gradient, forward, None], [gradient, forward, None]]


@pytest.mark.parametrize(("pair", "backward"), [(FormatPair.HYBRID, E5M2), (FormatPair.E4M3, E4M3FN)])
def test_the_named_recipes_cast_the_operands_and_leave_the_results(pair: FormatPair, backward: octavo.Format) -> None:
    assert table(delayed_scaling(fp8_format=pair)) == expected_table(Delayed(), backward)
    assert table(current_scaling(fp8_format=pair)) == expected_table(Current(), backward)


def test_the_defaults_are_hybrid_and_unscaled_nearest_even_saturating_cells() -> None:
    assert table(delayed_scaling()) == expected_table(Delayed(), E5M2)
    assert table(current_scaling()) == expected_table(Current(), E5M2)
    spec = TensorSpec(E5M2)
    assert (spec.scaling, spec.rounding, spec.overflow) == (Unscaled(), Rounding.NEAREST_EVEN, Overflow.SATURATE)
    assert Gemm().accumulator is Accumulator.FLOAT32
    assert table(Recipe()) == [[None] * 3] * 3


def test_the_arguments_reach_the_scaling() -> None:
    delayed = delayed_scaling(margin=2, amax_history_len=16, amax_compute_algo="most_recent", reduce_amax=False)
    scaling = Delayed(margin=2, history=16, algorithm=AmaxAlgorithm.MOST_RECENT, reduce=False)
    assert table(delayed) == expected_table(scaling, E5M2)
    assert delayed.delayed == scaling
    current = current_scaling(use_power_2_scales=True, amax_epsilon=1e-6)
    assert table(current) == expected_table(Current(power_of_two=True, epsilon=1e-6), E5M2)
    assert current.delayed is None


def test_the_algorithm_may_be_a_member_its_name_or_a_function() -> None:
    def newest(history: Any) -> Any:
        return history[0]

    for given, kept in ((AmaxAlgorithm.MAX, AmaxAlgorithm.MAX), ("max", AmaxAlgorithm.MAX), (newest, newest)):
        recipe = delayed_scaling(amax_compute_algo=given)
        assert recipe.delayed is not None
        assert recipe.delayed.algorithm == kept


@pytest.mark.parametrize(("misspelt", "meant"), [("most_recnt", "most_recent"), ("mox", "max")])
def test_a_misspelt_algorithm_suggests_the_nearest(misspelt: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"got '{misspelt}'; did you mean '{meant}'") as error:
        delayed_scaling(amax_compute_algo=misspelt)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tensor", TENSORS)
def test_from_tensors_fills_every_cell_of_a_tensor_and_no_other(tensor: str) -> None:
    recipe = Recipe.from_tensors("one", **{tensor: SPEC})
    filled = {(gemm, cell) for gemm, cell, _, spec in recipe.cells() if spec is not None}
    assert filled == TENSORS[tensor]
    assert all(getattr(getattr(recipe, gemm), cell) is SPEC for gemm, cell in filled)
    assert recipe.name == "one"


def test_cells_go_row_by_row_and_name_their_tensors() -> None:
    cells = list(Recipe.from_tensors(weight=SPEC).cells())
    assert [(gemm, cell) for gemm, cell, *_ in cells] == [
        (gemm, cell) for gemm in GEMMS for cell in ("left", "right", "result")
    ]
    for gemm, cell, tensor, spec in cells:
        assert (gemm, cell) in TENSORS[tensor]
        assert spec is (SPEC if tensor == "weight" else None)


def test_one_cell_is_changed_by_replacement() -> None:
    recipe = current_scaling()
    stochastic = TensorSpec(E5M2, Current(), Rounding.STOCHASTIC)
    changed = dataclasses.replace(recipe, grad_weight=dataclasses.replace(recipe.grad_weight, left=stochastic))
    differences = [
        (gemm, cell)
        for (gemm, cell, _, before), (*_, after) in zip(recipe.cells(), changed.cells(), strict=True)
        if before != after
    ]
    assert differences == [("grad_weight", "left")]
    assert changed.grad_weight.left is stochastic
    assert recipe == current_scaling()
    assert changed != recipe
    assert changed.cast_key != recipe.cast_key


def test_a_recipe_is_frozen() -> None:
    recipe = current_scaling()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "mine"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.output.left = None  # type: ignore[misc]


def test_grad_weight_keeps_no_history() -> None:
    delayed = TensorSpec(E5M2, Delayed())
    with pytest.raises(
        ValueError, match=r"mine.grad_weight.result: grad_weight keeps no history.*use scaling="
    ) as error:
        Recipe.from_tensors("mine", grad_weight=delayed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "other",
    [
        TensorSpec(E5M2, Delayed()),
        TensorSpec(E4M3FN, Delayed(margin=1)),
        TensorSpec(E4M3FN, Delayed(), overflow=Overflow.NONE),
    ],
    ids=str,
)
def test_a_tensor_has_one_delayed_scale(other: TensorSpec) -> None:
    forward = TensorSpec(E4M3FN, Delayed())
    with pytest.raises(
        ValueError, match=r"custom.grad_input.right: delayed scaling keeps one scale for weight"
    ) as error:
        Recipe(output=Gemm(right=forward), grad_input=Gemm(right=other))
    assert "\n" not in str(error.value)


def test_a_tensor_may_be_delayed_in_one_cell_and_not_in_another() -> None:
    recipe = Recipe(
        output=Gemm(right=TensorSpec(E4M3FN, Delayed())), grad_input=Gemm(right=TensorSpec(E5M2, Current()))
    )
    assert recipe.delayed == Delayed()


def test_the_tensors_of_a_recipe_share_their_history() -> None:
    with pytest.raises(ValueError, match=r"mine: the tensors of one recipe share their amax history") as error:
        Recipe.from_tensors("mine", input=TensorSpec(E4M3FN, Delayed()), weight=TensorSpec(E4M3FN, Delayed(history=8)))
    assert "\n" not in str(error.value)


EVERY_SPEC = [
    TensorSpec(format, scaling, rounding, overflow)
    for format in FORMATS.values()
    for scaling in (Unscaled(), Current(power_of_two=True), Current(epsilon=0.1 + 0.2))
    for rounding in Rounding
    for overflow in Overflow
]


@pytest.mark.parametrize("recipe", [make() for make in NAMED.values()], ids=list(NAMED))
def test_a_named_recipe_survives_its_cast_key(recipe: Recipe) -> None:
    back = Recipe.from_cast_key(recipe.cast_key)
    assert table(back) == table(recipe)
    assert back.cast_key == recipe.cast_key


def test_every_spec_survives_the_cast_key() -> None:
    for spec in EVERY_SPEC:
        recipe = Recipe.from_tensors(input=spec, grad_weight=spec, output=TensorSpec(E8M0FNU))
        assert table(Recipe.from_cast_key(recipe.cast_key)) == table(recipe)


def test_the_cast_key_says_how_to_cast_and_not_how_scales_are_updated() -> None:
    assert delayed_scaling(margin=3, amax_history_len=4).cast_key == delayed_scaling().cast_key
    assert dataclasses.replace(current_scaling(), name="mine").cast_key == current_scaling().cast_key
    keys = {Recipe.from_tensors(input=spec).cast_key for spec in EVERY_SPEC}
    assert len(keys) == len(EVERY_SPEC)


def test_recipes_and_their_parts_are_hashable() -> None:
    assert hash(delayed_scaling()) == hash(delayed_scaling())
    assert hash(delayed_scaling(amax_compute_algo=max)) == hash(delayed_scaling(amax_compute_algo=max))
    assert len({delayed_scaling(), delayed_scaling(), delayed_scaling(margin=1), current_scaling()}) == 3
    assert len({*EVERY_SPEC, *EVERY_SPEC}) == len(EVERY_SPEC)
    assert len({Gemm(), Gemm(), Gemm(left=SPEC)}) == 2


def test_describe_is_the_table_aligned() -> None:
    assert delayed_scaling().describe() == "\n".join(
        [
            "delayed_scaling",
            "  GEMM         left            right           result",
            "  output       e4m3fn delayed  e4m3fn delayed  -",
            "  grad_input   e5m2 delayed    e4m3fn delayed  -",
            "  grad_weight  e5m2 delayed    e4m3fn delayed  -",
        ]
    )


def test_describe_stays_aligned_whatever_the_cells_hold() -> None:
    long = TensorSpec(E5M2, Current(), Rounding.STOCHASTIC, Overflow.SATURATE_FINITE)
    assert str(long) == "e5m2 current stochastic overflow saturate-finite"
    recipe = Recipe.from_tensors("mine", grad_output=long, weight=TensorSpec(octavo.formats.E2M1FN), output=SPEC)
    title, *lines = recipe.describe().splitlines()
    assert title == "mine"
    starts = [lines[0].index(word) for word in ("GEMM", "left", "right", "result")]
    for line, gemm in zip(lines[1:], GEMMS, strict=True):
        row: Gemm = getattr(recipe, gemm)
        cells = [gemm, *("-" if spec is None else str(spec) for spec in (row.left, row.right, row.result))]
        ends = [*starts[1:], None]
        assert [line[start:end].rstrip() for start, end in zip(starts, ends, strict=True)] == cells
        assert line == line.rstrip()


def test_get_recipe_gives_the_defaults_and_suggests_the_nearest_name() -> None:
    for name, make in NAMED.items():
        assert get_recipe(name) == make()
        assert octavo.get_recipe(name).name == name
    with pytest.raises(
        ValueError, match="no recipe is called 'delayed_scalling'; did you mean 'delayed_scaling'"
    ) as error:
        get_recipe("delayed_scalling")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"no recipe is called 'zzz' \(`octavo recipes` lists them\)"):
        get_recipe("zzz")
