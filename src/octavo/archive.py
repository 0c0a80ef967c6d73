"""Quantised tensors in files: safetensors with a versioned JSON header, the same for NumPy, torch and JAX.

A tensor `name` is stored as `name.codes`, `name.scales` and, where scales are two-level, `name.amax`; a plain array as `name`.  The
metadata's `octavo.qtensors` says, as JSON, what each means.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from octavo.files import write_whole
from octavo.names import nearest
from octavo.qtensor import FLOATS, Array, QTensor, dtype_name, library_name
from octavo.table import spec_from, spell_spec

__all__ = ["VERSION", "load_qtensors", "save_qtensors"]

VERSION = 1
"""The version that is written; files of versions up to it are read."""
_KEY = "octavo.qtensors"
_LIBRARIES = ("numpy", "torch", "jax")
_PLAIN = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), *FLOATS)
"""The dtypes of plain arrays that every library and safetensors hold."""

NumPy: TypeAlias = npt.NDArray[Any]


def save_qtensors(path: str | os.PathLike[str], tensors: Mapping[str, QTensor | Array]) -> None:
    """Write quantised tensors and plain arrays, of any library and device, to `path`: at every moment the old file or the new one.

    Plain arrays are bool, integers or floats of up to 64 bits.  How delayed scales are updated is not stored, for codes do not
    depend on it.  Raises ValueError for anything else, for names that collide, and for a folder that cannot be written.
    """
    path, safetensors = Path(path), _safetensors()
    stored: dict[str, NumPy] = {}
    header: dict[str, Any] = {}
    for name, value in tensors.items():
        parts = {name: value}
        if isinstance(value, QTensor):
            header[name] = {
                "spec": spell_spec(value.spec),
                "shape": value.shape,
                "axis": value.axis,
                "dtype": dtype_name(value.dtype),
            }
            parts = {f"{name}.codes": value.codes, f"{name}.scales": value.scales}
            if value.amax is not None:
                parts[f"{name}.amax"] = value.amax
        for part, array in parts.items():
            if part in stored:
                raise ValueError(f"names in a file differ; {part!r} is given twice: rename {name!r}")
            stored[part] = _to_numpy(part, array)
    text = json.dumps({"version": VERSION, "tensors": header})
    try:
        write_whole(path, safetensors.numpy.save(stored, metadata={_KEY: text}))
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); choose a writable folder") from None


def load_qtensors(path: str | os.PathLike[str], library: str = "numpy") -> dict[str, QTensor | Array]:
    """What `save_qtensors` wrote, by name, as arrays of `library`: "numpy", "torch" (on the CPU) or "jax".

    Raises ValueError, naming the file, where it is truncated, no safetensors file, not Octavo's, of a newer version, or at odds with
    its own header, and for 64-bit numbers in a JAX that does not hold them; FileNotFoundError where there is none.
    """
    if library not in _LIBRARIES:
        raise ValueError(f"a library is one of {', '.join(_LIBRARIES)}; got {library!r}{nearest(library, _LIBRARIES)}")
    path, safetensors = Path(path), _safetensors()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            header = _header(path, file.metadata())
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: truncated, or not a safetensors file ({reason}); write it again") from None
    try:
        found: dict[str, QTensor | Array] = {
            name: _qtensor(name, entry, stored, library) for name, entry in header.items()
        }
        return found | {name: _from_numpy(array, library) for name, array in stored.items()}
    except _NoSuchNumbers as error:
        raise ValueError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: at odds with its own header ({error}); write it again") from None


class _NoSuchNumbers(Exception):
    """The library, as it is configured, does not hold a dtype."""


def _header(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The entries of the quantised tensors, by name."""
    foreign = ValueError(f"{path}: not a file of quantised tensors; give one that octavo.save_qtensors wrote")
    try:
        header = json.loads((metadata or {})[_KEY])
        version, entries = header["version"], header["tensors"]
    except (KeyError, TypeError, ValueError):
        raise foreign from None
    if not isinstance(version, int) or not isinstance(entries, dict):
        raise foreign
    if version > VERSION:
        raise ValueError(f"{path}: of version {version}, and this octavo reads up to {VERSION}; upgrade octavo")
    return entries


def _qtensor(name: str, entry: Mapping[str, Any], stored: dict[str, NumPy], library: str) -> QTensor:
    """The tensor that `entry` describes, whose parts are taken out of `stored`."""
    spec, codes, amax = spec_from(entry["spec"]), stored.pop(f"{name}.codes"), stored.pop(f"{name}.amax", None)
    if codes.size and 4 < spec.format.bits < 8 and int(codes.max()) >= 1 << spec.format.bits:
        raise ValueError(f"{spec.format.name} has codes 0 to {(1 << spec.format.bits) - 1}; got {int(codes.max())}")
    if entry["dtype"] not in FLOATS:
        raise ValueError(f"a quantised tensor decodes to {', '.join(FLOATS)}; got {entry['dtype']}")
    return QTensor(
        codes=_from_numpy(codes, library),
        scales=_from_numpy(stored.pop(f"{name}.scales"), library),
        amax=None if amax is None else _from_numpy(amax, library),
        spec=spec,
        shape=entry["shape"],
        axis=entry["axis"],
        dtype=_dtype(entry["dtype"], library),
    )


def _dtype(name: str, library: str) -> Any:
    """The library's dtype of that name."""
    if library == "torch":
        return getattr(importlib.import_module("torch"), name)
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    if library == "jax" and importlib.import_module("jax").dtypes.canonicalize_dtype(dtype) != dtype:
        raise _NoSuchNumbers(
            f'JAX does not hold {name} as it is configured; set jax_enable_x64, or load it with library="numpy"'
        )
    return dtype


def _to_numpy(name: str, x: Array) -> NumPy:
    """The same elements in row-major memory of the CPU."""
    if dtype_name(getattr(x, "dtype", "")) not in _PLAIN:
        raise ValueError(
            f"a file holds quantised tensors and arrays of bool, integers or floats of 16 to 64 bits; {name!r} is "
            f"{getattr(x, 'dtype', type(x).__name__)}: convert it first"
        )
    if library_name(x) == "torch":
        x = x.detach().cpu().resolve_neg().contiguous()
        if dtype_name(x.dtype) == "bfloat16":
            return np.asarray(x.view(importlib.import_module("torch").uint16).numpy().view(ml_dtypes.bfloat16))
        return np.asarray(x.numpy())
    return np.asarray(x, order="C")


def _from_numpy(x: NumPy, library: str) -> Array:
    """The same elements as an array of `library`."""
    dtype = _dtype(x.dtype.name, library)
    if library == "torch":
        torch = importlib.import_module("torch")
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.view(np.uint16)).view(dtype)
        return torch.from_numpy(x)
    return importlib.import_module("jax.numpy").asarray(x) if library == "jax" else x


def _safetensors() -> Any:
    try:
        importlib.import_module("safetensors.numpy")
        return importlib.import_module("safetensors")
    except ImportError:
        raise ImportError(
            "files of quantised tensors are written and read by safetensors, which is not installed; pip install 'octavo[torch]'"
        ) from None
