"""Which images a run uses: a validation split, and a data set without bad images."""

import math
from collections.abc import Callable
from contextlib import closing
from numbers import Real

import torch
from torch import Tensor

from transferkit.base.arguments import fraction, one_of
from transferkit.base.display import Display
from transferkit.base.randomness import derive_seed, shuffled
from transferkit.data.sources import DatasetSource, Source, SubsetSource
from transferkit.data.targets import class_indices
from transferkit.errors import ArgumentError, EmptyDataError, ImageError


def split_validation(
    source: Source, validation_split: float, seed: int, *, multi_label: bool = False
) -> tuple[SubsetSource, SubsetSource]:
    """Split data at random, by `seed`, into training and validation images, both in the order of the data.

    Each class with two images or more is in both, in proportion, unless an image may have several labels.
    """
    if fraction("validation_split", validation_split) == 0:
        raise ArgumentError("validation_split=0 leaves no validation images: expected a fraction, or None.")
    if source.num_images is None:
        raise ArgumentError("validation_split cannot split a DataLoader: pass its Dataset, or validation_data=.")
    count = round(source.num_images * validation_split)
    if count in (0, source.num_images):
        raise EmptyDataError(
            f"validation_split={validation_split} of {source.num_images} images gives {source.num_images - count} "
            f"training and {count} validation images: expected at least 1 of each."
        )
    order = shuffled(source.num_images, derive_seed(seed, "validation"))
    held_out = order[:count]
    if not multi_label:
        held_out = _of_each_class(class_indices(source.all_targets()), order, validation_split)
    return _without(source, held_out), SubsetSource(source, held_out.sort().values)


def _without(source: Source, left_out: Tensor) -> SubsetSource:
    kept = torch.ones(source.num_images or 0, dtype=torch.bool)
    kept[left_out] = False
    return SubsetSource(source, kept.nonzero().flatten())


def _of_each_class(classes: Tensor, order: Tensor, share: float) -> Tensor:
    """Return the first images of each class in an order: a share of them, at least one, and not all."""
    held_out, before = [], 0
    for index in torch.unique(classes):
        own = order[classes[order] == index]
        count = round(share * (before + len(own))) - round(share * before)  # the roundings of classes add up to one
        held_out.append(own[: min(max(1, count), len(own) - 1)])
        before += len(own)
    return torch.cat(held_out)


MAX_BAD_FRACTION = 0.01  # of the images that "skip" may leave out; it may always leave out one
_MOST_NAMED = 100  # bad images after which the search for more ends


def bad_image_limit(on_bad_image: str | float) -> float | None:
    """Return the fraction of images that may be left out, None if none may; anything else is an `ArgumentError`."""
    if isinstance(on_bad_image, Real) and not isinstance(on_bad_image, bool) and 0 <= on_bad_image <= 1:
        return float(on_bad_image)
    hint = "Or a number from 0 to 1: the fraction of images that may be left out."
    return MAX_BAD_FRACTION if one_of("on_bad_image", on_bad_image, ("raise", "skip"), hint=hint) == "skip" else None


def without_bad_images(
    source: Source, limit: float, *, display: Display, check: Callable[[], None] = lambda: None
) -> Source:
    """Read every image of a data set once, and return the data set without those that cannot be used.

    More than one and the fraction `limit` are an `ImageError`. `check` is called after each batch, and may raise.
    """
    if not isinstance(source, DatasetSource):
        if source.num_images is None:
            raise ArgumentError('on_bad_image="skip" does not work with a DataLoader: pass its Dataset.')
        return source
    bad: dict[int, str] = {}  # known before the first step: images and steps of an epoch stay the same
    read = 0
    with closing(source.failures()) as found, display.bar("looking for bad images", source.num_images) as bar:
        for reasons in found:
            bar.advance(len(reasons))
            bad |= {index: reason for index, reason in enumerate(reasons, start=read) if reason is not None}
            read += len(reasons)
            check()
            if len(bad) > max(_MOST_NAMED, limit * source.num_images):
                break
    if len(bad) == source.num_images:
        raise EmptyDataError(f"none of the {source.num_images} images can be used: {next(iter(bad.values()))}")
    if len(bad) > max(1, limit * source.num_images):
        raise ImageError(
            f"{len(bad)} of the first {read} images cannot be used: expected at most {limit:.0%} of all "
            f"{source.num_images}, or one. Replace or remove them, or pass a higher limit: "
            f"on_bad_image={math.ceil(100 * len(bad) / source.num_images) / 100:g}.",
            *list(bad.values())[:_MOST_NAMED],
        )
    for reason in bad.values():
        display.say(f"left out: {reason}")
    return _without(source, torch.tensor(list(bad))) if bad else source
