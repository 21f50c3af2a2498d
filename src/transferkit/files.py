"""Write a file whole or not at all, and know what a damaged or malicious one looks like before it is read."""

import os
import pickle
import re
import secrets
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

try:
    import fcntl
except ImportError:  # Windows: files that a killed writer left behind stay there
    fcntl = None  # type: ignore[assignment]

DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What zipfile and torch.load raise on files that are damaged or of another kind, seen by flipping bits."""

MAX_MEMBERS = 20_000
"""Parts of an archive; VGG19 with batch norm and Adam has some 500."""

FOLDER = 0x10
"""External attribute of a folder: torch reads nothing of such a part, and its tensor is whatever lay in memory."""

MAX_PICKLE_BYTES = 4 * 2**20
"""Size of the part that is not tensors; VGG16 with Adam has 20 kB."""


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a new file beside `path`; when the block ends well it takes the place of `path`, else it is removed.

    The content is on the disk before it takes its place, so that a crash leaves the old file or the new one. What a
    killed writer of the same path left behind is removed by the next one: its lock tells that nobody writes it.

    Raises:
        OSError: The folder is missing, read-only or full.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with written_whole(path) as file:
        ...     _ = file.write(b"whole")
        >>> path.read_bytes()
        b'whole'
    """
    _remove_abandoned(path)
    part = Path(os.devnull)
    try:
        part, file = _open_locked(path)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
            part.replace(path)
    finally:
        if part.name.startswith("."):
            part.unlink(missing_ok=True)
    with suppress(PermissionError):  # it may be written but not listed; Windows opens no folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a power failure could undo the renaming
        finally:
            os.close(folder)


def check_archive(path: Path) -> None:
    """Verify the checksum of every part of a file that torch.save wrote, having looked at how much there is.

    torch itself looks at no checksum, and inflates whatever is compressed.

    Raises:
        ValueError: A checksum is wrong, or no torch.save writes such an archive: compressed parts, more parts or
            larger ones than the file can hold.
        zipfile.BadZipFile: No archive.
    """  # weights_only keeps code from running; it does not keep a few bytes from filling the memory
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise ValueError(f"it has {len(members):,} parts, expected at most {MAX_MEMBERS:,}")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it has compressed parts, which torch.save does not write")
        if any(member.is_dir() or member.external_attr & FOLDER for member in members):
            raise ValueError("it has a folder among its parts, which torch.save does not write")
        declared = sum(member.file_size for member in members)
        if declared > path.stat().st_size:
            raise ValueError(f"its parts declare {declared:,} bytes, more than the file has")
        pickled = sum(member.file_size for member in members if member.filename.endswith(".pkl"))
        if pickled > MAX_PICKLE_BYTES:
            raise ValueError(f"{pickled:,} bytes of it are not tensors, expected at most {MAX_PICKLE_BYTES:,}")
        if damaged := archive.testzip():
            raise ValueError(f"it is damaged in its part {damaged!r}")
        if any(b"bytearray" in archive.read(name) for name in archive.namelist() if name.endswith(".pkl")):
            raise ValueError("it makes a bytearray, of any size from a few bytes, which no state dict holds")


def is_ordinary(tensor: Tensor) -> bool:
    """Say whether a tensor is dense and has memory for all that it says it holds.

    Example:
        >>> is_ordinary(torch.zeros(3)), is_ordinary(torch.zeros(1).expand(10**12))
        (True, False)
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        return False
    return not tensor.is_quantized and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _open_locked(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        file = part.open("x+b")
        with suppress(OSError):  # some network file systems have no locks: what is abandoned there stays
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)  # goes when the process does, however it ends
        if os.fstat(file.fileno()).st_nlink:  # nobody took it for abandoned before it was locked
            return part, file
        file.close()


def _remove_abandoned(path: Path) -> None:
    form = re.compile(rf"\.{re.escape(path.name)}\.\d+\.[0-9a-f]{{8}}")
    parts: list[Path] = []
    with suppress(OSError):  # a folder that may be written but not listed
        parts = [other for other in path.parent.iterdir() if form.fullmatch(other.name)]
    for part in parts if fcntl is not None else ():
        with suppress(OSError), part.open("rb") as file:  # somebody writes it, or has just finished
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
