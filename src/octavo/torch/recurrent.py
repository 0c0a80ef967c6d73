"""Torch's recurrent layers and cells as plain torch operations around matrix products that a callable computes.

Each function has the name of the torch function it stands for and takes a `Product` before that function's arguments.  What torch
returns, it returns: shapes, order, strides.  All tensors are of one floating dtype, except under torch's autocast, where dtypes
follow from promotion.  NaN and Inf go through as torch's operations take them.  A `ValueError` is raised for anything else than torch
documents, an empty sequence and a second dtype among them.  Source: the documentation of `torch.nn.LSTM`, `GRU`, `RNN` and their cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "RECURRENT",
    "Product",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
]

Product: TypeAlias = Callable[[Tensor, Tensor, Tensor | None, str], Tensor]
"""`linear(x, weight, bias, name)` is `x @ weight.T + bias`, x: [tokens, in_features].

name: what torch.nn calls that weight, the same at each time step: "weight_ih_l0", "weight_hh_l1_reverse", "weight_hr_l0"; in a cell
"weight_ih" and "weight_hh".  A weight of the input is asked for once a call, over all time steps; the others once a time step.
"""

_State: TypeAlias = tuple[Tensor, ...]
"""The hidden state and, of an LSTM, the cell state."""

_PADDED = "input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first"
_PACKED = "data", "batch_sizes", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional"
_KINDS: Mapping[str, Any] = {"params": tuple | list, "num_layers": int, "dropout": float | int}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cell:
    """A kind of cell: how many gates its weights hold, how many states, and the next ones from both products and the present ones."""

    name: str
    gates: int
    states: int
    step: Callable[[Tensor, Tensor, _State], _State]


class _Weights(NamedTuple):
    """What one direction of one layer multiplies with; suffix: what the names of its weights end with."""

    suffix: str
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


def _lstm_step(from_input: Tensor, from_hidden: Tensor, state: _State) -> _State:
    i, f, g, o = (from_input + from_hidden).chunk(4, -1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru_step(from_input: Tensor, from_hidden: Tensor, state: _State) -> _State:
    input_r, input_z, input_n = from_input.chunk(3, -1)
    hidden_r, hidden_z, hidden_n = from_hidden.chunk(3, -1)
    r, z = (input_r + hidden_r).sigmoid(), (input_z + hidden_z).sigmoid()
    n = (input_n + r * hidden_n).tanh()
    return ((1 - z) * n + z * state[0],)


def _tanh_step(from_input: Tensor, from_hidden: Tensor, state: _State) -> _State:
    return ((from_input + from_hidden).tanh(),)


def _relu_step(from_input: Tensor, from_hidden: Tensor, state: _State) -> _State:
    return ((from_input + from_hidden).relu(),)


_LSTM = _Cell(name="lstm", gates=4, states=2, step=_lstm_step)
_GRU = _Cell(name="gru", gates=3, states=1, step=_gru_step)
_TANH = _Cell(name="rnn_tanh", gates=1, states=1, step=_tanh_step)
_RELU = _Cell(name="rnn_relu", gates=1, states=1, step=_relu_step)


def lstm(linear: Product, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """`torch.lstm`: (output, h_n, c_n).

    args, kwargs: (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first), or, of a packed sequence,
    (data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional).  input: [time, batch, in_features], or
    [batch, time, in_features] with batch_first; data: [tokens, in_features], batch_sizes: int64 [time]; hx: (h_0, c_0), each
    [layers * directions, batch, features]; params: as `torch.nn.LSTM` orders them.  Where h_0 has other features than c_0, each
    direction ends with its projection (arXiv 1402.1128).
    """
    return _layers(_LSTM, linear, args, kwargs)


def gru(linear: Product, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """`torch.gru`: (output, h_n).  args, kwargs: as of `lstm`, hx being h_0 alone.  `n = tanh(W_in x + b_in + r * (W_hn h + b_hn))`."""
    return _layers(_GRU, linear, args, kwargs)


def rnn_tanh(linear: Product, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """`torch.rnn_tanh`: (output, h_n).  args, kwargs: as of `lstm`, hx being h_0 alone."""
    return _layers(_TANH, linear, args, kwargs)


def rnn_relu(linear: Product, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """`torch.rnn_relu`: (output, h_n).  args, kwargs: as of `lstm`, hx being h_0 alone."""
    return _layers(_RELU, linear, args, kwargs)


def lstm_cell(linear: Product, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """`torch.lstm_cell`: the next (h, c).

    args, kwargs: (input, hx, w_ih, w_hh, b_ih=None, b_hh=None), input: [batch, in_features]; hx: (h, c), each [batch, features].
    """
    return _one_step(_LSTM, linear, *args, **kwargs)


def gru_cell(linear: Product, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.gru_cell`: the next h.  args, kwargs: as of `lstm_cell`, hx being h alone."""
    return _one_step(_GRU, linear, *args, **kwargs)[0]


