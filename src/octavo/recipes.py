"""The named recipes: each a short function that returns its table (`octavo.table`)."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from octavo.formats import BFLOAT16, E2M1FN, E3M2FN, E4M3FN, E5M2, FLOAT16, TF32, Format
from octavo.names import nearest
from octavo.rounding import Overflow, Rounding
from octavo.scaling import AmaxAlgorithm, Block, BlockScale, Current, Delayed, Row, TwoLevel, Unscaled
from octavo.table import Accumulator, Gemm, Recipe, TensorSpec, Transform

__all__ = [
    "NAMED",
    "Accumulator",
    "FormatPair",
    "Gemm",
    "Recipe",
    "TensorSpec",
    "Transform",
    "bf16",
    "block_scaling",
    "current_scaling",
    "deepseek",
    "delayed_scaling",
    "direct",
    "fp16",
    "get_recipe",
    "hybrid",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "nvfp4",
    "on_hopper",
    "rowwise",
    "rowwise_high_precision_grad_weight",
    "tf32",
]


class FormatPair(enum.Enum):
    """Which formats the forward and the backward tensors take."""

    HYBRID = "hybrid"
    """E4M3FN forward, where precision counts; E5M2 for gradients, where range does."""
    E4M3 = "e4m3"
    """E4M3FN for all."""

    @property
    def forward(self) -> Format:
        """Of input and weight."""
        return E4M3FN

    @property
    def backward(self) -> Format:
        """Of grad_output."""
        return E5M2 if self is FormatPair.HYBRID else E4M3FN


def delayed_scaling(
    *,
    margin: int = 0,
    fp8_format: FormatPair = FormatPair.HYBRID,
    amax_history_len: int = 1024,
    amax_compute_algo: AmaxAlgorithm | str | Callable[[Any], Any] = AmaxAlgorithm.MAX,
    reduce_amax: bool = True,
) -> Recipe:
    """Transformer Engine's DelayedScaling: per-tensor scales from the amaxes of earlier steps, so a cast reads memory once.

    margin: the scale is divided by 2**margin; amax_history_len: steps remembered; amax_compute_algo: "max", "most_recent" or a
    function from the history [steps, tensors] to peaks [tensors]; reduce_amax: take the maximum over all ranks.
    """
    algorithm = amax_compute_algo if callable(amax_compute_algo) else AmaxAlgorithm(amax_compute_algo)
    scaling = Delayed(margin=margin, history=amax_history_len, algorithm=algorithm, reduce=reduce_amax)
    forward, backward = TensorSpec(fp8_format.forward, scaling), TensorSpec(fp8_format.backward, scaling)
    return Recipe.from_tensors("delayed_scaling", input=forward, weight=forward, grad_output=backward)


def current_scaling(
    *,
    fp8_format: FormatPair = FormatPair.HYBRID,
    use_power_2_scales: bool = False,
    amax_epsilon: float = 0.0,
) -> Recipe:
    """Transformer Engine's Float8CurrentScaling: per-tensor scales from each tensor's own amax, nothing remembered.

    use_power_2_scales: round scales down to powers of two; amax_epsilon: a floor under amax.
    """
    scaling = Current(power_of_two=use_power_2_scales, epsilon=amax_epsilon)
    forward, backward = TensorSpec(fp8_format.forward, scaling), TensorSpec(fp8_format.backward, scaling)
    return Recipe.from_tensors("current_scaling", input=forward, weight=forward, grad_output=backward)


def _with_accumulators(recipe: Recipe, *, output: Accumulator, gradients: Accumulator) -> Recipe:
    """The recipe with one accumulator for the GEMM `output` and one for the two of the backward pass."""
    return replace(
        recipe,
        output=replace(recipe.output, accumulator=output),
        grad_input=replace(recipe.grad_input, accumulator=gradients),
        grad_weight=replace(recipe.grad_weight, accumulator=gradients),
    )


def on_hopper(recipe: Recipe, *, split_output: bool = False) -> Recipe:
    """The recipe with the sums that Hopper's tensor cores give it: fast in `output`, split in the gradients, as its libraries choose.

    split_output: split there too, as recipes of blocks do.
    """
    output = Accumulator.HOPPER_SPLIT if split_output else Accumulator.HOPPER_FAST
    return _with_accumulators(recipe, output=output, gradients=Accumulator.HOPPER_SPLIT)


def block_scaling(*, use_power_2_scales: bool = True, amax_epsilon: float = 0.0) -> Recipe:
    """Transformer Engine's Float8BlockScaling: E4M3 throughout, 1x128 blocks of input and grad_output, 128x128 of weight.

    use_power_2_scales: round scales down to powers of two; amax_epsilon: a floor under amax.
    """
    scale = BlockScale.POWER_OF_TWO if use_power_2_scales else BlockScale.FLOAT32
    vectors = TensorSpec(E4M3FN, Block(shape=(1, 128), scale=scale, epsilon=amax_epsilon))
    squares = TensorSpec(E4M3FN, Block(shape=(128, 128), scale=scale, epsilon=amax_epsilon))
    return Recipe.from_tensors("block_scaling", input=vectors, weight=squares, grad_output=vectors)


def deepseek() -> Recipe:
    """DeepSeek-V3's: as `block_scaling`, with scales that are any float32 (arXiv 2412.19437, section 3.3)."""
    return replace(block_scaling(use_power_2_scales=False), name="deepseek")


