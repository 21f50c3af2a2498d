"""How unlike the training images an image is, by the features that its head takes."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import Self


class Novelty(nn.Module):
    """The relative Mahalanobis distance: how far features are from the nearest class, less how far they are from all.

    Ren et al., 2021, arXiv:2106.09022. `Trainer.learn_known` fits it to training images. D features are projected on R
    axes, for K classes.

    Attributes:
        mean: Of the training features, float32 `(D,)`.
        axes: Principal axes of the standardized features, divided by their standard deviations, `(D, R)`.
        centres: Mean of each class along the axes, `(K, R)`.
        within: What whitens differences from a class's centre, `(R, R)`.
        overall: What whitens differences from the mean of all, `(R, R)`.
        threshold: Distance above which an image is unknown, `()`.
    """

    mean: Tensor
    axes: Tensor
    centres: Tensor
    within: Tensor
    overall: Tensor
    threshold: Tensor

    def __init__(self, num_features: int, num_axes: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("axes", torch.zeros(num_features, num_axes))
        self.register_buffer("centres", torch.zeros(num_classes, num_axes))
        self.register_buffer("within", torch.zeros(num_axes, num_axes))
        self.register_buffer("overall", torch.zeros(num_axes, num_axes))
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        """Return the distance of each row of features `(N, D)` or `(N, C, h, w)`, less the threshold, float32 `(N,)`.

        Above 0 it counts as unknown.
        """
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
