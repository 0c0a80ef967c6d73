"""Configuration files: both shapes, overrides, and a line that names the key, what it got and the fix for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.lab.config_file import ConfigError, dump, read, read_text
from octavo.lab.schedules import rate
from octavo.lab.sections import Backend, Parallel, PrecisionKind
from octavo.recipes import NAMED, delayed_scaling

CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "fc_mnist" / "configs").glob("*.yaml"))

OLDER = """
train_input: {data_dir: /data, batch_size: 64}
eval_input: {data_dir: /data, batch_size: 100}
model: {name: fc_mnist, depth: 3, hidden_size: 40, dropout: 0.1}
optimizer:
  optimizer_type: SGD
  learning_rate:
    - {scheduler: Linear, initial_learning_rate: 0.0, end_learning_rate: 0.1, decay_steps: 10}
    - {scheduler: CosineDecay, initial_learning_rate: 0.1, end_learning_rate: 1e-3, decay_steps: 90}
  momentum: 0.5
  weight_decay_rate: 1e-4
  loss_scaling_factor: dynamic
  max_gradient_norm: 1
  grad_accum_steps: 2
runconfig:
  {model_dir: runs/x, seed: 7, max_steps: 100, eval_frequency: 50, checkpoint_steps: 20, save_initial_checkpoint: true, log_steps: 10}
precision: bf16
"""
NEWER = """
trainer:
  init:
    model_dir: runs/x
    seed: 7
    backend: {backend_type: CPU}
    model: {name: fc_mnist, depth: 3, hidden_size: 40, dropout: 0.1}
    optimizer: {SGD: {momentum: 0.5, weight_decay: 1e-4}}
    schedulers:
      - LinearLR: {initial_learning_rate: 0.0, end_learning_rate: 0.1, total_iters: 10}
      - CosineDecayLR: {initial_learning_rate: 0.1, end_learning_rate: 1e-3, total_iters: 90}
    precision: {enabled: true, fp16_type: bfloat16, loss_scaling_factor: dynamic, max_gradient_norm: 1}
    loop: {max_steps: 100, eval_frequency: 50, grad_accum_steps: 2}
    checkpoint: {steps: 20, save_initial_checkpoint: true}
    logging: {log_steps: 10}
  fit:
    train_dataloader: {data_processor: MNISTDataProcessor, data_dir: /data, batch_size: 64}
    val_dataloader: {data_processor: MNISTDataProcessor, data_dir: /data, batch_size: 100}
