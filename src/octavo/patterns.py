"""Choosing modules of a model by name, pattern or type."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

from octavo.names import nearest

__all__ = ["Patterns", "chosen", "exempt_among", "is_in"]

Patterns: TypeAlias = Iterable[str | type[Any]]
"""Modules by qualified name, with *, ? and [] as in file names, or by type."""


def is_in(site: str, module: str) -> bool:
    """Whether a module or site is that module or lies in it, by their names."""
    return not module or site == module or site.startswith(f"{module}.")


def chosen(modules: Mapping[str, Any], patterns: Patterns, what: str, *, inside: bool) -> set[str]:
    """The names of the modules that patterns fit; inside: and of all within them."""
    found: set[str] = set()
    if isinstance(patterns, (str, type)):
        raise ValueError(f"{what} is a list of names, patterns or types; got {patterns!r}: write [{patterns!r}]")
    for pattern in patterns:
        if isinstance(pattern, str):
            fitting = fnmatch.filter(modules, pattern)
            shown, near = repr(pattern), nearest(pattern, modules)
        else:
            fitting = [name for name, module in modules.items() if isinstance(module, pattern)]
            kinds = sorted({type(module).__name__ for module in modules.values()})
            shown, near = pattern.__name__, nearest(pattern.__name__, kinds)
        if not fitting:
            raise ValueError(f"{what} {shown} fits no module of the model{near}")
        found.update(fitting)
    if inside:
        found.update(name for name in modules if any(is_in(name, top) for top in found))
    return found


def exempt_among(layers: Collection[str], patterns: Iterable[str]) -> set[str]:
    """The linear layers, by name, that patterns exempt.  Raises ValueError for a pattern that fits none."""
    spared: set[str] = set()
    for pattern in patterns:
        fitting = fnmatch.filter(layers, pattern)
        if not fitting:
            raise ValueError(f"exempt {pattern!r} fits no linear layer of the model{nearest(pattern, layers)}")
        spared.update(fitting)
    return spared
