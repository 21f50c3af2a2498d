"""`audit`: what features and a solved head tell about the images and labels of a data set."""

import csv
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import astuple, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from transferkit.analysis.duplicates import SIDE, Copy, find_copies, thumbnails
from transferkit.analysis.labels import exchange_labels, find_limit, find_wrong_labels, label_probabilities
from transferkit.analysis.outliers import FAR, distances, unlike
from transferkit.base.arguments import one_of, whole_number
from transferkit.base.calls import explained
from transferkit.base.display import Display
from transferkit.base.processes import alone, broadcast, together, world_size
from transferkit.base.randomness import seeded
from transferkit.base.surroundings import own_surroundings
from transferkit.compute.device import Device, find_device
from transferkit.data.classes import find_classes
from transferkit.data.open import open_data
from transferkit.data.preprocessing import Preprocessing
from transferkit.data.samples import path_of
from transferkit.data.sources import Batch, DatasetSource, Source
from transferkit.data.targets import class_indices
from transferkit.errors import ArgumentError
from transferkit.features.cache import FeatureCache, open_folder
from transferkit.features.dataset import features_of
from transferkit.linear.choice import STRENGTHS, LinearHead, solve
from transferkit.linear.design import principal_axes, standardized
from transferkit.linear.table import Table
from transferkit.linear.temperature import fit_temperature
from transferkit.model.backbone import Backbone
from transferkit.model.freezing import freeze_until
from transferkit.model.head import attach_head
from transferkit.results.assessment import Assessment
from transferkit.results.figures import Axes, Figure
from transferkit.results.gallery import draw_images, read_pixels
from transferkit.trainer import Trainer
from transferkit.training.loss import CrossEntropy
from transferkit.training.run import without_loader

FOLDS = 4
EXCHANGED = 0.05  # share of the labels that is exchanged to see how well wrong labels are found
AXES = 128  # principal axes of the features along which distances are taken

