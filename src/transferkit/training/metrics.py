"""Figures over many batches, added up on the device."""

import math

import torch
from torch import Tensor

from transferkit.data.targets import class_indices


class Sums:
    """Loss and hits of many batches, added up on the device and read once."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.count = 0

    def add(self, loss: Tensor, correct: Tensor, count: int) -> None:
        """Add a batch: mean loss, number of hits, number of images."""
        self.loss += loss * count
        self.correct += correct
        self.count += count

    def clear(self) -> None:
        """Begin anew."""
        self.loss.zero_()
        self.correct.zero_()
        self.count = 0

    def means(self) -> tuple[float, float]:
        """Return mean loss and accuracy (0 to 1); NaN if nothing was added."""
        if self.count == 0:  # every step was left out
            return math.nan, math.nan
        return self.loss.item() / self.count, self.correct.item() / self.count  # host sync: once an epoch


def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Return how many images have their largest logit at their target, int64 `()`, on the device."""
    return (logits.detach().argmax(dim=1) == class_indices(targets)).sum()
