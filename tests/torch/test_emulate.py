"""Emulated operators beside torch's own, what recipes like `direct` store, and the handle: exemptions, steps, restoring, errors."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_emulate_twin import CASES, Call, arguments, backward
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import octavo
from octavo import Overflow, Rounding, formats, recipes
from octavo.diagnose.records import Memory
from octavo.formats import E5M2
from octavo.recipes import NAMED, Recipe, TensorSpec
from octavo.scaling import Block, BlockScale
from octavo.torch.emulate import Emulation, emulate
from octavo.torch.interception import HANDLERS
from octavo.torch.loss_scaling import LossScaler

UNCAST = Recipe(name="uncast")
DELAYED = recipes.delayed_scaling(amax_history_len=3)
every_recipe = pytest.mark.parametrize("recipe", [make() for make in NAMED.values()], ids=list(NAMED))
train_and_eval = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
Shapes = tuple[tuple[int, ...], ...]


def in_e5m2(x: Tensor) -> Tensor:
    return octavo.quantize(x.detach(), E5M2, overflow=Overflow.NONE)


def is_on_grid(x: Any) -> bool:
    """Whether all of x is E5M2."""
    return in_e5m2(x).equal(x.detach())


def assert_rounded(found: Tensor | None, exact: Tensor | None) -> None:
    """Whether found is exact, rounded to E5M2 either way."""
    assert found is not None
    assert exact is not None
    down = octavo.encode(exact, E5M2, rounding=Rounding.TOWARD_ZERO)
    low, high = octavo.decode(down, E5M2), octavo.decode(down + 1, E5M2)
    assert ((found == low) | ((found == high) & (low != exact))).all()


# ---- what is written besides products

WORDS = ("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide")
DUNDERS = ("add", "sub", "mul", "truediv")
OUT_OF_PLACE = {
    **{f"torch.{word}": getattr(torch, word) for word in (*WORDS, "rsub")},
    **{word: getattr(Tensor, word) for word in WORDS},
    **{f"__{side}{word}__": getattr(Tensor, f"__{side}{word}__") for word in DUNDERS for side in ("", "r")},
}
IN_PLACE = {
    **{f"{word}_": getattr(Tensor, f"{word}_") for word in WORDS},
    **{f"__i{word}__": getattr(Tensor, f"__i{word}__") for word in DUNDERS},
}
IMAGES: Shapes = ((4, 8, 6, 5), (8,), (8,))
IDS = torch.tensor([[1, 2], [2, 0]])
OTHERS: dict[Any, tuple[Callable[..., Tensor], Shapes]] = {
    F.layer_norm: (lambda x, w, b: F.layer_norm(x, (6, 5), w, b), ((4, 8, 6, 5), (6, 5), (6, 5))),
    F.rms_norm: (lambda x, w: F.rms_norm(x, (6, 5), w), ((4, 8, 6, 5), (6, 5))),
    torch.rms_norm: (lambda x, w: torch.rms_norm(x, (6, 5), w), ((4, 8, 6, 5), (6, 5))),
    F.group_norm: (lambda x, w, b: F.group_norm(x, 2, weight=w, bias=b), IMAGES),
    F.batch_norm: (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), IMAGES),
    F.instance_norm: (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), IMAGES),
    F.embedding: (lambda w: F.embedding(IDS, w, padding_idx=0), ((9, 7),)),
    F.embedding_bag: (lambda w: F.embedding_bag(IDS, w, mode="sum"), ((9, 7),)),
}
every_sum = pytest.mark.parametrize("function", OUT_OF_PLACE.values(), ids=OUT_OF_PLACE)
every_change = pytest.mark.parametrize("function", IN_PLACE.values(), ids=IN_PLACE)


def changed(function: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    """What an in-place function leaves of a copy of x."""
    y = x.clone()
    assert function(y, *others) is y
    return y


def assert_stored(function: Callable[..., Any], inputs: list[Any], *, uncast: Iterable[int] = ()) -> None:
    """Whether direct has the function's result, to nearest even, and the gradients of its inputs but for those uncast, rounded."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    want = function(*inputs)
    backward(want)
    exact = [x.grad for x in tensors]
    for x in tensors:
        x.grad = None
    with emulate(Call(function), "direct") as emulation:
        found = emulation.model(*inputs)
        backward(found)
    assert found.detach().equal(in_e5m2(want))
    for number, (x, grad) in enumerate(zip(tensors, exact, strict=True)):
        if number in uncast:
            torch.testing.assert_close(x.grad, grad, rtol=1e-6, atol=0)
        else:
            assert_rounded(x.grad, grad)


def test_every_function_of_the_table_is_in_these_tests() -> None:
    products = {function for case in CASES.values() for function in case.functions}
    assert {*products, *OUT_OF_PLACE.values(), *IN_PLACE.values(), *OTHERS} == set(HANDLERS)


@every_sum
def test_direct_stores_what_an_operator_writes_and_the_gradients_of_what_it_reads(function: Any) -> None:
    for shape in ((5, 7), (7,), (5, 1)):
        assert_stored(function, arguments((5, 7), shape))
    assert_stored(function, [*arguments((5, 7)), 1.3])


@every_change
def test_direct_stores_what_is_changed_in_place(function: Any) -> None:
    for shape in ((5, 7), (7,)):
        assert_stored(partial(changed, function), arguments((5, 7), shape))
    assert_stored(partial(changed, function), [*arguments((5, 7)), 1.3])


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "add alpha": lambda x, y: torch.add(x, y, alpha=3),
    "sub alpha": lambda x, y: torch.sub(x, y, alpha=0.3),
    "method alpha": lambda x, y: x.add(y, alpha=3),
    "rsub alpha": lambda x, y: torch.rsub(x, y, alpha=3),
    "add_ alpha": lambda x, y: changed(partial(Tensor.add_, alpha=3), x, y),
    "add by name": lambda x, y: torch.add(input=x, other=y),
    "add, other by name": lambda x, y: torch.add(x, other=y),
    "mul by name": lambda x, y: torch.mul(input=x, other=y),
    "mul, other by name": lambda x, y: x.mul(other=y),
}


