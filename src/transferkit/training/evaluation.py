"""A network in eval mode over a whole source of data."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from transferkit.base.processes import check_same, gather, part_of, together, total, world_size
from transferkit.base.surroundings import own_surroundings
from transferkit.data.inputs import Inputs
from transferkit.data.open import open_data
from transferkit.data.targets import class_indices
from transferkit.errors import ArgumentError, NonFiniteError
from transferkit.features.chunks import image_digests
from transferkit.model.head import TransferModel, check_float32, check_head
from transferkit.model.layers import Layers
from transferkit.model.modes import evaluating
from transferkit.results.assessment import Assessment
from transferkit.training.loss import Loss
from transferkit.training.metrics import count_correct, measure, probabilities_of
from transferkit.training.run import check_same_weights, check_shared, choose_batch_size
from transferkit.training.step import evaluation_step
from transferkit.training.training import Training

Batches = Iterable[tuple[Tensor, Tensor]]
"""What the network takes, and targets, on the device."""


@contextmanager
def ready(training: Training) -> Iterator[None]:
    """Put a model that is fit for use into eval mode, as if no mode of torch had been set outside."""
    with evaluating(training.model), own_surroundings():
        check_float32(training.model, trains=False)
        check_head(training.model)
        training.let_optimizer("eval")
        yield


@contextmanager
def opened(
    training: Training, data: object, batch_size: int | None, num_workers: int, *, with_targets: bool = True
) -> Iterator[Batches]:
    """Put a model into eval mode and yield what it takes of a user's data, and targets, batch by batch.

    Of several processes, each gets its part.
    """
    model = training.model
    with together("a pass over images"), ready(training):
        labels = {"with_targets": with_targets, "multi_label": model.threshold is not None}
        source = open_data(data, model.classes, num_workers=num_workers, **labels)
        inputs = Inputs(source, model.backbone.preprocess, training.device)
        part = None if world_size() == 1 else _own_part(inputs, model)
        with closing(inputs.batches(choose_batch_size(source, batch_size), order=part)) as batches:
            yield batches


def _own_part(inputs: Inputs, model: TransferModel) -> Tensor:
    """Return the places of the images that this process looks at, after comparing data and weights with the others."""
    count = check_shared(inputs.source, "a pass over images")
    with closing(inputs.read(2, order=torch.tensor([0, count - 1]))) as read:
        check_same({"images": count, "first and last image": image_digests(next(read)[0])}, "a pass over images")
    check_same_weights(model, "a pass over images")
    return torch.arange(count)[part_of(count)]


def evaluate(network: nn.Module, batches: Batches, *, training: Training, loss: Loss) -> dict[str, float]:
    """Return loss, accuracy (0 to 1) and the trainer's metrics; they do not depend on the batches' sizes.

    The network is in eval mode: a whole model, or what follows its frozen layers. The loss is without smoothing and
    weights.
    """
    losses, correct, outputs = [], torch.zeros((), dtype=torch.float64), []
    for inputs, targets in batches:
        logits = evaluation_step(network, inputs, device=training.device) / training.model.temperature
        losses.append(loss.each(logits, targets))
        correct = correct.to(logits.device) + count_correct(logits, targets, training.model.threshold)
        if training.metrics:
            outputs.append((logits, targets))
    every = _whole(losses, "losses").cpu().double()  # host sync: once an epoch
    figures = {"loss": every.mean().item(), "accuracy": total(correct.item(), "right answers") / len(every)}
    if training.metrics and world_size() > 1:
        outputs = [(_whole([one for one, _ in outputs], "logits"), _whole([one for _, one in outputs], "targets"))]
    return figures | measure(training.metrics, outputs, training.model.threshold)


def predict_proba(network: nn.Module, batches: Batches, *, training: Training) -> npt.NDArray[np.float32]:
    """Return the probability of each class for every image, float32 `(N, K)`.

    Raises:
        NonFiniteError: When a logit is infinite or NaN.
    """
    logits, _ = logits_of(network, batches, training=training)
    return _finite_probabilities(logits / training.model.temperature, training.model.threshold)


def predict_known(
    network: nn.Module, batches: Batches, *, training: Training
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return what `predict_proba` does, and the novelty of each image, `(N,)`, of a model that has learned it.

    Raises:
        ArgumentError: When it has not.
        NonFiniteError: When a logit is infinite or NaN.
    """
    if training.model.novelty is None:
        raise ArgumentError(
            "the model has not learned which images are known: call trainer.learn_known(training_images) first, "
            "after training."
        )
    logits, _, novelty = outputs_of(network, batches, training=training)
    probabilities = _finite_probabilities(logits / training.model.temperature, training.model.threshold)
    return probabilities, cast("Tensor", novelty).cpu().numpy()


