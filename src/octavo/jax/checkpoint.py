"""Checkpoints of Flax variables under PyTorch's names and in its layouts, so that either framework loads what the other wrote.

    params/fc1/kernel [in, out]                    fc1.weight [out, in]
    params/conv1/kernel [height, width, in, out]   conv1.weight [out, in, height, width]
    params/norm/scale [features]                   norm.weight
    params/embed/embedding                         embed.weight
    fp8_metas/fc1/x_scale, kernel_scale, ...       fc1.scale_forward [3], fc1.amax_history_forward [steps, 3]
    fp8_metas/fc1/grad_scale, ...                  fc1.scale_backward [2], fc1.amax_history_backward [steps, 2]
    fp8_metas/fc1/draws [4]                        fc1.draws [2], int64: seed and step

Other collections keep their names: batch_stats/norm/mean is batch_stats.norm.mean.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, meta, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from octavo import checkpoint
from octavo.checkpoint import CheckpointError
from octavo.jax.state import FP8_COLLECTION, NAMES, fresh_draws

__all__ = ["from_torch", "load", "save", "to_torch"]

_DIRECTIONS = {"forward": ("input", "weight", "output"), "backward": ("grad_output", "grad_input")}
"""The tensors that the columns of PyTorch's scales and histories stand for."""
_PARAMETERS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def save(
    path: str | os.PathLike[str], variables: Mapping[str, Any], *, header: Mapping[str, Any] | None = None
) -> None:
    """Write variables as `to_torch` has them, in one step, with a header of plain JSON.  Raises CheckpointError as that does, and where
    the file cannot be written."""
    checkpoint.save(path, to_torch(variables), header=header or {}, framework="numpy")


