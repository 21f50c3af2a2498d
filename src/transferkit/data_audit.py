"""`audit`: what features and a solved head tell about the images and labels of a data set."""

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor

from transferkit.analysis.duplicates import Copy, find_copies, thumbnails
from transferkit.analysis.labels import exchange_labels, find_limit, find_wrong_labels, label_probabilities
from transferkit.analysis.outliers import FAR, distances, principal, unlike
from transferkit.base.display import Display
from transferkit.base.processes import broadcast, together
from transferkit.base.randomness import seeded
from transferkit.compute.device import Device
from transferkit.data.classes import find_classes
from transferkit.data.samples import path_of
from transferkit.data.sources import Source
from transferkit.data.targets import class_indices
from transferkit.errors import ArgumentError
from transferkit.linear.choice import STRENGTHS, LinearHead, solve
from transferkit.linear.table import Table
from transferkit.linear.temperature import fit_temperature
from transferkit.model.backbone import Backbone
from transferkit.model.freezing import freeze_until
from transferkit.model.head import attach_head
from transferkit.results.assessment import Assessment
from transferkit.results.auditing import Audit, Finding
from transferkit.trainer import Trainer
from transferkit.training.loss import CrossEntropy

FOLDS = 4
EXCHANGED = 0.05
"""Fraction of the labels that is exchanged to see how well wrong labels are found."""

AXES = 128
"""Principal axes of the features along which distances are taken."""

_READ = 64  # images read at a time


@together("audit")
def audit(
    backbone: Backbone,
    data: object,
    validation_data: object = None,
    *,
    classes: Sequence[str] | int | None = None,
    layers: Sequence[str] | None = None,
    device: str | torch.device | Device = "auto",
    precision: str = "auto",
    cache: str | PathLike[str] | None = None,
    seed: int = 0,
    num_workers: int = 0,
    verbose: int = 1,
) -> Audit:
    """Find labels that are likely wrong, copies, leaks and images unlike the rest. Nothing is trained or changed.

    A head is solved on the features of a frozen backbone, four times, each time without a quarter of the images. A
    label is likely wrong where the head that did not see the image finds it as improbable as labels that were exchanged
    on purpose. Copies are found by thumbnails, outliers by their nearest neighbours among the features.

    Args:
        backbone: From `load_backbone`, or `trainer.model.backbone`.
        data: The training images, as in `Trainer.fit`, but no `DataLoader`.
        validation_data: Images that should not be among the training images.
        classes: The class names or their number; None takes them from the data.
        layers: As in `attach_head`.
        device: As in `Trainer`.
        precision: As in `Trainer`.
        cache: A folder for files of features; None keeps them in memory.
        seed: The folds depend on it.
        num_workers: Processes that read a `Dataset`.
        verbose: As in `Trainer.fit`.

    Raises:
        ArgumentError: When `backbone` is something else, or the classes are not known.
        TransferKitError: When the data cannot be used.

    Example:
        >>> from transferkit import load_backbone
        >>> images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
        >>> images[7] = images[2].flip(2)
        >>> backbone = load_backbone("vgg11", weights=None, image_size=32)
        >>> found = audit(backbone, (images, torch.arange(16) % 2), verbose=0)
        >>> [(copy.index, copy.detail) for copy in found.of("duplicate")]
        [(7, 'mirror image of image 2, labelled 0')]

    References:
        Northcutt, Athalye and Mueller, 2021, "Pervasive Label Errors in Test Sets", arXiv:2103.14749.
    """
    if not isinstance(backbone, Backbone):
        raise ArgumentError(f"backbone is a {type(backbone).__name__}: expected a Backbone from load_backbone.")
    names = find_classes(data, classes)
    display = Display(verbose)
    with seeded(seed):  # the head is never used
        model = freeze_until(attach_head(backbone, names, layers=layers), "head")
    trainer = Trainer(model, device=device, precision=precision, cache="auto" if cache is None else cache, seed=seed)
    source = trainer._open_source(data, num_workers)
    features, _ = trainer._features_of(source, num_workers, display)
    table = Table.of_features(features, columns=model.columns or None)
    targets = features.targets.cpu()
    solved, probabilities = _held_out(table, targets, len(model.classes), None, seed)
    display.say(f"solved the head in {FOLDS} folds: {solved}")
    listed = _Listed(data, [model.classes[target] for target in targets.tolist()])
    look = _look(source)
    precision_found, limit = _check(table, targets, len(model.classes), solved.l2, seed)
    findings = _find_labels(probabilities, targets, model.classes, listed, limit=limit)
    findings += [listed.copy("duplicate", copy, listed) for copy in _closest(find_copies(look.small))]
    sources = [source]
    if validation_data is not None:
        sources.append(trainer._open_source(validation_data, num_workers))
        shown = _look(sources[1])
        others = _Listed(validation_data, [model.classes[target] for target in shown.targets])
        findings += [others.copy("leak", copy, listed) for copy in _closest(find_copies(shown.small, look.small))]
    findings += _find_unlike(table, solved, look, listed)
    found = findings, _assessment(probabilities, targets, model.classes), precision_found
    return Audit(*broadcast(found, "the audit"), sources)


