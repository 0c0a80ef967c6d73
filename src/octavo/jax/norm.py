"""Normalisation and activations, as linen and NNX layers share them."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from octavo.names import nearest

__all__ = ["Normalization", "activation", "normalized"]


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
    match kind:
        case Normalization.LAYER:
            norm: Any = nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, use_bias=False, use_scale=False)
        case Normalization.RMS:
            norm = nn.RMSNorm(epsilon=epsilon, dtype=jnp.float32, use_scale=False)
    y = norm.apply({}, x) * scale
    y = y if bias is None else y + bias
    return y.astype(x.dtype if dtype is None else dtype)  # type: ignore[no-any-return]


def activation(name: str | Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The function of that name in `flax.linen`, or the function itself; "linear" is the identity.  Raises ValueError for no name."""
    if callable(name):
        return name
    if name == "linear":
        return lambda x: x
    function = getattr(nn, name, None)
    if not callable(function):
        raise ValueError(f"activations are functions or names such as 'relu', 'gelu', 'silu'; got {name!r}")
    return function  # type: ignore[no-any-return]
