"""`Linear`: a layer of the engine whose three GEMMs run as a recipe says.

T tokens, I input features, O output features; weights lie [I, O].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from octavo.engine import matrices, ops
from octavo.engine.autograd import enabled
from octavo.engine.kernels import casts, gemm
from octavo.engine.kernels.launch import refuse
from octavo.engine.kernels.memory import contiguous
from octavo.engine.operators import Library, register
from octavo.engine.tensor import Tensor, empty, from_numpy, zeros
from octavo.recipes import Recipe
from octavo.rounding import Rounding
from octavo.scaling import AmaxAlgorithm, Current, Delayed, Unscaled, roll_history
from octavo.table import Accumulator, Gemm, TensorSpec, Transform

__all__ = ["Linear", "Scales", "update_scales"]

FORWARD, BACKWARD = ("input", "weight", "output"), ("grad_output", "grad_input")
"""The tensors that the columns of scales and histories stand for."""


class Scales:
    """The state of delayed scaling of one layer, and the seed and step of stochastic rounding.

    forward, backward: float32 scales of (input, weight, output) and (grad_output, grad_input), ones at first; histories: float32
    [steps, tensors], row 0 empty between updates, the last row the newest.  Amaxes gather until `update_scales` moves them in.
    """

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe, self.seed, self.step = recipe, seed, 0
        delayed = recipe.delayed
        steps = 0 if delayed is None else delayed.history
        self.scales = tuple(from_numpy(np.ones(len(names), np.float32)) for names in (FORWARD, BACKWARD))
        self.histories = tuple(from_numpy(np.zeros((steps, len(names)), np.float32)) for names in (FORWARD, BACKWARD))
        self.amaxes = tuple(from_numpy(np.zeros(len(names), np.int64)) for names in (FORWARD, BACKWARD))
        self.maxima = tuple(
            from_numpy(np.array([recipe.maxima.get(name, 1.0) for name in names], np.float32))
            for names in (FORWARD, BACKWARD)
        )

    def place(self, tensor: str) -> tuple[int, int]:
        """(direction, column) of a tensor's scale."""
        return (0, FORWARD.index(tensor)) if tensor in FORWARD else (1, BACKWARD.index(tensor))

    def update(self) -> None:
        """Move the amaxes gathered since the last update into the histories, and the scales on."""
        delayed = self.recipe.delayed
        if delayed is None:
            return
        for scales, history, amaxes, maxima in zip(self.scales, self.histories, self.amaxes, self.maxima, strict=True):
            if isinstance(delayed.algorithm, AmaxAlgorithm):
                recent = delayed.algorithm is AmaxAlgorithm.MOST_RECENT
                casts.roll(history, scales, amaxes, maxima, 2.0**-delayed.margin, recent)
            else:
                refuse("an amax algorithm of your own is called")
                found = amaxes.array.astype(np.int32).view(np.float32)
                history.array[0] = np.maximum(history.array[0], found)
                amaxes.array[:] = 0
                rolled, moved = roll_history(history.array, scales.array, maxima.array, delayed)
                history.array[:], scales.array[:] = rolled, moved
            scales.storage.version += 1


def update_scales(*layers: Linear) -> None:
    """Move the delayed scales of these layers on: once for each training step, after its backward pass.

    Passes since the last update count as one step, so that micro-batches merge their amaxes.
    """
    for layer in layers:
        if layer.state is not None:
            layer.state.update()


class Cast(NamedTuple):
    """A tensor as a GEMM takes it: the values of its codes, and the address of the scale that they still carry, or 0."""

    values: Tensor
    scale: int


def _one_scale(spec: TensorSpec | None) -> bool:
    """Whether the compiled cast takes a cell: one scale, to nearest, to a format of 8 bits that has NaN."""
    return (
        spec is not None
        and isinstance(spec.scaling, (Unscaled, Current, Delayed))
        and spec.rounding is Rounding.NEAREST_EVEN
        and spec.transform is Transform.NONE
        and spec.format.bits == 8
        and spec.format.has_nan
    )


@functools.lru_cache(maxsize=64)
def _compiled(recipe: Recipe) -> bool:
    """Whether a recipe's whole table runs in compiled kernels: each tensor cast once, with one scale, results left alone."""
    rows: Sequence[Gemm] = (recipe.output, recipe.grad_input, recipe.grad_weight)
    pairs = ((rows[0].left, rows[2].right), (rows[0].right, rows[1].right), (rows[1].left, rows[2].left))
    return all(one == other and _one_scale(one) for one, other in pairs) and all(
        row.result is None and row.accumulator is Accumulator.FLOAT32 for row in rows
    )


def _cast(x: Tensor, spec: TensorSpec, tensor: str, scales: Scales, own: int, record: bool) -> Cast:
    """x by a cell; own: the address of a float32, where a scale of x's own goes; record: whether its amax is gathered."""
    direction, column = scales.place(tensor)
    cell = scales.amaxes[direction].address + 8 * column
    match spec.scaling:
        case Delayed():
            scale = scales.scales[direction].address + 4 * column
            return Cast(casts.cast(x, spec.format, spec.overflow, scale=scale, amax=cell if record else 0), scale)
        case Current(power_of_two=power_of_two, epsilon=epsilon):
            casts.scale_now(x, spec.format.max, epsilon, power_of_two, cell=cell, scale=own)
            return Cast(casts.cast(x, spec.format, spec.overflow, scale=own, amax=0), own)
        case _:
            return Cast(casts.cast(x, spec.format, spec.overflow, scale=0, amax=0), 0)


