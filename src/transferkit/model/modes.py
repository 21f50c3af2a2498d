"""Training and eval mode, module by module, and which thread uses a model."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from transferkit.errors import ModelInUseError
from transferkit.model.freezing import stays_in_eval


@dataclass(slots=True)
class _Use:
    evaluated_by: list[int] = field(default_factory=list)  # threads; once for each of their nested blocks
    mode: bool = False  # whether it was in training mode before the first of them
    changed_by: list[int] = field(default_factory=list)  # the thread that trains it, once for each nested block


_CONDITION = threading.Condition()  # one for all models, because models share modules
_USES: dict[nn.Module, _Use] = {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in eval mode while any number of threads evaluate it; then each module has its own mode back."""
    me, modules = threading.get_ident(), list(model.modules())
    with _CONDITION:
        for use, module in zip(_uses(modules, me), modules, strict=True):
            if not use.evaluated_by:
                use.mode = module.training
            use.evaluated_by.append(me)
            module.training = False
    try:
        yield
    finally:
        with _CONDITION:
            for module in modules:
                use = _USES[module]
                use.evaluated_by.remove(me)
                if not use.evaluated_by:
                    module.training = use.mode
            _forget(modules)


@contextmanager
def changing(model: nn.Module) -> Iterator[None]:
    """Let this thread alone use a model, but for what is frozen, once others that evaluate it are done."""
    me = threading.get_ident()
    modules = [module for module in model.modules() if module is model or not stays_in_eval(module)]
    with _CONDITION:
        uses = _uses(modules, me)
        for use in uses:
            use.changed_by.append(me)
    try:
        with _CONDITION:
            _CONDITION.wait_for(lambda: all(thread == me for use in uses for thread in use.evaluated_by))
        yield
    finally:
        with _CONDITION:
            for use in uses:
                use.changed_by.remove(me)
            _forget(modules)


def _uses(modules: list[nn.Module], me: int) -> list[_Use]:
    if any(thread != me for module in modules if module in _USES for thread in _USES[module].changed_by):
        raise ModelInUseError(
            "another thread trains this model or loads weights into it. Wait until that is done, or use a copy made "
            "before, Trainer(copy.deepcopy(model))."
        )
    return [_USES.setdefault(module, _Use()) for module in modules]


def _forget(modules: list[nn.Module]) -> None:
    for module in modules:
        if not _USES[module].evaluated_by and not _USES[module].changed_by:
            del _USES[module]
    _CONDITION.notify_all()


def begin_training(model: Any) -> None:
    """Put a model into training mode, except the layers that its user put into eval mode while the rest trained."""
    modules = dict(model.named_modules())
    if model.training:  # or they are all in eval mode, and nobody chose
        parents = {name: modules[name.rpartition(".")[0]] for name in modules if name}
        model.kept_in_eval = tuple(
            name
            for name, parent in parents.items()
            if parent.training and not modules[name].training and not stays_in_eval(modules[name])
        )
    model.train()
    for name in getattr(model, "kept_in_eval", ()):
        if name in modules:
            modules[name].eval()


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Let modes be changed inside, and give each module back the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    asked = [(vars(module)["train"], vars(module)["train"].mode) for module, _ in modes if stays_in_eval(module)]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for stand_in, mode in asked:
            stand_in.mode = mode