def rnn_tanh_cell(linear: Product, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.rnn_tanh_cell`: the next h.  args, kwargs: as of `lstm_cell`, hx being h alone."""
    return _one_step(_TANH, linear, *args, **kwargs)[0]


def rnn_relu_cell(linear: Product, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.rnn_relu_cell`: the next h.  args, kwargs: as of `lstm_cell`, hx being h alone."""
    return _one_step(_RELU, linear, *args, **kwargs)[0]


def _layers(cell: _Cell, linear: Product, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _State:
    given = _named(cell, args, kwargs)
    packed, states = "data" in given, _states(cell, given["hx"])
    x = given["data" if packed else "input"]
    _check_tensors(cell, [x, *states, *given["params"]])
    if x.ndim != (2 if packed else 3):
        raise ValueError(
            f"{cell.name} takes an input of 3 axes or packed data of 2; got {list(x.shape)}: unsqueeze what is unbatched"
        )
    if packed:
        sizes = _batch_sizes(given["batch_sizes"], len(x))
    else:
        x = x.transpose(0, 1) if given["batch_first"] else x
        sizes = [x.shape[1]] * x.shape[0]
        x = x.flatten(0, 1)
    if not sizes:
        raise ValueError(f"{cell.name} takes sequences of at least one time step; got none: leave empty ones out")
    output, ends = _stack(cell, linear, x, sizes, states, given)
    if not packed:
        output = output.unflatten(0, (len(sizes), sizes[0]))
        output = output.transpose(0, 1) if given["batch_first"] else output
    return output, *ends


def _stack(
    cell: _Cell, linear: Product, x: Tensor, sizes: Sequence[int], states: _State, given: Mapping[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """All layers: their output and the final states.  x: [tokens, in_features], time after time; sizes: how many tokens each has."""
    suffixes = ("", "_reverse") if given["bidirectional"] else ("",)
    places = given["num_layers"] * len(suffixes)
    _check_shapes(f"hx of {cell.name}", states, [(places, sizes[0], *part.shape[-1:]) for part in states])
    projected = states[0].shape[-1] != states[-1].shape[-1]
    many = (4 if given["has_biases"] else 2) + projected
    if len(given["params"]) != places * many:
        raise ValueError(
            f"{cell.name} takes {many} params for each of {places} directions; got {len(given['params'])}: "
            "give those that has_biases, num_layers, bidirectional and hx speak of"
        )
    ends: list[_State] = []
    for layer in range(given["num_layers"]):
        if layer and given["train"] and given["dropout"]:
            x = torch.dropout(x, given["dropout"], True)
        outputs = []
        for suffix in suffixes:
            place = len(ends)
            params = given["params"][place * many : (place + 1) * many]
            b_ih, b_hh = params[2:4] if given["has_biases"] else (None, None)
            w_hr = params[-1] if projected else None
            weights = _Weights(f"_l{layer}{suffix}", params[0], params[1], b_ih, b_hh, w_hr)
            state = tuple(part[place] for part in states)
            output, end = _unroll(cell, linear, x, sizes, state, weights)
            outputs.append(output)
            ends.append(end)
        x = torch.cat(outputs, -1)
    return x, [torch.stack(parts) for parts in zip(*ends, strict=True)]


def _unroll(
    cell: _Cell, linear: Product, x: Tensor, sizes: Sequence[int], state: _State, weights: _Weights
) -> tuple[Tensor, _State]:
    """One direction of one layer.  Of a packed batch, each step moves the first rows of the state and leaves the others as they were."""
    features, cells = state[0].shape[-1], state[-1].shape[-1]
    rows = cell.gates * cells
    shapes = [(rows, x.shape[-1]), (rows, features), (rows,), (rows,), (features, cells)]
    _check_shapes(f"weights{weights.suffix} of {cell.name}", weights[1:], shapes)
    from_input = linear(x, weights.w_ih, weights.b_ih, f"weight_ih{weights.suffix}").split(sizes)
    outputs, times = list(from_input), range(len(sizes))
    for time in reversed(times) if weights.suffix.endswith("reverse") else times:
        size = sizes[time]
        present = tuple(part[:size] for part in state)
        from_hidden = linear(present[0], weights.w_hh, weights.b_hh, f"weight_hh{weights.suffix}")
        hidden, *rest = cell.step(from_input[time], from_hidden, present)
        if weights.w_hr is not None:
            hidden = linear(hidden, weights.w_hr, None, f"weight_hr{weights.suffix}")
        outputs[time], moved = hidden, (hidden, *rest)
        whole = size == sizes[0]
        state = moved if whole else tuple(torch.cat([a, b[size:]]) for a, b in zip(moved, state, strict=True))
    return torch.cat(outputs), state


def _one_step(
    cell: _Cell, linear: Product, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None
) -> _State:
    state, weights = _states(cell, hx), _Weights("", w_ih, w_hh, b_ih, b_hh)
    _check_tensors(cell, [input, *state, w_ih, w_hh, *(b for b in (b_ih, b_hh) if b is not None)])
    batch, hidden = state[0].shape[:1], w_hh.shape[-1:]
    shapes = [(*batch, *w_ih.shape[-1:]), *[(*batch, *hidden)] * cell.states]
    _check_shapes(f"input and hx of a cell ({cell.name})", [input, *state], shapes)
    return _unroll(cell, linear, input, [len(input)], state, weights)[1]


def _named(cell: _Cell, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name, in torch's two ways of giving them: a packed sequence comes without batch_first."""
    padded = "batch_first" in kwargs or (len(args) == len(_PADDED) and not isinstance(args[3], tuple | list))
    names = _PADDED if padded else _PACKED
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    if len(args) + len(kwargs) != len(names) or set(given) != set(names):
        raise ValueError(
            f"{cell.name} takes {', '.join(names)}; got {len(args)} by place and {list(kwargs)} by name: give each once"
        )
    for name in names[names.index("params") :]:
        kind = _KINDS.get(name, bool)
        if not isinstance(given[name], kind):
            raise ValueError(f"{name} of {cell.name} is of {kind}; got {type(given[name]).__name__}: convert it")
    if given["num_layers"] < 1 or not 0 <= given["dropout"] <= 1:
        raise ValueError(
            f"{cell.name} has 1 layer or more and a dropout from 0 to 1; got {given['num_layers']} and {given['dropout']}"
        )
    return given


def _states(cell: _Cell, hx: Any) -> _State:
    if cell.states == 1:
        return (hx,)
    if not isinstance(hx, tuple | list) or len(hx) != cell.states:
        raise ValueError(f"hx of {cell.name} is a pair (h, c); got {type(hx).__name__}: give both states")
    return tuple(hx)


def _batch_sizes(sizes: Any, tokens: int) -> list[int]:
    if not isinstance(sizes, Tensor) or sizes.ndim != 1 or sizes.dtype != torch.int64:
        got = f"{sizes.dtype} {list(sizes.shape)}" if isinstance(sizes, Tensor) else type(sizes).__name__
        raise ValueError(f"batch_sizes are an int64 tensor [time]; got {got}: torch.nn.utils.rnn packs a sequence")
    values: list[int] = sizes.tolist()
    if sum(values) != tokens or values != sorted(values, reverse=True) or min(values, default=1) < 1:
        raise ValueError(
            f"batch_sizes are positive, never grow and sum to the {tokens} tokens; got {values}: torch.nn.utils.rnn packs a sequence"
        )
    return values


def _check_tensors(cell: _Cell, tensors: Sequence[Any]) -> None:
    dtypes = {str(x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in tensors}
    floating = all(isinstance(x, Tensor) and x.is_floating_point() for x in tensors)
    if not floating or (len(dtypes) > 1 and not torch.is_autocast_enabled(tensors[0].device.type)):
        raise ValueError(
            f"{cell.name} takes tensors of one floating dtype; got {', '.join(sorted(dtypes))}: convert them"
        )


def _check_shapes(what: str, tensors: Iterable[Tensor | None], shapes: Iterable[tuple[int, ...]]) -> None:
    pairs = [(list(x.shape), list(shape)) for x, shape in zip(tensors, shapes, strict=True) if x is not None]
    if any(got != expected for got, expected in pairs):
        got, expected = zip(*pairs, strict=True)
        raise ValueError(f"{what} have the shapes {list(expected)} beside the others; got {list(got)}: reshape them")


RECURRENT: Mapping[Callable[..., Any], Callable[..., Any]] = {
    getattr(torch, function.__name__): function
    for function in (lstm, gru, rnn_tanh, rnn_relu, lstm_cell, gru_cell, rnn_tanh_cell, rnn_relu_cell)
}
"""What stands here for each of torch's functions."""
