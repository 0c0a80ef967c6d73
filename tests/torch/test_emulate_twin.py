"""Emulated products beside twins that cast by hand and multiply in float64: a small network in every named recipe, and each function."""

from __future__ import annotations

import itertools
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo import recipes, reference
from octavo.recipes import NAMED, Recipe, TensorSpec, Transform
from octavo.scaling import Block, BlockScale, Current, Delayed, Row, TwoLevel, Unscaled, amax_scale
from octavo.torch.emulate import Emulation, emulate

Array = npt.NDArray[Any]
Axes = tuple[int, tuple[int, ...]]
"""The contracted axis of an operand, and those of which each place is a matrix of its own."""
STEPS = 3


@dataclass(frozen=True, kw_only=True)
class ByHand:
    """A product that is bilinear in float64 tensors left and right, and how its operands lie in the GEMMs that they enter."""

    run: Callable[[Tensor, Tensor], Tensor]
    left: tuple[Axes, Axes]
    """In `output`, in `grad_weight`."""
    right: tuple[Axes, Axes]
    """In `output`, in `grad_input`."""
    grad: tuple[Axes, Axes]
    """In `grad_input`, in `grad_weight`."""


@dataclass(kw_only=True)
class Drawn:
    """What casts of one pass of a site go by: seed and step of its draws, and delayed scales by the name of the tensor."""

    site: str
    step: int
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return zlib.crc32(self.site.encode()) << 32 | self.step


def convolution(rank: int, **settings: Any) -> ByHand:
    """Of [N, I, S...] and [O, I, s...]: channels are contracted, and samples for the gradient of the weight."""
    conv: Callable[..., Tensor] = getattr(F, f"conv{rank}d")
    places, left, grad = tuple(range(2, rank + 2)), ((1, ()), (0, ())), ((1, ()), (0, ()))
    return ByHand(run=lambda x, w: conv(x, w, **settings), left=left, right=((1, places), (0, places)), grad=grad)


def grouped_convolution(rank: int, *, transposed: bool, **settings: Any) -> ByHand:
    """Of [N, 2, I, S...] and [2, O, I, s...], transposed [2, I, O, s...]: two groups, each of which contracts its own channels."""
    conv: Callable[..., Tensor] = getattr(F, f"conv_transpose{rank}d" if transposed else f"conv{rank}d")
    matrices, left, grad = (*range(3, rank + 3), 0), ((2, ()), (0, ())), ((2, ()), (0, ()))
    output, grad_input = (1, 2) if transposed else (2, 1)

    def run(x: Tensor, w: Tensor) -> Tensor:
        y: Tensor = conv(x.flatten(1, 2), w.flatten(0, 1), groups=2, **settings)
        return y.reshape(y.shape[0], 2, -1, *y.shape[2:])

    return ByHand(run=run, left=left, right=((output, matrices), (grad_input, matrices)), grad=grad)


LINEAR = ByHand(run=lambda x, w: x @ w.T, left=((1, ()), (0, ())), right=((1, ()), (0, ())), grad=((1, ()), (0, ())))
"""Of [T, I] and [O, I]."""
_ALONG, _TURNED = (2, (0,)), (1, (0,))
MATRICES = ByHand(run=lambda a, b: a @ b.mT, left=(_ALONG, _TURNED), right=(_ALONG, _TURNED), grad=(_ALONG, _TURNED))
"""Of [B, M, K] and [B, N, K]."""


def scale_by_hand(x: Array, spec: TensorSpec, delayed: float) -> float:
    match spec.scaling:
        case Current() as current:
            peak = np.abs(x).max(initial=0).astype(np.float32)
            return float(amax_scale(peak.reshape(1), spec.format.max, current)[0])
        case Delayed():
            return delayed
        case _:
            return 1.0


