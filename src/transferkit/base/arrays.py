"""numpy arrays as tensors, and tensors as bytes for digests and files, without copies where possible."""

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Digest(Protocol):
    """What `hashlib.sha256()` returns."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Add bytes."""


def tensor_from_array(array: npt.NDArray[Any]) -> Tensor:
    """Return a tensor that shares an array's memory. The library never writes to it.

    Raises:
        TypeError: The array holds something other than numbers.

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
    r"""Return a tensor's elements as bytes, in row-major order.

    Example:
        >>> bytes(raw_bytes(torch.tensor([1, 2], dtype=torch.uint8)))
        b'\x01\x02'
    """
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # not reshape(-1), which leaves one element a stride of its own
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def digest_tensors(digest: Digest, tensors: Mapping[str, Tensor]) -> None:
    """Add the names, shapes, dtypes and elements of tensors, such as a state dict, to a digest."""
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(raw_bytes(tensor))