def mxfp8(*, fp8_format: FormatPair = FormatPair.E4M3, scale: BlockScale = BlockScale.RCEIL) -> Recipe:
    """OCP MXFP8: 1x32 blocks along the contracted axis with E8M0 scales, E4M3 for all tensors by default.

    scale: an E8M0 rule; RCEIL is NVIDIA's (arXiv 2506.08027), FLOOR that of the OCP specification.
    """
    blocks = Block(shape=(1, 32), scale=_e8m0(scale))
    forward, backward = TensorSpec(fp8_format.forward, blocks), TensorSpec(fp8_format.backward, blocks)
    return Recipe.from_tensors("mxfp8", input=forward, weight=forward, grad_output=backward)


def mxfp6(*, format: Format = E3M2FN, scale: BlockScale = BlockScale.RCEIL) -> Recipe:
    """OCP MXFP6: 1x32 blocks with E8M0 scales, E3M2 for all tensors by default (Rouhani et al., arXiv 2310.10537)."""
    spec = TensorSpec(format, Block(shape=(1, 32), scale=_e8m0(scale)))
    return Recipe.from_tensors("mxfp6", input=spec, weight=spec, grad_output=spec)


def mxfp4(*, scale: BlockScale = BlockScale.RCEIL) -> Recipe:
    """OCP MXFP4: 1x32 blocks of E2M1 with E8M0 scales; grad_output is rounded stochastically, so that gradients stay unbiased."""
    spec = TensorSpec(E2M1FN, Block(shape=(1, 32), scale=_e8m0(scale)))
    gradient = replace(spec, rounding=Rounding.STOCHASTIC)
    return Recipe.from_tensors("mxfp4", input=spec, weight=spec, grad_output=gradient)


def _e8m0(scale: BlockScale) -> BlockScale:
    scale = BlockScale(scale)
    if not scale.is_e8m0:
        names = ", ".join(rule.name for rule in BlockScale if rule.is_e8m0)
        raise ValueError(f"MX scales are E8M0: {names}; got {scale.name} (block_scaling has float32 scales)")
    return scale


def nvfp4() -> Recipe:
    """NVIDIA's NVFP4: E2M1 under two levels of scales, 1x16 blocks, 16x16 of weight.

    grad_output is rounded stochastically; in grad_weight both operands have the random Hadamard transform.  Source: Transformer
    Engine's recipe; arXiv 2509.25149, which keeps some layers in high precision (`convert`'s exempt).
    """
    vectors = TensorSpec(E2M1FN, TwoLevel(shape=(1, 16)))
    gradient = replace(vectors, rounding=Rounding.STOCHASTIC)
    squares = TensorSpec(E2M1FN, TwoLevel(shape=(16, 16)))
    turned = Gemm(
        left=replace(gradient, transform=Transform.HADAMARD), right=replace(vectors, transform=Transform.HADAMARD)
    )
    recipe = Recipe.from_tensors("nvfp4", input=vectors, weight=squares, grad_output=gradient)
    return replace(recipe, grad_weight=turned)


