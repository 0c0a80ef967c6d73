"""Training and testing one PyTorch model on a `Dataset`, so that a run repeats bit for bit.

A run depends on its initial weights, its data and its `TrainConfig` alone; the global random state is seeded inside and
put back afterwards.  The order of batches comes from `data.batches`, which every trainer of the lab shares.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import rich.console
import rich.progress
import torch
import torch.nn.functional as F
from torch import nn

from octavo.lab import checkpoint
from octavo.lab.data import Dataset, batches
from octavo.lab.training import MEAN, STD, TEST_BATCH, DivergenceError, History, Optimizer, Progress, TrainConfig
from octavo.torch import Emulation

__all__ = [
    "Contender",
    "Forward",
    "Prepared",
    "evaluate",
    "named_gradients",
    "named_parameters",
    "prepare",
    "require_finite",
    "take_turns",
    "train",
]

Forward = Callable[[], contextlib.AbstractContextManager[object]]
"""Makes the context that a forward pass runs in: `torch.autocast(...)`, `octavo.torch.autocast(...)` or nothing."""


class Contender(NamedTuple):
    """A model to train, the context of its forward pass, and its emulation, which takes the steps where there is one."""

    model: nn.Module
    forward: Forward = contextlib.nullcontext
    emulation: Emulation | None = None


_UNTIMED_ROUNDS = 3
_TURNS_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A `Dataset` as the tensors that training reads: inputs float32 [N, 1, 28, 28] normalised, labels int64 [N]."""

    train_inputs: torch.Tensor
    train_labels: torch.Tensor
    test_inputs: torch.Tensor
    test_labels: torch.Tensor


def prepare(dataset: Dataset) -> Prepared:
    """Normalises the whole data set once, so that a training step only gathers rows."""

    def inputs(images: Any) -> torch.Tensor:
        pixels = torch.from_numpy(images.copy()).to(torch.float32)
        return pixels.div_(255).sub_(MEAN).div_(STD).unsqueeze(1)

    return Prepared(
        train_inputs=inputs(dataset.train_images),
        train_labels=torch.from_numpy(dataset.train_labels.astype("int64")),
        test_inputs=inputs(dataset.test_images),
        test_labels=torch.from_numpy(dataset.test_labels.astype("int64")),
    )


def evaluate(
    model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, *, forward: Forward = contextlib.nullcontext
) -> tuple[float, float]:
    """The mean loss and the accuracy (a fraction) of `model` in eval mode; nothing of it changes.

    inputs: [N, 1, 28, 28].  labels: [N].  Raises `ValueError` where N is 0.
    """
    if len(labels) == 0:
        raise ValueError("there is nothing to test: the batch of inputs is empty; give at least one")
    was_training = model.training
    model.eval()
    loss, correct = 0.0, 0
    try:
        with torch.no_grad():
            for x, y in zip(torch.split(inputs, TEST_BATCH), torch.split(labels, TEST_BATCH), strict=True):
                with forward():
                    log_probs = model(x).float()
                loss += F.nll_loss(log_probs, y, reduction="sum").item()
                correct += int((log_probs.argmax(1) == y).sum())
    finally:
        model.train(was_training)
    return loss / len(labels), correct / len(labels)


