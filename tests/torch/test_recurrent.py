"""The unrolled recurrent functions against torch's own, in float64: outputs, states, and the gradients of all that goes in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.overrides import TorchFunctionMode

from octavo.torch import recurrent
from octavo.torch.recurrent import RECURRENT

TIME, BATCH, FEATURES, HIDDEN = 5, 3, 4, 6
LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "lstm-projected": partial(nn.LSTM, proj_size=2),
    "gru": nn.GRU,
    "rnn-tanh": nn.RNN,
    "rnn-relu": partial(nn.RNN, nonlinearity="relu"),
}
CELLS: dict[str, Callable[..., Any]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn-tanh": nn.RNNCell,
    "rnn-relu": partial(nn.RNNCell, nonlinearity="relu"),
}
Run = Callable[[], Any]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
    return F.linear(x, weight, bias)


class Unrolled(TorchFunctionMode):
    """Sends torch's recurrent functions to those under test, and notes which products they ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, Tensor] = {}
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in RECURRENT:
            return RECURRENT[function](self.linear, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
        assert self.weights.setdefault(name, weight) is weight
        self.calls[name] += 1
        return linear(x, weight, bias, name)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, Tensor):
        yield value
    else:
        for part in value:
            yield from tensors(part)


def outcome(run: Run, leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What `run` returns, and the gradients of the leaves under a weighing of all of it; dropout draws the same each time."""
    torch.manual_seed(7)
    results = list(tensors(run()))
    losses = [(x * torch.linspace(1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)).square().sum() for x in results]
    return results, list(torch.autograd.grad(torch.stack(losses).sum(), leaves))


def same(run: Run, leaves: list[Tensor]) -> Unrolled:
    """Assert that torch and the functions under test agree on `run`; returns what was asked of `linear`."""
    expected = outcome(run, leaves)
    mode = Unrolled()
    with mode:
        found = outcome(run, leaves)
    assert mode.calls
    for one, two in zip(expected[0], found[0], strict=True):
        assert (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)
    for one, two in zip(expected[0] + expected[1], found[0] + found[1], strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-12)
    return mode


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def states(module: nn.RNNBase, *batch: int) -> Any:
    places = module.num_layers * (1 + module.bidirectional)
    h = leaf(places, *batch, module.proj_size or HIDDEN)
    return (h, leaf(places, *batch, HIDDEN)) if isinstance(module, nn.LSTM) else h


def made(kind: str, **options: Any) -> nn.RNNBase:
    return LAYERS[kind](FEATURES, HIDDEN, dtype=torch.float64, **options)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("layers", "dropout"), [(1, 0.0), (2, 0.0), (3, 0.4)])
def test_layers(kind: str, layers: int, dropout: float) -> None:
    for bias, bidirectional, batch_first in product((True, False), repeat=3):
        options = {"bias": bias, "bidirectional": bidirectional, "batch_first": batch_first}
        module = made(kind, num_layers=layers, dropout=dropout, **options)
        x, hx = leaf(*((BATCH, TIME) if batch_first else (TIME, BATCH)), FEATURES), states(module, BATCH)
        mode = same(partial(module, x, hx), [x, *tensors(hx), *module.parameters()])
        assert mode.weights == {name: p for name, p in module.named_parameters() if name.startswith("weight")}
        assert all(count == (1 if "_ih_" in name else TIME) for name, count in mode.calls.items())


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences(kind: str) -> None:
    for bias, bidirectional, ordered in product((True, False), repeat=3):
        module = made(kind, num_layers=2, dropout=0.4, bias=bias, bidirectional=bidirectional)
        lengths = torch.tensor([5, 2, 2, 1] if ordered else [2, 5, 1, 2])
        x, hx = leaf(TIME, 4, FEATURES), states(module, 4)

        def run(module: nn.RNNBase = module, x: Tensor = x, hx: Any = hx, lengths: Tensor = lengths) -> Any:
            return module(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)

        mode = same(run, [x, *tensors(hx), *module.parameters()])
        assert set(mode.calls.values()) == {1, TIME}


@pytest.mark.parametrize("kind", LAYERS)
def test_unbatched_without_state_in_evaluation(kind: str) -> None:
    module = made(kind, num_layers=2, dropout=0.4).eval()
    x = leaf(TIME, FEATURES)
    same(lambda: module(x), [x, *module.parameters()])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_one_step_of_one(kind: str, dropout: float) -> None:
    module = made(kind, num_layers=2, dropout=dropout, bidirectional=True)
    x = leaf(1, 1, FEATURES)
    same(lambda: module(x), [x, *module.parameters()])


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (1,), (BATCH,)])
def test_cells(kind: str, bias: bool, batch: tuple[int, ...]) -> None:
    module = CELLS[kind](FEATURES, HIDDEN, bias=bias, dtype=torch.float64)
    x, h, c = leaf(*batch, FEATURES), leaf(*batch, HIDDEN), leaf(*batch, HIDDEN)
    hx = [h, c] if kind == "lstm" else [h]
    mode = same(lambda: module(x, (h, c) if kind == "lstm" else h), [x, *hx, *module.parameters()])
    assert mode.weights == {"weight_ih": module.weight_ih, "weight_hh": module.weight_hh}
    assert mode.calls == {"weight_ih": 1, "weight_hh": 1}


def lstm_call(**changes: Any) -> dict[str, Any]:
    """The keywords of a call of torch.lstm, two layers, with changes; None takes one away."""
    module = made("lstm", num_layers=2)
    call = {"input": leaf(TIME, BATCH, FEATURES), "hx": states(module, BATCH), "params": list(module.parameters())}
    options = {"has_biases": True, "num_layers": 2, "dropout": 0.0, "train": True, "bidirectional": False}
    changed = {**call, **options, "batch_first": False, **changes}
    return {name: value for name, value in changed.items() if value is not None}


def packed_call(**changes: Any) -> dict[str, Any]:
    call = {"data": leaf(6, FEATURES), "batch_sizes": torch.tensor([3, 2, 1])}
    return lstm_call(**{"input": None, "batch_first": None, **call, **changes})


@pytest.mark.parametrize("make", [lstm_call, packed_call])
@pytest.mark.parametrize("placed", [0, 1, 4, 9])
def test_arguments_by_place_and_by_name(make: Run, placed: int) -> None:
    call = make()
    names = recurrent._PADDED if "input" in call else recurrent._PACKED
    args = [call.pop(name) for name in names[:placed]]
    for one, two in zip(torch.lstm(*args, **call), recurrent.lstm(linear, *args, **call), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-12)


def test_no_argument_is_given_twice() -> None:
    call = lstm_call()
    with pytest.raises(ValueError, match=r"1 by place and .* give each once"):
        recurrent.lstm(linear, call["input"], **call)


def test_biases_of_a_cell_one_by_one() -> None:
    x, h, w_ih, w_hh, b = leaf(2, 4), leaf(2, 6), leaf(18, 4), leaf(18, 6), leaf(18)
    for biases in ({"b_ih": b}, {"b_hh": b}):
        same(partial(torch.gru_cell, x, h, w_ih, w_hh, **biases), [x, h, w_ih, w_hh, b])


def test_an_empty_batch() -> None:
    module = made("lstm", bidirectional=True)
    with Unrolled():
        output, (h, c) = module(leaf(TIME, 0, FEATURES))
    assert (*output.shape, *h.shape, *c.shape) == (TIME, 0, 2 * HIDDEN, 2, 0, HIDDEN, 2, 0, HIDDEN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    module, x = made("gru", num_layers=2).to(dtype), leaf(TIME, BATCH, FEATURES).to(dtype)
    expected = module(x)
    with Unrolled():
        found = module(x)
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_autocast_mixes_dtypes() -> None:
    module, x = made("lstm").float(), leaf(TIME, BATCH, FEATURES).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), Unrolled():
        output = module(x)[0]
    torch.testing.assert_close(output.float(), module(x.float())[0], rtol=0, atol=0.02)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_of_one_graph() -> None:
    torch._dynamo.reset()
    call = lstm_call()
    leaves = [call["input"], *call["hx"], *call["params"]]

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    def run(x: Tensor, hx: Any, params: list[Tensor]) -> tuple[Tensor, ...]:
        return recurrent.lstm(linear, x, hx, params, True, 2, 0.0, True, False, False)

    expected = outcome(lambda: torch.lstm(**call), leaves)
    found = outcome(lambda: run(call["input"], call["hx"], call["params"]), leaves)
    for one, two in zip(expected[0] + expected[1], found[0] + found[1], strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-12)


def test_the_table_is_of_all_that_the_layers_call() -> None:
    names = ("lstm", "gru", "rnn_tanh", "rnn_relu")
    assert {getattr(torch._VF, name + end) for name in names for end in ("", "_cell")} == set(RECURRENT)
    assert all(function is getattr(recurrent, key.__name__) for key, function in RECURRENT.items())


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": (lstm_call(train=None), "lstm takes input, hx, .*by place"),
    "unknown": (lstm_call(proj_size=2), "proj_size"),
    "both ways": (lstm_call(data=leaf(6, FEATURES)), "data"),
    "flag": (lstm_call(train=1), "train of lstm is .*bool"),
    "layers": (lstm_call(num_layers=0), "1 layer or more"),
    "layers kind": (lstm_call(num_layers=2.0), "num_layers of lstm"),
    "dropout": (lstm_call(dropout=1.5), "dropout from 0 to 1"),
    "dropout nan": (lstm_call(dropout=float("nan")), "dropout from 0 to 1"),
    "params kind": (lstm_call(params=leaf(2, 2)), "params of lstm"),
    "too few params": (lstm_call(params=[leaf(24, FEATURES)] * 7), "4 params for each of 2 directions"),
    "too many params": (lstm_call(num_layers=1, hx=(leaf(1, BATCH, HIDDEN),) * 2), "4 params for each of 1 "),
    "unbatched": (lstm_call(input=leaf(TIME, FEATURES)), "unsqueeze"),
    "no time": (lstm_call(input=leaf(0, BATCH, FEATURES)), "at least one time step"),
    "features": (lstm_call(input=leaf(TIME, BATCH, 5)), "weights_l0 of lstm"),
    "batch": (lstm_call(input=leaf(TIME, 1, FEATURES)), "hx of lstm"),
    "state places": (lstm_call(hx=(leaf(1, BATCH, HIDDEN),) * 2), "hx of lstm"),
    "state axes": (lstm_call(hx=(leaf(BATCH, HIDDEN),) * 2), "hx of lstm"),
    "one state": (lstm_call(hx=(leaf(2, BATCH, HIDDEN),)), "pair"),
    "no pair": (lstm_call(hx=leaf(2, BATCH, HIDDEN)), "pair"),
    "dtype": (
        lstm_call(input=leaf(TIME, BATCH, FEATURES).float()),
        "one floating dtype; got torch.float32, torch.float64",
    ),
    "integers": (lstm_call(input=torch.ones(TIME, BATCH, FEATURES, dtype=torch.int64)), "floating dtype"),
    "no tensor": (lstm_call(input=[1.0]), "got list"),
    "sizes grow": (packed_call(batch_sizes=torch.tensor([3, 1, 2])), "never grow"),
    "sizes sum": (packed_call(batch_sizes=torch.tensor([3, 2])), "sum to the 6 tokens"),
    "size of zero": (packed_call(batch_sizes=torch.tensor([3, 3, 0])), "positive"),
    "sizes kind": (packed_call(batch_sizes=torch.tensor([3.0, 2.0, 1.0])), "int64"),
    "sizes list": (packed_call(batch_sizes=[3, 2, 1]), "int64"),
    "packed axes": (packed_call(data=leaf(6, 1, FEATURES)), "packed data of 2"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_what_is_not_supported_raises(name: str) -> None:
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message) as raised:
        recurrent.lstm(linear, **call)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "shapes",
    [
        ((4,), (6,), (18, 4), (18, 6)),
        ((1, 2, 4), (1, 2, 6), (18, 4), (18, 6)),
        ((2, 5), (2, 6), (18, 4), (18, 6)),
        ((2, 4), (1, 6), (18, 4), (18, 6)),
        ((2, 4), (2, 6), (24, 4), (18, 6)),
        ((2, 4), (2, 6), (18, 4), (18, 7)),
        ((2, 4), (), (18, 4), (18, 6)),
        ((2, 4), (2, 6), (18, 4), ()),
        ((2, 4), (2, 6), (18, 4), (18, 6), (1,)),
        ((2, 4), (2, 6), (18, 4), (18, 6), (18,), (6,)),
    ],
)
def test_bad_shapes_of_a_cell(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="have the shapes"):
        recurrent.gru_cell(linear, *(leaf(*shape) for shape in shapes))


def test_a_layer_of_one_state_takes_no_pair() -> None:
    x, h = leaf(2, 4), leaf(2, 6)
    with pytest.raises(ValueError, match=r"gru takes tensors .* tuple: convert"):
        recurrent.gru_cell(linear, x, (h, h), leaf(18, 4), leaf(18, 6))
    with pytest.raises(ValueError, match=r"gru takes tensors .* tuple: convert"):
        recurrent.gru(linear, x, (h, h), [], True, 1, 0.0, True, False, False)
