"""A file of features is read whole and right, or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from transferkit.errors import CacheError
from transferkit.features.file import open_features, write_features

HEADER_BYTES = 4096
LAYERS = hashlib.sha256(b"layers").hexdigest()
IMAGES = [hashlib.sha256(bytes([number])).digest()[:16] for number in range(18)]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def features():
    return torch.rand(18, 3, 3, 5).bfloat16()


@pytest.fixture
def file(tmp_path, features):
    """A file that was written."""
    return write_features(tmp_path, LAYERS, IMAGES, features)


def reopen(path, layers=LAYERS, shape=(3, 3, 5), dtype=torch.bfloat16):
    return open_features(path, layers=layers, shape=shape, dtype=dtype)


def assert_refused(path, **expected):
    """Opening or reading fails with the path and the remedy."""
    with pytest.raises(CacheError) as caught:
        reopen(path, **expected).read()
    assert str(path) in str(caught.value)
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
def public_folder():
    """A folder that any user can reach."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


# ---- writing and reading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_is_written_is_read(tmp_path, features, dtype):
    """Features come back bit for bit, in shape and dtype, with the digests of their images."""
    written = write_features(tmp_path, LAYERS, IMAGES, features.to(dtype))
    opened = reopen(written.path, dtype=dtype)
    assert opened == written
    assert opened.images == tuple(IMAGES)
    assert opened.read().dtype == dtype
    assert torch.equal(opened.read(), features.to(dtype))


def test_another_memory_layout_is_written_in_row_major_order(tmp_path, features):
    """What counts is the order of the indices, not that in memory."""
    strided = features.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not strided.is_contiguous()
    assert torch.equal(write_features(tmp_path, LAYERS, IMAGES, strided).read(), features)


def test_not_a_number_and_signed_zero_come_back(tmp_path):
    """Every bit pattern comes back, those that are no numbers included."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    file = write_features(tmp_path, LAYERS, IMAGES[:1], bits.view(torch.bfloat16)[None])
    assert torch.equal(file.read().view(torch.int16)[0], bits)


def test_writing_to_the_tensor_changes_no_file(file, features):
    """A mapping is private: neither the file nor another mapping sees what is written to it."""
    one, other = file.read(), file.read()
    one.fill_(7)
    assert torch.equal(other, features)
    assert torch.equal(file.read(), features)


def test_a_mapping_holds_no_descriptor(file):
    """However many files are mapped, no limit of open files is reached."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc here")
    before = len(list(descriptors.iterdir()))
    mapped = [file.read() for _ in range(20)]
    assert len(list(descriptors.iterdir())) == before
    assert all(torch.equal(one, mapped[0]) for one in mapped)


def test_the_name_says_layers_and_images(file, tmp_path, features):
    """Two files of the same layers and images have the same name, others have another."""
    assert file.path.parent == tmp_path
    assert file.path.name.startswith(f"{LAYERS[:32]}-")
    assert write_features(tmp_path, LAYERS, IMAGES, features).path == file.path
    other = hashlib.sha256(b"other").hexdigest()
    assert write_features(tmp_path, LAYERS, IMAGES[::-1], features).path != file.path
    assert write_features(tmp_path, other, IMAGES, features).path != file.path
    assert len(list(tmp_path.iterdir())) == 3


def test_the_first_page_says_what_the_file_holds(file, features):
    """Anybody can read what the file holds; bare numbers and the images' digests lie behind the first page."""
    content = file.path.read_bytes()
    digest, text = content[:HEADER_BYTES].rstrip().split(b"\n")
    assert digest.decode() == hashlib.sha256(text).hexdigest()
    numbers = features.view(torch.uint8).numpy().tobytes()
    digests = b"".join(IMAGES)
    assert json.loads(text) == {
        "format": 2,
        "layers": LAYERS,
        "images": hashlib.sha256(digests).hexdigest(),
        "shape": [18, 3, 3, 5],
        "dtype": "bfloat16",
        "sha256": hashlib.sha256(numbers).hexdigest(),
    }
    assert content[HEADER_BYTES:] == numbers + digests


def test_a_second_writing_takes_the_place_of_the_first(file, tmp_path, features):
    """A file that exists is replaced, and who has mapped the old one keeps it."""
    old = file.read()
    assert write_features(tmp_path, LAYERS, IMAGES, -features).path == file.path
    assert torch.equal(reopen(file.path).read(), -features)
    assert torch.equal(old, features)


# ---- files that are refused


@pytest.mark.parametrize(
    "expected",
    [
        {"layers": LAYERS[:32] + "0" * 32},
        {"shape": (3, 3, 6)},
        {"shape": (3, 15)},
        {"shape": (5, 3, 3)},
        {"shape": ()},
        {"dtype": torch.float16},
        {"dtype": torch.float32, "shape": (3, 3, 3)},
    ],
    ids=str,
)
def test_other_features_are_refused(file, expected):
    """Features of other layers, another shape or another dtype are refused, whatever the file's name and size."""
    assert_refused(file.path, **expected)
    with pytest.raises(CacheError, match="expected"):
        reopen(file.path, **expected)


@pytest.mark.parametrize("change", [{"format": 1}, {"format": 3}], ids=str)
def test_another_format_is_refused(file, change):
    """A file in an earlier or later format, undamaged, is refused."""
    content = file.path.read_bytes()
    text = json.dumps({**json.loads(content[65:HEADER_BYTES]), **change}).encode()
    header = b"\n".join((hashlib.sha256(text).hexdigest().encode(), text)).ljust(HEADER_BYTES)
    file.path.write_bytes(header + content[HEADER_BYTES:])
    assert_refused(file.path)


