"""What the command line and the FC-MNIST example do with a configuration: train, evaluate, validate, compile."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from octavo.lab import config_file
from octavo.lab.config import Config
from octavo.lab.replicas import end, is_first, is_replica, launch
from octavo.lab.runner import Mode, Resume, evaluate, train
from octavo.lab.sections import Backend

__all__ = ["compiled", "configured", "guarded", "run", "validated"]


def configured(path: str | Path, overrides: Sequence[str] = (), **settings: Any) -> Config:
    """The configuration in a file; settings: model_dir, num_replicas and the like, None for what the file says."""
    return config_file.read(path, overrides, **settings)


def run(
    config: Config,
    mode: Mode,
    *,
    checkpoint_path: str | Path | None = None,
    resume: Resume = Resume.AUTO,
    command: Sequence[str],
) -> int:
    """Train or evaluate; the exit code.  command: the script with its arguments, which torchrun starts for each of several replicas."""
    path = None if checkpoint_path is None else Path(checkpoint_path)
    if mode is Mode.EVAL:
        evaluate(config.alone(), checkpoint_path=path)
        return 0
    if config.runconfig.num_replicas > 1 and config.backend is Backend.TORCH and not is_replica():
        return launch(config.runconfig.num_replicas, command)
    if is_replica():
        end(guarded(lambda: train(config, mode=mode, checkpoint_path=path, resume=resume)))
    return train(config, mode=mode, checkpoint_path=path, resume=resume)


def validated(config: Config, target: str, *, json: bool = False) -> str:
    """The table of `octavo validate`, or the same as JSON."""
    import torch

    from octavo.lab.networks import exempt_layers, torch_network, transformer_sizes
    from octavo.lab.sections import ModelKind
    from octavo.lab.validate import Scope, validate

    network = torch_network(config.model, config.runconfig.seed, device="meta")
    batch = config.train_input.batch_size // (config.optimizer.grad_accum_steps * config.runconfig.num_replicas)
    if config.model.name is ModelKind.TRANSFORMER:
        inputs = torch.zeros(batch, transformer_sizes(config.model)["max_length"], dtype=torch.int64, device="meta")
    else:
        inputs = torch.zeros(batch, 1, 28, 28, device="meta")
    chosen = config.kind.value if config.recipe is None else config.recipe
    exempt = () if config.recipe is None else exempt_layers(config.model, config.exempt)
    found = validate(network, (inputs,), chosen, exempt=exempt, target=target, scope=Scope.LINEAR)
    return found.to_json() if json else found.text()


def compiled(config: Config, out: str | Path | None = None, *, aot: bool = False) -> str:
    """Writes the compiled graphs, by default into the run's folder, and what says so; aot: with machine code for inference, too."""
    from octavo.lab.compiling import compile_config

    return compile_config(config, None if out is None else Path(out), aot=aot)


def guarded(work: Callable[[], int]) -> int:
    """The exit code of `work`; an error becomes one line on standard error and 1, Ctrl-C 130."""
    try:
        return work()
    except (ValueError, OSError) as error:
        if is_first():
            print(f"octavo: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("octavo: stopped", file=sys.stderr)
        return 130
