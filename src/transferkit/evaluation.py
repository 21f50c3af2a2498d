"""A network in eval mode over a whole source of data."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from transferkit.device import Device
from transferkit.step import count_correct, evaluation_step


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
