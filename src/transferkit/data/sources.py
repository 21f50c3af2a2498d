"""Everything `Trainer` accepts as data, in batches whose order depends only on (seed, epoch)."""

import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import sampler as samplers

from transferkit.base.arrays import sha256_of
from transferkit.base.randomness import derive_seed, shuffled
from transferkit.data.columns import image_and_target, image_of
from transferkit.data.images import as_image, as_images
from transferkit.data.preprocessing import Preprocessing, find_convention
from transferkit.data.samples import SKIP_HINT, Sample, Samples, evenly_spaced, listed_targets
from transferkit.data.workers import read_in_workers
from transferkit.errors import ArgumentError, EmptyDataError, ImageError, TargetError, TransferKitError

Sizes = int | list[int]  # images in a batch, or in each batch
ReadTargets = Callable[..., Tensor]  # `as_targets` for some classes; None where targets are not needed
Batch = tuple[Tensor | list[Tensor], Tensor, list[int]]  # images, targets, or none `(0,)`, and indices in the data set

_SCANNED = 32  # images read at a time outside of epochs; a signal is checked between batches
_NO_TARGETS = torch.empty(0, dtype=torch.int64)
_SMALLEST = replace(find_convention("IMAGENET1K_V1"), image_size=32, geometry="squash")
"""For samples that are read only to see whether they can be: a photograph is verified whole, but little is decoded."""


class Source(Protocol):
    """Data that can be read repeatedly, in a given order."""

    @property
    def num_images(self) -> int | None:
        """None for a `DataLoader`."""

    def batches(
        self, batch_size: Sizes, *, seed: int | None, order: Tensor | None, preprocess: Preprocessing | None = None
    ) -> Iterator[Batch]:
        """Yield each image once; a `DataLoader` has batches of its own.

        `seed` seeds the random transforms of a data set; None raises `CacheError` where it draws random numbers.
        `order` are indices of images, int64 `(N,)`; None keeps that of the data set. For `preprocess`, images come in
        no more pixels than it needs.
        """

    def why_not_repeatable(self, indices: Tensor | None = None) -> str | None:
        """Return why an image at `indices` may differ when read again; None if no reason was found."""

    def all_targets(self, indices: Tensor | None = None) -> Tensor:
        """Return the targets at `indices` (None: all), int64 `(N,)` or float32 `(N, K)`. May read the data."""

    def digest(self, indices: Tensor | None = None) -> str:
        """Return a digest of the listed targets and of some images at `indices`, to recognize the same data."""


def epoch_order(num_images: int | None, seed: int, epoch: int) -> Tensor | None:
    """Return the order of the images in an epoch, int64 `(num_images,)`; None if their number is unknown."""
    return None if num_images is None else shuffled(num_images, derive_seed(seed, "order", epoch))


def _in_batches(order: Tensor | None, num_images: int, batch_size: Sizes) -> Sequence[Tensor]:
    return torch.split(torch.arange(num_images) if order is None else order, batch_size)


class ArraySource:
    """Images and targets in memory. Each batch is one indexing operation."""

    def __init__(self, images: object, targets: object, read_targets: ReadTargets | None) -> None:
        self.images = as_images(images)
        self.num_images = len(self.images)
        if self.num_images == 0:
            raise EmptyDataError(f"data holds no images: got shape {tuple(self.images.shape)}, expected 1 or more.")
        self.targets = _NO_TARGETS if read_targets is None else read_targets(targets)
        if read_targets is not None and len(self.targets) != self.num_images:
            raise TargetError(f"{self.num_images} images but {len(self.targets)} targets: expected one for each.")

    def batches(self, batch_size: Sizes, *, order: Tensor | None, **_: Any) -> Iterator[Batch]:
        for indices in _in_batches(order, self.num_images, batch_size):
            yield self.images[indices], self.targets[indices] if len(self.targets) else _NO_TARGETS, indices.tolist()

    def why_not_repeatable(self, indices: Tensor | None = None) -> str | None:
        return None

    def all_targets(self, indices: Tensor | None = None) -> Tensor:
        return self.targets if indices is None else self.targets[indices]

    def digest(self, indices: Tensor | None = None) -> str:
        images = torch.stack([self.images[index] for index in evenly_spaced(self.num_images, indices)])
        indices = _NO_TARGETS if indices is None else indices
        return sha256_of({"targets": self.targets, "indices": indices, "images": images})


