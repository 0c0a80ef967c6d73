"""The toolkit's `mpt_emu`: train a model as 8-bit hardware would, or prepare it for inference in 8 bits.

model, emulator = mpt_emu.initialize(model, optimizer, training_algo="direct", list_exempt_layers=["conv1", "bn1", "fc"])
...
emulator.scale_loss(loss).backward()
emulator.optimizer_step(optimizer)

Casts, gradients and master weights are those of `octavo.torch.emulate`; inference is that of `octavo.torch.quantization`.
"""

from __future__ import annotations

import copy
import datetime
import inspect
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from octavo.diagnose.dumps import Dumps
from octavo.diagnose.records import TensorBoard, Writer
from octavo.formats import Format
from octavo.mpemu.choices import (
    DTYPES,
    EMBEDDINGS,
    MASTERS,
    METHODS,
    Selection,
    checked_model,
    checked_scale,
    embedding_recipe,
    named,
    refuse,
    select,
    steps_of,
)
from octavo.patterns import Patterns, is_in
from octavo.recipes import Recipe
from octavo.rounding import checked_counter
from octavo.torch.emulate import Emulation, install
from octavo.torch.loss_scaling import LossScaler
from octavo.torch.quantization import ptq_recipe
from octavo.torch.quantization import quantize_model as quantized_copy
from octavo.torch.quantized import is_quantizable

__all__ = ["MPTEmulator", "initialize", "quantize_model"]


def initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    training_algo: str = "direct",
    *,
    list_exempt_layers: Patterns | None = None,
    list_layers_output_fused: Patterns | None = None,
    device: str | torch.device | None = None,
    verbose: bool = False,
    loss_scale: LossScaler | float | str | None = None,
    seed: int = 0,
    hw_patch: str = "none",
    pruning_algo: str = "none",
) -> tuple[nn.Module, MPTEmulator]:
    """The model, which from now on computes as `training_algo` says, in place, and what steers that.

    training_algo: "direct" casts all six tensors of a GEMM to E5M2, unscaled, gradients stochastically (arXiv 1905.12334); "hybrid"
    casts input, weight and output to E4M3 by their own amax, gradients as "direct" does.  Master weights are rounded to float16,
    stochastically, after each `optimizer_step`.  list_exempt_layers: modules to leave in high precision, with all inside them;
    list_layers_output_fused: those whose output and grad_output are not cast; both by qualified name, pattern or type.
    optimizer: checked to hold this model's parameters alone; None checks nothing.  device: where the model is, if given.
    loss_scale: "dynamic", a constant or a `LossScaler`, for `scale_loss` and `optimizer_step`; None scales nothing.  seed: of the
    master weights' draws.  verbose: print what runs how.

    Covered is what `octavo.torch.emulate` covers, except embeddings, until `set_embedding_precision`, and norms other than layer
    norms, until `whitelist_modules`, which the toolkit leaves alone too.  NaN and Inf are treated as there.
    Raises ValueError for unknown words, with the nearest; for entries that fit no module, a foreign optimizer, a model that is
    emulated already or is elsewhere; for hardware patches and pruning, which Octavo does not do.
    """
    training, inference = named("training_algo", training_algo, METHODS)
    refuse(hw_patch=hw_patch, pruning_algo=pruning_algo)
    emulator = MPTEmulator(
        checked_model(model, device),
        training(),
        ptq_recipe(inference),
        exempt=list_exempt_layers,
        fused=list_layers_output_fused,
        optimizer=optimizer,
        loss_scale=checked_scale(loss_scale),
        master=MASTERS["fp16"],
        seed=seed,
        verbose=verbose,
    )
    return model, emulator


