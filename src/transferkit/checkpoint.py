"""Checkpoints: a trained model and the state of its training, in one file of plain types and tensors."""

import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from transferkit.backbone import load_backbone
from transferkit.errors import CheckpointError, HeadMismatchError
from transferkit.files import DAMAGE, written_whole
from transferkit.freezing import find_boundary, first_trainable, freeze_until
from transferkit.head import TransferModel, attach_head
from transferkit.preprocessing import Preprocessing
from transferkit.weights import differences

FORMAT = 1

PARTS = {
    "model": ("backbone", "preprocessing", "classes", "head", "first_trainable", "frozen", "weights"),
    "optimizer": ("class", "groups", "state"),
    "scaler": (),
    "progress": ("epoch", "global_step", "seed"),
}


def check_parts(state: Mapping[str, Any], *parts: str, origin: str = "the checkpoint") -> None:
    """Refuse a checkpoint that lacks one of the parts asked for, or something in it.

    Raises:
        CheckpointError: So it is.
    """
    lacking = [part for part in parts if not isinstance(state.get(part), Mapping)]
    lacking += [
        f"{part}/{key}" for part in parts if part not in lacking for key in PARTS[part] if key not in state[part]
    ]
    if lacking:
        raise CheckpointError(
            f"{origin} lacks {', '.join(lacking)}: expected a file that Trainer.save wrote, or what "
            "Trainer.state_dict returned."
        )


def model_state(model: TransferModel) -> dict[str, Any]:
    """Return all that is needed to build a model again, as plain types and tensors that are not copies."""
    return {
        "backbone": model.backbone.name,
        "preprocessing": asdict(model.backbone.preprocess),
        "classes": list(model.classes),
        "head": model.head_arguments,
        "first_trainable": first_trainable(model),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "weights": model.state_dict(),
    }


def check_model_state(model: TransferModel, state: Mapping[str, Any]) -> None:
    """Compare a saved model with a live one before anything is assigned.

    Raises:
        HeadMismatchError: Other classes.
        UnknownLayerError: It is frozen until a layer that the model does not have.
        CheckpointError: Another backbone, preprocessing, or other names or shapes of weights.
    """
    find_boundary(model, state["first_trainable"])
    if list(model.classes) != state["classes"]:
        raise HeadMismatchError(
            f"the checkpoint has {len(state['classes'])} classes ({', '.join(state['classes'][:5])}...), the model "
            f"{len(model.classes)} ({', '.join(model.classes[:5])}...): expected the same. transferkit.load_model "
            "builds the model that the checkpoint was made of."
        )
    live = {"backbone": model.backbone.name, "preprocessing": asdict(model.backbone.preprocess)}
    for name, value in live.items():
        if value != state[name]:
            raise CheckpointError(f"the checkpoint has {name} {state[name]}, the model {value}: expected the same.")
    if faults := differences(model.state_dict(), state["weights"]):
        raise CheckpointError(f"the checkpoint's weights do not fit the model: {faults}. Was its head built otherwise?")


def load_model_state(model: TransferModel, state: Mapping[str, Any]) -> None:
    """Assign a saved model, already compared, to a live one: its weights and what is frozen."""
    model.load_state_dict(state["weights"])
    freeze_until(model, state["first_trainable"] or "head")
    frozen = set(state["frozen"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def load_model(path: str | os.PathLike[str], *, head: nn.Module | None = None) -> TransferModel:
    """Build the model that `Trainer.save` wrote, from the file alone: no download, no other information.

    Args:
        path: The checkpoint.
        head: If the model had a head of your own, one built the same way.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        CheckpointError: Not a whole checkpoint, or one with a head of your own and no `head` given.

    Example:
        >>> model = load_model("flowers.pt")  # doctest: +SKIP
        >>> logits = model(model.backbone.preprocess(images))  # doctest: +SKIP
    """
    whole = read_checkpoint(path)
    check_parts(whole, "model", origin=str(path))
    state = whole["model"]
    if head is None and state["head"] is None:
        raise CheckpointError(
            f"{path} has a head of the user's own, whose code is not in the file: pass head= like it."
        )
    backbone = load_backbone(
        state["backbone"],
        weights=None,
        image_size=state["preprocessing"]["image_size"],
        preprocessing=Preprocessing(**state["preprocessing"]),
    )
    model = attach_head(backbone, state["classes"], **(state["head"] if head is None else {"head": head}))
    check_model_state(model, state)
    load_model_state(model, state)
    return model.eval()


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return an optimizer's state by parameter name."""
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
    parameters = dict(model.named_parameters())
    for name, values in state["state"].items():
        if name not in parameters:
            raise CheckpointError(f"the checkpoint's optimizer has state for {name!r}, which the model does not have.")
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameters[name].shape:
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


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a checkpoint whole or not at all: beside the target, flushed to the disk, then renamed.

    Raises:
        OSError: The folder is missing, read-only or full; what was at `path` before is still there.
    """
    versions = {package: version(package) for package in ("transferkit", "torch", "torchvision")}
    with written_whole(Path(path)) as file:
        torch.save({"format": FORMAT, "versions": versions, **state}, file)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint after verifying the checksum of every part of it. No code in the file is run.

    Raises:
        CheckpointError: No such file, a damaged one, or not a checkpoint of a format this version knows.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: expected a file that Trainer.save wrote.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not look at the checksums
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise CheckpointError(
            f"cannot read {path} ({path.stat().st_size} bytes) as a checkpoint: {error}. Expected a file that "
            "Trainer.save wrote, whole. For a file of weights alone use load_backbone(weights=path)."
        ) from error
    if damaged:
        raise CheckpointError(f"{path} is damaged in its part {damaged!r}: delete it and use an earlier checkpoint.")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format", "none") if isinstance(state, dict) else "none"
        raise CheckpointError(
            f"{path} has checkpoint format {found}: this version of transferkit reads format {FORMAT}."
        )
    return state
