"""A trainer's state: what a checkpoint holds of it, compared before anything is assigned, and taken over."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transferkit.base.display import Display
from transferkit.data.augmentation import Augment, describe_augmentation
from transferkit.errors import CheckpointError
from transferkit.saving import archive
from transferkit.saving import model as model_state
from transferkit.saving import optimizer as optimizer_state
from transferkit.training.checkpoint import Checkpoint, read_newest
from transferkit.training.optimizers import LearningRate, find_lr
from transferkit.training.progress import Progress, check_progress
from transferkit.training.run import Run
from transferkit.training.schedules import SCHEDULES

if TYPE_CHECKING:
    from transferkit.trainer import Trainer

PARTS: dict[str, dict[str, tuple[type, ...]]] = {
    "model": model_state.PARTS,
    "optimizer": {"class": (str,), "groups": (list,), "state": (dict,)},
    "scaler": {},
    "progress": {
        "epoch": (int,),
        "global_step": (int,),
        "seed": (int,),
        "micro_batch_size": (int, type(None)),
        "precision": (str,),
        "device": (str,),
    },
}


def training_state(trainer: "Trainer", progress: Progress | None) -> dict[str, Any]:
    """Return model, optimizer, position and the run under way as plain types and tensors, which are not copies."""
    return {
        "model": model_state.model_state(trainer.model),
        "optimizer": optimizer_state.optimizer_state(trainer.optimizer, trainer.model),
        "scaler": trainer.device.scaler.state_dict(),
        "progress": {
            "epoch": trainer.epoch,
            "global_step": trainer.global_step,
            "seed": trainer.seed,
            "micro_batch_size": trainer.micro_batch_size,
            "precision": trainer.device.precision,
            "device": trainer.device.torch_device.type,
        },
        "run": None if progress is None else progress.state(),
    }


def complete_training_state(trainer: "Trainer", state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a state read from a file, with the frozen weights it left out, once it is known to fit."""
    archive.check_parts(state, PARTS, origin=str(path))
    state = {**state, "model": model_state.put_back(state["model"], path, trainer.model.state_dict())}
    check_training_state(trainer, state, origin=str(path))
    return state


def check_training_state(trainer: "Trainer", state: Mapping[str, Any], *, origin: str) -> None:
    """Compare a state with a live trainer before anything is assigned.

    Raises:
        HeadMismatchError: Other classes.
        CheckpointError: Another backbone, head, preprocessing or optimizer.
    """
    archive.check_parts(state, PARTS, origin=origin)
    model_state.check_model_state(trainer.model, state["model"])
    optimizer_state.check_optimizer_state(trainer.optimizer, trainer.model, state["optimizer"])
    live, saved = trainer.device.scaler.state_dict(), state["scaler"]
    if live and saved and (set(live) != set(saved) or any(type(saved[name]) is not type(live[name]) for name in live)):
        raise CheckpointError(f"{origin} has a gradient scaler of {saved}: expected numbers for {', '.join(live)}.")


def assign_training_state(trainer: "Trainer", state: Mapping[str, Any]) -> None:
    """Take over a state that is known to fit."""
    position = state["progress"]
    here = {"precision": trainer.device.precision, "device": trainer.device.torch_device.type}
    there = {name: position[name] for name in here}
    if here != there:
        warnings.warn(
            f"the checkpoint is from {there['device']} in {there['precision']}, and goes on on {here['device']} in "
            f"{here['precision']}: numbers will differ from those of a run that stayed there"
            + (", and its gradient scale is dropped." if state["scaler"] and here["precision"] != "fp16" else "."),
            stacklevel=3,
        )
    model_state.load_model_state(trainer.model, state["model"])
    optimizer_state.load_optimizer_state(trainer.optimizer, trainer.model, state["optimizer"])
    if state["scaler"] and trainer.device.scaler.is_enabled():  # empty unless it was saved from fp16
        trainer.device.scaler.load_state_dict(state["scaler"])
    trainer.epoch = position["epoch"]
    trainer.global_step = position["global_step"]
    trainer.seed = position["seed"]


def read_run(
    trainer: "Trainer",
    path: str | os.PathLike[str],
    facts: dict[str, Any],
    checkpoints: Sequence[Checkpoint],
    display: Display,
) -> dict[str, Any] | None:
    """Return the state to resume from, known to fit; None if the folder has none yet.

    Raises:
        CheckpointError: It cannot be used.
        DataChangedError: The run began with other data.
    """
    found = read_newest(path)
    if found is None:
        display.say(f"{path} has no checkpoint yet: the run begins")
        return None
    file, state = found
    state = complete_training_state(trainer, state, file)
    check_progress(state.get("run"), facts, trainer.model.state_dict(), origin=str(file))
    for checkpoint in checkpoints:
        if checkpoint.folder.resolve() != file.parent.resolve():
            checkpoint.check_new_run(state["progress"]["global_step"])
    display.say(f"resumed from {file}")
    return state


def run_facts(
    trainer: "Trainer", run: Run, lr: LearningRate | None, epochs: int, augment: Augment | None
) -> dict[str, Any]:
    """Return what a call must have in common with the one it resumes."""
    constant = trainer.schedule is SCHEDULES["constant"]
    weights = trainer.cross_entropy.class_weights
    return {
        "training data": [run.source.num_images, run.source.digest()],
        "validation data": None if run.validation is None else [run.validation.num_images, run.validation.digest()],
        "batch_size": run.batch_size,
        "augment": None if augment is None else describe_augmentation(augment),
        "n_views": run.num_views,
        "lr": find_lr(trainer.optimizer, lr),
        "schedule": next((name for name, known in SCHEDULES.items() if known is trainer.schedule), "a function"),
        "epochs": None if constant else epochs,  # a schedule runs over all of them
        "weight_decay": [group.get("weight_decay") for group in trainer.optimizer.param_groups],
        "micro_batch_size": trainer.micro_batch_size,
        "warmup_steps": trainer.warmup_steps,
        "clip_grad_norm": trainer.clip_grad_norm,
        "label_smoothing": trainer.cross_entropy.label_smoothing,
        "class_weights": None if weights is None else weights.tolist(),
        "seed": trainer.seed,
    }
