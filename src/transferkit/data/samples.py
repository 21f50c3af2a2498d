"""One sample of a user's data set: read under a seed of its own, each failure named by index and path."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import default_loader, pil_loader

from transferkit.base.randomness import find_generators, next_numbers, seeded, state_of
from transferkit.base.surroundings import ProcessSetting
from transferkit.data.columns import image_and_target, image_of
from transferkit.data.images import as_image, is_encoded, open_image
from transferkit.data.preprocessing import Preprocessing
from transferkit.errors import CacheError, ImageError, TransferKitError

Sample = tuple[Tensor, Any, int]  # image, target, index in the data set

_TORCHVISION = "torchvision.datasets."

NUM_CHECKED = 16  # samples that stand for a data set where reading all would take too long

SKIP_HINT = ' fit(on_bad_image="skip") leaves it out.'
_NAN_HINT = ' predict_proba(on_bad_image="nan") gives NaN for it.'


class Samples:
    """The samples of a user's data set, pairs of image and target or images, read in this process or in a worker."""

    preprocess: Preprocessing | None = None  # what will be applied to the images; None asks for all pixels

    def __init__(self, dataset: Any, *, with_targets: bool) -> None:
        self.dataset = dataset
        self.with_targets = with_targets

    def for_input(self, preprocess: Preprocessing | None) -> "Samples":
        """Return these samples with images in no more pixels than `preprocess` needs."""
        other = copy.copy(self)
        other.preprocess = preprocess
        return other

    def try_read(self, index: int, seed: int | None) -> "Sample | TransferKitError":
        """Return what `read` returns, or the error it raises: raised in a worker, it would not arrive whole."""
        try:
            return self.read(index, seed)
        except TransferKitError as error:
            return error

    def read(self, index: int, seed: int | None) -> Sample:
        """Read a sample, with the global random generators seeded; with None, to draw a number is a `CacheError`.

        An image that cannot be read or used is an `ImageError`, a sample that is no pair a `TargetError`.
        """
        preprocess = self.preprocess
        try:
            with _TRUNCATED.at(value=False):
                sample = self._get(index, seed)
                image, target = (
                    image_and_target(sample, f"sample {index}") if self.with_targets else (image_of(sample), None)
                )
                _warn_of_order(self.dataset, index, image)
                pixels = as_image(_opened(image, index, preprocess), index)
            return pixels if preprocess is None else preprocess.shrink(pixels), target, index
        except TransferKitError as error:
            path = path_of(self.dataset, index)
            first, *lines = error.args
            raise type(error)(f"{first} File: {path}" if path else first, *lines) from error
        except Exception as error:
            path = path_of(self.dataset, index)
            failed = f"cannot read image {index}{in_parentheses(path)}: {type(error).__name__}: {error}".rstrip(": ")
            expected = "Expected a complete image file" + (
                f", and a data set and transform that return (image, target). Replace or remove it.{SKIP_HINT}"
                if self.with_targets
                else f".{_NAN_HINT}"
            )
            raise ImageError(f"{failed}. {expected}") from error

    def _get(self, index: int, seed: int | None) -> Any:
        """Return a sample as the data set gives it."""
        if self.are_files:
            return _from_folder(self.dataset, index) or self.dataset[index]
        with seeded(_SEED if seed is None else seed):
            before = [] if seed is not None else [*map(state_of, self._generators)]
            sample = _from_folder(self.dataset, index) or self.dataset[index]
            if seed is None:
                self._check_undrawn(index, before)
        return sample

    def why_not_repeatable(self, indices: Sequence[int]) -> str | None:
        """Read each sample twice, watching the random generators; say what differed, or return None."""
        for index in () if self.are_files else indices:
            try:
                first, second = self.read(index, None), self.read(index, None)
            except CacheError as error:
                return str(error)
            if first[0].shape != second[0].shape or not torch.equal(first[0], second[0]):
                return f"image {index} of the data set came out differently when it was read twice"
            if not same_targets(first[1], second[1]):
                return f"the target of image {index} came out differently when it was read twice"
        return None

    def _check_undrawn(self, index: int, before: list[object]) -> None:
        if [*map(state_of, self._generators)] != before or next_numbers() != _undrawn():  # drawing changes the states
            raise CacheError(
                f"the data set drew random numbers for image {index}, so its transform is random: leave it "
                "out (augment= changes training images)"
            )

    @cached_property
    def are_files(self) -> bool:
        """Whether the samples are image files that the library opens, with no code of the user's in between."""
        return _are_files(self.dataset)

    @cached_property
    def _generators(self) -> list[Any]:
        """Generators of random numbers that are the data set's own."""
        return find_generators(self.dataset)


_TRUNCATED = ProcessSetting(
    lambda: ImageFile.LOAD_TRUNCATED_IMAGES, lambda value: setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", value)
)  # Pillow fills with gray what is missing of a file if it is true

_SEED = 0  # of samples that are to draw no random numbers


@cache
def _undrawn() -> tuple[float, ...]:
    with seeded(_SEED):
        return next_numbers()


def evenly_spaced(count: int, indices: Tensor | None = None) -> list[int]:
    """Return at most `NUM_CHECKED` of `indices`, spread evenly; of 0 to `count - 1` if None."""
    count = count if indices is None else len(indices)
    rows = sorted({round(part * (count - 1) / (NUM_CHECKED - 1)) for part in range(NUM_CHECKED)})
    return rows if indices is None else [int(indices[row]) for row in rows]


