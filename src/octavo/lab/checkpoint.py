"""Checkpoints that never pickle and are never half written: safetensors with a versioned JSON header.

The file's metadata holds one key, `octavo`, whose JSON is `{"format": "octavo", "version": 1, "header": {...}}`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from octavo.files import write_whole

__all__ = ["VERSION", "CheckpointError", "load", "save"]

VERSION = 1
_KEY = "octavo"


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names the file and the fix."""


def save(path: str | os.PathLike[str], model_state: Mapping[str, torch.Tensor], *, header: Mapping[str, Any]) -> None:
    """Writes `model_state` and `header` to `path`, which holds the old file or the new one at every moment.

    Args:
        path: the file; its folder must exist.
        model_state: name -> tensor, as `state_dict()` gives; any dtype that safetensors knows, any device, any strides.
        header: whatever JSON can hold (epoch, step, model, arm ...); `load` gives it back.

    Raises:
        CheckpointError: a value is not a tensor, the header is not JSON, or the folder cannot be written.
    """
    path = Path(path)
    for name, value in model_state.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path}: checkpoints hold tensors only, {name!r} is a {type(value).__name__}; keep it in the header"
            )
    try:
        text = json.dumps({"format": _KEY, "version": VERSION, "header": dict(header)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header must be plain JSON ({error}); store numbers, strings, lists"
        ) from None
    # Clones, because safetensors refuses tensors that share memory, such as tied weights.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model_state.items()}
    try:
        write_whole(path, safetensors.torch.save(tensors, metadata={_KEY: text}))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); choose a writable folder") from None


def load(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads what `save` wrote: the tensors, on the CPU, and the header.

    Raises:
        CheckpointError: the file is missing, truncated, not Octavo's, or from a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; check the path")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata())
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (not a mapping)
    except safetensors.SafetensorError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: truncated, or not a safetensors file ({reason}); use an earlier checkpoint"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _header(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The caller's header out of the file's metadata, or a `CheckpointError` that says whose file it is."""
    foreign = CheckpointError(f"{path}: not an Octavo checkpoint; give a file that octavo wrote")
    try:
        outer = json.loads((metadata or {})[_KEY])
    except (KeyError, json.JSONDecodeError):
        raise foreign from None
    if not isinstance(outer, dict) or outer.get("format") != _KEY or not isinstance(outer.get("version"), int):
        raise foreign
    if outer["version"] > VERSION:
        raise CheckpointError(
            f"{path}: checkpoint version {outer['version']}, this octavo reads up to {VERSION}; upgrade octavo"
        )
    header = outer.get("header")
    if not isinstance(header, dict):
        raise foreign
    return header
