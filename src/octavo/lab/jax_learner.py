"""Training in JAX as a configuration says, on one device or on several of one process; an update is one compiled function."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import octavo.jax
from octavo.jax import FP8_COLLECTION, MeshResource
from octavo.lab.config import Config
from octavo.lab.data import Dataset
from octavo.lab.flax_models import network_of, spared_layers
from octavo.lab.jax_loop import Prepared, prepare
from octavo.lab.jax_state import LossScale, State, devices, placing, restored, snapshot
from octavo.lab.learner import Learner, Rows, Snapshot, Update
from octavo.lab.networks import exempt_layers, start
from octavo.lab.optimizers import optax_optimizer, with_rate
from octavo.lab.sections import Parallel, PrecisionKind
from octavo.lab.training import DivergenceError

__all__ = ["JaxLearner"]

Parts = tuple[Array, ...]
"""Micro-batches by the numbers of their samples, those of one size stacked: int32 [count, size] each."""


class Taken(NamedTuple):
    """What an update found: the mean loss, and whether each parameter's gradient is finite, bool [parameters], in the tree's order."""

    loss: Array
    finite: Array


class JaxLearner(Learner):
    """The network, its optimizer and its data.  report: takes one line for each step that the loss scale skips.

    The replicas of a configuration are devices of this one process: a CPU becomes so many where JAX has not started yet.
    Raises ValueError for fewer devices, exempt patterns that fit no layer, and rules that Optax does not have.
    """

    framework = "numpy"

    def __init__(self, config: Config, data: Dataset, report: Callable[[str], None] = print) -> None:
        self.config = config
        found = devices(config.runconfig.num_replicas)
        self.device, self.test_samples = found[0].platform, len(data.test_labels)
        axis = "fsdp" if config.runconfig.parallel is Parallel.FSDP2 else "dp"
        self.mesh = Mesh(np.array(found), (axis,), axis_types=(AxisType.Auto,)) if len(found) > 1 else None
        self.axis = axis
        self.scale = LossScale.of(config.optimizer, report)
        self.rule, self.clip = optax_optimizer(config.optimizer.rule), _clip(config)
        weights = start(config.model, config.runconfig.seed)
        spared: tuple[str, ...] = ()
        self.eight_bit: frozenset[str] = frozenset()
        if config.recipe is not None:
            spared = spared_layers(exempt_layers(config.model, config.exempt), weights)
            dense = {name.removesuffix(".weight") for name, value in weights.items() if value.ndim == 2}
            self.eight_bit = frozenset(dense - {*spared})
        self.network = network_of(config.model, dtype=_dtype(config.kind), spared=spared)
        with self._within(sharded=False):
            like = jax.eval_shape(self.network.init, jax.random.key(0), jnp.zeros((1, 1, 28, 28)))
        variables = octavo.jax.from_torch(weights, like)
        self.state = State(variables, self.rule.init(variables["params"]))
        self.places = None if self.mesh is None else placing(self.state, self.mesh, axis, config.runconfig.parallel)
        self.state = self._placed(jax.tree.map(lambda array: jnp.array(array, copy=True), self.state))
        self.data = self._whole(_ready(config, data))
        low, high = (np.uint32(config.runconfig.seed >> shift & 0xFFFFFFFF) for shift in (0, 32))
        self.key = self._whole(jax.random.fold_in(jax.random.key(low), high))
        self._update = jax.jit(self._updated, donate_argnums=0)
        self._test = jax.jit(self._tested)

    @property
    def devices(self) -> int:
        """How many devices share an update."""
        return 1 if self.mesh is None else self.mesh.size

    def _placed(self, state: State) -> State:
        return state if self.places is None else jax.device_put(state, self.places)

    def _whole(self, arrays: Any) -> Any:
        return arrays if self.mesh is None else jax.device_put(arrays, NamedSharding(self.mesh, P()))

    @contextlib.contextmanager
    def _within(self, *, sharded: bool) -> Iterator[None]:
        """What functions are traced and called in; sharded: their batch is split over the devices."""
        with contextlib.ExitStack() as stack:
            if self.mesh is not None:
                stack.enter_context(jax.set_mesh(self.mesh))
            if self.config.recipe is not None:
                resource = MeshResource(**{f"{self.axis}_resource": self.axis}) if sharded else MeshResource()
                stack.enter_context(octavo.jax.autocast(recipe=self.config.recipe, mesh_resource=resource))
            yield

    def _splits(self, size: int) -> bool:
        """Whether the devices share a batch of that size; one that they do not divide each computes whole."""
        return self.mesh is not None and size % self.devices == 0

    def _shared(self, array: Array) -> Array:
        """A batch, split over the devices along its first dimension."""
        if self.mesh is None:
            return array
        place = NamedSharding(self.mesh, P(self.axis) if self._splits(len(array)) else P())
        split: Array = lax.with_sharding_constraint(array, place)
        return split

    def update(self, rows: Rows, step: int, rate: float, *, stop: bool) -> Update:
        parts = _stacked(rows, self.config.optimizer.grad_accum_steps)
        scale = None if self.scale is None else np.float32(self.scale.value)
        with self._within(sharded=all(self._splits(part.shape[1]) for part in parts)):
            self.state, taken = self._update(
                self.state, self.data, parts, self.key, np.uint32(step), np.float32(rate), scale
            )
        taken = jax.device_get(taken)
        value, clean = float(taken.loss), bool(taken.finite.all())
        if self.config.runconfig.check_loss_values:
            if not math.isfinite(value):
                self._blame(parts, step, value)
            if self.scale is None and not clean:
                self._blame_gradients(taken.finite, step)
        stepped = self.scale is None or self.scale.step(step + 1, finite=clean)
        return Update(loss=value, taken=stepped, stop=stop, loss_scale=None if self.scale is None else self.scale.value)

    def _loss(self, output: Array, labels: Array) -> Array:
        """The sum of the samples' losses."""
        log_probs = jax.nn.log_softmax(output) if self.config.model.disable_softmax else output
        return -jnp.take_along_axis(log_probs, labels[:, None], axis=1).sum()

    def _updated(
        self, state: State, data: Prepared, parts: Parts, key: Array, step: Array, rate: Array, scale: Array | None
    ) -> tuple[State, Taken]:
        """One update; of a loss or gradients that are not finite none, as the configuration says.  scale: of the loss."""
        loss, gradients = self._gradients(state.variables, data, parts, jax.random.fold_in(key, step), scale)
        params, slopes = state.variables["params"], gradients["params"]
        if scale is not None:
            slopes = jax.tree.map(lambda slope: slope * (1 / scale), slopes)
        taken = Taken(loss, jnp.array([jnp.isfinite(slope).all() for slope in jax.tree.leaves(slopes)]))
        slopes, _ = self.clip.update(slopes, self.clip.init(params))
        updates, optimizer = self.rule.update(slopes, with_rate(state.optimizer, rate), params)
        weights, metadata = self._accepted(taken)
        kept = _either(metadata, octavo.jax.update_collections(gradients, state.variables), state.variables)
        kept["params"] = _either(weights, optax.apply_updates(params, updates), params)
        after = State(kept, _either(weights, optimizer, state.optimizer))
        return (after if self.places is None else lax.with_sharding_constraint(after, self.places)), taken

    def _accepted(self, taken: Taken) -> tuple[Array | bool, Array | bool]:
        """Whether the weights and the optimizer take the step, and whether 8-bit metadata does, which a skipped step moves too."""
        clean, sound = taken.finite.all(), jnp.isfinite(taken.loss)
        match self.config.runconfig.check_loss_values, self.scale is not None:
            case True, True:
                return sound & clean, sound
            case True, False:
                return sound & clean, sound & clean
            case False, True:
                return clean, True
            case _:
                return True, True

    def _gradients(
        self, variables: Any, data: Prepared, parts: Parts, key: Array, scale: Array | None
    ) -> tuple[Array, Any]:
        """The mean loss and its gradients, `scale` times as large, over micro-batches whose amaxes are merged."""
        samples = sum(part.size for part in parts)

        def loss_of(variables: Any, rows: Array, key: Array) -> tuple[Array, Array]:
            x, y = self._shared(data.train_inputs[rows]), self._shared(data.train_labels[rows])
            output: Any = self.network.apply(variables, x, train=True, rngs={"dropout": key})
            loss = self._loss(output, y) / samples
            return loss if scale is None else loss * scale, loss

        gradients_of = jax.grad(loss_of, has_aux=True)
        if [part.shape[0] for part in parts] == [1]:
            gradients, loss = gradients_of(variables, parts[0][0], key)
            return loss, gradients

        def add(sums: tuple[Array, Any], turn: tuple[Array, Array]) -> tuple[tuple[Array, Any], None]:
            rows, number = turn
            total, found = sums
            gradients, loss = gradients_of(_drawn(variables, found), rows, jax.random.fold_in(key, number))
            return (total + loss, _added(found, gradients)), None

        sums, done = (jnp.zeros(()), _drawn(jax.tree.map(jnp.zeros_like, variables), variables)), 0
        for part in parts:
            sums, _ = lax.scan(add, sums, (part, jnp.arange(done, done + len(part), dtype=jnp.uint32)))
            done += len(part)
        return sums

    def _blame(self, parts: Parts, step: int, value: float) -> None:
        """Raise DivergenceError that names where NaN or Inf came up first; the state is that before the update."""
        head = f"training stopped at step {step + 1}:"
        for path, parameter in jax.tree_util.tree_leaves_with_path(self.state.variables["params"]):
            if not np.isfinite(parameter).all():
                raise DivergenceError(f"{head} parameter {_name(path)!r} holds NaN or Inf; lower the learning rate")
        key = jax.random.fold_in(self.key, np.uint32(step))
        micro = [rows for part in parts for rows in part]
        for number, rows in enumerate(micro):
            with self._within(sharded=self._splits(len(rows))):
                _, seen = self.network.apply(
                    self.state.variables,
                    self.data.train_inputs[rows],
                    train=True,
                    rngs={"dropout": jax.random.fold_in(key, np.uint32(number)) if len(micro) > 1 else key},
                    mutable=["intermediates"],
                    capture_intermediates=True,
                )
            # Not through a compiled function, whose result would be in the order of names, fc10 before fc2.
            for path, output in _in_order(seen["intermediates"]):
                if path and not bool(jnp.isfinite(output).all()):
                    raise DivergenceError(
                        f"{head} the output of layer {'.'.join(path)!r} holds NaN or Inf; lower the learning rate, clip gradients, "
                        "or exempt the layer"
                    )
        raise DivergenceError(f"{head} the loss is {value}; lower the learning rate")

    def _blame_gradients(self, finite: Any, step: int) -> None:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(self.state.variables["params"])]
        raise DivergenceError(
            f"training stopped at step {step + 1}: the gradient of {_name(paths[int(np.argmin(finite))])!r} holds NaN or Inf; "
            "lower the learning rate, or clip gradients"
        )

    def _tested(self, variables: Any, data: Prepared, rows: Array) -> tuple[Array, Array]:
        x, y = self._shared(data.test_inputs[rows]), self._shared(data.test_labels[rows])
        output: Any = self.network.apply(variables, x)
        return self._loss(output, y), (output.argmax(1) == y).sum()

    def test(self, parts: Sequence[Rows]) -> tuple[float, float]:
        found = []
        for part in parts:
            with self._within(sharded=self._splits(len(part))):
                found.append(self._test(self.state.variables, self.data, part.astype(np.int32)))
        losses, right = (np.array(column, np.float64) for column in zip(*jax.device_get(found), strict=True))
        samples = sum(len(part) for part in parts)
        return float(losses.sum()) / samples, float(right.sum()) / samples

    def snapshot(self) -> Snapshot:
        return snapshot(self.state, self.scale)

    def restore(self, tensors: Mapping[str, Any], facts: Mapping[str, Any] | None) -> None:
        state = restored(self.state, tensors, eight_bit=self.eight_bit, whole=facts is not None)
        if facts is not None and self.scale is not None and facts["scaler"] is not None:
            self.scale.load_state_dict(facts["scaler"])
        self.state = self._placed(state)