@pytest.mark.parametrize("function", SPELLINGS.values(), ids=SPELLINGS)
def test_direct_stores_gradients_however_terms_are_given(function: Any) -> None:
    for shape in ((5, 7), (7,)):
        assert_stored(function, arguments((5, 7), shape))


PARTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "view add_": lambda y, z: y.view(7, 5).add_(z.view(7, 5)),
    "view mul_": lambda y, z: y.view(7, 5).mul_(z.view(7, 5)),
    "column add_": lambda y, z: y[:, 2].add_(z[:, 2]),
    "rows div_": lambda y, z: y[1:].div_(z[1:]),
    "assigned": lambda y, z: y.__setitem__(0, y[0] + z[0]),
}


@pytest.mark.parametrize("change", PARTS.values(), ids=PARTS)
def test_direct_stores_a_part_that_is_changed_in_place(change: Any) -> None:
    def function(x: Tensor, z: Tensor) -> Tensor:
        y = x.clone()
        change(y, z)
        return y

    x, z = arguments((5, 7), (5, 7))
    x = in_e5m2(x).requires_grad_()
    want = function(x, z)
    with emulate(Call(function), "direct") as emulation:
        found = emulation.model(x, z)
        backward(found)
    assert found.detach().equal(in_e5m2(want))
    assert is_on_grid(z.grad)


@pytest.mark.parametrize(("function", "shapes"), OTHERS.values(), ids=[function.__name__ for function in OTHERS])
def test_direct_stores_what_norms_and_embeddings_write(function: Callable[..., Tensor], shapes: Shapes) -> None:
    assert_stored(function, arguments(*shapes), uncast=(2,))


ADDED: dict[str, Callable[[Tensor], Tensor]] = {
    "addmm": lambda x: torch.addmm(x, x, x),
    "addmm of a bias": lambda x: torch.addmm(x[0], x, x),
    "addmm scaled": lambda x: torch.addmm(x, x, x, beta=0.3, alpha=0.7),
    "baddbmm": lambda x: torch.baddbmm(x[None], x[None], x[None]),
    "addmv": lambda x: torch.addmv(x[0], x, x[1]),
}


@pytest.mark.parametrize("function", ADDED.values(), ids=ADDED)
def test_direct_stores_a_product_to_which_something_is_added(function: Any) -> None:
    with emulate(Call(function), "direct") as emulation:
        assert is_on_grid(emulation.model(*arguments((8, 8))))


@pytest.mark.parametrize("recipe", ["hybrid", "mxfp8"])
def test_recipes_that_cast_no_result_leave_operators_alone(recipe: str) -> None:
    functions: list[Any] = [*OUT_OF_PLACE.values(), *(partial(changed, function) for function in IN_PLACE.values())]
    for function in functions:
        x, y = arguments((5, 7), (5, 7))
        want = torch.autograd.grad(function(x, y).sin().sum(), (x, y))
        with emulate(Call(function), recipe) as emulation:
            found = torch.autograd.grad(emulation.model(x, y).sin().sum(), (x, y))
        assert all(one.equal(other) for one, other in zip(found, want, strict=True))
        assert not emulation.sites


def with_three(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    return function(x, 3)


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: partial(with_three, function) for name, function in OUT_OF_PLACE.items() if "div" not in name},
    **{name: partial(with_three, partial(changed, f)) for name, f in IN_PLACE.items() if "div" not in name},
    "@": lambda x: x @ x,
    "mm": lambda x: torch.mm(x, x),
    "mv": lambda x: torch.mv(x, x[0]),
    "addmm": lambda x: torch.addmm(x, x, x),
    "linear": lambda x: F.linear(x, x),
    "einsum": lambda x: torch.einsum("ij,jk->ik", x, x),
    "einsum of three": lambda x: torch.einsum("ij,jk,kl->il", x, x, x),
}


@pytest.mark.parametrize("recipe", ["direct", "mxfp8"])
@pytest.mark.parametrize("function", WHOLE.values(), ids=WHOLE)
def test_integers_and_complex_numbers_are_left_alone(function: Callable[[Tensor], Tensor], recipe: str) -> None:
    for dtype in (torch.int64, torch.int32, torch.complex64):
        x = torch.arange(9).reshape(3, 3).to(dtype) * 101
        want = function(x)
        with emulate(Call(function), recipe) as emulation:
            assert emulation.model(x).equal(want)


