"""Batches as they lie in the data, to model input on the device: the one path of training, validation, prediction."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from torch import Tensor

from transferkit.base.randomness import derive_seed
from transferkit.compute.device import Device
from transferkit.data.augmentation import Transform, augment_batch
from transferkit.data.images import check_image_size, check_normalized
from transferkit.data.preprocessing import Preprocessing
from transferkit.data.sources import Batch, Source
from transferkit.errors import ImageError

Watch = Callable[[Tensor | list[Tensor]], None]


@dataclass(frozen=True, slots=True)
class Inputs:
    """A source of images as the model sees it.

    Raw images cross to the device as uint8 and are resized, augmented and normalised there; preprocessed ones pass.

    Attributes:
        source: The images.
        preprocess: The backbone's.
        device: Where to.
        transform: Random change of one raw image, or None.
        seed: The augmentation, and the data's own randomness, depend on it and on the view.
    """

    source: Source
    preprocess: Preprocessing
    device: Device
    transform: Transform | None = None
    seed: int = 0

    def batches(
        self, batch_size: int, *, order: Tensor | None = None, view: int = 0, watch: Watch | None = None
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield model input, float `(N, 3, S, S)`, and targets of each batch, on the device.

        Args:
            batch_size: Images in a batch.
            order: Places of the images in the source, int64; None takes them as they lie.
            view: Which of the random changes is made; the number of the epoch, as a rule.
            watch: Is shown the pixels of each batch, on the host: as they lie in the source, or augmented if they are.

        Raises:
            ImageError: Preprocessed images of another size, or that no preprocessing made, or that were to be
                augmented.
        """
        augmented = self.transform is not None
        read = self.source.batches(batch_size, seed=derive_seed(self.seed, "data", view), order=order)
        checked = _checked(read, self.preprocess, None if augmented else watch)
        for images, targets, places in self.device.batches(checked):
            if isinstance(images, Tensor) and images.is_floating_point():
                if augmented:
                    raise ImageError(
                        "augment works on raw images, but these are preprocessed (float): pass uint8 images."
                    )
                yield images, targets
                continue
            raw = self.preprocess.resize(images)
            if self.transform is not None:
                raw = augment_batch(self.transform, raw, places, seed=self.seed, epoch=view)
                if watch is not None:
                    watch(raw.cpu())  # host sync
            yield self.preprocess.normalize(raw), targets


def _checked(batches: Iterator[Batch], preprocess: Preprocessing, watch: Watch | None) -> Iterator[Batch]:
    """Look at preprocessed images while they are on the host: the sizes of all, the values of the first batch."""
    for number, (images, targets, places) in enumerate(batches):
        if isinstance(images, Tensor) and images.is_floating_point():
            check_image_size(images, preprocess.image_size)
            if number == 0:
                check_normalized(images, preprocess.name)
        if watch is not None:
            watch(images)
        yield images, targets, places