def assess(network: nn.Module, batches: Batches, *, training: Training, loss: Loss) -> Assessment:
    """Return what a network in eval mode makes of every image; the arguments are those of `evaluate`.

    Raises:
        NonFiniteError: When a logit is infinite or NaN.
    """
    logits, targets, novelty = outputs_of(network, batches, training=training)
    logits = logits / training.model.temperature
    probabilities = _finite_probabilities(logits, training.model.threshold)
    true = class_indices(targets) if training.model.threshold is None else targets >= 0.5
    return Assessment(
        probabilities,
        loss.each(logits, targets).cpu().numpy(),
        true.cpu().numpy(),
        training.model.classes,
        training.model.threshold,
        measure(training.metrics, [(logits, targets)], training.model.threshold),
        training.model.temperature,
        None if novelty is None else novelty.cpu().numpy(),
    )


def logits_of(network: nn.Module, batches: Batches, *, training: Training) -> tuple[Tensor, Tensor]:
    """Return the logits of every image, float32 `(N, K)`, not divided by the temperature, and the targets.

    Both are on the device; the arguments are those of `evaluate`.
    """
    outputs = [(evaluation_step(network, inputs, device=training.device), targets) for inputs, targets in batches]
    return _whole([logits for logits, _ in outputs], "logits"), _whole([known for _, known in outputs], "targets")


def _whole(parts: list[Tensor], what: str) -> Tensor:
    """Return the rows of all batches, those of other processes included, in the order of the images."""
    return gather(torch.cat(parts) if parts else None, what)


def outputs_of(network: nn.Module, batches: Batches, *, training: Training) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what `logits_of` does, and the novelty of each image, float32 `(N,)`; None if it was not learned."""
    model = training.model
    if model.novelty is None:
        return *logits_of(network, batches, training=training), None
    before = without_head(network)
    logits, known, scores = [], [], []
    for inputs, targets in batches:
        features = evaluation_step(before, inputs, device=training.device)
        logits.append(evaluation_step(model.head, features, device=training.device))
        known.append(targets)
        with torch.inference_mode():
            scores.append(model.novelty(features))
    return _whole(logits, "logits"), _whole(known, "targets"), _whole(scores, "novelty")


def head_inputs(network: nn.Module, batches: Batches, *, training: Training) -> tuple[Tensor, Tensor]:
    """Return what the head takes of every image, float32 `(N, D)`, and the targets, both on the CPU.

    The arguments are those of `evaluate`.
    """
    before = without_head(network)
    outputs = [
        (evaluation_step(before, inputs, device=training.device).flatten(1).cpu(), targets.cpu())
        for inputs, targets in batches
    ]
    return _whole([features for features, _ in outputs], "features"), _whole([known for _, known in outputs], "targets")


def without_head(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what a network does before its head: a whole model, or what follows its frozen layers."""
    if isinstance(network, TransferModel):
        return partial(network.backbone, pools=network.pools) if network.pools else network.backbone
    return cast("Layers", network)[:-1]


def _finite_probabilities(logits: Tensor, threshold: float | None) -> npt.NDArray[np.float32]:
    probabilities = probabilities_of(logits, threshold).cpu()
    if bool((wrong := probabilities.isnan().any(dim=1)).any()):
        raise NonFiniteError(
            f"the logits of image {int(wrong.nonzero()[0])} are infinite or NaN: expected finite images and weights. "
            "Look at that image and at the weights."
        )
    result: npt.NDArray[np.float32] = probabilities.numpy()
    return result