KINDS = {  # what an audit looks for
    "label": "labels that are likely wrong",
    "duplicate": "copies of another training image",
    "leak": "validation images that are copies of a training image",
    "outlier": "images unlike all others",
    "brightness": "images that are much brighter or darker than the rest",
    "size": "images of another size or shape than the rest",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about one image.

    Attributes:
        kind: A key of `KINDS`.
        index: Of the image, in the training data; of a leak, in the validation data.
        path: Its file, if the data lists files.
        label: Name of its class.
        score: How strong the finding is; the findings of a kind are sorted by it. Of a label, its probability; of a
            copy, the difference in contrast; else robust standard deviations from the median.
        detail: A sentence.
        other: Index of the training image that a copy is a copy of.
        other_path: Of that one's file.
    """

    kind: str
    index: int
    path: str | None
    label: str
    score: float
    detail: str
    other: int | None = None
    other_path: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Audit:
    """What was found, the most striking of each kind first. It prints as a summary.

    Attributes:
        findings: All of them, in the order of `KINDS`.
        assessment: Each training image's prediction by the head that did not see it. Its
            `confusion_matrix()` tells which classes are mixed up.
        precision: Fraction of changed labels found when some were changed on purpose, among as many worst-looking ones.
        sources: The training and the validation images, for pictures.
    """

    findings: list[Finding]
    assessment: Assessment
    precision: float
    sources: Sequence[Source]

    def of(self, kind: str) -> list[Finding]:
        """Return the findings of one kind, such as "label"; an unknown one is an `ArgumentError`."""
        one_of("kind", kind, KINDS)
        return [finding for finding in self.findings if finding.kind == kind]

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write all findings to a file with a header, one per line."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow([column.name for column in fields(Finding)])
            table.writerows(map(astuple, self.findings))

    def plot(self, kind: str, *, num_images: int = 12, ax: Axes | None = None) -> Figure:
        """Show the first images of one kind.

        Raises:
            ArgumentError: When there is no such kind, or `num_images` is below 1.
            MissingPackageError: When matplotlib is not installed.
        """
        found = self.of(kind)[: whole_number("num_images", num_images)]
        images = read_pixels(self.sources[-1 if kind == "leak" else 0], [each.index for each in found])
        titles = [f"{each.index}: {each.label}\n{each.detail}" for each in found]
        return draw_images(images, titles, wrong=[True] * len(found), ax=ax)

    def __str__(self) -> str:
        count = len(self.assessment.targets)
        lines = [f"{count:,} images, accuracy {self.assessment.accuracy:.4f} of a head that did not see them"]
        for kind, what in KINDS.items():
            found = self.of(kind)
            lines.append(f"{len(found):6,}  {what}")
            lines += [f"        {each.path or f'image {each.index}'}: {each.detail}" for each in found[:3]]
        lines.append(
            f"Look before you delete: when 5 % of the labels were exchanged on purpose, {self.precision:.0%} of as "
            "many labels that looked worst were those. The others are hard images, from which a model learns most."
        )
        pairs = [f"{true} for {guess} ({times})" for true, guess, times in self.assessment.most_confused(3)]
        lines.append(f"classes most often mixed up (true for predicted): {', '.join(pairs) or 'none'}")
        return "\n".join(lines)

    __repr__ = __str__  # what an interpreter shows


@explained
@together("audit")
@own_surroundings()
def audit(
    backbone: Backbone,
    data: object,
    validation_data: object = None,
    *,
    classes: Sequence[str] | int | None = None,
    layers: Sequence[str] | None = None,
    device: str | torch.device | Device = "auto",
    precision: str = "auto",
    cache: str | PathLike[str] | Trainer | None = None,
    seed: int = 0,
    num_workers: int = 0,
    verbose: int = 1,
) -> Audit:
    """Find labels that are likely wrong, copies, leaks and images unlike the rest. Nothing is trained or changed.

    Four heads are solved on the features of a frozen backbone, each without a quarter of the images. A label is likely
    wrong if the head that did not see the image finds it as improbable as labels that were changed on purpose. Copies
    are found by thumbnails, outliers by their nearest neighbors among the features.

    Args:
        backbone: From `load_backbone`, or `trainer.model.backbone`.
        data: The training images, as in `Trainer.fit`, but no `DataLoader`.
        validation_data: Images that must not be among the training images.
        classes: The class names or their number; None takes them from the data.
        layers: As in `attach_head`.
        device: As in `Trainer`.
        precision: As in `Trainer`.
        cache: A folder for feature files, or a trainer on `device` whose cached features are used; None keeps them
            in memory.
        seed: Determines the folds.
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
        [(7, 'mirror image of image 2, labeled 0')]

    References:
        Northcutt, Athalye and Mueller, 2021, "Pervasive Label Errors in Test Sets", arXiv:2103.14749.
    """
    if not isinstance(backbone, Backbone):
        raise ArgumentError(f"backbone is a {type(backbone).__name__}: expected a Backbone from load_backbone.")
    display, place = Display(verbose), find_device(device, precision)
    with seeded(whole_number("seed", seed, at_least=0)):  # the head is never used
        model = attach_head(deepcopy(backbone), find_classes(data, classes), layers=layers)
    freeze_until(model, "head")
    images = _Images(data, model.classes, num_workers)
    others = None if validation_data is None else _Images(validation_data, model.classes, num_workers)
    store = FeatureCache(place, None if isinstance(cache, Trainer) else open_folder(cache))
    if isinstance(cache, Trainer):
        store.share(cache.training.features)
    if world_size() > 1:  # each process computes its part of the features, and then looks at all images
        features_of(model, images.source, device=place, cache=store, display=display)
    with alone():
        features = features_of(model, cast("Source", images), device=place, cache=store, display=display)
    table = Table.of_features(features, columns=model.columns or None)
    solved, probabilities = held_out(table, images.targets, len(model.classes), seed=seed)
    display.say(f"solved the head in {FOLDS} folds: {solved}")
    precision_found, limit = find_exchanged(table, images.targets, len(model.classes), l2=solved.l2, seed=seed)
    own = label_probabilities(probabilities, images.targets)
    findings, (shares, guesses) = [], probabilities.max(dim=1)
    for index in find_wrong_labels(probabilities, images.targets, limit).tolist():
        looks = f"looks like {model.classes[guesses[index]]} ({shares[index]:.2f})"
        findings.append(images.finding("label", index, float(own[index]), looks))
    findings += images.copies("duplicate", find_copies(images.small), images)
    if others is not None:
        for _ in others.batches(64, seed=0, order=None):
            pass  # it has looked at them then
        findings += others.copies("leak", find_copies(others.small, images.small), images)
    far = outlyingness(table, solved)
    findings += images.unlike("outlier", far, lambda i: f"{far[i]:.1f} standard deviations from its neighbours")
    findings += [*_of_other_brightness(images), *_of_other_size(images)]
    losses = -own.clamp_min(1e-30).log()
    assessment = Assessment(probabilities.numpy(), losses.numpy(), images.targets.numpy(), model.classes)
    found = broadcast((findings, assessment, precision_found), "the audit")
    return Audit(*found, [each.source for each in (images, others) if each])


class _Images:
    """The images of a data set, as findings name them: their source, which looks at each image that is read."""

    def __init__(self, data: object, classes: Sequence[str], num_workers: int) -> None:
        data, num_workers = without_loader(data, num_workers)
        self.source, self.classes = open_data(data, classes, num_workers=num_workers), classes
        if self.source.num_images is None:
            raise ArgumentError("a DataLoader makes its own batches and cannot be audited: pass its Dataset.")
        count = self.source.num_images
        self.paths = [path_of(data, index) for index in range(count)]  # None of an image without a file
        self.small = torch.zeros(count, 3, SIDE, SIDE)  # thumbnails
        self.sizes = torch.zeros(count, 2, dtype=torch.float64)  # height and width
        self.targets = torch.zeros(count, dtype=torch.int64)
        self.raw = True  # from 0 to 255

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def batches(self, batch_size: int, *, preprocess: Preprocessing | None = None, **how: Any) -> Iterator[Batch]:
        for images, targets, indices in self.source.batches(batch_size, **how):  # every pixel: a crop would hide some
            self.small[indices] = thumbnails(images)
            self.sizes[indices] = torch.tensor([image.shape[1:] for image in images], dtype=torch.float64)
            self.targets[indices] = class_indices(targets)
            self.raw = not (isinstance(images, Tensor) and images.is_floating_point())
            seen = images
            if preprocess is not None and isinstance(self.source, DatasetSource):  # features are found by these pixels
                shrunk = [preprocess.shrink(image) for image in images]
                seen = torch.stack(shrunk) if len({image.shape for image in shrunk}) == 1 else shrunk
            yield seen, targets, indices

    def label(self, index: int) -> str:
        return self.classes[int(self.targets[index])]

    def finding(self, kind: str, index: int, score: float, detail: str, **other: Any) -> Finding:
        return Finding(kind, index, self.paths[index], self.label(index), score, detail, **other)

    def copies(self, kind: str, copies: list[Copy], of: "_Images") -> list[Finding]:
        """Return copies of images among `of`, the closest first."""
        found = []
        for copy in sorted(copies, key=lambda copy: copy.difference):
            path, label = of.paths[copy.of], of.label(copy.of)
            same = "mirror image of" if copy.mirrored else "nearly the same as" if copy.difference else "same pixels as"
            detail = f"{same} {path or f'image {copy.of}'}"
            if label != self.label(copy.index):
                detail += f", labeled {label}"
            found.append(self.finding(kind, copy.index, copy.difference, detail, other=copy.of, other_path=path))
        return found

    def unlike(self, kind: str, scores: Tensor, detail: Callable[[int], str]) -> list[Finding]:
        """Return the images whose score is far from 0, the farthest first."""
        order = scores.abs().argsort(descending=True, stable=True)[: int((scores.abs() > FAR).sum())]
        return [self.finding(kind, index, float(scores[index]), detail(index)) for index in order.tolist()]


def held_out(
    table: Table, targets: Tensor, classes: int, *, l2: float | None = None, seed: int = 0
) -> tuple[LinearHead, Tensor]:
    """Solve a head in four folds; return it, and the probabilities of each image in the fold without it, `(N, K)`."""
    loss = CrossEntropy()
    settings: dict[str, Any] = {"classes": classes, "folds": FOLDS, "seed": seed}
    solved = solve(table, targets, loss, strengths=STRENGTHS if l2 is None else [l2], **settings)
    if len(solved.held_out) < len(targets):  # of many images only one fold was left out to choose the penalty
        solved = solve(table, targets, loss, strengths=[solved.l2], every_fold=True, **settings)
    rows, logits = solved.held_out.cpu(), solved.logits.cpu()
    probabilities = torch.empty_like(logits)
    probabilities[rows] = (logits / fit_temperature(logits, targets[rows], loss)).softmax(dim=1)
    return solved, probabilities


def find_exchanged(table: Table, targets: Tensor, classes: int, *, l2: float, seed: int) -> tuple[float, float]:
    """Exchange some labels and look for them.

    Return which fraction of as many labels that look worst are those, and the probability up to which half of them are.
    """
    changed, exchanged = exchange_labels(targets, classes, fraction=EXCHANGED, seed=seed)
    own = label_probabilities(held_out(table, changed, classes, l2=l2, seed=seed)[1], changed)
    worst = own.argsort(stable=True)[: int(exchanged.sum())]
    return float(exchanged[worst].double().mean()), find_limit(own, exchanged)


def outlyingness(table: Table, solved: LinearHead) -> Tensor:
    """Return how much farther each row is from its nearest others than most, 0 or more, float64 `(N,)`."""

    def rows() -> Iterator[Tensor]:
        return standardized(table, solved.mean, solved.std)

    axes, _ = principal_axes(rows, table.shape, most=AXES)
    along = torch.cat([(block @ axes).cpu() for block in rows()])
    return unlike(distances(along).clamp_min(1e-6).log()).clamp_min(0)


def _of_other_brightness(images: _Images) -> list[Finding]:
    light = images.small.flatten(1).mean(dim=1).double()
    if images.raw:
        light = ((light + 0.5) / 256).logit()  # black and white are as far from gray as they look
    scores = unlike(light, spread=0.2)
    return images.unlike("brightness", scores, lambda i: f"much {'brighter' if scores[i] > 0 else 'darker'} than most")


def _of_other_size(images: _Images) -> list[Finding]:
    heights, widths = images.sizes.unbind(dim=1)
    area, shape = unlike((heights * widths).log(), spread=0.4), unlike((widths / heights).log(), spread=0.2)
    scores = torch.maximum(area.abs(), shape.abs())
    return images.unlike("size", scores, lambda i: f"{int(widths[i])} x {int(heights[i])} pixels, unlike the others")
