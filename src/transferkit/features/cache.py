"""The feature cache: the features of each image, computed once.

An image's features are found by two digests: of its pixels, and of the layers with all that their output depends on.
Nothing else counts: neither the image's place nor its file nor the data set. So features cannot disagree with the model
or the data, an image added to a data set costs one image, and any part of the cache serves by itself.
"""

import hashlib
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from transferkit.base.arrays import raw_bytes
from transferkit.base.display import Display
from transferkit.compute.device import Device
from transferkit.compute.host_memory import host_bytes
from transferkit.data.inputs import Images, Inputs
from transferkit.errors import CacheError
from transferkit.features.file import DIGEST_BYTES, SUFFIX, FeatureFile, open_features, write_features
from transferkit.features.prefix import Prefix

MEMORY_SHARE = 0.5
"""Fraction of the free memory, on the device and on the host, that features may take."""

ROOM_IF_UNKNOWN = 2 * 10**9
"""Bytes they may take where the system does not say how much is free (Apple's MPS, CPUs elsewhere than on Linux)."""

CHUNK_IMAGES = 1024
CHUNK_BYTES = 2**26
"""Limits of a file: whole batches of the prefix, and at least one."""


def open_folder(path: str | PathLike[str] | None) -> Path | None:
    """Return a folder for files of features, which is made if its parent exists; None for None.

    Raises:
        CacheError: When the folder does not exist and cannot be made.
    """
    if path is None:
        return None
    folder = Path(path)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"cache={str(path)!r} cannot be used: {error}. Expected a folder, or a place to make one."
        ) from error
    return folder


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
    """The features of some images behind some layers.

    Attributes:
        layers: What computed them: one of `Prefix.digests`.
        images: A digest of each image.
        features: `(len(images), h, w, C)`, on the device, on the host or in a mapped file.
    """

    layers: str
    images: list[bytes]
    features: Tensor


