"""Recipes: which cell of the table casts how, and which tables are refused."""

import dataclasses
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

import octavo
from octavo.formats import BFLOAT16, E2M1FN, E2M3FN, E3M2FN, E4M3FN, E5M2, E8M0FNU, FLOAT16, FORMATS, TF32
from octavo.recipes import (
    NAMED,
    Accumulator,
    FormatPair,
    Gemm,
    Recipe,
    TensorSpec,
    Transform,
    block_scaling,
    current_scaling,
    delayed_scaling,
    get_recipe,
    mxfp4,
    mxfp6,
    mxfp8,
    nvfp4,
    on_hopper,
)
from octavo.rounding import Overflow, Rounding
from octavo.scaling import AmaxAlgorithm, Block, BlockScale, Current, Delayed, Row, Scaling, TwoLevel, Unscaled

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
SIGNED = [format for format in FORMATS.values() if format.signed]
FLOAT_RULES = [BlockScale.FLOAT32, BlockScale.POWER_OF_TWO]
E8M0_RULES = [BlockScale.RCEIL, BlockScale.FLOOR, BlockScale.CEIL, BlockScale.EVEN]


def table(recipe: Recipe) -> list[list[TensorSpec | None]]:
    """The three rows of (left, right, result)."""
    rows = (recipe.output, recipe.grad_input, recipe.grad_weight)
    return [[row.left, row.right, row.result] for row in rows]


def accumulators(recipe: Recipe) -> list[Accumulator]:
    return [row.accumulator for row in (recipe.output, recipe.grad_input, recipe.grad_weight)]


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


VECTORS, SQUARES = (TensorSpec(E4M3FN, Block(shape=shape)) for shape in ((1, 128), (128, 128)))
PLAIN_VECTORS, PLAIN_SQUARES = (
    TensorSpec(E4M3FN, Block(shape=shape, scale=BlockScale.FLOAT32)) for shape in ((1, 128), (128, 128))
)
MX8, MX6, MX4 = (TensorSpec(f, Block(shape=(1, 32), scale=BlockScale.RCEIL)) for f in (E4M3FN, E3M2FN, E2M1FN))
MX4_GRADIENT = TensorSpec(E2M1FN, Block(shape=(1, 32), scale=BlockScale.RCEIL), Rounding.STOCHASTIC)
NV, NV_SQUARES = (TensorSpec(E2M1FN, TwoLevel(shape=shape)) for shape in ((1, 16), (16, 16)))
NV_GRADIENT = TensorSpec(E2M1FN, TwoLevel(shape=(1, 16)), Rounding.STOCHASTIC)
NV_TURNED = TensorSpec(E2M1FN, TwoLevel(shape=(1, 16)), transform=Transform.HADAMARD)
NV_TURNED_GRADIENT = TensorSpec(
    E2M1FN, TwoLevel(shape=(1, 16)), Rounding.STOCHASTIC, Overflow.SATURATE, Transform.HADAMARD
)
ROWS = TensorSpec(E4M3FN, Row(power_of_two=True, epsilon=1e-12))
WHOLE = TensorSpec(E4M3FN, Current(power_of_two=True, epsilon=1e-12))
DIRECT = TensorSpec(E5M2, Unscaled(), Rounding.NEAREST_EVEN, Overflow.NONE)
DIRECT_GRADIENT = TensorSpec(E5M2, Unscaled(), Rounding.STOCHASTIC, Overflow.NONE)
HYBRID_GRADIENT = TensorSpec(E5M2, Unscaled(), Rounding.STOCHASTIC, Overflow.SATURATE_FINITE)
OWN = TensorSpec(E4M3FN, Current(power_of_two=False, epsilon=0.0))
LATE, LATE_GRADIENT = (
    TensorSpec(format, Delayed(margin=0, history=1024, algorithm=AmaxAlgorithm.MAX, reduce=True))
    for format in (E4M3FN, E5M2)
)
OWN_GRADIENT = TensorSpec(E5M2, Current())
BF16, FP16, TF = (TensorSpec(format, overflow=Overflow.NONE) for format in (BFLOAT16, FLOAT16, TF32))
TABLES: dict[str, list[list[TensorSpec | None]]] = {
    "bf16": [[BF16, BF16, None], [BF16, BF16, None], [BF16, BF16, None]],
    "fp16": [[FP16, FP16, None], [FP16, FP16, None], [FP16, FP16, None]],
    "tf32": [[TF, TF, None], [TF, TF, None], [TF, TF, None]],
    "delayed_scaling": [[LATE, LATE, None], [LATE_GRADIENT, LATE, None], [LATE_GRADIENT, LATE, None]],
    "current_scaling": [[OWN, OWN, None], [OWN_GRADIENT, OWN, None], [OWN_GRADIENT, OWN, None]],
    "block_scaling": [[VECTORS, SQUARES, None], [VECTORS, SQUARES, None], [VECTORS, VECTORS, None]],
    "deepseek": [
        [PLAIN_VECTORS, PLAIN_SQUARES, None],
        [PLAIN_VECTORS, PLAIN_SQUARES, None],
        [PLAIN_VECTORS, PLAIN_VECTORS, None],
    ],
    "mxfp8": [[MX8, MX8, None], [MX8, MX8, None], [MX8, MX8, None]],
    "mxfp6": [[MX6, MX6, None], [MX6, MX6, None], [MX6, MX6, None]],
    "mxfp4": [[MX4, MX4, None], [MX4_GRADIENT, MX4, None], [MX4_GRADIENT, MX4, None]],
    "nvfp4": [[NV, NV_SQUARES, None], [NV_GRADIENT, NV_SQUARES, None], [NV_TURNED_GRADIENT, NV_TURNED, None]],
    "rowwise": [[ROWS, ROWS, None], [ROWS, ROWS, None], [ROWS, ROWS, None]],
    "rowwise_high_precision_grad_weight": [[ROWS, ROWS, None], [ROWS, WHOLE, None], [None, None, None]],
    "direct": [
        [DIRECT, DIRECT, DIRECT],
        [DIRECT_GRADIENT, DIRECT, DIRECT_GRADIENT],
        [DIRECT_GRADIENT, DIRECT, DIRECT_GRADIENT],
    ],
    "hybrid": [[OWN, OWN, None], [HYBRID_GRADIENT, OWN, None], [HYBRID_GRADIENT, OWN, None]],
}