def _dtype(kind: PrecisionKind) -> Any:
    """What layers compute in."""
    match kind:
        case PrecisionKind.FLOAT32 | PrecisionKind.RECIPE:
            return jnp.float32
        case PrecisionKind.BFLOAT16:
            return jnp.bfloat16
        case PrecisionKind.FLOAT16:
            return jnp.float16
        case _:
            assert_never(kind)


def _clip(config: Config) -> optax.GradientTransformation:
    options = config.optimizer
    if options.max_gradient_norm is not None:
        return optax.clip_by_global_norm(options.max_gradient_norm)
    return optax.identity() if options.max_gradient_value is None else optax.clip(options.max_gradient_value)


def _ready(config: Config, data: Dataset) -> Prepared:
    """Images and labels as precision wants them."""
    ready = prepare(data)
    train, test = (section.halved(config.kind) for section in (config.train_input, config.eval_input))

    def rounded(x: Array, chosen: bool) -> Array:
        return x.astype(jnp.float16).astype(jnp.float32) if chosen else x

    return ready._replace(train_inputs=rounded(ready.train_inputs, train), test_inputs=rounded(ready.test_inputs, test))


def _stacked(rows: Rows, micro: int) -> tuple[Any, ...]:
    """A batch in `micro` parts, the larger ones first where they are of two sizes, as `learner.shares` splits it."""
    size, larger = divmod(len(rows), micro)
    border = larger * (size + 1)
    whole = rows.astype(np.int32)
    parts = [whole[:border].reshape(larger, size + 1), whole[border:].reshape(micro - larger, size)]
    return tuple(part for part in parts if part.size)


