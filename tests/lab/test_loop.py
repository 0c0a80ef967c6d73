"""Training: it follows a plain NumPy transcription, repeats bit for bit, and stops at the first bad number."""

import dataclasses
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import rich.console
import torch
from torch import nn

from octavo.lab import checkpoint, loop, training
from octavo.lab.data import Source, batches, load
from octavo.lab.loop import Prepared, evaluate, train
from octavo.lab.models import ModelName, build, initial_weights
from octavo.lab.training import DivergenceError, History, Optimizer, Progress, TrainConfig

torch.set_num_threads(min(2, torch.get_num_threads()))

MLP = TrainConfig(optimizer=Optimizer.SGD, lr=0.1, batch_size=64, epochs=1, steps=4)
CNN = TrainConfig(optimizer=Optimizer.ADADELTA, lr=1.0, last_lr=0.01, batch_size=32, epochs=1, steps=3)


@pytest.fixture(scope="module")
def data() -> Prepared:
    return loop.prepare(load(Source.DIGITS))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def short(data: Prepared, *, train: int = 256, test: int = 50) -> Prepared:
    return Prepared(
        train_inputs=data.train_inputs[:train].clone(),
        train_labels=data.train_labels[:train],
        test_inputs=data.test_inputs[:test],
        test_labels=data.test_labels[:test],
    )


def test_prepare_normalises_every_pixel_as_the_reference_does() -> None:
    dataset = load(Source.DIGITS)
    prepared = loop.prepare(dataset)
    expected = ((dataset.test_images[:20] / 255 - 0.1307) / 0.3081)[:, None]
    # Five float32 roundings: of a quotient and a difference below 1, of two constants, and of a result below 4.
    np.testing.assert_allclose(prepared.test_inputs[:20].numpy(), expected, rtol=0, atol=5e-7)
    assert prepared.train_inputs.shape == (1437, 1, 28, 28)
    assert torch.equal(prepared.train_labels, torch.from_numpy(dataset.train_labels).long())


def numpy_losses(data: Prepared, config: TrainConfig) -> list[float]:
    """The MLP's training written out in float64: forward, softmax, two GEMMs a layer, SGD."""
    first, first_bias, second, second_bias = (
        value.astype(np.float64) for value in initial_weights(ModelName.MLP, config.seed).values()
    )
    images, labels = data.train_inputs.numpy().reshape(-1, 784).astype(np.float64), data.train_labels.numpy()
    losses = []
    for index in batches(len(labels), config.batch_size, epoch=0, seed=config.seed):
        x, y = images[index], np.eye(10)[labels[index]]
        hidden = np.maximum(x @ first.T + first_bias, 0)
        logits = hidden @ second.T + second_bias
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        losses.append(-np.log(probabilities[y == 1]).mean())
        grad_logits = (probabilities - y) / len(y)
        grad_hidden = (grad_logits @ second) * (hidden > 0)
        second -= config.lr * grad_logits.T @ hidden
        second_bias -= config.lr * grad_logits.sum(0)
        first -= config.lr * grad_hidden.T @ x
        first_bias -= config.lr * grad_hidden.sum(0)
    return losses


def test_training_follows_the_same_network_written_in_numpy(data: Prepared) -> None:
    config = dataclasses.replace(MLP, steps=None)
    history = train(build(ModelName.MLP, seed=1), data, config)
    expected = numpy_losses(data, config)
    assert len(history.losses) == len(expected) == 1437 // 64
    np.testing.assert_allclose(history.losses, expected, rtol=1e-4)


@pytest.mark.parametrize(("name", "config"), [(ModelName.MLP, MLP), (ModelName.CNN, CNN)])
def test_a_run_repeats_bit_for_bit_whatever_was_drawn_before(
    data: Prepared, name: ModelName, config: TrainConfig
) -> None:
    runs = []
    for _ in range(2):
        torch.rand(7)
        before = torch.get_rng_state()
        model = build(name, seed=3)
        history = train(model, short(data), config)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append((history.losses, history.test_losses, history.accuracies, weights(model)))
    assert runs[0][:3] == runs[1][:3]
    assert same(runs[0][3], runs[1][3])