class Counting(nn.Module):
    """Writes to a parameter of its own, to its buffers and to its child's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(7)), nn.BatchNorm1d(7)
        self.register_buffer("mean", torch.randn(7))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.div_(self.weight.norm())
            self.get_buffer("mean").mul_(0.9).add_(x.mean(0), alpha=0.1)
            self.mean += 0.3  # type: ignore[operator, assignment]
            self.steps += 1  # type: ignore[operator, assignment]
            self.norm.get_buffer("running_mean").sub_(0.7)
        return x * self.weight


def test_parameters_and_buffers_that_a_forward_pass_changes_are_not_cast() -> None:
    model, x = Counting(), torch.randn(8, 7)
    plain = copy.deepcopy(model)
    plain(x)
    with emulate(model, "direct"):
        assert is_on_grid(model(x))
    for name, entry in plain.state_dict().items():
        assert model.state_dict()[name].equal(entry), name


@pytest.mark.parametrize("recipe", ["direct", "mxfp8"])
@pytest.mark.parametrize("make", [nn.Embedding, partial(nn.EmbeddingBag, mode="sum")], ids=["embedding", "bag"])
@pytest.mark.parametrize("settings", [{"max_norm": 1.0}, {"sparse": True}], ids=["norm", "sparse"])
def test_embeddings_of_a_largest_norm_and_sparse_gradients_are_torch_s(make: Any, recipe: str, settings: Any) -> None:
    model = make(9, 4, **settings)
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(of.parameters(), lr=0.25) for of in (plain, model)]
    with emulate(model, recipe, optimizer=optimizers[1]) as emulation:
        for of in (plain, model):
            y = of(torch.tensor([[1, 5], [5, 0]]))
            y.backward(torch.ones(y.shape))
        assert model.weight.grad is not None
        assert model.weight.grad.is_sparse == ("sparse" in settings)
        optimizers[0].step()
        assert emulation.step(optimizers[1])
    assert model.weight.equal(plain.weight)


# ---- against torch: a recipe that casts nothing, in float64


def twins(build: Callable[[], nn.Module], inputs: Iterable[Tensor], *, train: bool = True) -> None:
    """Assert that a model and its emulated copy have the same outputs and gradients."""
    torch.manual_seed(0)
    plain = build().double().train(train)
    model = copy.deepcopy(plain)
    with emulate(model, UNCAST):
        want, found = (outputs_and_gradients(of, inputs) for of in (plain, model))
    assert len(found) == len(want)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def outputs_and_gradients(model: nn.Module, inputs: Iterable[Tensor]) -> list[Tensor]:
    """In float64, of copies of the inputs."""
    given = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = flat(model(*given))
    backward(*outputs)
    return [*outputs, *(torch.zeros_like(x) if x.grad is None else x.grad for x in (*given, *model.parameters()))]


def flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [x for part in outputs if part is not None for x in flat(part)]


RANKS: list[Shapes] = [
    ((6,), (6,)),
    ((5, 6), (6,)),
    ((6,), (6, 4)),
    ((5, 6), (6, 4)),
    ((2, 5, 6), (6,)),
    ((2, 5, 6), (6, 4)),
    ((6,), (2, 6, 4)),
    ((5, 6), (2, 6, 4)),
    ((2, 5, 6), (2, 6, 4)),
    ((1, 5, 6), (2, 6, 4)),
    ((3, 1, 5, 6), (2, 6, 4)),
    ((2, 5, 6), (3, 1, 6, 4)),
    ((3, 1, 5, 6), (1, 2, 6, 4)),
    ((3, 2, 5, 6), (6, 4)),
    ((0, 5, 6), (6, 4)),
    ((0, 5, 6), (0, 6, 4)),
    ((5, 0), (0, 4)),
    ((2, 5, 0), (0, 4)),
    ((2, 5, 0), (2, 0, 4)),
]


@pytest.mark.parametrize("shapes", RANKS, ids=str)
def test_matmul_takes_all_ranks(shapes: Shapes) -> None:
    functions: list[Any] = [torch.matmul, Tensor.matmul, Tensor.__matmul__]
    if min(map(len, shapes)) > 1:
        functions.append(torch.linalg.matmul)
    for function in functions:
        twins(partial(Call, function), arguments(*shapes))
    twins(partial(Call, Tensor.__rmatmul__), arguments(*shapes[::-1]))


EINSUMS: dict[str, Shapes] = {
    "ij,jk->ik": ((3, 4), (4, 5)),
    "ij,jk": ((3, 4), (4, 5)),
    "ij,kj->ki": ((3, 4), (5, 4)),
    "bij,bjk->bik": ((2, 3, 4), (2, 4, 5)),
    "bij, bkj -> kbi": ((2, 3, 4), (2, 5, 4)),
    "bhqd,bhkd->bhqk": ((2, 3, 4, 5), (2, 3, 6, 5)),
    "i,j->ij": ((3,), (4,)),
    "i,i": ((4,), (4,)),
    "i,i->i": ((4,), (4,)),
    "ij,ij->": ((3, 4), (3, 4)),
    "ijk,jk->i": ((2, 3, 4), (3, 4)),
    "ii->i": ((4, 4),),
    "ij->ji": ((3, 4),),
    "ijk->j": ((2, 3, 4),),
    "ii,ij->j": ((4, 4), (4, 5)),
    "iij,jk->ik": ((4, 4, 3), (3, 5)),
    "ijl,jk->ik": ((3, 4, 2), (4, 5)),
    "...ij,...jk->...ik": ((2, 3, 4, 5), (3, 5, 6)),
    "...ij,jk": ((2, 3, 4, 5), (5, 6)),
    "i...,i...->...": ((4, 2, 3), (4, 3)),
    "b...d,dk->bk...": ((2, 3, 4, 5), (5, 6)),
    "...i,...i->": ((2, 3), (2, 3)),
    "...ij,...ij->ij": ((2, 3, 4), (2, 3, 4)),
    "ij,jk,kl->il": ((3, 4), (4, 5), (5, 6)),
    "bi,ij,bj->b": ((2, 3), (3, 4), (2, 4)),
    "abc,cd,def,fg->abeg": ((2, 3, 4), (4, 5), (5, 2, 6), (6, 3)),
    "bij,bjk->ibk": ((1, 3, 4), (2, 4, 5)),
    "bij,bjk->ik": ((2, 3, 4), (2, 4, 5)),
    "Zi,iY->ZY": ((3, 4), (4, 5)),
    "aB,Bc": ((3, 4), (4, 5)),
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum_is_torch_s(equation: str) -> None:
    twins(lambda: Call(lambda *tensors: torch.einsum(equation, *tensors)), arguments(*EINSUMS[equation]))
    twins(lambda: Call(lambda *tensors: torch.einsum(equation, list(tensors))), arguments(*EINSUMS[equation]))


SUMS: dict[str, list[Shapes]] = {
    "addmm": [(shape, (3, 4), (4, 5)) for shape in ((3, 5), (5,), (3, 1), ())],
    "addmv": [(shape, (3, 4), (4,)) for shape in ((3,), (1,), ())],
    "baddbmm": [(shape, (2, 3, 4), (2, 4, 5)) for shape in ((2, 3, 5), (3, 5), (5,))],
}
SCALES = [{}, {"beta": 0.5}, {"alpha": -2.0}, {"beta": 2.0, "alpha": 0.5}, {"beta": 0.0}]


@pytest.mark.parametrize("settings", SCALES, ids=str)
@pytest.mark.parametrize("name", SUMS)
def test_added_products_are_torch_s(name: str, settings: dict[str, float]) -> None:
    for shapes in SUMS[name]:
        twins(lambda: Call(partial(getattr(torch, name), **settings)), arguments(*shapes))
        twins(lambda: Call(partial(getattr(Tensor, name), **settings)), arguments(*shapes))


def test_a_term_times_zero_is_not_read() -> None:
    with emulate(Call(lambda a, b: torch.addmm(torch.full((3, 5), math.nan), a, b, beta=0)), "mxfp8") as emulation:
        assert emulation.model(*arguments((3, 4), (4, 5))).isfinite().all()


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv1d unbatched": (lambda: nn.Conv1d(4, 6, 3, stride=2), (4, 9)),
    "conv1d depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4, padding=2, bias=False), (2, 4, 9)),
    "conv1d same, even": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2)), (2, 4, 7, 8)),
    "conv2d pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 7, 8)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 8)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (3, 4), padding="same", dilation=(2, 1)), (2, 4, 7, 8)),
    "conv2d same, unbatched": (lambda: nn.Conv2d(4, 6, (3, 4), padding="same"), (4, 7, 8)),
    "conv2d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 8)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 7, 8)),
    "conv2d of no sample": (lambda: nn.Conv2d(4, 6, 3), (0, 4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 2, 3), (1, 2, 1), padding=1, groups=2), (2, 4, 3, 4, 5)),
    "conv3d same": (lambda: nn.Conv3d(4, 6, (2, 3, 4), padding="same"), (2, 4, 3, 4, 5)),
    "conv3d unbatched": (lambda: nn.Conv3d(4, 6, 2), (4, 3, 4, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
    "transposed1d unbatched": (lambda: nn.ConvTranspose1d(4, 6, 3, bias=False), (4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2)), (2, 4, 5, 3)),
    "transposed2d groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (2, 4, 5, 3)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, (1, 2, 3), 2, (0, 1, 1), groups=2), (2, 4, 3, 4, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_torch_s(name: str) -> None:
    build, shape = CONVOLUTIONS[name]
    twins(build, arguments(shape))


@every_recipe
def test_convolutions_take_few_samples(recipe: Recipe) -> None:
    for shape in ((0, 3, 5, 5), (1, 3, 3, 3)):
        (x,) = arguments(shape)
        with emulate(nn.Conv2d(3, 4, 3), recipe) as emulation:
            emulation.model(x).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape
        grads = [parameter.grad for parameter in emulation.model.parameters()]
        assert all(grad is not None and bool(grad.any()) == (len(x) > 0) for grad in grads)


LYING: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "with gaps": lambda x: torch.stack([x, x.neg()], -1)[..., 0],
    "negated view": lambda x: torch.view_as_complex(torch.stack([x, x.neg()], -1)).conj().imag,
    "expanded": lambda x: x[:1].expand(x.shape),
}


@every_recipe
def test_products_do_not_depend_on_how_tensors_lie_in_memory(recipe: Recipe) -> None:
    for layer in (nn.Conv2d(6, 4, 3, groups=2), nn.ConvTranspose2d(6, 4, 3), nn.Linear(6, 4)):
        x, found = torch.randn(4, 6, 6, 6), list[list[Any]]()
        for lay in LYING.values():
            for given in (lay(x), lay(x).resolve_neg().clone(memory_format=torch.contiguous_format)):
                layer.zero_grad()
                with emulate(layer, recipe) as emulation:
                    y = emulation.model(given.requires_grad_())
                    y.backward(lay(torch.ones_like(y).cumsum(1).cumsum(3)))
                found.append([y.detach(), given.grad, *(parameter.grad for parameter in layer.parameters())])
            for one, other in zip(*found[-2:], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@every_recipe
def test_outputs_and_gradients_are_contiguous_where_torch_s_are(recipe: Recipe) -> None:
    others: dict[str, Any] = {
        "linear": (lambda: nn.Linear(7, 5), (2, 4, 7)),
        "matmul": (lambda: Call(lambda x: x @ x.mT), (2, 4, 5)),
    }
    for name, (build, shape) in {**CONVOLUTIONS, **others}.items():
        if 0 in shape:
            continue
        (x,), model = arguments(shape), build()
        with emulate(model, recipe):
            y = model(x)
            backward(y)
        assert x.grad is not None
        assert y.is_contiguous(), name
        assert x.grad.is_contiguous(), name


BARRED = torch.zeros(5, 5).double()
BARRED[0, 1:], BARRED[2, ::2] = -math.inf, -math.inf
LATER = torch.full((5, 5), -math.inf).double().triu(1)
ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "causal": {"is_causal": True},
    "float mask": {"attn_mask": BARRED},
    "bool mask": {"attn_mask": BARRED == 0},
    "bool mask, broadcast": {"attn_mask": torch.tensor([[True, True, False, True, False]])},
    "bool mask, empty row": {"attn_mask": torch.arange(25).reshape(5, 5) > 4},
    "float mask, empty row": {"attn_mask": LATER.T.clone().index_fill(0, torch.tensor([1]), -math.inf)},
}


@pytest.mark.parametrize("settings", ATTENTIONS.values(), ids=ATTENTIONS)
def test_scaled_dot_product_attention_is_torch_s(settings: dict[str, Any]) -> None:
    run = Call(partial(F.scaled_dot_product_attention, **settings))
    twins(lambda: run, arguments((2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 5, 6)))
    twins(lambda: run, arguments((3, 5, 8), (3, 5, 8), (3, 5, 8)))


def test_attention_of_grouped_queries_and_other_lengths_is_torch_s() -> None:
    run = Call(partial(F.scaled_dot_product_attention, enable_gqa=True))
    twins(lambda: run, arguments((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 4)))
    run = Call(partial(F.scaled_dot_product_attention, is_causal=True))
    twins(lambda: run, arguments((2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 7, 4)))


class Attended(nn.Module):
    """nn.MultiheadAttention of one input, or of three."""

    def __init__(self, made: dict[str, Any], called: dict[str, Any]) -> None:
        super().__init__()
        self.attention, self.called = nn.MultiheadAttention(8, 2, **made), called

    def forward(self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Any:
        return self.attention(q, q if k is None else k, q if v is None else v, **self.called)


FIRST = {"batch_first": True}
PADDED = torch.tensor([[False] * 5, [False, False, False, True, True]])
HEADS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "no weights": ({}, {"need_weights": False}),
    "weights of each head": ({}, {"average_attn_weights": False}),
    "batch first": (FIRST, {}),
    "no bias": ({"bias": False}, {}),
    "bias of keys, zeros": ({"add_bias_kv": True, "add_zero_attn": True}, {}),
    "float mask": ({}, {"attn_mask": BARRED}),
    "bool mask": ({}, {"attn_mask": BARRED != 0, "need_weights": False}),
    "causal": ({}, {"attn_mask": LATER, "is_causal": True, "need_weights": False}),
    "padding": (FIRST, {"key_padding_mask": PADDED}),
    "padding, no weights": (FIRST, {"key_padding_mask": PADDED, "need_weights": False}),
    "all padding": (FIRST, {"key_padding_mask": PADDED.any(1, True).expand(2, 5), "need_weights": False}),
}


@pytest.mark.parametrize(("made", "called"), HEADS.values(), ids=HEADS)
@train_and_eval
def test_multi_head_attention_is_torch_s(made: dict[str, Any], called: dict[str, Any], train: bool) -> None:
    twins(lambda: Attended(made, called), arguments((2, 5, 8) if made == FIRST else (5, 2, 8)), train=train)


def test_multi_head_attention_of_three_inputs_is_torch_s() -> None:
    twins(lambda: Attended({"kdim": 6, "vdim": 4}, {}), arguments((5, 2, 8), (7, 2, 6), (7, 2, 4)))
    twins(lambda: Attended({}, {}), arguments((5, 2, 8), (7, 2, 8), (7, 2, 8)))


def encoder(**settings: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, 0.0, **settings)


TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], Shapes]] = {
    "encoder layer": (encoder, ((5, 3, 8),)),
    "norm first": (partial(encoder, activation="gelu", norm_first=True, batch_first=True), ((3, 5, 8),)),
    "encoder": (lambda: nn.TransformerEncoder(encoder(batch_first=True), 2), ((3, 5, 8),)),  # type: ignore[arg-type]
    "decoder layer": (lambda: nn.TransformerDecoderLayer(8, 2, 16, 0.0), ((5, 3, 8), (7, 3, 8))),
}
every_transformer = pytest.mark.parametrize(("build", "shapes"), TRANSFORMERS.values(), ids=TRANSFORMERS)


@every_transformer
@train_and_eval
def test_transformers_are_torch_s(build: Callable[[], nn.Module], shapes: Shapes, train: bool) -> None:
    twins(build, arguments(*shapes), train=train)


@every_transformer
def test_transformers_take_no_shortcut_in_evaluation(build: Callable[[], nn.Module], shapes: Shapes) -> None:
    model, inputs = build().eval(), arguments(*shapes, grad=False)
    with torch.no_grad(), emulate(model, "mxfp4"):
        quick = model(*inputs)
    with emulate(model, "mxfp4"):
        assert quick.equal(model(*inputs))


class Sequence(nn.Module):
    """A recurrent layer of padded, packed or unbatched sequences."""

    def __init__(self, layer: nn.RNNBase, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = layer, kind

    def forward(self, x: Tensor) -> Any:
        if self.kind != "packed":
            return self.layer(x)
        packed = pack_padded_sequence(x, torch.tensor([2, 5, 3]), self.layer.batch_first, enforce_sorted=False)
        output, states = self.layer(packed)
        return output.data, states


LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(4, 6, 2, bidirectional=True),
    "lstm projected": lambda: nn.LSTM(4, 6, proj_size=3, batch_first=True),
    "gru": lambda: nn.GRU(4, 6, bidirectional=True, bias=False),
    "rnn": lambda: nn.RNN(4, 6, 2, nonlinearity="relu"),
}


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("kind", ["padded", "packed", "unbatched"])
def test_recurrent_layers_are_torch_s(build: Callable[[], nn.RNNBase], kind: str) -> None:
    batch = (3, 5, 4) if build().batch_first else (5, 3, 4)
    twins(lambda: Sequence(build(), kind), arguments((5, 4) if kind == "unbatched" else batch))


@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_cells_are_torch_s(make: Any, bias: bool) -> None:
    twins(lambda: make(4, 6, bias), arguments((3, 4)))
    twins(lambda: make(4, 6, bias), arguments((4,)))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embeddings_are_torch_s(mode: str) -> None:
    twins(lambda: nn.Embedding(9, 4, padding_idx=2), [IDS])
    twins(lambda: nn.EmbeddingBag(9, 4, mode=mode), [IDS])


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm((4, 5)), (3, 4, 5)),
    "layer, bare": (lambda: nn.LayerNorm(5, elementwise_affine=False), (3, 4, 5)),
    "rms": (lambda: nn.RMSNorm(5), (3, 4, 5)),
    "group": (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    "batch": (lambda: nn.BatchNorm1d(4), (3, 4, 5)),
    "batch2d": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (3, 4, 5, 6)),
    "instance": (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (3, 4, 5)),
}


@pytest.mark.parametrize("recipe", ["direct", "mxfp8"])
@train_and_eval
@pytest.mark.parametrize(("build", "shape"), NORMS.values(), ids=NORMS)
def test_norm_layers_keep_torch_s_statistics(build: Any, shape: tuple[int, ...], recipe: str, train: bool) -> None:
    plain = build().train(train)
    model = copy.deepcopy(plain)
    (x,) = arguments(shape)
    want = plain(x)
    with emulate(model, recipe):
        found = model(x)
        backward(found)
    assert found.detach().equal(in_e5m2(want) if recipe == "direct" else want.detach())
    assert all(one.equal(other) for one, other in zip(model.buffers(), plain.buffers(), strict=True))
    assert recipe == "mxfp8" or is_on_grid(x.grad)


# ---- the handle


class Net(nn.Module):
    """A convolution, a norm, a block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
        self.head = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y: Tensor = self.head((self.block(x) + x[:, :4]).flatten(1))
        return y


