"""Calls that do not fit a function: which argument to write instead, for people who come from other libraries."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from transferkit.errors import CallError, MissingMethodError, close_matches

_Called = TypeVar("_Called", bound=Callable[..., Any])

_FUNCTIONS: dict[str, Callable[..., Any]] = {}  # public ones, to name those that have an argument

_OTHER_NAMES = {
    "lr": "learning_rate base_lr lr_max max_lr",
    "schedule": "scheduler lr_scheduler lr_schedule",
    "loss": "criterion loss_fn loss_func",
    "epochs": "n_epochs num_epochs nb_epoch max_epochs",
    "batch_size": "bs batch",
    "validation_data": "val val_data val_dataset valid valid_data validation val_loader valid_loader",
    "validation_split": "valid_pct val_split validation_fraction",
    "data": "train train_data train_dataset train_loader training_data dataset dls dataloader",
    "num_workers": "workers use_multiprocessing max_queue_size n_jobs",
    "augment": "augmentation transform transforms batch_tfms data_augmentation",
    "precision": "amp fp16 mixed_precision dtype",
    "seed": "random_state random_seed",
    "weights": "pretrained",
    "image_size": "input_shape input_size target_size img_size",
    "classes": "num_classes n_classes n_out class_names",
    "class_weights": "weight",
    "resume_from": "checkpoint ckpt_path",
    "freeze_until": "trainable freeze freeze_layers unfreeze",
}
_ADVICE = {
    "images and targets are one argument: fit((images, targets)).": "x y X images targets labels",
    "training images are shuffled in each epoch, and others never: leave it out.": "shuffle",
    'write Trainer(model, loss=CrossEntropy(class_weights="balanced")), or a list.': "class_weight class_weights",
    "write Trainer(model, loss=...) with a loss of your own.": "sample_weight",
    "write optimizer=functools.partial(torch.optim.SGD, momentum=...).": "momentum",
    "an epoch is all images once: leave it out.": "steps_per_epoch validation_steps validation_freq drop_last",
    "resume_from= continues a run: leave it out.": "initial_epoch",
    "the classifier is never loaded, and attach_head adds a head: leave it out.": "include_top input_tensor top",
    "fit puts the best weights back, but not with WeightAverage(restore_best=False): leave it out.": (
        "restore_best_weights save_best_only save_weights_only save_top_k monitor"
    ),
    "lower is better for names that end in loss or error: leave it out.": "mode",
    "it shows nothing: leave it out.": "verbose",
}
_ELSEWHERE = {  # what to write, and for which methods that others look for in a model
    "Trainer(model).{}(data)": "fit evaluate predict predict_proba predict_classes solve lr_find",
    "transferkit.{}(model)": "summary",
    "transferkit.{}_model(model, path)": "save",
    "{}_until(model, 'head')": "freeze",
}


def explained(called: _Called) -> _Called:
    """Let a function, or a class with the methods that have options, say what to write where a call does not fit.

    `fit(data, learning_rate=0.2)` is then a `CallError`: "fit has no argument learning_rate: write lr=."
    """
    if not inspect.isclass(called):
        return cast("_Called", _explained(called, called.__name__))
    for name, method in list(vars(called).items()):
        typed = not name.startswith("_") and bool(getattr(method, "__kwdefaults__", None))
        if inspect.isfunction(method) and (typed or name == "__init__"):
            shown = called.__name__ if name == "__init__" else f"{called.__name__}.{name}"
            setattr(called, name, _explained(method, shown))
    return called


def explain_missing(model: object, name: str) -> None:
    """Raise `MissingMethodError`, which says who has a method, if it is one that others look for in a model."""
    if remedy := _find(name, _ELSEWHERE):
        raise MissingMethodError(f"a {type(model).__name__} has no {name}: write {remedy.format(name)}.")


def _explained(function: Callable[..., Any], shown: str) -> Callable[..., Any]:
    _FUNCTIONS[shown] = function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError:
            signature = inspect.signature(function)
            try:
                signature.bind(*args, **kwargs)
            except TypeError as misfit:
                raise CallError(_explanation(shown, signature, len(args), list(kwargs), misfit)) from None
            raise  # something inside failed

    return call


def _explanation(shown: str, signature: inspect.Signature, given: int, named: list[str], misfit: TypeError) -> str:
    own = {name: parameter for name, parameter in signature.parameters.items() if name != "self"}
    if unknown := [name for name in named if name not in own]:
        ours = _find(unknown[0], _OTHER_NAMES) or unknown[0]
        having = [name for name, function in _FUNCTIONS.items() if ours in inspect.signature(function).parameters]
        elsewhere = f"{' and '.join(having[:3])} {'have' if having[1:] else 'has'} {ours}=." if having else ""
        advice = f"write {ours}=." if ours in own else _find(unknown[0], _ADVICE) or elsewhere
        return f"{shown} has no argument {unknown[0]}: {advice or close_matches(unknown[0], own)}"
    unnamed = [name for name, parameter in own.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    given -= "self" in signature.parameters
    if given <= len(unnamed):
        return f"{shown}: {misfit}. Its arguments are {', '.join(own)}."
    others = [f"{name}=..." for name in own if name not in unnamed][: given - len(unnamed)]
    return (
        f"{shown} takes without a name only {' and '.join(unnamed)}, and got {given} arguments. Name the others: "
        f"{shown}({', '.join([*unnamed, *others])})."
        + (" Images and targets are one argument: fit((images, targets))." if "data" in unnamed else "")
    )


def _find(word: str, table: dict[str, str]) -> str:
    return next((found for found, words in table.items() if word in words.split()), "")
