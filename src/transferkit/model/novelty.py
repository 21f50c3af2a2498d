"""How unlike the training images an image is, by the features that its head takes."""

import torch
from torch import Tensor, nn
from typing_extensions import Self

AXES = 128
"""Principal axes of the features along which distances are taken."""

SHRINKAGE = 0.1
"""Share of a sphere in each covariance, so that few images are enough."""


class Novelty(nn.Module):
    """The relative Mahalanobis distance: how far features are from the nearest class, less how far they are from all.

    `Trainer.learn_known` fits it to training images. What is farther than the threshold counts as unknown.

    Args:
        num_features: D.
        num_axes: R.
        num_classes: K.

    Attributes:
        mean: Of the training features, float32 `(D,)`.
        axes: Principal axes of the standardised features, divided by their standard deviations, `(D, R)`.
        centres: Mean of each class along the axes, `(K, R)`.
        within: What whitens differences from a class's centre, `(R, R)`.
        overall: What whitens differences from the mean of all, `(R, R)`.
        threshold: Distance above which an image is unknown, `()`.

    References:
        Ren et al., 2021, "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", arXiv:2106.09022.
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
        """Return the distance of each row of features `(N, D)` or `(N, C, h, w)`, float32 `(N,)`."""
        along = (features.flatten(1).float() - self.mean) @ self.axes
        white, centres = along @ self.within, self.centres @ self.within
        near = (white[:, None] - centres).square().sum(dim=2).min(dim=1).values
        return near - (along @ self.overall).square().sum(dim=1)

    @classmethod
    def fit(cls, features: Tensor, targets: Tensor, classes: int) -> Self:
        """Fit it to features `(N, D)` of training images and their class indices `(N,)`; the threshold is infinite.

        Example:
            >>> features = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]])
            >>> novelty = Novelty.fit(features, torch.tensor([0, 0, 1, 1]), 2)
            >>> near, between = novelty(torch.tensor([[9.0, 0.5], [4.5, 0.5]]))
            >>> bool(near < between)
            True
        """
        rows = features.flatten(1).double()
        mean, std = rows.mean(dim=0), rows.std(dim=0, correction=0)
        std = std.clamp_min(std[std > 0].median() if bool((std > 0).any()) else 1.0)
        rows = (rows - mean) / std
        generator = torch.Generator().manual_seed(0)
        turns = _principal_axes(rows, min(AXES, *rows.shape), generator)
        along = rows @ turns
        present = [index for index in range(classes) if bool((targets == index).any())]
        own = torch.stack([along[targets == index].mean(dim=0) for index in present])
        place = torch.tensor([present.index(index) for index in targets.tolist()])
        novelty = cls(rows.shape[1], turns.shape[1], len(present))
        with torch.no_grad():
            novelty.mean.copy_(mean)
            novelty.axes.copy_(turns / std[:, None])
            novelty.centres.copy_(own)
            novelty.within.copy_(_whitening(along - own[place]))
            novelty.overall.copy_(_whitening(along))
            novelty.threshold.fill_(torch.inf)
        return novelty


def _principal_axes(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return the principal axes of centred rows `(N, D)`, `(D, count)`, by subspace iteration."""
    axes = torch.randn(rows.shape[1], count, generator=generator, dtype=rows.dtype)
    for _ in range(3):
        axes = torch.linalg.qr(rows.T @ (rows @ axes))[0]
    return axes


def _whitening(rows: Tensor) -> Tensor:
    """Return the matrix that makes the covariance of centred rows, with some of a sphere, the identity."""
    covariance = rows.T @ rows / len(rows)
    size = len(covariance)
    sphere = (covariance.trace() / size).clamp_min(1e-12) * torch.eye(size, dtype=rows.dtype)
    factor: Tensor = torch.linalg.cholesky(torch.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * sphere))
    return factor
