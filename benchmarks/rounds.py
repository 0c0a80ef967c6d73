"""What the benchmarks share: rounds that take turns, medians, the machine's name, a dated result file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def interleaved(contenders: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 2) -> dict[str, float]:
    """Median seconds of each contender over rounds in which each runs once, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(warm_up + rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if round_ >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def pin_threads(count: int) -> None:
    """The same number of threads in torch, and so in Octavo's kernels, and in whatever reads the environment later."""
    import torch

    torch.set_num_threads(count)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)


def environment() -> dict[str, Any]:
    """The hardware and the versions that a result was measured with."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    flags = ""
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        model, flags = fields.get("model name", model), fields.get("flags", "")
    packages = ("octavo", "torch", "numpy", "numba", "ml_dtypes", "torchao", "qtorch")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in flags.split()]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": model,
        "units": units,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def save(name: str, rows: list[dict[str, Any]], text: str) -> None:
    """Print the text; keep it, and the rows as JSON, under `results/`, dated."""
    where = environment()
    head = f"{where['date']}  {where['processor']} ({' '.join(where['units'])}), {where['cores']} cores, Python {where['python']}"
    versions = "  ".join(f"{package} {version}" for package, version in where["versions"].items())
    report = f"{head}\n{versions}\n\n{text}\n"
    print(report)
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"{where['date']}-{name}"
    stem.with_suffix(".txt").write_text(report)
    stem.with_suffix(".json").write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
    print(f"kept as {stem.relative_to(Path.cwd()) if stem.is_relative_to(Path.cwd()) else stem}.txt and .json")
