"""The file of a checkpoint: written whole or not at all, verified when it is written and when it is read."""

import os
import reprlib
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transferkit.base.files import atomic_write, kind_of
from transferkit.base.torch_files import check_archive, is_ordinary, read_torch_file
from transferkit.errors import CheckpointError, CheckpointTypeError, CheckpointWriteError, printable

FORMAT = 5

VERSIONS = {package: version(package) for package in ("transferkit", "torch", "torchvision")}

_PLAIN = (bool, int, float, str, type(None))
_PLAIN_BYTES = 2**20  # room for what is not tensors


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write plain types and tensors beside their place, read the checksums back, flush to the disk and rename.

    Anything else is a `CheckpointTypeError`. What keeps the file from being whole, or another thread that changes the
    tensors meanwhile, is a `CheckpointWriteError`, and an earlier file at `path` is still there.
    """
    path = Path(path)
    tensors = check_plain(state, CheckpointTypeError)
    versions = [tensor._version for tensor in tensors]
    needed = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    try:
        if (free := shutil.disk_usage(path.parent).free) < needed + _PLAIN_BYTES:
            raise OSError(f"it needs {needed / 1e6:,.0f} MB and {path.parent} has {free / 1e6:,.0f} MB free")
        with atomic_write(path) as file:
            torch.save({"format": FORMAT, "versions": VERSIONS, **state}, file)
            if versions != [tensor._version for tensor in tensors]:
                raise OSError("another thread changed its tensors meanwhile, save between two steps")
            check_archive(file)
    except (OSError, RuntimeError, ValueError) as error:  # torch raises RuntimeError where the disk is full
        raise CheckpointWriteError(
            f"cannot write a checkpoint to {path}: {error}. An earlier file there is unchanged. Expected a "
            "folder with write permission and enough room on a working disk."
        ) from error


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint after verifying the checksum of each part; else `CheckpointError`. No code in it runs."""
    path = Path(path)
    if (found := kind_of(path)) != "a file":
        raise CheckpointError(f"no checkpoint at {path}: got {found}, expected a file that Trainer.save wrote.")
    try:
        state = read_torch_file(path)
    except ValueError as error:
        raise CheckpointError(
            f"cannot read {path} ({path.stat().st_size} bytes) as a checkpoint: {error}. Expected a complete file of "
            "Trainer.save: delete it and use an earlier one. Weights alone are for load_backbone(weights=path)."
        ) from error
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}. The file may be good.") from error
    content: dict[str, Any] = state if isinstance(state, dict) else {}
    form = content.get("format", "none")
    if type(form) is not int or form != FORMAT:
        versions = content.get("versions")
        writer = versions.get("transferkit") if isinstance(versions, dict) else None
        by = f", written by transferkit {shown(writer)}" if writer else ""
        raise CheckpointError(
            f"{path} has checkpoint format {shown(form)}{by}: this is transferkit {VERSIONS['transferkit']}, which "
            f"reads format {FORMAT}. Expected a file that Trainer.save wrote, or install its transferkit."
        )
    check_plain(content, CheckpointError)
    return content


def shown(value: object) -> str:
    """Return a value from a file as text for a message, never long."""
    return printable(value) if isinstance(value, str) and len(value) < 80 else reprlib.repr(value)


def check_plain(state: object, error: type[CheckpointError]) -> list[Tensor]:
    """Return the tensors in a nested state; an `error` names what is no plain type, dense tensor or key of text."""
    tensors: list[Tensor] = []
    seen: set[int] = set()  # without it a list that holds one list twice, nested, would take forever
    waiting: list[tuple[str, object]] = [("", state)]
    while waiting:
        place, value = waiting.pop()
        here = place[1:] or "the state"
        if type(value) in _PLAIN or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor) and is_ordinary(value):
            tensors.append(value)
        elif isinstance(value, dict):
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise error(f"{here} has the key {shown(wrong[0])}: expected text.")
            waiting += [(f"{place}/{key}", part) for key, part in value.items()]
        elif isinstance(value, list | tuple) and type(value) in (list, tuple):  # no torch.Size, no named tuple
            waiting += [(f"{place}/{number}", part) for number, part in enumerate(value)]
        else:
            kind = "not an ordinary dense tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise error(f"{here} is {kind}: a checkpoint holds plain types and tensors only.")
    return tensors


def check_parts(state: object, parts: Any, *, origin: str, place: str = "") -> None:
    """Compare a nested state with a table of what it must hold; `CheckpointError` names the place of what differs.

    A table is a tuple of the types that a value may have; a dict of the keys that a mapping must have, with `str` for
    every key; or a list of one entry, for every item of a list. `origin` is the file.
    """
    kinds = parts if isinstance(parts, tuple) else (type(parts),)
    if not isinstance(state, kinds) or (isinstance(state, bool) and bool not in kinds):
        raise CheckpointError(
            f"{origin} has a {type(state).__name__} as {place or 'its state'}: expected "
            f"{' or '.join(kind.__name__ for kind in kinds)}."
        )
    prefix = f"{place}/" if place else ""
    if isinstance(parts, dict):
        if lacking := [prefix + key for key in parts if key is not str and key not in state]:
            expected = "expected a file that Trainer.save wrote, or what Trainer.state_dict returned."
            raise CheckpointError(f"{origin} lacks {', '.join(lacking)}: {expected}")
        for key, part in parts.items():
            for name in state if key is str else [key]:
                check_parts(state[name], part, origin=origin, place=f"{prefix}{name}")
    elif isinstance(parts, list):
        for number, item in enumerate(state):
            check_parts(item, parts[0], origin=origin, place=f"{prefix}{number}")


def check_ranges(state: Mapping[str, Any], ranges: Mapping[str, tuple[float, float]], *, origin: str) -> None:
    """Raise `CheckpointError` unless numbers of a state lie in a range; what is no number passes."""
    for name, (least, most) in ranges.items():
        value = state.get(name)
        if isinstance(value, int | float) and not least <= value <= most:
            raise CheckpointError(f"{origin} has {name} {shown(value)}: expected {least:g} to {most:g}.")


def check_no_tensors(value: object, place: str) -> None:
    """Raise `CheckpointError` if a value holds a tensor, because `==` on a tensor does not return a bool."""
    if check_plain(value, CheckpointError):
        raise CheckpointError(f"{place} of the checkpoint holds a tensor: expected numbers and text.")
