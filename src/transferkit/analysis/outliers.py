"""Which of many numbers or features are unlike the rest."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

FAR = 3.5
"""Robust standard deviations from the median beyond which a number is unlike the rest (Iglewicz and Hoaglin, 1993)."""

NEIGHBOURS = 10


def unlike(values: Tensor, *, spread: float = 0.0) -> Tensor:
    """Return how many robust standard deviations each number is from the median, with its sign, float64 `(N,)`.

    A standard deviation below `spread` would be a difference that nobody notices; `spread` then takes its place.

    Example:
        >>> unlike(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 99.0]), spread=0.1).round()
        tensor([-1., -1., -0.,  0.,  1., 43.], dtype=torch.float64)
    """
    values = values.double()
    middle = values.quantile(0.5)
    deviation = 1.4826 * (values - middle).abs().quantile(0.5)  # that of a normal distribution
    return (values - middle) / deviation.clamp_min(max(spread, 1e-12))


def distances(features: Tensor) -> Tensor:
    """Return how far each centered row is from the nearest 10, float32 `(N,)`: 1 less the mean cosine."""
    rows = normalize(features.float(), dim=1)
    count = min(NEIGHBOURS, len(rows) - 1)
    found = []
    for places in torch.split(torch.arange(len(rows)), max(1, 2**24 // len(rows))):  # similarities held at a time
        cosines = rows[places] @ rows.T
        cosines[torch.arange(len(places)), places] = -1.0  # not itself
        found.append(1 - cosines.topk(count, dim=1).values.mean(dim=1))
    return torch.cat(found) if count else torch.zeros(len(rows))


def nearest(features: Tensor, queries: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the `count` centered rows nearest to each query, int64 `(Q, count)`, and their cosines."""
    cosines, indices = (normalize(queries.float(), dim=1) @ normalize(features.float(), dim=1).T).topk(count, dim=1)
    return indices, cosines
