"""What one call of `fit` or `steps` works with, checked before its first step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import distributed, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, default_collate

from transferkit.base.arguments import whole_number
from transferkit.base.display import QUIET, Display
from transferkit.data.augmentation import Augment, Transform, build_augmentation
from transferkit.data.open import class_names, open_data
from transferkit.data.selection import check_policy, split_validation, without_bad_images
from transferkit.data.sources import Source
from transferkit.errors import ArgumentError, DeviceError, HeadMismatchError, NothingToTrainError
from transferkit.model.head import TransferModel

BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Run:
    """The training data of a call, opened, and how much of it there is.

    Attributes:
        source: The data to train on.
        validation: The data to validate on, or None.
        batch_size: Images in a batch.
        transform: Random change of one raw image, or None.
        num_views: Fixed views of each image that epochs go through in turn, or None.
        num_steps: Steps in the whole run; None where a `DataLoader` does not tell.
    """

    source: Source
    validation: Source | None
    batch_size: int
    transform: Transform | None
    num_views: int | None
    num_steps: int | None


def open_run(
    model: TransferModel,
    data: object,
    *,
    epochs: int,
    batch_size: int | None,
    augment: Augment | None,
    n_views: int | None,
    num_workers: int,
    validation_data: object = None,
    validation_split: float | None = None,
    seed: int = 0,
    on_bad_image: str = "raise",
    display: Display = QUIET,
    check: Callable[[], None] = lambda: None,
) -> Run:
    """Check the arguments of a call and open its data.

    The arguments are those of `Trainer.fit`; `display` shows what is done, and `check` is called while data
    is looked through, to stop.

    Raises:
        TransferKitError: An argument, or the data, cannot be used.
    """
    _check_alone()
    whole_number("epochs", epochs)
    check_policy(on_bad_image)
    if validation_data is not None and validation_split is not None:
        raise ArgumentError("validation_data and validation_split are both given: expected one of them.")
    open_ = partial(open_data, classes=model.classes, on_bad_image=on_bad_image)
    source = open_(data, num_workers=num_workers)
    validation = None
    if validation_data is not None:
        check_same_classes(data, validation_data)
        validation_data, num_workers = _without_loader(validation_data, num_workers)
        validation = open_(validation_data, num_workers=num_workers)
    if on_bad_image == "skip":
        source = without_bad_images(source, display=display, check=check)
        validation = None if validation is None else without_bad_images(validation, display=display, check=check)
    if validation_split is not None:
        source, validation = split_validation(source, validation_split, seed)
    size = choose_batch_size(source, batch_size)
    num_batches = source.num_batches(size)
    transform = None if augment is None else build_augmentation(augment, model.backbone.image_size)
    num_views = None if n_views is None else whole_number("n_views", n_views)
    num_steps = None if num_batches is None else epochs * num_batches
    return Run(source, validation, size, transform, num_views, num_steps)


def check_trains(model: TransferModel, run: Run) -> None:
    """Refuse a model that cannot train on this data.

    Raises:
        NothingToTrainError: Everything is frozen.
        ArgumentError: A last batch of one image meets batch norm over vectors.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise NothingToTrainError(
            "nothing to train: every parameter is frozen. freeze_until(model, 'head') trains the head alone."
        )
    _check_last_batch(model, run.source.num_images, run.batch_size)


def check_same_classes(data: object, validation_data: object) -> None:
    """Refuse two data sets whose folders are called differently.

    Raises:
        HeadMismatchError: So they are.
    """
    names, others = class_names(data), class_names(validation_data)
    if names is not None and others is not None and names != others:
        raise HeadMismatchError(
            f"the data to train on has {len(names)} classes ({', '.join(names[:8])}), the data to validate on "
            f"{len(others)} ({', '.join(others[:8])}), at most 8 listed: class indices would not mean the same. "
            "Expected the same folders in both; an empty one serves."
        )


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


def _check_alone() -> None:
    """Refuse several ranks: each would train a model of its own on all of the data."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise DeviceError(
            f"this process is rank {distributed.get_rank()} of {distributed.get_world_size()}, and Trainer trains in "
            "one process: each rank would train a model of its own. Use the model with DistributedDataParallel in your "
            "own loop, with transferkit.Device, or start one process."
        )


def _without_loader(data: object, num_workers: int) -> tuple[object, int]:
    """Return the data set of a `DataLoader` that only reads it in order: its features can be kept."""
    plain = (
        isinstance(data, DataLoader)
        and type(data.sampler) is SequentialSampler
        and type(data.batch_sampler) is BatchSampler
        and data.collate_fn is default_collate
        and not data.drop_last
    )
    return (data.dataset, data.num_workers) if plain else (data, num_workers)  # type: ignore[attr-defined]


def _check_last_batch(model: nn.Module, num_images: int | None, batch_size: int) -> None:
    """Batch norm over vectors cannot train on one image: say so now, not at the end of an epoch."""
    needs_two = any(
        isinstance(module, nn.BatchNorm1d) and any(parameter.requires_grad for parameter in module.parameters())
        for module in model.modules()
    )
    if needs_two and num_images is not None and (batch_size == 1 or num_images % batch_size == 1):
        other = next(size for size in range(batch_size + 1, num_images + 2) if num_images % size != 1)
        raise ArgumentError(
            f"batch_size={batch_size} leaves a batch of 1 image of {num_images}, and the head's batch norm needs 2 or "
            f"more to train: choose another batch_size, such as {other}."
        )