@pytest.mark.parametrize("size", [0, 1, 64, 65, 66, 300, 4095, 4096, 4097, -289, -17, -2, -1])
def test_a_file_cut_short_is_refused(file, size):
    """A file that ends too early, anywhere, is refused, also when it was opened before."""
    content = file.path.read_bytes()
    file.path.write_bytes(content[:size])
    assert_refused(file.path)
    if len(content[:size]) < len(content) - 16 * len(IMAGES):
        with pytest.raises(CacheError, match="elete it"):
            file.read()


def test_a_file_too_long_is_refused(file):
    """One byte too many is refused."""
    with file.path.open("ab") as opened:
        opened.write(b"\0")
    assert_refused(file.path)


@pytest.mark.parametrize(
    "content",
    [b"\0" * 9000, b"[" * 9000, b'{"format": 2}', b"\xff" * 9000],
    ids=["zeros", "brackets", "a little JSON", "ones"],
)
def test_a_file_of_another_kind_is_refused(file, content):
    """Whatever else lies under the name is refused."""
    file.path.write_bytes(content)
    assert_refused(file.path)


def test_nothing_or_a_directory_in_its_place_is_refused(file):
    """A missing file, a directory and a pipe under its name are refused; nobody waits for the pipe's other end."""
    file.path.unlink()
    with pytest.raises(CacheError, match=r"cannot be read: .*No such file"):
        reopen(file.path)
    for make, found in ((file.path.mkdir, "a folder"), (lambda: os.mkfifo(file.path), "a pipe or device")):
        make()
        with pytest.raises(CacheError, match=f"cannot be read: it is {found}"):
            reopen(file.path)
        if file.path.is_dir():
            file.path.rmdir()


def test_a_file_that_cannot_be_mapped_is_not_called_damaged(file, monkeypatch):
    """Where memory or handles run out nothing is to be deleted."""

    def failing(*_, **__):
        raise RuntimeError("unable to mmap: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "from_file", failing)
    with pytest.raises(CacheError, match="cannot be mapped: unable to mmap: Cannot allocate memory") as caught:
        file.read()
    assert "elete" not in str(caught.value)


def test_every_bit_counts(file):
    """A flipped bit is noticed in any byte of the first page's text, in its padding, the features and the digests."""
    content = bytearray(file.path.read_bytes())
    text = len(bytes(content[:HEADER_BYTES]).rstrip())
    assert text > 200
    padding = [*range(text, HEADER_BYTES, 97), HEADER_BYTES - 1]
    behind = [HEADER_BYTES, *range(HEADER_BYTES, len(content), 11), *range(len(content) - 32, len(content))]
    for place in [*range(text), *padding, *behind]:
        for bit in range(8) if place in (0, 64, 65, text) else (place % 8,):
            content[place] ^= 1 << bit
            file.path.write_bytes(content)
            with pytest.raises(CacheError):
                reopen(file.path).read()
            content[place] ^= 1 << bit
    file.path.write_bytes(content)
    reopen(file.path).read()


# ---- writing that fails


@pytest.mark.parametrize("short", [0, 1])
def test_the_disk_is_asked_before_the_first_byte(tmp_path, features, monkeypatch, short):
    """Without room for every byte, page and digests included, nothing is written."""
    needed = HEADER_BYTES + features.numel() * 2 + 16 * len(IMAGES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, needed - short))
    if not short:
        write_features(tmp_path, LAYERS, IMAGES, features)
        return
    with pytest.raises(CacheError, match="Make room there, or name another folder with cache=") as caught:
        write_features(tmp_path, LAYERS, IMAGES, features)
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_refused(tmp_path, features):
    """A folder that was deleted meanwhile is an error with its path and the remedy."""
    with pytest.raises(CacheError, match="cache=") as caught:
        write_features(tmp_path / "gone", LAYERS, IMAGES, features)
    assert str(tmp_path / "gone") in str(caught.value)


def test_a_folder_that_cannot_be_written_is_refused(public_folder, features):
    """A read-only folder is an error with its path and the remedy."""
    public_folder.chmod(0o555)
    with ordinary_user(), pytest.raises(CacheError, match="cache=") as caught:
        write_features(public_folder, LAYERS, IMAGES, features)
    assert str(public_folder) in str(caught.value)
    assert list(public_folder.iterdir()) == []


def test_a_file_in_a_read_only_folder_is_read(public_folder, features):
    """What lies in a read-only folder, for all to use, can be read."""
    file = write_features(public_folder, LAYERS, IMAGES, features)
    file.path.chmod(0o444)
    public_folder.chmod(0o555)
    with ordinary_user():
        assert torch.equal(reopen(file.path).read(), features)


def test_a_directory_in_its_place_cannot_be_replaced(file, tmp_path, features):
    """A directory under the name is an error at writing too, and nothing else is left."""
    file.path.unlink()
    file.path.mkdir()
    with pytest.raises(CacheError, match="cannot be written") as caught:
        write_features(tmp_path, LAYERS, IMAGES, features)
    assert str(file.path) in str(caught.value)
    assert list(tmp_path.iterdir()) == [file.path]
