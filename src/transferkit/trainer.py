"""`Trainer` composes the other parts."""

import copy
import inspect
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.optim import Optimizer

from transferkit.base.arguments import positive, whole_number
from transferkit.base.calls import explained
from transferkit.base.display import Display
from transferkit.base.processes import copy_from_rank_0, rank, together
from transferkit.base.surroundings import own_surroundings
from transferkit.compute.device import Device, find_device
from transferkit.data.augmentation import Augment
from transferkit.data.selection import split_validation
from transferkit.errors import ArgumentError, CheckpointTypeError
from transferkit.features.cache import find_cache
from transferkit.linear.choice import LinearHead
from transferkit.model.freezing import first_trainable
from transferkit.model.head import TransferModel, check_float32, check_head
from transferkit.model.modes import evaluating
from transferkit.results.assessment import Assessment
from transferkit.results.history import History
from transferkit.results.lr_sweep import LearningRateSweep
from transferkit.saving import archive
from transferkit.saving import model as model_state
from transferkit.training import evaluation
from transferkit.training.callback_list import CallbackList
from transferkit.training.loop import Callback, begin_run, finish_run, one_by_one
from transferkit.training.loss import Loss, LossFunction, find_loss
from transferkit.training.lr_find import spaced_rates, sweep
from transferkit.training.metrics import check_metrics
from transferkit.training.optimizers import LearningRate, OptimizerClass, build_optimizer
from transferkit.training.run import (
    check_same_data,
    check_trains,
    naming,
    open_feed,
    open_held_out,
    open_run,
    open_source,
    without_loader,
)
from transferkit.training.schedules import Schedule, find_schedule
from transferkit.training.solving import solve_head
from transferkit.training.standardizing import measure_features
from transferkit.training.state import (
    assign_training_state,
    check_training_state,
    complete_training_state,
    training_state,
)
from transferkit.training.step import Step
from transferkit.training.training import Training


