"""Checkpoints that never pickle and are never half written: safetensors with a versioned JSON header, from and for any framework.

The file's metadata holds one key, `octavo`, whose JSON is `{"format": "octavo", "version": 1, "header": {...}}`.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.files import write_whole

__all__ = ["VERSION", "CheckpointError", "load", "save"]

VERSION = 1
_KEY = "octavo"
_MODULES = {"torch": "pt", "flax": "flax", "numpy": "np"}
"""safetensors' modules that write a framework's tensors, and its names of the frameworks that read them."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names the file and the fix."""


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], *, header: Mapping[str, Any], framework: str
) -> None:
    """Write tensors and header to `path`, which holds the old file or the new one at every moment.

    path: the file; its folder must exist; tensors: by name, contiguous, none sharing memory with another; header: whatever JSON can
    hold; framework: "torch", "flax" or "numpy", whose tensors they are.
    Raises CheckpointError where the header is not JSON or the folder cannot be written, ImportError without safetensors.
    """
    path = Path(path)
    try:
        text = json.dumps({"format": _KEY, "version": VERSION, "header": dict(header)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header must be plain JSON ({error}); store numbers, strings, lists"
        ) from None
    content = _safetensors(framework).save(dict(tensors), metadata={_KEY: text})
    try:
        write_whole(path, content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); choose a writable folder") from None


def load(path: str | os.PathLike[str], *, framework: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `save` wrote, from whichever framework: the tensors of this one, on the CPU, and the header.

    Raises CheckpointError where the file is missing, truncated, not Octavo's, or from a newer version, ImportError without safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; check the path")
    _safetensors(framework)
    safetensors = importlib.import_module("safetensors")
    try:
        with safetensors.safe_open(path, framework=_MODULES[framework]) as file:
            header = _header(path, file.metadata())
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (not a mapping)
    except safetensors.SafetensorError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: truncated, or not a safetensors file ({reason}); use an earlier checkpoint"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _safetensors(framework: str) -> Any:
    try:
        return importlib.import_module(f"safetensors.{framework}")
    except ModuleNotFoundError:
        extra = "torch" if framework == "torch" else "jax"
        raise ImportError(
            f"checkpoints are written and read by safetensors, which is not installed; pip install 'octavo[{extra}]'"
        ) from None


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
