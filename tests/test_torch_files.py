"""Reading files that torch.save wrote."""

from pathlib import Path

import pytest
import torch

from transferkit.base.torch_files import read_torch_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.pt"
    torch.save({"numbers": torch.arange(100_000)}, path)
    return path


def damage(path: Path) -> None:
    """Change a byte in the middle, in place."""
    middle = path.stat().st_size // 2
    changed = path.read_bytes()[middle] ^ 1
    with path.open("r+b") as file:
        file.seek(middle)
        file.write(bytes([changed]))


@pytest.mark.parametrize("mmap", [False, True])
def test_the_format_before_torch_1_6_is_read_only_on_request(path, mmap):
    """The old format has no checksums: it is read where `legacy` says so, never mapped, and is refused otherwise."""
    content = torch.load(path)
    torch.save(content, path, _use_new_zipfile_serialization=False)

    assert torch.equal(read_torch_file(path, mmap=mmap, legacy=lambda: True)["numbers"], content["numbers"])
    with pytest.raises(ValueError, match=r"torch before 1\.6, which has no checksums"):
        read_torch_file(path, mmap=mmap)


@pytest.mark.parametrize("legacy", [False, True])
def test_checksums_are_verified_where_there_are_any(path, legacy):
    """Damage of a file in the new format is noticed, whether or not the old one would do."""
    damage(path)
    with pytest.raises(ValueError, match="it is damaged in its part"):
        read_torch_file(path, legacy=lambda: legacy)


@pytest.mark.parametrize("mmap", [False, True])
def test_tensors_are_mapped_only_on_request(path, mmap):
    """A mapped tensor changes with the file; another is a copy."""
    read, before = read_torch_file(path, mmap=mmap)["numbers"], torch.arange(100_000)
    assert torch.equal(read, before)
    damage(path)
    assert torch.equal(read, before) != mmap
