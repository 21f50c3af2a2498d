"""Choose the strength of the L2 penalty by images held out, and solve a linear head with it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from transferkit.base.randomness import derive_seed, shuffled
from transferkit.compute.device import float32_products
from transferkit.errors import ArgumentError, EmptyDataError, NonFiniteError
from transferkit.linear.design import design_of, standardized
from transferkit.linear.logistic import PAIRS, Loss, Problems
from transferkit.linear.table import Table

STRENGTHS = tuple(10 ** (2 - step / 2) for step in range(15))
"""Penalties tried, from strong to weak: 100 to 1e-5 in half decades, for standardized features."""

ONE_FOLD_ROWS = 20_000  # of more rows only the first fold is held out: a quarter of them tells strengths apart
PATH_TOLERANCE = 3e-3  # error of the weights, relative to their norm, at which a strength is scored
TOLERANCE = 1e-5  # error of the weights, relative to their norm, of the solved head
_BATCH_NUMBERS = 2**25  # logits and numbers of weights, with L-BFGS's memory, of the problems solved together


@dataclass(frozen=True)
class Strength:
    """How one penalty did on the held-out rows.

    Attributes:
        l2: The penalty.
        loss: Mean loss, without smoothing and class weights.
        accuracy: 0 to 1.
        accuracy_error: Standard error of the accuracy: over the folds, or of a proportion where there is only one.
    """

    l2: float
    loss: float
    accuracy: float
    accuracy_error: float


@dataclass(frozen=True, eq=False, repr=False)
class LinearHead:
    """A linear head at its optimum, for standardized features.

    Attributes:
        weight: `(K, D)`, float32, for features less `mean` and divided by `std`.
        bias: `(K,)`.
        mean: Of each feature over all rows, `(D,)`.
        std: Standard deviation of each feature over all rows, `(D,)`, with a floor; see `design.divisors`.
        l2: The penalty.
        path: The penalties tried, from strong to weak; empty if nothing was held out.
        held_out: int64: indices of the held-out rows, among the training or the validation rows.
        logits: Logits of these rows, `(len(held_out), K)`, from heads that were not trained on them, at the chosen
            penalty.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    l2: float
    path: list[Strength]
    held_out: Tensor
    logits: Tensor

    def __str__(self) -> str:
        if not self.path:
            return f"L2 {self.l2:.3g}"
        best = min(self.path, key=lambda strength: strength.loss)
        return f"accuracy {best.accuracy:.4f} ± {best.accuracy_error:.4f} on held-out images, L2 {self.l2:.3g}"

    __repr__ = __str__  # what an interpreter shows

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return weight `(K, D)` and bias `(K,)` for the features as they are."""
        weight = self.weight.double() / self.std
        return weight.float(), (self.bias - weight @ self.mean.double()).float()


@float32_products.at("highest")  # torch may have been allowed less, which does not reach the optimum
def solve(
    table: Table,
    targets: Tensor,
    loss: Loss,
    *,
    classes: int,
    validation: tuple[Table, Tensor] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    folds: int = 4,
    groups: Tensor | None = None,
    seed: int = 0,
    every_fold: bool = False,
    count_correct: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> LinearHead:
    """Solve a linear head to its optimum, with the penalty that does best on held-out rows.

    The head minimizes the mean loss plus `l2 / 2` times the sum of its squared weights. The penalties are tried from
    strong to weak, each from the last one's solution, until the loss on held-out rows has risen twice by more than its
    standard error. Then all rows are solved with the best.

    Of a table larger than memory, rows drawn at random choose the penalty, in memory; it counts as much beside the sum
    of all rows' losses as it did beside theirs. Then all rows are solved from there, and each step reads the table.

    Held-out rows are the validation rows or, without them, each fold in turn. All folds are solved together and share
    the mean and the standard deviation of all rows, which depend on no target. With as many folds as rows this is
    exact leave-one-out. Of more than 20,000 rows only the first fold is held out.

    Args:
        table: The features, `(N, D)`.
        targets: int64 `(N,)`, or float32 `(N, K)`.
        loss: What is minimized: convex in the logits, and a sum over rows. Weights that it holds are on `table.device`.
        classes: Number of classes `K`.
        validation: Features and targets of validation rows; None holds out folds of the training rows.
        strengths: The penalties, from strong to weak. If there is only one, it is scored and used.
        folds: Number of folds, 2 or more; as many as there are groups, if these are fewer. 0 holds out nothing, which
            needs a single strength.
        groups: int64 `(N,)`: rows of one group, such as the views of one image, are in the same fold. None lets each
            row be a group.
        seed: Determines the folds.
        every_fold: Hold out each fold in turn however many rows there are.
        count_correct: How many rows are right, given logits and targets; None counts those whose largest logit is at
            their target.

    Raises:
        ArgumentError: When the strengths are not positive and falling, or there are several and nothing is held out,
            or a table does not have as many rows as targets, or validation rows have other features.
        EmptyDataError: When a table has no rows.
        NonFiniteError: When a feature, or a slope of the loss, is infinite or NaN.

    Example:
        >>> from transferkit.training.loss import CrossEntropy
        >>> features = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [7.0]])
        >>> targets = torch.tensor([0, 0, 0, 1, 0, 1, 1, 1])
        >>> head = solve(Table.of_tensor(features), targets, CrossEntropy(), classes=2)
        >>> weight, bias = head.folded()
        >>> (features @ weight.T + bias).argmax(dim=1)
        tensor([0, 0, 0, 0, 1, 1, 1, 1])
    """
    _check(table, targets, strengths, folds, validation)
    design = design_of(table, seed=seed)
    targets = targets.to(table.device)
    every = torch.arange(len(targets), device=table.device)
    tried = every if every_fold else design.sample

    def build(members: Tensor) -> Problems:
        rows = design.sample if len(members) == len(design.sample) else every
        return Problems(design, targets[rows], loss, classes=classes, members=members, every=rows is every)

    scores: _Folds | _Validation
    if validation is not None:
        scores = _Validation(build(design.sample[:, None] >= 0), *validation)
    else:
        own = None if groups is None else groups[tried.to(groups.device)]
        fold_of = assign_folds(targets[tried], folds, groups=own, seed=seed)
        together = max(1, _BATCH_NUMBERS // (classes * max(len(tried), 2 * PAIRS * len(design.axes))))
        scores = _Folds(build, targets[tried], fold_of, together, most=len(targets) if every_fold else ONE_FOLD_ROWS)
    final = build(every[:, None] >= 0)
    l2, logits = strengths[0], final.logits[:0, 0]
    path: list[Strength] = []
    if len(scores.rows):
        l2, path, final.weights, logits = _choose(scores, strengths, loss, count_correct or _count_largest)
    if len(strengths) > 1:  # the more rows, the weaker the best penalty: its share of the sum over rows is kept
        l2 *= len(tried) / len(targets)
    final.solve(l2, tolerance=TOLERANCE)
    weight, bias = design.on_features(final.weights[0])
    rows = scores.rows if validation is not None else tried[scores.rows]
    return LinearHead(weight, bias, design.mean, design.std, l2, path, rows, logits)


def _choose(
    scores: "_Folds | _Validation",
    strengths: Sequence[float],
    loss: Loss,
    count_correct: Callable[[Tensor, Tensor], Tensor],
) -> tuple[float, list[Strength], Tensor, Tensor]:
    """Return the best strength, all that were tried, and the best one's weights and logits of the held-out rows."""
    path: list[Strength] = []
    least = torch.zeros(0)
    worse = 0
    for l2 in strengths:
        logits = scores.solve(l2)
        losses = loss.each(logits, scores.targets).double()
        path.append(Strength(l2, float(losses.mean()), *_accuracy(logits, scores, count_correct)))
        if len(path) == 1 or path[-1].loss < float(least.mean()):
            best, least, worse = (l2, scores.weights(), logits), losses, 0
            continue
        rise = losses - least  # row by row: the noise of the rise is much less than that of the loss
        worse = worse + 1 if float(rise.mean()) > float(rise.std(correction=0)) / math.sqrt(len(rise)) else 0
        if worse == 2:
            break
    l2, weights, logits = best
    return l2, path, weights, logits


