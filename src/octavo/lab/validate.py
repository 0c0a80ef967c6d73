"""What a model's GEMMs would do on a chip under a recipe, before anything is built: shapes, kernels, padding, rooflines, exemptions."""

from __future__ import annotations

import enum
import fnmatch
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from octavo.diagnose.chips import Arithmetic, Chip, get_chip
from octavo.diagnose.gemms import Kind, Shape, TracedGemm
from octavo.diagnose.kernels import Runs
from octavo.diagnose.matching import MatchedGemm, better_in_bf16, match
from octavo.diagnose.roofline import Cost
from octavo.diagnose.tracing import trace_gemms
from octavo.names import nearest
from octavo.patterns import Patterns, chosen, is_in
from octavo.recipes import NAMED, Recipe

__all__ = ["Scope", "Validation", "precision_of", "validate"]

_PRECISIONS: Mapping[str, Arithmetic] = MappingProxyType(
    {"fp32": Arithmetic.FP32, "bf16": Arithmetic.BF16, "fp16": Arithmetic.FP16}
)
_HEAD = ("layer", "GEMM", "MxKxN", "kernel", "pad", "FP8?", "FLOP/B", "BF16 us", "recipe us", "ratio", "note")
_NUMBERS = frozenset({"FLOP/B", "BF16 us", "recipe us", "ratio", "note"})
"""Columns that stand to the right."""


class Scope(enum.Enum):
    """Which products a recipe is meant for."""

    PRODUCTS = "products"
    """All of them, as `octavo.torch.emulate` has it."""
    LINEAR = "linear"
    """Those of `nn.Linear` modules, as `octavo.torch.convert` has it."""


def precision_of(name: str) -> tuple[Recipe | None, Arithmetic]:
    """What `precision:` names: None and its arithmetic for fp32, bf16 and fp16, else the named recipe with bfloat16 beside it.

    Raises ValueError, with the nearest name, where there is none.
    """
    if name in _PRECISIONS:
        return None, _PRECISIONS[name]
    if name in NAMED:
        return NAMED[name](), Arithmetic.BF16
    raise ValueError(
        f"precision is {', '.join(_PRECISIONS)} or a recipe (`octavo recipes` lists them); got {name!r}"
        f"{nearest(name, [*_PRECISIONS, *NAMED])}"
    )


