"""A file of features is read whole and right, or not at all."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from transferkit.errors import CacheError
from transferkit.features.file import FeatureFile

HEADER_BYTES = 4096
KEY = hashlib.sha256(b"one").hexdigest()
OTHER_KEY = KEY[:32] + hashlib.sha256(b"other").hexdigest()[32:]  # with the same file name
FORMATS = [torch.bfloat16, torch.float16, torch.float32]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def features():
    return torch.rand(2, 9, 3, 3, 5).bfloat16()


def parts_of(features):
    return iter(torch.split(features.flatten(0, 1), 4))


@pytest.fixture
def file(tmp_path, features):
    """A file that has been written."""
    file = FeatureFile(tmp_path, KEY)
    file.write(parts_of(features), tuple(features.shape), features.dtype)
    return file


def assert_refused(file):
    """Reading fails with the path and the remedy."""
    with pytest.raises(CacheError) as caught:
        file.read()
    assert str(file.path) in str(caught.value)
    assert "elete it" in str(caught.value)


@contextmanager
def ordinary_user():
    """The superuser may write anywhere: be somebody else."""
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that any user can reach."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


# ---- writing and reading


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_written_is_read(tmp_path, features, dtype):
    """Features come back bit for bit, in shape and number format, however they were divided."""
    features = features.to(dtype)
    file = FeatureFile(tmp_path, KEY)
    file.write(parts_of(features), tuple(features.shape), dtype)
    read = file.read()
    assert read.dtype == dtype
    assert torch.equal(read, features)


def test_parts_in_another_memory_layout_are_written_in_row_major_order(tmp_path, features):
    """What counts is the order of the indices, not that in memory."""
    strided = features.flatten(0, 1).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not strided.is_contiguous()
    file = FeatureFile(tmp_path, KEY)
    file.write([strided], tuple(features.shape), features.dtype)
    assert torch.equal(file.read(), features)


def test_not_a_number_and_signed_zero_are_kept(tmp_path):
    """Every bit pattern comes back, those that are no numbers included."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    file = FeatureFile(tmp_path, KEY)
    file.write([bits.view(torch.bfloat16)], (2**16,), torch.bfloat16)
    assert torch.equal(file.read().view(torch.int16), bits)


def test_the_name_comes_from_the_key(file, tmp_path):
    """The folder holds that one file, named after its key."""
    assert list(tmp_path.iterdir()) == [file.path]
    assert file.path.name == f"{KEY[:32]}.features"


