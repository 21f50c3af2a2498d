"""One sample of a user's data set, read under a seed of its own, with every failure named by index and path."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFile
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import default_loader

from transferkit.base.randomness import generator_states, seeded
from transferkit.data.images import as_image, upright_rgb
from transferkit.errors import ImageError, TargetError, TransferKitError

Sample = tuple[Tensor, Any, int]
"""Image, target, place in the data set."""

PROBES = 16
"""Samples that are looked at where all would take too long."""

SKIP_HINT = ' fit(on_bad_image="skip") leaves it out.'


class Samples(Dataset["Sample | TransferKitError"]):
    """Reads samples of a data set, in this process or in a worker.

    What is wrong with a sample comes back as the error that says so: raised in a worker it would lose its form.

    Args:
        dataset: The user's.
        with_targets: Whether samples are pairs of image and target.
        reading: int64 `(workers,)` in shared memory, in which each worker notes the sample it is at; None without.
    """

    def __init__(self, dataset: Any, *, with_targets: bool) -> None:
        self.dataset = dataset
        self.with_targets = with_targets
        self.reading: Tensor | None = None

    def __getitem__(self, key: tuple[int, int]) -> "Sample | TransferKitError":
        index, seed = key
        worker = torch.utils.data.get_worker_info()
        if worker is not None and self.reading is not None:
            self.reading[worker.id] = index
        sample: Sample | TransferKitError
        try:
            sample = self.read(index, seed)
        except TransferKitError as error:
            sample = error
        if worker is not None and self.reading is not None:
            self.reading[worker.id] = -1  # not where the worker ends in between
        return sample

    def read(self, index: int, seed: int) -> Sample:
        """Read a sample.

        Raises:
            ImageError: It cannot be read, or is no image that can be used.
            TargetError: It has no target.
        """
        truncated_pass, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            with seeded(seed):
                sample = _from_folder(self.dataset, index) or self.dataset[index]
            image, target = _parts(sample, index) if self.with_targets else (_image_of(sample), None)
            return as_image(image, index), target, index
        except TransferKitError as error:
            path = path_of(self.dataset, index)
            raise type(error)(f"{error} File: {path}" if path else str(error)) from error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            raise ImageError(
                f"cannot read image {index}{_at(self.dataset, index)}: {reason}. Expected a whole image file, and a "
                f"data set and transform that return (image, target). Replace or remove it.{SKIP_HINT}"
                if self.with_targets
                else f"cannot read image {index}{_at(self.dataset, index)}: {reason}. Expected a whole image."
            ) from error
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = truncated_pass

    def why_not_repeatable(self, places: Sequence[int]) -> str | None:
        """Read samples under two seeds each, and watch the random generators."""
        for index in places:
            first, second = self.read(index, 0)[0], self.read(index, 1)[0]
            if first.shape != second.shape or not torch.equal(first, second):
                return f"image {index} of the data set came out differently when it was read twice"
            with seeded(0):
                before = generator_states()
                self.dataset[index]
                if generator_states() != before:
                    return f"the data set drew random numbers for image {index}, so its transform is random"
        return None


def _parts(sample: Any, index: int) -> tuple[Any, Any]:
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise TargetError(f"sample {index} is a {type(sample).__name__}: expected a pair (image, target).")
    return sample[0], sample[1]


def _image_of(sample: Any) -> Any:
    return sample[0] if isinstance(sample, tuple | list) else sample


def probes(count: int, places: Tensor | None = None) -> list[int]:
    """Return some of `places`, spread over all of them; None is 0 to `count - 1`.

    Example:
        >>> probes(3), len(probes(1000)), probes(1000, torch.tensor([7, 8]))
        ([0, 1, 2], 16, [7, 8])
    """
    count = count if places is None else len(places)
    rows = sorted({round(part * (count - 1) / (PROBES - 1)) for part in range(PROBES)})
    return rows if places is None else [int(places[row]) for row in rows]


def path_of(dataset: Any, index: int) -> str | None:
    """Return the file of a sample where the data set tells: an `ImageFolder`, also in a `Subset` or `ConcatDataset`."""
    dataset, index = inner(dataset, index)
    listed = getattr(dataset, "samples", getattr(dataset, "imgs", None))
    if not isinstance(listed, list | tuple) or not 0 <= index < len(listed):
        return None
    entry = listed[index][:1] if isinstance(listed[index], tuple | list) else (listed[index],)
    return str(entry[0]) if entry and isinstance(entry[0], str | Path) else None


def inner(dataset: Any, index: int) -> tuple[Any, int]:
    """Return the data set inside torch's `Subset` and `ConcatDataset` that a sample comes from, and its place there."""
    while type(dataset) in (Subset, ConcatDataset):
        if type(dataset) is Subset:
            dataset, index = dataset.dataset, int(dataset.indices[index])
        else:
            part = next(number for number, end in enumerate(dataset.cumulative_sizes) if index < end)
            dataset, index = dataset.datasets[part], index - (dataset.cumulative_sizes[part - 1] if part else 0)
    return dataset, index


def _at(dataset: Any, index: int) -> str:
    path = path_of(dataset, index)
    return f" ({path})" if path else ""


def _from_folder(dataset: Any, index: int) -> tuple[Any, Any] | None:
    """Read a sample of a plain `ImageFolder` from its file; None for any other data set.

    Its own loader cuts 16-bit values off at 255 without a word and leaves rotated photographs lying on their side.
    """
    dataset, index_there = inner(dataset, index)
    own = isinstance(dataset, DatasetFolder) and type(dataset).__getitem__ is DatasetFolder.__getitem__
    if not own or dataset.loader is not default_loader:
        return None
    path, target = dataset.samples[index_there]
    with Image.open(path) as file:
        image = upright_rgb(file, index)
    image = image if dataset.transform is None else dataset.transform(image)
    return image, target if dataset.target_transform is None else dataset.target_transform(target)
