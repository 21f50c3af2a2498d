"""Whatever `Trainer` accepts as data, as batches in an order that depends on (seed, epoch) alone."""

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from transferkit.base.arrays import digest_tensors
from transferkit.base.randomness import derive_seed, shuffled
from transferkit.data.images import as_images
from transferkit.data.samples import SKIP_HINT, Sample, Samples, evenly_spaced
from transferkit.data.targets import as_targets
from transferkit.data.workers import read_in_workers
from transferkit.errors import (
    ArgumentError,
    EmptyDataError,
    ImageError,
    TargetError,
    TransferKitError,
)

Batch = tuple[Tensor | list[Tensor], Tensor, list[int]]
"""Images, targets (none at all, `(0,)`, where they are not wanted) and places in the data set."""

_SCANNED = 32  # images that are looked at between two chances to stop
_NO_TARGETS = torch.empty(0, dtype=torch.int64)


class Source(Protocol):
    """Data that can be read again and again, in a given order."""

    @property
    def num_images(self) -> int | None:
        """None where a `DataLoader` does not tell."""

    def num_batches(self, batch_size: int) -> int | None:
        """Number of batches in an epoch."""

    def batches(self, batch_size: int, *, seed: int, order: Tensor | None) -> Iterator[Batch]:
        """Yield the images once each, in the given order or as they lie; `seed` is for the data's own randomness."""

    def why_not_repeatable(self, places: Tensor | None = None) -> str | None:
        """Say why one of the images at `places` may come out differently when read again; None if nothing was found."""

    def all_targets(self, places: Tensor | None = None) -> Tensor:
        """Return the targets at `places`, int64 `(N,)` or float32 `(N, K)`; None is all. Data is read if it must be."""

    def digest(self, places: Tensor | None = None) -> str:
        """Return a digest of the targets, where they are listed, and of some images, by which other data is noticed."""


def epoch_order(num_images: int | None, seed: int, epoch: int) -> Tensor | None:
    """Return the order of the images in an epoch, int64 `(num_images,)`.

    Example:
        >>> sorted(epoch_order(4, seed=0, epoch=2).tolist())
        [0, 1, 2, 3]
    """
    return None if num_images is None else shuffled(num_images, derive_seed(seed, "order", epoch))


