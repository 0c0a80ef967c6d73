"""Training and testing a stack of linear layers in Octavo's engine: a step is captured once, and repeated with no Python in between.

A run depends on its initial weights, its data and its `TrainConfig` alone.  Batches come from `data.batches`, as every trainer's do.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from octavo import checkpoint, engine
from octavo.engine import Graph, Linear, Tensor, no_grad
from octavo.lab.data import Dataset, batches
from octavo.lab.training import MEAN, STD, TEST_BATCH, DivergenceError, History, Optimizer, Progress, TrainConfig
from octavo.recipes import Recipe

__all__ = ["Network", "Prepared", "Trainer", "evaluate", "layers_of", "prepare", "require_finite"]

Array = npt.NDArray[Any]
State = Mapping[str, Array]
"""A network by PyTorch's names and in its layouts."""
_CHUNK = 64
"""Steps between two looks at the losses and the weights."""
_DIRECTIONS = ("forward", "backward")


class Prepared(NamedTuple):
    """A `Dataset` as the tensors that training reads: inputs float32 [N, 784] normalised, labels int64 [N]."""

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def prepare(dataset: Dataset) -> Prepared:
    """Normalises the whole data set once, so that a training step only gathers rows."""

    def inputs(images: Any) -> Tensor:
        pixels = images.reshape(len(images), -1).astype(np.float32)
        pixels /= np.float32(255)
        pixels -= np.float32(MEAN)
        pixels /= np.float32(STD)
        return engine.from_numpy(pixels)

    def labels(values: Any) -> Tensor:
        return engine.from_numpy(values.astype(np.int64))

    return Prepared(
        inputs(dataset.train_images),
        labels(dataset.train_labels),
        inputs(dataset.test_images),
        labels(dataset.test_labels),
    )


def layers_of(weights: Iterable[str]) -> tuple[str, ...]:
    """The layers, in their order, whose parameters have these names."""
    return tuple(name.removesuffix(".weight") for name in weights if name.endswith(".weight"))


