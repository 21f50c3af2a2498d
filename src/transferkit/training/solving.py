"""The linear head of a model, solved to its optimum on cached features."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from transferkit.base.processes import broadcast, copy_from_rank_0, world_size
from transferkit.errors import CacheError, HeadMismatchError
from transferkit.features.feed import Feed
from transferkit.linear.choice import STRENGTHS, LinearHead, solve
from transferkit.linear.table import Table
from transferkit.linear.temperature import fit_temperature
from transferkit.model.head import Standardize, TransferModel
from transferkit.training.metrics import count_correct
from transferkit.training.training import Training


def solve_head(training: Training, train: Feed, validation: Feed | None, *, l2: float | None, folds: int) -> LinearHead:
    """Give the linear head of a model the weights that are best by its loss, and its temperature.

    Each view of a training image is a row. Validation images choose the penalty instead of cross-validation in `folds`
    parts; `l2` is the penalty, above 0, if it is chosen already. What the optimizer remembers of the head is dropped.
    Any head but a linear one is a `HeadMismatchError`; where more trains, or features cannot be cached, `CacheError`.
    """
    model = training.model
    standardize, linear = _parts(model)
    _check_boundary(model)
    cached = train.features()
    held_out = None if validation is None else validation.features()
    table_of = partial(Table.of_features, columns=model.columns or None)
    targets = cached.targets_of_rows
    solved = solve(
        table_of(cached),
        targets,
        training.loss.for_run(train.inputs.source, len(model.classes), cached.device.torch_device),
        classes=len(model.classes),
        strengths=STRENGTHS if l2 is None else [l2],
        folds=folds,
        groups=torch.arange(cached.rows.shape[1]).repeat(len(cached.rows)),
        validation=None if held_out is None else (table_of(held_out), held_out.targets_of_rows),
        seed=training.seed,
        count_correct=partial(count_correct, threshold=model.threshold),
    )
    if world_size() > 1:  # all solve it, which takes no longer, and that of the first counts
        copy_from_rank_0([solved.weight, solved.bias, solved.mean, solved.std, solved.held_out, solved.logits])
        l2, path = broadcast((solved.l2, solved.path), "the solved head")
        solved = replace(solved, l2=l2, path=path)
    with torch.no_grad():
        weight, bias = (solved.weight, solved.bias) if standardize else solved.folded()
        if standardize is not None:
            standardize.mean.copy_(solved.mean)
            standardize.std.copy_(solved.std)
            standardize.num_images.fill_(cached.rows.shape[1])
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    for parameter in model.head.parameters():
        training.optimizer.state.pop(parameter, None)
    model.temperature = 1.0
    if len(solved.logits):
        known = targets if held_out is None else held_out.targets_of_rows
        model.temperature = fit_temperature(solved.logits, known[solved.held_out], training.loss)
    return solved


def _parts(model: TransferModel) -> tuple[Standardize | None, nn.Linear]:
    """Return the parts of a linear head."""
    every: list[Any] = list(model.head) if isinstance(model.head, nn.Sequential) else [model.head]
    parts = [part for part in every if not isinstance(part, nn.Dropout)]  # it is off where the head is solved
    kinds = [type(part) for part in parts]
    if kinds not in ([nn.Flatten, Standardize, nn.Linear], [nn.Flatten, nn.Linear]) or parts[-1].bias is None:
        raise HeadMismatchError(
            f"the head has the layers {', '.join(kind.__name__ for kind in kinds)}, and only a linear one can be "
            "solved: expected Flatten and Linear with a bias, as attach_head(backbone, classes) makes it, without "
            "hidden=. Trainer.fit trains any head."
        )
    return (parts[1] if isinstance(parts[1], Standardize) else None), parts[-1]


def _check_boundary(model: TransferModel) -> None:
    depth, wanted = len(model.split()[0]), len(model.backbone.features)
    if depth != wanted:
        what = "the head is frozen, too" if depth > wanted else "layers before the head train"
        raise CacheError(f"the head cannot be solved: {what}. Call freeze_until(model, 'head') first.")
