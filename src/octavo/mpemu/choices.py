"""What the toolkit's words mean here: its methods and precisions as recipes and formats, and which modules run in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import nn

from octavo.formats import E3M4FN, E4M3FN, E5M2, FLOAT16, Format
from octavo.names import nearest
from octavo.patterns import Patterns, chosen
from octavo.recipes import Recipe, TensorSpec, direct, hybrid
from octavo.scaling import Row, Unscaled
from octavo.torch.choosing import output_uncast
from octavo.torch.loss_scaling import LossScaler

__all__ = [
    "DTYPES",
    "EMBEDDINGS",
    "MASTERS",
    "METHODS",
    "Selection",
    "checked_model",
    "checked_scale",
    "embedding_recipe",
    "named",
    "refuse",
    "scaled_hybrid",
    "select",
    "steps_of",
]

T = TypeVar("T")


def named(what: str, word: object, choices: Mapping[str, T]) -> T:
    """The choice of that name, in upper or lower case.  Raises ValueError, with the nearest name, where there is none."""
    key = word.lower() if isinstance(word, str) else ""
    if key not in choices:
        raise ValueError(f"{what} is one of {', '.join(choices)}; got {word!r}{nearest(key, choices)}")
    return choices[key]


def scaled_hybrid() -> Recipe:
    """The toolkit's hybrid: input, weight and output in E4M3 by their own amax, gradients in unscaled E5M2, rounded stochastically.

    `octavo.recipes.hybrid` is the paper's (arXiv 2209.05433), which casts what enters a GEMM and no result.
    """
    operands = hybrid()
    forward, gradient = operands.output.left, operands.grad_input.left
    return Recipe.from_tensors(
        "scaled_hybrid",
        input=forward,
        weight=forward,
        grad_output=gradient,
        output=forward,
        grad_input=gradient,
        grad_weight=gradient,
    )


METHODS: Mapping[str, tuple[Callable[[], Recipe], str]] = MappingProxyType(
    {"direct": (direct, "e5m2"), "hybrid": (scaled_hybrid, "hybrid")}
)
"""The training methods, each with the precision of inference after it."""
DTYPES: Mapping[str, str] = MappingProxyType({name: name for name in ("e5m2", "e4m3", "e3m4", "hybrid")})
"""Precisions of inference."""
MASTERS: Mapping[str, Format | None] = MappingProxyType({"fp32": None, "fp16": FLOAT16, "e5m2": E5M2, "bf8": E5M2})
"""Precisions of master weights; None rounds nothing."""
EMBEDDINGS: Mapping[str, Format | None] = MappingProxyType(
    {"fp32": None, "e5m2": E5M2, "bf8": E5M2, "e4m3": E4M3FN, "hf8": E4M3FN, "e3m4": E3M4FN, "hf8_2": E3M4FN}
)
"""Precisions of embeddings; None casts nothing."""


def refuse(**given: str) -> None:
    """Raise ValueError for what Octavo does not do."""
    for what, word in given.items():
        if str(word).lower() != "none":
            raise ValueError(f'{what} is "none": Octavo emulates numbers, not kernels or sparsity; got {word!r}')


def checked_scale(loss_scale: LossScaler | float | str | None) -> LossScaler | float | str | None:
    """The loss scale.  Raises ValueError for words other than "dynamic"."""
    return named("loss_scale", loss_scale, {"dynamic": "dynamic"}) if isinstance(loss_scale, str) else loss_scale


def checked_model(model: nn.Module, device: str | torch.device | None) -> nn.Module:
    """The model.  Raises ValueError where it is none, and where it is not on the device, if one is given."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"a model is a torch.nn.Module; got {type(model).__name__}: make it first")
    if device is None:
        return model
    wanted = named("device", str(device).partition(":")[0], {"cpu": "cpu", "cuda": "cuda"})
    there = next((parameter.device.type for parameter in model.parameters()), wanted)
    if wanted != there:
        raise ValueError(f"device is where the model is, {there}; got {device}: move it first (model.to({wanted!r}))")
    return model


def steps_of(schedule: Iterable[int | Sequence[int]]) -> set[int]:
    """The steps of a schedule: of steps, ranges, and pairs (first, stop) of ranges."""
    steps: set[int] = set()
    for entry in schedule:
        if isinstance(entry, range):
            steps.update(entry)
        elif isinstance(entry, int):
            steps.add(entry)
        elif isinstance(entry, (tuple, list)) and len(entry) == 2:
            steps.update(range(*entry))
        else:
            raise ValueError(f"a schedule has steps, ranges and pairs (first, stop); got {entry!r}: write [{entry!r}]")
    return steps


