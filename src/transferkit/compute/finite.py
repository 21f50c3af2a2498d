"""Keep infinite and NaN values out of the weights and the optimizer's state."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transferkit.compute.device import Device, parameters_of
from transferkit.errors import NonFiniteError

SUM = "the sum of a gradient over the batch"
MAX_GRADIENT = 1e15  # the sum of the squares of 100 million such gradients, for clipping, is still finite
MIN_SCALE = 1.0  # of gradients in fp16, which starts at 65,536: below this they overflow in every step


def gradients_are_finite(loss: Tensor, optimizer: Optimizer) -> Tensor:
    """Return whether the loss is finite and no gradient is above `MAX_GRADIENT` or NaN, bool `()`, on the device."""
    gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None and p.numel()]
    bounds = [loss.detach() * 0.0]  # NaN unless it is finite
    if loss.device.type == "cpu":  # aminmax reads 50 GB/s there, torch's norms 3
        bounds += [bound for gradient in gradients for bound in torch.aminmax(_in_memory_order(gradient))]
    elif gradients:
        bounds += torch._foreach_norm(gradients, float("inf"))  # the largest absolute values, in one kernel
    largest = torch.stack([bound.float() for bound in bounds]).abs()  # NaN if an entry is
    return (largest < MAX_GRADIENT).all()


def _in_memory_order(gradient: Tensor) -> Tensor:
    """Return a view of a channels-last gradient in memory order, which reads eight times as fast."""
    channels_last = gradient.ndim == 4 and gradient.is_contiguous(memory_format=torch.channels_last)
    return gradient.permute(0, 2, 3, 1) if channels_last else gradient


class BufferCopies:
    """Copies of the buffers that a forward pass in training mode changes, such as batch norm's statistics."""

    def __init__(self, network: nn.Module) -> None:
        self._copies = [
            (module, name, buffer.clone())
            for module in network.modules()
            if module.training
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def restore(self, *, unless: Tensor | None = None) -> None:
        """Restore the buffers, but not if `unless`, bool `()`, is true; there is no host sync."""
        with torch.no_grad():
            for module, name, copy in self._copies:
                live = module.get_buffer(name)  # looked up again: the module may have assigned another
                live.copy_(copy if unless is None else torch.where(unless, live, copy))


def find_nonfinite(
    network: nn.Module,
    parts: Sequence[tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    model: nn.Module,
    device: Device,
) -> str:
    """Name the first non-finite tensor of a step, by repeating its forward and backward passes with the weights it had.

    `parts` are inputs and targets of its micro-batches; `model`, which contains the network, gives the names.
    """
    bad = [~inputs.flatten(1).isfinite().all(dim=1) for inputs, _ in parts]  # none if other processes have all images
    if bad and bool((rows := torch.cat(bad)).any()):
        return f"the network's input for image {int(rows.nonzero()[0])} of the batch"
    found: list[str] = []
    used = set(network.modules())
    names = {module: name for name, module in model.named_modules() if module in used and not list(module.children())}
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def note(module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and not found and not bool(output.isfinite().all()):
            found.append(f"the output of {names[module]} ({type(module).__name__})")

    buffers, hooks = BufferCopies(network), [module.register_forward_hook(note) for module in names]
    try:
        for inputs, targets in parts:
            with device.autocast():
                loss = loss_of(network(inputs), targets)
            if not found and not bool(loss.isfinite()):
                found.append("the loss")
            if found:
                return found[0]
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None and not bool((gradient.abs() < MAX_GRADIENT).all()):
                    return f"the gradient of {name}"
    finally:
        for hook in hooks:
            hook.remove()
        buffers.restore()
    return SUM


def check_weights(model: nn.Module) -> None:
    """Raise `NonFiniteError` if an epoch's updates left infinity or NaN in what trains. Reads it once; a host sync."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad and value.numel()}
    for path, module in model.named_modules():
        if module.training:
            buffers = module.named_buffers(prefix=path, recurse=False)
            trained |= {name: value for name, value in buffers if value.is_floating_point() and value.numel()}
    bounds = [bound.float() for value in trained.values() for bound in torch.aminmax(_in_memory_order(value.detach()))]
    if not bounds or bool(torch.stack(bounds).isfinite().all()):
        return
    bad = next(name for name, value in trained.items() if not bool(value.isfinite().all()))
    raise NonFiniteError(
        f"{bad} became infinite or NaN in an update whose gradients were finite. Lower the learning rate or "
        "weight_decay, or give the optimizer a larger eps. The best epoch's weights, if there are any, are restored."
    )


def check_scale(device: Device) -> None:
    """Raise `NonFiniteError` if the gradient scale has collapsed: in fp16 a host sync, otherwise nothing."""
    if device.scaler.is_enabled() and device.scaler.get_scale() < MIN_SCALE:
        raise NonFiniteError(
            f"the fp16 gradient scale fell to {device.scaler.get_scale():.3g}, expected {MIN_SCALE:g} or more: "
            'gradients overflow in every step. Use precision="bf16" or "fp32", or a lower learning rate.'
        )
