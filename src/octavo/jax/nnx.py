"""The layers for Flax NNX: parameters are `nnx.Param`, float32; metadata is `Fp8Meta`, made with the layer inside `autocast`.

`nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Any(nnx.Param, Fp8Meta)))` gives the next state with the gradients; `nnx.update(model,
nnx.filter_state(gradients, Fp8Meta))` takes it over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from octavo.jax.context import current
from octavo.jax.dense import Shape, contracted, dense, dense_kernel_init, fresh_metas, tuple_of
from octavo.jax.linen import KERNEL_INIT, Axes
from octavo.jax.mesh import MeshResource
from octavo.jax.norm import Normalization, normalized
from octavo.jax.norm import activations as functions
from octavo.jax.state import AMAXES, amaxes_of, check

__all__ = ["DenseGeneral", "Fp8Meta", "LayerNorm", "LayerNormDenseGeneral", "LayerNormMLP", "mergeable"]


class Fp8Meta(nnx.Variable[Array]):
    """Metadata of a layer (`octavo.jax.state`), whose gradient is its next state."""


def _param(value: Array, axes: Axes) -> Any:
    """A parameter whose logical axes go along the mesh axes that the active `autocast` gives them (`nnx.get_partition_spec`)."""
    if not axes:
        return nnx.Param(value)
    frame = current()
    resource = MeshResource() if frame is None else frame.mesh_resource
    return nnx.Param(value, out_sharding=tuple(axes), sharding_rules=tuple(resource.rules()), eager_sharding=False)


def mergeable(model: nnx.Module) -> Any:
    """A copy of a model, of the same arrays, for a loss in which layers run several times: `octavo.jax.mergeable` for NNX.

    For use inside the differentiated function and inside `autocast`.
    """
    copy = nnx.merge(*nnx.split(model))
    frame = current()
    if frame is None or not frame.enabled:
        return copy
    for _, layer in nnx.iter_graph(copy):
        if isinstance(layer, DenseGeneral) and layer.metas:
            metas = {name: value for name, value in layer.held().items() if name != AMAXES}
            check(metas, frame.recipe, layer.path)
            setattr(layer, AMAXES, Fp8Meta(amaxes_of(frame.recipe, metas)))  # type: ignore[arg-type]
            layer.metas = (*metas, AMAXES)
    return copy


class DenseGeneral(nnx.Module):
    """`octavo.jax.DenseGeneral` for NNX.

    in_features: the sizes of the axes that it contracts; path: the layer's name in the model, which errors give and which seeds random
    draws: layers of one shape with one path draw alike.  The rest as there.
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        features: int | Sequence[int],
        *,
        axis: int | Sequence[int] = -1,
        kernel_axes: Axes = (),
        use_bias: bool = True,
        bias_axes: Axes = (),
        dtype: Any = None,
        kernel_init: Callable[..., Any] = KERNEL_INIT,
        bias_init: Callable[..., Any] = nnx.initializers.zeros_init(),  # noqa: B008 - it holds no state
        path: str = "DenseGeneral",
        rngs: nnx.Rngs,
    ) -> None:
        self.shape, self.axis, self.dtype, self.path = (
            Shape(tuple_of(in_features), tuple_of(features)),
            axis,
            dtype,
            path,
        )
        self.kernel_axes, self.bias_axes = tuple(kernel_axes), tuple(bias_axes) if use_bias else ()
        init = dense_kernel_init(kernel_init, self.shape)
        whole = (*self.shape.inputs, *self.shape.features)
        self.kernel = _param(init(rngs.params(), whole, jnp.float32), kernel_axes)
        start = bias_init(rngs.params(), self.shape.features, jnp.float32) if use_bias else None
        self.bias = None if start is None else _param(start, bias_axes)
        metas = fresh_metas(path)
        self.metas = tuple(metas)
        for name, value in metas.items():
            setattr(self, name, Fp8Meta(value))

    def held(self) -> dict[str, Any]:
        """The layer's metadata by name (`octavo.jax.state`)."""
        return {name: getattr(self, name).get_value() for name in self.metas}

    def __call__(self, inputs: Any) -> Array:
        """inputs: [..., contracted axes at their places, ...]; returns [*the other axes, *features]."""
        axes = contracted(self.axis, jnp.shape(inputs), self.path)
        sizes = tuple(jnp.shape(inputs)[one] for one in axes)
        if sizes != self.shape.inputs:
            raise ValueError(
                f"{self.path}: the contracted axes have {self.shape.inputs} elements; got {sizes} in an input {list(jnp.shape(inputs))}"
            )
        return dense(
            inputs,
            self.kernel[...],
            None if self.bias is None else self.bias[...],
            axes=axes,
            shape=self.shape,
            layer=self.path,
            dtype=self.dtype,
            metas=self.held(),
            owner=self,
            kernel_axes=self.kernel_axes,
            bias_axes=self.bias_axes,
        )


