"""numpy arrays as tensors, and tensors as bytes for digests and files, without copies where possible."""

import hashlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def tensor_from_array(array: npt.NDArray[Any]) -> Tensor:
    """Return an array of numbers as a tensor that nobody may write to; `TypeError` or `ValueError` if it is none."""
    if np.ma.is_masked(array):
        raise TypeError("some values are masked; fill them with .filled(value)")
    if array.dtype == object:
        array = np.array(array.tolist())
    if array.dtype == np.longdouble:
        array = array.astype(np.float64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)
    if not array.flags.writeable:  # torch would warn, and to filter warnings is not safe in threads
        address, _ = array.__array_interface__["data"]
        interface = {**array.__array_interface__, "data": (address, False)}
        array = np.asarray(SimpleNamespace(__array_interface__=interface, keeps_the_memory=array))
    return torch.from_numpy(array)


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's elements as bytes, in row-major order."""
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # not reshape(-1), which leaves one element a stride of its own
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def sha256_of(tensors: Mapping[str, Tensor], *, begin: str = "") -> str:
    """Return the SHA-256 of a text and the tensors behind it, such as a state dict, in hexadecimal digits."""
    digest = hashlib.sha256(begin.encode())
    digest_tensors(digest, tensors)
    return digest.hexdigest()


def digest_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Add the names, shapes, dtypes and elements of tensors to one of hashlib's digests."""
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(raw_bytes(tensor))
