"""Scales against scalar float32 transcriptions of their rules, for NumPy, torch, JAX (eager and jitted) and the compiled update."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from octavo.formats import E2M1FN, E4M3FN, E5M2, FORMATS, Format
from octavo.kernels import scales as kernels_scales
from octavo.scaling import (
    AmaxAlgorithm,
    Block,
    BlockScale,
    Current,
    Delayed,
    Row,
    TwoLevel,
    Unscaled,
    amax_scale,
    e8m0_codes,
    roll_history,
    same_along_both_axes,
    two_level_encode_factor,
    two_level_scale,
    two_level_target,
)

F32 = np.float32
FLT_MAX = F32(3.4028234663852886e38)
SUBNORMAL = 2.0**-149
NAN, INF = math.nan, math.inf
LIBRARIES: dict[str, Callable[[Any], Any]] = {
    "numpy": np.asarray,
    "torch": lambda x: torch.from_numpy(np.array(x)),
    "jax": jnp.asarray,
}
E8M0_RULES = [scale for scale in BlockScale if scale.is_e8m0]
MAXIMA = [448.0, 57344.0, 30.0, 6.0, 2.0**127]


@pytest.fixture(params=LIBRARIES.values(), ids=list(LIBRARIES))
def array(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """Makes a float32 array of one library or another."""
    return lambda values: request.param(np.asarray(values, np.float32))


def divided(numerator: np.float32, denominator: np.float32) -> np.float32:
    """The float32 quotient, FLT_MAX where that is infinite."""
    with np.errstate(over="ignore"):
        ratio = numerator / denominator
    return FLT_MAX if np.isinf(ratio) else ratio


def current_by_the_book(amax: float, maximum: float, power_of_two: bool, epsilon: float) -> np.float32:
    """Current scaling of one amax: A = max(A, eps); 0, Inf and NaN give 1; Inf becomes FLT_MAX; pow2 keeps the exponent alone."""
    peak = F32(amax) if math.isnan(amax) else max(F32(amax), F32(epsilon))
    if peak == 0 or not math.isfinite(peak):
        return F32(1)
    scale = divided(F32(maximum), peak)
    return F32(2.0 ** (math.frexp(float(scale))[1] - 1)) if power_of_two else scale


@pytest.mark.parametrize(
    ("amax", "maximum", "scale", "power_of_two"),
    [
        (3.0, 448.0, F32(149.33333), 128.0),
        (0.0, 448.0, 1.0, 1.0),
        (-0.0, 448.0, 1.0, 1.0),
        (INF, 448.0, 1.0, 1.0),
        (NAN, 448.0, 1.0, 1.0),
        (1e-40, 448.0, FLT_MAX, 2.0**127),
        (SUBNORMAL, 57344.0, FLT_MAX, 2.0**127),
        (448.0, 448.0, 1.0, 1.0),
        (1.0, 57344.0, 57344.0, 32768.0),
        (2.0**127, 448.0, 448.0 / 2.0**127, 2.0**-119),
        (float(FLT_MAX), 448.0, F32(448) / FLT_MAX, 2.0**-120),
    ],
)
def test_current_scales_at_the_edges(
    array: Callable[[Any], Any], amax: float, maximum: float, scale: float, power_of_two: float
) -> None:
    assert float(amax_scale(array(amax), maximum, Current())) == scale
    assert float(amax_scale(array(amax), maximum, Current(power_of_two=True))) == power_of_two


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 0.25, SUBNORMAL])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("maximum", MAXIMA)
def test_current_scales_are_those_of_the_book(
    array: Callable[[Any], Any], maximum: float, power_of_two: bool, epsilon: float
) -> None:
    patterns = np.random.default_rng(1).integers(0, 0x7F800001, 4000, np.uint32).view(np.float32)
    amaxes = np.concatenate(
        [patterns, F32([0, INF, NAN, SUBNORMAL, 2.0**-126, 1e-38, FLT_MAX]), 2.0 ** np.arange(-10, 10, dtype=F32)]
    )
    scales = np.asarray(amax_scale(array(amaxes), maximum, Current(power_of_two=power_of_two, epsilon=epsilon)))
    compiled = [kernels_scales.current_scale(float(amax), maximum, epsilon, power_of_two) for amax in amaxes]
    assert np.array_equal(np.array(compiled), scales)
    expected = np.array([current_by_the_book(float(amax), maximum, power_of_two, epsilon) for amax in amaxes])
    assert scales.dtype == np.float32
    assert np.array_equal(scales, expected)
    assert np.all(scales > 0)
    assert np.all(np.isfinite(scales))
    if power_of_two:
        assert not np.any(scales.view(np.uint32) & np.uint32(0x007FFFFF))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3,), (2, 3)], ids=str)
def test_scales_have_the_library_and_shape_of_their_amaxes(array: Callable[[Any], Any], shape: tuple[int, ...]) -> None:
    amaxes = array(np.full(shape, 3.0))
    for scaling in (Current(), Current(power_of_two=True)):
        scales = amax_scale(amaxes, 448.0, scaling)
        assert isinstance(scales, type(amaxes))
        assert (tuple(scales.shape), scales.dtype) == (shape, amaxes.dtype)


def roll_by_the_book(
    history: list[list[np.float32]], scale: list[np.float32], maxima: list[float], margin: int, algorithm: AmaxAlgorithm
) -> tuple[list[list[np.float32]], list[np.float32]]:
    """One update of delayed scaling, slot by slot: rows are steps, row 0 what was gathered since the last update."""
    rows, scale, steps = [list(row) for row in history], list(scale), len(history)
    for slot, maximum in enumerate(maxima):
        window = [row[slot] for row in history]
        last = window[0]
        if last == 0:
            continue
        peak = last if algorithm is AmaxAlgorithm.MOST_RECENT else NAN if any(map(math.isnan, window)) else max(window)
        shifted = [*window[1:], last]
        shifted[0] = F32(0)
        for step in range(steps):
            rows[step][slot] = shifted[step]
        if math.isfinite(peak) and peak > 0:
            scale[slot] = divided(F32(maximum) * F32(2.0**-margin), peak)
    return rows, scale


def amaxes(generator: np.random.Generator, count: int, largest: float = FLT_MAX) -> npt.NDArray[np.float32]:
    """What tensors report: numbers of any size, and now and then 0, Inf, NaN or a subnormal."""
    x = np.abs(generator.normal(0, 10, count) * 2.0 ** generator.integers(-20, 20, count)).astype(np.float32)
    odd = generator.choice(np.array([0, INF, NAN, SUBNORMAL, 1e-40, largest], np.float32), count)
    return np.where(generator.random(count) < 0.35, odd, x)


def compiled(history: Any, before: Any, maximum: Any, scaling: Delayed) -> tuple[Any, Any]:
    """The compiled update, the next scales in memory of their own."""
    history, kept, scale = history.copy(), before.copy(), np.full_like(before, NAN)
    most_recent = scaling.algorithm is AmaxAlgorithm.MOST_RECENT
    kernels_scales.roll_history(history, before, scale, maximum, 2.0**-scaling.margin, most_recent)
    assert np.array_equal(before, kept)
    return history, scale


def compiled_in_place(history: Any, scale: Any, maximum: Any, scaling: Delayed) -> tuple[Any, Any]:
    """The compiled update, the next scales over the old ones."""
    history, scale = history.copy(), scale.copy()
    kernels_scales.roll_history(
        history, scale, scale, maximum, 2.0**-scaling.margin, scaling.algorithm is AmaxAlgorithm.MOST_RECENT
    )
    return history, scale


UPDATES: dict[str, Callable[[Any, Any, Any, Delayed], tuple[Any, Any]]] = {
    "numpy": roll_history,
    "torch": lambda h, s, m, scaling: tuple(
        x.numpy() for x in roll_history(*map(torch.from_numpy, (h, s, m)), scaling)
    ),
    "compiled": compiled,
    "compiled in place": compiled_in_place,
}


def follow_the_book(
    update: Callable[[Any, Any, Any, Delayed], tuple[Any, Any]], scaling: Delayed, largest: float = FLT_MAX
) -> None:
    generator = np.random.default_rng(scaling.history)
    maxima = np.array([448, 57344, 448, 30, 6, 57344], np.float32)
    history, scale = np.zeros((scaling.history, maxima.size), np.float32), np.ones(maxima.size, np.float32)
    assert isinstance(scaling.algorithm, AmaxAlgorithm)
    for step in range(60):
        history[0] = amaxes(generator, maxima.size, largest)
        expected = roll_by_the_book(
            history.tolist(), scale.tolist(), maxima.tolist(), scaling.margin, scaling.algorithm
        )
        expected_history, expected_scale = (np.array(part, np.float32) for part in expected)
        history, scale = update(history, scale, maxima, scaling)
        assert (history.dtype, scale.dtype) == (np.float32, np.float32)
        assert np.array_equal(history, expected_history, equal_nan=True), step
        assert np.array_equal(scale, expected_scale), step
        assert np.all(scale > 0)
        assert np.all(np.isfinite(scale))


@pytest.mark.parametrize("margin", [0, 1, 3, -2])
@pytest.mark.parametrize("algorithm", list(AmaxAlgorithm), ids=lambda algorithm: algorithm.value)
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("update", UPDATES.values(), ids=list(UPDATES))
def test_delayed_scales_follow_the_book_over_random_sequences(
    update: Callable[[Any, Any, Any, Delayed], tuple[Any, Any]], steps: int, algorithm: AmaxAlgorithm, margin: int
) -> None:
    follow_the_book(update, Delayed(margin=margin, history=steps, algorithm=algorithm))


@pytest.mark.parametrize("margin", [0, 3])
@pytest.mark.parametrize("algorithm", list(AmaxAlgorithm), ids=lambda algorithm: algorithm.value)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("compiler", [lambda update: update, jax.jit], ids=["eager", "jit"])
def test_delayed_scales_follow_the_book_under_jax(
    compiler: Callable[..., Any], steps: int, algorithm: AmaxAlgorithm, margin: int
) -> None:
    """Where XLA flushes subnormals: amaxes may be subnormal, scales (of amaxes near FLT_MAX, with a margin) not."""
    scaling = Delayed(margin=margin, history=steps, algorithm=algorithm)
    update = compiler(lambda history, scale, maximum: roll_history(history, scale, maximum, scaling))

    def in_numpy(history: Any, scale: Any, maximum: Any, _: Delayed) -> tuple[Any, Any]:
        return tuple(np.array(x) for x in update(*map(jnp.asarray, (history, scale, maximum))))  # type: ignore[return-value]

    follow_the_book(in_numpy, scaling, largest=2.0**120)


@pytest.mark.parametrize("update", UPDATES.values(), ids=list(UPDATES))
def test_a_peak_stays_for_as_long_as_the_history_remembers(
    update: Callable[[Any, Any, Any, Delayed], tuple[Any, Any]],
) -> None:
    history, scale = np.zeros((3, 1), np.float32), np.ones(1, np.float32)
    scales = []
    for amax in (7.0, 3.5, 3.5, 3.5, 0.0, 1.75, 1.75, 1.75):
        history[0] = amax
        history, scale = update(history, scale, np.array([448], np.float32), Delayed(history=3))
        scales.append(float(scale[0]))
    assert scales == [64, 64, 64, 128, 128, 128, 128, 256]


@pytest.mark.parametrize("update", UPDATES.values(), ids=list(UPDATES))
def test_an_infinite_amax_freezes_the_scale_until_it_leaves_the_window(
    update: Callable[[Any, Any, Any, Delayed], tuple[Any, Any]],
) -> None:
    for odd in (INF, NAN):
        history, scale = np.zeros((3, 1), np.float32), np.ones(1, np.float32)
        scales = []
        for amax in (7.0, odd, 3.5, 3.5, 3.5):
            history[0] = amax
            history, scale = update(history, scale, np.array([448], np.float32), Delayed(history=3))
            scales.append(float(scale[0]))
        assert scales == [64, 64, 64, 64, 128]


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_function_of_the_history_gives_the_peaks_and_always_rolls(library: str, steps: int) -> None:
    def array(values: Any) -> Any:
        return LIBRARIES[library](np.asarray(values, np.float32))

    def ends(history: Any) -> Any:
        return history[-1] / 2 + history[0] / 2

    generator = np.random.default_rng(9)
    maxima = [448.0, 57344.0, 6.0]
    scaling = Delayed(margin=2, history=steps, algorithm=ends)
    history, scale = array(np.zeros((steps, 3))), array(np.ones(3))
    for step in range(40):
        before, scale_before = np.asarray(history).copy(), np.asarray(scale)
        before[0] = amaxes(generator, 3)
        peaks = ends(before)
        history, scale = roll_history(array(before), scale, array(maxima), scaling)
        rolled = np.vstack([before[1:], before[:1]])
        rolled[0] = 0
        assert np.array_equal(np.asarray(history), rolled, equal_nan=True), step
        for slot, (peak, maximum) in enumerate(zip(peaks, maxima, strict=True)):
            usable = math.isfinite(peak) and peak > 0
            assert scale[slot] == (divided(F32(maximum) / F32(4), peak) if usable else scale_before[slot]), step


def patterns(count: int) -> npt.NDArray[np.float32]:
    """Amaxes of any bits: numbers, subnormals, Inf and NaN of either sign."""
    generator = np.random.default_rng(17)
    subnormal = generator.integers(0, 1 << 24, count // 4, np.uint32)
    special = np.array([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0xFFC00000], np.uint32)
    return np.concatenate([generator.integers(0, 0x7F800000, count, np.uint32), subnormal, special]).view(np.float32)


def everywhere(function: Callable[..., Any], *arguments: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """The function of NumPy arrays, once it has given the same dtype and bits (NaN as a class) with the other libraries."""
    result = function(*arguments)
    for other in (
        function(*map(torch.from_numpy, arguments)).numpy(),
        np.asarray(function(*map(jnp.asarray, arguments))),
        np.asarray(jax.jit(function)(*arguments)),
    ):
        assert other.dtype == result.dtype
        assert np.array_equal(other, result, equal_nan=result.dtype == np.float32)
    return result  # type: ignore[no-any-return]


def test_scales_of_blocks_and_rows_have_the_same_bits_in_each_library() -> None:
    amaxes = patterns(20_000)
    for maximum in (448.0, 57344.0, 6.0):
        for power_of_two, rule in ((False, BlockScale.FLOAT32), (True, BlockScale.POWER_OF_TWO)):
            for epsilon in (0.0, 1e-4, 1e-40):
                own = amax_scale(amaxes, maximum, Current(power_of_two=power_of_two, epsilon=epsilon))
                for scaling in (Row(power_of_two=power_of_two, epsilon=epsilon), Block(scale=rule, epsilon=epsilon)):
                    assert np.array_equal(everywhere(lambda x, m=maximum, s=scaling: amax_scale(x, m, s), amaxes), own)


@pytest.mark.parametrize("rule", E8M0_RULES, ids=lambda rule: rule.value)
@pytest.mark.parametrize("format", [E4M3FN, E5M2, E2M1FN], ids=lambda format: format.name)
def test_e8m0_codes_have_the_same_bits_in_each_library(format: Format, rule: BlockScale) -> None:
    amaxes = patterns(20_000)
    for block in (Block(scale=rule), Block(scale=rule, skip_nan=True)):

        def codes(amax: Any, block: Block = block) -> Any:
            return e8m0_codes(amax, format.max, format.emax, format.mantissa_bits, block)

        result = everywhere(codes, amaxes)
        assert result.dtype == np.int32
        assert result[-3:].tolist() == [254 if block.skip_nan else 255, 255, 255]
        assert np.all(result[np.isfinite(amaxes)] < 255)
        for shape in ((), (0,), (2, 3)):
            assert everywhere(codes, np.full(shape, 3, np.float32)).shape == shape


@pytest.mark.parametrize("format", [f for f in FORMATS.values() if f.signed], ids=lambda format: format.name)
def test_e8m0_codes_are_those_of_the_book(format: Format) -> None:
    """OCP's floor, its ceiling, and the floor of a rounded amax, by the exponents that frexp gives in float64."""
    amaxes = np.concatenate([patterns(3000)[:-3], format.max * 2.0 ** np.arange(-120, 50)]).astype(np.float32)
    expected: dict[BlockScale, list[int]] = {BlockScale.FLOOR: [], BlockScale.CEIL: [], BlockScale.EVEN: []}
    for amax in amaxes.tolist():
        mantissa, exponent = math.frexp(amax)  # in [0.5, 1), so that log2 is in [exponent - 1, exponent)
        floor = exponent - 1 if amax else -1000
        steps = mantissa * 2.0 ** (format.mantissa_bits + 1)
        carries = math.floor(steps + 0.5) == 2 ** (format.mantissa_bits + 1)
        expected[BlockScale.FLOOR].append(floor)
        expected[BlockScale.CEIL].append(floor + (mantissa != 0.5))
        expected[BlockScale.EVEN].append(floor + carries)
    for rule, exponents in expected.items():
        codes = e8m0_codes(amaxes, format.max, format.emax, format.mantissa_bits, Block(scale=rule))
        assert np.array_equal(codes, np.clip(np.array(exponents) - format.emax + 127, 0, 254))


