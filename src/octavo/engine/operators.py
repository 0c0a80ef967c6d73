"""Operators by name: a schema, an implementation for each device, and a rule for the gradients.

library = Library("mine")
library.define("scale(Tensor x, float by) -> Tensor")
library.impl("scale", lambda x, by: engine.multiply(x, engine.full((), by)), device="cpu")
register("mine::scale", lambda gradients, saved: (engine.multiply(gradients[0], saved[1]), None))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.engine.autograd import record, recording, tracked
from octavo.engine.kernels.launch import recorder
from octavo.engine.schema import Argument, bind, parse
from octavo.engine.storage import Device
from octavo.engine.tensor import Tensor, operators
from octavo.names import nearest

__all__ = ["Library", "Operator", "operator", "register"]

Backward = Callable[[Sequence[Any], Sequence[Any]], Sequence[Tensor | None]]


@dataclass(slots=True)
class Operator:
    """A named operator; call it as a function of its arguments, in order or by name."""

    name: str
    arguments: tuple[Argument, ...]
    outputs: int
    kernels: dict[Device, Callable[..., Any]] = field(default_factory=dict)
    backward: Backward | None = None
    saves_outputs: bool = False
    _tensors: tuple[int, ...] = ()
    _changed: tuple[int, ...] = ()

    def __call__(self, *given: Any, **named: Any) -> Any:
        if named or len(given) != len(self.arguments):
            given = bind(self.name, self.arguments, given, named)
        device, flows = None, False
        for i in self._tensors:
            value = given[i]
            if value.__class__ is not Tensor and not isinstance(value, Tensor):
                self._check_absent(i, value)
                continue
            if device is None:
                device = value.storage.device
            elif value.storage.device is not device:
                raise ValueError(
                    f"{self.name}: {self.arguments[i].name} is on {value.device} and the tensors before it on {device}; move one with "
                    ".to(...)"
                )
            flows = flows or value.requires_grad or value.node is not None
        kernel = self.kernels.get(device or Device.CPU)
        if kernel is None:
            have = ", ".join(str(one) for one in self.kernels) or "no device"
            raise ValueError(
                f"{self.name} runs on {have}, and was called on {device or Device.CPU}; give it a kernel with Library.impl, or move its "
                "tensors"
            )
        wanted = flows and recording.get()
        if wanted:
            self._check_gradient(given)
        # A kernel may be written in other operators: they leave no nodes, as this call's rule stands for all of them.
        token = recording.set(False) if wanted else None
        try:
            result = kernel(*given)
        finally:
            if token is not None:
                recording.reset(token)
        for i in self._changed:
            if given[i] is not None:
                given[i].storage.version += 1
        capturing = recorder.get()
        if capturing is not None:
            capturing.memory += given  # tensors, and objects whose own tensors the kernels use
            capturing.changed += [given[i].storage for i in self._changed if given[i] is not None]
        if wanted:
            record(self, given, result)
        return result

    def _check_absent(self, i: int, value: Any) -> None:
        """Raise TypeError unless an argument that is no tensor may be None, and is."""
        argument = self.arguments[i]
        if value is not None or not argument.kind.endswith("?"):
            raise TypeError(
                f"{self.name}: {argument.name} is a Tensor; got {type(value).__name__}: wrap it with engine.from_numpy"
            )

    def _check_gradient(self, given: Sequence[Any]) -> None:
        """Raise ValueError unless gradients can flow back through this call."""
        if self.backward is None:
            names = " and ".join(self.arguments[i].name for i in self._tensors if tracked(given[i]))
            raise ValueError(
                f"{self.name} has no gradient, and {names} requires one; register its backward function, or call it inside no_grad()"
            )
        for i in self._changed:
            if tracked(given[i]):
                raise ValueError(
                    f"{self.name} would change {self.arguments[i].name}, which gradients flow through; use no_grad()"
                )


class Library:
    """Operators under one name: `Library("mine").define("f(Tensor x) -> Tensor")` makes `mine::f`."""

    def __init__(self, name: str) -> None:
        if not name.isidentifier():
            raise ValueError(f"a library's name is an identifier; got {name!r}")
        self.name = name

    def define(self, schema: str) -> Operator:
        """A new operator, from `name(kind argument=default, ...) -> Tensor`, or `-> (Tensor, Tensor)`, or `-> ()`.

        Kinds are Tensor, Tensor?, Tensor!, Tensor!?, float, int, bool and object; names may be left out.  Raises ValueError for a
        schema that does not read so, and for a name that is taken.
        """
        short, arguments, outputs = parse(schema.removeprefix(f"{self.name}::"))
        name = f"{self.name}::{short}"
        if name in operators:
            raise ValueError(f"{name} is defined already; choose another name")
        tensors = tuple(i for i, one in enumerate(arguments) if one.kind.startswith("Tensor"))
        changed = tuple(i for i, one in enumerate(arguments) if "!" in one.kind)
        made = Operator(name, arguments, outputs, _tensors=tensors, _changed=changed)
        operators[name] = made
        return made

    def impl(self, name: str, function: Callable[..., Any], device: Device | str = Device.CPU) -> None:
        """Run operator `name` by `function(*arguments)` on that device.  Raises ValueError where it has one there."""
        found = operator(name if "::" in name else f"{self.name}::{name}")
        place = Device(device)
        if place in found.kernels:
            raise ValueError(f"{found.name} has a kernel for {place} already; define an operator of your own")
        found.kernels[place] = function


def operator(name: str) -> Operator:
    """The operator of that full name.  Raises ValueError, with the nearest, where there is none."""
    if name not in operators:
        raise ValueError(
            f"there is no operator {name!r}{nearest(name, operators) or '; define it with Library.define'}"
        )
    found: Operator = operators[name]
    return found


def register(name: str | Operator, backward: Backward, *, saves_outputs: bool = False) -> None:
    """Give an operator its gradients: `backward(gradients, saved)` returns one for each argument, None for those without.

    gradients: of the outputs, in order, None where nothing depends on one.  saved: the arguments of the call, in order, and then, where
    saves_outputs, its outputs.  It runs without recording.  Raises ValueError where the operator has gradients already.
    """
    found = name if isinstance(name, Operator) else operator(name)
    if found.backward is not None:
        raise ValueError(f"{found.name} has a backward function already; define an operator of your own")
    found.backward, found.saves_outputs = backward, saves_outputs
