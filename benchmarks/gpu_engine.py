"""An epoch of the MNIST perceptron on a GPU: PyTorch eager beside the engine by operators, as a replayed graph, and as one kernel.

    python benchmarks/gpu_engine.py [--quick] [--json FILE]

784-256-10, ReLU, batches of 128, SGD with rate 0.1, data on the device; the median epoch of interleaved rounds, and how many kernels a
step launches.  MNIST where OCTAVO_DATA is set, else random numbers of its shape.  Without a CUDA device it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rounds import environment, interleaved
from torch import nn

from octavo import engine
from octavo.engine import Tensor, from_numpy

INPUTS, HIDDEN, CLASSES, BATCH, RATE = 784, 256, 10, 128, 0.1
TARGET = 10.0
"""How many times faster than PyTorch eager's an epoch of the engine is to be."""


def training_data() -> tuple[str, Any, Any]:
    """What it is, images float32 [N, 784] and labels int64 [N]."""
    if "OCTAVO_DATA" in os.environ:
        from octavo.lab.data import Source, load

        found = load(Source.MNIST)
        images = found.train_images.reshape(-1, INPUTS).astype(np.float32) / np.float32(255)
        return found.source, images, found.train_labels.astype(np.int64)
    generator = np.random.default_rng(0)
    return (
        "random numbers of MNIST's shape",
        generator.random((60_000, INPUTS), np.float32),
        generator.integers(0, CLASSES, 60_000),
    )


def start() -> list[Any]:
    """Weights, inputs first, normal as Xavier has them, and zero biases."""
    generator = np.random.default_rng(1)
    weights = []
    for rows, columns in ((INPUTS, HIDDEN), (HIDDEN, CLASSES)):
        spread = np.sqrt(2 / (rows + columns))
        weights += [(generator.standard_normal((rows, columns)) * spread).astype(np.float32)]
        weights += [np.zeros(columns, np.float32)]
    return weights


