"""Find, verify and read a weight file. Nothing here knows which network the weights are for."""

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from transferkit.base.files import atomic_write, kind_of, open_file
from transferkit.base.torch_files import is_ordinary, read_torch_file
from transferkit.errors import WeightsDownloadError, WeightsError, printable

TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 20

# A file name pins only the first eight digits. Where all digits are known they are compared.
_FULL_SHA256 = {"vgg16-397923af.pth": "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"}


def download(url: str, folder: Path | None = None) -> Path:
    """Return the local copy of a weight file, after downloading it if the folder does not have it.

    The file is verified at every use and appears in the folder whole or not at all. Its name, the last part of the URL,
    holds the start of its SHA-256. The folder is torch.hub's own by default, which torchvision uses too. What cannot be
    fetched or stored is a `WeightsDownloadError`, another content or a name without SHA-256 a `WeightsError`.
    """
    folder = folder or Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rsplit("/", 1)[-1]
    expected = _expected_sha256(path.name)
    if expected is None:
        raise WeightsError(f"{url} has no SHA-256 in its name: expected a name such as vgg16-397923af.pth.")
    if not path.exists():
        _fetch(url, path, expected)
    got = _read_sha256(path)
    if not got.startswith(expected):
        raise WeightsError(
            f"{path} is not the file published at {url}: got SHA-256 {got}, expected {expected}. It has not been "
            "opened. Delete it and run again."
        )
    return path


def is_published(path: Path) -> bool:
    """Return whether the name of a file holds a SHA-256 and its content has it."""
    expected = _expected_sha256(path.name)
    return expected is not None and kind_of(path) == "a file" and _read_sha256(path).startswith(expected)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a file of tensors by name, as `torch.save(model.state_dict(), path)` writes it; else `WeightsError`.

    Every checksum is verified first; of a file from before torch 1.6, which has none, a warning says so, unless its
    name holds its SHA-256. Tensors are mapped, not copied: the 500 MB of an unused classifier take no memory.
    """
    path = Path(path)
    check_is_file(path)
    try:
        content = read_torch_file(path, mmap=True, legacy=lambda: _warn_of_old_format(path))
    except ValueError as error:
        raise WeightsError(
            f"cannot read weights from {path} ({path.stat().st_size} bytes): {error}. Expected a file written by "
            "torch.save(model.state_dict(), path). If it is a damaged download, delete it and download it again."
        ) from error
    except (OSError, MemoryError) as error:
        raise WeightsError(f"cannot read weights from {path}: {error}. The file may be good.") from error
    return checked_state_dict(content, origin=str(path))


def _warn_of_old_format(path: Path) -> None:
    if not is_published(path):
        warnings.warn(
            f"{printable(str(path))} has the format of torch before 1.6, which has no checksums: damage would not be "
            "noticed. Save it again: torch.save(torch.load(path, weights_only=True), path).",
            stacklevel=5,
        )


def check_is_file(path: Path) -> None:
    """Raise `WeightsError` if a path is a folder, or nothing is there."""
    if (found := kind_of(path)) != "a file":
        raise WeightsError(
            f"no weight file at {path}: got {found}, expected a file written by "
            "torch.save(model.state_dict(), path), or a name such as weights='IMAGENET1K_V1'."
        )


def checked_state_dict(content: object, origin: str) -> dict[str, Tensor]:
    """Return `content` as a dict of tensors by name, or raise `WeightsError`, which names `origin`."""
    if isinstance(content, nn.Module):
        raise WeightsError(f"weights from {origin} are a whole module: pass its state_dict() instead.")
    if not isinstance(content, Mapping):
        raise WeightsError(f"weights from {origin} are a {type(content).__name__}: expected a state dict.")
    if wrong := [key for key, value in content.items() if not isinstance(value, Tensor)]:
        raise WeightsError(
            f"weights from {origin} hold {type(content[wrong[0]]).__name__} under {wrong[0]!r}: expected tensors only. "
            f"If the state dict lies deeper, pass that part (keys here: {', '.join(map(str, list(content)[:5]))})."
        )
    if strange := [key for key, value in content.items() if not is_ordinary(value)]:
        raise WeightsError(
            f"weights from {origin} hold something other than an ordinary dense tensor under {strange[0]!r}: expected "
            "what model.state_dict() gives."
        )
    return dict(content)


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Copy `state` into `module`, in its floating-point dtype, if every name and shape fits; else `WeightsError`."""
    own = module.state_dict()
    # missing in files from before torch 0.4.1
    counts = {key: torch.zeros_like(own[key]) for key in own if key.endswith(".num_batches_tracked")}
    state = {**counts, **state}
    if faults := differences(own, state):
        first = next(iter(own))
        prefixes = [key[: -len(first)] for key in state if key.endswith(f".{first}")]
        cause = f"The names there begin with {prefixes[0]!r}: remove that from each." if prefixes else ""
        raise WeightsError(
            f"weights from {origin} do not fit: {faults}. Expected exactly the {len(own)} tensors "
            f"{first} ... {list(own)[-1]}. {cause or 'Is it the file of another network?'}"
        )
    module.load_state_dict(dict(state))


def differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor], *, same_width: bool = False) -> str:
    """Say in which names, shapes and dtypes `state` differs from `own`; floating-point ones only with `same_width`."""
    found: dict[str, list[str]] = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "other shapes:": [],
        "other dtypes:": [],
    }
    for key, live, value in ((key, own[key], state[key]) for key in own if key in state):
        both_float = live.is_floating_point() and value.is_floating_point()
        if live.shape != value.shape:
            found["other shapes:"].append(f"{key} {tuple(value.shape)} instead of {tuple(live.shape)}")
        if live.dtype != value.dtype and (same_width or not both_float):
            found["other dtypes:"].append(f"{key} {value.dtype} instead of {live.dtype}")
    return "; ".join(
        f"{what} {', '.join(items[:5])}" + (f" and {len(items) - 5} more" if len(items) > 5 else "")
        for what, items in found.items()
        if items
    )


def _expected_sha256(name: str) -> str | None:
    in_name = re.search(r"-([0-9a-f]{8,})\.", name)
    return _FULL_SHA256.get(name) or (in_name.group(1) if in_name else None)


def _read_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}. The file may be good: correct its permissions.") from error
    return digest.hexdigest()


def _fetch(url: str, path: Path, expected: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_write(path) as file,
            urllib.request.urlopen(url, timeout=TIMEOUT_S) as response,  # noqa: S310 - torchvision's own URLs
        ):
            _copy_verified(response, file, url, expected)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise WeightsDownloadError(
            f"could not download {url} to {path}: {error}. Nothing was kept. Without a network, put the file there, or "
            "pass its path as weights=."
        ) from error


def _copy_verified(response: http.client.HTTPResponse, file: BinaryIO, url: str, expected: str) -> None:
    digest, received = hashlib.sha256(), 0
    while chunk := response.read(_CHUNK_BYTES):
        digest.update(chunk)
        received += file.write(chunk)
    announced = response.headers.get("Content-Length")
    if announced is not None and not announced.isdigit():
        raise ConnectionError(f"the server announced a Content-Length of {announced!r}")
    if announced is not None and received < int(announced):
        raise ConnectionError(f"the connection ended after {received} of {announced} bytes")
    if not digest.hexdigest().startswith(expected):
        raise WeightsError(
            f"the download from {url} ({received} bytes) does not have the SHA-256 in its name. Nothing was kept. A "
            "login page may have answered: try another network, or pass a path as weights=."
        )
