"""Random augmentation of raw images, on the device, drawn for each image from (seed, epoch, place in the data set)."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from transferkit.base.arguments import one_of
from transferkit.base.randomness import derive_seed, seeded
from transferkit.errors import ImageError

Transform = Callable[[Tensor], Tensor]
Augment = str | Transform | Sequence[str | Transform]


def build_augmentation(augment: Augment, image_size: int) -> Transform:
    """Return one transform of a raw image, uint8 `(3, S, S)`, made of named ones and the user's own.

    Args:
        augment: One or several of `"flip"` (left-right, every second image), `"crop"` (an eighth of the size added on
            each side by reflection, then cut at random), `"color"` (brightness, contrast, saturation within 20 %),
            `"trivial"` (TrivialAugment), or callables such as torchvision's `transforms.v2`.
        image_size: S.

    Raises:
        ArgumentError: An unknown name, or something that cannot be called.

    Example:
        >>> flip_and_crop = build_augmentation(["flip", "crop"], image_size=32)
        >>> flip_and_crop(torch.zeros(3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([3, 32, 32])

    References:
        Müller and Hutter, 2021, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", arXiv:2103.10158.
    """
    from torchvision.transforms import v2  # takes 0.2 s: not at import

    known: dict[str, Transform] = {
        "flip": v2.RandomHorizontalFlip(),
        "crop": v2.RandomCrop(image_size, padding=image_size // 8, padding_mode="reflect"),
        "color": v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
        "trivial": v2.TrivialAugmentWide(),
    }
    parts = augment if isinstance(augment, list | tuple) else [augment]
    return partial(_apply, [part if callable(part) else known[one_of("augment", part, known)] for part in parts])


def describe_augmentation(augment: Augment) -> list[str]:
    """Return the names of augmentations; of the user's own what can be told of them.

    Example:
        >>> describe_augmentation(["flip", torch.nn.Identity()])
        ['flip', 'Identity']
    """
    parts = augment if isinstance(augment, list | tuple) else [augment]
    return [part if isinstance(part, str) else getattr(part, "__qualname__", type(part).__name__) for part in parts]


def augment_batch(transform: Transform, images: Tensor, places: Sequence[int], *, seed: int, epoch: int) -> Tensor:
    """Return a batch with each image transformed under its own seed.

    torchvision's transforms draw once for each call: called on a whole batch they would flip all of it or nothing.

    Args:
        transform: Takes and returns one uint8 `(3, S, S)`.
        images: uint8 `(N, 3, S, S)`, on any device.
        places: Where in the data set each image lies.
        seed: The run's seed.
        epoch: Number of epochs trained before this one.

    Raises:
        ImageError: The transform changed shape or number type.
    """
    augmented = []
    for image, place in zip(images, places, strict=True):
        with seeded(derive_seed(seed, "augment", epoch, place), image.device):
            augmented.append(transform(image))
        result = augmented[-1]
        if not isinstance(result, Tensor) or result.shape != image.shape or result.dtype != image.dtype:
            made = (
                f"{tuple(result.shape)} {result.dtype}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
            )
            raise ImageError(
                f"augment changed image {place} from {tuple(image.shape)} {image.dtype} to {made}: expected a "
                "transform of raw images that keeps both. Normalisation is done afterwards."
            )
    return torch.stack(augmented)


def _apply(chain: Sequence[Transform], image: Tensor) -> Tensor:
    for transform in chain:
        image = transform(image)
    return image
