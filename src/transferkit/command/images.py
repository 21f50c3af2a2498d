"""A folder of images: one folder per class, or such folders below train, val and test."""

import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from transferkit.base.display import Display
from transferkit.data.selection import bad_image_limit, split_validation, without_bad_images
from transferkit.data.sources import DatasetSource, SubsetSource
from transferkit.data.targets import as_targets
from transferkit.errors import ArgumentError, EmptyDataError

PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def open_parts(folder: Path) -> dict[str, ImageFolder]:
    """Return the parts of a folder, `"train"`, `"val"` and `"test"` as far as there are any, else all as `"train"`."""
    if not folder.is_dir():
        raise ArgumentError(f"no folder {folder}: expected one with a folder of images for each class, or with train/.")
    parents = sorted(path for path in folder.iterdir() if path.is_dir() and any(map(Path.is_dir, path.iterdir())))
    named = [(part, path) for part, names in PARTS.items() for path in parents if path.name.lower() in names]
    if len(named) > len(dict(named)):
        found = ", ".join(str(path) for _, path in named)
        raise ArgumentError(f"{folder} needs one folder for each of train, val, test: {found}.")
    parts = {part: _open(path) for part, path in named} or {"train": _open(folder)}
    first = next(iter(parts.values()))
    for other in parts.values():
        if other.classes != first.classes:
            raise ArgumentError(f"{other.root} has other folders than {first.root}: expected the same classes in both.")
    return parts


def _open(folder: Path) -> ImageFolder:
    try:
        images = ImageFolder(folder)
    except FileNotFoundError as error:  # torchvision's message names the classes
        raise EmptyDataError(f"{folder}: {error}. Expected a folder of images for each class.") from error
    files = {str(path) for name in images.classes for path in (folder / name).rglob("[!.]*") if path.is_file()}
    if others := sorted(files - {path for path, _ in images.samples}):
        sys.stderr.write(f"{folder}: {len(others)} files without an image's extension left out, first {others[0]}\n")
    return images


def open_training(options: Mapping[str, Any]) -> dict[str, "Dataset[Any]"]:
    """Return `"train"`, `"val"`, which is held out of the training images if there is none, and perhaps `"test"`.

    All can be read, or that is an error; `fine_tune` itself reads those of `"train"` first.
    """
    parts: dict[str, Any] = {**open_parts(options["DATA"])}
    if "train" not in parts:
        raise ArgumentError(f"{options['DATA']} has {' and '.join(parts)} but no train: expected train/ beside them.")
    images, limit = parts["train"], bad_image_limit(options.get("on_bad_image", "raise"))

    read_targets = partial(as_targets, num_classes=len(images.classes))

    def source(part: Any) -> DatasetSource:
        return DatasetSource(part, read_targets, num_workers=options.get("num_workers", 0))

    if "val" not in parts:
        halves = split_validation(source(images), options.get("validation_split", 0.1), options.get("seed", 0))
        parts["train"], parts["val"] = (Subset(images, half.indices.tolist()) for half in halves)
    for part, every in parts.items():
        if limit is not None:
            good = without_bad_images(source(every), limit, display=Display(options.get("verbose", 1)))
            parts[part] = Subset(every, good.indices.tolist()) if isinstance(good, SubsetSource) else every
        elif part != "train":
            for _ in source(every).batches(32, seed=0, order=None):  # the first one that cannot be read raises
                pass
    return parts


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return image files as given, and those in and below folders, by name."""
    found: list[Path] = []
    for path in paths:
        below = sorted(file for file in path.rglob("[!.]*") if file.suffix.lower() in IMG_EXTENSIONS)
        if path.is_dir() and not below:
            raise EmptyDataError(f"no images in {path}: expected files with {', '.join(IMG_EXTENSIONS)}.")
        found += below or [path]
    return found
