"""The feature cache: the features of each image, computed once.

An image's features are found by two digests: one of its pixels, and one of the layers and all that their output depends
on. Nothing else counts, neither the image's place nor its file nor its data set. So features cannot disagree with model
or data, an image added to a data set costs one image, and any part of the cache is of use by itself.
"""

import difflib
import math
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from itertools import accumulate
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from transferkit.base.display import Display
from transferkit.base.processes import broadcast, exchange, gather, rank, send, total, world_size
from transferkit.compute.device import Device
from transferkit.compute.host_memory import host_bytes
from transferkit.data.inputs import Images, Inputs
from transferkit.errors import ArgumentError, CacheError
from transferkit.features.chunks import CachedFeatures, Chunk, image_digests, together
from transferkit.features.file import SUFFIX, FeatureFile, open_features, write_features
from transferkit.features.prefix import Prefix, pure_prefix
from transferkit.model.head import TransferModel

MEMORY_SHARE = 0.5  # fraction of the free memory, on the device and on the host, that features may take
ROOM_IF_UNKNOWN = 2 * 10**9
"""Bytes they may take where the system does not say how much is free (Apple's MPS, CPUs elsewhere than on Linux)."""

CHUNK_IMAGES = 1024  # limits of a file, which has whole batches of the prefix, and at least one
CHUNK_BYTES = 2**26


def open_folder(path: str | PathLike[str] | None) -> Path | None:
    """Return a folder for files of features, made if it is missing, else a `CacheError`. None for None."""
    if path is None:
        return None
    folder = Path(path)
    try:
        folder.mkdir(exist_ok=True, parents=True)
    except (OSError, ValueError) as error:
        raise CacheError(
            f"cache={str(path)!r} cannot be used: {error}. Expected a folder, or a place to make one."
        ) from error
    return folder


def find_cache(cache: object) -> tuple[bool | str, Path | None]:
    """Return when a trainer caches features, and its folder for files of them; see `Trainer`."""
    if isinstance(cache, bool) or cache == "auto":
        return cache, None
    misspelled = isinstance(cache, str) and difflib.get_close_matches(
        cache.lower(), ["auto", "true", "false"], cutoff=0.7
    )
    if not isinstance(cache, str | PathLike) or (misspelled and not Path(cache).exists()):
        raise ArgumentError(f'cache={cache!r} cannot be used: expected "auto", True, False or a folder.')
    return "auto", open_folder(cache)


class FeatureCache:
    """The features that a trainer uses on a device, in memory or in files of a folder.

    `check` is called after each batch; it raises to stop.
    """

    def __init__(self, device: Device, folder: Path | None = None, *, check: Callable[[], None] = lambda: None) -> None:
        self.device = device
        self.folder = folder
        self.check = check
        self.chunks: list[Chunk] = []
        self._prefix: Prefix | None = None  # the last one, made again whenever the layers changed

    def split(self, model: TransferModel) -> tuple[Prefix | None, nn.Module, str]:
        """Return the frozen prefix of a model, the network behind it, and `""`; or None, the model, and why."""
        layers, reason = pure_prefix(model)
        if reason:
            return None, model, reason
        preprocess, before = model.backbone.preprocess, self._prefix
        if before is None or not before.is_current(layers, preprocess):
            self._prefix = Prefix(layers, preprocess, device=self.device)
            if before is not None:
                self._prefix.batch_size = min(self._prefix.batch_size, before.batch_size)  # memory ran out before
        return self._prefix, model.split()[1], ""

    def share(self, other: "FeatureCache") -> None:
        """Use the features of another cache, and add to them."""
        self.chunks = other.chunks

    def fill(self, inputs: Inputs, prefix: Prefix, *, num_views: int | None, display: Display) -> CachedFeatures:
        """Return the features of every image, after computing those that are not known; `num_views` of each image."""
        filling = _Filling(self, inputs, prefix, display)
        images, targets = filling.run(num_views)
        chunks, parts, rows = self._place([filling.rows[len(prefix)][image] for image in images])
        mapped = [chunk for chunk in chunks if chunk.file is not None]
        shape = (num_views or 1, -1)
        return CachedFeatures(parts, rows.view(shape), self.device.move(targets), self.device, images, mapped)

    def choose_memory(self, num_bytes: int) -> torch.device:
        """Return where so many bytes of features can lie: on the device or on the host; else a `CacheError`."""
        places = dict.fromkeys((self.device.torch_device, torch.device("cpu")))
        for _ in range(2):
            for place in places:
                if num_bytes <= self._room(place):
                    return place
            self.chunks.clear()  # what earlier runs left; what this run uses stays with it
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

    def _place(self, found: list[tuple[Chunk, int]]) -> tuple[list[Chunk], list[Tensor], Tensor]:
        """Return chunks, their tensors and, for each image, its row in them laid end to end; all on one device.

        On an accelerator with room for them the rows are put together there. On the CPU mapped files serve.
        """
        chunks = list(dict.fromkeys(chunk for chunk, _ in found))
        starts = dict(zip(chunks, accumulate((len(chunk.images) for chunk in chunks), initial=0), strict=False))
        rows = torch.tensor([starts[chunk] + row for chunk, row in found])
        place, example = self.device.torch_device, chunks[0].features
        if place.type != "cpu" and not (len(chunks) == 1 and example.device.type == place.type):
            used = torch.unique(rows)
            if len(used) * example[0].numel() * example.element_size() <= self._room(place):
                chunks, rows = [together(chunks, used, place)], torch.searchsorted(used, rows)
                held = set(chunks[0].images)
                self.chunks[:] = [
                    c for c in self.chunks if c.layers != chunks[0].layers or not held.issuperset(c.images)
                ]
            else:
                for chunk in chunks:
                    chunk.features = chunk.features.cpu()
        self.chunks += [chunk for chunk in chunks if chunk not in self.chunks]
        return chunks, [chunk.features for chunk in chunks], rows


