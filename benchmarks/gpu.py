"""Casts on a GPU beside a copy of the same tensor, and a linear layer's forward and backward pass beside BF16 and torchao's float8.

    python benchmarks/gpu.py [--quick]

Without a CUDA device it says so and measures nothing.  A cast is given as the share of `copy_`'s bytes a second that it moves, in and
out; a layer is square, in bfloat16, with as many tokens as features.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from rounds import interleaved, save
from torch import Tensor, nn

from octavo.formats import E2M1FN, E4M3FN, E5M2
from octavo.recipes import current_scaling, delayed_scaling
from octavo.rounding import Overflow, Rounding
from octavo.scaling import Block, BlockScale, Current, TwoLevel
from octavo.table import TensorSpec

COLUMNS = 8192
SPECS = {
    "current": TensorSpec(E4M3FN, Current()),
    "blocks 1x128": TensorSpec(E4M3FN, Block()),
    "blocks 128x128": TensorSpec(E4M3FN, Block(shape=(128, 128))),
    "MXFP8": TensorSpec(E4M3FN, Block(shape=(1, 32), scale=BlockScale.RCEIL)),
    "NVFP4": TensorSpec(E2M1FN, TwoLevel()),
}


def casts(x: Tensor) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Of each contender, how many bytes it has to move, and a call of it."""
    from octavo.kernels import cuda

    n, y, codes = x.numel(), torch.empty_like(x), cuda.encode(x, E4M3FN)
    read, write, out = x.nbytes, x.nbytes, n
    rows: dict[str, tuple[int, Callable[[], Any]]] = {
        "copy_": (read + write, lambda: y.copy_(x)),
        "torch to float8_e4m3fn": (read + out, lambda: x.to(torch.float8_e4m3fn)),
        "encode, processor's rounding": (read + out, lambda: cuda.encode(x, E4M3FN)),
        "encode, by bits": (read + out, lambda: cuda.encode(x, E5M2, overflow=Overflow.NONE)),
        "encode, stochastic": (read + out, lambda: cuda.encode(x, E5M2, rounding=Rounding.STOCHASTIC, seed=1)),
        "encode with transpose": (read + 2 * out, lambda: cuda.encode_transposed(x, E4M3FN, scale=3.0)),
        "quantize": (read + write, lambda: cuda.quantize(x, E4M3FN, scale=3.0)),
        "amax": (read, lambda: cuda.amax(x)),
        "decode": (out + 4 * n, lambda: cuda.decode(codes, E4M3FN)),
    }
    for name, spec in SPECS.items():
        rows[f"matrix, {name}"] = (read + out, lambda spec=spec: cuda.encode_matrix(x, spec))  # type: ignore[misc]
    return rows


def layers(size: int, *, compiled: bool) -> dict[str, nn.Module]:
    """A square layer of each kind, all of the same weights."""
    from octavo.torch import convert

    base = nn.Sequential(nn.Linear(size, size)).to("cuda", torch.bfloat16)
    models: dict[str, nn.Module] = {"bf16": base}
    models["octavo delayed"] = convert(copy.deepcopy(base), delayed_scaling())
    models["octavo current"] = convert(copy.deepcopy(base), current_scaling())
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        print("torchao is not installed: its rows are left out")
    else:
        models["torchao float8"] = convert_to_float8_training(copy.deepcopy(base))
    if compiled:
        models |= {f"{name}, compiled": torch.compile(copy.deepcopy(model)) for name, model in models.items()}
    return models


def synchronised(run: Callable[[], Any], inner: int) -> Callable[[], None]:
    """`inner` calls and a wait for them."""

    def timed() -> None:
        for _ in range(inner):
            run()
        torch.cuda.synchronize()

    return timed


def pass_of(model: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """A forward and a backward pass."""

    def run() -> None:
        model.zero_grad()
        x.grad = None
        model(x).backward(grad)

    return run


def measure_casts(rounds: int, rows: list[dict[str, Any]], lines: list[str]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1 << 15, COLUMNS, device="cuda").to(dtype)
        contenders = casts(x)
        seconds = interleaved({name: synchronised(run, 10) for name, (_, run) in contenders.items()}, rounds=rounds)
        rate = {name: 10 * size / seconds[name] for name, (size, _) in contenders.items()}
        lines.append(f"{tuple(x.shape)} {dtype}, median of {rounds} rounds of 10 calls")
        lines.append(f"  {'':30}{'GB/s':>10}{'of copy_':>10}")
        for name, value in rate.items():
            ratio = value / rate["copy_"]
            lines.append(f"  {name:30}{value / 1e9:10.0f}{ratio:10.2f}")
            rows.append({"cast": name, "dtype": str(dtype), "bytes_per_second": value, "of_copy": ratio})
        lines.append("")


def measure_layers(sizes: list[int], rounds: int, compiled: bool, rows: list[dict[str, Any]], lines: list[str]) -> None:
    for size in sizes:
        x = torch.randn(size, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad, inner = torch.randn_like(x), max(1, 8192 // size)
        contenders = {
            name: synchronised(pass_of(model, x, grad), inner)
            for name, model in layers(size, compiled=compiled).items()
        }
        seconds = interleaved(contenders, rounds=rounds, warm_up=3)
        lines.append(f"{size}-{size}, {size} tokens, median of {rounds} rounds of {inner} passes")
        lines.append(f"  {'':30}{'ms':>10}{'of bf16':>10}")
        for name, value in seconds.items():
            ratio = value / seconds["bf16"]
            lines.append(f"  {name:30}{value / inner * 1e3:10.3f}{ratio:10.2f}")
            rows.append({"layer": name, "size": size, "seconds": value / inner, "of_bf16": ratio})
        lines.append("")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="eager only, smaller layers, fewer rounds")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing measured")
        return
    warnings.filterwarnings("ignore")
    rounds = 5 if arguments.quick else 21
    rows: list[dict[str, Any]] = []
    lines = [f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, triton {metadata.version('triton')}", ""]
    measure_casts(rounds, rows, lines)
    sizes = [1024, 2048] if arguments.quick else [1024, 2048, 4096, 8192]
    measure_layers(sizes, rounds, not arguments.quick, rows, lines)
    save("gpu-quick" if arguments.quick else "gpu", rows, "\n".join(lines))


if __name__ == "__main__":
    main()