def _forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, layer: Linear, train: bool, step: int
) -> tuple[Tensor, ...]:
    """(output, the cast input, the cast weight, their own scales): the GEMM `output`."""
    scales, recipe = layer.state, layer.recipe
    assert scales is not None
    assert recipe is not None
    if not _compiled(recipe):
        return matrices.forward(recipe, scales, input, weight, bias, train, step)
    row = recipe.output
    assert row.left is not None
    assert row.right is not None
    own = empty((2,))
    x = _cast(contiguous(input), row.left, "input", scales, own.address, train)
    w = _cast(contiguous(weight), row.right, "weight", scales, own.address + 4, train)
    out = empty((input.shape[0], weight.shape[1]))
    gemm.product(x.values, w.values, out, bias=bias, scales=(x.scale, w.scale))
    return out, x.values, w.values, own


def _backward(grads: Sequence[Any], saved: Sequence[Any]) -> Sequence[Any]:
    """The GEMMs `grad_input` and `grad_weight`, and grad_bias, the sum of the uncast grad_output."""
    grad_output: Tensor = grads[0]
    input, weight, bias, _, layer, train, step, _, x, w, own = saved
    recipe, scales = layer.recipe, layer.state
    grad_output = contiguous(grad_output)
    grad_bias = None if bias is None else grad_output.sum(0)
    tracked = input.requires_grad or input.node is not None
    if not _compiled(recipe):
        found = matrices.backward(recipe, scales, grad_output, input, weight, train, step, needs_input=tracked)
        return (*found, grad_bias, None, None, None, None)
    spec = recipe.grad_input.left
    g_own = empty((1,))
    g = _cast(grad_output, spec, "grad_output", scales, g_own.address, train)
    delayed = scales.scales[0].address
    row = recipe.output
    x_scale = _scale_of(row.left, own.address, delayed)
    w_scale = _scale_of(row.right, own.address + 4, delayed + 4)
    grad_input = None
    if tracked:
        grad_input = empty(input.shape)
        gemm.product(g.values, w.T, grad_input, scales=(g.scale, w_scale))
    grad_weight = empty(weight.shape)
    gemm.product(x.T, g.values, grad_weight, scales=(x_scale, g.scale))
    return grad_input, grad_weight, grad_bias, None, None, None, None


def _scale_of(spec: TensorSpec, own: int, delayed: int) -> int:
    """The address of the scale that a forward cast used."""
    return own if isinstance(spec.scaling, Current) else delayed if isinstance(spec.scaling, Delayed) else 0


_library = Library("scaled")
_operator = _library.define(
    "linear(Tensor input, Tensor weight, Tensor? bias, Tensor scale, object layer, bool train, int step) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("linear", _forward)
register(_operator, _backward, saves_outputs=True)


class Linear:
    """`y = x @ weight + bias`, in high precision or as `recipe` casts the operands of its three GEMMs.

    weight: float32 [I, O]; bias: float32 [O] or None; both require gradients.  Input: float32 [.., I].  Weights start as Glorot and Bengio
    (2010) have them, normal with variance 2 / (I + O), the bias at zero, from `seed`; or from the tensor
    given as `weight`, which is used where it lies.
    Every recipe's codes are those of `octavo.torch.Linear`, bit for bit; delayed scales move when `update_scales` is called.  Recipes with
    one scale a tensor run in compiled kernels and can be captured; the others run by NumPy.
    NaN and Inf go through, and leave delayed scales as they were.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        recipe: Recipe | None = None,
        seed: int = 0,
        weight: Tensor | None = None,
    ) -> None:
        if weight is None:
            drawn = np.random.Generator(np.random.Philox(seed)).normal(
                0.0, np.sqrt(2 / (in_features + out_features)), (in_features, out_features)
            )
            weight = from_numpy(drawn.astype(np.float32))
        if weight.shape != (in_features, out_features) or weight.dtype != np.float32:
            raise ValueError(
                f"Linear({in_features}, {out_features}) takes a float32 weight [{in_features}, {out_features}]; got {weight.dtype} "
                f"{list(weight.shape)}: weights lie inputs first"
            )
        self.weight, self.bias = weight, zeros((out_features,)) if bias else None
        for parameter in self.parameters():
            parameter.requires_grad = True
        self.recipe = recipe
        self.state = None if recipe is None else Scales(recipe, seed)
        self.training = True

    def parameters(self) -> list[Tensor]:
        """weight, and bias where there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def __call__(self, input: Tensor) -> Tensor:
        """The layer's output, [.., O]; while `training`, and outside no_grad(), amaxes are gathered."""
        if self.state is None:
            return ops.linear(input, self.weight, self.bias)  # type: ignore[no-any-return]
        if input.ndim < 2 or input.shape[-1] != self.weight.shape[0] or input.dtype != np.float32:
            raise ValueError(
                f"Linear({', '.join(map(str, self.weight.shape))}) takes float32 [.., {self.weight.shape[0]}]; got {input.dtype} "
                f"{list(input.shape)}"
            )
        flat = input if input.ndim == 2 else input.reshape(-1, input.shape[-1])
        scale = self.state.scales[0]
        train = self.training and enabled()
        self.state.step += train
        out: Tensor = _operator(flat, self.weight, self.bias, scale, self, train, self.state.step)[0]
        return out if input.ndim == 2 else out.reshape(*input.shape[:-1], out.shape[-1])
