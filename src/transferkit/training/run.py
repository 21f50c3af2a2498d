"""What one call of `fit`, `steps` or `lr_find` works with, checked before its first step."""

import math
import warnings
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, default_collate

from transferkit.base.arguments import whole_number
from transferkit.base.arrays import raw_bytes
from transferkit.base.display import QUIET, Display
from transferkit.base.processes import check_same, part_of, total, world_size
from transferkit.data.augmentation import Augment, build_augmentation
from transferkit.data.classes import learn_names
from transferkit.data.inputs import Inputs
from transferkit.data.open import open_data
from transferkit.data.selection import bad_image_limit, without_bad_images
from transferkit.data.sources import Source, count_batches
from transferkit.errors import ArgumentError, NothingToTrainError, ProcessError
from transferkit.features.chunks import CachedFeatures
from transferkit.features.feed import Batches, Feed
from transferkit.model.freezing import freeze_statistics, stays_in_eval, trainable_state
from transferkit.model.head import Standardize
from transferkit.training.loss import Loss
from transferkit.training.optimizers import has_scheduler, hold_parameters, take_rates
from transferkit.training.schedules import SCHEDULES, Schedule
from transferkit.training.training import Part, Training

Parts = Generator[Part, None, None]

BATCH_SIZE = 32

HIGH_LR: dict[type[Optimizer], float] = {torch.optim.SGD: 0.03} | dict.fromkeys(
    (torch.optim.Adam, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop), 1e-3
)
"""Learning rates from which on pretrained layers lose what they know within a few steps."""


@dataclass(frozen=True, slots=True)
class Run:
    """The data of one call, opened, and how much training it asks for."""

    train: Feed  # the training images, as epochs read them
    validation: Feed | None
    loss: Loss  # with everything computed that depends on the training data
    batch_size: int  # images in a batch, over all processes
    num_epochs: int
    num_steps: int | None  # of all epochs; None where a `DataLoader` does not tell
    schedule: Schedule  # the trainer's; for `"auto"` what that stands for in this run
    validation_data: object  # as the user passed it
    restore_best: bool  # whether the weights of the best epoch come back at the end

    @property
    def source(self) -> Source:
        """The training data."""
        return self.train.inputs.source

    @property
    def feeds(self) -> list[Feed]:
        """That of the training images, and that of the validation images if there are any."""
        return [self.train] if self.validation is None else [self.train, self.validation]

    @property
    def fill_s(self) -> float:
        """Seconds spent on features so far."""
        return sum(feed.fill_s for feed in self.feeds)

    def open_parts(self, *, order: Tensor | None, epoch: int) -> tuple[nn.Module, Parts]:
        """Return the network and, for one epoch, this process's part of each batch; see `Feed.open`."""
        if order is None or world_size() == 1:
            network, batches = self.train.open(self.batch_size, order=order, epoch=epoch)
            return network, self._whole(batches)
        whole = torch.split(order, self.batch_size)
        own = [batch[part_of(len(batch))] for batch in whole]
        sizes = [len(part) for part in own if len(part)]
        network, batches = self.train.open(sizes, order=torch.cat(own), epoch=epoch)
        return network, self._parts(batches, own, [len(batch) for batch in whole])

    def _whole(self, batches: Batches) -> Parts:
        with closing(batches):
            for inputs, targets in batches:
                yield Part(inputs, targets, len(targets), self.loss.total_weight(targets))

    def _parts(self, batches: Batches, own: Sequence[Tensor], counts: Sequence[int]) -> Parts:
        device = self.train.inputs.device.torch_device
        nothing = torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device)
        if self.loss.threshold is not None:
            nothing = nothing[0], torch.empty(0, len(self.train.model.classes), device=device)
        with closing(batches):
            for part, count in zip(own, counts, strict=True):
                inputs, targets = next(batches) if len(part) else nothing
                weight = float(self.loss.total_weight(targets))  # host sync where classes have weights
                whole = total(weight if math.isfinite(weight) else 0.0, "the weight of a batch")
                yield Part(inputs, targets, count, whole or math.inf)


