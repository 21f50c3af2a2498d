"""What the loggers write, and what they refuse to write over."""

import csv
import errno
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

import transferkit as tk
from transferkit.errors import ArgumentError, MissingPackageError
from transferkit.training import loggers

HEADER = ",".join(loggers.COLUMNS) + "\n"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def make_trainer(model):
    return tk.Trainer(tk.freeze_until(model, "head"), device="cpu", schedule="constant")


def test_the_file_has_each_epochs_figures(model, data, tmp_path):
    """One line for each epoch with the numbers of its report; what was not measured is empty."""
    history = make_trainer(model).fit(data, epochs=3, callbacks=[tk.CSVLogger(tmp_path / "log.csv")], verbose=0)
    written = rows(tmp_path / "log.csv")
    assert [int(row["epoch"]) for row in written] == [0, 1, 2]
    assert [float(row["loss"]) for row in written] == history.history["loss"]
    assert {row["val_loss"] for row in written} == {""}


def test_a_second_phase_is_added(model, data, tmp_path):
    """A later call of `fit` by the same trainer leaves the epochs before."""
    trainer, logger = make_trainer(model), tk.CSVLogger(tmp_path / "log.csv")
    for epochs in (2, 1):
        trainer.fit(data, validation_data=data, epochs=epochs, callbacks=[logger], verbose=0)
    assert [row["epoch"] for row in rows(tmp_path / "log.csv")] == ["0", "1", "2"]


def test_a_resumed_run_has_every_epoch_once(make_backbone, data, tmp_path):
    """What was written before the stop is not written again."""

    def fit(epochs):
        model = tk.attach_head(make_backbone(), 3)
        callbacks = [tk.CSVLogger(tmp_path / "log.csv"), tk.Checkpoint(tmp_path / "run")]
        make_trainer(model).fit(data, epochs=epochs, callbacks=callbacks, resume_from=tmp_path / "run", verbose=0)

    fit(2)
    before = rows(tmp_path / "log.csv")
    fit(3)
    after = rows(tmp_path / "log.csv")
    assert [row["epoch"] for row in after] == ["0", "1", "2"]
    assert after[:2] == before


def test_the_log_of_another_run_is_kept_under_another_name(make_backbone, data, tmp_path):
    """A script that is started again and again loses no line: each earlier log is renamed, with a warning."""
    for number, epochs in enumerate((4, 3, 1)):
        trainer = make_trainer(tk.attach_head(make_backbone(), 3))
        callbacks = [tk.CSVLogger(tmp_path / "log.csv")]
        with (
            pytest.warns(UserWarning, match=rf"log of another run: it is now .*log\.{number}\.csv")
            if number
            else (nullcontext())
        ):
            trainer.fit(data, epochs=epochs, callbacks=callbacks, verbose=0)
    assert [len(rows(tmp_path / name)) for name in ("log.1.csv", "log.2.csv", "log.csv")] == [4, 3, 1]


def test_a_run_resumed_from_an_earlier_checkpoint_goes_on_in_its_log(make_backbone, data, tmp_path):
    """Lines of epochs that are made again belong to the same run: they are replaced, and no file is renamed."""

    def fit(epochs, resume_from):
        callbacks = [tk.CSVLogger(tmp_path / "log.csv"), tk.Checkpoint(tmp_path / "run", keep_last=9)]
        trainer = make_trainer(tk.attach_head(make_backbone(), 3))
        trainer.fit(data, epochs=epochs, callbacks=callbacks, resume_from=resume_from, verbose=0)

    fit(4, None)
    fit(3, sorted((tmp_path / "run").glob("step-*.pt"))[1])
    assert [row["epoch"] for row in rows(tmp_path / "log.csv")] == ["0", "1", "2"]
    assert [path.name for path in tmp_path.glob("*.csv")] == ["log.csv"]


