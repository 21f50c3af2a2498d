"""The file of a checkpoint: written whole or not at all, verified before anything of it is used."""

import os
import reprlib
import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from transferkit.base.files import atomic_write
from transferkit.base.torch_files import DAMAGE, check_archive, is_ordinary
from transferkit.errors import CheckpointError, CheckpointTypeError, CheckpointWriteError

FORMAT = 3

VERSIONS = {package: version(package) for package in ("transferkit", "torch", "torchvision")}

_PLAIN = (bool, int, float, str, type(None))
_PLAIN_BYTES = 2**20  # room for what is not tensors


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a checkpoint whole or not at all: beside the target, flushed to the disk, renamed.

    Args:
        path: Its folder is there.
        state: Plain types and tensors, nested. They are not copied, and must not change meanwhile: a change that torch
            counts is an error, but one that is under way at the end, or made through `.data`, is not seen.

    Raises:
        CheckpointTypeError: Something else is among them; nothing was written.
        CheckpointWriteError: The folder is missing, read-only or full, or a tensor was changed while it was written;
            what was at `path` before is still there.
    """
    path = Path(path)
    tensors = check_plain(state, CheckpointTypeError)
    counts = [tensor._version for tensor in tensors]
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder, expected the name of a file")
        _check_room(path, sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        with atomic_write(path) as file:
            torch.save({"format": FORMAT, "versions": VERSIONS, **state}, file)
            _check_unchanged(tensors, counts)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError where the disk is full
        raise CheckpointWriteError(
            f"cannot write a checkpoint to {path}: {error}. What was there before still is. Expected a folder "
            "that can be written and has room."
        ) from error


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint after verifying the checksum of every part of it. No code in the file is run.

    Raises:
        CheckpointError: No such file, a damaged one, or not a checkpoint of a format this version knows.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: expected a file that Trainer.save wrote.")
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, *DAMAGE) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"cannot read {path} ({path.stat().st_size} bytes) as a checkpoint: {reason}. Expected a file that "
            "Trainer.save wrote, whole: delete it and use an earlier one. For a file of weights alone use "
            "load_backbone(weights=path)."
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} {_other_format(state)}")
    check_plain(state, CheckpointError)
    return state


def shown(value: object) -> str:
    """Return a value from a file for a message: never long, whatever it is.

    Example:
        >>> shown("vgg16"), shown([[0] * 100] * 100)[:30]
        ('vgg16', '[[0, 0, 0, 0, 0, 0, ...], [0, ')
    """
    return value if isinstance(value, str) and len(value) < 80 else reprlib.repr(value)


def _other_format(state: object) -> str:
    found = state.get("format", "none") if isinstance(state, dict) else "none"
    versions = state.get("versions") if isinstance(state, dict) else None
    writer = versions.get("transferkit") if isinstance(versions, dict) else None
    newer = isinstance(found, int) and found > FORMAT
    by = f", written by transferkit {shown(writer)}" if writer else ""
    remedy = "Install a newer transferkit." if newer else "Expected a file that Trainer.save wrote."
    return (
        f"has checkpoint format {shown(found)}{by}: this is transferkit {VERSIONS['transferkit']}, which reads format "
        f"{FORMAT}. {remedy}"
    )


def check_plain(state: object, error: type[CheckpointError]) -> list[Tensor]:
    """Return the tensors in `state`, refusing whatever is not a plain type or a dense tensor with memory of its own.

    Raises:
        CheckpointError: The given class of it, with the place.
    """
    tensors: list[Tensor] = []
    seen: set[int] = set()  # a list that holds one list many times, nested, would take forever
    waiting: list[tuple[str, object]] = [("", state)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, Tensor):
            if not is_ordinary(value):
                raise error(
                    f"{place} is not an ordinary dense tensor: a checkpoint holds plain types and tensors only."
                )
            tensors.append(value)
        elif id(value) in seen or type(value) in _PLAIN:
            continue
        elif isinstance(value, dict):
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise error(f"{place or 'the state'} has the key {shown(wrong[0])}: expected text.")
            waiting += [(f"{place}/{key}" if place else key, part) for key, part in value.items()]
        elif type(value) in (list, tuple):
            waiting += [(f"{place}/{number}", part) for number, part in enumerate(cast("list[object]", value))]
        else:
            raise error(
                f"{place or 'the state'} is a {type(value).__name__}: a checkpoint holds plain types and tensors only."
            )
        seen.add(id(value))
    return tensors


def check_parts(state: Mapping[str, Any], parts: Mapping[str, Mapping[str, tuple[type, ...]]], *, origin: str) -> None:
    """Refuse a checkpoint that lacks one of the parts asked for, or something in it, or has it of another type.

    Raises:
        CheckpointError: So it is.
    """
    lacking = [part for part in parts if not isinstance(state.get(part), Mapping)]
    lacking += [
        f"{part}/{key}" for part, keys in parts.items() if part not in lacking for key in keys if key not in state[part]
    ]
    if lacking:
        raise CheckpointError(
            f"{origin} lacks {', '.join(lacking)}: expected a file that Trainer.save wrote, or what "
            "Trainer.state_dict returned."
        )
    for part, keys in parts.items():
        for key, kinds in keys.items():
            if type(state[part][key]) not in kinds:
                raise CheckpointError(
                    f"{origin} has a {type(state[part][key]).__name__} as {part}/{key}: expected "
                    f"{' or '.join(kind.__name__ for kind in kinds)}."
                )


def check_items(values: Iterable[object], kind: type, place: str) -> None:
    """Refuse a list or the values of a mapping in a checkpoint that are not all of one type.

    Raises:
        CheckpointError: So they are.
    """
    if wrong := [value for value in values if not isinstance(value, kind)]:
        raise CheckpointError(f"{place} of the checkpoint holds a {type(wrong[0]).__name__}: expected {kind.__name__}.")


def check_no_tensors(value: object, place: str) -> None:
    """Refuse a tensor where a checkpoint has numbers and text: comparing it would be no yes or no.

    Raises:
        CheckpointError: So it is.
    """
    if check_plain(value, CheckpointError):
        raise CheckpointError(f"{place} of the checkpoint holds a tensor: expected numbers and text.")


def _check_unchanged(tensors: list[Tensor], counts: list[int]) -> None:
    if counts != [tensor._version for tensor in tensors]:
        raise OSError("its tensors were changed meanwhile, by another thread; save between two steps")


def _check_room(path: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < num_bytes + _PLAIN_BYTES:
        raise OSError(f"it needs {num_bytes / 1e6:,.0f} MB and {path.parent} has {free / 1e6:,.0f} MB free")
