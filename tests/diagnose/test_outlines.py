"""The rules for shapes give what PyTorch's own operators give on the meta device, or leave the call to them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.diagnose.outlines import _RULES, outlined

aten = torch.ops.aten
Call = tuple[Any, ...]
META = {"device": torch.device("meta"), "pin_memory": False}
UNARY = (aten.relu, aten.gelu, aten.silu, aten.tanh, aten.sigmoid, aten.elu)
PAIRS = (aten.add, aten.sub, aten.mul, aten.div)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def conv(x: Tensor, weight: Tensor, *modes: Any, bias: bool = True, transposed: bool = False, groups: int = 1) -> Call:
    axes = weight.dim() - 2
    stride, padding, dilation = itertools.chain(modes, ([1] * axes, [0] * axes, [1] * axes)[len(modes) :])
    last = (stride, padding, dilation, transposed, [0] * axes, groups)
    return aten.convolution.default, x, weight, t(weight.shape[0]) if bias else None, *last


COVERED: tuple[Call, ...] = (
    *((op.default, t(*shape)) for op in UNARY for shape in ((), (0,), (3,), (2, 1, 4), (2, 0, 3), (2, 3, 4, 5))),
    *((op.default, t(3, 4, dtype=dtype)) for op in UNARY for dtype in FLOATS),
    *((op.default, t(3, 4).t()) for op in UNARY),
    (aten.relu.default, t(2, 3, 4, 5).permute(2, 0, 3, 1)),
    (aten.relu.default, t(4, 6, 3, 5)[:, ::2].transpose(1, 3)),
    (aten.relu.default, t(2, 3, 4, 5).to(memory_format=torch.channels_last)),
    (aten.mul.Scalar, t(3, 4, 7, 2, 5).permute(2, 0, 3, 1, 4)[2].transpose(-3, -2), 0.5),
    *((op.Tensor, t(*one), t(*other)) for op in PAIRS for one, other in (((2, 3), (2, 3)), ((2, 1, 3), (3,)))),
    *((op.Tensor, t(3), t(4, 2, 3)) for op in PAIRS),
    *((op.Tensor, t(1), t()) for op in PAIRS),
    *((op.Tensor, t(2, 3, dtype=dtype), t(3, dtype=dtype)) for op in PAIRS for dtype in FLOATS),
    *((op.Tensor, t(2, 3), 2.5) for op in PAIRS),
    *((op.Scalar, t(2, 3, dtype=dtype), 2) for op in (aten.mul, aten.div) for dtype in FLOATS),
    *((op.Scalar, t(2, 3), 0.5) for op in (aten.mul_, aten.div_)),
    (aten.mul_.Scalar, t(2, 3).t(), 0.5),
    *((op.default, t(2, 3, 4), axis, False) for op in (aten._softmax, aten._log_softmax) for axis in (-3, -1, 0, 2)),
    *((aten._safe_softmax.default, t(2, 3, dtype=dtype), -1) for dtype in FLOATS),
    (aten.empty_like.default, t(2, 3)),
    (aten.empty_like.default, t(4, 2, 3).permute(1, 2, 0)),
    *((aten.tril.default, t(3, 4, dtype=dtype), 1) for dtype in (torch.float32, torch.bool, torch.int64)),
    *((aten.where.self, t(2, 3, dtype=torch.bool), t(*one), t(*other)) for one, other in (((), ()), ((2, 3), (3,)))),
    (aten.where.self, t(3, dtype=torch.bool), t(2, 3, dtype=torch.bfloat16), t(dtype=torch.bfloat16)),
    *((aten.mm.default, t(2, k), t(k, 4)) for k in (0, 1, 3)),
    (aten.mm.default, t(3, 2).t(), t(4, 3).t()),
    *((aten.addmm.default, t(*bias), t(2, 3), t(3, 4)) for bias in ((), (1,), (4,), (1, 4), (2, 1), (2, 4))),
    (aten.bmm.default, t(5, 2, 3), t(5, 4, 3).mT),
    (aten.bmm.default, t(5, 2, 3, dtype=torch.float16), t(5, 3, 4, dtype=torch.float16)),
    conv(t(2, 1, 28, 28), t(8, 1, 3, 3)),
    conv(t(2, 4, 9, 8), t(8, 4, 1, 1), bias=False),
    conv(t(1, 1, 1, 1), t(1, 1, 1, 1)),
    conv(t(2, 4, 9, 8), t(6, 2, 3, 2), [2, 1], [1, 0], [1, 2], groups=2),
    conv(t(2, 4, 9), t(6, 4, 3), [2], [1], [2]),
    conv(t(2, 4, 5, 6, 7), t(8, 1, 3, 3, 3), [1, 2, 3], [1, 1, 1], groups=4),
    *((aten.max_pool2d_with_indices.default, t(2, 3, 9, 8), *modes) for modes in (([2, 2],), ([3, 2], [1, 2], [1, 1]))),
    (aten.max_pool2d_with_indices.default, t(2, 1, 9, 8), [2, 3], [], [0, 0], [2, 1]),
    *((aten.native_layer_norm.default, t(2, 3, 4), shape, None, None, 1e-5) for shape in ([4], [3, 4], [2, 3, 4])),
    (aten.native_layer_norm.default, t(2, 3, 4), [4], t(4), t(4), 1e-5),
    *((aten.embedding.default, t(7, 4), t(*shape, dtype=torch.int64)) for shape in ((), (3,), (2, 3))),
    *((aten.arange.default, end, META) for end in (0, 1, 2048)),
)
LEFT: tuple[Call, ...] = (
    (aten.exp.default, t(2)),
    (aten.relu.default, t(2, dtype=torch.int64)),
    (aten.relu.default, t(1, 3, 2).transpose(1, 2)),
    (aten.gelu.default, t(3, 1).expand(3, 4)),
    (aten.tanh.default, t(2, dtype=torch.int64)),
    (aten.relu.default, torch.ones(2)),
    (aten.add.Tensor, t(2), t(2, dtype=torch.float64)),
    (aten.add.Tensor, t(2, 1), t(1, 3)),
    (aten.add.Tensor, t(2, 3), t(3, 2).t()),
    (aten.mul.Tensor, t(2), torch.ones(())),
    (aten.mul.Scalar, t(2, dtype=torch.int64), 2.5),
    (aten.mul.Scalar, t(2), 2j),
    (aten.div.Tensor, t(2, dtype=torch.int64), t(2, dtype=torch.int64)),
    (aten._softmax.default, t(2, 3), 2, False),
    (aten._safe_softmax.default, t(2, 3), -1, torch.float64),
    (aten.empty_like.default, t(2, 3), {"dtype": torch.float64}),
    (aten.where.self, t(2, dtype=torch.bool), t(2), t(2, dtype=torch.float64)),
    (aten.mm.default, t(2, 3), t(3, 2, dtype=torch.float64)),
    conv(t(2, 4, 9, 8), t(4, 6, 3, 3), bias=False, transposed=True),
    conv(t(2, 4, 9, 8).to(memory_format=torch.channels_last), t(8, 4, 3, 3)),
    conv(t(2, 4, 9, 8), t(5, 2, 3, 3), groups=2),
    (aten.max_pool2d_with_indices.default, t(2, 3, 9, 8), [2, 2], [2, 2], [0, 0], [1, 1], True),
    (aten.native_layer_norm.default, t(2, 3, dtype=torch.bfloat16), [3], None, None, 1e-5),
    (aten.arange.default, 2.5, META),
    (aten.arange.default, 3, {**META, "dtype": torch.float32}),
)
REFUSED: tuple[Call, ...] = (
    (aten.add.Tensor, t(2, 3), t(2)),
    (aten.where.self, t(2, dtype=torch.bool), t(3), t(3)),
    (aten._log_softmax.default, t(2, 3), -3, False),
    (aten.tril.default, t(3)),
    (aten.mm.default, t(2, 3), t(4, 3)),
    (aten.mm.default, t(2, 3), t(3)),
    (aten.addmm.default, t(3), t(2, 3), t(3, 4)),
    (aten.addmm.default, t(4), t(2, 3), t(4, 4)),
    (aten.bmm.default, t(2, 3, 4), t(3, 4, 5)),
    (aten.bmm.default, t(2, 3, 4), t(2, 3, 4)),
    conv(t(2, 4, 9, 8), t(8, 3, 3, 3)),
    conv(t(2, 4, 2, 2), t(8, 4, 3, 3)),
    (aten.max_pool2d_with_indices.default, t(2, 3, 9, 8), [2, 2], [2, 2], [2, 2]),
    (aten.max_pool2d_with_indices.default, t(2, 3, 1, 1), [2, 2]),
    (aten.native_layer_norm.default, t(2, 3), [2], None, None, 1e-5),
    (aten.native_layer_norm.default, t(2, 3), [3], t(2), None, 1e-5),
    (aten.embedding.default, t(7), t(2, dtype=torch.int64)),
    (aten.arange.default, -1, META),
)


def parts(call: Call) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Operator, arguments and keywords, which stand last."""
    operator, *args = call
    named = args.pop() if isinstance(args[-1], dict) else {}
    return operator, tuple(args), named


