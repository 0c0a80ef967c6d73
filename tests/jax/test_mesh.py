"""Meshes of eight simulated devices: every way of sharding equals the single-device run, and what does not fit is refused."""

import os
import subprocess
import sys

import pytest

HEAD = """
import functools
import jax, jax.numpy as jnp, numpy as np, flax.linen as nn
from jax.sharding import NamedSharding, PartitionSpec as P
from octavo.jax import *
from octavo.recipes import delayed_scaling, current_scaling, mxfp8, rowwise

class Model(nn.Module):
    column: tuple
    row: tuple
    @nn.compact
    def __call__(self, x):
        x = nn.relu(DenseGeneral(64, kernel_axes=self.column, name="fc1")(x))
        return DenseGeneral(16, kernel_axes=self.row, name="fc2")(x)

x = jax.random.normal(jax.random.key(0), (32, 48))
y = jax.random.normal(jax.random.key(2), (32, 16))

def train(model, variables, x, y, steps=4):
    def loss(v, x, y):
        return jnp.mean((model.apply(v, x) - y) ** 2)
    @jax.jit
    def step(v, x, y):
        value, g = jax.value_and_grad(loss)(v, x, y)
        params = jax.tree.map(lambda p, d: p - 0.1 * d, v["params"], g["params"])
        return update_collections({**g, "params": params}, v), value
    losses = []
    for _ in range(steps):
        variables, value = step(variables, x, y)
        losses.append(float(value))
    return variables, losses
"""

SHARDED = (
    HEAD
    + """
plain = Model((), ())
layouts = {
    "data": (MeshResource(dp_resource="d"), (8,), ("d",)),
    "tensor": (MeshResource(tp_resource="t"), (8,), ("t",)),
    "fsdp": (MeshResource(fsdp_resource="f"), (8,), ("f",)),
    "all": (MeshResource(dp_resource="d", tp_resource="t", fsdp_resource="f"), (2, 2, 2), ("d", "t", "f")),
}
for recipe in (delayed_scaling(amax_history_len=4), current_scaling(), mxfp8()):
    with autocast(recipe=recipe):
        start = jax.jit(plain.init)(jax.random.key(1), x)
        start = {"fp8_metas": start.get("fp8_metas", {}), "params": start["params"]}
        wanted, losses = train(plain, start, x, y)
    for name, (resource, shape, axes) in layouts.items():
        if recipe.delayed is None and name != "all":
            continue  # each kind of sharding by itself once
        mesh = jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
        model = Model(("embed", "mlp"), ("mlp", "embed"))
        with jax.set_mesh(mesh), autocast(recipe=recipe, mesh_resource=resource):
            shapes = jax.eval_shape(model.init, jax.random.key(1), x)
            specs = nn.logical_to_mesh_sharding(nn.get_partition_spec(shapes), mesh, resource.rules())
            variables = {k: jax.tree.map(jax.device_put, start[k], specs[k]) if start[k] else {} for k in start}
            batch = tuple(a for a in (resource.dp_resource, resource.fsdp_resource) if a) or None
            place = functools.partial(jax.device_put, device=NamedSharding(mesh, P(batch)))
            kernel = variables["params"]["fc1"]["kernel"].sharding.spec
            assert kernel == P(resource.fsdp_resource, resource.tp_resource), kernel
            found, mine = train(model, variables, place(x), place(y))
        np.testing.assert_allclose(mine, losses, rtol=1e-5, err_msg=name)
        for layer, metas in wanted["fp8_metas"].items():
            for key, value in metas.items():
                np.testing.assert_allclose(found["fp8_metas"][layer][key], value, rtol=2e-5, err_msg=f"{name} {layer} {key}")
        # Before rounding differs anywhere, in the first step, the states are the same to the bit.
        if name == "data":
            with jax.set_mesh(mesh), autocast(recipe=recipe, mesh_resource=resource):
                once = train(model, variables, place(x), place(y), 1)[0]["fp8_metas"]
            with autocast(recipe=recipe):
                one = train(plain, start, x, y, 1)[0]["fp8_metas"]
            for layer in one:
                for key in ("x_scale", "kernel_scale"):
                    if layer == "fc1":
                        np.testing.assert_array_equal(once[layer][key], one[layer][key])
"""
)