def open_source(
    training: Training, data: object, num_workers: int, on_bad_image: str | float = "raise", display: Display = QUIET
) -> Source:
    """Open labeled data, without the images that cannot be used if those are to be skipped."""
    limit, model = bad_image_limit(on_bad_image), training.model
    labels = {"multi_label": model.threshold is not None, "skip": limit is not None}
    source = open_data(data, model.classes, num_workers=num_workers, **labels)
    if limit is None:
        return source
    return without_bad_images(source, limit, display=display, check=training.interrupts.check)


def open_held_out(
    training: Training, data: object, num_workers: int, on_bad_image: str | float, display: Display
) -> Source | None:
    """Open validation data if there is some; a `DataLoader` that only reads it is passed over, to cache features."""
    if data is None:
        return None
    return open_source(training, *without_loader(data, num_workers), on_bad_image, display)


def open_feed(
    training: Training,
    source: Source,
    what: str = "training",
    *,
    augment: Augment | None = None,
    n_views: int | None = None,
    display: Display = QUIET,
) -> Feed:
    """Return what reads images for a model, from its cached features where that is safe; `what` is as in `Feed`."""
    preprocess = training.model.backbone.preprocess
    seed = training.seed if what == "training" else 0  # data that is random itself is validated as it is evaluated
    transform = None if augment is None else build_augmentation(augment, preprocess.image_size)
    return Feed(
        inputs=Inputs(source, preprocess, training.device, transform, seed),
        model=training.model,
        cache=training.features,
        mode=training.cache_mode,
        num_views=None if n_views is None else whole_number("n_views", n_views),
        what=what,
        display=display,
    )


def features_of(training: Training, source: Source, display: Display) -> CachedFeatures:
    """Return the features of every image; a `CacheError` where they cannot be cached."""
    with training.alone("features"), training.interrupts:
        check_same_data(source, training.model, "features")
        return open_feed(training, source, display=display).features()


def open_run(
    training: Training,
    train: Feed,
    validation: Feed | None = None,
    *,
    epochs: int,
    batch_size: int | None,
    validation_data: object = None,
    restore_best: bool = True,
) -> Run:
    """Check the data of a call against model, loss and schedule before a weight changes.

    One of the validation images is read now: data that cannot be used would cost an epoch later.
    """
    epochs = whole_number("epochs", epochs)
    follow_model(training, train.display)
    take_rates(training.optimizer)
    source = train.inputs.source
    size = choose_batch_size(source, batch_size)
    num_batches = count_batches(source, size)
    num_steps = None if num_batches is None else epochs * num_batches
    if validation is not None:
        next(validation.inputs.batches(1))
    loss = training.loss.for_run(source, len(training.model.classes), training.device.torch_device)
    schedule = training.schedule
    if schedule is SCHEDULES["auto"] and (num_steps is None or has_scheduler(training.optimizer)):
        schedule = SCHEDULES["constant"]
    restore_best = restore_best and validation is not None
    return Run(train, validation, loss, size, epochs, num_steps, schedule, validation_data, restore_best)


@contextmanager
def naming(training: Training, data: object) -> Iterator[None]:
    """Give a head without class names those of its training data, and take them back if no step is made."""
    model, step = training.model, training.global_step
    before, names = model.classes, learn_names(data, model.classes)
    measured = any(int(part.num_images) for part in model.head.modules() if isinstance(part, Standardize))
    if not (step or measured) or {*names} != {*before}:  # trained by its numbers, it keeps their order
        model.classes = names
    try:
        yield
    except BaseException:
        if training.global_step == step:
            model.classes = before
        raise


def follow_model(training: Training, display: Display) -> None:
    """Let everything follow a model whose layers were replaced, added, converted or frozen since the last epoch.

    Parameters that train and that the optimizer does not hold are an `ArgumentError`.
    """
    training.device.prepare(training.model)
    hold_parameters(training.optimizer, training.model)
    if names := freeze_statistics(training.model):
        display.say(f"batch norm whose parameters are frozen keeps its statistics, too: {', '.join(names)}")
    for name, module in training.model.named_modules() if world_size() > 1 else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not stays_in_eval(module):
            raise ProcessError(
                f"{name} ({type(module).__name__}) trains, and would normalise by the part of a batch that each of "
                f"{world_size()} processes has: the result would depend on their number. Freeze it, or start one "
                "process."
            )


