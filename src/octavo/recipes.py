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
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from octavo.formats import E4M3FN, E5M2, Format, get_format
from octavo.names import nearest
from octavo.rounding import Overflow, Rounding
from octavo.scaling import AmaxAlgorithm, Current, Delayed, Scaling, Unscaled

__all__ = [
    "NAMED",
    "Accumulator",
    "FormatPair",
    "Gemm",
    "Recipe",
    "TensorSpec",
    "current_scaling",
    "delayed_scaling",
    "get_recipe",
]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """How one tensor is cast: to which format, by which scale, rounded how, and what overflow becomes."""

    format: Format
    scaling: Scaling = Unscaled()  # noqa: RUF009 - frozen, so one instance serves all
    rounding: Rounding = Rounding.NEAREST_EVEN
    overflow: Overflow = Overflow.SATURATE

    def __str__(self) -> str:
        words = [self.format.name.removeprefix("float8_").removeprefix("float6_").removeprefix("float4_")]
        words.append(type(self.scaling).__name__.lower())
        if self.rounding is not Rounding.NEAREST_EVEN:
            words.append(self.rounding.value)
        if self.overflow is not Overflow.SATURATE:
            words.append(f"overflow {self.overflow.value}")
        return " ".join(words)


class Accumulator(enum.Enum):
    """How a GEMM adds its products up."""

    FLOAT32 = "float32"
    """Exact products, float32 sums, in the order of the library that runs the GEMM."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemm:
    """A row of the table; None leaves a tensor in high precision."""

    left: TensorSpec | None = None
    right: TensorSpec | None = None
    result: TensorSpec | None = None
    accumulator: Accumulator = Accumulator.FLOAT32


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
    cast_key: str = field(init=False, repr=False, compare=False)
    """The table as text that `from_cast_key` reads back: all that casting needs, and so not how delayed scales are updated."""

    def __post_init__(self) -> None:
        delayed: dict[str, TensorSpec] = {}
        for gemm, cell, tensor, spec in self.cells():
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
        shared = next((spec.scaling for spec in delayed.values()), None)
        object.__setattr__(self, "delayed", shared)
        object.__setattr__(self, "maxima", {tensor: spec.format.max for tensor, spec in delayed.items()})
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
        tensors = {
            "output": ("input", "weight", "output"),
            "grad_input": ("grad_output", "weight", "grad_input"),
            "grad_weight": ("grad_output", "input", "grad_weight"),
        }
        for gemm, names in tensors.items():
            row: Gemm = getattr(self, gemm)
            for cell, tensor, spec in zip(
                ("left", "right", "result"), names, (row.left, row.right, row.result), strict=True
            ):
                yield gemm, cell, tensor, spec

    def __hash__(self) -> int:
        return hash(self.cast_key)  # recipes key the caches of every layer

    def _spelled(self) -> str:
        spelled = {}
        for gemm, cell, _, spec in self.cells():
            if spec is None:
                continue
            scaling: dict[str, Any] = {"kind": type(spec.scaling).__name__}
            if isinstance(spec.scaling, Current):
                scaling |= {"power_of_two": spec.scaling.power_of_two, "epsilon": spec.scaling.epsilon}
            modes = {"rounding": spec.rounding.value, "overflow": spec.overflow.value}
            spelled[f"{gemm}.{cell}"] = {"format": spec.format.name, "scaling": scaling, **modes}
        return json.dumps(spelled, sort_keys=True)

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def from_cast_key(key: str) -> Recipe:
        """The table that `cast_key` spelled."""
        rows: dict[str, dict[str, Any]] = {"output": {}, "grad_input": {}, "grad_weight": {}}
        kinds: dict[str, Callable[..., Scaling]] = {"Unscaled": Unscaled, "Current": Current, "Delayed": Delayed}
        for place, spelled in json.loads(key).items():
            gemm, _, cell = place.partition(".")
            scaling = dict(spelled["scaling"])
            rows[gemm][cell] = TensorSpec(
                get_format(spelled["format"]),
                kinds[scaling.pop("kind")](**scaling),
                Rounding(spelled["rounding"]),
                Overflow(spelled["overflow"]),
            )
        output, grad_input, grad_weight = (Gemm(**rows[gemm]) for gemm in ("output", "grad_input", "grad_weight"))
        return Recipe(output=output, grad_input=grad_input, grad_weight=grad_weight)

    def describe(self) -> str:
        """The table as aligned text, one line for each GEMM."""
        lines: list[tuple[str, ...]] = [("GEMM", "left", "right", "result")]
        for gemm in ("output", "grad_input", "grad_weight"):
            row: Gemm = getattr(self, gemm)
            lines.append((gemm, *(str(spec) if spec else "-" for spec in (row.left, row.right, row.result))))
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        body = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([self.name, *("  " + line for line in body)])


class FormatPair(enum.Enum):
    """Which formats the forward and the backward tensors take."""

    HYBRID = "hybrid"
    """E4M3FN forward, where precision counts; E5M2 for gradients, where range does."""
    E4M3 = "e4m3"
    """E4M3FN for all."""

    @property
    def forward(self) -> Format:
        """Of input and weight."""
        return E4M3FN

    @property
    def backward(self) -> Format:
        """Of grad_output."""
        return E5M2 if self is FormatPair.HYBRID else E4M3FN


def delayed_scaling(
    *,
    margin: int = 0,
    fp8_format: FormatPair = FormatPair.HYBRID,
    amax_history_len: int = 1024,
    amax_compute_algo: AmaxAlgorithm | str | Callable[[Any], Any] = AmaxAlgorithm.MAX,
    reduce_amax: bool = True,
) -> Recipe:
    """Transformer Engine's DelayedScaling: per-tensor scales from the amaxes of earlier steps, so a cast reads memory once.

    margin: the scale is divided by 2**margin; amax_history_len: steps remembered; amax_compute_algo: "max", "most_recent" or a
    function from the history [steps, tensors] to peaks [tensors]; reduce_amax: take the maximum over all ranks.
    """
    algorithm = amax_compute_algo if callable(amax_compute_algo) else AmaxAlgorithm(amax_compute_algo)
    scaling = Delayed(margin=margin, history=amax_history_len, algorithm=algorithm, reduce=reduce_amax)
    forward, backward = TensorSpec(fp8_format.forward, scaling), TensorSpec(fp8_format.backward, scaling)
    return Recipe.from_tensors("delayed_scaling", input=forward, weight=forward, grad_output=backward)


def current_scaling(
    *,
    fp8_format: FormatPair = FormatPair.HYBRID,
    use_power_2_scales: bool = False,
    amax_epsilon: float = 0.0,
) -> Recipe:
    """Transformer Engine's Float8CurrentScaling: per-tensor scales from each tensor's own amax, nothing remembered.

    use_power_2_scales: round scales down to powers of two; amax_epsilon: a floor under amax.
    """
    scaling = Current(power_of_two=use_power_2_scales, epsilon=amax_epsilon)
    forward, backward = TensorSpec(fp8_format.forward, scaling), TensorSpec(fp8_format.backward, scaling)
    return Recipe.from_tensors("current_scaling", input=forward, weight=forward, grad_output=backward)


NAMED: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {"delayed_scaling": delayed_scaling, "current_scaling": current_scaling}
)
"""The named recipes, each with its defaults."""


def get_recipe(name: str) -> Recipe:
    """The named recipe with its defaults.  Raises ValueError, with the nearest name, where there is none."""
    if name not in NAMED:
        raise ValueError(f"no recipe is called {name!r}{nearest(name, NAMED)} (`octavo recipes` lists them)")
    return NAMED[name]()