@pytest.mark.parametrize("name", NAMED)
def test_the_cells_of_each_named_recipe(name: str) -> None:
    recipe = NAMED[name]()
    assert recipe.name == name
    assert table(recipe) == TABLES[name]
    assert accumulators(recipe) == [Accumulator.FLOAT32] * 3


def test_the_arguments_of_recipes_of_blocks_reach_their_cells() -> None:
    plain = Block(shape=(1, 128), scale=BlockScale.FLOAT32, epsilon=1e-4)
    recipe = block_scaling(use_power_2_scales=False, amax_epsilon=1e-4)
    assert recipe.output.left == TensorSpec(E4M3FN, plain)
    assert recipe.output.right == TensorSpec(E4M3FN, dataclasses.replace(plain, shape=(128, 128)))
    for scale in E8M0_RULES:
        blocks = Block(shape=(1, 32), scale=scale)
        eights = mxfp8(fp8_format=FormatPair.HYBRID, scale=scale)
        assert table(eights) == expected_table(blocks, E5M2)
        assert mxfp6(format=E2M3FN, scale=scale).grad_weight.left == TensorSpec(E2M3FN, blocks)
        assert mxfp4(scale=scale).output.left == TensorSpec(E2M1FN, blocks)


def test_on_hopper_changes_how_sums_are_made_and_no_cell() -> None:
    fast, split = Accumulator.HOPPER_FAST, Accumulator.HOPPER_SPLIT
    for make in NAMED.values():
        assert accumulators(on_hopper(make())) == [fast, split, split]
        assert accumulators(on_hopper(make(), split_output=True)) == [split] * 3
        assert table(on_hopper(make())) == table(make())
        assert on_hopper(make()).cast_key != make().cast_key


@pytest.mark.parametrize(
    ("spec", "once"),
    [
        (TensorSpec(E4M3FN), True),
        (TensorSpec(E4M3FN, Current()), True),
        (TensorSpec(E4M3FN, Delayed()), True),
        (TensorSpec(E4M3FN, Row()), False),
        (VECTORS, False),
        (SQUARES, True),
        (NV, False),
        (NV_SQUARES, True),
        (dataclasses.replace(NV_SQUARES, transform=Transform.HADAMARD), False),
    ],
    ids=str,
)
def test_one_cast_serves_both_gemms_where_blocks_are_square(spec: TensorSpec, once: bool) -> None:
    assert spec.cast_once is once


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