def assign_folds(targets: Tensor, folds: int, *, groups: Tensor | None = None, seed: int = 0) -> Tensor:
    """Return the fold of each row, int64 `(N,)` from 0: every class is spread over the folds as evenly as possible.

    Of targets `(N, K)` a row counts as the rarest of its labels. Rows of one of the `groups`, int64 `(N,)`, share a
    fold, and count as the first of them; there are no more folds than groups. Rows of a class are dealt out in an order
    that `seed` determines.

    Example:
        >>> assign_folds(torch.tensor([0, 0, 1, 1]), 2).view(2, 2).sum(dim=1)
        tensor([1, 1])
    """
    labels = targets if targets.ndim == 1 else (targets / targets.sum(dim=0).clamp_min(1e-12)).argmax(dim=1)
    count = len(targets)
    member = torch.arange(count) if groups is None else torch.unique(groups.cpu(), return_inverse=True)[1]
    number = int(member.max()) + 1
    first = torch.full((number,), count).scatter_reduce(0, member, torch.arange(count), "amin")
    order = shuffled(number, derive_seed(seed, "folds"))
    order = order[labels.cpu()[first[order]].argsort(stable=True)]
    fold = torch.empty(number, dtype=torch.int64)
    fold[order] = torch.arange(number) % max(1, min(folds, number))
    return fold[member].to(targets.device)


