"""What each GEMM of a model costs on a chip in bfloat16 and under a recipe, and which layers are better left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from octavo.diagnose import roofline
from octavo.diagnose.chips import Arithmetic, Chip, Kernel
from octavo.diagnose.gemms import Kind, Shape, TracedGemm, Which
from octavo.diagnose.kernels import Match, Runs, kernel_for
from octavo.diagnose.roofline import Cost
from octavo.table import Gemm, Recipe, TensorSpec

__all__ = ["MatchedGemm", "better_in_bf16", "match"]

_PLAIN = Recipe()
"""Nothing is cast."""
_TENSORS = {
    Which.OUTPUT: ("input", "weight"),
    Which.GRAD_INPUT: ("grad_output", "weight"),
    Which.GRAD_WEIGHT: ("grad_output", "input"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchedGemm:
    """A row of `octavo validate`: one of the three GEMMs of a layer on a chip."""

    layer: str
    module: str
    kind: Kind
    which: Which
    batch: int
    shape: Shape
    kernel: str
    """What multiplies: a library's kernel, a plain GEMM, or `emulated: ...`."""
    padding: Shape
    """What that kernel needs added to each of m, k and n."""
    runs: Runs
    reason: str
    bf16: Cost
    """Uncast, in bfloat16."""
    recipe: Cost
    """Under the recipe, by that kernel: casts, product and what is done to the result."""
    octavo: Cost
    """The same as Octavo runs it: it emulates unless `runs` is YES or nothing is cast, and transposes shared codes on every chip."""

    @property
    def ratio(self) -> float:
        """BF16's time over the recipe's: above 1 the recipe is faster."""
        return self.bf16.seconds / self.recipe.seconds


def match(
    gemms: Iterable[TracedGemm],
    recipe: Recipe | None,
    chip: Chip,
    *,
    high: Arithmetic = Arithmetic.BF16,
    spared: Callable[[TracedGemm], str] = lambda _: "",
) -> tuple[MatchedGemm, ...]:
    """Each GEMM that training runs, matched and priced.

    recipe: None casts nothing.  high: in what uncast operands are multiplied.  spared: why a layer is left in high precision, or "".
    A tensor that two GEMMs take in the same codes is cast in the first; the second pays for having them transposed, where it must.
    Raises ValueError for a chip that does not multiply `high`.
    """
    if high not in chip.peaks:
        known = ", ".join(arithmetic.value for arithmetic in chip.peaks)
        raise ValueError(f"high precision on {chip.name} is one of {known}; got {high.value}")
    rows: list[MatchedGemm] = []
    for traced in gemms:
        why = spared(traced) if recipe is not None else f"everything is in {high.value}"
        layer = _Layer(traced, _PLAIN if why or recipe is None else recipe, chip, high)
        rows += (layer.row(which, why) for which, _ in traced.gemms())
    return tuple(rows)


def better_in_bf16(rows: Iterable[MatchedGemm]) -> tuple[str, ...]:
    """The layers with a GEMM that is cast whose GEMMs together are not faster for it, in order."""
    saved: dict[str, float] = {}
    cast: set[str] = set()
    for row in rows:
        saved[row.layer] = saved.get(row.layer, 0.0) + row.bf16.seconds - row.recipe.seconds
        if row.runs is not Runs.HIGH:
            cast.add(row.layer)
    return tuple(layer for layer, seconds in saved.items() if layer in cast and seconds <= 0)


class _Operand(NamedTuple):
    """A matrix [rows, along] of a GEMM, and how it is cast."""

    tensor: str
    spec: TensorSpec | None
    rows: int
    along: int