class _Listed:
    """The images of a data set, by index: how a finding names them."""

    def __init__(self, data: object, labels: list[str]) -> None:
        self.labels = labels
        self.paths = [path_of(data, index) for index in range(len(labels))]

    def name(self, index: int) -> str:
        return self.paths[index] or f"image {index}"

    def finding(self, kind: str, index: int, score: float, detail: str) -> Finding:
        return Finding(kind, index, self.paths[index], self.labels[index], score, detail)

    def copy(self, kind: str, copy: Copy, of: "_Listed") -> Finding:
        what = "same pixels as" if copy.difference == 0 else "nearly the same as"
        what = "mirror image of" if copy.mirrored else what
        detail = f"{what} {of.name(copy.of)}"
        if of.labels[copy.of] != self.labels[copy.index]:
            detail += f", labelled {of.labels[copy.of]}"
        found = self.finding(kind, copy.index, copy.difference, detail)
        return replace(found, other=copy.of, other_path=of.paths[copy.of])


def _closest(copies: list[Copy]) -> list[Copy]:
    return sorted(copies, key=lambda copy: copy.difference)


class _Look(NamedTuple):
    """What one pass over the pixels gives.

    Attributes:
        small: Thumbnails, `(N, 3, 8, 8)`.
        sizes: Height and width of each image, `(N, 2)`.
        targets: Class indices, or what else the data has.
        raw: Whether the images are raw, 0 to 255.
    """

    small: Tensor
    sizes: Tensor
    targets: list[int]
    raw: bool


def _look(source: Source) -> _Look:
    small, sizes, targets, raw = [], [], [], True
    for images, labels, _ in source.batches(_READ, seed=0, order=None):
        small.append(thumbnails(images))
        sizes += [image.shape[1:] for image in images]
        targets += class_indices(labels).tolist()
        raw = raw and not (isinstance(images, Tensor) and images.is_floating_point())
    return _Look(torch.cat(small), torch.tensor(sizes), targets, raw)


def _held_out(table: Table, targets: Tensor, classes: int, l2: float | None, seed: int) -> tuple[LinearHead, Tensor]:
    """Solve a head in folds; return it, and the probabilities of each image in the fold without it, `(N, K)`."""
    loss = CrossEntropy()
    strengths = STRENGTHS if l2 is None else [l2]
    solved = solve(table, targets, loss, classes=classes, strengths=strengths, folds=FOLDS, seed=seed)
    if len(solved.held_out) < len(targets):  # of many images only one fold was left out to choose the penalty
        solved = solve(
            table, targets, loss, classes=classes, strengths=[solved.l2], folds=FOLDS, seed=seed, every_fold=True
        )
    rows, logits = solved.held_out.cpu(), solved.logits.cpu()
    probabilities = torch.empty_like(logits)
    probabilities[rows] = (logits / fit_temperature(logits, targets[rows], loss)).softmax(dim=1)
    return solved, probabilities


def _check(table: Table, targets: Tensor, classes: int, l2: float, seed: int) -> tuple[float, float]:
    """Exchange some labels and look for them.

    Returns:
        Which fraction of as many labels that look worst are those, and the probability up to which half of them are.
    """
    changed, exchanged = exchange_labels(targets, classes, fraction=EXCHANGED, seed=seed)
    _, probabilities = _held_out(table, changed, classes, l2, seed)
    own = label_probabilities(probabilities, changed)
    worst = own.argsort(stable=True)[: int(exchanged.sum())]
    return float(exchanged[worst].double().mean()), find_limit(own, exchanged)


def _find_labels(
    probabilities: Tensor, targets: Tensor, classes: Sequence[str], listed: _Listed, *, limit: float
) -> list[Finding]:
    own = label_probabilities(probabilities, targets)
    found = []
    for index in find_wrong_labels(probabilities, targets, limit).tolist():
        guess = int(probabilities[index].argmax())
        detail = f"looks like {classes[guess]} ({probabilities[index, guess]:.2f})"
        found.append(listed.finding("label", index, float(own[index]), detail))
    return found


def _find_unlike(table: Table, solved: LinearHead, look: _Look, listed: _Listed) -> list[Finding]:
    rows = torch.cat([((block - solved.mean) / solved.std).cpu() for block in table.blocks()])
    far = unlike(distances(principal(rows, AXES)).clamp_min(1e-6).log())
    found = [
        listed.finding("outlier", int(i), float(far[i]), f"{far[i]:.1f} standard deviations from its neighbours")
        for i in far.argsort(descending=True)
        if far[i] > FAR
    ]
    light = look.small.flatten(1).mean(dim=1).double()
    if look.raw:
        share = (light + 0.5) / 256
        light = (share / (1 - share)).log()  # black and white are as far from grey as they look
    deviation = unlike(light, spread=0.2)
    for index in deviation.abs().argsort(descending=True).tolist():
        if abs(deviation[index]) <= FAR:
            break
        how = "brighter" if deviation[index] > 0 else "darker"
        found.append(listed.finding("brightness", index, float(deviation[index]), f"much {how} than most"))
    heights, widths = look.sizes.double().unbind(dim=1)
    area, shape = unlike((heights * widths).log(), spread=0.4), unlike((widths / heights).log(), spread=0.2)
    deviation = torch.maximum(area.abs(), shape.abs())
    for index in deviation.argsort(descending=True).tolist():
        if deviation[index] <= FAR:
            break
        size = f"{int(widths[index])} x {int(heights[index])} pixels, unlike the others"
        found.append(listed.finding("size", index, float(deviation[index]), size))
    return found


def _assessment(probabilities: Tensor, targets: Tensor, classes: Sequence[str]) -> Assessment:
    losses = -label_probabilities(probabilities, targets).clamp_min(1e-30).log()
    return Assessment(probabilities.float().numpy(), losses.float().numpy(), targets.numpy(), tuple(classes))
