"""Writing a file whole or not at all."""

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from transferkit.base.files import atomic_write, kind_of, open_file

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are listed under Linux only")


def write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def test_the_whole_content_is_there_when_the_disk_is_asked_to_take_it(tmp_path, monkeypatch):
    """Nothing of the content waits in the process when the file is flushed to the disk."""
    sizes, fsync = [], os.fsync

    def synced(descriptor):
        sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    write(tmp_path / "note.txt", b"whole")

    assert sizes[0] == 5


def test_no_descriptor_stays_open(tmp_path):
    """A file that was written, or failed to be, leaves no open descriptor behind."""
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    write(tmp_path / "note.txt", b"whole")
    with pytest.raises(RuntimeError, match="in the middle"), atomic_write(tmp_path / "note.txt"):
        raise RuntimeError("in the middle")

    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_a_part_file_that_another_writer_took_for_abandoned_is_made_again(tmp_path, monkeypatch):
    """Another writer may remove a part file before it is locked: the content is written to a new one."""
    removed, flock = [], fcntl.flock

    def locked(file, operation):
        if not removed:
            removed.append(file.name)
            os.unlink(file.name)  # noqa: PTH108
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", locked)
    write(tmp_path / "note.txt", b"whole")

    assert len(removed) == 1
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("note.txt", b"whole")]


# ---- what is there already


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_replaced_file_keeps_its_mode(tmp_path, mode):
    """A file that its owner made private, or executable, stays so when it is written anew."""
    path = tmp_path / "note.txt"
    write(path, b"old")
    path.chmod(mode)
    write(path, b"new")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", mode)


def test_the_new_content_is_private_from_the_first_byte(tmp_path):
    """Nobody reads the new content who may not read the old one; a file of a new name has the process's mode."""
    path, mask = tmp_path / "note.txt", os.umask(0o022)
    try:
        write(path, b"old")
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        path.chmod(0o600)
        with atomic_write(path) as file:
            assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
    finally:
        os.umask(mask)


def test_a_link_stays_a_link(tmp_path):
    """The file that a link points to is written, in its own folder; a link to a file that is missing makes it."""
    (tmp_path / "there").mkdir()
    for name, link in (("there/note.txt", "link"), ("there/new.txt", "other")):
        (tmp_path / link).symlink_to(name)
        write(tmp_path / link, b"new")
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / name).read_bytes() == b"new"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_file_is_not_replaced(tmp_path):
    """Renaming would not ask for the permission to write: a protected file is refused."""
    write(tmp_path / "note.txt", b"old")
    (tmp_path / "note.txt").chmod(0o444)
    with pytest.raises(PermissionError):
        write(tmp_path / "note.txt", b"new")
    assert (tmp_path / "note.txt").read_bytes() == b"old"


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to itself", "long name", "NUL"])
def test_what_is_no_file_is_refused_and_stays(tmp_path, kind):
    """A folder, a pipe or a name that no file can have is an OSError: nothing waits, and nothing is removed."""
    path = tmp_path / {"long name": "x" * 300, "NUL": "a\0b"}.get(kind, "note.txt")
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link to itself": lambda: path.symlink_to(path)}.get(
        kind, lambda: None
    )()
    before = sorted(tmp_path.iterdir())

    with pytest.raises(OSError, match=r"."):
        write(path, b"new")
    with pytest.raises(OSError, match=r"."):
        open_file(path).close()
    assert kind_of(path) != "a file"
    assert sorted(tmp_path.iterdir()) == before


def test_a_pipe_that_looks_like_an_abandoned_file_is_passed_over(tmp_path):
    """A pipe beside the file is not opened, which would wait for a writer for ever."""
    os.mkfifo(tmp_path / ".note.txt.1.00000000")
    write(tmp_path / "note.txt", b"whole")
    assert (tmp_path / "note.txt").read_bytes() == b"whole"


# ---- file systems that cannot flush


@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_is_no_error(tmp_path, monkeypatch, what, number):
    """Some CIFS, FUSE and 9p mounts refuse to flush a folder or a file: the file is written all the same."""
    fsync = os.fsync

    def refused(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (what == "folder"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    write(tmp_path / "note.txt", b"whole")
    assert (tmp_path / "note.txt").read_bytes() == b"whole"


def test_a_disk_that_fails_to_flush_is_an_error(tmp_path, monkeypatch):
    """A flush that fails for another reason is raised, and the old file stays."""
    write(tmp_path / "note.txt", b"old")

    def failing(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "note.txt", b"new")
    assert (tmp_path / "note.txt").read_bytes() == b"old"