def test_two_level_scales_have_the_same_bits_in_each_library() -> None:
    """Of the tensor: for every amax.  Of blocks: where the tensor's is 2**-100 or more; XLA flushes the subnormals that lie beyond."""
    amaxes = patterns(20_000)
    whole = everywhere(lambda x: two_level_scale(x, 6.0, 448.0), amaxes)
    assert np.all((whole > 0) & np.isfinite(whole))
    assert whole[amaxes.view(np.uint32) == 1].tolist() == [FLT_MAX]
    assert np.all(whole[(amaxes == 0) | ~np.isfinite(amaxes)] == 1)
    tensors = amaxes[(amaxes >= 2.0**-100) & np.isfinite(amaxes)]
    share = np.random.default_rng(2).uniform(0, 1, tensors.size).astype(np.float32)
    scales = two_level_scale(tensors, 6.0, 448.0)
    everywhere(lambda x, s: two_level_target(x, s, 6.0), tensors * share, scales)
    decoded = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    everywhere(two_level_encode_factor, np.resize(decoded, tensors.size), scales)


def test_an_update_leaves_its_arguments_as_they_were(array: Callable[[Any], Any]) -> None:
    history, scale, maximum = array([[4.0, 0.0], [1.0, 2.0]]), array([1.0, 1.0]), array([448.0, 57344.0])
    roll_history(history, scale, maximum, Delayed(history=2))
    assert np.array_equal(np.asarray(history), [[4, 0], [1, 2]])
    assert np.array_equal(np.asarray(scale), [1, 1])