class _Layer:
    """The costs of a layer's GEMMs, which know what those before them have cast."""

    def __init__(self, traced: TracedGemm, recipe: Recipe, chip: Chip, high: Arithmetic) -> None:
        self.traced, self.recipe, self.chip, self.high = traced, recipe, chip, high
        self._cast: set[tuple[str, TensorSpec]] = set()

    def row(self, which: Which, why: str) -> MatchedGemm:
        """The next of them; why: the reason that nothing is cast, if any."""
        shape = self.traced.shape(which)
        gemm: Gemm = getattr(self.recipe, which.value)
        found = kernel_for(gemm, self.traced.kind, self.chip, self.high)
        kernel, padding = found.kernel, Shape(0, 0, 0)
        octavo = self._emulated(which, gemm, shape) if found.emulated else None
        if isinstance(kernel, Kernel):
            padding = Shape(0, -shape.k % kernel.align_k, -shape.n % kernel.align_n)
            padded = Shape(*(size + more for size, more in zip(shape, padding, strict=True)))
            recipe = self._native(which, gemm, padded, kernel, turned=self.chip.contracted_last)
            octavo = self._native(which, gemm, padded, kernel, turned=True) if octavo is None else octavo
        elif kernel is not None:
            recipe = self._plain(shape, kernel) + self._result(gemm, shape)
        else:
            assert octavo is not None
            recipe = octavo
        self._remember(which, gemm)
        return MatchedGemm(
            layer=self.traced.layer,
            module=self.traced.module,
            kind=self.traced.kind,
            which=which,
            batch=self.traced.batch,
            shape=shape,
            kernel=self._words(found, gemm),
            padding=padding,
            runs=found.runs,
            reason=why or found.reason,
            bf16=self._plain(shape, Arithmetic.BF16),
            recipe=recipe,
            octavo=recipe if octavo is None else octavo,
        )

    def _words(self, found: Match, gemm: Gemm) -> str:
        match found.kernel:
            case Kernel(name=name):
                return name
            case Arithmetic(value=value):
                return value
            case None:
                return f"emulated: cast + {self._wide(gemm).value} GEMM"

    def _plain(self, shape: Shape, arithmetic: Arithmetic) -> Cost:
        """Uncast operands."""
        batch, (m, k, n), width = self.traced.batch, shape, arithmetic.bytes
        left, right, result = (float(width * batch * size) for size in (m * k, k * n, m * n))
        return roofline.product(self.chip, arithmetic, batch, shape, left=left, right=right, result=result)

    def _operands(self, which: Which, gemm: Gemm, shape: Shape) -> tuple[_Operand, _Operand]:
        left, right = _TENSORS[which]
        return _Operand(left, gemm.left, shape.m, shape.k), _Operand(right, gemm.right, shape.n, shape.k)

    def _remember(self, which: Which, gemm: Gemm) -> None:
        for tensor, spec in zip(_TENSORS[which], (gemm.left, gemm.right), strict=True):
            if spec is not None and spec.cast_once:
                self._cast.add((tensor, spec))

    def _native(self, which: Which, gemm: Gemm, shape: Shape, kernel: Kernel, *, turned: bool) -> Cost:
        """By a kernel that takes codes; shape: padded; turned: codes of an earlier GEMM are transposed in memory."""
        batch, cost, held = self.traced.batch, Cost(), []
        for operand in self._operands(which, gemm, shape):
            assert operand.spec is not None
            bytes = roofline.held_bytes(operand.spec, batch, operand.rows, operand.along)
            held.append(bytes)
            if (operand.tensor, operand.spec) not in self._cast:
                cost += roofline.cast(self.chip, operand.spec, batch, operand.rows, operand.along, writes=bytes)
            elif turned:
                cost += roofline.sweep(self.chip, 2 * bytes)
        result = float(Arithmetic.BF16.bytes * batch * shape.m * shape.n)
        cost += roofline.product(self.chip, kernel.arithmetic, batch, shape, left=held[0], right=held[1], result=result)
        return cost + self._result(gemm, shape)

    def _wide(self, gemm: Gemm) -> Arithmetic:
        """What Octavo multiplies cast values in: bfloat16 holds those of 8 bits, and only the CPU's linear layers use it."""
        short = all(spec is None or spec.format.bits <= 8 for spec in (gemm.left, gemm.right))
        return Arithmetic.BF16 if self.chip.holds_values and self.traced.kind.flat and short else Arithmetic.FP32

    def _emulated(self, which: Which, gemm: Gemm, shape: Shape) -> Cost:
        """Cast, decoded and multiplied in a wider format."""
        arithmetic, batch, cost, sizes = self._wide(gemm), self.traced.batch, Cost(), []
        for operand in self._operands(which, gemm, shape):
            elements = batch * operand.rows * operand.along
            values = float(arithmetic.bytes * elements)
            sizes.append(values)
            spec, known = operand.spec, (operand.tensor, operand.spec) in self._cast
            if spec is None:
                changed = arithmetic is not Arithmetic.BF16
                cost += roofline.sweep(self.chip, values + Arithmetic.BF16.bytes * elements) if changed else Cost()
                continue
            codes = roofline.held_bytes(spec, batch, operand.rows, operand.along)
            if not known:
                writes = values if self.chip.holds_values else codes
                cost += roofline.cast(self.chip, spec, batch, operand.rows, operand.along, writes=writes)
            if not self.chip.holds_values:
                cost += roofline.sweep(self.chip, codes + values)
        result = float(Arithmetic.FP32.bytes * batch * shape.m * shape.n)
        cost += roofline.product(self.chip, arithmetic, batch, shape, left=sizes[0], right=sizes[1], result=result)
        return cost + self._result(gemm, shape)

    def _result(self, gemm: Gemm, shape: Shape) -> Cost:
        """Casting the result, where the recipe does, back into bfloat16."""
        if gemm.result is None:
            return Cost()
        batch, (m, _, n) = self.traced.batch, shape
        writes = float(Arithmetic.BF16.bytes * batch * m * n)
        return roofline.cast(self.chip, gemm.result, batch, m, n, writes=writes)
