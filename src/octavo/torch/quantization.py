"""Post-training quantisation: a trained model becomes one for inference whose weights are codes and whose scales are fixed by data.

quantized = quantize_model(model, ptq_recipe("e4m3"), batches, exempt=["conv1", "fc"])
save_quantized("model.safetensors", quantized)
"""

from __future__ import annotations

import copy
import fnmatch
import itertools
import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from octavo import checkpoint
from octavo.checkpoint import CheckpointError
from octavo.formats import E3M4FN, E4M3FN, E5M2, Format
from octavo.names import nearest
from octavo.rounding import Rounding
from octavo.scaling import Current, Row
from octavo.table import Accumulator, Gemm, Recipe, TensorSpec, spec_from, spell_spec
from octavo.torch import context
from octavo.torch.calibration import Calibration, calibrate_layers, check_clipping
from octavo.torch.folding import NORMS, find_pairs, fold_pairs
from octavo.torch.quantized import QuantizedLayer, as_rows, is_quantizable, is_transposed, quantized, replace_modules

__all__ = ["load_quantized", "ptq_recipe", "quantize_model", "save_quantized"]

_FORMATS: Mapping[str, tuple[Format, Format]] = MappingProxyType(
    {
        "e4m3": (E4M3FN, E4M3FN),
        "e3m4": (E3M4FN, E3M4FN),
        "e5m2": (E5M2, E5M2),
        "hybrid": (E4M3FN, E3M4FN),
    }
)
"""Of input and weight."""
_KIND = "quantized model"
_CELLS = ("left", "right", "result")
_LISTED = 6


def ptq_recipe(format_name: str, *, per_channel: bool = True) -> Recipe:
    """A recipe for `quantize_model`: one fixed scale for each input, one for each output channel of a weight.

    format_name: "e4m3", "e3m4" (finite but for NaN, largest value 30) or "e5m2" for both; "hybrid" casts inputs to E4M3, which has
    the range that outliers among activations want, and weights to E3M4, which has the precision that is enough for their even
    spread.  per_channel: False gives a weight one scale.  Only the GEMM `output` casts.
    Raises ValueError, with the nearest name, for another.
    Source: Shen et al., arXiv 2309.14592 (its mixed formats are "hybrid" here, as in Intel's FP8 emulation toolkit); the paper casts
    to E5M2 unscaled.
    """
    if format_name not in _FORMATS:
        raise ValueError(
            f"a recipe for quantisation is one of {', '.join(_FORMATS)}; got {format_name!r}{nearest(str(format_name), _FORMATS)}"
        )
    input, weight = _FORMATS[format_name]
    by_weight = Row() if per_channel else Current()
    output = Gemm(left=TensorSpec(input, Current()), right=TensorSpec(weight, by_weight))
    return Recipe(name=f"ptq_{format_name}", output=output)


def quantize_model(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[Any],
    *,
    exempt: Iterable[str] = (),
    calibration: Calibration = Calibration.MAX,
    percentile: float = 99.99,
    fold: bool = True,
) -> nn.Module:
    """A copy of `model` for inference, in eval mode, whose linear layers and convolutions hold codes; the model stays as it is.

    recipe: its row `output` says how input, weight and output of each layer are cast; None cells stay in high precision.  Where
    scaling is Current or Delayed, inputs and outputs get one scale, fixed by the batches, and weights one by their amax; elsewhere
    scales follow from each tensor as it comes.  batches: inputs of the model; of a tuple or list, such as a DataLoader's (inputs,
    targets), the first element; a dict is passed by keyword.  They run once, in high precision.  exempt: qualified names, or
    patterns with *, ? and [], of layers to leave alone.  calibration, percentile: how data fixes a scale.  fold: batch norms that
    follow a layer are folded into it first (`octavo.torch.folding`).

    Linear layers and Conv1d, 2d, 3d and their transposes are quantised, torch's and Octavo's own; other subclasses and the
    projections inside `nn.MultiheadAttention` are not.  Parameters of the copy need no gradient, and its quantised layers give none.
    Raises ValueError for a model without such a layer, an exempt name that fits none, a weight that is computed (parametrised, or by
    a hook), no batch, a layer without data for its scale, NaN, Inf, integers or complex numbers in a layer's input (its output too
    where that is cast), NaN or Inf in a weight, and a row that rounds stochastically or whose accumulator is not FLOAT32.
    """
    row = _row_of(recipe)
    check_clipping({"input": row.left, "output": row.result}, calibration, percentile)
    spared = _spared(model, exempt)
    stream = iter(batches)
    first = list(itertools.islice(stream, 1))
    if not first:
        raise ValueError("calibration needs at least one batch; got none")
    pairs = find_pairs(model, first[0], spared) if fold else ()
    new = _prepared(model)
    fold_pairs(new, pairs)
    norms = dict(pairs)
    layers = {}
    for name, layer in new.named_modules():
        if is_quantizable(layer) and name not in spared:
            _check_weight(name, layer)
            layers[name] = (layer, quantized(layer, row, norms.get(name)))
    calibrate_layers(new, layers, itertools.chain(first, stream), calibration, percentile)
    return replace_modules(new, dict(layers.values()))