def test_a_power_of_two_scale_never_takes_the_peak_past_the_maximum() -> None:
    peaks = np.abs(np.random.default_rng(3).normal(0, 100, 5000)).astype(np.float32)
    for format in (E4M3FN, E5M2):
        scales = amax_scale(peaks, format.max, Current(power_of_two=True))
        assert np.all(peaks.astype(np.float64) * scales <= format.max)
        assert np.all(peaks.astype(np.float64) * scales > format.max / 2 * (1 - 2.0**-23))


def test_the_float32_maximum_is_ml_dtypes() -> None:
    assert float(ml_dtypes.finfo(np.float32).max) == FLT_MAX


@pytest.mark.parametrize("epsilon", [-1.0, INF, NAN])
def test_epsilon_is_a_finite_floor(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon is a finite floor under amax, 0 or more; got"):
        Current(epsilon=epsilon)


@pytest.mark.parametrize("history", [0, -1])
def test_a_history_holds_at_least_one_amax(history: int) -> None:
    with pytest.raises(ValueError, match=f"a history holds at least 1 amax; got {history}"):
        Delayed(history=history)


def test_an_algorithm_may_be_named_and_a_misspelt_one_suggests_the_nearest() -> None:
    assert Delayed(algorithm="most_recent").algorithm is AmaxAlgorithm.MOST_RECENT
    with pytest.raises(ValueError, match="got 'most_recnt'; did you mean 'most_recent'") as error:
        Delayed(algorithm="most_recnt")
    assert "\n" not in str(error.value)


def test_scalings_are_values() -> None:
    assert Delayed() == Delayed(margin=0, history=1024, algorithm=AmaxAlgorithm.MAX, reduce=True)
    assert (
        len({Unscaled(), Unscaled(), Current(), Current(), Current(power_of_two=True), Delayed(), Delayed(margin=1)})
        == 5
    )


def test_a_block_scale_may_be_named_and_a_misspelt_one_suggests_the_nearest() -> None:
    assert Block(scale="rceil") == Block(scale=BlockScale.RCEIL)
    with pytest.raises(ValueError, match=r"a block's scale is one of .* got 'flor'; did you mean 'floor'") as error:
        Block(scale="flor")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(0, 32), (1,), (1, 2, 3), (1, -4), (1, 1.5), ()], ids=str)
