"""Emulated models where others meet them: torch.compile, checkpointing, ranks, copies, transforms, threads, Hugging Face."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from octavo.diagnose.records import JsonLines
from octavo.formats import E5M2, FLOAT16
from octavo.recipes import NAMED, Recipe, delayed_scaling
from octavo.torch import Emulation, LossScaler, emulate

DELAYED = delayed_scaling(amax_history_len=3)
RECIPES: dict[str, Recipe | str] = {"direct": "direct", "hybrid": "hybrid", "delayed": DELAYED, "mxfp8": "mxfp8"}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


class Cnn(nn.Module):
    """Convolutions, batch norms, and a sum written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(x))
        out += x
        return self.head(F.relu(out).mean((2, 3)))


class Attention(nn.Module):
    """A block of nn.MultiheadAttention, or of scaled_dot_product_attention."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)
        self.inner = nn.Linear(16, 48) if fused else nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(x)
        if isinstance(self.inner, nn.MultiheadAttention):
            return self.head(x + self.inner(x, x, x)[0])
        q, k, v = self.inner(x).unflatten(-1, (2, 24)).transpose(1, 2).chunk(3, -1)
        return self.head(x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Called(nn.Module):
    """A linear layer and a function behind it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 20))


def attention() -> nn.Module:
    return Attention(False)


def fused_attention() -> nn.Module:
    return Attention(True)


SHAPES = {mlp: (7, 20), Cnn: (4, 1, 8, 8), attention: (2, 5, 16), fused_attention: (2, 5, 16)}


def seeded(make: Callable[..., nn.Module], *arguments: Any) -> Any:
    torch.manual_seed(1)
    return make(*arguments)


def data(make: Callable[..., nn.Module], steps: int) -> list[Tensor]:
    return [torch.randn(SHAPES[make], generator=torch.Generator().manual_seed(step)) for step in range(steps)]


Forward = Callable[[Tensor], Tensor]


def train(emulation: Emulation, xs: list[Tensor], forward: Forward | None = None, rate: float = 0.1) -> list[float]:
    """Steps of SGD on a mean of squares, and their losses."""
    model, losses = emulation.model, []
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for x in xs:
        loss = (model if forward is None else forward)(x).square().mean()
        optimizer.zero_grad()
        emulation.scale(loss).backward()
        emulation.step(optimizer)
        losses.append(loss.item())
    return losses


