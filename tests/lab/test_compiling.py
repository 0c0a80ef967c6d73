"""Compiled networks against eager training and evaluation, to the bit; and files that are refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from torch import Tensor

import octavo.jax
import octavo.torch
from octavo import checkpoint
from octavo.lab import compiled, compiling
from octavo.lab.compiled import load_compiled
from octavo.lab.compiling import compile_config
from octavo.lab.config import Config
from octavo.lab.flax_models import network_of
from octavo.lab.learner import images as dataset
from octavo.lab.networks import start, torch_network
from octavo.lab.replicas import World
from octavo.lab.runner import Mode, train
from octavo.lab.sections import PrecisionKind
from octavo.lab.torch_learner import TorchLearner
from octavo.recipes import NAMED

BATCH, RATE = 16, 0.1
STACK = {"hidden_sizes": [24, 16], "dropout": 0.1}
PRECISIONS = ["fp32", "bf16", "fp16", *(name for name in NAMED if name not in ("bf16", "fp16"))]
TRANSFORMER = {"name": "transformer", "hidden_size": 32, "depth": 2, "num_heads": 4, "vocab_size": 50, "max_length": 12}


def config(folder: Path, model: dict[str, Any] = STACK, precision: Any = "fp32", **sections: Any) -> Config:
    data = {"use_fake_data": True, "batch_size": BATCH}
    run = {"model_dir": str(folder), "max_steps": 3, "checkpoint_steps": 2}
    given = {"train_input": data, "eval_input": data, "runconfig": run, "model": model, "precision": precision}
    return Config.model_validate(given | sections)


def forward(setting: Config) -> contextlib.AbstractContextManager[object]:
    if setting.recipe is not None:
        return octavo.torch.autocast(recipe=setting.recipe)
    halves = {PrecisionKind.BFLOAT16: torch.bfloat16, PrecisionKind.FLOAT16: torch.float16}
    return torch.autocast("cpu", dtype=halves.get(setting.kind), enabled=setting.kind in halves)


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def unlike(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """`differing` of arrays."""
    assert one.keys() == other.keys()
    return [name for name in one if not np.array_equal(one[name], other[name])]


def seeds(step: int) -> int:
    """What `TorchLearner` seeds an update with."""
    return int(np.random.SeedSequence([1, step, 0]).generate_state(1, np.uint64)[0])


CASES = [
    *((STACK, precision) for precision in PRECISIONS),
    ({"hidden_sizes": [24], "disable_softmax": True, "use_bias": False}, "delayed_scaling"),
    ({"hidden_sizes": [24], "activation_fn": "gelu"}, {"recipe": "delayed_scaling", "amax_history_len": 3}),
    ({"name": "mlp"}, "hybrid"),
    ({"name": "cnn"}, "bf16"),
    ({"name": "cnn"}, "delayed_scaling"),
]


@pytest.mark.parametrize(("model", "precision"), CASES, ids=lambda value: str(value)[:40])
def test_steps_and_inference_equal_eager_training(model: dict[str, Any], precision: Any, tmp_path: Path) -> None:
    setting = config(tmp_path, model, precision)
    compile_config(setting)
    program = load_compiled(tmp_path / "model.pt2")
    optimizer = {"optimizer_type": "SGD", "learning_rate": RATE, "momentum": 0.0}
    eager = TorchLearner(config(tmp_path, model, precision, optimizer=optimizer), dataset(setting), World.join(1))
    state = program.state
    for number in range(3):
        rows = np.arange(BATCH * number, BATCH * (number + 1))
        images, labels = eager.data.train_inputs[rows], eager.data.train_labels[rows]
        before = {name: value.clone() for name, value in state.items()}
        found = program.step(state, images, labels, seed=seeds(number))
        assert differing(before, state) == []
        update = eager.update(rows, number, RATE, stop=False)
        assert found.loss.item() == update.loss
        gradients = {name: value.grad for name, value in eager.network.named_parameters()}
        assert differing(found.gradients, gradients) == []
        moved = {name: state[name].add(slope, alpha=-RATE) for name, slope in found.gradients.items()}
        state = state | found.buffers | moved
        assert differing(state, eager.network.state_dict()) == []
    eager.network.eval()
    for size in (1, 3, BATCH, 0):
        images = eager.data.test_inputs[:size]
        with torch.no_grad(), forward(setting):
            wanted = eager.network(images)
        assert torch.equal(program.infer(images, state), wanted)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(program.infer(images, state), wanted)


def test_a_step_scales_the_gradients_by_the_loss_scale_alone(tmp_path: Path) -> None:
    compile_config(config(tmp_path))
    program = load_compiled(tmp_path / "model.pt2")
    images, labels = torch.randn(BATCH, 1, 28, 28), torch.arange(BATCH, dtype=torch.int32) % 10
    plain, scaled = (program.step(program.state, images, labels, loss_scale=scale, seed=3) for scale in (1.0, 1024.0))
    assert plain.loss == scaled.loss
    for name, slope in plain.gradients.items():
        assert torch.equal(slope * 1024, scaled.gradients[name])
    other = program.step(program.state, images, labels, seed=4)
    assert plain.loss != other.loss


def test_what_a_nan_leaves_is_what_eager_training_leaves(tmp_path: Path) -> None:
    setting = config(tmp_path, precision="delayed_scaling", model={"hidden_sizes": [24]})
    compile_config(setting)
    program = load_compiled(tmp_path / "model.pt2")
    network = octavo.torch.convert(torch_network(setting.model, 1), setting.recipe)
    images, labels = torch.randn(BATCH, 1, 28, 28), torch.arange(BATCH) % 10
    images[0] = torch.nan
    found = program.step(program.state, images, labels)
    torch.nn.functional.nll_loss(network(images), labels).backward()
    for name, value in found.buffers.items():
        assert torch.equal(value.nan_to_num(7), network.state_dict()[name].nan_to_num(7)), name


@pytest.mark.parametrize("precision", ["fp32", "delayed_scaling"])
def test_the_newest_checkpoint_gives_the_weights(precision: str, tmp_path: Path) -> None:
    setting = config(tmp_path / "run", precision=precision)
    assert "the first ones, of seed 1" in compile_config(setting, tmp_path / "fresh.pt2")
    train(setting, mode=Mode.TRAIN)
    said = compile_config(setting)
    assert "step-00000003.safetensors, after 3 updates" in said
    held = checkpoint.load(tmp_path / "run/checkpoints/step-00000003.safetensors", framework="torch")[0]
    model = {name.removeprefix("model."): value for name, value in held.items() if name.startswith("model.")}
    assert differing(load_compiled(tmp_path / "run/model.pt2").state, model) == []
    with pytest.raises(ValueError, match=r"step-00000003.safetensors: of another model: .*fc1\.weight \[24, 784\]"):
        compile_config(config(tmp_path / "run", {"hidden_sizes": [25, 16]}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "delayed_scaling", "mxfp8"])
def test_a_transformer_infers(precision: str, tmp_path: Path) -> None:
    setting = config(tmp_path, TRANSFORMER, precision)
    said = compile_config(setting)
    assert f"inference of transformer in {precision}" in said
    program = load_compiled(tmp_path / "model.pt2")
    network = torch_network(setting.model, 1)
    network.load_state_dict({name: program.state[name] for name in program.manifest.parameters})
    if setting.recipe is not None:
        octavo.torch.convert(network, setting.recipe)
    for size, length in ((1, 12), (3, 5), (2, 1)):
        tokens = torch.randint(0, 50, (size, length))
        with torch.no_grad(), forward(setting):
            assert torch.equal(program.infer(tokens), network.eval()(tokens))
    for tokens, reason in (
        (torch.zeros(1, 13, dtype=torch.int64), "got 13"),
        (torch.full((1, 3), 50), "0 to 49, got 50 to 50"),
    ):
        with pytest.raises(ValueError, match=reason):
            program.infer(tokens)
    with pytest.raises(ValueError, match="holds inference alone"):
        program.step(program.state, torch.zeros(1, 3), torch.zeros(1))


def test_machine_code_is_close_and_asked_for(tmp_path: Path) -> None:
    setting = config(tmp_path, {"hidden_sizes": [8]})
    assert "AOTInductor: not asked for" in compile_config(setting, tmp_path / "graphs.pt2")
    with pytest.raises(ValueError, match="holds no machine code"):
        load_compiled(tmp_path / "graphs.pt2", machine_code=True)
    assert "AOTInductor: inference, too" in compile_config(setting, aot=True)
    graphs, code = (load_compiled(tmp_path / "model.pt2", machine_code=choice) for choice in (False, True))
    images = torch.randn(5, 1, 28, 28)
    torch.testing.assert_close(code.infer(images), graphs.infer(images), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="machine code has its weights in it"):
        code.infer(images, code.state)


def test_aot_without_a_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        compile_config(config(tmp_path), aot=True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none/model.pt2", "its folder does not exist"), ("model.bin", "ends in .pt2"), ("folder.pt2", "is a file that")],
)
def test_where_nothing_can_be_written(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ValueError, match=reason):
        compile_config(config(tmp_path), tmp_path / name)


def test_a_read_only_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(compiled, "write_whole", refuse)
    with pytest.raises(ValueError, match=r"model\.pt2: cannot be written \(Read-only file system\)"):
        compile_config(config(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be made"):
        compile_config(config(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"backend": "engine"}, "backend: engine compiles nothing; write backend: torch"),
        ({"backend": "jax", "model": TRANSFORMER}, "write backend: torch"),
        ({"model": TRANSFORMER | {"hidden_size": 4096, "vocab_size": 50_000}}, "up to 100,000,000 parameters"),
        ({"precision": "mxfp8", "exempt": ["fc9"]}, "fits no linear layer"),
    ],
)
def test_what_is_not_compiled(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        compile_config(config(tmp_path, **changes))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    compile_config(config(folder, precision="delayed_scaling"))
    return folder / "model.pt2"


def rewritten(path: Path, change: Callable[[dict[str, bytes]], None], out: Path) -> Path:
    """A file with other members, for which its manifest vouches."""
    with zipfile.ZipFile(path) as file:
        members = {name.removeprefix("package/"): file.read(name) for name in file.namelist()}
    change(members)
    with zipfile.ZipFile(out, "w") as file:
        for name, content in members.items():
            file.writestr(f"package/{name}", content)
    return out


def manifest_with(**changes: Any) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        members["extra/octavo.json"] = json.dumps(json.loads(members["extra/octavo.json"]) | changes).encode()

    return change


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 2}, "version 2, this octavo reads up to 1; upgrade octavo"),
        ({"format": "other"}, "not a network that octavo compiled"),
        ({"batch_size": "many"}, "its manifest is damaged .batch_size"),
        ({"members": {}}, "the SHA-256 of its parts"),
        ({"buffers": []}, "its state is not the one"),
    ],
)
def test_files_of_others_and_newer_ones(changes: dict[str, Any], reason: str, written: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        load_compiled(rewritten(written, manifest_with(**changes), tmp_path / "model.pt2"))


def refused(path: Path) -> tuple[str, dict[str, Tensor] | None]:
    """What loading says, or the state that it gives."""
    try:
        return "", load_compiled(path).state
    except ValueError as error:
        return str(error), None


def test_damage_is_found_wherever_it_is(written: Path, tmp_path: Path) -> None:
    content, draws = written.read_bytes(), np.random.default_rng(0)
    damaged = tmp_path / "model.pt2"
    for place in draws.integers(0, len(content), 60):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(draws.integers(8))
        damaged.write_bytes(flipped)
        said, state = refused(damaged)
        if state is None:
            assert said.startswith(f"{damaged}: ")
            assert "\n" not in said
        else:  # a date, or another field of the zip that says nothing of its members
            assert differing(state, load_compiled(written).state) == []
    for size in (0, 10, len(content) // 2, len(content) - 1):
        damaged.write_bytes(content[:size])
        with pytest.raises(ValueError, match="truncated or damaged"):
            load_compiled(damaged)
    with pytest.raises(ValueError, match="no such file"):
        load_compiled(tmp_path / "none.pt2")


@pytest.mark.parametrize(
    "name", ["data/sample_inputs/inference.pt", "data/weights/inference.pt", "data/constants/step.pt"]
)
def test_a_pickle_is_refused(name: str, written: Path, tmp_path: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        members[name] = b"cposix\nsystem\n"
        manifest = json.loads(members["extra/octavo.json"])
        manifest["members"][name] = hashlib.sha256(members[name]).hexdigest()
        members["extra/octavo.json"] = json.dumps(manifest).encode()

    with pytest.raises(ValueError, match=f"{name} is a pickle"):
        load_compiled(rewritten(written, change, tmp_path / "model.pt2"))


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (torch.zeros(2, 784), r"float32 \[N, 1, 28, 28\]; got float32 \[2, 784\]"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.float64), "got float64"),
        ([1, 2], "got list"),
    ],
)
def test_images_that_do_not_fit(images: Any, reason: str, written: Path) -> None:
    program = load_compiled(written)
    with pytest.raises(ValueError, match=reason):
        program.infer(images)
    with pytest.raises(ValueError, match="images must be"):
        program.step(program.state, images, torch.zeros(BATCH, dtype=torch.int64))


def test_steps_that_do_not_fit(written: Path) -> None:
    program = load_compiled(written)
    images, labels = torch.zeros(BATCH, 1, 28, 28), torch.zeros(BATCH, dtype=torch.int64)
    state = program.state
    for given, reason in (
        ((state, images[:3], labels), "got float32 .3, 1, 28, 28"),
        ((state, images, labels[:3]), "labels must be int64 .16"),
        ((state, images, labels.float()), "labels must be int32"),
        ((state, images, labels + 10), "labels must be 0 to 9, got 10 to 10"),
        (({}, images, labels), "fc1.weight missing"),
        ((state | {"fc1.weight": state["fc1.weight"].double()}, images, labels), "fc1.weight must be torch.float32"),
    ):
        with pytest.raises(ValueError, match=reason):
            program.step(*given)


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        ({"hidden_sizes": [24], "dropout": 0.1}, "delayed_scaling"),
        ({"hidden_sizes": [24], "disable_softmax": True}, "bf16"),
    ],
    ids=["delayed_scaling", "bf16-logits"],
)
def test_jax_equals_its_jitted_functions(model: dict[str, Any], precision: str, tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers: pip install flatbuffers")
    setting = config(tmp_path, model, precision, backend="jax")
    assert "inference and a training step" in compile_config(setting)
    program = load_compiled(tmp_path / "model.pt2")
    network = network_of(setting.model, dtype=jnp.bfloat16 if precision == "bf16" else jnp.float32)

    def loss_of(variables: Any, images: Any, labels: Any, key: Any) -> Any:
        output = network.apply(variables, images, train=True, rngs={"dropout": key})
        scores = jax.nn.log_softmax(output) if setting.model.disable_softmax else output
        return -jnp.take_along_axis(scores, labels[:, None], axis=1).sum() / BATCH

    def slopes(gradients: Any) -> Any:
        return jax.tree.map(lambda slope: np.float32(RATE) * np.asarray(slope), gradients)

    draws = np.random.default_rng(1)
    stepped, inferred = jax.jit(jax.value_and_grad(loss_of)), jax.jit(network.apply)
    within = octavo.jax.autocast(recipe=setting.recipe) if setting.recipe else contextlib.nullcontext()
    with within:
        like = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 1, 28, 28)))
        variables = octavo.jax.from_torch(start(setting.model, 1), like)
        state = program.state
        for number in range(3):
            images = draws.standard_normal((BATCH, 1, 28, 28), np.float32)
            labels = np.arange(BATCH) % 10
            loss, found = stepped(variables, images, labels, jax.random.key(number))
            step = program.step(state, images, labels, seed=number)
            assert step.loss == loss
            assert unlike(step.gradients, flatten_dict({"params": found["params"]}, sep=".")) == []
            moved = {name: np.subtract(state[name], slope) for name, slope in slopes(step.gradients).items()}
            params = jax.tree.map(np.subtract, variables["params"], slopes(found["params"]))
            variables = octavo.jax.update_collections(found | {"params": params}, variables)
            state = state | step.buffers | moved
            assert unlike(state, flatten_dict(variables, sep=".")) == []
        least, most = program.manifest.least_batch, program.manifest.most_batch or BATCH
        for size in {least, min(BATCH, most)}:
            images = draws.standard_normal((size, 1, 28, 28), np.float32)
            assert np.array_equal(program.infer(images, state), inferred(variables, images))
    with pytest.raises(ValueError, match=f"infers .*{most} images a call; got {most + 1}"):
        program.infer(np.zeros((most + 1, 1, 28, 28), np.float32))
    with pytest.raises(ValueError, match="labels must be 0 to 9"):
        program.step(state, np.zeros((BATCH, 1, 28, 28), np.float32), labels + 5)
    with pytest.raises(ValueError, match="holds no machine code"):
        load_compiled(tmp_path / "model.pt2", machine_code=True)


def test_jax_without_flatbuffers_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install flatbuffers"):
        compile_config(config(tmp_path, backend="jax"))
