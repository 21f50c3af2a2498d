"""The feature cache: what the frozen prefix makes of each image, computed once and kept.

A key says what features depend on: the pixels in their order, the preprocessing, every frozen layer's settings and
weights, the number format, the kind of device and the version of torch. Features are taken again only under the same
key, so they cannot disagree with the model or the data.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from transferkit.base.arrays import raw_bytes
from transferkit.base.display import Display
from transferkit.compute.device import Device
from transferkit.compute.host_memory import host_bytes
from transferkit.data.inputs import Inputs
from transferkit.errors import CacheError
from transferkit.features.file import FeatureFile
from transferkit.features.prefix import Prefix

MEMORY_SHARE = 0.5
"""How much of the memory that is free on the device, and of that on the host, features may take."""

ROOM_IF_UNKNOWN = 2 * 10**9
"""Bytes they may take where the system does not tell how much is free (Apple's MPS, CPUs elsewhere than on Linux)."""


def open_folder(path: str | PathLike[str] | None) -> Path | None:
    """Return the folder for files of features, made if its parent is there; None as it is.

    Raises:
        CacheError: There is no such folder and none can be made.
    """
    if path is None:
        return None
    folder = Path(path)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"cache={str(path)!r} cannot be used: {error}. Expected a folder, or where to make one."
        ) from error
    return folder


