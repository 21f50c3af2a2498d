"""The weights of the best epoch so far."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from transferkit.freezing import trainable_state


class BestWeights:
    """Remembers what training changes of a model, as it was at one moment, in memory taken once.

    What is frozen is not copied: it stays as it is. Where more begins to train later, `before_training` copies it
    while it still is what it was.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> best = BestWeights(layer)
        >>> best.take()
        >>> _ = layer.weight.data.zero_()
        >>> best.restore()
        >>> bool(layer.weight.any())
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._copies: dict[str, Tensor] | None = None

    def take(self) -> None:
        """Copy the weights as they are now, in place of those copied before."""
        live = trainable_state(self.model)
        copies = {} if self._copies is None else self._copies
        self._copies = {
            name: copies[name].copy_(value) if name in copies else value.clone() for name, value in live.items()
        }

    def before_training(self) -> None:
        """Copy what was frozen when the weights were taken and is no longer."""
        if self._copies is not None:
            for name, value in trainable_state(self.model).items():
                if name not in self._copies:
                    self._copies[name] = value.clone()

    def state(self) -> dict[str, Tensor] | None:
        """Return the weights that were taken, which are not copies; None if none were."""
        return self._copies

    def load(self, copies: Mapping[str, Tensor] | None) -> None:
        """Take over what `state` returned in another process."""
        live = self.model.state_dict()
        self._copies = None if copies is None else {name: copy.to(live[name].device) for name, copy in copies.items()}

    def restore(self) -> None:
        """Put the weights back, if any were taken."""
        if self._copies is not None:
            live = self.model.state_dict()
            with torch.no_grad():
                for name, copy in self._copies.items():
                    live[name].copy_(copy)
