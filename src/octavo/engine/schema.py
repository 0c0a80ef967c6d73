"""What an operator takes and returns, as one line of text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Argument", "bind", "parse"]

_SCHEMA = re.compile(r"\s*(\w+)\s*\((.*)\)\s*->\s*(Tensor|\(\s*\)|\(\s*Tensor(?:\s*,\s*Tensor)*\s*\))\s*")
_ARGUMENT = re.compile(r"(Tensor\?|Tensor!\??|Tensor|float|int|bool|object)(?:\s+(\w+))?(?:\s*=\s*(\S+))?")
_WORDS = {"None": None, "True": True, "False": False}


@dataclass(frozen=True, slots=True)
class Argument:
    """One of a schema: `Tensor x`, `Tensor? bias=None` (may be absent), `Tensor! weight` (changed in place), `Tensor!? velocity` (both),
    `float rate`, `object how`."""

    kind: str
    name: str
    default: Any = ...


def parse(schema: str) -> tuple[str, tuple[Argument, ...], int]:
    """(name, arguments, number of outputs) of `name(kind argument=default, ...) -> Tensor`, `-> (Tensor, Tensor)` or `-> ()`.

    Raises ValueError, naming the part, for a text that does not read so.
    """
    matched = _SCHEMA.fullmatch(schema)
    if matched is None:
        raise ValueError(f'{schema!r} is no schema; write "name(Tensor x, float by=1.0) -> Tensor"')
    inside = matched[2].strip()
    arguments = tuple(_argument(schema, i, text) for i, text in enumerate(inside.split(",") if inside else ()))
    names = [one.name for one in arguments]
    if len(set(names)) < len(names):
        raise ValueError(f"two arguments of {schema!r} have one name; rename one")
    return matched[1], arguments, matched[3].count("Tensor")


def _argument(schema: str, number: int, text: str) -> Argument:
    matched = _ARGUMENT.fullmatch(text.strip())
    if matched is None:
        raise ValueError(
            f"{text.strip()!r} in {schema!r} is no argument; write a kind and a name, such as Tensor x or float by=1.0"
        )
    default: Any = ...
    if matched[3] is not None:
        try:
            number_of = int if matched[1] == "int" else float
            default = _WORDS[matched[3]] if matched[3] in _WORDS else number_of(matched[3])
        except ValueError:
            raise ValueError(
                f"{matched[3]!r} in {schema!r} is no default; write a number, None, True or False"
            ) from None
    return Argument(matched[1], matched[2] or f"argument_{number}", default)


def bind(name: str, arguments: Sequence[Argument], given: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call in order, defaults among them.  Raises TypeError for one that is missing, unknown or too many."""
    rest = arguments[len(given) :]
    missing = [one.name for one in rest if one.name not in named and one.default is ...]
    unknown = [key for key in named if key not in {one.name for one in rest}]
    if missing or unknown or len(given) > len(arguments):
        wrong = f"{missing[0]} is missing" if missing else f"{unknown[0]} is unknown" if unknown else "that is too many"
        raise TypeError(f"{name}({', '.join(one.name for one in arguments)}): {wrong}; {len(given)} given in order")
    return (*given, *(named.get(one.name, one.default) for one in rest))