def count_batches(num_images: int, batch_size: int) -> int:
    """Return the number of batches, the last of which may be smaller.

    Example:
        >>> count_batches(5, batch_size=2)
        3
    """
    return -(-num_images // batch_size)


def _in_batches(order: Tensor | None, num_images: int, batch_size: int) -> Sequence[Tensor]:
    places: Sequence[Tensor] = torch.split(torch.arange(num_images) if order is None else order, batch_size)
    return places


class ArraySource:
    """Images and targets in memory. Each batch is one indexing operation."""

    def __init__(self, images: object, targets: object, classes: Sequence[str], *, multi_label: bool = False) -> None:
        self.images = as_images(images)
        self.num_images = len(self.images)
        if self.num_images == 0:
            raise EmptyDataError(f"data holds no images: got shape {tuple(self.images.shape)}, expected 1 or more.")
        self.targets = _NO_TARGETS if targets is None else as_targets(targets, len(classes), multi_label=multi_label)
        if targets is not None and len(self.targets) != self.num_images:
            raise TargetError(
                f"{self.num_images} images but {len(self.targets)} targets: expected one target for each image."
            )

    def num_batches(self, batch_size: int) -> int:
        return count_batches(self.num_images, batch_size)

    def batches(self, batch_size: int, *, seed: int, order: Tensor | None) -> Iterator[Batch]:
        for places in _in_batches(order, self.num_images, batch_size):
            yield self.images[places], self.targets[places] if len(self.targets) else _NO_TARGETS, places.tolist()

    def why_not_repeatable(self, places: Tensor | None = None) -> str | None:
        return None

    def all_targets(self, places: Tensor | None = None) -> Tensor:
        return self.targets if places is None else self.targets[places]

    def digest(self, places: Tensor | None = None) -> str:
        images = torch.stack([self.images[place] for place in evenly_spaced(self.num_images, places)])
        return _digest(targets=self.targets, places=_NO_TARGETS if places is None else places, images=images)


class DatasetSource:
    """A map-style `Dataset`, read by a `DataLoader`; its own random transforms are seeded image by image."""

    def __init__(
        self, dataset: Any, classes: Sequence[str], *, num_workers: int, with_targets: bool, multi_label: bool = False
    ) -> None:
        self.read_targets = partial(as_targets, num_classes=len(classes), multi_label=multi_label)
        self.num_images = len(dataset)
        if self.num_images == 0:
            raise EmptyDataError(f"data is an empty {type(dataset).__name__}: expected 1 image or more.")
        self.samples = Samples(dataset, with_targets=with_targets)
        self.num_classes = len(classes)
        self.num_workers = num_workers
        listed = getattr(dataset, "targets", None)
        self.targets_listed = (
            with_targets
            and isinstance(listed, list | Tensor | np.ndarray)
            and getattr(dataset, "target_transform", None) is None
        )
        if self.targets_listed:
            self.read_targets(listed)  # all at once, before anything runs

    def check_first(self) -> None:
        """Read one sample, so that data of a form that cannot be used is refused at once."""
        _collate([self.samples.read(0, 0)], self.read_targets if self.samples.with_targets else None, self.num_classes)

    def num_batches(self, batch_size: int) -> int:
        return count_batches(self.num_images, batch_size)

    def batches(self, batch_size: int, *, seed: int, order: Tensor | None) -> Iterator[Batch]:
        parts = _in_batches(order, self.num_images, batch_size)
        keys = [[(place, derive_seed(seed, place)) for place in part.tolist()] for part in parts]
        for samples in read_in_workers(self.samples, keys, num_workers=self.num_workers, seed=seed):
            yield _collate(samples, self.read_targets if self.samples.with_targets else None, self.num_classes)

    def why_not_repeatable(self, places: Tensor | None = None) -> str | None:
        return self.samples.why_not_repeatable(evenly_spaced(self.num_images, places))

    def all_targets(self, places: Tensor | None = None) -> Tensor:
        if self.targets_listed:
            targets: Tensor = self.read_targets(self.samples.dataset.targets)
            return targets if places is None else targets[places]
        return torch.cat([targets for _, targets, _ in self.batches(_SCANNED, seed=0, order=places)])

    def digest(self, places: Tensor | None = None) -> str:
        listed = self.samples.dataset.targets if self.targets_listed else []
        tensors = {"targets": torch.as_tensor(listed), "places": _NO_TARGETS if places is None else places}
        if self.why_not_repeatable(places) is None:
            tensors |= {str(place): self.samples.read(place, 0)[0] for place in evenly_spaced(self.num_images, places)}
        return _digest(**tensors)

    def failures(self) -> Generator[tuple[int, dict[int, str]], None, None]:
        """Read every sample; yield after each batch how many were read, and what is wrong with which of them."""
        read = 0
        keys = [[(place, 0) for place in part.tolist()] for part in _in_batches(None, self.num_images, _SCANNED)]
        for batch in read_in_workers(self.samples, keys, num_workers=self.num_workers, seed=0):
            bad = {
                read + row: str(sample).removesuffix(SKIP_HINT)
                for row, sample in enumerate(batch)
                if isinstance(sample, TransferKitError)
            }
            read += len(batch)
            yield read, bad


class LoaderSource:
    """A user's own `DataLoader`: its batches, in its order."""

    def __init__(
        self, loader: "DataLoader[Any]", classes: Sequence[str], *, with_targets: bool, multi_label: bool = False
    ) -> None:
        self.loader = loader
        self.read_targets = partial(as_targets, num_classes=len(classes), multi_label=multi_label)
        self.with_targets = with_targets
        self.num_images: int | None = None
        sized = hasattr(loader.dataset, "__len__")
        self.length = len(loader) if sized else None
        if self.length == 0:
            raise EmptyDataError(
                f"the DataLoader makes 0 batches: {len(loader.dataset)} images, "  # type: ignore[arg-type]
                f"batch_size {loader.batch_size}, drop_last={loader.drop_last}. Expected 1 batch or more."
            )

    def num_batches(self, batch_size: int) -> int | None:
        return self.length

    def batches(self, batch_size: int, *, seed: int, order: Tensor | None) -> Iterator[Batch]:
        first = 0
        for batch in self.loader:
            parts = batch if isinstance(batch, tuple | list) else (batch,)
            if self.with_targets and len(parts) != 2:
                raise TargetError(
                    f"the DataLoader's batch has {len(parts)} parts ({type(batch).__name__}): expected (images, "
                    "targets)."
                )
            images = as_images(parts[0])
            places = list(range(first, first + len(images)))
            targets = self.read_targets(parts[1], places=places) if self.with_targets else _NO_TARGETS
            yield images, targets, places
            first += len(images)
        if first == 0:
            raise EmptyDataError("the DataLoader made no batch this time: expected 1 or more in every epoch.")

    def why_not_repeatable(self, places: Tensor | None = None) -> str | None:
        return "a DataLoader makes batches of its own, in an order of its own; pass its Dataset instead"

    def all_targets(self, places: Tensor | None = None) -> Tensor:
        raise ArgumentError(
            '"balanced" needs all targets before the first step, which a DataLoader does not tell: pass its Dataset, '
            "or the weights as numbers."
        )

    def digest(self, places: Tensor | None = None) -> str:
        return _digest(length=torch.tensor(-1 if self.length is None else self.length))


def _collate(
    samples: Sequence[Sample | TransferKitError], read_targets: Callable[..., Tensor] | None, num_classes: int
) -> Batch:
    for sample in samples:
        if isinstance(sample, TransferKitError):
            raise sample
    images, targets, places = map(list, zip(*samples, strict=True))
    if len({image.dtype for image in images}) > 1:
        raise ImageError(
            f"images {places} mix raw (uint8) and preprocessed (float) ones: expected one kind throughout."
        )
    same_size = len({image.shape for image in images}) == 1
    if not same_size and images[0].is_floating_point():
        raise ImageError(f"images {places} are preprocessed (float) but differ in size: expected one size throughout.")
    labels = _NO_TARGETS
    if read_targets is not None:
        try:
            stacked = torch.stack([torch.as_tensor(target) for target in targets])
        except (TypeError, ValueError, RuntimeError) as error:  # names of classes, or rows of different lengths
            raise TargetError(
                f"targets of images {places} do not make a batch ({error}): expected class indices 0 to "
                f"{num_classes - 1}, or rows of {num_classes}; got {targets[0]!r} for the first."
            ) from error
        labels = read_targets(stacked, places=places)
    return torch.stack(images) if same_size else images, labels, places


def _digest(**tensors: Tensor) -> str:
    digest = hashlib.sha256()
    digest_tensors(digest, tensors)
    return digest.hexdigest()


class SubsetSource:
    """Some images of a source, by their places in it; the data is not copied.

    Attributes:
        source: The whole.
        places: Which images, int64 `(num_images,)`.
    """

    def __init__(self, source: Source, places: Tensor) -> None:
        self.source = source
        self.places = places
        self.num_images = len(places)

    def num_batches(self, batch_size: int) -> int:
        return count_batches(self.num_images, batch_size)

    def batches(self, batch_size: int, *, seed: int, order: Tensor | None) -> Iterator[Batch]:
        places = self.places if order is None else self.places[order]
        return self.source.batches(batch_size, seed=seed, order=places)

    def why_not_repeatable(self, places: Tensor | None = None) -> str | None:
        return self.source.why_not_repeatable(self.places if places is None else self.places[places])

    def all_targets(self, places: Tensor | None = None) -> Tensor:
        return self.source.all_targets(self.places if places is None else self.places[places])

    def digest(self, places: Tensor | None = None) -> str:
        return self.source.digest(self.places if places is None else self.places[places])
