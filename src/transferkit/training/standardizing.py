"""The mean and standard deviation by which a head standardizes its features, measured on training images."""

from contextlib import closing

import torch
from torch import Tensor, nn

from transferkit.base.processes import gather, part_of
from transferkit.base.randomness import seeded
from transferkit.compute.out_of_memory import within_memory
from transferkit.data.sources import epoch_order
from transferkit.linear.design import divisors
from transferkit.model.head import Standardize
from transferkit.model.modes import begin_training, modes_kept
from transferkit.training.run import Run
from transferkit.training.step import evaluation_step
from transferkit.training.training import Training

MOST_IMAGES = 2048  # training images that are measured: more hardly move a mean


def measure_features(training: Training, run: Run) -> None:
    """Set the statistics of the head's `Standardize` layers, unless they have some.

    Up to 2,048 training images go through the network, from cached features where there are some. An image whose
    features are not all finite is left out; if there is no other, nothing is set, and the first step says where.
    """
    model = training.model
    layers = [part for part in model.head.modules() if isinstance(part, Standardize)]
    if all(layer.num_images for layer in layers):  # host sync, once a run
        return
    seen: dict[Standardize, list[Tensor]] = {layer: [] for layer in layers}
    handles = [layer.register_forward_pre_hook(lambda part, inputs: seen[part].append(inputs[0])) for layer in layers]
    buffers = {name: value.clone() for name, value in model.named_buffers()}  # batch norm counts what it sees
    order = epoch_order(run.source.num_images, training.seed, training.epoch)
    if order is not None:
        order = order[:MOST_IMAGES][part_of(min(len(order), MOST_IMAGES))]
    try:
        with modes_kept(model), seeded(training.seed, training.device.torch_device):
            begin_training(model)  # batch norm that trains normalizes by each batch, as in the steps that follow
            network, batches = run.train.open(run.batch_size, order=order)
            with closing(batches):
                count = 0
                for inputs, targets in training.interrupts.watched(batches):
                    _look(network, inputs, seen, training)
                    count += len(targets)
                    if count >= MOST_IMAGES:
                        break
    finally:
        for handle in handles:
            handle.remove()
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
    for layer, features in seen.items():
        rows = gather(torch.cat(features).double() if features else None, "features of the head")
        rows = rows[rows.isfinite().all(dim=1)]
        if len(rows):
            kinds = [part.stop - part.start for part in model.columns]
            mean, std = rows.mean(dim=0), rows.std(dim=0, correction=0)
            layer.mean.copy_(mean)
            layer.std.copy_(divisors(mean, std, kinds if sum(kinds) == rows.shape[1] else None))
            layer.num_images.fill_(len(rows))


def _look(network: nn.Module, inputs: Tensor, seen: dict[Standardize, list[Tensor]], training: Training) -> None:
    """Let a batch go through a network, in smaller parts where memory runs out."""
    before = {layer: len(features) for layer, features in seen.items()}

    def run(size: int) -> None:
        for part in torch.split(inputs, size):
            evaluation_step(network, part, device=training.device)

    def undo() -> None:
        for layer, features in seen.items():
            del features[before[layer] :]

    size = training.micro_batch_size or len(inputs)
    within_memory(run, size, device=training.device, what="the head's features", undo=undo)
