"""Writing a file whole or not at all."""

import fcntl
import os
from pathlib import Path

import pytest

from transferkit.base.files import atomic_write

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
