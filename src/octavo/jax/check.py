"""`check_fp8`: whether a function's layers compute in float8, read from its jaxpr."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from octavo.jax.dot import SCOPE

__all__ = ["check_fp8"]

_PLACE = re.compile(rf"{SCOPE}:([^:()/]*):(\w+)")
_WIDENING = "widened_float8"
"""`octavo.jax.products.widened_float8`, as a jaxpr calls it."""
_KEEPING = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "dynamic_slice",
    "mul",
    "optimization_barrier",
    "pad",
    "reshape",
    "sharding_constraint",
    "slice",
    "squeeze",
    "transpose",
}
"""Primitives whose result holds float8 numbers, widened or times a scale, where an operand of theirs does."""


def check_fp8(fn: Callable[..., Any], *args: Any) -> bool:
    """Whether `fn(*args)` computes in float8: True where each GEMM of each Octavo layer multiplies float8 numbers, False where it runs no
    Octavo layer at all.

    The operands are `float8_*` arrays, or such as were widened, or times the scales of their blocks, just before.  GEMMs that the recipe
    itself leaves in high precision do not count.  fn is traced, not run.
    Raises ValueError that names the first layer and GEMM whose operands are others.
    """
    closed = jax.make_jaxpr(fn)(*args)
    found: list[tuple[str, str, list[str]]] = []
    _walk(closed.jaxpr, [_is_float8(var) for var in closed.jaxpr.invars], "", found)
    for layer, gemm, dtypes in found:
        if dtypes:
            raise ValueError(
                f"{layer} does not compute in float8: its GEMM {gemm} multiplies {' and '.join(dtypes)}; trace it inside "
                "octavo.jax.autocast with a recipe of 8 bits or fewer"
            )
    return bool(found)


def _dtype(var: Any) -> str:
    return str(getattr(var.aval, "dtype", "no array"))


def _is_float8(var: Any) -> bool:
    return _dtype(var).startswith("float8")


def _walk(jaxpr: Jaxpr, given: list[bool], outer: str, found: list[tuple[str, str, list[str]]]) -> list[bool]:
    """Which results hold float8 numbers, where `given` says so of the arguments.

    To `found` goes each GEMM: layer, name, and the dtypes of operands that do not hold such.
    """
    held = dict(zip(jaxpr.invars, given, strict=True))

    def holds(var: Any) -> bool:
        return _is_float8(var) or (not isinstance(var, Literal) and held.get(var, False))

    for eqn in jaxpr.eqns:
        place = f"{outer}/{eqn.source_info.name_stack}"
        inputs = [holds(var) for var in eqn.invars]
        outputs = [False] * len(eqn.outvars)
        if eqn.primitive.name == "dot_general":
            named = _PLACE.findall(place)
            if named:
                dtypes = [_dtype(var) for var, good in zip(eqn.invars, inputs, strict=True) if not good]
                found.append((unquote(named[-1][0]), named[-1][1], dtypes))
        elif eqn.primitive.name in _KEEPING or eqn.params.get("name") == _WIDENING:
            outputs = [any(inputs)] * len(outputs)
        for inner in _jaxprs(eqn):
            # The arguments of an inner jaxpr are the last of its equation's: a cond's index comes first.
            results = _walk(inner, inputs[len(inputs) - len(inner.invars) :], place, found)
            if len(results) == len(outputs):
                outputs = [one or other for one, other in zip(outputs, results, strict=True)]
        held.update(zip(eqn.outvars, outputs, strict=True))
    return [holds(var) for var in jaxpr.outvars]


def _jaxprs(eqn: Any) -> Iterator[Jaxpr]:
    """The jaxprs that an equation runs."""
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            inner = one.jaxpr if isinstance(one, ClosedJaxpr) else one
            if isinstance(inner, Jaxpr) and len(inner.invars) <= len(eqn.invars):
                yield inner
