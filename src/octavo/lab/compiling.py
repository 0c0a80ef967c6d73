"""Compiling a configuration's network: inference and a training step as graphs in one file, which `octavo.lab.compiled` runs.

Both are pure functions, without the optimizer.  The step goes forward and backward as eager training does; scales and histories go in and
come out.  Clipping, accumulation and replicas are its caller's.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, assert_never

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import package_pt2
from torch.fx.experimental.proxy_tensor import make_fx

from octavo import checkpoint
from octavo.lab.compiled import INFERENCE, MACHINE_CODE, STATE, STEP, Manifest, write_compiled
from octavo.lab.config import Config
from octavo.lab.learner import check_names
from octavo.lab.networks import exempt_layers, start, torch_network, transformer_sizes
from octavo.lab.run_folder import RunFolder
from octavo.lab.sections import Backend, ModelKind, PrecisionKind
from octavo.scaling import AmaxAlgorithm, roll_history
from octavo.torch import convert
from octavo.torch.state import BACKWARD, ScaledLayer

__all__ = ["LARGEST", "compile_config"]

LARGEST = 100_000_000
"""Parameters of the largest network that is compiled: its weights are made in memory and written into the file."""
Tensors = dict[str, Tensor]
_MODEL = "model."
_MOST_BATCH = 4096


class _Graphs(NamedTuple):
    """What a backend made.  facts: what `Manifest` asks for beyond the configuration; line: what there is to say."""

    members: dict[str, bytes]
    facts: dict[str, Any]
    line: str


def compile_config(config: Config, out: Path | None = None, *, aot: bool = False) -> str:
    """Write the compiled network of a configuration; lines that say what was written, of what weights, and how.

    Weights are those of the newest checkpoint in `config.folder`, else the first ones.  out: the file, default `model.pt2` in that folder.
    aot: beside the graph, inference as AOTInductor's machine code, whose fused kernels may differ from eager in last bits.
    Inference takes any batch; under JAX so many that kernels choose alike for all.  A transformer compiles for inference alone.
    Raises ValueError for a folder that is missing or cannot be written, for backend: engine, and for what cannot be compiled.
    """
    path = _place(config, out)
    match config.backend:
        case Backend.TORCH:
            graphs = _torch_graphs(config, aot=aot)
        case Backend.JAX:
            if aot:
                raise ValueError("aot=True needs backend: torch, got jax; leave it out: XLA compiles when loaded")
            graphs = _jax_graphs(config)
        case Backend.ENGINE:
            raise ValueError("backend: engine compiles nothing; write backend: torch, or jax")
        case other:
            assert_never(other)
    manifest = Manifest(
        backend=config.backend.value,
        precision=config.precision_name,
        batch_size=config.train_input.batch_size,
        config=config.resolved(),
        **graphs.facts,
    )
    size = write_compiled(path, manifest, graphs.members)
    what = f"{'inference and a training step' if manifest.step else 'inference'} of {config.model.name.value}"
    first = f"{path}: {what} in {config.precision_name}, {size / 1e6:.2f} MB, {manifest.written_with}"
    return "\n".join((first, f"weights: {manifest.weights}", graphs.line))


def _place(config: Config, out: Path | None) -> Path:
    """Where to write, known to be a file in a folder before anything is traced."""
    path = config.folder / "model.pt2" if out is None else out.expanduser()
    if out is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{path.parent}: cannot be made ({error.strerror}); name another model_dir") from None
    if not path.parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist; make it, or name another file")
    if path.is_dir() or path.suffix != ".pt2":
        raise ValueError(f"a compiled network is a file that ends in .pt2, got {path}; name one such as model.pt2")
    return path


def _weights(config: Config, framework: str) -> tuple[dict[str, Any] | None, str]:
    """The newest checkpoint's tensors of the network, None where there is none, and what to call them."""
    held = RunFolder(config.folder).checkpoints()
    if not held or config.model.name is ModelKind.TRANSFORMER:
        return None, f"the first ones, of seed {config.runconfig.seed}"
    step, path = held[-1]
    tensors, _ = checkpoint.load(path, framework=framework)
    found = {name.removeprefix(_MODEL): value for name, value in tensors.items() if name.startswith(_MODEL)}
    wanted = {name: value.shape for name, value in start(config.model, config.runconfig.seed).items()}
    given = {name: tuple(value.shape) for name, value in found.items()}
    try:
        # Scales and histories may come in another length, or not at all.
        check_names(
            {name: given[name] for name in given if name in wanted or name.endswith((".weight", ".bias"))}, wanted
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found, f"{path.name}, after {step} updates"


class _Inference(nn.Module):
    """The network in the precision of its run."""

    def __init__(self, network: nn.Module, kind: PrecisionKind) -> None:
        super().__init__()
        self.network, self.kind = network, kind

    def forward(self, images: Tensor) -> Tensor:
        with _computing(self.kind):
            output: Tensor = self.network(images)
            return output


def _computing(kind: PrecisionKind) -> contextlib.AbstractContextManager[object]:
    """What a forward pass runs in; layers under a recipe know it themselves."""
    match kind:
        case PrecisionKind.FLOAT32 | PrecisionKind.RECIPE:
            return contextlib.nullcontext()
        case PrecisionKind.BFLOAT16:
            return torch.autocast("cpu", dtype=torch.bfloat16)
        case PrecisionKind.FLOAT16:
            return torch.autocast("cpu", dtype=torch.float16)
        case _:
            assert_never(kind)


def _network(config: Config) -> tuple[nn.Module, str]:
    """The network with its weights, and what to call them."""
    count = sum(p.numel() for p in torch_network(config.model, config.runconfig.seed, device="meta").parameters())
    if count > LARGEST:
        raise ValueError(f"networks of up to {LARGEST:,} parameters are compiled, got {count:,}; take a smaller model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.runconfig.seed)
        network = torch_network(config.model, config.runconfig.seed)
    if config.recipe is not None:
        convert(network, config.recipe, exempt=exempt_layers(config.model, config.exempt))
    tensors, source = _weights(config, "torch")
    if tensors is not None:
        known = network.state_dict()  # a checkpoint of another precision may hold scales that this one has no use for
        network.load_state_dict({name: value for name, value in tensors.items() if name in known})
    if config.recipe is not None and config.recipe.delayed is not None:
        for layer in _scaled(network).values():
            layer.resize_histories(config.recipe.delayed.history)
    return network, source


def _scaled(network: nn.Module) -> dict[str, ScaledLayer]:
    return {name: module for name, module in network.named_modules() if isinstance(module, ScaledLayer)}


def _torch_graphs(config: Config, *, aot: bool) -> _Graphs:
    """Exported programs of PyTorch."""
    network, source = _network(config)
    tokens = config.model.name is ModelKind.TRANSFORMER
    parameters = [name for name, _ in network.named_parameters()]
    buffers = [name for name in network.state_dict() if name not in parameters]
    programs = {"inference": _inference(config, network)}
    if not tokens:
        programs["step"] = _step(config, network, parameters, buffers)
    line = "AOTInductor: not asked for (aot=True), as its code may differ from eager in last bits"
    code: dict[str, bytes] = {}
    if aot:
        code = _machine_code(programs["inference"])
        line = f"AOTInductor: inference, too, {sum(map(len, code.values())) / 1e6:.2f} MB; may differ from eager in last bits"
    for program in programs.values():
        program.example_inputs = None  # they would be pickled
    buffer = io.BytesIO()
    package_pt2(buffer, exported_programs=programs)
    sizes = transformer_sizes(config.model) if tokens else {}
    facts = {
        "written_with": f"torch {torch.__version__}",
        "weights": source,
        "least_batch": 0,
        "most_batch": None,
        **{key: sizes.get(key) for key in ("max_length", "vocab_size")},
        "parameters": parameters,
        "buffers": buffers,
        "step": not tokens,
        "machine_code": aot,
    }
    return _Graphs(_members(buffer) | code, facts, line)


def _members(archive: io.BytesIO | Path) -> dict[str, bytes]:
    """The members of an archive of torch's, but for their common folder and what tells archives apart."""
    with zipfile.ZipFile(archive) as file:
        found = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    return {name: content for name, content in found.items() if name != ".data/serialization_id"}


def _inference(config: Config, network: nn.Module) -> ExportedProgram:
    """The network in evaluation, of any batch."""
    model = _Inference(copy.deepcopy(network).eval(), config.kind)
    sizes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if config.model.name is ModelKind.TRANSFORMER:
        length = transformer_sizes(config.model)["max_length"]
        example = torch.zeros(2, length, dtype=torch.int64)
        if length > 2:  # torch takes sizes of 0 and 1 for constants
            sizes[1] = torch.export.Dim("length", max=length)
    else:
        example = torch.zeros(2, 1, 28, 28)
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=(sizes,), strict=False)


def _step(config: Config, network: nn.Module, parameters: list[str], buffers: list[str]) -> ExportedProgram:
    """(parameters, buffers, images, labels, loss scale) -> (loss, gradients, buffers), traced through autograd into one graph."""
    network = copy.deepcopy(network).train()
    state, size = network.state_dict(), config.train_input.batch_size
    arguments = (
        {name: state[name] for name in parameters},
        {name: state[name] for name in buffers},
        torch.zeros(size, 1, 28, 28),
        torch.zeros(size, dtype=torch.int64),
        torch.ones(()),
    )
    loss_of = F.cross_entropy if config.model.disable_softmax else F.nll_loss

    def step(weights: Tensors, held: Tensors, images: Tensor, labels: Tensor, scale: Tensor) -> tuple[Any, ...]:
        weights = {name: value.detach().requires_grad_() for name, value in weights.items()}
        held = {name: value.clone() for name, value in held.items()}  # layers move scales in place
        with _computing(config.kind):
            output = torch.func.functional_call(network, {**weights, **held}, (images,))
        loss = loss_of(output.float(), labels, reduction="sum") / size
        gradients = torch.autograd.grad(loss * scale, list(weights.values()))
        for name, layer in _scaled(network).items():
            _move_backward_scales(name, layer, held)
        return loss.detach(), dict(zip(weights, gradients, strict=True)), held

    with _compiling():
        graph = make_fx(step, tracing_mode="fake")(*arguments)
    return torch.export.export(graph, arguments, strict=False)


def _move_backward_scales(name: str, layer: ScaledLayer, buffers: Tensors) -> None:
    """What eager layers do when a backward pass ends (`ScaledLayer.update_backward`), where there is no such moment."""
    scaling = None if layer.recipe is None else layer.recipe.delayed
    if layer.recipe is None or scaling is None:
        return
    if not isinstance(scaling.algorithm, AmaxAlgorithm):
        raise ValueError(f"a step compiles with a named amax algorithm, {layer.recipe.name} has a function; name one")
    history, scale = f"{name}.amax_history_backward", f"{name}.scale_backward"
    maxima = torch.tensor([layer.recipe.maxima.get(tensor, 1.0) for tensor in BACKWARD])
    buffers[history], buffers[scale] = roll_history(buffers[history], buffers[scale], maxima, scaling)


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Have layers do what torch.compile can trace: operators through the dispatcher, and forward scales moved in the graph."""
    before, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _machine_code(program: ExportedProgram) -> dict[str, bytes]:
    """The members of an archive that hold AOTInductor's code for a program."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise ValueError("aot=True needs a C++ compiler, found no c++, g++ or clang++; install one, or leave it out")
    from torch._inductor import aoti_compile_and_package

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about itself
        path = aoti_compile_and_package(program, package_path=str(Path(folder) / "model.pt2"))
        theirs, kept = "data/aotinductor/model/", _members(Path(path))
    return {
        MACHINE_CODE + name.removeprefix(theirs): content for name, content in kept.items() if name.startswith(theirs)
    }


def _jax_graphs(config: Config) -> _Graphs:
    """Functions of JAX, for the platform that it runs on."""
    if config.model.name is ModelKind.TRANSFORMER:
        raise ValueError("backend: jax compiles fc_mnist, cnn and mlp, got transformer; write backend: torch")
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError("backend: jax compiles with flatbuffers, which is not installed; pip install flatbuffers")
    import jax
    import safetensors.numpy
    from flax.traverse_util import flatten_dict

    import octavo.jax

    within = octavo.jax.autocast(recipe=config.recipe) if config.recipe is not None else contextlib.nullcontext()
    with within:
        network, variables, source = _flax_network(config)
        infer, step = _flax_functions(config, network)
        state = {name: np.asarray(value) for name, value in flatten_dict(variables, sep=".").items()}
        given = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in state.items()}
        inference, least, most = _any_batch(infer, given, config.train_input.batch_size)
        size, key = config.train_input.batch_size, jax.random.key_data(jax.random.key(0))
        shapes = (((size, 1, 28, 28), "float32"), ((size,), "int32"), ((), "float32"), (key.shape, key.dtype))
        stepping = jax.export.export(jax.jit(step))(given, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    members = {INFERENCE: bytes(inference.serialize()), STEP: bytes(stepping.serialize())}
    facts = {
        "written_with": f"jax {jax.__version__}",
        "weights": source,
        "least_batch": least,
        "most_batch": most,
        "parameters": [name for name in state if name.startswith("params.")],
        "buffers": [name for name in state if not name.startswith("params.")],
        "step": True,
    }
    many = f"{least} to {most}" if least < most else f"exactly {most}"
    line = f"inference takes {many} images a call; compiled for {', '.join(inference.platforms)}"
    return _Graphs(members | {STATE: safetensors.numpy.save(state)}, facts, line)


def _flax_network(config: Config) -> tuple[Any, Any, str]:
    """The network in Flax, its variables, and what to call their weights."""
    import jax
    import jax.numpy as jnp

    import octavo.jax
    from octavo.lab.flax_models import network_of, spared_layers

    halves = {PrecisionKind.BFLOAT16: jnp.bfloat16, PrecisionKind.FLOAT16: jnp.float16}
    first = start(config.model, config.runconfig.seed)
    patterns = exempt_layers(config.model, config.exempt)
    spared = spared_layers(patterns, first) if config.recipe is not None else ()
    network = network_of(config.model, dtype=halves.get(config.kind, jnp.float32), spared=spared)
    like = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 1, 28, 28)))
    tensors, source = _weights(config, "numpy")
    return network, octavo.jax.from_torch(first if tensors is None else tensors, like), source


