"""Functions of torch that multiply matrices, each brought to a `Linear`'s product, a batch of matrices or a convolution.

Each takes the place and then what the function takes.  Whatever of it is no product (reshaping, masks, softmax) is PyTorch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.torch.bilinear import Convolution, MatrixProduct
from octavo.torch.place import Place

__all__ = ["added_matmul", "attention", "convolution", "einsum", "linear", "matmul", "transposed_convolution"]

_MATRICES = MatrixProduct()


def linear(place: Place, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`; weight: [O, I] or [I]."""
    site = place.site("linear", input, main=True)
    if weight.dim() == 1:
        return place.linear(site, input, weight[None], None if bias is None else bias.reshape(1)).squeeze(-1)
    return place.linear(site, input, weight, bias)


def matmul(place: Place, input: Tensor, other: Tensor, *, word: str = "matmul") -> Tensor:
    """`torch.matmul` of any ranks, which broadcast."""
    if 0 in (input.dim(), other.dim()) or not (input.is_floating_point() and other.is_floating_point()):
        return torch.matmul(input, other)
    site = place.site(word, input)
    if other.dim() == 1:
        return place.linear(site, input, other[None], None).squeeze(-1)
    if other.dim() == 2:
        return place.linear(site, input, other.mT, None)
    left = input[None] if input.dim() == 1 else input
    batch = torch.broadcast_shapes(left.shape[:-2], other.shape[:-2])
    right, count = other.mT, math.prod(batch)
    if left.shape[-1] != right.shape[-1]:
        return torch.matmul(input, other)  # which says so
    a = left.expand(*batch, *left.shape[-2:]).reshape(count, *left.shape[-2:])
    b = right.expand(*batch, *right.shape[-2:]).reshape(count, *right.shape[-2:])
    y = place.product(site, _MATRICES, a, b).reshape(*batch, left.shape[-2], other.shape[-1])
    return y.squeeze(-2) if input.dim() == 1 else y


