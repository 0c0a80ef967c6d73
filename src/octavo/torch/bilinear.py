"""The products that an emulated model computes beside those of linear layers: convolutions and batches of matrices.

Each is bilinear in (left, right), and so has the three GEMMs of the recipe's table.  A convolution is a sum, over the positions of its
kernel, of GEMMs: `output` contracts the input channels (of a group), `grad_input` the output channels, `grad_weight` the samples of the
batch.  Those are the axes that blocks, rows and transforms run along.
N samples, I and O channels, G groups, S a place; for matrices B batch, M x K times (N x K) transposed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from octavo.torch.layouts import Layout

__all__ = ["Convolution", "MatrixProduct", "Product", "product_from", "spell_product"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixProduct:
    """`left @ right.mT` of [B, M, K] and [B, N, K]."""

    kind: ClassVar[str] = "matrices"

    def layouts(self, rank: int) -> tuple[Layout, ...]:
        """Of the six operands, by row of the recipe's table; rank: of each."""
        along, turned = Layout((0, 1, 2), 1), Layout((0, 2, 1), 1)
        return along, along, along, turned, turned, turned

    def forward(self, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        """The product of operands."""
        y = torch.bmm(left, right.mT)
        return y if bias is None else y + bias

    def grad_left(self, grad: Tensor, right: Tensor, shape: Sequence[int]) -> Tensor:
        """The gradient of the left operand."""
        return torch.bmm(grad, right)

    def grad_right(self, grad: Tensor, left: Tensor, shape: Sequence[int]) -> Tensor:
        """The gradient of the right operand."""
        return torch.bmm(grad.mT, left)

    def grads(
        self, grad: Tensor, left: Tensor, right: Tensor, shapes: tuple[Sequence[int], Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Both gradients from one cast of the output's."""
        return self.grad_left(grad, right, shapes[0]), self.grad_right(grad, left, shapes[1])

    def bias_axes(self, rank: int) -> tuple[int, ...]:
        """The axes of the output that a bias spans, all but the channels."""
        return (0, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Convolution:
    """`torch.convolution` of input [N, I, S...] and weight [O, I / G, s...], transposed [I, O / G, s...]."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    kind: ClassVar[str] = "convolution"

    def layouts(self, rank: int) -> tuple[Layout, ...]:
        """Of the six operands, by row of the recipe's table; rank: of each."""
        places = tuple(range(2, rank))
        if self.groups == 1:
            channels = Layout((0, *places, 1), 0)
            weight, turned = Layout((*places, 0, 1), len(places)), Layout((*places, 1, 0), len(places))
        else:
            after = tuple(place + 1 for place in places)
            # [N, G, C, S]: each group contracts its own channels.
            channels = Layout((0, *after, 1, 2), 0, (1, self.groups))
            # [G, first, second, s]
            weight = Layout((*after, 0, 1, 2), len(places) + 1, (0, self.groups))
            turned = Layout((*after, 0, 2, 1), len(places) + 1, (0, self.groups))
        samples = Layout((1, *places, 0), 0)
        for_output, for_input = (turned, weight) if self.transposed else (weight, turned)
        return channels, for_output, channels, for_input, samples, samples

    def forward(self, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of operands."""
        return torch.convolution(left, right, bias, *self._settings)

    def grad_left(self, grad: Tensor, right: Tensor, shape: Sequence[int]) -> Tensor:
        """The gradient of the input, of that shape."""
        unread = grad.new_empty(1).expand(shape)
        return self._backward(grad, unread, right, (True, False))[0]

    def grad_right(self, grad: Tensor, left: Tensor, shape: Sequence[int]) -> Tensor:
        """The gradient of the weight, of that shape."""
        unread = grad.new_empty(1).expand(shape)
        return self._backward(grad, left, unread, (False, True))[1]

    def grads(
        self, grad: Tensor, left: Tensor, right: Tensor, shapes: tuple[Sequence[int], Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Both gradients from one cast of the output's."""
        return self._backward(grad, left, right, (True, True))

    def bias_axes(self, rank: int) -> tuple[int, ...]:
        """The axes of the output that a bias spans, all but the channels."""
        return (0, *range(2, rank))

    @property
    def _settings(self) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
        return (
            list(self.stride),
            list(self.padding),
            list(self.dilation),
            self.transposed,
            list(self.output_padding),
            self.groups,
        )

    def _backward(self, grad: Tensor, left: Tensor, right: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        one, other, _ = torch.ops.aten.convolution_backward(grad, left, right, None, *self._settings, [*wanted, False])
        return one, other


Product: TypeAlias = MatrixProduct | Convolution


def spell_product(product: Product) -> str:
    """The product as text, as which an operator of torch takes it; plain enough for torch.compile to trace."""
    match product:
        case MatrixProduct():
            return product.kind
        case Convolution():
            lists = product.stride, product.padding, product.dilation, product.output_padding
            words = [",".join([str(number) for number in numbers]) for numbers in lists]
            return ";".join([product.kind, *words, str(int(product.transposed)), str(product.groups)])


@functools.lru_cache(maxsize=1024)
def product_from(spelled: str) -> Product:
    """What `spell_product` spelled."""
    kind, *words = spelled.split(";")
    if kind == MatrixProduct.kind:
        return MatrixProduct()
    lists = [tuple(int(number) for number in word.split(",")) for word in words[:4]]
    stride, padding, dilation, output_padding = lists
    return Convolution(
        stride=stride,
        padding=padding,
        dilation=dilation,
        transposed=words[4] == "1",
        output_padding=output_padding,
        groups=int(words[5]),
    )
