"""The configuration of a run: what a file may say, and what it comes to.

Two shapes of file are read (`octavo.lab.config_file`): sections `train_input, eval_input, model, optimizer, runconfig`, and
`trainer.init / fit / validate`.  Both may have `precision`, `exempt` and `backend` at their top.  What is unknown or of a wrong type is
refused.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr, model_validator

from octavo.lab.sections import (
    Backend,
    EvalInput,
    Input,
    Model,
    OptimizerSection,
    PrecisionKind,
    Runconfig,
    Section,
    choice,
)
from octavo.names import nearest
from octavo.recipes import NAMED, Recipe

__all__ = ["Config", "flattened"]

_FREE = frozenset(
    f"{section}.{key}"
    for section, keys in {
        "runconfig": (name for name in Runconfig.model_fields if name != "seed"),
        "train_input": ("data_dir", "data"),
        "eval_input": EvalInput.model_fields,
        "model": ("compute_eval_metrics",),
    }.items()
    for key in keys
)
"""What a resumed run may say otherwise than before: none of it changes an update."""


class Config(Section):
    """A whole run.  precision: fp32, bf16, fp16, a recipe's name, or `{recipe: name, option: value}`; exempt: patterns of layers left in
    high precision under a recipe, default by model."""

    train_input: Input = Input()
    eval_input: EvalInput = EvalInput()
    model: Model = Model()
    optimizer: OptimizerSection = OptimizerSection()
    runconfig: Runconfig = Runconfig()
    precision: str | dict[str, Any] | None = None
    exempt: list[str] | None = None
    backend: choice(Backend, "torch, jax or engine") = Backend.TORCH  # type: ignore[valid-type]

    _recipe: Recipe | None = PrivateAttr(None)
    _kind: PrecisionKind = PrivateAttr(PrecisionKind.FLOAT32)

    @model_validator(mode="after")
    def _check(self) -> Config:
        self._kind, self._recipe = _precision(self.precision, self.model.mixed_precision)
        batch, micro = self.train_input.batch_size, self.optimizer.grad_accum_steps
        replicas = self.runconfig.num_replicas
        if batch % (micro * replicas):
            least = f"{replicas} replicas x {micro} micro-batches"
            raise ValueError(
                f"train_input.batch_size {batch} must be a multiple of {least} (runconfig.num_replicas, optimizer.grad_accum_steps); "
                f"take {-(-batch // (micro * replicas)) * micro * replicas}, or fewer replicas"
            )
        if self.exempt is not None and self._kind is not PrecisionKind.RECIPE:
            raise ValueError(f"exempt needs a recipe as precision, got {self._kind.value}; name one, or remove exempt")
        return self

    @property
    def kind(self) -> PrecisionKind:
        """What layers compute in."""
        return self._kind

    @property
    def recipe(self) -> Recipe | None:
        """The recipe, where there is one."""
        return self._recipe

    @property
    def precision_name(self) -> str:
        """What a table calls the precision."""
        return self._kind.value if self._recipe is None else self._recipe.name

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, plain: what the file beside the run says, and what reads back as this."""
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def deciding(self) -> dict[str, Any]:
        """`section.key` -> value of all that decides an update; a run resumes only under the same."""
        sections = {name: value for name, value in self.resolved().items() if name != "precision"}
        flat = flattened(sections) | {"precision": self.precision}
        return {key: value for key, value in flat.items() if key not in _FREE}

    @property
    def hash(self) -> str:
        """SHA-256 of `deciding`."""
        return hashlib.sha256(json.dumps(self.deciding, sort_keys=True).encode()).hexdigest()

    def alone(self) -> Config:
        """The same with one replica."""
        return self.model_copy(update={"runconfig": self.runconfig.model_copy(update={"num_replicas": 1})})

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return Path(self.runconfig.model_dir).expanduser()


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`section.key` -> value of nested mappings."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _precision(given: str | dict[str, Any] | None, mixed: bool | None) -> tuple[PrecisionKind, Recipe | None]:
    """What `precision` and `model.mixed_precision` come to."""
    if given is None:
        return (PrecisionKind.FLOAT16 if mixed else PrecisionKind.FLOAT32), None
    plain = {kind.value: kind for kind in PrecisionKind if kind is not PrecisionKind.RECIPE}
    if isinstance(given, str) and given in plain:
        if mixed is not None and mixed is (given == "fp32"):
            raise ValueError(
                f"precision: {given} and model.mixed_precision: {mixed} exclude each other; remove mixed_precision"
            )
        return plain[given], None
    if mixed is False:
        raise ValueError(f"precision: {given} and model.mixed_precision: False exclude each other; remove one")
    options = dict(given) if isinstance(given, dict) else {"recipe": given}
    name = str(options.pop("recipe", None))
    names = [*plain, *NAMED]
    if name not in NAMED:
        raise ValueError(f"precision must be one of {', '.join(names)}, got {name!r}{nearest(name, names)}")
    make = NAMED[name]
    known = inspect.signature(make).parameters
    for option in options:
        if option not in known:
            choices = ", ".join(known) or "no options"
            raise ValueError(f"precision: {name} takes {choices}, got {option!r}{nearest(option, known)}")
    return PrecisionKind.RECIPE, make(**options)
