"""The optimizer: one group of parameters for each block and one for the head, frozen parameters included.

The groups never change, so freezing more or less breaks neither optimizer, schedule nor resume. Frozen parameters have
no gradient, and optimizers skip parameters without one.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from transferkit.base.arguments import one_of, positive
from transferkit.compute.device import parameters_of
from transferkit.errors import ArgumentError
from transferkit.model.head import TransferModel

OptimizerClass = Callable[..., Optimizer]

OPTIMIZERS: dict[str, OptimizerClass] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    "rmsprop": torch.optim.RMSprop,
}

LearningRate = float | Mapping[str, float]

HEAD, BACKBONE = "head", "backbone"

LR = {HEAD: 3e-4, BACKBONE: 1e-4}  # of the named optimizers; pretrained layers keep what they know at these
SGD_LR = {HEAD: 1e-2, BACKBONE: 1e-3}


def build_optimizer(
    optimizer: str | OptimizerClass | Optimizer,
    model: TransferModel,
    lr: LearningRate | None,
    weight_decay: float | None,
) -> Optimizer:
    """Return an optimizer over all of a model's parameters, fused into one kernel where it can be; see `Trainer`.

    One that takes no groups of parameters, or needs a closure or sparse gradients, is an `ArgumentError`.
    """
    if isinstance(optimizer, Optimizer):
        if lr is not None or weight_decay is not None:
            given = f"lr={lr} and weight_decay={weight_decay}"
            raise ArgumentError(f"{given} have no effect on an optimizer that is already built: set them there.")
        _check_step(optimizer)
        hold_parameters(optimizer, model)
        take_rates(optimizer)
        return optimizer
    if isinstance(optimizer, str):
        name = one_of("optimizer", optimizer, OPTIMIZERS)
        if lr is None:
            lr = SGD_LR if name == "sgd" else LR
        optimizer = OPTIMIZERS[name]
    if not callable(optimizer):
        expected = f"a name ({', '.join(OPTIMIZERS)}), an optimizer class or an optimizer"
        raise ArgumentError(f"optimizer={optimizer!r} cannot be used: expected {expected}.")
    groups = [{"params": parameters, "name": name} for name, parameters in parameter_groups(model).items()]
    accepted = inspect.signature(optimizer).parameters
    fixed = getattr(optimizer, "keywords", {})  # what a functools.partial already says
    options: dict[str, Any] = {"fused": True} if "fused" in accepted and not {"fused", "foreach"} & set(fixed) else {}
    if weight_decay is not None:
        options["weight_decay"] = positive("weight_decay", weight_decay, or_zero=True)
    try:
        built = optimizer(groups, **options)
        _check_step(built)
        if Optimizer in type(built).__bases__ and not hasattr(built, "train"):  # schedule-free ones need no closure
            tiny = nn.Parameter(torch.zeros(2, 2))
            tiny.grad = torch.zeros(2, 2)
            cast("Any", optimizer([{"params": [tiny]}], **options)).step()  # some say only then that they need one
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # LBFGS takes no groups, Muon matrices alone
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(
            f"optimizer={optimizer!r} cannot be built over the model: {error}. Expected one such as torch.optim.AdamW."
        ) from error
    set_lr(built, float(built.param_groups[0]["lr"]) if lr is None else lr)
    return built


def parameter_groups(model: TransferModel) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of each block and of the head, to which all else belongs, in the model's order."""
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in model.backbone.blocks}
    for name, layer in zip(model.backbone.layer_names, model.backbone.features, strict=False):
        groups[name.split("_")[0]].extend(layer.parameters())
    blocks = {id(parameter) for parameters in groups.values() for parameter in parameters}
    return {**groups, HEAD: [parameter for parameter in model.parameters() if id(parameter) not in blocks]}


def discriminative_lr(model: TransferModel, lr: float, *, factor: float = 0.3) -> dict[str, float]:
    """Return a learning rate for each block, each smaller by a factor than that of the block after it.

    Early layers detect features common to all images and need to change less than late ones (Howard and Ruder, 2018,
    arXiv:1801.06146).

    Args:
        model: From `attach_head`.
        lr: Learning rate of the head, above 0.
        factor: Ratio between neighboring blocks, and between the last block and the head; above 0.

    Returns:
        A mapping that `Trainer(lr=...)` and `fit(lr=...)` take.

    Raises:
        ArgumentError: A value is out of range.

    Example:
        >>> from transferkit import attach_head, load_backbone
        >>> model = attach_head(load_backbone(weights=None, image_size=32), 10)
        >>> rates = discriminative_lr(model, 1e-3, factor=0.1)
        >>> [f"{name} {rate:.0e}" for name, rate in rates.items()][-3:]
        ['block4 1e-05', 'block5 1e-04', 'head 1e-03']
    """
    rate, step = positive("lr", lr), positive("factor", factor)
    names = list(parameter_groups(model))
    return {name: rate * step**distance for name, distance in zip(names, reversed(range(len(names))), strict=True)}


