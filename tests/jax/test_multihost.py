"""Two processes on one machine, joined by `jax.distributed`: they train as one process does on the whole batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
import flax.linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from octavo.jax import DenseGeneral, MeshResource, autocast, update_collections
from octavo.recipes import delayed_scaling

port, rank, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
assert (jax.device_count(), jax.local_device_count()) == (4, 2)

class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return DenseGeneral(8, name="fc2")(nn.relu(DenseGeneral(32, name="fc1")(x)))

model = Model()
rng = np.random.default_rng(0)
x, y = rng.standard_normal((16, 24)).astype(np.float32), rng.standard_normal((16, 8)).astype(np.float32)
x[12] *= 50  # the largest value is in the second process's half
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
with jax.set_mesh(mesh), autocast(recipe=delayed_scaling(amax_history_len=4), mesh_resource=MeshResource(dp_resource="data")):
    everywhere = NamedSharding(mesh, P())
    variables = jax.jit(model.init, out_shardings=everywhere)(jax.random.key(0), jnp.zeros((4, 24)))
    mine = slice(8 * rank, 8 * rank + 8)
    place = lambda a: jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), a[mine])

    @jax.jit
    def step(v, x, y):
        value, g = jax.value_and_grad(lambda v: jnp.mean((model.apply(v, x) - y) ** 2))(v)
        params = jax.tree.map(lambda p, d: p - 0.05 * d, v["params"], g["params"])
        return update_collections({**g, "params": params}, v), value

    losses = []
    for _ in range(4):
        variables, value = step(variables, place(x), place(y))
        losses.append(float(value))
metas = {f"{layer}.{name}": np.asarray(a) for layer, m in variables["fp8_metas"].items() for name, a in m.items()}
np.savez(f"{path}/{rank}.npz", losses=losses, **metas)

# The same on one device of this process, on the whole batch.
if rank == 0:
    with jax.default_device(jax.local_devices()[0]), autocast(recipe=delayed_scaling(amax_history_len=4)):
        variables, losses = jax.jit(model.init)(jax.random.key(0), jnp.zeros((4, 24))), []
        step = jax.jit(step.__wrapped__)
        for _ in range(4):
            variables, value = step(variables, x, y)
            losses.append(float(value))
    metas = {f"{layer}.{name}": np.asarray(a) for layer, m in variables["fp8_metas"].items() for name, a in m.items()}
    np.savez(f"{path}/alone.npz", losses=losses, **metas)
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)[-4000:]
    first, second, alone = (np.load(tmp_path / f"{name}.npz") for name in (0, 1, "alone"))
    for name in alone.files:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        np.testing.assert_allclose(first[name], alone[name], rtol=1e-5, err_msg=name)
    # Each process saw half of the inputs: their amax is the maximum of both.
    np.testing.assert_array_equal(first["fc1.x_amax_history"], alone["fc1.x_amax_history"])
    assert first["fc1.x_amax_history"].max() > 50
