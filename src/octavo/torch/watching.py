"""Looking at tensors as they are cast: what statistics and dumps hang on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeAlias

from torch import Tensor

from octavo.table import TensorSpec

__all__ = ["Look", "looking", "watch"]

Look: TypeAlias = Callable[[int, TensorSpec, Tensor, Callable[[], Tensor], float], None]
"""Takes the number of the cell (3 * row + place in the recipe's table), its spec, the tensor as it was, a function that gives the values
it was cast to, float32 or float64 of the same shape, and its one scale.  Of a cast that turns or transforms, the tensor so laid."""


class _Watch(threading.local):
    look: Look | None = None
    """Called with each tensor that this thread casts; None while nobody looks."""


watch = _Watch()


@contextlib.contextmanager
def looking(look: Look | None) -> Iterator[None]:
    """Have `look` called with what this thread casts inside the block; None looks at nothing."""
    before, watch.look = watch.look, look
    try:
        yield
    finally:
        watch.look = before
