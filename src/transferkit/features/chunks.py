"""Features of many images, found by the digest of each image's pixels, and batches of them."""

import hashlib
from bisect import bisect_right
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from transferkit.base.arrays import raw_bytes
from transferkit.compute.device import Device
from transferkit.data.inputs import Images
from transferkit.data.sources import Sizes
from transferkit.errors import CacheError
from transferkit.features.file import DIGEST_BYTES, FeatureFile


def image_digests(images: Images) -> list[bytes]:
    """Return a digest of each image: 16 bytes of the SHA-256 of its dtype, shape and pixels.

    Example:
        >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        >>> one, other = image_digests(images)
        >>> one == other, one == image_digests(images.float())[0], len(one)
        (True, False, 16)
    """
    if isinstance(images, list):
        return [digest for image in images for digest in image_digests(image[None])]
    start = hashlib.sha256(f"{images.dtype} {tuple(images.shape[1:])}".encode())
    pixels = raw_bytes(images)  # host sync where they were augmented on an accelerator
    size = len(pixels) // len(images)
    digests = []
    for row in range(len(images)):
        digest = start.copy()
        digest.update(pixels[row * size : (row + 1) * size])
        digests.append(digest.digest()[:DIGEST_BYTES])
    return digests


@dataclass(eq=False, slots=True)
class Chunk:
    """The features of some images behind some layers."""

    layers: str  # what computed them: one of `Prefix.digests`
    images: list[bytes]  # a digest of each image
    features: Tensor  # (len(images), h, w, C), on the device, on the host or in a mapped file
    file: FeatureFile | None = None  # that file
    state: tuple[int, ...] | None = None  # of the file, from before its features were verified

    def is_intact(self) -> bool:
        """Return whether nobody has written to the mapped file; one that was deleted or replaced stays mapped."""
        now = None if self.file is None else self.file.state()
        return now is None or self.state is None or now[:2] != self.state[:2] or now == self.state


def together(chunks: Sequence[Chunk], rows: Tensor, place: torch.device) -> Chunk:
    """Copy rows of chunks laid end to end, int64 and ascending, into one chunk on a device."""
    example = chunks[0].features
    features = torch.empty(len(rows), *example.shape[1:], dtype=example.dtype, device=place)
    images: list[bytes] = []
    start = 0
    for chunk in chunks:
        own = rows[(rows >= start) & (rows < start + len(chunk.images))] - start
        features[len(images) : len(images) + len(own)] = chunk.features[own.to(chunk.features.device)].to(place)
        images += [chunk.images[row] for row in own.tolist()]
        start += len(chunk.images)
    return Chunk(chunks[0].layers, images, features)


@dataclass(frozen=True, eq=False)
class CachedFeatures:
    """The features of every image of a source, in one or several views."""

    parts: Sequence[Tensor]  # (n, h, w, C) each, all on one device, in the dtype they were computed in
    rows: Tensor  # int64 (views, N): where each image lies in the parts laid end to end
    targets: Tensor  # on the device
    device: Device  # where batches go
    images: Sequence[bytes] = ()  # the images' digests, view after view
    mapped: Sequence[Chunk] = ()  # the chunks whose files are mapped

    @property
    def targets_of_rows(self) -> Tensor:
        """The targets of all views, one after the other: `(views * N,)` or `(views * N, K)`."""
        return self.targets.repeat(len(self.rows), *(1 for _ in self.targets.shape[1:]))

    def batches(
        self, batch_size: Sizes, *, order: Tensor | None = None, view: int = 0
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield features `(N, C, h, w)`, channels-last, and targets of each batch, on the device.

        Each batch is a copy: a head that works in place cannot change what is cached. `batch_size` is that of all
        batches or of each; `order` are places of the images, int64, None takes them as they lie.
        """
        order = torch.arange(self.rows.shape[1]) if order is None else order
        if not len(order):
            return
        rows = self.rows[view][order].to(self.parts[0].device)
        gathered = map(self.gather, torch.split(rows, batch_size))
        targets = (self.targets[places] for places in torch.split(order.to(self.targets.device), batch_size))
        for features, batch_targets in self.device.batches(zip(gathered, targets, strict=True)):
            yield features.permute(0, 3, 1, 2), batch_targets  # (N, h, w, C) in memory: no copy

    def gather(self, rows: Tensor) -> Tensor:
        """Return a copy `(len(rows), h, w, C)` of some rows, which lie on the device of the parts.

        A `CacheError` where somebody wrote to one of the mapped files.
        """
        if not self.is_intact():
            changed = next(str(chunk.file.path) for chunk in self.mapped if chunk.file and not chunk.is_intact())
            raise CacheError(
                f"another program wrote to {changed} while its features were used: keep the cache folder private, and "
                "run again. Damaged features are computed again."
            )
        first = self.parts[0]
        pinned = self.device.torch_device.type == "cuda" and first.device.type == "cpu"  # so that nobody waits
        batch = torch.empty(len(rows), *first.shape[1:], dtype=first.dtype, device=first.device, pin_memory=pinned)
        if len(self.parts) == 1:
            return torch.index_select(first, 0, rows, out=batch)
        found = ((bisect_right(self._starts, row) - 1, row) for row in rows.tolist())
        return torch.stack([self.parts[part][row - self._starts[part]] for part, row in found], out=batch)

    def is_intact(self) -> bool:
        """Return whether nobody has written to the mapped files."""
        return all(chunk.is_intact() for chunk in self.mapped)

    def is_of(self, images: Sequence[bytes], targets: Tensor, places: Tensor, view: int) -> bool:
        """Return whether the images at some places still have these digests and targets."""
        first = view * self.rows.shape[1]
        same = [self.images[first + place] for place in places.tolist()] == list(images)
        return same and torch.equal(self.targets[places.to(self.targets.device)].cpu(), targets)

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate(map(len, self.parts[:-1]), initial=0))