def embedding_recipe(format: Format | None, *, by_rows: bool) -> Recipe | None:
    """What an embedding gives out, in `format`, rounded to nearest even; by_rows: each vector by its own amax, else unscaled."""
    if format is None:
        return None
    return Recipe.from_tensors("embedding", output=TensorSpec(format, Row() if by_rows else Unscaled()))


_UNHOOKED = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.RMSNorm)
"""Norms that the toolkit leaves alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which modules of a model run in 8 bits, by qualified name: all that emulation covers, but for what follows."""

    exempt: frozenset[str]
    """In high precision, with all inside them."""
    fused: frozenset[str]
    """Their output and grad_output are not cast."""
    rules: tuple[tuple[frozenset[str], bool], ...]
    """Modules to leave alone (False) or not (True), with all inside them: the innermost counts, of two for one module the later."""
    embedding: Recipe | None = None
    """Of embeddings."""

    def ruled(
        self, kinds: Iterable[type[nn.Module] | str], modules: Mapping[str, nn.Module], *, runs: bool
    ) -> Selection:
        """The same with one more rule, for modules of those types."""
        what = "whitelist_modules" if runs else "blacklist_modules"
        return replace(self, rules=(*self.rules, (_of_kinds(modules, kinds, what), runs)))

    def chooser(self, recipe: Recipe) -> Callable[[str, nn.Module], Recipe | None]:
        """What `octavo.torch.emulate.install` asks of each module."""
        without = output_uncast(recipe)

        def choose(name: str, module: nn.Module) -> Recipe | None:
            if not self.runs(name):
                return None
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                return self.embedding
            return without if name in self.fused else recipe

        return choose

    def runs(self, name: str) -> bool:
        """Whether that module runs in 8 bits."""
        around = _outwards(name)
        if any(place in self.exempt for place in around):
            return False
        verdicts = (verdict for place in around for names, verdict in reversed(self.rules) if place in names)
        return next(verdicts, True)


def select(modules: Mapping[str, nn.Module], exempt: Patterns | None, fused: Patterns | None) -> Selection:
    """The selection that two of the toolkit's lists make.  Raises ValueError for entries that fit no module."""
    norms = frozenset(name for name, module in modules.items() if isinstance(module, _UNHOOKED))
    return Selection(
        exempt=_fitting(modules, exempt or (), "list_exempt_layers"),
        fused=_fitting(modules, fused or (), "list_layers_output_fused"),
        rules=((norms, False),),
    )


def _outwards(name: str) -> list[str]:
    """A module's name, its parent's and so on, the model's "" at last."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _fitting(modules: Mapping[str, nn.Module], patterns: Patterns, what: str) -> frozenset[str]:
    """The names that patterns fit: qualified names, with *, ? and [] as in file names, and types."""
    return frozenset(chosen(modules, _listed(patterns, what), what, inside=False))


def _of_kinds(modules: Mapping[str, nn.Module], kinds: Iterable[type[nn.Module] | str], what: str) -> frozenset[str]:
    """The names of modules of those types, which may be given by name, and of their subclasses."""
    found: set[str] = set()
    for kind in _listed(kinds, what):
        name = kind if isinstance(kind, str) else getattr(kind, "__name__", repr(kind))
        if isinstance(kind, str):
            fitting = {place for place, module in modules.items() if kind in _type_names(module)}
        elif isinstance(kind, type):
            fitting = {place for place, module in modules.items() if isinstance(module, kind)}
        else:
            raise ValueError(f"{what} takes types of modules and their names; got {kind!r}: write type({name})")
        if not fitting:
            there = sorted({type(module).__name__ for module in modules.values()})
            raise ValueError(f"{what}: {name} is the type of no module of the model{nearest(name, there)}")
        found |= fitting
    return frozenset(found)


def _type_names(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}


def _listed(entries: Iterable[T], what: str) -> Iterable[T]:
    """The entries.  Raises ValueError for one that stands alone."""
    if isinstance(entries, (str, type)):
        raise ValueError(f"{what} takes a list; got {entries!r}: write [{entries!r}]")
    return entries