class DatasetSource:
    """A map-style `Dataset`; its random transforms are seeded for each image."""

    def __init__(self, dataset: Any, read_targets: ReadTargets | None, *, num_workers: int) -> None:
        self.read_targets = read_targets
        self.num_images = len(dataset)
        if self.num_images == 0:
            raise EmptyDataError(f"data is an empty {type(dataset).__name__}: expected 1 image or more.")
        self.samples = Samples(dataset, with_targets=read_targets is not None)
        self.num_workers = num_workers
        listed = None if read_targets is None else listed_targets(dataset)
        self.targets = None if listed is None or read_targets is None else read_targets(listed)

    def check_first(self, num_classes: int) -> None:
        """Read the first sample, and one that a list beside the data calls out of range, so that these fail at once."""
        listed = None if self.read_targets is None else getattr(self.samples.dataset, "targets", None)
        suspects = [0]
        if self.targets is None and isinstance(listed, list) and len(listed) == self.num_images:
            labels = enumerate(listed)
            suspects += [row for row, label in labels if type(label) is int and not 0 <= label < num_classes][:1]
        for index in suspects:
            _collate([self.samples.for_input(_SMALLEST).read(index, 0)], self.read_targets)

    def batches(
        self, batch_size: Sizes, *, seed: int | None, order: Tensor | None, preprocess: Preprocessing | None = None
    ) -> Iterator[Batch]:
        keys = [
            [(index, None if seed is None else derive_seed(seed, index)) for index in batch.tolist()]
            for batch in _in_batches(order, self.num_images, batch_size)
        ]
        workers = 0 if order is not None and len(keys) == 1 else self.num_workers  # a few images that are looked at
        read = self.samples.for_input(preprocess)
        for samples in read_in_workers(read, keys, num_workers=workers, seed=seed or 0):
            yield _collate(samples, self.read_targets)

    def why_not_repeatable(self, indices: Tensor | None = None) -> str | None:
        return self.samples.why_not_repeatable(evenly_spaced(self.num_images, indices))

    def all_targets(self, indices: Tensor | None = None) -> Tensor:
        if self.targets is not None:
            return self.targets if indices is None else self.targets[indices]
        batches = self.batches(_SCANNED, seed=0, order=indices, preprocess=_SMALLEST)
        return torch.cat([targets for _, targets, _ in batches])

    def digest(self, indices: Tensor | None = None) -> str:
        tensors = {"targets": self.targets, "indices": indices}
        if self.why_not_repeatable(indices) is None:
            for index in evenly_spaced(self.num_images, indices):
                image, target, _ = _collate([self.samples.read(index, 0)], self.read_targets)
                tensors |= {f"image {index}": image[0], f"target {index}": target}
        return sha256_of({name: _NO_TARGETS if value is None else value for name, value in tensors.items()})

    def failures(self) -> Generator[list[str | None], None, None]:
        """Read every sample; of each batch of them, yield why each cannot be used, or None if it can."""
        indices = [batch.tolist() for batch in _in_batches(None, self.num_images, _SCANNED)]
        keys: list[list[tuple[int, int | None]]] = [[(index, 0) for index in batch] for batch in indices]
        read_small = self.samples.for_input(_SMALLEST)
        for batch in read_in_workers(read_small, keys, num_workers=self.num_workers, seed=0):
            yield [str(s).removesuffix(SKIP_HINT) if isinstance(s, TransferKitError) else None for s in batch]


class LoaderSource:
    """A user's `DataLoader`: its batches, in its order."""

    def __init__(self, loader: "DataLoader[Any]", read_targets: ReadTargets | None) -> None:
        self.loader = loader
        self.read_targets = read_targets
        self.num_images: int | None = None
        self.length = None
        dataset: Any = loader.dataset
        if hasattr(dataset, "__len__"):
            with suppress(TypeError):  # a sampler without a length
                self.length = len(loader)
        if self.length == 0:
            raise EmptyDataError(
                f"the DataLoader makes 0 batches: {len(dataset)} images, "
                f"batch_size {loader.batch_size}, drop_last={loader.drop_last}. Expected 1 batch or more."
            )

    def batches(self, batch_size: Sizes, **_: Any) -> Iterator[Batch]:
        first = 0
        for number, batch in enumerate(_made_by(self.loader)):
            what = f"batch {number} of the DataLoader"
            images, targets = (image_of(batch), None) if self.read_targets is None else image_and_target(batch, what)
            indices = list(range(first, first + len(images)))
            if isinstance(images, list | tuple):  # of different sizes, by the user's own collate_fn
                read = [as_image(image, index) for image, index in zip(images, indices, strict=True)]
                labels = [None] * len(read) if targets is None else targets
                samples = list(zip(read, labels, indices, strict=True))
                yield _collate(samples, self.read_targets)
            else:
                labels = _NO_TARGETS if self.read_targets is None else self.read_targets(targets, indices=indices)
                yield as_images(images), labels, indices
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
        return sha256_of({"length": torch.tensor(-1 if self.length is None else self.length)})