def outline(found: Any) -> list[Any]:
    tensors = [found] if isinstance(found, Tensor) else list(found)
    return [(x.shape, x.dtype, x.stride(), x.device.type, x.storage_offset()) for x in tensors]


def name(call: Call) -> str:
    return str(call[0])


@pytest.mark.parametrize("call", COVERED, ids=name)
def test_a_rule_gives_what_the_operator_gives(call: Call) -> None:
    operator, args, named = parts(call)
    found = outlined(operator, args, named)
    assert found is not None
    assert outline(found) == outline(operator(*args, **named))
    if "_." in str(operator):
        assert found is args[0]


@pytest.mark.parametrize("call", LEFT, ids=name)
def test_what_no_rule_covers_is_left_to_the_operator(call: Call) -> None:
    operator, args, named = parts(call)
    assert outlined(operator, args, named) is None
    operator(*args, **named)


@pytest.mark.parametrize("call", REFUSED, ids=name)
def test_what_the_operator_refuses_is_left_to_it(call: Call) -> None:
    operator, args, named = parts(call)
    assert outlined(operator, args, named) is None
    with pytest.raises((RuntimeError, IndexError, AssertionError)):
        operator(*args, **named)


def test_every_rule_is_tried() -> None:
    assert {call[0] for call in COVERED} == set(_RULES)