def path_of(dataset: Any, index: int) -> str | None:
    """Return a sample's file if the data set lists it: an `ImageFolder`, also in a `Subset` or `ConcatDataset`."""
    dataset, index = innermost(dataset, index)
    listed = getattr(dataset, "samples", getattr(dataset, "imgs", None))
    if not isinstance(listed, list | tuple) or not 0 <= index < len(listed):
        return None
    entry = listed[index][:1] if isinstance(listed[index], tuple | list) else (listed[index],)
    return str(entry[0]) if entry and isinstance(entry[0], str | Path) else None


def innermost(dataset: Any, index: int) -> tuple[Any, int]:
    """Return the data set inside torch's `Subset` and `ConcatDataset` that holds a sample, and its index there."""
    while type(dataset) in (Subset, ConcatDataset):
        if type(dataset) is Subset:
            dataset, index = dataset.dataset, int(dataset.indices[index])
        else:
            part = next(number for number, end in enumerate(dataset.cumulative_sizes) if index < end)
            dataset, index = dataset.datasets[part], index - (dataset.cumulative_sizes[part - 1] if part else 0)
    return dataset, index


def in_parentheses(path: str | None) -> str:
    """Return a path as it follows an index in a message; nothing for None."""
    return f" ({path})" if path else ""


class GivenImages:
    """Images in a list, and their targets if there are any; a file is opened when its image is read."""

    def __init__(self, images: Sequence[Any], targets: Any = None) -> None:
        self.samples = list(images)  # error messages look up paths here
        self.targets = targets

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index] if self.targets is None else (self.samples[index], self.targets[index])


def same_targets(one: Any, other: Any) -> bool:
    """Return whether two targets are equal, whatever holds them; numpy knows no bfloat16."""
    plain = [target.tolist() if isinstance(target, Tensor) else target for target in (one, other)]
    return np.array_equal(plain[0], plain[1])


def listed_targets(dataset: Any) -> Any:
    """Return the targets of a data set, one for each sample, where it is known how `__getitem__` finds them; else None.

    A list that a data set of the user's own has beside `__getitem__` may be stale, or of other labels.
    """
    if type(dataset) is Subset:
        whole = listed_targets(dataset.dataset)
        return None if whole is None else [whole[index] for index in dataset.indices]
    if type(dataset) is ConcatDataset:
        parts = [listed_targets(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [target for part in parts for target in part]
    if type(dataset) is TensorDataset:
        return dataset.tensors[1] if len(dataset.tensors) == 2 else None
    read = type(dataset).__getitem__ if hasattr(type(dataset), "__getitem__") else None
    targets = getattr(dataset, "targets", None)
    if read is DatasetFolder.__getitem__:
        targets = [target for _, target in dataset.samples]
    elif read is not GivenImages.__getitem__ and not str(getattr(read, "__module__", "")).startswith(_TORCHVISION):
        return None
    if targets is None or len(targets) != len(dataset):
        return None
    transform = getattr(dataset, "target_transform", None)
    with seeded(0):
        return targets if transform is None else [transform(target) for target in targets]


def _are_files(dataset: Any) -> bool:
    if type(dataset) is Subset:
        return _are_files(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(_are_files, dataset.datasets))
    if type(dataset) is GivenImages:
        return all(isinstance(image, str | PathLike | bytes) for image in dataset.samples)
    return _is_folder(dataset) and dataset.transform is dataset.target_transform is None


def _opened(image: Any, index: int, preprocess: Preprocessing | None) -> Any:
    """Return the image of a path, of encoded bytes, or of a dict of these as Hugging Face has it; others as given."""
    if isinstance(image, Mapping) and set(image) == {"bytes", "path"}:
        image = image["path"] if image["bytes"] is None else image["bytes"]
    if not isinstance(image, str | PathLike) and not is_encoded(image):
        return image
    return open_image(image, index, prepare=None if preprocess is None else preprocess.request_size)


def _warn_of_order(dataset: Any, index: int, image: Any) -> None:
    """Say that the channel order of an `ImageFolder` is its loader's, where that makes no PIL images."""
    loader = getattr(innermost(dataset, index)[0], "loader", default_loader)
    if loader not in (default_loader, pil_loader) and not isinstance(image, Image.Image):
        warnings.warn(
            "the order of the channels cannot be seen in what the data set's loader returns: expected RGB. cv2.imread "
            "gives BGR: ImageFolder(..., loader=lambda path: cv2.imread(path)[..., ::-1]), or no loader at all.",
            stacklevel=2,
        )


def _is_folder(dataset: Any) -> bool:
    plain = isinstance(dataset, DatasetFolder) and type(dataset).__getitem__ is DatasetFolder.__getitem__
    return plain and dataset.loader is default_loader


def _from_folder(dataset: Any, index: int) -> tuple[Any, Any] | None:
    """Return path and target of a plain `ImageFolder`, or what its transforms make of them; None for other data sets.

    `ImageFolder`'s own loader clips 16-bit values at 255 and ignores the EXIF orientation, both silently.
    """
    dataset, inner_index = innermost(dataset, index)
    if not _is_folder(dataset):
        return None
    path, target = dataset.samples[inner_index]
    image = path if dataset.transform is None else dataset.transform(open_image(path, index))
    return image, target if dataset.target_transform is None else dataset.target_transform(target)
