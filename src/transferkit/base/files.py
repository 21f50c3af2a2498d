"""Open files that are files, and write a file whole or not at all."""

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: what a killed writer left behind stays there
    fcntl = None  # type: ignore[assignment]

_NO_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # of some CIFS, FUSE and 9p file systems


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading; a folder, pipe or device, which nobody waits for, is an `OSError`."""
    if (found := kind_of(path)) not in ("a file", "nothing"):
        raise OSError(f"it is {found}, expected a file")
    return path.open("rb")


def kind_of(path: str | os.PathLike[str]) -> str:
    """Return what is at a path: `"a file"`, `"a folder"`, `"a pipe or device"`, `"nothing"`, or why nothing can be."""
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return "nothing"
    except (OSError, ValueError) as error:
        return f"nothing ({getattr(error, 'strerror', error)})"
    return "a file" if stat.S_ISREG(mode) else "a folder" if stat.S_ISDIR(mode) else "a pipe or device"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a hidden file beside `path` that replaces `path` when the block ends, unless the block raises.

    The content is flushed to the disk before the file is renamed, so that after a crash `path` is the old file or the
    new one. The new file has the old one's mode and group; a link stays a link. A writer locks its hidden file. One
    that is not locked was left by a killed writer, and the next writer of the same path removes it. Where `path`
    cannot be written, `OSError` is raised and nothing is changed.
    """
    found = kind_of(path)
    if found == "a file":
        os.close(os.open(path, os.O_WRONLY))  # raises where it is read-only: renaming would not ask
    elif found != "nothing":
        raise OSError(f"it is {found}, expected the name of a file")
    path = Path(os.path.realpath(path))  # what a link points to
    old = path.stat() if found == "a file" else None
    _remove_abandoned(path)
    part, file = _open_locked(path)
    try:
        with file:
            if old is not None:  # before there is anything to read
                with suppress(OSError, AttributeError):  # not a member of the group; Windows has none
                    os.chown(part, -1, old.st_gid)
                part.chmod(stat.S_IMODE(old.st_mode))
            yield file
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


def lock_folder(folder: Path) -> BinaryIO | None:
    """Lock a folder until the file returned is closed, or raise `BlockingIOError`; None where there are no locks."""
    path = folder / ".lock"
    if fcntl is None or kind_of(path) not in ("nothing", "a file"):
        return None
    try:
        file = path.open("ab")
    except OSError:  # a read-only folder
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, whose children do not have it
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):  # a file system without locks
            return file
        file.close()
        raise BlockingIOError(error.errno, "another process holds it") from error
    return file


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


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
        with suppress(OSError), open_file(part) as file:  # somebody writes it, or has just finished
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