"""


def told(text: str, *overrides: str) -> str:
    """The one line that a mistake comes to."""
    with pytest.raises(ConfigError) as caught:
        read_text(text, "run.yaml", overrides)
    assert str(caught.value).startswith("run.yaml: ")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("run.yaml: ")


def test_both_shapes_come_to_the_same() -> None:
    older, newer = read_text(OLDER, "older"), read_text(NEWER, "newer")
    assert older.resolved() == newer.resolved()
    assert older.hash == newer.hash
    assert older.kind is PrecisionKind.BFLOAT16
    assert rate(older.optimizer.learning_rate, 5) == pytest.approx(0.05)
    assert rate(older.optimizer.learning_rate, 1000) == pytest.approx(1e-3)


@pytest.mark.parametrize("text", [OLDER, NEWER, "", *(path.read_text() for path in CONFIGS)])
def test_what_is_written_beside_the_run_reads_back_as_the_same(text: str) -> None:
    config = read_text(text, "file")
    again = read_text(dump(config), "resolved")
    assert again == config
    assert again.hash == config.hash
    assert again.recipe == config.recipe


def test_defaults_are_those_of_the_runner() -> None:
    config = read_text("{}", "empty")
    assert (config.train_input.batch_size, config.model.sizes) == (128, (50,) * 10)
    assert config.optimizer.rule.settings["momentum"] == 0.9
    assert config.optimizer.scale_bounds[1] == 2**15
    assert (config.runconfig.total_steps(468), config.runconfig.checkpoint_steps, config.runconfig.log_steps) == (
        10_000,
        2000,
        50,
    )
    assert config.backend is Backend.TORCH
    assert config.runconfig.parallel is Parallel.DDP


@pytest.mark.parametrize("name", NAMED)
def test_precision_takes_every_recipe(name: str) -> None:
    config = read_text(f"precision: {name}", "file")
    if name in ("bf16", "fp16"):
        assert config.recipe is None
        config = read_text(f"precision: {{recipe: {name}}}", "file")
    assert config.recipe == NAMED[name]()


def test_precision_takes_a_recipe_with_options() -> None:
    config = read_text("precision: {recipe: delayed_scaling, amax_history_len: 16, margin: 1}", "file")
    assert config.recipe == delayed_scaling(amax_history_len=16, margin=1)
    assert config.recipe is not None
    assert config.recipe.delayed == delayed_scaling(amax_history_len=16, margin=1).delayed


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("model: {mixed_precision: true}", PrecisionKind.FLOAT16),
        ("model: {mixed_precision: false}", PrecisionKind.FLOAT32),
        ("precision: fp16", PrecisionKind.FLOAT16),
        ("precision: mxfp8\nmodel: {mixed_precision: true}", PrecisionKind.RECIPE),
    ],
)
def test_mixed_precision_is_a_precision(text: str, kind: PrecisionKind) -> None:
    assert read_text(text, "file").kind is kind


def test_overrides_in_both_spellings() -> None:
    config = read_text(
        OLDER, "file", ["model.hidden_sizes", "[5, 6]", "precision=mxfp8", "optimizer.learning_rate", "3e-4"]
    )
    assert config.model.sizes == (5, 6)
    assert config.recipe == NAMED["mxfp8"]()
    assert config.optimizer.learning_rate == 3e-4
    newer = read_text(NEWER, "file", ["trainer.init.loop.max_steps=5"], num_replicas=2, model_dir="elsewhere")
    assert (newer.runconfig.max_steps, newer.runconfig.num_replicas) == (5, 2)
    assert newer.folder == Path("elsewhere")


def test_what_does_not_change_an_update_is_not_part_of_the_hash() -> None:
    one = read_text("", "file")
    same = ["runconfig.max_steps=5", "runconfig.model_dir=y", "train_input.data_dir=/d", "eval_input.batch_size=3"]
    assert read_text("", "file", [*same, "runconfig.num_replicas=2"]).hash == one.hash
    for change in (
        "runconfig.seed=2",
        "train_input.batch_size=64",
        "precision=mxfp8",
        "optimizer.momentum=0.5",
        "model.depth=3",
    ):
        assert read_text("", "file", [change]).hash != one.hash


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {depth: 3}", "unknown key modle; did you mean 'model'?"),
        ("model: {dept: 3}", "unknown key model.dept; did you mean 'depth'?"),
        ("runconfig: {checkpoint_step: 3}", "unknown key runconfig.checkpoint_step; did you mean 'checkpoint_steps'?"),
        ("train_input: {batchsize: 3}", "unknown key train_input.batchsize; did you mean 'batch_size'?"),
        ("runconfig: {max_steps: 10k}", "runconfig.max_steps should be an integer, got '10k' (str)"),
        ("runconfig: {max_steps: 1.5}", "runconfig.max_steps should be an integer, got 1.5 (float)"),
        ("runconfig: {max_steps: true}", "runconfig.max_steps should be an integer, got True (bool)"),
        ("runconfig: {max_steps: 0}", "runconfig.max_steps should be greater than or equal to 1, got 0"),
        ("model: {dropout: 1.0}", "model.dropout should be less than 1, got 1.0"),
        ("model: {dropout: yes}", "model.dropout should be a number, got True"),
        ("model: {use_bias: 1}", "model.use_bias should be a boolean, got 1"),
        ("model: {name: resnet}", "model.name: must be one of fc_mnist, cnn, mlp, transformer, got 'resnet'"),
        ("model: {activation_fn: relo}", "did you mean 'relu'?"),
        ("model: {hidden_sizes: [3, x]}", "got 'x' (str)"),
        ("model: {hidden_sizes: []}", "hidden_sizes must name at least one layer"),
        ("model: {to_float16: true}", "write precision: fp16"),
        ("model: {name: cnn, depth: 3}", "depth means nothing to name: cnn"),
        ("model: {num_heads: 3}", "num_heads means nothing to name: fc_mnist"),
        ("optimizer: {optimizer_type: SDG}", "did you mean 'SGD'?"),
        ("optimizer: {optimizer_type: Adam, momentum: 0.9}", "momentum"),
        ("optimizer: {learning_rate: fast}", "learning_rate"),
        ("optimizer: {learning_rate: {scheduler: Cosin, decay_steps: 3}}", "Cosin"),
        ("optimizer: {learning_rate: {scheduler: Linear, decay_step: 3}}", "decay_step"),
        ("optimizer: {max_gradient_norm: 1, max_gradient_value: 1}", "exclude each other; remove one"),
        ("optimizer: {initial_loss_scale: 8}", 'initial_loss_scale needs loss_scaling_factor: "dynamic"'),
        ("optimizer: {loss_scaling_factor: dynamik}", "loss_scaling_factor"),
        (
            "optimizer: {loss_scaling_factor: dynamic, min_loss_scale: 8, max_loss_scale: 4}",
            "must be min_loss_scale <=",
        ),
        ("runconfig: {max_steps: 3, num_epochs: 3}", "max_steps and num_epochs exclude each other"),
        ("runconfig: {steps_per_epoch: 3}", "steps_per_epoch needs num_epochs"),
        ("runconfig: {parallel: dpd}", "did you mean 'ddp'?"),
        ("runconfig: {num_replicas: 256}", "batch_size 128 must be a multiple of 256 replicas"),
        ("optimizer: {grad_accum_steps: 3}", "take 129, or fewer replicas"),
        ("train_input: {num_workers: 2}", "num_workers must be 0, got 2"),
        ("train_input: {use_fake_data: true, data_dir: /d}", "data_dir and use_fake_data exclude each other"),
        ("precision: delayed", "precision must be one of fp32, bf16, fp16"),
        ("precision: {recipe: mxfp8, margin: 1}", "precision: mxfp8 takes fp8_format, scale, got 'margin'"),
        ("precision: {recipe: delayed_scaling, margn: 1}", "did you mean 'margin'?"),
        ("precision: fp32\nmodel: {mixed_precision: true}", "exclude each other; remove mixed_precision"),
        ("precision: mxfp8\nmodel: {mixed_precision: false}", "exclude each other; remove one"),
        ("precision: bf16\nexempt: [fc1]", "exempt needs a recipe as precision, got bf16"),
        ("backend: tensorflow", "must be one of torch, jax, engine, got 'tensorflow'"),
        ("a: 1\na: 2", "line 2: 'a' stands twice; remove one"),
        ("model: {depth: 3, depth: 4}", "line 1: 'depth' stands twice"),
        ("3: x", "line 1: keys are words, got 3"),
        ("[1, 2]", "sections of key: value pairs are needed, got list"),
        ("model: {depth: 3", "line 1: not YAML"),
        ("model: [1]", "model should be a"),
        ("trainer: {init: {modle: {}}}", "unknown key trainer.init.modle; did you mean 'model'?"),
        ("trainer: {init: {loop: {max_step: 3}}}", "unknown key trainer.init.loop.max_step; did you mean 'max_steps'?"),
        ("trainer: {init: {model: {dept: 3}}}", "unknown key trainer.init.model.dept; did you mean 'depth'?"),
        (
            "trainer: {init: {}, fit: {train_dataloader: {batchsize: 3}}}",
            "unknown key trainer.fit.train_dataloader.batchsize",
        ),
        ("trainer: {init: {optimizer: {SGD: {}, Adam: {}}}}", "must name one rule, got SGD, Adam"),
        ("trainer: {fit: {train_dataloader: {data_processor: CIFAR}}}", "data_processor must be MNIST's, got 'CIFAR'"),
        ("trainer: {init: {precision: {fp16_type: float8}}}", "fp16_type"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(text: str, message: str) -> None:
    assert message in told(text)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.dept", "3"], "unknown key model.dept; did you mean 'depth'?"),
        (["model.depth"], "override 'model.depth' has no value"),
        (["model..depth", "3"], "is no section.key"),
        (["precision.recipe.name", "3", "precision", "x"], "precision must be one of"),
        (["backend.name", "3"], "backend"),
        (["model.depth", "[1"], "not YAML"),
    ],
)
def test_an_override_that_does_not_fit_is_one_line(overrides: list[str], message: str) -> None:
    assert message in told("backend: torch", *overrides)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("model: {depth: 2}", encoding="utf-8")
    assert read(tmp_path / "params.yaml").model.depth == 2
    with pytest.raises(ConfigError, match=r"parms\.yaml: no such file; did you mean 'params\.yaml'\?"):
        read(tmp_path / "parms.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "bytes.yaml")
