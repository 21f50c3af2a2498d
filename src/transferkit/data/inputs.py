"""Batches as they lie in the data, to model input on the device: the one path of training, validation, prediction."""

from collections.abc import Generator
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

Images = Tensor | list[Tensor]  # a batch `(N, 3, H, W)`, or raw images `(3, H, W)` whose sizes differ


@dataclass(frozen=True, slots=True)
class Inputs:
    """A source of images as the model sees it: raw ones are resized, augmented and normalized, float ones unchanged.

    What is random depends on `seed` and on the view, such as the number of the epoch.
    """

    source: Source
    preprocess: Preprocessing
    device: Device
    transform: Transform | None = None
    seed: int = 0

    def batches(
        self, batch_size: Sizes, *, order: Tensor | None = None, view: int = 0
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield model input, float `(N, 3, S, S)`, and targets of each batch, on the device, read one batch ahead."""
        for images, targets in self.device.batches(self.read(batch_size, order=order, view=view)):
            yield self.prepare(images), targets

    def read(
        self, batch_size: Sizes, *, order: Tensor | None = None, view: int | None = 0
    ) -> Generator[tuple[Images, Tensor], None, None]:
        """Yield the images that `prepare` makes model input of, on the device if they are augmented, and host targets.

        `order` are places of the images in the source, int64; None reads them as they lie. With None as view, data that
        draws random numbers raises `CacheError`. Preprocessed images of another size or normalization than the weights
        expect, or that are to be augmented, are an `ImageError`.
        """
        if order is not None and not len(order):
            return
        seed = None if view is None else derive_seed(self.seed, "data", view)
        for images, targets, places in self.source.batches(
            batch_size, seed=seed, order=order, preprocess=self.preprocess
        ):
            preprocessed = isinstance(images, Tensor) and images.is_floating_point()
            if isinstance(images, Tensor) and preprocessed:  # while they are on the host
                check_image_size(images, self.preprocess.image_size)
                check_normalized(images, self.preprocess)
            if self.transform is None or view is None:
                yield images, targets
            elif preprocessed:
                raise ImageError(
                    "augment works on raw images, but these are preprocessed (float): pass uint8 images, or "
                    "augment=None."
                )
            else:
                raw = self.preprocess.resize(self.device.move(images))
                yield augment_batch(self.transform, raw, places, seed=self.seed, epoch=view), targets

    def prepare(self, images: Images) -> Tensor:
        """Return model input, float `(N, 3, S, S)`, on the device."""
        images = self.device.move(images)
        if isinstance(images, Tensor) and images.is_floating_point():
            return images
        if self.transform is None or isinstance(images, list):
            images = self.preprocess.resize(images)  # augmented images have been resized: once more may change them
        return self.preprocess.normalize(images)