HADAMARD = TensorSpec(E4M3FN, transform=Transform.HADAMARD)
TALL = TensorSpec(E4M3FN, Block(shape=(128, 1)))
CONTRADICTIONS: list[tuple[dict[str, TensorSpec], str]] = [
    (
        {"weight": TALL},
        "mine.output.right (weight): blocks of shape (128, 1) run across the contracted axis, where no sum could take their scales "
        "out; write shape=(1, 128)",
    ),
    (
        {"grad_output": TensorSpec(E2M1FN, TwoLevel(shape=(16, 1)))},
        "mine.grad_input.left (grad_output): blocks of shape (16, 1) run across the contracted axis, where no sum could take their "
        "scales out; write shape=(1, 16)",
    ),
    (
        {"grad_input": TensorSpec(E8M0FNU, Current())},
        "mine.grad_input.result (grad_input): float8_e8m0fnu holds scales, not tensors; give it a signed format",
    ),
    *(
        (
            {"input": spec},
            "mine.output.left (input): bfloat16 is cast as processors do it; leave scaling, rounding and transform at their defaults "
            "and write overflow=Overflow.NONE",
        )
        for spec in (
            TensorSpec(BFLOAT16),
            TensorSpec(BFLOAT16, Current(), overflow=Overflow.NONE),
            TensorSpec(BFLOAT16, Unscaled(), Rounding.STOCHASTIC, Overflow.NONE),
            TensorSpec(BFLOAT16, overflow=Overflow.NONE, transform=Transform.HADAMARD),
        )
    ),
    (
        {"output": HADAMARD},
        "mine.output.result (output): a result is contracted along no axis; leave its transform NONE",
    ),
    (
        {"weight": HADAMARD},
        "mine.output: left (input) has transform none and right (weight) hadamard, whose product is another; give both operands the "
        "same transform",
    ),
    (
        {"input": HADAMARD, "weight": HADAMARD, "grad_output": SPEC},
        "mine.grad_input: left (grad_output) has transform none and right (weight) hadamard, whose product is another; give both "
        "operands the same transform",
    ),
    (
        {"grad_weight": TensorSpec(E5M2, Delayed())},
        "mine.grad_weight.result: grad_weight keeps no history, so its scale cannot be delayed; use scaling=Current()",
    ),
]


@pytest.mark.parametrize(("tensors", "message"), CONTRADICTIONS, ids=lambda value: next(iter(value), ""))
def test_a_contradiction_names_the_cell_and_the_remedy(tensors: dict[str, TensorSpec], message: str) -> None:
    with pytest.raises(ValueError, match="mine") as error:
        Recipe.from_tensors("mine", **tensors)
    assert str(error.value) == message


def test_a_result_may_have_blocks_of_any_shape() -> None:
    assert Recipe.from_tensors(output=TALL).output.result == TALL


@pytest.mark.parametrize("recipe", [mxfp8, mxfp6, mxfp4])
def test_mx_scales_are_e8m0(recipe: Any) -> None:
    for scale in FLOAT_RULES:
        with pytest.raises(ValueError, match="MX scales are E8M0: RCEIL, FLOOR, CEIL, EVEN; got") as error:
            recipe(scale=scale)
        assert scale.name in str(error.value)
        assert "(block_scaling has float32 scales)" in str(error.value)
    with pytest.raises(ValueError, match="got 'flor'; did you mean 'floor'"):
        recipe(scale="flor")


def test_the_tensors_of_a_recipe_share_their_history() -> None:
    with pytest.raises(ValueError, match=r"mine: the tensors of one recipe share their amax history") as error:
        Recipe.from_tensors("mine", input=TensorSpec(E4M3FN, Delayed()), weight=TensorSpec(E4M3FN, Delayed(history=8)))
    assert "\n" not in str(error.value)


SCALINGS = [
    Unscaled(),
    Current(power_of_two=True),
    Current(epsilon=0.1 + 0.2),
    Row(),
    Row(power_of_two=True, epsilon=1e-12),
    *(Block(shape=(3, 32), scale=scale, padding=False) for scale in BlockScale),
    Block(scale=BlockScale.FLOAT32, epsilon=2.0**-149),
    Block(shape=(1, 1), scale=BlockScale.EVEN, skip_nan=True),
    TwoLevel(),
    TwoLevel(shape=(16, 16), padding=False),
]
EVERY_SPEC = [
    TensorSpec(format, scaling, rounding, overflow)
    for format in SIGNED
    for scaling in SCALINGS
    for rounding in Rounding
    for overflow in Overflow
]


def survives(recipe: Recipe) -> None:
    """The recipe comes back from its cast key, but for its name and how its delayed scales are updated."""
    back = Recipe.from_cast_key(recipe.cast_key)
    assert table(back) == table(recipe)
    assert accumulators(back) == accumulators(recipe)
    assert back.cast_key == recipe.cast_key
    assert hash(back) == hash(recipe)


@pytest.mark.parametrize("recipe", [make() for make in NAMED.values()], ids=list(NAMED))
def test_a_named_recipe_survives_its_cast_key(recipe: Recipe) -> None:
    survives(recipe)
    survives(on_hopper(recipe))


def test_every_spec_survives_the_cast_key() -> None:
    for spec in EVERY_SPEC:
        survives(Recipe.from_tensors(input=spec, grad_weight=spec, output=TensorSpec(E5M2)))
    for format in SIGNED:
        delayed = TensorSpec(format, Delayed(), Rounding.STOCHASTIC, Overflow.NONE)
        survives(Recipe.from_tensors(weight=delayed, grad_output=delayed, output=delayed))


