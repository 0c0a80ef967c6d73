"""Files of quantised tensors: written by one library and read by another, atomically, and refused in one line where they are broken."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import torch

import octavo
from octavo import QTensor, TensorSpec, load_qtensors, save_qtensors
from octavo.formats import E2M1FN, E3M2FN, E4M3FN
from octavo.recipes import NAMED
from octavo.scaling import Block, Current, Delayed, TwoLevel

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HAS_XLA = importlib.util.find_spec("octavo.kernels.xla_matrices") is not None
NEEDS_XLA = pytest.mark.skipif(not HAS_XLA, reason="octavo.kernels.xla_matrices, the JAX casts, is not there")
LIBRARIES = ["numpy", "torch", pytest.param("jax", marks=NEEDS_XLA)]
CELLS = sorted(
    {spec for make in NAMED.values() for *_, spec in make().cells() if spec and spec.format.bits <= 8}, key=str
)
BLOCKS = TensorSpec(E4M3FN, Block(shape=(4, 8)))
TWO_LEVEL = TensorSpec(E2M1FN, TwoLevel(shape=(1, 5)))


def made(shape: tuple[int, ...], dtype: Any = np.float32) -> npt.NDArray[Any]:
    """Numbers of one size or another, the same for the same shape."""
    return np.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


def to_library(x: npt.NDArray[Any], library: str) -> Any:
    """The same numbers as an array of the library."""
    match library:
        case "torch" if x.dtype == BFLOAT16:
            return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
        case "torch":
            return torch.from_numpy(x)
        case "jax":
            return importlib.import_module("jax.numpy").asarray(x)
    return x


def to_numpy(x: Any) -> npt.NDArray[Any]:
    if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy().view(BFLOAT16)
    return np.asarray(x)


def assert_same(got: Any, expected: Any) -> None:
    """Of one dtype and shape and the same bytes."""
    values, wanted = to_numpy(got), to_numpy(expected)
    assert (values.dtype, values.shape, values.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())


VALID = QTensor.encode(made((6, 20)), TensorSpec(E2M1FN, TwoLevel()))


def assert_same_tensor(got: QTensor, expected: QTensor) -> None:
    assert (got.spec, got.shape, got.axis) == (expected.spec, expected.shape, expected.axis)
    assert str(got.dtype).rpartition(".")[2] == str(expected.dtype).rpartition(".")[2]
    assert_same(got.codes, expected.codes)
    assert_same(got.scales, expected.scales)
    assert (got.amax is None) == (expected.amax is None)
    assert_same(got.decode(), expected.decode())


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("reader", LIBRARIES)
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
def test_a_file_of_one_library_is_read_by_every_other(
    dtype: np.dtype, reader: str, library: str, tmp_path: Path
) -> None:
    lean = "jax" in (reader, library)  # which compiles for each spec
    specs = {f"layer.{i}": spec for i, spec in enumerate([BLOCKS, TWO_LEVEL] if lean else CELLS)}
    held = {
        name: QTensor.encode(to_library(made((9, 35), dtype), library), spec, axis=0, seed=3)
        for name, spec in specs.items()
    }
    plain = {"bias": to_library(made((7,), dtype), library), "step": to_library(np.array(3, np.int32), library)}
    path = tmp_path / "layers.safetensors"
    save_qtensors(path, held | plain)
    loaded = load_qtensors(path, reader)
    assert loaded.keys() == held.keys() | plain.keys()
    for name, q in held.items():
        assert loaded[name].library == reader
        assert_same_tensor(loaded[name], q)
    for name, array in plain.items():
        assert type(loaded[name]) is type(to_library(made(()), reader))
        assert_same(loaded[name], array)
    assert [entry.name for entry in tmp_path.iterdir()] == ["layers.safetensors"]


@pytest.mark.parametrize("shape", [(), (7,), (0,), (0, 5), (5, 33), (2, 3, 5, 19), (2, 1, 3, 2, 7)], ids=str)
def test_any_shape_survives_a_file(shape: tuple[int, ...], tmp_path: Path) -> None:
    held = {f"w{axis}": QTensor.encode(made(shape), TWO_LEVEL, axis=axis) for axis in (-1, 0)}
    save_qtensors(tmp_path / "w", held)
    for name, q in load_qtensors(tmp_path / "w").items():
        assert_same_tensor(q, held[name])


def test_slices_and_transposes_are_stored_as_they_are_seen(tmp_path: Path) -> None:
    q = QTensor.encode(torch.from_numpy(made((16, 32))), BLOCKS)[4:12, 8:24].T
    save_qtensors(tmp_path / "w", {"w": q, "strided": torch.arange(12).reshape(3, 4).T})
    loaded = load_qtensors(tmp_path / "w", "torch")
    assert_same_tensor(loaded["w"], q)
    assert loaded["strided"].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]


def test_how_delayed_scales_are_updated_is_not_stored(tmp_path: Path) -> None:
    q = QTensor.encode(
        made((3,)), TensorSpec(E4M3FN, Delayed(history=3, algorithm=lambda history: history[0])), scale=2
    )
    save_qtensors(tmp_path / "w", {"w": q})
    loaded = load_qtensors(tmp_path / "w")["w"]
    assert loaded.spec == TensorSpec(E4M3FN, Delayed())
    assert_same(loaded.decode(), q.decode())


def test_the_file_is_plain_safetensors_with_a_header(tmp_path: Path) -> None:
    save_qtensors(tmp_path / "w", {"w": VALID})
    with safetensors.safe_open(tmp_path / "w", "np") as file:
        assert sorted(file.keys()) == ["w.amax", "w.codes", "w.scales"]
        header = json.loads(file.metadata()["octavo.qtensors"])
    spec = {
        "format": "float4_e2m1fn",
        "scaling": {"kind": "TwoLevel", "shape": [1, 16], "padding": True},
        "rounding": "nearest-even",
        "overflow": "saturate",
        "transform": "none",
    }
    entry = {"spec": spec, "shape": [6, 20], "axis": -1, "dtype": "float32"}
    assert header == {"version": 1, "tensors": {"w": entry}}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w"
    save_qtensors(path, {"w": VALID})
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("octavo.archive.os.replace", refuse)
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\); choose"):
        save_qtensors(path, {"w": VALID[:3]})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["w"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": VALID, "w.codes": np.zeros(3)}, "'w.codes' is given twice: rename"),
        ({"w": [1.0]}, "'w' is list: convert it first"),
        ({"w": torch.zeros(3, dtype=torch.float8_e4m3fn)}, "'w' is torch.float8_e4m3fn: convert it first"),
        ({"w": np.zeros(3, complex)}, "'w' is complex128: convert it first"),
    ],
)
def test_what_a_file_cannot_hold_is_an_error(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_qtensors(tmp_path / "w", tensors)
    assert not list(tmp_path.iterdir())


def written(tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
    """A file whose tensors and header were tampered with."""
    path = tmp_path / "w"
    save_qtensors(path, {"w": VALID, "six": QTensor.encode(made((2, 8)), TensorSpec(E3M2FN))})
    with safetensors.safe_open(path, "np") as file:
        tensors = file.get_tensors()
        header = json.loads(file.metadata()["octavo.qtensors"])
    change(tensors, header)
    path.write_bytes(safetensors.numpy.save(tensors, {"octavo.qtensors": json.dumps(header)}))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: t.pop("w.codes"), "at odds with its own header"),
        (lambda t, h: t.pop("w.amax"), "at odds with its own header .*holds an amax"),
        (
            lambda t, h: t.update({"w.scales": t["w.scales"][:1]}),
            r"at odds .*scales .*uint8 \[6, 2\]; got uint8 \[1, 2\]",
        ),
        (lambda t, h: t["six.codes"].fill(64), "at odds .*float6_e3m2fn has codes 0 to 63; got 64"),
        (lambda t, h: h["tensors"]["w"].update(axis=1), "at odds .*contracted axis"),
        (lambda t, h: h["tensors"]["w"].update(shape="wide"), "at odds"),
        (lambda t, h: h["tensors"]["w"].update(dtype="int8"), "at odds .*decodes to .*; got int8"),
        (
            lambda t, h: h["tensors"]["w"]["spec"].update(format="float8_e4m3fm"),
            "at odds .*did you mean 'float8_e4m3fn'",
        ),
        (lambda t, h: h["tensors"]["w"]["spec"]["scaling"].update(kind="Blocks"), "at odds"),
        (lambda t, h: h["tensors"]["w"]["spec"]["scaling"].update(depth=3), "at odds"),
        (lambda t, h: h["tensors"].update(w=3), "at odds"),
        (lambda t, h: h.update(tensors=[]), "not a file of quantised tensors"),
        (lambda t, h: h.update(version="new"), "not a file of quantised tensors"),
        (lambda t, h: h.update(version=2), "of version 2, and this octavo reads up to 1; upgrade octavo"),
    ],
)
def test_a_file_at_odds_with_itself_is_named_in_one_line(change: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        load_qtensors(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "w"
    save_qtensors(path, {"w": VALID})
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated, or not a safetensors file") as error:
            load_qtensors(path)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)


def test_a_file_of_others_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "w"
    for metadata in (None, {"format": "pt"}, {"octavo.qtensors": "{"}, {"octavo.qtensors": "3"}):
        path.write_bytes(safetensors.numpy.save({"w": np.ones(3)}, metadata))
        with pytest.raises(ValueError, match="w: not a file of quantised tensors; give one that octavo"):
            load_qtensors(path)
    path.write_text("not a tensor in sight")
    with pytest.raises(ValueError, match="w: truncated, or not a safetensors file"):
        load_qtensors(path)
    with pytest.raises(FileNotFoundError, match="none: no such file; check the path"):
        load_qtensors(tmp_path / "none")
    with pytest.raises(ValueError, match="one of numpy, torch, jax; got 'troch'; did you mean 'torch'"):
        load_qtensors(path, "troch")


def test_jax_says_what_it_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "w"
    for tensor in (QTensor.encode(made((3,), np.float64), TensorSpec(E4M3FN, Current())), np.arange(3)):
        save_qtensors(path, {"w": tensor})
        with pytest.raises(
            ValueError, match=r"w: JAX does not hold (float|int)64 as it is configured; set jax_enable_x64"
        ):
            load_qtensors(path, "jax")


def test_without_safetensors_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"pip install 'octavo\[torch\]'"):
        save_qtensors(tmp_path / "w", {"w": VALID})


def test_the_package_lends_its_names() -> None:
    assert octavo.load_qtensors is load_qtensors
    assert octavo.save_qtensors is save_qtensors
