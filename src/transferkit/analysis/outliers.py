"""Which of many numbers or features are unlike the rest."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from transferkit.base.randomness import seeded

FAR = 3.5
"""Robust standard deviations from the median beyond which a number is unlike the rest (Iglewicz and Hoaglin, 1993)."""

NEIGHBOURS = 10

_BLOCK_NUMBERS = 2**24  # of similarities that are held at a time


def unlike(values: Tensor, *, spread: float = 0.0) -> Tensor:
    """Return how many robust standard deviations each number is from the median, with its sign, float64 `(N,)`.

    Args:
        values: `(N,)`.
        spread: Least standard deviation to divide by: a difference that nobody would notice.

    Example:
        >>> unlike(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 99.0]), spread=0.1).round()
        tensor([-1., -1., -0.,  0.,  1., 43.], dtype=torch.float64)
    """
    values = values.double()
    middle = values.quantile(0.5)
    deviation = 1.4826 * (values - middle).abs().quantile(0.5)  # that of a normal distribution
    return (values - middle) / deviation.clamp_min(max(spread, 1e-12))


def principal(rows: Tensor, axes: int) -> Tensor:
    """Return centred rows `(N, D)` along their principal axes, `(N, min(axes, D, N))`.

    Example:
        >>> principal(torch.tensor([[3.0, 0.0], [-3.0, 0.0]]), 1).abs()
        tensor([[3.],
                [3.]])
    """
    rows = rows - rows.mean(dim=0)
    count = min(axes, *rows.shape)
    with seeded(0):
        _, _, turns = torch.svd_lowrank(rows, q=count, niter=2)
    return rows @ turns


def distances(features: Tensor) -> Tensor:
    """Return how far each row is from its nearest others: 1 less the mean cosine with 10 of them, float32 `(N,)`.

    Args:
        features: Centred rows `(N, D)`. All pairs are compared, in `2 D N^2` operations.
    """
    rows = normalize(features.float(), dim=1)
    count = len(rows)
    if count < 2:
        return torch.zeros(count)
    size = max(1, _BLOCK_NUMBERS // count)
    found = []
    for start in range(0, count, size):
        cosines = rows[start : start + size] @ rows.T
        here = torch.arange(len(cosines))
        cosines[here, start + here] = -1.0  # not itself
        found.append(1 - cosines.topk(min(NEIGHBOURS, count - 1), dim=1).values.mean(dim=1))
    return torch.cat(found)


def nearest(features: Tensor, queries: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """Return the rows nearest to each query by cosine: their indices, int64 `(Q, count)`, and the cosines.

    Args:
        features: Centred rows `(N, D)`.
        queries: `(Q, D)`, less the same mean.
        count: 1 to N.

    Example:
        >>> nearest(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.1, 2.0]]), count=1)[0]
        tensor([[1]])
    """
    cosines, indices = (normalize(queries.float(), dim=1) @ normalize(features.float(), dim=1).T).topk(count, dim=1)
    return indices, cosines
