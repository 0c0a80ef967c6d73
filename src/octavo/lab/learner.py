"""What a run asks of the framework that trains: one update, one test, its state as tensors and back."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from octavo.lab.config import Config
from octavo.lab.data import Dataset, batches, fake, load, load_folder
from octavo.lab.sections import Input

__all__ = [
    "FAKE_SAMPLES",
    "MODEL",
    "OPTIMIZER",
    "Learner",
    "Order",
    "Rows",
    "Snapshot",
    "Update",
    "check_names",
    "fingerprint",
    "images",
    "in_batches",
    "shares",
]

Rows = npt.NDArray[np.int64]
"""The samples of a batch by number: int64 [batch]."""
FAKE_SAMPLES = 2048
MODEL, OPTIMIZER = "model.", "optimizer."
"""How the names of a snapshot's tensors begin: the network's, and the optimizer's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What an update came to.  loss: mean over the batch of all replicas.  taken: not skipped for an overflow.  stop: some replica was
    asked to.  loss_scale: the next update's, None where there is none."""

    loss: float
    taken: bool = True
    stop: bool = False
    loss_scale: float | None = None


class Snapshot(NamedTuple):
    """All that a run needs to go on: tensors by name, `model.` first in those of the network, and what JSON holds."""

    tensors: dict[str, Any]
    facts: dict[str, Any]


class Learner(ABC):
    """One network in training.

    framework: whose tensors its snapshots hold, as `octavo.checkpoint` calls it.  device: where it computes.  test_samples: how many
    there are.  rank, replicas: this process's number among all.
    """

    framework: str
    device: str
    test_samples: int
    rank = 0
    replicas = 1

    @abstractmethod
    def update(self, rows: Rows, step: int, rate: float, *, stop: bool) -> Update:
        """Train on the samples `rows` of the whole batch, of which this replica takes its share.

        step: from 0; random draws depend on it, the seed and the replica alone.  rate: the learning rate.  stop: whether this replica was
        asked to stop.  Raises DivergenceError, and leaves the weights as they were, where check_loss_values meets NaN or Inf.
        """

    @abstractmethod
    def test(self, parts: Sequence[Rows]) -> tuple[float, float]:
        """The mean loss and the accuracy (a fraction) over the batches `parts` of the test data; nothing changes."""

    @abstractmethod
    def snapshot(self) -> Snapshot:
        """The state between two updates; every replica has to ask, and the first one's counts."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Any], facts: Mapping[str, Any] | None) -> None:
        """Go on from a snapshot; with None for facts, from the network in it alone.

        Raises ValueError, and changes nothing, where the tensors are another network's.
        """

    def close(self) -> None:  # noqa: B027 (most have nothing to do)
        """Wait for the other replicas, at the end of a run."""


@dataclass(kw_only=True, slots=True)
class Order:
    """Which samples each update takes: those of epoch after epoch, each shuffled by the seed and its number alone."""

    samples: int
    input: Input
    seed: int
    per_epoch: int | None = None
    _epoch: int = field(default=-1, init=False)
    _rows: list[Rows] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        whole, rest = divmod(self.samples, self.input.batch_size)
        there = whole + bool(rest and not self.input.drop_last_batch)
        if there == 0:
            raise ValueError(
                f"train_input.batch_size {self.input.batch_size} exceeds the {self.samples} training images; take at most {self.samples}"
            )
        if self.per_epoch is not None and self.per_epoch > there:
            raise ValueError(
                f"runconfig.steps_per_epoch {self.per_epoch} exceeds the {there} batches that there are; lower it"
            )
        self.per_epoch = self.per_epoch or there

    @property
    def updates_in_an_epoch(self) -> int:
        """How many updates an epoch takes."""
        assert self.per_epoch is not None
        return self.per_epoch

    def rows(self, step: int) -> Rows:
        """The samples of update `step`, from 0."""
        epoch, place = divmod(step, self.updates_in_an_epoch)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, list(in_batches(self.samples, self.input, epoch=epoch, seed=self.seed))
        return self._rows[place]


def in_batches(samples: int, input: Input, *, epoch: int, seed: int) -> Iterator[Rows]:
    """The batches of an epoch as a section of the file asks for them."""
    if input.shuffle:
        return batches(samples, input.batch_size, epoch=epoch, seed=seed, drop_last=input.drop_last_batch)
    size = input.batch_size
    end = samples - samples % size if input.drop_last_batch and samples >= size else samples
    return (np.arange(first, min(first + size, end)) for first in range(0, end, size))


def shares(rows: Rows, *, rank: int, replicas: int, micro: int) -> list[Rows]:
    """The part of a batch that one replica takes, in micro-batches; over all replicas every sample comes once."""
    return np.array_split(np.array_split(rows, replicas)[rank], micro)


def images(config: Config) -> Dataset:
    """The data that a configuration names, training and test part each from its section.  Raises DataError."""
    train, test = (_source(section, config.runconfig.seed) for section in (config.train_input, config.eval_input))
    return Dataset(
        name=train.name,
        source=train.source if train.source == test.source else f"{train.source}; tested on {test.source}",
        train_images=train.train_images,
        train_labels=train.train_labels,
        test_images=test.test_images,
        test_labels=test.test_labels,
    )


def _source(section: Input, seed: int) -> Dataset:
    if section.use_fake_data:
        return fake(max(FAKE_SAMPLES, section.batch_size), seed=seed)
    return load_folder(Path(section.data_dir).expanduser()) if section.data_dir else load(section.data)


def fingerprint(data: Dataset) -> str:
    """SHA-256 of the training images and labels: a run resumes on the same."""
    found = hashlib.sha256(np.ascontiguousarray(data.train_images).data)
    found.update(np.ascontiguousarray(data.train_labels).data)
    return found.hexdigest()


def check_names(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError, listing what differs, where tensors in a checkpoint are not those of the network; both by name, with shapes."""
    differing = [
        *(f"{name} missing" for name in wanted if name not in found),
        *(f"{name} unknown" for name in found if name not in wanted),
        *(
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ),
    ]
    if differing:
        some = ", ".join(differing[:8]) + (f" and {len(differing) - 8} more" if len(differing) > 8 else "")
        raise ValueError(f"of another model: {some}; give the checkpoint of this configuration")
