"""A network in eval mode over a whole source of data."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from transferkit.device import Device
from transferkit.step import CrossEntropy, Sums, count_correct, evaluation_step


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
    """Return mean cross-entropy, unsmoothed and unweighted, and accuracy, 0 to 1.

    Args:
        network: In eval mode: a whole model, or its suffix.
        batches: What the network takes, and targets, on the device.
        device: Number format.
    """
    sums = Sums(device.torch_device)
    plain = CrossEntropy()
    for inputs, targets in batches:
        logits = evaluation_step(network, inputs, device=device)
        sums.add(plain.sum(logits, targets) / len(targets), count_correct(logits, targets), len(targets))
    return sums.means()