def warn_of_high_lr(training: Training) -> None:
    """Warn, once for a trainer, where pretrained layers train at a learning rate that makes them forget."""
    trainable = {id(parameter) for parameter in training.model.backbone.parameters() if parameter.requires_grad}
    groups = [group for group in training.optimizer.param_groups if trainable & set(map(id, group["params"]))]
    limit = next((limit for kind, limit in HIGH_LR.items() if isinstance(training.optimizer, kind)), math.inf)
    rate = max((group.get("base_lr", 0.0) for group in groups), default=0.0)
    if training.pretrained and rate >= limit:
        training.pretrained = False
        warnings.warn(
            f"pretrained layers train at a learning rate of {rate:g}, at which they may lose within a few steps what "
            "they have learned. freeze_until(model, 'head') trains the head alone. To train them, too, give them a "
            f"lower rate: lr={{'head': {limit:g}, 'backbone': {limit / 10:g}}}, or in an optimizer of your own a group "
            f"of parameters with lr={limit / 10:g}.",
            stacklevel=3,
        )


def check_trains(model: nn.Module, run: Run) -> None:
    """Refuse a model of which nothing trains, and one whose batch norm over vectors would train on one image."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise NothingToTrainError(
            "nothing to train: every parameter is frozen. freeze_until(model, 'head') trains the head alone."
        )
    needs_two = any(
        isinstance(module, nn.BatchNorm1d) and any(parameter.requires_grad for parameter in module.parameters())
        for module in model.modules()
    )
    size, num_images = run.batch_size, run.source.num_images
    if needs_two and num_images is not None and (size == 1 or num_images % size == 1):  # not at the end of an epoch
        other = next(other for other in range(size + 1, num_images + 2) if num_images % other != 1)
        raise ArgumentError(
            f"batch_size={size} leaves a batch of 1 image of {num_images}, and the head's batch norm needs 2 or "
            f"more to train: choose another batch_size, such as {other}."
        )


def choose_batch_size(source: Source, batch_size: int | None) -> int:
    """Return the batch size asked for, or 32; `ArgumentError` if it is none, or the data is a `DataLoader`."""
    if batch_size is not None and source.num_images is None:
        raise ArgumentError(
            f"batch_size={batch_size} has no effect on a DataLoader, which makes its own batches: leave it out."
        )
    return BATCH_SIZE if batch_size is None else whole_number("batch_size", batch_size)


def check_same_weights(model: nn.Module, what: str) -> None:
    """Refuse, with `ProcessError`, processes whose weights differ; costs a checksum of what trains."""
    if world_size() > 1:
        trainable = trainable_state(model).items()
        check_same({name: zlib.crc32(raw_bytes(value.detach())) for name, value in trainable}, f"the weights in {what}")


def check_same_data(source: Source, model: nn.Module, what: str, **facts: object) -> None:
    """Refuse, with `ProcessError`, processes that were given other data, weights or arguments than the first."""
    if world_size() > 1:
        check_same({"images": check_shared(source, what), "data": source.digest(), **facts}, what)
        check_same_weights(model, what)


def check_shared(source: Source, what: str) -> int:
    """Return how many images several processes share; a `DataLoader` is a `ProcessError`."""
    if source.num_images is None:
        raise ProcessError(
            f"{what}: a DataLoader makes its own batches, which {world_size()} processes cannot share. Pass its data "
            "set itself, loader.dataset."
        )
    return source.num_images


def without_loader(data: object, num_workers: int) -> tuple[object, int]:
    """Return the data set and workers of a `DataLoader` that only reads it in order: its features can be cached."""
    if (
        isinstance(data, DataLoader)
        and type(data.sampler) is SequentialSampler
        and type(data.batch_sampler) is BatchSampler
        and data.collate_fn is default_collate
        and not data.drop_last
    ):
        return data.dataset, data.num_workers
    return data, num_workers
