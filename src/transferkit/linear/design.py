"""Standardized features as what maps weights to logits, with an estimate of how its logistic regressions curve."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

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

    Attributes:
        table: The rows.
        mean: Of each feature, float32 `(D,)`.
        std: What each feature is divided by, float32 `(D,)`; see `divisors`.
        rows: The rows, or their factor, with the column of ones, float32 `(N, A + 1)`; None if they do not fit in
            memory and are read again in each pass.
        factor: The factor, float64 `(N, N)`; None if the columns are the features.
        axes: Principal axes of the rows, `(A + 1, R)`; the last is the column of ones.
        variances: Of the rows along each axis, `(R,)`.
        rest: Upper bound of the variance along every other axis, `()`.
    """

    table: Table
    mean: Tensor
    std: Tensor
    rows: Tensor | None
    factor: Tensor | None
    axes: Tensor
    variances: Tensor
    rest: Tensor

    def logits(self, weights: Tensor) -> Tensor:
        """Return the logits `(N, M)` of weights `(M, A + 1)`. Rows that are not in memory are read once."""
        if self.rows is not None:
            return self.rows @ weights.T
        return torch.cat([torch.addmm(weights[:, -1], block, weights[:, :-1].T) for block in self._blocks()])

    def gradient(self, slopes: Tensor) -> Tensor:
        """Return the gradient `(M, A + 1)` that follows from the slopes `(N, M)` of the logits, at the same cost."""
        if self.rows is not None:
            return slopes.T @ self.rows
        return torch.cat([_combined(slopes.T, self._blocks()), slopes.sum(dim=0)[:, None]], dim=1)

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
            own = _combined(by_row.T.float(), self._blocks())
        return own, bias

    def _blocks(self) -> Iterator[Tensor]:
        return standardised(self.table, self.mean, self.std)


def standardised(table: Table, mean: Tensor, std: Tensor) -> Iterator[Tensor]:
    """Yield the rows of a table in blocks, less the mean and divided by `std`."""
    for block in table.blocks():
        yield (block - mean) / std


def moments(table: Table) -> tuple[Tensor, Tensor]:
    """Return the mean of each feature and its divisor, float32 `(D,)`. Reads the table once.

    Raises:
        NonFiniteError: When a feature is infinite or NaN.
    """
    total = square = torch.zeros(table.shape[1], dtype=torch.float64, device=table.device)
    for rows, block in _placed(table.blocks()):
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


def design_of(table: Table) -> Design:
    """Standardize a table, and take its rows to memory if they fit there as float32.

    Raises:
        NonFiniteError: When a feature is infinite or NaN.
    """
    mean, std = moments(table)
    count, width = table.shape
    rows = factor = None
    if count < width and count <= LARGEST_PRODUCTS:
        factor = _factor(table, mean, std)
        rows = pad(factor.float(), (0, 1), value=1)
    elif table.fits_in_memory():
        rows = torch.ones(count, width + 1, device=table.device)
        for places, block in _placed(standardised(table, mean, std)):
            rows[places, :-1] = block

    def blocks() -> Iterable[Tensor]:
        return standardised(table, mean, std) if rows is None else [rows[:, :-1]]

    axes, variances = principal_axes(blocks, (count, width if factor is None else count), most=_AXES)
    rest = torch.maximum(variances[0], variances[-1] / 1000)  # a larger quotient would be lost to rounding
    axes = pad(axes, (0, 1, 0, 1))
    axes[-1, -1] = 1
    return Design(table, mean, std, rows, factor, axes, torch.cat([variances, variances.new_ones(1)]), rest)


def _placed(blocks: Iterable[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows, each with its place among all rows."""
    start = 0
    for block in blocks:
        yield slice(start, start + len(block)), block
        start += len(block)


def _combined(by_row: Tensor, blocks: Iterable[Tensor]) -> Tensor:
    """Return combinations of all rows, `(M, D)`, from the share of each row `(M, N)`."""
    total = torch.zeros(1, device=by_row.device)
    for rows, block in _placed(blocks):
        total = total + by_row[:, rows] @ block
    return total


def _factor(table: Table, mean: Tensor, std: Tensor) -> Tensor:
    """Return the Cholesky factor of the inner products of all standardized rows, float64 `(N, N)`."""
    count = table.shape[0]
    products = torch.zeros(count, count, dtype=torch.float64, device=table.device)
    for rows, block in _placed(standardised(table, mean, std)):
        exact = block.double()
        for columns, other in _placed(standardised(table, mean, std)):
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