class _Folds:
    """Scores a strength by the rows of each fold, with weights solved on the others."""

    def __init__(
        self, build: Callable[[Tensor], Problems], targets: Tensor, fold_of: Tensor, together: int, *, most: int
    ) -> None:
        count = len(fold_of)
        number = int(fold_of.max()) + 1
        used = 0 if number == 1 else number if count <= most else 1
        self.rows = (fold_of < used).nonzero().squeeze(1)  # which are held out
        self.targets = targets[self.rows]
        self.fold_of = fold_of[self.rows]
        self.parts = [(self.fold_of == fold).nonzero().squeeze(1) for fold in range(used)]  # places of each in `rows`
        batches = torch.split(torch.arange(used, device=fold_of.device), together)
        self.batches = [build(fold_of[:, None] != batch) for batch in batches]

    def solve(self, l2: float) -> Tensor:
        """Return the logits of the held-out rows, `(N, K)`."""
        for batch in self.batches:
            batch.follow(l2, tolerance=PATH_TOLERANCE)
        logits = torch.cat([batch.logits[self.rows] for batch in self.batches], dim=1)
        return logits[torch.arange(len(logits), device=logits.device), self.fold_of]

    def weights(self) -> Tensor:
        """Return the mean over the folds: where to start with all rows."""
        return torch.cat([batch.weights for batch in self.batches]).mean(dim=0, keepdim=True)


class _Validation:
    """Scores a strength by validation rows, with weights solved on all training rows."""

    def __init__(self, problem: Problems, table: Table, targets: Tensor) -> None:
        self.problem, self.table = problem, table
        self.targets = targets.to(table.device)
        self.rows = torch.arange(len(targets), device=table.device)
        self.parts = [self.rows]

    def solve(self, l2: float) -> Tensor:
        """Return the logits of the validation rows, `(N, K)`. Reads their table once."""
        self.problem.follow(l2, tolerance=PATH_TOLERANCE)
        design = self.problem.design
        weight, bias = design.on_features(self.problem.weights[0])
        blocks = standardized(self.table, design.mean, design.std)
        logits = torch.cat([torch.addmm(bias, block, weight.T) for block in blocks])
        finite = logits.isfinite().all(dim=1)
        if not bool(finite.all()):  # host sync
            row = int((~finite).nonzero()[0])
            raise NonFiniteError(
                f"the features of validation row {row} are not finite: expected numbers. Look at this image."
            )
        return logits

    def weights(self) -> Tensor:
        """Return the solution."""
        return self.problem.weights


def _count_largest(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == (targets if targets.ndim == 1 else targets.argmax(dim=1))).sum()


def _accuracy(
    logits: Tensor, scores: "_Folds | _Validation", count_correct: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, float]:
    """Return the accuracy and its standard error: over the folds, or of a proportion."""
    parts = [(logits[part], scores.targets[part]) for part in scores.parts]
    right = torch.stack([count_correct(*part).double() for part in parts])
    accuracy = float(right.sum()) / len(logits)
    if len(parts) == 1:
        return accuracy, math.sqrt(accuracy * (1 - accuracy) / len(logits))
    sizes = torch.tensor([len(part) for part in scores.parts], device=right.device)
    return accuracy, float((right / sizes).std()) / math.sqrt(len(parts))


def _check(
    table: Table,
    targets: Tensor,
    strengths: Sequence[float],
    folds: int,
    validation: tuple[Table, Tensor] | None,
) -> None:
    falling = all(after < before for before, after in pairwise(strengths))
    if not strengths or not falling or not all(0 < l2 < math.inf for l2 in strengths):
        raise ArgumentError(f"l2={list(strengths)} cannot be used: expected numbers above 0, from strong to weak.")
    if validation is None and folds < 2 and len(strengths) > 1:
        raise ArgumentError(
            f"folds={folds} holds out no rows that could choose among {len(strengths)} penalties: expected 2 folds or "
            "more, validation data, or one l2."
        )
    for name, rows, labels in [("training", table, targets), *([("validation", *validation)] if validation else [])]:
        if rows.shape[0] != len(labels) or rows.shape[1] != table.shape[1]:
            raise ArgumentError(
                f"the {name} data has {rows.shape[0]} rows of {rows.shape[1]} features and {len(labels)} targets: "
                f"expected as many rows as targets, and {table.shape[1]} features."
            )
        if len(labels) == 0:
            raise EmptyDataError(f"the {name} data has 0 images: expected at least one.")
