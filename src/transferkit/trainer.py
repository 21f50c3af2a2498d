"""`Trainer` composes the other parts; `fit` is a short loop over the steps of an epoch."""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transferkit import archive, model_state, optimizer_state
from transferkit.arguments import positive, share, whole_number
from transferkit.augmentation import Augment, describe_augmentation
from transferkit.best import BestWeights
from transferkit.checkpoint import Checkpoint, read_newest
from transferkit.data import epoch_order, open_data
from transferkit.device import Device
from transferkit.errors import ArgumentError, CheckpointError, NonFiniteError
from transferkit.evaluation import evaluate, in_eval_mode
from transferkit.features import FeatureCache, Say, open_folder, say_nothing
from transferkit.feed import Batches, Feed, Frozen
from transferkit.finite import FiniteFlags, check_policy, check_scale, find_nonfinite
from transferkit.freezing import describe_frozen
from transferkit.head import TransferModel
from transferkit.history import EpochReport, History
from transferkit.inputs import Inputs
from transferkit.interrupts import Interruption, Interrupts
from transferkit.linear_adam import find_linear_adam
from transferkit.optimizers import LearningRate, OptimizerClass, build_optimizer, find_lr, scale_lr, set_lr
from transferkit.progress import Progress, check_progress
from transferkit.randomness import derive_seed, seeded
from transferkit.recompute import Recomputed, check_recomputable
from transferkit.run import Run, check_trains, choose_batch_size, open_run
from transferkit.schedules import SCHEDULES, Schedule, check_schedule, find_schedule, lr_factor
from transferkit.step import CrossEntropy, Step, Sums, check_class_weights, evaluation_step, training_step

KEPT_BATCH_SIZE = 256
"""Images validated at once where their features are kept: there are no convolutions to take memory."""

SCALE_CHECKED_EVERY = 50
"""Steps between two looks at the gradient scale of fp16, each of which waits for the device."""

