"""A training step of an emulated model beside float32, all in turn in one run, and what watching it costs.

    python benchmarks/emulate.py [--quick]

Targets, eager, against float32: at most 1.3 on a CIFAR-style ResNet-20 at batch 64, at most 1.2 on a BERT-like model at batch 16 x 128;
statistics every 100 steps: at most 5 % of the time.  The retired FP8 emulation toolkit printed no step times: of its casts alone, 16 M
floats on two cores of an AVX-512 Xeon, its figures are 1.6 and 1.1 G elements/s for E4M3 in place on one thread and on two, 2.2 and 3.7
for E5M2, 0.36 out of place; the same casts of Octavo are timed here.
A step is forward, loss, backward, SGD; all contenders start from the same weights, and malloc keeps what is freed.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rounds import interleaved, pin_threads, save
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from emulate_resnet import ResNet

import octavo
from octavo.diagnose.records import Memory
from octavo.formats import E4M3FN, E5M2
from octavo.kernels import cpu
from octavo.torch import emulate

TARGETS = {"ResNet-20": 1.3, "BERT-like": 1.2}
RECIPES = ("direct", "hybrid", "delayed_scaling", "current_scaling", "mxfp8")
TOOLKIT = {E4M3FN: (1.6, 1.1), E5M2: (2.2, 3.7)}
"""G elements/s in place on one and two threads, as published."""


class BertLike(nn.Module):
    """Embeddings, two of BERT base's twelve layers, and a classifier: 768 wide, 12 heads, 3072 inside."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30522, 768), nn.Embedding(512, 768)
        self.norm = nn.LayerNorm(768)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(768, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """[batch, tokens] -> scores [batch, 2]."""
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        return self.head(self.encoder(x)[:, 0])


def workloads() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Model, inputs and labels of each row."""
    torch.manual_seed(0)
    return {
        "ResNet-20": (ResNet(depth=3), torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))),
        "BERT-like": (BertLike(), torch.randint(0, 30522, (16, 128)), torch.randint(0, 2, (16,))),
    }


def step(model: nn.Module, x: Tensor, y: Tensor, counted: Any = None) -> Callable[[], None]:
    """A training step; counted: the emulation whose steps it counts."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def run() -> None:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if counted is None:
            optimizer.step()
        else:
            counted.step(optimizer)
        optimizer.zero_grad()

    return run


def contenders(name: str, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], None]]:
    """Each contender's step, on a copy of its own."""
    rows = {"float32": step(copy.deepcopy(model), x, y)}
    exempt = ["conv1", "bn1", "fc"] if name.startswith("ResNet") else []
    for recipe in RECIPES:
        own = copy.deepcopy(model)
        emulate(own, recipe, exempt=exempt)
        rows[f"octavo {recipe}"] = step(own, x, y)
    own = copy.deepcopy(model)
    emulation = emulate(own, "hybrid", exempt=exempt)
    emulation.observe(Memory(), every=1)
    rows["octavo hybrid, each step watched"] = step(own, x, y, emulation)
    return rows


def keep_memory() -> None:
    """Have malloc keep what is freed, for all contenders alike: models that take turns would else pay for each other's pages."""
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30)


def casts(rounds: int, threads: int) -> tuple[list[dict[str, Any]], list[str]]:
    """16 M floats, beside the toolkit's published figures."""
    x, rows = torch.randn(1 << 24), []
    y = torch.empty_like(x)
    memory = cpu.Buffer(y.data_ptr(), cpu.Kind.FLOAT32, y.numel())
    found = interleaved(
        {"copy_": lambda: y.copy_(x)}
        | {f"{format.name}, in place": (lambda format=format: cpu.cast(memory, memory, format)) for format in TOOLKIT}
        | {f"{format.name}, fresh memory": (lambda format=format: octavo.quantize(x, format)) for format in TOOLKIT},
        rounds=rounds,
        warm_up=2,
    )
    lines = [f"casts, 16 M floats, {threads} threads, G elements/s    here  toolkit, published"]
    for name, seconds in found.items():
        published = next(
            (str(rates[threads - 1]) for format, rates in TOOLKIT.items() if f"{format.name}, in" in name), ""
        )
        published = "0.36" if "fresh" in name else published
        lines.append(f"  {name:49}{x.numel() / seconds / 1e9:6.2f}  {published}")
        rows.append({"cast": name, "giga_elements_per_second": x.numel() / seconds / 1e9})
    return rows, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, choices=(1, 2), default=min(2, torch.get_num_threads()))
    arguments = parser.parse_args()
    rounds = 5 if arguments.quick else arguments.rounds
    warnings.filterwarnings("ignore")
    pin_threads(arguments.threads)
    keep_memory()
    rows, lines = [], []
    for name, (model, x, y) in workloads().items():
        seconds = interleaved(contenders(name, model, x, y), rounds=rounds, warm_up=2)
        lines.append(f"{name}, batch {list(x.shape)}, {arguments.threads} threads, median of {rounds} rounds")
        lines.append(f"  {'':41}{'ms a step':>12}{'of float32':>12}{'target':>10}")
        for contender, value in seconds.items():
            ratio = value / seconds["float32"]
            watched = contender.endswith("watched")
            target = f"{TARGETS[name]:.2f}" if contender != "float32" and not watched else ""
            lines.append(f"  {contender:41}{value * 1e3:12.1f}{ratio:12.2f}{target:>10}")
            rows.append({"model": name, "contender": contender, "seconds": value, "of_float32": ratio})
        extra = seconds["octavo hybrid, each step watched"] / seconds["octavo hybrid"] - 1
        lines.append(f"  {'statistics every 100 steps cost':41}{extra:23.2f}%{'5%':>10}")
        lines.append("")
        rows.append({"model": name, "statistics_every_100_steps": extra / 100})
    more, text = casts(rounds, arguments.threads)
    save("emulate-quick" if arguments.quick else "emulate", rows + more, "\n".join(lines + text))


if __name__ == "__main__":
    main()
