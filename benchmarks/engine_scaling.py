"""A training step of 784-H-10 in PyTorch eager and in the engine, over widths H and batches, in turn for each size.

    python benchmarks/engine_scaling.py [--quick] [--json FILE]

Target: nowhere is the engine, by hand or by its autograd, slower than 0.9 of PyTorch's speed.  A step is gathering its batch from memory,
forward, loss, backward, SGD, and the classes found; each contender runs in a process of its own, on equally many threads.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rounds import RESULTS, environment, pin_threads, save
from workers import Worker, serve

EXAMPLES = Path(__file__).parents[1] / "examples" / "engine_mnist"
SIZES = (64, 256, 1024, 4096), (32, 128, 512, 4096)
"""Widths and batches."""
QUICK = (64, 1024), (32, 512)
BASE, TARGET = "PyTorch eager", 0.9
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    BASE: ("train_pytorch", {"compile": False}),
    "engine manual": ("train_manual", {"graph": False}),
    "engine autograd": ("train_autograd", {"graph": False, "recipe": None}),
}
IMAGES = 8192
LEAST = 0.1
"""Seconds of steps that make a round."""
# Okabe and Ito's palette, which colour-blind readers can tell apart; the markers repeat the distinction.
LINES = {32: ("#0072b2", "o"), 128: ("#e69f00", "s"), 512: ("#009e73", "^"), 4096: ("#d55e00", "D")}


def contender(name: str) -> Callable[..., dict[str, Any]]:
    """What runs some steps of a size: {"seconds"} a step, and {"loss"} of the last."""
    script, flags = CONTENDERS[name]
    sys.path.insert(0, str(EXAMPLES))
    prepare = importlib.import_module(script).prepare
    wrap = importlib.import_module("torch" if script == "train_pytorch" else "octavo.engine").from_numpy
    draws = np.random.default_rng(0)
    images, labels = draws.random((IMAGES, 784), np.float32), draws.integers(0, 10, IMAGES)
    order = draws.permutation(IMAGES)
    held: dict[tuple[int, int], Any] = {}

    def steps(width: int, batch: int, count: int) -> dict[str, Any]:
        if (width, batch) not in held:
            held.clear()
            fresh = np.random.default_rng(width)
            shapes = {"fc1.weight": (width, 784), "fc1.bias": (width,), "fc2.weight": (10, width), "fc2.bias": (10,)}
            weights = {key: fresh.normal(0, 0.03, shape).astype(np.float32) for key, shape in shapes.items()}
            weights["fc1.bias"][:] = weights["fc2.bias"][:] = 0
            args = argparse.Namespace(lr=0.01, batch_size=batch, **flags)
            held[width, batch] = prepare(weights, wrap(images), wrap(labels), args)[1]
        rows = np.resize(order, (count, batch))
        start = time.perf_counter()
        losses, _ = held[width, batch](rows)
        return {"seconds": (time.perf_counter() - start) / count, "loss": float(losses[-1])}

    return steps


def measured(workers: list[Worker], width: int, batch: int, rounds: int) -> dict[str, Any]:
    """Medians of a size, over rounds in which each contender runs once, in turn."""
    size = {"width": width, "batch": batch}
    for worker in workers:
        worker.ask(**size, count=3)
    # As many steps for all, so that the losses can be compared.
    count = max(3, round(LEAST / workers[0].ask(**size, count=3)["seconds"]))
    for worker in workers[1:]:
        worker.ask(**size, count=3)
    found: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for _ in range(rounds):
        for worker in workers:
            found[worker.name].append(worker.ask(**size, count=count))
    seconds = {name: statistics.median(one["seconds"] for one in runs) for name, runs in found.items()}
    speeds = {name: seconds[BASE] / value for name, value in seconds.items() if name != BASE}
    return {
        **size,
        "seconds": seconds,
        "speed": speeds,
        "loss": {name: runs[-1]["loss"] for name, runs in found.items()},
    }


def told(rows: list[dict[str, Any]]) -> str:
    """The table and the worst ratio."""
    engines = [name for name in CONTENDERS if name != BASE]
    heads = "".join(f"{f'{name}, ms':>20}{'speed':>7}" for name in engines)
    lines = [f"{'width':>6}{'batch':>7}{f'{BASE}, ms':>19}{heads}{'losses differ by':>18}"]
    for row in rows:
        cells = "".join(f"{row['seconds'][name] * 1e3:20.3f}{row['speed'][name]:7.2f}" for name in engines)
        base = row["loss"][BASE]
        apart = max(abs(row["loss"][name] - base) / abs(base) for name in engines)
        lines.append(f"{row['width']:6}{row['batch']:7}{row['seconds'][BASE] * 1e3:19.3f}{cells}{apart:18.1e}")
    worst, where, name = min(
        (row["speed"][name], (row["width"], row["batch"]), name) for row in rows for name in engines
    )
    lines += [
        "",
        f"slowest: {name} at width {where[0]}, batch {where[1]}: {worst:.2f} of {BASE}'s speed (target {TARGET})",
    ]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each way to write a step: speed over PyTorch by width, a line for each batch."""
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Axes] = list(figure.subplots(1, 2, sharey=True))
    for axes, name in zip(panels, [name for name in CONTENDERS if name != BASE], strict=True):
        for batch in sorted({row["batch"] for row in rows}):
            points = [(row["width"], row["speed"][name]) for row in rows if row["batch"] == batch]
            colour, marker = LINES[batch]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=f"batch {batch:,}")
        axes.axhline(1, color="#7f7f7f", linewidth=1)
        axes.axhline(TARGET, color="#7f7f7f", linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        widths = sorted({row["width"] for row in rows})
        axes.set_xticks(widths, [f"{width:,}" for width in widths])
        axes.set(title=name, xlabel="width of the hidden layer")
        axes.grid(color="#dddddd", linewidth=0.6)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("speed, PyTorch eager = 1")
    panels[0].legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four sizes, three rounds; no result is kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, hardware and versions there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw there, besides what results keep")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        serve(flags.threads, lambda: contender(flags.worker))
        return
    for path in (flags.json, flags.plot):
        if path and not path.resolve().parent.is_dir():
            parser.exit(2, f"engine_scaling.py: {path}: there is no such folder; make it first\n")
    pin_threads(flags.threads)
    widths, batches = QUICK if flags.quick else SIZES
    rounds = 3 if flags.quick else 7
    workers = [Worker(__file__, name, flags.threads) for name in CONTENDERS]
    try:
        rows = [measured(workers, width, batch, rounds) for width in widths for batch in batches]
    finally:
        for worker in workers:
            worker.close()
    text = f"784-H-10, SGD, {flags.threads} threads, medians of {rounds} rounds\n\n{told(rows)}"
    if flags.quick:
        print(text)
    else:
        save("engine-scaling", rows, text)
        plot(rows, RESULTS / f"{environment()['date'].split()[0]}-engine-scaling.png")
    if flags.plot:
        plot(rows, flags.plot)
    if flags.json:
        worst = min(speed for row in rows for speed in row["speed"].values())
        kept = {"worst_speed_over_torch_eager": worst, "rows": rows, "environment": environment(), "quick": flags.quick}
        flags.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
