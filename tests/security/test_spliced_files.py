"""Files in which one reader would see another archive than the other: what is verified must be what is read."""

import io
import re
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
import transferkit as tk
from transferkit.base import torch_files
from transferkit.base.torch_files import read_torch_file
from transferkit.errors import CheckpointError, TransferKitError, WeightsError
from transferkit.saving.archive import FORMAT


@pytest.fixture(scope="module")
def good() -> bytes:
    """A good file of two tensors."""
    return archive_of({"a": torch.arange(100), "b": torch.zeros(3)})


def archive_of(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def parts_of(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def packed(parts: list[tuple[str, bytes]], comment: bytes = b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, part in parts:
            archive.writestr(name, part)
        archive.comment = comment
    return file.getvalue()


def flipped(content: bytes) -> bytes:
    place = content.find(torch.arange(100).numpy().tobytes()) + 8
    return content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


def shifted(content: bytes) -> bytes:
    """Bytes before the archive, and every offset in its table right for that."""
    front = b"x" * 64
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        start, count = archive.start_dir, len(archive.infolist())
    table, end = bytearray(content[start:-98]), content[-98:]
    place = 0
    for _ in range(count):
        names, extra, comment = struct.unpack_from("<3H", table, place + 28)
        (offset,) = struct.unpack_from("<L", table, place + 42)
        struct.pack_into("<L", table, place + 42, offset + len(front))
        place += 46 + names + extra + comment
    size = len(table)
    wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start + len(front))
    where = struct.pack("<4sLQL", b"PK\x06\x07", 0, start + len(front) + size, 1)
    narrow = end[-22:-6] + struct.pack("<LH", start + len(front), 0)
    return front + content[:start] + bytes(table) + wide + where + narrow


def renamed(old: str, new: str) -> Callable[[bytes], bytes]:
    return lambda content: packed([(name.replace(old, new), part) for name, part in parts_of(content)])


def doubled(new: str) -> Callable[[bytes], bytes]:
    """Two parts whose names differ in case only, or not at all: the second one would be read, or the first."""

    def double(content: bytes) -> bytes:
        parts = parts_of(content)
        pickled = next(part for name, part in parts if name.endswith("data.pkl"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)  # zipfile's, of the name
            return packed([*parts, (new, pickled)])

    return double


SPLICES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a damaged archive before a good one": (lambda good: flipped(good) + good, "bytes before its archive"),
    "a damaged archive behind a good one": (lambda good: good + flipped(good), "bytes before its archive"),
    "the same archive twice": (lambda good: good + good, "bytes before its archive"),
    "another program before it": (lambda good: b"#!/bin/sh\n" + good, "torch.save did not write it"),
    "zeros before it": (lambda good: bytes(64) + good, "torch.save did not write it"),
    "bytes behind it": (lambda good: good + b"x", "bytes behind its archive"),
    "zeros behind it": (lambda good: good + bytes(22), "bytes behind its archive"),
    "a comment": (lambda good: packed(parts_of(good), comment=b"x" * 30), "bytes behind its archive"),
    "its front moved": (shifted, "torch.save did not write it"),
    "its front moved behind a signature": (
        lambda good: b"PK\x03\x04" + shifted(good)[4:],
        "its first part is not at its first byte",
    ),
    "two parts of one name": (doubled("archive/data.pkl"), "two parts with the same name"),
    "two parts but for case": (doubled("archive/data.PKL"), "the part 'archive/data.PKL'"),
    "a folder but for case": (doubled("Archive/data.pkl"), "its parts are in several folders"),
    "the pickle in capitals": (renamed("data.pkl", "DATA.PKL"), "the part 'archive/DATA.PKL'"),
    "a part beside the folder": (renamed("archive/byteorder", "byteorder"), "the part 'byteorder'"),
    "a part above the folder": (renamed("archive/byteorder", "../byteorder"), "its parts are in several folders"),
    "a part with a NUL": (lambda good: good.replace(b"byteorder", b"byteorde\0"), "which torch.save does not write"),
    "code of TorchScript": (renamed("byteorder", "constants.pkl"), "the part 'archive/constants.pkl'"),
}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("splice", SPLICES)
def test_a_file_that_two_readers_could_read_differently_is_refused(
    tmp_path: Path, good: bytes, splice: str, *, mmap: bool
) -> None:
    """Bytes around the archive, and parts of other or repeated names, are refused before anything is read."""
    make, message = SPLICES[splice]
    path = tmp_path / "spliced.pt"
    path.write_bytes(make(good))

    with pytest.raises(ValueError, match=re.escape(message)):
        read_torch_file(path, mmap=mmap)


def test_a_good_file_is_read_however_it_is_named(tmp_path: Path) -> None:
    """The folder in the archive has the name of the file: spaces, capitals and other alphabets do no harm."""
    for name in ("a b.pt", "MODEL.PKL", "模型.pth", "data.pkl"):
        torch.save({"a": torch.arange(3)}, tmp_path / name)
        assert torch.equal(read_torch_file(tmp_path / name)["a"], torch.arange(3))


def test_a_checkpoint_behind_a_damaged_one_is_refused(tmp_path: Path) -> None:
    """A trainer keeps its weights where the first of two archives in a file has a flipped bit."""
    trainer = tiny.make_trainer(tiny.make_model(tiny.make_backbone(), hidden=(64,)))
    trainer.save(tmp_path / "run.pt")
    content = (tmp_path / "run.pt").read_bytes()
    place = content.find(trainer.model.head.fc1.weight.detach().numpy().tobytes()) + 3
    damaged = content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]
    (tmp_path / "run.pt").write_bytes(damaged + content)
    before = tiny.weights_of(trainer.model)

    with pytest.raises(CheckpointError, match="bytes before its archive, or more than one"):
        trainer.load(tmp_path / "run.pt")
    assert tiny.changed(before, trainer.model) == set()


# ---- pickles that allocate


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def called(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


COUNT = 75 * 10**6

FORGED = {
    "a bytearray": called("builtins", "bytearray", number(4 * COUNT)),
    "a tensor of any size": called("torch", "Tensor", number(COUNT)),
    "a storage of any size": called("torch", "FloatStorage", number(COUNT)),
    "an untyped storage": called("torch.storage", "UntypedStorage", number(4 * COUNT)),
    "a parameter": called("torch.nn.parameter", "Parameter", called("torch", "Tensor", number(COUNT))),
    "a size": called("torch", "Size", b"(" + number(3) + b"t"),
    "a name put together": text("torch") + text("Tensor") + b"\x93(" + number(COUNT) + b"tR",
}


@pytest.mark.parametrize("name", ["data.pkl", "data.PKL"])
@pytest.mark.parametrize("forged", FORGED)
def test_a_pickle_that_would_allocate_memory_is_refused(tmp_path: Path, forged: str, name: str) -> None:
    """Only tensors whose numbers are in the file are accepted: a few bytes cannot fill the memory."""
    pickled = b"\x80\x02}(" + text("format") + number(FORMAT) + text("w") + FORGED[forged] + b"u."
    path = tmp_path / "forged.pt"
    path.write_bytes(packed([(f"a/{name}", pickled), ("a/byteorder", b"little"), ("a/version", b"3\n")]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(CheckpointError):
        tk.load_model(path)
    with pytest.raises(WeightsError):
        tk.load_backbone("vgg11", weights=path, preprocessing="KERAS", image_size=32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


@pytest.mark.parametrize("forged", FORGED)
def test_the_format_before_torch_1_6_has_the_same_limits(tmp_path: Path, forged: str) -> None:
    """A file without checksums is read within the limits of others: what its pickles name, and how large they are."""
    file = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    content = file.getvalue()
    start = content.index(b"\x80\x02}q\x00X\x01\x00\x00\x00w")
    (tmp_path / "old.pt").write_bytes(content[:start] + b"\x80\x02}(" + text("w") + FORGED[forged] + b"u.")

    with pytest.raises(ValueError, match=r"it holds |larger than the file"):
        read_torch_file(tmp_path / "old.pt", legacy=lambda: None)


def test_tensors_larger_than_an_old_file_are_refused(tmp_path: Path) -> None:
    """In the format before torch 1.6, too, a tensor's numbers must be in the file."""
    file = io.BytesIO()
    torch.save({"w": torch.zeros(70_000)}, file, _use_new_zipfile_serialization=False)
    content = file.getvalue().replace(struct.pack("<I", 70_000), struct.pack("<I", 2**31 - 1))
    (tmp_path / "old.pt").write_bytes(content)

    with pytest.raises(ValueError, match="its tensors are larger than the file"):
        read_torch_file(tmp_path / "old.pt", legacy=lambda: None)


def test_an_old_pickle_has_the_same_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long pickle in a file without checksums is given up at the limit."""
    monkeypatch.setattr(torch_files, "MAX_PICKLE_BYTES", 1000)
    torch.save({str(key): key for key in range(200)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)

    with pytest.raises(ValueError, match="over 1,000 bytes of it are not tensors"):
        read_torch_file(tmp_path / "old.pt", legacy=lambda: None)


# ---- files of other programs


class Net(torch.nn.Module):
    """A model of the user's own."""


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a module of torch's": (
        lambda path: torch.save(torch.nn.Linear(2, 2), path),
        r"it holds torch\.nn\.modules\.linear\.Linear.*Of a model, save the state_dict\(\)",
    ),
    "a module of the user's": (lambda path: torch.save(Net(), path), r"Of a model, save the state_dict\(\)"),
    "a module in the old format": (
        lambda path: torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=False),
        r"Of a model, save the state_dict\(\)",
    ),
    "Keras's HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(2000)), "HDF5 file, as Keras writes"),
    "Keras's archive": (
        lambda path: path.write_bytes(packed([("metadata.json", b"{}"), ("model.weights.h5", b"")])),
        r"the part 'metadata\.json'.*an archive of another program, such as a \.keras",
    ),
    "safetensors": (
        lambda path: path.write_bytes(struct.pack("<Q", 40) + b'{"a":{"dtype":"F32"' + bytes(100)),
        r"safetensors.*load_file\(path\)",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, other: str) -> None:
    """Weights of another program, or a whole model, are refused with what they are, in one line without escapes."""
    write, message = OTHERS[other]
    write(tmp_path / "weights.pth")

    with pytest.raises(WeightsError, match=message) as error:
        tk.load_backbone("vgg11", weights=tmp_path / "weights.pth", preprocessing="KERAS", image_size=32)
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(TransferKitError):
        tk.load_model(tmp_path / "weights.pth")
