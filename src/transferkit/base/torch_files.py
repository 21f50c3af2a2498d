"""Read files that `torch.save` wrote, after looking for damage and malice."""

import errno
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

MAX_MEMBERS = 20_000
"""Parts of an archive. VGG19 with batch norm and Adam has some 500."""


MAX_PICKLE_BYTES = 4 * 2**20
"""Size of the part that describes the tensors. VGG16 with Adam has 20 kB."""


FOLDER = 0x10
"""External attribute of a folder. torch reads no bytes of such a part: its tensor is whatever lay in memory."""


def read_torch_file(path: Path, *, mmap: bool = False, legacy: bool = False) -> object:
    """Read a file that `torch.save` wrote, with its tensors on the CPU. No code in the file runs.

    Args:
        path: Of the file.
        mmap: Map the tensors into memory instead of copying them. The caller must not keep them: they change with
            the file.
        legacy: Also read the format of torch before 1.6, which has no checksums and cannot be mapped.

    Raises:
        ValueError: The file is damaged, malicious, or not a file that `torch.save` writes. The message is one line.
        OSError: The file is missing or cannot be read.
        MemoryError: There is not enough memory for its tensors.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "numbers.pt"
        >>> torch.save({"a": torch.arange(3)}, path)
        >>> read_torch_file(path)
        {'a': tensor([0, 1, 2])}
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    with _one_line_errors():
        if zipped or not legacy:
            check_archive(path)  # 0.3 s for 528 MB
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn whatever zipfile and torch raise into one of the errors of `read_torch_file`."""
    try:
        yield
    except MemoryError as error:
        raise MemoryError("there is not enough memory for its tensors") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # damage makes zipfile seek to nowhere: EINVAL
            raise
        if isinstance(error, RuntimeError) and "allocate memory" in str(error):  # torch has no class for it on the CPU
            raise MemoryError("there is not enough memory for its tensors") from error
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    text = str(error)
    if found := re.search(r"GLOBAL (\S{1,100})", text):
        return f"it holds {found[1]}, expected tensors and plain types only"
    if isinstance(error, pickle.UnpicklingError):  # whose text advises weights_only=False
        return "torch.save did not write it, or it is damaged"
    return text.splitlines()[0][:200] if text else type(error).__name__


@_one_line_errors()
def check_archive(path: Path) -> None:
    """Verify the checksum of every part of an archive that `torch.save` wrote, once its size is known to be harmless.

    torch itself verifies no checksum and inflates compressed parts. `weights_only=True` keeps code from running, but
    does not keep a few bytes from filling the memory.

    Raises:
        ValueError: The file is no archive, a checksum is wrong, or it has what `torch.save` does not write: compressed
            parts, too many parts, or parts larger than the file.
        OSError: The file is missing or cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise ValueError(f"it has {len(members):,} parts, expected at most {MAX_MEMBERS:,}")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it has compressed parts, which torch.save does not write")
        if any(member.is_dir() or member.external_attr & FOLDER for member in members):
            raise ValueError("it has a folder among its parts, which torch.save does not write")
        declared, size = sum(member.file_size for member in members), path.stat().st_size
        if declared > size:
            raise ValueError(f"its parts declare {declared:,} bytes, but the file has {size:,}")
        pickles = [member for member in members if member.filename.endswith(".pkl")]
        pickled = sum(member.file_size for member in pickles)
        if pickled > MAX_PICKLE_BYTES:
            raise ValueError(f"{pickled:,} bytes of it are not tensors, expected at most {MAX_PICKLE_BYTES:,}")
        if damaged := archive.testzip():
            raise ValueError(f"it is damaged in its part {damaged!r}")
        if any(b"bytearray" in archive.read(member) for member in pickles):  # a few bytes make one of any size
            raise ValueError("it holds a bytearray, expected tensors and plain types only")


def is_ordinary(tensor: Tensor) -> bool:
    """Return whether a tensor is dense and has memory for all its elements.

    Example:
        >>> is_ordinary(torch.zeros(3)), is_ordinary(torch.zeros(1).expand(10**12))
        (True, False)
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        return False
    return not tensor.is_quantized and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
