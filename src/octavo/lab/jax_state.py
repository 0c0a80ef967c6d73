"""What a JAX run keeps from update to update: variables, the optimizer's state and the loss scale, on one device or on several."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import octavo.jax
from octavo.lab.learner import MODEL, OPTIMIZER, Snapshot, check_names
from octavo.lab.sections import OptimizerSection, Parallel

__all__ = ["LossScale", "State", "devices", "placing", "restored", "snapshot"]

PATIENCE = 100
"""Skips in a row after which a fixed loss scale is given up."""
_BUFFERS = ("scale_forward", "scale_backward", "amax_history_forward", "amax_history_backward", "draws")
"""What an 8-bit layer of PyTorch keeps beside its parameters."""
_COUNTS = ("scale", "clean_steps", "skipped", "skipped_in_a_row")


class State(NamedTuple):
    """What an update takes and gives: collections of variables by name, and the state of `optimizers.optax_optimizer`."""

    variables: Any
    optimizer: Any


def devices(replicas: int) -> list[Any]:
    """So many devices of JAX's default platform; a CPU becomes so many, if JAX has not started.

    Raises ValueError where there are fewer.
    """
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not given and replicas > max(1, int(jax.config.values["jax_num_cpu_devices"])):
        with contextlib.suppress(RuntimeError):  # JAX has started: it may have as many all the same
            jax.config.update("jax_num_cpu_devices", replicas)
    found = jax.devices()
    if len(found) < replicas:
        platform = (
            "CPU; start a new process, in which octavo divides it" if found[0].platform == "cpu" else found[0].platform
        )
        raise ValueError(
            f"runconfig.num_replicas {replicas} needs as many devices, and JAX has started with {len(found)} of {platform}, or lower it"
        )
    return list(found[:replicas])


def placing(state: State, mesh: Mesh, axis: str, parallel: Parallel) -> State:
    """Where each array of a state lies: whole on every device, or under fsdp2 its first dimension that they divide split over them.

    Metadata of 8-bit layers is whole everywhere.  Raises ValueError where fsdp2 finds no parameter to split.
    """
    count = mesh.shape[axis]

    def whole(_: Any) -> NamedSharding:
        return NamedSharding(mesh, P())

    def split(array: Any) -> NamedSharding:
        fitting = [place for place, size in enumerate(array.shape) if size % count == 0]
        return NamedSharding(mesh, P(*(None,) * fitting[0], axis) if fitting else P())

    if parallel is Parallel.DDP:
        return State(*jax.tree.map(whole, tuple(state)))
    params = jax.tree.map(split, state.variables["params"])
    if all(place.is_fully_replicated for place in jax.tree.leaves(params)):
        raise ValueError(
            f"parallel: fsdp2 splits parameters over {count} devices, which divide no dimension of any; use ddp, or other widths"
        )
    return State(jax.tree.map(whole, state.variables) | {"params": params}, jax.tree.map(split, state.optimizer))


def snapshot(state: State, scale: LossScale | None) -> Snapshot:
    """`model.fc1.weight`, as PyTorch names it, `optimizer.rule.0.trace.fc1.kernel` and so on, as NumPy arrays; the loss scale as a fact."""
    # Copies: what the next update is given, it may write over.
    tensors = {MODEL + name: np.array(value) for name, value in octavo.jax.to_torch(state.variables).items()}
    tensors |= {name: np.array(value) for name, value in _named(state.optimizer).items()}
    return Snapshot(tensors, {"scaler": None if scale is None else scale.state_dict()})


def _named(optimizer: Any) -> dict[str, Any]:
    """The arrays of an optimizer's state by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(optimizer)
    return {OPTIMIZER + jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in leaves}


def restored(state: State, tensors: Mapping[str, Any], *, eight_bit: Iterable[str], whole: bool) -> State:
    """The state of a snapshot, in new arrays.

    eight_bit: the layers that may bring metadata; whole: with the optimizer's state, which else stays as it is.

    Raises ValueError where the tensors are another network's, or another optimizer's.
    """
    found = {name.removeprefix(MODEL): value for name, value in tensors.items() if name.startswith(MODEL)}
    wanted = octavo.jax.to_torch({"params": state.variables["params"]})
    # Scales and histories may come in another length, or not at all.
    metadata = {f"{layer}.{buffer}" for layer in eight_bit for buffer in _BUFFERS}
    check_names(
        {name: value.shape for name, value in found.items() if name not in metadata},
        {name: value.shape for name, value in wanted.items()},
    )
    variables = octavo.jax.from_torch(found, state.variables)
    if not whole:
        return State(jax.tree.map(_owned, variables), jax.tree.map(_owned, state.optimizer))
    there = {name: value for name, value in tensors.items() if name.startswith(OPTIMIZER)}
    names = _named(state.optimizer)
    check_names(
        {name: value.shape for name, value in there.items()}, {name: value.shape for name, value in names.items()}
    )
    leaves = [jnp.asarray(there[name], value.dtype) for name, value in names.items()]
    optimizer = jax.tree.unflatten(jax.tree.structure(state.optimizer), leaves)
    return State(jax.tree.map(_owned, variables), jax.tree.map(_owned, optimizer))


