"""Octavo trains neural networks in 8 bits, on any machine.

    import octavo

    codes = octavo.encode(x, octavo.formats.E4M3FN)
    octavo.decode(codes, octavo.formats.E4M3FN)

`octavo.torch` is the PyTorch front end; no framework is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo import formats, recipes, reference, rounding, scaling
    from octavo.archive import load_qtensors, save_qtensors
    from octavo.casts import amax, decode, encode, quantize
    from octavo.formats import Format, get_format
    from octavo.qtensor import QTensor
    from octavo.recipes import Accumulator, Gemm, Recipe, TensorSpec, Transform, get_recipe
    from octavo.rounding import Overflow, Rounding

__version__ = "0.1.0"

__all__ = [
    "Accumulator",
    "Format",
    "Gemm",
    "Overflow",
    "QTensor",
    "Recipe",
    "Rounding",
    "TensorSpec",
    "Transform",
    "amax",
    "decode",
    "encode",
    "formats",
    "get_format",
    "get_recipe",
    "load_qtensors",
    "quantize",
    "recipes",
    "reference",
    "rounding",
    "save_qtensors",
    "scaling",
]

_HOMES = {
    "Accumulator": "recipes",
    "Format": "formats",
    "Gemm": "recipes",
    "Overflow": "rounding",
    "QTensor": "qtensor",
    "Recipe": "recipes",
    "Rounding": "rounding",
    "TensorSpec": "recipes",
    "Transform": "recipes",
    "amax": "casts",
    "decode": "casts",
    "encode": "casts",
    "get_format": "formats",
    "get_recipe": "recipes",
    "load_qtensors": "archive",
    "quantize": "casts",
    "save_qtensors": "archive",
}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `octavo --help` waits for neither NumPy nor Numba.
    if name in _HOMES:
        return getattr(importlib.import_module(f"octavo.{_HOMES[name]}"), name)
    if name in __all__ or name in ("torch", "lab"):
        return importlib.import_module(f"octavo.{name}")
    raise AttributeError(f"module 'octavo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
