"""Which functions of torch an emulated module's calls go through, and what stands in for each: one table.

Products run by the recipe's three GEMMs.  Every other function of the table writes its result, and its gradients, as the recipe stores
results; where it stores none (all recipes but those like `direct`) such functions run as they are.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from octavo.torch import contractions as c
from octavo.torch.layouts import carry_mark
from octavo.torch.place import Place, now
from octavo.torch.recurrent import RECURRENT

__all__ = ["HANDLERS", "Interception"]

Handler: TypeAlias = Callable[..., Any]
"""Takes the place, the function and its arguments."""


class Interception(TorchFunctionMode):
    """While entered, functions of the table that the running emulated module calls are those of its recipe."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the handler of func, or func."""
        place, kwargs = now.place, kwargs or {}
        if place is None or place.recipe is None:
            return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(place, func, *args, **kwargs)
        if func not in _KEEPING or not place.stores or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        version = args[0]._version
        y = func(*args, **kwargs)
        if isinstance(y, Tensor):
            carry_mark(args[0], y, version)
        return y


def _written(
    word: str, reads: Mapping[str, int], weights: Mapping[str, int], *, main: bool = False, fresh: bool = True
) -> Handler:
    """A handler that stores what a function writes; reads, weights: its tensors by name and position; fresh: its result is new memory
    that its gradient does not need."""

    def run(place: Place, func: Any, *args: Any, **kwargs: Any) -> Any:
        if not place.stores:
            return func(*args, **kwargs)
        _refuse_out(func, kwargs)
        positional, site = list(args), None
        for lane, (name, position) in enumerate([*reads.items(), *weights.items()], 1):
            given = position < len(positional)
            x = positional[position] if given else kwargs.get(name)
            if not isinstance(x, Tensor) or not x.is_floating_point():
                continue
            site = site or place.site(word, x, main=main)
            x = place.read(site, x, lane, weight=name in weights)
            if given:
                positional[position] = x
            else:
                kwargs[name] = x
        y = func(*positional, **kwargs)
        if site is None:
            return y
        return place.write(site, y, fresh=fresh) if isinstance(y, Tensor) else (place.write(site, y[0]), *y[1:])

    return run


_PAIR = {"input": 0, "other": 1}


def _summed(word: str) -> Handler:
    """The handler of a sum or a difference: both terms have the result's gradient, which is stored once."""
    apart = _written(word, _PAIR, {})

    def run(place: Place, func: Any, *args: Any, **kwargs: Any) -> Any:
        x, other = (*args, None, None)[:2]
        alike = isinstance(x, Tensor) and (not isinstance(other, Tensor) or x.shape == other.shape)
        if not place.stores or not alike or not x.is_floating_point():
            return apart(place, func, *args, **kwargs)
        _refuse_out(func, kwargs)
        site = place.site(word, x)
        return place.write(site, func(*args, **kwargs), fresh=True, both=True)

    return run


