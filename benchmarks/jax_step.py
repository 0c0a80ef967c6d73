"""A jitted training step in FP8 beside float32, BF16, Flax's own FP8 operations and qwix, all in turn in one run.

    python benchmarks/jax_step.py [--quick]

Targets against float32: at most 1.10 on 1024-4096-1024 at batch 512, 1.15 on the CNN at batch 64, 1.5 on 784-256-10 at batch 128; and
never slower than Flax's operations.  A step is forward, loss, backward, SGD with momentum; all contenders start from the same numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rounds import interleaved, save

import octavo.jax
from octavo.recipes import NAMED, Recipe, current_scaling, delayed_scaling, mxfp8

TARGETS = {"1024-4096-1024": 1.10, "CNN": 1.15, "784-256-10": 1.50}
OVERWRITTEN = (octavo.jax.FP8_COLLECTION, "_overwrite_with_gradient")
"""Collections whose gradient is their next state: Octavo's and Flax's."""


class Mlp(nn.Module):
    """Dense layers with relu between them."""

    dense: Callable[..., nn.Module]
    sizes: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x.astype(self.dtype)
        for number, size in enumerate(self.sizes):
            x = self.dense(size, dtype=self.dtype, name=f"fc{number + 1}")(x if number == 0 else nn.relu(x))
        return x.astype(jnp.float32)


class Cnn(nn.Module):
    """The network of Transformer Engine's MNIST example, all three dense layers in FP8."""

    dense: Callable[..., nn.Module]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x.astype(self.dtype)
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (3, 3), dtype=self.dtype)(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2)).reshape(x.shape[0], -1)
        for number, size in enumerate((128, 32, 32)):
            x = self.dense(size, dtype=self.dtype, name=f"fc{number + 1}")(x if number != 1 else nn.relu(x))
        return x.astype(jnp.float32)


def workloads() -> dict[str, tuple[Callable[..., nn.Module], Any, Any]]:
    """Network, inputs and labels of each row."""
    keys = jax.random.split(jax.random.key(0), 6)
    return {
        "1024-4096-1024": (
            lambda **settings: Mlp(sizes=(4096, 1024), **settings),
            jax.random.normal(keys[0], (512, 1024)),
            jax.random.randint(keys[1], (512,), 0, 1024),
        ),
        "CNN": (Cnn, jax.random.normal(keys[2], (64, 28, 28, 1)), jax.random.randint(keys[3], (64,), 0, 10)),
        "784-256-10": (
            lambda **settings: Mlp(sizes=(256, 10), **settings),
            jax.random.normal(keys[4], (128, 784)),
            jax.random.randint(keys[5], (128,), 0, 10),
        ),
    }


def stepping(model: nn.Module, x: Any, y: Any, inner: int, recipe: Recipe | None = None) -> Callable[[], None]:
    """`inner` training steps, each one jitted call that is given its state and hands back the next."""
    optimizer = optax.sgd(1e-3, 0.9)

    def loss(variables: Any, x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(variables, x), y).mean()

    # The batch is an argument: of a constant XLA would fold amax and casts.
    def step(variables: Any, moments: Any, x: Any, y: Any) -> tuple[Any, Any]:
        gradients = jax.grad(loss)(variables, x, y)
        updates, moments = optimizer.update(gradients["params"], moments)
        own = {name: gradients[name] for name in OVERWRITTEN if name in gradients}
        return {**variables, **own, "params": optax.apply_updates(variables["params"], updates)}, moments

    jitted = jax.jit(step, donate_argnums=(0, 1))
    with octavo.jax.autocast(enabled=recipe is not None, recipe=recipe):
        variables = jax.jit(model.init)(jax.random.key(1), x)
        state = [(variables, optimizer.init(variables["params"]))]

    def run() -> None:
        with octavo.jax.autocast(enabled=recipe is not None, recipe=recipe):
            for _ in range(inner):
                state[0] = jitted(*state[0], x, y)
            jax.block_until_ready(state[0])

    return run


def with_qwix(model: nn.Module, x: Any) -> nn.Module | None:
    """The model under qwix's FP8 training, or None where it is not installed."""
    try:
        import qwix
    except ImportError:
        print("qwix is not installed (make bench installs it): its rows are left out")
        return None
    rule = qwix.QtRule(
        module_path="fc.*", weight_qtype=jnp.float8_e4m3fn, act_qtype=jnp.float8_e4m3fn, bwd_qtype=jnp.float8_e5m2
    )
    return qwix.quantize_model(model, qwix.QtProvider([rule]))


def contenders(
    name: str, make: Callable[..., nn.Module], x: Any, y: Any, inner: int
) -> Mapping[str, Callable[[], None]]:
    """Each contender's steps."""
    flax = lambda size, **settings: nn.Dense(size, dot_general_cls=nn.Fp8DotGeneral, **settings)  # noqa: E731
    plain, dense = make(dense=nn.Dense), make(dense=octavo.jax.DenseGeneral)
    runs = {
        "float32": stepping(plain, x, y, inner),
        "bfloat16": stepping(make(dense=nn.Dense, dtype=jnp.bfloat16), x, y, inner),
        "flax fp8": stepping(make(dense=flax), x, y, inner),
        "octavo delayed": stepping(dense, x, y, inner, delayed_scaling()),
        "octavo current": stepping(dense, x, y, inner, current_scaling()),
        "octavo mxfp8": stepping(dense, x, y, inner, mxfp8()),
    }
    quantized = with_qwix(plain, x)
    if quantized is not None:
        runs["qwix fp8"] = stepping(quantized, x, y, inner)
    if name == "1024-4096-1024":
        others = (make for make in NAMED.values() if make not in (delayed_scaling, current_scaling, mxfp8))
        runs |= {f"octavo {other.__name__}": stepping(dense, x, y, inner, other()) for other in others}
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing kept")
    arguments = parser.parse_args()
    packages = ("jax", "jaxlib", "flax", "optax", "qwix")
    lines, rows = ["  ".join(f"{name} {metadata.version(name)}" for name in packages if _installed(name)), ""], []
    for name, (make, x, y) in workloads().items():
        inner = 20 if name == "784-256-10" else 1
        seconds = interleaved(contenders(name, make, x, y, inner), rounds=5 if arguments.quick else 15)
        base = seconds["float32"]
        lines.append(f"{name}: {base / inner * 1e3:.3f} ms a step in float32; target of FP8 {TARGETS[name]:.2f}")
        for contender, median in seconds.items():
            rows.append({"workload": name, "contender": contender, "seconds": median / inner, "ratio": median / base})
            lines.append(f"    {contender:45s} {median / inner * 1e3:9.3f} ms  {median / base:5.2f}")
    text = "\n".join(lines)
    if arguments.quick:
        print(text)
    else:
        save("jax-step", rows, text)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
