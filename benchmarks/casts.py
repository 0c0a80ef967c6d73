"""Quantise-dequantise beside its peers: G elements a second, one thread and two, all contenders in turn in one run.

    python benchmarks/casts.py [--quick]

Targets: with amax in the same pass, at least 0.9 of `copy_`; at least 10 times torch's own cast pair (which neither scales nor takes
an amax; "the same work" does both), which no cast from memory can be where `copy_` is less: hence the rows by size.  Ratios are medians
of the rounds' own.  Each contender writes to memory that it already has where its interface lets it; the others allocate, as users do.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import gfloat
import ml_dtypes
import numpy as np
import torch
from gfloat.formats import format_info_ocp_e4m3
from rounds import each_round, pin_threads, save, times_as_fast

from octavo.formats import E2M1FN, E3M2FN, E4M3FN, E5M2, Format
from octavo.kernels import cpu, matrices
from octavo.kernels.arrays import library_of
from octavo.rounding import Rounding
from octavo.scaling import Block, BlockScale, Row, TwoLevel
from octavo.table import TensorSpec

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


def in_blocks(x: torch.Tensor) -> torch.Tensor:
    """MXFP8's quantise-dequantise in the operators that microxcaling is made of: floor(log2), scale, round, clamp, unscale."""
    blocks = x.reshape(-1, 32)
    shared = torch.floor(torch.log2(blocks.abs().amax(1, keepdim=True))) - 8
    scaled = blocks / 2**shared
    private = torch.floor(torch.log2(scaled.abs() + (scaled == 0))).clamp(min=-6)
    ulps = scaled / 2**private * 8
    rounded = torch.sign(ulps) * torch.floor(ulps.abs() + 0.5)
    return ((rounded / 8 * 2**private).clamp(-448, 448) * 2**shared).reshape(x.shape)


def scaled_contenders(rows: int) -> dict[str, Callable[[], Any]]:
    """Quantise-dequantise of a [rows, 4096] matrix, a scale for each block or row, to float32 unless a name says otherwise."""
    x = torch.randn(rows, 4096)
    y, codes = torch.empty_like(x), torch.empty(x.shape, dtype=torch.uint8)
    scales, library, shape = np.empty(x.shape, np.float32), library_of(x), (rows, 4096)

    def ours(spec: TensorSpec, into: torch.Tensor = y, **how: Any) -> Callable[[], Any]:
        return lambda: matrices.cast_blocks(
            library.buffer(x), library.buffer(into), scales.ctypes.data, shape, spec, **{"decoded": 2, **how}
        )

    mx = Block(shape=(1, 32), scale=BlockScale.RCEIL)
    contenders: dict[str, Callable[[], Any]] = {
        "copy_": lambda: y.copy_(x),
        "octavo MXFP8": ours(TensorSpec(E4M3FN, mx)),
        "octavo MXFP8, along columns": ours(TensorSpec(E4M3FN, mx), upright=True),
        "octavo MXFP8, codes and scales": ours(TensorSpec(E4M3FN, mx), codes, decoded=0),
        "octavo MXFP6": ours(TensorSpec(E3M2FN, mx)),
        "octavo MXFP4": ours(TensorSpec(E2M1FN, mx)),
        "octavo 1x128": ours(TensorSpec(E4M3FN, Block())),
        "octavo 1x128, float32 scales": ours(TensorSpec(E4M3FN, Block(scale=BlockScale.FLOAT32))),
        "octavo 128x128": ours(TensorSpec(E4M3FN, Block(shape=(128, 128)))),
        "octavo rows": ours(TensorSpec(E4M3FN, Row())),
        "octavo NVFP4": ours(TensorSpec(E2M1FN, TwoLevel())),
        "octavo MXFP4, stochastic": ours(TensorSpec(E2M1FN, mx, Rounding.STOCHASTIC), seed=1),
        "microxcaling's operators, MXFP8": lambda: in_blocks(x),
        "gfloat round_ndarray, no scale": lambda: gfloat.round_ndarray(format_info_ocp_e4m3, x.numpy(), sat=True),
    }
    try:
        from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_dtype, to_mx
    except ImportError:
        print("torchao is not installed (make bench installs it): its rows are left out")
        return contenders

    def there_and_back() -> torch.Tensor:
        scale, data = to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
        return to_dtype(data, scale, torch.float8_e4m3fn, 32, torch.float32)

    contenders["torchao to_mx and back, MXFP8"] = there_and_back
    contenders["torchao to_mx, codes and scales"] = lambda: to_mx(
        x, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL
    )
    return contenders


