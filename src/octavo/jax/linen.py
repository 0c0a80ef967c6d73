"""Layers for Flax linen: parameters in `params`, float32; metadata in `fp8_metas`, made by `init` inside `autocast`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from octavo.jax.dense import Shape, contracted, dense, dense_kernel_init, fresh_metas, tuple_of
from octavo.jax.norm import Normalization, activations, normalized
from octavo.jax.state import FP8_COLLECTION

__all__ = ["DenseGeneral", "LayerNorm", "LayerNormDenseGeneral", "LayerNormMLP"]

Axes = Sequence[str | None]
KERNEL_INIT = nn.initializers.lecun_normal()


def _partitioned(init: Callable[..., Any], axes: Axes) -> Callable[..., Any]:
    return nn.with_logical_partitioning(init, tuple(axes)) if axes else init


class DenseGeneral(nn.Module):
    """A dense layer over one axis or several, whose three GEMMs run as the recipe of the active `autocast` says.

    features: the size of the output's last axis, or the sizes of its last axes; axis: of the input, contracted; kernel_axes, bias_axes:
    a logical axis for each dimension of kernel [*contracted, *features] and bias [*features] (`octavo.jax.MeshResource`); dtype: what
    the input is converted to, None for its own.  The output has that dtype; parameters are float32, and the kernel is cast from that.
    NaN and Inf propagate, into the result and into amax, and leave delayed scales as they were.
    Raises ValueError where the variables lack the metadata that the recipe keeps, or hold another's, and where shapes do not fit the mesh.
    Source: Transformer Engine's DenseGeneral.
    """

    features: int | Sequence[int]
    axis: int | Sequence[int] = -1
    kernel_axes: Axes = ()
    use_bias: bool = True
    bias_axes: Axes = ()
    dtype: Any = None
    kernel_init: Callable[..., Any] = KERNEL_INIT
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: Any) -> Array:
        """inputs: [..., contracted axes at their places, ...]; returns [*the other axes, *features]."""
        layer = ".".join(self.path) or type(self).__name__
        assert self.scope is not None
        axes = contracted(self.axis, jnp.shape(inputs), layer)
        shape = Shape(tuple(jnp.shape(inputs)[one] for one in axes), tuple_of(self.features))
        init = _partitioned(dense_kernel_init(self.kernel_init, shape), self.kernel_axes)
        kernel = self.param("kernel", init, (*shape.inputs, *shape.features), jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", _partitioned(self.bias_init, self.bias_axes), shape.features, jnp.float32)
        return dense(
            inputs,
            kernel,
            bias,
            axes=axes,
            shape=shape,
            layer=layer,
            dtype=self.dtype,
            metas=self._metas(layer),
            owner=self.scope.root,
            kernel_axes=self.kernel_axes,
            bias_axes=self.bias_axes if self.use_bias else (),
        )

    def _metas(self, layer: str) -> Any:
        if self.is_mutable_collection(FP8_COLLECTION):
            for name, value in fresh_metas(layer).items():
                if not self.has_variable(FP8_COLLECTION, name):
                    self.variable(FP8_COLLECTION, name, lambda value=value: value)
        return self.variables.get(FP8_COLLECTION, {})


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, or RMS normalisation, in float32; the output has dtype, or the input's.

    layernorm_type: a `Normalization` or its value; zero_centered_gamma: what is multiplied with is 1 + scale, and scale starts at 0.
    """

    epsilon: float = 1e-6
    layernorm_type: Normalization | str = Normalization.LAYER
    zero_centered_gamma: bool = False
    scale_axes: Axes = ()
    bias_axes: Axes = ()
    dtype: Any = None
    scale_init: Callable[..., Any] | None = None
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: Any) -> Array:
        """inputs: [..., features]; returns the same shape."""
        kind, features = Normalization(self.layernorm_type), jnp.shape(inputs)[-1:]
        start = nn.initializers.zeros_init() if self.zero_centered_gamma else nn.initializers.ones_init()
        scale = self.param("scale", _partitioned(self.scale_init or start, self.scale_axes), features, jnp.float32)
        bias = None
        if kind is Normalization.LAYER:
            bias = self.param("bias", _partitioned(self.bias_init, self.bias_axes), features, jnp.float32)
        return normalized(
            inputs, 1 + scale if self.zero_centered_gamma else scale, bias, kind, epsilon=self.epsilon, dtype=self.dtype
        )


