"""The lab's three networks in PyTorch, and the initial weights that every framework starts from."""

import enum
import math
from functools import cache
from typing import TYPE_CHECKING, Final, assert_never

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

# A layer and the shape of its weight in PyTorch's layout: [out_features, in_features], or [out, in, height, width].
_Layers = tuple[tuple[str, tuple[int, ...]], ...]

_CNN: Final[_Layers] = (
    ("conv1", (32, 1, 3, 3)),
    ("conv2", (64, 32, 3, 3)),
    ("fc1", (128, 9216)),
    ("fc2", (16, 128)),
    ("fc3", (10, 16)),
)
_MLP: Final[_Layers] = (("fc1", (256, 784)), ("fc2", (10, 256)))
_FC: Final[_Layers] = (("fc1", (500, 784)), ("fc2", (300, 500)), ("fc3", (10, 300)))


class ModelName(enum.Enum):
    """A network of the lab. Each maps images, float [N, 1, 28, 28], to log-probabilities, float [N, 10]."""

    CNN = "cnn"
    """Two convolutions and three linear layers, with dropout: the network of Transformer Engine's MNIST example."""
    MLP = "mlp"
    """784-256-10 with ReLU: the network of VibeTensor's MNIST example."""
    FC = "fc"
    """784-500-300-10 with ReLU: the network of Cerebras's FC-MNIST."""


def initial_weights(name: ModelName, seed: int) -> dict[str, NDArray[np.float32]]:
    """The starting parameters, float32, by PyTorch's names and in its layouts; needs NumPy alone.

    They stand layer by layer in the order of the forward pass, weight before bias, and the i-th (from 0) is drawn
    from Philox keyed by (seed, i): a parameter does not depend on the others.
    CNN and FC: weight and bias uniform in +-1/sqrt(fan_in), PyTorch's default for convolutions and linear layers.
    MLP: weight normal with variance 2/(fan_in + fan_out) (Glorot and Bengio 2010), bias zero.

    Raises `ValueError` when `seed` is not in [0, 2**64).
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be at least 0 and below 2**64, got {seed}; pass such a number")
    weights: dict[str, NDArray[np.float32]] = {}
    for layer, shape in _layers(name):
        weight, bias = (generator(seed, len(weights) + i) for i in (0, 1))
        fan_in, fan_out = math.prod(shape[1:]), shape[0]
        if name is ModelName.MLP:
            deviation = math.sqrt(2 / (fan_in + fan_out))
            values = weight.normal(0.0, deviation, shape), np.zeros(fan_out)
        else:
            bound = 1 / math.sqrt(fan_in)
            values = weight.uniform(-bound, bound, shape), bias.uniform(-bound, bound, fan_out)
        weights[f"{layer}.weight"], weights[f"{layer}.bias"] = (value.astype(np.float32) for value in values)
    return weights


def generator(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


def _layers(name: ModelName) -> _Layers:
    match name:
        case ModelName.CNN:
            return _CNN
        case ModelName.MLP:
            return _MLP
        case ModelName.FC:
            return _FC
        case _:
            assert_never(name)


def exempt(name: ModelName) -> tuple[str, ...]:
    """The linear layers that stay in high precision under FP8: the CNN's last, as in Transformer Engine's example."""
    match name:
        case ModelName.CNN:
            return ("fc3",)
        case ModelName.MLP | ModelName.FC:
            return ()
        case _:
            assert_never(name)


def build(name: ModelName, *, seed: int) -> "torch.nn.Module":
    """The network in PyTorch, float32 on the CPU and in training mode, with `initial_weights(name, seed)`.

    PyTorch's own random state is neither used nor moved; dropout (CNN) draws from it later.

    Raises `ValueError` when `seed` is not in [0, 2**64).
    """
    import torch

    weights = {key: torch.from_numpy(value) for key, value in initial_weights(name, seed).items()}
    cnn, feed_forward = _networks()
    # On the meta device the layers draw no numbers that would be thrown away.
    with torch.device("meta"):
        model = cnn() if name is ModelName.CNN else feed_forward(_layers(name))
    model.load_state_dict(weights, assign=True)
    return model


@cache
def _networks() -> tuple["type[torch.nn.Module]", "type[torch.nn.Module]"]:
    """The two classes, made on first use so that importing this module does not import PyTorch."""
    from torch import Tensor, nn
    from torch.nn import functional as F

    class CNN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(1, 32, 3)
            self.conv2 = nn.Conv2d(32, 64, 3)
            self.dropout1 = nn.Dropout(0.25)
            self.dropout2 = nn.Dropout(0.5)
            self.fc1 = nn.Linear(9216, 128)
            self.fc2 = nn.Linear(128, 16)
            self.fc3 = nn.Linear(16, 10)

        def forward(self, images: Tensor) -> Tensor:
            x = F.relu(self.conv1(images))
            x = F.relu(self.conv2(x))
            x = self.dropout1(F.max_pool2d(x, 2)).flatten(1)
            x = self.dropout2(F.relu(self.fc1(x)))
            return F.log_softmax(self.fc3(self.fc2(x)), dim=1)

    class FeedForward(nn.Module):
        def __init__(self, layers: _Layers) -> None:
            super().__init__()
            for layer, (fan_out, fan_in) in layers:
                self.add_module(layer, nn.Linear(fan_in, fan_out))

        def forward(self, images: Tensor) -> Tensor:
            x = images.flatten(1)
            *hidden, last = self.children()
            for layer in hidden:
                x = F.relu(layer(x))
            return F.log_softmax(last(x), dim=1)

    return CNN, FeedForward
