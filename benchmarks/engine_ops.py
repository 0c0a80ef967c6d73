"""Each kernel of a training step of 784-256-10: shapes, bytes, FLOPs, the time a roofline allows and the time measured, as Markdown.

    python benchmarks/engine_ops.py [--quick] [--write]

The tables of docs/engine_ops.md, which --write renews.  A kernel's time is that of a graph of this kernel alone, run many times with
nothing of Python between; its tensors stay in the caches, except the images, which the batch is gathered from.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rounds import environment, pin_threads

from octavo import engine
from octavo.engine.capture import Graph
from octavo.engine.kernels.launch import Recorder, recorder
from octavo.engine.storage import Pool, using
from octavo.lab.models import ModelName, initial_weights

ROOT = Path(__file__).parents[1]
EXAMPLES, PAGE = ROOT / "examples" / "engine_mnist", ROOT / "docs" / "engine_ops.md"
BATCH, INPUTS, HIDDEN, CLASSES = 128, 784, 256, 10
IMAGES = 60_000
ROUNDS = 7


class Row(NamedTuple):
    """A kernel by name, what it computes, and what that costs; far: whether it reads what no cache holds."""

    kernel: str
    what: str
    shapes: str
    flops: int
    bytes: int
    far: bool = False


def gemm(what: str, m: int, k: int, n: int, *, also: int = 0) -> Row:
    """[m, k] @ [k, n]; also: float32 numbers read besides the operands."""
    return Row("gemm", what, f"[{m}, {k}] @ [{k}, {n}]", 2 * m * k * n, 4 * (m * k + k * n + m * n + also))


def over(kernel: str, what: str, *shape: int, tensors: int, flops: int = 1) -> Row:
    """Once over a tensor, and as many others of its shape as are read and written; flops: of an element."""
    size = int(np.prod(shape))
    return Row(kernel, what, str(list(shape)), flops * size, 4 * tensors * size)


def sums(what: str, columns: int) -> Row:
    return Row("column_sums", what, f"[{BATCH}, {columns}]", BATCH * columns, 4 * (BATCH + 1) * columns)


B, I, H, O = BATCH, INPUTS, HIDDEN, CLASSES  # noqa: E741
PARAMETERS = ((I, H), (H,), (H, O), (O,))
GATHER = [
    Row("take_rows", "x = images[rows]", f"{[B, I]} of {[IMAGES, I]}", 0, 8 * B * I + 8 * B, far=True),
    Row("take_rows", "y = labels[rows]", f"{[B]} of {[IMAGES]}", 0, 24 * B),
]
UPDATES = [over("sgd", "parameter -= rate * its gradient", *shape, tensors=3, flops=2) for shape in PARAMETERS]
FOUND = Row("arg_max", "the class found", f"{[B, O]}", B * O, 4 * B * O + 8 * B)
LOSS = over("cross_entropy", "the loss", B, O, tensors=1, flops=4)
LOSS_GRADIENT = [
    Row("fill", "the gradient of the loss, 1", "[]", 0, 4),
    over("cross_entropy", "grad_logits", B, O, tensors=2, flops=5),
]
FORWARD_1, FORWARD_2 = gemm("x @ w1 + b1", B, I, H, also=H), gemm("hidden @ w2 + b2", B, H, O, also=O)
RELU = over("relu", "hidden = relu of it", B, H, tensors=2)
BACKWARD_2 = [gemm("grad_hidden = grad_logits @ w2.T", B, O, H), gemm("grad_w2 = hidden.T @ grad_logits", H, B, O)]
MASK = over("relu_gradient", "grad_hidden, 0 where ReLU was", B, H, tensors=3)
BACKWARD_1 = gemm("grad_w1 = x.T @ grad_hidden", I, B, H)


def cast(what: str, *shape: int) -> Row:
    """To E4M3 or E5M2 and back, and the amax, in one pass."""
    return over("cast", f"{what}, in 8 bits, and its amax", *shape, tensors=2, flops=3)


ROLL = [
    Row("roll_history", "amaxes into a layer's history, its next scales", f"[1024, {n}]", 1024 * n, 8 * 1024 * n)
    for n in (3, 2, 3, 2)
]
STEPS: dict[str, tuple[str, dict[str, Any], list[Row]]] = {
    "By hand": (
        "train_manual",
        {},
        [
            *GATHER,
            gemm("hidden = relu(x @ w1 + b1)", B, I, H, also=H),
            FORWARD_2,
            over("cross_entropy", "the loss and grad_logits", B, O, tensors=2, flops=5),
            gemm("grad_hidden = grad_logits @ w2.T, 0 where ReLU was", B, O, H, also=B * H),
            gemm("w2 -= rate * hidden.T @ grad_logits", H, B, O, also=H * O),
            sums("grad_b2", O),
            UPDATES[3],
            gemm("w1 -= rate * x.T @ grad_hidden", I, B, H, also=I * H),
            sums("grad_b1", H),
            UPDATES[1],
            FOUND,
        ],
    ),
    "By autograd": (
        "train_autograd",
        {"recipe": None},
        [
            *GATHER, FORWARD_1, RELU, FORWARD_2, LOSS, *LOSS_GRADIENT, *BACKWARD_2, sums("grad_b2", O), MASK, BACKWARD_1,
            sums("grad_b1", H), *UPDATES, FOUND,
        ],
    ),
    "In FP8, delayed scaling": (
        "train_autograd",
        {"recipe": "delayed_scaling"},
        [
            *GATHER, cast("x", B, I), cast("w1", I, H), FORWARD_1, RELU, cast("hidden", B, H), cast("w2", H, O), FORWARD_2,
            LOSS, *LOSS_GRADIENT, sums("grad_b2", O), cast("grad_logits", B, O), *BACKWARD_2, MASK, sums("grad_b1", H),
            cast("grad_hidden", B, H), BACKWARD_1, *ROLL, *UPDATES, FOUND,
        ],
    ),
}  # fmt: skip
"""Heading -> the script, its flags, and its kernels in order."""


def seconds_of(run: Callable[[int], object], *, rounds: int) -> float:
    """Of one of `times` repetitions that run(times) makes: the median over rounds of some ten milliseconds."""
    start = time.perf_counter()
    run(20)
    times = max(20, round(20 * 0.01 / (time.perf_counter() - start)))
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run(times)
        found.append((time.perf_counter() - start) / times)
    return statistics.median(found)


def written_down(step: Callable[[Any], object]) -> tuple[Recorder, Pool, engine.Tensor]:
    """The kernels of a step of int64 [batch] row numbers, the memory that they work in, and the slot for the row numbers."""
    own, recording = Pool(engine.Device.CPU), Recorder()
    with using(own):
        slot = engine.empty((BATCH,), np.int64)
        token = recorder.set(recording)
        try:
            step(slot)
        finally:
            recorder.reset(token)
    return recording, own, slot


def measured(script: str, flags: dict[str, Any], rounds: int) -> tuple[list[str], list[float], float, float]:
    """(names, seconds) of the kernels of a step, and the seconds of all in one graph and of the step called from Python."""
    draws = np.random.default_rng(0)
    images, labels = draws.random((IMAGES, INPUTS), np.float32), draws.integers(0, CLASSES, IMAGES)
    wrapped = engine.from_numpy(images), engine.from_numpy(labels)
    module: Any = importlib.import_module(script)
    weights = initial_weights(ModelName.MLP, 1)
    model = module.Mlp(weights, *(flags["recipe"] and module.get_recipe(flags["recipe"]) for _ in flags))

    def step(rows: Any) -> object:
        return model.step(engine.take_rows(wrapped[0], rows), engine.take_rows(wrapped[1], rows), 0.001)

    recording, own, slot = written_down(step)
    order = draws.integers(0, IMAGES, (4096, BATCH))

    def graph_of(calls: slice) -> Callable[[int], object]:
        part = Recorder()
        part.calls, part.names, part.memory = recording.calls[calls], recording.names[calls], recording.memory
        graph = Graph(part, own, (slot,), (), False)
        return lambda times: graph.run(np.resize(order, (times, BATCH)))

    whole = seconds_of(graph_of(slice(None)), rounds=rounds)  # before the parts, which work on what it leaves
    parts = [seconds_of(graph_of(slice(i, i + 1)), rounds=rounds) for i in range(len(recording.calls))]
    args = argparse.Namespace(lr=0.001, batch_size=BATCH, graph=False, **flags)
    run = module.prepare(weights, *wrapped, args)[1]
    called = seconds_of(lambda times: run(np.resize(order, (times, BATCH))), rounds=rounds)
    return recording.names, parts, whole, called


def peaks(rounds: int) -> tuple[float, float, float]:
    """What this machine does at best: FLOP/s of a float32 product, bytes/s through the caches, bytes/s through memory."""

    def rate(work: float, run: Callable[[], object]) -> float:
        recording, own, slot = written_down(lambda rows: run())
        graph = Graph(recording, own, (slot,), (), False)
        repeat = lambda times: graph.run(np.zeros((times, BATCH), np.int64))  # noqa: E731
        return work / min(seconds_of(repeat, rounds=1) for _ in range(rounds))

    a, b = (engine.full((1024, 1024), 0.5) for _ in range(2))
    near, far = engine.zeros((1 << 17,)), engine.zeros((1 << 24,))
    flops = rate(2 * 1024**3, lambda: engine.matmul(a, b))
    return flops, rate(8 * near.size, lambda: engine.relu(near)), rate(8 * far.size, lambda: engine.relu(far))


def table(rows: list[Row], names: list[str], seconds: list[float], rates: tuple[float, float, float]) -> list[str]:
    """Lines of Markdown.  Raises ValueError where the step has other kernels than the rows say."""
    if [row.kernel for row in rows] != names:
        raise ValueError(f"the step's kernels are {', '.join(names)}; correct the rows of this script")
    flops, near, far = rates
    lines = [
        "| kernel | computes | shapes | bytes | FLOPs | roofline, us | measured, us |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, spent in zip(rows, seconds, strict=True):
        least = max(row.flops / flops, row.bytes / (far if row.far else near))
        cells = f"{row.bytes:,} | {row.flops:,} | {least * 1e6:.2f} | {spent * 1e6:.1f}"
        lines.append(f"| {row.kernel} | {row.what} | {row.shapes} | {cells} |")
    least = sum(max(row.flops / flops, row.bytes / (far if row.far else near)) for row in rows)
    cells = f"{sum(row.bytes for row in rows):,} | {sum(row.flops for row in rows):,} | {least * 1e6:.0f} | {sum(seconds) * 1e6:.0f}"
    return [*lines, f"| **{len(rows)} kernels** | | | {cells} |"]


def report(threads: int, rounds: int) -> str:
    """What the machine does at best, and a table for each way to write the step."""
    where, (flops, near, far) = environment(), peaks(rounds)
    lines = [
        f"{where['hardware']} ({' '.join(where['units'])}), {threads} threads, {where['date'].split()[0]}: float32 products reach",
        f"{flops / 1e9:.0f} GFLOP/s, reading and writing {near / 1e9:.0f} GB/s in the caches and {far / 1e9:.0f} GB/s in memory.",
    ]
    for heading, (script, options, rows) in STEPS.items():
        names, seconds, whole, called = measured(script, options, rounds)
        lines += ["", f"### {heading}", "", *table(rows, names, seconds, (flops, near, far))]
        lines += [
            "",
            f"The whole step takes {whole * 1e6:.0f} us as a graph, {called * 1e6:.0f} us called from Python.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/engine_ops.md too")
    parser.add_argument("--threads", type=int, default=2)
    flags = parser.parse_args()
    pin_threads(flags.threads)
    sys.path.insert(0, str(EXAMPLES))
    text = report(flags.threads, 1 if flags.quick else ROUNDS)
    print(text)
    if flags.write:
        before, start, rest = PAGE.read_text(encoding="utf-8").partition("<!-- tables -->\n")
        _, end, after = rest.partition("<!-- end of tables -->\n")
        PAGE.write_text(f"{before}{start}{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
