"""How unlike the training images an image is, by the features that its head takes."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import Self


class Novelty(nn.Module):
    """The relative Mahalanobis distance: how far features are from the nearest class, less how far they are from all.

    Ren et al., 2021, arXiv:2106.09022. `Trainer.learn_known` fits it to training images.
    """

    def __init__(self, num_features: int, num_axes: int, num_classes: int) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(num_features))  # of the training features
        self.axes = nn.Buffer(torch.zeros(num_features, num_axes))  # principal ones, over their standard deviations
        self.centres = nn.Buffer(torch.zeros(num_classes, num_axes))  # mean of each class along the axes
        self.within = nn.Buffer(torch.zeros(num_axes, num_axes))  # whitens differences from a class's centre
        self.overall = nn.Buffer(torch.zeros(num_axes, num_axes))  # whitens differences from the mean of all
        self.threshold = nn.Buffer(torch.zeros(()))  # distance above which an image is unknown

    def forward(self, features: Tensor) -> Tensor:
        """Return how unlike the training images features `(N, D)` are, float32 `(N,)`: above 0 it is unknown."""
        along = (features.flatten(1).float() - self.mean) @ self.axes
        white, centres = along @ self.within, self.centres @ self.within
        near = (white[:, None] - centres).square().sum(dim=2).min(dim=1).values
        return near - (along @ self.overall).square().sum(dim=1) - self.threshold

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Build one with the sizes of saved buffers, and load them; `ValueError` if they do not fit each other."""
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        if set(shapes) != set(cls(1, 1, 1).state_dict()) or len(shapes["axes"]) != 2 or len(shapes["centres"]) != 2:
            raise ValueError("expected mean, axes, centres, within, overall and threshold")
        novelty = cls(*shapes["axes"], shapes["centres"][0])
        wrong = [name for name, value in novelty.state_dict().items() if value.shape != shapes[name]]
        if wrong or not all(bool(value.isfinite().all()) for value in state.values()):
            raise ValueError(f"wrong shapes, or numbers that are not finite, in {', '.join(wrong) or 'its buffers'}")
        novelty.load_state_dict(dict(state))
        return novelty
