"""The gradients that flow back through operators.

What runs on tensors that require gradients leaves a `Node`, the tape's; `backward` walks the nodes from the last to the first.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from octavo.engine.schema import Argument
from octavo.engine.tensor import Tensor, empty, full, operators

if TYPE_CHECKING:
    from octavo.engine.operators import Operator

__all__ = ["Node", "backward", "enabled", "no_grad", "record", "recording", "tracked"]

recording: ContextVar[bool] = ContextVar("octavo_engine_recording", default=True)
"""Whether operators leave nodes."""
_numbers = itertools.count()


def tracked(value: Tensor | None) -> bool:
    """Whether gradients flow back through a tensor."""
    return value is not None and (value.requires_grad or value.node is not None)


class Node:
    """One call that gradients flow back through: what it saved, and where the gradients of its inputs go."""

    __slots__ = ("edges", "number", "operator", "outputs", "saved", "versions")

    def __init__(
        self, operator: Operator, saved: tuple[Any, ...], edges: list[Any], outputs: tuple[Tensor, ...]
    ) -> None:
        self.operator, self.edges, self.number = operator, edges, next(_numbers)
        self.outputs = [(one.shape, one.dtype, one.device) for one in outputs]
        self.saved: tuple[Any, ...] | None = saved
        self.versions = [one.storage.version if isinstance(one, Tensor) else 0 for one in saved]

    def gradients(self, grads: Sequence[Tensor | None], *, retain: bool) -> Sequence[Tensor | None]:
        """Of the inputs, from those of the outputs."""
        name, saved = self.operator.name, self.saved
        if saved is None:
            raise RuntimeError(
                f"{name}: its saved tensors are gone, because backward ran here before; give the first call retain=True"
            )
        for i, (value, version) in enumerate(zip(saved, self.versions, strict=True)):
            if isinstance(value, Tensor) and value.storage.version != version:
                place = self.operator.arguments[i].name if i < len(self.operator.arguments) else "its output"
                raise RuntimeError(
                    f"{name}: {place} was changed in place after it was saved for backward (version {version}, now "
                    f"{value.storage.version}); change a copy, or call backward first"
                )
        assert self.operator.backward is not None
        found = self.operator.backward(grads, saved)
        if not isinstance(found, (tuple, list)) or len(found) != len(self.edges):
            count = len(found) if isinstance(found, (tuple, list)) else type(found).__name__
            raise ValueError(
                f"{name}: its backward function returns {count}, and {len(self.edges)} gradients are due, one for each argument"
            )
        if not retain:
            self.saved = None
        pairs = zip(self.operator.arguments, self.edges, found, strict=True)
        return [self._fitted(*each) if each[1] is not None and each[2] is not None else None for each in pairs]

    def _fitted(self, argument: Argument, edge: tuple[Any, ...], gradient: Any) -> Tensor:
        """The gradient of an argument, in its dtype.  Raises ValueError unless it has its shape."""
        shape, dtype = edge[2:]
        if not isinstance(gradient, Tensor) or gradient.shape != shape:
            got = (
                f"has shape {list(gradient.shape)}"
                if isinstance(gradient, Tensor)
                else f"is a {type(gradient).__name__}"
            )
            raise ValueError(
                f"{self.operator.name}: the gradient of {argument.name} {got}, and {argument.name} is a tensor of shape {list(shape)}; "
                "correct its backward function"
            )
        if gradient.dtype == dtype:
            return gradient
        converted = empty(shape, dtype, device=gradient.device)
        operators["octavo::copy_"](converted, gradient)
        return converted


def record(operator: Operator, given: tuple[Any, ...], result: Any) -> None:
    """Leave a node of a call and what it returned, which has to be as many tensors as its schema says."""
    outputs = result if isinstance(result, tuple) else () if result is None else (result,)
    if len(outputs) != operator.outputs:
        raise ValueError(
            f"{operator.name}: its kernel returns {len(outputs)} tensors, and its schema says {operator.outputs}; correct one"
        )
    if any(one is value for one in outputs for value in given):
        raise ValueError(
            f"{operator.name}: its kernel returns one of its arguments, which needs a node of its own; return its detach()"
        )
    edges: list[Any] = [None] * len(given)
    for i in operator._tensors:
        value = given[i]
        if value is not None and tracked(value):
            edges[i] = (*(value.node or (value, -1)), value.shape, value.dtype)
    # A gradient's rule sees its outputs without what made them, lest they keep themselves alive.
    saved = given + tuple(one.detach() for one in outputs) if operator.saves_outputs else given
    node = Node(operator, saved, edges, outputs)
    for i, one in enumerate(outputs):
        if one.dtype.kind == "f":
            one.node = node, i


def backward(tensor: Tensor, gradient: Tensor | None = None, *, retain: bool = False) -> None:
    """Add the gradient of `tensor` to `grad` of every tensor that requires one and that it was computed from.

    gradient: that of the outcome by `tensor`, in its shape; 1 for a tensor of one element.  retain: keep what was saved, for another call.
    A tensor that was used several times has its gradients added up, in the order of the nodes.  Nothing here is recorded.
    """
    if tensor.node is None:
        raise ValueError(
            "nothing was recorded for this tensor: none of its inputs requires a gradient, or it was made inside no_grad()"
        )
    if gradient is None:
        if tensor.size != 1:
            raise ValueError(
                f"backward() without a gradient is for one number; this tensor has shape {list(tensor.shape)}: give gradient="
            )
        gradient = full(tensor.shape, 1, tensor.dtype, device=tensor.device)
    elif (gradient.shape, gradient.dtype, gradient.device) != (tensor.shape, tensor.dtype, tensor.device):
        kinds = (f"{one.dtype} {list(one.shape)} on {one.device}" for one in (gradient, tensor))
        raise ValueError(
            f"backward() takes a gradient like its tensor; got {', beside '.join(kinds)}: give one of that shape and dtype"
        )
    last, index = tensor.node
    waiting: dict[int, list[Tensor | None]] = {last.number: [None] * len(last.outputs)}
    waiting[last.number][index] = gradient
    queue = [(-last.number, last)]
    with no_grad():
        while queue:
            _, node = heapq.heappop(queue)
            found = node.gradients(waiting.pop(node.number), retain=retain)
            for edge, grad in zip(node.edges, found, strict=True):
                if edge is None or grad is None:
                    continue
                source, place, *_ = edge
                if place < 0:
                    source.grad = grad if source.grad is None else _sum(source.grad, grad)
                    continue
                if source.number not in waiting:
                    waiting[source.number] = [None] * len(source.outputs)
                    heapq.heappush(queue, (-source.number, source))
                grads = waiting[source.number]
                before = grads[place]
                grads[place] = grad if before is None else _sum(before, grad)


def _sum(one: Tensor, other: Tensor) -> Tensor:
    total: Tensor = operators["octavo::add"](one, other)
    return total


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Inside, operators leave no nodes."""
    token = recording.set(False)
    try:
        yield
    finally:
        recording.reset(token)


def enabled() -> bool:
    """Whether operators leave nodes."""
    return recording.get()