EPSILONS = st.floats(0, 1e30) | st.just(0.0)
SIZES = st.integers(1, 300)
SHAPES = st.tuples(SIZES, SIZES).filter(lambda shape: shape[1] > 1 or shape[0] == 1)
ANY_SCALING = st.one_of(
    st.just(Unscaled()),
    st.builds(Current, power_of_two=st.booleans(), epsilon=EPSILONS),
    st.builds(Row, power_of_two=st.booleans(), epsilon=EPSILONS),
    st.builds(
        Block,
        shape=SHAPES,
        scale=st.sampled_from(FLOAT_RULES),
        epsilon=EPSILONS,
        padding=st.booleans(),
        skip_nan=st.booleans(),
    ),
    st.builds(Block, shape=SHAPES, scale=st.sampled_from(E8M0_RULES), padding=st.booleans(), skip_nan=st.booleans()),
    st.builds(TwoLevel, shape=SHAPES, padding=st.booleans()),
)
ANY_SPEC = st.builds(
    TensorSpec, st.sampled_from(SIGNED), ANY_SCALING, st.sampled_from(Rounding), st.sampled_from(Overflow)
)


@st.composite
def gemms(draw: st.DrawFn) -> Gemm:
    left, right, result = (draw(st.none() | ANY_SPEC) for _ in range(3))
    if left is not None and right is not None and draw(st.booleans()):
        left, right = (dataclasses.replace(spec, transform=Transform.HADAMARD) for spec in (left, right))
    return Gemm(left=left, right=right, result=result, accumulator=draw(st.sampled_from(Accumulator)))


@hypothesis.given(gemms(), gemms(), gemms())
def test_any_table_survives_its_cast_key(output: Gemm, grad_input: Gemm, grad_weight: Gemm) -> None:
    survives(Recipe(name="mine", output=output, grad_input=grad_input, grad_weight=grad_weight))


@hypothesis.given(ANY_SPEC, ANY_SPEC)
def test_different_specs_have_different_cast_keys(one: TensorSpec, other: TensorSpec) -> None:
    keys = [Recipe.from_tensors(input=spec).cast_key for spec in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


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
            "  GEMM         left            right           result  accumulator",
            "  output       e4m3fn delayed  e4m3fn delayed  -       float32",
            "  grad_input   e5m2 delayed    e4m3fn delayed  -       float32",
            "  grad_weight  e5m2 delayed    e4m3fn delayed  -       float32",
        ]
    )
    assert on_hopper(nvfp4()).describe() == "\n".join(
        [
            "nvfp4",
            "  GEMM         left                                       right                           result  accumulator",
            "  output       e2m1fn 1x16 two-level                      e2m1fn 16x16 two-level          -       hopper-fast",
            "  grad_input   e2m1fn 1x16 two-level stochastic           e2m1fn 16x16 two-level          -       hopper-split",
            "  grad_weight  e2m1fn 1x16 two-level hadamard stochastic  e2m1fn 1x16 two-level hadamard  -       hopper-split",
        ]
    )


def test_describe_stays_aligned_whatever_the_cells_hold() -> None:
    long = TensorSpec(E5M2, Current(), Rounding.STOCHASTIC, Overflow.SATURATE_FINITE)
    assert str(long) == "e5m2 current stochastic overflow saturate-finite"
    assert str(TensorSpec(E2M3FN, Row(power_of_two=True))) == "e2m3fn row power-of-two"
    assert str(TensorSpec(E3M2FN, Block(shape=(1, 32), scale=BlockScale.EVEN))) == "e3m2fn 1x32 even"
    recipe = Recipe.from_tensors("mine", grad_output=long, weight=TensorSpec(octavo.formats.E2M1FN), output=SPEC)
    title, *lines = recipe.describe().splitlines()
    assert title == "mine"
    starts = [lines[0].index(word) for word in ("GEMM", "left", "right", "result", "accumulator")]
    for line, gemm in zip(lines[1:], GEMMS, strict=True):
        row: Gemm = getattr(recipe, gemm)
        specs = ("-" if spec is None else str(spec) for spec in (row.left, row.right, row.result))
        cells = [gemm, *specs, row.accumulator.value]
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


@pytest.mark.parametrize(("tensor", "gemm"), [("input", "grad_weight"), ("weight", "grad_input")])
def test_a_delayed_tensor_is_cast_in_the_forward_pass_where_its_amax_is_taken(tensor: str, gemm: str) -> None:
    with pytest.raises(ValueError, match=f"delayed scaling of {tensor} learns from the GEMM output"):
        Recipe(**{gemm: Gemm(right=TensorSpec(E4M3FN, Delayed()))})
