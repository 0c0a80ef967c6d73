"""The traced table equals the products that a real training step dispatches, and names them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.diagnose.gemms import Kind, Shape, Which
from octavo.diagnose.tracing import TracedGemm, trace_gemms
from octavo.lab.models import ModelName, build
from octavo.lab.transformer import Transformer

Sizes = tuple[int, int, int, int]
"""(batch, smaller and larger of the result's sides, contracted)."""


def sizes(batch: int, m: int, k: int, n: int) -> Sizes:
    return batch, min(m, n), max(m, n), k


def columns(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, int]:
    """(patches, elements of one) of a convolution over x, by PyTorch's own `unfold`, one axis made two."""
    x = torch.zeros(x.shape if x.dim() == 4 else (*x.shape[:2], 1, x.shape[2]))
    both = [
        tuple(v) if len(v) == 2 else (other, *v)
        for v, other in zip((kernel, dilation, padding, stride), (1, 1, 0, 1), strict=True)
    ]
    found = F.unfold(x, both[0], dilation=both[1], padding=both[2], stride=both[3])
    return found.shape[0] * found.shape[2], found.shape[1]


class Step(TorchDispatchMode):
    """What a step really multiplies: the products of its two passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[Counter[Sizes]] = [Counter(), Counter()]
        self.back = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::")
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            a, b = args[-2:] if name in ("mm", "bmm") else args[1:3]
            batch = a.shape[0] if a.dim() == 3 else 1
            self.passes[self.back][sizes(batch, a.shape[-2], a.shape[-1], b.shape[-1])] += 1
        elif name == "convolution":
            input, weight, _, *modes = args
            self.passes[0][sizes(*self.patches(out, input, weight, *modes))] += 1
        elif name == "convolution_backward":
            grad, input, weight, _, *modes, mask = args
            groups, tokens, features, outputs = self.patches(grad, input, weight, *modes)
            if mask[0]:
                self.passes[1][sizes(groups, tokens, outputs, features)] += 1
            if mask[1]:
                self.passes[1][sizes(groups, outputs, tokens, features)] += 1
        else:
            assert not any(word in name for word in ("mm", "conv", "attention", "linear", "rnn")), name
        return out

    @staticmethod
    def patches(output: Tensor, input: Tensor, weight: Tensor, *modes: Any) -> Sizes:
        stride, padding, dilation, transposed, _, groups = modes
        looked_at, looking = (output, input) if transposed else (input, output)
        tokens, elements = columns(looked_at, weight.shape[2:], stride, padding, dilation)
        assert tokens * looking.shape[1] == looking.numel()
        channels = looking.shape[1] // groups
        return (
            (groups, tokens, channels, elements // groups)
            if transposed
            else (groups, tokens, elements // groups, channels)
        )


def stepped(model: nn.Module, *inputs: Tensor) -> list[Counter[Sizes]]:
    with sdpa_kernel(SDPBackend.MATH), Step() as step:
        output = model(*inputs)
        loss = (output[0] if isinstance(output, tuple) else output).square().sum()
        step.back = 1
        loss.backward()
    return step.passes


def traced(model: nn.Module, *inputs: Tensor) -> tuple[TracedGemm, ...]:
    return trace_gemms(model.to("meta"), *(x.to("meta").requires_grad_(x.requires_grad) for x in inputs))


class Conv(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(4, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(8, 8, 3, padding="same", groups=4, dilation=2),
            nn.Conv1d(8, 6, 1, bias=False),
        )


class Grouped(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(4, 8, (3, 2), groups=2, stride=(2, 1)),
            nn.Conv2d(8, 8, 3, groups=8, padding=1),
            nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2, output_padding=1),
            nn.ConvTranspose2d(6, 4, (2, 3), padding=1, bias=False),
        )


class Attention(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.weights = weights
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.heads(x, x, x, need_weights=self.weights)[0]
        return mixed


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.ones(3, 5)), nn.Parameter(torch.ones(2, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        first = x @ self.left  # [2, 6, 3] x [3, 5]: one product
        second = torch.matmul(first, self.right)  # [2, 6, 5] x [2, 5, 4]: two
        third = torch.einsum("bij,bkj->bik", second, second.detach())
        return torch.baddbmm(third, second, second.mT)


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 7), nn.Linear(7, 5, bias=False))
    model[1].requires_grad_(False)
    return model


fc = lambda: nn.Sequential(nn.Flatten(), *(nn.Linear(a, b) for a, b in ((784, 50), (50, 50), (50, 10))))  # noqa: E731

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "cnn": (lambda: build(ModelName.CNN, seed=0), lambda: torch.rand(2, 1, 28, 28)),
    "fc-mnist": (fc, lambda: torch.rand(4, 1, 28, 28)),
    "lab-fc": (lambda: build(ModelName.FC, seed=0), lambda: torch.rand(4, 1, 28, 28)),
    "transformer": (lambda: Transformer(50, 16, 2, 4, 32, 12), lambda: torch.randint(50, (3, 9))),
    "tied": (lambda: Transformer(50, 16, 1, 2, 24, 12, tied=True), lambda: torch.randint(50, (1, 12))),
    "conv1d": (Conv, lambda: torch.rand(3, 4, 17)),
    "grouped": (Grouped, lambda: torch.rand(2, 4, 11, 9)),
    "attention": (lambda: Attention(False), lambda: torch.rand(2, 5, 8)),
    "attention-weights": (lambda: Attention(True), lambda: torch.rand(2, 5, 8, requires_grad=True)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda: torch.rand(2, 5, 8)),
    "functions": (Functions, lambda: torch.rand(2, 6, 3)),
    "frozen": (frozen, lambda: torch.rand(3, 2, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_what_a_real_step_multiplies(name: str) -> None:
    build_model, make = MODELS[name]
    model, x = build_model(), make()
    forward, backward = stepped(model, x)
    gemms = traced(model, x)
    assert Counter(sizes(g.batch, *g.shape(Which.OUTPUT)) for g in gemms) == forward
    assert Counter(sizes(g.batch, *s) for g in gemms for which, s in g.gemms() if which is not Which.OUTPUT) == backward
    assert sum(forward.values()) > 0
    assert sum(backward.values()) > 0


def test_the_three_gemms_are_those_of_the_recipes_table() -> None:
    first, second = traced(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)), torch.rand(2, 3, 4))
    assert list(first.gemms()) == [(Which.OUTPUT, Shape(6, 4, 6)), (Which.GRAD_WEIGHT, Shape(6, 6, 4))]
    assert list(second.gemms()) == [
        (Which.OUTPUT, Shape(6, 6, 5)),
        (Which.GRAD_INPUT, Shape(6, 5, 6)),
        (Which.GRAD_WEIGHT, Shape(5, 6, 6)),
    ]


def test_layers_have_the_names_of_their_modules_and_functions_of_who_calls_them() -> None:
    x = torch.rand(2, 6, 3)
    assert [g.layer for g in traced(Functions(), x)] == ["matmul()", "matmul_2()", "matmul_3()", "matmul_4()"]
    assert [g.layer for g in traced(nn.ModuleDict({"deep": Functions()})["deep"], x)][:1] == ["matmul()"]
    found = traced(nn.Sequential(Functions(), Attention(False).requires_grad_(), nn.Linear(6, 2))[:1], x)
    assert [(g.layer, g.module, g.kind) for g in found][:2] == [
        ("0.matmul()", "0", Kind.MATMUL),
        ("0.matmul_2()", "0", Kind.BATCHED),
    ]
    names = [g.layer for g in traced(Transformer(50, 16, 2, 4, 32, 12), torch.randint(50, (3, 9)))]
    block = ["qkv", "scores()", "context()", "out", "fc1", "fc2"]
    assert names == [f"blocks.{i}.{word}" for i in range(2) for word in block] + ["head"]
    assert [g.layer for g in traced(Attention(False), torch.rand(2, 5, 8))] == [
        "heads.matmul()",
        "heads.scores()",
        "heads.context()",
        "heads.matmul_2()",
    ]


def test_kinds_and_a_module_that_is_the_model() -> None:
    (linear,) = traced(nn.Linear(3, 2), torch.rand(3))
    assert (linear.layer, linear.module, linear.kind, linear.batch) == ("model", "", Kind.LINEAR, 1)
    assert (linear.tokens, linear.features, linear.outputs) == (1, 3, 2)
    assert {g.kind for g in traced(Conv(), torch.rand(3, 4, 17))} == {Kind.CONVOLUTION}
    kinds = Counter(g.kind for g in traced(Transformer(50, 16, 2, 4, 32, 12), torch.randint(50, (3, 9))))
    assert kinds == {Kind.LINEAR: 9, Kind.ATTENTION: 4}


def test_vectors_are_matrices_of_one_row_or_column() -> None:
    class Vectors(nn.Module):
        def forward(self, a: Tensor, v: Tensor) -> Tensor:
            return torch.dot(a @ v, torch.addmv(a[:, 0], a, v))

    found = traced(Vectors(), torch.rand(4, 3), torch.rand(3))
    assert [(g.tokens, g.features, g.outputs) for g in found] == [(4, 3, 1), (4, 3, 1), (1, 4, 1)]


def test_a_loss_is_traced_too() -> None:
    model = nn.Linear(4, 3, device="meta")
    other = torch.empty(3, 3, device="meta")
    found = trace_gemms(model, torch.empty(2, 4, device="meta"), loss=lambda y: (y @ other).sum())
    assert [(g.layer, g.left_grad, g.right_grad) for g in found] == [("model", False, True), ("matmul()", True, False)]


def test_nothing_is_built_and_no_trace_stays() -> None:
    with torch.device("meta"):
        model, tokens = Transformer(32000, 2048, 24, 16, 8192), torch.empty(1, 2048, dtype=torch.long)
    assert sum(p.numel() for p in model.parameters()) > 1_000_000_000
    before = model.training
    gemms = trace_gemms(model, tokens)
    assert len(gemms) == 24 * 6 + 1
    assert model.training is before
    assert all(p.is_meta and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    flops = sum(2 * g.batch * math.prod(g.shape(Which.OUTPUT)) for g in gemms)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "s.weight" not in name)
    assert flops == 2 * 2048 * weights + 24 * 4 * 2048 * 2048 * 2048


def test_hooks_go_when_the_pass_fails() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3)).to("meta")
    with pytest.raises(
        ValueError, match=r"^1 cannot run on the meta device \(.*2.*3.*4.*\); check the inputs' shapes"
    ) as caught:
        trace_gemms(model, torch.empty(2, 4, device="meta"))
    assert "\n" not in str(caught.value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_tensors_elsewhere_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r'meta device; 0\.weight is on cpu: use model\.to\("meta"\)'):
        trace_gemms(nn.Sequential(nn.Linear(2, 2)), torch.empty(1, 2, device="meta"))
    with pytest.raises(ValueError, match="input 0 is on cpu"):
        trace_gemms(nn.Linear(2, 2, device="meta"), torch.empty(1, 2))


def test_a_model_that_reads_values_is_refused() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum().item() > 0 else x

    with pytest.raises(ValueError, match=r"^0 cannot run on the meta device .* reads the values of tensors"):
        traced(nn.Sequential(Reads()), torch.rand(2))


def test_a_product_of_three_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.Bilinear(2, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.pair(x, x)
            return y

    with pytest.raises(ValueError, match=r"pair calls aten::_trilinear.* write it as matmul or einsum"):
        traced(Two(), torch.rand(1, 2))


def test_a_recurrent_layer_is_a_product_for_each_step() -> None:
    found = traced(nn.LSTM(4, 5), torch.rand(7, 3, 4))
    hidden = [g for g in found if g.features == 5]
    assert [(g.tokens, g.outputs) for g in hidden] == [(3, 20)] * 7
    assert {g.kind for g in found} == {Kind.MATMUL}
    assert sum(g.tokens for g in found if g.features == 4) == 21
