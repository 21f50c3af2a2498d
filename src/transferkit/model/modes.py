"""Training and eval mode, module by module."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from transferkit.model.freezing import stand_ins


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Let modes be changed inside, and give each module back the mode it had.

    `model.train(was_training)` would not do: it puts a layer that the user set to eval mode back into training mode.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
        >>> with modes_kept(model):
        ...     _ = model.eval()
        >>> [module.training for module in model]
        [False, True]
    """
    modes = [(module, module.training) for module in model.modules()]
    asked = [(stand_in, stand_in.mode) for stand_in in stand_ins(model)]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for stand_in, mode in asked:
            stand_in.mode = mode