@dataclass(frozen=True, slots=True)
class KeptFeatures:
    """The features of every image of a source, in one or several views.

    Attributes:
        features: `(views, N, h, w, C)` in the number format they were computed in: on the device, in host memory or
            in a mapped file.
        targets: As the source has them, on the device.
        pixels: Digest of the images they were computed from.
        layers: Digest of the layers they were computed by.
        device: Where batches go.
    """

    features: Tensor
    targets: Tensor
    pixels: str
    layers: str
    device: Device

    def batches(
        self, batch_size: int, *, order: Tensor | None = None, view: int = 0
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield features `(N, C, h, w)`, channels-last, and targets of each batch, on the device.

        Each batch is a copy: a head that works in place cannot change what is kept.

        Args:
            batch_size: Images in a batch.
            order: Places of the images, int64; None takes them as they lie.
            view: Which of the views.
        """
        features = self.features[view]
        order = torch.arange(len(features)) if order is None else order
        gathered = (self._gather(features, places) for places in torch.split(order.to(features.device), batch_size))
        targets = (self.targets[places] for places in torch.split(order.to(self.targets.device), batch_size))
        for batch, batch_targets in self.device.batches(zip(gathered, targets, strict=True)):
            yield batch.permute(0, 3, 1, 2), batch_targets  # (N, h, w, C) in memory: no copy

    def _gather(self, features: Tensor, places: Tensor) -> Tensor:
        pinned = self.device.torch_device.type == "cuda" and features.device.type == "cpu"  # so that nobody waits
        batch = torch.empty(
            len(places), *features.shape[1:], dtype=features.dtype, device=features.device, pin_memory=pinned
        )
        return torch.index_select(features, 0, places, out=batch)


class FeatureCache:
    """The features that a trainer keeps in memory, and the files of them in a folder.

    Args:
        device: Where features are used.
        folder: Where they are kept for later runs and other processes; None keeps them in memory alone.
        check: Called after each batch, to stop.
    """

    def __init__(self, device: Device, folder: Path | None = None, *, check: Callable[[], None] = lambda: None) -> None:
        self.device = device
        self.folder = folder
        self.check = check
        self._kept: list[KeptFeatures] = []

    def share(self, other: "FeatureCache") -> None:
        """Keep the features of another cache, one list for both."""
        self._kept = other._kept

    def keep(self, inputs: Inputs, prefix: Prefix, *, num_views: int, display: Display) -> KeptFeatures:
        """Return the features of every image: known ones, ones derived from those of fewer layers, or new ones.

        Args:
            inputs: The images; their source knows how many it has.
            prefix: What computes the features.
            num_views: Views of each image.
            display: Shows what is done.

        Raises:
            CacheError: They would take too much memory.
        """
        scan = _Scan(inputs, prefix.batch_size, num_views, self.check)
        example = _example(inputs, prefix)
        shape = (num_views, scan.num_images, *example.shape[1:])
        start = None
        if self.folder is not None or any(kept.features.shape[:2] == shape[:2] for kept in self._kept):
            scan.read(display)  # the pixels must be known before it can be told whether their features are
            start = self._find(scan, prefix, display)
        if start is not None and start.layers == prefix.digests[-1]:
            display.say(f"features of {scan.num_images:,} images: known already")
            return self._remember(start)

        def compute() -> Iterator[Tensor]:
            computed = scan.compute(prefix) if start is None else _derive(start, prefix)
            total = num_views * scan.num_images
            with closing(computed), display.bar("features", total) as bar:  # or a kept traceback would keep workers
                for part in computed:
                    yield part.permute(0, 2, 3, 1)
                    bar.advance(len(part))
                    self.check()

        file = self._file(scan.pixels, prefix.digests[-1])
        features, where = self._store(compute, shape, example.dtype, file=file, display=display)
        how = "computed" if start is None else f"derived from those behind {_depth(start, prefix)} layers"
        size = features.numel() * features.element_size() / 1e6
        display.say(f"features of {scan.num_images:,} images: {how}, kept in {where} ({size:,.0f} MB)")
        return self._remember(KeptFeatures(features, scan.targets, scan.pixels, prefix.digests[-1], self.device))

    def _find(self, scan: "_Scan", prefix: Prefix, display: Display) -> KeptFeatures | None:
        """Return what is known of these images behind the largest number of the prefix's layers."""
        for layers in reversed(prefix.digests[1:]):
            for kept in self._kept:
                if (kept.pixels, kept.layers) == (scan.pixels, layers):
                    return replace(kept, targets=scan.targets)
            file = self._file(scan.pixels, layers)
            if file is not None and file.path.exists():
                try:
                    features = self._on_device(file.read())
                except CacheError as error:
                    display.say(f"a file of features is passed over: {error}")
                    continue
                return KeptFeatures(features, scan.targets, scan.pixels, layers, self.device)
        return None

    def _store(
        self,
        compute: Callable[[], Iterator[Tensor]],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        file: FeatureFile | None,
        display: Display,
    ) -> tuple[Tensor, str]:
        """Compute features into a file if there is a folder, else or if that fails into memory."""
        if file is not None:
            try:
                file.write(compute(), shape, dtype)
                return self._on_device(file.read()), str(file.path)
            except CacheError as error:
                display.say(f"features are not kept in a file: {error}")
        place, where = self._choose_memory(torch.Size(shape).numel() * dtype.itemsize)
        features = torch.empty(shape, dtype=dtype, device=place, pin_memory=where == "pinned memory")
        rows, filled = features.view(-1, *shape[2:]), 0
        for part in compute():
            rows[filled : filled + len(part)].copy_(part, non_blocking=True)
            filled += len(part)
        self.device.synchronize()
        return features, where

    def _choose_memory(self, num_bytes: int) -> tuple[torch.device, str]:
        cpu = torch.device("cpu")
        for _ in range(2):
            if num_bytes <= self._room(self.device.torch_device):
                return self.device.torch_device, f"memory of {self.device.torch_device}"
            if self.device.torch_device != cpu and num_bytes <= self._room(cpu):
                return cpu, "pinned memory" if self.device.torch_device.type == "cuda" else "memory"
            self._kept.clear()  # what earlier runs left; what this run uses stays with it
        raise CacheError(
            f"they take {num_bytes / 1e6:,.0f} MB, and may take {self._room(cpu) / 1e6:,.0f} MB "
            f"({MEMORY_SHARE:.0%} of what is free). Name a folder for them: Trainer(cache=...)"
        )

    def _room(self, place: torch.device) -> int:
        """Return how many bytes features may take there."""
        if place.type == "cpu":
            memory = host_bytes()
            free = None if memory is None else memory["free"]
        else:
            free = self.device.memory()["free"] if place.type == "cuda" else None
        return ROOM_IF_UNKNOWN if free is None else int(MEMORY_SHARE * free)

    def _on_device(self, mapped: Tensor) -> Tensor:
        """Copy the features of a file to an accelerator that has room for them; on the CPU the mapping serves."""
        place = self.device.torch_device
        roomy = place.type != "cpu" and mapped.numel() * mapped.element_size() <= self._room(place)
        return mapped.to(place) if roomy else mapped

    def _file(self, pixels: str, layers: str) -> FeatureFile | None:
        key = hashlib.sha256(f"{pixels} {layers}".encode()).hexdigest()
        return None if self.folder is None else FeatureFile(self.folder, key)

    def _remember(self, kept: KeptFeatures) -> KeptFeatures:
        self._kept[:] = [other for other in self._kept if (other.pixels, other.layers) != (kept.pixels, kept.layers)]
        self._kept.append(kept)
        return kept


class _Scan:
    """Reads every view of a source, and notes the digest of the pixels and the targets.

    The pixels are those in the source or, if they are augmented, the augmented ones; the digest does not depend on
    how they are divided into batches.
    """

    def __init__(self, inputs: Inputs, batch_size: int, num_views: int, check: Callable[[], None]) -> None:
        self.check = check
        self.inputs = inputs
        self.batch_size = batch_size
        self.num_views = num_views
        self.num_images = inputs.source.num_images or 0
        self.pixels = ""
        self.targets = torch.empty(0)

    def __iter__(self) -> Generator[Tensor, None, None]:
        """Yield the model input of each batch."""
        digest, targets = hashlib.sha256(f"{self.num_views} views".encode()), []
        form = ""

        def watch(images: Tensor | list[Tensor]) -> None:
            nonlocal form
            for image in [images] if isinstance(images, Tensor) else [image[None] for image in images]:
                if form != (form := f"{image.dtype} {tuple(image.shape[1:])}"):
                    digest.update(form.encode())
                digest.update(raw_bytes(image))

        for view in range(self.num_views):
            for inputs, batch_targets in self.inputs.batches(self.batch_size, view=view, watch=watch):
                if view == 0:
                    targets.append(batch_targets)
                yield inputs
        self.pixels, self.targets = digest.hexdigest(), torch.cat(targets)

    def read(self, display: Display) -> None:
        """Read all without computing anything."""
        total = self.num_views * self.num_images
        with closing(iter(self)) as batches, display.bar("looking at the images", total) as bar:
            for batch in batches:
                bar.advance(len(batch))
                self.check()

    def compute(self, prefix: Prefix) -> Generator[Tensor, None, None]:
        """Yield the features of each batch."""
        with closing(iter(self)) as batches:
            for batch in batches:
                yield prefix(batch)


def _example(inputs: Inputs, prefix: Prefix) -> Tensor:
    size = inputs.preprocess.image_size
    images = torch.zeros(1, 3, size, size, device=inputs.device.torch_device)
    return prefix(images).permute(0, 2, 3, 1)


def _depth(kept: KeptFeatures, prefix: Prefix) -> int:
    return prefix.digests.index(kept.layers)


def _derive(start: KeptFeatures, prefix: Prefix) -> Generator[Tensor, None, None]:
    first = _depth(start, prefix)
    for view in range(len(start.features)):
        for batch, _ in start.batches(prefix.batch_size, view=view):
            yield prefix(batch, first=first)
