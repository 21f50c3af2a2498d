"""A network in eval mode over a whole source of data: figures, probabilities, and what an assessment is made of."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from transferkit.analysis.unknown import learn_known as learn_features
from transferkit.base.arguments import fraction, one_of
from transferkit.base.display import QUIET
from transferkit.base.processes import broadcast, check_same, gather, part_of, together, total, world_size
from transferkit.base.surroundings import own_surroundings
from transferkit.data.inputs import Inputs
from transferkit.data.open import open_data
from transferkit.data.selection import without_bad_images
from transferkit.data.sources import Source, SubsetSource
from transferkit.data.targets import class_indices
from transferkit.errors import ArgumentError, NonFiniteError
from transferkit.features.chunks import image_digests
from transferkit.features.feed import CACHED_BATCH_SIZE
from transferkit.linear.temperature import fit_temperature
from transferkit.model.head import TransferModel, check_float32, check_head
from transferkit.model.layers import Layers
from transferkit.model.modes import evaluating
from transferkit.results.assessment import Assessment
from transferkit.training.metrics import count_correct, measure, probabilities_of
from transferkit.training.run import check_same_weights, check_shared, choose_batch_size, open_feed
from transferkit.training.step import evaluation_step
from transferkit.training.training import Training

Batches = Iterable[tuple[Tensor, Tensor]]  # what the network takes, and targets, on the device


@contextmanager
def opened(
    training: Training, data: object, batch_size: int | None, num_workers: int, *, with_targets: bool = True
) -> Iterator[tuple[nn.Module, Batches]]:
    """Put a model into eval mode and yield a network and its batches: all of the model, and a user's images.

    The validation data of the current run are read from its features, by what follows the frozen layers. Of several
    processes, each gets its part.
    """
    model, run = training.model, None if training.progress is None else training.progress.run
    with together("a pass over images"), evaluating(model), own_surroundings():
        check_float32(model, trains=False)
        check_head(model)
        training.let_optimizer("eval")
        network: nn.Module = model
        if with_targets and run is not None and run.validation is not None and data is run.validation_data:
            size = choose_batch_size(run.validation.inputs.source, batch_size)
            network, batches = run.validation.open_part(size)
        else:
            labels = {"with_targets": with_targets, "multi_label": model.threshold is not None}
            source = open_data(data, model.classes, num_workers=num_workers, **labels)
            inputs = Inputs(source, model.backbone.preprocess, training.device)
            part = None if world_size() == 1 else _own_part(inputs, model)
            batches = inputs.batches(choose_batch_size(source, batch_size), order=part)
        with closing(batches):
            yield network, batches


def _own_part(inputs: Inputs, model: TransferModel) -> Tensor:
    """Return the places of the images that this process looks at, after comparing data and weights with the others."""
    count = check_shared(inputs.source, "a pass over images")
    with closing(inputs.read(2, order=torch.tensor([0, count - 1]))) as read:
        check_same({"images": count, "first and last image": image_digests(next(read)[0])}, "a pass over images")
    check_same_weights(model, "a pass over images")
    return torch.arange(count)[part_of(count)]


def evaluate(network: nn.Module, batches: Batches, *, training: Training) -> dict[str, float]:
    """Return loss, accuracy (0 to 1) and the trainer's metrics; they do not depend on the batches' sizes.

    The network is in eval mode: a whole model, or what follows its frozen layers. The loss is without smoothing and
    weights. If it is NaN for an image, that is a `NonFiniteError`.
    """
    threshold, correct = training.model.threshold, torch.zeros((), dtype=torch.float64)
    losses, outputs = [], []
    for inputs, targets in batches:
        logits = evaluation_step(network, inputs, device=training.device) / training.model.temperature
        losses.append((training.loss.each(logits, targets),))
        correct = correct.to(logits.device) + count_correct(logits, targets, threshold)
        if training.metrics:
            outputs.append((logits, targets))
    every = _whole(losses, "losses")[0].cpu().double()  # host sync: once an epoch
    if bool((wrong := every.isnan()).any()):
        raise _nonfinite(int(wrong.nonzero()[0]))
    figures = {"loss": every.mean().item(), "accuracy": total(correct.item(), "right answers") / len(every)}
    if training.metrics and world_size() > 1:
        logits, targets = _whole(outputs, "logits", "targets")
        outputs = [(logits, targets)]
    return figures | measure(training.metrics, outputs, threshold)


def validate(training: Training, source: Source) -> dict[str, float]:
    """Return loss and accuracy of labeled images, over cached features where that is safe."""
    feed = open_feed(training, source, "validation")
    with together("validation"), evaluating(training.model), training.interrupts:
        network, batches = feed.open_part(CACHED_BATCH_SIZE)
        with closing(batches):
            return evaluate(network, batches, training=training)


def predict_proba(
    training: Training, images: object, batch_size: int | None, num_workers: int, *, on_bad_image: str = "raise"
) -> npt.NDArray[np.float32]:
    """Return the probability of each class for every image, float32 `(N, K)`; see `Trainer.predict_proba`."""
    model = training.model
    if one_of("on_bad_image", on_bad_image, ("raise", "nan")) == "nan":
        labels = {"with_targets": False, "multi_label": model.threshold is not None}
        source = open_data(images, model.classes, num_workers=num_workers, skip=True, **labels)
        images = without_bad_images(source, 1.0, display=QUIET)
        if isinstance(images, SubsetSource):
            found = np.full((source.num_images or 0, len(model.classes)), np.nan, np.float32)
            found[images.indices.numpy()] = predict_proba(training, images, batch_size, num_workers)
            return found
    with opened(training, images, batch_size, num_workers, with_targets=False) as (network, batches):
        logits, _ = logits_of(network, batches, training=training)
        return _finite_probabilities(logits, model)


def predict_known(
    training: Training, images: object, batch_size: int | None, num_workers: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return what `predict_proba` does, and the novelty of each image, float32 `(N,)`; see `Trainer.novelty`."""
    with opened(training, images, batch_size, num_workers, with_targets=False) as (network, batches):
        if training.model.novelty is None:
            raise ArgumentError(
                "the model has not learned which images are known: call trainer.learn_known(training_images) first, "
                "after training."
            )
        logits, _, novelty = _outputs_of(network, batches, training)
        return _finite_probabilities(logits, training.model), cast("Tensor", novelty).cpu().numpy()


