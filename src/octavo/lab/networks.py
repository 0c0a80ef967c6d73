"""The networks that a configuration names, in PyTorch: any stack of linear layers, beside the lab's three and a transformer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, assert_never

import numpy as np
import numpy.typing as npt

from octavo.lab.models import ModelName, build, exempt, generator, initial_weights
from octavo.lab.sections import Activation, Model, ModelKind

if TYPE_CHECKING:
    import torch

__all__ = ["PIXELS", "exempt_layers", "layers", "start", "torch_network", "transformer_sizes"]

PIXELS, CLASSES = 784, 10


def layers(model: Model) -> tuple[tuple[str, int, int], ...]:
    """(name, in_features, out_features) of an FC-MNIST's linear layers: fc1, fc2 ..."""
    widths = (PIXELS, *model.sizes, CLASSES)
    return tuple((f"fc{i}", fan_in, fan_out) for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths), 1))


def start(model: Model, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """The parameters before the first update, float32, by PyTorch's names and in its layouts; the same in every framework.

    An FC-MNIST's weights are uniform in +-sqrt(6 / fan_in), from Philox keyed by (seed, place), and its biases 0 (He et al., arXiv
    1502.01852): with PyTorch's own narrower draw, ten layers of 50 do not begin to learn in a thousand updates.
    """
    match model.name:
        case ModelKind.CNN:
            return initial_weights(ModelName.CNN, seed)
        case ModelKind.MLP:
            return initial_weights(ModelName.MLP, seed)
        case ModelKind.TRANSFORMER:
            raise ValueError(
                "model.name: transformer is for octavo validate and octavo compile, as the lab's data are images; name another to train"
            )
        case ModelKind.FC_MNIST:
            weights: dict[str, npt.NDArray[np.float32]] = {}
            for place, (name, fan_in, fan_out) in enumerate(layers(model)):
                bound, draws = math.sqrt(6 / fan_in), generator(seed, place)
                weights[f"{name}.weight"] = draws.uniform(-bound, bound, (fan_out, fan_in)).astype(np.float32)
                if model.use_bias:
                    weights[f"{name}.bias"] = np.zeros(fan_out, np.float32)
            return weights
        case _:
            assert_never(model.name)


def exempt_layers(model: Model, chosen: Sequence[str] | None) -> tuple[str, ...]:
    """The layers that stay in high precision under a recipe: those that the file chose, else the model's own."""
    if chosen is not None:
        return tuple(chosen)
    return exempt(ModelName.CNN) if model.name is ModelKind.CNN else ()


def torch_network(model: Model, seed: int, *, device: str = "cpu") -> torch.nn.Module:
    """The network in training mode with its first weights; on the device "meta" it has shapes alone.

    It maps images, float [N, 1, 28, 28], to log-probabilities (logits under disable_softmax), float [N, 10]; a transformer maps int64
    tokens [N, length] to logits [N, length, vocab_size].
    """
    import torch

    if model.name is ModelKind.TRANSFORMER:
        from octavo.lab.transformer import Transformer

        with torch.device("meta" if device == "meta" else "cpu"):
            return Transformer(**transformer_sizes(model))
    if model.name is ModelKind.FC_MNIST:
        with torch.device("meta"):
            network = _stack()(model)
        if device == "meta":
            return network
        weights = {name: torch.from_numpy(value) for name, value in start(model, seed).items()}
        network.load_state_dict(weights, assign=True)
    else:
        network = build(ModelName(model.name.value), seed=seed)
    return network.to(device)


def transformer_sizes(model: Model) -> dict[str, Any]:
    """A transformer's sizes, those that the file leaves out by custom."""
    return {
        "vocab_size": model.vocab_size or 32_000,
        "hidden_size": model.hidden_size,
        "depth": model.depth,
        "num_heads": model.num_heads or max(1, model.hidden_size // 64),
        "filter_size": model.filter_size or 4 * model.hidden_size,
        "max_length": model.max_length or 2048,
    }


@cache
def _stack() -> type[torch.nn.Module]:
    """The class, made on first use so that importing this module does not import PyTorch."""
    from torch import Tensor, nn
    from torch.nn import functional as F

    functions: dict[Activation, Callable[[Tensor], Tensor]] = {
        Activation.RELU: F.relu,
        Activation.GELU: F.gelu,
        Activation.SILU: F.silu,
        Activation.TANH: F.tanh,
        Activation.SIGMOID: F.sigmoid,
        Activation.ELU: F.elu,
    }

    class Stack(nn.Module):
        def __init__(self, model: Model) -> None:
            super().__init__()
            self.activation, self.dropout = functions[model.activation_fn], model.dropout
            self.logits = model.disable_softmax
            for name, fan_in, fan_out in layers(model):
                self.add_module(name, nn.Linear(fan_in, fan_out, bias=model.use_bias))

        def forward(self, images: Tensor) -> Tensor:
            x = images.flatten(1)
            *hidden, last = self.children()
            for layer in hidden:
                x = self.activation(layer(x))
                if self.dropout:
                    x = F.dropout(x, self.dropout, self.training)
            x = last(x).float()
            return x if self.logits else F.log_softmax(x, dim=1)

    return Stack
