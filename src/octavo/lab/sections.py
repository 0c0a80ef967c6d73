"""The sections of a run's configuration; `octavo.lab.config` puts them together."""

from __future__ import annotations

import enum
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from octavo.lab.data import Source
from octavo.lab.optimizers import OptimizerRule, rule
from octavo.lab.schedules import LearningRate
from octavo.names import nearest

__all__ = [
    "Activation",
    "Backend",
    "EvalInput",
    "Input",
    "Model",
    "ModelKind",
    "OptimizerSection",
    "Parallel",
    "PrecisionKind",
    "Runconfig",
    "Section",
    "choice",
]


class Section(BaseModel):
    """A part of the file: no unknown key, no type but the one that is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Backend(enum.Enum):
    """What trains."""

    TORCH = "torch"
    """PyTorch, eager."""
    JAX = "jax"
    """JAX and Flax, a step compiled."""
    ENGINE = "engine"
    """Octavo's own engine."""


class Parallel(enum.Enum):
    """How replicas share the work."""

    DDP = "ddp"
    """Every replica holds the whole model."""
    FSDP2 = "fsdp2"
    """Parameters and optimizer state are sharded over the replicas."""


class PrecisionKind(enum.Enum):
    """What layers compute in."""

    FLOAT32 = "fp32"
    """float32 throughout."""
    BFLOAT16 = "bf16"
    """bfloat16 products, float32 weights: `torch.autocast`, or the dtype of Flax's layers."""
    FLOAT16 = "fp16"
    """The same in float16, which wants a loss scale."""
    RECIPE = "recipe"
    """Linear layers under one of Octavo's recipes."""


class ModelKind(enum.Enum):
    """The networks that a configuration can name."""

    FC_MNIST = "fc_mnist"
    """A stack of linear layers: `hidden_sizes`, or `depth` times `hidden_size`, and ten outputs."""
    CNN = "cnn"
    """The network of Transformer Engine's MNIST example."""
    MLP = "mlp"
    """784-256-10 with ReLU."""
    TRANSFORMER = "transformer"
    """A decoder-only transformer, for `octavo validate` and `octavo compile`."""


class Activation(enum.Enum):
    """What follows each hidden layer of an FC-MNIST."""

    RELU = "relu"
    """max(x, 0)."""
    GELU = "gelu"
    """x times the normal distribution function of x."""
    SILU = "silu"
    """x times its logistic function."""
    TANH = "tanh"
    """The hyperbolic tangent."""
    SIGMOID = "sigmoid"
    """The logistic function."""
    ELU = "elu"
    """x, or exp(x) - 1 where x is negative."""


def choice(kind: type[enum.Enum], what: str) -> Any:
    """`kind` as a file spells it: by value, in any case."""

    def read(word: Any) -> Any:
        if isinstance(word, kind):
            return word
        values = [member.value for member in kind]
        if isinstance(word, str) and word.lower() in values:
            return kind(word.lower())
        raise ValueError(f"must be one of {', '.join(values)}, got {word!r}{nearest(str(word), values)}")

    return Annotated[kind, BeforeValidator(read), Field(description=what)]


Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Magnitude = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Input(Section):
    """Images to train on.

    data: where they come from if there is no data_dir, which names the folder of MNIST's four files and is filled if it lacks them.
    batch_size: of one update, over all replicas and micro-batches.  to_float16: round pixels to float16; None: where precision is fp16.
    use_fake_data: random images of ten classes, which need no file.  num_workers: 0, as the data are held in memory.
    """

    data: choice(Source, "auto, mnist or digits") = Source.AUTO  # type: ignore[valid-type]
    data_dir: Annotated[str, Field(min_length=1)] | None = None
    batch_size: Positive = 128
    drop_last_batch: bool = True
    shuffle: bool = True
    num_workers: Count = 0
    to_float16: bool | None = None
    use_fake_data: bool = False

    @model_validator(mode="after")
    def _check(self) -> Input:
        if self.num_workers:
            raise ValueError(
                f"num_workers must be 0, got {self.num_workers}: the data are held in memory; remove the key"
            )
        if self.data_dir is not None and self.use_fake_data:
            raise ValueError("data_dir and use_fake_data exclude each other; remove one")
        return self

    def halved(self, kind: PrecisionKind) -> bool:
        """Whether pixels are rounded to float16."""
        return kind is PrecisionKind.FLOAT16 if self.to_float16 is None else self.to_float16


class EvalInput(Input):
    """Images to test on: all of them, in their order, unless the file says otherwise."""

    drop_last_batch: bool = False
    shuffle: bool = False


class Model(Section):
    """The network.

    hidden_sizes overrides depth times hidden_size.  mixed_precision: True is `precision: fp16`, False `precision: fp32`, where the file
    does not name a precision.  disable_softmax: outputs are logits, and the loss takes their log-softmax.  compute_eval_metrics: accuracy.
    num_heads, filter_size, vocab_size, max_length: of a transformer, whose depth counts blocks.
    """

    name: choice(ModelKind, "fc_mnist, cnn, mlp or transformer") = ModelKind.FC_MNIST  # type: ignore[valid-type]
    depth: Positive = 10
    hidden_size: Positive = 50
    hidden_sizes: (
        Annotated[tuple[Positive, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] | None
    ) = None
    dropout: Fraction = 0.0
    activation_fn: choice(Activation, "relu, gelu ...") = Activation.RELU  # type: ignore[valid-type]
    use_bias: bool = True
    mixed_precision: bool | None = None
    compute_eval_metrics: bool = True
    disable_softmax: bool = False
    to_float16: bool = False
    num_heads: Positive | None = None
    filter_size: Positive | None = None
    vocab_size: Positive | None = None
    max_length: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.to_float16:
            raise ValueError(
                "to_float16 would keep the weights themselves in float16, which loses small updates; remove it and write precision: fp16"
            )
        if self.hidden_sizes is not None and not self.hidden_sizes:
            raise ValueError("hidden_sizes must name at least one layer; remove it to use depth and hidden_size")
        others = {"num_heads", "filter_size", "vocab_size", "max_length"}
        stack = {"hidden_sizes", "activation_fn", "use_bias"}
        foreign = others if self.name is not ModelKind.TRANSFORMER else stack
        if self.name in (ModelKind.CNN, ModelKind.MLP):
            foreign = others | stack | {"depth", "hidden_size", "dropout", "disable_softmax"}
        for key in sorted(foreign & self.model_fields_set):
            if getattr(self, key) == type(self).model_fields[key].default:
                continue
            raise ValueError(f"{key} means nothing to name: {self.name.value}; remove it")
        if self.name is ModelKind.TRANSFORMER and self.hidden_size % (self.num_heads or 1):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}; change one"
            )
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """The widths of an FC-MNIST's hidden layers."""
        return self.hidden_sizes or (self.hidden_size,) * self.depth