def test_a_full_disk_ends_no_run(model, data, tmp_path, monkeypatch):
    """A line that cannot be written is a warning; the next one that can be brings all lines."""
    write, failed = loggers.atomic_write, []

    def full(path):
        if len(failed) < 2:
            failed.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path)

    monkeypatch.setattr(loggers, "atomic_write", full)
    with pytest.warns(UserWarning, match=r"could not write .*log\.csv, and the run goes on: .*No space left"):
        history = make_trainer(model).fit(data, epochs=3, callbacks=[tk.CSVLogger(tmp_path / "log.csv")], verbose=0)
    assert [float(row["loss"]) for row in rows(tmp_path / "log.csv")] == history.history["loss"]
    assert len(failed) == 2


@pytest.mark.parametrize("name", ["x" * 300, "a\0b.csv", "log.csv/log.csv"])
def test_a_name_that_no_file_can_have_is_refused_before_a_step(model, data, tmp_path, name):
    """The system's own errors do not come out bare."""
    (tmp_path / "log.csv").write_text("")
    trainer = make_trainer(model)
    with pytest.raises(ArgumentError, match="CSVLogger cannot "):
        trainer.fit(data, callbacks=[tk.CSVLogger(tmp_path / name)], verbose=0, epochs=1)
    assert trainer.global_step == 0


def test_a_pipe_is_refused_and_not_waited_for(model, data, tmp_path):
    """A pipe in the place of the log is no file."""
    os.mkfifo(tmp_path / "log.csv")
    with pytest.raises(ArgumentError, match="it is a pipe or device"):
        make_trainer(model).fit(data, callbacks=[tk.CSVLogger(tmp_path / "log.csv")], verbose=0, epochs=1)


@pytest.mark.parametrize(
    "content", ["name,price\nbread,3\n", "epoch,loss\n0,1\n", "one line", '"open', HEADER + "x,1\n"]
)
def test_another_file_is_refused_and_kept(model, data, tmp_path, content):
    """A file of something else is refused before the first step, and stays as it was."""
    path = tmp_path / "mine.csv"
    path.write_text(content)
    trainer = make_trainer(model)
    with pytest.raises(ArgumentError, match=r"mine\.csv.*(Name another file|name another)"):
        trainer.fit(data, callbacks=[tk.CSVLogger(path)], verbose=0, epochs=1)
    assert (path.read_text(), trainer.global_step) == (content, 0)


def test_a_missing_folder_is_made(model, data, tmp_path):
    """Folders that lack are made; one that cannot be made is an error before the first step."""
    path = tmp_path / "runs" / "a" / "log.csv"
    make_trainer(model).fit(data, callbacks=[tk.CSVLogger(path)], verbose=0, epochs=1)
    assert len(path.read_text().splitlines()) == 2
    trainer = make_trainer(model)
    with pytest.raises(ArgumentError, match=r"cannot write .*log\.csv/b\.csv.*Name another file"):
        trainer.fit(data, callbacks=[tk.CSVLogger(path / "b.csv")], verbose=0, epochs=1)
    assert trainer.global_step == 0


@pytest.mark.slow
def test_tensorboard_reads_what_is_written(model, data, tmp_path):
    """Every figure of every epoch is a scalar at the epoch's number."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callbacks = [tk.TensorBoardLogger(tmp_path / "tb")]
    history = make_trainer(model).fit(data, validation_data=data, epochs=2, callbacks=callbacks, verbose=0)
    losses = {}
    for file in sorted((tmp_path / "tb").iterdir()):
        events = EventAccumulator(str(file)).Reload()
        assert {"loss", "accuracy", "lr", "val_loss", "val_accuracy"} <= set(events.Tags()["scalars"])
        losses |= {scalar.step: scalar.value for scalar in events.Scalars("val_loss")}
    assert losses == pytest.approx(dict(enumerate(history.history["val_loss"])))


def test_without_tensorboard_the_command_is_named(monkeypatch):
    """The message says what to install."""
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install '\.\[tensorboard\]'"):
        tk.TensorBoardLogger("logs")
