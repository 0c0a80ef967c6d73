"""Batch norms folded into the layers before them, for inference: torch.fx finds the pairs, torch's own fusion does the arithmetic."""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from octavo.torch.calibration import run_batch
from octavo.torch.quantized import (
    QuantizedLayer,
    as_rows,
    check_input,
    from_rows,
    is_quantizable,
    is_transposed,
    replace_modules,
)

__all__ = ["NORMS", "Pair", "find_pairs", "fold_batch_norms", "fold_pairs"]

Pair: TypeAlias = tuple[str, str]
"""The names of a layer and of the batch norm that alone takes its output."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""The batch norms that can be folded; not their subclasses."""


def fold_batch_norms(model: nn.Module, batch: Any) -> nn.Module:
    """A copy of the model in eval mode, each batch norm that follows a linear layer or convolution folded into it.

    In the place of the norm is an `nn.Identity`.  batch: an input of the model, as of `quantize_model`; it runs once, to see how many
    axes the norms' inputs have.  A pair stays as it is where the layer's output goes elsewhere too, where one of the two runs twice
    or has hooks, where the norm keeps no running statistics, or where it does not normalise the layer's output channels.
    A model that branches on plain arguments is folded as this batch takes it.  One that torch.fx cannot trace is copied unfolded,
    and a UserWarning says why.  Source: Jacob et al., arXiv 1712.05877, section 3.2.
    """
    pairs = find_pairs(model, batch)
    folded = copy.deepcopy(model).eval()
    fold_pairs(folded, pairs)
    return folded


def find_pairs(model: nn.Module, batch: Any, spared: Container[str] = ()) -> tuple[Pair, ...]:
    """The pairs that can be folded, in the order in which they run; spared: names of layers to leave alone.

    The model stays as it is.  Raises ValueError where a layer is given integers or complex numbers.
    """
    if not any(type(module) in NORMS for module in model.modules()):
        return ()
    probe = copy.deepcopy(model).eval()
    with torch.no_grad(), _watched_axes(probe) as axes:
        run_batch(probe, batch)
    try:
        graph = _Tracer().trace(probe, _settled(probe, batch))
    except Exception as error:  # whatever the model's own code raises on a symbolic input
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"{type(model).__name__} cannot be traced by torch.fx ({reason}), so its batch norms stay unfolded; fold=False says so",
            stacklevel=3,
        )
        return ()
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    found = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        pair = str(before.target), str(node.target)
        alone = all(calls[name] == 1 and name not in read for name in pair)
        if alone and pair[0] not in spared and _folds(probe, pair, axes):
            found.append(pair)
    return tuple(found)


def fold_pairs(model: nn.Module, pairs: Iterable[Pair]) -> None:
    """Fold each pair of the model, in place."""
    for layer_name, norm_name in pairs:
        layer: Any = model.get_submodule(layer_name)
        norm: Any = model.get_submodule(norm_name)
        groups, transposed = getattr(layer, "groups", 1), is_transposed(layer)
        with torch.no_grad():
            rows, bias = fuse_conv_bn_weights(
                as_rows(layer.weight, groups, transposed),
                layer.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
            learned = layer.weight.requires_grad
            weight = from_rows(rows, layer.weight.shape, groups, transposed).contiguous()
            layer.weight, layer.bias = nn.Parameter(weight, learned), nn.Parameter(bias.detach(), learned)
        replace_modules(model, {norm: nn.Identity().train(norm.training)})


class _Tracer(fx.Tracer):
    """Traces a model down to the layers and norms that matter here."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, QuantizedLayer) or is_quantizable(m)
        return ours or super().is_leaf_module(m, module_qualified_name)


def _settled(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The model's arguments that are plain values, by name: the batch's, else their defaults.  A trace may branch on them."""
    arguments = inspect.signature(model.forward).parameters
    values = {name: argument.default for name, argument in arguments.items()}
    given = batch if isinstance(batch, dict) else dict.fromkeys(itertools.islice(arguments, 1), batch)
    return {
        name: value
        for name, value in {**values, **given}.items()
        if value is None or isinstance(value, (bool, int, float, str))
    }


@contextmanager
def _watched_axes(model: nn.Module) -> Iterator[dict[str, set[int]]]:
    """How many axes the outputs of each linear layer and convolution have, by its name, of what runs inside the block."""
    axes: dict[str, set[int]] = {}
    handles = []
    for name, module in model.named_modules():
        if not is_quantizable(module):
            continue
        seen = axes.setdefault(name, set())

        def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], place: str = name) -> None:
            check_input(f"{place}.input", inputs[0] if inputs else named.get("input"))

        def after(_: nn.Module, inputs: Any, output: Tensor, seen: set[int] = seen) -> None:
            seen.add(output.dim())

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield axes
    finally:
        for handle in handles:
            handle.remove()


def _folds(model: nn.Module, pair: Pair, axes: dict[str, set[int]]) -> bool:
    """Whether the norm normalises the layer's output channels by statistics that it keeps, and nobody looks between them."""
    layer: Any = model.get_submodule(pair[0])
    norm: Any = model.get_submodule(pair[1])
    if not is_quantizable(layer) or type(norm) not in NORMS or norm.running_mean is None:
        return False
    if layer._parameters.get("weight") is None or _has_hooks(layer) or _has_hooks(norm):
        return False
    linear = isinstance(layer, nn.Linear)
    channels = layer.out_features if linear else layer.out_channels
    # A norm takes axis 1 for the channels, which after a linear layer they are in matrices alone.
    wanted = 2 if linear else len(layer.kernel_size) + 2
    return axes[pair[0]] == {wanted} and norm.num_features == channels


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
