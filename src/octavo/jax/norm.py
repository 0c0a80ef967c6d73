"""Normalisation and activations, as linen and NNX layers share them."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from octavo.names import nearest

__all__ = ["Normalization", "activations", "normalized"]


_NAMES = [
    "celu",
    "elu",
    "gelu",
    "hard_sigmoid",
    "hard_swish",
    "hard_tanh",
    "leaky_relu",
    "linear",
    "log_sigmoid",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "soft_sign",
    "softplus",
    "swish",
    "tanh",
]


class Normalization(enum.Enum):
    """What a normalisation takes out of its input."""

    LAYER = "layernorm"
    """Mean and variance (Ba et al., arXiv 1607.06450)."""
    RMS = "rmsnorm"
    """The root of the mean square (Zhang and Sennrich, arXiv 1910.07467)."""

    @classmethod
    def _missing_(cls, value: object) -> Normalization:
        names = [member.value for member in cls]
        raise ValueError(f"layernorm_type is one of {names}; got {value!r}{nearest(str(value), names)}")


def normalized(x: Any, scale: Array, bias: Array | None, kind: Normalization, *, epsilon: float, dtype: Any) -> Array:
    """x over its last axis, times scale, plus bias; computed in float32, returned in dtype, or x's own.  Flax's own arithmetic."""
    x = jnp.asarray(x)
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    match kind:
        case Normalization.LAYER:
            norm: Any = nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, use_bias=False, use_scale=False)
        case Normalization.RMS:
            norm = nn.RMSNorm(epsilon=epsilon, dtype=jnp.float32, use_scale=False)
    y = norm.apply({}, x) * scale
    y = y if bias is None else y + bias
    return y.astype(x.dtype if dtype is None else dtype)  # type: ignore[no-any-return]


def activations(names: Sequence[str | Callable[[Array], Array]], layer: str) -> list[Callable[[Array], Array]]:
    """The functions of those names in `flax.linen`, or the functions themselves; "linear" is the identity.

    Raises ValueError, naming the layer, for no function at all and for a name that is none.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"{layer}: activations are one function or more, such as ('gelu',); got {names!r}")
    return [_activation(name, layer) for name in names]


def _activation(name: Any, layer: str) -> Callable[[Array], Array]:
    if callable(name):
        return name  # type: ignore[no-any-return]
    if name == "linear":
        return lambda x: x
    if name not in _NAMES:
        raise ValueError(
            f"{layer}: activations are functions or among {_NAMES}; got {name!r}{nearest(str(name), _NAMES)}"
        )
    return getattr(nn, name)  # type: ignore[no-any-return]