def cast_by_hand(
    x: Array, spec: TensorSpec | None, axes: Axes, drawn: Drawn, number: int, delayed: float = 1.0
) -> Array:
    """The values of a float32 tensor as cell `number` of the table casts it, scales undone, in float64.

    Under one scale draws go by the place in the tensor, else by that in the operand matrix, whose contracted axis is last.
    """
    if spec is None:
        return x.astype(np.float64)
    draws: dict[str, Any] = {"seed": drawn.seed, "offset": number << 56}
    if isinstance(spec.scaling, (Unscaled, Current, Delayed)) and spec.transform is Transform.NONE:
        scale = scale_by_hand(x, spec, delayed)
        modes: dict[str, Any] = {"rounding": spec.rounding, "overflow": spec.overflow}
        return reference.quantize(x, spec.format, scale=scale, **modes, **draws).astype(np.float64)
    contracted, batch = axes
    rows = [axis for axis in range(x.ndim) if axis not in (*batch, contracted)]
    order = [*batch, *rows, contracted]
    lying = x.transpose(order)
    count = int(np.prod([x.shape[axis] for axis in batch]))
    matrices = lying.reshape(count, -1, x.shape[contracted])
    across = spec.scaling.shape[0] if isinstance(spec.scaling, (Block, TwoLevel)) else 1
    # No block reaches into the next matrix.
    padded = np.pad(matrices, ((0, 0), (0, -matrices.shape[1] % across), (0, 0)))
    codes = reference.encode_matrix(padded.reshape(-1, padded.shape[2]), spec, scale=delayed, **draws)
    values = reference.decode_matrix(codes, spec).reshape(*padded.shape[:2], -1)[:, : matrices.shape[1]]
    return values.reshape(*lying.shape[:-1], -1).transpose(np.argsort(order)).astype(np.float64)


def shared(one: TensorSpec | None, other: TensorSpec | None) -> bool:
    """Whether both GEMMs of a tensor take the same cast of it."""
    if one is None or one != other or one.transform is not Transform.NONE:
        return False
    match one.scaling:
        case Unscaled() | Current() | Delayed():
            return True
        case Block(shape=(across, along)) | TwoLevel(shape=(across, along)):
            return across == along
        case Row():
            return False


def output_by_hand(
    product: ByHand, recipe: Recipe, left: Array, right: Array, bias: Array | None, drawn: Drawn
) -> Array:
    """The output of [float32 left, right], bias of the shape that broadcasts to it."""
    row, scales = recipe.output, drawn.scales
    a = cast_by_hand(left, row.left, product.left[0], drawn, 0, scales.get("input", 1.0))
    b = cast_by_hand(right, row.right, product.right[0], drawn, 1, scales.get("weight", 1.0))
    y = product.run(torch.from_numpy(a), torch.from_numpy(b)).numpy() + (0 if bias is None else bias)
    return y if row.result is None else cast_by_hand(y.astype(np.float32), row.result, (-1, ()), drawn, 2)


def transposed(linear: Callable[[Tensor], Tensor], shape: tuple[int, ...], grad: Array) -> Array:
    """The gradient of a linear function's argument."""
    with torch.enable_grad():
        zero = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(linear(zero), zero, torch.from_numpy(grad))[0].numpy()


