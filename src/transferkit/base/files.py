"""Write a file whole or not at all."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: what a killed writer left behind stays there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a hidden file beside `path` that replaces `path` when the block ends, unless the block raises.

    The content is flushed to the disk before the file is renamed, so that after a crash `path` is the old file or the
    new one. A writer locks its hidden file. One that is not locked was left by a killed writer, and the next writer of
    the same path removes it.

    Raises:
        OSError: The folder is missing, read-only or full. `path` is unchanged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with atomic_write(path) as file:
        ...     _ = file.write(b"whole")
        >>> path.read_bytes()
        b'whole'
    """
    _remove_abandoned(path)
    part, file = _open_locked(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows does not rename an open file
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    with suppress(PermissionError):  # a folder that may be written but not listed; Windows opens no folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a power failure could undo the renaming
        finally:
            os.close(folder)


def _open_locked(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        file = part.open("x+b")
        with suppress(OSError):  # some network file systems have no locks: what is abandoned there stays
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process, however that ends
        if os.fstat(file.fileno()).st_nlink:  # no other writer removed it before it was locked
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
