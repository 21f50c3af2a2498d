"""Chunks of features in files that later runs and other processes map into memory."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transferkit.base.arrays import raw_bytes
from transferkit.base.files import atomic_write, open_file
from transferkit.errors import CacheError

FORMAT = 2
SUFFIX = ".features"
DIGEST_BYTES = 16  # length of an image's digest

_HEADER_BYTES = 4096  # a page: the numbers behind it are aligned


@dataclass(frozen=True, slots=True)
class FeatureFile:
    """A file with the features of some images behind some layers, from `write_features` or `open_features`.

    It holds a page of JSON with a SHA-256 of itself, the bare numbers, and the images' digests. Its name is made of the
    digests of layers and images, so two processes that write the same features write the same file.
    """

    path: Path
    layers: str  # what computed the features: one of `Prefix.digests`
    images: tuple[bytes, ...]  # a digest of each image, 16 bytes
    shape: tuple[int, ...]  # (len(images), ...)
    dtype: torch.dtype
    sha256: str  # of the numbers, in hexadecimal digits

    def state(self) -> tuple[int, ...] | None:
        """Return what changes when somebody writes to the file or cuts it short; None if it is gone."""
        try:
            found = os.stat(self.path)  # noqa: PTH116 - before each batch: a third of the time of Path.stat
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def read(self) -> Tensor:
        """Map the file and return its features, after comparing every byte with their SHA-256: half a second for 1 GB.

        Writing to the tensor changes neither the file nor what others map.
        """
        end = _HEADER_BYTES + _num_bytes(self.shape, self.dtype)
        state = self.state()
        if state is not None and state[2] < end:
            raise CacheError(f"{self.path} is cut short, {state[2]:,} of {end:,} bytes: delete it.")
        try:
            mapped = torch.from_file(str(self.path), shared=False, size=end, dtype=torch.uint8)  # holds no descriptor
        except (OSError, ValueError, RuntimeError) as error:
            raise CacheError(f"{self.path} cannot be mapped: {error}.") from error
        numbers = mapped[_HEADER_BYTES:]
        if hashlib.sha256(raw_bytes(numbers)).hexdigest() != self.sha256:
            raise CacheError(f"{self.path} is damaged: its features do not match their SHA-256. Delete it.")
        return numbers.view(self.dtype).view(self.shape)


def write_features(folder: Path, layers: str, images: Sequence[bytes], features: Tensor) -> FeatureFile:
    """Write a chunk of features, `(len(images), ...)`, into a file in an existing folder, whole or not at all."""
    digests = b"".join(images)
    path = folder / f"{layers[:32]}-{hashlib.sha256(digests).hexdigest()[:32]}{SUFFIX}"
    if not folder.is_dir():
        raise CacheError(f"{folder} is not a folder: create it, or name another with cache=.")
    num_bytes = features.numel() * features.element_size()
    free = shutil.disk_usage(folder).free
    if free < _HEADER_BYTES + num_bytes + len(digests):
        raise CacheError(
            f"the next {num_bytes / 1e6:,.1f} MB do not fit into {folder}, which has {free / 1e6:,.1f} MB free. Make "
            "room there, or name another folder with cache=."
        )
    numbers = raw_bytes(features)
    sha256 = hashlib.sha256(numbers).hexdigest()
    file = FeatureFile(path, layers, tuple(images), tuple(features.shape), features.dtype, sha256)
    try:
        with atomic_write(path) as opened:
            opened.write(_header(file))
            opened.write(numbers)
            opened.write(digests)
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written: {error}. Make room there, or name another folder with cache=."
        ) from error
    return file


def open_features(path: Path, *, layers: str, shape: tuple[int, ...], dtype: torch.dtype) -> FeatureFile:
    """Read what a file holds, without its features: those behind some layers, of one shape for each image."""
    try:
        with open_file(path) as opened:
            page = opened.read(_HEADER_BYTES)
            content: dict[str, Any] = json.loads(page[65:])
            found = {key: content[key] for key in ("format", "layers", "shape", "dtype")}
            found["bytes"] = os.fstat(opened.fileno()).st_size
            count = int(content["shape"][0])
            end = _HEADER_BYTES + _num_bytes((count, *shape), dtype)
            expected = {"format": FORMAT, "layers": layers, "shape": [count, *shape], "dtype": _name(dtype)}
            expected["bytes"] = end + count * DIGEST_BYTES
            opened.seek(end)
            digests = opened.read() if found == expected else b""
        images = tuple(digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES))
        file = FeatureFile(path, layers, images, (count, *shape), dtype, content["sha256"])
        whole = page == _header(file)  # every byte of the page and, through it, every digest
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error}.") from error
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        raise CacheError(f"{path} is not a complete feature file ({error}): delete it.") from error
    if found != expected:
        raise CacheError(f"{path} holds {found}: expected {expected}. Delete it.")
    if not whole:
        raise CacheError(f"{path} is damaged: its first page does not match its SHA-256. Delete it.")
    return file


def _header(file: FeatureFile) -> bytes:
    content = {
        "format": FORMAT,
        "layers": file.layers,
        "images": hashlib.sha256(b"".join(file.images)).hexdigest(),
        "shape": list(file.shape),
        "dtype": _name(file.dtype),
        "sha256": file.sha256,
    }
    text = json.dumps(content).encode()
    return b"\n".join((hashlib.sha256(text).hexdigest().encode(), text)).ljust(_HEADER_BYTES)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
