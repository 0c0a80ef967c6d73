"""`autocast`: in which recipe the layers below it run.

The active block is part of the key of `jax.jit`'s cache: a function jitted inside and called outside is traced again, and then runs in
high precision.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import jax

from octavo.jax.mesh import MeshResource, check_mesh_resource
from octavo.recipes import Recipe, delayed_scaling

__all__ = ["Frame", "HighPrecisionWarning", "autocast", "current", "fp8_autocast"]


class HighPrecisionWarning(UserWarning):
    """A layer that keeps 8-bit metadata ran outside `autocast`, and so in high precision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One entered `autocast`."""

    enabled: bool
    recipe: Recipe
    mesh_resource: MeshResource


_active: Any = jax.make_user_context(None)
_DEFAULT = delayed_scaling()


def current() -> Frame | None:
    """The innermost `autocast` of this thread."""
    return _active.value  # type: ignore[no-any-return]


class autocast(contextlib.ContextDecorator):
    """Run the Octavo layers of the block, or of the function it decorates, in 8 bits.

    enabled: False turns 8 bits off inside; recipe: for all layers inside, default `delayed_scaling()`; mesh_resource: what the axes of
    the mesh are for (`MeshResource`).  May be nested and entered again; what counts is the block around the tracing of a function.
    Raises ValueError for a recipe or mesh_resource of another type.
    """

    def __init__(
        self, enabled: bool = True, recipe: Recipe | None = None, mesh_resource: MeshResource | None = None
    ) -> None:
        if recipe is not None and not isinstance(recipe, Recipe):
            raise ValueError(
                f"recipe is a Recipe such as octavo.recipes.delayed_scaling(); got {type(recipe).__name__}"
            )
        check_mesh_resource(mesh_resource)
        self.frame = Frame(enabled=enabled, recipe=recipe or _DEFAULT, mesh_resource=mesh_resource or MeshResource())
        self._entered: list[Any] = []

    def _recreate_cm(self) -> autocast:
        frame = self.frame  # a decorated function may run in several threads at once
        return autocast(frame.enabled, frame.recipe, frame.mesh_resource)

    def __enter__(self) -> None:
        check_mesh_resource(self.frame.mesh_resource)
        entered = _active(self.frame)
        entered.__enter__()
        self._entered.append(entered)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.pop().__exit__(kind, error, trace)


def fp8_autocast(
    enabled: bool = True, fp8_recipe: Recipe | None = None, mesh_resource: MeshResource | None = None
) -> autocast:
    """`autocast` with the argument names it had earlier in Transformer Engine."""
    return autocast(enabled, fp8_recipe, mesh_resource)
