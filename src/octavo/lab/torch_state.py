"""A PyTorch run's state as tensors by name and plain JSON, and back; of sharded parameters, whole on the first rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from octavo.lab.learner import MODEL, OPTIMIZER, Snapshot, check_names
from octavo.torch import LossScaler

__all__ = ["restore", "snapshot"]


def snapshot(
    network: nn.Module, optimizer: torch.optim.Optimizer, scaler: LossScaler | None, *, sharded: bool
) -> Snapshot:
    """`model.fc1.weight`, `optimizer.fc1.weight.exp_avg` and so on, on the CPU; what is no tensor is in the facts."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, value in _model_state(network, sharded).items():
        tensors[MODEL + name] = value.detach().cpu().clone()
    for name, state in _optimizer_state(network, optimizer, sharded).items():
        for key, value in state.items():
            place = f"{OPTIMIZER}{name}.{key}"
            if isinstance(value, Tensor):
                tensors[place] = value.detach().cpu().clone()
            elif value is not None:
                numbers[place] = value
    return Snapshot(tensors, {"optimizer": numbers, "scaler": None if scaler is None else scaler.state_dict()})


def restore(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: LossScaler | None,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any] | None,
    *,
    sharded: bool,
) -> None:
    """Take over what `snapshot` gave; facts None: the network alone.

    Raises ValueError, and changes nothing, where the tensors are another network's.
    """
    found = {name.removeprefix(MODEL): value for name, value in tensors.items() if name.startswith(MODEL)}
    wanted = dict(network.named_parameters())
    # Scales and histories may come in another length, or not at all.
    check_names(
        {
            name: tuple(value.shape)
            for name, value in found.items()
            if name in wanted or name not in network.state_dict()
        },
        {name: tuple(value.shape) for name, value in wanted.items()},
    )
    if sharded:
        set_model_state_dict(network, dict[str, Any](found), options=StateDictOptions(full_state_dict=True))
    else:
        network.load_state_dict(found)
    if facts is None:
        return
    states: dict[str, dict[str, Any]] = {}
    entries = {name: value for name, value in tensors.items() if name.startswith(OPTIMIZER)} | dict(facts["optimizer"])
    for name, value in entries.items():
        parameter, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
        states.setdefault(parameter, {})[key] = value
    _restore_optimizer(network, optimizer, states, sharded)
    if scaler is not None and facts["scaler"] is not None:
        scaler.load_state_dict(facts["scaler"])


def _model_state(network: nn.Module, sharded: bool) -> dict[str, Tensor]:
    if not sharded:
        return network.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(network, options=options)  # type: ignore[return-value]


def _optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer, sharded: bool) -> dict[str, dict[str, Any]]:
    """State by parameter."""
    if sharded:
        if not optimizer.state:  # torch's function would take a step to make it
            return {}
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: Any = get_optimizer_state_dict(network, optimizer, options=options)
        return dict(state.get("state", {}))
    names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    return {names[parameter]: state for parameter, state in optimizer.state.items()}


def _restore_optimizer(
    network: nn.Module, optimizer: torch.optim.Optimizer, states: dict[str, dict[str, Any]], sharded: bool
) -> None:
    if sharded:
        if states:
            options = StateDictOptions(full_state_dict=True)
            groups = get_optimizer_state_dict(network, optimizer, options=options)["param_groups"]
            whole: dict[str, Any] = {"state": states, "param_groups": groups}
            set_optimizer_state_dict(network, optimizer, whole, options=options)
        return
    for name, parameter in network.named_parameters():
        state = states.get(name)
        if state is not None:
            # torch keeps the step on the CPU, and all else beside the parameter
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if isinstance(value, Tensor) and value.dim() else value
                for key, value in state.items()
            }
