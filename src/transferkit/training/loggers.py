"""Callbacks that write each epoch's metrics for other programs."""

import csv
import importlib.util
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

from transferkit.base.calls import explained
from transferkit.base.files import atomic_write, kind_of, open_file
from transferkit.base.processes import rank
from transferkit.errors import ArgumentError, MissingPackageError
from transferkit.results.history import EpochReport, History

COLUMNS = tuple(field.name for field in fields(EpochReport))
"""The figures of every report; metrics and figures that callbacks add follow them."""


@contextmanager
def going_on(what: str, path: Path) -> Iterator[None]:
    """Turn an error of a log's file inside into a warning: a line of a log that is lost ends no run."""
    try:
        yield
    except (OSError, ArgumentError) as error:
        warnings.warn(f"{what} could not write {path}, and the run goes on: {error}", stacklevel=3)


@explained
class CSVLogger:
    """A callback that writes a file with one line for each epoch: `epoch,loss,accuracy,lr,epoch_s,val_loss,...`.

    The file is replaced as a whole after each epoch. Lines of earlier epochs of the same trainer stay; the file of a
    resumed run has every epoch once. The file of another run is renamed first, to `log.1.csv`, `log.2.csv`, ..., with a
    warning. Metrics and values that callbacks add are the last columns. If the disk is full, the run continues with a
    warning, and the next epoch writes all lines.

    Args:
        path: The file; missing folders are created.

    Raises:
        ArgumentError: When a run starts, if the file is not one that CSVLogger wrote or cannot be written there.

    Example:
        >>> trainer.fit(train, callbacks=[CSVLogger("logs/first.csv")])  # doctest: +SKIP
    """

    order = 1  # after callbacks that add figures

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def before_run(self, trainer: Any, *, validated: bool) -> None:
        """Refuse a file that cannot be written or is no log, before the first step."""
        if rank():  # the first of several processes writes
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise ArgumentError(f"CSVLogger cannot write {self.path}: {error}. Name another file.") from error
        if not os.access(self.path.parent, os.W_OK):
            raise ArgumentError(f"CSVLogger cannot write {self.path}: its folder is read-only. Name another file.")
        self._read()

    def __call__(self, trainer: Any, report: EpochReport) -> None:
        if rank():
            return
        reports = (trainer.history or History()).reports
        with going_on("CSVLogger", self.path):
            rows = self._earlier_rows(reports) + [vars(one) for one in reports]
            text = io.StringIO(newline="")
            columns = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])
            writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            with atomic_write(self.path) as file:
                file.write(text.getvalue().encode())

    def _earlier_rows(self, reports: list[EpochReport]) -> list[dict[str, Any]]:
        """Return the lines of the trainer's epochs before this run, after moving the file of another run away."""
        rows, first = self._read(), reports[0]
        later = [row for row in rows if int(row["epoch"]) >= first.epoch]
        same = {name: "" if value is None else str(value) for name, value in vars(first).items()}
        if later and any(later[0].get(name) != same[name] for name in COLUMNS):
            names = (self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}") for number in count(1))
            free = next(name for name in names if kind_of(name) == "nothing")
            self.path.rename(free)
            warnings.warn(f"{self.path} was the log of another run: it is now {free}.", stacklevel=3)
            return []
        return [row for row in rows if int(row["epoch"]) < first.epoch]

    def _read(self) -> list[dict[str, Any]]:
        if kind_of(self.path) == "nothing":
            return []
        try:
            with open_file(self.path) as file:
                reader = csv.DictReader(file.read().decode().splitlines(), strict=True)
            rows = list(reader)
            ours = tuple(reader.fieldnames or COLUMNS)[: len(COLUMNS)] == COLUMNS  # an empty file will do
            ours = ours and all(None not in row and str(row["epoch"]).isdigit() for row in rows)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ArgumentError(f"CSVLogger cannot append to {self.path}: {error}. Name another file.") from error
        if not ours:
            raise ArgumentError(
                f"{self.path} was not written by CSVLogger: expected {','.join(COLUMNS)} first. Name another file."
            )
        return rows


@explained
class TensorBoardLogger:
    """A callback that writes each epoch's metrics for TensorBoard; needs the package `tensorboard`.

    Args:
        folder: The run's folder, for `tensorboard --logdir`.

    Raises:
        MissingPackageError: When `tensorboard` is not installed.

    Example:
        >>> trainer.fit(train, callbacks=[TensorBoardLogger("logs/first")])  # doctest: +SKIP
    """

    order = 1  # after callbacks that add figures

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise MissingPackageError(
                "TensorBoardLogger needs the package tensorboard, which is not installed: "
                "from a clone, pip install '.[tensorboard]'. CSVLogger needs no package."
            )
        self.folder = Path(folder)

    def __call__(self, trainer: Any, report: EpochReport) -> None:
        if rank():
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second: not at import

        # a file for each epoch: nothing is open between two
        with going_on("TensorBoardLogger", self.folder), SummaryWriter(self.folder) as writer:
            for name, value in report.figures.items():
                if name != "epoch":
                    writer.add_scalar(name, value, report.epoch)
