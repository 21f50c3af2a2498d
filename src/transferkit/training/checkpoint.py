"""`Checkpoint` keeps the last states of a run in a folder."""

import os
import re
import warnings
from pathlib import Path
from typing import Any, Protocol

from transferkit.base.arguments import whole_number
from transferkit.base.torch_files import DAMAGE, check_archive
from transferkit.errors import (
    ArgumentError,
    CheckpointError,
    CheckpointTypeError,
    CheckpointWriteError,
    TransferKitError,
)
from transferkit.model.head import TransferModel
from transferkit.results.history import EpochReport
from transferkit.saving.archive import check_plain, read_checkpoint, write_checkpoint
from transferkit.saving.model import frozen_path, leave_out_frozen

_NAME = re.compile(r"step-(\d+)\.pt")


class Resumable(Protocol):
    """What can be saved: a `Trainer`."""

    model: TransferModel
    global_step: int

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""


class Checkpoint:
    """A callback of `Trainer.fit` that saves the run after epochs, after steps, and when something ends it early.

    `fit(resume_from=folder)` continues from there with the same result as if it had never stopped. Frozen weights are
    written once, to a separate file. Files appear whole or not at all, and an old one is removed once the new one has
    been read back and verified. A save that fails is a warning, and an error at the end of `fit` unless a later one
    succeeds.

    Args:
        folder: Made if its parent is there.
        every_epochs: 1 saves after each epoch.
        every_steps: Saves after so many steps as well; None does not.
        keep_last: How many states stay in the folder, 1 or more.

    Attributes:
        folder: The folder.
        failure: What the last save failed with; None if it did not.

    Raises:
        CheckpointWriteError: There is no such folder and none can be made.
        ArgumentError: A number out of range.

    Example:
        >>> trainer.fit(train, epochs=10, callbacks=[Checkpoint("runs/a")], resume_from="runs/a")  # doctest: +SKIP
    """

    order = 2  # after everything that changes the model or adds to the report

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every_epochs: int = 1,
        every_steps: int | None = None,
        keep_last: int = 2,
    ) -> None:
        self.folder = Path(folder)
        self.every_epochs = whole_number("every_epochs", every_epochs)
        self.every_steps = None if every_steps is None else whole_number("every_steps", every_steps)
        self.keep_last = whole_number("keep_last", keep_last)
        self.failure: TransferKitError | None = None
        self._frozen_written: set[Path] = set()
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointWriteError(
                f"checkpoints cannot be kept in {folder}: {error}. Expected a folder, or where to make one."
            ) from error

    def __call__(self, trainer: Resumable, report: EpochReport) -> None:
        """Save after an epoch, if it is its turn."""
        if (report.epoch + 1) % self.every_epochs == 0:
            self.try_to_save(trainer)

    def after_step(self, trainer: Resumable) -> None:
        """Save after a step, if it is its turn."""
        if self.every_steps is not None and trainer.global_step % self.every_steps == 0:
            self.try_to_save(trainer)

    def try_to_save(self, trainer: Resumable) -> Path | None:
        """Save; a failure becomes a warning and stays in `failure`. Return the file's path, None if it failed."""
        try:
            path = self.save(trainer)
        except (CheckpointTypeError, CheckpointWriteError) as error:
            self.failure = error
            warnings.warn(f"the run goes on unsaved: {error}", stacklevel=2)
            return None
        self.failure = None
        return path

    def save(self, trainer: Resumable) -> Path:
        """Write the state of a trainer, verify it, remove what is older than the last ones, and return its path.

        Raises:
            CheckpointWriteError: The folder is read-only or full; what was there before still is.
        """
        state = trainer.state_dict()
        check_plain(state, CheckpointTypeError)
        model, frozen = leave_out_frozen(state["model"], trainer.model)
        if frozen:
            path = frozen_path(self.folder, model["sha256"])
            if path not in self._frozen_written or not path.exists():
                _write_verified(path, {"frozen": frozen})
                self._frozen_written.add(path)
        path = self.folder / f"step-{trainer.global_step:08d}.pt"
        _write_verified(path, {**state, "model": model})
        states = steps_in(self.folder)
        place = states.index(path)  # what lies behind was left by a run that was resumed from an earlier state
        for other in states[: max(0, place + 1 - self.keep_last)] + states[place + 1 :]:
            other.unlink(missing_ok=True)
        return path

    def on_stop(self, trainer: Resumable) -> Path | None:
        """Save a run that something ends early; return the file's path, None if that failed."""
        return self.try_to_save(trainer)

    def after_run(self) -> None:
        """Raise what the last save failed with, if it did."""
        if self.failure is not None:
            raise self.failure

    def before_first_step(self, global_step: int, *, resumed_from: Path | None) -> None:
        """Refuse a folder with states of a longer run, which would be taken for this one's.

        Args:
            global_step: Steps already made.
            resumed_from: The checkpoint that the run resumes, whose folder may hold later states of the same run.

        Raises:
            ArgumentError: When another run's states are in the folder.
        """
        if resumed_from is not None and self.folder.resolve() == resumed_from.parent.resolve():
            return
        if any(_step(path) > global_step for path in steps_in(self.folder)):
            raise ArgumentError(
                f"{self.folder} holds the checkpoints of another run, up to {steps_in(self.folder)[-1].name}: go on "
                f"with it, fit(resume_from={str(self.folder)!r}), or name another folder."
            )


def steps_in(folder: Path) -> list[Path]:
    """Return the states in a folder, the newest last."""
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_step)


def read_newest(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]] | None:
    """Read a checkpoint, or the newest in a folder; None if the folder has none yet.

    Raises:
        CheckpointError: No such file or folder, or the newest is damaged; then the message names the newest good one.
    """
    path = Path(path)
    if not path.is_dir():
        return path, read_checkpoint(path)
    states = steps_in(path)
    if not states:
        return None
    try:
        return states[-1], read_checkpoint(states[-1])
    except CheckpointError as error:
        good = next((str(older) for older in reversed(states[:-1]) if _is_good(older)), None)
        remedy = "There is no other." if good is None else f"The newest good one is {good}: pass resume_from={good!r}."
        raise CheckpointError(f"{error} {remedy}") from error


def _is_good(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _step(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def _write_verified(path: Path, state: dict[str, Any]) -> None:
    write_checkpoint(path, state)
    try:
        check_archive(path)
    except DAMAGE as error:
        raise CheckpointWriteError(
            f"{path} was written and does not verify: {error}. Nothing older was removed; is the disk sound?"
        ) from error