ALL = {"stem", "norm", "block.0", "block.2", "add()", "head"}
BATCH = (4, 3, 3, 3)


def trained(emulation: Emulation, *, steps: int = 1) -> list[Tensor]:
    """The output and the gradients of the last of some steps, whose weights stay."""
    y = torch.zeros(())
    for step in range(steps):
        emulation.model.zero_grad()
        y = emulation.model(torch.randn(BATCH, generator=torch.Generator().manual_seed(step)))
        backward(y)
    return [y.detach(), *(x.grad for x in emulation.model.parameters() if x.grad is not None)]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(one.equal(other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize(
    ("exempt", "left"),
    [
        ([], ALL),
        (["head"], ALL - {"head"}),
        (["block.*"], ALL - {"block.0", "block.2"}),
        (["block"], ALL - {"block.0", "block.2"}),
        (["*.0", "stem"], ALL - {"block.0", "stem"}),
        (["block.[02]"], ALL - {"block.0", "block.2"}),
        (["h?ad"], ALL - {"head"}),
        ([nn.Conv2d], ALL - {"stem", "block.0", "block.2"}),
        ([nn.Sequential], ALL - {"block.0", "block.2"}),
        ([nn.Linear, "norm"], ALL - {"head", "norm"}),
        ([nn.modules.batchnorm._BatchNorm], ALL - {"norm"}),
        ([""], set()),
        ([Net], set()),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_exempt_modules_and_all_inside_them_run_in_high_precision(exempt: list[Any], left: set[str]) -> None:
    emulation = emulate(Net(), "direct", exempt=exempt)
    trained(emulation)
    assert set(emulation.sites) == left


def test_a_model_whose_modules_are_all_exempt_has_the_bits_of_torch() -> None:
    model = Net()
    plain, found = copy.deepcopy(model), []
    with emulate(model, "direct", exempt=["*"]):
        for of in (plain, model):
            y = of(torch.ones(BATCH))
            backward(y)
            found.append([y, *(parameter.grad for parameter in of.parameters()), *of.buffers()])
    assert same(*found)


def test_an_exempt_part_of_attention_is_spared_or_refused() -> None:
    def sites(exempt: list[str]) -> int:
        model, (x,) = nn.MultiheadAttention(8, 2), arguments((5, 2, 8))
        with emulate(model, "mxfp8", exempt=exempt) as emulation:
            model(x, x, x)
        return len(emulation.sites)

    whole = sites([])
    with contextlib.suppress(ValueError):
        assert sites(["out_proj"]) == whole - 1


def test_a_fused_norm_writes_what_it_computes_and_stores_its_gradients() -> None:
    model, (x,) = nn.Sequential(nn.LayerNorm(7)), arguments((5, 7))
    want = model(x)
    with emulate(model, "direct", output_fused=["0"]):
        found = model(x)
        backward(found)
    assert found.equal(want)
    assert is_on_grid(x.grad)
    assert is_on_grid(model.get_parameter("0.weight").grad)


@every_recipe
def test_parameters_and_state_are_never_written(recipe: Recipe) -> None:
    model = Net()
    model.norm.eval()
    before = bits(model)
    with emulate(model, recipe) as emulation:
        trained(emulation, steps=2)
        with torch.no_grad():
            model(torch.ones(BATCH))
        model.eval()(torch.ones(BATCH))
        assert bits(model).keys() == before.keys()
        assert same(bits(model).values(), before.values())


@every_recipe
def test_eval_and_no_grad_have_the_bits_of_the_training_pass(recipe: Recipe) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Flatten(), nn.Linear(54, 5))
    x = torch.randn(BATCH)
    with emulate(model, recipe):
        with torch.no_grad():
            first = model(x)
        assert first.equal(model.eval()(x))
        assert first.equal(model.train()(x))


def test_two_models_of_one_seed_have_the_same_bits_and_two_layers_draw_apart() -> None:
    model = Net()
    one, other = (emulate(of, "direct") for of in (model, copy.deepcopy(model)))
    first = trained(one)
    assert same(first, trained(other))
    assert not same(first, trained(one))
    assert not one.sites["stem"].draws.equal(one.sites["head"].draws)


class Dispatching(TorchDispatchMode):
    """Lets each operator through; while it is on, nothing goes past the dispatcher."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@every_recipe
def test_watching_and_the_dispatcher_change_no_bits(recipe: Recipe) -> None:
    model = Net()
    plain, watched, dispatched = (emulate(copy.deepcopy(model), recipe) for _ in range(3))
    watched.observe(Memory(), every=1)
    want = trained(plain, steps=3)
    assert same(want, trained(watched, steps=3))
    with Dispatching():  # type: ignore[no-untyped-call]
        found = trained(dispatched, steps=3)
    assert same(want, found)


def test_removing_restores_the_model_exactly() -> None:
    model, x = Net().eval(), torch.randn(BATCH)

    def own(x: Tensor) -> Tensor:
        return model.block[2](model.block[0](x))  # type: ignore[no-any-return]

    model.block.forward = own  # type: ignore[method-assign]
    want, before = model(x), bits(model)
    emulation = emulate(model, "mxfp4")
    assert not model(x).equal(want)
    emulation.remove()
    emulation.remove()
    assert model.block.__dict__["forward"] is own
    assert [name for name, module in model.named_modules() if "forward" in module.__dict__] == ["block"]
    assert bits(model).keys() == before.keys()
    assert same(bits(model).values(), before.values())
    assert model(x).equal(want)
    with emulate(model, "mxfp4"):
        assert not model(x).equal(want)
    assert model(x).equal(want)


def test_an_exception_leaves_no_trace_and_ends_a_block() -> None:
    model, x = Net().eval(), torch.randn(BATCH)
    want, odd = model(x), torch.randn(4, 5, 3, 3)
    with pytest.raises(RuntimeError), emulate(model, "mxfp4"):
        model(odd)
    assert model(x).equal(want)
    with emulate(model, "mxfp4"):
        emulated = model(x)
        with pytest.raises(RuntimeError):
            model(odd)
        assert model(x).equal(emulated)


def test_functions_outside_the_model_are_not_emulated() -> None:
    x, weight = torch.randn(4, 36), torch.randn(36, 5)
    want = x @ weight
    with emulate(nn.Linear(36, 5), "mxfp4") as emulation:
        emulation.model(x)
        assert (x @ weight).equal(want)


# ---- delayed scales


def peak(x: Tensor) -> float:
    return float(x.detach().abs().max())


def test_scales_and_histories_move_once_a_step() -> None:
    layer = nn.Conv1d(3, 4, 1)
    emulation, inputs, grads = emulate(layer, DELAYED), [0.0, 0.0], [0.0, 0.0]
    for factor in (2.0, 8.0, 1.0, 0.5, 0.25):
        x, g = torch.randn(2, 3, 5) * factor, torch.randn(2, 4, 5) / factor
        inputs, grads = [*inputs, peak(x)], [*grads, peak(g)]
        y = layer(x.requires_grad_())
        site = emulation.sites["model"]
        assert site.amax_history_forward[:, 0].tolist() == [0.0, *inputs[-2:]]
        forward = site.scale_forward.tolist()
        assert forward[0] == np.float32(448) / np.float32(max(inputs[-3:]))
        assert forward[1] == np.float32(448) / np.float32(peak(layer.weight))
        y.backward(g)
        assert site.amax_history_backward[:, 0].tolist() == [0.0, *grads[-2:]]
        assert float(site.scale_backward[0]) == np.float32(57344) / np.float32(max(grads[-3:]))
        assert site.scale_forward.tolist() == forward


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference", "exception", "nan"])
def test_scales_and_histories_stay_where_nothing_is_trained(how: str) -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(20, 2))
    emulation = emulate(model, DELAYED)
    model(torch.randn(2, 3, 5)).sum().backward()
    states = {name: copy.deepcopy(site.state_dict()) for name, site in emulation.sites.items()}
    x = torch.randn(2, 3, 5) * 100
    match how:
        case "eval":
            model.eval()(x).sum().backward()
        case "no_grad":
            with torch.no_grad():
                model(x)
        case "inference":
            with torch.inference_mode():
                model(x)
        case "exception":
            with pytest.raises((RuntimeError, ValueError)):
                model(torch.randn(2, 3, 7))
        case _:
            with pytest.raises(ValueError, match="holds NaN"):
                model(x.log())
    for name, site in emulation.sites.items():
        assert same(site.state_dict().values(), states[name].values())


def test_a_shared_module_joins_the_amaxes_of_its_calls() -> None:
    layer = nn.Linear(6, 6)
    emulation, inner = emulate(nn.Sequential(layer, nn.Tanh(), layer), DELAYED), []
    layer.register_forward_pre_hook(lambda module, inputs: inner.append(inputs[0]))
    emulation.model(torch.randn(5, 6))
    history = emulation.sites["0"].amax_history_forward
    assert len(inner) == 2
    assert history[:, 0].tolist() == [0.0, 0.0, max(map(peak, inner))]


# ---- errors


def fitted() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


def odd(dtype: torch.dtype) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("odd", nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=dtype.is_complex))
    return model


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "name": (lambda: emulate(Net(), "mxfp9"), "no recipe is called 'mxfp9'; did you mean 'mxfp8'?"),
    "recipe": (lambda: emulate(Net(), 8), "recipe is a Recipe"),  # type: ignore[arg-type]
    "exempt": (lambda: emulate(Net(), "mxfp8", exempt=["haed"]), "exempt 'haed' fits no .*; did you mean 'head'"),
    "pattern": (lambda: emulate(Net(), "mxfp8", exempt=["x*"]), r"exempt 'x\*' fits no module of the model"),
    "type": (lambda: emulate(Net(), "mxfp8", exempt=[nn.Conv1d]), "exempt Conv1d fits no .*; did you mean 'Conv2d'"),
    "text": (lambda: emulate(Net(), "mxfp8", exempt="head"), r"write \['head'\]"),
    "fused": (lambda: emulate(Net(), "mxfp8", output_fused=["norn"]), "output_fused 'norn' fits no .*'norm'"),
    "optimizer": (lambda: emulate(Net(), "mxfp8", optimizer=fitted()[1]), "holds 4 of 4 parameters that are not of"),
    "integers": (lambda: emulate(odd(torch.int8), "mxfp8"), r"odd is torch\.int8"),
    "complex": (lambda: emulate(odd(torch.complex64), "mxfp8"), r"odd is torch\.complex64"),
    "loss scale": (lambda: emulate(Net(), "mxfp8", loss_scale="static"), 'is "dynamic", a number or a LossScaler'),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_in_one_line(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        mistake()


def test_a_model_is_emulated_once_and_a_refused_one_is_left_as_it_was() -> None:
    model = Net()
    with emulate(model, "mxfp8"), pytest.raises(ValueError, match=r"^the model is emulated already; call .*remove"):
        emulate(model, "hybrid")
    with emulate(model.block, "mxfp8"), pytest.raises(ValueError, match=r"^block is emulated already; call .*remove"):
        emulate(model, "hybrid")
    with pytest.raises(ValueError, match="fits no module"):
        emulate(model, "hybrid", exempt=["nothing like it"])
    assert not any("forward" in module.__dict__ for module in model.modules())


@every_recipe
@pytest.mark.parametrize("where", ["input", "weight"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf], ids=str)
def test_nan_and_inf_are_named_with_module_tensor_and_step(recipe: Recipe, where: str, bad: float) -> None:
    layers: list[tuple[nn.Module, Tensor]] = [
        (nn.Linear(6, 5), torch.randn(4, 6)),
        (nn.Conv1d(6, 5, 1), torch.randn(4, 6, 1)),
    ]
    for layer, x in layers:
        with torch.no_grad():
            (x if where == "input" else layer.get_parameter("weight"))[2, 3] = bad
        with emulate(nn.Sequential(nn.Identity(), layer), recipe) as emulation:
            emulation.global_step = 7
            kind = "NaN" if math.isnan(bad) else "Inf"
            with pytest.raises(ValueError, match=rf"^1\.{where} holds {kind} at step 7; [^\n]*$"):
                emulation.model(x)


LARGE: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Linear(6, 6), (4, 6)),
    (lambda: nn.Conv1d(6, 6, 1), (4, 6, 3)),
    (lambda: nn.LayerNorm(6), (4, 6)),
]


@pytest.mark.parametrize(("build", "shape"), LARGE, ids=["linear", "conv", "norm"])
def test_a_result_that_its_format_cannot_hold_is_named(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = nn.Sequential(build(), nn.ReLU())
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(5e4)
    with emulate(model, "direct"), pytest.raises(ValueError, match=r"^0\.output holds Inf at step 0"):
        model(torch.arange(math.prod(shape)).float().reshape(shape))


def test_a_gradient_that_its_format_cannot_hold_is_named_when_the_step_is_skipped() -> None:
    (model, optimizer), lines = fitted(), list[str]()
    scaler = LossScaler(start=2.0**16, report=lines.append)
    with emulate(model, "direct", loss_scale=scaler) as emulation:
        emulation.scale(model(torch.randn(64, 6) * 64).sum() / 8).backward()  # grad_output fits, the sums do not
        grad = model.get_parameter("2.weight").grad
        assert grad is not None
        assert grad.isinf().any()
        assert not emulation.step(optimizer)
    assert len(lines) == 1
    assert "first bad tensor: 2.grad_weight holds Inf at step 0" in lines[0]


MISFITS: list[tuple[Any, Shapes]] = [
    (F.linear, ((3, 6), (4, 8))),
    (F.linear, ((2, 3, 6), (4, 8))),
    (F.linear, ((3, 6), (4, 6), (5,))),
    (torch.matmul, ((3, 6), (8, 4))),
    (torch.matmul, ((6,), (3, 4))),
    (torch.matmul, ((6,), (3,))),
    (torch.matmul, ((2, 3, 6), (3, 8))),
    (torch.matmul, ((2, 3, 6), (2, 8, 4))),
    (torch.matmul, ((2, 3, 6), (3, 6, 4))),
    (torch.matmul, ((), (3,))),
    (torch.mm, ((3, 6), (8, 4))),
    (torch.mm, ((2, 3, 6), (6, 4))),
    (torch.mv, ((3, 6), (6, 4))),
    (torch.addmm, ((5,), (3, 6), (8, 5))),
    (torch.bmm, ((2, 3, 6), (3, 6, 4))),
    (partial(torch.einsum, "ij,jk->ik"), ((3, 6), (8, 4))),
    (partial(torch.einsum, "bij,bjk->bik"), ((2, 3, 6), (3, 6, 4))),
    (F.conv1d, ((2, 3, 6), (4, 5, 2))),
]


@pytest.mark.parametrize(
    ("function", "shapes"), MISFITS, ids=[f"{getattr(f, '__name__', 'einsum')} {shapes}" for f, shapes in MISFITS]
)
def test_shapes_that_do_not_fit_are_refused(function: Any, shapes: Shapes) -> None:
    inputs = arguments(*shapes)
    with pytest.raises(RuntimeError):
        function(*inputs)
    for recipe in (recipes.current_scaling(), recipes.direct(), recipes.mxfp8(), recipes.tf32(), UNCAST):
        with emulate(Call(function), recipe) as emulation, pytest.raises((RuntimeError, ValueError)):
            emulation.model(*inputs)


@pytest.mark.parametrize("channels", [20, 40])
def test_blocks_that_may_not_be_padded_are_refused_in_convolutions(channels: int) -> None:
    strict = TensorSpec(formats.E4M3FN, Block(shape=(1, 32), scale=BlockScale.RCEIL, padding=False))
    recipe = Recipe.from_tensors(input=strict, weight=strict)
    with emulate(nn.Conv1d(channels, 4, 2), recipe) as emulation, pytest.raises(ValueError, match="do not divide"):
        emulation.model(torch.randn(2, channels, 5))


@pytest.mark.parametrize("function", [torch.matmul, torch.mm])
def test_results_written_to_a_given_tensor_are_refused(function: Any) -> None:
    x, into = torch.randn(3, 3), torch.empty(3, 3)
    with emulate(Call(function), "mxfp8") as emulation, pytest.raises(ValueError, match=r"\(out=...\) is not emulated"):
        emulation.model(x, x, out=into)


# ---- steps


def test_a_bad_gradient_without_a_loss_scale_raises_and_leaves_the_weights() -> None:
    model, optimizer = fitted()
    message = r"^step 1: gradients hold Inf or NaN: 2\.grad_output holds Inf at step 1; [^\n]*$"
    with emulate(model, "hybrid", optimizer=optimizer) as emulation:
        model(torch.randn(8, 6)).sum().backward()
        assert emulation.step(optimizer)
        weights, states = bits(model), copy.deepcopy(optimizer.state_dict()["state"])
        optimizer.zero_grad()
        (model(torch.randn(8, 6)) * math.inf).sum().backward()
        with pytest.raises(ValueError, match=message):
            emulation.step(optimizer)
        assert same(bits(model).values(), weights.values())
        for number, state in optimizer.state_dict()["state"].items():
            assert same(state.values(), states[number].values())


@pytest.mark.parametrize("loss_scale", ["dynamic", 2.0**20, None], ids=str)
def test_a_scaled_loss_is_clipped_and_steps_as_an_unscaled_one(loss_scale: Any) -> None:
    (model, optimizer), x = fitted(), torch.randn(8, 6)
    plain = copy.deepcopy(model)
    twin = torch.optim.Adam(plain.parameters(), lr=0.1)
    plain(x).square().sum().backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    nn.utils.clip_grad_value_(plain.parameters(), 0.05)
    twin.step()
    with emulate(model, UNCAST, optimizer=optimizer, loss_scale=loss_scale) as emulation:
        emulation.scale(model(x).square().sum()).backward()
        assert emulation.step(optimizer, max_norm=0.5, max_value=0.05)
        assert emulation.global_step == 1
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_masters_are_rounded_after_a_step_and_not_after_one_that_is_skipped() -> None:
    model, optimizer = fitted()
    scaler = LossScaler(report=lambda line: None)
    with emulate(model, "hybrid", optimizer=optimizer, loss_scale=scaler, master=formats.FLOAT16) as emulation:
        before = bits(model)
        (emulation.scale(model(torch.randn(8, 6)).sum()) * math.inf).backward()
        assert not emulation.step(optimizer)
        assert same(bits(model).values(), before.values())
        optimizer.zero_grad()
        emulation.scale(model(torch.randn(8, 6)).sum()).backward()
        assert emulation.step(optimizer)
    assert all(x.half().float().equal(x) for x in model.parameters())
    assert not same(bits(model).values(), before.values())
