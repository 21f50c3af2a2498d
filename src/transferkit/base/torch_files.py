"""Read files that `torch.save` wrote, after looking for damage and malice."""

import errno
import math
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from transferkit.base.files import open_file

MAX_MEMBERS = 20_000  # parts of an archive; VGG19 with batch norm and Adam has some 500
MAX_PICKLE_BYTES = 4 * 2**20  # of the part that describes the tensors; VGG16 with Adam has 20 kB
FOLDER = 0x10  # attribute of a folder; torch reads no bytes of such a part: its tensor is whatever lay in memory

_MEMBER = re.compile(
    r"([^/]+)/(data\.pkl|data/[0-9]+|byteorder|version|\.data/serialization_id|\.format_version|\.storage_alignment)"
)
"""What torch.save calls a part, in one folder. torch would find other names, too: without regard to case."""

_KINDS = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexDouble ComplexFloat"
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in _KINDS.split()),
}
"""What a pickle may name: enough for dense tensors whose numbers are in the file, and nothing that allocates memory."""

_OLD_PICKLES, _CONTENT = 5, 3  # before torch 1.6: a magic number, a version, the writer's system, content, storages


def read_torch_file(path: Path, *, mmap: bool = False, legacy: Callable[[], None] | None = None) -> object:
    """Read a file that `torch.save` wrote, with its tensors on the CPU. No code in the file runs.

    With `mmap` the tensors are mapped, not copied: they change with the file, so the caller must not keep them.
    `legacy` is called before a file in the format of torch before 1.6 is read, which has no checksums and cannot be
    mapped; None refuses such a file. A file that is damaged, malicious or of another kind is a `ValueError` of one
    line, one that cannot be opened or read an `OSError`, one that does not fit into memory a `MemoryError`.
    """
    with _one_line_errors(), open_file(path) as file:
        begin = file.read(9)
        file.seek(0)
        if begin.startswith(b"PK\x03\x04"):
            check_archive(file)  # 0.3 s for 528 MB
        else:
            _check_old_format(file, begin)
            if legacy is None:
                raise ValueError("it has the format of torch before 1.6, which has no checksums")
            legacy()
            mmap = False
        return torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn whatever zipfile and torch raise into one of the errors of `read_torch_file`."""
    try:
        yield
    except MemoryError as error:
        raise MemoryError("there is not enough memory for its tensors") from error
    except Exception as error:  # whatever zipfile, pickletools and torch raise over a strange file
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # damage makes zipfile seek to nowhere: EINVAL
            raise
        if isinstance(error, RuntimeError) and "allocate memory" in str(error):  # torch has no class for it on the CPU
            raise MemoryError("there is not enough memory for its tensors") from error
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(reason[0][:200]) from error


@_one_line_errors()
def check_archive(file: BinaryIO) -> None:
    """Verify the checksum of every part of an archive that `torch.save` wrote, once its size is known to be harmless.

    torch verifies none and inflates compressed parts, so a few bytes could fill the memory. Any other archive is a
    `ValueError`.
    """
    size = file.seek(0, 2)
    _check_ends(file, size)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise ValueError(f"it has {len(members):,} parts, expected at most {MAX_MEMBERS:,}")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it has compressed parts, which torch.save does not write")
        if any(member.is_dir() or member.external_attr & FOLDER for member in members):
            raise ValueError("it has a folder among its parts, which torch.save does not write")
        declared = sum(member.file_size for member in members)
        if declared > size:
            raise ValueError(f"its parts declare {declared:,} bytes, but the file has {size:,}")
        names = [member.orig_filename for member in members]
        known = [_MEMBER.fullmatch(name) for name in names]
        if strange := [name for name, found in zip(names, known, strict=True) if not found]:
            other = "it may be an archive of another program, such as a .keras or .npz file"
            raise ValueError(f"it has the part {strange[0]!r}, which torch.save does not write: {other}")
        if len({found[1] for found in known if found}) > 1:
            raise ValueError("its parts are in several folders, which torch.save does not write")
        if len(set(names)) != len(names):
            raise ValueError("it has two parts with the same name")
        pickles = [name for name in names if name.endswith(".pkl")]
        pickled = sum(archive.getinfo(name).file_size for name in pickles)
        if pickled > MAX_PICKLE_BYTES:
            raise ValueError(f"{pickled:,} bytes of it are not tensors, expected at most {MAX_PICKLE_BYTES:,}")
        if damaged := archive.testzip():
            raise ValueError(f"it is damaged in its part {damaged!r}")
        for name in pickles:
            _check_pickle(archive.read(name))
    file.seek(0)


def _check_ends(file: BinaryIO, size: int) -> None:
    """Check that a file is one archive from first byte to last, or `zipfile` and torch may each read another in it."""
    file.seek(max(0, size - 98))
    end = file.read().rjust(98)  # 56 bytes and 20 of zip64, then 22
    signature, _, _, here, total, length, start, comment = struct.unpack("<4s4H2LH", end[-22:])
    if signature != b"PK\x05\x06" or comment or here != total:
        raise ValueError("it is cut short, or has bytes behind its archive")
    tail = 22
    if end[56:60] == b"PK\x06\x07":
        wide, length, start = struct.unpack("<4s36x2Q", end[:56])
        (place,) = struct.unpack("<8xQ4x", end[56:76])
        tail = 98
        start = -1 if wide != b"PK\x06\x06" or place != size - 98 else start
    if start + length + tail != size:
        raise ValueError("it has bytes before its archive, or more than one")
    file.seek(start)
    first = file.read(46)
    if len(first) < 46 or struct.unpack("<4s38xL", first) != (b"PK\x01\x02", 0):
        raise ValueError("its first part is not at its first byte")


def _check_pickle(pickled: bytes | BinaryIO, largest: float = math.inf) -> None:
    """Check that a pickle is small, names only what rebuilds dense tensors, and holds no number above `largest`."""
    for opcode, argument, place in pickletools.genops(pickled):
        if (place or 0) > MAX_PICKLE_BYTES:
            raise ValueError(f"over {MAX_PICKLE_BYTES:,} bytes of it are not tensors")
        if opcode.name == "STACK_GLOBAL" or (opcode.name == "GLOBAL" and argument not in _GLOBALS):
            name = str(argument or "a name put together").replace(" ", ".")[:100]
            raise ValueError(f"it holds {name}, expected tensors and plain types. Of a model, save the state_dict()")
        if isinstance(argument, int) and argument > largest:
            raise ValueError("its tensors are larger than the file")


def _check_old_format(file: BinaryIO, begin: bytes) -> None:
    if begin.startswith(b"\x89HDF"):
        raise ValueError("it is an HDF5 file, as Keras writes: copy its arrays into a state dict")
    if begin.endswith(b"{"):
        raise ValueError("it is a safetensors file: pass the state dict that safetensors.torch.load_file(path) returns")
    if begin[:1] != b"\x80":
        raise ValueError("torch.save did not write it, or it is damaged")
    size = os.fstat(file.fileno()).st_size
    for number in range(_OLD_PICKLES):
        _check_pickle(file, size if number == _CONTENT else math.inf)
    file.seek(0)


def is_ordinary(tensor: Tensor) -> bool:
    """Return whether a tensor is dense and has memory for all its elements."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        return False
    return not tensor.is_quantized and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
