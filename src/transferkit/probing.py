"""`probe` scores the features of every block before any training."""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import NamedTuple

import torch

from transferkit.base.arguments import whole_number
from transferkit.base.calls import explained
from transferkit.base.display import Display
from transferkit.base.processes import broadcast, together
from transferkit.base.randomness import seeded
from transferkit.base.surroundings import own_surroundings
from transferkit.compute.device import Device, find_device
from transferkit.data.classes import find_classes
from transferkit.data.open import open_data
from transferkit.errors import ArgumentError
from transferkit.features.cache import FeatureCache, open_folder
from transferkit.features.dataset import features_of
from transferkit.linear.choice import solve
from transferkit.linear.table import Table
from transferkit.model.backbone import Backbone
from transferkit.model.freezing import freeze_until
from transferkit.model.head import attach_head
from transferkit.results.figures import Axes, Figure, open_axes
from transferkit.results.tabular import html_table, text_table
from transferkit.training.loss import Loss, LossFunction, find_loss


class ProbeScore(NamedTuple):
    """A linear head on the pooled features of some blocks, by cross-validation.

    Attributes:
        layers: The blocks, as `attach_head(layers=...)` takes them.
        image_size: Height and width of the images, in pixels.
        accuracy: Of the held-out images, 0 to 1.
        error: Standard error of the accuracy over the folds.
        loss: Mean loss of the held-out images.
        l2: The penalty with the lowest loss.
        seconds: To solve it; the features are the same for all blocks of an image size.
    """

    layers: tuple[str, ...]
    image_size: int
    accuracy: float
    error: float
    loss: float
    l2: float
    seconds: float


def plot_probe(probe: "Probe", ax: Axes | None = None) -> Figure:
    """Draw the accuracy of each set of blocks, with its standard error, on `ax`, or on a new figure.

    `Probe.plot` is the same.

    Raises:
        MissingPackageError: When matplotlib is not installed.

    Example:
        >>> probe = Probe([ProbeScore(("block5",), 64, 0.72, 0.01, 0.9, 0.1, 0.5)], {64: 12.0})
        >>> plot_probe(probe).axes[0].get_xlabel()
        'accuracy by cross-validation, with standard error'
    """
    sets = list(dict.fromkeys(score.layers for score in probe.scores))
    ax, figure = open_axes(ax, width=7.5, height=0.6 + 0.36 * len(sets))
    sizes = list(probe.feature_seconds)
    for number, size in enumerate(sizes):
        own = [score for score in probe.scores if score.image_size == size]
        places = [sets.index(score.layers) + (number - (len(sizes) - 1) / 2) * 0.2 for score in own]
        accuracies = [score.accuracy for score in own]
        ax.errorbar(accuracies, places, xerr=[score.error for score in own], fmt="o", capsize=3, label=f"{size} px")
    ax.set_yticks(range(len(sets)), [", ".join(layers) for layers in sets])
    ax.set_xlabel("accuracy by cross-validation, with standard error")
    ax.invert_yaxis()
    ax.grid(axis="x", color="0.9")
    if len(sizes) > 1:
        ax.legend(fontsize="small")
    return figure


@dataclass(frozen=True, repr=False)
class Probe:
    """The scores of a probe, in the order in which they were made. It prints as a table, in a notebook it is one.

    Attributes:
        scores: Each block alone, then the last ones together, for each image size.
        feature_seconds: Seconds to compute the features, by image size.

    Example:
        >>> scores = [ProbeScore(("block4",), 64, 0.71, 0.01, 0.9, 0.1, 0.5)]
        >>> scores += [ProbeScore(("block4", "block5"), 64, 0.74, 0.01, 0.8, 0.1, 0.9)]
        >>> probe = Probe(scores, {64: 12.0})
        >>> probe.best.layers
        ('block4', 'block5')
        >>> print(probe)
        layers         image size         accuracy    loss  seconds
        block4                 64  0.7100 ± 0.0100  0.9000      0.5
        block4,block5          64  0.7400 ± 0.0100  0.8000      0.9
        features: 12 s at 64 px
    """

    scores: list[ProbeScore]
    feature_seconds: dict[int, float]

    @property
    def best(self) -> ProbeScore:
        """The score with the lowest loss on held-out images, which is less noisy than accuracy."""
        return min(self.scores, key=lambda score: (math.isnan(score.loss), score.loss))

    def __str__(self) -> str:
        return f"{text_table(self._table())}\n{self._last_line()}"

    __repr__ = __str__  # what an interpreter shows

    def _repr_html_(self) -> str:
        return f"{html_table(self._table())}<p>{self._last_line()}</p>"

    def _table(self) -> list[list[str]]:
        table = [["layers", "image size", "accuracy", "loss", "seconds"]]
        for score in self.scores:
            accuracy, seconds = f"{score.accuracy:.4f} ± {score.error:.4f}", f"{score.seconds:.1f}"
            table.append([",".join(score.layers), str(score.image_size), accuracy, f"{score.loss:.4f}", seconds])
        return table

    def _last_line(self) -> str:
        return "features: " + ", ".join(f"{spent:.0f} s at {size} px" for size, spent in self.feature_seconds.items())

    plot = plot_probe