def validate(
    model: nn.Module,
    inputs: Sequence[Tensor],
    recipe: Recipe | str,
    *,
    exempt: Patterns = (),
    target: str = "sm90",
    scope: Scope = Scope.PRODUCTS,
    loss: Callable[[Any], Any] | None = None,
) -> Validation:
    """Trace `model(*inputs)` and match each of its GEMMs on the target.

    model, inputs: on the meta device, as `octavo.diagnose.tracing.trace_gemms` takes them, loss too.  recipe: a Recipe, or what
    `precision_of` knows.  exempt: modules to leave in high precision, with all inside them, as `octavo.torch.emulate` takes them.
    Raises ValueError for an unknown recipe or target, for patterns that fit nothing, and for tensors that are not on the meta device.
    """
    chip = get_chip(target)
    table, high = precision_of(recipe) if isinstance(recipe, str) else (recipe, Arithmetic.BF16)
    modules = dict(model.named_modules())
    left_out = chosen(modules, exempt, "exempt", inside=True)

    def spared(traced: TracedGemm) -> str:
        if traced.module in left_out:
            return "exempt"
        outside = scope is Scope.LINEAR and traced.kind is not Kind.LINEAR
        return "only linear layers are converted" if outside else ""

    rows = match(trace_gemms(model, *inputs, loss=loss), table, chip, high=high, spared=spared)
    return Validation(
        chip=chip,
        recipe=recipe if isinstance(recipe, str) else recipe.name,
        rows=rows,
        modules=tuple(modules),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        exempt=tuple(pattern if isinstance(pattern, str) else pattern.__name__ for pattern in exempt),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """Every GEMM of a training step on a chip, and what follows from it."""

    chip: Chip
    recipe: str
    """Its name, or that of a precision."""
    rows: tuple[MatchedGemm, ...]
    modules: tuple[str, ...]
    """The names of the model's modules."""
    parameters: int
    exempt: tuple[str, ...]
    """As given."""

    @property
    def better(self) -> tuple[str, ...]:
        """The layers that are not faster under the recipe."""
        return better_in_bf16(self.rows)

    @property
    def totals(self) -> dict[str, Cost]:
        """Of all rows: `bf16`, `recipe` and `octavo`, as a row has them."""
        return {name: sum((getattr(row, name) for row in self.rows), Cost()) for name in _COSTS}

    def exemptions(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """`better` as an `exempt` list, the given patterns first, and the functions in it that no module's name exempts alone."""
        better = set(self.better)
        homes = {row.layer: row.module for row in self.rows if row.runs is not Runs.HIGH}
        modules, functions = dict[str, None](), list[str]()
        for layer in self.better:
            home = homes.get(layer, "")
            whole = {other for other, module in homes.items() if is_in(module, home)} <= better
            if home and whole:
                modules[home] = None
            else:
                functions.append(layer)
        return (*self.exempt, *_patterns(modules, self.modules)), tuple(functions)

    def text(self) -> str:
        """The table, the totals and the exempt list, as aligned text; layers that are alike stand in one row."""
        parts = [self._headline(), *self._table(), "", *self._totals(), "", *self._exempt_lines()]
        return "\n".join(parts)

    def to_json(self) -> str:
        """The same as JSON, each GEMM by itself, times in seconds."""
        modules, functions = self.exemptions()
        found = {
            "target": self.chip.name,
            "chip": self.chip.words,
            "recipe": self.recipe,
            "parameters": self.parameters,
            "gemms": [_spelled(row) for row in self.rows],
            "totals": {name: _cost(cost) for name, cost in self.totals.items()},
            "exempt": list(modules),
            "better_in_bf16": list(self.better),
            "not_modules": list(functions),
        }
        return json.dumps(found, indent=2)

    def _headline(self) -> str:
        chip = self.chip
        rates = ", ".join(f"{name.value} {figure.value:g}" for name, figure in chip.peaks.items())
        return (
            f"{self.recipe} on {chip.name}, {chip.words}; {self.parameters:,} parameters\n"
            f"peaks: {rates} TFLOP/s, {chip.bandwidth.value:g} TB/s, {chip.floor.value:g} us a kernel at least\n"
        )

    def _table(self) -> list[str]:
        groups: dict[Any, list[MatchedGemm]] = {}
        for row in self.rows:
            alike = (re.sub(r"\d+", "*", row.layer), row.which, row.batch, row.shape, row.kernel, row.reason)
            groups.setdefault((*alike, row.bf16, row.recipe), []).append(row)
        notes = {row.reason: None for row in self.rows if row.reason}
        numbers = {reason: str(number) for number, reason in enumerate(notes, 1)}
        lines = [_HEAD, *(_cells(group, numbers.get(group[0].reason, "")) for group in groups.values())]
        return [*_aligned(lines), *(f"  {number}: {reason}" for reason, number in numbers.items())]

    def _totals(self) -> list[str]:
        bf16, recipe, octavo = self.totals.values()
        spared = set(self.better)
        mixed = sum((row.bf16 if row.layer in spared else row.recipe).seconds for row in self.rows)
        flops = {runs: sum(row.bf16.flops for row in self.rows if row.runs is runs) for runs in Runs}
        all_flops = max(bf16.flops, 1.0)
        lines = [("GEMMs of a step", "us", "ratio"), ("  BF16", _microseconds(bf16.seconds), "1.00")]
        for words, seconds in (
            (f"  {self.recipe}", recipe.seconds),
            (f"  {self.recipe}, slower layers in BF16", mixed),
            (f"  {self.recipe}, as Octavo runs it now", octavo.seconds),
        ):
            lines.append((words, _microseconds(seconds), _ratio(bf16.seconds, seconds)))
        chip = (flops[Runs.YES] + flops[Runs.COULD]) / all_flops
        share = f"of their FLOP {chip:.0%} could run in 8 bits or fewer there, {flops[Runs.YES] / all_flops:.0%} do in Octavo"
        return [*_aligned(lines, numbers=frozenset({"us", "ratio"})), share]

    def _exempt_lines(self) -> list[str]:
        modules, functions = self.exemptions()
        lines = [f"exempt: [{', '.join(json.dumps(name) for name in modules)}]"]
        if functions:
            lines.append(f"# slower too, but functions that modules call: {', '.join(_folded_names(functions))}")
        if self.better and not any(row.runs in (Runs.YES, Runs.COULD) for row in self.rows):
            lines.append(
                f"# nothing here runs in 8 bits on {self.chip.name}: emulation shows the numerics, and costs time"
            )
        return lines


_COSTS = ("bf16", "recipe", "octavo")
"""The costs of a `MatchedGemm`."""


def _cells(group: Sequence[MatchedGemm], note: str) -> tuple[str, ...]:
    """A line of the table for layers that are alike."""
    row = group[0]
    name = _folded([one.layer for one in group]) + (f" x{len(group)}" if len(group) > 1 else "")
    size = "x".join(map(str, row.shape))
    padding = " ".join(f"{axis}+{more}" for axis, more in zip("MKN", row.padding, strict=True) if more)
    return (
        name,
        row.which.value,
        size if row.batch == 1 else f"{row.batch} of {size}",
        row.kernel,
        padding or "-",
        row.runs.value,
        f"{row.bf16.intensity:.0f} / {row.recipe.intensity:.0f}",
        _microseconds(row.bf16.seconds),
        _microseconds(row.recipe.seconds),
        _ratio(row.bf16.seconds, row.recipe.seconds),
        note,
    )


def _aligned(lines: Sequence[tuple[str, ...]], numbers: frozenset[str] = _NUMBERS) -> list[str]:
    """Lines of cells, the first of which names the columns."""
    head = lines[0]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for cell, width, column in zip(line, widths, head, strict=True)
        ).rstrip()
        for line in lines
    ]


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}"