def load(path: str | os.PathLike[str], like: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(variables, header) from a checkpoint of JAX or of PyTorch: of the structure, shapes and dtypes of `like`, as `model.init` gives.

    Raises CheckpointError where the file cannot be read, lacks a parameter or holds it in another shape.
    """
    tensors, header = checkpoint.load(path, framework="numpy")
    return from_torch(tensors, like, source=str(path)), header


def to_torch(variables: Mapping[str, Any]) -> dict[str, Any]:
    """NumPy arrays of a PyTorch `state_dict` from collections of variables; kernels over several axes become matrices.

    A kernel of 4 or 5 axes is a convolution's, as is one of 3 in a layer that is called so, unless the layer has 8-bit metadata or a
    bias of several axes.  Raises CheckpointError for metadata of layers that `nn.scan` stacked, for which PyTorch has no name.
    """
    state: dict[str, Any] = {}
    variables = unfreeze(dict(variables))
    dense = _dense(variables)
    for collection, tree in meta.unbox(variables).items():
        flat = flatten_dict(tree)
        if collection == FP8_COLLECTION:
            for layer in dict.fromkeys(path[:-1] for path in flat):
                metas = {path[-1]: np.asarray(value) for path, value in flat.items() if path[:-1] == layer}
                if any(value.ndim > 1 for value in metas.values()):
                    raise CheckpointError(
                        f"{'.'.join(layer)}: layers stacked by nn.scan or nn.vmap have no names in PyTorch; unstack the variables first"
                    )
                state |= {".".join((*layer, name)): value for name, value in _state_of(metas, ".".join(layer)).items()}
            continue
        for path, value in flat.items():
            *layer, name = path if collection == "params" else (collection, *path)
            array = np.asarray(value)
            if collection == "params":
                name, array = _PARAMETERS.get(name, name), _turned(array, path, flat, dense)
            state[".".join((*layer, name))] = np.ascontiguousarray(array)
    return state


_Tree = Mapping[tuple[str, ...], Any]


def _outputs(path: tuple[str, ...], params: _Tree) -> int:
    """How many of a kernel's last axes are the layer's features: as many as its bias has, else one, but two in a LayerNormMLP's first."""
    bias = params.get((*path[:-1], "bias"))
    if bias is None:
        return 2 if path[-3:-1] == ("wi", "dense") else 1
    return len(bias.shape)


def _is_convolution(path: tuple[str, ...], params: _Tree, dense: set[tuple[str, ...]]) -> bool:
    """A kernel [height, width, in, out], or of 1 or 3 dimensions in space, where the layer has no 8-bit metadata and no further axes of
    features; one of 1 dimension has to be called a convolution, since dense layers over two axes look alike."""
    axes = len(params[path].shape)
    if axes < 3 or _outputs(path, params) > 1 or path[:-1] in dense:
        return False
    return axes > 3 or any("conv" in part.lower() for part in path)


def _turned(array: Any, path: tuple[str, ...], params: _Tree, dense: set[tuple[str, ...]]) -> Any:
    """A parameter in PyTorch's layout."""
    if path[-1] == "bias":
        return array.reshape(-1)
    if path[-1] != "kernel":
        return array
    if _is_convolution(path, params, dense):
        return np.moveaxis(array, (-1, -2), (0, 1))
    return array.reshape(math.prod(array.shape[: array.ndim - _outputs(path, params)]), -1).T


def _returned(tensor: Any, path: tuple[str, ...], params: _Tree, dense: set[tuple[str, ...]]) -> Any:
    """A parameter from PyTorch's layout."""
    if path[-1] == "kernel" and _is_convolution(path, params, dense):
        return np.moveaxis(tensor, (0, 1), (-1, -2))
    return (tensor.T if path[-1] == "kernel" else tensor).reshape(params[path].shape)


def _dense(variables: Mapping[str, Any]) -> set[tuple[str, ...]]:
    """The layers that have 8-bit metadata."""
    return {path[:-1] for path in flatten_dict(meta.unbox(variables.get(FP8_COLLECTION, {})))}


def _state_of(metas: Mapping[str, Any], layer: str) -> dict[str, Any]:
    """PyTorch's buffers of a layer from its metadata; what the recipe does not scale with delay has scale 1 and a history of zeros."""
    state: dict[str, Any] = {}
    steps = max((len(value) for name, value in metas.items() if name.endswith("_amax_history")), default=0)
    for direction, tensors in _DIRECTIONS.items():
        scales, history = np.ones(len(tensors), np.float32), np.zeros((steps, len(tensors)), np.float32)
        for column, tensor in enumerate(tensors):
            if f"{NAMES[tensor]}_scale" in metas:
                scales[column] = metas[f"{NAMES[tensor]}_scale"][0]
                history[:, column] = metas[f"{NAMES[tensor]}_amax_history"]
        state[f"scale_{direction}"], state[f"amax_history_{direction}"] = scales, history
    words = [int(word) for word in (metas["draws"] if "draws" in metas else fresh_draws(layer))]
    state["draws"] = np.array([words[0] | words[1] << 16, words[2] | words[3] << 16], np.int64)
    return state


def _metas_from(state: Mapping[str, Any], layer: str, like: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A layer's metadata, by the names in `like`, from PyTorch's buffers; fresh where they are empty or not there."""
    for direction, tensors in _DIRECTIONS.items():
        scales, history = (state.get(f"{layer}{name}_{direction}") for name in ("scale", "amax_history"))
        for column, tensor in enumerate(tensors):
            for name, stored in ((f"{NAMES[tensor]}_scale", scales), (f"{NAMES[tensor]}_amax_history", history)):
                if name in like:
                    yield name, _column(stored, column, like[name].shape[0], name)
    if "draws" in like:
        words = fresh_draws(layer.removesuffix("."))
        if f"{layer}draws" in state:
            seed, step = (int(word) for word in state[f"{layer}draws"])
            words = [seed & 0xFFFF, seed >> 16 & 0xFFFF, step & 0xFFFF, step >> 16 & 0xFFFF]
        yield "draws", jnp.array(words, jnp.float32)


def _column(stored: Any, column: int, wanted: int, name: str) -> Array:
    """A tensor's scale or history, fresh where there is none; of a history of another length the newest rows, and row 0."""
    if stored is None or not len(stored):
        return jnp.ones(1, jnp.float32) if name.endswith("_scale") else jnp.zeros(wanted, jnp.float32)
    if stored.ndim == 1:
        return jnp.asarray(stored[column : column + 1])
    own = stored[:, column]
    kept = min(len(own), wanted) - 1
    padded = np.zeros(wanted, np.float32)
    padded[wanted - kept :] = own[len(own) - kept :] if kept else ()
    padded[0] = own[0]
    return jnp.asarray(padded)


def from_torch(state: Mapping[str, Any], like: Mapping[str, Any], *, source: str = "the state_dict") -> Any:
    """Variables of the structure, shapes and dtypes of `like` from a PyTorch `state_dict` of arrays; what it holds beside is left out.

    Metadata that state does not have is fresh.  Returns a FrozenDict where like is one.
    Raises CheckpointError, by the tensor's name, for a parameter that is not there or has another shape.
    """
    found: dict[str, Any] = {}
    dense = _dense(unfreeze(dict(like)))
    for collection, tree in unfreeze(dict(like)).items():
        flat = flatten_dict(meta.unbox(tree))
        if collection == FP8_COLLECTION:
            for layer in dict.fromkeys(path[:-1] for path in flat):
                own = {path[-1]: value for path, value in flat.items() if path[:-1] == layer}
                flat |= {(*layer, name): value for name, value in _metas_from(state, ".".join((*layer, "")), own)}
            found[collection] = unflatten_dict(flat)
            continue
        for path, value in flat.items():
            *layer, name = path if collection == "params" else (collection, *path)
            key = ".".join((*layer, _PARAMETERS.get(name, name) if collection == "params" else name))
            array = _fetched(state, key, source)
            if collection == "params":
                wanted = _turned(np.empty(value.shape, np.bool_), path, flat, dense).shape
                _check_shape(array, wanted, key, source)
                array = _returned(array, path, flat, dense)
            else:
                _check_shape(array, value.shape, key, source)
            flat[path] = jnp.asarray(array, value.dtype)
        found[collection] = meta.replace_boxed(tree, unflatten_dict(flat))
    return FrozenDict(found) if isinstance(like, FrozenDict) else found


def _fetched(state: Mapping[str, Any], key: str, source: str) -> Any:
    if key not in state:
        raise CheckpointError(f"{source}: no tensor {key!r}, which the model has; give the checkpoint of this model")
    return np.asarray(state[key])


def _check_shape(array: Any, wanted: tuple[int, ...], key: str, source: str) -> None:
    if array.shape != wanted:
        raise CheckpointError(
            f"{source}: {key!r} is {list(array.shape)}, and the model's {list(wanted)} in PyTorch's layout; give the checkpoint of this "
            "model"
        )
