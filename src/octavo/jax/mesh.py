"""Meshes: what their axes are for, and that layers fit them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
from jax import Array, lax

from octavo.names import nearest

__all__ = [
    "LOGICAL_AXES",
    "MeshResource",
    "ShardingResource",
    "check_batch",
    "check_mesh",
    "check_mesh_resource",
    "check_parameter",
    "max_over_mesh",
    "summed_like",
    "varying_like",
]


@dataclass(frozen=True, slots=True)
class MeshResource:
    """Which axis of the mesh each kind of parallelism goes along; None where there is none.

    dp_resource: data parallel, along the batch; tp_resource: tensor parallel, along features or heads; fsdp_resource: along which
    parameters, too, are split while they rest.  Amaxes are taken over all of these axes.
    """

    dp_resource: str | None = None
    tp_resource: str | None = None
    fsdp_resource: str | None = None

    def __post_init__(self) -> None:
        for name, axis in self.named():
            if not isinstance(axis, str):
                raise ValueError(f"{name} is the name of a mesh axis, or None; got {axis!r}")
        if self.tp_resource is not None and self.tp_resource in (self.dp_resource, self.fsdp_resource):
            raise ValueError(f"tp_resource={self.tp_resource!r} is the batch's axis, too; give each an axis of its own")

    def named(self) -> list[tuple[str, str]]:
        """(resource, axis) of those that are set."""
        return [(item.name, axis) for item in fields(self) if (axis := getattr(self, item.name)) is not None]

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that are set, each once."""
        return tuple(dict.fromkeys(axis for _, axis in self.named()))

    def rules(self) -> list[tuple[str, str | tuple[str, ...] | None]]:
        """The logical axes of `LOGICAL_AXES` and the mesh axes they go along, for `flax.linen.logical_axis_rules`."""
        batch = tuple(axis for axis in (self.dp_resource, self.fsdp_resource) if axis is not None)
        held: dict[str, Any] = {"batch": batch or None, "fsdp": self.fsdp_resource, "tp": self.tp_resource}
        return [(axis, held.get(kind)) for axis, kind in LOGICAL_AXES.items()]


def ShardingResource(dp_resource: str | None = None, tp_resource: str | None = None) -> MeshResource:
    """`MeshResource` as it was earlier in Transformer Engine."""
    return MeshResource(dp_resource=dp_resource, tp_resource=tp_resource)


LOGICAL_AXES: Mapping[str, str] = {
    "batch": "batch",
    "embed": "fsdp",
    "mlp": "tp",
    "heads": "tp",
    "joined_kv": "tp",
    "vocab": "tp",
    "act": "none",
    "length": "none",
    "kv": "none",
    "stack": "none",
}
"""The logical axes of kernels, biases and activations, and the kind of parallelism each goes along."""


def check_mesh_resource(resource: Any) -> None:
    """Raise ValueError for what is neither a MeshResource nor None, and for one that names an axis which the active mesh has not."""
    if resource is None:
        return
    if not isinstance(resource, MeshResource):
        raise ValueError(f"mesh_resource is an octavo.jax.MeshResource; got {type(resource).__name__}")
    sizes = _sizes()
    for name, axis in resource.named():
        if sizes and axis not in sizes:
            raise ValueError(
                f"{name}={axis!r} is no axis of the mesh, whose axes are {sorted(sizes)}{nearest(axis, sizes)}; name one of them, or "
                "give the mesh that axis"
            )


def _sizes() -> dict[str, int]:
    """The axes of the active mesh (`jax.set_mesh`) and their sizes; empty where there is none."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def _bound() -> tuple[str, ...]:
    """The mesh axes that the code runs inside of, as in `shard_map`."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def check_mesh(layer: str, resource: MeshResource) -> None:
    """Raise ValueError where a layer cannot run on the active mesh: its axes are Explicit, or the code runs inside of some (`shard_map`)
    that resource does not name, over which amaxes would then not be taken."""
    check_mesh_resource(resource)
    if explicit := list(jax.sharding.get_abstract_mesh().explicit_axes):
        raise ValueError(
            f"{layer}: the mesh's axes {explicit} are Explicit, as jax.make_mesh makes them; make it with "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(_sizes())}"
        )
    if unnamed := sorted(set(_bound()) - set(resource.axes)):
        raise ValueError(
            f"{layer} runs inside shard_map over {unnamed}, which mesh_resource does not name; give autocast "
            f"mesh_resource=MeshResource(dp_resource={unnamed[0]!r}) or what the axis is for"
        )


def check_parameter(
    layer: str, name: str, axes: Sequence[str | None], shape: Sequence[int], resource: MeshResource
) -> None:
    """Raise ValueError where a parameter's logical axes are unknown or do not fit its shape, or its shape not the mesh.

    axes: one logical axis for each dimension of shape, or none at all.
    """
    if not axes:
        return
    if len(axes) != len(shape):
        raise ValueError(f"{layer}: {name}_axes name each dimension of {tuple(shape)}; got {tuple(axes)}")
    sizes, rules = _sizes(), dict(resource.rules())
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in rules and axis not in sizes:
            raise ValueError(
                f"{layer}: {name}_axes are logical axes, of {sorted(rules)}; got {axis!r}{nearest(axis, rules)}"
            )
        along = rules.get(axis) if axis is not None else None
        if isinstance(along, str) and along in sizes and along not in _bound() and size % sizes[along]:
            raise ValueError(
                f"{layer}: the axis {axis!r} has {size} elements, which the {sizes[along]} devices along {along!r} do not divide; "
                "choose a multiple, or leave the axis unsharded"
            )


def check_batch(layer: str, batch: int, resource: MeshResource) -> None:
    """Raise ValueError where the mesh's data-parallel devices do not divide the first dimension of an input."""
    sizes, along = _sizes(), dict(resource.rules())["batch"]
    axes = [axis for axis in along or () if axis in sizes and axis not in _bound()]
    devices = math.prod(sizes[axis] for axis in axes)
    if batch % devices:
        raise ValueError(
            f"{layer}: the batch has {batch} elements, which the {devices} devices along {axes} do not divide; choose a multiple"
        )


def max_over_mesh(x: Array, axes: tuple[str, ...]) -> Array:
    """The maximum over those of the mesh's axes that the code runs inside of."""
    bound = tuple(axis for axis in axes if axis in _bound())
    return lax.pmax(x, bound) if bound else x


def varying_like(x: Array, *others: Array) -> Array:
    """x as what varies over the mesh wherever one of the others does: a loop's first value is to vary as its later ones do."""
    if not _bound():
        return x
    own, *theirs = (jax.typeof(array).mat.varying for array in (x, *others))
    extra = tuple(sorted(frozenset().union(*theirs) - own))
    return lax.pcast(x, extra, to="varying") if extra else x


def summed_like(x: Array, like: Any) -> Array:
    """A gradient summed over the mesh axes along which it varies and what it is the gradient of does not."""
    if not _bound():
        return x
    one, other = (jax.typeof(array).mat.varying for array in (x, like))
    extra = tuple(sorted(one - other))
    return lax.psum(x, extra) if extra else x