def predict_classes(
    training: Training, images: object, batch_size: int | None, num_workers: int, *, unknown: str | None
) -> list[str] | list[list[str]]:
    """Return the name of each image's class, or those of its labels; see `Trainer.predict_classes`."""
    names, threshold = training.model.classes, training.model.threshold
    if unknown is not None:
        probabilities, novelty = predict_known(training, images, batch_size, num_workers)
        found = np.where(novelty > 0, 0, 1 + probabilities.argmax(axis=1))
        return [[unknown, *names][index] for index in found]
    probabilities = predict_proba(training, images, batch_size, num_workers)
    if threshold is not None:
        return [[name for name, has in zip(names, row >= threshold, strict=True) if has] for row in probabilities]
    return [names[index] for index in probabilities.argmax(axis=1)]


def calibrate(training: Training, data: object, batch_size: int | None, num_workers: int) -> float:
    """Fit a model's temperature to labeled images, and return it; see `Trainer.calibrate`."""
    with training.alone("calibrate"), opened(training, data, batch_size, num_workers) as (network, batches):
        found = fit_temperature(*logits_of(network, batches, training=training), training.loss)
        training.model.temperature = broadcast(found, "the temperature")
    return training.model.temperature


def learn_known(
    training: Training,
    data: object,
    validation_data: object,
    batch_size: int | None,
    num_workers: int,
    *,
    rejected: float,
) -> float:
    """Let a model learn which images are known, and return the threshold; see `Trainer.learn_known`."""
    model = training.model
    if model.threshold is not None:
        raise ArgumentError("learn_known needs images with one label each, but here they may have several.")
    share = fraction("rejected", rejected)
    with training.alone("learn_known"):
        given = []
        for each in (data, validation_data):
            if each is not None:
                with opened(training, each, batch_size, num_workers) as (network, batches):
                    given.append(head_inputs(network, batches, training=training))
        kinds = [part.stop - part.start for part in model.columns] or None
        held_out = given[1][0] if len(given) > 1 else None
        features, targets = given[0][0], class_indices(given[0][1])
        known = learn_features(features, targets, rejected=share, held_out=held_out, kinds=kinds, seed=training.seed)
        known = broadcast(known, "which images are known")
        model.novelty = known.to(training.device.torch_device).eval()
    return float(known.threshold)


