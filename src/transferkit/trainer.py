"""`Trainer` composes the other parts."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer

from transferkit.base.arguments import positive, share, whole_number
from transferkit.base.display import QUIET, Display
from transferkit.base.interrupts import Interrupts
from transferkit.compute.device import Device
from transferkit.compute.finite import check_policy
from transferkit.data.augmentation import Augment
from transferkit.data.inputs import Inputs
from transferkit.data.open import open_data
from transferkit.errors import ArgumentError
from transferkit.features.cache import FeatureCache, open_folder
from transferkit.features.feed import Feed, Frozen
from transferkit.model.freezing import describe_frozen
from transferkit.model.head import TransferModel
from transferkit.model.recompute import check_recomputable
from transferkit.results.assessment import Assessment
from transferkit.results.history import History
from transferkit.results.lr_sweep import LearningRateSweep
from transferkit.saving import archive
from transferkit.saving import model as model_state
from transferkit.training.checkpoint import Checkpoint
from transferkit.training.evaluation import assess, evaluate, in_eval_mode, predict_proba
from transferkit.training.loop import Callback, run_epochs, train_epoch
from transferkit.training.loss import CrossEntropy, check_class_weights, find_class_weights
from transferkit.training.lr_find import spaced_rates, sweep
from transferkit.training.metrics import Sums
from transferkit.training.optimizers import LearningRate, OptimizerClass, build_optimizer, set_lr
from transferkit.training.progress import BestWeights, Progress
from transferkit.training.run import Run, check_trains, choose_batch_size, open_run
from transferkit.training.schedules import Schedule, check_schedule, find_schedule
from transferkit.training.state import (
    assign_training_state,
    check_training_state,
    complete_training_state,
    read_run,
    run_facts,
    training_state,
)
from transferkit.training.step import Step


class Trainer:
    """Trains a `TransferModel`, evaluates it and predicts with it, always from raw images or the same input.

    Args:
        model: It is moved to the device. What is frozen may change between two calls of `fit`.
        optimizer: `"adam"`, `"adamw"`, `"sgd"` (momentum 0.9), `"rmsprop"`, an optimizer class or
            `functools.partial` of one, or an instance over the model's parameters. Fused where torch can.
        lr: Learning rate, above 0: one number, or `{"backbone": 1e-5, "head": 1e-3}`, in which blocks may have rates of
            their own (`"block5": 1e-4`; see `discriminative_lr`). None is 1e-3.
        weight_decay: 0 or more.
        schedule: `"constant"`, `"linear"` or `"cosine"` (both to 0 over one call of `fit`), `"one_cycle"` (up from 1/25
            over 30 % of it, then down to 0), or a function of progress (0 to 1) that returns a factor. It counts steps
            made, those that fp16 skipped included.
        warmup_steps: Steps over which the learning rate first rises linearly.
        clip_grad_norm: Largest Euclidean norm of all gradients together; None leaves them.
        cache: `"auto"` computes what the frozen layers make of each image once, keeps it, and trains the rest on it,
            wherever that gives the same result, and says so where it does not; True raises there; False never does.
        cache_dir: A folder in which these features are kept in files, for later runs and other processes. None keeps
            them in memory: on the device if they take at most half of what is free there, else on the host likewise.
        micro_batch_size: Split each batch into parts of this size and add their gradients up: the memory of a part,
            the update of the whole batch. None does not split.
        label_smoothing: 0 up to but not including 1.
        class_weights: One number for each class: how much its images count in the training loss. `"balanced"` lets
            every class count alike, however many images of it the training data has.
        device: `"auto"`, `"cuda"`, `"cuda:1"`, `"mps"`, `"cpu"`, a `torch.device` or a `Device`.
        precision: `"auto"`, `"bf16"`, `"fp16"` or `"fp32"`; see `Device`.
        on_nonfinite: What is done with a step whose loss or gradients are infinite or NaN, which changes no weight:
            `"raise"`, or `"skip"` it. In fp16 overflowing gradients are the scaler's business.
        max_skipped: Steps that may be skipped in one run.
        seed: Order of images, augmentation, dropout and validation split depend on it and on nothing else; the
            head's initial weights are drawn earlier, in `attach_head`, after your `torch.manual_seed`.
        recompute_activations: Keep the activations at block boundaries alone and compute the others a second time in
            the backward pass: less memory, a third more time.
        torch_compile: Let `torch.compile` fuse what runs; see docs/performance.md for what it brings.

    Attributes:
        model: The model.
        device: The `Device`.
        optimizer: The optimizer, with one group of parameters for each block and one for the head.
        epoch: Number of epochs finished so far.
        global_step: Number of steps made so far.
        history: The `History` of the run under way, which callbacks may read, else of the last one; None before.

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
        >>> sorted(trainer.evaluate((images, targets)))
        ['accuracy', 'loss']
        >>> trainer.assess((images, targets)).confusion_matrix().sum()
        np.int64(8)
        >>> trainer.predict_classes(images[0]) == [model.classes[trainer.predict(images)[0]]]
        True
        >>> [f"{lr:.0e}" for lr in trainer.lr_find((images, targets), num_steps=3, lr_max=1e-4, verbose=0).lrs]
        ['1e-06', '1e-05', '1e-04']
        >>> [step.index for step in trainer.steps((images, targets), batch_size=4)]
        [0, 1]
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
        class_weights: Sequence[float] | Tensor | str | None = None,
        device: str | torch.device | Device = "auto",
        precision: str = "auto",
        cache: bool | str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        on_nonfinite: str = "raise",
        max_skipped: int = 10,
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
        self.class_weights = check_class_weights(class_weights, len(model.classes))
        self.cross_entropy = CrossEntropy(share("label_smoothing", label_smoothing))
        self.seed = whole_number("seed", seed, at_least=0)
        self.on_nonfinite = check_policy(on_nonfinite)
        self.max_skipped = whole_number("max_skipped", max_skipped, at_least=0)
        if cache != "auto" and not isinstance(cache, bool):
            raise ArgumentError(f'cache={cache!r} is not known: expected "auto", True or False.')
        self.cache = cache
        self.recompute_activations = recompute_activations
        self.torch_compile = torch_compile
        self._interrupts = Interrupts()
        self._features = FeatureCache(self.device, open_folder(cache_dir), check=self._interrupts.check)
        self._frozen = Frozen(model, self.device)
        self._progress: Progress | None = None
        self._history: History | None = None
        self.epoch = 0
        self.global_step = 0

    @property
    def history(self) -> History | None:
        return self._history

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
        resume_from: str | os.PathLike[str] | None = None,
        restore_best: bool = True,
        on_bad_image: str = "raise",
        num_workers: int = 0,
        verbose: int = 1,
    ) -> History:
        """Train for some epochs, validate after each, and leave the model as it was after the best of them.

        Ctrl-C (SIGINT) and SIGTERM end the run after the step or batch under way, and are then raised again as
        `KeyboardInterrupt` or exit status 143; a second one ends it at once. Whatever ends a run between two steps, a
        `Checkpoint` among the callbacks first saves where it stood.

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
                the run. One that has a method `before_run(trainer, validated=...)` is asked before the first step
                whether it can be used. `GradualUnfreezing` is called first, so that a `Checkpoint` saves what it did.
            resume_from: A checkpoint saved during a run, or the folder of a `Checkpoint`: the run is resumed with the
                same result as if it had never stopped, and the history is that of all of it. In a folder that has none
                yet it begins. `epochs` counts those that were done; data and other arguments must be those of the
                run. A `DataLoader` that shuffles draws another order.
            restore_best: Put the weights of the epoch with the highest validation accuracy back at the end, whatever
                ended the run (the optimizer's state stays the last). Without validation data the last weights stay.
            on_bad_image: `"skip"` reads a `Dataset` once before the run and leaves out, with a line for each, the
                images that cannot be used: at most 1 % of them, or one. `"raise"` ends the run at the first.
            num_workers: Processes that read a `Dataset`.
            verbose: 0 shows nothing; 2 a line at the start and one for each epoch; 1 also bars, in a terminal or a
                notebook where `tqdm` is installed, for features being computed and for the epoch under way.

        Raises:
            NothingToTrainError: Everything is frozen.
            NonFiniteError: A loss or gradient is infinite or NaN; the weights are those of the step before.
            OutOfMemoryError: Memory does not suffice for one image at a time.
            WorkerError: A process that reads images died or hangs.
            CheckpointError: `resume_from` cannot be used; nothing was changed.
            DataChangedError: It began with other data.
            CheckpointWriteError: At the end, if the last save of a `Checkpoint` failed.
            TransferKitError: Arguments or data that cannot be used, all seen before the first step but for what a
                `Dataset` or `DataLoader` hides until it is read.
        """
        if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
            raise ArgumentError(
                f"callbacks={callbacks!r} cannot be used: expected a list of functions of (trainer, report)."
            )
        epochs = whole_number("epochs", epochs)
        display = Display(verbose)
        checkpoints = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
        with self._interrupts:
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
                on_bad_image=on_bad_image,
                display=display,
                check=self._interrupts.check,
            )
            check_schedule(self.schedule, run.num_steps)
            self._check_validation(run)
            self._weigh_classes(run)
            for callback in callbacks:
                if hasattr(callback, "before_run"):
                    callback.before_run(self, validated=run.validation is not None)
            facts: dict[str, Any] = {}
            if callbacks or resume_from is not None:
                facts = {**run_facts(self, run, lr, epochs, augment), "restore_best": restore_best}
            saved = None if resume_from is None else read_run(self, resume_from, facts, checkpoints, display)
            if saved is None:
                self._begin_run(run, lr, checkpoints)
            else:
                assign_training_state(self, saved)  # nothing was changed before
            display.say(f"{describe_frozen(self.model)}; on {self.device.torch_device} in {self.device.precision}")
            train, validation = self._feeds(run, display)
            progress = self._begin(run, facts)
            if saved is not None:
                progress.load(saved["run"])
                self.epoch, self.micro_batch_size = progress.epoch, saved["progress"]["micro_batch_size"]
            self._progress, self._history = progress, progress.history
            try:
                run_epochs(
                    self,
                    run,
                    progress,
                    train=train,
                    validation=validation,
                    epochs=epochs,
                    callbacks=callbacks,
                    restore_best=restore_best,
                    interrupts=self._interrupts,
                    display=display,
                )
            finally:
                self._progress = None
        for failure in [checkpoint.failure for checkpoint in checkpoints if checkpoint.failure is not None]:
            raise failure
        return progress.history

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
        check_trains(self.model, run)
        self._weigh_classes(run)
        if lr is not None:
            set_lr(self.optimizer, lr)
        train, _ = self._feeds(run, QUIET)
        progress = self._begin(run, {})
        return (step for _ in range(epochs) for step in train_epoch(self, run, train, progress, first=0))

    def lr_find(
        self,
        data: object,
        *,
        batch_size: int | None = None,
        num_steps: int = 100,
        lr_min: float = 1e-6,
        lr_max: float = 1.0,
        augment: Augment | None = None,
        n_views: int | None = None,
        num_workers: int = 0,
        verbose: int = 1,
    ) -> LearningRateSweep:
        """Make training steps at learning rates from low to high, and say which rate suits.

        Model, optimizer, counters and the global random generators are afterwards as they were, bit for bit, also
        where Ctrl-C or an error ends it. What the frozen layers make of the images is computed once and kept, for
        `fit` too: with the backbone frozen, the rest takes seconds.

        Args:
            data: As in `fit`; it is gone through again where it is too small.
            batch_size: That of `fit` to come.
            num_steps: Steps, 2 or more. It ends earlier where the loss diverges.
            lr_min: Learning rate of the first step, of the head; blocks keep their proportion to it.
            lr_max: Of the last.
            augment: As in `fit`.
            n_views: As in `fit`.
            num_workers: Processes that read a `Dataset`.
            verbose: As in `fit`.

        Raises:
            ArgumentError: A value out of range.
            TransferKitError: As in `fit`.

        Example:
            >>> found = trainer.lr_find(train)  # doctest: +SKIP
            >>> found.plot(), found.suggestion  # doctest: +SKIP
            >>> trainer.fit(train, lr=found.suggestion)  # doctest: +SKIP
        """
        rates = spaced_rates(lr_min, lr_max, num_steps)
        display = Display(verbose)
        with self._interrupts:
            run = open_run(
                self.model,
                data,
                epochs=1,
                batch_size=batch_size,
                augment=augment,
                n_views=n_views,
                num_workers=num_workers,
            )
            check_trains(self.model, run)
            self._weigh_classes(run)
            feed, _ = self._feeds(run, display)
            found = sweep(self, run, feed, rates, interrupts=self._interrupts, display=display)
        if found.suggestion is None:
            why = "the loss fell nowhere. Is the model trained already?"
            if not math.isfinite(found.losses[0]):
                why = "the loss of the first step is not finite. Look at the images and at the weights."
            display.say(f"lr_find suggests nothing: {why}")
        return found

    def evaluate(self, data: object, *, batch_size: int | None = None, num_workers: int = 0) -> dict[str, float]:
        """Return `{"loss": ..., "accuracy": ...}`: mean cross-entropy, unsmoothed and unweighted, and accuracy, 0 to 1.

        Args:
            data: As in `fit`.
            batch_size: 32 if None.
            num_workers: Processes that read a `Dataset`.
        """
        with in_eval_mode(self.model):
            batches = self._batches(data, batch_size, num_workers, with_targets=True)
            loss, accuracy = evaluate(self.model, batches, device=self.device)
        return {"loss": loss, "accuracy": accuracy}

    def assess(self, data: object, *, batch_size: int | None = None, num_workers: int = 0) -> Assessment:
        """Return what the model makes of each image of labelled data: accuracy by class, top k, confusion matrix.

        The arguments are those of `evaluate`.

        Raises:
            NonFiniteError: The model makes infinity or NaN of an image.

        Example:
            >>> print(trainer.assess(test))  # doctest: +SKIP
            accuracy 0.6920, loss 0.9127, 500 images
            class       precision  recall      f1  images
            airplane       0.7255  0.7400  0.7327      50
            ...
        """
        with in_eval_mode(self.model):
            batches = self._batches(data, batch_size, num_workers, with_targets=True)
            return assess(self.model, batches, self.model.classes, device=self.device)

    def predict_proba(
        self, images: object, *, batch_size: int | None = None, num_workers: int = 0
    ) -> npt.NDArray[np.float32]:
        """Return the probability of each class, float32 `(N, len(classes))`, rows summing to one.

        Args:
            images: One image: the path of a file, a PIL image, an array or tensor `(H, W, 3)` or `(3, H, W)`. Or
                many: a list of these, or all that `fit` takes, with targets (which are not looked at) or without.
            batch_size: 32 if None.
            num_workers: Processes that read a `Dataset` or a list.

        Raises:
            ImageError: An image cannot be read or used; the message has its place and path.
            NonFiniteError: The model makes infinity or NaN of an image.
        """
        with in_eval_mode(self.model):
            batches = self._batches(images, batch_size, num_workers, with_targets=False)
            return predict_proba(self.model, batches, device=self.device)

    def predict(self, images: object, *, batch_size: int | None = None, num_workers: int = 0) -> npt.NDArray[np.int64]:
        """Return the most probable class index of each image, int64 `(N,)`; `predict_classes` returns names.

        The arguments are those of `predict_proba`.
        """
        probabilities = self.predict_proba(images, batch_size=batch_size, num_workers=num_workers)
        classes: npt.NDArray[np.int64] = probabilities.argmax(axis=1)
        return classes

    def predict_classes(self, images: object, *, batch_size: int | None = None, num_workers: int = 0) -> list[str]:
        """Return the name of the most probable class of each image.

        The arguments are those of `predict_proba`.

        Example:
            >>> trainer.predict_classes(["holiday/0001.jpg", "holiday/0002.jpg"])  # doctest: +SKIP
            ['dog', 'airplane']
        """
        indices = self.predict(images, batch_size=batch_size, num_workers=num_workers)
        return [self.model.classes[index] for index in indices]

    def state_dict(self) -> dict[str, Any]:
        """Return model, optimizer and progress as plain types and tensors, which are not copies."""
        return training_state(self, self._progress)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, what is frozen included; on any difference nothing is changed.

        Raises:
            HeadMismatchError: Other classes.
            CheckpointError: Another backbone, head, preprocessing or optimizer.
        """
        check_training_state(self, state, origin="the checkpoint")
        assign_training_state(self, state)

    def save(self, path: str | os.PathLike[str], *, frozen: bool = True) -> None:
        """Write a checkpoint, whole or not at all; `load` and `transferkit.load_model` read it.

        Args:
            path: Of the file.
            frozen: False leaves out the weights that are frozen; whoever reads it must have them, and is told by their
                SHA-256 whether they are the same.

        Raises:
            CheckpointWriteError: The folder is missing, read-only or full; what was there before still is.
        """
        state = self.state_dict()
        model = state["model"] if frozen else model_state.leave_out_frozen(state["model"], self.model)[0]
        archive.write_checkpoint(path, {**state, "model": model})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over a checkpoint that `save` or a `Checkpoint` wrote; see `load_state_dict`.

        Raises:
            CheckpointError: No such file, a damaged one, or one that does not fit.
            HeadMismatchError: It has other classes.
        """
        assign_training_state(self, complete_training_state(self, archive.read_checkpoint(path), Path(path)))

    def share_features(self, other: "Trainer") -> None:
        """Use the kept features of another trainer on the same device, and add to them.

        Which of them belong to this trainer's data and frozen layers is told by their key, as always.
        """
        self._features.share(other._features)

    def _begin(self, run: Run, facts: dict[str, Any]) -> Progress:
        sums = Sums(self.device.torch_device)
        return Progress(facts, self.global_step, self.epoch, run.num_steps, BestWeights(self.model), sums)

    def _begin_run(self, run: Run, lr: LearningRate | None, checkpoints: Sequence[Checkpoint]) -> None:
        check_trains(self.model, run)
        for checkpoint in checkpoints:
            checkpoint.check_new_run(self.global_step)
        if lr is not None:
            set_lr(self.optimizer, lr)

    def _check_validation(self, run: Run) -> None:
        """Read one image to validate on now: a whole epoch would be lost on data that cannot be used."""
        if run.validation is not None:
            next(Inputs(run.validation, self.model.backbone.preprocess, self.device).batches(1))

    def _weigh_classes(self, run: Run) -> None:
        weights = find_class_weights(self.class_weights, run.source, len(self.model.classes))
        self.cross_entropy = CrossEntropy(self.cross_entropy.label_smoothing, self.device.move(weights))

    def _feeds(self, run: Run, display: Display) -> tuple[Feed, Feed | None]:
        """Return what the epochs of a run train and validate on."""
        if self.recompute_activations:
            check_recomputable(self.model)
        preprocess = self.model.backbone.preprocess
        inputs = Inputs(run.source, preprocess, self.device, run.transform, self.seed)
        feed = partial(Feed, frozen=self._frozen, cache=self._features, mode=self.cache, display=display)
        train = feed(inputs, num_views=run.num_views, what="training")
        train.check()
        if run.validation is None:
            return train, None
        validation = feed(Inputs(run.validation, preprocess, self.device), num_views=None, what="validation")
        validation.check()
        return train, validation

    def _batches(
        self, data: object, batch_size: int | None, num_workers: int, *, with_targets: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        source = open_data(data, self.model.classes, num_workers=num_workers, with_targets=with_targets)
        inputs = Inputs(source, self.model.backbone.preprocess, self.device)
        return inputs.batches(choose_batch_size(source, batch_size))
