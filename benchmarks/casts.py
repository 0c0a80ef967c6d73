"""Quantise-dequantise beside its peers: G elements a second, one thread and two, all contenders in turn in one run.

    python benchmarks/casts.py [--quick]

Targets: with amax in the same pass, at least 0.9 of `copy_`; at least 10 times torch's own cast pair (which neither scales nor takes
an amax; "the same work" does both).  Each contender writes to memory
that it already has where its interface lets it; the others allocate, as their users do.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
from rounds import interleaved, pin_threads, save

from octavo.formats import E4M3FN, E5M2, Format
from octavo.kernels import cpu
from octavo.kernels.arrays import library_of
from octavo.rounding import Rounding

TORCH = {E4M3FN: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
ML_DTYPES = {E4M3FN: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}


def contenders(size: int, format: Format) -> dict[str, Callable[[], Any]]:
    """Each turns `x` into its values in `format`, in float32, scaled by 3 and back where it scales at all."""
    x, y = torch.randn(size), torch.empty(size)
    codes, narrow = torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.bfloat16)
    array = x.numpy()
    library = library_of(x)
    source, target = library.buffer(x), library.buffer(y)

    def same_work() -> torch.Tensor:
        """What `octavo quantize` does in one pass, in torch's own operators."""
        x.abs().max()
        return y.copy_((x * 3.0).clamp(-format.max, format.max).to(TORCH[format])).div_(3.0)

    stochastic = {"rounding": Rounding.STOCHASTIC, "seed": 1}
    rows: dict[str, Callable[[], Any]] = {
        "copy_": lambda: y.copy_(x),
        "octavo quantize, amax, scale": lambda: cpu.cast(source, target, format, scale=3.0, divisor=3.0),
        "octavo to bfloat16 operand": lambda: cpu.cast(source, library.buffer(narrow), format, scale=3.0),
        "octavo encode": lambda: cpu.cast(source, library.buffer(codes), format, scale=3.0),
        "octavo stochastic": lambda: cpu.cast(source, target, format, scale=3.0, divisor=3.0, **stochastic),
        "octavo amax alone": lambda: cpu.amax(source),
        "torch, the same work": same_work,
        "torch cast pair, no scale": lambda: y.copy_(x.to(TORCH[format])),
        "ml_dtypes cast pair, no scale": lambda: array.astype(ML_DTYPES[format]).astype(np.float32),
    }
    try:
        from qtorch.quant import float_quantize
    except ImportError:
        print("qtorch is not installed (make bench installs it): its row is left out")
    else:
        exp, man = format.exponent_bits, format.mantissa_bits
        rows["qtorch float_quantize, no scale"] = lambda: float_quantize(x, exp=exp, man=man, rounding="nearest")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller arrays and fewer rounds")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    size, rounds = (1 << 22, 5) if arguments.quick else (1 << 24, arguments.rounds)
    warnings.filterwarnings("ignore")  # ml_dtypes warns of what overflows
    rows, lines = [], []
    for threads in (1, 2):
        pin_threads(threads)
        for format in (E4M3FN, E5M2):
            seconds = interleaved(contenders(size, format), rounds=rounds)
            lines.append(
                f"{format.name}, {size:,} float32, {threads} thread{'s' if threads > 1 else ''}, median of {rounds} rounds"
            )
            lines.append(f"  {'':34}{'G elements/s':>14}{'of copy_':>10}{'x torch pair':>14}{'x the same work':>17}")
            for name, value in seconds.items():
                of_copy, of_pair = seconds["copy_"] / value, seconds["torch cast pair, no scale"] / value
                of_work = seconds["torch, the same work"] / value
                lines.append(f"  {name:34}{size / value / 1e9:14.3f}{of_copy:10.2f}{of_pair:14.1f}{of_work:17.1f}")
                row = {"format": format.name, "threads": threads, "size": size, "contender": name, "seconds": value}
                rows.append(row | {"of_copy": of_copy, "times_torch_pair": of_pair, "times_same_work": of_work})
            lines.append("")
    save("casts-quick" if arguments.quick else "casts", rows, "\n".join(lines))


if __name__ == "__main__":
    main()
