"""Everything `Trainer` accepts as data, in batches whose order depends only on (seed, epoch)."""

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
"""Images, targets (empty, `(0,)`, if not requested) and the images' indices in the data set."""

_SCANNED = 32  # images read at a time outside of epochs; a signal is checked between batches
_NO_TARGETS = torch.empty(0, dtype=torch.int64)


class Source(Protocol):
    """Data that can be read repeatedly, in a given order."""

    @property
    def num_images(self) -> int | None:
        """None for a `DataLoader`."""

    def num_batches(self, batch_size: int) -> int | None:
        """Number of batches in an epoch; None if a `DataLoader` has no length."""

    def batches(self, batch_size: int, *, seed: int | None, order: Tensor | None) -> Iterator[Batch]:
        """Yield each image once.

        Args:
            batch_size: Images in a batch; a `DataLoader` has its own.
            seed: Seeds the random transforms of a data set; None raises `CacheError` where it draws random numbers.
            order: Indices of the images, int64 `(N,)`; None keeps the order of the data set.
        """

    def why_not_repeatable(self, indices: Tensor | None = None) -> str | None:
        """Return why an image at `indices` may differ when read again; None if no reason was found."""

    def all_targets(self, indices: Tensor | None = None) -> Tensor:
        """Return the targets at `indices` (None: all), int64 `(N,)` or float32 `(N, K)`. May read the data."""

    def digest(self, indices: Tensor | None = None) -> str:
        """Return a digest of the listed targets and of some images at `indices`, to recognize the same data."""


def epoch_order(num_images: int | None, seed: int, epoch: int) -> Tensor | None:
    """Return the order of the images in an epoch, int64 `(num_images,)`; None if their number is unknown.

    Example:
        >>> sorted(epoch_order(4, seed=0, epoch=2).tolist())
        [0, 1, 2, 3]
    """
    return None if num_images is None else shuffled(num_images, derive_seed(seed, "order", epoch))


