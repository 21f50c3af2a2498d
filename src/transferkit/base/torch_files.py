"""Files that `torch.save` wrote: know a damaged or malicious one before anything of it is read."""

import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

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
