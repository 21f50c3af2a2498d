"""No infinite number and no NaN reaches the weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transferkit.compute.device import Device
from transferkit.errors import NonFiniteError

MIN_SCALE = 1.0
"""A gradient scale of fp16 under this has left no gradient that is finite: it began at 65,536."""


def gradients_are_finite(loss: Tensor, optimizer: Optimizer) -> Tensor:
    """Return whether a loss and all gradients are finite, bool `()`, on the device.

    Reads every gradient once, at memory speed.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None and p.numel()]
    bounds = [loss.detach()]
    if loss.device.type == "cpu":  # 50 GB/s; torch's norms run at 3 there
        bounds += [bound for gradient in gradients for bound in torch.aminmax(_as_it_lies(gradient))]
    elif gradients:
        bounds += torch._foreach_norm(gradients, float("inf"))  # the largest entries, in one kernel
    return torch.stack([bound.float() for bound in bounds]).isfinite().all()  # all of these are NaN where one entry is


def _as_it_lies(gradient: Tensor) -> Tensor:
    """View a channels-last gradient in the order of its memory, in which it is read eight times as fast."""
    channels_last = gradient.ndim == 4 and gradient.is_contiguous(memory_format=torch.channels_last)
    return gradient.permute(0, 2, 3, 1) if channels_last else gradient


class BufferCopies:
    """The buffers that a forward pass in training mode changes (batch norm's statistics), to undo it.

    Args:
        network: Where they are looked for.
    """

    def __init__(self, network: nn.Module) -> None:
        self._copies = [
            (module, name, buffer.clone())
            for module in network.modules()
            if module.training
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def restore(self) -> None:
        """Put them back as they were."""
        with torch.no_grad():
            for module, name, copy in self._copies:
                module.get_buffer(name).copy_(copy)

    def restore_unless(self, finite: Tensor) -> None:
        """Put them back where `finite`, bool `()`, is false, without waiting for it."""
        with torch.no_grad():
            for module, name, copy in self._copies:
                live = module.get_buffer(name)  # not the one from before, if the module assigned another
                live.copy_(torch.where(finite, live, copy))


def find_nonfinite(
    network: nn.Module,
    parts: Sequence[tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    model: nn.Module,
    device: Device,
) -> str:
    """Name the first tensor of a step that is not finite, by making its forward and backward passes once more.

    Args:
        network: As it was in that step.
        parts: What it was given, and targets, in the micro-batches of that step.
        loss_of: Logits and targets to loss.
        model: What `network` is a part of, by whose names tensors are called.
        device: Number format.
    """
    rows = torch.cat([~inputs.flatten(1).isfinite().all(dim=1) for inputs, _ in parts])
    if bool(rows.any()):
        return f"what the network is given for image {int(rows.nonzero()[0])} of the batch"
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not found and not bool(output.isfinite().all()):
                found.append(f"the output of {name} ({type(module).__name__})")

        return hook

    own = set(network.modules())
    leaves = [(n, m) for n, m in model.named_modules() if m in own and not list(m.children())]
    buffers = BufferCopies(network)
    hooks = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        for inputs, targets in parts:
            with device.autocast():
                loss = loss_of(network(inputs), targets)
            if not found and not bool(loss.isfinite()):
                found.append("the loss")
            if found or (first := _first_gradient(loss, model)):
                return found[0] if found else str(first)
    finally:
        for hook in hooks:
            hook.remove()
        buffers.restore()
    return "the sum of a gradient over the batch"


def _first_gradient(loss: Tensor, model: nn.Module) -> str | None:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    for (name, _), gradient in zip(named, gradients, strict=True):
        if gradient is not None and not bool(gradient.isfinite().all()):
            return f"the gradient of {name}"
    return None


def check_scale(device: Device) -> None:
    """Refuse a gradient scale that has collapsed. Host sync; nothing unless in fp16.

    Raises:
        NonFiniteError: So it has.
    """
    if device.scaler.is_enabled() and device.scaler.get_scale() < MIN_SCALE:
        raise NonFiniteError(
            f"the gradient scale of fp16 fell to {device.scaler.get_scale():.3g}: gradients overflow in every step, "
            'and nothing is learnt. Use precision="bf16" or "fp32", or a smaller learning rate.'
        )
