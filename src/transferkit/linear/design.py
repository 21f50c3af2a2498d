"""Standardised features in the basis of their principal axes, where a logistic regression is well conditioned."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from transferkit.errors import EmptyDataError, NonFiniteError
from transferkit.linear.table import Table

LARGEST_GRAM = 4096
"""Largest matrix that is decomposed; beyond, the features keep their own axes."""

_CONSTANT = 1e-5
"""A column whose standard deviation is a smaller fraction of its mean is constant but for rounding."""

_RANK = 1e-10
"""Axes whose variance is a smaller fraction of the largest are left out: float32 rows do not hold them."""


@dataclass(frozen=True, eq=False)
class Design:
    """What maps weights to logits: standardised rows and a column of ones, with an axis for each number of a weight.

    The axes are the eigenvectors of the covariance. Weights on them have the norm they have on the features, so the L2
    penalty is the same. Where there are more features than rows, the axes come from the inner products of the rows:
    nothing but reading then depends on the number of features. Where both are more than `LARGEST_GRAM`, each feature
    is an axis.

    Attributes:
        table: The rows.
        mean: Of each feature, float32 `(D,)`.
        std: Of each feature, float32 `(D,)`; 1 if the feature is constant.
        variances: Of the rows along each axis, `(A,)`, then 1 for the column of ones.
        rows: The rows on their axes, with the column of ones, float32 `(N, A + 1)`; None if they do not fit in memory
            and are read again in each pass.
        axes: `(D, A)`; None where each feature is an axis or where `combinations` says what they are.
        combinations: `(N, A)`: each axis as a combination of the standardised rows, where `D > N`.
    """

    table: Table
    mean: Tensor
    std: Tensor
    variances: Tensor
    rows: Tensor | None
    axes: Tensor | None
    combinations: Tensor | None

    def logits(self, weights: Tensor) -> Tensor:
        """Return the logits `(N, M)` of weights `(M, A + 1)`. Reads the table once if its rows are not in memory."""
        if self.rows is not None:
            return self.rows @ weights.T
        weight, bias = self.on_features(weights)
        return torch.cat([torch.addmm(bias, block, weight.T) for block in self._blocks()])

    def gradient(self, slopes: Tensor) -> Tensor:
        """Return the gradient `(M, A + 1)` that follows from the slopes `(N, M)` of the logits.

        Reads the table once if its rows are not in memory.
        """
        if self.rows is not None:
            return slopes.T @ self.rows
        total = slopes.new_zeros(slopes.shape[1], self.table.shape[1])
        start = 0
        for block in self._blocks():
            total += slopes[start : start + len(block)].T @ block
            start += len(block)
        return torch.cat([total if self.axes is None else total @ self.axes, slopes.sum(dim=0)[:, None]], dim=1)

    def on_features(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights `(M, A + 1)` as weights on the standardised features `(M, D)` and biases `(M,)`.

        Reads the table once where there are more features than rows.
        """
        own, bias = weights[:, :-1], weights[:, -1]
        if self.combinations is not None:
            by_row = own @ self.combinations.T  # (M, N)
            own, start = own.new_zeros(len(own), self.table.shape[1]), 0
            for block in self._blocks():
                own += by_row[:, start : start + len(block)] @ block
                start += len(block)
        elif self.axes is not None:
            own = own @ self.axes.T
        return own, bias

    def _blocks(self) -> Iterator[Tensor]:
        return standardised(self.table, self.mean, self.std)


def standardised(table: Table, mean: Tensor, std: Tensor) -> Iterator[Tensor]:
    """Yield the rows of a table in blocks, less the mean and divided by the standard deviation."""
    for block in table.blocks():
        yield (block - mean) / std


def moments(table: Table) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each feature, float32 `(D,)`. Reads the table once.

    Raises:
        EmptyDataError: When the table has no rows.
        NonFiniteError: When a feature is infinite or NaN.
    """
    if table.shape[0] == 0:
        raise EmptyDataError("a linear head cannot be solved on 0 images: expected at least one.")
    shift, start = torch.zeros(()), 0
    total = square = torch.zeros(table.shape[1], dtype=torch.float64, device=table.device)
    for block in table.blocks():
        exact = block.double()
        shift = shift if start else exact.mean(dim=0)  # of the first block: squares of differences lose no digits
        exact -= shift
        total, square = total + exact.sum(dim=0), square + exact.square_().sum(dim=0)
        if not bool(square.isfinite().all()):  # host sync: once a block
            row = start + int((~block.isfinite().all(dim=1)).nonzero()[0])
            raise NonFiniteError(
                f"the features of row {row} are not finite: expected numbers. Look at this image, and at the weights "
                "and the precision of the frozen layers."
            )
        start += len(block)
    offset = total / table.shape[0]
    mean = shift + offset
    std = (square / table.shape[0] - offset.square()).clamp_min(0).sqrt()
    rounding = (_CONSTANT * mean.abs()).clamp_min(1e-30)
    return mean.float(), torch.where(std > rounding, std, rounding.clamp_min(1)).float()


def design_of(table: Table) -> Design:
    """Standardise a table and find its axes.

    Reads the table once for mean and standard deviation, once for the covariance and, if its rows fit in memory as
    float32, once to take them there. Where `D > N` the covariance is replaced by the inner products of the rows, which
    take a reading for each block of rows.

    Raises:
        EmptyDataError: When the table has no rows.
        NonFiniteError: When a feature is infinite or NaN.
    """
    count, width = table.shape
    mean, std = moments(table)
    axes = combinations = rows = None
    if min(count, width) > LARGEST_GRAM:
        variances = torch.ones(width, device=table.device)
    elif width <= count:
        gram = torch.zeros(width, width, dtype=torch.float64, device=table.device)
        for block in standardised(table, mean, std):
            exact = block.double()
            gram += exact.T @ exact
        values, vectors = _eigh(gram)
        axes, variances = vectors.float(), (values / count).float()
    else:
        values, vectors = _eigh(_inner_products(table, mean, std))
        combinations, variances = (vectors / values.sqrt()).float(), (values / count).float()
        rows = _with_ones(vectors * values.sqrt())
    if rows is None and table.fits_in_memory():
        rows = torch.empty(count, len(variances) + 1, device=table.device)
        rows[:, -1] = 1
        start = 0
        for block in standardised(table, mean, std):
            rows[start : start + len(block), :-1] = block if axes is None else block @ axes
            start += len(block)
    variances = torch.cat([variances, variances.new_ones(1)])
    return Design(table, mean, std, variances, rows, axes, combinations)


def _with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1).float()


def _inner_products(table: Table, mean: Tensor, std: Tensor) -> Tensor:
    """Return the inner products of all standardised rows, float64 `(N, N)`."""
    products = torch.zeros(table.shape[0], table.shape[0], dtype=torch.float64, device=table.device)
    start = 0
    for block in standardised(table, mean, std):
        exact, other = block.double(), 0
        for second in standardised(table, mean, std):
            part = slice(start, start + len(block)), slice(other, other + len(second))
            products[part] = exact @ second.double().T
            other += len(second)
            if other >= start + len(block):
                break  # the rest is the transpose
        start += len(block)
    return products.tril() + products.tril(-1).T


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues above rounding, descending, and their eigenvectors.

    One thread computes them on the CPU: with two threads and another busy process LAPACK was 70 times slower, because
    its threads wait for each other at every column.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        values, vectors = torch.linalg.eigh(matrix)
    finally:
        torch.set_num_threads(threads)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = int((values > _RANK * values[:1].clamp_min(0)).sum()) if len(values) else 0
    return values[:rank], vectors[:, :rank]
