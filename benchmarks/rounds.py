"""What the benchmarks share: rounds that take turns, medians, the machine's name, a dated result file."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def each_round(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each contender in each of the rounds, in which each runs once, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(warm_up + rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if round_ >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def interleaved(contenders: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 2) -> dict[str, float]:
    """Median seconds of each contender over such rounds."""
    seconds = each_round(contenders, rounds=rounds, warm_up=warm_up)
    return {name: statistics.median(values) for name, values in seconds.items()}


def times_as_fast(ours: list[float], theirs: list[float]) -> float:
    """The median of the rounds' own ratios: where a machine's memory is fast and slow by turns, both are of the same moment."""
    return statistics.median(other / one for one, other in zip(ours, theirs, strict=True))


def pin_threads(count: int) -> None:
    """The same number of threads in torch, and so in Octavo's kernels, and in whatever reads the environment later."""
    import torch

    torch.set_num_threads(count)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)


def environment() -> dict[str, Any]:
    """The hardware and the versions that a result was measured with: the comparison's own, the vector units and the peers."""
    import torch

    from octavo.lab import report

    has = torch.cpu.get_capabilities()
    where = report.environment()
    where["units"] = [unit for unit in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if has.get(unit, False)]
    for package in ("ml_dtypes", "torchao", "qtorch"):
        try:
            where[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            where[package] = "not installed"
    return where


def save(name: str, rows: list[dict[str, Any]], text: str) -> None:
    """Print the text; keep it, and the rows as JSON, under `results/`, dated."""
    where = environment()
    date = where["date"].split()[0]
    packages = ("octavo", "torch", "numpy", "numba", "ml_dtypes", "torchao", "qtorch")
    head = f"{date}  {where['hardware']} ({' '.join(where['units'])}), {where['cores']} cores, Python {where['python']}"
    versions = "  ".join(f"{package} {where[package]}" for package in packages)
    report = f"{head}\n{versions}\n\n{text}\n"
    print(report)
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"{date}-{name}"
    stem.with_suffix(".txt").write_text(report)
    stem.with_suffix(".json").write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
    print(f"kept as {stem.relative_to(Path.cwd()) if stem.is_relative_to(Path.cwd()) else stem}.txt and .json")