def test_the_first_page_says_what_the_file_holds(file, features):
    """Anybody can read what the file holds, and the numbers lie bare behind the first page."""
    content = file.path.read_bytes()
    digest, text = content[:HEADER_BYTES].rstrip().split(b"\n")
    assert digest.decode() == hashlib.sha256(text).hexdigest()
    payload = content[HEADER_BYTES:]
    assert json.loads(text) == {
        "format": 1,
        "key": KEY,
        "shape": list(features.shape),
        "dtype": "bfloat16",
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    assert payload == features.view(torch.uint8).numpy().tobytes()


def test_a_second_writing_takes_the_place_of_the_first(file, features):
    """A file that is there is replaced, and who has mapped the old one keeps it."""
    old = file.read()
    file.write(parts_of(-features), tuple(features.shape), features.dtype)
    assert torch.equal(file.read(), -features)
    assert torch.equal(old, features)


# ---- files that are refused


def test_a_missing_file_is_refused(tmp_path):
    """No file is an error with the path."""
    with pytest.raises(CacheError, match=str(tmp_path)):
        FeatureFile(tmp_path, KEY).read()


def test_a_file_of_another_key_is_refused(file, tmp_path):
    """A file of the right name whose content belongs to another key is refused."""
    other = FeatureFile(tmp_path, OTHER_KEY)
    assert other.path == file.path
    assert_refused(other)


@pytest.mark.parametrize("change", [{"format": 2}, {"format": 0}], ids=str)
def test_another_format_is_refused(file, change):
    """A file in a later or an older format, undamaged, is refused."""
    content = file.path.read_bytes()
    text = json.dumps({**json.loads(content[65:HEADER_BYTES]), **change}).encode()
    header = b"\n".join((hashlib.sha256(text).hexdigest().encode(), text)).ljust(HEADER_BYTES)
    file.path.write_bytes(header + content[HEADER_BYTES:])
    assert_refused(file)


@pytest.mark.parametrize("size", [0, 1, 64, 65, 66, 300, 4095, 4096, 4097, -2, -1])
def test_a_file_cut_short_is_refused(file, size):
    """A file that ends too early, anywhere, is refused; so is an empty one."""
    content = file.path.read_bytes()
    file.path.write_bytes(content[:size])
    assert_refused(file)


def test_a_file_too_long_is_refused(file):
    """One byte too many is refused too."""
    with file.path.open("ab") as opened:
        opened.write(b"\0")
    assert_refused(file)


@pytest.mark.parametrize(
    "content", [b"\0" * 9000, b"[" * 9000, b'{"format": 1}', b"\xff" * 9000], ids=lambda c: str(c[:1])
)
def test_a_file_of_another_kind_is_refused(file, content):
    """Whatever else lies under the name is refused."""
    file.path.write_bytes(content)
    assert_refused(file)


def test_a_directory_in_its_place_is_refused(tmp_path):
    """A directory under the name is refused like a damaged file."""
    file = FeatureFile(tmp_path, KEY)
    file.path.mkdir()
    assert_refused(file)


def test_every_bit_of_the_first_page_counts(file):
    """A flipped bit in the first page, in any byte of its text and in its padding, is noticed."""
    content = bytearray(file.path.read_bytes())
    text = len(bytes(content[:HEADER_BYTES]).rstrip())
    assert text > 200
    for place in [*range(text + 3), *range(text + 3, HEADER_BYTES, 97), HEADER_BYTES - 1]:
        for bit in range(8) if place in (0, 64, 65, text) else (place % 8, 5):
            content[place] ^= 1 << bit
            file.path.write_bytes(content)
            with pytest.raises(CacheError):
                file.read()
            content[place] ^= 1 << bit
    file.path.write_bytes(content)
    file.read()


def test_every_bit_of_the_features_counts(file):
    """A flipped bit in the features is noticed: the first, the last and 200 others."""
    content = bytearray(file.path.read_bytes())
    places = torch.randint(HEADER_BYTES, len(content), (200,)).tolist()
    for number, place in enumerate([HEADER_BYTES, len(content) - 1, *places]):
        content[place] ^= 1 << number % 8
        file.path.write_bytes(content)
        with pytest.raises(CacheError, match="damaged"):
            file.read()
        content[place] ^= 1 << number % 8


# ---- writing that fails


def test_parts_that_do_not_make_up_the_shape_are_refused(tmp_path, features):
    """Too few or too many features are an error, and no file is left."""
    for wrong in (features[:1], torch.cat([features, features])):
        with pytest.raises(CacheError, match="expected 1620"):
            FeatureFile(tmp_path, KEY).write(parts_of(wrong), tuple(features.shape), features.dtype)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_computing_leaves_no_file(tmp_path, features, error):
    """If what computes the features fails the error comes out as it is, and nothing is left in the folder."""

    def parts():
        yield from torch.split(features[0], 2)
        raise error

    with pytest.raises(error):
        FeatureFile(tmp_path, KEY).write(parts(), tuple(features.shape), features.dtype)
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_computing_leaves_the_old_file(file, features):
    """A file that was there stays."""

    def parts():
        yield features[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file.write(parts(), tuple(features.shape), features.dtype)
    assert torch.equal(file.read(), features)


@pytest.mark.parametrize("short", [0, 1])
def test_the_disk_is_asked_before_the_first_byte(tmp_path, features, monkeypatch, short):
    """Without room for every byte, the first page included, nothing is computed and nothing is written."""
    needed = HEADER_BYTES + features.numel() * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, needed - short))
    file, computed = FeatureFile(tmp_path, KEY), []

    def parts():
        computed.append(True)
        yield from parts_of(features)

    if not short:
        file.write(parts(), tuple(features.shape), features.dtype)
        return
    with pytest.raises(CacheError, match="make room there, or name another folder as cache_dir") as caught:
        file.write(parts(), tuple(features.shape), features.dtype)
    assert str(tmp_path) in str(caught.value)
    assert computed == []
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_refused(tmp_path, features):
    """A folder that was deleted meanwhile is an error with its path and the remedy."""
    folder = tmp_path / "gone"
    with pytest.raises(CacheError, match="cache") as caught:
        FeatureFile(folder, KEY).write(parts_of(features), tuple(features.shape), features.dtype)
    assert str(folder) in str(caught.value)


