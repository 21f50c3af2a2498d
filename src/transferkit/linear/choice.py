"""Choose the strength of the L2 penalty by images held out, and solve a linear head with it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transferkit.base.randomness import derive_seed, shuffled
from transferkit.errors import ArgumentError
from transferkit.linear.design import Design, design_of, standardised
from transferkit.linear.logistic import Loss, Problems
from transferkit.linear.table import Table

STRENGTHS = tuple(10 ** (1 - step / 2) for step in range(13))
"""Penalties tried, from strong to weak: 10 to 1e-5 in half decades, for standardised features."""

ONE_FOLD_ROWS = 20_000
"""Above this number of rows only the first fold is held out: a quarter of them tells strengths apart."""

PATH_TOLERANCE = 1e-2
"""Error of the weights, relative to their norm, at which a strength is scored."""

TOLERANCE = 1e-5
"""Error of the weights, relative to their norm, of the solved head."""

_BATCH_NUMBERS = 2**25
"""Logits and numbers of weights, with L-BFGS's memory, of the problems that are solved together."""


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
    """A linear head at its optimum, for standardised features.

    Attributes:
        weight: `(K, D)`, float32, for features less `mean` and divided by `std`.
        bias: `(K,)`.
        mean: Of each feature over all rows, `(D,)`.
        std: Standard deviation of each feature over all rows, `(D,)`; 1 where the feature is constant.
        l2: The penalty.
        path: What was tried, from strong to weak; empty if nothing was held out.
        held_out: int64: which rows were held out, of the training rows or of the validation rows.
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
        chosen = [strength for strength in self.path if strength.l2 == self.l2]
        scored = [f"accuracy {best.accuracy:.4f} ± {best.accuracy_error:.4f} on held-out images, " for best in chosen]
        return f"{''.join(scored)}L2 {self.l2:.3g}"

    __repr__ = __str__  # what an interpreter shows

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return weight `(K, D)` and bias `(K,)` for the features as they are."""
        weight = self.weight.double() / self.std
        return weight.float(), (self.bias - weight @ self.mean.double()).float()


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
    count_correct: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> LinearHead:
    """Solve a linear head to its optimum, with the penalty that does best on held-out rows.

    The head minimises the mean loss plus `l2 / 2` times the sum of its squared weights. The penalties are tried from
    strong to weak, each from the last one's solution, until the loss on held-out rows has risen twice by more than its
    standard error. Then all rows are solved with the best.

    Held-out rows are the validation rows or, without them, each fold in turn. All folds are solved together and share
    the mean and the standard deviation of all rows, which depend on no target. With as many folds as rows this is
    exact leave-one-out. Of more than 20,000 rows only the first fold is held out.

    Args:
        table: The features, `(N, D)`.
        targets: int64 `(N,)`, or float32 `(N, K)`.
        loss: What is minimised: convex in the logits, and a sum over rows.
        classes: Number of classes `K`.
        validation: Features and targets of validation rows; None holds out folds of the training rows.
        strengths: The penalties, from strong to weak. If there is only one, it is scored and used.
        folds: Number of folds, 2 or more; as many as there are groups, if these are fewer. 0 holds out nothing, which
            needs a single strength.
        groups: int64 `(N,)`: rows of one group, such as the views of one image, are in the same fold. None lets each
            row be a group.
        seed: Of the folds.
        count_correct: How many rows are right, given logits and targets; None counts those whose largest logit is at
            their target.

    Raises:
        ArgumentError: When there are no strengths or one is not positive, or there are several and nothing is held
            out, or the targets are not as many as the rows.
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
    design = design_of(table)
    targets = targets.to(table.device)
    right = count_correct or _count_largest
    if validation is not None:
        scorer: _Folds | _Rows | None = _Rows(design, targets, loss, classes, validation)
    else:
        fold_of = assign_folds(targets, folds, groups=groups, seed=seed)
        scorer = _Folds(design, targets, loss, classes, fold_of) if int(fold_of.max()) > 0 else None
    path: list[Strength] = []
    held_out, logits = targets.new_zeros(0, dtype=torch.int64), torch.zeros(0, classes, device=table.device)
    best, start, losses, worse = strengths[0], None, None, 0
    for l2 in strengths:
        if scorer is None:
            break
        here = scorer.solve(l2)
        own = loss.each(here, scorer.targets).double()
        path.append(Strength(l2, float(own.mean()), *_accuracy(here, scorer.targets, scorer.parts, right)))
        if losses is None or float(own.mean()) < float(losses.mean()):
            best, start, losses, worse = l2, scorer.weights(), own, 0
            held_out, logits = scorer.held_out, here.clone()
            continue
        rise = own - losses
        worse = worse + 1 if float(rise.mean()) > float(rise.std(correction=0)) / math.sqrt(len(rise)) else 0
        if worse == 2:
            break
    everything = torch.ones(len(targets), 1, dtype=torch.bool, device=table.device)
    final = Problems(design, targets, loss, classes=classes, members=everything)
    if start is not None:
        final.weights = start
    final.solve(best, tolerance=TOLERANCE)
    weight, bias = design.on_features(final.weights[0])
    return LinearHead(weight, bias, design.mean, design.std, best, path, held_out, logits)


def assign_folds(targets: Tensor, folds: int, *, groups: Tensor | None = None, seed: int = 0) -> Tensor:
    """Return the fold of each row, int64 `(N,)` from 0: every class is spread over the folds as evenly as possible.

    Args:
        targets: int64 `(N,)`, or `(N, K)`, where a row counts as the rarest of its labels.
        folds: Number of folds; as many as there are groups, if these are fewer.
        groups: int64 `(N,)`: rows of one group share a fold, and count as the first of them; None has no groups.
        seed: Of the order in which the rows of a class are dealt out.

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

    def __init__(self, design: Design, targets: Tensor, loss: Loss, classes: int, fold_of: Tensor) -> None:
        count, number = len(fold_of), int(fold_of.max()) + 1
        used = number if count <= ONE_FOLD_ROWS else 1
        self.held_out = (fold_of < used).nonzero().squeeze(1)
        self.targets = targets[self.held_out]
        self.fold_of = fold_of[self.held_out]
        self.parts = [(self.fold_of == fold).nonzero().squeeze(1) for fold in range(used)]
        size = max(1, _BATCH_NUMBERS // (classes * max(count, 24 * len(design.variances))))
        self.batches = [
            Problems(design, targets, loss, classes=classes, members=fold_of[:, None] != batch)
            for batch in torch.split(torch.arange(used, device=fold_of.device), size)
        ]

    def solve(self, l2: float) -> Tensor:
        for batch in self.batches:
            batch.solve(l2, tolerance=PATH_TOLERANCE)
        logits = torch.cat([batch.logits[self.held_out] for batch in self.batches], dim=1)
        return logits[torch.arange(len(logits), device=logits.device), self.fold_of]

    def weights(self) -> Tensor:
        """Return the mean over the folds: where to start with all rows."""
        return torch.cat([batch.weights for batch in self.batches]).mean(dim=0, keepdim=True)


class _Rows:
    """Scores a strength by validation rows, with weights solved on all training rows."""

    def __init__(
        self, design: Design, targets: Tensor, loss: Loss, classes: int, validation: tuple[Table, Tensor]
    ) -> None:
        self.table, self.targets = validation[0], validation[1].to(targets.device)
        self.design = design
        self.held_out = torch.arange(len(self.targets), device=targets.device)
        self.parts = [self.held_out]
        members = torch.ones(len(targets), 1, dtype=torch.bool, device=targets.device)
        self.problem = Problems(design, targets, loss, classes=classes, members=members)

    def solve(self, l2: float) -> Tensor:
        self.problem.solve(l2, tolerance=PATH_TOLERANCE)
        weight, bias = self.design.on_features(self.problem.weights[0])
        blocks = standardised(self.table, self.design.mean, self.design.std)
        return torch.cat([torch.addmm(bias, block, weight.T) for block in blocks])

    def weights(self) -> Tensor:
        return self.problem.weights


def _count_largest(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == (targets if targets.ndim == 1 else targets.argmax(dim=1))).sum()


def _accuracy(
    logits: Tensor, targets: Tensor, parts: list[Tensor], count_correct: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, float]:
    """Return accuracy and its standard error over the parts of the held-out rows, or of a proportion."""
    right = torch.stack([count_correct(logits[part], targets[part]).double() for part in parts])
    accuracy = float(right.sum()) / len(logits)
    if len(parts) == 1:
        return accuracy, math.sqrt(accuracy * (1 - accuracy) / len(logits))
    sizes = torch.tensor([len(part) for part in parts], device=right.device)
    return accuracy, float((right / sizes).std()) / math.sqrt(len(parts))


def _check(
    table: Table,
    targets: Tensor,
    strengths: Sequence[float],
    folds: int,
    validation: tuple[Table, Tensor] | None,
) -> None:
    if not strengths or not all(0 < l2 < math.inf for l2 in strengths):
        raise ArgumentError(f"l2={list(strengths)} cannot be used: expected one or more numbers above 0.")
    if validation is None and folds < 2 and len(strengths) > 1:
        raise ArgumentError(
            f"folds={folds} holds out no rows to choose among {len(strengths)} penalties by: expected 2 folds or more, "
            "validation data, or one l2."
        )
    for rows, labels, name in [(table, targets, "training"), *([(*validation, "validation")] if validation else [])]:
        if rows.shape[0] != len(labels):
            raise ArgumentError(
                f"the {name} data has {rows.shape[0]} rows and {len(labels)} targets: expected as many."
            )
