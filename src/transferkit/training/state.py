"""A trainer's state in a checkpoint: compared before anything is assigned, then assigned."""

import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transferkit.base.display import Display
from transferkit.base.processes import broadcast, rank
from transferkit.data.augmentation import Augment, describe_augmentation
from transferkit.errors import CheckpointError
from transferkit.model.freezing import first_trainable
from transferkit.saving import archive
from transferkit.saving import model as model_state
from transferkit.saving import optimizer as optimizer_state
from transferkit.training.callback_list import CallbackList
from transferkit.training.checkpoint import read_newest
from transferkit.training.optimizers import LearningRate, find_lr, hold_parameters
from transferkit.training.progress import check_progress
from transferkit.training.run import Run
from transferkit.training.schedules import SCHEDULES, describe_schedule
from transferkit.training.training import Training

_COUNTERS = ("epoch", "global_step", "seed")
_PARTS = {
    "model": model_state.PARTS,
    "optimizer": optimizer_state.PARTS,
    "scaler": {},
    "progress": {
        **dict.fromkeys(_COUNTERS, (int,)),
        **dict.fromkeys(("precision", "device"), (str,)),
        "micro_batch_size": (int, type(None)),
    },
}
_MOST = 2**63 - 1
_RANGES = {**dict.fromkeys(_COUNTERS, (0, _MOST)), "micro_batch_size": (1, _MOST)}
_SCALER_RANGES = {
    "scale": (sys.float_info.min, 2.0**64),
    "growth_factor": (1.0, 2.0**16),
    "backoff_factor": (2.0**-16, 1.0),
    "growth_interval": (1, 2**31),
    "_growth_tracker": (0, 2**31),
}
_NOT_COMPARED = {"params", "name", "lr", "initial_lr", "base_lr", "scheduled_lr", "foreach", "fused", "capturable"}
_FREEZING = ("freeze_until", "frozen parameters")


def training_state(training: Training) -> dict[str, Any]:
    """Return model, optimizer, counters and the current run as plain types and tensors, which are not copies."""
    training.let_optimizer("eval")
    hold_parameters(training.optimizer, training.model)
    return {
        "model": model_state.model_state(training.model),
        "optimizer": optimizer_state.optimizer_state(training.optimizer, training.model),
        "scaler": training.device.scaler.state_dict(),
        "progress": {
            **{name: getattr(training, name) for name in (*_COUNTERS, "micro_batch_size")},
            **_place(training),
        },
        "run": None if training.progress is None else training.progress.state(),
    }


def complete_training_state(training: Training, state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a state from a file, with the frozen weights it left out, after checking that it fits."""
    archive.check_parts(state, _PARTS, origin=str(path))
    state = {**state, "model": model_state.put_back(state["model"], path, training.model.state_dict())}
    check_training_state(training, state, origin=str(path))
    return state


def check_training_state(training: Training, state: Mapping[str, Any], *, origin: str) -> None:
    """Compare a state with a live trainer before anything is assigned; what differs is an error that names it."""
    training.let_optimizer("eval")
    archive.check_parts(state, _PARTS, origin=origin)
    archive.check_ranges(state["progress"], _RANGES, origin=origin)
    hold_parameters(training.optimizer, training.model)
    model_state.check_model_state(training.model, state["model"])
    optimizer_state.check_optimizer_state(training.optimizer, training.model, state["optimizer"])
    live, saved = training.device.scaler.state_dict(), state["scaler"]
    if live and saved and (set(live) != set(saved) or any(type(saved[name]) is not type(live[name]) for name in live)):
        expected = f"numbers for {', '.join(live)}"
        raise CheckpointError(f"{origin} has a gradient scaler of {archive.shown(saved)}: expected {expected}.")
    archive.check_ranges(saved, _SCALER_RANGES, origin=f"the gradient scaler of {origin}")


def assign_training_state(training: Training, state: Mapping[str, Any]) -> None:
    """Assign a state that was checked."""
    here = _place(training)
    there = {name: archive.shown(state["progress"][name]) for name in here}
    if here != there:
        dropped = ", and its gradient scale is dropped" if state["scaler"] and here["precision"] != "fp16" else ""
        warnings.warn(
            f"the checkpoint is from {there['device']} in {there['precision']} and continues on {here['device']} in "
            f"{here['precision']}: numbers will differ{dropped}.",
            stacklevel=3,
        )
    model_state.load_model_state(training.model, state["model"])
    optimizer_state.load_optimizer_state(training.optimizer, training.model, state["optimizer"])
    if state["scaler"] and training.device.scaler.is_enabled():  # empty unless it was saved from fp16
        training.device.scaler.load_state_dict(state["scaler"])
    for name in _COUNTERS:
        setattr(training, name, state["progress"][name])


def _place(training: Training) -> dict[str, str]:
    return {"precision": training.device.precision, "device": training.device.torch_device.type}


def read_run(
    training: Training, path: str | os.PathLike[str], facts: dict[str, Any], callbacks: CallbackList, display: Display
) -> dict[str, Any] | None:
    """Return the state to resume from, checked against the facts of this call; None if the folder has none yet."""
    found = read_newest(path) if rank() == 0 else None  # other processes may not see the folder
    if found is not None:
        found = found[0], complete_training_state(training, found[1], found[0])
    found = broadcast(found, "the checkpoint")
    if found is None:
        display.say(f"{path} has no checkpoint yet: a new run starts")
        return None
    file, state = found
    moved = _FREEZING if facts[_FREEZING[1]] == state["model"]["frozen"] else ()  # in the run, and here by the same run
    check_progress(state.get("run"), facts, training.model.state_dict(), origin=str(file), but=moved)
    callbacks.each("before_first_step", state["progress"]["global_step"], resumed_from=file)
    display.say(f"resumed from {file}")
    return state


def run_facts(
    training: Training, run: Run, lr: LearningRate | None, augment: Augment | None, callbacks: CallbackList
) -> dict[str, Any]:
    """Return what a call must have in common with the one it resumes."""
    model, groups = training.model, training.optimizer.param_groups
    training_data, *validation_data = [
        [feed.inputs.source.num_images, feed.inputs.source.digest()] for feed in run.feeds
    ]
    settings = {}  # of the optimizer, without rates: one value, or that of each group where they differ
    for name in sorted({name for group in groups for name in group} - _NOT_COMPARED):
        values = [repr(group.get(name)) for group in groups]
        settings[name] = values[0] if len(set(values)) == 1 else values
    return {
        "training data": training_data,
        "validation data": validation_data[0] if validation_data else None,
        "batch_size": run.batch_size,
        "augment": None if augment is None else describe_augmentation(augment),
        "n_views": run.train.num_views,
        "lr": find_lr(training.optimizer, lr),
        "schedule": describe_schedule(run.schedule),
        "epochs": None if run.schedule is SCHEDULES["constant"] else run.num_epochs,  # a schedule runs over all of them
        _FREEZING[0]: first_trainable(model),
        _FREEZING[1]: [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        **settings,
        "micro_batch_size": training.micro_batch_size,
        "clip_grad_norm": training.clip_grad_norm,
        "loss": run.loss.describe(),
        "metrics": sorted(training.metrics),
        "callbacks with a state": sorted(callbacks.state()),
        "seed": training.seed,
        "restore_best": run.restore_best,
    }
