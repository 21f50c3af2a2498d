"""What the training images look like, so that images unlike them can be told."""

import torch
from torch import Tensor

from transferkit.linear.choice import assign_folds
from transferkit.linear.design import divisors, principal_axes
from transferkit.model.novelty import Novelty

AXES = 128  # principal axes of the features along which distances are taken
SHRINKAGE = 0.1  # share of a sphere in each covariance, so that few images are enough
FOLDS = 4


def learn_known(
    features: Tensor,
    targets: Tensor,
    *,
    rejected: float,
    held_out: Tensor | None = None,
    kinds: list[int] | None = None,
    seed: int = 0,
) -> Novelty:
    """Return the novelty of features `(N, D)` of training images, with targets int64 `(N,)`.

    Its threshold is exceeded by a share `rejected`, above 0 and below 1, of features `held_out`, of images that the
    model was not trained on. Without them, each quarter of the training images is measured by the other three. `kinds`
    are those of `divisors`.
    """
    known = _fit(features, targets, kinds)
    if held_out is None:
        folds = assign_folds(targets, FOLDS, seed=seed)
        kept = [folds != fold for fold in range(int(folds.max()) + 1)]
        scores = torch.cat([_fit(features[part], targets[part], kinds)(features[~part]) for part in kept])
    else:
        scores = known(held_out)
    known.threshold.fill_(scores.double().quantile(1 - rejected))
    return known


def _fit(features: Tensor, targets: Tensor, kinds: list[int] | None) -> Novelty:
    rows = features.flatten(1).double()
    mean = rows.mean(dim=0)
    std = divisors(mean, rows.std(dim=0, correction=0), kinds)
    rows = (rows - mean) / std
    axes, _ = principal_axes(lambda: [rows], (len(rows), len(mean)), most=AXES)
    along = rows @ axes
    present, place = torch.unique(targets, return_inverse=True)
    centres = torch.stack([along[place == index].mean(dim=0) for index in range(len(present))])
    known = Novelty(rows.shape[1], axes.shape[1], len(present))
    known.mean.copy_(mean)
    known.axes.copy_(axes / std[:, None])
    known.centres.copy_(centres)
    known.within.copy_(_whitening(along - centres[place]))
    known.overall.copy_(_whitening(along))
    return known


def _whitening(rows: Tensor) -> Tensor:
    """Return the matrix that makes the covariance of centered rows, with some of a sphere, the identity."""
    covariance = rows.T @ rows / len(rows)
    sphere = covariance.diagonal().mean().clamp_min(1e-12) * torch.eye(len(covariance), dtype=rows.dtype)
    factor: Tensor = torch.linalg.cholesky(torch.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * sphere))
    return factor
