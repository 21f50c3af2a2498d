"""Compare the solver of linear heads with scikit-learn's LogisticRegression and LogisticRegressionCV, in one run.

The features are made to look like those of a network: correlated, not negative, 1,280 of each image, ten classes.
Seconds are CPU seconds of the process, which other processes change little, and ratios are scikit-learn's to the
solver's. The error is a bound on the distance from the optimum relative to the weights, from the gradient in float64:

    OMP_NUM_THREADS=1 python benchmarks/solver.py --rows 500 2000 10000
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from torch import Tensor

from transferkit.linear.choice import STRENGTHS, solve
from transferkit.linear.table import Table
from transferkit.training.loss import CrossEntropy

FEATURES, CLASSES = 1280, 10


def make_features(rows: int) -> tuple[Tensor, Tensor]:
    """Return features `(rows, 1280)` whose variances fall as those of a network's do, and their classes."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.arange(1, FEATURES + 1).float() ** -0.7
    targets = torch.randint(CLASSES, (rows,), generator=generator)
    centres = 0.25 * torch.randn(CLASSES, FEATURES, generator=generator)
    hidden = (torch.randn(rows, FEATURES, generator=generator) + centres[targets]) * sizes
    return torch.relu(hidden @ torch.randn(FEATURES, FEATURES, generator=generator)), targets


def measure(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    result = function()
    return result, time.process_time() - started


def error(weight: Tensor, bias: Tensor, rows: Tensor, targets: Tensor, l2: float) -> float:
    """Return a bound on the weights' relative error: the objective curves by at least `l2`."""
    weight = weight.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(rows.double() @ weight.T + bias.double(), targets)
    (gradient,) = torch.autograd.grad(loss + l2 / 2 * weight.square().sum(), weight)
    return float(gradient.norm() / l2 / weight.detach().norm())


def one_penalty(features: Tensor, targets: Tensor, l2: float) -> None:
    """Solve with one penalty, to four digits and at scikit-learn's defaults."""
    head, seconds = measure(
        lambda: solve(Table.of_tensor(features), targets, CrossEntropy(), classes=CLASSES, strengths=[l2], folds=0)
    )
    rows = (features - head.mean) / head.std
    print(
        f"  l2 {l2:<6g} solver        {seconds:8.2f} s   error {error(head.weight, head.bias, rows, targets, l2):.0e}"
    )
    for name, tolerance, array in [
        ("four digits", 1e-7, rows.double().numpy()),
        ("defaults", 1e-4, rows.numpy()),
    ]:
        model = LogisticRegression(C=1 / (l2 * len(rows)), tol=tolerance, max_iter=10_000)
        _, theirs = measure(lambda model=model, array=array: model.fit(array, targets.numpy()))
        far = error(torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_), rows, targets, l2)
        print(f"            scikit-learn  {theirs:8.2f} s   error {far:.0e}   ratio {theirs / seconds:5.1f}   {name}")


def path(features: Tensor, targets: Tensor) -> None:
    """Choose among the same penalties by the same number of folds, and refit."""
    head, seconds = measure(lambda: solve(Table.of_tensor(features), targets, CrossEntropy(), classes=CLASSES))
    rows = ((features - head.mean) / head.std).numpy()
    tried = np.array([strength.l2 for strength in head.path])  # no more than the solver tried
    model = LogisticRegressionCV(
        Cs=1 / (tried * len(rows) * 3 / 4),
        cv=4,
        scoring="neg_log_loss",
        max_iter=10_000,
        l1_ratios=(0,),
        use_legacy_attributes=False,
    )
    _, theirs = measure(lambda: model.fit(rows, targets.numpy()))
    print(
        f"  path of {len(tried)} of {len(STRENGTHS)} penalties, 4 folds: solver {seconds:.2f} s, l2 {head.l2:.1e}; "
        f"scikit-learn {theirs:.2f} s, l2 {1 / float(np.ravel(model.C_)[0]) / len(rows) * 4 / 3:.1e}; "
        f"ratio {theirs / seconds:.1f}"
    )


def larger_than_memory(features: Tensor, targets: Tensor, kept: int) -> None:
    """Solve the path and all rows while only `kept` rows fit into memory, and count how often the table is read."""
    read: list[int] = []

    def read_rows(start: int, stop: int) -> Tensor:
        read.append(start)
        return features[start:stop]

    rows = Table(read_rows, *features.shape, features.device)
    with mock.patch.object(Table, "rows_in_memory", return_value=kept):
        head, seconds = measure(lambda: solve(rows, targets, CrossEntropy(), classes=CLASSES))
    far = error(head.weight, head.bias, (features - head.mean) / head.std, targets, head.l2)
    print(
        f"  {kept} rows in memory: {seconds:.2f} s, l2 {head.l2:.1e}, path of {len(head.path)}, "
        f"{read.count(0)} readings, error {far:.0e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[500, 2000, 10_000])
    parser.add_argument("--no-path", action="store_true", help="leave out the path, which takes scikit-learn minutes")
    parser.add_argument("--kept", type=int, nargs="+", default=[], help="solve while only so many rows fit into memory")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # scikit-learn's, about iterations and about what will change
    print(f"{FEATURES} features, {CLASSES} classes, {torch.get_num_threads()} threads, CPU seconds")
    for count in arguments.rows:
        features, targets = make_features(count)
        print(f"{count} rows")
        for l2 in (1.0, 0.1, 0.01):
            one_penalty(features, targets, l2)
        for kept in arguments.kept:
            larger_than_memory(features, targets, kept)
        if not arguments.no_path:
            path(features, targets)


if __name__ == "__main__":
    main()
