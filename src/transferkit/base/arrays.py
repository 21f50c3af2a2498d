"""numpy arrays as tensors, without copies where that can be."""

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Digest(Protocol):
    """What `hashlib` makes."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take in more bytes."""


def tensor_from_array(array: npt.NDArray[Any]) -> Tensor:
    """Return a tensor over an array's memory; the library only reads it.

    Raises:
        TypeError: The array does not hold numbers.

    Example:
        >>> tensor_from_array(np.array([1, 2])[::-1])
        tensor([2, 1])
    """
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)  # torch has no negative strides
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # a memory map, a PIL image
        return torch.from_numpy(array)


def raw_bytes(tensor: Tensor) -> memoryview:
    r"""Return a tensor's numbers as bytes, in row-major order, for a digest or a file.

    Example:
        >>> bytes(raw_bytes(torch.tensor([1, 2], dtype=torch.uint8)))
        b'\x01\x02'
    """
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def digest_tensors(digest: Digest, tensors: Mapping[str, Tensor]) -> None:
    """Take names, shapes, number types and values of tensors, such as a state dict, into a digest."""
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(raw_bytes(tensor))
