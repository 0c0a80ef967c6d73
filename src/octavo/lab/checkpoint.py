"""Checkpoints of PyTorch models; `octavo.checkpoint` has the format, in which `octavo.jax.save` writes too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from octavo import checkpoint
from octavo.checkpoint import VERSION, CheckpointError

__all__ = ["VERSION", "CheckpointError", "load", "save"]


def save(path: str | os.PathLike[str], model_state: Mapping[str, torch.Tensor], *, header: Mapping[str, Any]) -> None:
    """Writes `model_state` and `header` to `path`, which holds the old file or the new one at every moment.

    Args:
        path: the file; its folder must exist.
        model_state: name -> tensor, as `state_dict()` gives; any dtype that safetensors knows, any device, any strides.
        header: whatever JSON can hold (epoch, step, model, arm ...); `load` gives it back.

    Raises:
        CheckpointError: a value is not a tensor, the header is not JSON, or the folder cannot be written.
    """
    for name, value in model_state.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path}: checkpoints hold tensors only, {name!r} is a {type(value).__name__}; keep it in the header"
            )
    # Clones, because safetensors refuses tensors that share memory, such as tied weights.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model_state.items()}
    checkpoint.save(path, tensors, header=header, framework="torch")


def load(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads what `save`, or `octavo.jax.save`, wrote: the tensors, on the CPU, and the header.

    Raises:
        CheckpointError: the file is missing, truncated, not Octavo's, or from a newer version.
    """
    return checkpoint.load(path, framework="torch")
