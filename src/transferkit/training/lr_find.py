"""A sweep of training steps over learning rates that changes nothing in the end."""

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager

from torch import Tensor, nn
from torch.optim import Optimizer

from transferkit.base.arguments import positive, whole_number
from transferkit.base.randomness import derive_seed, seeded
from transferkit.compute.device import Device
from transferkit.data.sources import epoch_order
from transferkit.errors import ArgumentError
from transferkit.model.freezing import trainable_state, write_values
from transferkit.model.modes import begin_training, modes_kept
from transferkit.results.lr_sweep import LearningRateSweep
from transferkit.training.run import Run
from transferkit.training.standardizing import measure_features
from transferkit.training.step import guarded_step
from transferkit.training.training import Part, Training


def spaced_rates(lr_min: float, lr_max: float, num_steps: int) -> list[float]:
    """Return learning rates from `lr_min` to `lr_max`, evenly spaced on a logarithmic scale."""
    low, high = positive("lr_min", lr_min), positive("lr_max", lr_max)
    whole_number("num_steps", num_steps, at_least=2)
    if low >= high:
        raise ArgumentError(f"lr_min={lr_min!r} is not below lr_max={lr_max!r}: expected a range of learning rates.")
    return [low * (high / low) ** (step / (num_steps - 1)) for step in range(num_steps)]


def sweep(training: Training, run: Run, rates: list[float]) -> LearningRateSweep:
    """Make one training step at each rate, until the loss diverges, and leave nothing changed.

    The rates are those of the optimizer's last group, the head; the others keep their proportion to it, so it must not
    be 0. The training data begins again where it has fewer batches than there are rates.
    """
    model, optimizer, device = training.model, training.optimizer, training.device
    base = optimizer.param_groups[-1]["base_lr"]
    if base == 0:
        raise ArgumentError(
            "the learning rate of the optimizer's last group is 0, and the other groups keep their proportion to it: "
            "expected one above 0. Build the optimizer with one; freeze_until freezes what is not to train."
        )
    seen, losses = [], []
    training.let_optimizer("eval")
    with (
        seeded(derive_seed(training.seed, "lr_find"), device.torch_device),  # a DataLoader draws random numbers
        unchanged(model, optimizer, device),
        closing(_batches(training, run)) as batches,
        run.train.display.bar("lr_find", len(rates) * run.batch_size) as bar,
        ExitStack() as stack,
    ):
        stack.callback(training.let_optimizer, "eval")  # before weights and state are put back
        measure_features(training, run)
        begin_training(model)
        training.let_optimizer("train")
        for index, (rate, (network, batch)) in enumerate(zip(rates, batches, strict=False)):
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * (rate / base)
            seed = derive_seed(training.seed, "lr_find", index)
            update = guarded_step(network, batch, training=training, loss=run.loss, seed=seed)
            seen.append(rate)
            losses.append(update.loss.item())  # host sync: it must end where the loss diverges
            bar.advance(batch.count, lambda: f"lr {seen[-1]:.1e} loss {losses[-1]:.3f}")
            training.interrupts.check()
            if not math.isfinite(losses[-1]) or LearningRateSweep(seen, losses).diverged:
                break
    return LearningRateSweep(seen, losses)


def _batches(training: Training, run: Run) -> Generator[tuple[nn.Module, Part], None, None]:
    """Yield the network with this process's part of each batch, epoch after epoch."""
    for epoch in itertools.count():
        order = epoch_order(run.source.num_images, training.seed, epoch)
        network, batches = run.open_parts(order=order, epoch=epoch)
        with closing(batches):
            for batch in batches:
                yield network, batch


@contextmanager
def unchanged(model: nn.Module, optimizer: Optimizer, device: Device) -> Iterator[None]:
    """Let a model be trained, then put back every bit of model, optimizer and gradient scale.

    Inside, gradients are clear and the optimizer works on copies of its state.
    """
    weights = {name: value.detach().clone() for name, value in _changing(model).items()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    state, scaler = optimizer.state, device.scaler
    groups = [dict(group) for group in optimizer.param_groups]
    try:
        # the parameters that are the state's keys stay themselves
        optimizer.state = defaultdict(dict, copy.deepcopy(dict(state), {id(key): key for key in state}))
        device.scaler = copy.deepcopy(scaler)
        for parameter in gradients:
            parameter.grad = None
        with modes_kept(model):
            yield
    finally:
        optimizer.state = state
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)
        device.scaler = scaler
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        write_values(weights, _changing(model))


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """Return what training may change, buffers that no state dict holds included."""
    return {**dict(model.named_buffers()), **trainable_state(model)}