def added_matmul(
    place: Place, input: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """`beta * input + alpha * (first @ second)`: `addmm`, `addmv`, `baddbmm`."""
    if beta == alpha == 1 and input.dim() == 1 and second.dim() == 2 and input.shape[0] == second.shape[1]:
        return place.linear(place.site("matmul", first), first, second.mT, input)
    y = matmul(place, first, second)
    if beta == 0 and alpha == 1:
        return y
    site = place.site("add", y) if place.stores else None
    if site is not None:
        input, y = place.read(site, input, 1), place.read(site, y, 2)
    sum = alpha * y if beta == 0 else torch.add(beta * input, y, alpha=alpha)
    return sum if site is None else place.write(site, sum, fresh=True)


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return (int(value),) * rank if isinstance(value, int) else tuple(value) * (rank if len(value) == 1 else 1)


def _convolve(place: Place, kind: Convolution, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    site = place.site("convolution", input, main=True)
    if input.dim() == weight.dim():
        return place.product(site, kind, input, weight, bias)
    return place.product(site, kind, input[None], weight, bias)[0]


def convolution(rank: int) -> Callable[..., Tensor]:
    """`torch.conv1d`, `conv2d` or `conv3d`."""

    def convolve(
        place: Place,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        dilation = _tuple(dilation, rank)
        if padding == "same":
            total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
            # An odd number of elements goes to the end, the last axis first in what F.pad takes.
            input = F.pad(input, [more for width in reversed(total) for more in (0, width % 2)])
            padding = [width // 2 for width in total]
        kind = Convolution(
            stride=_tuple(stride, rank),
            padding=_tuple(0 if padding == "valid" else padding, rank),
            dilation=dilation,
            transposed=False,
            output_padding=(0,) * rank,
            groups=groups,
        )
        return _convolve(place, kind, input, weight, bias)

    return convolve


def transposed_convolution(rank: int) -> Callable[..., Tensor]:
    """`torch.conv_transpose1d`, `conv_transpose2d` or `conv_transpose3d`."""

    def convolve(
        place: Place,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        kind = Convolution(
            stride=_tuple(stride, rank),
            padding=_tuple(padding, rank),
            dilation=_tuple(dilation, rank),
            transposed=True,
            output_padding=_tuple(output_padding, rank),
            groups=groups,
        )
        return _convolve(place, kind, input, weight, bias)

    return convolve


def attention(
    place: Place,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`: two emulated products around a softmax in float32."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = matmul(place, query, key.mT, word="scores")
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        if attn_mask is not None:
            raise ValueError("scaled_dot_product_attention takes attn_mask or is_causal=True; got both: leave one out")
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        weights = torch.softmax(scores, -1)
    else:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype is torch.bool else scores + attn_mask
        # A row that attends to nothing is zero, as PyTorch has it, and so is its gradient; softmax would make both NaN.
        nothing = (scores == -math.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    return matmul(place, F.dropout(weights, dropout_p) if dropout_p else weights, value, word="context")


def einsum(place: Place, equation: Any, *operands: Any) -> Tensor:
    """`torch.einsum` of an equation as text; of more than two operands, two at a time from the left."""
    if not isinstance(equation, str):
        raise ValueError(
            "einsum is emulated with its equation as text ('ij,jk->ik'); write it so, or exempt the module"
        )
    given = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    if not all(x.is_floating_point() for x in given):
        return torch.einsum(equation, *given)
    terms, output = _parsed(equation, given)
    first, tensor = terms[0], given[0]
    for number in range(1, len(given)):
        later = "".join(terms[number + 1 :]) + output
        kept = "".join(dict.fromkeys(letter for letter in first + terms[number] if letter in later))
        kept = output if number + 1 == len(given) else kept
        tensor = _contracted(place, first, terms[number], kept, tensor, given[number])
        first = kept
    return torch.einsum(f"{first}->{output}", tensor) if len(given) == 1 else tensor


def _parsed(equation: str, tensors: Sequence[Tensor]) -> tuple[list[str], str]:
    """The letters of each operand and of the output; those that an ellipsis stands for are capitals from Z on, and free."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(tensors):
        raise ValueError(f"einsum {equation!r} names {len(terms)} operands; got {len(tensors)}")
    free = [letter for letter in "ZYXWVUTSRQPONMLKJIHGFEDCBA" if letter not in equation]
    hidden = [tensor.dim() - len(term) + 3 for term, tensor in zip(terms, tensors, strict=True)]
    most = max([rank for rank, term in zip(hidden, terms, strict=True) if "..." in term], default=0)
    dots = "".join(reversed(free[:most]))
    spelled = [term.replace("...", dots[len(dots) - rank :]) for term, rank in zip(terms, hidden, strict=True)]
    if not arrow:
        letters = "".join(spelled)
        once = [letter for letter in sorted(set(letters)) if letters.count(letter) == 1 and letter not in dots]
        output = "..." + "".join(once)
    return spelled, output.replace("...", dots)


def _contracted(place: Place, one: str, other: str, output: str, a: Tensor, b: Tensor) -> Tensor:
    """Two operands as a batch of matrices: letters of both and the output make the batch, those of both alone are contracted."""
    a, one = _distinct(a, one, other + output)
    b, other = _distinct(b, other, one + output)
    batch = [letter for letter in one if letter in other and letter in output]
    inner = [letter for letter in one if letter in other and letter not in output]
    rows = [letter for letter in one if letter not in other]
    columns = [letter for letter in other if letter not in one]
    sizes: dict[str, int] = {}
    for letter, size in zip(one + other, (*a.shape, *b.shape), strict=True):
        if sizes.get(letter, 1) == 1:  # which broadcasts
            sizes[letter] = size
    count = {
        name: [sizes[letter] for letter in letters]
        for name, letters in (("batch", batch), ("inner", inner), ("rows", rows), ("columns", columns))
    }
    a = a.permute([one.index(letter) for letter in (*batch, *rows, *inner)])
    b = b.permute([other.index(letter) for letter in (*batch, *columns, *inner)])
    a = a.expand(*count["batch"], *count["rows"], *count["inner"])
    b = b.expand(*count["batch"], *count["columns"], *count["inner"])
    groups, width = math.prod(count["batch"]), math.prod(count["inner"])
    left = a.reshape(groups, math.prod(count["rows"]), width)
    right = b.reshape(groups, math.prod(count["columns"]), width)
    site = place.site("einsum", left)
    product = place.product(site, _MATRICES, left, right) if batch else place.linear(site, left[0], right[0], None)
    y = product.reshape((*count["batch"], *count["rows"], *count["columns"]))
    letters = [*batch, *rows, *columns]
    return y.permute([letters.index(letter) for letter in output])


def _distinct(x: Tensor, letters: str, elsewhere: str) -> tuple[Tensor, str]:
    """x with its diagonals taken and the letters that stand nowhere else summed."""
    kept = "".join(dict.fromkeys(letter for letter in letters if letter in elsewhere))
    return (x, letters) if kept == letters else (torch.einsum(f"{letters}->{kept}", x), kept)
