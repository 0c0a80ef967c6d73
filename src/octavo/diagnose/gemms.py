"""The products of a model and the three GEMMs that training runs for each."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Kind", "Shape", "TracedGemm", "Which"]


class Kind(enum.Enum):
    """What computes a product."""

    LINEAR = "linear"
    """An `nn.Linear`."""
    MATMUL = "matmul"
    """Another product of two matrices."""
    BATCHED = "batched"
    """A batch of such products."""
    CONVOLUTION = "convolution"
    """A convolution, as a product of the patches it looks at: a batch of as many as it has groups."""
    ATTENTION = "attention"
    """One of the two batched products of an attention."""

    @property
    def flat(self) -> bool:
        """Whether it is one product of two matrices."""
        return self in (Kind.LINEAR, Kind.MATMUL)


class Which(enum.Enum):
    """Which of the three; the value is its row in a `Recipe`."""

    OUTPUT = "output"
    """[tokens, features] x [features, outputs]."""
    GRAD_INPUT = "grad_input"
    """[tokens, outputs] x [outputs, features]."""
    GRAD_WEIGHT = "grad_weight"
    """[outputs, tokens] x [tokens, features]."""


class Shape(NamedTuple):
    """[m, k] x [k, n]; k is contracted."""

    m: int
    k: int
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedGemm:
    """A product [tokens, features] x [features, outputs] of a model's forward pass, `batch` times."""

    layer: str
    """The module's name, `name.matmul()` for a function that a module calls."""
    module: str
    """The name of the module that runs it, as `named_modules` has it."""
    kind: Kind
    batch: int
    tokens: int
    features: int
    outputs: int
    left_grad: bool
    """Whether training needs the gradient of the left operand, the input; not in a first layer."""
    right_grad: bool
    """The same of the right operand, the weight."""

    def shape(self, which: Which) -> Shape:
        """Of one of the three GEMMs."""
        match which:
            case Which.OUTPUT:
                return Shape(self.tokens, self.features, self.outputs)
            case Which.GRAD_INPUT:
                return Shape(self.tokens, self.outputs, self.features)
            case Which.GRAD_WEIGHT:
                return Shape(self.outputs, self.tokens, self.features)

    def gemms(self) -> Iterator[tuple[Which, Shape]]:
        """Those that training runs, in the order of the table."""
        yield Which.OUTPUT, self.shape(Which.OUTPUT)
        if self.left_grad:
            yield Which.GRAD_INPUT, self.shape(Which.GRAD_INPUT)
        if self.right_grad:
            yield Which.GRAD_WEIGHT, self.shape(Which.GRAD_WEIGHT)