def gradients_by_hand(
    product: ByHand, recipe: Recipe, left: Array, right: Array, grad: Array, drawn: Drawn, *, needs_left: bool = True
) -> tuple[Array, Array]:
    """The gradients of left (zeros where it needs none) and right."""
    one, other, scales = recipe.grad_input, recipe.grad_weight, drawn.scales
    g_scale = scales.get("grad_output", 1.0)
    grad_left = np.zeros(left.shape)
    if needs_left:
        g = cast_by_hand(grad, one.left, product.grad[0], drawn, 3, g_scale)
        number = 1 if shared(recipe.output.right, one.right) else 4
        b = cast_by_hand(right, one.right, product.right[number == 4], drawn, number, scales.get("weight", 1.0))
        grad_left = transposed(lambda x: product.run(x, torch.from_numpy(b)), left.shape, g)
        if one.result is not None:
            grad_left = cast_by_hand(grad_left.astype(np.float32), one.result, (-1, ()), drawn, 5)
    number = 3 if needs_left and shared(one.left, other.left) else 6
    g = cast_by_hand(grad, other.left, product.grad[number == 6], drawn, number, g_scale)
    number = 0 if shared(recipe.output.left, other.right) else 7
    a = cast_by_hand(left, other.right, product.left[number == 7], drawn, number, scales.get("input", 1.0))
    grad_right = transposed(lambda x: product.run(torch.from_numpy(a), x), right.shape, g)
    if other.result is not None:
        grad_right = cast_by_hand(grad_right.astype(np.float32), other.result, (-1, ()), drawn, 8)
    return grad_left, grad_right


def assert_close(found: Tensor | None, want: Array, *, exact: bool) -> None:
    """exact: to the bit; else but for float32 sums."""
    assert found is not None
    values = found.detach().numpy()
    if exact:
        np.testing.assert_array_equal(values, want)
    else:
        np.testing.assert_allclose(values, want, rtol=0, atol=1e-5 * max(float(np.abs(want).max(initial=0)), 1e-30))


def sums_are_exact(recipe: Recipe) -> bool:
    """Whether small integers are cast to small multiples of powers of two, which float32 adds exactly in any order."""

    def plain(spec: TensorSpec | None) -> bool:
        match spec.scaling if spec is not None else Unscaled():
            case Unscaled():
                return True
            case Current(power_of_two=power) | Row(power_of_two=power):
                return power
            case Block(scale=scale):
                return scale is not BlockScale.FLOAT32
            case Delayed() | TwoLevel():
                return False

    return all(plain(spec) for *_, spec in recipe.cells())


# A result that is cast may fall to either neighbour where its sum is not exact.
RUNS = [
    pytest.param(make(), integers, id=f"{name}-{'integers' if integers else 'normal'}")
    for (name, make), integers in itertools.product(NAMED.items(), (True, False))
    if integers or make().output.result is None
]


@dataclass
class Seen:
    """What a layer of the emulated model met in one pass."""

    input: Tensor
    output: Tensor
    grad_output: Tensor | None = None
    grad_input: Tensor | None = None


def watched(model: nn.Sequential, x: Tensor) -> tuple[dict[str, Seen], Tensor]:
    """What each layer with a weight met, its gradients once the backward pass ran, and the output."""
    seen: dict[str, Seen] = {}

    def hook(name: str) -> Callable[..., None]:
        def meet(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            met = seen[name] = Seen(inputs[0].detach().clone(), output.detach().clone())
            output.register_hook(lambda grad: setattr(met, "grad_output", grad.clone()))
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda grad: setattr(met, "grad_input", grad.clone()))

        return meet

    handles = [
        module.register_forward_hook(hook(name)) for name, module in model.named_children() if list(module.parameters())
    ]
    y = model(x)
    for handle in handles:
        handle.remove()
    return seen, y


def network(integers: bool) -> nn.Sequential:
    """Blocks of 32 channels divide those of integer networks and leave a tail in the others."""
    width = 64 if integers else 36
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 10, (3, 2), stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(40, 7),
    )
    if integers:  # sixteenths, few of them, so that sums have less than 24 bits
        for parameter in model.parameters():
            kept = torch.rand_like(parameter) < 0.08
            parameter.data = torch.empty_like(parameter).uniform_(-20, 20).round() / 16 * kept
    return model


