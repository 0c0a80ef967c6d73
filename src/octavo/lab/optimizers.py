"""The rules that update weights, by the names that a configuration file gives them: PyTorch's own, and Optax's where both agree.

Settings have torch's names and defaults, but for SGD's momentum of 0.9.  `weight_decay` (`weight_decay_rate` in a file) adds that share of
the weight to its gradient; AdamW takes the rate's share of it from the weight instead.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from octavo.names import nearest

if TYPE_CHECKING:
    import jax
    import optax
    import torch

__all__ = ["OptimizerKind", "OptimizerRule", "RatedState", "optax_optimizer", "rule", "torch_optimizer", "with_rate"]

Setting = float | bool | tuple[float, float]


class OptimizerKind(enum.Enum):
    """The rules, by the names of their classes in `torch.optim`."""

    SGD = "SGD"
    """Stochastic gradient descent, with momentum and Nesterov's."""
    ADAM = "Adam"
    """Adam (Kingma and Ba, 2015), and AMSGrad."""
    ADAMW = "AdamW"
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""
    ADADELTA = "Adadelta"
    """Adadelta (Zeiler, 2012)."""
    ADAGRAD = "Adagrad"
    """Adagrad (Duchi, Hazan and Singer, 2011)."""
    ADAMAX = "Adamax"
    """Adam with the infinity norm (Kingma and Ba, 2015)."""
    NADAM = "NAdam"
    """Adam with Nesterov's momentum (Dozat, 2016)."""
    RADAM = "RAdam"
    """Rectified Adam (Liu et al., 2020)."""
    RMSPROP = "RMSprop"
    """Divided by the root of a running mean of squares (Hinton, 2012), centred or not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """What a rule takes, with defaults, and why it is not for JAX: `no_optax` is None where Optax's rule agrees with torch's."""

    settings: Mapping[str, Setting]
    no_optax: str | None = None


_ADAM: dict[str, Setting] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_TABLE: dict[OptimizerKind, _Row] = {
    OptimizerKind.SGD: _Row(settings={"momentum": 0.9, "nesterov": False, "weight_decay": 0.0}),
    OptimizerKind.ADAM: _Row(settings=_ADAM | {"amsgrad": False}),
    OptimizerKind.ADAMW: _Row(settings=_ADAM | {"amsgrad": False, "weight_decay": 0.01}),
    OptimizerKind.ADADELTA: _Row(settings={"rho": 0.9, "eps": 1e-6, "weight_decay": 0.0}),
    OptimizerKind.ADAGRAD: _Row(
        settings={"lr_decay": 0.0, "initial_accumulator_value": 0.0, "eps": 1e-10, "weight_decay": 0.0}
    ),
    OptimizerKind.ADAMAX: _Row(settings=_ADAM),
    OptimizerKind.NADAM: _Row(
        settings=_ADAM | {"momentum_decay": 0.004},
        no_optax="Optax's momentum does not grow by momentum_decay",
    ),
    OptimizerKind.RADAM: _Row(
        settings=_ADAM,
        no_optax="Optax's rectification is inexact in float32, and its eps is elsewhere",
    ),
    OptimizerKind.RMSPROP: _Row(
        settings={"alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "centered": False, "weight_decay": 0.0}
    ),
}
_BELOW_ONE = frozenset({"betas", "momentum", "rho", "alpha"})
"""The shares of a running mean that stay, 0 ... 1 without 1; every other number is at least 0."""


def _check(kind: OptimizerKind, key: str, value: Setting, default: Setting) -> None:
    """Raises ValueError for a setting of another type than its default's, or out of its range."""
    name = f"{key} of {kind.value}"
    match default:
        case bool():
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}; give {str(default).lower()}")
            return
        case tuple():
            if not (isinstance(value, tuple) and len(value) == len(default)):
                raise ValueError(f"{name} must be {len(default)} numbers, got {value!r}; give {list(default)}")
            numbers: tuple[object, ...] = value
        case _:
            numbers = (value,)
    end = 1.0 if key in _BELOW_ONE else math.inf
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < end:
            bounds = "finite and at least 0" if end == math.inf else "at least 0 and below 1"
            raise ValueError(f"{name} must be {bounds}, got {number!r}; give {default}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerRule:
    """A rule with all of its settings, under torch's names; made by `rule`, which fills in what is not given.

    Raises ValueError for a setting that the rule lacks or does not take, a wrong type, NaN, a number out of its range, and Nesterov's
    momentum without momentum.
    """

    kind: OptimizerKind
    settings: Mapping[str, Setting]

    def __post_init__(self) -> None:
        defaults = _TABLE[self.kind].settings
        if self.settings.keys() != defaults.keys():
            wrong = ", ".join(sorted(self.settings.keys() ^ defaults.keys()))
            raise ValueError(f"{self.kind.value} needs {', '.join(defaults)}, got other or missing {wrong}; use rule()")
        for key, value in self.settings.items():
            _check(self.kind, key, value, defaults[key])
        if self.settings.get("nesterov") and not self.settings["momentum"]:
            raise ValueError("nesterov of SGD needs momentum above 0, got 0; give 0.9, or leave nesterov out")
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))