def quantize_model(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    dtype: str = "e4m3",
    *,
    calibrate: bool | Iterable[Any] = False,
    list_exempt_layers: Patterns | None = None,
    list_layers_output_fused: Patterns | None = None,
    device: str | torch.device | None = None,
    verbose: bool = False,
    fuse_bn: bool = False,
    calibration_batches: int = 32,
    loss_scale: LossScaler | float | str | None = None,
    seed: int = 0,
    hw_patch: str = "none",
) -> tuple[nn.Module, MPTEmulator]:
    """The model, whose GEMMs from now on cast input and weight as `dtype` says, in place, and what steers that.

    dtype: of `octavo.torch.quantization.ptq_recipe`: "e4m3", "e3m4" or "e5m2" for both, "hybrid" for E4M3 inputs and E3M4 weights;
    an input has one scale, a weight one for each output channel, both taken from the tensor at hand.  Outputs and gradients are not
    cast, so the model can be fine-tuned.  calibrate: what fixes the scales of inputs in `fuse_bnlayers_and_quantize_model`: False
    nothing; True the first `calibration_batches` that pass through the model; or batches, as `octavo.torch.quantization` takes
    them.  fuse_bn: return what that method makes of the model at once.  optimizer, loss_scale, seed: for fine-tuning; the rest, and
    what is raised, as in `initialize`.
    """
    recipe = ptq_recipe(named("dtype", dtype, DTYPES))
    refuse(hw_patch=hw_patch)
    emulator = MPTEmulator(
        checked_model(model, device),
        recipe,
        recipe,
        exempt=list_exempt_layers,
        fused=list_layers_output_fused,
        optimizer=optimizer,
        loss_scale=checked_scale(loss_scale),
        master=None,
        seed=seed,
        verbose=verbose,
        kept=calibration_batches,
    )
    if calibrate is True:
        emulator.set_calibration_qconfig()
    elif calibrate is not False:
        emulator.batches = calibrate
    return (emulator.fuse_bnlayers_and_quantize_model(model) if fuse_bn else model), emulator