class Eager:
    """PyTorch as one writes it: modules, autograd, torch.optim.SGD."""

    def __init__(self, images: Any, labels: Any) -> None:
        self.images, self.labels = torch.from_numpy(images).cuda(), torch.from_numpy(labels).cuda()
        self.model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)).cuda()
        with torch.no_grad():
            for have, given in zip(self.model.parameters(), start(), strict=True):
                have.copy_(torch.from_numpy(given).T)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
        self.loss = nn.CrossEntropyLoss()

    def step(self, rows: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(self.model(self.images[rows]), self.labels[rows]).backward()
        self.optimizer.step()

    def epoch(self, order: Any) -> None:
        for rows in torch.from_numpy(order).cuda():
            self.step(rows)

    def launches(self, order: Any) -> float:
        """What a step hands to the driver, as the profiler counts it."""
        rows = torch.from_numpy(order[0]).cuda()
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as seen:
            self.step(rows)
            torch.cuda.synchronize()
        return sum(one.count for one in seen.key_averages() if "LaunchKernel" in one.key)


class Operators:
    """The engine by operators, its gradients by autograd."""

    def __init__(self, images: Any, labels: Any) -> None:
        self.images, self.labels = from_numpy(images).to("cuda"), from_numpy(labels).to("cuda")
        self.weights = [from_numpy(one).to("cuda") for one in start()]
        for one in self.weights:
            one.requires_grad = True

    def step(self, rows: Tensor) -> Tensor:
        w1, b1, w2, b2 = self.weights
        x, labels = engine.take_rows(self.images, rows), engine.take_rows(self.labels, rows)
        loss: Tensor = engine.cross_entropy(engine.linear(engine.linear_relu(x, w1, b1), w2, b2), labels)
        loss.backward()
        with engine.no_grad():
            for one in self.weights:
                engine.sgd_(one, one.grad, None, RATE)
                one.grad = None
        return loss.detach()

    def epoch(self, order: Any) -> None:
        every = from_numpy(order).to("cuda")
        for i in range(len(order)):
            self.step(every[i])

    def launches(self, order: Any) -> float:
        """What a step hands to the driver."""
        from octavo.engine.kernels.cuda_launch import launches

        before = launches()
        self.epoch(order)
        return (launches() - before) / len(order)


class Graphed(Operators):
    """The same step, captured once; a replay follows the copy of its row numbers."""

    def __init__(self, images: Any, labels: Any) -> None:
        from octavo.engine.kernels.cuda_graph import Graph

        super().__init__(images, labels)
        self.rows = engine.zeros((BATCH,), np.int64, device="cuda")
        self.graph = Graph(lambda: self.step(self.rows))
        for one, given in zip(self.weights, start(), strict=True):  # the steps of making it are undone
            engine.copy_(one.detach(), from_numpy(given).to("cuda"))

    def epoch(self, order: Any) -> None:
        every = from_numpy(order).to("cuda")
        for i in range(len(order)):
            engine.copy_(self.rows, every[i])
            self.graph.replay()
        self.graph.check()

    def launches(self, order: Any) -> float:
        return 2  # the copy's kernel, and the graph


class OneKernel(Operators):
    """The whole epoch in one launch, and four small ones about it."""

    def epoch(self, order: Any) -> None:
        from octavo.engine.kernels import cuda_mlp

        weights = tuple(one.detach() for one in self.weights)
        rows = from_numpy(order.reshape(-1)).to("cuda")
        cuda_mlp.train(self.images, self.labels, rows, weights, batch=BATCH, rate=RATE)  # type: ignore[arg-type]


def finished(contender: Any, order: Any) -> Callable[[], None]:
    """An epoch, and a wait for the device."""

    def run() -> None:
        contender.epoch(order)
        torch.cuda.synchronize()

    return run


def compared(images: Any, labels: Any, rounds: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows for the file and lines to print."""
    steps = len(images) // BATCH
    order = np.random.default_rng(2).permutation(len(images))[: steps * BATCH].reshape(steps, BATCH)
    kinds = {
        "torch eager": Eager,
        "engine operators": Operators,
        "engine graph": Graphed,
        "engine one kernel": OneKernel,
    }
    contenders = {name: kind(images, labels) for name, kind in kinds.items()}
    for one in contenders.values():
        one.epoch(order)
    finals = [[weight.detach().numpy() for weight in contenders[name].weights] for name in list(kinds)[1:]]
    same = all(np.array_equal(a, b) for other in finals[1:] for a, b in zip(finals[0], other, strict=True))
    seconds = interleaved({name: finished(one, order) for name, one in contenders.items()}, rounds=rounds)
    lines = [f"{steps} steps, median of {rounds} rounds; the engine's three came to the same weights: {same}", ""]
    lines.append(f"  {'':24}{'s/epoch':>10}{'us/step':>10}{'of eager':>10}{'launches/step':>15}")
    rows = []
    for name, value in seconds.items():
        speedup, launches = seconds["torch eager"] / value, contenders[name].launches(order)
        lines.append(f"  {name:24}{value:10.4f}{value / steps * 1e6:10.1f}{speedup:9.1f}x{launches:15.2f}")
        rows.append(
            {"name": name, "seconds": value, "speedup_over_torch_eager": speedup, "launches_per_step": launches}
        )
    lines.append(f"\n  the graph holds {contenders['engine graph'].graph.launches} kernels")
    best = max(row["speedup_over_torch_eager"] for row in rows)
    lines.append(
        f"  best: {best:.1f}x PyTorch eager's speed; target {TARGET:.0f}x: {'met' if best >= TARGET else 'missed'}"
    )
    return [*rows, {"name": "the same weights", "value": same}], lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, hardware and versions there")
    flags = parser.parse_args()
    if flags.json and not flags.json.resolve().parent.is_dir():
        parser.exit(2, f"gpu_engine.py: --json {flags.json}: there is no such folder; make it first\n")
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing measured")
        return
    source, images, labels = training_data()
    rows, lines = compared(images, labels, 5 if flags.quick else 15)
    device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, triton {metadata.version('triton')}"
    print("\n".join([device, source, "", *lines]))
    if flags.json:
        kept = {"environment": environment(), "device": device, "data": source, "rows": rows}
        flags.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
