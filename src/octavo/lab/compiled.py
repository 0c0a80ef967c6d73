"""Compiled networks: the file that holds one, and the loader that runs it.

The file is a zip of stored members: `extra/octavo.json` is the manifest, with the SHA-256 of all others.  Of PyTorch it is the archive that
`torch.export.pt2_archive` reads, of two exported programs: `models/inference.json` and `models/step.json` are graphs, `data/weights` raw
tensors with a list in JSON.  torch.export itself pickles example inputs, and may pickle tensors; here are neither, and a file that holds a
pickle is refused.  Of JAX the graphs are `jax.export`'s serialised StableHLO, and the state is in safetensors.
A file is a program: machine code, where it holds some, does what whoever wrote it meant; load it from those you trust.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, assert_never

from pydantic import BaseModel, ConfigDict, ValidationError

from octavo.files import write_whole
from octavo.lab.learner import check_names
from octavo.lab.sections import Backend

__all__ = ["FORMAT", "VERSION", "Compiled", "Manifest", "Step", "load_compiled", "write_compiled"]

FORMAT, VERSION = "octavo-compiled", 1
ROOT, MANIFEST = "package", "extra/octavo.json"
INFERENCE, STEP, STATE = "inference.bin", "step.bin", "state.safetensors"
"""The members of a file of JAX."""
MACHINE_CODE = "data/aotinductor/inference/"
_TIME = (1980, 1, 1, 0, 0, 0)
CLASSES = 10


class Manifest(BaseModel):
    """What a compiled file says of itself.

    written_with: the framework and its version.  weights: where they come from.  least_batch, most_batch: what inference takes, None for
    any; batch_size: what a step takes.  max_length, vocab_size: of a transformer, whose inputs are tokens.  parameters, buffers: the names
    in a state.  step, machine_code: whether the file holds them.  config: the configuration, resolved.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["octavo-compiled"] = "octavo-compiled"
    version: int = VERSION
    backend: Literal["torch", "jax"]
    written_with: str
    precision: str
    weights: str
    least_batch: int
    most_batch: int | None
    batch_size: int
    max_length: int | None = None
    vocab_size: int | None = None
    parameters: list[str]
    buffers: list[str]
    step: bool
    machine_code: bool = False
    config: dict[str, Any]
    members: dict[str, str] = {}


class Step(NamedTuple):
    """What a training step finds.  loss: float32 [], the mean over the batch.  gradients: of the loss times its scale, by parameter, in
    its shape and dtype.  buffers: the next scales, histories and draws, by name."""

    loss: Any
    gradients: dict[str, Any]
    buffers: dict[str, Any]


class Compiled(ABC):
    """A network that `compile_config` wrote.

    A state holds parameters and buffers by name, arrays of the framework: PyTorch's names (`fc1.weight`, `fc1.scale_forward`), or those
    of Flax's collections (`params.fc1.kernel`, `fp8_metas.fc1.x_scale`).
    """

    def __init__(self, manifest: Manifest, path: Path, state: Mapping[str, Any]) -> None:
        self.manifest, self._path, self._state = manifest, path, state
        if {*state} != {*manifest.parameters, *manifest.buffers}:
            raise ValueError(f"{path}: damaged, its state is not the one that its manifest lists; compile it anew")

    @property
    def state(self) -> dict[str, Any]:
        """The state in the file; the arrays are the caller's own."""
        return {name: self._copied(value) for name, value in self._state.items()}

    def infer(self, images: Any, state: Mapping[str, Any] | None = None) -> Any:
        """Log-probabilities (logits under disable_softmax), float32 [N, 10], as eager evaluation gives them, to the bit on a CPU.

        images: float32 [N, 1, 28, 28], normalised as in training; of a transformer tokens, int64 [N, length], whose logits are [N, length,
        vocab_size].  state: instead of that in the file.  NaN and Inf propagate.  Raises ValueError for another shape, dtype or state.
        """
        if self.manifest.max_length is None:
            _require(images, "images", "float32", (None, 1, 28, 28))
        else:
            _require(images, "tokens", "int64", (None, None))
            length, most = images.shape[1], self.manifest.max_length
            if not 1 <= length <= most:
                raise ValueError(f"tokens are 1 to max_length={most} long; got {length}: cut or fill them")
            self._require_range(images, "tokens", self.manifest.vocab_size or 0)
        least, greatest, count = self.manifest.least_batch, self.manifest.most_batch, images.shape[0]
        if count < least or (greatest is not None and count > greatest):
            wanted = f"{least} to {greatest}" if greatest != least else f"exactly {least}"
            if greatest is None:
                wanted = f"at least {least}"
            raise ValueError(f"this file infers {wanted} images a call; got {count}: split them, or fill the batch")
        return self._infer(images, None if state is None else self._checked(state))

    def step(
        self, state: Mapping[str, Any], images: Any, labels: Any, *, loss_scale: float = 1.0, seed: int = 0
    ) -> Step:
        """One forward and backward pass in training mode, as eager training runs it, to the bit on a CPU; nothing in state changes.

        images: float32 [batch_size, 1, 28, 28]; labels: int32 or int64 [batch_size], 0 to 9; loss_scale: the gradients are of the loss
        times it; seed: of dropout: `torch.manual_seed(seed)`, or `jax.random.key(seed)`.  NaN and Inf propagate and leave delayed scales.
        The next state is `state | step.buffers` with parameters that the caller's optimizer has moved.
        Raises ValueError for another shape, dtype or state, and for a file that holds no step.
        """
        if not self.manifest.step:
            raise ValueError(
                f"{self._path}: holds inference alone; compile an fc_mnist, cnn or mlp for a training step"
            )
        size = self.manifest.batch_size
        _require(images, "images", "float32", (size, 1, 28, 28))
        _require(labels, "labels", "int64" if "64" in str(getattr(labels, "dtype", "")) else "int32", (size,))
        self._require_range(labels, "labels", CLASSES)
        return self._step(self._checked(state), images, labels, loss_scale, seed)

    def _checked(self, state: Mapping[str, Any]) -> dict[str, Any]:
        try:
            check_names(_shapes(state), _shapes(self._state))
        except ValueError as error:
            raise ValueError(f"state is {error}") from None
        for name, own in self._state.items():
            if str(state[name].dtype) != str(own.dtype):
                raise ValueError(f"state: {name} must be {own.dtype}, got {state[name].dtype}; convert it")
        return {name: state[name] for name in self._state}

    @staticmethod
    def _require_range(values: Any, what: str, end: int) -> None:
        if values.shape[0] and not 0 <= int(values.min()) <= int(values.max()) < end:
            raise ValueError(f"{what} must be 0 to {end - 1}, got {int(values.min())} to {int(values.max())}; map them")

    @staticmethod
    @abstractmethod
    def _copied(value: Any) -> Any: ...

    @abstractmethod
    def _infer(self, images: Any, state: dict[str, Any] | None) -> Any: ...

    @abstractmethod
    def _step(self, state: dict[str, Any], images: Any, labels: Any, loss_scale: float, seed: int) -> Step: ...


