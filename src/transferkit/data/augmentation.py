"""Random augmentation of raw images, on the device. Each image is seeded by (seed, epoch, index in the data set)."""

import re
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from transferkit.base.arguments import one_of
from transferkit.base.randomness import derive_seed, seeded
from transferkit.errors import ImageError

Transform = Callable[[Tensor], Tensor]
Augment = str | Transform | Sequence[str | Transform]


def build_augmentation(augment: Augment, image_size: int) -> Transform:
    """Return one transform of a raw image, uint8 `(3, S, S)`, that applies several augmentations in turn."""
    from torchvision.transforms import v2  # takes 0.2 s: not at import

    known: dict[str, Transform] = {
        "flip": v2.RandomHorizontalFlip(),
        "crop": v2.RandomCrop(image_size, padding=image_size // 8, padding_mode="reflect"),
        "color": v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
        "trivial": v2.TrivialAugmentWide(),  # Müller and Hutter, 2021, arXiv:2103.10158
    }
    parts = augment if isinstance(augment, list | tuple) else [augment]
    chain = [part if callable(part) else known[one_of("augment", part, known)] for part in parts]
    return lambda image: reduce(lambda changed, part: part(changed), chain, image)


def describe_augmentation(augment: Augment) -> list[str]:
    """Return augmentations as text: names, and of callables all that can be told of their parameters."""
    parts = augment if isinstance(augment, list | tuple) else [augment]
    return [part if isinstance(part, str) else _describe(part) for part in parts]


def augment_batch(transform: Transform, images: Tensor, indices: Sequence[int], *, seed: int, epoch: int) -> Tensor:
    """Return a batch, uint8 `(N, 3, S, S)`, in which each image, by its index in the data set, has its own seed."""
    augmented = []
    for image, index in zip(images, indices, strict=True):  # a whole batch would be flipped, or none of it
        with seeded(derive_seed(seed, "augment", epoch, index), image.device):
            try:
                augmented.append(transform(image))
            except Exception as error:  # whatever a user's transform raises
                raise ImageError(
                    f"augment failed on image {index}: {type(error).__name__}: {error}. It gets one raw image, uint8 "
                    f"{tuple(image.shape)}, without its target. CutMix and MixUp go into a DataLoader's collate_fn."
                ) from error
        result: Any = augmented[-1]
        form = f"{tuple(image.shape)} {image.dtype}"
        got = f"{tuple(result.shape)} {result.dtype}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        if got != form:
            raise ImageError(
                f"augment changed image {index} from {form} to {got}: expected the same "
                "shape and dtype. Images are normalized afterwards."
            )
    return torch.stack(augmented)


def _describe(part: Any) -> str:
    if (code := getattr(part, "__code__", None)) is not None:  # a function
        cells = [cell.cell_contents for cell in part.__closure__ or ()]
        part = (part.__qualname__, *code.co_consts, part.__defaults__, cells)
    elif repr(part) == object.__repr__(part):
        part = (type(part).__qualname__, getattr(part, "__dict__", {}))
    return re.sub(r" at 0x[0-9a-fA-F]+(, file .*?, line \d+)?", "", repr(part))