class Network:
    """Linear layers with ReLU between them: it maps inputs [N, in] to logits [N, out].

    weights: the parameters by PyTorch's names and in its layouts, copied: `fc1.weight` [out, in], `fc1.bias` [out] or none, and so on.
    recipe: of the layers' GEMMs, but for those in `spared`, which stay in float32.
    """

    def __init__(self, weights: State, *, recipe: Recipe | None = None, spared: Iterable[str] = ()) -> None:
        spared = frozenset(spared)
        self.layers: dict[str, Linear] = {}
        for name in layers_of(weights):
            weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
            self.layers[name] = layer = Linear(
                *weight.T.shape,
                bias=bias is not None,
                recipe=None if name in spared else recipe,
                seed=_seed(name),
                weight=engine.from_numpy(weight.T.copy(order="C")),
            )
            if layer.bias is not None:
                np.copyto(layer.bias.array, weights[f"{name}.bias"])

    def __call__(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers.values()
        for layer in hidden:
            x = engine.relu(layer(x))
        return last(x)

    def parameters(self) -> dict[str, Tensor]:
        """By PyTorch's names; weights lie [in, out]."""
        return {
            f"{name}.{kind}": parameter
            for name, layer in self.layers.items()
            for kind, parameter in zip(("weight", "bias"), layer.parameters(), strict=False)
        }

    def update_scales(self) -> None:
        """Move delayed scales on, once a step, after its backward pass."""
        engine.update_scales(*self.layers.values())

    def state(self) -> dict[str, Array]:
        """Copies of the parameters, and of the scales, histories and draws of layers under a recipe, as `octavo.torch.Linear` has them."""
        found = {name: parameter.array.T.copy(order="C") for name, parameter in self.parameters().items()}
        for name, layer in self.layers.items():
            held = layer.state
            if held is None:
                continue
            for direction, scales, history in zip(_DIRECTIONS, held.scales, held.histories, strict=True):
                found[f"{name}.scale_{direction}"] = scales.array.copy()
                found[f"{name}.amax_history_{direction}"] = history.array.copy()
            # PyTorch's layers count steps only where something is drawn.
            found[f"{name}.draws"] = np.array([held.seed, held.step if held.recipe.stochastic else 0], np.int64)
        return found

    def load(self, state: State) -> None:
        """Take over what `state` gave, in the memory that is there; scales, histories and draws that it lacks begin anew.

        Of a history of another length the newest steps are kept.
        """
        for name, parameter in self.parameters().items():
            _overwrite(parameter, state[name].T)
        for name, layer in self.layers.items():
            held = layer.state
            if held is None:
                continue
            for i, direction in enumerate(_DIRECTIONS):
                scales = held.scales[i]
                _overwrite(scales, state.get(f"{name}.scale_{direction}", np.ones(scales.shape, np.float32)))
                _overwrite(held.histories[i], _newest(state.get(f"{name}.amax_history_{direction}"), held.histories[i]))
                _overwrite(held.amaxes[i], np.zeros(scales.shape, np.int64))
            held.seed, held.step = (int(one) for one in state.get(f"{name}.draws", (_seed(name), 0)))


def _seed(layer: str) -> int:
    """Of a layer's draws, as every framework has it."""
    return zlib.crc32(layer.encode())


def _overwrite(tensor: Tensor, values: Array) -> None:
    np.copyto(tensor.array, values)
    tensor.storage.version += 1


def _newest(stored: Array | None, like: Tensor) -> Array:
    """A history of as many steps as `like`: row 0, and the newest of the others."""
    rows = np.zeros(like.shape, np.float32)
    if stored is not None and len(stored) and len(rows):
        kept = min(len(stored), len(rows)) - 1
        rows[len(rows) - kept :] = stored[len(stored) - kept :]
        rows[0] = stored[0]
    return rows


def evaluate(network: Network, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """The mean loss and the accuracy (a fraction); nothing of the network changes.

    inputs: float32 [N, in].  labels: int64 [N].  Raises `ValueError` where N is 0.
    """
    if len(labels) == 0:
        raise ValueError("there is nothing to test: the batch of inputs is empty; give at least one")
    losses, correct = [], 0
    with no_grad():
        for first in range(0, len(labels), TEST_BATCH):
            x, y = (whole[first : first + TEST_BATCH] for whole in (inputs, labels))
            logits = network(x)
            losses.append(engine.cross_entropy(logits, y).item() * len(y))
            correct += int((engine.argmax(logits).array == y.array).sum())
    return math.fsum(losses) / len(labels), correct / len(labels)


class Trainer:
    """Trains a network in place under a `TrainConfig`.

    by_hand: gradients are written out in the engine's fused operators, in float32, and not recorded.
    Raises ValueError for a rule other than SGD, and for gradients by hand under a recipe.
    """

    def __init__(self, network: Network, data: Prepared, config: TrainConfig, *, by_hand: bool = False) -> None:
        if config.optimizer is not Optimizer.SGD:
            raise ValueError(
                f"the engine's arms train by sgd, got {config.optimizer.value}; take an arm of torch or jax"
            )
        if by_hand and any(layer.recipe is not None for layer in network.layers.values()):
            raise ValueError("gradients by hand are in float32, and this network has a recipe; leave one out")
        self.network, self.data, self.config = network, data, config
        self.plan = config.epoch_steps(len(data.train_labels))
        self.step = self._by_hand if by_hand else self._recorded
        finite = np.isfinite(data.train_inputs.array)
        # Found once and not from the loss, because a saturating cast turns an Inf pixel into a number.
        self._bad_rows = None if finite.all() else ~finite.all(1)
        self._graph: Graph | None = None

    def _recorded(self, rows: Tensor, rate: Tensor) -> Tensor:
        """One update by the gradients that autograd finds; the loss."""
        network = self.network
        loss = engine.cross_entropy(network(self._inputs(rows)), engine.take_rows(self.data.train_labels, rows))
        loss.backward()
        network.update_scales()
        with no_grad():
            for parameter in network.parameters().values():
                engine.sgd_(parameter, parameter.grad, None, rate)
                parameter.grad = None
        return loss  # type: ignore[no-any-return]

    def _by_hand(self, rows: Tensor, rate: Tensor) -> Tensor:
        """One update by gradients written out, each product with what follows it in one kernel; the loss."""
        config, layers = self.config, tuple(self.network.layers.values())
        with no_grad():
            inputs = [self._inputs(rows)]
            for layer in layers[:-1]:
                inputs.append(engine.linear_relu(inputs[-1], layer.weight, layer.bias))
            logits = engine.linear(inputs[-1], layers[-1].weight, layers[-1].bias)
            loss, grad = engine.cross_entropy_both(logits, engine.take_rows(self.data.train_labels, rows))
            for x, layer in zip(reversed(inputs), reversed(layers), strict=True):
                # Before the weight moves.
                below = engine.masked_matmul(grad, layer.weight.T, x) if layer is not layers[0] else None
                if config.last_lr == 1.0:
                    engine.add_matmul_(layer.weight, x.T, grad, -config.lr)
                else:
                    engine.sgd_(layer.weight, x.T @ grad, None, rate)
                if layer.bias is not None:
                    engine.sgd_(layer.bias, grad.sum(0), None, rate)
                grad = below
        return loss  # type: ignore[no-any-return]

    def _inputs(self, rows: Tensor) -> Tensor:
        return engine.take_rows(self.data.train_inputs, rows)  # type: ignore[no-any-return]

    def repeat(self, order: Array, rates: Array) -> Array:
        """The losses, float32 [steps], of steps on the rows `order`, int64 [steps, batch], at `rates`, float32 [steps, 1].

        Looks at nothing: NaN and Inf go through.
        """
        if self._graph is None:
            self._graph = engine.capture(self.step, engine.zeros(order.shape[1:], np.int64), engine.zeros((1,)))
        losses: Array = self._graph.run(order, rates).numpy()
        return losses

    def train(
        self, progress: Progress, *, checkpoint_path: Path | None = None, header: Mapping[str, Any] | None = None
    ) -> History:
        """Trains, and tests after each epoch.

        Where `checkpoint_path` is given, the network is saved there after each epoch, with `header`, the epoch and the step.
        Raises DivergenceError, after the step that met it, where the input, the loss or a parameter is NaN or Inf; no checkpoint is
        written of such an epoch.
        """
        config, samples = self.config, len(self.data.train_labels)
        history = History(steps_per_epoch=samples // config.batch_size)
        require_finite(_named(self.network), step=1)
        self.repeat(np.zeros((0, config.batch_size), np.int64), np.zeros((0, 1), np.float32))
        with progress:
            for epoch, steps in enumerate(self.plan):
                order = np.stack([*islice(batches(samples, config.batch_size, epoch=epoch, seed=config.seed), steps)])
                start = time.perf_counter()
                for first in range(0, steps, _CHUNK):
                    self._advance(order[first : first + _CHUNK], history, progress)
                history.epochs.append((steps, time.perf_counter() - start))
                found = evaluate(self.network, self.data.test_inputs, self.data.test_labels)
                if not math.isfinite(found[0]):
                    step = len(history.losses)
                    raise DivergenceError(f"training stopped at step {step}: the test loss is {found[0]}; lower --lr")
                history.test_losses.append(found[0])
                history.accuracies.append(found[1])
                if checkpoint_path is not None:
                    place = {"epoch": epoch + 1, "step": len(history.losses)}
                    header = {**(header or {}), **place}
                    checkpoint.save(checkpoint_path, self.network.state(), header=header, framework="numpy")
        return history

    def _advance(self, order: Array, history: History, progress: Progress) -> None:
        """Takes some steps, and where they met NaN or Inf takes them again one by one to say where."""
        config, done = self.config, len(history.losses)
        falling = (config.last_lr - 1) * (done + np.arange(len(order))) / sum(self.plan)
        rates = (config.lr * (1 + falling)).astype(np.float32)[:, None]
        before = self.network.state()
        clean = self._bad_rows is None or not self._bad_rows[order].any()
        losses = self.repeat(order, rates)
        parameters = self.network.parameters().values()
        if not (clean and np.isfinite(losses).all() and all(np.isfinite(one.array).all() for one in parameters)):
            self.network.load(before)
            self._blame(order, rates, done)
        history.losses += losses.tolist()
        progress.step(history.losses[-1], config.batch_size, None, steps=len(order))

    def _blame(self, order: Array, rates: Array, done: int) -> None:
        """Raises DivergenceError for the first step that meets NaN or Inf, by the tensor that holds it."""
        for number, (rows, rate) in enumerate(zip(order, rates, strict=True), done + 1):
            require_finite([("the input", self.data.train_inputs.array[rows])], step=number)
            loss = self.step(engine.from_numpy(rows.copy()), engine.from_numpy(rate.copy()))
            require_finite([("the loss", loss.array), *_named(self.network)], step=number)
        raise AssertionError("steps taken one by one differ from the same steps captured")


def _named(network: Network) -> Iterable[tuple[str, Array]]:
    return ((f"parameter {name!r}", parameter.array) for name, parameter in network.parameters().items())


def require_finite(named: Iterable[tuple[str, Array]], *, step: int) -> None:
    """Raises `DivergenceError` for the first array that holds NaN or Inf."""
    for name, array in named:
        count = array.size - int(np.isfinite(array).sum())
        if count:
            kind = "NaN" if np.isnan(array).any() else "Inf"
            raise DivergenceError(
                f"training stopped at step {step}: {name} holds {kind} ({count} of {array.size} elements);"
                " lower the learning rate (--lr) or look at the data"
            )
