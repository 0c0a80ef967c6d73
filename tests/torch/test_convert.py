"""convert, calibrate, and state that loads in every direction."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import octavo.torch as ot
from octavo.recipes import current_scaling, delayed_scaling

DELAYED = delayed_scaling(amax_history_len=4)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)))


def trained() -> nn.Sequential:
    model = ot.convert(network(), DELAYED)
    for i in range(3):
        model(torch.randn(4, 6) * (i + 1)).sum().backward()
    return model


def test_convert_keeps_objects_names_hooks_and_ties() -> None:
    model = network()
    first, weight = model[0], model[0].weight
    calls: list[str] = []
    first.register_forward_hook(lambda *_: calls.append("hook"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = set(model.state_dict())
    assert ot.convert(model, current_scaling()) is model
    assert model[0] is first
    assert isinstance(first, ot.Linear)
    assert first.weight is weight is optimizer.param_groups[0]["params"][0]
    assert names < set(model.state_dict())
    model(torch.ones(1, 6))
    assert calls == ["hook"]


def test_tied_layers_stay_tied() -> None:
    layer = nn.Linear(4, 4)
    model = ot.convert(nn.ModuleList([layer, layer]), None)
    assert model[0] is model[1]


def test_convert_takes_the_model_itself() -> None:
    layer = nn.Linear(4, 4)
    assert ot.convert(layer, DELAYED) is layer
    assert isinstance(layer, ot.Linear)


@pytest.mark.parametrize(
    ("exempt", "converted"), [(("0",), {"2.0", "2.1"}), (("2.*",), {"0"}), (("*",), set()), ((), {"0", "2.0", "2.1"})]
)
def test_exempt(exempt: tuple[str, ...], converted: set[str]) -> None:
    model = ot.convert(network(), DELAYED, exempt)
    assert {name for name, module in model.named_modules() if isinstance(module, ot.Linear)} == converted


def test_exempt_that_fits_nothing_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"exempt '2.2' fits no linear layer of the model; did you mean '2.\d'"):
        ot.convert(network(), DELAYED, exempt=["2.2"])


def test_converting_again_changes_the_recipe() -> None:
    model = ot.convert(ot.convert(network(), DELAYED), current_scaling())
    assert model[0].recipe == current_scaling()


def test_calibrate_freezes_the_scales_of_the_data() -> None:
    model = ot.convert(network(), DELAYED)
    model.train()
    data = [torch.randn(4, 6), torch.full((1, 6), 9.0), torch.randn(4, 6)]
    expected = [np.float32(448) / np.float32(9), np.float32(448) / np.float32(model[0].weight.abs().max().item())]
    assert ot.calibrate(model, ((x, "target") for x in data)) is model
    assert model.training
    assert model[0].scale_forward[:2].tolist() == expected
    model.eval()
    before = copy.deepcopy(model.state_dict())
    inside = model(data[0])
    with ot.autocast():
        assert model(data[0]).equal(inside)
    with ot.autocast(enabled=False):
        assert not model(data[0]).equal(inside)
    for name, value in model.state_dict().items():
        assert value.equal(before[name])


def test_calibrated_state_travels_by_checkpoint(tmp_path: Any) -> None:
    model = ot.calibrate(ot.convert(network(), DELAYED), [torch.randn(4, 6)]).eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = ot.convert(network(), DELAYED).eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x = torch.randn(4, 6)
    assert other(x).equal(model(x))


def test_calibrating_by_hand_through_autocast() -> None:
    layer, x = ot.Linear(6, 4), torch.full((2, 6), 7.0)
    with ot.autocast(enabled=False, calibrating=True):
        assert layer(x).equal(nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.scale_forward[0].item() == 64


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one batch"),
        ([torch.full((1, 6), math.nan)], "0.input holds nan during calibration"),
        ([torch.full((1, 6), math.inf)], "0.input holds inf during calibration"),
    ],
)
def test_calibration_refuses(batches: list[Tensor], message: str) -> None:
    model = ot.convert(network(), DELAYED)
    with pytest.raises(ValueError, match=message):
        ot.calibrate(model, batches)
    assert model[0].scale_forward.tolist() == [1, 1, 1]
    assert not model[0].amax_history_forward.any()


def test_calibration_wants_layers_and_a_recipe_with_state() -> None:
    with pytest.raises(ValueError, match="no 8-bit layer"):
        ot.calibrate(network(), [torch.ones(1, 6)])
    with pytest.raises(ValueError, match="current_scaling keeps none"):
        ot.calibrate(ot.convert(network(), current_scaling()), [torch.ones(1, 6)])


# -- state_dict in every direction ------------------------------------------------------------------------------------


def fresh(layer: ot.Linear) -> bool:
    return not layer.amax_history_forward.any() and layer.scale_forward.tolist() == [1, 1, 1]


def test_state_with_history_loads_into_a_layer_without() -> None:
    source, target = trained(), ot.convert(network(), None)
    target.load_state_dict(source.state_dict())
    for name, value in source.state_dict().items():
        assert target.state_dict()[name].equal(value), name
    x = torch.randn(4, 6)
    with ot.autocast(recipe=DELAYED):
        assert target(x).equal(source(x))


def test_plain_state_loads_into_a_trained_layer() -> None:
    target = trained()
    target.load_state_dict(network().state_dict())
    assert fresh(target[0])


def test_empty_state_loads_into_a_trained_layer() -> None:
    target = trained()
    target.load_state_dict(ot.convert(network(), None).state_dict())
    assert fresh(target[0])
    target(torch.ones(1, 6)).sum().backward()
    assert target[0].amax_history_forward.shape == (4, 3)


def test_eight_bit_state_loads_into_a_plain_model_but_for_its_own_entries() -> None:
    missing, unexpected = network().load_state_dict(trained().state_dict(), strict=False)
    assert not missing
    assert all("scale_" in name or "amax_" in name or name.endswith("draws") for name in unexpected)


def test_resumed_training_continues_bit_for_bit() -> None:
    source = trained()
    target = ot.convert(network(), DELAYED)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    for model in (source, target):
        torch.manual_seed(5)
        model.zero_grad()
        for _ in range(3):
            model(torch.randn(4, 6)).sum().backward()
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        assert a.grad.equal(b.grad)
    for name, value in source.state_dict().items():
        assert value.equal(target.state_dict()[name]), name


def test_a_state_of_another_shape_is_refused() -> None:
    state = trained().state_dict()
    state["0.scale_forward"] = torch.ones(7)
    with pytest.raises(RuntimeError, match="scale_forward"):
        ot.convert(network(), DELAYED).load_state_dict(state)


def test_a_longer_history_keeps_the_newest() -> None:
    layer = ot.Linear(4, 4)
    for value, steps in ((1.0, 3), (2.0, 3), (3.0, 6), (4.0, 2)):
        with ot.autocast(recipe=delayed_scaling(amax_history_len=steps)):
            layer(torch.full((1, 4), value))
        if steps == 6:
            assert layer.amax_history_forward[:, 0].tolist() == [0, 0, 0, 1, 2, 3]
    assert layer.amax_history_forward[:, 0].tolist() == [0, 4]
