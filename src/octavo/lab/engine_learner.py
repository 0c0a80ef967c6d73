"""Training in Octavo's engine as a configuration says, in one process on the CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo import engine
from octavo.engine import Tensor, no_grad
from octavo.lab.config import Config
from octavo.lab.data import Dataset
from octavo.lab.engine_loop import Network, Prepared, layers_of, prepare
from octavo.lab.learner import MODEL, OPTIMIZER, Learner, Rows, Snapshot, Update, check_names, shares
from octavo.lab.networks import exempt_layers, start
from octavo.lab.optimizers import OptimizerKind, OptimizerRule
from octavo.lab.sections import Activation, ModelKind, PrecisionKind
from octavo.lab.training import DivergenceError
from octavo.patterns import exempt_among

__all__ = ["EngineLearner"]

Array = npt.NDArray[Any]
_SCALES = ("scale_forward", "amax_history_forward", "scale_backward", "amax_history_backward", "draws")
"""What a layer under a recipe keeps, by the names of its buffers in PyTorch."""


class EngineLearner(Learner):
    """The network, its optimizer and its data.

    Raises ValueError, in one line that names the key, for what the engine does not do: networks other than linear layers with ReLU,
    dropout, bfloat16 and float16, rules other than SGD and Adam, loss scales, replicas; and for exempt patterns that fit no layer.
    """

    framework = "numpy"
    device = "cpu"

    def __init__(self, config: Config, data: Dataset) -> None:
        _check(config)
        self.config, self.test_samples = config, len(data.test_labels)
        weights = start(config.model, config.runconfig.seed)
        spared: set[str] = set()
        if config.recipe is not None:
            spared = exempt_among(layers_of(weights), exempt_layers(config.model, config.exempt))
        self.network = Network(weights, recipe=config.recipe, spared=spared)
        self.parameters = self.network.parameters()
        self.rule = _Rule(config.optimizer.rule, self.parameters)
        self.data = _ready(config, data)

    def update(self, rows: Rows, step: int, rate: float, *, stop: bool) -> Update:
        for parameter in self.parameters.values():
            parameter.grad = None
        value = 0.0
        parts = shares(rows, rank=0, replicas=1, micro=self.config.optimizer.grad_accum_steps)
        for part in parts:
            x, y = _chosen(self.data.train_inputs, part), _chosen(self.data.train_labels, part)
            loss, share = engine.cross_entropy(self.network(x), y), len(part) / len(rows)
            loss.backward(engine.full((), share))
            value += loss.item() * share
        if self.config.runconfig.check_loss_values:
            if not math.isfinite(value):
                self._blame(parts, step, value)
            _require_finite(self._gradients(), "the gradient of", step)
        self._clip()
        self.network.update_scales()
        self.rule.step(self.parameters, rate)
        return Update(loss=value, stop=stop)

    def _gradients(self) -> dict[str, Array]:
        return {name: one.grad.array for name, one in self.parameters.items() if one.grad is not None}

    def _clip(self) -> None:
        """Limit the gradients as PyTorch's clip_grad_value_ and clip_grad_norm_ do."""
        options, gradients = self.config.optimizer, self._gradients().values()
        if options.max_gradient_value is not None:
            for gradient in gradients:
                np.clip(gradient, -options.max_gradient_value, options.max_gradient_value, out=gradient)
        if options.max_gradient_norm is not None:
            norm = math.sqrt(math.fsum(float(np.square(one, dtype=np.float64).sum()) for one in gradients))
            for gradient in gradients:
                gradient *= np.float32(np.minimum(1.0, options.max_gradient_norm / (norm + 1e-6)))  # NaN stays

    def _blame(self, parts: Sequence[Rows], step: int, value: float) -> None:
        """Raise DivergenceError that names where NaN or Inf came up first."""
        _require_finite({name: one.array for name, one in self.parameters.items()}, "parameter", step)
        for part in parts:
            with no_grad():
                x = _chosen(self.data.train_inputs, part)
                for name, layer in self.network.layers.items():
                    y = layer(x)
                    if not np.isfinite(y.array).all():
                        raise DivergenceError(
                            f"training stopped at step {step + 1}: the output of layer {name!r} holds NaN or Inf; lower the learning "
                            "rate, clip gradients, or exempt the layer"
                        )
                    x = engine.relu(y)
        raise DivergenceError(f"training stopped at step {step + 1}: the loss is {value}; lower the learning rate")

    def test(self, parts: Sequence[Rows]) -> tuple[float, float]:
        losses, correct, samples = [], 0, 0
        with no_grad():
            for part in parts:
                labels = _chosen(self.data.test_labels, part)
                logits = self.network(_chosen(self.data.test_inputs, part))
                losses.append(engine.cross_entropy(logits, labels).item() * len(part))
                correct += int((engine.argmax(logits).array == labels.array).sum())
                samples += len(part)
        return math.fsum(losses) / samples, correct / samples

    def snapshot(self) -> Snapshot:
        tensors = {MODEL + name: value for name, value in self.network.state().items()}
        tensors |= {OPTIMIZER + name: _turned(value.array).copy(order="C") for name, value in self.rule.state.items()}
        return Snapshot(tensors, {"scaler": None})

    def restore(self, tensors: Mapping[str, Any], facts: Mapping[str, Any] | None) -> None:
        found = {name.removeprefix(MODEL): value for name, value in tensors.items() if name.startswith(MODEL)}
        # Scales and histories may come in another length, or not at all.
        scaled = [name for name, layer in self.network.layers.items() if layer.state is not None]
        kept = {f"{layer}.{buffer}" for layer in scaled for buffer in _SCALES}
        check_names({name: value.shape for name, value in found.items() if name not in kept}, _shapes(self.parameters))
        there = {name.removeprefix(OPTIMIZER): one for name, one in tensors.items() if name.startswith(OPTIMIZER)}
        if facts is not None:
            check_names({name: value.shape for name, value in there.items()}, _shapes(self.rule.state))
        self.network.load(found)
        for name, slot in self.rule.state.items() if facts is not None else ():
            np.copyto(slot.array, _turned(there[name]))