@pytest.mark.parametrize(("recipe", "integers"), RUNS)
def test_every_gemm_of_three_steps_is_that_of_the_twin(recipe: Recipe, integers: bool) -> None:
    model = network(integers)
    products = {"0": convolution(2, padding=1), "2": convolution(2, stride=2), "5": LINEAR}
    exact = integers and sums_are_exact(recipe)
    peaks: dict[tuple[str, str], float] = {}
    emulation = emulate(model, recipe)
    for step in range(1, STEPS + 1):
        spread = (1.0, 0.25, 2.0)[step - 1]
        x = (torch.randn(18, 3, 5, 5) * 12 * spread).requires_grad_(step != 2)
        g = torch.randn(18, 7) * 9 * spread
        if integers:
            x, g = x.detach().round().requires_grad_(step != 2), g.round() / 64
        model.zero_grad()
        seen, y = watched(model, x)
        y.backward(g)
        for name, product in products.items():
            _compare(emulation, name, product, seen[name], step, exact, peaks)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.neg_()


def _compare(
    emulation: Emulation,
    name: str,
    product: ByHand,
    met: Seen,
    step: int,
    exact: bool,
    peaks: dict[tuple[str, str], float],
) -> None:
    """The GEMMs of one layer in one step.  peaks: the largest amaxes of earlier steps, which delayed scales go by."""
    recipe, layer = emulation.recipe, emulation.model.get_submodule(name)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    assert met.grad_output is not None
    left, right, grad = (x.detach().numpy() for x in (met.input, weight, met.grad_output))
    tensors = {"input": left, "weight": right, "grad_output": grad}
    drawn = Drawn(site=name, step=step)
    for tensor, x in tensors.items():
        if tensor in recipe.maxima:
            if (name, tensor) in peaks:
                drawn.scales[tensor] = float(np.float32(recipe.maxima[tensor]) / np.float32(peaks[name, tensor]))
            peaks[name, tensor] = max(peaks.get((name, tensor), 0.0), float(np.abs(x).max()))
    spread = bias.detach().numpy().reshape(-1, *[1] * (left.ndim - 2))
    assert_close(met.output, output_by_hand(product, recipe, left, right, spread, drawn), exact=exact)
    needs = met.grad_input is not None
    grad_left, grad_right = gradients_by_hand(product, recipe, left, right, grad, drawn, needs_left=needs)
    if needs:
        assert_close(met.grad_input, grad_left, exact=exact)
    assert_close(weight.grad, grad_right, exact=exact)
    axes = (0, *range(2, grad.ndim))
    assert_close(bias.grad, grad.astype(np.float64).sum(axes), exact=exact)
    assert int(emulation.sites[name].draws[1]) == (step if recipe.stochastic else 0)


class Call(nn.Module):
    """A module that is one function of its inputs and parameters."""

    def __init__(self, function: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, *self.parameters(), **kwargs)


def arguments(*shapes: tuple[int, ...], grad: bool = True) -> list[Tensor]:
    return [torch.randn(shape).requires_grad_(grad) for shape in shapes]


def backward(*outputs: Tensor) -> None:
    """Backward from each output by a fixed gradient that repeats nowhere."""
    grads = [torch.arange(1, y.numel() + 1, dtype=y.dtype).sin().view(y.shape) for y in outputs]
    torch.autograd.backward(outputs, grads)


class _Product(torch.autograd.Function):
    """A product cast by hand, and the gradients that are so."""

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, bias: Tensor | None, product: ByHand, recipe: Recipe, drawn: Drawn
    ) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.others, ctx.bias = (product, recipe, drawn), None if bias is None else bias.shape
        a, b = left.numpy(), right.numpy()
        y = output_by_hand(product, recipe, a, b, None if bias is None else bias.numpy(), drawn)
        return torch.from_numpy(y).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        product, recipe, drawn = ctx.others
        left, right = (x.numpy() for x in ctx.saved_tensors)
        found = gradients_by_hand(
            product, recipe, left, right, grad.contiguous().numpy(), drawn, needs_left=ctx.needs_input_grad[0]
        )
        grads = [torch.from_numpy(x.astype(np.float32)) for x in found]
        return *grads, None if ctx.bias is None else grad.sum_to_size(ctx.bias), None, None, None


