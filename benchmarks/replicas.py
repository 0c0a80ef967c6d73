"""Updates a second of one process and of two replicas with a thread each, and what agreeing on amaxes costs, in turns in one run.

    python benchmarks/replicas.py [--quick]

Target: the reduction of amaxes takes at most 2 % of an update.  Then a model on paper of that collective on 8 to 4,096 ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MODELS = {
    "784-500-300-10, batch 128": ("[500, 300]", 128),
    "784-1024-1024-1024-10, batch 512": ("[1024, 1024, 1024]", 512),
}
LATENCY, BANDWIDTH = 5e-6, 50e9
"""Of the paper model: seconds a hop, and bytes a second of each rank (a 400 Gbit/s network port)."""
RANKS = (8, 16, 64, 256, 1024, 4096)
LAYERS = 97
"""Linear layers of the 1.3-billion-parameter transformer of examples/fc_mnist/configs/transformer_1b.yaml."""
PARAMETERS = 1_343_868_928
WARM_UP = 3


def collective_seconds(ranks: int, size: int) -> float:
    """An all-reduce of `size` bytes by recursive halving and doubling: 2 log2(ranks) hops, each byte sent and received about twice."""
    return 2 * math.log2(ranks) * LATENCY + 2 * (ranks - 1) / ranks * size / BANDWIDTH


KINDS = {
    "one": (1, "fp32"),
    "two": (2, "fp32"),
    "one, FP8": (1, "delayed_scaling"),
    "two, FP8": (2, "delayed_scaling"),
    "two, FP8, amaxes apart": (2, "{recipe: delayed_scaling, reduce_amax: false}"),
}
"""Contenders: how many processes, and the precision."""


def worker(kind: str, out: Path, updates: int) -> None:
    """What each rank runs: the median of an update and of the collective within it, by model."""
    import numpy as np
    import torch

    from octavo.lab import config_file
    from octavo.lab.learner import images
    from octavo.lab.replicas import World
    from octavo.lab.torch_learner import TorchLearner

    torch.set_num_threads(1)
    replicas, precision = KINDS[kind]
    world = World.join(replicas)
    found: dict[str, dict[str, float]] = {}
    for name, (sizes, batch) in MODELS.items():
        options = ["train_input.use_fake_data=true", "eval_input.use_fake_data=true", f"model.hidden_sizes={sizes}"]
        options += [f"train_input.batch_size={batch}", "runconfig.check_loss_values=false", f"precision={precision}"]
        config = config_file.read_text("", "benchmark", options)
        learner = TorchLearner(config, images(config), world)
        seconds: list[float] = []
        collectives: list[float] = []
        sent = {"bytes": 0}
        for turn in range(updates + WARM_UP):
            with counted(collectives, sent):
                start = time.perf_counter()
                learner.update(np.arange(batch), turn, 0.01, stop=False)
                seconds.append(time.perf_counter() - start)
        found[name] = {
            "update": statistics.median(seconds[WARM_UP:]),
            "collective": statistics.median(collectives[WARM_UP:]),
            "amax bytes": sent["bytes"],
            "gradient bytes": sum(parameter.numel() * 4 for parameter in learner.parameters),
        }
        del learner
        gc.collect()
    if world.rank == 0:
        out.write_text(json.dumps(found), encoding="utf-8")
    world.leave()
    sys.stdout.flush()
    os._exit(0)


def measured(rounds: int, updates: int) -> list[dict[str, Any]]:
    """Medians over rounds in which each contender runs once, in processes of its own: layers of one learner would share with another's."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        for _ in range(rounds):
            for kind, (replicas, _precision) in KINDS.items():
                run = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    f"--nproc-per-node={replicas}",
                    __file__,
                ]
                arguments = ["--worker", kind, "--out", str(out), "--updates", str(updates)]
                subprocess.run([*run, *arguments], check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
                found[kind].append(json.loads(out.read_text()))
    rows = []
    for model in MODELS:
        both = [one[model] for one in found["two, FP8"]]
        seconds = {kind: statistics.median(one[model]["update"] for one in runs) for kind, runs in found.items()}
        seconds["collective"] = statistics.median(one["collective"] for one in both)
        rows.append(
            {"model": model, "seconds": seconds, **{key: both[0][key] for key in ("amax bytes", "gradient bytes")}}
        )
    return rows


class Waited:
    """A collective under way that adds the time of waiting for it to `spend`."""

    def __init__(self, work: Any, spend: Callable[[float], None]) -> None:
        self.work, self.spend = work, spend

    def wait(self) -> None:
        start = time.perf_counter()
        self.work.wait()
        self.spend(time.perf_counter() - start)


@contextlib.contextmanager
def counted(seconds: list[float], sent: dict[str, int]) -> Iterator[None]:
    """Time what agreeing on amaxes takes within the block: laying them side by side, the all-reduce of maxima, waiting for it, and
    handing them back.  Moving the scales after it is not counted: a process alone does that, too."""
    import torch

    import octavo.torch.context as context

    spent = 0.0

    def spend(more: float) -> None:
        nonlocal spent
        spent += more

    def timed(real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            result = real(*arguments, **keywords)
            spend(time.perf_counter() - start)
            return result

        return run

    def reduced(tensor: Any, *arguments: Any, **keywords: Any) -> Any:
        if keywords.get("op") != torch.distributed.ReduceOp.MAX:
            return reduce(tensor, *arguments, **keywords)
        sent["bytes"] = tensor.numel() * tensor.element_size()
        return Waited(timed(reduce)(tensor, *arguments, **keywords), spend)

    reduce, kept = torch.distributed.all_reduce, (context._hand_out, context._rows)
    torch.distributed.all_reduce = reduced
    context._hand_out, context._rows = timed(kept[0]), timed(kept[1])
    try:
        yield
    finally:
        torch.distributed.all_reduce, (context._hand_out, context._rows) = reduce, kept
        seconds.append(spent)


def told(rows: list[dict[str, Any]]) -> str:
    """The table and the paper model."""
    lines = []
    for row in rows:
        seconds = row["seconds"]
        lines.append(f"{row['model']}: {row['gradient bytes']:,} bytes of gradients, {row['amax bytes']} of amaxes")
        for kind in ("one", "two", "one, FP8", "two, FP8", "two, FP8, amaxes apart"):
            base = seconds["one, FP8" if "FP8" in kind else "one"]
            lines.append(f"    {kind:<24} {1 / seconds[kind]:9.1f} updates/s {base / seconds[kind]:6.2f}")
        share = seconds["collective"] / seconds["two, FP8"]
        row["share"] = share
        lines.append(
            f"    agreeing on amaxes {1e6 * seconds['collective']:15.0f} us, waiting included, {share:.1%} of an update (target 2 %)"
        )
    amaxes, gradients = LAYERS * 5 * 4, PARAMETERS * 2
    lines += [
        "",
        f"On paper, {LAYERS} layers: {amaxes:,} bytes of amaxes, {gradients:,} of bfloat16 gradients, {LATENCY * 1e6:.0f} us a hop, ",
    ]
    lines[-1] += f"{BANDWIDTH / 1e9:.0f} GB/s a rank"
    lines.append("    ranks   amaxes, us   gradients, ms   share")
    for ranks in RANKS:
        small, large = collective_seconds(ranks, amaxes), collective_seconds(ranks, gradients)
        lines.append(f"    {ranks:>5}   {1e6 * small:10.1f}   {1e3 * large:13.1f}   {small / large:.3%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, and no result is kept")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--updates", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        worker(flags.worker, flags.out, flags.updates)
        return
    rows = measured(*((1, 5) if flags.quick else (3, 40)))
    text = told(rows)
    if flags.quick:
        print(text)
        return
    from rounds import save

    save("replicas", rows, text)


if __name__ == "__main__":
    main()
