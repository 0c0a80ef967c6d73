"""Checkpoints that never pickle and are never half written: safetensors with a versioned JSON header, from and for any framework.

The file's metadata holds two keys: `octavo`, whose JSON is `{"format": "octavo", "version": 2, "header": {...}}`, and `sha256`, the
digest of the whole file with zeros in its own place.  Version 1 had no digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from octavo.files import write_whole

__all__ = ["VERSION", "CheckpointError", "load", "read_header", "save"]

VERSION = 2
_KEY, _DIGEST = "octavo", "sha256"
_BLANK = "0" * 64
_STANDS = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_HEAD, _CHUNK = 8, 1 << 20
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
    blank = _safetensors(framework).save(dict(tensors), metadata={_KEY: text, _DIGEST: _BLANK})
    place = _place(blank[: _HEAD + int.from_bytes(blank[:_HEAD], "little")])
    assert place is not None
    content = b"".join((blank[: place[0]], hashlib.sha256(blank).hexdigest().encode(), blank[place[1] :]))
    try:
        write_whole(path, content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); choose a writable folder") from None


def load(path: str | os.PathLike[str], *, framework: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `save` wrote, from whichever framework: the tensors of this one, on the CPU, and the header.

    Raises CheckpointError where the file is missing, truncated, damaged, not Octavo's, or from a newer version, ImportError without
    safetensors.
    """
    path = Path(path)
    with _opened(path, framework) as file:
        version, header = _header(path, file.metadata())
        _check_digest(path, version)
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (not a mapping)


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header alone.  Raises CheckpointError as `load` does, but looks at no tensor."""
    path = Path(path)
    with _opened(path, "numpy") as file:
        return _header(path, file.metadata())[1]


@contextlib.contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    """The file as safetensors reads it; what cannot be read within the block is a `CheckpointError`."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; check the path")
    _safetensors(framework)
    safetensors = importlib.import_module("safetensors")
    try:
        with safetensors.safe_open(path, framework=_MODULES[framework]) as file:
            yield file
    except safetensors.SafetensorError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: truncated, or not a safetensors file ({reason}); use an earlier checkpoint"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _place(head: bytes) -> tuple[int, int] | None:
    """Where the digest stands, in the JSON that safetensors begins a file with."""
    found = _STANDS.search(head)
    return found.span(1) if found else None


def _check_digest(path: Path, version: int) -> None:
    """Raise CheckpointError where the file is not as it was written."""
    with open(path, "rb") as file:
        size = file.read(_HEAD)
        head = size + file.read(int.from_bytes(size, "little"))
        place = _place(head)
        if place is None:
            if version > 1:
                raise CheckpointError(f"{path}: damaged, its SHA-256 cannot be read; use an earlier checkpoint")
            return
        digest = hashlib.sha256(head[: place[0]] + _BLANK.encode() + head[place[1] :])
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest().encode() != head[slice(*place)]:
        raise CheckpointError(f"{path}: damaged, its SHA-256 is not the one written; use an earlier checkpoint")


def _safetensors(framework: str) -> Any:
    try:
        return importlib.import_module(f"safetensors.{framework}")
    except ModuleNotFoundError:
        extra = "torch" if framework == "torch" else "jax"
        raise ImportError(
            f"checkpoints are written and read by safetensors, which is not installed; pip install 'octavo[{extra}]'"
        ) from None


def _header(path: Path, metadata: Mapping[str, str] | None) -> tuple[int, dict[str, Any]]:
    """The version and the caller's header out of the file's metadata, or a `CheckpointError` that says whose file it is."""
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
    return outer["version"], header