def _either(chosen: Array | bool, new: Any, old: Any) -> Any:
    """`new` where chosen, else `old`, whole trees."""
    if isinstance(chosen, bool):
        return new if chosen else old
    return jax.tree.map(lambda one, other: jnp.where(chosen, one, other), new, old)


def _drawn(variables: Any, later: Any) -> Any:
    """Variables with the random draws of later ones: micro-batches that drew alike would round alike."""
    if FP8_COLLECTION not in variables:
        return variables
    pick = lambda path, one, other: other if path[-1].key == "draws" else one  # noqa: E731
    metas = jax.tree_util.tree_map_with_path(pick, variables[FP8_COLLECTION], later[FP8_COLLECTION])
    return {**variables, FP8_COLLECTION: metas}


def _added(one: Any, other: Any) -> Any:
    """The gradients of two micro-batches: sums, and the merged next state of 8-bit layers."""
    sums = jax.tree.map(jnp.add, one["params"], other["params"])
    merged = (
        {FP8_COLLECTION: octavo.jax.merge_fp8_metas(one[FP8_COLLECTION], other[FP8_COLLECTION])}
        if FP8_COLLECTION in one
        else {}
    )
    return {**merged, "params": sums}


def _in_order(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Layers and what they gave, in the order in which they ran."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _in_order(value, (*path, name))
        else:
            yield from ((path, output) for output in value)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