def test_a_folder_that_cannot_be_written_is_refused(open_folder, features):
    """A read-only folder is an error with its path and the remedy."""
    open_folder.chmod(0o555)
    file = FeatureFile(open_folder, KEY)
    with ordinary_user(), pytest.raises(CacheError, match="cache") as caught:
        file.write(parts_of(features), tuple(features.shape), features.dtype)
    assert str(open_folder) in str(caught.value)
    assert list(open_folder.iterdir()) == []


def test_a_file_in_a_read_only_folder_is_read(open_folder, features):
    """What lies in a read-only folder, for all to use, can be read."""
    file = FeatureFile(open_folder, KEY)
    file.write(parts_of(features), tuple(features.shape), features.dtype)
    file.path.chmod(0o444)
    open_folder.chmod(0o555)
    with ordinary_user():
        assert torch.equal(file.read(), features)


def test_a_directory_in_its_place_cannot_be_replaced(tmp_path, features):
    """A directory under the name is an error at writing too, and nothing else is left."""
    file = FeatureFile(tmp_path, KEY)
    file.path.mkdir()
    with pytest.raises(CacheError, match="cannot be written") as caught:
        file.write(parts_of(features), tuple(features.shape), features.dtype)
    assert str(file.path) in str(caught.value)
    assert list(tmp_path.iterdir()) == [file.path]


# ---- other processes

WRITER = """
import os, sys, time
from pathlib import Path
import torch
from transferkit.features.file import FeatureFile

folder, key, pause, count = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)
features = torch.rand(1, 40, 64, 64, 8)

def parts():
    print("begun\\n", end="")
    sys.stdout.flush()
    while len(list(folder.iterdir())) < count and not any(folder.glob("*.features")):  # until the others have begun too
        time.sleep(0.001)
    for part in features[0].split(1):
        yield part
        time.sleep(pause)

def write():
    FeatureFile(folder, key).write(parts(), tuple(features.shape), features.dtype)

children = []
for _ in range(count - 1):
    child = os.fork()
    if child == 0:
        write()
        os._exit(0)
    children.append(child)
write()
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
"""


def start_writers(folder, pause, count):
    command = [sys.executable, "-c", WRITER, str(folder), KEY, str(pause), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_processes_that_write_at_once_end_with_one_whole_file(tmp_path):
    """Three processes writing the same features at once leave one valid file and nothing else."""
    writers = start_writers(tmp_path, 0.002, 3)
    assert writers.communicate(timeout=60)[0] == "begun\n" * 3
    assert writers.returncode == 0
    torch.manual_seed(0)
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY[:32]}.features"]
    assert torch.equal(FeatureFile(tmp_path, KEY).read(), torch.rand(1, 40, 64, 64, 8))


@pytest.mark.slow
def test_a_killed_writer_leaves_no_file_under_the_name(tmp_path, features):
    """A writer killed in the middle leaves nothing under the final name, and the next writer succeeds."""
    writer = start_writers(tmp_path, 0.05, 1)
    writer.stdout.readline()
    while not any(path.stat().st_size > HEADER_BYTES for path in tmp_path.iterdir()):
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("*.features")) == []
    file = FeatureFile(tmp_path, KEY)
    file.write(parts_of(features), tuple(features.shape), features.dtype)
    assert torch.equal(file.read(), features)
