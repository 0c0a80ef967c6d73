"""A recipe is a three-by-three table: for each of the three GEMMs of a layer, how its two operands and its result are cast.

    GEMM          left                        right     result
    output        input                       weight    output
    grad_input    grad_output                 weight    grad_input
    grad_weight   grad_output (transposed)    input     grad_weight

Front ends, kernels and reports read this table and nothing else.
"""

from __future__ import annotations

import enum
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from octavo.formats import Format, get_format
from octavo.rounding import Overflow, Rounding
from octavo.scaling import (
    Block,
    BlockScale,
    Current,
    Delayed,
    Row,
    Scaling,
    TwoLevel,
    Unscaled,
    same_along_both_axes,
)

__all__ = ["Accumulator", "Gemm", "Recipe", "TensorSpec", "Transform", "spec_from", "spell_spec"]


class Transform(enum.Enum):
    """What is done to a tensor before it is cast."""

    NONE = "none"
    """Nothing."""
    HADAMARD = "hadamard"
    """Each 16 elements along the contracted axis, the last ones filled up with zeros, become `x @ (diag(signs) @ H16 / 4)`, rounded to
    bfloat16 (`octavo.reference.hadamard`).  Both operands of a GEMM have it or neither: then their product is what it was."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """How one tensor is cast: to which format, by which scale, rounded how, and what overflow becomes."""

    format: Format
    scaling: Scaling = Unscaled()  # noqa: RUF009 - frozen, so one instance serves all
    rounding: Rounding = Rounding.NEAREST_EVEN
    overflow: Overflow = Overflow.SATURATE
    transform: Transform = Transform.NONE

    @property
    def cast_once(self) -> bool:
        """Whether one cast serves both GEMMs of a tensor, which contract it along different axes."""
        return self.transform is Transform.NONE and same_along_both_axes(self.scaling)

    def __str__(self) -> str:
        words = [self.format.name.removeprefix("float8_").removeprefix("float6_").removeprefix("float4_")]
        words.append(_scaling_words(self.scaling))
        if self.transform is not Transform.NONE:
            words.append(self.transform.value)
        if self.rounding is not Rounding.NEAREST_EVEN:
            words.append(self.rounding.value)
        if self.overflow is not Overflow.SATURATE:
            words.append(f"overflow {self.overflow.value}")
        return " ".join(words)


def _scaling_words(scaling: Scaling) -> str:
    """A scaling in a cell of a printed table."""
    match scaling:
        case Block(shape=(across, along), scale=scale):
            return f"{across}x{along} {scale.value}"
        case TwoLevel(shape=(across, along)):
            return f"{across}x{along} two-level"
        case Current(power_of_two=True) | Row(power_of_two=True):
            return f"{type(scaling).__name__.lower()} power-of-two"
        case Unscaled() | Current() | Delayed() | Row():
            return type(scaling).__name__.lower()


class Accumulator(enum.Enum):
    """How a GEMM adds its products up.  Products are exact; scales enter after the sum of what they belong to."""

    FLOAT32 = "float32"
    """float32 sums, in the order of the library that runs the GEMM."""
    BFLOAT16_OUT = "bfloat16-out"
    """The same, and the result rounded to bfloat16 before anything is added to it."""
    HOPPER_FAST = "hopper-fast"
    """Hopper's tensor core as it is: 32 products at a time meet the running sum, all cut off 13 bits below the largest of them."""
    HOPPER_SPLIT = "hopper-split"
    """The same over 128 elements at a time, whose sums are added in float32 (arXiv 2412.19437, section 3.3.2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemm:
    """A row of the table; None leaves a tensor in high precision."""

    left: TensorSpec | None = None
    right: TensorSpec | None = None
    result: TensorSpec | None = None
    accumulator: Accumulator = Accumulator.FLOAT32


_GEMMS: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "output": ("input", "weight", "output"),
        "grad_input": ("grad_output", "weight", "grad_input"),
        "grad_weight": ("grad_output", "input", "grad_weight"),
    }
)
"""The tensors of each GEMM: left, right, result."""
_MODES: Mapping[str, Callable[[str], Any]] = MappingProxyType(
    {"rounding": Rounding, "overflow": Overflow, "transform": Transform}
)


def spell_spec(spec: TensorSpec) -> dict[str, Any]:
    """The spec as what JSON holds, for `spec_from` to read back: all that casting needs, and so not how delayed scales are updated."""
    scaling: dict[str, Any] = {"kind": type(spec.scaling).__name__}
    if not isinstance(spec.scaling, Delayed):
        settings = {item.name: getattr(spec.scaling, item.name) for item in fields(spec.scaling)}
        scaling |= {name: value.value if isinstance(value, enum.Enum) else value for name, value in settings.items()}
    modes = {name: getattr(spec, name).value for name in _MODES}
    return {"format": spec.format.name, "scaling": scaling, **modes}


def spec_from(spelled: Mapping[str, Any]) -> TensorSpec:
    """The spec that `spell_spec` spelled; delayed scaling comes back with its defaults."""
    kinds = {kind.__name__: kind for kind in (Unscaled, Current, Delayed, Row, Block, TwoLevel)}
    settings = {name: value for name, value in spelled["scaling"].items() if name != "kind"}
    if "scale" in settings:
        settings["scale"] = BlockScale(settings["scale"])
    scaling: Scaling = kinds[spelled["scaling"]["kind"]](**settings)
    return TensorSpec(
        get_format(spelled["format"]), scaling, **{name: kind(spelled[name]) for name, kind in _MODES.items()}
    )


def _check_cell(place: str, cell: str, spec: TensorSpec) -> None:
    """Raise ValueError for a cell that no GEMM could use."""
    scaling = spec.scaling
    if isinstance(scaling, (Block, TwoLevel)) and cell != "result" and scaling.shape[1] == 1 < scaling.shape[0]:
        across = scaling.shape[0]
        raise ValueError(
            f"{place}: blocks of shape {scaling.shape} run across the contracted axis, where no sum could take their scales out; "
            f"write shape=(1, {across})"
        )
    if not spec.format.signed:
        raise ValueError(f"{place}: {spec.format.name} holds scales, not tensors; give it a signed format")
    plain = isinstance(scaling, Unscaled) and spec.rounding is Rounding.NEAREST_EVEN
    if spec.format.bits > 8 and not (plain and spec.transform is Transform.NONE and spec.overflow is Overflow.NONE):
        raise ValueError(
            f"{place}: {spec.format.name} is cast as processors do it; leave scaling, rounding and transform at their defaults and "
            "write overflow=Overflow.NONE"
        )
    if cell == "result" and spec.transform is not Transform.NONE:
        raise ValueError(f"{place}: a result is contracted along no axis; leave its transform NONE")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The table.  Build one with `from_tensors`; change one cell with `dataclasses.replace`."""

    name: str = "custom"
    output: Gemm = Gemm()
    grad_input: Gemm = Gemm()
    grad_weight: Gemm = Gemm()
    # Derived once, and not on first use, because torch.compile cannot trace what caches under a lock.
    delayed: Delayed | None = field(init=False, repr=False, compare=False)
    """The delayed scaling that its tensors share, or None where the recipe keeps no state."""
    maxima: Mapping[str, float] = field(init=False, repr=False, compare=False)
    """format.max of each tensor whose scaling is delayed, by its name."""
    stochastic: bool = field(init=False, repr=False, compare=False)
    """Whether any cell rounds stochastically, so that layers need random draws."""
    cast_key: str = field(init=False, repr=False, compare=False)
    """The table as text that `from_cast_key` reads back: all that casting needs, and so not how delayed scales are updated."""

    def __post_init__(self) -> None:
        delayed: dict[str, TensorSpec] = {}
        for gemm, cell, tensor, spec in self.cells():
            if spec is not None:
                _check_cell(f"{self.name}.{gemm}.{cell} ({tensor})", cell, spec)
            if spec is None or not isinstance(spec.scaling, Delayed):
                continue
            if tensor == "grad_weight":
                raise ValueError(
                    f"{self.name}.{gemm}.{cell}: grad_weight keeps no history, so its scale cannot be delayed; use scaling=Current()"
                )
            if delayed.setdefault(tensor, spec) != spec:
                raise ValueError(
                    f"{self.name}.{gemm}.{cell}: delayed scaling keeps one scale for {tensor}, but its cells differ "
                    f"({delayed[tensor]} and {spec}); give both the same TensorSpec"
                )
        if len({spec.scaling for spec in delayed.values()}) > 1:
            raise ValueError(
                f"{self.name}: the tensors of one recipe share their amax history; give all the same Delayed(...)"
            )
        for tensor, first in (("input", self.output.left), ("weight", self.output.right)):
            if tensor in delayed and first is None:
                raise ValueError(
                    f"{self.name}: delayed scaling of {tensor} learns from the GEMM output, which leaves it uncast; cast it there too or "
                    "use scaling=Current()"
                )
        for gemm, (left, right, _) in _GEMMS.items():
            row: Gemm = getattr(self, gemm)
            transforms = [Transform.NONE if spec is None else spec.transform for spec in (row.left, row.right)]
            if transforms[0] is not transforms[1]:
                raise ValueError(
                    f"{self.name}.{gemm}: left ({left}) has transform {transforms[0].value} and right ({right}) {transforms[1].value}, "
                    "whose product is another; give both operands the same transform"
                )
        shared = next((spec.scaling for spec in delayed.values()), None)
        object.__setattr__(self, "delayed", shared)
        object.__setattr__(self, "maxima", {tensor: spec.format.max for tensor, spec in delayed.items()})
        drawing = [spec for *_, spec in self.cells() if spec is not None and spec.rounding is Rounding.STOCHASTIC]
        object.__setattr__(self, "stochastic", bool(drawing))
        object.__setattr__(self, "cast_key", self._spelled())

    @classmethod
    def from_tensors(
        cls,
        name: str = "custom",
        *,
        input: TensorSpec | None = None,
        weight: TensorSpec | None = None,
        grad_output: TensorSpec | None = None,
        output: TensorSpec | None = None,
        grad_input: TensorSpec | None = None,
        grad_weight: TensorSpec | None = None,
    ) -> Recipe:
        """The table that casts each named tensor alike wherever it appears."""
        return cls(
            name=name,
            output=Gemm(left=input, right=weight, result=output),
            grad_input=Gemm(left=grad_output, right=weight, result=grad_input),
            grad_weight=Gemm(left=grad_output, right=input, result=grad_weight),
        )

    def cells(self) -> Iterator[tuple[str, str, str, TensorSpec | None]]:
        """The nine cells, row by row: (GEMM, cell, tensor, spec)."""
        for gemm, names in _GEMMS.items():
            row: Gemm = getattr(self, gemm)
            for cell, tensor, spec in zip(
                ("left", "right", "result"), names, (row.left, row.right, row.result), strict=True
            ):
                yield gemm, cell, tensor, spec

    def __hash__(self) -> int:
        return hash(self.cast_key)  # recipes key the caches of every layer

    def _spelled(self) -> str:
        spelled = {f"{gemm}.{cell}": spell_spec(spec) for gemm, cell, _, spec in self.cells() if spec is not None}
        accumulators = {gemm: getattr(self, gemm).accumulator.value for gemm in _GEMMS}
        return json.dumps({"accumulators": accumulators, "cells": spelled})

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def from_cast_key(key: str) -> Recipe:
        """The table that `cast_key` spelled."""
        spelled = json.loads(key)
        rows: dict[str, dict[str, Any]] = {
            gemm: {"accumulator": Accumulator(spelled["accumulators"][gemm])} for gemm in _GEMMS
        }
        for place, cell in spelled["cells"].items():
            gemm, _, side = place.partition(".")
            rows[gemm][side] = spec_from(cell)
        output, grad_input, grad_weight = (Gemm(**rows[gemm]) for gemm in _GEMMS)
        return Recipe(output=output, grad_input=grad_input, grad_weight=grad_weight)

    def describe(self) -> str:
        """The table as aligned text, one line for each GEMM."""
        lines: list[tuple[str, ...]] = [("GEMM", "left", "right", "result", "accumulator")]
        for gemm in _GEMMS:
            row: Gemm = getattr(self, gemm)
            cells = (str(spec) if spec else "-" for spec in (row.left, row.right, row.result))
            lines.append((gemm, *cells, row.accumulator.value))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        body = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([self.name, *("  " + line for line in body)])