class Hand:
    """Products by hand, of a model's sites by name; each training pass of a site has the next step of its draws."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.steps: Counter[str] = Counter()

    def __call__(self, site: str, product: ByHand, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        self.steps[site] += 1
        drawn = Drawn(site=site, step=self.steps[site])
        return _Product.apply(left, right, bias, product, self.recipe, drawn)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Functions of the table, called alike, and what they are by hand."""

    functions: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    hand: Callable[..., Tensor]
    """Takes a `Hand` and the tensors."""
    call: Callable[..., Any] = lambda function, *tensors: function(*tensors)
    """Takes the function and the tensors."""
    sums: bool = False
    """Whether something is added to a product whose result was cast."""


def matmul_by_hand(hand: Hand, a: Tensor, b: Tensor, word: str = "matmul()") -> Tensor:
    if b.dim() <= 2:
        weight = b[None] if b.dim() == 1 else b.mT
        y = hand(word, LINEAR, a.reshape(-1, a.shape[-1]), weight).reshape(*a.shape[:-1], weight.shape[0])
        return y[..., 0] if b.dim() == 1 else y
    left = a[None] if a.dim() == 1 else a
    batch = torch.broadcast_shapes(left.shape[:-2], b.shape[:-2])
    left = left.expand(*batch, *left.shape[-2:])
    right = b.mT.expand(*batch, *b.mT.shape[-2:])
    y = hand(word, MATRICES, left.flatten(0, -3), right.flatten(0, -3))
    return y.reshape(*batch, *y.shape[1 if a.dim() > 1 else 2 :])