def _summed_in_place(word: str) -> Handler:
    """The same of one that changes its first argument."""

    def run(place: Place, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_activation(place, x):
            return func(x, *args, **kwargs)
        return place.write(place.site(word, x), func(x, *args, **kwargs), fresh=True, both=True)

    return run


def _in_place(word: str, function: Handler) -> Handler:
    """The handler of another function that changes its first argument."""
    out_of_place = _written(word, _PAIR, {})

    def run(place: Place, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_activation(place, x):
            return func(x, *args, **kwargs)
        return x.copy_(out_of_place(place, function, x, *args, **kwargs))

    return run


def _is_activation(place: Place, x: Any) -> bool:
    """Whether a recipe that stores results stores x: it is no buffer of the module, such as a running mean."""
    if not place.stores or not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    return not any(x is buffer for buffer in place.module.buffers(recurse=False))


def _refuse_out(func: Any, kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("out") is not None:
        raise ValueError(f"{func.__name__}(out=...) is not emulated; assign the result, or exempt the module")


def _through(handler: Callable[..., Any]) -> Handler:
    """A handler of a product, which does not need the function."""

    def run(place: Place, func: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_out(func, kwargs)
        kwargs.pop("out", None)
        return handler(place, *args, **kwargs)

    return run


def _recurrent(function: Callable[..., Any]) -> Handler:
    def run(place: Place, func: Any, *args: Any, **kwargs: Any) -> Any:
        def linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
            return place.linear(place.named(name, x), x, weight, bias)

        return function(linear, *args, **kwargs)

    return run


# multi_head_attention_forward hands itself over whole; read by this copy of it, whose inner calls are met one by one.
_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)


def _attended(place: Place, func: Any, *args: Any, **kwargs: Any) -> Any:
    with Interception():
        return _attention(*args, **kwargs)


def _elementwise() -> dict[Any, Handler]:
    table: dict[Any, Handler] = {torch.rsub: _summed("sub")}
    for word, names, operators in (
        ("add", ("add",), ("add", "radd")),
        ("sub", ("sub", "subtract"), ("sub", "rsub")),
        ("mul", ("mul", "multiply"), ("mul", "rmul")),
        ("div", ("div", "divide", "true_divide"), ("truediv", "rtruediv")),
    ):
        sums = word in ("add", "sub")
        handler = _summed(word) if sums else _written(word, _PAIR, {})
        in_place = _summed_in_place(word) if sums else _in_place(word, getattr(torch, word))
        for name in names:
            table[getattr(torch, name)] = table[getattr(Tensor, name)] = handler
            table[getattr(Tensor, f"{name}_")] = in_place
        table |= {getattr(Tensor, f"__{operator}__"): handler for operator in operators}
        table[getattr(Tensor, f"__i{operators[0]}__")] = in_place
    return table


def _products() -> dict[Any, Handler]:
    table: dict[Any, Handler] = {F.linear: _through(c.linear), torch.einsum: _through(c.einsum)}
    table[F.scaled_dot_product_attention] = _through(c.attention)
    for rank in (1, 2, 3):
        table[getattr(torch, f"conv{rank}d")] = _through(c.convolution(rank))
        table[getattr(torch, f"conv_transpose{rank}d")] = _through(c.transposed_convolution(rank))
    for name in ("matmul", "mm", "bmm", "mv", "dot"):
        table[getattr(torch, name)] = table[getattr(Tensor, name)] = _through(c.matmul)
    table[torch.linalg.matmul] = table[Tensor.__matmul__] = _through(c.matmul)
    table[Tensor.__rmatmul__] = _through(lambda place, right, left: c.matmul(place, left, right))
    for name in ("addmm", "baddbmm", "addmv"):
        table[getattr(torch, name)] = table[getattr(Tensor, name)] = _through(c.added_matmul)
    return table


def _others() -> dict[Any, Handler]:
    norm = {"weight": 2}
    table: dict[Any, Handler] = {
        F.layer_norm: _written("norm", {"input": 0}, norm, main=True),
        F.rms_norm: _written("norm", {"input": 0}, norm, main=True, fresh=False),
        F.group_norm: _written("norm", {"input": 0}, norm, main=True),
        F.batch_norm: _written("norm", {"input": 0}, {"weight": 3}, main=True),
        F.instance_norm: _written("norm", {"input": 0}, {"weight": 3}, main=True, fresh=False),
        F.embedding: _written("embedding", {}, {"weight": 1}, main=True, fresh=False),
        F.embedding_bag: _written("embedding", {}, {"weight": 1}, main=True),
        F.multi_head_attention_forward: _attended,
    }
    return table | {function: _recurrent(ours) for function, ours in RECURRENT.items()}


_KEEPING = {
    F.relu,
    torch.relu,
    torch.relu_,
    Tensor.relu,
    Tensor.relu_,
    F.max_pool1d,
    F.max_pool2d,
    F.max_pool3d,
    torch.flatten,
    Tensor.flatten,
    Tensor.view,
    Tensor.reshape,
    Tensor.permute,
    Tensor.transpose,
}
"""Functions that write no values but those of their first argument, and zero."""
# A plain dict: torch.compile reads no other mapping whose keys are functions.
HANDLERS: dict[Any, Handler] = {**_elementwise(), **_products(), **_others()}
"""What stands in for each function of torch."""
