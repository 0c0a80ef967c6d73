"""Seconds of `octavo validate` as a whole command, from the start of its process to the end, beside `import torch`, in turns in one run.

    python benchmarks/validate.py [--quick]

Target: each of the three models in under two seconds.  Files are in the machine's memory, as the first round of all is not counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rounds import interleaved, save

CONFIGS = Path(__file__).parents[1] / "examples" / "fc_mnist" / "configs"
TARGET = 2.0
MODELS = {
    "the reference CNN": ("params.yaml", ["model={name: cnn}"]),
    "FC-MNIST, 10 x 50": ("params.yaml", []),
    "a transformer, 1.3 billion": ("transformer_1b.yaml", []),
}
BESIDE = {
    "python -c pass": ["-c", "pass"],
    "python -c 'import torch'": ["-c", "import torch"],
    "octavo --help": ["-m", "octavo.cli", "--help"],
    "octavo compare --help": ["-m", "octavo.cli", "compare", "--help"],
}
COMMANDS = BESIDE | {
    name: ["-m", "octavo.cli", "validate", str(CONFIGS / file), *overrides, "--target", "sm90"]
    for name, (file, overrides) in MODELS.items()
}
"""What Python is asked to do, by the name in the table."""


def command(arguments: list[str]) -> Callable[[], object]:
    """A process of one thread that does it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, and no result is kept")
    quick = parser.parse_args().quick
    contenders = {name: command(arguments) for name, arguments in COMMANDS.items()}
    seconds = interleaved(contenders, rounds=3 if quick else 15, warm_up=1)
    imported = seconds["python -c 'import torch'"]
    rows: list[dict[str, Any]] = [
        {"command": name, "seconds": taken, "over import torch": taken / imported} for name, taken in seconds.items()
    ]
    lines = [f"{'whole command':<43} {'s':>6} {'/ import torch':>15}   target"]
    for row in rows:
        name = row["command"]
        asked = f"< {TARGET:g} s" if name in MODELS else ""
        told = f"octavo validate: {name}" if name in MODELS else name
        lines.append(f"{told:<43} {row['seconds']:>6.2f} {row['over import torch']:>15.2f}   {asked}".rstrip())
    text = "\n".join(lines)
    if quick:
        print(text)
        return
    save("validate", rows, text)


if __name__ == "__main__":
    main()
