"""Weight files on this machine: which are published, and what differs between two state dicts."""

import hashlib
from pathlib import Path

import pytest
import torch

from transferkit.model import weights


@pytest.mark.parametrize(
    ("name", "content", "published"),
    [
        ("net-{}.pth", b"right", True),
        ("net-{}.pth", b"wrong", False),
        ("net.pth", b"right", False),
        ("net-{}.pth", None, False),
    ],
    ids=["right", "wrong", "no hash", "no file"],
)
def test_a_published_file_is_known_by_name_and_content(
    tmp_path: Path, name: str, content: bytes | None, published: bool
) -> None:
    """A file counts as published if its name holds a hash and its content has that hash."""
    path = tmp_path / name.format(hashlib.sha256(b"right").hexdigest()[:8])
    if content is not None:
        path.write_bytes(content)

    assert weights.is_published(path) is published


def test_differences_are_counted_past_five() -> None:
    """Of seven missing names five are listed and two counted."""
    own = {f"k{number}": torch.zeros(1) for number in range(7)}

    assert weights.differences(own, {}) == "missing k0, k1, k2, k3, k4 and 2 more"


@pytest.mark.parametrize(
    ("state", "same_width", "found"),
    [
        (torch.ones(2).bfloat16(), False, ""),
        (torch.ones(2).bfloat16(), True, "other dtypes: a torch.bfloat16 instead of torch.float32"),
        (torch.ones(2).long(), False, "other dtypes: a torch.int64 instead of torch.float32"),
        (torch.ones(1, 2), False, "other shapes: a (1, 2) instead of (2,)"),
    ],
    ids=["another width", "the same width", "whole numbers", "shape"],
)
def test_values_are_no_difference_and_shapes_are(state: torch.Tensor, same_width: bool, found: str) -> None:
    """Values differ freely, shapes and kinds of numbers do not, and another width counts where it is asked for."""
    assert weights.differences({"a": torch.zeros(2)}, {"a": state}, same_width=same_width) == found
