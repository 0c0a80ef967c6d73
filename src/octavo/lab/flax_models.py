"""The lab's networks in Flax: the weights of `models.initial_weights` and `networks.start`, by the same names, in Flax's layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, assert_never

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

import octavo.jax
from octavo.lab.models import ModelName, exempt, initial_weights
from octavo.lab.networks import layers
from octavo.lab.sections import Activation, Model, ModelKind
from octavo.patterns import exempt_among

__all__ = ["Network", "Stack", "build", "convolution", "network_of", "spared_layers"]

_FUNCTIONS: Mapping[Activation, Callable[..., Any]] = {
    Activation.RELU: nn.relu,
    Activation.GELU: partial(nn.gelu, approximate=False),
    Activation.SILU: nn.silu,
    Activation.TANH: nn.tanh,
    Activation.SIGMOID: nn.sigmoid,
    Activation.ELU: nn.elu,
}
_HIDDEN: dict[ModelName, tuple[int, ...]] = {ModelName.MLP: (256, 10), ModelName.FC: (500, 300, 10)}


def convolution(x: Array, kernel: Array, strides: Any, padding: Any, **others: Any) -> Array:
    """`lax.conv_general_dilated`, for Flax's `Conv`; on a CPU a matrix product, where it is plain: in two dimensions, undilated, stride 1.

    x: [N, H, W, in]; kernel: [height, width, in, out].  Sums are float32, and the result has x's dtype.
    XLA's own convolution is some fifty times slower than this inside a compiled loop on a CPU.
    """
    dilated = {*(others.get("lhs_dilation") or ()), *(others.get("rhs_dilation") or ())} - {1}
    plain = kernel.ndim == 4 and set(strides) == {1} and not dilated and others.get("feature_group_count", 1) == 1
    if jax.default_backend() != "cpu" or not plain:
        return lax.conv_general_dilated(x, kernel, strides, padding, **others)
    height, width, _, features = kernel.shape
    pads = lax.padtype_to_pads(x.shape[1:3], (height, width), strides, padding) if isinstance(padding, str) else padding
    wide = jnp.pad(x.astype(jnp.float32), ((0, 0), *pads, (0, 0)))
    rows, columns = wide.shape[1] - height + 1, wide.shape[2] - width + 1
    shifted = [wide[:, i : i + rows, j : j + columns] for i in range(height) for j in range(width)]
    patches = jnp.concatenate(shifted, -1).reshape(-1, kernel.size // features)
    y = patches @ kernel.astype(jnp.float32).reshape(-1, features)
    return y.reshape(x.shape[0], rows, columns, features).astype(x.dtype)


class Network(nn.Module):
    """A network of the lab: images, float [N, 1, 28, 28], to log-probabilities, float32 [N, 10].

    dtype: that its layers compute in; parameters are float32.  Its dense layers, but for those in spared (None: `models.exempt`), are
    Octavo's, and so run in 8 bits inside `octavo.jax.autocast`.  Dropout draws from the random numbers `dropout` where train is set.
    """

    name_of: ModelName
    dtype: Any = jnp.float32
    spared: tuple[str, ...] | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        if self.name_of is ModelName.CNN:
            return jax.nn.log_softmax(self._cnn(images, train).astype(jnp.float32))
        x = images.reshape(images.shape[0], -1)
        for number, features in enumerate(_HIDDEN[self.name_of], 1):
            x = nn.relu(x) if number > 1 else x
            x = self._dense(features, f"fc{number}")(x)
        return jax.nn.log_softmax(x.astype(jnp.float32))

    def _cnn(self, images: Array, train: bool) -> Any:
        x = jnp.moveaxis(images, 1, -1)
        for name, features in (("conv1", 32), ("conv2", 64)):
            conv = nn.Conv(
                features, (3, 3), padding="VALID", dtype=self.dtype, conv_general_dilated=convolution, name=name
            )
            x = nn.relu(conv(x))
        x = nn.Dropout(0.25, deterministic=not train)(nn.max_pool(x, (2, 2), strides=(2, 2)))
        # Channels first, as PyTorch flattens them: fc1 then contracts the same numbers in the same order.
        x = jnp.moveaxis(x, -1, 1).reshape(images.shape[0], -1)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(self._dense(128, "fc1")(x)))
        return self._dense(10, "fc3")(self._dense(16, "fc2")(x))

    def _dense(self, features: int, name: str) -> Any:
        spared = exempt(self.name_of) if self.spared is None else self.spared
        return _dense(features, name, self.dtype, spared)


class Stack(nn.Module):
    """An FC-MNIST: images, float [N, 1, 28, 28], to log-probabilities (logits under disable_softmax), float32 [N, 10].

    dtype, spared: as of `Network`.  Dropout follows each hidden layer's activation, and draws from `dropout` where train is set.
    """

    model: Model
    dtype: Any = jnp.float32
    spared: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        x: Any = images.reshape(images.shape[0], -1)
        *hidden, (last, _, classes) = layers(self.model)
        for name, _, features in hidden:
            x = _FUNCTIONS[self.model.activation_fn](self._dense(features, name)(x))
            x = nn.Dropout(self.model.dropout, deterministic=not train)(x)
        x = self._dense(classes, last)(x).astype(jnp.float32)
        return x if self.model.disable_softmax else jax.nn.log_softmax(x)

    def _dense(self, features: int, name: str) -> Any:
        return _dense(features, name, self.dtype, self.spared, use_bias=self.model.use_bias)


def _dense(features: int, name: str, dtype: Any, spared: Iterable[str], *, use_bias: bool = True) -> Any:
    dense = nn.Dense if name in spared else octavo.jax.DenseGeneral
    return dense(features, use_bias=use_bias, dtype=dtype, name=name)


def network_of(model: Model, *, dtype: Any = jnp.float32, spared: tuple[str, ...] = ()) -> nn.Module:
    """The network that a configuration names; dtype: that its layers compute in; spared: the names of dense layers that are not Octavo's.

    Raises ValueError for a transformer, as the lab's data are images.
    """
    match model.name:
        case ModelKind.FC_MNIST:
            return Stack(model, dtype, spared)
        case ModelKind.CNN:
            return Network(ModelName.CNN, dtype, spared)
        case ModelKind.MLP:
            return Network(ModelName.MLP, dtype, spared)
        case ModelKind.TRANSFORMER:
            raise ValueError(
                "model.name: transformer is for octavo validate and octavo compile; the lab's data are images"
            )
        case _:
            assert_never(model.name)


def spared_layers(patterns: Iterable[str], weights: Mapping[str, Any]) -> tuple[str, ...]:
    """The dense layers that patterns name, as `octavo.torch.convert` reads them: names, or patterns with *, ? and [].

    weights: a network's parameters by PyTorch's names (`networks.start`).  Raises ValueError for a pattern that fits no dense layer.
    """
    dense = [name.removesuffix(".weight") for name, value in weights.items() if value.ndim == 2]
    spared = exempt_among(dense, patterns)
    return tuple(name for name in dense if name in spared)


def build(name: ModelName, *, seed: int, dtype: Any = jnp.float32) -> tuple[Network, Any]:
    """The network and its variables, with `initial_weights(name, seed)`; inside `octavo.jax.autocast` with the recipe's metadata.

    Raises `ValueError` when `seed` is not in [0, 2**64).
    """
    network = Network(name, dtype)
    start = network.init(jax.random.key(0), jnp.zeros((1, 1, 28, 28)))
    return network, octavo.jax.from_torch(initial_weights(name, seed), start)
