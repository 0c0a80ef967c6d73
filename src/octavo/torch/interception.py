"""Which functions of torch an emulated module's calls go through, and what stands in for each: one table.

Products run by the recipe's three GEMMs.  Every other function of the table writes its result, and its gradients, as the recipe stores
results; where it stores none (all recipes but those like `direct`) such functions run as they are.
"""

from __future__ import annotations

import inspect
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
        if torch.compiler.is_compiling():
            number, method = _known(func)
            if number >= 0 and place is not None and place.recipe is not None:
                return _ROWS[number](place, func, *args, **kwargs)
            # torch.compile knows methods written in Python by their names alone.
            return func(*args, **kwargs) if method is None else getattr(args[0], method)(*args[1:], **kwargs)
        if place is None or place.recipe is None:
            return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(place, func, *args, **kwargs)
        if func not in _KEEPING or not place.stores or args[0].is_inference():
            return func(*args, **kwargs)
        version = args[0]._version
        y = func(*args, **kwargs)
        if isinstance(y, Tensor):
            carry_mark(args[0], y, version)
        return y


# A look into a dict whose keys are functions would become a guard that torch.compile cannot check.
@torch.compiler.assume_constant_result
def _known(func: Any) -> tuple[int, str | None]:
    """The number of func's handler, or -1, and its name if it is a method of tensors that is written in Python."""
    name = getattr(func, "__name__", "")
    method: Any = getattr(Tensor, name, None)
    for spelled in (func, method):
        if spelled in HANDLERS and (spelled is func or inspect.unwrap(spelled) is inspect.unwrap(func)):
            return _FUNCTIONS.index(spelled), None
    own = isinstance(method, types.FunctionType) and inspect.unwrap(method) is inspect.unwrap(func)
    return -1, name if own else None


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
        alike = isinstance(x, Tensor) and (not isinstance(other, Tensor) or x.shape == other.shape) and not kwargs
        if place.stores and (_is_mask(place, other) or _is_mask(place, x)):
            return func(*args, **kwargs)
        if not place.stores or not alike or not x.is_floating_point():
            return apart(place, func, *args, **kwargs)
        _refuse_out(func, kwargs)
        site = place.site(word, x)
        return place.write(site, func(*args, **kwargs), fresh=True, both=True)

    return run


def _summed_in_place(word: str) -> Handler:
    """The same of one that changes its first argument."""
    apart = _in_place(word, getattr(torch, word))

    def run(place: Place, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_activation(place, x) or _is_mask(place, *args[:1]):
            return func(x, *args, **kwargs)
        if kwargs or (args and isinstance(args[0], Tensor) and args[0].shape != x.shape):
            return apart(place, func, x, *args, **kwargs)
        whole = not torch.compiler.is_compiling() and not x._is_view()
        y = place.write(place.site(word, x), func(x, *args, **kwargs), fresh=whole, both=True)
        return y if y is x else x.copy_(y)

    return run


def _in_place(word: str, function: Handler) -> Handler:
    """The handler of another function that changes its first argument."""
    out_of_place = _written(word, _PAIR, {})

    def run(place: Place, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_activation(place, x):
            return func(x, *args, **kwargs)
        before = x.clone()  # which its gradient may need
        others = [before if other is x else other for other in args]
        return x.copy_(out_of_place(place, function, before, *others, **kwargs))

    return run


def _is_mask(place: Place, x: Any = None) -> bool:
    """Whether x is no number to be stored but a mask, which holds what the format does not: attention adds float32's minimum."""
    if not isinstance(x, Tensor) or x.requires_grad or not x.is_floating_point() or torch.compiler.is_compiling():
        return False
    assert place.recipe is not None
    spec = place.recipe.output.result
    return spec is not None and x.numel() > 0 and bool(x.amin() < -spec.format.max)


def _is_activation(place: Place, x: Any) -> bool:
    """Whether a recipe that stores results stores x: it is no parameter, and no buffer of the model, such as a running mean."""
    if not place.stores or not isinstance(x, Tensor) or not x.is_floating_point() or isinstance(x, torch.nn.Parameter):
        return False
    computed = not torch.compiler.is_compiling() and x.grad_fn is not None
    return computed or not any(x is buffer for buffer in place.owner.model.buffers())


def _refuse_out(func: Any, kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("out") is not None:
        raise ValueError(f"{func.__name__}(out=...) is not emulated; assign the result, or exempt the module")


def _through(handler: Callable[..., Any], *ranks: int) -> Handler:
    """A handler of a product, which does not need the function but for what it refuses; ranks: of the tensors that it takes."""

    def run(place: Place, func: Any, *args: Any, **kwargs: Any) -> Any:
        operands = [x for x in (*args, *kwargs.values())[:2] if isinstance(x, Tensor)]
        if not all(x.is_floating_point() for x in operands):
            return func(*args, **kwargs)
        if ranks and tuple(x.dim() for x in operands) != ranks:
            return func(*args, **kwargs)  # which says what it takes
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


def _embedded(function: Callable[..., Any]) -> Handler:
    """The handler of an embedding; `max_norm` changes the table itself, which is done first, and once."""
    write = _written("embedding", {}, {"weight": 1}, main=True, fresh=False)
    signature = inspect.signature(function)

    def run(place: Place, func: Any, *args: Any, **kwargs: Any) -> Any:
        if not place.stores:
            return func(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        if (norm := given.get("max_norm")) is not None:
            with torch.no_grad():
                torch.embedding_renorm_(given["weight"], given["input"].contiguous(), norm, given.get("norm_type", 2.0))
            given["max_norm"] = None
        return write(place, func, *bound.args, **bound.kwargs)

    return run


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
    for name, ranks in (("matmul", ()), ("mm", (2, 2)), ("bmm", (3, 3)), ("mv", (2, 1)), ("dot", (1, 1))):
        table[getattr(torch, name)] = table[getattr(Tensor, name)] = _through(c.matmul, *ranks)
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
        torch.rms_norm: _written("norm", {"input": 0}, norm, main=True, fresh=False),
        F.group_norm: _written("norm", {"input": 0}, norm, main=True),
        F.batch_norm: _written("norm", {"input": 0}, {"weight": 3}, main=True),
        F.instance_norm: _written("norm", {"input": 0}, {"weight": 3}, main=True, fresh=False),
        F.embedding: _embedded(F.embedding),
        F.embedding_bag: _embedded(F.embedding_bag),
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
_FUNCTIONS, _ROWS = list(HANDLERS), list(HANDLERS.values())