def test_a_block_has_two_sizes(shape: tuple[Any, ...]) -> None:
    for scaling in (Block, TwoLevel):
        with pytest.raises(
            ValueError, match=r"a block's shape is \(across, along\) the contracted axis, each 1 or more"
        ) as error:
            scaling(shape=shape)
        assert repr(shape) in str(error.value)
        assert scaling(shape=[4, 32]).shape == (4, 32)


@pytest.mark.parametrize("rule", E8M0_RULES, ids=lambda rule: rule.value)
def test_an_e8m0_scale_has_no_epsilon(rule: BlockScale) -> None:
    with pytest.raises(
        ValueError, match=f"epsilon is a floor for float32 scales; {rule.value} scales have none: leave it 0"
    ):
        Block(scale=rule, epsilon=1e-12)


@pytest.mark.parametrize("epsilon", [-1.0, INF, NAN])
def test_epsilon_is_a_finite_floor_of_blocks_and_rows_too(epsilon: float) -> None:
    for scaling in (Row, Block):
        with pytest.raises(ValueError, match="epsilon is a finite floor under amax, 0 or more; got"):
            scaling(epsilon=epsilon)


def test_float32_scales_are_no_e8m0_codes() -> None:
    for rule in (BlockScale.FLOAT32, BlockScale.POWER_OF_TWO):
        with pytest.raises(ValueError, match=f"{rule.value} scales are no E8M0 codes; use amax_scale"):
            e8m0_codes(np.ones(1, np.float32), 448.0, 8, 3, Block(scale=rule))


def test_square_blocks_are_the_same_along_both_axes() -> None:
    same = [Unscaled(), Current(), Delayed(), Block(shape=(128, 128)), TwoLevel(shape=(16, 16))]
    assert all(map(same_along_both_axes, same))
    assert not any(map(same_along_both_axes, [Row(), Block(), Block(shape=(2, 128)), TwoLevel()]))