def state(emulation: Emulation) -> dict[str, Tensor]:
    """Parameters, buffers, gradients, scales, histories and draws, copied."""
    model, sites = emulation.model, emulation.state_dict()["sites"]
    found = {f"model {name}": value.clone() for name, value in model.state_dict().items()}
    found |= {f"grad {name}": value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return found | {f"{site} {name}": value.clone() for site, held in sites.items() for name, value in held.items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert sorted(one) == sorted(two)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_recipe
@pytest.mark.parametrize("make", [Cnn, attention, fused_attention])
def test_compiled_training_has_the_bits_of_eager(make: Callable[..., nn.Module], recipe: Recipe | str) -> None:
    torch._dynamo.reset()
    xs, eager, compiled = data(make, 3), emulate(seeded(make), recipe), emulate(seeded(make), recipe)
    forward = torch.compile(compiled.model, backend="aot_eager", fullgraph=True)
    assert train(eager, xs) == train(compiled, xs, forward)
    same(state(eager), state(compiled))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_has_the_bits_of_eager() -> None:
    torch._dynamo.reset()
    xs, eager, compiled = data(mlp, 3), emulate(seeded(mlp), "hybrid"), emulate(seeded(mlp), "hybrid")
    assert train(eager, xs) == train(compiled, xs, torch.compile(compiled.model, fullgraph=True))
    same(state(eager), state(compiled))


def _gated(x: Tensor) -> Tensor:
    y = x.clone()
    y *= x.sigmoid()
    return y


def _summed_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y.add_(x.sigmoid())
    return y


def _summed_in_part(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :3].add_(1.3)
    y[:, 3:] += 0.7
    return y


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "a number minus": lambda x: 1 - x,
    "a number over": lambda x: 1 / (x.abs() + 1),
    "a tensor times": lambda x: torch.ones(3, 4) @ x,
    "unflatten": lambda x: x.unflatten(-1, (2, 4)).sum(1),
    "split": lambda x: x.split(4, -1)[1],
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "a product in place": _gated,
    "a sum in place": _summed_in_place,
    "sums in parts": _summed_in_part,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_compiled_functions_have_the_bits_of_eager(function: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    x, found = torch.randn(4, 8), []
    for compiled in (False, True):
        emulation = emulate(seeded(Called, function), "direct")
        model = emulation.model
        y = (torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model)(x)
        y.square().sum().backward()
        found.append({**state(emulation), "y": y.detach()})
    same(*found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models_follow_emulation_and_its_end() -> None:
    torch._dynamo.reset()
    (x,), model = data(mlp, 1), seeded(mlp)
    compiled: Any = torch.compile(model, backend="aot_eager")
    plain = compiled(x)
    for recipe in ("direct", "mxfp8"):
        with emulate(model, recipe):
            assert compiled(x).equal(model(x))
            assert not compiled(x).equal(plain)
        assert compiled(x).equal(plain)


@every_recipe
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [mlp, Cnn])
def test_a_checkpointed_model_trains_the_same(
    make: Callable[..., nn.Module], recipe: Recipe | str, reentrant: bool
) -> None:
    if recipe == "direct" and reentrant and make is Cnn:
        pytest.skip(
            "a reentrant pass has no gradients to store, so that direct draws other numbers: nothing to compare"
        )
    xs, plain, kept = data(make, 4), emulate(seeded(make), recipe), emulate(seeded(make), recipe)
    xs = [x.requires_grad_() for x in xs]
    assert train(plain, xs) == train(kept, xs, lambda x: checkpoint(kept.model, x, use_reentrant=reentrant))
    ours, theirs = state(kept), state(plain)
    if make is Cnn:  # batch norm counts the recomputation
        ours, theirs = ({k: v for k, v in s.items() if "bn" not in k or "weight" in k} for s in (ours, theirs))
    same(ours, theirs)


class Partly(nn.Module):
    """A function of its own, with operators that are in no child, checkpointed or not."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20)
        self.weight, self.reentrant = nn.Parameter(torch.randn(20, 20) / 5), reentrant

    def middle(self, x: Tensor) -> Any:
        return x + F.relu(F.linear(self.second(x), self.weight) @ self.weight)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        kept = self.reentrant is not None
        return self.last(checkpoint(self.middle, x, use_reentrant=self.reentrant) if kept else self.middle(x))


@every_recipe
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_function_inside_a_module_is_refused(recipe: Recipe | str, reentrant: bool) -> None:
    """Recomputed, its operators would be in no module, and run as they are."""
    (x,), model = data(mlp, 1), seeded(Partly, reentrant)
    emulate(model, recipe)
    with pytest.raises(ValueError, match="checkpoint"):
        model(x)


def test_two_checkpointed_passes_before_one_backward_are_refused() -> None:
    """The delayed scales move after each pass, and only one older set is kept."""
    xs, model = data(mlp, 2), seeded(mlp)
    emulate(model, DELAYED)
    loss = sum(checkpoint(model, x, use_reentrant=False).square().mean() for x in xs)
    with pytest.raises(RuntimeError, match="recomputed after its scales moved"):
        loss.backward()


RANKS = """
import datetime, json, sys
import torch, torch.distributed as dist
from torch import nn
from octavo.recipes import delayed_scaling
from octavo.torch import emulate

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)
        self.one, self.other = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x, one, other):
        x = self.first(x)
        x = self.one(1000 * x) if one else x
        return self.last(torch.mm(x, self.other) if other else x)

def train(branches):
    torch.manual_seed(0)
    model = Model()
    emulation = emulate(model, delayed_scaling(amax_history_len=4))
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=set(branches) != {"both"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step, branch in enumerate(branches):
        optimizer.zero_grad()
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(2 * step + rank)) * (1 + 9 * rank)
        parallel(x, branch != "other", branch != "one").square().mean().backward()
        emulation.step(optimizer)
    scales = {name: (site.scale_forward.tolist(), site.scale_backward.tolist()) for name, site in emulation.sites.items()}
    emulation.remove()
    values = [[None if p.grad is None else p.grad.tolist(), p.tolist()] for p in model.parameters()]
    return sorted(scales.items()), values

rank, store = int(sys.argv[1]), "file://" + sys.argv[2]
patience = datetime.timedelta(seconds=30)
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
print(json.dumps([train(branches[rank]) for branches in json.loads(sys.argv[3])]))
dist.destroy_process_group()
"""
BRANCHES = {
    "alike": [["both", "both", "both"]] * 2,
    "met in another order": [["one", "other", "one"], ["other", "one", "other"]],
    "taken by one rank": [["one", "one", "one"], ["both", "one", "both"]],
}


def test_ranks_share_scales_and_gradients(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "store"), json.dumps(list(BRANCHES.values()))]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([sys.executable, "-c", RANKS, str(rank), *arguments], **pipes) for rank in range(2)]
    told = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told[0][1][-800:] + told[1][1][-800:]
    one, two = (json.loads(out.splitlines()[-1]) for out, _ in told)
    for case, ours, theirs in zip(BRANCHES, one, two, strict=True):
        assert ours == theirs, case
        assert all(forward[0] != 1 and backward[0] != 1 for _, (forward, backward) in ours[0]), case


class Tied(nn.Module):
    """A language model whose head is its embedding, by the module or by a call."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(12, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.embedding.weight if tied else nn.Parameter(self.embedding.weight.detach().clone())

    def forward(self, ids: Tensor) -> Any:
        return self.head(F.relu(self.middle(self.embedding(ids))))


@every_recipe
def test_tied_weights_have_both_gradients(recipe: Recipe | str) -> None:
    ids, found = torch.arange(12).reshape(2, 6), []
    for tied in (True, False):
        model = seeded(Tied, tied)
        emulation = emulate(model, recipe, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        found.append((model, emulation))
    (tied_model, one), (apart, two) = found
    assert tied_model.embedding.weight.grad.equal(apart.embedding.weight.grad + apart.head.weight.grad)
    assert tied_model.middle.weight.grad.equal(apart.middle.weight.grad)
    assert one.sites.keys() == two.sites.keys()


def test_a_module_used_twice_has_one_site_that_sees_both_passes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(20, 20)

        def forward(self, x: Tensor) -> Any:
            return self.layer(F.relu(self.layer(x)))

    amaxes: list[float] = []
    model = seeded(Twice)
    emulation = emulate(model, DELAYED)
    model.layer.register_forward_pre_hook(lambda _, args: amaxes.append(args[0].abs().max().item()))
    losses = train(emulation, data(mlp, 3), rate=0.01)
    assert list(emulation.sites) == ["layer"]
    history = emulation.sites["layer"].amax_history_forward[:, 0].tolist()
    peaks = [max(amaxes[2 * step : 2 * step + 2]) for step in range(3)]
    assert history == [0, *peaks[1:]]
    assert all(map(math.isfinite, losses))


def test_operators_and_children_of_one_name_have_sites_of_their_own() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.weight = nn.Linear(20, 8), nn.Parameter(torch.randn(3, 8) * 100)

        def forward(self, x: Tensor) -> Any:
            return F.linear(self.linear(x), self.weight)

    model = seeded(Named)
    emulation = emulate(model, DELAYED)
    train(emulation, data(mlp, 1), rate=0.0)
    # Each keeps the amax of its own weight.
    found = {site.amax_history_forward[-1, 1].item() for site in emulation.sites.values()}
    assert found == {model.linear.weight.abs().max().item(), model.weight.abs().max().item()}


@every_recipe
def test_a_copy_trains_as_the_original_would_and_apart_from_it(recipe: Recipe | str) -> None:
    xs, emulation = data(Cnn, 5), emulate(seeded(Cnn), recipe, loss_scale=2.0**8, master=FLOAT16)
    train(emulation, xs[:2])
    model, twin = copy.deepcopy((emulation.model, emulation))
    assert twin.model is model
    before = state(emulation)
    losses, after = train(twin, xs[2:]), state(twin)
    same(state(emulation), before)
    assert train(emulation, xs[2:]) == losses
    same(state(emulation), after)
    emulation.remove()
    assert "forward" not in emulation.model.__dict__
    assert not model(xs[0]).equal(emulation.model(xs[0]))
    twin.remove()
    assert model(xs[0]).equal(emulation.model(xs[0]))


def test_models_that_are_watched_can_be_copied(tmp_path: Path) -> None:
    model = seeded(mlp)
    emulation = emulate(model, "hybrid")
    with JsonLines(tmp_path / "casts.jsonl") as writer:
        emulation.observe(writer, every=1)
        average: Any = torch.optim.swa_utils.AveragedModel(model)
    x = data(mlp, 1)[0]
    assert average.module[0].weight.equal(model[0].weight)
    assert pickle.loads(pickle.dumps(average.module))(x).equal(average(x))


@every_recipe
def test_state_dicts_are_those_of_the_plain_model(recipe: Recipe | str) -> None:
    plain, model = seeded(Cnn), seeded(Cnn)
    emulation, file = emulate(model, recipe), io.BytesIO()
    assert list(model.state_dict()) == list(plain.state_dict())
    train(emulation, data(Cnn, 2))
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    emulation.remove()
    model.eval(), plain.eval()
    assert model(data(Cnn, 1)[0]).equal(plain(data(Cnn, 1)[0]))


@every_recipe
def test_a_pickled_model_goes_on_as_the_original(recipe: Recipe | str) -> None:
    xs, emulation, file = data(Cnn, 4), emulate(seeded(Cnn), recipe, loss_scale="dynamic"), io.BytesIO()
    train(emulation, xs[:2])
    torch.save((emulation.model, emulation), file)
    file.seek(0)
    _, loaded = torch.load(file, weights_only=False)
    assert train(loaded, xs[2:]) == train(emulation, xs[2:])
    same(state(loaded), state(emulation))


@pytest.mark.parametrize("recipe", ["direct", "hybrid", "mxfp8"])
@pytest.mark.parametrize("make", [Cnn, attention])
def test_a_retained_graph_gives_the_same_gradients_again(make: Callable[..., nn.Module], recipe: str) -> None:
    emulation = emulate(seeded(make), recipe)
    loss = emulation.model(data(make, 1)[0]).square().sum()
    first, second = (torch.autograd.grad(loss, list(emulation.model.parameters()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


class Scaled(nn.Module):
    """No product at all."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Any:
        return self.norm(x) ** 2


@pytest.mark.parametrize("make", [mlp, Cnn, attention, Scaled])
def test_gradients_of_gradients_are_refused(make: Callable[..., nn.Module]) -> None:
    model = seeded(make)
    emulate(model, "direct")
    x = torch.randn(SHAPES.get(make, (3, 16)), requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad * x).sum().backward()


@every_recipe
def test_functional_call_runs_the_given_parameters(recipe: Recipe | str) -> None:
    model, other, x = seeded(mlp), mlp(), data(mlp, 1)[0]
    emulate(model, recipe), emulate(other, recipe)
    given = {name: value.detach() for name, value in other.named_parameters()}
    assert torch.func.functional_call(model, given, (x,)).equal(other(x))


@every_recipe
@pytest.mark.parametrize("make", [mlp, Cnn])
@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_are_refused_by_name(make: Callable[..., nn.Module], recipe: Recipe | str, transform: str) -> None:
    model, x = seeded(make).eval(), data(make, 1)[0]
    emulate(model, recipe)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    run: dict[str, Callable[[], Any]] = {
        "vmap": lambda: torch.func.vmap(model)(torch.stack([x, x])),
        "grad": lambda: torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters),
    }
    with pytest.raises((ValueError, RuntimeError), match=r"torch\.func|vmap"):
        run[transform]()


def _distance(x: Tensor, y: Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("make", [Cnn, attention, fused_attention])
@pytest.mark.parametrize("name", list(NAMED))
def test_autocast_gives_bfloat16_outputs_and_float32_gradients(name: str, make: Callable[..., nn.Module]) -> None:
    model, x = seeded(make), data(make, 1)[0]
    expected = model(x)
    emulate(model, name)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert _distance(y, expected) < 0.5
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert (parameter.grad.dtype, parameter.grad.isfinite().all().item()) == (torch.float32, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", list(NAMED))
def test_models_of_other_dtypes_keep_them(name: str, dtype: torch.dtype) -> None:
    plain, x = seeded(Cnn), data(Cnn, 1)[0]
    model, expected = seeded(Cnn).to(dtype), plain(x)
    emulation = emulate(model, name)
    whole = name in ("delayed_scaling", "current_scaling", "direct", "hybrid")
    if dtype is torch.float64 and not whole:
        with pytest.raises(ValueError, match=r"takes float32, bfloat16 and float16.*; got float64: convert"):
            model(x.to(dtype))
        return
    y = model(x.to(dtype))
    y.square().mean().backward()
    assert y.dtype == dtype
    assert _distance(y, expected) < 0.5
    assert {parameter.grad.dtype for parameter in model.parameters()} == {dtype}
    emulation.step(torch.optim.SGD(model.parameters(), lr=0.1))


@every_recipe
def test_inference_mode_evaluates_as_no_grad_does(recipe: Recipe | str) -> None:
    for make in (Cnn, attention):
        model, x = seeded(make).eval(), data(make, 1)[0]
        emulation = emulate(model, recipe)
        with torch.no_grad():
            expected = model(x)
        with torch.inference_mode():
            assert model(x).equal(expected)
        train(emulation, [x])


@pytest.mark.parametrize("recipe", ["direct", "hybrid"])
def test_layers_of_pytorch_that_evaluate_by_a_fast_path_are_emulated_there(recipe: str) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    plain = model(x, src_key_padding_mask=padding)
    emulate(model, recipe)
    slow = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        assert model(x, src_key_padding_mask=padding).equal(slow)
    assert not plain.equal(slow)


@pytest.mark.parametrize("recipe", ["direct", "hybrid", DELAYED, "mxfp4"], ids=["direct", "hybrid", "delayed", "mxfp4"])
def test_a_resumed_run_repeats_the_uninterrupted_one(recipe: Recipe | str) -> None:
    settings: dict[str, Any] = {"master": FLOAT16, "seed": 7}
    overflows = () if recipe == "mxfp4" else (1, 5)

    def start() -> tuple[Emulation, torch.optim.Optimizer]:
        model = seeded(Cnn)
        scaler = LossScaler(growth_interval=3, report=lambda line: None)
        return emulate(model, recipe, loss_scale=scaler, **settings), torch.optim.Adam(model.parameters(), lr=1e-2)

    def run(emulation: Emulation, optimizer: torch.optim.Optimizer, steps: range) -> list[Any]:
        found = []
        for step in steps:
            optimizer.zero_grad()
            loss = emulation.model(xs[step]).square().mean() * (1e38 if step in overflows else 1)
            emulation.scale(loss).backward()
            assert emulation.scaler is not None
            found.append((loss.item(), emulation.step(optimizer), emulation.scaler.value, emulation.global_step))
        return found

    xs = data(Cnn, 8)
    whole, optimizer = start()
    expected = run(whole, optimizer, range(8))
    first, optimizer = start()
    found = run(first, optimizer, range(4))
    file = io.BytesIO()
    torch.save([first.model.state_dict(), optimizer.state_dict(), first.state_dict()], file)
    file.seek(0)
    weights, moments, rest = torch.load(file, weights_only=True)
    second, optimizer = start()
    second.model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    second.load_state_dict(rest)
    assert found + run(second, optimizer, range(4, 8)) == expected
    assert [taken for _, taken, _, _ in expected] == [step not in overflows for step in range(8)]
    same(state(second), state(whole))


def test_states_of_other_runs_are_refused_in_one_line() -> None:
    emulation = emulate(seeded(mlp), DELAYED, loss_scale="dynamic")
    train(emulation, data(mlp, 1))
    held = emulation.state_dict()
    cases: list[tuple[Emulation, Any, str]] = [
        (emulate(seeded(mlp), "hybrid", loss_scale="dynamic"), held, "another recipe"),
        (emulate(seeded(mlp), DELAYED), held, "with a loss scale"),
        (
            emulate(seeded(mlp), DELAYED, loss_scale="dynamic", exempt=["2"]),
            held,
            "'2', which is in no emulated module",
        ),
        (emulate(seeded(Cnn), DELAYED, loss_scale="dynamic"), held, "'0', which is in no emulated module"),
        (emulation, {"sites": {}}, "has the keys global_step"),
    ]
    for other, loaded, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            other.load_state_dict(loaded)
        assert "\n" not in str(error.value)
    emulation.remove()
    with pytest.raises(ValueError, match="remove"):
        emulation.load_state_dict(held)


@pytest.mark.parametrize("recipe", ["hybrid", DELAYED], ids=["hybrid", "delayed"])
def test_sparse_gradients_of_embeddings_are_taken(recipe: Recipe | str) -> None:
    found = []
    for sparse in (True, False):
        model = seeded(lambda: nn.Sequential(nn.Embedding(10, 8, sparse=sparse), nn.Linear(8, 3)))  # noqa: B023
        emulation, optimizer = emulate(model, recipe), torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.tensor([1, 3, 8])).square().sum().backward()
        assert emulation.step(optimizer)
        found.append(model[0].weight)
    assert torch.equal(*found)


def test_threads_do_not_mix() -> None:
    recipes, xs = list(RECIPES.values()), data(Cnn, 6)
    emulations = [emulate(seeded(Cnn), recipe) for recipe in recipes]
    found: dict[int, list[float]] = {}

    def work(number: int) -> None:
        found[number] = train(emulations[number], xs)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(recipes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, recipe in enumerate(recipes):
        alone = emulate(seeded(Cnn), recipe)
        assert train(alone, xs) == found[number]
        same(state(alone), state(emulations[number]))


class Holder(nn.Module):
    """A layer before another model, which is a child or merely known."""

    def __init__(self, inner: nn.Module, child: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 20)
        self.known: Any = inner if child else [inner]

    def forward(self, x: Tensor) -> Any:
        return (self.known if isinstance(self.known, nn.Module) else self.known[0])(self.layer(x))


@pytest.mark.parametrize("recipe", ["mxfp8", DELAYED], ids=["mxfp8", "delayed"])
def test_an_emulated_model_that_another_calls_keeps_its_own_recipe_and_scales(recipe: Recipe | str) -> None:
    """Alone, below an emulated model, and below a plain one: fed alike, its state is the same."""
    xs, found = data(mlp, 3), []
    for around in (None, "emulated", "plain"):
        inner = seeded(mlp)
        emulation = emulate(inner, recipe)
        outer = Holder(inner, around == "plain")
        with torch.no_grad():
            outer.layer.weight.copy_(torch.eye(20)), outer.layer.bias.zero_()
        if around == "emulated":
            emulate(outer, "tf32")
        # tf32 leaves a product with the identity exact where its input has 10 bits.
        train(emulation, [x.bfloat16().float() for x in xs], None if around is None else outer)
        found.append(state(emulation))
    same(found[0], found[1])
    same(found[0], found[2])


def test_a_part_that_is_emulated_already_is_named() -> None:
    inner = seeded(mlp)
    outer, emulation = Holder(inner, True), emulate(inner, "mxfp8")
    with pytest.raises(ValueError, match="known is emulated already; call"):
        emulate(outer, "mxfp8")
    emulation.remove()
    with emulate(outer, "mxfp8"), pytest.raises(ValueError, match="emulated already"):
        emulate(inner, "mxfp8")


def hugging_face(kind: str, **settings: Any) -> Any:
    """A small random BERT or GPT-2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    t: Any = transformers
    t.logging.set_verbosity_error()
    sizes = {"vocab_size": 64, **settings}
    if kind == "bert":
        widths = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        return seeded(t.BertForSequenceClassification, t.BertConfig(max_position_embeddings=32, **widths, **sizes))
    ends = {"bos_token_id": None, "eos_token_id": None}
    return seeded(t.GPT2LMHeadModel, t.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, **ends, **sizes))


def texts(kind: str, padding: str = "right") -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[1, slice(None, 4) if padding == "left" else slice(6, None)] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1]) if kind == "bert" else ids}


kinds = pytest.mark.parametrize("kind", ["bert", "gpt2"])


@kinds
@pytest.mark.parametrize("name", list(NAMED))
def test_hugging_face_models_train_in_every_recipe(kind: str, name: str) -> None:
    model, batch = hugging_face(kind), texts(kind)
    twin, untouched = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, other = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, twin))
    losses = []
    with emulate(model, name, optimizer=optimizer) as emulation:
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                theirs.grad = None if ours.grad is None else ours.grad.clone()
            emulation.step(optimizer)
            other.step()
            losses.append(loss.item())
        # Nobody but the optimizer changed a weight.
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert ours.equal(theirs)
        emulated = model.eval()(**batch).loss.item()
    assert losses[2] < losses[0]
    fresh = hugging_face(kind).eval()
    fresh.load_state_dict(model.state_dict())
    assert model(**batch).logits.equal(fresh(**batch).logits)
    assert emulated == pytest.approx(model(**batch).loss.item(), rel=0.1)
    assert not model(**batch).logits.equal(untouched.eval()(**batch).logits)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@kinds
@pytest.mark.parametrize("recipe", ["hybrid", DELAYED, "mxfp8"], ids=["hybrid", "delayed", "mxfp8"])
def test_hugging_face_checkpointing_has_the_same_bits(kind: str, recipe: Recipe | str) -> None:
    found = []
    for reentrant in (None, False, True):
        model = hugging_face(kind)
        model.train()
        emulation = emulate(model, recipe)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(**texts(kind)).loss.backward()
            emulation.step(optimizer)
        found.append(state(emulation))
    same(found[0], found[1])
    same(found[0], found[2])


@kinds
@pytest.mark.parametrize("recipe", ["direct", "hybrid"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_texts_give_finite_results(kind: str, recipe: str, padding: str, attention: str) -> None:
    model, batch = hugging_face(kind, attn_implementation=attention), texts(kind, padding)
    emulate(model, recipe)
    output = model(**batch)
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_masters_of_tied_weights_are_rounded_once() -> None:
    found = []
    for tied in (True, False):
        model = seeded(Tied, tied)
        emulation = emulate(model, "hybrid", master=E5M2, seed=3)
        emulation.round_masters()
        found.append(model.embedding.weight)
    assert torch.equal(*found)