class OptimizerSection(Section):
    """The update rule, its learning rate (a number, a schedule, or a list of schedules one after the other), and what precedes it.

    loss_scaling_factor: a constant, or "dynamic": from initial_loss_scale, doubled after steps_per_increase clean steps, halved at an
    overflow, within min_loss_scale and max_loss_scale.  max_gradient_norm, max_gradient_value: clip; they exclude each other.
    grad_accum_steps: micro-batches an update.
    """

    optimizer_type: str = "SGD"
    learning_rate: LearningRate = 0.001
    weight_decay_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    momentum: float | None = None
    nesterov: bool | None = None
    betas: list[float] | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    rho: float | None = None
    alpha: float | None = None
    centered: bool | None = None
    amsgrad: bool | None = None
    lr_decay: float | None = None
    momentum_decay: float | None = None
    loss_scaling_factor: Magnitude | Literal["dynamic"] = 1.0
    initial_loss_scale: Magnitude | None = None
    steps_per_increase: Positive | None = None
    min_loss_scale: Magnitude | None = None
    max_loss_scale: Magnitude | None = None
    max_gradient_norm: Magnitude | None = None
    max_gradient_value: Magnitude | None = None
    grad_accum_steps: Positive = 1

    @model_validator(mode="after")
    def _check(self) -> OptimizerSection:
        if self.max_gradient_norm is not None and self.max_gradient_value is not None:
            raise ValueError("max_gradient_norm and max_gradient_value exclude each other; remove one")
        if self.loss_scaling_factor != "dynamic":
            for key in ("initial_loss_scale", "steps_per_increase", "min_loss_scale", "max_loss_scale"):
                if getattr(self, key) is not None:
                    raise ValueError(f'{key} needs loss_scaling_factor: "dynamic"; write it, or remove {key}')
        low, first, high = self.scale_bounds
        if not low <= first <= high:
            raise ValueError(
                f"must be min_loss_scale <= initial_loss_scale <= max_loss_scale, got {low:g}, {first:g} and {high:g}; reorder them"
            )
        assert self.rule
        return self

    @cached_property
    def rule(self) -> OptimizerRule:
        """The update rule with its settings."""
        keys = (
            "momentum",
            "nesterov",
            "betas",
            "beta1",
            "beta2",
            "eps",
            "rho",
            "alpha",
            "centered",
            "amsgrad",
            "lr_decay",
        )
        given = {key: value for key in (*keys, "momentum_decay") if (value := getattr(self, key)) is not None}
        return rule(self.optimizer_type, weight_decay_rate=self.weight_decay_rate, **given)

    @property
    def growth_interval(self) -> int:
        """After how many clean steps a dynamic loss scale doubles."""
        return self.steps_per_increase or 2000

    @property
    def scale_bounds(self) -> tuple[float, float, float]:
        """The least, the first and the greatest dynamic loss scale."""
        return self.min_loss_scale or 1.0, self.initial_loss_scale or 2.0**15, self.max_loss_scale or 2.0**24


class Runconfig(Section):
    """How long, how often, where.

    max_steps, or num_epochs (of steps_per_epoch updates each, default: the whole data).  Every checkpoint_steps a checkpoint (0: only at
    the end), of which the newest keep_checkpoints stay; every log_steps a log line.  eval_frequency: updates between tests in
    train_and_eval, default at the end; eval_steps: batches of a test, default all.  check_loss_values: stop at NaN and Inf, naming the
    layer.
    """

    max_steps: Positive | None = None
    num_epochs: Positive | None = None
    steps_per_epoch: Positive | None = None
    checkpoint_steps: Count = 2000
    keep_checkpoints: Positive = 3
    log_steps: Positive = 50
    eval_steps: Positive | None = None
    eval_frequency: Positive | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 1
    model_dir: Annotated[str, Field(min_length=1)] = "model_dir"
    save_initial_checkpoint: bool = False
    check_loss_values: bool = True
    num_replicas: Positive = 1
    parallel: choice(Parallel, "ddp or fsdp2") = Parallel.DDP  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _check(self) -> Runconfig:
        if self.max_steps is not None and self.num_epochs is not None:
            raise ValueError("max_steps and num_epochs exclude each other; remove one")
        if self.steps_per_epoch is not None and self.num_epochs is None:
            raise ValueError("steps_per_epoch needs num_epochs; write it, or remove steps_per_epoch")
        return self

    def total_steps(self, updates_in_an_epoch: int) -> int:
        """How many updates a run takes over data of so many updates an epoch."""
        if self.num_epochs is None:
            return self.max_steps or 10_000
        return self.num_epochs * (self.steps_per_epoch or updates_in_an_epoch)
