"""An optimizer's state by parameter name, so that neither order nor numbering of parameters matters."""

import inspect
import math
import sys
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transferkit.compute.device import parameters_of
from transferkit.errors import CheckpointError
from transferkit.saving.archive import check_parts, check_ranges, shown

PARTS: dict[str, Any] = {"class": (str,), "groups": [(dict,)], "state": {str: (dict,)}}


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return an optimizer's state by parameter name, as plain types and tensors that are not copies."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    state = {names[id(parameter)]: dict(values) for parameter, values in optimizer.state.items()}
    return {"class": type(optimizer).__name__, "groups": groups, "state": state}


def check_optimizer_state(optimizer: Optimizer, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless class, groups and what is stored of each parameter fit a live optimizer."""
    check_parts(state, PARTS, origin="the checkpoint", place="optimizer")
    if (name := type(optimizer).__name__) != state["class"] or len(optimizer.param_groups) != len(state["groups"]):
        raise CheckpointError(
            f"the checkpoint's optimizer is {state['class']} with {len(state['groups'])} groups, the live one {name} "
            f"with {len(optimizer.param_groups)}. Build the Trainer with that optimizer."
        )
    from_torch = f"{type(optimizer).__module__}.".startswith("torch.optim.")  # the step of another may do anything
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    unknown = dict(state["state"])
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, state["groups"], strict=True)):
        _check_values(f"group {number}", {key: value for key, value in group.items() if key != "params"}, saved)
        rates = dict.fromkeys(("lr", "base_lr", "scheduled_lr"), (0, sys.float_info.max))
        check_ranges(saved, rates, origin="the checkpoint's optimizer")
        if from_torch:
            _check_settings(type(optimizer), f"group {number}", saved)
        for parameter in group["params"]:
            values = unknown.pop(names[id(parameter)], None)
            if values is not None and from_torch:
                _check_values(names[id(parameter)], _state_after_a_step(optimizer, group, parameter), values)
                _check_numbers(names[id(parameter)], values)
    if unknown:
        raise CheckpointError(f"the checkpoint's optimizer has state for {next(iter(unknown))!r}, not in the model.")


def _check_settings(kind: type[Optimizer], place: str, saved: Mapping[str, Any]) -> None:
    """Let an optimizer's class judge saved settings, as when it is built, and refuse what is not finite."""
    known = inspect.signature(kind.__init__).parameters
    numbers = [part for value in saved.values() for part in (value if isinstance(value, tuple | list) else [value])]
    try:
        if not all(math.isfinite(number) for number in numbers if isinstance(number, Real | Tensor)):
            raise ValueError("a number is infinite or NaN")
        settings = {key: value for key, value in saved.items() if key in known}
        kind([nn.Parameter(torch.zeros(2, 3))], **settings)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        wrong = f"the checkpoint's optimizer has settings for {place} that it cannot work with: {error}."
        raise CheckpointError(f"{wrong} Got {shown(dict(saved))}.") from error


_NOT_NEGATIVE = [
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "square_avg",
    "acc_delta",
    "sum",
    "step",
    "step_size",
    "eta",
]


def _check_numbers(name: str, values: Mapping[str, Any]) -> None:
    """Refuse moments that are not finite, and second moments or counts below 0, which would make the next step NaN."""
    for key, value in values.items():
        if isinstance(value, Tensor) and value.numel() and value.is_floating_point():
            least, most = (float(end) for end in value.detach().aminmax())
            if not (-math.inf < least and most < math.inf and (least >= 0 or key not in _NOT_NEGATIVE)):
                got = f"numbers from {least:g} to {most:g} as {key} of {name}"
                expected = f"finite ones{' of 0 or more' if key in _NOT_NEGATIVE else ''}"
                raise CheckpointError(f"the checkpoint's optimizer has {got}: expected {expected}.")


def _state_after_a_step(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return what one of torch's optimizers stores of a parameter, as meta tensors: the step of a tiny one tells."""
    sizes = dict(enumerate(parameter.shape, start=2))  # the tiny one is 2 x 3 x ...
    tiny = nn.Parameter(torch.zeros(tuple(sizes), dtype=parameter.dtype, device=parameter.device))
    tiny.grad = torch.zeros_like(tiny)
    twin = type(optimizer)([{**group, "params": [tiny]}])  # type: ignore[call-arg] # torch's have defaults
    twin.step()
    state = dict(twin.state[tiny])
    for key, value in state.items():
        if isinstance(value, Tensor):
            shape = [sizes.get(size, size) for size in value.shape]
            state[key] = torch.empty(shape, dtype=value.dtype, device="meta")
    return state


def _check_values(place: str, live: Mapping[str, object], saved: Mapping[str, object]) -> None:
    if set(live) != set(saved):
        raise CheckpointError(
            f"the checkpoint's optimizer has {', '.join(sorted(saved))} for {place}, the live one "
            f"{', '.join(sorted(live))}: expected the same. Is it another version of torch?"
        )
    for key, value in live.items():
        if (expected := _kind(value)) != (found := _kind(saved[key])):
            raise CheckpointError(f"the checkpoint's optimizer has {found} as {key} of {place}: expected {expected}.")


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if value is None or isinstance(value, bool):  # of `foreach` and `fused` None lets torch choose
        return "a bool or None"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_kind(part) if not isinstance(part, tuple | list) else '...' for part in value[:9])}]"
    return "a number" if isinstance(value, Real) else f"a {type(value).__name__}"


def load_optimizer_state(optimizer: Optimizer, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Assign a saved optimizer, which `check_optimizer_state` has accepted, to a live one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_order = [names[id(parameter)] for parameter in parameters_of(optimizer)]  # as torch numbers them
    numbered = {number: state["state"][name] for number, name in enumerate(in_order) if name in state["state"]}
    live = optimizer.state_dict()["param_groups"]
    groups = [{**saved, "params": group["params"]} for saved, group in zip(state["groups"], live, strict=True)]
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})
