"""The lab's networks: their shapes, their arithmetic against plain torch, and weights that NumPy alone decides."""

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from octavo.lab.models import ModelName, build, exempt, initial_weights

SHAPES = {
    ModelName.CNN: {
        "conv1.weight": (32, 1, 3, 3),
        "conv1.bias": (32,),
        "conv2.weight": (64, 32, 3, 3),
        "conv2.bias": (64,),
        "fc1.weight": (128, 9216),
        "fc1.bias": (128,),
        "fc2.weight": (16, 128),
        "fc2.bias": (16,),
        "fc3.weight": (10, 16),
        "fc3.bias": (10,),
    },
    ModelName.MLP: {"fc1.weight": (256, 784), "fc1.bias": (256,), "fc2.weight": (10, 256), "fc2.bias": (10,)},
    ModelName.FC: {
        "fc1.weight": (500, 784),
        "fc1.bias": (500,),
        "fc2.weight": (300, 500),
        "fc2.bias": (300,),
        "fc3.weight": (10, 300),
        "fc3.bias": (10,),
    },
}
EVERY = pytest.mark.parametrize("name", ModelName)


def oracle(name: ModelName, weights: dict[str, np.ndarray]) -> nn.Sequential:
    """The same network as a flat list of torch's layers, in evaluation mode, with these weights."""
    layers: list[nn.Module]
    match name:
        case ModelName.CNN:
            convolutions = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)]
            linear = [nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 16), nn.Linear(16, 10)]
            layers = [*convolutions, *linear]
        case ModelName.MLP:
            layers = [nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)]
        case ModelName.FC:
            layers = [nn.Flatten(), nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 300), nn.ReLU(), nn.Linear(300, 10)]
    model = nn.Sequential(*layers, nn.LogSoftmax(1)).eval()
    for parameter, value in zip(model.parameters(), weights.values(), strict=True):
        parameter.data = torch.from_numpy(value)
    return model


@EVERY
def test_parameters_are_the_initial_weights(name: ModelName) -> None:
    weights, model = initial_weights(name, 3), build(name, seed=3)
    assert {key: value.shape for key, value in weights.items()} == SHAPES[name]
    assert list(weights) == list(model.state_dict())
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.device.type == "cpu"
        assert weights[key].dtype == np.float32
        assert np.array_equal(parameter.detach().numpy(), weights[key])


@EVERY
def test_forward_equals_torchs_own_layers(name: ModelName) -> None:
    model = build(name, seed=0)
    images = torch.rand(7, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    output = model.eval()(images)
    assert output.shape == (7, 10)
    assert torch.equal(output, oracle(name, initial_weights(name, 0))(images))
    assert torch.allclose(output.exp().sum(1), torch.ones(7))


@EVERY
def test_every_parameter_gets_a_gradient(name: ModelName) -> None:
    model = build(name, seed=0)
    nn.functional.nll_loss(model(torch.rand(4, 1, 28, 28)), torch.arange(4)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_the_cnn_drops_a_quarter_and_then_a_half() -> None:
    model = build(ModelName.CNN, seed=0)
    assert (model.dropout1.p, model.dropout2.p) == (0.25, 0.5)
    assert [key for key, _ in model.named_children()] == ["conv1", "conv2", "dropout1", "dropout2", "fc1", "fc2", "fc3"]
    images = torch.rand(4, 1, 28, 28)
    assert model.training
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@EVERY
def test_seeds_differ_and_repeat(name: ModelName) -> None:
    one, again, other = (initial_weights(name, seed) for seed in (1, 1, 2**64 - 1))
    assert all(np.array_equal(one[key], again[key]) for key in one)
    assert not any(np.array_equal(one[key], other[key]) for key in one if one[key].any())
    first, second = one["fc1.weight"].ravel()[:10], one["fc2.weight"].ravel()[:10]
    assert not np.allclose(first / np.abs(first).max(), second / np.abs(second).max())


@pytest.mark.parametrize("name", [ModelName.CNN, ModelName.FC])
def test_cnn_and_fc_are_uniform_within_torchs_bound(name: ModelName) -> None:
    weights = initial_weights(name, 0)
    for key, value in weights.items():
        bound = 1 / math.sqrt(math.prod(SHAPES[name][f"{key.partition('.')[0]}.weight"][1:]))
        assert np.abs(value).max() <= np.float32(bound)
        if value.size > 1000:
            assert np.abs(value).max() > 0.99 * bound
            assert value.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert abs(value.mean()) < 4 * value.std() / math.sqrt(value.size)


def test_the_mlp_is_xavier_normal_without_bias() -> None:
    weights = initial_weights(ModelName.MLP, 0)
    assert weights["fc1.weight"].std() == pytest.approx(math.sqrt(2 / (784 + 256)), rel=0.01)
    assert weights["fc2.weight"].std() == pytest.approx(math.sqrt(2 / (256 + 10)), rel=0.05)
    inside = np.abs(weights["fc1.weight"]) < weights["fc1.weight"].std()
    assert inside.mean() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.01)
    assert not weights["fc1.bias"].any()
    assert not weights["fc2.bias"].any()


@EVERY
def test_the_ith_parameter_is_drawn_from_philox_keyed_by_seed_and_i(name: ModelName) -> None:
    for i, (key, value) in enumerate(initial_weights(name, 5).items()):
        if not value.any():
            continue
        generator = np.random.Generator(np.random.Philox(key=np.array([5, i], np.uint64)))
        layer = SHAPES[name][f"{key.partition('.')[0]}.weight"]
        fan_in = math.prod(layer[1:])
        if name is ModelName.MLP:
            wanted = generator.normal(0, math.sqrt(2 / (fan_in + layer[0])), value.shape)
        else:
            wanted = generator.uniform(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), value.shape)
        assert np.array_equal(value, wanted.astype(np.float32))


@EVERY
def test_build_leaves_torchs_random_state_alone(name: ModelName) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    build(name, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@EVERY
def test_models_are_independent_and_can_be_copied(name: ModelName) -> None:
    first, second = build(name, seed=0), build(name, seed=0)
    copied = copy.deepcopy(first)
    with torch.no_grad():
        first.fc1.weight.zero_()
    for other in (second, copied):
        assert np.array_equal(other.fc1.weight.detach().numpy(), initial_weights(name, 0)["fc1.weight"])
    assert type(first) is type(second)


@EVERY
def test_exempt_layers_exist_and_are_the_references(name: ModelName) -> None:
    layers = dict(build(name, seed=0).named_modules())
    assert all(layer in layers for layer in exempt(name))
    assert exempt(name) == (("fc3",) if name is ModelName.CNN else ())


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"^seed must be at least 0 and below 2\\*\\*64, got {seed}"):
        initial_weights(ModelName.CNN, seed)
    with pytest.raises(ValueError, match=r"^seed must be"):
        build(ModelName.MLP, seed=seed)


def test_initial_weights_need_no_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from octavo.lab.models import ModelName, initial_weights\n"
        "print(len(initial_weights(ModelName.CNN, 0)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("10\n", "")
