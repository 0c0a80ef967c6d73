"""The race to an accuracy without its clock: schedules, shifted images, a network that learns, and a whole quick run on few images."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from octavo import engine
from octavo.lab import data

ROOT = Path(__file__).parent.parent


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("speedrun")


def test_rates_rise_and_fall_to_nothing(race: ModuleType) -> None:
    found = race.shares(100, 0.25)
    assert (found.shape, found.dtype) == ((100, 1), np.float32)
    assert found[0, 0] == np.float32(0.1)
    assert found.argmax() == 25
    assert found[25, 0] == 1
    assert found[99, 0] == np.float32(0.01 / 0.75)


def test_every_image_comes_once_before_any_comes_again(race: ModuleType) -> None:
    rows = race.order(50, 12, 10, np.random.default_rng(0))
    assert rows.shape == (12, 10)
    assert sorted(rows.ravel()[:50]) == sorted(rows.ravel()[50:100]) == list(range(50))


def test_shifted_images_are_rolled_ones(race: ModuleType) -> None:
    images = np.zeros((30, 8, 8, 1), np.float32)
    images[:, 2:6, 2:6] = np.random.default_rng(0).random((30, 4, 4, 1), np.float32)
    rows = np.arange(30)[None, :]
    begins = race.starts(rows, 1, images.shape, np.random.default_rng(1))
    found = engine.take_runs(engine.from_numpy(images), engine.from_numpy(begins[0]), 64).numpy().reshape(images.shape)
    shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    matched = [
        [shift for shift in shifts if (np.roll(x, shift, (0, 1)) == y).all()]
        for x, y in zip(images, found, strict=True)
    ]
    assert all(len(one) == 1 for one in matched)
    assert len({one[0] for one in matched}) > 5
    assert (race.starts(rows, 0, images.shape, np.random.default_rng(1)) == rows * 64).all()


@pytest.mark.parametrize(("inputs", "outputs"), [(40, 16), (16, 40), (24, 24)])
def test_updates_are_nearly_orthogonal(race: ModuleType, inputs: int, outputs: int) -> None:
    """Singular values near 1, by NumPy's decomposition, in the gradient's own directions."""
    network = race.Network(race.SCHEDULES[0], 8, np.random.default_rng(0))
    gradient = np.random.default_rng(1).standard_normal((inputs, outputs), np.float32)
    weight = engine.zeros((inputs, outputs))
    network.weights[0] = weight
    optimizer = race.Optimizer(network, race.SCHEDULES[0])
    weight.grad = engine.from_numpy(gradient.copy())
    update = optimizer._orthogonal(weight).numpy().astype(np.float64)
    u, values, v = np.linalg.svd(gradient.astype(np.float64), full_matrices=False)
    within = u.T @ update @ v.T
    assert np.abs(within - np.diag(np.diag(within))).max() < 1e-3
    wanted = values / np.sqrt((values**2).sum())
    for _ in range(race.ITERATIONS):
        a, b, c = race.QUINTIC
        wanted = a * wanted + b * wanted**3 + c * wanted**5
    np.testing.assert_allclose(np.diag(within), wanted, rtol=1e-3, atol=1e-3)


def test_a_network_learns_and_repeats_itself(race: ModuleType) -> None:
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 10, 640)
    images = (
        draws.standard_normal((10, 28, 28, 1), np.float32)[labels]
        + 0.3 * draws.standard_normal((640, 28, 28, 1), np.float32)
    ) / 4
    for schedule in race.SCHEDULES:
        runs = [race.train(images, labels, replace(schedule, epochs=6, shift=0), 3)[1] for _ in range(2)]
        assert race.accuracy(runs[0], images, labels) > 0.95
        for one, other in zip(*(run.weights for run in runs), strict=True):
            assert one.numpy().tobytes() == other.numpy().tobytes()


def test_the_table_says_who_reached_what(race: ModuleType) -> None:
    rows = [
        {"contender": name, "target": target, "seed": seed, "seconds": 1.0 + seed, "test_seconds": 0.25, "accuracy": accuracy,
         "epochs": 2, "reached": accuracy >= target}
        for target in (0.98, 0.99)
        for name, accuracies in (("engine", (0.991, 0.989, 0.992)), ("PyTorch", (0.981, 0.982, 0.983)))
        for seed, accuracy in enumerate(accuracies)
    ]  # fmt: skip
    lines = race.told(rows).splitlines()
    assert lines[3] == "engine         99%     2.000    2.00      2 of 3   99.10% 98.90% 99.20%"
    assert lines[4] == "PyTorch        99%       not    2.00      0 of 3   98.10% 98.20% 98.30%"


def test_a_quick_run(
    race: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(race, "load", lambda source: data.fake(700, seed=0))
    monkeypatch.setattr(race, "pin_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["speedrun.py", "--quick", "--json", str(tmp_path / "a.json")])
    race.main()
    text = capsys.readouterr().out
    assert "for 99%: convolutions 5x5/2 to 32, 3x3/2 to 32, linear to 64 and 10" in text
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(row["contender"], row["target"]) for row in rows] == [
        ("engine", 0.98),
        ("engine", 0.99),
        ("PyTorch", 0.98),
        ("PyTorch", 0.99),
    ]
    assert all(row["seconds"] > 0 and not row["reached"] for row in rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "--seeds and --threads are 1 or more; got 0 and 2"),
        (["--json", "/no/such/folder/a.json"], "there is no such folder; make it first"),
    ],
)
def test_bad_flags_are_one_line(
    race: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["speedrun.py", *flags])
    with pytest.raises(SystemExit) as ended:
        race.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
