"""Heads of one shape, trained together on one stream of features: each as it would be trained alone."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from transferkit.base.randomness import derive_seed, seeded
from transferkit.compute.finite import MAX_GRADIENT
from transferkit.data.sources import epoch_order
from transferkit.features.feed import Feed
from transferkit.features.prefix import is_intercepted, pure_prefix
from transferkit.model.head import Standardize
from transferkit.model.modes import begin_training, evaluating
from transferkit.results.history import EpochReport, History
from transferkit.training.metrics import count_correct
from transferkit.training.optimizers import OptimizerClass
from transferkit.training.run import Run
from transferkit.training.schedules import lr_factor
from transferkit.training.standardizing import measure_features
from transferkit.training.training import Training

TOGETHER = 2**24
"""Numbers that the weights of heads trained together may have: larger heads are limited by their own weights."""

_LAYERS = (Standardize, nn.Linear, nn.ReLU, nn.Dropout)
_OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop)


@dataclass(eq=False, slots=True)
class HeadRun:
    """The run of one head among those that are trained together, of one model and kind of optimizer, on one device."""

    training: Training  # its rates, weight decay, schedule and clipping are each head's own
    run: Run  # its data, batch size and loss are common; the number of epochs is each head's own
    history: History = field(default_factory=History)  # the finished epochs
    best: dict[str, Tensor] = field(default_factory=dict)  # the head's weights after the best of them, by name


def how_many_together(training: Training) -> int:
    """Return how many heads like that of a model can be trained together; 1 where each must be trained alone.

    Heads train together on a frozen backbone if `attach_head` built them, with an optimizer of torch that treats
    each number by itself, without metrics, skipped steps, micro-batches and gradient scaling.
    """
    model, head = training.model, training.model.head
    layers = [head, *head.children()]
    usable = (
        len(model.split()[1]) == 1
        and not pure_prefix(model)[1]
        and model.head_arguments is not None  # attach_head built it
        and type(head) is nn.Sequential
        and all(type(layer) in _LAYERS for layer in head[1:])
        and not any(is_intercepted(layer) or nn.utils.parametrize.is_parametrized(layer) for layer in layers)
        and all(parameter.requires_grad for parameter in head.parameters())
        and type(training.optimizer) in _OPTIMIZERS
        and not (training.metrics or training.max_skipped or training.micro_batch_size)
        and not training.device.scaler.is_enabled()
    )
    return max(1, TOGETHER // sum(map(Tensor.numel, head.parameters()))) if usable else 1


def train_heads(runs: Sequence[HeadRun]) -> Iterator[HeadRun]:
    """Train heads from the weights that their model's head has, and yield each of them after each of its epochs.

    Batches, dropout and updates are those of `Trainer.fit`, so weights and figures differ from it by rounding alone.
    The model's own head keeps its weights; its `Standardize` layer is measured. A head whose numbers are not all finite
    is dropped.
    """
    first, run = runs[0].training, runs[0].run
    model, place = first.model, first.device.torch_device
    measure_features(first, run)
    stack, running, step = _Stack(runs), list(runs), 0
    while running:
        started, epoch = time.perf_counter(), len(running[0].history.reports)
        begin_training(model)
        losses = torch.zeros(len(running), device=place)
        correct, count = torch.zeros_like(losses), 0
        finite = torch.ones_like(losses, dtype=torch.bool)
        order = epoch_order(run.source.num_images, first.seed, epoch)
        with closing(run.train.open(run.batch_size, order=order, epoch=epoch)[1]) as batches:
            for inputs, targets in first.interrupts.watched(batches):
                for group, head in zip(stack.optimizer.param_groups, running, strict=True):
                    group["lr"] = group["base_lr"] * lr_factor(head.run.schedule, step, head.run.num_steps)
                with seeded(derive_seed(first.seed, "step", step), place):
                    batch_losses, logits, batch_finite = stack.step(inputs, targets)
                losses += batch_losses * len(targets)
                correct += torch.stack([count_correct(own, targets, model.threshold) for own in logits])
                finite &= batch_finite
                count, step = count + len(targets), step + 1
        for weight in stack.weights.values():
            finite &= weight.detach().flatten(1).isfinite().all(dim=1)
        val_losses, val_accuracies = stack.validate(cast("Feed", run.validation))
        seconds = (time.perf_counter() - started) / len(running)
        good = finite.nonzero().flatten().tolist()  # host sync
        for index in good:
            head, lr = running[index], stack.optimizer.param_groups[index]["lr"]
            loss, accuracy = losses[index].item() / count, correct[index].item() / count
            report = EpochReport(epoch, loss, accuracy, lr, seconds, val_losses[index], val_accuracies[index])
            head.history.reports.append(report)
            if head.history.best_epoch == epoch:
                head.best = {name: own.detach()[index].clone() for name, own in stack.weights.items()}
            yield head
        keep = [index for index in good if epoch + 1 < running[index].run.num_epochs]
        running = [running[index] for index in keep]
        stack.keep(keep)


class _Stack:
    """The weights of several heads, each parameter as one tensor `(H, ...)`, and an optimizer with a group for each.

    The first layer of all heads is one matrix product, later ones are batched products. The optimizer sees a view for
    each head, so its steps are those it would make alone.
    """

    def __init__(self, runs: Sequence[HeadRun]) -> None:
        first = runs[0].training
        self.model, self.device, self.loss, self.run = first.model, first.device, runs[0].run.loss, runs[0].run
        self.interrupts = first.interrupts
        limits = [math.inf if (limit := head.training.clip_grad_norm) is None else limit for head in runs]
        self.limits = torch.tensor(limits, device=first.device.torch_device)
        named = self.model.head.named_parameters()
        self.weights = {name: torch.stack([weight.detach()] * len(runs)).requires_grad_() for name, weight in named}
        settings = [head.training.optimizer.param_groups[-1] for head in runs]
        views = zip(*(weight.detach().unbind() for weight in self.weights.values()), strict=True)
        groups = [{**group, "params": [*map(nn.Parameter, own)]} for group, own in zip(settings, views, strict=True)]
        build: OptimizerClass = type(first.optimizer)
        self.optimizer = build(groups)

    def __call__(self, features: Tensor) -> Tensor:
        """Return the logits of all heads, `(H, N, K)`, from features `(N, C, h, w)`."""
        activation = features
        for name, layer in self.model.head.named_children():
            if isinstance(layer, nn.Linear):
                weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
                if activation.ndim == 2:  # all heads share it
                    activation = functional.linear(activation, weight.flatten(0, 1), bias.flatten())
                    activation = activation.view(-1, *bias.shape).transpose(0, 1)
                else:
                    activation = torch.baddbmm(bias[:, None], activation, weight.mT)
            elif isinstance(layer, nn.Dropout) and activation.ndim == 3:
                activation = activation * layer(torch.ones_like(activation[0]))  # the same for all, as alone
            else:
                activation = layer(activation)
        return activation

    def step(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Update each head by one batch; return losses `(H,)`, logits before, and whether all of it was finite."""
        with self.device.autocast():
            logits = self(inputs)
        losses = torch.stack([self.loss.sum(own, targets) for own in logits]) / self.loss.total_weight(targets)
        self.device.backward(losses.sum())
        gradients = []
        for weight in self.weights.values():
            gradients.append(cast("Tensor", weight.grad))
            weight.grad = None
        squares = [gradient.flatten(1).square().sum(dim=1) for gradient in gradients]
        norms = torch.stack(squares).sum(dim=0).sqrt()
        factors = (self.limits / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *(1 for _ in gradient.shape[1:])))
        for group, *own in zip(self.optimizer.param_groups, *(part.unbind() for part in gradients), strict=True):
            for parameter, gradient in zip(group["params"], own, strict=True):
                parameter.grad = gradient
        self.optimizer.step()
        return losses.detach(), logits.detach(), losses.isfinite() & (norms < MAX_GRADIENT)

    def validate(self, feed: Feed) -> tuple[list[float], list[float]]:
        """Return the loss and the accuracy of each head on the validation images."""
        losses, correct = [], []
        batches = feed.open_part(self.run.batch_size)[1]
        with evaluating(self.model), closing(batches), torch.inference_mode():
            for inputs, targets in self.interrupts.watched(batches):
                with self.device.autocast():
                    logits = self(inputs).float()
                losses.append(torch.stack([self.loss.each(own, targets) for own in logits]))
                correct.append(torch.stack([count_correct(own, targets, self.model.threshold) for own in logits]))
        every = torch.cat(losses, dim=1).cpu().double()  # host sync: once an epoch
        right = torch.stack(correct).sum(dim=0).cpu().double() / every.shape[1]
        return every.mean(dim=1).tolist(), right.tolist()

    def keep(self, heads: list[int]) -> None:
        """Drop all heads but some."""
        if len(heads) == len(self.limits):
            return
        self.limits = self.limits[heads]
        self.weights = {name: weight.detach()[heads].requires_grad_() for name, weight in self.weights.items()}
        self.optimizer.param_groups = [self.optimizer.param_groups[index] for index in heads]
        views = (weight.detach().unbind() for weight in self.weights.values())
        for group, *own in zip(self.optimizer.param_groups, *views, strict=True):
            before, group["params"] = group["params"], [*map(nn.Parameter, own)]
            for old, new in zip(before, group["params"], strict=True):
                self.optimizer.state[new] = self.optimizer.state.pop(old, {})  # SGD without momentum has none
