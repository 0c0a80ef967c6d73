"""One network trained side by side in several precisions: same data, start, batches and dropout draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import rich.console

from octavo.lab.arms import ARMS, DEFAULT_ARMS, ArmResult, Framework
from octavo.lab.bench import Bench
from octavo.lab.data import Dataset, Source, load
from octavo.lab.models import ModelName
from octavo.lab.training import DivergenceError, Optimizer, TrainConfig
from octavo.names import nearest

__all__ = ["CompareConfig", "Comparison", "arms_for", "run"]

_SMALL = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings:
    """How a model is trained where the user does not say.  epochs_small: on fewer than `_SMALL` training images.

    The CNN's rate falls to almost nothing: where one epoch at the full rate ends is chance, by half a point of accuracy either way.
    """

    optimizer: Optimizer
    lr: float
    last_lr: float
    batch_size: int
    epochs: int
    epochs_small: int


_SETTINGS: Mapping[ModelName, _Settings] = MappingProxyType(
    {
        ModelName.CNN: _Settings(
            optimizer=Optimizer.ADADELTA, lr=1.0, last_lr=0.01, batch_size=64, epochs=1, epochs_small=8
        ),
        ModelName.MLP: _Settings(
            optimizer=Optimizer.SGD, lr=0.1, last_lr=1.0, batch_size=128, epochs=5, epochs_small=40
        ),
        ModelName.FC: _Settings(
            optimizer=Optimizer.SGD, lr=0.1, last_lr=1.0, batch_size=128, epochs=5, epochs_small=40
        ),
    }
)


def arms_for(model: ModelName) -> tuple[str, ...]:
    """Every arm that trains that network: the engine has no convolutions."""
    return tuple(
        name for name, arm in ARMS.items() if model is not ModelName.CNN or arm.framework is not Framework.ENGINE
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """What to compare; None leaves a setting to the model and the size of the data set."""

    source: Source = Source.AUTO
    model: ModelName = ModelName.MLP
    arms: tuple[str, ...] = DEFAULT_ARMS
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError(f"arms must name at least one arm; choose from {', '.join(ARMS)}")
        for name in self.arms:
            if name not in ARMS:
                raise ValueError(f"unknown arm {name!r}{nearest(name, ARMS) or '; the arms are ' + ', '.join(ARMS)}")
            if self.arms.count(name) > 1:
                raise ValueError(f"arm {name!r} is named {self.arms.count(name)} times; name each arm once")
            if name not in arms_for(self.model):
                raise ValueError(
                    f"arm {name!r} trains networks of linear layers, and {self.model.value} has convolutions; choose --model mlp, or fc"
                )

    def training(self, samples: int) -> TrainConfig:
        """How each arm trains on `samples` training samples.  Where only `steps` is given, epochs follow from it."""
        settings = _SETTINGS[self.model]
        batch_size = settings.batch_size if self.batch_size is None else self.batch_size
        epochs = self.epochs
        if epochs is None and self.steps is not None:
            epochs = max(1, -(-self.steps // max(1, samples // max(1, batch_size))))
        elif epochs is None:
            epochs = settings.epochs if samples >= _SMALL else settings.epochs_small
        return TrainConfig(
            optimizer=settings.optimizer,
            lr=settings.lr if self.lr is None else self.lr,
            last_lr=settings.last_lr,
            batch_size=batch_size,
            epochs=epochs,
            steps=self.steps,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The arms run so far, and what they share.  data: name -> fact about the data set, plain JSON."""

    config: CompareConfig
    training: TrainConfig
    data: Mapping[str, str | int]
    steps_per_epoch: int
    arms: tuple[ArmResult, ...] = ()

    def adding(self, result: ArmResult) -> Comparison:
        """With one more arm, the accuracy of each set against its framework's float32 arm where that is among them."""
        arms = (*self.arms, result)
        accuracy = {arm.name: arm.test_accuracy for arm in arms}
        compared = (
            dataclasses.replace(arm, difference_to_fp32=arm.test_accuracy - accuracy[arm.baseline])
            if arm.baseline in accuracy
            else arm
            for arm in arms
        )
        return dataclasses.replace(self, arms=tuple(compared))


def run(
    config: CompareConfig,
    *,
    dataset: Dataset | None = None,
    folder: Path | None = None,
    on_result: Callable[[Comparison], None] = lambda comparison: None,
    console: rich.console.Console | None = None,
) -> Comparison:
    """Runs the arms one after the other and returns what they came to.

    Args:
        config: what to compare.
        dataset: the data, loaded already; None loads `config.source`.
        folder: where each arm's checkpoint `<arm>.safetensors` goes after each epoch; None keeps none.
        on_result: called after each arm with the results so far, so that an interrupted run keeps them.
        console: where progress is drawn if it is a terminal; None is standard error.

    Raises:
        ValueError: an arm's framework is not installed.
        DataError, CheckpointError: as `data.load` and `checkpoint.save` do.
        DivergenceError: an arm met NaN or Inf; the message names arm, step and tensor.
    """
    dataset = dataset or load(config.source)
    samples = len(dataset.train_labels)
    training = config.training(samples)
    training.epoch_steps(samples)
    comparison = Comparison(
        config=config,
        training=training,
        data={"name": dataset.name, "training images": samples, "test images": len(dataset.test_labels)},
        steps_per_epoch=samples // training.batch_size,
    )

    benches = {
        framework: _bench(framework)(
            model=config.model,
            training=training,
            dataset=dataset,
            folder=folder,
            console=console,
            paired=framework.baseline in config.arms,
        )
        for framework in dict.fromkeys(ARMS[name].framework for name in config.arms)
    }
    for name in config.arms:
        try:
            comparison = comparison.adding(benches[ARMS[name].framework].measure(ARMS[name]))
        except DivergenceError as error:
            raise DivergenceError(f"{name}: {error}") from None
        on_result(comparison)
    return comparison


def _bench(framework: Framework) -> Callable[..., Bench]:
    """What measures a framework's arms, loaded when it is first asked for.  Raises ValueError where the framework is not installed."""
    try:
        match framework:
            case Framework.TORCH:
                from octavo.lab.torch_bench import TorchBench

                return TorchBench
            case Framework.JAX:
                from octavo.lab.jax_bench import JaxBench

                return JaxBench
            case Framework.ENGINE:
                from octavo.lab.engine_bench import EngineBench

                return EngineBench
    except ModuleNotFoundError as error:
        extra = "lab" if framework is Framework.ENGINE else framework.value  # nothing of its own
        raise ValueError(
            f"the {framework.value} arms need {error.name}, which is not installed; pip install 'octavo[{extra}]'"
        ) from None