PARTS: dict[str, dict[str, tuple[type, ...]]] = {
    "model": model_state.PARTS,
    "optimizer": {"class": (str,), "groups": (list,), "state": (dict,)},
    "scaler": {},
    "progress": {
        "epoch": (int,),
        "global_step": (int,),
        "seed": (int,),
        "micro_batch_size": (int, type(None)),
        "precision": (str,),
        "device": (str,),
    },
}

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
        weights = check_class_weights(class_weights, len(model.classes))
        self.cross_entropy = CrossEntropy(share("label_smoothing", label_smoothing), self.device.move(weights))
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
        self._frozen = Frozen(model, self.device, compiled=torch_compile)
        self._progress: Progress | None = None
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
                the run. A `Checkpoint` is one.
            resume_from: A checkpoint saved during a run, or the folder of a `Checkpoint`: the run is resumed with the
                same result as if it had never stopped, and the history is that of all of it. In a folder that has none
                yet it begins. `epochs` counts those that were done; data and other arguments must be those of the
                run. A `DataLoader` that shuffles draws another order.
            restore_best: Put the weights of the epoch with the highest validation accuracy back at the end, whatever
                ended the run (the optimizer's state stays the last). Without validation data the last weights stay.
            on_bad_image: `"skip"` reads a `Dataset` once before the run and leaves out, with a line for each, the
                images that cannot be used: at most 1 % of them, or one. `"raise"` ends the run at the first.
            num_workers: Processes that read a `Dataset`.
            verbose: 1 prints a line at the start and one for each epoch, 0 nothing.

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
        say = _print if verbose else say_nothing
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
                say=say,
                check=self._interrupts.check,
            )
            check_schedule(self.schedule, run.num_steps)
            self._check_validation(run)
            facts: dict[str, Any] = {}
            if callbacks or resume_from is not None:
                facts = {**self._facts(run, lr, epochs, augment), "restore_best": restore_best}
            saved = None if resume_from is None else self._read_run(resume_from, facts, checkpoints, say)
            if saved is None:
                self._begin_run(run, lr, checkpoints)
            else:
                self._assign(saved)  # nothing was changed before
            say(f"{describe_frozen(self.model)}; on {self.device.torch_device} in {self.device.precision}")
            train, validation = self._feeds(run, say=say)
            progress = self._begin(run, facts)
            if saved is not None:
                progress.load(saved["run"])
                self.epoch, self.micro_batch_size = progress.epoch, saved["progress"]["micro_batch_size"]
            fit_epoch = partial(self._fit_epoch, run, train, validation, progress, checkpoints)
            self._run_epochs(fit_epoch, progress, epochs, callbacks, restore_best=restore_best, say=say)
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
        if lr is not None:
            set_lr(self.optimizer, lr)
        train, _ = self._feeds(run, say=say_nothing)
        progress = self._begin(run, {})
        return (step for _ in range(epochs) for step in self._train_epoch(run, train, progress, first=0))

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

        Raises:
            NonFiniteError: The model makes infinity or NaN of an image.
        """
        source = open_data(images, self.model.classes, num_workers=num_workers, with_targets=False)
        inputs = Inputs(source, self.model.backbone.preprocess, self.device)
        with in_eval_mode(self.model):
            batches = inputs.batches(choose_batch_size(source, batch_size))
            logits = [evaluation_step(self.model, images, device=self.device) for images, _ in batches]
        probabilities = torch.cat([part.softmax(dim=1).cpu() for part in logits])
        if bool((wrong := probabilities.isnan().any(dim=1)).any()):
            raise NonFiniteError(
                f"the logits of image {int(wrong.nonzero()[0])} are infinite or NaN: expected finite images and "
                "weights. Look at that image and at the weights."
            )
        return probabilities.numpy()

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
            "model": model_state.model_state(self.model),
            "optimizer": optimizer_state.optimizer_state(self.optimizer, self.model),
            "scaler": self.device.scaler.state_dict(),
            "progress": {
                "epoch": self.epoch,
                "global_step": self.global_step,
                "seed": self.seed,
                "micro_batch_size": self.micro_batch_size,
                "precision": self.device.precision,
                "device": self.device.torch_device.type,
            },
            "run": None if self._progress is None else self._progress.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, what is frozen included; on any difference nothing is changed.

        Raises:
            HeadMismatchError: Other classes.
            CheckpointError: Another backbone, head, preprocessing or optimizer.
        """
        self._check(state, origin="the checkpoint")
        self._assign(state)

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
        self._assign(self._complete(archive.read_checkpoint(path), Path(path)))

    def _complete(self, state: dict[str, Any], path: Path) -> dict[str, Any]:
        """Return a state read from a file, with the frozen weights it left out, once it is known to fit."""
        archive.check_parts(state, PARTS, origin=str(path))
        state = {**state, "model": model_state.put_back(state["model"], path, self.model.state_dict())}
        self._check(state, origin=str(path))
        return state

    def _check(self, state: Mapping[str, Any], *, origin: str) -> None:
        archive.check_parts(state, PARTS, origin=origin)
        model_state.check_model_state(self.model, state["model"])
        optimizer_state.check_optimizer_state(self.optimizer, self.model, state["optimizer"])
        live, saved = self.device.scaler.state_dict(), state["scaler"]
        if (
            live
            and saved
            and (set(live) != set(saved) or any(type(saved[name]) is not type(live[name]) for name in live))
        ):
            raise CheckpointError(f"{origin} has a gradient scaler of {saved}: expected numbers for {', '.join(live)}.")

    def _assign(self, state: Mapping[str, Any]) -> None:
        """Take over a state that is known to fit."""
        position = state["progress"]
        here = {"precision": self.device.precision, "device": self.device.torch_device.type}
        there = {name: position[name] for name in here}
        if here != there:
            warnings.warn(
                f"the checkpoint is from {there['device']} in {there['precision']}, and goes on on {here['device']} in "
                f"{here['precision']}: numbers will differ from those of a run that stayed there"
                + (", and its gradient scale is dropped." if state["scaler"] and here["precision"] != "fp16" else "."),
                stacklevel=3,
            )
        model_state.load_model_state(self.model, state["model"])
        optimizer_state.load_optimizer_state(self.optimizer, self.model, state["optimizer"])
        if state["scaler"] and self.device.scaler.is_enabled():  # empty unless it was saved from fp16
            self.device.scaler.load_state_dict(state["scaler"])
        self.epoch = position["epoch"]
        self.global_step = position["global_step"]
        self.seed = position["seed"]

    def _read_run(
        self, path: str | os.PathLike[str], facts: dict[str, Any], checkpoints: Sequence[Checkpoint], say: Say
    ) -> dict[str, Any] | None:
        """Return the state to resume from, known to fit; None if the folder has none yet."""
        found = read_newest(path)
        if found is None:
            say(f"{path} has no checkpoint yet: the run begins")
            return None
        file, state = found
        state = self._complete(state, file)
        check_progress(state.get("run"), facts, self.model.state_dict(), origin=str(file))
        for checkpoint in checkpoints:
            if checkpoint.folder.resolve() != file.parent.resolve():
                checkpoint.check_new_run(state["progress"]["global_step"])
        say(f"resumed from {file}")
        return state

    def _facts(self, run: Run, lr: LearningRate | None, epochs: int, augment: Augment | None) -> dict[str, Any]:
        """Return what a call must have in common with the one it resumes."""
        constant = self.schedule is SCHEDULES["constant"]
        weights = self.cross_entropy.class_weights
        return {
            "training data": [run.source.num_images, run.source.digest()],
            "validation data": None if run.validation is None else [run.validation.num_images, run.validation.digest()],
            "batch_size": run.batch_size,
            "augment": None if augment is None else describe_augmentation(augment),
            "n_views": run.num_views,
            "lr": find_lr(self.optimizer, lr),
            "schedule": next((name for name, known in SCHEDULES.items() if known is self.schedule), "a function"),
            "epochs": None if constant else epochs,  # a schedule runs over all of them
            "weight_decay": [group.get("weight_decay") for group in self.optimizer.param_groups],
            "micro_batch_size": self.micro_batch_size,
            "warmup_steps": self.warmup_steps,
            "clip_grad_norm": self.clip_grad_norm,
            "label_smoothing": self.cross_entropy.label_smoothing,
            "class_weights": None if weights is None else weights.tolist(),
            "seed": self.seed,
        }

    def _begin(self, run: Run, facts: dict[str, Any]) -> Progress:
        sums = Sums(self.device.torch_device)
        return Progress(facts, self.global_step, self.epoch, run.num_steps, BestWeights(self.model), sums)

    def _save_where_it_stands(self, callbacks: Sequence[Callback]) -> str:
        """Save a run that ends early, if a step is not half made, and say so."""
        checkpoints = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
        stop = f"stopped after step {self.global_step}"
        if not checkpoints:
            return f"{stop}; nothing was saved: there is no Checkpoint among the callbacks"
        if self._progress is None or not self._progress.between_steps:
            return f"{stop}; a step was under way, so the last checkpoint is the one before"
        paths = [str(path) for checkpoint in checkpoints if (path := checkpoint.try_to_save(self))]
        return f"{stop}; saved to {', '.join(paths)}" if paths else f"{stop}; it could not be saved"

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

    def _begin_run(self, run: Run, lr: LearningRate | None, checkpoints: Sequence[Checkpoint]) -> None:
        check_trains(self.model, run)
        for checkpoint in checkpoints:
            checkpoint.check_new_run(self.global_step)
        if lr is not None:
            set_lr(self.optimizer, lr)

    def _run_epochs(
        self,
        fit_epoch: Callable[[], EpochReport],
        progress: Progress,
        epochs: int,
        callbacks: Sequence[Callback],
        *,
        restore_best: bool,
        say: Say,
    ) -> None:
        """Make what is left of the epochs, and leave the best weights in the model, whatever ends it."""
        self._progress = progress
        try:
            while len(progress.history.reports) < epochs and not progress.ended:
                report = fit_epoch()
                progress.finish_epoch(report)
                if restore_best and progress.history.best_epoch == len(progress.history.reports) - 1:
                    progress.best.take()
                say(str(report))
                progress.ended = any([callback(self, report) is True for callback in callbacks])  # noqa: C419 - call all
                if progress.ended:
                    self._save_where_it_stands(callbacks)
                self._interrupts.check()
        except BaseException as error:
            if self._interrupts.twice:
                raise
            stop = self._save_where_it_stands(callbacks)
            if isinstance(error, Interruption) or self._interrupts.received is not None:
                say(stop)
                raise Interruption(stop) from error
            raise
        finally:
            progress.best.restore()
            self._progress = None

    def _fit_epoch(
        self, run: Run, train: Feed, validation: Feed | None, progress: Progress, checkpoints: Sequence[Checkpoint]
    ) -> EpochReport:
        """Train for what is left of an epoch, validate, and return its report."""
        started = time.perf_counter()
        progress.best.before_training()
        for step in self._train_epoch(run, train, progress, first=progress.batches):
            progress.add(step)
            for checkpoint in checkpoints:
                checkpoint.after_step(self)
            self._interrupts.check()
        loss, accuracy = progress.sums.means()
        val_loss, val_accuracy = (None, None)
        if validation is not None:
            val_loss, val_accuracy = self._validate(validation, run.batch_size)
        epoch_s = time.perf_counter() - started
        skipped = progress.skipped - progress.skipped_before
        lr = self.optimizer.param_groups[-1]["lr"]
        return EpochReport(progress.epoch, loss, accuracy, lr, epoch_s, val_loss, val_accuracy, skipped)

    def _train_epoch(self, run: Run, feed: Feed, progress: Progress, *, first: int) -> Iterator[Step]:
        """Make the steps of one epoch, from batch `first` on."""
        self.model.train()
        num_batches = run.source.num_batches(run.batch_size)
        if first == 0 or num_batches is None or first < num_batches:
            order = epoch_order(run.source.num_images, self.seed, self.epoch)
            rest = None if order is None else order[first * run.batch_size :]
            network, batches = feed.open(run.batch_size, order=rest, epoch=self.epoch)
            with closing(batches):  # or a kept traceback would keep worker processes
                for _ in range(0 if order is not None else first):
                    next(batches, None)  # a DataLoader's own batches: read, and passed over
                yield from self._train_batches(network, batches, feed, progress, first=first)
        self.epoch += 1

    def _train_batches(
        self, network: nn.Module, batches: Batches, feed: Feed, progress: Progress, *, first: int
    ) -> Iterator[Step]:
        if self.recompute_activations:
            network = Recomputed(network)
        whole = self.clip_grad_norm is None and self.micro_batch_size is None and not self.torch_compile
        linear_adam = find_linear_adam(network, self.optimizer, device=self.device) if whole else None
        flags = FiniteFlags(late=self.device.torch_device.type == "cuda" and self.on_nonfinite == "raise")
        for index, (inputs, targets) in enumerate(batches, start=first):
            made = self.global_step - progress.first_step
            scale_lr(self.optimizer, lr_factor(self.schedule, made, progress.num_steps, self.warmup_steps))
            seed = derive_seed(self.seed, "step", self.global_step)  # for dropout
            progress.between_steps = False
            loss, correct, finite, size = training_step(
                network,
                inputs,
                targets,
                device=self.device,
                optimizer=self.optimizer,
                cross_entropy=self.cross_entropy,
                seed=seed,
                micro_batch_size=self.micro_batch_size or len(targets),
                clip_grad_norm=self.clip_grad_norm,
                linear_adam=linear_adam,
                go_on=flags.go_on,
            )
            if size < min(self.micro_batch_size or len(targets), len(targets)):
                feed.say(f"memory did not suffice: batches go through in parts of {size} from here on, the same update")
                self.micro_batch_size = size
            bad = flags.add(
                finite,
                partial(self._explain_nonfinite, network, inputs, targets, size, step=self.global_step, index=index),
            )
            if bad is not None:
                if self.on_nonfinite == "raise" or progress.skipped == self.max_skipped:
                    progress.between_steps = not flags.late
                    raise bad()
                progress.skip(index)
                continue
            self.global_step += 1
            if self.global_step % SCALE_CHECKED_EVERY == 0:
                check_scale(self.device)
            yield Step(self.epoch, index, loss, correct, len(targets), self.optimizer.param_groups[-1]["lr"])
        if (bad := flags.last()) is not None:
            raise bad()
        check_scale(self.device)

    def _explain_nonfinite(
        self, network: nn.Module, inputs: Tensor, targets: Tensor, size: int, *, step: int, index: int
    ) -> NonFiniteError:
        def loss_of(logits: Tensor, part_targets: Tensor) -> Tensor:
            return self.cross_entropy.sum(logits, part_targets) / self.cross_entropy.total_weight(targets)

        parts = list(zip(torch.split(inputs, size), torch.split(targets, size), strict=True))
        with seeded(derive_seed(self.seed, "step", step), self.device.torch_device):
            first = find_nonfinite(network, parts, loss_of, model=self.model, device=self.device)
        return NonFiniteError(
            f"in step {step} (epoch {self.epoch}, batch {index}, all from 0) a number is infinite or NaN, "
            f"first in {first}. No weight was changed by it. Look at that image, lower the learning rate, or clip "
            f'gradients; on_nonfinite="skip" leaves out up to max_skipped={self.max_skipped} such steps.'
        )

    def _validate(self, feed: Feed, batch_size: int) -> tuple[float, float]:
        """Return loss and accuracy on the images to validate on."""
        network, batches = feed.open(batch_size, kept_batch_size=max(batch_size, KEPT_BATCH_SIZE))
        with in_eval_mode(self.model), closing(batches):
            return evaluate(network, self._interrupts.watched(batches), device=self.device)


def _print(line: str) -> None:
    print(line)  # noqa: T201
