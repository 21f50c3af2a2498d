"""Hold some of the training data back to validate on."""

from collections.abc import Iterator

import torch
from torch import Tensor

from transferkit.base.arguments import fraction, one_of
from transferkit.data.sources import Batch, Source, count_batches
from transferkit.errors import ArgumentError, EmptyDataError
from transferkit.base.randomness import derive_seed, shuffled
from collections.abc import Callable
from contextlib import closing
import torch
from transferkit.data.sources import DatasetSource, Source
from transferkit.base.display import Display
from transferkit.errors import ArgumentError, EmptyDataError, ImageError
from transferkit.data.sources import SubsetSource




def split_validation(source: Source, validation_split: float, seed: int) -> tuple[SubsetSource, SubsetSource]:
    """Divide data into a part to train on and a part to validate on, at random by `seed`.

    Raises:
        ArgumentError: The fraction is not between 0 and 1, or the data is a `DataLoader`.
        EmptyDataError: One of the parts would be empty.
    """
    if fraction("validation_split", validation_split) == 0:
        raise ArgumentError("validation_split=0 holds nothing back: expected a fraction above 0, e.g. 0.2, or None.")
    if source.num_images is None:
        raise ArgumentError(
            "validation_split cannot divide a DataLoader, which makes its own batches: pass (images, targets), a "
            "Dataset, or validation_data= instead."
        )
    count = round(source.num_images * validation_split)
    if count in (0, source.num_images):
        raise EmptyDataError(
            f"validation_split={validation_split} of {source.num_images} images leaves {source.num_images - count} to "
            f"train and {count} to validate: expected at least 1 each."
        )
    order = shuffled(source.num_images, derive_seed(seed, "validation"))
    return SubsetSource(source, torch.sort(order[count:]).values), SubsetSource(source, torch.sort(order[:count]).values)


POLICIES = ("raise", "skip")


LIMIT = 0.01
"""Share of the images that may be bad; one may always be."""


def without_bad_images(source: Source, *, display: Display, check: Callable[[], None]) -> Source:
    """Read every image of a data set once, and return the data set without those that cannot be used.

    Which images a run uses, and how many steps an epoch has, is therefore known before the first step and does not
    change. The price is one more reading.

    Args:
        source: A `Dataset`; images in memory cannot be bad in this way.
        display: Shows how far it is, and a line for each bad image.
        check: Called after each batch, to stop.

    Raises:
        ImageError: More than 1 % of the images are bad, and more than one.
        ArgumentError: The data is a `DataLoader`.
        EmptyDataError: Every image is bad.
    """
    if not isinstance(source, DatasetSource):
        if source.num_images is None:
            raise ArgumentError(
                'on_bad_image="skip" does not reach a DataLoader, which reads images itself: pass its Dataset instead.'
            )
        return source
    bad: dict[int, str] = {}
    with closing(source.failures()) as found, display.bar("looking for bad images", source.num_images) as bar:
        before = 0
        for places, failures in found:
            bar.advance(places - before)
            before = places
            bad.update(failures)
            check()
            if len(bad) > max(1, LIMIT * source.num_images):
                raise ImageError(
                    f"{len(bad)} of the first {places} images cannot be used, more than {LIMIT:.0%} of all "
                    f"{source.num_images}: this is no accident. The first: {next(iter(bad.values()))}"
                )
    if len(bad) == source.num_images:
        raise EmptyDataError(f"none of the {source.num_images} images can be used: {next(iter(bad.values()))}")
    for reason in bad.values():
        display.say(f"left out: {reason}")
    if not bad:
        return source
    good = torch.ones(source.num_images, dtype=torch.bool)
    good[list(bad)] = False
    return SubsetSource(source, good.nonzero().flatten())


def check_policy(on_bad_image: str) -> str:
    """Return `on_bad_image` if it is known.

    Raises:
        ArgumentError: It is not.
    """
    return one_of("on_bad_image", on_bad_image, POLICIES)
