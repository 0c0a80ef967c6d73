"""Seconds of training, with the data in memory, until 98 % and 99 % of MNIST's test images are told apart, on two processor cores.

    python benchmarks/speedrun.py [--quick] [--seeds N] [--threads N] [--json FILE]

The engine trains two convolutions and two linear layers by a schedule for each target, whose sizes, length and rates were found on the
training images alone: trained on 50,000, looked at on the other 10,000.  Nothing is chosen by the test images: a run ends where its
schedule ends, and is tested then.  Beside it is PyTorch's script: 784-256-10, batches of 128, SGD at 0.1, tested after each epoch, which
ends at the first that reaches the target, or after 50.

Time is of training: from float32 pixels / 255 in memory to weights, with drawing the first weights and the order of the images, and
writing down the graph of a step.  Tests are not in it, nor is what happens once on a machine: loading libraries, compiling kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rounds import environment, pin_threads, save

from octavo import engine
from octavo.engine import Tensor
from octavo.lab.data import Dataset, Source, load

Floats = npt.NDArray[np.float32]
PEER_EPOCHS, PEER_BATCH, PEER_RATE = 50, 128, 0.1
TESTED = 500
"""Test images at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Convolution:
    """Windows of side x side pixels at every `stride`-th one, `padding` zeros around the image, to so many channels."""

    side: int
    stride: int
    padding: int
    channels: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A network, and how long and how fast it learns: rates rise from a tenth to their peaks over the share `rise` of the steps, then fall
    in a line to 0.

    convolutions: before linear layers to `hidden` and 10.  shift: pixels by which images are moved at most, at random, up or down and to
    a side.  spectral_rate: of all matrices but the last, whose updates are orthogonalized; rate: of the last and of biases, by Nesterov's
    momentum.
    """

    target: float
    epochs: float
    convolutions: tuple[Convolution, ...]
    hidden: int = 64
    shift: int = 0
    batch: int = 64
    spectral_rate: float = 0.03
    rate: float = 0.1
    momentum: float = 0.9
    rise: float = 0.25


CLASSES = 10
LAST = Convolution(side=3, stride=2, padding=1, channels=32)
SCHEDULES = (
    Schedule(target=0.98, epochs=0.6, convolutions=(Convolution(side=5, stride=3, padding=1, channels=16), LAST)),
    Schedule(
        target=0.99, epochs=1.5, shift=1, convolutions=(Convolution(side=5, stride=2, padding=2, channels=32), LAST)
    ),
)
GAIN = 0.4
"""Of the first weights, over He's: updates of a fixed size soon outgrow them."""
QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b, c of a step X <- aX + b(XX')X + c(XX')(XX')X towards the nearest orthogonal matrix, of which Jordan (2024) takes five."""
ITERATIONS = 4


class Network:
    """Convolutions, then two linear layers; images [N, H, W, 1] -> logits [N, 10]."""

    def __init__(self, schedule: Schedule, side: int, draws: np.random.Generator) -> None:
        self._convolutions, hidden = schedule.convolutions, schedule.hidden
        sizes, channels = [], 1
        for one in self._convolutions:
            sizes.append((one.side**2 * channels, one.channels))
            side, channels = (side + 2 * one.padding - one.side) // one.stride + 1, one.channels
        sizes += [(side**2 * channels, hidden), (hidden, CLASSES)]
        scales = [GAIN * (2 / inputs) ** 0.5 for inputs, _ in sizes[:-1]] + [0.1 * hidden**-0.5]
        self.weights = [
            engine.from_numpy(draws.standard_normal(size, np.float32) * np.float32(scale), requires_grad=True)
            for size, scale in zip(sizes, scales, strict=True)
        ]
        self.biases = [engine.from_numpy(np.zeros(outputs, np.float32), requires_grad=True) for _, outputs in sizes]

    def __call__(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        for one, weight, bias in zip(self._convolutions, self.weights, self.biases, strict=False):
            side = (x.shape[1] + 2 * one.padding - one.side) // one.stride + 1
            columns = engine.patches(x, one.side, one.stride, one.padding)
            x = engine.linear_relu(columns, weight, bias).reshape(count, side, side, one.channels)
        x = engine.linear_relu(x.reshape(count, -1), self.weights[-2], self.biases[-2])
        logits: Tensor = engine.linear(x, self.weights[-1], self.biases[-1])
        return logits


class Optimizer:
    """Momentum, orthogonalized (Muon, Jordan 2024) for matrices that are not the last."""

    def __init__(self, network: Network, schedule: Schedule) -> None:
        self._schedule, self._spectral = schedule, network.weights[:-1]
        self._plain = [network.weights[-1], *network.biases]
        self._velocities = {id(one): engine.zeros(one.shape) for one in [*self._spectral, *self._plain]}
        sizes = {min(one.shape) for one in self._spectral}
        self._identities = {n: engine.from_numpy(QUINTIC[0] * np.eye(n, dtype=np.float32)) for n in sizes}

    def update(self, share: Tensor) -> None:
        """A step by the gradients, which it forgets; share: of the peak rates, one float32."""
        chosen = self._schedule
        with engine.no_grad():
            rate, spectral_rate = share * chosen.rate, share * chosen.spectral_rate
            for one in self._spectral:
                engine.sgd_(one, self._orthogonal(one), None, spectral_rate)
            for one in self._plain:
                engine.sgd_(one, one.grad, self._velocities[id(one)], rate, chosen.momentum, nesterov=True)
        for one in [*self._spectral, *self._plain]:
            one.grad = None

    def _orthogonal(self, weight: Tensor) -> Tensor:
        """What the velocity and the gradient come to, its singular values near 1."""
        x, momentum = engine.zeros(weight.shape), self._schedule.momentum
        engine.sgd_(x, weight.grad, self._velocities[id(weight)], -1.0, momentum, nesterov=True)
        x = engine.unit(x)
        wide = x.shape[0] < x.shape[1]
        # All steps are polynomials of this small matrix, so they are taken in it and meet x at the end.
        gram = x @ x.T if wide else x.T @ x
        total: Tensor | None = None
        for i in range(ITERATIONS):
            step = gram * QUINTIC[1] + self._identities[gram.shape[0]]
            engine.add_matmul_(step, gram, gram, QUINTIC[2])
            total = step if total is None else total @ step
            if i < ITERATIONS - 1:
                gram = step @ gram @ step
        assert total is not None
        return total @ x if wide else x @ total


def shares(steps: int, rise: float) -> Floats:
    """[steps, 1]: of the peak rate, at each step."""
    place = np.arange(steps) / max(1, steps)
    return np.minimum(0.1 + 0.9 * place / rise, (1 - place) / (1 - rise)).astype(np.float32)[:, None]


def order(count: int, steps: int, batch: int, draws: np.random.Generator) -> npt.NDArray[np.int64]:
    """[steps, batch]: numbers of images, each once before any comes again."""
    turns = -(-steps * batch // count)
    return np.concatenate([draws.permutation(count) for _ in range(turns)])[: steps * batch].reshape(steps, batch)


def starts(
    rows: npt.NDArray[np.int64], shift: int, shape: tuple[int, ...], draws: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Where images of shape [count, H, W, 1] begin in memory, moved by up to `shift` pixels.

    What a shift pushes out comes in on the other side, a line on: the border of a digit's image is empty.
    """
    size, width = shape[1] * shape[2], shape[2]
    found = rows * size
    if shift:
        found += draws.integers(-shift, shift + 1, rows.shape) * width + draws.integers(-shift, shift + 1, rows.shape)
    return np.clip(found, 0, (shape[0] - 1) * size)


def train(images: Floats, labels: npt.NDArray[np.int64], schedule: Schedule, seed: int) -> tuple[float, Network]:
    """(seconds, what was trained) on images [N, H, W, 1]."""
    start = time.perf_counter()
    draws = np.random.default_rng(seed)
    x, y = engine.from_numpy(images), engine.from_numpy(labels)
    network = Network(schedule, images.shape[1], draws)
    optimizer = Optimizer(network, schedule)

    def step(rows: Tensor, begins: Tensor, share: Tensor) -> Tensor:
        batch = engine.take_runs(x, begins, images[0].size).reshape(schedule.batch, *images.shape[1:])
        loss: Tensor = engine.cross_entropy(network(batch), engine.take_rows(y, rows))
        loss.backward()
        optimizer.update(share)
        return loss

    steps = max(1, int(schedule.epochs * len(labels) / schedule.batch))
    numbers = engine.empty((schedule.batch,), np.int64)
    graph = engine.capture(step, numbers, numbers, engine.empty((1,)))
    rows = order(len(labels), steps, schedule.batch, draws)
    graph.run(rows, starts(rows, schedule.shift, images.shape, draws), shares(steps, schedule.rise))
    return time.perf_counter() - start, network


def accuracy(network: Callable[[Tensor], Tensor], images: Floats, labels: npt.NDArray[Any]) -> float:
    """The share of images that it tells."""
    right = 0
    with engine.no_grad():
        for i in range(0, len(labels), TESTED):
            found = engine.argmax(network(engine.from_numpy(images[i : i + TESTED]))).numpy()
            right += int((found == labels[i : i + TESTED]).sum())
    return right / len(labels)


def raced(data: Dataset, seeds: int, share: float) -> list[dict[str, Any]]:
    """A row for each schedule and seed; share: of each schedule that is run."""
    images, tests = (one[..., None].astype(np.float32) / 255 for one in (data.train_images, data.test_images))
    labels = data.train_labels.astype(np.int64)
    rows = []
    for schedule in SCHEDULES:
        shorter = replace(schedule, epochs=schedule.epochs * share)
        train(images[: schedule.batch], labels[: schedule.batch], shorter, 0)  # warms up
        for seed in range(seeds):
            seconds, network = train(images, labels, shorter, seed)
            start = time.perf_counter()
            reached = accuracy(network, tests, data.test_labels)
            rows.append(
                {
                    "contender": "engine",
                    "target": schedule.target,
                    "seed": seed,
                    "seconds": seconds,
                    "test_seconds": time.perf_counter() - start,
                    "accuracy": reached,
                    "epochs": shorter.epochs,
                    "reached": reached >= schedule.target,
                }
            )
    return rows


def peer(data: Dataset, seed: int, epochs: int) -> list[dict[str, Any]]:
    """PyTorch's script: a row for each target, at the first epoch that reaches it, else at the last."""
    import torch
    from torch.nn import functional

    torch.manual_seed(seed)
    x, tests = (
        torch.from_numpy(one).reshape(len(one), -1).float() / 255 for one in (data.train_images, data.test_images)
    )
    y, labels = (torch.from_numpy(one).long() for one in (data.train_labels, data.test_labels))
    model = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 256), torch.nn.ReLU(), torch.nn.Linear(256, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=PEER_RATE)
    seconds, tested, rows = 0.0, 0.0, []
    waiting = [one.target for one in SCHEDULES]
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        for rows_of in torch.randperm(len(y))[: len(y) // PEER_BATCH * PEER_BATCH].reshape(-1, PEER_BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows_of]), y[rows_of]).backward()
            optimizer.step()
        seconds += time.perf_counter() - start
        start = time.perf_counter()
        with torch.no_grad():
            reached = float((model(tests).argmax(1) == labels).float().mean())
        tested += time.perf_counter() - start
        met = [target for target in waiting if reached >= target]
        for target in met if epoch < epochs else waiting:
            found = {"seed": seed, "seconds": seconds, "test_seconds": tested, "accuracy": reached, "epochs": epoch}
            rows.append({"contender": "PyTorch", "target": target, **found, "reached": target in met})
        waiting = [target for target in waiting if target not in met]
        if not waiting:
            break
    return rows


def told(rows: list[dict[str, Any]]) -> str:
    """The table: medians over seeds, and each seed's accuracy."""
    lines = [f"{'':10}{'target':>8}{'seconds':>10}{'epochs':>8}{'reached by':>12}   accuracy of each seed"]
    for target in (one.target for one in SCHEDULES):
        for name in dict.fromkeys(row["contender"] for row in rows):
            own = [row for row in rows if (row["contender"], row["target"]) == (name, target)]
            seconds, epochs = (statistics.median(row[key] for row in own) for key in ("seconds", "epochs"))
            met = sum(row["reached"] for row in own)
            accuracies = " ".join(f"{row['accuracy']:.2%}" for row in own)
            time_ = f"{seconds:10.3f}" if met else f"{'not':>10}"
            lines.append(f"{name:10}{target:8.0%}{time_}{epochs:8.2f}{f'{met} of {len(own)}':>12}   {accuracies}")
    tested = statistics.median(row["test_seconds"] for row in rows if row["contender"] == "engine")
    lines += [
        "",
        f"A test of the engine's takes {tested:.3f} s, which is not counted.  not: no seed reached the target.",
    ]
    return "\n".join(lines)


def described() -> str:
    """The network and the schedules."""
    lines = []
    for one in SCHEDULES:
        layers = ", ".join(f"{each.side}x{each.side}/{each.stride} to {each.channels}" for each in one.convolutions)
        lines += [
            f"for {one.target:.0%}: convolutions {layers}, linear to {one.hidden} and {CLASSES}, ReLU between, float32;",
            f"    {one.epochs:g} epochs in batches of {one.batch}, Muon {one.spectral_rate} and SGD {one.rate}, momentum {one.momentum}, "
            f"rates rise over {one.rise:.0%} of the steps and fall to 0, images shifted by up to {one.shift}",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed, a tenth of each schedule, two epochs of PyTorch; nothing is kept",
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each schedule (default 5)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, hardware and versions there")
    flags = parser.parse_args()
    if flags.seeds < 1 or flags.threads < 1:
        parser.exit(2, f"speedrun.py: --seeds and --threads are 1 or more; got {flags.seeds} and {flags.threads}\n")
    if flags.json and not flags.json.resolve().parent.is_dir():
        parser.exit(2, f"speedrun.py: --json {flags.json}: there is no such folder; make it first\n")
    pin_threads(flags.threads)
    data, seeds = load(Source.AUTO), 1 if flags.quick else flags.seeds
    rows = raced(data, seeds, 0.1 if flags.quick else 1.0)
    for seed in range(seeds):
        rows += peer(data, seed, 2 if flags.quick else PEER_EPOCHS)
    source = f"data: {data.name}, {len(data.train_labels):,} images; {flags.threads} threads; medians of {seeds} seeds"
    text = "\n".join([source, described(), "", told(rows)])
    if flags.quick:
        print(text)
    else:
        save("speedrun", rows, text)
    if flags.json:
        kept = {"quick": flags.quick, "threads": flags.threads, "rows": rows, "environment": environment()}
        flags.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