@explained
class Trainer:
    """Trains a `TransferModel`, evaluates it and predicts with it.

    Args:
        model: From `attach_head`; it is moved to the device. More or less of it may be frozen between two calls of
            `fit`.
        optimizer: `"adam"`, `"adamw"`, `"sgd"` (momentum 0.9), `"rmsprop"`, an optimizer class or
            `functools.partial` of one, or an instance over the model's parameters. Fused where torch can.
        lr: Learning rate, above 0: one number, or `{"backbone": 1e-5, "head": 1e-3}`, in which blocks may have their
            own (`"block5": 1e-4`; see `discriminative_lr`). None is 3e-4 for the head and 1e-4 for the backbone (1e-2
            and 1e-3 with `"sgd"`), and the own default of an optimizer class.
        weight_decay: 0 or more; None is the optimizer's own default, 0.01 for AdamW and 0 for the others named here.
        schedule: `"constant"`, `"linear"` or `"cosine"` (both fall to 0 over one call of `fit`), `"one_cycle"` (rises
            from 1/25 over the first 30 % of the steps, then falls to 0), `warmup("cosine", 0.1)`, or a function of
            progress (0 to 1) that returns a factor. Steps that fp16 skips count. `"auto"` is `warmup("cosine", 0.1)`
            where the number of steps is known and no scheduler of torch's was built over the optimizer, else
            `"constant"`. If a callback or a scheduler writes a learning rate into the optimizer's groups, it holds for
            the rest of the run, and the next run starts from it.
        clip_grad_norm: Largest Euclidean norm of all gradients together; None does not clip.
        loss: `CrossEntropy` (None), `BinaryCrossEntropy` for several labels per image, or any function or module of
            (logits, targets) that returns the mean over a batch.
        metrics: Further metrics, `{"f1": function}`: a function of (probabilities, targets), or a torchmetrics object.
            Each is computed over all images of a pass. It joins every report, as `f1` and `val_f1`, and the results of
            `evaluate` and `assess`.
        device: `"auto"`, `"cuda"`, `"cuda:1"`, `"mps"`, `"cpu"`, a `torch.device` or a `Device`.
        precision: `"auto"`, `"bf16"`, `"fp16"` or `"fp32"`; see `Device`.
        cache: `"auto"` computes the output of the frozen layers once for each image, caches it, and trains the rest on
            it, if this gives the same result; if not, it says so. True raises an error then. False never caches. A
            folder caches in files there, for later runs and other processes. Otherwise features stay on the device if
            they fit into half of its free memory, else in host memory.
        max_skipped: Steps of one run that may be skipped because the loss or a gradient is infinite or NaN; such a step
            changes no weight. One more is an error. The gradient scaler handles overflows in fp16; they do not count.
        seed: Determines the order of images, augmentation, dropout and validation split. The head's initial weights are
            drawn earlier, in `attach_head`, by your `torch.manual_seed`.

    Attributes:
        model: The model.
        device: The `Device`.
        optimizer: The optimizer, with one group of parameters for each block and one for the head. Assign another, its
            name or its class; it starts without a state.
        micro_batch_size: Images that pass through the network at once. None, the default, is the whole batch. Assign a
            number to save memory: gradients of the micro-batches add up, and the update stays that of the whole batch.
            It falls by itself when memory runs out.
        epoch: Epochs finished so far.
        global_step: Steps made so far.
        history: The `History` of the current run, which callbacks may read, else of the last one; None before.
        metrics: The metrics by name.
        seed: Determines the order of images, augmentation and dropout.

    Raises:
        ArgumentError: When a value is out of range.
        DeviceError: When the machine has no such device or cannot compute in that precision.

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

    @together("Trainer")
    @own_surroundings()
    def __init__(
        self,
        model: TransferModel,
        *,
        optimizer: str | OptimizerClass | Optimizer = "adam",
        lr: LearningRate | None = None,
        weight_decay: float | None = None,
        schedule: str | Schedule = "auto",
        clip_grad_norm: float | None = 1.0,
        loss: Loss | LossFunction | None = None,
        metrics: object = None,
        device: str | torch.device | Device = "auto",
        precision: str = "auto",
        cache: bool | str | os.PathLike[str] = "auto",
        max_skipped: int = 0,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, TransferModel):
            raise ArgumentError(
                f"model is a {type(model).__name__}: expected a TransferModel from attach_head. For a module of your "
                "own use transferkit.Device in your own loop."
            )
        place = find_device(device, precision)
        check_float32(model, trains=True)
        found = find_loss(loss, model, place.torch_device)
        cache_mode, cache_folder = find_cache(cache)
        self.training = Training(
            model=place.prepare(model),
            device=place,
            optimizer=build_optimizer(optimizer, model, lr, weight_decay),
            loss=found,
            metrics=check_metrics(metrics),
            schedule=find_schedule(schedule),
            clip_grad_norm=None if clip_grad_norm is None else positive("clip_grad_norm", clip_grad_norm),
            max_skipped=whole_number("max_skipped", max_skipped, at_least=0),
            seed=whole_number("seed", seed, at_least=0),
            pretrained=model.backbone.is_trained(),
            cache_mode=cache_mode,
            cache_folder=cache_folder,
        )
        self._history: History | None = None
        check_head(model)
        model.threshold = found.threshold
        copy_from_rank_0([*model.state_dict().values()])

    def __setattr__(self, name: str, value: object) -> None:
        if name in SETTINGS - {"optimizer", "micro_batch_size"}:
            raise ArgumentError(
                f"trainer.{name} = ... would have no effect: a Trainer keeps the settings it was made with. Expected "
                "an argument of Trainer or fit, such as fit(lr=1e-4), or a new Trainer over the same model."
            )
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        """Say in one line what trains, on what, and how far it has come."""
        backbone, first = self.model.backbone, first_trainable(self.model)
        trains = "nothing trains" if first is None else f"trains from {first} on"
        return (
            f"Trainer({backbone.name} at {backbone.image_size} px, {len(self.model.classes)} classes, {trains}, "
            f"{type(self.optimizer).__name__}, {self.device}, epoch {self.epoch})"
        )

    @property
    def model(self) -> TransferModel:
        return self.training.model

    @property
    def device(self) -> Device:
        return self.training.device

    @property
    def optimizer(self) -> Optimizer:
        return self.training.optimizer

    @optimizer.setter
    def optimizer(self, value: str | OptimizerClass | Optimizer) -> None:
        self.training.optimizer, self.training.optimizer_mode = build_optimizer(value, self.model, None, None), "eval"

    @property
    def seed(self) -> int:
        return self.training.seed

    @property
    def metrics(self) -> Mapping[str, Any]:
        return self.training.metrics

    @property
    def epoch(self) -> int:
        return self.training.epoch

    @property
    def global_step(self) -> int:
        return self.training.global_step

    @property
    def micro_batch_size(self) -> int | None:
        return self.training.micro_batch_size

    @micro_batch_size.setter
    def micro_batch_size(self, value: int | None) -> None:
        self.training.micro_batch_size = None if value is None else whole_number("micro_batch_size", value)

    @property
    def history(self) -> History | None:
        return self._history

    def fit(
        self,
        data: object,
        *,
        validation_data: object = None,
        validation_split: float | None = None,
        epochs: int = 10,
        batch_size: int | None = None,
        lr: LearningRate | None = None,
        augment: Augment | None = None,
        n_views: int | None = None,
        callbacks: Sequence[Callback] = (),
        resume_from: str | os.PathLike[str] | None = None,
        on_bad_image: str | float = "raise",
        num_workers: int = 0,
        verbose: int = 1,
    ) -> History:
        """Train for some epochs, validate after each, and restore the weights of the best one.

        Ctrl-C (SIGINT) and SIGTERM end the run after the current step or batch, and are then raised again as
        `KeyboardInterrupt` or exit status 143; a second one ends it at once. If anything ends a run between two steps,
        a `Checkpoint` among the callbacks saves it first.

        Afterwards the model is in eval mode. A layer that you put into eval mode while the rest was in training mode
        stays in eval mode during training. Other threads cannot use the model during a run; before and after, any
        number may predict.

        Args:
            data: `(images, targets)`; a `Dataset` of such pairs, or of dicts with an image and a label; a `DataLoader`
                of batches; or a table or dict with a column for each. Images are raw, uint8 `(N, 3, H, W)` or
                `(N, H, W, 3)`, or preprocessed, float; or a list of PIL images of any sizes, arrays or paths. Targets
                are class indices, class names, or one-hot or soft rows; with `BinaryCrossEntropy`, multi-hot rows. A
                head with numbers for classes takes the names that `data` has.
            validation_data: Data of the same forms, evaluated after each epoch. At the end, however the run ended, the
                weights of the epoch with the highest validation accuracy are restored; the optimizer's state stays the
                last. Without validation data, or with `WeightAverage(restore_best=False)`, the last weights stay.
            validation_split: Fraction of `data` to hold out as validation data instead, drawn at random by the seed.
            epochs: 1 or more.
            batch_size: 1 or more; 32 if None. A `DataLoader` has its own.
            lr: A new base learning rate, from this call on.
            augment: Random changes to raw training images: `"flip"`, `"crop"`, `"color"`, `"trivial"`, a
                `torchvision.transforms.v2` transform or any callable of one image, or a list of these.
            n_views: Makes this many fixed views of each image, with `augment` or with a `Dataset` whose own transform
                is random. Epochs use them in turn, so their features can be cached. None draws new changes in every
                epoch and caches no features of augmented images.
            callbacks: Called after each epoch with the trainer and the `EpochReport`; one that returns True ends the
                run. `CallbackList` describes what else a callback may have.
            resume_from: A checkpoint saved during a run, or the folder of a `Checkpoint`. The run continues with the
                result of an uninterrupted run, and the history covers all of it. If the folder has no
                checkpoint, a new run starts. `epochs` counts the finished ones; data and other arguments must be those
                of the run. A `DataLoader` that shuffles draws another order.
            on_bad_image: `"skip"` reads a `Dataset` once before the run and skips images that cannot be used, with a
                line for each: at most 1 % of them, or one. A number is another limit: 0.05 skips up to 5 %. `"raise"`
                ends the run at the first.
            num_workers: Processes that read a `Dataset`.
            verbose: 0 shows nothing; 2 a line at the start and one for each epoch; 1 also progress bars, in a terminal
                or a notebook with `tqdm` installed.

        Returns:
            The reports of the run's epochs.

        Raises:
            NothingToTrainError: When everything is frozen.
            NonFiniteError: When a loss or gradient is infinite or NaN, and `max_skipped` steps were skipped before.
            OutOfMemoryError: When even one image at a time does not fit into memory.
            CacheError: When features cannot be cached although `cache=True` asks for it.
            CheckpointError: When the checkpoint to resume from cannot be used.
            DataChangedError: When the run to resume began with other data.
            CheckpointWriteError: At the end, if the last save of a `Checkpoint` failed.
            ModelInUseError: When another thread trains the model, or a callback calls `fit`.
            TransferKitError: When arguments or data cannot be used: before the first step, except for what a `Dataset`
                or `DataLoader` hides until it is read.
        """
        if validation_data is not None and validation_split is not None:
            raise ArgumentError("validation_data and validation_split are both given: expected one of them.")
        called, display, training = CallbackList(self, callbacks), Display(verbose), self.training
        with training.alone("fit"), training.interrupts, naming(training, data), closing(called):
            train = open_source(training, data, num_workers, on_bad_image, display)
            held_out = open_held_out(training, validation_data, num_workers, on_bad_image, display)
            if validation_split is not None:
                several = self.model.threshold is not None
                train, held_out = split_validation(train, validation_split, self.seed, multi_label=several)
            run = open_run(
                training,
                open_feed(training, train, augment=augment, n_views=n_views, display=display),
                None if held_out is None else open_feed(training, held_out, "validation", display=display),
                epochs=epochs,
                batch_size=batch_size,
                validation_data=validation_data,
                restore_best=called.restore_best,
            )
            progress = begin_run(training, run, called, "fit", lr=lr, augment=augment, resume_from=resume_from)
            self._history = progress.history
            finish_run(training, progress)
        with training.alone("the end of fit"):
            called.each("after_run")
        return progress.history

    def solve(
        self,
        data: object,
        *,
        validation_data: object = None,
        l2: float | None = None,
        folds: int = 4,
        augment: Augment | None = None,
        n_views: int | None = None,
        on_bad_image: str | float = "raise",
        num_workers: int = 0,
        verbose: int = 1,
    ) -> LinearHead:
        """Solve a linear head on a frozen backbone: the weights of lowest loss, without learning rate or epochs.

        The features of each image are computed once. Logistic regression with an L2 penalty is then solved to its
        optimum on all of them at once, for penalties from strong to weak. Held-out images choose the penalty, and set
        the model's temperature. The result is an ordinary head, which can be trained further together with deeper
        layers.

        Args:
            data: As in `fit`, but no `DataLoader` that shuffles.
            validation_data: Images that choose the penalty. None uses cross-validation: each fold is held out once, and
                the final head is solved on all images. Pass some if the frozen layers were trained on `data`, whose
                held-out figures would be too good.
            l2: The penalty, above 0: the mean loss plus `l2 / 2` times the sum of the squared weights on standardized
                features. None chooses it among 15 from 100 to 1e-5.
            folds: Parts of the cross-validation, 2 or more; as many as images is leave-one-out.
            augment: As in `fit`; needs `n_views`.
            n_views: Fixed views of each image, each a row of its own.
            on_bad_image: As in `fit`.
            num_workers: As in `fit`.
            verbose: As in `fit`.

        Returns:
            The solved head, with accuracy and loss of the held-out images for each penalty tried.

        Raises:
            HeadMismatchError: When the head is not linear.
            CacheError: When more than the head trains, or features cannot be cached.
            TransferKitError: As in `fit`.

        Example:
            >>> found = trainer.solve(train)  # doctest: +SKIP
            >>> print(found)  # doctest: +SKIP
            accuracy 0.7355 ± 0.0098 on held-out images, L2 0.0316
        """
        display, training = Display(verbose), self.training
        with training.alone("solve"), training.interrupts, naming(training, data):
            source = open_source(training, *without_loader(data, num_workers), on_bad_image, display)
            held_out = open_held_out(training, validation_data, num_workers, on_bad_image, display)
            check_same_data(source, self.model, "solve", l2=l2, folds=folds, n_views=n_views)
            solved = solve_head(
                training,
                open_feed(training, source, augment=augment, n_views=n_views, display=display),
                None if held_out is None else open_feed(training, held_out, "validation", display=display),
                l2=None if l2 is None else positive("l2", l2),
                folds=whole_number("folds", folds, at_least=2),
            )
            self.model.eval()
            display.say(f"solved the head: {solved}")
        return solved

    def calibrate(self, data: object, *, batch_size: int | None = None, num_workers: int = 0) -> float:
        """Fit the temperature by which the model's logits are divided, and return it.

        Probabilities of unseen images then say how often the model is right. No predicted class changes. The
        temperature is saved and exported with the model. Further training resets it to 1.

        The arguments are those of `evaluate`; the model must not have been trained on these images.

        Raises:
            NonFiniteError: When a logit is infinite or NaN.

        References:
            Guo et al., 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599.
        """
        return evaluation.calibrate(self.training, data, batch_size, num_workers)

    def learn_known(
        self,
        data: object,
        validation_data: object = None,
        *,
        rejected: float = 0.05,
        batch_size: int | None = None,
        num_workers: int = 0,
    ) -> float:
        """Fit the distribution of the training images' features, so that the model can mark unknown images.

        `predict_classes(unknown="?")`, `novelty` and `assess` use it. It is saved and exported with the model; further
        training deletes it. It misses many images: rejecting one in twenty known images, it finds about one in six
        of unknown classes.

        Args:
            data: The training images, as in `fit`.
            validation_data: Images that the model was not trained on; they set the threshold. None uses the training
                images, each quarter measured by the other three.
            rejected: Fraction of known images that are marked unknown, above 0 and below 1.
            batch_size: As in `evaluate`.
            num_workers: As in `fit`.

        Returns:
            The threshold, a relative Mahalanobis distance.

        Raises:
            ArgumentError: When `rejected` is out of range, or an image may have several labels.

        References:
            Ren et al., 2021, "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", arXiv:2106.09022.
        """
        return evaluation.learn_known(self.training, data, validation_data, batch_size, num_workers, rejected=rejected)

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
        """Return an iterator that makes one training step each time it is advanced.

        Your code runs between the steps. The arguments are those of `fit` and are checked at once. Layers may be frozen
        or unfrozen between two epochs. Between two steps the model is in training mode, and parameters have the
        gradients of the last one, as they were applied: unscaled and clipped. At the end the model is in eval mode.

        Example:
            >>> for step in trainer.steps(train, epochs=3):  # doctest: +SKIP
            ...     my_logger.log(step.loss, step.lr)
        """
        training = self.training
        with training.alone("steps"), naming(training, data):
            train = open_feed(training, open_source(training, data, num_workers), augment=augment, n_views=n_views)
            run = open_run(training, train, epochs=epochs, batch_size=batch_size)
            progress = begin_run(training, run, CallbackList(self, ()), "steps", lr=lr, augment=augment)
            measure_features(training, run)
        return one_by_one(training, progress)

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
        """Make training steps at rising learning rates, and suggest one.

        Model, optimizer, counters and the global random generators are the same afterwards, bit for bit, even if Ctrl-C
        or an error ends the sweep. Features of frozen layers are computed once and stay cached for `fit`: with the
        backbone frozen, the rest takes seconds.

        Args:
            data: As in `fit`; it is repeated if it has fewer batches than steps.
            batch_size: The one that `fit` will use.
            num_steps: 2 or more. The sweep ends earlier if the loss diverges.
            lr_min: Learning rate of the head in the first step; blocks keep their proportion to it.
            lr_max: Learning rate of the head in the last step.
            augment: As in `fit`.
            n_views: As in `fit`.
            num_workers: As in `fit`.
            verbose: As in `fit`.

        Raises:
            ArgumentError: When a value is out of range.
            TransferKitError: As in `fit`.

        Example:
            >>> found = trainer.lr_find(train)  # doctest: +SKIP
            >>> found.plot(), found.suggestion  # doctest: +SKIP
            >>> trainer.fit(train, lr=found.suggestion)  # doctest: +SKIP
        """
        rates = spaced_rates(lr_min, lr_max, num_steps)
        display, training = Display(verbose), self.training
        with training.alone("lr_find"), training.interrupts:
            source = open_source(training, data, num_workers)
            check_same_data(source, self.model, "lr_find", rates=rates, batch_size=batch_size, n_views=n_views)
            train = open_feed(training, source, augment=augment, n_views=n_views, display=display)
            run = open_run(training, train, epochs=1, batch_size=batch_size)
            check_trains(self.model, run)
            train.check()
            found = sweep(training, run, rates)
        if found.suggestion is None:
            display.say(f"lr_find suggests nothing: {found.why_none}")
        return found

    def evaluate(self, data: object, *, batch_size: int | None = None, num_workers: int = 0) -> dict[str, float]:
        """Return `{"loss": ..., "accuracy": ...}` and the trainer's metrics: mean loss, and accuracy from 0 to 1.

        The loss is taken without smoothing and weights. A callback that evaluates the data of the current run uses its
        cached features.

        Args:
            data: As in `fit`.
            batch_size: 32 if None.
            num_workers: Processes that read a `Dataset`.
        """
        with evaluation.opened(self.training, data, batch_size, num_workers) as (network, batches):
            return evaluation.evaluate(network, batches, training=self.training)

    def assess(self, data: object, *, batch_size: int | None = None, num_workers: int = 0) -> Assessment:
        """Return what the model makes of each image of labeled data: accuracy by class, top k, confusion matrix.

        The arguments are those of `evaluate`.

        Raises:
            NonFiniteError: When a logit is infinite or NaN.

        Example:
            >>> print(trainer.assess(test))  # doctest: +SKIP
            accuracy 0.6920, loss 0.9127, 500 images
            class       precision  recall      f1  images
            airplane       0.7255  0.7400  0.7327      50
            ...
        """
        with evaluation.opened(self.training, data, batch_size, num_workers) as (network, batches):
            return evaluation.assess(network, batches, training=self.training)

    def predict_proba(
        self, images: object, *, batch_size: int | None = None, on_bad_image: str = "raise", num_workers: int = 0
    ) -> npt.NDArray[np.float32]:
        """Return the probability of each class, float32 `(N, len(classes))`.

        Rows sum to one, except if an image may have several labels: the probabilities are then independent.

        Args:
            images: One image: the path of a file, its content as bytes, an open file, a PIL image, an array
                `(H, W, 3)`, a tensor `(H, W, 3)` or `(3, H, W)`. Or many: a list, tuple, array or iterator of these, or
                all that `fit` takes, with targets (which are ignored) or without.
            batch_size: 32 if None.
            on_bad_image: `"nan"` reads the images of a list or `Dataset` once before and returns NaN for those that
                cannot be used. `"raise"` ends at the first.
            num_workers: Processes that read a `Dataset` or a list.

        Raises:
            ImageError: When an image cannot be read or used; the message has its index and path.
            ArgumentError: When the images are a `DataLoader` that shuffles or leaves images out.
            NonFiniteError: When a logit is infinite or NaN.
            ModelInUseError: When another thread trains the model.
        """
        return evaluation.predict_proba(self.training, images, batch_size, num_workers, on_bad_image=on_bad_image)

    def predict(
        self, images: object, *, batch_size: int | None = None, num_workers: int = 0
    ) -> npt.NDArray[np.int64] | npt.NDArray[np.bool_]:
        """Return the most probable class index of each image, int64 `(N,)`; `predict_classes` returns names.

        If an image may have several labels, return which it has, bool `(N, len(classes))`: those whose probability is
        at least `model.threshold`. The arguments are those of `predict_proba`.
        """
        probabilities = self.predict_proba(images, batch_size=batch_size, num_workers=num_workers)
        if self.model.threshold is not None:
            return probabilities >= self.model.threshold
        return cast("npt.NDArray[np.int64]", probabilities.argmax(axis=1))

    def novelty(
        self, images: object, *, batch_size: int | None = None, num_workers: int = 0
    ) -> npt.NDArray[np.float32]:
        """Return how unlike the training images each image is, float32 `(N,)`: above 0 it counts as unknown.

        The arguments are those of `predict_proba`.

        Raises:
            ArgumentError: When `learn_known` was not called after training.
            NonFiniteError: When a logit is infinite or NaN.
        """
        return evaluation.predict_known(self.training, images, batch_size, num_workers)[1]

    def predict_classes(
        self, images: object, *, unknown: str | None = None, batch_size: int | None = None, num_workers: int = 0
    ) -> list[str] | list[list[str]]:
        """Return the name of the most probable class of each image, or the names of its labels if it may have several.

        With `unknown`, images too unlike the training images get that name; see `learn_known`. The other arguments are
        those of `predict_proba`.

        Example:
            >>> trainer.predict_classes(["holiday/0001.jpg", "holiday/0002.jpg"])  # doctest: +SKIP
            ['dog', 'airplane']
        """
        return evaluation.predict_classes(self.training, images, batch_size, num_workers, unknown=unknown)

    def state_dict(self) -> dict[str, Any]:
        """Return model, optimizer and progress as plain types and tensors (not copies)."""
        with evaluating(self.model):  # not while another thread trains
            return training_state(self.training)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, including which layers are frozen. If anything differs, nothing changes.

        Raises:
            HeadMismatchError: When the classes differ.
            CheckpointError: When backbone, head, preprocessing or optimizer differ.
        """
        with self.training.alone("load_state_dict"):
            check_training_state(self.training, state, origin="the checkpoint")
            assign_training_state(self.training, {**state, "optimizer": copy.deepcopy(state["optimizer"])})

    def save(self, path: str | os.PathLike[str], *, frozen: bool = True) -> None:
        """Write a checkpoint for `load` and `transferkit.load_model`. The file appears whole or not at all.

        Args:
            path: The file to write.
            frozen: False leaves out the frozen weights. The reader must have them; their SHA-256 is compared.

        Raises:
            CheckpointTypeError: When `load_model` could not build the model again; see `save_model`.
            CheckpointWriteError: When the folder is missing, read-only or full. The file that was there before remains.
        """
        with together("save"), evaluating(self.model):
            model_state.check_loadable(self.model)
            state = self.state_dict()
            model = state["model"] if frozen else model_state.leave_out_frozen(state["model"], self.model)[0]
            if rank() == 0:
                archive.write_checkpoint(path, {**state, "model": model})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load a checkpoint that `save` or a `Checkpoint` wrote; see `load_state_dict`.

        Raises:
            CheckpointError: When there is no such file, it is damaged, or it does not fit.
            HeadMismatchError: When it has other classes.
        """
        with self.training.alone("load"):
            state = complete_training_state(self.training, archive.read_checkpoint(path), Path(path))
            assign_training_state(self.training, state)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the current run. What cannot be pickled is named.

        Raises:
            CheckpointTypeError: When schedule, loss or a metric is a function that pickle cannot find by its name.
        """
        name = ""
        try:
            for name in ("schedule", "loss", "metrics"):
                pickle.dumps(getattr(self.training, name))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise CheckpointTypeError(
                f"Trainer cannot be pickled, because of its {name}: {error}. Define functions at the top level "
                "of a module, not as a lambda or inside another. Trainer.save needs no pickle."
            ) from error
        training = copy.copy(self.training)
        training.progress = None
        return {**vars(self), "training": training}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Trainer":
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def share_features(self, other: "Trainer") -> None:
        """Use the cached features of another trainer on the same device, and add to them.

        Their keys tell which belong to this trainer's images and frozen layers.
        """
        self.training.features.share(other.training.features)


SETTINGS = {
    *inspect.signature(Trainer).parameters,
    *inspect.signature(Trainer.fit).parameters,
    *("criterion", "epoch", "global_step", "history", "learning_rate", "loss_fn", "lr_scheduler", "scheduler"),
} - {"self"}
"""What people assign to a trainer, and what would not reach it."""
