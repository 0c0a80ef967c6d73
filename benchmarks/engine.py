"""Training 784-256-10 on MNIST in PyTorch, JAX and the engine, one epoch of each in turn.

    python benchmarks/engine.py [--quick] [--json FILE]

Targets, as speed over PyTorch eager: the engine by hand 1.7, by its autograd 1.4, in FP8 with delayed scaling 1.2, each as its script
runs: a step captured once.  Beside them are the same steps with each operator called from Python.  All begin with the same weights and
train on the same batches, on equally many threads, each in a process of its own.  A step is gathering its batch from memory, forward,
loss, backward, SGD, and the classes found.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rounds import environment, pin_threads, save
from workers import Gone, Worker, serve

from octavo.lab.data import Source, batches, load
from octavo.lab.models import ModelName, initial_weights

EXAMPLES = Path(__file__).parents[1] / "examples" / "engine_mnist"
BATCH, RATE, SEED = 128, 0.1, 1
BASE = "PyTorch eager"
# Contender -> the script that is run, or this file, and its flags.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    BASE: ("train_pytorch", {"compile": False}),
    "PyTorch compiled": ("train_pytorch", {"compile": True}),
    "JAX, a step jitted": ("", {"scanned": False}),
    "JAX, an epoch jitted": ("", {"scanned": True}),
    "engine manual": ("train_manual", {"graph": True}),
    "engine autograd": ("train_autograd", {"graph": True, "recipe": None}),
    "engine FP8": ("train_autograd", {"graph": True, "recipe": "delayed_scaling"}),
    "manual, from Python": ("train_manual", {"graph": False}),
    "autograd, from Python": ("train_autograd", {"graph": False, "recipe": None}),
    "FP8, from Python": ("train_autograd", {"graph": False, "recipe": "delayed_scaling"}),
}
TARGETS = {"manual": 1.7, "autograd": 1.4, "fp8": 1.2}
PEAKS = ("PyTorch", "NumPy", "the engine")
FLOPS = 2 * BATCH * (2 * 784 * 256 + 3 * 256 * 10)
"""Of a step: two products for the first layer, whose input needs no gradient, and three for the second."""


def with_jax(weights: Any, images: Any, labels: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """As the scripts' `prepare`, for JAX: one jitted call a step, or one an epoch."""
    import jax
    import jax.numpy as jnp
    import optax

    data = jnp.asarray(images), jnp.asarray(labels.astype(np.int32))

    def loss_of(params: Any, x: Any, y: Any) -> Any:
        hidden = jax.nn.relu(x @ params["fc1.weight"] + params["fc1.bias"])
        logits = hidden @ params["fc2.weight"] + params["fc2.bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), logits.argmax(1)

    # The data is an argument: a constant would be folded into the program.
    def step(params: Any, rows: Any, data: Any) -> tuple[Any, Any]:
        found, gradients = jax.value_and_grad(loss_of, has_aux=True)(params, *(x[rows] for x in data))
        return jax.tree.map(lambda p, g: p - args.lr * g, params, gradients), found

    def epoch(params: Any, order: Any, data: Any) -> tuple[Any, Any]:
        return jax.lax.scan(lambda params, rows: step(params, rows, data), params, order)

    jitted = jax.jit(epoch if args.scanned else step, donate_argnums=0)
    state = [{name: jnp.asarray(value.T) for name, value in weights.items()}]

    def run(order: Any) -> tuple[Any, Any]:
        order = order.astype(np.int32)
        if args.scanned:
            state[0], found = jitted(state[0], order, data)
            return np.asarray(found[0]), np.asarray(found[1])
        losses, classes = np.empty(len(order), np.float32), np.empty(order.shape, np.int64)
        for i, rows in enumerate(order):
            state[0], (losses[i], classes[i]) = jitted(state[0], rows, data)
        return losses, classes

    return state, run


def contender(name: str, folder: Path) -> Callable[..., dict[str, Any]]:
    """What runs an epoch: {"seconds", "loss"}."""
    script, flags = CONTENDERS[name]
    if flags.get("compile") and not (shutil.which("g++") or shutil.which("clang++")):
        raise RuntimeError("torch.compile needs a C++ compiler; install g++")
    images, labels = np.load(folder / "images.npy"), np.load(folder / "labels.npy")
    args = argparse.Namespace(lr=RATE, batch_size=BATCH, **flags)
    prepare, wrapped = with_jax, (images, labels)
    if script:
        sys.path.insert(0, str(EXAMPLES))
        prepare = importlib.import_module(script).prepare
        import_from = "torch" if script == "train_pytorch" else "octavo.engine"
        wrapped = tuple(importlib.import_module(import_from).from_numpy(x) for x in wrapped)
    run = prepare(initial_weights(ModelName.MLP, SEED), *wrapped, args)[1]

    def epoch(number: int, steps: int | None) -> dict[str, Any]:
        order = np.stack([*batches(len(labels), BATCH, epoch=number, seed=SEED)])[:steps]
        start = time.perf_counter()
        losses, classes = run(order)
        seconds = time.perf_counter() - start
        right = float((classes == labels[order]).mean())
        found = {"seconds": seconds / len(order), "loss": float(np.mean(losses)), "accuracy": right}
        return {**found, "epoch": max(1, len(labels) // BATCH)}

    return epoch


def peak(name: str, threads: int) -> Callable[..., dict[str, Any]]:
    """What measures float32 matrix products: {"gflops"}."""
    draws = np.random.default_rng(0)

    def product(size: int) -> Callable[[], object]:
        a, b = (draws.standard_normal((size, size), np.float32) for _ in range(2))
        match name:
            case "PyTorch":
                import torch

                torch.set_num_threads(threads)
                left, right = torch.from_numpy(a), torch.from_numpy(b)
                return lambda: torch.mm(left, right)
            case "NumPy":
                return lambda: np.matmul(a, b)
            case _:
                from octavo import engine

                one, other = engine.from_numpy(a), engine.from_numpy(b)
                return lambda: engine.matmul(one, other)

    def measured(size: int) -> dict[str, Any]:
        run, best = product(size), float("inf")
        for _ in range(20):
            start = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - start)
        return {"gflops": 2 * size**3 / best / 1e9}

    return measured


def measured_peak(threads: int, sizes: tuple[int, ...]) -> tuple[float, str]:
    """The highest rate of float32 products that any of three libraries reaches, in GFLOP/s, and which did where."""
    found = []
    for name in PEAKS:
        worker = Worker(__file__, name, threads)
        try:
            found += [(worker.ask(size=size)["gflops"], f"{name} at {size}") for size in sizes]
        finally:
            worker.close()
    return max(found)


def raced(threads: int, rounds: int, steps: int | None) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each contender, medians over rounds in which each runs an epoch in turn; and why some are missing."""
    data, missing = load(Source.AUTO), []
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "images.npy", data.train_images.reshape(-1, 784).astype(np.float32) / 255)
        np.save(Path(folder) / "labels.npy", data.train_labels.astype(np.int64))
        workers = [Worker(__file__, name, threads, "--folder", folder) for name in CONTENDERS]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
        try:
            for worker in workers:  # the first epoch warms up, of all at once; its time is not looked at
                worker.tell(number=0, steps=steps)
            for number in range(rounds + 1):
                for worker in [*workers]:
                    try:
                        answer = worker.ask(number=number, steps=steps) if number else worker.hear()
                        found[worker.name].append(answer)
                    except Gone as error:
                        missing.append(str(error))
                        workers.remove(worker)
                        worker.close()
        finally:
            for worker in workers:
                worker.close()
    rows = []
    for name in (worker.name for worker in workers):
        seconds = statistics.median(one["seconds"] for one in found[name][1:])
        last = found[name][-1]
        rows.append(
            {"contender": name, "seconds": seconds, **{key: last[key] for key in ("loss", "accuracy", "epoch")}}
        )
    if not rows or rows[0]["contender"] != BASE:
        raise SystemExit(f"there is nothing to compare with: {missing[0]}")
    for row in rows:
        row["speedup"] = rows[0]["seconds"] / row["seconds"]
    return rows, [f"data: {data.name}, {len(data.train_labels):,} images", *missing]


def told(rows: list[dict[str, Any]], best: tuple[float, str]) -> str:
    """The table; each row's share of the peak goes into it."""
    lines = [f"float32 products reach {best[0]:.0f} GFLOP/s ({best[1]}); a step is {FLOPS / 1e6:.1f} MFLOP", ""]
    lines.append(
        f"{'':26}{'ms a step':>10}{'s an epoch':>12}{'speed':>8}{'of peak':>9}{'last loss':>11}{'accuracy':>10}"
    )
    for row in rows:
        row["peak_share"] = FLOPS / row["seconds"] / 1e9 / best[0]
        lines.append(
            f"{row['contender']:26}{row['seconds'] * 1e3:10.3f}{row['seconds'] * row['epoch']:12.3f}{row['speedup']:8.2f}"
            f"{row['peak_share']:9.0%}{row['loss']:11.5f}{row['accuracy']:10.2%}"
        )
    return "\n".join(
        [
            *lines,
            "",
            *(f"{name}: target {TARGETS[name]:.1f}, got {got:.2f}" for name, got in speedups(rows).items()),
            *(f"{name}, from Python: {got:.2f}" for name, got in speedups(rows, captured=False).items()),
        ]
    )


def speedups(rows: list[dict[str, Any]], *, captured: bool = True) -> dict[str, float]:
    """Those of the engine's three contenders, captured or called from Python."""
    found = {row["contender"]: row["speedup"] for row in rows}
    names = {
        key: f"engine {name}" if captured else f"{name}, from Python"
        for key, name in {"manual": "manual", "autograd": "autograd", "fp8": "FP8"}.items()
    }
    return {key: found[name] for key, name in names.items() if name in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of an epoch each, three rounds; no result is kept"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the speeds, rows, hardware and versions there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        name = flags.worker
        serve(flags.threads, lambda: peak(name, flags.threads) if name in PEAKS else contender(name, flags.folder))
        return
    if flags.json and not flags.json.resolve().parent.is_dir():
        parser.exit(2, f"engine.py: --json {flags.json}: there is no such folder; make it first\n")
    pin_threads(flags.threads)
    best = measured_peak(flags.threads, (1024,) if flags.quick else (512, 1024, 2048))
    rows, notes = raced(flags.threads, *((3, 117) if flags.quick else (5, None)))
    table = told(rows, best)
    head = (
        f"784-256-10, batch {BATCH}, SGD {RATE}, {flags.threads} threads, medians of {3 if flags.quick else 5} rounds"
    )
    text = "\n".join([*notes, f"jax {metadata.version('jax')}" if len(rows) > 2 else "", head, table])
    if flags.quick:
        print(text)
    else:
        save("engine", rows, text)
    if flags.json:
        kept = {
            "speedup_over_torch_eager": {**speedups(rows), "from_python": speedups(rows, captured=False)},
            "rows": rows,
        }
        kept |= {
            "sgemm_peak_gflops": best[0],
            "quick": flags.quick,
            "threads": flags.threads,
            "environment": environment(),
        }
        flags.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