class _Torch(Compiled):
    """Two exported programs."""

    def __init__(self, manifest: Manifest, path: Path, members: Mapping[str, bytes], machine_code: bool) -> None:
        self._torch = importlib.import_module("torch")
        importlib.import_module("octavo.torch")  # which makes the operators known
        archive = importlib.import_module("torch.export.pt2_archive._package")
        _refuse_pickles(path, members)
        kept = {name: content for name, content in members.items() if not name.startswith(MACHINE_CODE)}
        try:
            programs = archive.load_pt2(io.BytesIO(_zipped(kept))).exported_programs
            self._graphs = {name: program.module() for name, program in programs.items()}
        except Exception as error:  # torch has no error of its own for what it cannot read
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise ValueError(
                f"{path}: torch {self._torch.__version__} does not read what {manifest.written_with} wrote ({reason[0]}); compile anew"
            ) from None
        held = {name.removeprefix("network."): value for name, value in programs["inference"].state_dict.items()}
        super().__init__(manifest, path, {name: value.detach() for name, value in held.items()})
        self._known = set(self._graphs["inference"].state_dict())
        self._code = self._runner(archive, members) if machine_code else None

    def _runner(self, archive: Any, members: Mapping[str, bytes]) -> Any:
        """AOTInductor's code, out of the bytes that were checked."""
        if not self.manifest.machine_code:
            raise ValueError(f"{self._path}: holds no machine code; compile with aot=True, or load without it")
        code = {
            name: content
            for name, content in members.items()
            if "/" not in name or name.startswith((MACHINE_CODE, ".data/"))
        }
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.pt2"
            file.write_bytes(_zipped(code))
            return archive.load_pt2(str(file)).aoti_runners["inference"]

    @staticmethod
    def _copied(value: Any) -> Any:
        return value.clone()

    def _infer(self, images: Any, state: dict[str, Any] | None) -> Any:
        torch, graph = self._torch, self._graphs["inference"]
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if self._code is not None:
                if state is not None:
                    raise ValueError("machine code has its weights in it, got a state; load without machine_code")
                return self._code(images)
            if state is None:
                return graph(images)
            there = {f"network.{name}": value for name, value in state.items() if f"network.{name}" in self._known}
            return torch.func.functional_call(graph, there, (images,))

    def _step(self, state: dict[str, Any], images: Any, labels: Any, loss_scale: float, seed: int) -> Step:
        torch, manifest = self._torch, self.manifest
        parts = [{name: state[name].detach() for name in names} for names in (manifest.parameters, manifest.buffers)]
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = self._graphs["step"](*parts, images, labels.long(), torch.tensor(loss_scale, dtype=torch.float32))
        return Step(*found)


