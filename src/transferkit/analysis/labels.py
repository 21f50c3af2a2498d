"""Labels that are likely wrong, by the probabilities of a model that was not trained on them."""

import torch
from torch import Tensor


def label_probabilities(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the probability of each image's own label, `(N,)`: the lower, the more likely the label is wrong.

    Args:
        probabilities: `(N, K)`, each from a model that did not see the image.
        targets: int64 `(N,)`.
    """
    return probabilities.gather(1, targets[:, None]).squeeze(1)


def find_wrong_labels(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the images whose label is likely wrong, the likeliest first, int64.

    These are images that the model takes for another class, and as surely as it takes the images of that class for what
    they are.

    Args:
        probabilities: As in `label_probabilities`.
        targets: int64 `(N,)`.

    Example:
        >>> probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.95, 0.05]])
        >>> find_wrong_labels(probabilities, torch.tensor([0, 0, 1, 1]))
        tensor([3])

    References:
        Northcutt, Jiang and Chuang, 2021, "Confident Learning", arXiv:1911.00068.
    """
    own = label_probabilities(probabilities, targets)
    count = torch.bincount(targets, minlength=probabilities.shape[1])
    confidence = torch.zeros(probabilities.shape[1], dtype=own.dtype).index_add_(0, targets, own) / count.clamp_min(1)
    highest, guess = probabilities.max(dim=1)
    wrong = (guess != targets) & (highest >= confidence[guess])
    places = wrong.nonzero().squeeze(1)
    return places[own[places].argsort(stable=True)]


def exchange_labels(targets: Tensor, classes: int, *, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return targets of which some are exchanged for another class at random, and whether each is, bool `(N,)`."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(targets), generator=generator)[: max(1, round(fraction * len(targets)))]
    changed = targets.clone()
    changed[places] += torch.randint(1, classes, (len(places),), generator=generator)
    exchanged = torch.zeros(len(targets), dtype=torch.bool)
    exchanged[places] = True
    return changed % classes, exchanged
