"""Labels that are likely wrong, by the probabilities of a model that was not trained on them."""

import torch
from torch import Tensor


def label_probabilities(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the probability `(N,)` of each image's own label: the lower, the more likely the label is wrong."""
    return probabilities.gather(1, targets[:, None]).squeeze(1)


def find_wrong_labels(probabilities: Tensor, targets: Tensor, limit: float) -> Tensor:
    """Return the images that are taken for another class, their own label at most as probable as `limit`, int64.

    The likeliest to be wrong come first. Probabilities are `(N, K)`, of a model that did not see them.
    """
    own = label_probabilities(probabilities, targets)
    places = ((probabilities.argmax(dim=1) != targets) & (own <= limit)).nonzero().squeeze(1)
    return places[own[places].argsort(stable=True)]


def find_limit(own: Tensor, exchanged: Tensor) -> float:
    """Return the probability of the own label up to which at least half the labels were exchanged on purpose."""
    order = own.argsort(stable=True)
    share = exchanged[order].double().cumsum(0) / torch.arange(1, len(own) + 1)
    enough = (share >= 0.5).nonzero()
    return float(own[order[enough[-1, 0]]]) if len(enough) else 0.0


def exchange_labels(targets: Tensor, classes: int, *, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return targets with some changed to another class at random, and which were changed, bool `(N,)`."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(targets), generator=generator)[: max(1, round(fraction * len(targets)))]
    changed = targets.clone()
    changed[places] += torch.randint(1, classes, (len(places),), generator=generator)
    return changed % classes, changed != targets