def _row_of(recipe: Recipe) -> Gemm:
    """The row `output` of a recipe that can be meant for inference."""
    if recipe is None:
        raise ValueError("quantisation needs a recipe; got None: write ptq_recipe('e4m3'), say")
    context.check_recipe(recipe)
    row = recipe.output
    for name, cell in zip(("input", "weight", "output"), _CELLS, strict=True):
        spec: TensorSpec | None = getattr(row, cell)
        if spec is not None and spec.rounding is Rounding.STOCHASTIC:
            raise ValueError(
                f"{recipe.name}: a quantised model gives one answer, and {name} is rounded stochastically; write "
                "rounding=Rounding.NEAREST_EVEN"
            )
    if row.accumulator is not Accumulator.FLOAT32:
        raise ValueError(
            f"{recipe.name}: a quantised model adds in float32, and the accumulator of output is {row.accumulator.value}; write "
            "accumulator=Accumulator.FLOAT32"
        )
    return row


def _spared(model: nn.Module, exempt: Iterable[str]) -> set[str]:
    """All names of the layers that the patterns fit.  Raises ValueError where there is no layer, and for a pattern that fits none."""
    layers = {name: module for name, module in model.named_modules(remove_duplicate=False) if is_quantizable(module)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no linear layer and no convolution to quantise; give another model"
        )
    fitting: set[nn.Module] = set()
    for pattern in [exempt] if isinstance(exempt, str) else exempt:
        names = fnmatch.filter(layers, pattern)
        if not names:
            raise ValueError(
                f"exempt {pattern!r} fits no linear layer and no convolution of the model{nearest(pattern, layers)}"
            )
        fitting.update(layers[name] for name in names)
    spared = {name for name, module in layers.items() if module in fitting}
    for name, layer in layers.items():
        if name not in spared and layer._parameters.get("weight") is None:
            raise ValueError(
                f"{name or 'the model'} computes its weight (a parametrisation or a hook of weight norm, spectral norm or pruning); "
                "make it a plain parameter first (remove_parametrizations, remove_weight_norm, prune.remove), or exempt it"
            )
    return spared


def _check_weight(name: str, layer: nn.Module) -> None:
    weight = layer._parameters["weight"]
    if weight is not None and not bool(weight.isfinite().all()):
        raise ValueError(f"{name or 'the model'}.weight holds NaN or Inf; train it anew, or exempt it")


def _prepared(model: nn.Module) -> nn.Module:
    """A copy for inference, whose transformer layers call their linear layers, as torch's fused inference path does not."""
    new = copy.deepcopy(model).eval().requires_grad_(False)
    for module in new.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return new


def save_quantized(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Write what `quantize_model` made to `path`, a safetensors file: at every moment the old file or the new one, nothing pickled.

    Raises ValueError where the model has no quantised layer, holds state that is no tensor, or the folder cannot be written.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantised layer to save; quantize_model makes them")
    header: dict[str, Any] = {}
    for name, layer in layers.items():
        cells = {cell: getattr(layer.row, cell) for cell in _CELLS}
        spelled = {cell: None if spec is None else spell_spec(spec) for cell, spec in cells.items()}
        header[name] = {**spelled, "norm": layer.norm}
    tensors = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"a file holds tensors; {name} is {type(value).__name__}: keep it out of the state dict")
        tensors[name] = value.detach().cpu().contiguous().clone()
    checkpoint.save(path, tensors, header={"kind": _KIND, "layers": header}, framework="torch")


def load_quantized(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """The quantised model that `save_quantized` wrote, with the same outputs bit for bit; `model`, freshly built, stays as it is.

    model: built as the one that was quantised, in high precision; of its values nothing remains.
    Raises ValueError where the file cannot be read, is no quantised model's, or is another model's, listing the tensors that differ.
    """
    tensors, header = checkpoint.load(path, framework="torch")
    if header.get("kind") != _KIND:
        raise CheckpointError(f"{path}: holds no quantised model; give a file that save_quantized wrote")
    try:
        new, differing = _placed(_prepared(model), header["layers"])
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: at odds with its own header ({error}); write it again") from None
    expected = {name: _described(value) for name, value in new.state_dict().items()}
    found = {name: _described(value) for name, value in tensors.items()}
    differing += [
        f"{name} ({found.get(name, 'none')} in the file, {expected.get(name, 'none')} in the model)"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    ]
    if differing:
        more = f" and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
        raise CheckpointError(
            f"{path}: of another model than {type(model).__name__}: {', '.join(differing[:_LISTED])}{more}; build the model that was saved"
        )
    new.load_state_dict(tensors)
    return new


def _placed(model: nn.Module, header: Mapping[str, Mapping[str, Any]]) -> tuple[nn.Module, list[str]]:
    """The model with quantised layers, still without values, where the header names layers that it has, and what it lacks besides."""
    modules = dict(model.named_modules())
    new: dict[nn.Module, nn.Module] = {}
    lacking = []
    for name, entry in header.items():
        layer: Any = modules.get(name)
        if layer is None or not is_quantizable(layer):
            continue  # its tensors will be missed
        norm = entry["norm"]
        if norm is not None and type(modules.get(norm)) not in NORMS:
            there = type(modules[norm]).__name__ if norm in modules else "none"
            lacking.append(f"{norm} (a batch norm in the file, {there} in the model)")
        elif norm is not None:
            new[modules[norm]] = nn.Identity().eval()
            if layer.bias is None:
                out = as_rows(layer.weight, getattr(layer, "groups", 1), is_transposed(layer)).shape[0]
                layer.bias = nn.Parameter(layer.weight.new_zeros(out))
        with torch.no_grad():
            layer.weight.zero_()
        left, right, result = (None if entry[cell] is None else spec_from(entry[cell]) for cell in _CELLS)
        new[layer] = quantized(layer, Gemm(left=left, right=right, result=result), norm)
    return replace_modules(model, new), lacking


def _described(value: Any) -> str:
    """What has to agree for a tensor to be loaded."""
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}" if isinstance(value, Tensor) else "state"