def count_batches(num_images: int, batch_size: int) -> int:
    """Return the number of batches; the last may be smaller.

    Example:
        >>> count_batches(5, batch_size=2)
        3
    """
    return -(-num_images // batch_size)


def _in_batches(order: Tensor | None, num_images: int, batch_size: int) -> Sequence[Tensor]:
    batches: Sequence[Tensor] = torch.split(torch.arange(num_images) if order is None else order, batch_size)
    return batches


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

    def batches(self, batch_size: int, *, seed: int | None, order: Tensor | None) -> Iterator[Batch]:
        for indices in _in_batches(order, self.num_images, batch_size):
            yield self.images[indices], self.targets[indices] if len(self.targets) else _NO_TARGETS, indices.tolist()

    def why_not_repeatable(self, indices: Tensor | None = None) -> str | None:
        return None

    def all_targets(self, indices: Tensor | None = None) -> Tensor:
        return self.targets if indices is None else self.targets[indices]

    def digest(self, indices: Tensor | None = None) -> str:
        images = torch.stack([self.images[index] for index in evenly_spaced(self.num_images, indices)])
        return _digest(targets=self.targets, indices=_NO_TARGETS if indices is None else indices, images=images)


class DatasetSource:
    """A map-style `Dataset`; its random transforms are seeded for each image."""

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
            self.read_targets(listed)  # all of them, before the run starts

    def check_first(self) -> None:
        """Read the first sample, so that data in an unsupported form fails at once."""
        _collate([self.samples.read(0, 0)], self.read_targets if self.samples.with_targets else None, self.num_classes)

    def num_batches(self, batch_size: int) -> int:
        return count_batches(self.num_images, batch_size)

    def batches(self, batch_size: int, *, seed: int | None, order: Tensor | None) -> Iterator[Batch]:
        batches = _in_batches(order, self.num_images, batch_size)
        keys = [
            [(index, None if seed is None else derive_seed(seed, index)) for index in batch.tolist()]
            for batch in batches
        ]
        workers = self.num_workers if len(batches) > 1 else 0
        for samples in read_in_workers(self.samples, keys, num_workers=workers, seed=seed or 0):
            yield _collate(samples, self.read_targets if self.samples.with_targets else None, self.num_classes)

    def why_not_repeatable(self, indices: Tensor | None = None) -> str | None:
        return self.samples.why_not_repeatable(evenly_spaced(self.num_images, indices))

    def all_targets(self, indices: Tensor | None = None) -> Tensor:
        if self.targets_listed:
            targets: Tensor = self.read_targets(self.samples.dataset.targets)
            return targets if indices is None else targets[indices]
        return torch.cat([targets for _, targets, _ in self.batches(_SCANNED, seed=0, order=indices)])

    def digest(self, indices: Tensor | None = None) -> str:
        listed = self.samples.dataset.targets if self.targets_listed else []
        tensors = {"targets": torch.as_tensor(listed), "indices": _NO_TARGETS if indices is None else indices}
        if self.why_not_repeatable(indices) is None:
            tensors |= {str(index): self.samples.read(index, 0)[0] for index in evenly_spaced(self.num_images, indices)}
        return _digest(**tensors)

    def failures(self) -> Generator[tuple[int, dict[int, str]], None, None]:
        """Read every sample; after each batch, yield the number read so far and the failures in it, by index."""
        read = 0
        keys: list[list[tuple[int, int | None]]] = [
            [(index, 0) for index in batch.tolist()] for batch in _in_batches(None, self.num_images, _SCANNED)
        ]
        for batch in read_in_workers(self.samples, keys, num_workers=self.num_workers, seed=0):
            bad = {
                read + row: str(sample).removesuffix(SKIP_HINT)
                for row, sample in enumerate(batch)
                if isinstance(sample, TransferKitError)
            }
            read += len(batch)
            yield read, bad


class LoaderSource:
    """A user's `DataLoader`: its batches, in its order."""

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

    def batches(self, batch_size: int, *, seed: int | None, order: Tensor | None) -> Iterator[Batch]:
        first = 0
        for batch in self.loader:
            parts = batch if isinstance(batch, tuple | list) else (batch,)
            if self.with_targets and len(parts) != 2:
                raise TargetError(
                    f"the DataLoader's batch has {len(parts)} parts ({type(batch).__name__}): expected (images, "
                    "targets)."
                )
            images = as_images(parts[0])
            indices = list(range(first, first + len(images)))
            targets = self.read_targets(parts[1], indices=indices) if self.with_targets else _NO_TARGETS
            yield images, targets, indices
            first += len(images)
        if first == 0:
            raise EmptyDataError("the DataLoader made no batch in this epoch: expected 1 or more in every epoch.")

    def why_not_repeatable(self, indices: Tensor | None = None) -> str | None:
        return "a DataLoader chooses its own batches and order; pass its Dataset instead"

    def all_targets(self, indices: Tensor | None = None) -> Tensor:
        raise ArgumentError(
            '"balanced" needs all targets before the first step, but a DataLoader does not list them: pass its '
            "Dataset, or the weights as numbers."
        )

    def digest(self, indices: Tensor | None = None) -> str:
        return _digest(length=torch.tensor(-1 if self.length is None else self.length))


def _collate(
    samples: Sequence[Sample | TransferKitError], read_targets: Callable[..., Tensor] | None, num_classes: int
) -> Batch:
    for sample in samples:
        if isinstance(sample, TransferKitError):
            raise sample
    images, targets, indices = map(list, zip(*samples, strict=True))
    if len({image.dtype for image in images}) > 1:
        raise ImageError(f"images {indices} are partly raw (uint8) and partly preprocessed (float): expected one kind.")
    same_size = len({image.shape for image in images}) == 1
    if not same_size and images[0].is_floating_point():
        raise ImageError(f"images {indices} are preprocessed (float) but differ in size: expected one size.")
    labels = _NO_TARGETS
    if read_targets is not None:
        try:
            stacked = torch.stack([torch.as_tensor(target) for target in targets])
        except (TypeError, ValueError, RuntimeError) as error:  # class names, or rows of different lengths
            raise TargetError(
                f"targets of images {indices} do not form a batch ({error}): expected class indices 0 to "
                f"{num_classes - 1}, or rows of {num_classes}; got {targets[0]!r} for the first."
            ) from error
        labels = read_targets(stacked, indices=indices)
    return torch.stack(images) if same_size else images, labels, indices


def _digest(**tensors: Tensor) -> str:
    digest = hashlib.sha256()
    digest_tensors(digest, tensors)
    return digest.hexdigest()


class SubsetSource:
    """Some images of a source. The data is not copied.

    Attributes:
        source: The source.
        indices: Indices of the images in the source, int64 `(num_images,)`.
    """

    def __init__(self, source: Source, indices: Tensor) -> None:
        self.source = source
        self.indices = indices
        self.num_images = len(indices)

    def num_batches(self, batch_size: int) -> int:
        return count_batches(self.num_images, batch_size)

    def batches(self, batch_size: int, *, seed: int | None, order: Tensor | None) -> Iterator[Batch]:
        return self.source.batches(batch_size, seed=seed, order=self._in_source(order))

    def why_not_repeatable(self, indices: Tensor | None = None) -> str | None:
        return self.source.why_not_repeatable(self._in_source(indices))

    def all_targets(self, indices: Tensor | None = None) -> Tensor:
        return self.source.all_targets(self._in_source(indices))

    def digest(self, indices: Tensor | None = None) -> str:
        return self.source.digest(self._in_source(indices))

    def _in_source(self, indices: Tensor | None) -> Tensor:
        return self.indices if indices is None else self.indices[indices]
