"""Training and testing one Flax model on a `Dataset`: an epoch is one compiled loop, its data on the device.

A run depends on its initial weights, its data and its `TrainConfig` alone.  Batches come from `data.batches`, as every trainer's do.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import octavo.jax
from octavo.lab.data import Dataset, batches
from octavo.lab.flax_models import Network
from octavo.lab.training import MEAN, STD, TEST_BATCH, DivergenceError, History, Optimizer, Progress, TrainConfig

__all__ = ["Prepared", "State", "Trainer", "evaluate", "prepare"]

_TICKS = 50
"""How often an epoch tells how far it is."""


class Prepared(NamedTuple):
    """A `Dataset` on the device: inputs float32 [N, 1, 28, 28] normalised, labels int32 [N]."""

    train_inputs: Array
    train_labels: Array
    test_inputs: Array
    test_labels: Array


class State(NamedTuple):
    """What a step takes and gives."""

    variables: Any
    optimizer: Any
    key: Array


class Taken(NamedTuple):
    """What a step found: its loss, and for each parameter, in the order of its tree, whether it and its gradient are finite."""

    loss: Array
    finite: Array


def prepare(dataset: Dataset) -> Prepared:
    """Normalises the whole data set once, on the host, so that a training step only gathers rows."""

    def inputs(images: Any) -> Array:
        pixels = images.astype(np.float32)[:, None]
        return jnp.asarray((pixels / np.float32(255) - np.float32(MEAN)) / np.float32(STD))

    def labels(values: Any) -> Array:
        return jnp.asarray(values.astype(np.int32))

    return Prepared(
        inputs(dataset.train_images),
        labels(dataset.train_labels),
        inputs(dataset.test_images),
        labels(dataset.test_labels),
    )


def _loss(log_probs: Array, labels: Array) -> Array:
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=1).sum()


@functools.partial(jax.jit, static_argnums=0)
def _tested(network: Network, variables: Any, x: Array, y: Array) -> tuple[Array, Array]:
    log_probs: Any = network.apply(variables, x)
    return _loss(log_probs, y), (log_probs.argmax(1) == y).sum()


def evaluate(network: Network, variables: Any, inputs: Array, labels: Array) -> tuple[float, float]:
    """The mean loss and the accuracy (a fraction) without dropout; no metadata moves.  Runs in the recipe of the active `autocast`.

    inputs: [N, 1, 28, 28]; labels: [N].  Raises ValueError where N is 0.
    """
    if len(labels) == 0:
        raise ValueError("there is nothing to test: the batch of inputs is empty; give at least one")
    parts = range(0, len(labels), TEST_BATCH)
    found = [_tested(network, variables, inputs[i : i + TEST_BATCH], labels[i : i + TEST_BATCH]) for i in parts]
    loss, correct = (math.fsum(map(float, column)) for column in zip(*found, strict=True))
    return loss / len(labels), correct / len(labels)


class Trainer:
    """Trains a network under a `TrainConfig`; to be made and used inside the `autocast` that it is to train in."""

    def __init__(self, network: Network, data: Prepared, config: TrainConfig) -> None:
        self.network, self.data, self.config = network, data, config
        self.plan = config.epoch_steps(len(data.train_labels))
        end = sum(self.plan)

        def rate(count: Any) -> Any:
            return config.lr * (1 + (config.last_lr - 1) * count / end)

        match config.optimizer:
            case Optimizer.SGD:
                self.rule = optax.sgd(rate)
            case Optimizer.ADADELTA:
                self.rule = optax.adadelta(rate, rho=0.9, eps=1e-6)
        self._epoch = jax.jit(self._run_epoch, static_argnums=4, donate_argnums=0)
        self.step = jax.jit(self._step, donate_argnums=0)

    def start(self, variables: Any) -> State:
        """The state before the first step."""
        return State(variables, self.rule.init(variables["params"]), jax.random.key(self.config.seed))

    def _step(self, state: State, x: Array, y: Array) -> tuple[State, Taken]:
        """One update on x [batch, 1, 28, 28] and y [batch]."""
        key, dropout = jax.random.split(state.key)

        def loss_of(variables: Any) -> Array:
            log_probs: Any = self.network.apply(variables, x, train=True, rngs={"dropout": dropout})
            return _loss(log_probs, y) / len(y)

        loss, gradients = jax.value_and_grad(loss_of)(state.variables)
        params = state.variables["params"]
        sums = [(x.sum(), g.sum()) for x, g in zip(*map(jax.tree.leaves, (params, gradients["params"])), strict=True)]
        updates, optimizer = self.rule.update(gradients["params"], state.optimizer, params)
        new = gradients | {"params": optax.apply_updates(params, updates)}
        variables = octavo.jax.update_collections(new, state.variables)
        return State(variables, optimizer, key), Taken(loss, jnp.isfinite(jnp.array(sums)))

    def _run_epoch(
        self, state: State, data: Prepared, order: Array, first: Array, tick: Callable[..., None] | None
    ) -> tuple[State, Taken]:
        """All steps of an epoch; order: int32 [steps, batch]; first: steps before; tick: told of some steps, by number and loss."""
        every = max(1, len(order) // _TICKS)

        def body(state: State, turn: tuple[Array, Array]) -> tuple[State, Taken]:
            index, number = turn
            state, taken = self._step(state, data.train_inputs[index], data.train_labels[index])
            if tick is not None:
                told = functools.partial(jax.debug.callback, tick)
                jax.lax.cond((number + 1) % every == 0, told, lambda *_: None, number + 1, taken.loss)
            return state, taken

        return jax.lax.scan(body, state, (order, first + jnp.arange(len(order))))

    def train(
        self,
        variables: Any,
        progress: Progress,
        *,
        checkpoint_path: Path | None = None,
        header: Mapping[str, Any] | None = None,
    ) -> tuple[Any, History]:
        """(variables, history) after training, with a test after each epoch.

        Where `checkpoint_path` is given, the variables are saved there after each epoch, with `header`, the epoch and the step.
        Raises DivergenceError where the loss, a parameter or a gradient is NaN or Inf; no checkpoint is written of such an epoch.
        """
        config, samples = self.config, len(self.data.train_labels)
        history = History(steps_per_epoch=samples // config.batch_size)
        state = self.start(jax.tree.map(jnp.copy, variables))  # the copies are given up to the first step
        tick = _Tick(progress, config.batch_size) if progress.shown else None  # one, lest the epoch be compiled anew
        with progress:
            for epoch, steps in enumerate(self.plan):
                order = batches(samples, config.batch_size, epoch=epoch, seed=config.seed)
                chosen = jnp.asarray(
                    np.stack([index for index, _ in zip(order, range(steps), strict=False)]), jnp.int32
                )
                first = jnp.int32(len(history.losses))
                run = self._epoch.lower(state, self.data, chosen, first, tick).compile()
                start = time.perf_counter()
                state, taken = jax.block_until_ready(run(state, self.data, chosen, first))
                history.epochs.append((steps, time.perf_counter() - start))
                self._check(state, taken, done=len(history.losses))
                history.losses += taken.loss.tolist()
                found = evaluate(self.network, state.variables, self.data.test_inputs, self.data.test_labels)
                history.test_losses.append(found[0])
                history.accuracies.append(found[1])
                if checkpoint_path is not None:
                    place = {"epoch": epoch + 1, "step": len(history.losses)}
                    octavo.jax.save(checkpoint_path, state.variables, header={**(header or {}), **place})
        return state.variables, history

    def _check(self, state: State, taken: Taken, *, done: int) -> None:
        """Raises DivergenceError for the first step that met NaN or Inf, by the first tensor that held it."""
        good = np.isfinite(taken.loss) & np.asarray(taken.finite).all((1, 2))
        if good.all():
            return
        number = int(np.argmin(good))
        paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in self._leaves(state)]
        names = [*(f"parameter {path!r}" for path in paths), *(f"the gradient of {path!r}" for path in paths)]
        bad = ~np.asarray(taken.finite)[number].T.reshape(-1)
        where = names[int(np.argmax(bad))] if bad.any() else "the loss"
        raise DivergenceError(
            f"training stopped at step {done + number + 1}: {where} holds NaN or Inf;"
            " lower the learning rate (--lr) or look at the data"
        )

    @staticmethod
    def _leaves(state: State) -> Any:
        return jax.tree_util.tree_leaves_with_path(state.variables["params"])


class _Tick:
    """Tells a progress line of the steps since it was last told."""

    def __init__(self, progress: Progress, images: int) -> None:
        self.progress, self.images, self.done = progress, images, 0

    def __call__(self, number: Any, loss: Any) -> None:
        steps, self.done = int(number) - self.done, int(number)
        self.progress.step(float(loss), self.images, None, steps=steps)
