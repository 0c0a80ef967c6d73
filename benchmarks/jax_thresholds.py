"""Whether the Flax example meets Transformer Engine's own thresholds on MNIST, in BF16 and three FP8 recipes.

    python benchmarks/jax_thresholds.py [--epochs 5]

After five epochs, the better of the last two has to show: train loss < 0.06, train accuracy > 0.98, test loss < 0.05, test accuracy > 0.98.
Needs the real MNIST (OCTAVO_DATA, the cache or the network); takes some minutes a run.  Exits with status 1 where a figure is missed.
"""

from __future__ import annotations

import argparse
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rounds import save

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import jax_mnist

RUNS = {
    "BF16": ("--use-te",),
    "delayed": ("--use-fp8", "--fp8-recipe", "DelayedScaling"),
    "current": ("--use-fp8", "--fp8-recipe", "Float8CurrentScaling"),
    "MXFP8": ("--use-fp8", "--fp8-recipe", "MXFP8BlockScaling"),
}
THRESHOLDS = {"train loss": 0.06, "train accuracy": 0.98, "test loss": 0.05, "test accuracy": 0.98}


def best(history: list[list[float]]) -> dict[str, float]:
    """The better of the last two epochs: the smaller loss, the larger accuracy."""
    columns = zip(*history[-2:], strict=True)
    return {name: (min if "loss" in name else max)(column) for name, column in zip(THRESHOLDS, columns, strict=True)}


def met(found: dict[str, float]) -> bool:
    return all(found[name] < bound if "loss" in name else found[name] > bound for name, bound in THRESHOLDS.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="the thresholds are meant for five")
    epochs = parser.parse_args().epochs
    lines = ["  ".join(f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "optax")), ""]
    lines.append(f"MNIST, {epochs} epochs, batch 64, SGD 0.01 with momentum 0.9; the better of the last two epochs")
    lines.append(f"{'':10s}" + "".join(f"{name:>16s}" for name in THRESHOLDS))
    bounds = (f"{'<' if 'loss' in name else '>'} {bound}" for name, bound in THRESHOLDS.items())
    lines.append(f"{'threshold':10s}" + "".join(f"{bound:>16s}" for bound in bounds))
    rows: list[dict[str, Any]] = []
    for name, flags in RUNS.items():
        print(f"{name}:", flush=True)
        arguments = jax_mnist.mnist_parser(["--data", "mnist", "--epochs", str(epochs), *flags])
        history = jax_mnist.train_and_evaluate(arguments)
        found = best(history)
        rows.append({"run": name, "met": met(found), **found, "history": history})
        figures = "".join(f"{found[column]:16.4f}" for column in THRESHOLDS)
        lines.append(f"{name:10s}{figures}  {'met' if met(found) else 'MISSED'}")
    save("jax-thresholds", rows, "\n".join(lines))
    sys.exit(not all(row["met"] for row in rows))


if __name__ == "__main__":
    main()