def find_lr(optimizer: Optimizer, lr: LearningRate | None) -> dict[str, float]:
    """Return the base learning rate of each group: that of `lr` or, if it is None, the present one.

    `lr` is one number for all groups, or a mapping from their names. `"backbone"` stands for every block without an
    entry of its own: `{"backbone": 1e-5, "block5": 1e-4, "head": 1e-3}`. Anything else is an `ArgumentError`.
    """
    names = [group.get("name", str(index)) for index, group in enumerate(optimizer.param_groups)]
    if lr is None:
        return {name: group["base_lr"] for name, group in zip(names, optimizer.param_groups, strict=True)}
    if not isinstance(lr, Mapping):
        return dict.fromkeys(names, positive("lr", lr))
    blocks = [name for name in names if name.startswith("block")]
    rates = {name: positive(f"lr of {name}", rate) for name, rate in lr.items()}
    every = {**(dict.fromkeys(blocks, rates[BACKBONE]) if BACKBONE in rates else {}), **rates}
    if set(every) - ({BACKBONE} if blocks else set()) != set(names):
        shorthand = f' ("{BACKBONE}" for all blocks not named)' if blocks else ""
        raise ArgumentError(
            f"lr names the groups {sorted(lr)}: expected a rate for each of {names}{shorthand}, or one number for all."
        )
    return {name: every[name] for name in names}


def set_lr(optimizer: Optimizer, lr: LearningRate) -> None:
    """Give every group its base learning rate, from which schedules start."""
    for rate, group in zip(find_lr(optimizer, lr).values(), optimizer.param_groups, strict=True):
        group["base_lr"] = group["scheduled_lr"] = group["lr"] = rate


def scale_lr(optimizer: Optimizer, factor: float) -> None:
    """Set every group's learning rate to its base times `factor`, unless a scheduler or a callback has changed it."""
    for group in optimizer.param_groups:
        if group["lr"] == group.get("scheduled_lr"):
            group["lr"] = group["scheduled_lr"] = group["base_lr"] * factor


def take_rates(optimizer: Optimizer) -> None:
    """Make learning rates that somebody wrote into the groups between two runs the base of the next."""
    for group in optimizer.param_groups:
        group["lr"] = positive("lr of the optimizer", float(group["lr"]), or_zero=True)  # it may be a tensor
        if group["lr"] != group.get("scheduled_lr"):
            group["base_lr"] = group["scheduled_lr"] = group["lr"]


def has_scheduler(optimizer: Optimizer) -> bool:
    """Return whether one of torch's schedulers has been built over an optimizer; `ReduceLROnPlateau` does not show."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")  # torch has no public name for this


def hold_parameters(optimizer: Optimizer, model: TransferModel) -> None:
    """Let the groups that `build_optimizer` made, and its state, follow a model whose layers were replaced or added."""
    blocks, groups = parameter_groups(model), optimizer.param_groups
    named = [group.get("name") for group in groups[: len(blocks)]] == list(blocks)
    from_torch = type(optimizer).__module__.startswith("torch.optim.")  # others may keep parameters elsewhere, too
    if named and from_torch and not isinstance(optimizer, torch.optim.Adagrad):  # it makes its state when it is built
        others = {id(parameter) for group in groups[len(blocks) :] for parameter in group["params"]}
        for group, parameters in zip(groups, blocks.values(), strict=False):
            group["params"] = [parameter for parameter in parameters if id(parameter) not in others]
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    check_held(optimizer, model, trainable)
    held = set(parameters_of(optimizer))
    for parameter in [key for key in optimizer.state if isinstance(key, torch.Tensor) and key not in held]:
        del optimizer.state[parameter]
    for group in groups if isinstance(optimizer, torch.optim.SGD) else []:  # fused, it refuses momentum of some alone
        with_momentum = [p for p in group["params"] if optimizer.state.get(p, {}).get("momentum_buffer") is not None]
        for parameter in group["params"] if with_momentum else []:
            if parameter.requires_grad and parameter not in set(with_momentum):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _check_step(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose step cannot be made from dense gradients alone."""
    _, *arguments = inspect.signature(type(optimizer).step).parameters.values()  # a scheduler wraps that of the object
    needs = "sparse gradients" if isinstance(optimizer, torch.optim.SparseAdam) else ""
    if any(a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD) for a in arguments):
        needs = "a closure that computes the loss again in each step"
    if needs:
        expected = "expected one that steps on dense gradients, such as torch.optim.AdamW"
        raise ArgumentError(f"optimizer {type(optimizer).__name__} needs {needs}: {expected}.")


def check_held(optimizer: Optimizer, model: TransferModel, trainable: Mapping[str, nn.Parameter]) -> None:
    """Raise `ArgumentError` for an optimizer that holds parameters of another model, or lacks one that trains."""
    own = {id(parameter) for parameter in model.parameters()}
    held = {id(parameter) for parameter in parameters_of(optimizer)}
    strangers = len(held - own)
    missing = [name for name, parameter in trainable.items() if id(parameter) not in held]
    if strangers or missing:
        names = f" ({', '.join(missing[:5])})" if missing else ""
        raise ArgumentError(
            f"the optimizer does not belong to the model: it holds {strangers} parameters of another model and lacks "
            f"{len(missing)} that train{names}. Build it over model.parameters() and assign it, "
            "trainer.optimizer = ..., or make a new Trainer with its class."
        )