MANUAL = (
    HEAD
    + """
model = Model((), ())
mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
def loss(v, x, y, share=1):
    return jnp.mean((model.apply(v, x) - y) ** 2) * share
for recipe in (delayed_scaling(), current_scaling(), rowwise()):
    with jax.set_mesh(mesh), autocast(recipe=recipe, mesh_resource=MeshResource(dp_resource="d")):
        v = jax.jit(model.init)(jax.random.key(1), x)
        @jax.shard_map(mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P())
        def step(v, x, y):
            value, g = jax.value_and_grad(loss)(v, x, y, 1 / 8)
            return jax.lax.psum(value, "d"), g
        value, g = jax.jit(step)(v, x, y)
    with autocast(recipe=recipe):
        wanted, h = jax.jit(jax.value_and_grad(loss))(v, x, y)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), g, h)
"""
)

REFUSED = (
    HEAD
    + """
def refused(text, f):
    try:
        f()
    except ValueError as error:
        assert text in str(error), error
    else:
        raise AssertionError(text)

mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
with jax.set_mesh(mesh):
    refused("dp_resource='date' is no axis of the mesh, whose axes are ['data', 'model']; did you mean 'data'?",
            lambda: autocast(mesh_resource=MeshResource(dp_resource="date")))
    with autocast(mesh_resource=ShardingResource("data", "model")):
        odd = DenseGeneral(30, kernel_axes=("embed", "mlp"), name="fc1")
        refused("the axis 'mlp' has 30 elements, which the 4 devices along 'model' do not divide", lambda: odd.init(jax.random.key(0), x))
        refused("kernel_axes name each dimension of (48, 30); got ('mlp',)",
                lambda: DenseGeneral(30, kernel_axes=("mlp",)).init(jax.random.key(0), x))
        refused("the axis 'mlp' has 30 elements", lambda: DenseGeneral(30, bias_axes=("mlp",)).init(jax.random.key(0), x))
        refused("got 'mpl'; did you mean 'mlp'?",
                lambda: DenseGeneral(32, kernel_axes=("embed", "mpl")).init(jax.random.key(0), x))
        transposed = DenseGeneral(32, axis=0)  # contracts the first axis, which then is no batch
        transposed.apply(transposed.init(jax.random.key(0), x[:31]), x[:31])
        rows = DenseGeneral(4)
        jax.vmap(lambda row: rows.apply(rows.init(jax.random.key(0), row), row))(jnp.ones((8, 5, 16)))
        refused("the batch has 31 elements, which the 2 devices along ['data'] do not divide",
                lambda: DenseGeneral(32).init(jax.random.key(0), x[:31]))
late = autocast(mesh_resource=MeshResource(dp_resource="date"))
with jax.set_mesh(mesh):
    refused("dp_resource='date' is no axis of the mesh", late.__enter__)
refused("tp_resource='model' is the batch's axis, too", lambda: MeshResource(dp_resource="model", tp_resource="model"))
with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))), autocast():
    refused("fc1: the mesh's axes ['data'] are Explicit, as jax.make_mesh makes them; make it with axis_types=",
            lambda: Model((), ()).init(jax.random.key(0), x))
with jax.set_mesh(mesh), autocast():
    v = jax.jit(Model((), ()).init)(jax.random.key(1), x)
    inside = jax.shard_map(lambda v, x: Model((), ()).apply(v, x), in_specs=(P(), P("data")), out_specs=P("data"))
    refused("fc1 runs inside shard_map over ['data', 'model'], which mesh_resource does not name; give autocast", lambda: inside(v, x))
"""
)

NNX = (
    HEAD
    + """
from flax import nnx
import octavo.jax.nnx as on
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
def make():
    return on.DenseGeneral(48, 16, kernel_axes=("embed", "mlp"), bias_axes=("mlp",), rngs=nnx.Rngs(0))
with autocast():
    wanted = make()(x)
with jax.set_mesh(mesh), autocast(mesh_resource=MeshResource(dp_resource="data", tp_resource="model")):
    @nnx.jit
    def sharded():
        layer = make()
        state = nnx.state(layer)
        nnx.update(layer, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
        return layer
    layer = sharded()
    assert layer.kernel[...].sharding.spec == P(None, "model"), layer.kernel[...].sharding
    np.testing.assert_allclose(layer(x), wanted, rtol=1e-5, atol=1e-6)
"""
)


@pytest.mark.parametrize("program", [SHARDED, MANUAL, REFUSED, NNX], ids=["sharded", "shard_map", "refused", "nnx"])
def test_on_eight_devices(program: str) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
