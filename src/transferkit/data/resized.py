"""A data set's images, read once, resized, and kept in memory as they go into many runs."""

import torch
from torch import Tensor

from transferkit.compute.device import Device
from transferkit.compute.host_memory import host_bytes
from transferkit.data.open import open_data
from transferkit.data.preprocessing import Preprocessing
from transferkit.data.sources import ArraySource

MEMORY_SHARE = 0.25
"""How much of the host's free memory they may take."""


def resized(
    data: object, classes: tuple[str, ...], preprocess: Preprocessing, *, device: Device, num_workers: int = 0
) -> tuple[Tensor, Tensor] | None:
    """Return raw images, uint8 `(N, 3, S, S)`, and targets, which train as the data itself does.

    Resizing treats each image alone, and what has the right size stays as it is, so that every pixel is the same. It is
    done on the device, as in training: another one may round some pixels differently.

    Args:
        data: As in `Trainer.fit`.
        classes: The model's class names.
        preprocess: Says to which size.
        device: Where to resize.
        num_workers: Processes that read a `Dataset`.

    Returns:
        None where reading again would give other images, or they lie in memory already, or there is no room: the data
        is then to be used as it is.

    Raises:
        TransferKitError: The data cannot be used.
    """
    source = open_data(data, classes, num_workers=num_workers)
    if isinstance(source, ArraySource) or source.num_images is None or source.why_not_repeatable() is not None:
        return None
    memory = host_bytes()
    size = source.num_images * 3 * preprocess.image_size**2
    if memory is None or size > MEMORY_SHARE * memory["free"]:
        return None
    images, targets = [], []
    for batch, batch_targets, _ in source.batches(32, seed=0, order=None):
        if isinstance(batch, Tensor) and batch.is_floating_point():
            return None
        images.append(preprocess.resize(device.move(batch)).cpu())
        targets.append(batch_targets)
    return torch.cat(images), torch.cat(targets)