def _kind(name: str) -> OptimizerKind:
    for kind in OptimizerKind:
        if kind.value.lower() == name.lower():
            return kind
    names = [kind.value for kind in OptimizerKind]
    near = nearest(name, names) or "; take one of those"
    raise ValueError(f"optimizer must be one of {', '.join(names)}, got {name!r}{near}")


def rule(name: str, **settings: object) -> OptimizerRule:
    """The rule of that name, in any case, with the settings given and torch's defaults (SGD: momentum 0.9) for the others.

    `weight_decay_rate` is another name for `weight_decay`; betas are two numbers, or `beta1` and `beta2`.  Raises ValueError, in one line,
    for a name or key that there is not, with the nearest one, for one given twice, and for what `OptimizerRule` refuses.
    """
    kind = _kind(name)
    defaults = _TABLE[kind].settings
    given = dict(settings)
    if "weight_decay_rate" in given:
        if "weight_decay" in given:
            raise ValueError(f"{kind.value} takes weight_decay once, got weight_decay_rate too; leave one of them out")
        given["weight_decay"] = given.pop("weight_decay_rate")
    single = [key for key in ("beta1", "beta2") if key in given and "betas" in defaults]
    if single and "betas" in given:
        raise ValueError(
            f"{kind.value} takes betas or beta1 and beta2, got betas and {single[0]}; leave one of them out"
        )
    if single:
        first, second = defaults["betas"]  # type: ignore[misc]
        given["betas"] = (given.pop("beta1", first), given.pop("beta2", second))
    for key in given:
        if key not in defaults:
            near = nearest(key, defaults) or "; leave it out"
            raise ValueError(f"{kind.value} takes {', '.join(defaults)}, got {key!r}{near}")
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return OptimizerRule(kind=kind, settings=dict(defaults) | plain)