@pytest.mark.parametrize("factors", [{"beta": 2}, {"alpha": 0.5}, {"beta": 0, "alpha": 3}])
def test_factors_change_no_shape(factors: dict[str, float]) -> None:
    args = t(4), t(2, 3), t(3, 4)
    assert outline(outlined(aten.addmm.default, args, factors)) == outline(aten.addmm.default(*args, **factors))
    pair = t(2, 3), t(3)
    alpha = {"alpha": factors.get("alpha", 1)}
    assert outline(outlined(aten.add.Tensor, pair, alpha)) == outline(aten.add.Tensor(*pair, **alpha))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_an_option_that_changes_no_shape(approximate: str) -> None:
    asked = {"approximate": approximate}
    assert outline(outlined(aten.gelu.default, (t(2, 3),), asked)) == outline(aten.gelu.default(t(2, 3), **asked))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
@pytest.mark.parametrize(
    "cut", [lambda x: x, lambda x: x[:, 1:], lambda x: x[..., ::2]], ids=["whole", "cut", "stepped"]
)
def test_axes_keep_their_order_in_memory(order: tuple[int, ...], cut: Callable[[Tensor], Tensor]) -> None:
    x = cut(t(2, 3, 4, 5)).permute(order)
    assert outline(outlined(aten.relu.default, (x,), {})) == outline(aten.relu.default(x))
