"""A data set's images, read once and held in memory, resized, for many runs."""

import torch
from torch import Tensor

from transferkit.compute.device import Device
from transferkit.compute.host_memory import host_bytes
from transferkit.data.open import open_data
from transferkit.data.preprocessing import Preprocessing
from transferkit.data.sources import ArraySource
from transferkit.errors import CacheError

MEMORY_SHARE = 0.25  # of the free host memory may the resized images take


def resized(
    data: object, classes: tuple[str, ...], preprocess: Preprocessing, *, device: Device, num_workers: int = 0
) -> tuple[Tensor, Tensor] | None:
    """Return raw images, uint8 `(N, 3, S, S)`, and targets, on which training gives the same weights as on the data.

    They are resized on the device, as in training. None if the data should be used directly.
    """
    source = open_data(data, classes, num_workers=num_workers)
    if preprocess.geometry == "torchvision" or isinstance(source, ArraySource):  # it would resize once more
        return None
    if source.num_images is None or source.why_not_repeatable() is not None:
        return None
    memory = host_bytes()
    if memory is None or source.num_images * 3 * preprocess.image_size**2 > MEMORY_SHARE * memory["free"]:
        return None
    images, targets = [], []
    try:
        for batch, batch_targets, _ in source.batches(32, seed=None, order=None, preprocess=preprocess):
            if isinstance(batch, Tensor) and batch.is_floating_point():
                return None
            images.append(preprocess.resize(device.move(batch)).cpu())
            targets.append(batch_targets)
    except CacheError:  # the data set drew random numbers for one of them
        return None
    return torch.cat(images), torch.cat(targets)
