"""A network in eval mode over a whole source of data."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from transferkit.compute.device import Device
from transferkit.data.targets import class_indices
from transferkit.errors import NonFiniteError
from transferkit.results.assessment import Assessment
from transferkit.training.metrics import count_correct
from transferkit.training.step import evaluation_step


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and back afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def evaluate(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: Device) -> tuple[float, float]:
    """Return mean cross-entropy, unsmoothed and unweighted, and accuracy, 0 to 1; the batches' sizes do not matter.

    Args:
        network: In eval mode: a whole model, or its suffix.
        batches: What the network takes, and targets, on the device.
        device: Number format.
    """
    losses, correct = [], torch.zeros((), dtype=torch.int64, device=device.torch_device)
    for inputs, targets in batches:
        logits = evaluation_step(network, inputs, device=device)
        losses.append(functional.cross_entropy(logits, targets, reduction="none"))
        correct += count_correct(logits, targets)
    every = torch.cat(losses).cpu().double()  # host sync: once an epoch
    return every.mean().item(), correct.item() / len(every)


def predict_proba(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: Device
) -> npt.NDArray[np.float32]:
    """Return the probability of each class for every image, float32 `(N, K)`.

    Raises:
        NonFiniteError: The network makes infinity or NaN of an image.
    """
    logits = [evaluation_step(network, inputs, device=device) for inputs, _ in batches]
    return _probabilities(torch.cat(logits))


def assess(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], classes: Sequence[str], *, device: Device
) -> Assessment:
    """Return what a network in eval mode makes of every image.

    Raises:
        NonFiniteError: The network makes infinity or NaN of an image.
    """
    pairs = [(evaluation_step(network, inputs, device=device), targets) for inputs, targets in batches]
    logits, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    losses = functional.cross_entropy(logits, targets, reduction="none")
    indices = class_indices(targets).cpu().numpy()
    return Assessment(_probabilities(logits), losses.cpu().numpy(), indices, tuple(classes))


def _probabilities(logits: Tensor) -> npt.NDArray[np.float32]:
    probabilities = logits.softmax(dim=1).cpu()
    if bool((wrong := probabilities.isnan().any(dim=1)).any()):
        raise NonFiniteError(
            f"the logits of image {int(wrong.nonzero()[0])} are infinite or NaN: expected finite images and weights. "
            "Look at that image and at the weights."
        )
    result: npt.NDArray[np.float32] = probabilities.numpy()
    return result
