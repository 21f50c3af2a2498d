"""A model in eval mode over a whole source of data."""

from collections.abc import Iterator

from torch import Tensor

from transferkit.data import Source
from transferkit.device import Device
from transferkit.head import TransferModel
from transferkit.inputs import model_inputs
from transferkit.step import CrossEntropy, Sums, count_correct, evaluation_step


def compute_logits(
    model: TransferModel, source: Source, batch_size: int, *, device: Device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits, float32 `(N, K)`, and the targets of each batch, on the device; then put the mode back."""
    was_training = model.training
    model.eval()
    try:
        batches = source.batches(batch_size, seed=0, order=None)
        for inputs, targets in model_inputs(batches, model.backbone.preprocess, device=device):
            yield evaluation_step(model, inputs, device=device), targets
    finally:
        model.train(was_training)


def evaluate(model: TransferModel, source: Source, batch_size: int, *, device: Device) -> tuple[float, float]:
    """Return mean cross-entropy, unsmoothed and unweighted, and accuracy, 0 to 1."""
    sums = Sums(device.torch_device)
    plain = CrossEntropy()
    for logits, targets in compute_logits(model, source, batch_size, device=device):
        sums.add(plain.sum(logits, targets) / len(targets), count_correct(logits, targets), len(targets))
    return sums.means()