class LayerNorm(nnx.Module):
    """`octavo.jax.LayerNorm` for NNX."""

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-6,
        layernorm_type: Normalization | str = Normalization.LAYER,
        zero_centered_gamma: bool = False,
        scale_axes: Axes = (),
        bias_axes: Axes = (),
        dtype: Any = None,
    ) -> None:
        self.kind, self.epsilon, self.dtype = Normalization(layernorm_type), epsilon, dtype
        self.zero_centered_gamma = zero_centered_gamma
        start = jnp.zeros if zero_centered_gamma else jnp.ones
        self.scale = _param(start(features, jnp.float32), scale_axes)
        with_bias = self.kind is Normalization.LAYER
        self.bias = _param(jnp.zeros(features, jnp.float32), bias_axes) if with_bias else None

    def __call__(self, inputs: Any) -> Array:
        """inputs: [..., features]; returns the same shape."""
        scale, bias = self.scale[...], None if self.bias is None else self.bias[...]
        scale = 1 + scale if self.zero_centered_gamma else scale
        return normalized(inputs, scale, bias, self.kind, epsilon=self.epsilon, dtype=self.dtype)


class LayerNormDenseGeneral(nnx.Module):
    """`octavo.jax.LayerNormDenseGeneral` for NNX: returns (output, layer norm's output or None).

    norm: settings of `LayerNorm`; others: settings of `DenseGeneral`.
    """

    def __init__(
        self,
        in_features: int,
        features: int | Sequence[int],
        *,
        enable_layernorm: bool = True,
        return_layernorm_output: bool = True,
        depth_scaling: float | None = None,
        norm: dict[str, Any] | None = None,
        use_bias: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
        **others: Any,
    ) -> None:
        self.layer_norm = LayerNorm(in_features, dtype=dtype, **(norm or {})) if enable_layernorm else None
        self.dense = DenseGeneral(in_features, features, use_bias=use_bias, dtype=dtype, rngs=rngs, **others)
        self.return_layernorm_output, self.depth_scaling = return_layernorm_output, depth_scaling

    def __call__(self, inputs: Any) -> tuple[Array, Array | None]:
        """inputs: [..., features]."""
        x = inputs if self.layer_norm is None else self.layer_norm(inputs)
        y = self.dense(x)
        y = y if self.depth_scaling is None else y / self.depth_scaling
        return y, x if self.return_layernorm_output and self.layer_norm is not None else None


class LayerNormMLP(nnx.Module):
    """`octavo.jax.LayerNormMLP` for NNX: returns (output, layer norm's output or None).

    norm: settings of `LayerNorm`; path: under which its two dense layers are `<path>.wi` and `<path>.wo`.
    """

    def __init__(
        self,
        in_features: int,
        intermediate_dim: int = 2048,
        *,
        activations: Sequence[str | Callable[[Array], Array]] = ("gelu",),
        intermediate_dropout_rate: float = 0.0,
        kernel_axes_1: Axes = (),
        kernel_axes_2: Axes = (),
        use_bias: bool = False,
        bias_axes_1: Axes = (),
        bias_axes_2: Axes = (),
        dtype: Any = None,
        path: str = "LayerNormMLP",
        rngs: nnx.Rngs,
        **others: Any,
    ) -> None:
        self.activations = tuple(functions(activations, path))
        shared = {"use_bias": use_bias, "dtype": dtype, "rngs": rngs}
        self.wi = LayerNormDenseGeneral(
            in_features,
            (len(self.activations), intermediate_dim),
            kernel_axes=kernel_axes_1,
            bias_axes=bias_axes_1,
            path=f"{path}.wi",
            **shared,
            **others,
        )
        self.wo = DenseGeneral(
            intermediate_dim, in_features, kernel_axes=kernel_axes_2, bias_axes=bias_axes_2, path=f"{path}.wo", **shared
        )
        self.dropout = nnx.Dropout(intermediate_dropout_rate, rngs=rngs)

    def __call__(self, inputs: Any, deterministic: bool = True) -> tuple[Array, Array | None]:
        """inputs: [..., features]; the output has the same shape."""
        hidden, normal = self.wi(inputs)
        gated = math.prod(function(hidden[..., number, :]) for number, function in enumerate(self.activations))
        return self.wo(self.dropout(gated, deterministic=deterministic)), normal
