"""The engine's benchmarks without their clocks: contenders that agree, a table that names every kernel, what is said of a missing one."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark, imported as where it runs."""
    for folder in ("benchmarks", "examples/engine_mnist"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module(name)


def test_the_table_names_every_kernel_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = module("engine_ops", monkeypatch)
    from octavo import engine
    from octavo.lab.models import ModelName, initial_weights

    images, labels = engine.zeros((200, 784)), engine.zeros((200,), np.int64)
    for script, flags, rows in ops.STEPS.values():
        example = importlib.import_module(script)
        recipe = [flags["recipe"] and example.get_recipe(flags["recipe"])] if flags else []
        model = example.Mlp(initial_weights(ModelName.MLP, 0), *recipe)

        def step(numbers: object, model: object = model) -> object:
            return model.step(engine.take_rows(images, numbers), engine.take_rows(labels, numbers), 0.1)  # type: ignore[attr-defined]

        recording, _, _ = ops.written_down(step)
        lines = ops.table(rows, recording.names, [1e-6] * len(rows), (1e12, 1e11, 1e10))
        assert len(lines) == len(rows) + 3
        with pytest.raises(ValueError, match="correct the rows"):
            ops.table(rows[1:], recording.names, [1e-6] * len(rows), (1e12, 1e11, 1e10))


def test_the_table_s_costs() -> None:
    """Of two rows, counted by hand."""
    with pytest.MonkeyPatch.context() as patch:
        ops = module("engine_ops", patch)
    first = next(row for row in ops.STEPS["By hand"][2] if row.kernel == "gemm")
    assert first.flops == 2 * 128 * 784 * 256
    assert first.bytes == 4 * (128 * 784 + 784 * 256 + 256 + 128 * 256)
    products = sum(row.flops for row in ops.STEPS["By autograd"][2] if row.kernel == "gemm")
    with pytest.MonkeyPatch.context() as patch:
        assert products == module("engine", patch).FLOPS


def test_the_page_has_tables_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "engine_ops.md").read_text(encoding="utf-8")
    for heading, (_, _, rows) in module("engine_ops", monkeypatch).STEPS.items():
        assert f"### {heading}\n" in page
        assert f"**{len(rows)} kernels**" in page


def test_a_step_in_jax_is_the_scripts_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    race = module("engine", monkeypatch)
    draws = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", draws.random((512, 784), np.float32))
    np.save(tmp_path / "labels.npy", draws.integers(0, 10, 512))
    names = ("PyTorch eager", "JAX, a step jitted", "JAX, an epoch jitted", "manual, from Python", "engine autograd")
    found = {name: race.contender(name, tmp_path)(number=0, steps=None) for name in names}
    for answer in found.values():
        assert answer["epoch"] == 4
        assert answer["loss"] == pytest.approx(found["PyTorch eager"]["loss"], rel=1e-5)
        assert answer["accuracy"] == pytest.approx(found["PyTorch eager"]["accuracy"], abs=2 / 512)


ROWS = [
    {"contender": name, "seconds": seconds, "speedup": 1e-3 / seconds, "loss": 0.3, "accuracy": 0.9, "epoch": 468}
    for name, seconds in (("PyTorch eager", 1e-3), ("engine manual", 5e-4), ("FP8, from Python", 2.5e-4))
]


def test_what_the_race_tells_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    race = module("engine", monkeypatch)
    assert race.speedups(ROWS) == {"manual": 2.0}
    assert race.speedups(ROWS, captured=False) == {"fp8": 4.0}
    text = race.told([dict(row) for row in ROWS], (200.0, "NumPy at 512"))
    assert "engine manual                  0.500       0.234    2.00     105%    0.30000    90.00%" in text
    assert text.endswith("manual: target 1.7, got 2.00\nfp8, from Python: 4.00")


def test_the_scaling_s_worst_ratio_and_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scaling = module("engine_scaling", monkeypatch)
    rows = []
    for width, manual in ((64, 2.0), (4096, 0.8)):
        speed = {"engine manual": manual, "engine autograd": 1.0}
        seconds = {"PyTorch eager": 1e-3, **{name: 1e-3 / value for name, value in speed.items()}}
        rows.append(
            {"width": width, "batch": 32, "seconds": seconds, "speed": speed, "loss": dict.fromkeys(seconds, 2.0)}
        )
    assert "slowest: engine manual at width 4096, batch 32: 0.80 of PyTorch eager's speed (target 0.9)" in scaling.told(
        rows
    )
    scaling.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_contender_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    workers = module("workers", monkeypatch)
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "from workers import serve\n"
        "def prepare():\n"
        "    if 'bad' in sys.argv: raise ImportError('no peer here')\n"
        "    print('noise')\n"
        "    return lambda number: {'twice': 2 * number}\n"
        "serve(1, prepare)\n"
    )
    worker = workers.Worker(str(script), "good", 1)
    assert worker.ask(number=4) == {"twice": 8}
    worker.close()
    worker = workers.Worker(str(script), "bad", 1)
    with pytest.raises(workers.Gone, match="bad is left out: ImportError: no peer here"):
        worker.ask(number=4)
    worker.close()


def test_a_folder_for_json_that_is_missing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("engine", "engine_scaling"):
        race = module(name, monkeypatch)
        monkeypatch.setattr(sys, "argv", [name, "--json", str(tmp_path / "none" / "a.json")])
        with pytest.raises(SystemExit) as ended:
            race.main()
        assert ended.value.code == 2
        assert "there is no such folder; make it first\n" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
