"""An optimizer's state by parameter name, so that no order and no numbering can mix it up."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from transferkit.errors import CheckpointError


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
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, state["groups"], strict=True)):
        if set(group) - {"params"} != set(saved):
            raise CheckpointError(
                f"the checkpoint's optimizer has settings {', '.join(sorted(saved))} in group {number}, the live one "
                f"{', '.join(sorted(set(group) - {'params'}))}: expected the same. Is it another version of torch?"
            )
    parameters = dict(model.named_parameters())
    for name, values in state["state"].items():
        if name not in parameters:
            raise CheckpointError(f"the checkpoint's optimizer has state for {name!r}, which the model does not have.")
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameters[name].shape:
                raise CheckpointError(
                    f"the checkpoint's optimizer has {key} of shape {tuple(value.shape)} for {name}, whose shape is "
                    f"{tuple(parameters[name].shape)}: expected the same."
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
