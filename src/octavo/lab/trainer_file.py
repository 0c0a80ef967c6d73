"""The newer shape of a configuration file, `trainer.init / fit / validate`, as the sections that `octavo.lab.config` knows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from octavo.lab.sections import Section

__all__ = ["TrainerFile"]


class _Backend(Section):
    backend_type: Annotated[Literal["cpu", "gpu"], BeforeValidator(lambda word: str(word).lower())]


class _Precision(Section):
    enabled: bool = True
    fp16_type: Literal["float16", "bfloat16"] = "float16"
    loss_scaling_factor: Any = None
    initial_loss_scale: Any = None
    steps_per_increase: Any = None
    min_loss_scale: Any = None
    max_loss_scale: Any = None
    max_gradient_norm: Any = None
    max_gradient_value: Any = None


class _Loop(Section):
    max_steps: Any = None
    num_epochs: Any = None
    steps_per_epoch: Any = None
    eval_frequency: Any = None
    eval_steps: Any = None
    grad_accum_steps: Any = None


class _Checkpoint(Section):
    steps: Any = None
    save_initial_checkpoint: Any = None
    keep_checkpoints: Any = None


class _Logging(Section):
    log_steps: Any = None


class _Init(Section):
    model_dir: Any = None
    seed: Any = None
    backend: _Backend | None = None
    model: dict[str, Any] = Field(default_factory=dict)
    optimizer: dict[str, Any] = Field(default_factory=dict)
    schedulers: list[dict[str, Any]] | None = None
    precision: _Precision | None = None
    loop: _Loop = _Loop()
    checkpoint: _Checkpoint = _Checkpoint()
    logging: _Logging = _Logging()
    num_replicas: Any = None
    parallel: Any = None


class _Fit(Section):
    train_dataloader: dict[str, Any] = Field(default_factory=dict)
    val_dataloader: dict[str, Any] | None = None


class _Validate(Section):
    val_dataloader: dict[str, Any] = Field(default_factory=dict)


class _Trainer(Section):
    init: _Init = _Init()
    fit: _Fit = _Fit()
    validate_: _Validate | None = Field(None, alias="validate")


class TrainerFile(Section):
    """The whole file."""

    trainer: _Trainer
    precision: Any = None
    exempt: Any = None
    backend: Any = None

    def sections(self) -> dict[str, Any]:
        """The same as the older sections; what those check (types, ranges) is checked there."""
        init, fit, test = self.trainer.init, self.trainer.fit, self.trainer.validate_
        found = {
            "train_input": _loader(fit.train_dataloader),
            "eval_input": _loader(test.val_dataloader if test else fit.val_dataloader or {}),
            "model": dict(init.model),
            "optimizer": self._optimizer(),
            "runconfig": _given(
                model_dir=init.model_dir,
                seed=init.seed,
                num_replicas=init.num_replicas,
                parallel=init.parallel,
                checkpoint_steps=init.checkpoint.steps,
                save_initial_checkpoint=init.checkpoint.save_initial_checkpoint,
                keep_checkpoints=init.checkpoint.keep_checkpoints,
                log_steps=init.logging.log_steps,
                **init.loop.model_dump(exclude={"grad_accum_steps"}),
            ),
        }
        precision = self.precision
        if precision is None and init.precision is not None:
            half = {"float16": "fp16", "bfloat16": "bf16"}[init.precision.fp16_type]
            precision = half if init.precision.enabled else "fp32"
        return found | _given(precision=precision, exempt=self.exempt, backend=self.backend)

    def _optimizer(self) -> dict[str, Any]:
        """`optimizer: {SGD: {...}}` with its schedulers, precision and loop, as one section."""
        init = self.trainer.init
        if len(init.optimizer) > 1:
            raise ValueError(f"trainer.init.optimizer must name one rule, got {', '.join(init.optimizer)}; remove one")
        found: dict[str, Any] = {}
        for name, settings in init.optimizer.items():
            if not isinstance(settings, dict | None):
                raise ValueError(f"trainer.init.optimizer.{name} must hold settings, got {settings!r}; write lr: 0.01")
            found = {"optimizer_type": name, **(settings or {})}
        for theirs, ours in (("lr", "learning_rate"), ("weight_decay", "weight_decay_rate")):
            if theirs in found:
                found[ours] = found.pop(theirs)
        if init.schedulers:
            found["learning_rate"] = [_scheduler(entry) for entry in init.schedulers]
        if init.precision is not None:
            found |= _given(**init.precision.model_dump(exclude={"enabled", "fp16_type"}))
        return found | _given(grad_accum_steps=init.loop.grad_accum_steps)


def _loader(keys: dict[str, Any]) -> dict[str, Any]:
    """A dataloader's keys; a processor, where one is named, is one of MNIST."""
    processor = str(keys.get("data_processor", "mnist"))
    if "mnist" not in processor.lower():
        raise ValueError(f"data_processor must be MNIST's, got {processor!r}; remove the key")
    return {key: value for key, value in keys.items() if key != "data_processor"}


def _scheduler(entry: dict[str, Any]) -> dict[str, Any]:
    """`{CosineDecayLR: {...}}` as `{scheduler: CosineDecayLR, ...}`."""
    if len(entry) == 1:
        ((name, settings),) = entry.items()
        if isinstance(settings, dict):
            return {"scheduler": name, **settings}
    return entry


def _given(**keys: Any) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if value is not None}
