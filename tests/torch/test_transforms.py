"""The same bits under torch.compile, torch.export, activation checkpointing and gradient accumulation as in eager mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import octavo.torch as ot
from octavo.recipes import Recipe, current_scaling, delayed_scaling

RECIPES = {"delayed": delayed_scaling(amax_history_len=3), "current": current_scaling()}
Block = Callable[[], AbstractContextManager[None]]


def network(recipe: Recipe | None) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)]
    return ot.convert(nn.Sequential(*layers), recipe)


def batches(count: int = 5) -> list[Tensor]:
    return [torch.randn(7, 20, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def train(model: nn.Module, forward: Callable[[Tensor], Tensor], block: Block) -> tuple[list[float], dict[str, Tensor]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for x in batches():
        with block():
            loss = forward(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


def same(one: tuple[list[float], dict[str, Tensor]], two: tuple[list[float], dict[str, Tensor]]) -> None:
    assert one[0] == two[0]
    assert [name for name in one[1] if not one[1][name].equal(two[1][name])] == []


@pytest.fixture(params=["own", "autocast"])
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(RECIPES))
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return RECIPES[request.param]


def setting(recipe: Recipe, where: str) -> tuple[nn.Sequential, Block]:
    if where == "own":
        return network(recipe), nullcontext
    return network(None), lambda: ot.autocast(recipe=recipe)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(recipe: Recipe, where: str, backend: str) -> None:
    model, block = setting(recipe, where)
    expected = train(model, model, block)
    torch._dynamo.reset()
    model, block = setting(recipe, where)
    same(expected, train(model, torch.compile(model, backend=backend, fullgraph=True), block))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [delayed_scaling, current_scaling])
def test_compile_of_what_never_ran(make: Callable[..., Recipe]) -> None:
    torch._dynamo.reset()
    model, x = network(make()), batches(1)[0]
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert y.equal(network(make())(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_follows_the_autocast_around_it() -> None:
    torch._dynamo.reset()
    model, x = network(None).eval(), batches(1)[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run in (model, compiled):
        with torch.no_grad():
            results.append([run(x)])
            for recipe in RECIPES.values():
                with ot.autocast(recipe=recipe):
                    results[-1].append(run(x))
            results[-1].append(run(x))
    for eager, traced in zip(*results, strict=True):
        assert eager.equal(traced)
    assert not results[0][0].equal(results[0][2])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing(recipe: Recipe, where: str, reentrant: bool) -> None:
    model, block = setting(recipe, where)
    expected = train(model, model, block)
    model, block = setting(recipe, where)

    def forward(x: Tensor) -> Tensor:
        return model[3:](checkpoint(model[:3], x.requires_grad_(reentrant), use_reentrant=reentrant))

    same(expected, train(model, forward, block))


def test_checkpointing_whole_model_with_backward_inside_autocast(recipe: Recipe) -> None:
    results = []
    for repeated in (False, True):
        model = network(None)
        for x in batches():
            with ot.autocast(recipe=recipe):
                y = checkpoint(model, x, use_reentrant=False) if repeated else model(x)
                y.square().mean().backward()
        results.append(([], dict(model.state_dict())))
        results[-1][1].update({f"{name}.grad": p.grad for name, p in model.named_parameters()})
    same(*results)


def test_gradient_accumulation_keeps_every_amax() -> None:
    """Two halves in one autocast leave the amaxes of the whole batch."""
    recipe = RECIPES["delayed"]
    whole, halves = network(None), network(None)
    x = batches(1)[0][:6]
    x[5] *= 50
    with ot.autocast(recipe=recipe):
        y = whole(x)
    y.sum().backward()
    with ot.autocast(recipe=recipe):
        ys = [halves(x[:3]), halves(x[3:])]
    (ys[0].sum() + ys[1].sum()).backward()
    for name, value in whole.state_dict().items():
        assert value.equal(halves.state_dict()[name]), name


def test_accumulated_gradients_are_sums_of_steps(recipe: Recipe) -> None:
    model = network(recipe)
    separate = []
    for x in batches(3):
        model(x).sum().backward()
        separate.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    model = network(recipe)
    for x in batches(3):
        model(x).sum().backward()
    for p, *parts in zip(model.parameters(), *separate, strict=True):
        assert p.grad.equal(parts[0] + parts[1] + parts[2])


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export_holds_the_scales(recipe: Recipe, strict: bool) -> None:
    model = network(recipe)
    for x in batches():
        model(x).sum().backward()
    model.eval()
    x = batches(1)[0]
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,), strict=strict)
        assert program.module()(x).equal(expected)
    assert any("octavo" in str(node.target) for node in program.graph.nodes)


def test_evaluation_moves_nothing(where: str) -> None:
    model, block = setting(RECIPES["delayed"], where)
    train(model, model, block)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for mode in ("eval", "no_grad", "inference"):
        model.train(mode != "eval")
        guard = {"eval": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
        with guard(), block():
            model(100 * batches(1)[0])
    model.eval()
    with block():
        model(100 * batches(1)[0]).sum().backward()
    same(([], before), ([], dict(model.state_dict())))


def test_evaluating_a_fresh_model_leaves_its_state_empty() -> None:
    model, x = network(None), batches(1)[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ot.autocast(recipe=RECIPES["delayed"]):
        with torch.no_grad():
            model(x)
        model.eval()(x)
    same(([], before), ([], dict(model.state_dict())))


def test_a_shared_layer_updates_once_per_autocast() -> None:
    shared = ot.Linear(8, 8)
    with ot.autocast(recipe=RECIPES["delayed"]):
        y = shared(F.relu(shared(torch.ones(2, 8))))
    y.sum().backward()
    assert (shared.amax_history_forward[:, 1] != 0).sum() == 1
    assert (shared.amax_history_backward[:, 0] != 0).sum() == 1


def test_recomputing_after_two_updates_is_refused() -> None:
    model, recipe = network(None), RECIPES["delayed"]
    with ot.autocast(recipe=recipe):
        y = checkpoint(model, batches(1)[0], use_reentrant=False)
    model[0].update_forward()
    for _ in range(2):
        model[0].gather_forward(torch.ones(3))
        model[0].update_forward()
    with pytest.raises(RuntimeError, match="scales moved twice"):
        y.sum().backward()


def test_gradient_of_part_of_the_graph() -> None:
    model, x = network(RECIPES["delayed"]), batches(1)[0].requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x)
    assert grad.isfinite().all()
    assert model[0].amax_history_backward.any()
