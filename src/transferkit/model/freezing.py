"""Freeze the early layers of a network, so that training does not change a bit of them."""

from collections.abc import Collection, Mapping
from itertools import takewhile
from typing import TypeVar

import torch
from torch import Tensor, nn

from transferkit.base.calls import explained
from transferkit.errors import ArgumentError, UnknownLayerError, close_matches
from transferkit.model.backbone import Backbone

_Module = TypeVar("_Module", bound=nn.Module)
_Norm = nn.modules.batchnorm._NormBase

_PAST_LAST_LAYER = "(past the last layer)"  # the boundary that freezes everything; no module can have this name


class _StayInEval:
    """Replaces a frozen module's `train` method: `model.train()` leaves its batch norm and dropout in eval mode."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.mode = module.training  # the requested mode, which the module gets when it is unfrozen

    def __call__(self, mode: bool = True) -> nn.Module:  # noqa: FBT001, FBT002 - torch's signature
        self.mode = mode
        self.module.training = False
        for child in self.module.children():
            child.train(mode)
        return self.module


def _keep_statistics() -> None:
    """Replaces `reset_running_stats` of frozen batch norm: torch's `update_bn` resets what eval mode never refills."""


def _freeze(module: nn.Module) -> None:
    if not stays_in_eval(module):
        module.train = _StayInEval(module)  # type: ignore[method-assign] # its purpose
    module.training = False
    if isinstance(module, _Norm):
        module.reset_running_stats = _keep_statistics  # type: ignore[method-assign] # its purpose