class _Jax(Compiled):
    """Two exported functions."""

    def __init__(self, manifest: Manifest, path: Path, members: Mapping[str, bytes]) -> None:
        self._jax = jax = importlib.import_module("jax")
        export = importlib.import_module("jax.export")
        read = importlib.import_module("safetensors.numpy").load
        try:
            state = {name: jax.numpy.asarray(value) for name, value in read(members[STATE]).items()}
            functions = [export.deserialize(bytearray(members[name])).call for name in (INFERENCE, STEP)]
        except Exception as error:  # neither library names the errors it raises for bytes it cannot read
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise ValueError(
                f"{path}: jax {jax.__version__} does not read what {manifest.written_with} wrote ({reason[0]}); compile anew"
            ) from None
        self._run_inference, self._run_step = map(jax.jit, functions)
        super().__init__(manifest, path, state)

    @staticmethod
    def _copied(value: Any) -> Any:
        return value.copy()

    def _infer(self, images: Any, state: dict[str, Any] | None) -> Any:
        return self._run_inference(dict(self._state) if state is None else state, images)

    def _step(self, state: dict[str, Any], images: Any, labels: Any, loss_scale: float, seed: int) -> Step:
        jax = self._jax
        key = jax.random.key_data(jax.random.key(seed))
        return Step(*self._run_step(state, images, labels.astype("int32"), jax.numpy.float32(loss_scale), key))


def load_compiled(path: str | Path, *, machine_code: bool = False) -> Compiled:
    """The network in a file that `compile_config` wrote; machine_code: infer with AOTInductor's code in it, which may differ in last bits.

    Raises ValueError where the file is missing, truncated, damaged, not Octavo's, holds a pickle, or is of a newer version.
    """
    path = Path(path)
    manifest, members = _read(path)
    match Backend(manifest.backend):
        case Backend.TORCH:
            return _Torch(manifest, path, members, machine_code)
        case Backend.JAX:
            if machine_code:
                raise ValueError(f"{path}: a file of JAX holds no machine code; load without machine_code")
            return _Jax(manifest, path, members)
        case Backend.ENGINE:
            raise ValueError(f"{path}: backend engine compiles nothing; compile with torch or jax")
        case other:
            assert_never(other)


def write_compiled(path: Path, manifest: Manifest, members: Mapping[str, bytes]) -> int:
    """Write a file, whole or not at all; its size in bytes.  Raises ValueError where it cannot be written."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}
    text = manifest.model_copy(update={"members": digests}).model_dump_json(indent=1)
    content = _zipped({**members, MANIFEST: text.encode()})
    try:
        write_whole(path, content)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); choose a writable folder") from None
    return len(content)


def _zipped(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(f"{ROOT}/{name}", _TIME), content)
    return buffer.getvalue()


def _read(path: Path) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest, and the members that it vouches for."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; write one with octavo compile")
    try:
        with zipfile.ZipFile(path) as file:
            found = {name.removeprefix(f"{ROOT}/"): file.read(name) for name in file.namelist()}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); compile it anew") from None
    manifest = _manifest(path, found.pop(MANIFEST, b""))
    if {name: hashlib.sha256(content).hexdigest() for name, content in found.items()} != manifest.members:
        raise ValueError(f"{path}: damaged, the SHA-256 of its parts is not the one written; compile it anew")
    return manifest, found


def _manifest(path: Path, text: bytes) -> Manifest:
    try:
        found = json.loads(text)
    except ValueError:  # of JSON, and of UTF-8
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("version"), int):
        raise ValueError(f"{path}: not a network that octavo compiled; write one with octavo compile")
    if found["version"] > VERSION:
        raise ValueError(f"{path}: version {found['version']}, this octavo reads up to {VERSION}; upgrade octavo")
    try:
        return Manifest.model_validate(found)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise ValueError(
            f"{path}: its manifest is damaged ({place}: {error.errors()[0]['msg']}); compile it anew"
        ) from None


def _refuse_pickles(path: Path, members: Mapping[str, bytes]) -> None:
    """Raise ValueError where torch would unpickle."""
    for name, content in members.items():
        folder, _, last = name.rpartition("/")
        pickled = folder == "data/sample_inputs" and bool(content)
        if folder in ("data/weights", "data/constants"):
            if last.endswith("_config.json"):
                payloads = json.loads(content)["config"].values()
                pickled = any(
                    one["use_pickle"] or not one["path_name"].startswith(("weight_", "tensor_")) for one in payloads
                )
            else:
                pickled = last.endswith(".pt")
        if pickled:
            raise ValueError(f"{path}: {name} is a pickle, which octavo never reads; compile it anew")


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _require(array: Any, what: str, dtype: str, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError for an array of another dtype or shape; None in a shape is any size."""
    wanted = f"{dtype} [{', '.join('N' if size is None else str(size) for size in shape)}]"
    if not (hasattr(array, "dtype") and hasattr(array, "shape")):
        raise ValueError(f"{what} must be an array, {wanted}; got {type(array).__name__}: convert it")
    got = str(array.dtype).removeprefix("torch.")
    fits = len(array.shape) == len(shape) and all(
        size in (None, own) for size, own in zip(shape, array.shape, strict=True)
    )
    if got != dtype or not fits:
        raise ValueError(f"{what} must be {wanted}; got {got} {list(array.shape)}: convert it")