def rowwise() -> Recipe:
    """torchao's rowwise: E4M3, one power-of-two scale for each row along the contracted axis."""
    spec = TensorSpec(E4M3FN, Row(power_of_two=True, epsilon=1e-12))
    return Recipe.from_tensors("rowwise", input=spec, weight=spec, grad_output=spec)


def rowwise_high_precision_grad_weight() -> Recipe:
    """torchao's rowwise_with_gw_hp: as `rowwise`, grad_weight in high precision, and in grad_input one scale for the weight."""
    weight = TensorSpec(E4M3FN, Current(power_of_two=True, epsilon=1e-12))
    recipe = rowwise()
    grad_input = replace(recipe.grad_input, right=weight)
    return replace(recipe, name="rowwise_high_precision_grad_weight", grad_input=grad_input, grad_weight=Gemm())


def direct() -> Recipe:
    """Intel's direct: E5M2 for all six tensors, unscaled; gradients are rounded stochastically (arXiv 1905.12334).

    Finite overflow becomes Inf: gradients are meant to be multiplied by a loss scale that backs off when it meets one.
    """
    forward = TensorSpec(E5M2, Unscaled(), overflow=Overflow.NONE)
    gradient = replace(forward, rounding=Rounding.STOCHASTIC)
    return Recipe.from_tensors(
        "direct",
        input=forward,
        weight=forward,
        grad_output=gradient,
        output=forward,
        grad_input=gradient,
        grad_weight=gradient,
    )


def hybrid() -> Recipe:
    """Intel's hybrid: input and weight in E4M3 by their own amax, grad_output in unscaled E5M2 rounded stochastically.

    Only what enters a GEMM is cast; Inf in a gradient stays Inf (arXiv 2209.05433, section 2).
    """
    forward = TensorSpec(E4M3FN, Current())
    gradient = TensorSpec(E5M2, Unscaled(), Rounding.STOCHASTIC, Overflow.SATURATE_FINITE)
    return Recipe.from_tensors("hybrid", input=forward, weight=forward, grad_output=gradient)


def _in(format: Format) -> Recipe:
    """Operands rounded to a wider format and multiplied exactly, float32 sums: what a tensor core of that format returns."""
    spec = TensorSpec(format, Unscaled(), overflow=Overflow.NONE)
    return Recipe.from_tensors(format.name, input=spec, weight=spec, grad_output=spec)


def bf16() -> Recipe:
    """bfloat16 operands, float32 sums."""
    return replace(_in(BFLOAT16), name="bf16")


def fp16() -> Recipe:
    """float16 operands, float32 sums; gradients below 2**-25 vanish, so scale the loss (`torch.amp.GradScaler`)."""
    return replace(_in(FLOAT16), name="fp16")


def tf32() -> Recipe:
    """Operands with 10 bits of mantissa and float32's range, float32 sums: NVIDIA's TF32."""
    return _in(TF32)


NAMED: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        recipe.__name__: recipe
        for recipe in (
            delayed_scaling,
            current_scaling,
            block_scaling,
            deepseek,
            mxfp8,
            mxfp6,
            mxfp4,
            nvfp4,
            rowwise,
            rowwise_high_precision_grad_weight,
            direct,
            hybrid,
            bf16,
            fp16,
            tf32,
        )
    }
)
"""The named recipes, each with its defaults."""


def get_recipe(name: str) -> Recipe:
    """The named recipe with its defaults.  Raises ValueError, with the nearest name, where there is none."""
    if name not in NAMED:
        raise ValueError(f"no recipe is called {name!r}{nearest(name, NAMED)} (`octavo recipes` lists them)")
    return NAMED[name]()
