"""An optimizer's state by parameter name, so that no order and no numbering can mix it up."""

from collections import defaultdict
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transferkit.errors import CheckpointError
from transferkit.saving.archive import check_items, shown


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return an optimizer's state by parameter name, as plain types and tensors that are not copies."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    state = {names[id(parameter)]: dict(values) for parameter, values in optimizer.state.items()}
    return {"class": type(optimizer).__name__, "groups": groups, "state": state}


def check_optimizer_state(optimizer: Optimizer, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Compare a saved optimizer with a live one before anything is assigned.

    Raises:
        CheckpointError: Another class, other groups, unknown parameters or other shapes.
    """
    if (name := type(optimizer).__name__) != state["class"] or len(optimizer.param_groups) != len(state["groups"]):
        raise CheckpointError(
            f"the checkpoint's optimizer is {state['class']} with {len(state['groups'])} groups, the live one {name} "
            f"with {len(optimizer.param_groups)}: expected the same. Build the Trainer with that optimizer."
        )
    check_items(state["groups"], dict, "optimizer/groups")
    check_items(state["state"].values(), dict, "optimizer/state")
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, state["groups"], strict=True)):
        _check_group(number, group, saved)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {names[id(p)]: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    parameters, made = dict(model.named_parameters()), _made_states(optimizer)
    for name, values in state["state"].items():
        if name not in groups:
            raise CheckpointError(f"the checkpoint's optimizer has state for {name!r}, which the model does not have.")
        if made is not None and set(values) != set(made[groups[name]]):
            raise CheckpointError(
                f"the checkpoint's optimizer keeps {', '.join(sorted(values))} of {name}, the live one "
                f"{', '.join(sorted(made[groups[name]]))}: expected the same."
            )
        for key, value in values.items():
            expected = value if made is None else made[groups[name]][key]
            _check_value(name, key, value, expected, parameters[name])


def _check_group(number: int, group: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    live = {key: value for key, value in group.items() if key != "params"}
    if set(live) != set(saved):
        raise CheckpointError(
            f"the checkpoint's optimizer has settings {', '.join(sorted(saved))} in group {number}, the live one "
            f"{', '.join(sorted(live))}: expected the same. Is it another version of torch?"
        )
    for key, value in live.items():
        if key in ("foreach", "fused") and all(isinstance(one, bool | None) for one in (value, saved[key])):
            continue  # None lets torch choose
        if _kind(value) != _kind(saved[key]):
            raise CheckpointError(
                f"the checkpoint's optimizer has {key}={shown(saved[key])} in group {number}, the live one {value!r}: "
                "expected the same kind of value."
            )


def _kind(value: object) -> object:
    if isinstance(value, bool):
        return "a switch"
    if isinstance(value, tuple | list):
        return [_kind(part) for part in value]
    return "a number" if isinstance(value, Real) else type(value)


def _made_states(optimizer: Optimizer) -> list[dict[str, Any]] | None:
    """Return what one step makes an optimizer of torch's keep of a parameter in each group; None for another's."""
    if not type(optimizer).__module__.startswith("torch.optim."):
        return None
    parameters = [nn.Parameter(torch.zeros(2, 3, device=group["params"][0].device)) for group in optimizer.param_groups]
    twin = object.__new__(type(optimizer))
    twin.__dict__ = {**optimizer.__dict__, "state": defaultdict(dict), "_optimizer_step_pre_hooks": {}}
    twin.__dict__["_optimizer_step_post_hooks"] = {}
    pairs = zip(optimizer.param_groups, parameters, strict=True)
    twin.param_groups = [{**group, "params": [parameter]} for group, parameter in pairs]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    twin.step()
    return [dict(twin.state[parameter]) for parameter in parameters]


def _check_value(name: str, key: str, value: object, expected: object, parameter: Tensor) -> None:
    """Compare what is kept of a parameter with what is to be expected: of its shape, one number, or no tensor."""
    if not isinstance(value, Tensor) or not isinstance(expected, Tensor):
        if _kind(value) != _kind(expected):
            raise CheckpointError(
                f"the checkpoint's optimizer has a {type(value).__name__} as {key} of {name}: expected a "
                f"{type(expected).__name__}."
            )
        return
    shape = parameter.shape if expected.ndim else expected.shape
    if (value.shape, value.dtype) != (shape, expected.dtype):
        raise CheckpointError(
            f"the checkpoint's optimizer has {key} of shape {tuple(value.shape)}, {value.dtype}, for {name}: expected "
            f"shape {tuple(shape)}, {expected.dtype}."
        )


def load_optimizer_state(optimizer: Optimizer, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Assign a saved optimizer, already compared, to a live one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    live = optimizer.state_dict()["param_groups"]
    numbered = {
        number: state["state"][names[id(parameter)]]
        for group, live_group in zip(optimizer.param_groups, live, strict=True)
        for parameter, number in zip(group["params"], live_group["params"], strict=True)
        if names[id(parameter)] in state["state"]
    }
    groups = [{**saved, "params": group["params"]} for saved, group in zip(state["groups"], live, strict=True)]
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})
