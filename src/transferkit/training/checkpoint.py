"""`Checkpoint` keeps the last checkpoints of a run in a folder."""

import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from transferkit.base.arguments import whole_number
from transferkit.base.calls import explained
from transferkit.base.files import kind_of, lock_folder
from transferkit.base.processes import rank
from transferkit.errors import ArgumentError, CheckpointError, CheckpointTypeError, CheckpointWriteError
from transferkit.results.history import EpochReport
from transferkit.saving.archive import check_plain, read_checkpoint, write_checkpoint
from transferkit.saving.model import frozen_path, leave_out_frozen

_NAME = re.compile(r"step-(\d+)\.pt")


@explained
class Checkpoint:
    """A callback that saves the run after epochs, after steps, and when something ends it early.

    `fit(resume_from=folder)` continues the run with the result of an uninterrupted run. Frozen weights are
    written once, to a file of their own. A file appears whole or not at all, and an old one is removed only after the
    new one has been verified. A save that fails gives a warning. If no later save succeeds, `fit` ends with the error.

    Args:
        folder: Created with its parents if it is missing. One run at a time saves to it.
        every_epochs: Number of epochs between two saves.
        every_steps: Number of steps between two further saves. `None` saves after epochs only.
        keep_last: Number of checkpoints that stay in the folder, 1 or more.

    Attributes:
        folder: The folder.
        failure: The error of the last save, `None` if it succeeded.

    Raises:
        CheckpointWriteError: The folder cannot be created.
        ArgumentError: A number is out of range.

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
        self.every_epochs = whole_number("every_epochs", every_epochs)
        self.every_steps = None if every_steps is None else whole_number("every_steps", every_steps)
        self.keep_last = whole_number("keep_last", keep_last)
        self.failure: CheckpointTypeError | CheckpointWriteError | None = None
        self._frozen_written: set[Path] = set()
        self._known: set[Path] | None = None  # states that this run wrote or began with
        self._lock: BinaryIO | None = None
        try:
            self.folder = Path(folder)
            self.folder.mkdir(exist_ok=True, parents=True)
        except (OSError, TypeError, ValueError) as error:
            raise CheckpointWriteError(
                f"checkpoints cannot be kept in {folder}: {error}. Expected a folder."
            ) from error

    def __call__(self, trainer: Any, report: EpochReport) -> None:
        """Save after every `every_epochs` epochs."""
        if (report.epoch + 1) % self.every_epochs == 0:
            self.try_to_save(trainer)

    def after_step(self, trainer: Any) -> None:
        """Save after every `every_steps` steps."""
        if self.every_steps is not None and trainer.global_step % self.every_steps == 0:
            self.try_to_save(trainer)

    def try_to_save(self, trainer: Any) -> Path | None:
        """Save, and return the path, or `None` if that failed: then warn and keep the error in `failure`."""
        if rank():  # the first of several processes saves; they have the same state
            return None
        try:
            path = self.save(trainer)
        except (CheckpointTypeError, CheckpointWriteError) as error:
            self.failure = error
            warnings.warn(f"the run continues unsaved: {error}", stacklevel=2)
            return None
        self.failure = None
        return path

    def save(self, trainer: Any) -> Path:
        """Write the state of a trainer, then remove older checkpoints; return the path.

        Raises:
            CheckpointTypeError: The state holds something other than plain types and tensors. Nothing was written.
            CheckpointWriteError: The folder is read-only or full, or another run saves to it, too. Nothing was removed.
        """
        states = self._states()
        self._known = set(states) if self._known is None else self._known
        if foreign := [state for state in states if state not in self._known]:
            raise CheckpointWriteError(
                f"{self.folder} holds {foreign[-1].name}, which another run wrote: give each run a folder of its own."
            )
        state = trainer.state_dict()
        check_plain(state, CheckpointTypeError)
        model, frozen = leave_out_frozen(state["model"], trainer.model)
        if frozen:
            path = frozen_path(self.folder, model["sha256"])
            if path not in self._frozen_written or not path.exists():
                write_checkpoint(path, {"frozen": frozen})
                self._frozen_written.add(path)
        path = self.folder / f"step-{trainer.global_step:08d}.pt"
        write_checkpoint(path, {**state, "model": model})
        self._known.add(path)
        states = self._states()
        end = states.index(path) + 1  # later ones are of a run that was then resumed from an earlier checkpoint
        for other in states[: max(0, end - self.keep_last)] + states[end:]:
            with suppress(OSError):  # a folder of that name; the new state is written
                other.unlink()
                self._known.discard(other)
        return path

    def _states(self) -> list[Path]:
        with suppress(CheckpointError):  # writing says what is wrong; a folder that may not be listed will do
            return steps_in(self.folder)
        return []

    on_stop = try_to_save

    def after_run(self) -> None:
        """Raise what the last save failed with, if it did."""
        if self.failure is not None:
            raise self.failure

    def before_first_step(self, global_step: int, *, resumed_from: Path | None) -> None:
        """Refuse, with `ArgumentError`, a folder that another process saves to, or with states of a longer run.

        The folder of the checkpoint that the run resumes may hold later states of the same run.
        """
        if rank():
            return
        self.release()
        try:
            self._lock = lock_folder(self.folder)
        except BlockingIOError as error:
            raise ArgumentError(f"another process saves its run to {self.folder}: name another folder.") from error
        states = self._states()
        self._known = set(states)
        same = resumed_from is not None and self.folder.resolve() == resumed_from.parent.resolve()
        if not same and states and _step(states[-1]) > global_step:
            raise ArgumentError(
                f"{self.folder} holds the checkpoints of another run, up to {states[-1].name}: continue that run, "
                f"fit(resume_from={str(self.folder)!r}), or name another folder."
            )

    def release(self) -> None:
        """Let other processes save to the folder."""
        if self._lock is not None:
            with suppress(OSError):
                Path(self._lock.name).unlink()
            self._lock.close()
        self._lock = None


def steps_in(folder: Path) -> list[Path]:
    """Return the paths of the checkpoints in a folder, the newest last."""
    try:
        paths = list(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"the folder cannot be read: {error}.") from error
    return sorted((path for path in paths if _NAME.fullmatch(path.name)), key=_step)


def read_newest(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]] | None:
    """Read a checkpoint, or the newest in a folder; return its path and state, or `None` if the folder has none yet.

    A run may save to the folder meanwhile, and remove what it was about to read: then a newer one is read. If the
    newest in a folder cannot be used, the `CheckpointError` names the newest good one.
    """
    path = Path(path)
    if kind_of(path) != "a folder":
        return path, read_checkpoint(path)
    states = steps_in(path)
    if not states:
        return None
    try:
        return states[-1], read_checkpoint(states[-1])
    except CheckpointError as error:
        if kind_of(states[-1]) == "nothing":
            return read_newest(path)
        good = next((str(older) for older in reversed(states[:-1]) if _is_good(older)), None)
        remedy = "There is no other." if good is None else f"The newest good one is {good}: pass resume_from={good!r}."
        raise CheckpointError(f"{error} {remedy}") from error


def _is_good(path: Path) -> bool:
    with suppress(CheckpointError):
        return bool(read_checkpoint(path))
    return False


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