def convolution_case(rank: int, *, transposed: bool = False, **settings: Any) -> Case:
    product = grouped_convolution(rank, transposed=transposed, **settings)
    weight, out = ((6, 5, *[3] * rank), 10) if transposed else ((4, 3, *[3] * rank), 4)

    def hand(by: Hand, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        spread = bias.reshape(2, -1, *[1] * rank)
        return by("model", product, x.unflatten(1, (2, -1)), w.unflatten(0, (2, -1)), spread).flatten(1, 2)

    return Case(
        functions=(getattr(torch, f"conv_transpose{rank}d" if transposed else f"conv{rank}d"),),
        shapes=((5, 6, *[5] * rank), weight, (out,)),
        call=lambda function, x, w, b: function(x, w, b, groups=2, **settings),
        hand=hand,
    )


def added_case(name: str, shapes: tuple[tuple[int, ...], ...]) -> Case:
    return Case(
        functions=(getattr(torch, name), getattr(Tensor, name)),
        shapes=shapes,
        call=lambda function, x, a, b: function(x, a, b, beta=0.5),
        hand=lambda hand, x, a, b: 0.5 * x + matmul_by_hand(hand, a, b),
        sums=True,
    )


def attention_by_hand(hand: Hand, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = matmul_by_hand(hand, q, k.mT, "scores()") * (1 / math.sqrt(q.shape[-1]))
    return matmul_by_hand(hand, scores.softmax(-1), v, "context()")


def attend(function: Any, x: Tensor, *weights: Tensor) -> Any:
    return function(
        x, x, x, 8, 2, weights[0], weights[1], None, None, False, 0.0, weights[2], weights[3], need_weights=False
    )[0]


def multi_head_by_hand(hand: Hand, x: Tensor, w: Tensor, b: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    length, batch, width = x.shape
    together = hand("model", LINEAR, x.flatten(0, 1), w, b).reshape(length, batch, 3, 2, width // 2)
    q, k, v = together.permute(2, 1, 3, 0, 4)
    context = attention_by_hand(hand, q, k, v).permute(2, 0, 1, 3).reshape(-1, width)
    return hand("linear_2()", LINEAR, context, w_out, b_out).reshape(x.shape)


def step_by_hand(
    gates: int, a: Tensor, b: Tensor, h: Tensor, c: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor | None]:
    """The next states from the products of the input and the hidden state, as `torch.nn`'s documentation has them."""
    match gates:
        case 4:
            assert c is not None
            i, f, g, o = (a + b).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return o.sigmoid() * c.tanh(), c
        case 3:
            (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
            r, z = (ar + br).sigmoid(), (az + bz).sigmoid()
            return (1 - z) * (an + r * bn).tanh() + z * h, None
        case _:
            return (a + b).relu() if relu else (a + b).tanh(), None


def recurrent_cases(name: str, gates: int) -> Iterator[tuple[str, Case]]:
    relu, rows = name == "rnn_relu", gates * 3
    weights = ((rows, 4), (rows, 3), (rows,), (rows,))

    def states(h: Tensor) -> Any:
        return (h, h.cos()) if gates == 4 else h

    def call(function: Any, x: Tensor, h: Tensor, *params: Tensor) -> Tensor:
        found: Tensor = function(x, states(h.tanh()[None]), list(params), True, 1, 0.0, True, False, False)[0]
        return found

    def hand(by: Hand, x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
        h = h.tanh()
        c, outputs = h.cos(), []
        inputs = by("weight_ih_l0", LINEAR, x.flatten(0, 1), w_ih, b_ih).unflatten(0, x.shape[:2])
        for a in inputs:
            h, c = step_by_hand(gates, a, by("weight_hh_l0", LINEAR, h, w_hh, b_hh), h, c, relu)  # type: ignore[assignment]
            outputs.append(h)
        return torch.stack(outputs)

    def call_cell(function: Any, x: Tensor, h: Tensor, *params: Tensor) -> Tensor:
        found = function(x, states(h.tanh()), *params)
        return found[0] if gates == 4 else found  # type: ignore[no-any-return]

    def hand_cell(by: Hand, x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
        h = h.tanh()
        a, b = by("weight_ih", LINEAR, x, w_ih, b_ih), by("weight_hh", LINEAR, h, w_hh, b_hh)
        return step_by_hand(gates, a, b, h, h.cos(), relu)[0]

    yield name, Case(functions=(getattr(torch, name),), shapes=((3, 2, 4), (2, 3), *weights), call=call, hand=hand)
    cell = f"{name}_cell"
    yield (
        cell,
        Case(functions=(getattr(torch, cell),), shapes=((5, 4), (5, 3), *weights), call=call_cell, hand=hand_cell),
    )


CASES: dict[str, Case] = {
    "linear": Case(
        functions=(F.linear,),
        shapes=((3, 5, 40), (7, 40), (7,)),
        hand=lambda hand, x, w, b: hand("model", LINEAR, x.flatten(0, 1), w, b).unflatten(0, (3, 5)),
    ),
    **{f"conv{rank}d": convolution_case(rank, stride=2, padding=1, dilation=1) for rank in (1, 2, 3)},
    **{
        f"conv_transpose{rank}d": convolution_case(rank, transposed=True, stride=2, padding=1, output_padding=1)
        for rank in (1, 2, 3)
    },
    "matrices": Case(
        functions=(torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, torch.linalg.matmul, Tensor.__matmul__),
        shapes=((6, 40), (40, 9)),
        hand=matmul_by_hand,
    ),
    "reflected": Case(
        functions=(Tensor.__rmatmul__,), shapes=((40, 9), (6, 40)), hand=lambda hand, b, a: matmul_by_hand(hand, a, b)
    ),
    "batches": Case(functions=(torch.bmm, Tensor.bmm), shapes=((3, 6, 40), (3, 40, 9)), hand=matmul_by_hand),
    "broadcast": Case(functions=(torch.matmul,), shapes=((2, 1, 6, 40), (3, 40, 9)), hand=matmul_by_hand),
    "vector": Case(functions=(torch.mv, Tensor.mv), shapes=((6, 40), (40,)), hand=matmul_by_hand),
    "dot": Case(functions=(torch.dot, Tensor.dot), shapes=((40,), (40,)), hand=matmul_by_hand),
    "addmm": added_case("addmm", ((6, 9), (6, 40), (40, 9))),
    "baddbmm": added_case("baddbmm", ((3, 6, 9), (3, 6, 40), (3, 40, 9))),
    "addmv": added_case("addmv", ((6,), (6, 40), (40,))),
    "addmm of a bias": Case(
        functions=(torch.addmm,),
        shapes=((9,), (6, 40), (40, 9)),
        hand=lambda hand, b, x, w: hand("matmul()", LINEAR, x, w.mT, b),
    ),
    "einsum": Case(
        functions=(torch.einsum,),
        shapes=((2, 6, 3, 40), (2, 9, 3, 40)),
        call=lambda function, q, k: function("bqhd,bkhd->bhqk", q, k),
        hand=lambda hand, q, k: hand(
            "einsum()", MATRICES, *(x.transpose(1, 2).flatten(0, 1) for x in (q, k))
        ).unflatten(0, (2, 3)),
    ),
    "attention": Case(
        functions=(F.scaled_dot_product_attention,),
        shapes=((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
        hand=attention_by_hand,
    ),
    "heads": Case(
        functions=(F.multi_head_attention_forward,),
        shapes=((5, 3, 8), (24, 8), (24,), (8, 8), (8,)),
        call=attend,
        hand=multi_head_by_hand,
    ),
    **dict(
        case
        for name, gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1))
        for case in recurrent_cases(name, gates)
    ),
}
PRODUCTS = [
    pytest.param(recipe, case, function, id=f"{recipe}-{name}-{getattr(function, '__qualname__', function)}")
    for recipe in ("direct", "hybrid", "mxfp8")
    for name, case in CASES.items()
    for function in case.functions
    if not (recipe == "direct" and case.sums)
]


@pytest.mark.parametrize(("recipe", "case", "function"), PRODUCTS)
def test_products_are_those_by_hand(recipe: str, case: Case, function: Any) -> None:
    inputs = arguments(*case.shapes)
    twins = [x.detach().clone().requires_grad_() for x in inputs]
    model = Call(partial(case.call, function))
    hand = Hand(recipes.get_recipe(recipe))
    with emulate(model, recipe) as emulation:
        found = model(*inputs)
        backward(found)
    want = case.hand(hand, *twins)
    backward(want)
    assert emulation.sites.keys() == hand.steps.keys()
    assert found.shape == want.shape
    for one, other in zip((found, *(x.grad for x in inputs)), (want, *(x.grad for x in twins)), strict=True):
        assert other is not None
        assert_close(one, other.detach().numpy(), exact=False)


@pytest.mark.parametrize("name", ["direct", "hybrid", "mxfp8", "nvfp4"])
def test_fused_outputs_and_their_gradients_are_not_cast(name: str) -> None:
    recipe, inputs = recipes.get_recipe(name), arguments((18, 6, 5, 5), (4, 6, 3, 3), (4,))
    x, w, b = (t.detach().clone().requires_grad_() for t in inputs)
    model = nn.Sequential(Call(F.conv2d))
    with emulate(model, recipe, output_fused=["0"]):
        found = model[0](*inputs)
        backward(found)

    def bare(spec: TensorSpec | None) -> TensorSpec | None:
        return spec and replace(spec, transform=Transform.NONE)

    fused = replace(
        recipe,
        output=replace(recipe.output, result=None),
        grad_input=replace(recipe.grad_input, left=None, right=bare(recipe.grad_input.right)),
        grad_weight=replace(recipe.grad_weight, left=None, right=bare(recipe.grad_weight.right)),
    )
    want = Hand(fused)("0", convolution(2), x, w, b.reshape(-1, 1, 1))
    backward(want)
    for one, other in zip((found, *(t.grad for t in inputs)), (want, x.grad, w.grad, b.grad), strict=True):
        assert other is not None
        assert_close(one, other.detach().numpy(), exact=False)