@explained
@together("probe")
@own_surroundings()
def probe(
    backbone: Backbone,
    data: object,
    *,
    classes: Sequence[str] | int | None = None,
    image_sizes: Sequence[int] | None = None,
    folds: int = 4,
    loss: Loss | LossFunction | None = None,
    device: str | torch.device | Device = "auto",
    precision: str = "auto",
    cache: str | PathLike[str] | None = None,
    seed: int = 0,
    num_workers: int = 0,
    verbose: int = 1,
) -> Probe:
    """Score the pooled features of each block, alone and together, by cross-validation of a solved linear head.

    One pass over the images computes the features of all blocks. The scores show which layers a head should take.
    Blocks after the best single one are too specific to ImageNet; training them can help.

    Args:
        backbone: From `load_backbone`; a copy is used. If it was trained on these images, the scores are too high.
        data: As in `Trainer.fit`.
        classes: The class names or their number; None takes them from the data.
        image_sizes: Heights and widths to compare, in pixels; None takes the backbone's own. Each costs a pass.
        folds: Parts of the cross-validation, 2 or more.
        loss: As in `Trainer`.
        device: As in `Trainer`.
        precision: As in `Trainer`.
        cache: A folder for feature files; None keeps them in memory.
        seed: Determines the folds.
        num_workers: Processes that read a `Dataset`.
        verbose: As in `Trainer.fit`.

    Raises:
        ArgumentError: When `backbone` is something else, or a value is out of range.
        TransferKitError: When the data cannot be used.

    Example:
        >>> from transferkit import load_backbone
        >>> images, targets = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8), torch.arange(16) % 2
        >>> backbone = load_backbone("vgg11", weights=None, image_size=32)
        >>> found = probe(backbone, (images, targets), device="cpu", verbose=0)
        >>> [len(score.layers) for score in found.scores]
        [1, 1, 1, 1, 1, 2, 3, 4, 5]

    References:
        Alain and Bengio, 2016, "Understanding intermediate layers using linear classifier probes", arXiv:1610.01644.
    """
    if not isinstance(backbone, Backbone):
        raise ArgumentError(f"backbone is a {type(backbone).__name__}: expected a Backbone from load_backbone.")
    names = find_classes(data, classes)
    folds = whole_number("folds", folds, at_least=2)
    display, place = Display(verbose), find_device(device, precision)
    scores: list[ProbeScore] = []
    seconds: dict[int, float] = {}
    blocks = backbone.blocks
    folder = open_folder(cache)
    sizes = [backbone.image_size] if image_sizes is None else image_sizes
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes:
        raise ArgumentError(
            f"image_sizes={sizes!r} cannot be used: expected a list of sizes in pixels, such as [32, 64]."
        )
    for size in sizes:
        resized = copy.deepcopy(backbone)
        resized.preprocess = backbone.preprocess.with_image_size(whole_number("each of image_sizes", size, at_least=32))
        with seeded(whole_number("seed", seed, at_least=0)):  # the head is never used
            model = freeze_until(attach_head(resized, names, layers=blocks), "head")
        measure = find_loss(loss, model, place.torch_device)
        model.threshold = measure.threshold
        source = open_data(data, model.classes, num_workers=num_workers, multi_label=model.threshold is not None)
        started = time.perf_counter()
        features = features_of(model, source, device=place, cache=FeatureCache(place, folder), display=display)
        measure = measure.for_run(source, len(model.classes), place.torch_device)
        seconds[size] = time.perf_counter() - started
        kinds = len(model.columns) // len(blocks)  # of each block: its means, its maxima
        sets = [(block,) for block in blocks] + [blocks[-count:] for count in range(2, len(blocks) + 1)]
        for layers in sets:
            started = time.perf_counter()
            first = kinds * blocks.index(layers[0])
            table = Table.of_features(features, columns=model.columns[first : first + kinds * len(layers)])
            solved = solve(table, features.targets, measure, classes=len(model.classes), folds=folds, seed=seed)
            best = min(solved.path, key=lambda strength: strength.loss)
            spent = time.perf_counter() - started
            scores.append(ProbeScore(layers, size, best.accuracy, best.accuracy_error, best.loss, best.l2, spent))
            display.say(f"{','.join(layers)} at {size} px: {best.accuracy:.4f} ± {best.accuracy_error:.4f}")
    return Probe(*broadcast((scores, seconds), "the probe"))