@dataclass(frozen=True, eq=False)
class CachedFeatures:
    """The features of every image of a source, in one or several views.

    Attributes:
        parts: Tensors `(n, h, w, C)` that hold them, all on one device, in the dtype they were computed in.
        rows: int64 `(views, N)`: where each image lies in the parts laid end to end.
        targets: The targets, on the device.
        device: Where batches go.
    """

    parts: Sequence[Tensor]
    rows: Tensor
    targets: Tensor
    device: Device

    def batches(
        self, batch_size: int, *, order: Tensor | None = None, view: int = 0
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield features `(N, C, h, w)`, channels-last, and targets of each batch, on the device.

        Each batch is a copy: a head that works in place cannot change what is cached.

        Args:
            batch_size: Images in a batch.
            order: Places of the images, int64; None takes them as they lie.
            view: Which of the views.
        """
        order = torch.arange(self.rows.shape[1]) if order is None else order
        rows = self.rows[view][order].to(self.parts[0].device)
        gathered = map(self.gather, torch.split(rows, batch_size))
        targets = (self.targets[places] for places in torch.split(order.to(self.targets.device), batch_size))
        for features, batch_targets in self.device.batches(zip(gathered, targets, strict=True)):
            yield features.permute(0, 3, 1, 2), batch_targets  # (N, h, w, C) in memory: no copy

    def gather(self, rows: Tensor) -> Tensor:
        """Return a copy `(len(rows), h, w, C)` of some rows, which lie on the device of the parts."""
        first = self.parts[0]
        pinned = self.device.torch_device.type == "cuda" and first.device.type == "cpu"  # so that nobody waits
        batch = torch.empty(len(rows), *first.shape[1:], dtype=first.dtype, device=first.device, pin_memory=pinned)
        if len(self.parts) == 1:
            return torch.index_select(first, 0, rows, out=batch)
        found = ((bisect_right(self._starts, row) - 1, row) for row in rows.tolist())
        return torch.stack([self.parts[part][row - self._starts[part]] for part, row in found], out=batch)

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate(map(len, self.parts[:-1]), initial=0))


class FeatureCache:
    """The features that a trainer has in memory, and those in files of a folder.

    Args:
        device: Where features are used.
        folder: Where they are written for later runs and other processes; None keeps them in memory.
        check: Called after each batch; raises to stop.
    """

    def __init__(self, device: Device, folder: Path | None = None, *, check: Callable[[], None] = lambda: None) -> None:
        self.device = device
        self.folder = folder
        self.check = check
        self._chunks: list[Chunk] = []

    def share(self, other: "FeatureCache") -> None:
        """Use the features of another cache, and add to them."""
        self._chunks = other._chunks

    def fill(self, inputs: Inputs, prefix: Prefix, *, num_views: int, display: Display) -> CachedFeatures:
        """Return the features of every image, after computing those that are not known.

        The data is read once. What is known behind fewer layers is carried on from there.

        Args:
            inputs: The images; their source knows how many there are.
            prefix: What computes the features.
            num_views: Views of each image.
            display: Shows what is done.

        Raises:
            CacheError: When new features would take too much memory.
        """
        total = num_views * (inputs.source.num_images or 0)
        known = _Known(self._chunks, self.folder, prefix, display)
        new = _New(self, known, display)
        images: list[bytes] = []
        targets: list[Tensor] = []
        depths: list[int] = []
        with display.bar("features", total) as bar:
            for view in range(num_views):
                with closing(inputs.read(prefix.batch_size, view=view)) as batches:  # or a traceback would keep workers
                    for batch, batch_targets in batches:
                        digests = image_digests(batch)
                        depths += _complete(batch, digests, inputs, known, new, most=total - len(images))
                        images += digests
                        if view == 0:
                            targets.append(batch_targets)
                        bar.advance(len(digests))
                        self.check()
        new.close()
        display.say(f"features of {total:,} images: {_describe(depths, len(prefix))}{new.describe()}")
        parts, rows = self._place([known.final[image] for image in images])
        return CachedFeatures(parts, rows.view(num_views, -1), self.device.move(torch.cat(targets)), device=self.device)

    def choose_memory(self, num_bytes: int) -> torch.device:
        """Return where so many bytes of features can lie: on the device or on the host.

        Raises:
            CacheError: When neither has room.
        """
        places = dict.fromkeys((self.device.torch_device, torch.device("cpu")))
        for _ in range(2):
            for place in places:
                if num_bytes <= self._room(place):
                    return place
            self._chunks.clear()  # what earlier runs left; what this run uses stays with it
        raise CacheError(
            f"they take {num_bytes / 1e6:,.0f} MB, and may take {self._room(torch.device('cpu')) / 1e6:,.0f} MB "
            f"({MEMORY_SHARE:.0%} of what is free). Name a folder for them: Trainer(cache=folder)"
        )

    def _room(self, place: torch.device) -> int:
        """Return how many bytes features may take there."""
        if place.type == "cpu":
            memory = host_bytes()
            free = None if memory is None else memory["free"]
        else:
            free = self.device.memory()["free"] if place.type == "cuda" else None
        return ROOM_IF_UNKNOWN if free is None else int(MEMORY_SHARE * free)

    def _place(self, found: list[tuple[Chunk, int]]) -> tuple[list[Tensor], Tensor]:
        """Return the tensors of chunks and, for each image, its row in them laid end to end; all on one device.

        On an accelerator with room for them the rows are put together there. On the CPU mapped files serve.
        """
        chunks = list(dict.fromkeys(chunk for chunk, _ in found))
        starts = dict(zip(chunks, accumulate((len(chunk.images) for chunk in chunks), initial=0), strict=False))
        rows = torch.tensor([starts[chunk] + row for chunk, row in found])
        place, example = self.device.torch_device, chunks[0].features
        if place.type != "cpu" and not (len(chunks) == 1 and example.device == place):
            used = torch.unique(rows)
            if len(used) * example[0].numel() * example.element_size() <= self._room(place):
                chunks, rows = [together(chunks, used, place)], torch.searchsorted(used, rows)
                held = set(chunks[0].images)
                self._chunks[:] = [
                    c for c in self._chunks if c.layers != chunks[0].layers or not held.issuperset(c.images)
                ]
            else:
                for chunk in chunks:
                    chunk.features = chunk.features.cpu()
        self._chunks += [chunk for chunk in chunks if chunk not in self._chunks]
        return [chunk.features for chunk in chunks], rows


class _Known:
    """Finds an image's features behind as many layers of a prefix as possible.

    Attributes:
        prefix: The prefix.
        final: Chunk and row of each image whose features behind all layers are known.
    """

    def __init__(self, chunks: list[Chunk], folder: Path | None, prefix: Prefix, display: Display) -> None:
        self.prefix = prefix
        self.final: dict[bytes, tuple[Chunk, int]] = {}
        self._chunks = chunks
        self._display = display
        self._rows: dict[int, dict[bytes, tuple[Chunk, int]]] = {}
        self._files: dict[int, dict[bytes, FeatureFile]] = {}
        paths = [] if folder is None else sorted(folder.glob(f"*{SUFFIX}"))
        for depth in range(len(prefix), 0, -1):
            layers = prefix.digests[depth]
            self._rows[depth] = self.final if depth == len(prefix) else {}
            for chunk in chunks:
                if chunk.layers == layers:
                    self._add(depth, chunk)
            self._files[depth] = {}
            for path in paths:
                if path.name.startswith(layers[:32]):
                    self._note(depth, path)

    def depth(self, image: bytes) -> int:
        """Return the number of layers behind which an image's features are known; 0 if they are not."""
        for depth, rows in self._rows.items():
            if image in rows or self._open(depth, image):
                return depth
        return 0

    def row(self, image: bytes, depth: int) -> Tensor:
        """Return the features `(h, w, C)` of an image behind some layers, which are known."""
        chunk, row = self._rows[depth][image]
        return chunk.features[row]

    def _add(self, depth: int, chunk: Chunk) -> None:
        self._rows[depth].update((image, (chunk, row)) for row, image in enumerate(chunk.images))

    def _note(self, depth: int, path: Path) -> None:
        shape, dtype = self.prefix.outputs[depth]
        try:
            file = open_features(path, layers=self.prefix.digests[depth], shape=shape, dtype=dtype)
        except CacheError as error:
            self._display.say(f"a file of features is passed over: {error}")
            return
        self._files[depth].update(dict.fromkeys(file.images, file))

    def _open(self, depth: int, image: bytes) -> bool:
        """Map the file that holds an image's features; return whether there is a good one."""
        file = self._files[depth].get(image)
        if file is None:
            return False
        for other in file.images:
            self._files[depth].pop(other, None)
        try:
            chunk = Chunk(file.layers, list(file.images), file.read())
        except CacheError as error:
            self._display.say(f"a file of features is passed over: {error}")
            return False
        self._add(depth, chunk)
        self._chunks.append(chunk)
        return True


class _New:
    """Takes features as they are computed, in chunks: into files if there is a folder, else into memory."""

    def __init__(self, cache: FeatureCache, known: _Known, display: Display) -> None:
        self._cache = cache
        self._known = known
        self._display = display
        self._folder = cache.folder
        self._chunk: Chunk | None = None
        self._num_bytes = 0
        self._where: dict[str, None] = {}
        batch_size = known.prefix.batch_size
        self._layers = known.prefix.digests[-1]
        self._shape, self._dtype = known.prefix.outputs[-1]
        self._row_bytes = math.prod(self._shape) * self._dtype.itemsize
        self._chunk_images = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // self._row_bytes) // batch_size) * batch_size

    def reserve(self, count: int, *, most: int) -> Chunk:
        """Return a chunk with room for so many more images; `most` may still come, these included.

        Raises:
            CacheError: When memory does not suffice for all that may come.
        """
        if self._chunk is not None and len(self._chunk.images) + count <= len(self._chunk.features):
            return self._chunk
        self.close()
        rows, place = min(self._chunk_images, most), torch.device("cpu")
        if self._folder is None:
            rows, place = most, self._cache.choose_memory(most * self._row_bytes)
        pinned = place.type == "cpu" and self._cache.device.torch_device.type == "cuda"  # so that nobody waits
        features = torch.empty(rows, *self._shape, dtype=self._dtype, device=place, pin_memory=pinned)
        self._chunk = Chunk(self._layers, [], features)
        return self._chunk

    def add(self, chunk: Chunk, images: list[bytes], features: Tensor) -> None:
        """Put the features `(n, h, w, C)` of images into a chunk that has room for them."""
        first = len(chunk.images)
        chunk.features[first : first + len(images)].copy_(features, non_blocking=True)
        chunk.images += images
        self._known.final.update((image, (chunk, row)) for row, image in enumerate(images, start=first))

    def close(self) -> None:
        """Put what came since the last chunk where it stays."""
        chunk, self._chunk = self._chunk, None
        if chunk is None:
            return
        self._cache.device.synchronize()
        where = f"memory of {chunk.features.device}"
        chunk.features = chunk.features[: len(chunk.images)]
        if self._folder is not None:
            try:
                chunk.features = write_features(self._folder, chunk.layers, chunk.images, chunk.features).read()
                where = str(self._folder)
            except CacheError as error:
                self._display.say(f"features are not cached in a file: {error}")
                self._folder = None
        elif chunk.features.untyped_storage().nbytes() > len(chunk.images) * self._row_bytes:
            chunk.features = chunk.features.clone()  # and let go of the room for images that were known
        self._where[where] = None
        self._num_bytes += len(chunk.images) * self._row_bytes

    def describe(self) -> str:
        """Return where the new features are, for a line of text."""
        return f", cached in {' and '.join(self._where)} ({self._num_bytes / 1e6:,.0f} MB)" if self._where else ""


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


def _complete(batch: Images, digests: list[bytes], inputs: Inputs, known: _Known, new: _New, *, most: int) -> list[int]:
    """Compute the features that a batch lacks; return behind how many layers those of each image were known."""
    depths = [known.depth(image) for image in digests]
    for depth in sorted({*depths} - {len(known.prefix)}):
        missing = {image: place for place, image in enumerate(digests) if depths[place] == depth}  # each image once
        chunk = new.reserve(len(missing), most=most)  # before anything is computed
        if depth:
            start = torch.stack([inputs.device.move(known.row(image, depth)) for image in missing]).permute(0, 3, 1, 2)
        else:
            start = inputs.prepare(_select(batch, list(missing.values())))
        new.add(chunk, list(missing), known.prefix(start, first=depth).permute(0, 2, 3, 1))
    return depths


def _select(batch: Images, places: list[int]) -> Images:
    if len(places) == len(batch):
        return batch
    return [batch[place] for place in places] if isinstance(batch, list) else batch[places]


def _describe(depths: list[int], full: int) -> str:
    """Say how the features of images came about that were known behind so many layers."""
    if set(depths) == {full}:
        return "known already"
    kinds = {full: "known", 0: "computed"}
    counts = sorted(Counter(depths).items(), reverse=True)
    texts = [(count, kinds.get(depth, f"derived from those behind {depth} layers")) for depth, count in counts]
    return texts[0][1] if len(texts) == 1 else ", ".join(f"{count:,} {text}" for count, text in texts)
