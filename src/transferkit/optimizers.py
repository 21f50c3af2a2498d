"""The optimizer: one group of parameters for the backbone and one for the head, frozen parameters included.

The groups never change, so freezing more or less breaks neither optimizer, schedule nor resume. A frozen parameter
has no gradient, and optimizers pass over what has none.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from transferkit.arguments import positive
from transferkit.errors import ArgumentError, close_matches
from transferkit.head import TransferModel

OptimizerClass = Callable[..., Optimizer]

OPTIMIZERS: dict[str, OptimizerClass] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    "rmsprop": torch.optim.RMSprop,
}

LearningRate = float | Mapping[str, float]

LR = 1e-3


def build_optimizer(
    optimizer: str | OptimizerClass | Optimizer, model: TransferModel, lr: LearningRate | None, weight_decay: float
) -> Optimizer:
    """Return an optimizer over all of a model's parameters, fused into one kernel where it can be.

    Args:
        optimizer: `"adam"`, `"adamw"`, `"sgd"` (momentum 0.9), `"rmsprop"`; a class or `functools.partial` of one;
            or an optimizer already built over this model's parameters.
        model: Whose parameters.
        lr: Learning rate; one number, or `{"backbone": 1e-5, "head": 1e-3}`; None is what a `functools.partial` says,
            else 1e-3.
        weight_decay: 0 or more.

    Raises:
        ArgumentError: An unknown name, a number out of range, an instance over other parameters, or `lr` or
            `weight_decay` together with an instance.
    """
    if isinstance(optimizer, Optimizer):
        if lr is not None or weight_decay:
            raise ArgumentError(
                f"lr={lr} and weight_decay={weight_decay} do not reach an optimizer that is already built: set them "
                "there, or pass its class."
            )
        _check_parameters(optimizer, model)
        for group in optimizer.param_groups:
            positive("lr of the optimizer", float(group["lr"]), or_zero=True)
            group.setdefault("initial_lr", group["lr"])
        return optimizer
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise ArgumentError(f"optimizer={optimizer!r} is not known. {close_matches(optimizer, OPTIMIZERS)}")
        optimizer = OPTIMIZERS[optimizer]
    if not callable(optimizer):
        raise ArgumentError(
            f"optimizer={optimizer!r} cannot be used: expected a name ({', '.join(OPTIMIZERS)}), an optimizer class "
            "or an optimizer."
        )
    positive("weight_decay", weight_decay, or_zero=True)
    groups = [
        {"params": list(part.parameters()), "name": name}
        for name, part in (("backbone", model.backbone), ("head", model.head))
    ]
    accepted = inspect.signature(optimizer).parameters
    fixed = getattr(optimizer, "keywords", {})  # what a functools.partial already says
    options: dict[str, Any] = {"fused": True} if "fused" in accepted and not {"fused", "foreach"} & set(fixed) else {}
    if weight_decay:
        options["weight_decay"] = weight_decay
    built = optimizer(groups, **options)
    own_lr = built.param_groups[0]["lr"] if "lr" in fixed else LR
    set_lr(built, own_lr if lr is None else lr)
    return built


def find_lr(optimizer: Optimizer, lr: LearningRate | None) -> dict[str, float]:
    """Return the base learning rate of each group: what `lr` says or, if that is None, what it has.

    Raises:
        ArgumentError: Not positive and finite, or a mapping with other names than the groups'.
    """
    names = [group.get("name", str(index)) for index, group in enumerate(optimizer.param_groups)]
    if lr is None:
        return {name: group["initial_lr"] for name, group in zip(names, optimizer.param_groups, strict=True)}
    rates = dict(lr) if isinstance(lr, Mapping) else dict.fromkeys(names, lr)
    if set(rates) != set(names):
        raise ArgumentError(f"lr names the groups {sorted(rates)}: expected exactly {names}, or one number for all.")
    return {name: positive(f"lr of {name}" if isinstance(lr, Mapping) else "lr", rates[name]) for name in names}


def set_lr(optimizer: Optimizer, lr: LearningRate) -> None:
    """Give every group its base learning rate, from which schedules start.

    Raises:
        ArgumentError: As `find_lr`.
    """
    for rate, group in zip(find_lr(optimizer, lr).values(), optimizer.param_groups, strict=True):
        group["initial_lr"] = group["lr"] = rate


def scale_lr(optimizer: Optimizer, factor: float) -> None:
    """Set every group's learning rate to its base times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _check_parameters(optimizer: Optimizer, model: TransferModel) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    strangers = len(held - own)
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in held
    ]
    if strangers or missing:
        raise ArgumentError(
            f"the optimizer does not belong to the model: it holds {strangers} parameters of another model and lacks "
            f"{len(missing)} that train ({', '.join(missing[:5])}). Build it over model.parameters() after "
            "attach_head, or pass its class."
        )
