"""Activation checkpointing: less memory for a third more arithmetic."""

from typing import cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transferkit.errors import ArgumentError
from transferkit.model.head import TransferModel


class Recomputed(nn.Module):
    """A network that keeps the activations behind its poolings alone, and computes the others again for the gradient.

    It gives the same numbers, dropout included. Batch norm that trains cannot be used: its running statistics would
    move twice in a step.

    Args:
        network: A `TransferModel`, or the suffix of one. Its modules are shared.

    Raises:
        ArgumentError: Batch norm trains in it.

    References:
        Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        check_recomputable(network)
        layers = (
            [*network.backbone.features, network.head]
            if isinstance(network, TransferModel)
            else list(network.children())
        )
        self.segments = nn.ModuleList()
        segment: list[nn.Module] = []
        for layer in layers:
            segment.append(layer)
            if isinstance(layer, nn.MaxPool2d):
                self.segments.append(nn.Sequential(*segment))
                segment = []
        self.last = nn.Sequential(*segment)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits `(N, K)`."""
        for segment in self.segments:
            inputs = cast("Tensor", checkpoint(segment, inputs, use_reentrant=False))
        return cast("Tensor", self.last(inputs))


def check_recomputable(network: nn.Module) -> None:
    """Refuse a network whose batch norm trains.

    Raises:
        ArgumentError: So it does.
    """
    for name, module in network.named_modules():
        moves = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        if moves and any(parameter.requires_grad for parameter in module.parameters()):
            raise ArgumentError(
                f"recompute_activations cannot be used while batch norm trains ({name}): its running statistics would "
                "move twice in a step. Freeze it, take a network without batch norm, or set micro_batch_size instead."
            )
