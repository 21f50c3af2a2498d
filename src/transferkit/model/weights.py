"""Find, verify and read a weight file. Nothing here knows what network the weights are for."""

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from transferkit.base.files import atomic_write
from transferkit.base.torch_files import DAMAGE, check_archive, is_ordinary
from transferkit.errors import WeightsDownloadError, WeightsError

TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 20

# torchvision pins only the first eight digits, in the file name; where the whole sum is known it is checked.
_FULL_SHA256 = {
    "vgg16-397923af.pth": "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
}


def download(url: str, folder: Path | None = None) -> Path:
    """Return the local copy of a weight file, downloading it first if it is not there.

    The file is verified whether it was just downloaded or lay in the folder already, and it appears in the
    folder whole or not at all.

    Args:
        url: Its last part names the file and holds the start of the SHA-256, as in `vgg16-397923af.pth`.
        folder: Where the copy is kept; None is torch.hub's own folder, shared with torchvision.

    Raises:
        WeightsDownloadError: No network, no such file, a stalled or broken connection, a full or read-only disk.
        WeightsError: The content is not what the name promises.
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
            f"{path} is not the file published at {url}: got SHA-256 {got}, expected {expected}. It is damaged or was "
            "replaced; it has not been opened. Delete it and run again."
        )
    return path


def is_published(path: Path) -> bool:
    """Return whether a file has the name of a published weight file and the content that name promises.

    Raises:
        WeightsError: It is there and cannot be read.
    """
    expected = _expected_sha256(path.name)
    return expected is not None and path.is_file() and _read_sha256(path).startswith(expected)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a file of tensors by name, as `torch.save(model.state_dict(), path)` writes it.

    Every part's checksum is verified first, no code in the file is run (`weights_only=True`), nothing is fetched, and
    tensors are mapped, not copied: the 500 MB of an unused classifier take no memory.

    Raises:
        WeightsError: No such file, not such a file, or more in it than tensors by name.
    """
    path = Path(path)
    check_is_file(path)
    try:
        if zipped := _is_zip(path):
            check_archive(path)  # 0.3 s for 528 MB
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (MemoryError, *DAMAGE) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"cannot read weights from {path} ({path.stat().st_size} bytes): {reason}. Expected a file written by "
            "torch.save(model.state_dict(), path), holding tensors only. If it was downloaded, delete it and "
            "download it again."
        ) from error
    return checked_state_dict(content, origin=str(path))


def check_is_file(path: Path) -> None:
    """Refuse a path where there is no file.

    Raises:
        WeightsError: So it is.
    """
    if not path.is_file():
        raise WeightsError(
            f"no weight file at {path}: got {'a folder' if path.is_dir() else 'nothing'}, expected a file written by "
            "torch.save(model.state_dict(), path). Weights by name are e.g. weights='IMAGENET1K_V1'."
        )


def checked_state_dict(content: object, origin: str) -> dict[str, Tensor]:
    """Return `content` if it maps names to tensors.

    Raises:
        WeightsError: It is something else; `origin` says where it came from.
    """
    if isinstance(content, nn.Module):
        raise WeightsError(f"weights from {origin} are a whole module: pass its state_dict() instead.")
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"weights from {origin} are a {type(content).__name__}: expected a mapping of names to tensors (a state "
            "dict)."
        )
    wrong = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if wrong:
        raise WeightsError(
            f"weights from {origin} hold {type(content[wrong[0]]).__name__} under {wrong[0]!r}: expected tensors only. "
            "If the state dict lies deeper in the file, pass that part (keys here: "
            f"{', '.join(map(str, list(content)[:5]))})."
        )
    if strange := [key for key, value in content.items() if not is_ordinary(value)]:
        raise WeightsError(
            f"weights from {origin} hold no ordinary dense tensor under {strange[0]!r}: expected what "
            "model.state_dict() gives, on the CPU or a GPU."
        )
    return dict(content)


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Copy `state` into `module`, after comparing every name and shape; on any difference nothing is copied.

    Floating-point numbers of another width (a bfloat16 file) are converted to the module's. Batch norm's
    `num_batches_tracked`, which files from before torch 0.4.1 lack, may be missing; it is 0 then.

    Raises:
        WeightsError: Names are missing or unexpected, or shapes differ; at most five of each are listed.
    """
    own = module.state_dict()
    counts = {key: torch.zeros_like(own[key]) for key in own if key.endswith(".num_batches_tracked")}
    state = {**counts, **state}
    if faults := differences(own, state):
        raise WeightsError(
            f"weights from {origin} do not fit: {faults}. Expected exactly the {len(own)} tensors "
            f"{next(iter(own))} ... {list(own)[-1]}. {_likely_cause(own, state)}"
        )
    module.load_state_dict(dict(state))


def differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor], *, same_width: bool = False) -> str:
    """Say in which names, shapes and kinds of numbers `state` differs from `own`; nothing if in none.

    With `same_width` floating-point numbers of another width are a difference too.

    Example:
        >>> differences({"a": torch.zeros(2)}, {"a": torch.zeros(3), "b": torch.zeros(1)})
        'unexpected b; other shapes: a (3,) instead of (2,)'
    """
    faults = []
    if missing := [key for key in own if key not in state]:
        faults.append(f"missing {_some(missing)}")
    if unexpected := [key for key in state if key not in own]:
        faults.append(f"unexpected {_some(unexpected)}")
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if shapes:
        faults.append(f"other shapes: {_some(shapes)}")
    kinds = [
        f"{key} {state[key].dtype} instead of {own[key].dtype}"
        for key in own
        if key in state
        and state[key].dtype != own[key].dtype
        and (same_width or not (state[key].is_floating_point() and own[key].is_floating_point()))
    ]
    if kinds:
        faults.append(f"other number types: {_some(kinds)}")
    return "; ".join(faults)


def _some(items: list[str]) -> str:
    rest = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(items[:5]) + rest


def _likely_cause(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    first = next(iter(own))
    prefixes = [key[: -len(first)] for key in state if key.endswith(f".{first}")]
    if prefixes:
        return f"The names there begin with {prefixes[0]!r}: remove that from each."
    return "Is it the file of another network?"


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"  # only torch's zip format can be mapped


def _expected_sha256(name: str) -> str | None:
    in_name = re.search(r"-([0-9a-f]{8,})\.", name)
    return _FULL_SHA256.get(name) or (in_name.group(1) if in_name else None)


def _read_sha256(path: Path) -> str:
    try:
        return _sha256(path)
    except OSError as error:
        raise WeightsError(
            f"{path} is there and cannot be read: {error}. Expected a weight file: mend its permissions, or delete it "
            "and download it again."
        ) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _fetch(url: str, path: Path, expected: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_write(path) as file,
            urllib.request.urlopen(url, timeout=TIMEOUT_S) as response,  # noqa: S310 - torchvision's own addresses
        ):
            _copy_verified(response, file, url, expected)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise WeightsDownloadError(
            f"could not download {url} to {path}: {error}. Nothing was kept. Without a network, download the file "
            "elsewhere, put it there, or pass its path as weights=."
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
            f"what {url} sent ({received} bytes) does not have the SHA-256 in its name. Nothing was kept. A proxy or "
            "login page may have answered instead: try another network, or pass a path as weights=."
        )