class _Rule:
    """SGD or Adam; state: what it keeps, by the names of PyTorch's optimizers, `fc1.weight.exp_avg` and so on."""

    def __init__(self, rule: OptimizerRule, parameters: Mapping[str, Tensor]) -> None:
        self.kind, self.settings = rule.kind, dict[str, Any](rule.settings)
        self.state: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            if self.kind is OptimizerKind.ADAM:
                self.state[f"{name}.exp_avg"] = engine.zeros(parameter.shape)
                self.state[f"{name}.exp_avg_sq"] = engine.zeros(parameter.shape)
                self.state[f"{name}.step"] = engine.zeros(())
            elif self.settings["momentum"]:
                self.state[f"{name}.momentum_buffer"] = engine.zeros(parameter.shape)

    def step(self, parameters: Mapping[str, Tensor], rate: float) -> None:
        """Move the parameters along their gradients."""
        options, state = self.settings, self.state
        decay = options["weight_decay"]
        with no_grad():
            for name, parameter in parameters.items():
                if self.kind is OptimizerKind.ADAM:
                    kept = (state[f"{name}.{slot}"] for slot in ("exp_avg", "exp_avg_sq", "step"))
                    engine.adam_(parameter, parameter.grad, *kept, rate, *options["betas"], options["eps"], decay)
                else:
                    velocity = state.get(f"{name}.momentum_buffer")
                    momentum, nesterov = options["momentum"], options["nesterov"]
                    engine.sgd_(parameter, parameter.grad, velocity, rate, momentum, decay, nesterov)


def _check(config: Config) -> None:
    """Raise ValueError, in one line, for the first setting that the engine does not follow."""
    model, options, settings = config.model, config.optimizer, config.optimizer.rule.settings
    known = (OptimizerKind.SGD, OptimizerKind.ADAM)
    limits = (
        ("model.name", "fc_mnist or mlp", model.name.value, model.name in (ModelKind.FC_MNIST, ModelKind.MLP)),
        ("model.activation_fn", "relu", model.activation_fn.value, model.activation_fn is Activation.RELU),
        ("model.dropout", "0", model.dropout, not model.dropout),
        (
            "precision",
            "fp32 or a recipe",
            config.kind.value,
            config.kind in (PrecisionKind.FLOAT32, PrecisionKind.RECIPE),
        ),
        ("optimizer.optimizer_type", "SGD or Adam", options.rule.kind.value, options.rule.kind in known),
        ("optimizer.amsgrad", "false", "true", not settings.get("amsgrad")),
        ("optimizer.loss_scaling_factor", "1", options.loss_scaling_factor, options.loss_scaling_factor == 1.0),
        ("runconfig.num_replicas", "1", config.runconfig.num_replicas, config.runconfig.num_replicas == 1),
    )
    for key, wanted, got, fits in limits:
        if not fits:
            raise ValueError(
                f"{key} must be {wanted} with backend: engine, got {got}; change it, or write backend: torch, or jax"
            )


def _ready(config: Config, data: Dataset) -> Prepared:
    """Images and labels as the sections for input want them."""
    ready = prepare(data)
    train, test = (section.halved(config.kind) for section in (config.train_input, config.eval_input))

    def rounded(x: Tensor, chosen: bool) -> Tensor:
        return engine.from_numpy(x.array.astype(np.float16).astype(np.float32)) if chosen else x

    return ready._replace(train_inputs=rounded(ready.train_inputs, train), test_inputs=rounded(ready.test_inputs, test))


def _chosen(whole: Tensor, rows: Rows) -> Tensor:
    return engine.take_rows(whole, engine.from_numpy(rows.copy()))  # type: ignore[no-any-return]


def _turned(array: Array) -> Array:
    """From the engine's layout to PyTorch's, or back; alike but for matrices."""
    return array.T


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Of tensors by name, in PyTorch's layouts."""
    return {name: _turned(value.array).shape for name, value in tensors.items()}


def _require_finite(named: Mapping[str, Array], what: str, step: int) -> None:
    """Raise DivergenceError for the first array that holds NaN or Inf."""
    for name, array in named.items():
        if not np.isfinite(array).all():
            raise DivergenceError(
                f"training stopped at step {step + 1}: {what} {name!r} holds NaN or Inf; lower the learning rate, or clip gradients"
            )