def _owned(array: Any) -> Any:
    """A copy: an array made of NumPy's may share its memory, which a later update would write over."""
    return jnp.array(array, copy=True)


@dataclass(kw_only=True, slots=True)
class LossScale:
    """The rule of `octavo.torch.LossScaler` for a scale that lives on the host; of which finite gradients are the compiled update's news.

    An overflow halves the scale, down to floor, and the step is skipped; after interval clean steps in a row it doubles, up to ceiling.
    dynamic False: the scale stays, and `PATIENCE` skips in a row are an error.  report: takes one line for each skip.
    """

    value: float
    floor: float
    ceiling: float
    interval: int
    dynamic: bool
    report: Callable[[str], None]
    clean: int = 0
    skipped: int = 0
    in_a_row: int = 0

    @classmethod
    def of(cls, options: OptimizerSection, report: Callable[[str], None]) -> LossScale | None:
        """The loss scale that the optimizer's section asks for; scales are rounded to float32.  Raises ValueError for one beyond it."""
        chosen = options.loss_scaling_factor
        if chosen == 1.0:
            return None
        dynamic = isinstance(chosen, str)
        bounds = options.scale_bounds if isinstance(chosen, str) else (chosen,) * 3
        with np.errstate(over="ignore", under="ignore"):
            floor, first, ceiling = (float(np.float32(one)) for one in bounds)
        if not 0 < floor <= first <= ceiling < math.inf:
            raise ValueError(
                f"loss scales are finite, and 0 < floor <= start <= ceiling; got floor={floor}, start={first}, ceiling={ceiling}"
            )
        return cls(
            value=first,
            floor=floor,
            ceiling=ceiling,
            interval=options.growth_interval,
            dynamic=dynamic,
            report=report,
        )

    def step(self, number: int, *, finite: bool) -> bool:
        """Move the scale after the gradients of step `number`; returns finite, which is whether the step was taken.

        Raises ValueError for an overflow at the floor, and for the last of `PATIENCE` in a row under a fixed scale.
        """
        before = self.value
        if finite:
            self.clean, self.in_a_row = self.clean + 1, 0
            if self.clean == self.interval:
                self.clean, self.value = 0, min(self.value * 2, self.ceiling)
            return True
        self.clean, self.value = 0, max(self.value / 2, self.floor)
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        look = "look for Inf or NaN in the data, the loss and the weights, or lower the learning rate"
        if before <= self.floor and self.in_a_row >= (1 if self.dynamic else PATIENCE):
            where, remedy = f"at loss scale {before:.9g}, which is the floor", look
            if not self.dynamic:
                where = f"{self.in_a_row} steps in a row at the fixed loss scale {before:.9g}"
                remedy = f"take a smaller scale, {look}"
            raise ValueError(f"step {number}: gradient overflow {where}; {remedy}")
        moved = f"{before:.9g} -> {self.value:.9g}" if self.dynamic else f"stays {before:.9g}"
        self.report(f"step {number}: gradient overflow; step skipped, loss scale {moved}")
        return False

    def state_dict(self) -> dict[str, float | int]:
        """Scale and counts, under the names that `octavo.torch.LossScaler` gives them."""
        return dict(zip(_COUNTS, (self.value, self.clean, self.skipped, self.in_a_row), strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.  Raises ValueError, and changes nothing, for other keys and what no run comes to."""
        if set(state) != set(_COUNTS):
            raise ValueError(
                f"a loss scale's state has the keys {', '.join(_COUNTS)}; got {', '.join(map(str, state))}"
            )
        scale, clean, skipped, in_a_row = (state[key] for key in _COUNTS)
        if not isinstance(scale, float) or not self.floor <= scale <= self.ceiling:
            bounds = f"{self.floor:.9g} to {self.ceiling:.9g}"
            raise ValueError(f"scale is a number from {bounds}; got {scale!r}: resume with the settings of that run")
        counts = {
            "clean_steps": (clean, self.interval - 1),
            "skipped": (skipped, 1 << 63),
            "skipped_in_a_row": (in_a_row, skipped),
        }
        for name, (count, most) in counts.items():
            if type(count) is not int or not 0 <= count <= most:
                raise ValueError(
                    f"{name} is a whole number from 0 to {most}; got {count!r}: resume with the settings of that run"
                )
        self.value, self.clean, self.skipped, self.in_a_row = scale, clean, skipped, in_a_row