def measure_scaled(size: int, rounds: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and lines of every scaling on one thread and on two."""
    rows, lines = [], []
    for threads in (1, 2):
        pin_threads(threads)
        seconds = each_round(scaled_contenders(size // 4096), rounds=rounds, warm_up=1)
        lines.append(f"[{size // 4096}, 4096] float32, {threads} thread(s), median of {rounds} rounds")
        lines.append(f"  {'':34}{'G elements/s':>14}{'of copy_':>10}{'x torchao':>11}")
        peer = seconds.get("torchao to_mx and back, MXFP8", [float("nan")] * rounds)
        for name, ours in seconds.items():
            value, of_copy = statistics.median(ours), times_as_fast(ours, seconds["copy_"])
            of_peer = times_as_fast(ours, peer)
            lines.append(f"  {name:34}{size / value / 1e9:14.3f}{of_copy:10.2f}{of_peer:11.1f}")
            row = {"threads": threads, "size": size, "contender": name, "seconds": value}
            rows.append(row | {"of_copy": of_copy, "times_torchao": of_peer})
        lines.append("")
    return rows, lines


def repeated(call: Callable[[], Any], times: int) -> Callable[[], Any]:
    def calls() -> None:
        for _ in range(times):
            call()

    return calls


def measure_sizes(powers: range, rounds: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and lines of tensors of 2**power elements, from those that a layer of this lab has to those that no cache holds."""
    ours, names = "octavo quantize, amax, scale", ("copy_", "torch cast pair, no scale", "torch, the same work")
    rows, lines = [], []
    for format in (E4M3FN, E5M2):
        lines.append(f"{format.name} by size: {ours}; median of {rounds} rounds; one thread / two")
        lines.append(
            f"  {'elements':>12}{'G elements/s':>20}{'of copy_':>18}{'x torch pair':>18}{'x the same work':>18}"
        )
        for size in (1 << power for power in powers):
            found = []
            for threads in (1, 2):
                pin_threads(threads)
                every, times = contenders(size, format), max(1, (1 << 22) // size)
                seconds = each_round({name: repeated(every[name], times) for name in (ours, *names)}, rounds=rounds)
                ratios = [times_as_fast(seconds[ours], seconds[name]) for name in names]
                found.append([size * times / statistics.median(seconds[ours]) / 1e9, *ratios])
                row = {"format": format.name, "threads": threads, "size": size, "contender": f"{ours}, by size"}
                kinds = ("seconds", "of_copy", "times_torch_pair", "times_same_work")
                rows.append(row | dict(zip(kinds, [statistics.median(seconds[ours]) / times, *ratios], strict=True)))
            (speed, *one), (speed_2, *two) = found
            cells = [f"{speed:.2f} / {speed_2:.2f}".rjust(20)]
            cells += [f"{a:.{d}f} / {b:.{d}f}".rjust(18) for a, b, d in zip(one, two, (2, 1, 1), strict=True)]
            lines.append(f"  {size:12,}{''.join(cells)}")
        lines.append("")
    return rows, lines


PUBLISHED = """Intel's FP8 Emulation Toolkit, as published: a 2-core AVX-512 Xeon, 16 M float32, on one / two threads
                                      G elements/s    of copy_
  copy_                                  1.4 / 2.7
  E4M3, in place                         1.6 / 1.1  1.14 / 0.41
  E5M2, in place                         2.2 / 3.7  1.57 / 1.37
  out of place                                0.36         0.26
"""


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
            seconds = each_round(contenders(size, format), rounds=rounds)
            lines.append(
                f"{format.name}, {size:,} float32, {threads} thread{'s' if threads > 1 else ''}, median of {rounds} rounds"
            )
            lines.append(f"  {'':34}{'G elements/s':>14}{'of copy_':>10}{'x torch pair':>14}{'x the same work':>17}")
            for name, ours in seconds.items():
                value, of_copy = statistics.median(ours), times_as_fast(ours, seconds["copy_"])
                of_pair = times_as_fast(ours, seconds["torch cast pair, no scale"])
                of_work = times_as_fast(ours, seconds["torch, the same work"])
                lines.append(f"  {name:34}{size / value / 1e9:14.3f}{of_copy:10.2f}{of_pair:14.1f}{of_work:17.1f}")
                row = {"format": format.name, "threads": threads, "size": size, "contender": name, "seconds": value}
                rows.append(row | {"of_copy": of_copy, "times_torch_pair": of_pair, "times_same_work": of_work})
            lines.append("")
    more, further = measure_scaled(size, min(rounds, 7))
    by_size, sized = measure_sizes(range(16, 23, 2) if arguments.quick else range(16, 25), min(rounds, 7))
    rows, lines = rows + by_size + more, [*lines, *sized, *further, PUBLISHED]
    save("casts-quick" if arguments.quick else "casts", rows, "\n".join(lines))


if __name__ == "__main__":
    main()