class MPTEmulator:
    """What steers an emulated model.  Its settings may be changed at any time between two steps; `initialize` makes one.

    model: the emulated model.  emulation: its `octavo.torch.Emulation`, another one after a change of settings; scaler, step and
    random draws go on.  batches: what calibrates `fuse_bnlayers_and_quantize_model`, None where nothing does.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        inference: Recipe,
        *,
        exempt: Patterns | None,
        fused: Patterns | None,
        optimizer: torch.optim.Optimizer | None,
        loss_scale: LossScaler | float | str | None,
        master: Format | None,
        seed: int,
        verbose: bool,
        kept: int = 32,
    ) -> None:
        self.model = model
        self.batches: Iterable[Any] | None = None
        self._recipe, self._inference, self._verbose = recipe, inference, verbose
        self._kept = checked_counter("calibration_batches", kept, 1 << 31)
        self._selection = select(dict(model.named_modules()), exempt, fused)
        self._stats: list[tuple[Writer, int]] = []
        self._dumps: Dumps | None = None
        self._sites: dict[str, Any] = {}
        self._recording: RemovableHandle | None = None
        self.emulation: Emulation = install(
            model,
            recipe,
            self._selection.chooser(recipe),
            optimizer=optimizer,
            loss_scale=loss_scale,
            master=master,
            seed=seed,
        )
        if verbose:
            print(self.describe())

    # Training.

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on: times the loss scale, where there is one."""
        return self.emulation.scale(loss)

    def optimizer_step(
        self, optimizer: torch.optim.Optimizer, *, max_norm: float | None = None, max_value: float | None = None
    ) -> bool:
        """`octavo.torch.Emulation.step`: unscale, clip, step, round the master weights, count; whether the step was taken."""
        return self.emulation.step(optimizer, max_norm=max_norm, max_value=max_value)

    def update_global_steps(self, global_steps: int) -> None:
        """Set the number of the next step, which `optimizer_step` counts up.  Steps of one number draw alike in master weights."""
        self.emulation.global_step = checked_counter("global_steps", global_steps, 1 << 63)

    def set_master_param_precision(self, master_params: str) -> None:
        """What master weights are rounded to, stochastically, after each step: "fp16", "e5m2" ("bf8"), or "fp32", which leaves them."""
        self.emulation.master = named("master_params", master_params, MASTERS)

    # Which modules run how.

    def blacklist_modules(self, list_modules: Iterable[type[nn.Module] | str]) -> None:
        """Leave modules of these types, or names of types, in high precision, with all inside them.

        Of a blacklisted module in a whitelisted one, or the other way round, the innermost counts; for one type, the later call.
        Exempt layers stay exempt.  Raises ValueError for a type that no module has.
        """
        self._change(self._selection.ruled(list_modules, dict(self.model.named_modules()), runs=False))

    def whitelist_modules(self, list_modules: Iterable[type[nn.Module] | str]) -> None:
        """Have modules of these types, or names of types, run in 8 bits, with all inside them; see `blacklist_modules`."""
        self._change(self._selection.ruled(list_modules, dict(self.model.named_modules()), runs=True))

    def set_embedding_precision(self, emb_precision: str, emb_norm: bool = False) -> None:
        """What embeddings give out: "e5m2" ("bf8"), "e4m3" ("hf8"), "e3m4" ("hf8_2"), or "fp32", as it is.

        Values are rounded to nearest even and saturate, unscaled; emb_norm: each vector is scaled by its own amax.  The table itself
        and its gradient stay in float32.
        """
        format = named("emb_precision", emb_precision, EMBEDDINGS)
        self._change(replace(self._selection, embedding=embedding_recipe(format, by_rows=emb_norm)))

    # What can be seen.

    def enable_tensor_stats(
        self, summary_writer: Writer | str | os.PathLike[str] | Any | None = None, *, every: int = 1000
    ) -> Writer:
        """Write statistics of every tensor that is cast, in steps 0, every, 2 * every, ...; returns the writer, for the caller to close.

        summary_writer: one of `octavo.diagnose.records`, a TensorBoard `SummaryWriter`, or a folder for a new one; None takes the folder
        emulator_logs/<model>_<time>.  Raises ValueError for anything else, ImportError where tensorboard is needed and missing.
        """
        if summary_writer is None:
            stamp = datetime.datetime.now().strftime("%Y_%m_%d_%H_%M_%S")
            summary_writer = os.path.abspath(f"emulator_logs/{type(self.model).__name__}_{stamp}")
        writer: Writer = (
            cast(Writer, summary_writer) if hasattr(summary_writer, "write") else TensorBoard(summary_writer)
        )
        self.emulation.observe(writer, every=every)
        self._stats.append((writer, every))
        return writer

    def enable_tensorboard_logging(
        self, summary_writer: str | os.PathLike[str] | Any | None = None, *, every: int = 1000
    ) -> Writer:
        """`enable_tensor_stats`, by its other name."""
        return self.enable_tensor_stats(summary_writer, every=every)

    def set_tensor_bindump_schedule(
        self,
        list_bindump_schedule: Iterable[int | Sequence[int]] | None,
        *,
        directory: str | os.PathLike[str] = "tensor_dumps",
        patterns: Sequence[str] = ("*",),
    ) -> None:
        """Write tensors whole, as they were before the cast, in these steps and no others; None or an empty list ends it.

        list_bindump_schedule: steps, ranges, and pairs (first, stop) of ranges.  directory, patterns: of `octavo.diagnose.dumps.Dumps`.
        """
        steps = steps_of(list_bindump_schedule or ())
        self._dumps = Dumps(directory, patterns=patterns, steps=steps) if steps else None
        self._reinstall()

    def describe(self) -> str:
        """The recipe's table, and the modules that do not run in it, as text."""
        choose = self._selection.chooser(self._recipe)
        leaves = {name: module for name, module in self.model.named_modules() if next(module.children(), None) is None}
        spared = [name for name, module in leaves.items() if choose(name, module) is None]
        lines = [self._recipe.describe(), f"  in high precision: {', '.join(spared) or 'none'}"]
        if self._selection.fused:
            lines.append(f"  output not cast: {', '.join(sorted(self._selection.fused))}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"MPTEmulator({type(self.model).__name__} in {self._recipe.name}, step {self.emulation.global_step})"

    # Inference.

    def set_calibration_qconfig(self) -> None:
        """Cast as in inference from now on, and keep the inputs of the model's next passes to calibrate by."""
        self.batches = []
        self._change(self._selection, self._inference)
        self._record()

    def set_default_inference_qconfig(self) -> None:
        """Cast as in inference from now on, and keep no more inputs."""
        self._stop_recording()
        self._change(self._selection, self._inference)

    def fuse_bnlayers_and_quantize_model(self, model: nn.Module) -> nn.Module:
        """A copy of the model for inference, in eval mode; the model goes on as it was.

        Calibrated, it is what `octavo.torch.quantization.quantize_model` makes of the batches: weights in codes, inputs by fixed
        scales, batch norms folded into the layers before them.  Else the copy is emulated, with scales taken from each tensor as it
        comes; its batch norms are then no more than a scale and a shift, in float32.  model: the emulator's.
        Raises ValueError for another model, and where calibration was asked for and no batch has passed.
        """
        if model is not self.model:
            raise ValueError("an emulator quantises the model it was made for; got another: pass emulator.model")
        if isinstance(self.batches, list) and not self.batches:
            raise ValueError("no batch has passed to calibrate by; run some first, or give calibrate=batches")
        recording = self._recording is not None
        self._stop_recording()
        self._remove()
        try:
            return self._fixed() if self.batches is not None else self._following()
        finally:
            self._install(self._recipe)
            if recording:
                self._record()

    def remove(self) -> None:
        """Restore the model: it computes as it did before `initialize`.  A second call does nothing."""
        self._stop_recording()
        self.emulation.remove()

    def _fixed(self) -> nn.Module:
        """A quantised copy, its scales fixed by the batches."""
        choose = self._selection.chooser(self._inference)
        layers = ((name, layer) for name, layer in self.model.named_modules() if is_quantizable(layer))
        spared = [name for name, layer in layers if choose(name, layer) is None]
        assert self.batches is not None
        return quantized_copy(self.model, self._inference, self.batches, exempt=spared)

    def _following(self) -> nn.Module:
        """An emulated copy, whose scales follow from each tensor."""
        new = copy.deepcopy(self.model).eval().requires_grad_(False)
        install(new, self._inference, self._selection.chooser(self._inference))
        return new

    def _record(self) -> None:
        """Keep the inputs of the model's passes."""
        seen = self.batches
        assert isinstance(seen, list)

        def keep(module: nn.Module, inputs: tuple[Any, ...], named_inputs: dict[str, Any]) -> None:
            if len(seen) < self._kept:
                seen.append(_batch(module, inputs, named_inputs))

        self._stop_recording()
        self._recording = self.model.register_forward_pre_hook(keep, with_kwargs=True)

    def _stop_recording(self) -> None:
        if self._recording is not None:
            self._recording.remove()
        self._recording = None

    def _change(self, selection: Selection, recipe: Recipe | None = None) -> None:
        """Go on with another selection, or recipe."""
        self._selection, self._recipe = selection, recipe or self._recipe
        self._reinstall()
        if self._verbose:
            print(self.describe())

    def _reinstall(self) -> None:
        self._remove()
        self._install(self._recipe)

    def _remove(self) -> None:
        """Take the emulation off the model; its sites' draws are kept for when they come back."""
        self._sites |= self.emulation.state_dict()["sites"]
        self.emulation.remove()

    def _install(self, recipe: Recipe) -> None:
        """Put an emulation on the model that goes on where the last one ended."""
        before, choose = self.emulation, self._selection.chooser(recipe)
        modules = dict(self.model.named_modules())
        self.emulation = install(
            self.model, recipe, choose, loss_scale=before.scaler, master=before.master, seed=before.seed
        )
        chosen = {name for name, module in modules.items() if choose(name, module) is not None}
        sites = {name: state for name, state in self._sites.items() if _owner(name, modules) in chosen}
        self.emulation.load_state_dict(before.state_dict() | {"recipe": recipe.cast_key, "sites": sites})
        for writer, every in self._stats:
            self.emulation.observe(writer, every=every)
        if self._dumps is not None:
            self.emulation.observe(dumps=self._dumps)


def _owner(site: str, modules: Iterable[str]) -> str:
    """The name of the module that a site is in."""
    return max((name for name in modules if is_in(site, name)), key=len)


def _batch(model: nn.Module, inputs: tuple[Any, ...], named_inputs: dict[str, Any]) -> Any:
    """The inputs of a pass as `octavo.torch.quantization` takes a batch."""
    if len(inputs) == 1 and not named_inputs:
        return inputs
    return dict(inspect.signature(model.forward).bind(*inputs, **named_inputs).arguments)
