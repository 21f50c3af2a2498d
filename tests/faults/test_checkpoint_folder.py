"""A folder of checkpoints with company: readers, other runs, and things in the way."""

import errno
import fcntl
import os
import resource
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import tiny
import transferkit as tk
from transferkit.base.files import lock_folder
from transferkit.errors import ArgumentError, CheckpointError, CheckpointWriteError, TransferKitError
from transferkit.training.checkpoint import read_newest


def make_trainer(**arguments: Any) -> tk.Trainer:
    return tiny.make_trainer(tiny.make_model(tiny.make_backbone(), "head", hidden=(16,)), **arguments)


def fit(folder: Path, *callbacks: object, epochs: int = 1, **arguments: Any) -> tk.Trainer:
    trainer = make_trainer()
    callbacks = (*callbacks, tk.Checkpoint(folder, **arguments))
    trainer.fit(tiny.make_images(), epochs=epochs, batch_size=8, verbose=0, callbacks=callbacks)
    return trainer


def newest(folder: Path) -> str:
    return max(path.name for path in folder.glob("step-*.pt"))


# ---- readers


def test_a_reader_of_a_live_folder_gets_the_newest_state_there_is(tmp_path: Path) -> None:
    """A state that is removed between the listing and the reading is no error: a newer one is read."""
    done, errors = threading.Event(), []

    def write() -> None:
        try:
            fit(tmp_path, epochs=5, every_steps=1, keep_last=1)
        finally:
            done.set()

    thread = threading.Thread(target=write)
    thread.start()
    reads = 0
    while not done.is_set():
        try:
            reads += read_newest(tmp_path) is not None
        except TransferKitError as error:  # noqa: PERF203
            errors.append(error)
    thread.join()
    assert errors == []
    assert reads > 0


def test_a_state_that_vanishes_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listing may name a state that is gone: the folder is listed again."""
    fit(tmp_path, epochs=2, keep_last=1)
    listed = []
    iterdir = Path.iterdir

    def stale(folder: Path) -> Any:
        listed.append(folder)
        return iter([folder / "step-00000999.pt"]) if len(listed) == 1 else iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", stale)
    assert read_newest(tmp_path)[0].name == "step-00000006.pt"


def test_a_folder_that_is_gone_is_an_error_of_the_library(tmp_path: Path) -> None:
    """Neither resuming nor saving raises the system's own error."""
    checkpoint = tk.Checkpoint(tmp_path / "run")
    (tmp_path / "run").rmdir()
    with pytest.raises(CheckpointWriteError, match="cannot write a checkpoint to"):
        checkpoint.save(make_trainer())
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        make_trainer().fit(tiny.make_images(), verbose=0, resume_from=tmp_path / "run")


# ---- other runs


SECOND = """
import sys
import tiny
import transferkit as tk
trainer = tiny.make_trainer(tiny.make_model(tiny.make_backbone(), "head", hidden=(16,)))
try:
    trainer.fit(tiny.make_images(), epochs=5, batch_size=8, verbose=0, callbacks=[tk.Checkpoint(sys.argv[1])])
except tk.TransferKitError as error:
    print(type(error).__name__, trainer.global_step, error)
"""


@pytest.mark.slow
def test_a_second_process_with_the_same_folder_is_refused(tmp_path: Path) -> None:
    """The same job started twice: the second one ends before its first step, and the first one is not disturbed."""
    said = []

    def meanwhile(trainer: tk.Trainer, report: tk.EpochReport) -> None:
        said.append(tiny.python(SECOND, tmp_path))

    fit(tmp_path, meanwhile)
    assert said[0].startswith(f"ArgumentError 0 another process saves its run to {tmp_path}: name another folder")
    assert newest(tmp_path) == "step-00000003.pt"
    assert "ArgumentError" in tiny.python(SECOND, tmp_path) or newest(tmp_path) == "step-00000015.pt"


def test_a_second_run_in_the_same_process_loses_nothing(tmp_path: Path) -> None:
    """A run that finds another one's states in its folder stops saving there, and removes nothing of them."""
    seen = []

    def meanwhile(trainer: tk.Trainer, report: tk.EpochReport) -> None:
        fit(tmp_path, epochs=5)
        seen.append(newest(tmp_path))

    with (
        pytest.warns(UserWarning, match=r"holds step-00000015\.pt, which another run wrote"),
        pytest.raises(CheckpointWriteError, match="give each run a folder of its own"),
    ):
        fit(tmp_path, meanwhile)
    assert seen == [newest(tmp_path)] == ["step-00000015.pt"]


