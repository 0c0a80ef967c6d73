"""Layers for inference that hold their weights in codes: what `quantize_model` puts in the place of linear layers and convolutions.

A weight is cast as the matrix [output channels, input channels of a group x kernel], an input as [samples x places x groups, input
channels of a group], an output as [samples x places, output channels].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from octavo.formats import BFLOAT16, FLOAT16
from octavo.kernels import matrices
from octavo.qtensor import QTensor
from octavo.scaling import Current, Delayed, Unscaled, amax_scale
from octavo.table import Gemm, TensorSpec, Transform
from octavo.torch.operands import KINDS, Cast
from octavo.torch.state import ScaledLayer

__all__ = [
    "QuantizedConv",
    "QuantizedConvTranspose",
    "QuantizedLayer",
    "QuantizedLinear",
    "as_rows",
    "check_input",
    "from_rows",
    "has_fixed_scale",
    "is_quantizable",
    "is_transposed",
    "quantized",
    "replace_modules",
    "scale_for",
]

_CONVOLUTIONS: Mapping[type[nn.Module], Callable[..., Tensor]] = MappingProxyType(
    {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
)
_TRANSPOSED: Mapping[type[nn.Module], Callable[..., Tensor]] = MappingProxyType(
    {
        nn.ConvTranspose1d: F.conv_transpose1d,
        nn.ConvTranspose2d: F.conv_transpose2d,
        nn.ConvTranspose3d: F.conv_transpose3d,
    }
)
_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def is_quantizable(module: nn.Module) -> bool:
    """Whether a module is a linear layer or convolution of torch, perhaps parametrised, or Octavo's own 8-bit kind of one.

    Other subclasses are not: what they compute is not known (`nn.MultiheadAttention` never calls its projections).
    """
    ours = isinstance(module, ScaledLayer) or parametrize.is_parametrized(module)
    return type(module) in _KINDS or (ours and isinstance(module, _KINDS))


def is_transposed(layer: nn.Module) -> bool:
    """Whether it is a transposed convolution, whose weight is [input channels, output channels of a group, kernel]."""
    return isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))


def as_rows(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """A weight of a linear layer or convolution as [output channels, input channels of a group x kernel]."""
    if not transposed:
        return weight.flatten(1)
    into, out, *kernel = weight.shape
    return weight.reshape(groups, into // groups, out, *kernel).transpose(1, 2).reshape(groups * out, -1)


def from_rows(rows: Tensor, shape: Sequence[int], groups: int, transposed: bool) -> Tensor:
    """The weight of that shape that `as_rows` laid out."""
    if not transposed:
        return rows.reshape(*shape)
    into, out, *kernel = shape
    return rows.reshape(groups, out, into // groups, *kernel).transpose(1, 2).reshape(*shape)


def has_fixed_scale(spec: TensorSpec | None) -> TypeGuard[TensorSpec]:
    """Whether a cell casts by one scale for the tensor, which calibration can fix."""
    return spec is not None and isinstance(spec.scaling, (Current, Delayed))


def scale_for(spec: TensorSpec, amax: float) -> float:
    """The scale of a cell with one scale for a tensor whose largest magnitude is `amax`, by the rule of its scaling; 1 for amax 0."""
    assert isinstance(spec.scaling, (Current, Delayed))
    margin, rule = (spec.scaling.margin, Current()) if isinstance(spec.scaling, Delayed) else (0, spec.scaling)
    return float(amax_scale(np.array([amax], np.float32), spec.format.max * 2.0**-margin, rule)[0])


def check_input(place: str, x: Any) -> Tensor:
    """x, where a quantised layer can cast it.  Raises ValueError, naming the place, for anything else."""
    if not isinstance(x, Tensor) or x.dtype not in KINDS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in KINDS)
        raise ValueError(f"{place} takes {names}; got {getattr(x, 'dtype', type(x).__name__)}: convert it (x.float())")
    return x


def _values(matrix: Tensor, spec: TensorSpec, scale: float) -> Tensor:
    """A matrix [rows, contracted], cast and decoded: float32 of its shape."""
    if not matrix.numel():
        return matrix.float()
    if spec.format.bits > 8:
        return Cast(spec, upright=False, number=0)(matrix, 1.0).values.float()
    given = replace(spec, scaling=Delayed()) if has_fixed_scale(spec) else spec
    if matrix.device.type == "cpu" and spec.transform is Transform.NONE:
        values: Tensor = matrices.quantize_matrix(matrix, given, scale=scale)
        return values
    q = QTensor.encode(matrix, given, scale=scale)
    found: Tensor = replace(q, dtype=torch.float32).decode()
    return found


class QuantizedLayer(nn.Module):
    """A linear layer or convolution for inference: codes of a weight that was cast once, and inputs cast as they come.

    Buffers, each None where the recipe's row has no use for it:
        weight_codes, weight_scales, weight_amax    the parts of a `QTensor` of the weight's matrix
        weight                                      the weight itself, uncast or rounded to a format of more than 8 bits
        input_scale, output_scale                   float32 [], what a tensor with one scale is multiplied with before it is cast
        bias                                        uncast
    Their dtypes stay whatever the layer is converted to.  Products and sums are float32, float64 for float64 inputs, of the
    decoded values; the result has the input's dtype, and no gradient.  NaN and Inf go as `octavo.QTensor.encode` says.
    """

    bias: Tensor | None
    input_scale: Tensor | None
    output_scale: Tensor | None
    weight: Tensor | None
    weight_codes: Tensor | None
    weight_scales: Tensor | None
    weight_amax: Tensor | None

    channel_axis: ClassVar[int] = 1
    transposed: ClassVar[bool] = False

    def __init__(self, layer: Any, row: Gemm, norm: str | None = None) -> None:
        """layer: what is quantised; row: of the recipe's table, `output`; norm: the batch norm that was folded into the layer."""
        super().__init__()
        weight: Tensor = layer.weight.detach()
        self.row, self.norm, self.shape = row, norm, tuple(weight.shape)
        self.groups: int = getattr(layer, "groups", 1)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        for name, spec in (("input_scale", row.left), ("output_scale", row.result)):
            one = torch.ones((), dtype=torch.float32, device=weight.device)
            self.register_buffer(name, one if has_fixed_scale(spec) else None)
        for name, part in self._parts(weight, row.right).items():
            self.register_buffer(name, part)
        for name in _HOOKS:
            setattr(self, name, getattr(layer, name))
        self.train(layer.training)

    def _parts(self, weight: Tensor, spec: TensorSpec | None) -> dict[str, Tensor | None]:
        """The buffers that hold a weight."""
        whole = None
        if spec is None:
            whole = weight.clone()
        elif spec.format.bits > 8:
            narrow = {BFLOAT16: torch.bfloat16, FLOAT16: torch.float16}.get(spec.format, torch.float32)
            whole = _values(weight.flatten(1), spec, 1.0).to(narrow).reshape(weight.shape)
        if spec is None or whole is not None:
            return {"weight": whole, "weight_codes": None, "weight_scales": None, "weight_amax": None}
        rows = as_rows(weight, self.groups, self.transposed).contiguous()
        scale = 1.0
        if isinstance(spec.scaling, Delayed):
            turned = matrices.hadamard(rows.cpu()) if spec.transform is Transform.HADAMARD else rows
            scale = scale_for(spec, float(turned.abs().amax()) if turned.numel() else 0.0)
        q = QTensor.encode(rows, spec, scale=scale)
        return {"weight": None, "weight_codes": q.codes, "weight_scales": q.scales, "weight_amax": q.amax}

    @property
    def quantized_weight(self) -> QTensor | None:
        """The weight's matrix in codes, on this layer's own memory; None where the recipe leaves it in more than 8 bits."""
        spec = self.row.right
        if self.weight_codes is None or spec is None:
            return None
        out = self.shape[1] * self.groups if self.transposed else self.shape[0]
        size = 1
        for extent in self.shape:
            size *= extent
        return QTensor(
            codes=self.weight_codes,
            scales=self.weight_scales,
            amax=self.weight_amax,
            spec=spec,
            shape=(out, size // max(out, 1)),
            axis=-1,
            dtype=torch.float32,
        )

    def decoded_weight(self) -> Tensor:
        """The weight that inputs are multiplied with, in the shape of the layer that was quantised."""
        q = self.quantized_weight
        if q is not None:
            return from_rows(q.decode(), self.shape, self.groups, self.transposed)
        assert self.weight is not None
        return self.weight

    @property
    def in_channels(self) -> int:
        """The size of an input's channel axis."""
        return self.shape[0] if self.transposed else self.shape[1] * self.groups

    def lay(self, x: Tensor, spec: TensorSpec, groups: int = 1) -> Tensor:
        """x as the matrix that `spec` casts: [rows, contracted], one row where all of it shares a scale."""
        if self._in_one(spec):
            return x.contiguous().view(1, -1)
        return x.movedim(self.channel_axis, -1).reshape(-1, x.shape[self.channel_axis] // groups)

    def _in_one(self, spec: TensorSpec) -> bool:
        one_scale = isinstance(spec.scaling, (Unscaled, Current, Delayed))
        return spec.format.bits > 8 or (one_scale and spec.transform is Transform.NONE)

    def _cast(self, x: Tensor, spec: TensorSpec | None, scale: Tensor | None, groups: int = 1) -> Tensor:
        """The values that x is cast to, in its shape; x itself where the recipe leaves it alone."""
        if spec is None:
            return x
        values = _values(self.lay(x, spec, groups), spec, 1.0 if scale is None else scale.item())
        if self._in_one(spec):
            return values.view(x.shape)
        return values.reshape(x.movedim(self.channel_axis, -1).shape).movedim(-1, self.channel_axis)

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output, as the layer that was quantised takes and shapes it.

        Raises ValueError for integers and complex numbers, and for another number of axes or channels.
        """
        return self._run(input, None)

    def _run(self, input: Tensor, output_size: Sequence[int] | None) -> Tensor:
        check_input(type(self).__name__, input)
        x = self._batched(input.detach())
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        left = self._cast(x, self.row.left, self.input_scale, self.groups).to(wide)
        bias = None if self.bias is None else self.bias.to(wide)
        with torch.autocast(x.device.type, enabled=False):
            y = self._product(left, self.decoded_weight().to(wide), bias, output_size)
        y = self._cast(y, self.row.result, self.output_scale).to(input.dtype)
        return y if x.dim() == input.dim() else y.squeeze(0)

    def _batched(self, x: Tensor) -> Tensor:
        """x with an axis of samples, where the layer lets that be left out."""
        raise NotImplementedError

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Sequence[int] | None) -> Tensor:
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        cells = zip(("input", "weight", "output"), (self.row.left, self.row.right, self.row.result), strict=True)
        return ", ".join([str(list(self.shape)), *(f"{name}={spec}" for name, spec in cells if spec is not None)])


class QuantizedLinear(QuantizedLayer):
    """`torch.nn.Linear` with its weight in codes; input: [..., in_features]."""

    channel_axis: ClassVar[int] = -1

    def _batched(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_channels:
            raise ValueError(
                f"a quantised linear layer takes [..., {self.in_channels}]; got {list(x.shape)}: reshape the input so that its last "
                "dimension is in_features"
            )
        return x

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Sequence[int] | None) -> Tensor:
        return F.linear(x, weight, bias)


class QuantizedConv(QuantizedLayer):
    """`torch.nn.Conv1d`, `2d` or `3d` with its weight in codes; input: [samples, channels, places...], or one sample."""

    def __init__(self, layer: Any, row: Gemm, norm: str | None = None) -> None:
        super().__init__(layer, row, norm)
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.padding_mode: str = layer.padding_mode
        self.edges: Sequence[int] = getattr(layer, "_reversed_padding_repeated_twice", ())
        kinds = _TRANSPOSED if self.transposed else _CONVOLUTIONS
        self.function = next(function for kind, function in kinds.items() if isinstance(layer, kind))

    def _batched(self, x: Tensor) -> Tensor:
        places = len(self.stride)
        if x.dim() not in (places + 1, places + 2) or x.shape[-places - 1] != self.in_channels:
            axes = ", ".join(["samples", str(self.in_channels), *["places"] * places])
            raise ValueError(f"a quantised convolution takes [{axes}], or one sample; got {list(x.shape)}: reshape it")
        return x if x.dim() == places + 2 else x.unsqueeze(0)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Sequence[int] | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, list(self.edges), mode=self.padding_mode), 0
        return self.function(x, weight, bias, self.stride, padding, self.dilation, self.groups)


class QuantizedConvTranspose(QuantizedConv):
    """`torch.nn.ConvTranspose1d`, `2d` or `3d` with its weight in codes; input as that of `QuantizedConv`."""

    transposed: ClassVar[bool] = True

    def __init__(self, layer: Any, row: Gemm, norm: str | None = None) -> None:
        super().__init__(layer, row, norm)
        self.output_padding: Sequence[int] = layer.output_padding
        self.kernel_size: Sequence[int] = layer.kernel_size

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """As `QuantizedLayer.forward`; output_size: of the places, where the stride leaves it open."""
        return self._run(input, output_size)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Sequence[int] | None) -> Tensor:
        ours: Any = self
        size = None if output_size is None else list(output_size)
        extra = _ConvTransposeNd._output_padding(
            ours,
            x,
            size,
            self.stride,
            self.padding,
            list(self.kernel_size),
            len(self.stride),
            self.dilation,
        )
        return self.function(x, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation)


def quantized(layer: nn.Module, row: Gemm, norm: str | None = None) -> QuantizedLayer:
    """The layer with its weight in codes, its scales of inputs and outputs still 1."""
    if isinstance(layer, nn.Linear):
        return QuantizedLinear(layer, row, norm)
    return (QuantizedConvTranspose if is_transposed(layer) else QuantizedConv)(layer, row, norm)


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """The model, in which new modules stand wherever the old ones did, under each of their names."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)
