"""Features in a file that later runs and other processes map into memory."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transferkit.base.arrays import raw_bytes, tensor_from_array
from transferkit.base.files import atomic_write
from transferkit.errors import CacheError

FORMAT = 1
SUFFIX = ".features"

_HEADER_BYTES = 4096  # a page: what follows it is aligned
_CHUNK_BYTES = 64 * 2**20
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class FeatureFile:
    """Where the features of one key lie, whether they are there yet or not.

    The file is a page of JSON that says what it holds, with a SHA-256 of itself, and then the bare numbers.

    Attributes:
        folder: An existing folder.
        key: What the features depend on, as a SHA-256 in hexadecimal digits.
    """

    folder: Path
    key: str

    @property
    def path(self) -> Path:
        return self.folder / f"{self.key[:32]}{SUFFIX}"

    def check_room(self, num_bytes: int) -> None:
        """Refuse a file for which the disk has no room, before its first byte is written.

        Raises:
            CacheError: So it is, or the folder is missing.
        """
        if not self.folder.is_dir():
            raise CacheError(f"{self.folder} is no folder: create it, or name another as cache.")
        free = shutil.disk_usage(self.folder).free
        if free < num_bytes + _HEADER_BYTES:
            raise CacheError(
                f"the features take {num_bytes / 1e6:,.0f} MB but {self.folder} has {free / 1e6:,.0f} MB free: make "
                "room there, or name another folder as cache."
            )

    def write(self, parts: Iterable[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Write features, which come in parts along the first dimension, whole or not at all.

        Raises:
            CacheError: The disk has no room, the folder is missing or cannot be written, or the parts do not
                make up `shape`.
        """
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        self.check_room(num_bytes)
        digest, written = hashlib.sha256(), 0
        try:
            with atomic_write(self.path) as file:
                file.write(bytes(_HEADER_BYTES))
                for part in parts:
                    data = raw_bytes(part)
                    digest.update(data)
                    written += file.write(data)
                if written != num_bytes:
                    raise CacheError(f"{written} bytes of features were computed: expected {num_bytes}.")
                content = {
                    "format": FORMAT,
                    "key": self.key,
                    "shape": list(shape),
                    "dtype": str(dtype).removeprefix("torch."),
                    "sha256": digest.hexdigest(),
                }
                file.seek(0)
                file.write(_header(content))
        except OSError as error:
            raise CacheError(
                f"the features cannot be written to {self.path}: {error}. Make room there, or name another folder as "
                "cache_dir."
            ) from error

    def read(self) -> Tensor:
        """Map the file and return its features, once every byte has been compared with its digest.

        The tensor must not be written to. Reading 1 GB takes about half a second.

        Raises:
            CacheError: No such file, or one that is damaged, cut short, of another key or another format.
        """
        try:
            content = _read_header(self.path)
            shape, dtype = tuple(content["shape"]), _DTYPES[content["dtype"]]
            num_bytes = torch.Size(shape).numel() * dtype.itemsize
            expected = {"format": FORMAT, "key": self.key, "size": _HEADER_BYTES + num_bytes}
            found = {"format": content["format"], "key": content["key"], "size": self.path.stat().st_size}
            if found != expected:
                raise CacheError(f"{self.path} holds {found}: expected {expected}. Delete it.")
            expected_digest = content["sha256"]
            mapped: Any = np.memmap(self.path, np.uint8, mode="r", offset=_HEADER_BYTES, shape=(num_bytes,))
            features = tensor_from_array(mapped).view(dtype).view(shape)
        except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            raise CacheError(f"{self.path} is no whole file of features ({error}): delete it.") from error
        digest = hashlib.sha256()
        for start in range(0, num_bytes, _CHUNK_BYTES):
            digest.update(memoryview(mapped[start : start + _CHUNK_BYTES]))
        if digest.hexdigest() != expected_digest:
            raise CacheError(f"{self.path} is damaged: its features do not match their SHA-256. Delete it.")
        return features


def _header(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return b"\n".join((hashlib.sha256(text).hexdigest().encode(), text)).ljust(_HEADER_BYTES)


def _read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    content: dict[str, Any] = json.loads(header[65:])
    if header != _header(content):  # the digest of the text, the padding, the size: all of the page
        raise CacheError(f"{path} is damaged: its first page does not match its SHA-256. Delete it.")
    return content
