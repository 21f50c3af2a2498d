"""Batches as they lie in the data, to model input on the device: the one path of training, validation, prediction."""

from collections.abc import Callable, Iterator

from torch import Tensor

from transferkit.data import Batch
from transferkit.device import Device
from transferkit.errors import ImageError
from transferkit.images import check_image_size, check_normalized
from transferkit.preprocessing import Preprocessing

AugmentBatch = Callable[[Tensor, list[int]], Tensor]


def model_inputs(
    batches: Iterator[Batch], preprocess: Preprocessing, *, device: Device, augment: AugmentBatch | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield model input and targets of each batch, on the device.

    Raw images cross to the device as uint8 and are resized, augmented and normalised there; preprocessed ones pass.

    Args:
        batches: Images, targets and places in the data set, on the host.
        preprocess: The backbone's.
        device: Where to.
        augment: uint8 `(N, 3, S, S)` and the images' places to the same shape and type; None leaves them.

    Raises:
        ImageError: Preprocessed images of another size, or that no preprocessing made, or together with `augment`.
    """
    for images, targets, places in device.batches(_checked(batches, preprocess)):
        if isinstance(images, Tensor) and images.is_floating_point():
            if augment is not None:
                raise ImageError("augment works on raw images, but these are preprocessed (float): pass uint8 images.")
            yield images, targets
            continue
        raw = preprocess.resize(images)
        if augment is not None:
            raw = augment(raw, places)
        yield preprocess.normalize(raw), targets


def _checked(batches: Iterator[Batch], preprocess: Preprocessing) -> Iterator[Batch]:
    """Look at preprocessed images while they are on the host: the sizes of all, the values of the first batch."""
    for number, (images, targets, places) in enumerate(batches):
        if isinstance(images, Tensor) and images.is_floating_point():
            check_image_size(images, preprocess.image_size)
            if number == 0:
                check_normalized(images, preprocess.name)
        yield images, targets, places