@explained
def freeze_until(model: _Module, layer: str | None) -> _Module:
    """Freeze every layer before `layer`, in place, and return the model; `layer` and all layers after it train.

    Frozen parameters take no gradient, and frozen modules stay in eval mode even after `model.train()`: batch norm's
    statistics do not change and dropout is off. Layers that an earlier call froze and this one does not train again.
    A second call with the same `layer` changes nothing. Yosinski et al., 2014, arXiv:1411.1792, measured the effect.

    Args:
        model: A `Backbone`, a `TransferModel`, a module that contains a `Backbone`, or any module that registers its
            modules (`model.named_modules()`) in forward order.
        layer: A block (`"block5"`), a layer (`"block4_conv2"`), a module name (`"features.24"`), `"head"` (freezes
            the whole backbone), or None (freezes nothing).

    Raises:
        UnknownLayerError: `model` has no such layer. The message lists close matches.
        ArgumentError: `model` is not a module.

    Example:
        >>> from transferkit import load_backbone
        >>> backbone = freeze_until(load_backbone(weights=None), "block2")  # block 1 has 1,792 + 36,928
        >>> sum(p.numel() for p in backbone.parameters() if not p.requires_grad)
        38720
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}: write freeze_until(model, 'head').")
    trainable = parameters_from(model, layer)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in trainable)
            parameter.grad = parameter.grad if name in trainable else None  # or an optimizer would still apply it
    boundary = find_boundary(model, layer)
    before = set(_modules_before(model, boundary))
    if boundary != _PAST_LAST_LAYER:  # what contains the boundary must follow model.train()
        before -= {name for name in before if f"{boundary}.".startswith(f"{name}." if name else "")}
    freeze_modules(model, before)
    return model


def freeze_modules(model: nn.Module, names: Collection[str]) -> None:
    """Let exactly these modules stay in eval mode, whatever mode is asked for; parameters are left alone."""
    for name, module in model.named_modules():
        replaced = module.__dict__.get("train")
        if name in names:
            _freeze(module)
        elif isinstance(replaced, _StayInEval):
            del module.train
            module.__dict__.pop("reset_running_stats", None)
            module.training = replaced.mode


def parameters_from(model: nn.Module, layer: str | None) -> dict[str, nn.Parameter]:
    """Return the parameters that train after `freeze_until(model, layer)`, by name."""
    before = _modules_before(model, find_boundary(model, layer))
    # A parameter shared by a frozen and a trainable module is frozen: the frozen part must not change.
    frozen = {id(p) for module in before.values() for p in module.parameters(recurse=False)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in frozen}


def freeze_statistics(model: nn.Module) -> list[str]:
    """Freeze batch norm whose parameters are all frozen, by hand or before a conversion, and return the names.

    Batch norm without parameters counts as frozen where it lies in a `Backbone` before the first trainable layer.
    """
    modules = dict(model.named_modules())
    early = list(modules.values())[: list(modules).index(first_trainable_module(model) or "")]
    backbones = [part for backbone in early if isinstance(backbone, Backbone) for part in backbone.modules()]
    found = []
    for name, module in modules.items():
        if not isinstance(module, _Norm) or not module.track_running_stats or stays_in_eval(module):
            continue
        own = list(module.parameters(recurse=False))
        if not any(p.requires_grad for p in own) and (own or (module in early and module in backbones)):
            _freeze(module)
            found.append(name)
    return found


def stays_in_eval(module: nn.Module) -> bool:
    """Return whether `freeze_until` froze a module."""
    return isinstance(module.__dict__.get("train"), _StayInEval)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights and buffers that training changes, by name, not copied."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, module in model.named_modules():
        if stays_in_eval(module):
            frozen.update(f"{name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False))
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def write_values(values: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    """Copy values over those that a model has, `live`, such as its state dict; others stay."""
    with torch.no_grad():
        for name, value in values.items():
            live[name].copy_(value)


def first_trainable(model: nn.Module) -> str | None:
    """Return the name of the first layer that trains, in a `Backbone` its block name; None if nothing trains."""
    names = {qualified: alias for alias, qualified in reversed(_aliases(model).items()) if "_" in alias}
    first = first_trainable_module(model)
    return None if first is None else str(names.get(first, first))


def first_trainable_module(model: nn.Module) -> str | None:
    """Return the name of the first module with a trainable parameter of its own; None if there is none."""
    own = ((name, module.parameters(recurse=False)) for name, module in model.named_modules())
    return next((name for name, parameters in own if any(p.requires_grad for p in parameters)), None)


def describe_frozen(model: nn.Module) -> str:
    """Return one line with the numbers of frozen and trainable parameters, and where training begins."""
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    before = f" before {first_trainable(model)}" if trainable else ""
    part = f"{frozen:,} parameters{before}" if frozen else "nothing"
    return f"frozen: {part}; training: {trainable:,} parameters"


def find_boundary(model: nn.Module, layer: str | None) -> str | None:
    """Return the name of the module at which `freeze_until(model, layer)` cuts; None for None."""
    if layer is None:
        return None
    aliases = _aliases(model)
    known: dict[str, str] = aliases | {n: n for n, _ in model.named_modules() if n and n not in aliases}
    if isinstance(layer, str) and layer in known:
        return known[layer]
    blocks_first = sorted(known, key=lambda name: "_" in name or "." in name)  # most users mean these
    raise UnknownLayerError(
        f"cannot freeze until layer {layer!r}: {type(model).__name__} has no such layer. "
        f"{close_matches(layer, blocks_first)} None freezes nothing."
    )


def _aliases(model: nn.Module) -> dict[str, str]:
    """Map the block and layer names of each backbone inside `model` to the names of its modules."""
    aliases: dict[str, str] = {}
    for prefix, backbone in model.named_modules():
        if not isinstance(backbone, Backbone):
            continue
        dot = f"{prefix}." if prefix else ""
        for index, name in enumerate(backbone.layer_names):
            aliases.setdefault(name.split("_")[0], f"{dot}features.{index}")
            aliases[name] = f"{dot}features.{index}"
        if prefix:  # "features.24" for "backbone.features.24"
            aliases.update({name: dot + name for name, _ in backbone.named_modules() if name})
        else:
            aliases["head"] = _PAST_LAST_LAYER
    return aliases


def _modules_before(model: nn.Module, boundary: str | None) -> dict[str, nn.Module]:
    """Return the modules registered before `boundary` by name, those that contain it included."""
    modules = dict(model.named_modules())
    if boundary == _PAST_LAST_LAYER:
        return modules
    return {} if boundary is None else dict(takewhile(lambda item: item[0] != boundary, modules.items()))
