"""Finding the name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["nearest"]


def nearest(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'torch-fp8'?"` for the closest of `choices`, or `""` where none is close: the tail of an error."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