class LayerNormDenseGeneral(nn.Module):
    """`LayerNorm`, then `DenseGeneral`: returns (output, what the normalisation gave, or None without return_layernorm_output).

    enable_layernorm: False leaves the normalisation out; depth_scaling: what the output is divided by, or None; the rest as in those two.
    """

    features: int | Sequence[int]
    enable_layernorm: bool = True
    layernorm_type: Normalization | str = Normalization.LAYER
    epsilon: float = 1e-6
    zero_centered_gamma: bool = False
    scale_axes: Axes = ()
    ln_bias_axes: Axes = ()
    axis: int | Sequence[int] = -1
    kernel_axes: Axes = ()
    use_bias: bool = False
    bias_axes: Axes = ()
    return_layernorm_output: bool = True
    depth_scaling: float | None = None
    dtype: Any = None
    kernel_init: Callable[..., Any] = KERNEL_INIT

    @nn.compact
    def __call__(self, inputs: Any) -> tuple[Array, Array | None]:
        """inputs: [..., features]."""
        x = inputs
        if self.enable_layernorm:
            x = LayerNorm(
                epsilon=self.epsilon,
                layernorm_type=self.layernorm_type,
                zero_centered_gamma=self.zero_centered_gamma,
                scale_axes=self.scale_axes,
                bias_axes=self.ln_bias_axes,
                dtype=self.dtype,
                name="layer_norm",
            )(x)
        y = DenseGeneral(
            features=self.features,
            axis=self.axis,
            kernel_axes=self.kernel_axes,
            use_bias=self.use_bias,
            bias_axes=self.bias_axes,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name="dense",
        )(x)
        y = y if self.depth_scaling is None else y / self.depth_scaling
        return y, x if self.return_layernorm_output and self.enable_layernorm else None


class LayerNormMLP(nn.Module):
    """`LayerNorm`, a `DenseGeneral` to intermediate_dim, activations, and one back: returns (output, layer norm's output or None).

    activations: names of functions of `flax.linen` or functions; of several, each has its own part of the first kernel, and what they
    give is multiplied.  intermediate_dropout_rate: of dropout after them, which draws from `dropout` unless deterministic.
    """

    intermediate_dim: int = 2048
    activations: Sequence[str | Callable[[Array], Array]] = ("gelu",)
    intermediate_dropout_rate: float = 0.0
    enable_layernorm: bool = True
    layernorm_type: Normalization | str = Normalization.LAYER
    epsilon: float = 1e-6
    zero_centered_gamma: bool = False
    scale_axes: Axes = ()
    ln_bias_axes: Axes = ()
    kernel_axes_1: Axes = ()
    kernel_axes_2: Axes = ()
    use_bias: bool = False
    bias_axes_1: Axes = ()
    bias_axes_2: Axes = ()
    return_layernorm_output: bool = True
    dtype: Any = None
    kernel_init: Callable[..., Any] = KERNEL_INIT

    @nn.compact
    def __call__(self, inputs: Any, deterministic: bool = True) -> tuple[Array, Array | None]:
        """inputs: [..., features]; the output has the same shape."""
        functions = activations(self.activations, ".".join(self.path) or type(self).__name__)
        hidden, normal = LayerNormDenseGeneral(
            features=(len(self.activations), self.intermediate_dim),
            enable_layernorm=self.enable_layernorm,
            layernorm_type=self.layernorm_type,
            epsilon=self.epsilon,
            zero_centered_gamma=self.zero_centered_gamma,
            scale_axes=self.scale_axes,
            ln_bias_axes=self.ln_bias_axes,
            kernel_axes=self.kernel_axes_1,
            use_bias=self.use_bias,
            bias_axes=self.bias_axes_1,
            return_layernorm_output=self.return_layernorm_output,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name="wi",
        )(inputs)
        gated = math.prod(function(hidden[..., number, :]) for number, function in enumerate(functions))
        gated = nn.Dropout(self.intermediate_dropout_rate)(gated, deterministic=deterministic)
        output = DenseGeneral(
            features=jnp.shape(inputs)[-1],
            kernel_axes=self.kernel_axes_2,
            use_bias=self.use_bias,
            bias_axes=self.bias_axes_2,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name="wo",
        )(gated)
        return output, normal
