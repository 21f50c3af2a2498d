"""`Trainer` composes the other parts; `fit` is a short loop over the steps of an epoch."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer

from transferkit import checkpoint
from transferkit.arguments import positive, share, whole_number
from transferkit.augmentation import Augment
from transferkit.best import BestWeights
from transferkit.data import epoch_order, open_data
from transferkit.device import Device
from transferkit.errors import ArgumentError
from transferkit.evaluation import evaluate, in_eval_mode
from transferkit.features import FeatureCache, Say, open_folder, say_nothing
from transferkit.feed import Feed, Frozen
from transferkit.freezing import describe_frozen
from transferkit.head import TransferModel
from transferkit.history import EpochReport, History
from transferkit.inputs import Inputs
from transferkit.linear_adam import find_linear_adam
from transferkit.optimizers import LearningRate, OptimizerClass, build_optimizer, scale_lr, set_lr
from transferkit.randomness import derive_seed, seeded
from transferkit.recompute import Recomputed, check_recomputable
from transferkit.run import Run, choose_batch_size, open_run
from transferkit.schedules import Schedule, check_schedule, find_schedule, lr_factor
from transferkit.step import CrossEntropy, Step, Sums, check_class_weights, evaluation_step, training_step

KEPT_BATCH_SIZE = 256
"""Images validated at once where their features are kept: there are no convolutions to take memory."""

Callback = Callable[["Trainer", EpochReport], object]


class Trainer:
    """Trains a `TransferModel`, evaluates it and predicts with it, always from raw images or the same input.

    Args:
        model: It is moved to the device. What is frozen may change between two calls of `fit`.
        optimizer: `"adam"`, `"adamw"`, `"sgd"` (momentum 0.9), `"rmsprop"`, an optimizer class or
            `functools.partial` of one, or an instance over the model's parameters. Fused where torch can.
        lr: Learning rate, above 0: one number, or `{"backbone": 1e-5, "head": 1e-3}`. None is 1e-3.
        weight_decay: 0 or more.
        schedule: `"constant"`, `"linear"` or `"cosine"` (both to 0 over one call of `fit`), or a function of
            progress (0 to 1) that returns a factor. It counts steps made, those that fp16 skipped included.
        warmup_steps: Steps over which the learning rate first rises linearly.
        clip_grad_norm: Largest Euclidean norm of all gradients together; None leaves them.
        cache: `"auto"` computes what the frozen layers make of each image once, keeps it, and trains the rest on it,
            wherever that gives the same result, and says so where it does not; True raises there; False never does.
        cache_dir: A folder in which these features are kept in files, for later runs and other processes. None keeps
            them in memory: on the device if they take at most half of what is free there, else on the host likewise.
        micro_batch_size: Split each batch into parts of this size and add their gradients up: the memory of a part,
            the update of the whole batch. None does not split.
        label_smoothing: 0 up to but not including 1.
        class_weights: One number for each class: how much its images count in the training loss.
        device: `"auto"`, `"cuda"`, `"cuda:1"`, `"mps"`, `"cpu"`, a `torch.device` or a `Device`.
        precision: `"auto"`, `"bf16"`, `"fp16"` or `"fp32"`; see `Device`.
        seed: Order of images, augmentation, dropout and validation split depend on it and on nothing else; the
            head's initial weights are drawn earlier, in `attach_head`, after your `torch.manual_seed`.
        recompute_activations: Keep the activations at block boundaries alone and compute the others a second time in
            the backward pass: less memory, a third more time.
        torch_compile: Let `torch.compile` fuse what runs; see docs/performance.md for what it brings.

    Attributes:
        model: The model.
        device: The `Device`.
        optimizer: The optimizer, with one group of parameters for the backbone and one for the head.
        epoch: Number of epochs finished so far.
        global_step: Number of steps made so far.

    Raises:
        ArgumentError: A value out of range.
        DeviceError: The machine has no such device or number format.

    Example:
        >>> import transferkit as tk
        >>> _ = torch.manual_seed(0)
        >>> images, targets = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 2
        >>> backbone = tk.load_backbone("vgg11", weights=None, image_size=32)
        >>> model = tk.attach_head(tk.freeze_until(backbone, "head"), ["cat", "dog"])
        >>> trainer = tk.Trainer(model, lr=1e-3, device="cpu")
        >>> history = trainer.fit((images, targets), epochs=2, batch_size=4, verbose=0)
        >>> len(history.history["loss"]), trainer.predict(images).shape
        (2, (8,))
    """

    def __init__(
        self,
        model: TransferModel,
        *,
        optimizer: str | OptimizerClass | Optimizer = "adam",
        lr: LearningRate | None = None,
        weight_decay: float = 0.0,
        schedule: str | Schedule = "constant",
        warmup_steps: int = 0,
        clip_grad_norm: float | None = None,
        micro_batch_size: int | None = None,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | Tensor | None = None,
        device: str | torch.device | Device = "auto",
        precision: str = "auto",
        cache: bool | str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
        recompute_activations: bool = False,
        torch_compile: bool = False,
    ) -> None:
        if not isinstance(model, TransferModel):
            raise ArgumentError(
                f"model is a {type(model).__name__}: expected a TransferModel from attach_head. For a module of your "
                "own use transferkit.Device in your own loop."
            )
        if isinstance(device, Device) and precision not in ("auto", device.precision):
            raise ArgumentError(f"precision={precision!r} contradicts {device}: say it in one place.")
        self.device = device if isinstance(device, Device) else Device(device, precision)
        self.model = self.device.prepare(model)
        self.optimizer = build_optimizer(optimizer, model, lr, weight_decay)
        self.schedule = find_schedule(schedule)
        self.warmup_steps = whole_number("warmup_steps", warmup_steps, at_least=0)
        self.clip_grad_norm = None if clip_grad_norm is None else positive("clip_grad_norm", clip_grad_norm)
        self.micro_batch_size = None if micro_batch_size is None else whole_number("micro_batch_size", micro_batch_size)
        weights = check_class_weights(class_weights, len(model.classes))
        self.cross_entropy = CrossEntropy(share("label_smoothing", label_smoothing), self.device.move(weights))
        self.seed = whole_number("seed", seed, at_least=0)
        if cache != "auto" and not isinstance(cache, bool):
            raise ArgumentError(f'cache={cache!r} is not known: expected "auto", True or False.')
        self.cache = cache
        self.recompute_activations = recompute_activations
        self.torch_compile = torch_compile
        self._features = FeatureCache(self.device, open_folder(cache_dir))
        self._frozen = Frozen(model, self.device, compiled=torch_compile)
        self.epoch = 0
        self.global_step = 0

    def fit(
        self,
        data: object,
        *,
        validation_data: object = None,
        validation_split: float | None = None,
        epochs: int = 1,
        batch_size: int | None = None,
        lr: LearningRate | None = None,
        augment: Augment | None = None,
        n_views: int | None = None,
        callbacks: Sequence[Callback] = (),
        restore_best: bool = True,
        num_workers: int = 0,
        verbose: int = 1,
    ) -> History:
        """Train for some epochs, validate after each, and leave the model as it was after the best of them.

        Args:
            data: `(images, targets)`, a `Dataset` of such pairs (PIL images of any sizes are fine), or a
                `DataLoader` of batches. Images are raw, uint8 `(N, 3, H, W)` or `(N, H, W, 3)`, or preprocessed, float.
                Targets are class indices, or one-hot or soft rows.
            validation_data: Likewise; measured after each epoch.
            validation_split: Share of `data` to hold back as validation data instead, drawn at random by the seed.
            epochs: 1 or more.
            batch_size: 1 or more; 32 if None. A `DataLoader` has its own.
            lr: A new base learning rate, from this call on.
            augment: Random changes to raw training images: `"flip"`, `"crop"`, `"color"`, `"trivial"`, a
                `torchvision.transforms.v2` transform or any callable of one image, or a list of these.
            n_views: With augmentation, or a `Dataset` whose own transform is random: make this many fixed views of each
                image and go through them in turn, an epoch each, so that their features can be kept. None makes new
                ones in every epoch, and keeps no features of training images.
            callbacks: Called after each epoch with the trainer and the `EpochReport`; one that returns True ends
                the run.
            restore_best: Put the weights of the epoch with the highest validation accuracy back at the end, whatever
                ended the run (the optimizer's state stays the last). Without validation data the last weights stay.
            num_workers: Processes that read a `Dataset`.
            verbose: 1 prints a line at the start and one for each epoch, 0 nothing.

        Raises:
            NothingToTrainError: Everything is frozen.
            TransferKitError: Arguments or data that cannot be used, all seen before the first step but for what a
                `Dataset` or `DataLoader` hides until it is read.
        """
        run = open_run(
            self.model,
            data,
            validation_data=validation_data,
            validation_split=validation_split,
            epochs=epochs,
            batch_size=batch_size,
            augment=augment,
            n_views=n_views,
            num_workers=num_workers,
            seed=self.seed,
        )
        check_schedule(self.schedule, run.num_steps)
        self._check_validation(run)
        if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
            raise ArgumentError(
                f"callbacks={callbacks!r} cannot be used: expected a list of functions of (trainer, report)."
            )
        if lr is not None:
            set_lr(self.optimizer, lr)
        if verbose:
            _print(f"{describe_frozen(self.model)}; on {self.device.torch_device} in {self.device.precision}")
        train, validation = self._feeds(run, say=_print if verbose else say_nothing)
        history, best, first_step = History(), BestWeights(self.model), self.global_step
        try:
            for epoch in range(epochs):
                started = time.perf_counter()
                best.before_training()
                sums = Sums(self.device.torch_device)
                for step in self._train_epoch(run, train, first_step):
                    sums.add(step.loss, step.correct, step.count)
                loss, accuracy = sums.means()
                val_loss, val_accuracy = (None, None)
                if validation is not None:
                    val_loss, val_accuracy = self._validate(validation, run.batch_size)
                epoch_s = time.perf_counter() - started
                report = EpochReport(self.epoch - 1, loss, accuracy, step.lr, epoch_s, val_loss, val_accuracy)
                history.reports.append(report)
                if restore_best and history.best_epoch == epoch:
                    best.take()
                if verbose:
                    _print(str(report))
                if any([callback(self, report) is True for callback in callbacks]):  # noqa: C419 - call them all
                    break
        finally:
            best.restore()
        return history

    def steps(
        self,
        data: object,
        *,
        epochs: int = 1,
        batch_size: int | None = None,
        lr: LearningRate | None = None,
        augment: Augment | None = None,
        n_views: int | None = None,
        num_workers: int = 0,
    ) -> Iterator[Step]:
        """Return an iterator that makes one training step each time it is asked for the next.

        Your code runs between the steps. The arguments are those of `fit`, and they are checked at once. What is frozen
        is looked at when an epoch begins.

        Example:
            >>> for step in trainer.steps(train, epochs=3):  # doctest: +SKIP
            ...     my_logger.log(step.loss, step.lr)
        """
        run = open_run(
            self.model,
            data,
            epochs=epochs,
            batch_size=batch_size,
            augment=augment,
            n_views=n_views,
            num_workers=num_workers,
        )
        check_schedule(self.schedule, run.num_steps)
        if lr is not None:
            set_lr(self.optimizer, lr)
        train, _ = self._feeds(run, say=say_nothing)
        first_step = self.global_step
        return (step for _ in range(epochs) for step in self._train_epoch(run, train, first_step))

    def evaluate(self, data: object, *, batch_size: int | None = None, num_workers: int = 0) -> dict[str, float]:
        """Return `{"loss": ..., "accuracy": ...}`: mean cross-entropy, unsmoothed and unweighted, and accuracy, 0 to 1.

        Args:
            data: As in `fit`.
            batch_size: 32 if None.
            num_workers: Processes that read a `Dataset`.
        """
        source = open_data(data, self.model.classes, num_workers=num_workers)
        inputs = Inputs(source, self.model.backbone.preprocess, self.device)
        with in_eval_mode(self.model):
            batches = inputs.batches(choose_batch_size(source, batch_size))
            loss, accuracy = evaluate(self.model, batches, device=self.device)
        return {"loss": loss, "accuracy": accuracy}

    def predict_proba(
        self, images: object, *, batch_size: int | None = None, num_workers: int = 0
    ) -> npt.NDArray[np.float32]:
        """Return the probability of each class, float32 `(N, len(classes))`, rows summing to one.

        Args:
            images: As in `fit`, with targets (which are not looked at) or without.
            batch_size: 32 if None.
            num_workers: Processes that read a `Dataset`.
        """
        source = open_data(images, self.model.classes, num_workers=num_workers, with_targets=False)
        inputs = Inputs(source, self.model.backbone.preprocess, self.device)
        with in_eval_mode(self.model):
            batches = inputs.batches(choose_batch_size(source, batch_size))
            logits = [evaluation_step(self.model, images, device=self.device) for images, _ in batches]
        return torch.cat([part.softmax(dim=1).cpu() for part in logits]).numpy()

    def predict(self, images: object, *, batch_size: int | None = None, num_workers: int = 0) -> npt.NDArray[np.int64]:
        """Return the most probable class index of each image, int64 `(N,)`; `model.classes` has their names.

        The arguments are those of `predict_proba`.
        """
        probabilities = self.predict_proba(images, batch_size=batch_size, num_workers=num_workers)
        classes: npt.NDArray[np.int64] = probabilities.argmax(axis=1)
        return classes

    def state_dict(self) -> dict[str, Any]:
        """Return model, optimizer and progress as plain types and tensors, which are not copies."""
        return {
            "model": checkpoint.model_state(self.model),
            "optimizer": checkpoint.optimizer_state(self.optimizer, self.model),
            "scaler": self.device.scaler.state_dict(),
            "progress": {"epoch": self.epoch, "global_step": self.global_step, "seed": self.seed},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, what is frozen included; on any difference nothing is changed.

        Raises:
            HeadMismatchError: Other classes.
            CheckpointError: Another backbone, head, preprocessing or optimizer.
        """
        checkpoint.check_parts(state, *checkpoint.PARTS)
        checkpoint.check_model_state(self.model, state["model"])
        checkpoint.check_optimizer_state(self.optimizer, self.model, state["optimizer"])
        checkpoint.load_model_state(self.model, state["model"])
        checkpoint.load_optimizer_state(self.optimizer, self.model, state["optimizer"])
        if state["scaler"] and self.device.scaler.is_enabled():  # empty unless it was saved from fp16
            self.device.scaler.load_state_dict(state["scaler"])
        self.epoch = state["progress"]["epoch"]
        self.global_step = state["progress"]["global_step"]
        self.seed = state["progress"]["seed"]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, whole or not at all; `load` and `transferkit.load_model` read it.

        Raises:
            OSError: The folder is missing, read-only or full.
        """
        checkpoint.write_checkpoint(path, self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over a checkpoint that `save` wrote; see `load_state_dict`.

        Raises:
            CheckpointError: No such file, a damaged one, or one that does not fit.
            HeadMismatchError: It has other classes.
        """
        self.load_state_dict(checkpoint.read_checkpoint(path))

    def _check_validation(self, run: Run) -> None:
        """Read one image to validate on now: a whole epoch would be lost on data that cannot be used."""
        if run.validation is not None:
            next(Inputs(run.validation, self.model.backbone.preprocess, self.device).batches(1))

    def _feeds(self, run: Run, *, say: Say) -> tuple[Feed, Feed | None]:
        """Return what the epochs of a run train and validate on."""
        if self.recompute_activations:
            check_recomputable(self.model)
        preprocess = self.model.backbone.preprocess
        inputs = Inputs(run.source, preprocess, self.device, run.transform, self.seed)
        feed = partial(Feed, frozen=self._frozen, cache=self._features, mode=self.cache, say=say)
        train = feed(inputs, num_views=run.num_views, what="training")
        train.check()
        if run.validation is None:
            return train, None
        validation = feed(Inputs(run.validation, preprocess, self.device), num_views=None, what="validation")
        validation.check()
        return train, validation

    def _train_epoch(self, run: Run, feed: Feed, first_step: int) -> Iterator[Step]:
        """Make the steps of one epoch of a run that began with `first_step`."""
        self.model.train()
        order = epoch_order(run.source.num_images, self.seed, self.epoch)
        network, batches = feed.open(run.batch_size, order=order, epoch=self.epoch)
        if self.recompute_activations:
            network = Recomputed(network)
        whole = self.clip_grad_norm is None and self.micro_batch_size is None and not self.torch_compile
        linear_adam = find_linear_adam(network, self.optimizer, device=self.device) if whole else None
        for index, (inputs, targets) in enumerate(batches):
            made = self.global_step - first_step
            scale_lr(self.optimizer, lr_factor(self.schedule, made, run.num_steps, self.warmup_steps))
            with seeded(derive_seed(self.seed, "step", self.global_step), self.device.torch_device):  # for dropout
                loss, correct = training_step(
                    network,
                    inputs,
                    targets,
                    device=self.device,
                    optimizer=self.optimizer,
                    cross_entropy=self.cross_entropy,
                    micro_batch_size=self.micro_batch_size or len(targets),
                    clip_grad_norm=self.clip_grad_norm,
                    linear_adam=linear_adam,
                )
            self.global_step += 1
            yield Step(self.epoch, index, loss, correct, len(targets), self.optimizer.param_groups[-1]["lr"])
        self.epoch += 1

    def _validate(self, feed: Feed, batch_size: int) -> tuple[float, float]:
        """Return loss and accuracy on the images to validate on."""
        network, batches = feed.open(batch_size, kept_batch_size=max(batch_size, KEPT_BATCH_SIZE))
        with in_eval_mode(self.model):
            return evaluate(network, batches, device=self.device)


def _print(line: str) -> None:
    print(line)  # noqa: T201