def train(
    model: nn.Module,
    data: Prepared,
    config: TrainConfig,
    *,
    forward: Forward = contextlib.nullcontext,
    emulation: Emulation | None = None,
    progress: Progress | None = None,
    checkpoint_path: Path | None = None,
    header: Mapping[str, Any] | None = None,
) -> History:
    """Trains `model` in place and tests it after each epoch.

    emulation: the model's, where it is emulated; it then scales the loss and takes the steps.
    Where `checkpoint_path` is given, the model is saved there after each epoch, with `header`, the epoch and the step.

    Raises:
        DivergenceError: the input, the loss, a parameter or a gradient is NaN or Inf.  All but the parameters are met
            before an update, so the weights stay those of the step before; no checkpoint is written of bad ones.
    """
    plan = config.epoch_steps(len(data.train_labels))
    history = History(steps_per_epoch=len(data.train_labels) // config.batch_size)
    run = _Run(
        model=model,
        optimizer=_optimizer(model, config),
        data=data,
        bad_rows=_bad_rows(data.train_inputs),
        forward=forward,
        emulation=emulation,
        history=history,
        progress=progress or Progress("training", steps=sum(plan)),
    )
    with torch.random.fork_rng(devices=[]), run.progress:
        torch.manual_seed(config.seed)
        require_finite(named_parameters(model), step=1)
        for epoch, steps in enumerate(plan):
            run.epoch(config, epoch=epoch, steps=steps)
            require_finite(named_parameters(model), step=len(history.losses))
            test_loss, accuracy = evaluate(model, data.test_inputs, data.test_labels, forward=forward)
            if not math.isfinite(test_loss):
                step = len(history.losses)
                raise DivergenceError(f"training stopped at step {step}: the test loss is {test_loss}; lower --lr")
            history.test_losses.append(test_loss)
            history.accuracies.append(accuracy)
            if checkpoint_path is not None:
                place = {"epoch": epoch + 1, "step": len(history.losses)}
                checkpoint.save(checkpoint_path, model.state_dict(), header={**(header or {}), **place})
    return history


def take_turns(contenders: Sequence[Contender], data: Prepared, config: TrainConfig, *, rounds: int) -> list[float]:
    """The median seconds of one training step of each contender.

    They step in turns on the same batches, so that a busy machine slows all alike; the models are trained on the way.
    The first rounds, in which kernels are compiled, do not count; after `_TURNS_SECONDS` of others it ends early.
    """
    runs = [
        _Run(
            model=contender.model.train(),
            optimizer=_optimizer(contender.model, config),
            data=data,
            bad_rows=None,
            forward=contender.forward,
            emulation=contender.emulation,
            history=History(steps_per_epoch=rounds),
            progress=Progress("", steps=rounds, console=rich.console.Console(file=io.StringIO())),
        )
        for contender in contenders
    ]
    samples = len(data.train_labels)
    orders = (batches(samples, config.batch_size, epoch=epoch, seed=config.seed) for epoch in itertools.count())
    untimed = min(_UNTIMED_ROUNDS, rounds - 1)
    seconds: list[list[float]] = [[] for _ in runs]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for turn, index in zip(range(rounds), itertools.chain.from_iterable(orders), strict=False):
            for run, taken in zip(runs, seconds, strict=True):
                start = time.perf_counter()
                run.step(torch.from_numpy(index))
                if turn >= untimed:
                    taken.append(time.perf_counter() - start)
            if sum(map(sum, seconds)) > _TURNS_SECONDS:
                break
    return [statistics.median(taken) for taken in seconds]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What one run's steps share.  bad_rows: bool [N], the training samples that hold NaN or Inf, or None for none."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: Prepared
    bad_rows: torch.Tensor | None
    forward: Forward
    emulation: Emulation | None
    history: History
    progress: Progress

    def epoch(self, config: TrainConfig, *, epoch: int, steps: int) -> None:
        """Takes the first `steps` steps of an epoch and records their time."""
        self.model.train()
        total = sum(config.epoch_steps(len(self.data.train_labels)))
        order = batches(len(self.data.train_labels), config.batch_size, epoch=epoch, seed=config.seed)
        start = time.perf_counter()
        for _, index in zip(range(steps), order, strict=False):
            done = len(self.history.losses) / total
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * (1 + (config.last_lr - 1) * done)
            self.step(torch.from_numpy(index))
        self.history.epochs.append((steps, time.perf_counter() - start))

    def step(self, index: torch.Tensor) -> None:
        """One update on the samples `index`: int64 [batch]."""
        number = len(self.history.losses) + 1
        x, y = self.data.train_inputs[index], self.data.train_labels[index]
        if self.bad_rows is not None and bool(self.bad_rows[index].any()):
            require_finite([("the input", x)], step=number)
        self.optimizer.zero_grad()
        with self.forward():
            log_probs = self.model(x)
        loss = F.nll_loss(log_probs.float(), y)
        value = loss.item()
        if not math.isfinite(value):
            require_finite([*named_parameters(self.model), ("the output", log_probs), ("the loss", loss)], step=number)
        if self.emulation is None:
            self._update(loss, number)
        else:
            self.emulation.scale(loss).backward()
            self.emulation.step(self.optimizer)
        self.history.losses.append(value)
        self.progress.step(value, len(y), lambda: (log_probs.detach().argmax(1) == y).float().mean().item())

    def _update(self, loss: torch.Tensor, number: int) -> None:
        loss.backward()
        # One sum a gradient, 12 us of the MLP's 1 ms step; where good values overflow it, the exact check finds none.
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if not math.isfinite(sum(gradient.sum().item() for gradient in gradients)):
            require_finite([*named_parameters(self.model), *named_gradients(self.model)], step=number)
        self.optimizer.step()


def _bad_rows(inputs: torch.Tensor) -> torch.Tensor | None:
    """Found once and not from the loss, because a saturating cast turns an Inf pixel into a number."""
    if all(bool(torch.isfinite(bound)) for bound in inputs.aminmax()):
        return None
    return ~torch.isfinite(inputs.flatten(1)).all(1)


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    match config.optimizer:
        case Optimizer.SGD:
            return torch.optim.SGD(model.parameters(), lr=config.lr)
        case Optimizer.ADADELTA:
            return torch.optim.Adadelta(model.parameters(), lr=config.lr)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield f"parameter {name!r}", parameter


def named_gradients(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield f"the gradient of {name!r}", parameter.grad


def require_finite(named: Iterable[tuple[str, torch.Tensor]], *, step: int) -> None:
    """Raises `DivergenceError` for the first tensor that holds NaN or Inf."""
    for name, tensor in named:
        bad = ~torch.isfinite(tensor.detach())
        count = int(bad.sum())
        if count:
            kind = "NaN" if bool(torch.isnan(tensor.detach()).any()) else "Inf"
            raise DivergenceError(
                f"training stopped at step {step}: {name} holds {kind} ({count} of {tensor.numel()} elements);"
                " lower the learning rate (--lr) or look at the data"
            )