def _ratio(one: float, other: float) -> str:
    return f"{one / other:.2f}" if other else "-"


def _folded(names: Sequence[str]) -> str:
    """Names that differ in their numbers as one, with * for those numbers."""
    columns = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(column[0] if len(set(column)) == 1 else "*" for column in columns)


def _by_numbers(names: Iterable[str]) -> Iterable[list[str]]:
    """Names that differ in their numbers alone, together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return groups.values()


def _folded_names(names: Iterable[str]) -> list[str]:
    return [_folded(group) + (f" x{len(group)}" if len(group) > 1 else "") for group in _by_numbers(names)]


def _patterns(names: Iterable[str], modules: Sequence[str]) -> list[str]:
    """Names as few patterns that leave out the same modules, with all inside them, and no other."""
    chosen_names = list(names)
    tops = [name for name in chosen_names if not any(name != top and is_in(name, top) for top in chosen_names)]
    found: list[str] = []
    for group in _by_numbers(tops):
        pattern = _folded(group)
        exact = _within(fnmatch.filter(modules, pattern), modules) == _within(group, modules)
        found += [pattern] if exact else group
    return found


def _within(tops: Sequence[str], modules: Sequence[str]) -> set[str]:
    """The modules that are one of `tops` or lie in one."""
    return {name for name in modules if any(is_in(name, top) for top in tops)}


def _cost(cost: Cost) -> dict[str, float]:
    return {"flops": cost.flops, "bytes": cost.bytes, "seconds": cost.seconds}


def _spelled(row: MatchedGemm) -> dict[str, Any]:
    """A row as what JSON holds."""
    sizes: dict[str, Shape] = {"shape": row.shape, "padding": row.padding}
    return {
        "layer": row.layer,
        "kind": row.kind.value,
        "gemm": row.which.value,
        "batch": row.batch,
        **{name: size._asdict() for name, size in sizes.items()},
        "kernel": row.kernel,
        "runs": row.runs.value,
        "reason": row.reason,
        **{name: _cost(getattr(row, name)) for name in _COSTS},
        "ratio": row.ratio if math.isfinite(row.ratio) else None,
    }
