"""Tensors kept whole: which ones, at which steps, and where their files lie."""

from __future__ import annotations

import fnmatch
import io
import os
import urllib.parse
from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from octavo.files import write_whole
from octavo.rounding import checked_counter

__all__ = ["Dumps"]


@dataclass(frozen=True, slots=True)
class Dumps:
    """Which tensors are written to files of NumPy's, and at which steps: `<directory>/step-00000012/<module>.<tensor>.npy`.

    Raises ValueError for both or neither of `every` and `steps`, for `every` below 1, and for a directory that cannot be written.
    """

    directory: str | os.PathLike[str]
    """Made when the first tensor is written."""
    _: KW_ONLY
    patterns: Sequence[str] = ("*",)
    """A tensor is wanted whose `module.tensor` matches any of these, as a shell matches file names: `encoder.*.weight`."""
    every: int | None = None
    """Steps 0, every, 2 * every, ..."""
    steps: Collection[int] | None = None
    """These steps."""

    def __post_init__(self) -> None:
        if isinstance(self.patterns, str):
            raise ValueError(f"patterns is a sequence of patterns; got {self.patterns!r}: write ({self.patterns!r},)")
        if (self.every is None) == (self.steps is None):
            given = "neither" if self.every is None else "both"
            raise ValueError(
                f"dumps are made every so many steps, or at given steps; got {given}: give one, every=100, say"
            )
        if self.every is not None and self.every < 1:
            raise ValueError(f"every is 1 or more steps; got {self.every}: write every=1 for each step")
        directory = Path(self.directory)
        there = next(filter(os.path.exists, (directory.absolute(), *directory.absolute().parents)), directory)
        if not (os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)):
            raise _unwritable(directory, "Permission denied" if os.path.isdir(there) else "Not a directory")
        object.__setattr__(self, "directory", directory)
        object.__setattr__(self, "patterns", tuple(self.patterns))
        object.__setattr__(self, "steps", None if self.steps is None else frozenset(self.steps))

    def wants(self, step: int, module: str, tensor: str) -> bool:
        """Whether that tensor is to be written at that step."""
        if self.every is not None and step % self.every:
            return False
        if self.steps is not None and step not in self.steps:
            return False
        name = _name(module, tensor)
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)

    def write(self, step: int, module: str, tensor: str, array: npt.NDArray[np.generic]) -> Path:
        """Writes the array, wanted or not, and returns its file: at every moment the old file, if any, or the new one.

        array: bool, integers, floats or complex numbers of NumPy's own, any shape.  In the names of modules, what file names do not
        take everywhere is spelled as in a URL: `a/b` as `a%2Fb`.
        Raises ValueError for other dtypes, a negative step, and a file that cannot be written.
        """
        array = np.asarray(array)
        if array.dtype.kind not in "biufc" or array.dtype.isbuiltin == 2:
            raise ValueError(
                f"a .npy file holds dtypes of NumPy's own; {_name(module, tensor)} is {array.dtype}: convert it first"
            )
        folder = Path(self.directory, f"step-{checked_counter('step', step, 1 << 63):08d}")
        path = folder / (urllib.parse.quote(_name(module, tensor), safe="") + ".npy")
        content = io.BytesIO()
        np.save(content, array)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, content.getvalue())
        except OSError as error:
            raise _unwritable(path, error.strerror) from None
        return path


def _name(module: str, tensor: str) -> str:
    return f"{module}.{tensor}" if module else tensor


def _unwritable(path: Path, reason: str | None) -> ValueError:
    return ValueError(f"{path}: cannot be written ({reason}); choose a writable folder")
