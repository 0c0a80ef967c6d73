"""Where in an emulated model a forward pass is: the module that is running, its recipe and its sites."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from octavo.recipes import Recipe
from octavo.torch import context
from octavo.torch.bilinear import Product
from octavo.torch.layouts import GRAD_INPUT, GRAD_WEIGHT, OUTPUT
from octavo.torch.site import Owner, Site
from octavo.torch.stores import UNCAST

__all__ = ["Place", "SiteOwner", "now"]


class SiteOwner(Owner, Protocol):
    """Whom the sites of a model belong to."""

    model: nn.Module
    sites: dict[str, Site]


_PRODUCTS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def _checkpoints() -> object:
    """What tells whether a checkpoint began or ended: the innermost hooks on saved tensors, and whether an autograd function runs."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    kept = hooks if hooks is not None and "checkpoint" in getattr(hooks[0], "__module__", "") else None
    return None if kept is None else id(kept[0]), context.inside_function()


class _Now(threading.local):
    place: Place | None = None
    """The innermost emulated module whose forward pass this thread runs."""


now = _Now()


class Place:
    """A module of an emulated model: what its operators run in (None: high precision), and its sites by name."""

    def __init__(self, name: str, module: nn.Module, recipe: Recipe | None, owner: SiteOwner) -> None:
        self.name, self.module, self.recipe, self.owner = name, module, recipe, owner
        self.leaf = next(module.children(), None) is None
        self.stores = recipe is not None and any(
            spec is not None for spec in (recipe.output.result, recipe.grad_input.result, recipe.grad_weight.result)
        )
        self.counts: dict[str, int] = {}
        self.around: object = None

    def start(self) -> None:
        """Begin a pass of the module: its operators are counted anew."""
        self.counts = {}
        if not torch.compiler.is_compiling():
            self.around = _checkpoints()

    def _refuse_checkpoint(self, word: str) -> None:
        """Raise ValueError inside a checkpoint that began within this module: recomputed, its operators would be in no module."""
        if not context.in_backward() and _checkpoints() != self.around:
            raise ValueError(
                f"{self.name or 'the model'} checkpoints a function of its own, which calls {word or 'a product'}: recomputed, it would "
                "run in high precision; checkpoint a module instead, or exempt this one"
            )

    def site(self, word: str, like: Tensor, *, main: bool = False) -> Site:
        """The site of the next operator `word` of this pass.  main: it is what a module without children is there for, and has its name."""
        number = self.counts.get(word, 0) + 1
        self.counts[word] = number
        if main and self.leaf and number == 1:
            return self.named("", like)
        return self.named(f"{word}()" if number == 1 else f"{word}_{number}()", like)

    def named(self, word: str, like: Tensor) -> Site:
        """The site of that word, made where there is none yet."""
        if not torch.compiler.is_compiling():
            self._refuse_checkpoint(word)
        attribute = f"site_{word.removesuffix('()')}" if word.endswith("()") else f"named_{word}"
        _ensure(self, attribute, word, like.device)
        site: Site = getattr(self, attribute)  # torch.compile sees new attributes, but no new entries of a dict
        return site

    def expect(self) -> None:
        """Make the site of a module that is one product, before its first pass: ranks that run different layers then agree on all."""
        weight = getattr(self.module, "weight", None)
        if self.recipe is not None and isinstance(self.module, _PRODUCTS) and isinstance(weight, Tensor):
            _ensure(self, "named_", "", weight.device)

    def linear(self, site: Site, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`Site.linear` in the module's mode."""
        return site.linear(input, weight, bias, self.module.training)

    def product(self, site: Site, kind: Product, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        """`Site.product` in the module's mode."""
        return site.product(kind, left, right, bias, self.module.training)

    def read(self, site: Site, x: Any, lane: int, *, weight: bool = False) -> Any:
        """x, whose gradient the recipe stores; anything that has none is returned as it is."""
        assert self.recipe is not None
        spec = (self.recipe.grad_weight if weight else self.recipe.grad_input).result
        if spec is None or not isinstance(x, Tensor) or not x.requires_grad:
            return x
        cell = GRAD_WEIGHT if weight else GRAD_INPUT
        return site.read(x, self.module.training, cell=cell, lane=lane)

    def write(self, site: Site, y: Tensor, *, fresh: bool = False, both: bool = False) -> Tensor:
        """y as the recipe stores it.  fresh: nobody else has y, nor needs it backward; both: its gradient is stored here, too."""
        assert self.recipe is not None
        cell = UNCAST if self.recipe.output.result is None else OUTPUT
        grad_cell = GRAD_INPUT if both and self.recipe.grad_input.result is not None else UNCAST
        if not y.is_floating_point() or cell == grad_cell == UNCAST:
            return y
        return site.store(y, self.module.training, cell=cell, grad_cell=grad_cell, lane=0, in_place=fresh)


# While torch.compile traces, this runs on the model itself, so that the traced graph meets the site.
@torch.compiler.assume_constant_result
def _ensure(place: Place, attribute: str, word: str, device: torch.device) -> None:
    site: Site | None = place.__dict__.get(attribute)
    if site is None:
        assert place.recipe is not None
        name = ".".join(part for part in (place.name, word) if part) or "model"
        sites = place.owner.sites
        if name not in sites:
            sites[name] = Site(name, place.recipe, device, place.owner)
        site = place.__dict__[attribute] = sites[name]
    if site.draws.device != device:  # the model moved, and its sites are none of its modules
        site.to(device)
