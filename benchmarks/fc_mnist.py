"""The FC-MNIST example on real MNIST, in float32 and in FP8: accuracy of 784-500-300-10, the thousand updates of 10 x 50, and how long
`octavo validate` takes.

    python benchmarks/fc_mnist.py

Targets: 98.3 % test accuracy of 784-500-300-10 in both; each validation in under two seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rounds import save

from octavo.lab import commands
from octavo.lab.data import Source, load

EXAMPLE = Path(__file__).parents[1] / "examples" / "fc_mnist"


def trained(config: str, precision: str) -> dict[str, Any]:
    """What the example comes to."""
    with tempfile.TemporaryDirectory() as folder:
        run = [
            sys.executable,
            str(EXAMPLE / "run.py"),
            "--mode",
            "train_and_eval",
            "--params",
            str(EXAMPLE / "configs" / config),
        ]
        start = time.perf_counter()
        subprocess.run([*run, "--model_dir", folder, "precision", precision], check=True, capture_output=True)
        seconds = time.perf_counter() - start
        state = json.loads((Path(folder) / "run.json").read_text())
    return {
        "config": config,
        "precision": precision,
        "accuracy": state["accuracy"],
        "steps": state["step"],
        "seconds": seconds,
    }


def validated(name: str, config: str, overrides: list[str]) -> dict[str, Any]:
    """Seconds of a validation: the table alone, in a process that has loaded torch, and the whole command."""
    path = EXAMPLE / "configs" / config
    chosen = commands.configured(path, overrides)
    commands.validated(chosen, "sm90")
    start = time.perf_counter()
    commands.validated(chosen, "sm90")
    table = time.perf_counter() - start
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "octavo.cli", "validate", str(path), *overrides, "--target", "sm90"],
        check=True,
        capture_output=True,
    )
    return {"validate": name, "table": table, "command": time.perf_counter() - start}


def main() -> None:
    data = load(Source.AUTO)
    runs = [
        trained(config, precision)
        for config in ("params_500_300.yaml", "params.yaml")
        for precision in ("fp32", "delayed_scaling", "current_scaling")
    ]
    checks = [
        validated("FC-MNIST, 10 x 50", "params.yaml", []),
        validated("the reference CNN", "params.yaml", ["model={name: cnn}"]),
        validated("a transformer, 1.3 billion", "transformer_1b.yaml", []),
    ]
    lines = [
        f"data: {data.name}, {len(data.train_labels):,} training and {len(data.test_labels):,} test images",
        "",
        f"{'config':<22} {'precision':<18} {'steps':>6} {'accuracy':>9} {'seconds':>8}",
    ]
    lines += [
        f"{run['config']:<22} {run['precision']:<18} {run['steps']:>6} {run['accuracy']:>9.2%} {run['seconds']:>8.1f}"
        for run in runs
    ]
    lines += ["", f"{'octavo validate, sm90':<28} {'table, s':>9} {'command, s':>11}"]
    lines += [f"{check['validate']:<28} {check['table']:>9.2f} {check['command']:>11.2f}" for check in checks]
    save("fc-mnist", [*runs, *checks], "\n".join(lines))


if __name__ == "__main__":
    main()
