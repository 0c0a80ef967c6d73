"""`emulate`: run any PyTorch model as a recipe would train it, without a change to its code."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from octavo.diagnose.dumps import Dumps
from octavo.diagnose.records import Writer
from octavo.formats import Format
from octavo.patterns import Patterns, chosen
from octavo.recipes import Recipe, get_recipe
from octavo.torch import context
from octavo.torch.choosing import check_optimizer, output_uncast, scaler_of
from octavo.torch.interception import Interception
from octavo.torch.loss_scaling import LossScaler
from octavo.torch.masters import round_masters
from octavo.torch.observing import Observer
from octavo.torch.place import Place, now
from octavo.torch.site import Site
from octavo.torch.state import next_serial
from octavo.torch.watching import Look

__all__ = ["Emulation", "emulate", "emulation_of", "install"]


def emulate(
    model: nn.Module,
    recipe: Recipe | str,
    *,
    exempt: Patterns = (),
    output_fused: Patterns = (),
    optimizer: torch.optim.Optimizer | None = None,
    loss_scale: LossScaler | float | str | None = None,
    master: Format | None = None,
    seed: int = 0,
) -> Emulation:
    """Have `model` compute as `recipe` says, in place, until `remove()` of what is returned, which is a context manager too.

    recipe: a Recipe, or the name of one.  exempt: modules to leave in high precision, with all inside them.  output_fused: modules
    whose output and grad_output are left uncast, since whatever reads them is computed in the same kernel.  optimizer: checked to hold
    this model's parameters and no others.  loss_scale: "dynamic", a constant, or a `LossScaler`; None scales nothing.  master: the
    format that parameters are rounded to, stochastically, after each `step`; None leaves them in float32.  seed: of all random draws.

    What runs by the recipe's three GEMMs: nn.Linear, convolutions and transposed ones, attention, LSTM, GRU and RNN, and matmul, mm, bmm,
    mv, dot, addmm, addmv, baddbmm, einsum and scaled_dot_product_attention wherever a module calls them.  Norms, embeddings, add, sub,
    mul and div read tensors as they are, and store results and gradients as the recipe's `result` cells say, if it has any (`direct`).
    All else runs as it is.  Parameters keep their values and dtype; state_dict() keeps its keys.
    NaN and Inf in an operand or a result raise ValueError with the module, the tensor and the step; under a loss scale they are named
    where the step is skipped, or in a warning where casts saturated them and it was not.
    Raises ValueError for patterns that fit nothing, foreign optimizers, parameters that are complex or integers, and a model that is
    emulated already.
    """
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    context.check_recipe(recipe)
    modules = dict(model.named_modules())
    spared = chosen(modules, exempt, "exempt", inside=True)
    fused = chosen(modules, output_fused, "output_fused", inside=False)
    without = output_uncast(recipe)

    def choose(name: str, module: nn.Module) -> Recipe | None:
        return None if name in spared else without if name in fused else recipe

    return install(model, recipe, choose, optimizer=optimizer, loss_scale=loss_scale, master=master, seed=seed)


def emulation_of(model: nn.Module) -> Emulation | None:
    """The emulation of a model; None where it has none.  A copy of an emulated model (`copy.deepcopy`) has one of its own."""
    entered = model.__dict__.get("forward")
    return entered.emulation if isinstance(entered, _Entered) else None


def install(
    model: nn.Module,
    recipe: Recipe,
    choose: Callable[[str, nn.Module], Recipe | None],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss_scale: LossScaler | float | str | None = None,
    master: Format | None = None,
    seed: int = 0,
) -> Emulation:
    """`emulate` with a recipe for each module, None for high precision, by qualified name and module."""
    _check_model(model)
    if optimizer is not None:
        check_optimizer(model, optimizer)
    emulation = Emulation(model, recipe, scaler_of(loss_scale, model), master, seed)
    for name, module in model.named_modules():
        place = Place(name, module, choose(name, module), emulation)
        place.expect()
        module.forward = _Entered(module, place, emulation)  # type: ignore[method-assign]
    return emulation


class Emulation:
    """An emulated model's handle: its steps, its loss scale, what is watched; `remove()`, or leaving the block, ends it.

    global_step: the number of the step in messages, records and draws; `step` counts it up, and it may be set.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, scaler: LossScaler | None, master: Format | None, seed: int
    ) -> None:
        self.model, self.recipe, self.scaler, self.master, self.seed = model, recipe, scaler, master, seed
        self.sites: dict[str, Site] = {}
        self.serial = next_serial()
        self.global_step = 0
        self._observers: list[Observer] = []
        self._bad: str | None = None
        self._agreed = -1

    def __enter__(self) -> Emulation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Restore the model: every module's own forward.  A second call does nothing."""
        for module in self.model.modules():
            entered = module.__dict__.get("forward")
            if isinstance(entered, _Entered) and entered.emulation is self:
                entered.restore()
        # At once, and not when sites are collected, which every rank would do at a time of its own.
        for site in self.sites.values():
            context.unregister(site)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on: times the loss scale, where there is one."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def step(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        max_norm: float | None = None,
        max_value: float | None = None,
    ) -> bool:
        """Unscale the gradients, clip them, step, round the master weights, count; whether the step was taken.

        optimizer: one, or all of several that step together.  max_norm, max_value: limits of the norm of all gradients and of each
        element (`torch.nn.utils.clip_grad_*_`).
        Under a loss scale a step whose gradients hold Inf or NaN is skipped, with one line that names the first bad tensor; it counts.
        Raises ValueError for such gradients without one, and LossScaleError where the scale can fall no further.  Weights and optimizer
        state are then as they were.
        """
        bad, self._bad = self._bad, None
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        parameters = [p for one in optimizers for group in one.param_groups for p in group["params"]]
        scaler = self.scaler
        if scaler is None:
            self._require_finite(parameters, bad)
        else:
            for one in optimizers:
                scaler.unscale(one)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_norm)
        if max_value is not None:
            nn.utils.clip_grad_value_(parameters, max_value)
        taken = True
        if scaler is not None:
            taken = scaler.step(optimizers, self.global_step, blame=bad)
        else:
            for one in optimizers:
                one.step()
        if not taken:
            for site in self.sites.values():
                site.forget_overflow()
        elif bad is not None:
            warnings.warn(f"{bad}; casts saturated it, and the step was taken", stacklevel=2)
        if taken and self.master is not None:
            self.round_masters(parameters)
        self.global_step += 1
        return taken

    def round_masters(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Round the parameters (default: the model's) to the master format, as `step` does."""
        if self.master is None:
            raise ValueError("this emulation keeps float32 masters; give emulate(..., master=octavo.formats.FLOAT16)")
        chosen = self.model.parameters() if parameters is None else parameters
        round_masters(chosen, self.master, seed=self.seed, step=self.global_step & 0xFFFFFFFF)

    def observe(self, *writers: Writer, every: int = 100, dumps: Dumps | Iterable[Dumps] = ()) -> None:
        """Take statistics of every tensor that is cast, every `every` steps, and write chosen tensors to files.

        writers: of `octavo.diagnose.records`: JsonLines, TensorBoard, Memory.  dumps: of `octavo.diagnose.dumps`.  The casts themselves,
        and so the model's bits, stay as they are.  Of several passes in one step the first is seen.  Not in compiled code.
        """
        found = (dumps,) if isinstance(dumps, Dumps) else tuple(dumps)
        self._observers.append(Observer(every=every, writers=writers, dumps=found))

    def look(self, site: str) -> Look | None:
        """What is to see the tensors of a site in this step."""
        looks = [look for seer in self._observers if (look := seer.look(self.global_step, site)) is not None]
        if not looks:
            return None
        return looks[0] if len(looks) == 1 else functools.partial(_in_turn, looks)

    def met(self, site: str, tensor: str, amax: float) -> None:
        """Take note of a tensor that holds Inf or NaN; forward ones are an error where no loss scale could mend it."""
        place = f"{site}.{tensor} holds {'NaN' if math.isnan(amax) else 'Inf'} at step {self.global_step}"
        forward = not tensor.startswith("grad_")
        if self.scaler is None and forward:
            raise ValueError(
                f"{place}; look at the data and the layers before it, lower the learning rate, or exempt the layer"
            )
        if not forward or torch.is_grad_enabled() or context.inside_function():  # evaluation is no part of a step
            self._bad = self._bad or place

    def lets_gradients_be_nan(self) -> bool:
        """Whether a gradient that its format cannot hold may be NaN, for the loss scale to skip the step."""
        return self.scaler is not None

    def state_dict(self) -> dict[str, Any]:
        """The sites' scales, histories and draws, the loss scale and the step: tensors and numbers, for `load_state_dict`."""
        return {
            "global_step": self.global_step,
            "recipe": self.recipe.cast_key,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "sites": {name: dict(site.state_dict()) for name, site in self.sites.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.  Raises ValueError for another recipe, for other keys, and for a loss scale where one has none."""
        keys = {"global_step", "recipe", "scaler", "sites"}
        if set(state) != keys:
            raise ValueError(
                f"an emulation's state has the keys {', '.join(sorted(keys))}; got {', '.join(map(str, state))}"
            )
        if state["recipe"] != self.recipe.cast_key:
            raise ValueError(
                f"the state is of another recipe than {self.recipe.name}; emulate with that one, then load"
            )
        if (state["scaler"] is None) != (self.scaler is None):
            which = "without" if state["scaler"] is None else "with"
            raise ValueError(f"the state is of a run {which} a loss scale; give emulate the same loss_scale, then load")
        if emulation_of(self.model) is not self:
            raise ValueError("the model is emulated no more since remove(); emulate it again, then load")
        for name, entries in state["sites"].items():
            if name not in self.sites:
                self._add_site(name)
            self.sites[name].load_state_dict(entries)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.global_step = state["global_step"]

    def _add_site(self, name: str) -> None:
        """Make a site that this process has not met.  Raises ValueError where no emulated module can have it."""
        parent, _, word = name.rpartition(".")
        # A site is a module, or a function or a recurrent layer's weight within one.
        inside = word.endswith("()") or word.startswith("weight_")
        places = {path: module.__dict__.get("forward") for path, module in self.model.named_modules()}
        entered = places.get("" if name == "model" else parent if inside else name)
        if not isinstance(entered, _Entered) or entered.place.recipe is None:
            raise ValueError(f"the state has {name!r}, which is in no emulated module; load it into the same model")
        self.sites[name] = Site(name, entered.place.recipe, self._device(), self)

    def _device(self) -> torch.device:
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def _agree(self) -> None:
        """Have every rank know the sites of all: they share amaxes in one collective."""
        new = len(self.sites) != self._agreed
        for name in sorted(context.agree(self.sites, anything_new=new, device=self._device())):
            self._add_site(name)
        self._agreed = len(self.sites)

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any, *, inside: bool) -> Any:
        """The outermost forward pass of this emulation; inside: within one of another."""
        mode = contextlib.nullcontext() if inside else Interception()
        if torch.compiler.is_compiling():  # then each site moves its scales by itself
            with mode:
                return forward(*args, **kwargs)
        if torch._C._are_functorch_transforms_active():
            raise ValueError(
                "torch.func's transforms (grad, vmap) do not see how an emulated model is cast; use backward(), or remove() the emulation"
            )
        if not context.in_backward():
            context.settle()
        keep = False
        try:
            with mode:
                result = forward(*args, **kwargs)
            keep = torch.is_grad_enabled() or context.inside_function()
        finally:
            if self.recipe.delayed is not None and not context.in_backward():
                if keep and self.recipe.delayed.reduce:
                    self._agree()
                context.update_forward(self.sites.values(), keep=keep)
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_observers": []}  # a copy is watched by nobody

    def _require_finite(self, parameters: list[Tensor], bad: str | None) -> None:
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        grads = [grad.coalesce().values() if grad.is_sparse else grad for grad in found]
        if grads and not math.isfinite(float(nn.utils.get_total_norm(grads, math.inf))):
            cause = f": {bad}" if bad else ""
            raise ValueError(
                f"step {self.global_step}: gradients hold Inf or NaN{cause}; the step is not taken: scale the loss "
                '(loss_scale="dynamic"), lower the learning rate, or exempt the layer'
            )


def _in_turn(looks: Iterable[Look], *arguments: Any) -> None:
    for look in looks:
        look(*arguments)


class _Entered:
    """A module's forward, of an emulated model.  It keeps the signature of the module's own."""

    def __init__(self, module: nn.Module, place: Place, emulation: Emulation) -> None:
        self.module, self.place, self.emulation = module, place, emulation
        self.own = module.__dict__.get("forward")
        self.__wrapped__ = module.forward

    def restore(self) -> None:
        """Give the module its own forward back."""
        del self.module.__dict__["forward"]
        if self.own is not None:
            self.module.forward = self.own  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outer = now.place
        now.place = self.place
        self.place.start()
        try:
            if outer is not None and outer.owner is self.emulation:
                return self.__wrapped__(*args, **kwargs)
            return self.emulation.run(self.__wrapped__, args, kwargs, inside=outer is not None)
        finally:
            now.place = outer


def _check_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module.__dict__.get("forward"), _Entered):
            raise ValueError(
                f"{name or 'the model'} is emulated already; call octavo.torch.emulation_of(model).remove() first"
            )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"emulated parameters are real floating-point tensors; {name} is {parameter.dtype}: keep it as a buffer, or emulate "
                "the submodules without it"
            )
