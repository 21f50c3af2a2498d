"""Standardized features as what maps weights to logits, with an estimate of how its logistic regressions curve."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from transferkit.base.randomness import derive_seed, shuffled
from transferkit.errors import NonFiniteError
from transferkit.linear.table import Table

LARGEST_PRODUCTS = 4096
"""Most rows whose inner products are taken in place of the features, where there are more features than rows."""

_AXES = 128  # principal axes: along these features vary most, and the Hessian is largest
_READINGS = 3  # products with the covariance that find them
_CONSTANT = 1e-5  # a column whose standard deviation is a smaller fraction of its mean is constant but for rounding
_JITTER = 1e-9  # added to the inner products, as a fraction of their mean square: they have a Cholesky factor then


@dataclass(frozen=True, eq=False)
class Design:
    """What maps weights to logits: standardized rows and a column of ones, with a weight for each column.

    Where there are more features than rows, the rows are replaced by the Cholesky factor of their inner products. It
    has the same inner products, so the optimum is the same, and its size does not depend on the number of features.

    Of a table larger than memory the design has some rows, drawn at random.
    """

    table: Table  # all rows
    sample: Tensor  # which rows of the table the design has, int64, ascending
    mean: Tensor  # of each feature, float32 (D,)
    std: Tensor  # what each feature is divided by, float32 (D,); see `divisors`
    rows: Tensor  # the rows, or their factor, with the column of ones, float32 (N, A + 1)
    factor: Tensor | None  # the factor, float64 (N, N); None if the columns are the features
    axes: Tensor  # principal axes of the rows, (A + 1, R); the last is the column of ones
    variances: Tensor  # of the rows along each axis, (R,)
    rest: Tensor  # upper bound of the variance along every other axis, ()

    def blocks(self, *, every: bool) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows with the column of ones, and their place: those in memory, or every row of the table."""
        if every:
            for rows, block in placed(standardized(self.table, self.mean, self.std)):
                yield rows, pad(block, (0, 1), value=1)
        else:
            yield slice(0, len(self.rows)), self.rows

    def precondition(self, gradient: Tensor, curvature: Tensor, penalty: float) -> Tensor:
        """Return the gradients `(P, K, A + 1)` of problems divided by an estimate of their Hessians.

        `curvature` is that of each problem's loss in its logits, `(P,)`.

        References:
            Frangella, Tropp and Udell, 2023, "Randomized Nyström Preconditioning".
        """
        curvature = curvature[:, None, None]
        penalties = torch.full_like(self.variances, penalty)
        penalties[-1] = 0  # biases are not penalized
        variances = curvature * self.variances + penalties
        rest = curvature * self.rest + penalty
        along = gradient @ self.axes
        return gradient / rest + (along * (1 / variances - 1 / rest)) @ self.axes.T

    def on_features(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights `(M, A + 1)` as weights on the standardized features `(M, D)` and biases `(M,)`."""
        own, bias = weights[:, :-1], weights[:, -1]
        if self.factor is not None:
            by_row = torch.linalg.solve_triangular(self.factor.T, own.T.double(), upper=True)
            blocks = placed(standardized(self.table, self.mean, self.std))
            own = sum((by_row.T[:, rows].float() @ block for rows, block in blocks), torch.zeros_like(bias)[:, None])
        return own, bias


def standardized(table: Table, mean: Tensor, std: Tensor) -> Iterator[Tensor]:
    """Yield the rows of a table in blocks, less the mean and divided by `std`."""
    for block in table.blocks():
        yield (block - mean) / std


def moments(table: Table, *, take: Callable[[slice, Tensor], None] | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean of each feature and its divisor, float32 `(D,)`; `NonFiniteError` if a feature is not finite.

    Reads the table once. `take` gets each block, and the place of its rows.
    """
    total = square = torch.zeros(table.shape[1], dtype=torch.float64, device=table.device)
    for rows, block in placed(table.blocks()):
        if take is not None:
            take(rows, block)
        exact = block.double()
        total, square = total + exact.sum(dim=0), square + exact.square().sum(dim=0)
        if not bool(square.isfinite().all()):  # host sync: once a block
            row = rows.start + int((~block.isfinite().all(dim=1)).nonzero()[0])
            raise NonFiniteError(
                f"the features of row {row} are not finite: expected numbers. Look at this image, and at the weights "
                "and the precision of the frozen layers."
            )
    mean = total / table.shape[0]
    std = (square / table.shape[0] - mean.square()).clamp_min(0).sqrt()
    return mean.float(), divisors(mean, std, table.kinds).float()


def divisors(mean: Tensor, std: Tensor, kinds: list[int] | None) -> Tensor:
    """Return what features are divided by: their standard deviation, or the median one of their kind if that is more.

    A feature that hardly varies among the training images may vary among others, and must not drown the rest there.
    `kinds` tells how many features of one kind lie side by side, such as the means of one layer's channels; None
    compares none with each other, and divides what is constant by 1.

    Example:
        >>> divisors(torch.ones(4), torch.tensor([2.0, 4.0, 0.0, 0.0]), [3, 1])
        tensor([2., 4., 2., 1.])
    """
    varies = std > (_CONSTANT * mean.abs()).clamp_min(1e-30)
    if kinds is None:
        return torch.where(varies, std, 1)
    floors = [
        (own[moving].median() if bool(moving.any()) else own.new_ones(())).expand(len(own))
        for own, moving in zip(torch.split(std, kinds), torch.split(varies, kinds), strict=True)
    ]
    return torch.maximum(std, torch.cat(floors))


def design_of(table: Table, *, seed: int = 0) -> Design:
    """Standardize a table, and take its rows to memory: all, or as many as fit there as float32, drawn by the seed.

    Reads the table once, or a few times where there are more features than rows. Errors are those of `moments`.
    """
    count, width = table.shape
    if count < width and count <= LARGEST_PRODUCTS:
        mean, std = moments(table)
        sample = torch.arange(count, device=table.device)
        factor = _factor(table, mean, std)
        rows = pad(factor.float(), (0, 1), value=1)
    else:
        factor = None
        sample = shuffled(count, derive_seed(seed, "sample"))[: table.rows_in_memory()].sort().values.to(table.device)
        rows = torch.ones(len(sample), width + 1, device=table.device)

        def take(places: slice, block: Tensor) -> None:
            own = (sample >= places.start) & (sample < places.stop)
            rows[own, :-1] = block[sample[own] - places.start]

        mean, std = moments(table, take=take)
        rows[:, :-1].sub_(mean).div_(std)
    axes, variances = principal_axes(lambda: [rows[:, :-1]], (len(rows), rows.shape[1] - 1), most=_AXES)
    rest = torch.maximum(variances[0], variances[-1] / 1000)  # a larger quotient would be lost to rounding
    axes = pad(axes, (0, 1, 0, 1))
    axes[-1, -1] = 1
    return Design(table, sample, mean, std, rows, factor, axes, torch.cat([variances, variances.new_ones(1)]), rest)


def placed(blocks: Iterable[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows, each with its place among all rows."""
    start = 0
    for block in blocks:
        yield slice(start, start + len(block)), block
        start += len(block)


def _factor(table: Table, mean: Tensor, std: Tensor) -> Tensor:
    """Return the Cholesky factor of the inner products of all standardized rows, float64 `(N, N)`."""
    count = table.shape[0]
    products = torch.zeros(count, count, dtype=torch.float64, device=table.device)
    for rows, block in placed(standardized(table, mean, std)):
        exact = block.double()
        for columns, other in placed(standardized(table, mean, std)):
            products[rows, columns] = exact @ other.double().T
            if columns.stop >= rows.stop:
                break  # above the diagonal nothing is needed
    products.diagonal().add_((_JITTER * products.diagonal().mean()).clamp_min(1e-12))
    factor: Tensor = torch.linalg.cholesky(products)
    return factor


def principal_axes(
    blocks: Callable[[], Iterable[Tensor]], shape: tuple[int, int], *, most: int
) -> tuple[Tensor, Tensor]:
    """Return axes `(D, R)` along which centered rows `(N, D)` vary most, and the variances along them, rising, `(R,)`.

    `blocks` returns the rows from the first to the last each time it is called: three times.

    Example:
        >>> rows = torch.tensor([[3.0, 0.0], [-3.0, 0.0]])
        >>> axes, variances = principal_axes(lambda: [rows], (2, 2), most=1)
        >>> (rows @ axes).abs().T, variances
        (tensor([[3., 3.]]), tensor([9.]))

    References:
        Halko, Martinsson and Tropp, 2011, "Finding structure with randomness": subspace iteration.
    """
    count, width = shape
    product = torch.randn(width, min(most, *shape), generator=torch.Generator().manual_seed(0))
    for _ in range(_READINGS):
        axes = torch.linalg.qr(product)[0]
        product = torch.zeros_like(product)
        for block in blocks():
            axes, product = axes.to(block), product.to(block)
            product += block.T @ (block @ axes)
    variances, turns = torch.linalg.eigh((axes.T @ product).double() / count)
    return axes @ turns.to(axes), variances.clamp_min(0).to(axes)
