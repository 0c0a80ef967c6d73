"""A training step in FP8 beside float32, BF16 and torchao's emulated FP8, eager and compiled, all in turn in one run.

    python benchmarks/linear.py [--quick]

Targets, eager, against float32: at most 1.10 on 1024-4096-1024 at batch 512, 1.15 on the CNN at batch 64, 1.3 on the 784-256-10 MLP
at batch 128; MXFP8 and blocks at most 1.25 on the first, where every named recipe runs.
A step is forward, loss, backward, SGD; all contenders start from the same weights.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rounds import interleaved, pin_threads, save
from torch import Tensor, nn

from octavo.lab.models import ModelName, build
from octavo.recipes import NAMED, current_scaling, delayed_scaling
from octavo.torch import convert

TARGETS = {"1024-4096-1024": 1.10, "CNN": 1.15, "784-256-10": 1.30}
BLOCK_TARGET = 1.25
EXEMPT = {"CNN": ("fc3",)}


def workloads() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Model, inputs and labels of each row."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))
    return {
        "1024-4096-1024": (wide, torch.randn(512, 1024), torch.randint(0, 1024, (512,))),
        "CNN": (build(ModelName.CNN, seed=0), torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))),
        "784-256-10": (build(ModelName.MLP, seed=0), torch.randn(128, 1, 28, 28), torch.randint(0, 10, (128,))),
    }


def step(model: nn.Module, x: Tensor, y: Tensor, inner: int, *, bf16: bool = False) -> Callable[[], None]:
    """`inner` training steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(inner):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def torchao(model: nn.Module, exempt: tuple[str, ...]) -> nn.Module | None:
    """The model under torchao's float8 training with emulated GEMMs, or None where it is not installed."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        print("torchao is not installed (make bench installs it): its rows are left out")
        return None
    return convert_to_float8_training(
        model, config=Float8LinearConfig(emulate=True), module_filter_fn=lambda module, name: name not in exempt
    )


def contenders(name: str, model: nn.Module, x: Tensor, y: Tensor, inner: int, *, compiled: bool) -> dict[str, Any]:
    """Each contender's steps, on a copy of its own."""
    exempt = EXEMPT.get(name, ())
    models = {
        "float32": copy.deepcopy(model),
        "bf16 autocast": copy.deepcopy(model),
        "octavo delayed": convert(copy.deepcopy(model), delayed_scaling(), exempt),
        "octavo current": convert(copy.deepcopy(model), current_scaling(), exempt),
    }
    if name == "1024-4096-1024":
        others = (make for make in NAMED.values() if make not in (delayed_scaling, current_scaling))
        models |= {f"octavo {make.__name__}": convert(copy.deepcopy(model), make(), exempt) for make in others}
    peer = torchao(copy.deepcopy(model), exempt)
    if peer is not None:
        models["torchao emulate"] = peer
    rows = {key: step(m, x, y, inner, bf16=key.startswith("bf16")) for key, m in models.items()}
    if compiled:
        for key in ("float32", "octavo delayed", "torchao emulate"):
            if key in models:
                rows[f"{key}, compiled"] = step(torch.compile(copy.deepcopy(models[key])), x, y, inner)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="eager only, fewer rounds")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    arguments = parser.parse_args()
    rounds = 7 if arguments.quick else arguments.rounds
    warnings.filterwarnings("ignore")
    pin_threads(arguments.threads)
    rows, lines = [], []
    for name, (model, x, y) in workloads().items():
        inner = 20 if name == "784-256-10" else 1
        seconds = interleaved(
            contenders(name, model, x, y, inner, compiled=not arguments.quick), rounds=rounds, warm_up=3
        )
        lines.append(f"{name}, batch {len(x)}, {arguments.threads} threads, median of {rounds} rounds of {inner} steps")
        lines.append(f"  {'':41}{'ms a step':>12}{'of float32':>12}{'target':>10}")
        for contender, value in seconds.items():
            ratio = value / seconds["float32"]
            target = f"{TARGETS[name]:.2f}" if contender in ("octavo delayed", "octavo current") else ""
            target = f"{BLOCK_TARGET:.2f}" if contender in ("octavo mxfp8", "octavo block_scaling") else target
            lines.append(f"  {contender:41}{value / inner * 1e3:12.3f}{ratio:12.2f}{target:>10}")
            rows.append({"model": name, "contender": contender, "seconds": value / inner, "of_float32": ratio})
        lines.append("")
    save("linear-quick" if arguments.quick else "linear", rows, "\n".join(lines))


if __name__ == "__main__":
    main()