def _made_by(loader: "DataLoader[Any]") -> Iterator[Any]:
    """Yield the batches of a user's loader; whatever fails in it is an error that names it."""
    try:
        yield from loader
    except TransferKitError:
        raise
    except Exception as error:  # whatever a user's data set, collate_fn and workers raise
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        cause = lines[-1] if "Original Traceback" in str(error) else f"{type(error).__name__}: {lines[0]}"
        size = "" if loader.batch_size is None else f" and batch_size={loader.batch_size}"
        raise ImageError(
            f"the DataLoader cannot make a batch ({cause}). Pass the data set itself, loader.dataset{size}: "
            "its images may be PIL images and differ in size, and one that cannot be read is named."
        ) from error


def check_order(loader: "DataLoader[Any]") -> None:
    """Refuse a loader that shuffles or leaves images out; warn of one whose order may not be that of the data."""
    if isinstance(loader.dataset, IterableDataset):
        return
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    while hasattr(sampler, "sampler"):  # of a BatchSampler
        sampler = sampler.sampler
    itself = "Pass its data set itself, loader.dataset"
    random = (samplers.RandomSampler, samplers.SubsetRandomSampler, samplers.WeightedRandomSampler)
    if isinstance(sampler, random) or getattr(sampler, "shuffle", False) is True:
        raise ArgumentError(
            f"the DataLoader draws its images at random ({type(sampler).__name__}), so predictions would belong to "
            f"unknown images. {itself}, or a DataLoader with shuffle=False."
        )
    size: Any = loader.dataset
    if loader.drop_last and loader.batch_size and (left := len(size) % loader.batch_size):
        raise ArgumentError(
            f"the DataLoader has drop_last=True, so the last {left} images would have no prediction. {itself}, or a "
            "DataLoader without drop_last."
        )
    if type(sampler) is not samplers.SequentialSampler:
        own = f"the DataLoader has a sampler of its own ({type(sampler).__name__})"
        warnings.warn(f"{own}: predictions come in its order, which may not be that of the data set.", stacklevel=2)


def _collate(samples: Sequence[Sample | TransferKitError], read_targets: ReadTargets | None) -> Batch:
    if failed := [sample for sample in samples if isinstance(sample, TransferKitError)]:
        raise failed[0]
    images, targets, indices = map(list, zip(*samples, strict=True))
    if len({image.dtype for image in images}) > 1:
        raise ImageError(f"images {indices} are partly raw (uint8) and partly preprocessed (float): expected one kind.")
    same_size = len({image.shape for image in images}) == 1
    if not same_size and images[0].is_floating_point():
        raise ImageError(f"images {indices} are preprocessed (float) but differ in size: expected one size.")
    labels = _NO_TARGETS if read_targets is None else read_targets(targets, indices=indices)
    return torch.stack(images) if same_size else images, labels, indices


class SubsetSource:
    """Some images of a source, by their `indices` in it, int64 `(num_images,)`. The data is not copied."""

    def __init__(self, source: Source, indices: Tensor) -> None:
        self.source = source
        self.indices = indices
        self.num_images = len(indices)

    def batches(self, batch_size: Sizes, *, order: Tensor | None, **how: Any) -> Iterator[Batch]:
        return self.source.batches(batch_size, order=self._in_source(order), **how)

    def why_not_repeatable(self, indices: Tensor | None = None) -> str | None:
        return self.source.why_not_repeatable(self._in_source(indices))

    def all_targets(self, indices: Tensor | None = None) -> Tensor:
        return self.source.all_targets(self._in_source(indices))

    def digest(self, indices: Tensor | None = None) -> str:
        return self.source.digest(self._in_source(indices))

    def _in_source(self, indices: Tensor | None) -> Tensor:
        return self.indices if indices is None else self.indices[indices]


def count_batches(source: Source, batch_size: int) -> int | None:
    """Return the number of batches in an epoch, the last of which may be smaller; None if nobody knows."""
    if isinstance(source, LoaderSource):
        return source.length
    return None if source.num_images is None else -(-source.num_images // batch_size)