def _flax_functions(config: Config, network: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Inference and the step; a state is one flat dict."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict, unflatten_dict

    import octavo.jax

    def infer(state: Any, images: Any) -> Any:
        return network.apply(unflatten_dict(state, sep="."), images)

    def step(state: Any, images: Any, labels: Any, scale: Any, key: Any) -> Any:
        def scaled_loss(variables: Any) -> Any:
            draws = {"dropout": jax.random.wrap_key_data(key)}
            output = network.apply(variables, images, train=True, rngs=draws)
            log_probs = jax.nn.log_softmax(output) if config.model.disable_softmax else output
            loss = -jnp.take_along_axis(log_probs, labels[:, None], axis=1).sum() / config.train_input.batch_size
            return loss * scale, loss

        variables = unflatten_dict(state, sep=".")
        (_, loss), found = jax.value_and_grad(scaled_loss, has_aux=True)(variables)
        new = flatten_dict(octavo.jax.update_collections(found, variables), sep=".")
        parts: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        for name, value in new.items():
            parts[not name.startswith("params.")][name] = value
        return loss, *parts

    return infer, step


def _any_batch(infer: Callable[..., Any], state: Mapping[str, Any], size: int) -> tuple[Any, int, int]:
    """Inference of any batch up to the largest for which tracing decides alike, else of `size` alone; and its least and most batch."""
    import jax

    most = _MOST_BATCH
    while most > 1:
        (batch,) = jax.export.symbolic_shape("batch", constraints=[f"batch <= {most}"])
        try:
            return (
                jax.export.export(jax.jit(infer))(state, jax.ShapeDtypeStruct((batch, 1, 28, 28), "float32")),
                1,
                most,
            )
        except jax.errors.InconclusiveDimensionOperation:
            most //= 2
    return jax.export.export(jax.jit(infer))(state, jax.ShapeDtypeStruct((size, 1, 28, 28), "float32")), size, size
