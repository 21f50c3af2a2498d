"""What a network trains on or is evaluated on, epoch by epoch: cached features where that is safe, else images."""

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from transferkit.base.display import Display
from transferkit.base.processes import part_of, together, total, world_size
from transferkit.base.randomness import derive_seed
from transferkit.data.inputs import Inputs
from transferkit.data.sources import Sizes
from transferkit.errors import ArgumentError, CacheError, TransferKitError
from transferkit.features.cache import FeatureCache
from transferkit.features.chunks import CachedFeatures, image_digests
from transferkit.features.prefix import NOTHING_FROZEN, Prefix
from transferkit.model.head import TransferModel

Batches = Generator[tuple[Tensor, Tensor], None, None]

CACHED_BATCH_SIZE = 256
"""Images evaluated at once where their features are cached: there are no convolutions to take memory."""


@dataclass(eq=False, kw_only=True)
class Feed:
    """One source of a run, as its epochs read it."""

    inputs: Inputs
    model: TransferModel
    cache: FeatureCache
    mode: bool | str  # "auto" caches features where that is safe, and says so where not; True raises there; or False
    num_views: int | None  # fixed views of each image, which epochs go through in turn; None draws each epoch again
    what: str  # the images are for: "training" or "validation"
    display: Display
    fill_s: float = 0.0  # seconds spent on features so far
    _prefix: Prefix | None = None
    _features: CachedFeatures | None = None
    _said: set[str] = field(default_factory=set)

    def open_part(self, batch_size: int) -> tuple[nn.Module, Batches]:
        """Return what `open` does, for this process's part of the images as they lie, in larger batches if cached."""
        count = self.inputs.source.num_images
        order = None if count is None or world_size() == 1 else torch.arange(count)[part_of(count)]
        return self.open(batch_size, order=order, cached_batch_size=max(batch_size, CACHED_BATCH_SIZE))

    def open(
        self, batch_size: Sizes, *, order: Tensor | None = None, epoch: int = 0, cached_batch_size: int | None = None
    ) -> tuple[nn.Module, Batches]:
        """Return the network and, for one epoch, the batches of its input and of targets, on the device.

        `batch_size` is that of all batches or of each; `cached_batch_size` another where features are cached. `order`
        are places in the source, int64; None takes the images as they lie. Random changes depend on the epoch.
        """
        prefix, network, reason = self._split()
        view = epoch if self.num_views is None else epoch % self.num_views
        if prefix is None:
            self._refuse(reason)
            return network, self.inputs.batches(batch_size, order=order, view=view)
        stale = self._prefix is not prefix or self._has_changed(epoch)  # the boundary, a weight, a file or the data
        if total(stale, "features that changed"):
            self._prefix, self._features = prefix, None
            started = time.perf_counter()
            try:
                self._features = self._fill(prefix) if self.mode is not False else None
            except CacheError as error:
                self._refuse(str(error))
            self.fill_s += time.perf_counter() - started
        if self._features is not None:
            cached_view = view % len(self._features.rows)
            return network, self._features.batches(cached_batch_size or batch_size, order=order, view=cached_view)
        images = self.inputs.batches(batch_size, order=order, view=view)
        return network, ((prefix(batch), targets) for batch, targets in images)

    def check(self) -> None:
        """Refuse what can be refused before anything is computed: `CacheError` if `mode` is True."""
        if self.mode is True:
            prefix, _, reason = self.cache.split(self.model)
            if found := reason if prefix is None else self._unrepeatable:
                self._refuse(found)

    def features(self) -> CachedFeatures:
        """Return the features of every image; a `CacheError` where they cannot be cached."""
        prefix, _, reason = self._split()
        if prefix is None:
            raise CacheError(f"features cannot be cached: {reason}.")
        return self._fill(prefix)

    def _split(self) -> tuple[Prefix | None, nn.Module, str]:
        """Do what `FeatureCache.split` does, and follow a model that a callback gave another preprocessing."""
        preprocess, before = self.model.backbone.preprocess, self.inputs.preprocess
        if preprocess != before:
            if self.inputs.transform is not None and preprocess.image_size != before.image_size:
                raise ArgumentError(
                    f"the image size changed from {before.image_size} to {preprocess.image_size} during a run with "
                    "augment, which was made for the old one: change it between two calls of fit."
                )
            self.inputs = replace(self.inputs, preprocess=preprocess)
        return self.cache.split(self.model)

    def _has_changed(self, epoch: int) -> bool:
        """Return whether a file of features changed, or one of two images, others in each epoch: all are read again."""
        features = self._features
        if features is None or not features.is_intact():
            return features is not None
        view = None if self.num_views is None else epoch % self.num_views
        count = features.rows.shape[1]
        places = torch.tensor(sorted({derive_seed("checked", epoch, part) % count for part in range(2)}))
        try:
            with closing(self.inputs.read(len(places), order=places, view=view)) as batches:
                images, targets = next(batches)
        except TransferKitError:
            return True
        return not features.is_of(image_digests(images), targets, places, view or 0)

    def _fill(self, prefix: Prefix) -> CachedFeatures:
        with together("features"):  # without them on one process, all train without
            if self._unrepeatable:
                raise CacheError(self._unrepeatable)
            return self.cache.fill(self.inputs, prefix, num_views=self.num_views, display=self.display)

    @cached_property
    def _unrepeatable(self) -> str | None:
        """Why an image may not be the same each time; found out once, by reading some."""
        source = self.inputs.source
        if self.num_views is None and self.inputs.transform is not None and source.num_images is not None:
            return "augment changes images at random in each epoch; n_views=2 would cache two fixed views of each"
        fixed_views = self.num_views is not None and source.num_images is not None
        return None if fixed_views else source.why_not_repeatable()

    def _refuse(self, reason: str) -> None:
        message = f"features of the {self.what} images are not cached: {reason}."
        if self.mode is True:
            raise CacheError(f'{message} cache="auto" trains without.')
        if self.mode == "auto" and reason != NOTHING_FROZEN and message not in self._said:
            self._said.add(message)
            self.display.say(message)