def assess(network: nn.Module, batches: Batches, *, training: Training) -> Assessment:
    """Return what a network in eval mode makes of every image; a number that is not finite is a `NonFiniteError`."""
    model = training.model
    logits, targets, novelty = _outputs_of(network, batches, training)
    probabilities = _finite_probabilities(logits, model)
    logits = logits / model.temperature
    true = class_indices(targets) if model.threshold is None else targets >= 0.5
    return Assessment(
        probabilities,
        training.loss.each(logits, targets).cpu().numpy(),
        true.cpu().numpy(),
        model.classes,
        model.threshold,
        measure(training.metrics, [(logits, targets)], model.threshold),
        model.temperature,
        None if novelty is None else novelty.cpu().numpy(),
    )


def logits_of(network: nn.Module, batches: Batches, *, training: Training) -> tuple[Tensor, Tensor]:
    """Return the logits of every image, float32 `(N, K)`, not divided by the temperature, and the targets."""
    outputs = [(evaluation_step(network, inputs, device=training.device), targets) for inputs, targets in batches]
    logits, targets = _whole(outputs, "logits", "targets")
    return logits, targets


def head_inputs(network: nn.Module, batches: Batches, *, training: Training) -> tuple[Tensor, Tensor]:
    """Return what the head takes of every image, float32 `(N, D)`, and the targets, both on the CPU."""
    before = _without_head(network)
    outputs = [
        (evaluation_step(before, inputs, device=training.device).flatten(1).cpu(), targets.cpu())
        for inputs, targets in batches
    ]
    features, targets = _whole(outputs, "features", "targets")
    return features, targets


def _outputs_of(network: nn.Module, batches: Batches, training: Training) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what `logits_of` does, and the novelty of each image, float32 `(N,)`; None if it was not learned."""
    before, model, outputs = _without_head(network), training.model, []
    if model.novelty is None:
        return *logits_of(network, batches, training=training), None
    for inputs, targets in batches:
        features = evaluation_step(before, inputs, device=training.device)
        with torch.inference_mode():
            novelty = model.novelty(features)
        outputs.append((evaluation_step(model.head, features, device=training.device), targets, novelty))
    logits, known, novelty = _whole(outputs, "logits", "targets", "novelty")
    return logits, known, novelty


def _whole(outputs: Sequence[tuple[Tensor, ...]], *names: str) -> list[Tensor]:
    """Return what all batches gave, those of other processes included, in the order of the images."""
    columns = zip(*outputs, strict=True) if outputs else [None] * len(names)
    return [gather(None if own is None else torch.cat(own), name) for own, name in zip(columns, names, strict=True)]


def _without_head(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what a network does before its head: a whole model, or what follows its frozen layers."""
    if isinstance(network, TransferModel):
        return partial(network.backbone, pools=network.pools) if network.pools else network.backbone
    return cast("Layers", network)[:-1]


def _finite_probabilities(logits: Tensor, model: TransferModel) -> npt.NDArray[np.float32]:
    probabilities = probabilities_of(logits / model.temperature, model.threshold).cpu()
    if bool((wrong := probabilities.isnan().any(dim=1)).any()):
        raise _nonfinite(int(wrong.nonzero()[0]))
    return probabilities.numpy()


def _nonfinite(image: int) -> NonFiniteError:
    return NonFiniteError(
        f"the logits of image {image} are infinite or NaN: expected finite images and weights. Look at that image and "
        "at the weights."
    )
