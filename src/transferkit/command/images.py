"""A folder of images: one folder per class, or such folders below train, val and test."""

import argparse
import copy
import sys
from collections.abc import Iterable
from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from transferkit.base.arguments import one_of
from transferkit.data.selection import MAX_BAD_FRACTION, POLICIES, split_validation
from transferkit.data.sources import DatasetSource
from transferkit.errors import ArgumentError, EmptyDataError, ImageError

PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def open_parts(folder: Path) -> dict[str, ImageFolder]:
    """Return the parts of a folder, `"train"`, `"val"` and `"test"` as far as there are any, else all as `"train"`.

    Raises:
        ArgumentError: When there is no such folder, two folders are the same part, or parts have other classes.
        EmptyDataError: When there are no classes, or one has no images.
    """
    if not folder.is_dir():
        raise ArgumentError(
            f"no folder {folder}: expected one with a folder of images for each class, or with train/ and val/ (or "
            "test/) that have those."
        )
    parents = sorted(path for path in folder.iterdir() if path.is_dir() and any(map(Path.is_dir, path.iterdir())))
    found: dict[str, Path] = {}
    for part, path in ((part, path) for path in parents for part in PARTS if path.name.lower() in PARTS[part]):
        if part in found:
            raise ArgumentError(f"{found[part]} and {path} would both be {part}: expected one of them.")
        found[part] = path
    parts = {part: _open(found[part]) for part in PARTS if part in found} or {"train": _open(folder)}
    first, *others = parts.values()
    for other in others:
        if other.classes != first.classes:
            raise ArgumentError(f"{other.root} has other folders than {first.root}: expected the same classes in both.")
    return parts


def _open(folder: Path) -> ImageFolder:
    try:
        images = ImageFolder(folder)
    except FileNotFoundError as error:  # torchvision's message names the classes
        raise EmptyDataError(f"{folder}: {error}. Expected a folder of images for each class.") from error
    used = {path for path, _ in images.samples}
    files = (path for name in images.classes for path in (folder / name).rglob("[!.]*") if path.is_file())
    if others := sorted(str(path) for path in files if str(path) not in used):
        sys.stderr.write(f"{folder}: {len(others)} files without an image's extension left out, first {others[0]}\n")
    return images


def open_training(options: argparse.Namespace) -> dict[str, ImageFolder]:
    """Return `"train"`, `"val"`, which is held out of the training images if there is none, and perhaps `"test"`.

    Raises:
        ArgumentError: When there are no training images.
        ImageError: When an image cannot be read; `fine_tune` itself reads those of `"train"` first.
    """
    parts = open_parts(options.data)
    if "train" not in parts:
        raise ArgumentError(f"{options.data} has {' and '.join(parts)} but no train: expected train/ beside them.")
    if "val" not in parts:
        source = _source(parts["train"], options)
        train, held_out = split_validation(source, options.validation_split, options.seed)
        images = parts["train"]
        parts |= {"train": _subset(images, train.indices.tolist()), "val": _subset(images, held_out.indices.tolist())}
    skips = one_of("on_bad_image", options.on_bad_image, POLICIES) == "skip"
    return {
        part: images if part == "train" and not skips else _usable(images, options) for part, images in parts.items()
    }


def _source(images: ImageFolder, options: argparse.Namespace) -> DatasetSource:
    return DatasetSource(images, images.classes, num_workers=options.num_workers, with_targets=True)


def _usable(images: ImageFolder, options: argparse.Namespace) -> ImageFolder:
    """Read each image once, and return those that can be used, if others may be left out."""
    failures = [found for _, found in _source(images, options).failures()]
    bad = {index: why for found in failures for index, why in found.items()}
    if bad and options.on_bad_image == "raise":
        raise ImageError(f"{next(iter(bad.values()))} --on-bad-image skip leaves it out.")
    if len(bad) > max(1, MAX_BAD_FRACTION * len(images)):
        raise ImageError(
            f"{len(bad)} of {len(images)} images in {images.root} cannot be used: {next(iter(bad.values()))}"
        )
    sys.stderr.writelines(f"left out: {why}\n" for why in bad.values())
    return _subset(images, [index for index in range(len(images)) if index not in bad])


def _subset(images: ImageFolder, indices: Iterable[int]) -> ImageFolder:
    part = copy.copy(images)
    part.samples = part.imgs = [images.samples[index] for index in indices]
    part.targets = [target for _, target in part.samples]
    return part


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return image files as given, and those in and below folders, by name.

    Raises:
        EmptyDataError: When a folder has no images.
    """
    found: list[Path] = []
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("[!.]*") if file.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise EmptyDataError(f"no images in {path}: expected files with {', '.join(IMG_EXTENSIONS)}.")
        found += files
    return found
