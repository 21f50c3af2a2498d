"""A network in eval mode over a whole source of data."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from transferkit.base.processes import gather, total, world_size
from transferkit.data.targets import class_indices
from transferkit.errors import NonFiniteError
from transferkit.model.head import TransferModel
from transferkit.model.layers import Layers
from transferkit.results.assessment import Assessment
from transferkit.training.loss import Loss
from transferkit.training.metrics import count_correct, measure, probabilities_of
from transferkit.training.step import evaluation_step
from transferkit.training.training import Training

Batches = Iterable[tuple[Tensor, Tensor]]
"""What the network takes, and targets, on the device."""


def evaluate(network: nn.Module, batches: Batches, *, training: Training, loss: Loss) -> dict[str, float]:
    """Return loss, accuracy (0 to 1) and the trainer's metrics; they do not depend on the batches' sizes.

    Args:
        network: In eval mode: a whole model, or what follows its frozen layers.
        batches: What the network takes, and targets.
        training: Its device and metrics are used.
        loss: Taken without smoothing and weights.
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
        NonFiniteError: When the network makes infinity or NaN of an image.
    """
    logits, _ = logits_of(network, batches, training=training)
    return _finite_probabilities(logits / training.model.temperature, training.model.threshold)


def assess(network: nn.Module, batches: Batches, *, training: Training, loss: Loss) -> Assessment:
    """Return what a network in eval mode makes of every image; the arguments are those of `evaluate`.

    Raises:
        NonFiniteError: When the network makes infinity or NaN of an image.
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
    """Return what `logits_of` does, and the novelty of each image, float32 `(N,)`; None if it was not learnt."""
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