def test_the_seed_decides_the_dropout_draws_and_the_order(data: Prepared) -> None:
    losses = [
        train(build(ModelName.CNN, seed=3), short(data), dataclasses.replace(CNN, seed=seed)).losses for seed in (1, 2)
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [
        (1, None, (10,)),
        (3, None, (10, 10, 10)),
        (3, 25, (10, 10, 5)),
        (3, 10, (10,)),
        (3, 99, (10, 10, 10)),
        (1, 1, (1,)),
    ],
)
def test_epoch_steps_counts_whole_batches_and_stops_at_steps(
    epochs: int, steps: int | None, expected: tuple[int, ...]
) -> None:
    config = TrainConfig(optimizer=Optimizer.SGD, lr=0.1, batch_size=10, epochs=epochs, steps=steps)
    assert config.epoch_steps(109) == expected


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("steps", -1, "steps must be at least 1, got -1"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("lr", float("nan"), "lr must be a positive finite number, got nan"),
        ("lr", 0.0, "lr must be a positive finite number"),
        ("last_lr", float("inf"), "last_lr must be a positive finite number"),
        ("seed", -1, "seed must be in 0"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MLP, **{field: value})


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 64 exceeds the 63 training samples; use at most 63"):
        MLP.epoch_steps(63)


def test_a_batch_of_one_trains(data: Prepared) -> None:
    history = train(build(ModelName.MLP, seed=1), short(data, train=3), dataclasses.replace(MLP, batch_size=1))
    assert len(history.losses) == 3


def test_history_defines_the_final_loss_and_the_seconds_of_an_epoch() -> None:
    history = History(
        steps_per_epoch=20, losses=[9.0] * 43 + [1.0, 2.0], epochs=[(20, 2.0), (20, 4.0), (5, 0.75)], accuracies=[0.5]
    )
    assert history.final_loss == 2.0  # a tenth of five steps is one step
    assert history.seconds_per_epoch == 3.0  # the median of 2, 4 and 0.75 / 5 * 20
    history = History(steps_per_epoch=20, losses=[9.0] * 18 + [1.0, 2.0], epochs=[(20, 2.0)])
    assert history.final_loss == 1.5


@pytest.mark.parametrize("rounds", [1, 3, 9])
def test_contenders_take_turns_on_the_same_batches(
    data: Prepared, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    seen: list[tuple[str, torch.Tensor]] = []
    contenders = []
    for name in ("first", "second"):
        model = build(ModelName.MLP, seed=1)
        model.register_forward_pre_hook(lambda _, inputs, name=name: seen.append((name, inputs[0])))
        contenders.append(loop.Contender(model))
    ticks = itertools.count()  # a clock that moves one second a look: every step takes one second
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(loop, "_TURNS_SECONDS", 1000.0)
    before = torch.get_rng_state()
    medians = loop.take_turns(contenders, short(data), MLP, rounds=rounds)
    assert torch.equal(torch.get_rng_state(), before)
    assert [name for name, _ in seen] == ["first", "second"] * rounds
    assert all(torch.equal(seen[i][1], seen[i + 1][1]) for i in range(0, len(seen), 2))
    assert len(medians) == 2
    assert same(weights(contenders[0][0]), weights(contenders[1][0]))


def test_one_nan_pixel_stops_training_at_its_batch_with_the_weights_of_the_step_before(data: Prepared) -> None:
    bad = short(data)
    order = list(batches(256, MLP.batch_size, epoch=0, seed=MLP.seed))
    bad.train_inputs[order[2][5], 0, 14, 14] = float("nan")
    model, twin = build(ModelName.MLP, seed=1), build(ModelName.MLP, seed=1)
    with pytest.raises(DivergenceError, match=r"step 3: the input holds NaN \(1 of 50176 elements\)") as caught:
        train(model, bad, MLP)
    assert "\n" not in str(caught.value)
    train(twin, short(data), dataclasses.replace(MLP, steps=2))
    assert same(weights(model), weights(twin))


def test_an_infinite_pixel_is_named_too(data: Prepared) -> None:
    bad = short(data)
    bad.train_inputs[7, 0, 0, 0] = float("inf")
    with pytest.raises(DivergenceError, match=r"step \d: the input holds Inf"):
        train(build(ModelName.MLP, seed=1), bad, MLP)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_bad_weight_stops_training_before_the_first_step(data: Prepared, value: float) -> None:
    model = build(ModelName.MLP, seed=1)
    with torch.no_grad():
        model.get_parameter("fc2.weight")[3, 4] = value
    kind = "NaN" if value != value else "Inf"
    with pytest.raises(DivergenceError, match=rf"step 1: parameter 'fc2\.weight' holds {kind} \(1 of 2560"):
        train(model, short(data), MLP)


@pytest.mark.parametrize("name", ["fc1.weight", "fc2.bias"])
def test_a_bad_gradient_is_named_and_never_reaches_the_weights(data: Prepared, name: str) -> None:
    model, twin = build(ModelName.MLP, seed=1), build(ModelName.MLP, seed=1)
    calls = []

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(gradient)
        return gradient.clone().index_fill_(0, torch.tensor([0]), float("inf")) if len(calls) == 3 else gradient

    model.get_parameter(name).register_hook(poison)
    with pytest.raises(DivergenceError, match=rf"step 3: the gradient of '{name}' holds Inf"):
        train(model, short(data), MLP)
    train(twin, short(data), dataclasses.replace(MLP, steps=2))
    assert same(weights(model), weights(twin))


def test_a_run_that_diverges_leaves_the_last_good_checkpoint(data: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = build(ModelName.MLP, seed=1)
    saw = []

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        saw.append(gradient)
        return gradient * float("nan") if len(saw) == 6 else gradient

    model.get_parameter("fc1.weight").register_hook(poison)
    config = dataclasses.replace(MLP, epochs=3, steps=None)
    with pytest.raises(DivergenceError, match="step 6"):
        train(model, short(data), config, checkpoint_path=path, header={"arm": "x"})
    state, header = checkpoint.load(path)
    assert header == {"arm": "x", "epoch": 1, "step": 4}
    twin = build(ModelName.MLP, seed=1)
    train(twin, short(data), dataclasses.replace(config, epochs=1))
    assert same(state, weights(twin))


def test_too_large_a_learning_rate_stops_with_one_line(data: Prepared) -> None:
    with pytest.raises(DivergenceError, match=r"training stopped at step \d+: .* holds (NaN|Inf)"):
        train(build(ModelName.MLP, seed=1), data, dataclasses.replace(MLP, lr=1e30, steps=22))


def test_evaluate_changes_nothing_and_agrees_with_counting_by_hand(data: Prepared) -> None:
    model = build(ModelName.CNN, seed=1).train()
    before = weights(model)
    loss, accuracy = evaluate(model, data.test_inputs[:30], data.test_labels[:30])
    assert model.training
    assert same(weights(model), before)
    with torch.no_grad():
        log_probs = model.eval()(data.test_inputs[:30]).numpy()
    labels = data.test_labels[:30].numpy()
    assert accuracy == np.mean(log_probs.argmax(1) == labels)
    np.testing.assert_allclose(loss, -log_probs[np.arange(30), labels].mean(), rtol=1e-6)


def test_evaluate_of_nothing_is_refused(data: Prepared) -> None:
    with pytest.raises(ValueError, match="nothing to test"):
        evaluate(build(ModelName.MLP, seed=1), data.test_inputs[:0], data.test_labels[:0])


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_progress_draws_on_a_terminal_and_is_silent_elsewhere(
    data: Prepared, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO
) -> None:
    monkeypatch.setattr(training, "_REFRESH_SECONDS", 0.0)
    console = rich.console.Console(file=stream, width=120, force_terminal=True)
    train(build(ModelName.MLP, seed=1), short(data), MLP, progress=Progress("torch-fp32", steps=4, console=console))
    if stream.isatty():
        for word in ("torch-fp32", "loss", "accuracy", "images/s"):
            assert word in stream.getvalue()
    else:
        assert stream.getvalue() == ""


def test_training_prints_nothing_where_there_is_no_terminal(data: Prepared, capfd: pytest.CaptureFixture[str]) -> None:
    train(build(ModelName.MLP, seed=1), short(data), MLP)
    assert capfd.readouterr() == ("", "")
