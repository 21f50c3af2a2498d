"""Callbacks that write each epoch's figures for other programs."""

import csv
import importlib.util
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from transferkit.base.calls import explained
from transferkit.base.files import atomic_write
from transferkit.errors import ArgumentError, MissingPackageError
from transferkit.results.history import EpochReport, History
from transferkit.training.callbacks import Running

COLUMNS = tuple(field.name for field in fields(EpochReport))
"""The figures of every report; metrics and figures that callbacks add follow them."""


@contextmanager
def going_on(what: str, path: Path) -> Iterator[None]:
    """Turn an error of the file system inside into a warning: a line of a log that is lost ends no run."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{what} could not write {path}, and the run goes on: {error}", stacklevel=3)


@explained
class CSVLogger:
    """A callback that writes a file with one line for each epoch: `epoch,loss,accuracy,lr,epoch_s,val_loss,...`.

    The file is replaced as a whole after each epoch; where that fails, a warning says so and the run goes on. Lines of
    earlier epochs of the same trainer stay; the file of a resumed run has every epoch once. Metrics and figures that
    callbacks add have columns at the end.

    Args:
        path: Of the file.

    Raises:
        ArgumentError: When a run starts, if the file is not one that CSVLogger wrote or its folder cannot be made.

    Example:
        >>> import tempfile
        >>> from types import SimpleNamespace
        >>> path = Path(tempfile.mkdtemp()) / "log.csv"
        >>> report = EpochReport(0, loss=2.0, accuracy=0.25, lr=1e-3, epoch_s=5.0)
        >>> CSVLogger(path)(SimpleNamespace(history=History([report])), report)
        >>> print(path.read_text().replace(",", ", "))
        epoch, loss, accuracy, lr, epoch_s, val_loss, val_accuracy, skipped
        0, 2.0, 0.25, 0.001, 5.0, , , 0
        <BLANKLINE>
    """

    order = 1  # after callbacks that add figures

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def before_run(self, trainer: Running, *, validated: bool) -> None:
        """Refuse a file that cannot be written or is no log, before the first step."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(f"CSVLogger cannot write {self.path}: {error}. Name another file.") from error
        self._read()

    def __call__(self, trainer: Running, report: EpochReport) -> None:
        reports = (trainer.history or History()).reports
        rows = [row for row in self._read() if int(row["epoch"]) < reports[0].epoch]
        text = io.StringIO(newline="")
        rows += [vars(one) for one in reports]
        columns = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])
        writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with going_on("CSVLogger", self.path), atomic_write(self.path) as file:
            file.write(text.getvalue().encode())

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        try:
            reader = csv.DictReader(self.path.read_text().splitlines(), strict=True)
            rows = list(reader)
            ours = tuple(reader.fieldnames or COLUMNS)[: len(COLUMNS)] == COLUMNS  # an empty file will do
            ours = ours and all(None not in row and str(row["epoch"]).isdigit() for row in rows)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ArgumentError(f"CSVLogger cannot go on with {self.path}: {error}. Name another file.") from error
        if not ours:
            raise ArgumentError(
                f"{self.path} is not a file that CSVLogger wrote, which begins with {','.join(COLUMNS)}: name another."
            )
        return rows


@explained
class TensorBoardLogger:
    """A callback that writes each epoch's figures as TensorBoard reads them; needs the package `tensorboard`.

    Args:
        folder: Of the run, as in `tensorboard --logdir`.

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

    def __call__(self, trainer: Running, report: EpochReport) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second: not at import

        # a file for each epoch: nothing is open between two
        with going_on("TensorBoardLogger", self.folder), SummaryWriter(self.folder) as writer:
            for name, value in report.figures.items():
                if name != "epoch":
                    writer.add_scalar(name, value, report.epoch)
