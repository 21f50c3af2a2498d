"""Hold some of the training data back to validate on."""

from collections.abc import Iterator

import torch
from torch import Tensor

from transferkit.arguments import share
from transferkit.data import Batch, Source, count_batches
from transferkit.errors import ArgumentError, EmptyDataError
from transferkit.randomness import derive_seed, shuffled


class Part:
    """Some images of a source, by their places in it; the data is not copied.

    Attributes:
        source: The whole.
        places: Which images, int64 `(num_images,)`.
    """

    def __init__(self, source: Source, places: Tensor) -> None:
        self.source = source
        self.places = places
        self.num_images = len(places)

    def num_batches(self, batch_size: int) -> int:
        return count_batches(self.num_images, batch_size)

    def batches(self, batch_size: int, *, seed: int, order: Tensor | None) -> Iterator[Batch]:
        places = self.places if order is None else self.places[order]
        return self.source.batches(batch_size, seed=seed, order=places)

    def why_not_repeatable(self, places: Tensor | None = None) -> str | None:
        return self.source.why_not_repeatable(self.places if places is None else self.places[places])

    def all_targets(self, places: Tensor | None = None) -> Tensor:
        return self.source.all_targets(self.places if places is None else self.places[places])

    def digest(self, places: Tensor | None = None) -> str:
        return self.source.digest(self.places if places is None else self.places[places])


def split_validation(source: Source, validation_split: float, seed: int) -> tuple[Part, Part]:
    """Divide data into a part to train on and a part to validate on, at random by `seed`.

    Raises:
        ArgumentError: The share is not between 0 and 1, or the data is a `DataLoader`.
        EmptyDataError: One of the parts would be empty.
    """
    if share("validation_split", validation_split) == 0:
        raise ArgumentError("validation_split=0 holds nothing back: expected a share above 0, e.g. 0.2, or None.")
    if source.num_images is None:
        raise ArgumentError(
            "validation_split cannot divide a DataLoader, which makes its own batches: pass (images, targets), a "
            "Dataset, or validation_data= instead."
        )
    count = round(source.num_images * validation_split)
    if count in (0, source.num_images):
        raise EmptyDataError(
            f"validation_split={validation_split} of {source.num_images} images leaves {source.num_images - count} to "
            f"train and {count} to validate: expected at least 1 each."
        )
    order = shuffled(source.num_images, derive_seed(seed, "validation"))
    return Part(source, torch.sort(order[count:]).values), Part(source, torch.sort(order[:count]).values)