@pytest.mark.parametrize("ending", ["end", "error", "refusal"])
def test_the_folder_is_free_again_whatever_ended_the_run(tmp_path: Path, ending: str) -> None:
    """After the last epoch, an error of a callback, or a refusal, another process may use the folder at once."""

    def fail(trainer: tk.Trainer, report: tk.EpochReport) -> None:
        raise RuntimeError("a callback failed")

    checkpoint, trainer = tk.Checkpoint(tmp_path), make_trainer(cache=True)
    if ending == "end":
        trainer.fit(tiny.make_images(), epochs=1, verbose=0, callbacks=[checkpoint])
    elif ending == "error":
        with pytest.raises(RuntimeError, match="a callback failed"):
            trainer.fit(tiny.make_images(), epochs=1, verbose=0, callbacks=[fail, checkpoint])
    else:
        with pytest.raises(TransferKitError):
            trainer.fit(tiny.make_images(), epochs=1, verbose=0, augment="flip", callbacks=[checkpoint])
    assert not (tmp_path / ".lock").exists()
    assert tiny.python(LOCK, tmp_path) == "locked\n"


LOCK = """
import sys
from pathlib import Path
from transferkit.base.files import lock_folder
try:
    file = lock_folder(Path(sys.argv[1]))
    print("locked")
except BlockingIOError:
    print("held")
"""


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    """A folder is locked for one process, and a killed run leaves no lock behind."""
    program = f"{LOCK}sys.stdout.flush(); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=tiny.environment(),
    )
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(BlockingIOError):
        lock_folder(tmp_path)
    process.kill()
    process.communicate()
    lock_folder(tmp_path).close()


def test_a_file_system_without_locks_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have no locks: a run saves there all the same."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    fit(tmp_path)
    assert newest(tmp_path) == "step-00000003.pt"


# ---- what is in the way


def test_missing_folders_are_made(tmp_path: Path) -> None:
    """The folder of a run and the folder of all runs."""
    assert tk.Checkpoint(tmp_path / "runs" / "a").folder.is_dir()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["step-00000009.pt", ".step-00000003.pt.1.00000000", "frozen-0000.pt", ".lock"])
def test_pipes_and_folders_among_the_states_do_no_harm(tmp_path: Path, name: str, make: Any) -> None:
    """None is opened or removed; in the place of the newest state it is an error that names the good one."""
    trainer = fit(tmp_path, epochs=2)
    make(tmp_path / name)
    if name.startswith("step"):
        with pytest.raises(CheckpointError, match=r"The newest good one is .*step-00000006\.pt"):
            trainer.fit(tiny.make_images(), epochs=3, batch_size=8, verbose=0, resume_from=tmp_path)
        with pytest.raises(ArgumentError, match="the checkpoints of another run"):
            fit(tmp_path)
    else:
        checkpoint = tk.Checkpoint(tmp_path)
        make_trainer().fit(
            tiny.make_images(), epochs=3, batch_size=8, verbose=0, resume_from=tmp_path, callbacks=[checkpoint]
        )
        assert newest(tmp_path) == "step-00000009.pt"
    assert (tmp_path / name).exists()


LONG, NUL = "x" * 300, "a\0b"


@pytest.mark.parametrize("name", [LONG, NUL])
def test_names_that_the_system_refuses_are_errors_of_the_library(tmp_path: Path, name: str) -> None:
    """Each call raises its own error for a name that no file can have."""
    trainer, images, path = make_trainer(), tiny.make_images(), f"{tmp_path}/{name}"
    actions = {
        "load_model": lambda: tk.load_model(path),
        "Trainer.load": lambda: trainer.load(path),
        "Trainer.save": lambda: trainer.save(path),
        "save_model": lambda: tk.save_model(trainer.model, path),
        "predict": lambda: trainer.predict(path),
        "predict many": lambda: trainer.predict([path]),
        "resume_from": lambda: trainer.fit(images, verbose=0, resume_from=path),
        "CSVLogger": lambda: trainer.fit(images, verbose=0, callbacks=[tk.CSVLogger(path)]),
        "Checkpoint": lambda: tk.Checkpoint(path),
        "cache": lambda: make_trainer(cache=path),
        "weights": lambda: tk.load_backbone("vgg11", weights=path, preprocessing="KERAS"),
        "weights without a suffix": lambda: tk.load_backbone("vgg11", weights=name, preprocessing="KERAS"),
        "data": lambda: trainer.fit(path, verbose=0),
    }
    for call, action in actions.items():
        with pytest.raises(TransferKitError) as error:
            action()
        assert "\0" not in str(error.value), call


def test_a_sound_file_is_not_called_damaged_for_want_of_handles(tmp_path: Path) -> None:
    """Without a free handle, loading says so: nothing is to be deleted, and the next attempt succeeds."""
    trainer = make_trainer()
    trainer.save(tmp_path / "run.pt")
    tk.cache_features(trainer.model, tiny.make_images(), cache=tmp_path / "cache", device="cpu", precision="fp32")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    handles = []
    try:
        with suppress(OSError):
            while True:
                handles.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(CheckpointError, match=r"Too many open files.*The file may be good") as error:
            trainer.load(tmp_path / "run.pt")
    finally:
        for handle in handles:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "delete" not in str(error.value)
    trainer.load(tmp_path / "run.pt")
