"""What one call of `fit` or `steps` works with, checked before its first step."""

from dataclasses import dataclass

from transferkit.arguments import whole_number
from transferkit.augmentation import Augment, Transform, build_augmentation
from transferkit.data import Source, open_data
from transferkit.errors import ArgumentError, NothingToTrainError
from transferkit.head import TransferModel

BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Run:
    """The training data of a call, opened, and how much of it there is.

    Attributes:
        source: The data.
        batch_size: Images in a batch.
        transform: Random change of one raw image, or None.
        num_batches: Batches in an epoch; None where a `DataLoader` does not tell.
        num_steps: Steps in the whole run; None likewise.
    """

    source: Source
    batch_size: int
    transform: Transform | None
    num_batches: int | None
    num_steps: int | None


def open_run(
    model: TransferModel,
    data: object,
    *,
    epochs: int,
    batch_size: int | None,
    augment: Augment | None,
    num_workers: int,
) -> Run:
    """Check the arguments of a call and open its data.

    Raises:
        NothingToTrainError: Everything is frozen.
        TransferKitError: Another argument, or the data, cannot be used.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise NothingToTrainError(
            "nothing to train: every parameter is frozen. freeze_until(model, 'head') trains the head alone."
        )
    whole_number("epochs", epochs)
    source = open_data(data, model.classes, num_workers=num_workers)
    size = choose_batch_size(source, batch_size)
    num_batches = source.num_batches(size)
    transform = None if augment is None else build_augmentation(augment, model.backbone.image_size)
    return Run(source, size, transform, num_batches, None if num_batches is None else epochs * num_batches)


def choose_batch_size(source: Source, batch_size: int | None) -> int:
    """Return the batch size asked for, or the usual one.

    Raises:
        ArgumentError: Not a whole number of 1 or more, or asked of a `DataLoader`.
    """
    if batch_size is not None and source.num_images is None:
        raise ArgumentError(
            f"batch_size={batch_size} does not reach a DataLoader, which makes its own batches: leave it out."
        )
    return BATCH_SIZE if batch_size is None else whole_number("batch_size", batch_size)