class _Filling:
    """Goes through every view of a source once, and computes the features that are not known.

    What is known behind fewer layers is carried on from there. New features are taken in chunks: into files if there is
    a folder, else into memory.
    """

    def __init__(self, cache: FeatureCache, inputs: Inputs, prefix: Prefix, display: Display) -> None:
        self.cache = cache
        self.inputs = inputs
        self.prefix = prefix
        self.display = display
        self.folder = cache.folder
        self.chunk: Chunk | None = None  # the one being filled
        self.where = Counter[str]()  # bytes of new features by where they are
        self.shape, self.dtype = prefix.outputs[-1]
        self.row_bytes = math.prod(self.shape) * self.dtype.itemsize
        batches = min(CHUNK_IMAGES, CHUNK_BYTES // self.row_bytes) // prefix.batch_size
        self.batch_size = broadcast(prefix.batch_size, "the size of a batch")  # another where memory ran out
        self.chunk_images = max(1, batches if self.folder else 1) * self.batch_size
        self.rows: dict[int, dict[bytes, tuple[Chunk, int]]] = {}  # by number of layers, most first
        self.files: dict[int, dict[bytes, FeatureFile]] = {}
        cache.chunks[:] = [chunk for chunk in cache.chunks if chunk.is_intact()]  # others are verified again
        paths = [] if cache.folder is None else sorted(cache.folder.glob(f"*{SUFFIX}"))
        for path in paths:
            if "-" not in path.name:
                display.say(f"skipped a feature file: {path} is of an earlier version. Delete it.")
        for depth in range(len(prefix), 0, -1):
            self.rows[depth], self.files[depth] = {}, {}
            for chunk in cache.chunks:
                if chunk.layers == prefix.digests[depth]:
                    self._add(depth, chunk)
            for path in paths:
                if path.name.startswith(prefix.digests[depth][:32]):
                    self._note(depth, path)

    def run(self, num_views: int | None) -> tuple[list[bytes], Tensor]:
        """Return the digests of all images, view after view, and the targets, on the host."""
        count, own = self.inputs.source.num_images or 0, None
        if world_size() > 1:  # each looks at every so many chunks: these, and so files, do not depend on their number
            own = torch.cat([*self._chunks(count)[rank() :: world_size()], torch.arange(0)])
        total = (num_views or 1) * (count if own is None else len(own))
        images, targets, depths = list[bytes](), list[Tensor](), list[int]()
        with self.display.bar("features", total) as bar:
            for view in [None] if num_views is None else range(num_views):
                # closed at once, or a traceback that somebody holds would keep worker processes
                with closing(self._read(own, view)) as batches:
                    for batch, batch_targets in batches:
                        digests = image_digests(batch)
                        depths += self._complete(batch, digests, most=total - len(images))
                        images += digests
                        targets.append(batch_targets)
                        bar.advance(len(digests))
                        self.cache.check()
        self._close()
        whole = torch.cat(targets) if targets else torch.empty(0)
        if own is not None:
            images, whole = self._exchange(images, whole if targets else None, count, num_views or 1)
        self.display.say(f"features of {len(images):,} images: {self._describe(depths)}")
        first, *others = whole.chunk(num_views or 1)
        if not all(torch.equal(first, other) for other in others):
            raise CacheError("the data set's targets change from view to view")
        return images, first

    def _chunks(self, count: int) -> Sequence[Tensor]:
        """Return the places of the images in each chunk."""
        return torch.split(torch.arange(count), self.chunk_images)

    def _read(self, own: Tensor | None, view: int | None) -> Generator[tuple[Images, Tensor], None, None]:
        """Yield batches; the processes meet after so many, and so learn soon of one that failed."""
        every = max(1, CHUNK_IMAGES // self.batch_size)
        most = math.ceil((self.inputs.source.num_images or 0) / self.chunk_images / world_size()) * self.chunk_images
        meetings = math.ceil(most / self.batch_size / every)
        with closing(self.inputs.read(self.batch_size, order=own, view=view)) as batches:
            for number, batch in enumerate(batches):
                if self.folder is not None and number * self.batch_size % self.chunk_images == 0:
                    self._close()  # a file has whole chunks
                if number % every == 0:
                    meetings -= 1
                    total(0, "the next features")
                yield batch
        for _ in range(meetings):  # of a process that has less to read than others
            total(0, "the next features")

    def _exchange(
        self, images: list[bytes], targets: Tensor | None, count: int, num_views: int
    ) -> tuple[list[bytes], Tensor]:
        """Return digests and targets of all images, in order, after taking over the features that others have."""
        owned = [self._chunks(count)[r :: world_size()] for r in range(world_size())]
        places = [part + view * count for parts in owned for view in range(num_views) for part in parts]
        order = torch.cat(places).argsort()  # what is gathered comes process by process
        everyone = exchange(images, "digests")
        whole = gather(targets, "targets").cpu()[order]
        if self.folder is not None:  # others have written there meanwhile, if it is the same folder
            for path in sorted(self.folder.glob(f"{self.prefix.digests[-1][:32]}*{SUFFIX}")):
                self._note(len(self.prefix), path)
        self._take_over(everyone)
        held = [image for theirs in everyone for image in theirs]
        return [held[place] for place in order.tolist()], whole

    def _take_over(self, everyone: list[list[bytes]]) -> None:
        """Get the features that this process lacks from those that have them, block by block, in memory or files.

        `everyone` are the images that each process has features of.
        """
        depth, in_memory = len(self.prefix), self.folder is None
        lacking = {image for theirs in everyone for image in theirs if self._depth(image) != depth}
        wanted = set[bytes]().union(*exchange(lacking, "features that processes lack"))
        room = len(wanted) if in_memory else 0
        place = self.cache.choose_memory(room * self.row_bytes) if room else torch.device("cpu")
        whole = Chunk(self.prefix.digests[-1], [], torch.empty(room, *self.shape, dtype=self.dtype, device=place))
        total(0, "memory for features")  # where one process lacks it, all train without
        for owner, theirs in enumerate(everyone):
            sent = [image for image in dict.fromkeys(theirs) if image in wanted]
            wanted.difference_update(sent)  # others may have a copy, too
            for first in range(0, len(sent), self.chunk_images):
                block, own = sent[first : first + self.chunk_images], None
                if owner == rank():
                    found = (self.rows[depth][image] for image in block)
                    own = torch.stack([chunk.features[row].cpu() for chunk, row in found])
                total(0, "features of a chunk")
                rows = send(own, (len(block), *self.shape), self.dtype, owner=owner, what="features of a chunk")
                if in_memory:
                    whole.features[len(whole.images) : len(whole.images) + len(block)] = rows.to(place)
                    whole.images += block
                elif not all(self._depth(image) == depth for image in block):
                    self.chunk = Chunk(whole.layers, block, rows)
                    self._add(depth, self.chunk)
                    self._close()
        self._add(depth, whole)
        if whole.images:
            self.where = Counter({f"memory of {place}": len(whole.images) * self.row_bytes})

    def _complete(self, batch: Images, digests: list[bytes], *, most: int) -> list[int]:
        """Compute the features that a batch lacks; return the depth behind which those of each image were known."""
        depths = [self._depth(image) for image in digests]
        for depth in sorted({*depths} - {len(self.prefix)}):
            missing = {image: place for place, image in enumerate(digests) if depths[place] == depth}  # each image once
            target = self._reserve(len(missing), most=most)  # before anything is computed
            if depth:
                known = (self.rows[depth][image] for image in missing)
                rows = torch.stack([self.cache.device.move(chunk.features[row]) for chunk, row in known])
                start = rows.permute(0, 3, 1, 2)
            else:
                places = list(missing.values())
                new = [batch[place] for place in places] if isinstance(batch, list) else batch[places]
                start = self.inputs.prepare(new)
            first = len(target.images)
            features = self.prefix(start, first=depth).permute(0, 2, 3, 1)
            target.features[first : first + len(missing)].copy_(features, non_blocking=True)
            target.images += missing
            self._add(len(self.prefix), target, first)
        return depths

    def _depth(self, image: bytes) -> int:
        """Return the number of layers behind which an image's features are known; 0 if they are not."""
        return next((depth for depth in self.rows if image in self.rows[depth] or self._open(depth, image)), 0)

    def _add(self, depth: int, chunk: Chunk, first: int = 0) -> None:
        added = enumerate(chunk.images[first:], start=first)
        self.rows[depth].update((image, (chunk, row)) for row, image in added)

    def _note(self, depth: int, path: Path) -> None:
        """Note which images a file has features of."""
        shape, dtype = self.prefix.outputs[depth]
        try:
            file = open_features(path, layers=self.prefix.digests[depth], shape=shape, dtype=dtype)
        except CacheError as error:
            self.display.say(f"skipped a feature file: {error}")
        else:
            self.files[depth].update(dict.fromkeys(file.images, file))

    def _open(self, depth: int, image: bytes) -> bool:
        """Map the file that has an image's features; return whether there is a good one."""
        file = self.files[depth].pop(image, None)
        if file is None:
            return False
        try:
            state = file.state()
            chunk = Chunk(file.layers, list(file.images), file.read(), file, state)
        except CacheError as error:
            self.display.say(f"skipped a feature file: {error}")
            for other in file.images:
                self.files[depth].pop(other, None)
            return False
        self._add(depth, chunk)
        self.cache.chunks.append(chunk)
        return True

    def _reserve(self, count: int, *, most: int) -> Chunk:
        """Return a chunk with room for so many more images; `most` may still come, these included."""
        if self.chunk is None or len(self.chunk.images) + count > len(self.chunk.features):
            self._close()
            rows, place = min(self.chunk_images, most), torch.device("cpu")
            if self.folder is None:
                rows, place = most, self.cache.choose_memory(most * self.row_bytes)
            pinned = place.type == "cpu" and self.cache.device.torch_device.type == "cuda"  # so that nobody waits
            features = torch.empty(rows, *self.shape, dtype=self.dtype, device=place, pin_memory=pinned)
            self.chunk = Chunk(self.prefix.digests[-1], [], features)
        return self.chunk

    def _close(self) -> None:
        """Put the chunk that was filled where it stays."""
        chunk, self.chunk = self.chunk, None
        if chunk is None:
            return
        self.cache.device.synchronize()
        where, room = f"memory of {chunk.features.device}", len(chunk.features)
        chunk.features = chunk.features[: len(chunk.images)]
        if self.folder is not None:
            try:
                file = write_features(self.folder, chunk.layers, chunk.images, chunk.features)
                chunk.state, chunk.features, chunk.file = file.state(), file.read(), file
                where = str(self.folder)
            except CacheError as error:
                self.display.say(f"features are not cached in a file: {error}")
                self.folder = None
        elif len(chunk.images) < room:
            chunk.features = chunk.features.clone()  # and let go of the room for images that were known
        self.where[where] += len(chunk.images) * self.row_bytes

    def _describe(self, depths: list[int]) -> str:
        """Say how the features came about of images that were known behind so many layers, on all processes."""
        found = exchange((Counter(depths), self.where), "how features came about")
        counted = sum((own for own, _ in found), Counter[int]())
        places = sum((there for _, there in found), Counter[str]())
        kinds = {len(self.prefix): "known", 0: "computed"}
        counts = sorted(counted.items(), reverse=True)
        texts = [(count, kinds.get(depth, f"derived from those behind {depth} layers")) for depth, count in counts]
        if not places:
            return "known already"
        how = texts[0][1] if len(texts) == 1 else ", ".join(f"{count:,} {text}" for count, text in texts)
        where = " and ".join(f"{where} ({num_bytes / 1e6:,.0f} MB)" for where, num_bytes in places.items())
        return f"{how}{f' by {world_size()} processes' if world_size() > 1 else ''}, cached in {where}"