def torch_optimizer(rule: OptimizerRule, parameters: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """The `torch.optim` optimizer of that rule over `parameters`, at the rate `lr`: finite, at least 0; ValueError otherwise.

    A schedule sets `group["lr"]` of each of its `param_groups` before a step.
    """
    import torch

    if not 0 <= lr < math.inf:
        raise ValueError(f"lr must be finite and at least 0, got {lr}; try 0.001")
    kind: type[torch.optim.Optimizer] = getattr(torch.optim, rule.kind.value)
    optimizer: torch.optim.Optimizer = kind(parameters, lr=lr, **rule.settings)  # type: ignore[arg-type,call-arg]
    return optimizer


class RatedState(NamedTuple):
    """What `optax_optimizer` keeps: `rate`, a float32 scalar that is NaN until `with_rate` sets it, and its rule's own state."""

    rate: jax.Array
    rule: Any


def with_rate(state: RatedState, lr: float | jax.Array) -> RatedState:
    """`state` with the rate of the next steps; a rate may be traced, and another one compiles nothing anew."""
    import jax.numpy as jnp

    return state._replace(rate=jnp.asarray(lr, jnp.float32))


def _adagrad(settings: Mapping[str, Any]) -> optax.GradientTransformation:
    """Optax's sums of squares; torch adds eps to their root, Optax to themselves."""
    import jax
    import jax.numpy as jnp
    import optax

    sums = optax.scale_by_rss(settings["initial_accumulator_value"], eps=0.0)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = sums.update(gradients, state, params)
        scaled = jax.tree.map(
            lambda grad, total: grad / (jnp.sqrt(total) + settings["eps"]), gradients, state.sum_of_squares
        )
        return scaled, state

    falling = optax.scale_by_schedule(lambda count: 1 / (1 + count * settings["lr_decay"]))
    return optax.chain(optax.GradientTransformation(sums.init, update), falling)


def _direction(kind: OptimizerKind, settings: Mapping[str, Any]) -> optax.GradientTransformation:
    """What the rate multiplies, for a gradient that weight decay has been added to, with Optax's arguments that agree with torch."""
    import optax

    match kind:
        case OptimizerKind.SGD:
            if not settings["momentum"]:
                return optax.identity()
            return optax.trace(settings["momentum"], nesterov=settings["nesterov"])
        case OptimizerKind.ADAM | OptimizerKind.ADAMW:
            return optax.scale_by_adam(*settings["betas"], eps=settings["eps"])
        case OptimizerKind.ADADELTA:
            return optax.scale_by_adadelta(settings["rho"], settings["eps"])
        case OptimizerKind.ADAGRAD:
            return _adagrad(settings)
        case OptimizerKind.ADAMAX:
            return optax.scale_by_adamax(*settings["betas"], eps=settings["eps"])
        case OptimizerKind.RMSPROP:
            scale = optax.scale_by_stddev if settings["centered"] else optax.scale_by_rms
            divided = scale(settings["alpha"], settings["eps"], eps_in_sqrt=False)
            return optax.chain(divided, optax.trace(settings["momentum"])) if settings["momentum"] else divided
        case OptimizerKind.NADAM | OptimizerKind.RADAM:
            raise AssertionError(kind)


def optax_optimizer(rule: OptimizerRule) -> optax.GradientTransformation:
    """Optax's transformation for that rule, whose state holds the rate of the next step: set it by `with_rate` before each.

    All of these rules are linear in the rate, so that they are computed for a rate of 1 and multiplied by it.  The settings stay
    Python floats; `optax.inject_hyperparams` makes float32 of them, where 1 - 0.999 is off by a part in 80,000.  Results follow torch's
    to rounding; `update` needs the parameters where weights decay.  Raises ValueError for NAdam, RAdam and AMSGrad, which differ.
    """
    import jax
    import jax.numpy as jnp
    import optax

    reason = _TABLE[rule.kind].no_optax
    if reason is None and rule.settings.get("amsgrad"):
        reason = "Optax takes AMSGrad's maximum after the correction of the bias, torch before"
    if reason is not None:
        raise ValueError(
            f"rules for JAX agree with torch, got {rule.kind.value}: {reason}; use Adam, or backend: torch"
        )
    parts = [_direction(rule.kind, rule.settings)]
    if rule.settings["weight_decay"]:
        place = 1 if rule.kind is OptimizerKind.ADAMW else 0
        parts.insert(place, optax.add_decayed_weights(rule.settings["weight_decay"]))
    whole = optax.chain(*parts)

    def init(params: Any) -> RatedState:
        return RatedState(rate=jnp.full((), jnp.nan, jnp.float32), rule=whole.init(params))

    def update(gradients: Any, state: RatedState, params: Any = None) -> tuple[Any, RatedState]:
        updates, inner = whole.update(gradients, state.rule, params)
        stepped = jax.tree.map(lambda update: -state.rate.astype(update.dtype) * update, updates)
        return stepped, state._replace(rule=inner)

    return optax.GradientTransformation(init, update)
