"""Open files that are files, and write a file whole or not at all."""

import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: what a killed writer left behind stays there
    fcntl = None  # type: ignore[assignment]

_NO_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EBADF}
"""Errors of file systems (CIFS, FUSE, 9p) that cannot flush a file or folder."""


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading, without waiting for a pipe's other end.

    Raises:
        OSError: It is missing, cannot be read, or is a folder, pipe or device; or no path can have this name.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.ENOENT, str(error), str(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"it is {kind_of(path)}, expected a file")
    return os.fdopen(descriptor, "rb")


def kind_of(path: str | os.PathLike[str]) -> str:
    """Return what is at a path: `"a file"`, `"a folder"`, `"a pipe or device"`, `"nothing"`, or why nothing can be.

    Example:
        >>> kind_of("/"), kind_of("x" * 300)
        ('a folder', 'nothing (File name too long)')
    """
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return "nothing"
    except (OSError, ValueError) as error:
        return f"nothing ({getattr(error, 'strerror', None) or error})"
    return "a file" if stat.S_ISREG(mode) else "a folder" if stat.S_ISDIR(mode) else "a pipe or device"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a hidden file beside `path` that replaces `path` when the block ends, unless the block raises.

    The content is flushed to the disk before the file is renamed, so that after a crash `path` is the old file or the
    new one. The new file has the old one's mode and group; a link stays a link. A writer locks its hidden file. One
    that is not locked was left by a killed writer, and the next writer of the same path removes it.

    Raises:
        OSError: The folder is missing, read-only or full, or what is at `path` is read-only or no file. `path` is
            unchanged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with atomic_write(path) as file:
        ...     _ = file.write(b"whole")
        >>> path.read_bytes()
        b'whole'
    """
    old = None
    try:
        path = Path(os.path.realpath(path))  # what a link points to
        old = path.stat()
    except FileNotFoundError:
        pass
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise OSError(f"it is {kind_of(path)}, expected the name of a file")
    if old is not None:
        os.close(os.open(path, os.O_WRONLY))  # raises where it is read-only: renaming would not ask
    _remove_abandoned(path)
    part, file = _open_locked(path, private=old is not None)
    try:
        with file:
            yield file
            if old is not None:
                _take_over(part, old)
            file.flush()
            _sync(file.fileno())
            if fcntl is None:
                file.close()  # Windows does not rename an open file
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    with suppress(PermissionError):  # a folder that may be written but not listed; Windows opens no folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            _sync(folder)  # or a power failure could undo the renaming
        finally:
            os.close(folder)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from locking a folder inside the block. A process may lock a folder twice.

    On file systems without locks, and under Windows, nothing is locked.

    Raises:
        BlockingIOError: Another process holds it, for longer than the workers of a killed one take to end.
    """
    key = os.path.realpath(folder)
    try:
        descriptor = None if fcntl is None or key in _HELD else os.open(folder, os.O_RDONLY)
    except OSError:  # a folder that may be written but not listed
        descriptor = None
    if descriptor is None:
        yield
        return
    try:
        _lock(descriptor)
        _HELD.add(key)
        yield
    finally:
        _HELD.discard(key)
        os.close(descriptor)


_HELD: set[str] = set()
_PATIENCE_S = 2.0


def _lock(descriptor: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not _locks(descriptor):
        if time.monotonic() > deadline:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
        time.sleep(0.05)


def _locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)  # no locks there
    return True


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


def _take_over(part: Path, old: os.stat_result) -> None:
    """Give a file the group and mode of the one that it replaces."""
    if hasattr(os, "chown"):
        with suppress(OSError):  # not a member of that group
            os.chown(part, -1, old.st_gid)
    part.chmod(stat.S_IMODE(old.st_mode))


def _open_locked(path: Path, *, private: bool) -> tuple[Path, BinaryIO]:
    mode = 0o600 if private else 0o666  # nobody reads the new content who may not read the old
    while True:
        part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        file = open(part, "x+b", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115
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
        with suppress(OSError), open_file(part) as file:  # somebody writes it, or has just finished
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
