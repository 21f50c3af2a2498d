"""Batches as they lie in the data, to model input on the device: the one path of training, validation, prediction."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from transferkit.base.randomness import derive_seed
from transferkit.compute.device import Device
from transferkit.data.augmentation import Transform, augment_batch
from transferkit.data.images import check_image_size
from transferkit.data.normalized import check_normalized
from transferkit.data.preprocessing import Preprocessing
from transferkit.data.sources import Sizes, Source
from transferkit.errors import ImageError

Images = Tensor | list[Tensor]
"""A batch `(N, 3, H, W)`, or a list of raw images `(3, H, W)` whose sizes differ."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """A source of images as the model sees it.

    Raw images cross to the device as uint8 and are resized, augmented by `transform` and normalized there. Preprocessed
    images, float, pass unchanged. Augmentation and the data's own randomness depend on `seed` and on the view.
    """

    source: Source
    preprocess: Preprocessing
    device: Device
    transform: Transform | None = None
    seed: int = 0

    def batches(
        self, batch_size: Sizes, *, order: Tensor | None = None, view: int = 0
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield model input, float `(N, 3, S, S)`, and targets of each batch, on the device, read one batch ahead.

        `order` are places of the images in the source, int64; None reads them as they lie. `view` says which random
        changes are drawn: the number of the epoch, as a rule. Preprocessed images of another size or normalization than
        the weights expect, or that are to be augmented, are an `ImageError`.
        """
        for images, targets, places in self.device.batches(self._checked(batch_size, order, view)):
            yield self.prepare(self._augment(images, places, view)), targets

    def read(
        self, batch_size: Sizes, *, order: Tensor | None = None, view: int | None = 0
    ) -> Generator[tuple[Images, Tensor], None, None]:
        """Yield the images that `prepare` makes model input of, and targets, which stay on the host.

        The images are those of the source, on the host; with augmentation they are the augmented ones, on the device.
        With None as view, data that draws random numbers raises `CacheError`.
        """
        for images, targets, places in self._checked(batch_size, order, view):
            if self.transform is None or view is None:
                yield images, targets
            else:
                yield self._augment(self.device.move(images), places, view), targets

    def prepare(self, images: Images) -> Tensor:
        """Return model input, float `(N, 3, S, S)`, on the device."""
        images = self.device.move(images)
        if isinstance(images, Tensor) and images.is_floating_point():
            return images
        if self.transform is None or isinstance(images, list):
            images = self.preprocess.resize(images)  # augmented images have been resized: once more may change them
        return self.preprocess.normalize(images)

    def _augment(self, images: Images, places: Sequence[int], view: int) -> Images:
        if self.transform is None:
            return images
        if isinstance(images, Tensor) and images.is_floating_point():
            raise ImageError("augment works on raw images, but these are preprocessed (float): pass uint8 images.")
        return augment_batch(self.transform, self.preprocess.resize(images), places, seed=self.seed, epoch=view)

    def _checked(
        self, batch_size: Sizes, order: Tensor | None, view: int | None
    ) -> Iterator[tuple[Images, Tensor, tuple[int, ...]]]:
        """Check size and values of preprocessed images while they are on the host."""
        if order is not None and not len(order):
            return
        seed = None if view is None else derive_seed(self.seed, "data", view)
        for images, targets, places in self.source.batches(
            batch_size, seed=seed, order=order, preprocess=self.preprocess
        ):
            if isinstance(images, Tensor) and images.is_floating_point():
                check_image_size(images, self.preprocess.image_size)
                check_normalized(images, self.preprocess)
            yield images, targets, tuple(places)  # no list: Device.move would look at each number for a tensor
