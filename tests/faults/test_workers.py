"""Worker processes that raise, die, exit, crash and hang: one error in time, and nothing is left behind."""

import ctypes
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

import tiny
import transferkit as tk
from tiny import CLASSES, changed, python
from transferkit.data import workers
from transferkit.data.open import open_data
from transferkit.errors import ImageError, NonFiniteError, WorkerError

VICTIM = 21


class Pictures(Dataset):
    """Tensors with made-up paths; one sample does something else when it is read in a worker."""

    def __init__(self, action=lambda: None, count=32, victim=VICTIM):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        self.samples = [(f"photos/{index:03}.jpg", index % 3) for index in range(count)]
        self.action = action
        self.victim = victim

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index == self.victim and torch.utils.data.get_worker_info() is not None:
            self.action()
        return self.images[index], index % 3


def make_trainer(make_backbone, *, frozen=None, **arguments):
    return tiny.make_trainer(tiny.make_model(make_backbone(), frozen), **arguments)


def children():
    """This process's children, the dead that nobody waited for included."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:  # gone meanwhile
            continue
        if int(fields["PPid"]) == os.getpid():
            found.append((fields["Name"], fields["State"]))
    return found


@pytest.fixture(autouse=True)
def _no_child_stays():
    """No test leaves a process behind, living or dead."""
    before = children()
    yield
    gc.collect()
    assert children() == before


@pytest.fixture(autouse=True)
def _short_timeout(monkeypatch):
    monkeypatch.setattr(workers, "TIMEOUT_S", 2.0)


DEATHS = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "os._exit(3)": lambda: os._exit(3),
    "os._exit(0)": lambda: os._exit(0),
    "segmentation fault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "hangs": lambda: time.sleep(1000),
    "hangs in a loop": lambda: [None for _ in iter(int, 1)],
}


@pytest.mark.slow
@pytest.mark.parametrize(("death", "num_workers"), [*((death, 2) for death in DEATHS), ("SIGKILL", 1), ("hangs", 1)])
def test_a_worker_that_dies_or_hangs_is_one_error_in_time(make_backbone, tmp_path, death, num_workers):
    """One `WorkerError` with index, path, worker and cause; a whole checkpoint; nothing left; the next run works."""
    trainer = make_trainer(make_backbone)
    checkpoint = tk.Checkpoint(tmp_path / "run", every_steps=1)
    started = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        trainer.fit(
            Pictures(DEATHS[death]), batch_size=4, num_workers=num_workers, callbacks=[checkpoint], verbose=0, epochs=2
        )
    assert time.monotonic() - started < 2 + 10
    left = children()
    message = str(caught.value)
    assert f"was reading image {VICTIM} (photos/021.jpg)" in message
    assert any(f"worker {number} was" in message for number in range(num_workers))
    assert ("hang (no batch for 2 s)" if "hang" in death else "died") in message
    assert "num_workers=0" in message
    assert "\n" not in message
    assert caught.value.__cause__ is not None
    assert left == []
    newest = sorted((tmp_path / "run").glob("step-*.pt"))
    assert len(newest) > 0 or trainer.global_step == 0
    if newest:
        other = make_trainer(make_backbone)
        other.load(newest[-1])
        assert other.global_step == trainer.global_step
        assert changed(trainer.model.state_dict(), other.model) == set()
    step = trainer.global_step
    trainer.fit(Pictures(), batch_size=4, num_workers=num_workers, verbose=0, epochs=1)
    assert trainer.global_step == step + 8


@pytest.mark.slow
def test_a_run_whose_worker_died_is_resumed_to_the_same_weights(make_backbone, tmp_path):
    """What a dead worker interrupted goes on from the saved step with the same result."""
    expected = make_trainer(make_backbone)
    expected.fit(Pictures(), batch_size=4, epochs=2, verbose=0)
    with pytest.raises(WorkerError):
        make_trainer(make_backbone).fit(
            Pictures(DEATHS["SIGKILL"]),
            batch_size=4,
            epochs=2,
            num_workers=2,
            callbacks=[tk.Checkpoint(tmp_path / "run")],
            verbose=0,
        )
    resumed = make_trainer(make_backbone)
    resumed.fit(Pictures(), batch_size=4, epochs=2, num_workers=2, resume_from=tmp_path / "run", verbose=0)
    assert resumed.global_step == 16
    values = resumed.model.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in expected.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_a_death_while_measuring_is_the_same_error(make_backbone, method):
    """`evaluate` and `predict` tell of a dead worker like `fit`."""
    trainer = make_trainer(make_backbone)
    with pytest.raises(WorkerError, match=r"was reading image 21 \(photos/021.jpg\)"):
        getattr(trainer, method)(Pictures(DEATHS["SIGKILL"]), batch_size=4, num_workers=2)
    assert children() == []


@pytest.mark.slow
def test_a_death_while_features_are_computed_leaves_no_part_of_a_file(make_backbone, tmp_path):
    """A worker that dies in the pass that fills the cache is that error too, and the folder stays empty."""
    trainer = make_trainer(make_backbone, frozen="head", cache=tmp_path)
    with pytest.raises(WorkerError, match=r"was reading image 21 "):
        trainer.fit(Pictures(DEATHS["SIGKILL"]), batch_size=4, num_workers=2, verbose=0, epochs=1)
    assert list(tmp_path.iterdir()) == []
    assert children() == []


@pytest.mark.slow
def test_a_death_while_bad_images_are_looked_for(make_backbone):
    """A worker that dies is no bad image, and is not skipped."""
    with pytest.raises(WorkerError, match=r"was reading image 21 "):
        make_trainer(make_backbone).fit(
            Pictures(DEATHS["SIGKILL"]), on_bad_image="skip", batch_size=4, num_workers=2, verbose=0, epochs=1
        )


def fail(error):
    raise error


@pytest.mark.slow
@pytest.mark.parametrize("error", [OSError("gone"), ZeroDivisionError(), UnicodeDecodeError("utf8", b"x", 0, 1, "bad")])
def test_a_worker_that_raises_gives_the_samples_own_error(make_backbone, error):
    """An exception in a worker is an `ImageError` with index and path, not a traceback in a text."""
    with pytest.raises(ImageError, match=rf"cannot read image 21 \(photos/021.jpg\): {type(error).__name__}") as caught:
        make_trainer(make_backbone).fit(Pictures(lambda: fail(error)), batch_size=4, num_workers=2, verbose=0, epochs=1)
    assert "Traceback" not in str(caught.value)
    assert children() == []


@pytest.mark.slow
@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt()], ids=repr)
def test_a_data_set_that_ends_its_worker_is_told_with_its_sample(make_backbone, error):
    """`sys.exit` and the like in a data set end a worker: an error with the sample, in time."""
    started = time.monotonic()
    with pytest.raises((WorkerError, ImageError)) as caught:
        make_trainer(make_backbone).fit(Pictures(lambda: fail(error)), batch_size=4, num_workers=2, verbose=0, epochs=1)
    assert time.monotonic() - started < 2 + 10
    assert "image 21 (photos/021.jpg)" in str(caught.value)


class Unsendable(Pictures):
    """Its images cannot be sent from process to process."""

    def __getitem__(self, index):
        image = self.images[index].float() - 100
        return (image * torch.ones(1, requires_grad=True) if index == VICTIM else image), index % 3


@pytest.mark.slow
def test_an_image_that_cannot_be_sent_does_not_hang_in_silence(make_backbone, capfd):
    """An image with a gradient graph, which no process can send to another, ends in an error within the time limit."""
    started = time.monotonic()
    with pytest.raises((WorkerError, ImageError)):
        make_trainer(make_backbone).fit(Unsendable(), batch_size=4, num_workers=1, verbose=0, epochs=1)
    assert time.monotonic() - started < 2 + 10
    capfd.readouterr()


@pytest.mark.slow
def test_a_normal_end_leaves_no_worker(make_backbone):
    """After fit with validation, evaluate and predict no worker is there."""
    trainer = make_trainer(make_backbone)
    trainer.fit(Pictures(), validation_data=Pictures(), batch_size=8, num_workers=2, verbose=0, epochs=1)
    assert children() == []
    trainer.evaluate(Pictures(), num_workers=2)
    trainer.predict(Pictures(), num_workers=2)
    assert children() == []


def test_leaving_steps_in_the_middle_leaves_no_worker(make_backbone):
    """A loop over `steps` that is broken off ends its workers with the iterator."""
    steps = make_trainer(make_backbone).steps(Pictures(), batch_size=4, num_workers=2)
    next(steps)
    next(steps)
    assert len(children()) == 2
    del steps
    assert children() == []


def test_a_source_that_is_left_in_the_middle_leaves_no_worker():
    """So does a source whose batches are no longer asked for."""
    batches = open_data(Pictures(), CLASSES, num_workers=2).batches(4, seed=0, order=None)
    next(batches)
    assert len(children()) == 2
    batches.close()
    assert children() == []


@pytest.mark.slow
def test_no_worker_outlives_a_failed_step_whose_error_is_kept(make_backbone):
    """A notebook keeps the last error and all that hangs on it: the workers are ended all the same."""

    class Poisoned(Pictures):
        def __getitem__(self, index):
            image = self.images[index].float() / 50 - 2
            return (image * float("nan") if index == 0 else image), index % 3

    trainer = make_trainer(make_backbone)
    with pytest.raises((NonFiniteError, ImageError)) as caught:
        trainer.fit(Poisoned(count=64), batch_size=2, epochs=2, num_workers=2, verbose=0)
    assert caught.value is not None
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("callback"), KeyboardInterrupt()], ids=repr)
def test_no_worker_outlives_an_error_between_two_steps(make_backbone, tmp_path, error):
    """An error raised between two steps ends the workers at once, though it is kept."""

    class Fails(tk.Checkpoint):
        def after_step(self, trainer):
            raise error

    trainer = make_trainer(make_backbone)
    with pytest.raises(type(error)) as caught:
        trainer.fit(Pictures(), batch_size=2, callbacks=[Fails(tmp_path)], num_workers=2, verbose=0, epochs=1)
    assert caught.value is not None
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_death_in_another_thread_is_told_as_well(make_backbone):
    """Outside the main thread too, a dead worker is one error that names the image."""
    caught = []

    def run():
        try:
            make_trainer(make_backbone).fit(
                Pictures(DEATHS["SIGKILL"]), batch_size=4, num_workers=2, verbose=0, epochs=1
            )
        except BaseException as error:  # noqa: BLE001 - whatever comes out is what is tested
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert [type(error) for error in caught] == [WorkerError]
    assert "image 21" in str(caught[0])


def signals_of_workers():
    return [
        line.split()[1]
        for child in multiprocessing.active_children()
        for line in Path(f"/proc/{child.pid}/status").read_text().splitlines()
        if line.startswith("SigIgn")
    ]


def test_workers_leave_signals_to_the_main_process():
    """SIGINT and SIGTERM, which a terminal or a scheduler sends to all processes, do not end a worker."""
    batches = open_data(Pictures(), CLASSES, num_workers=2).batches(4, seed=0, order=None)
    next(batches)
    wanted = 1 << (signal.SIGINT - 1) | 1 << (signal.SIGTERM - 1)
    until = time.monotonic() + 10  # the second worker may still be starting
    while [int(ignored, 16) & wanted for ignored in signals_of_workers()] != [wanted, wanted]:
        assert time.monotonic() < until
        time.sleep(0.05)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    assert len(list(batches)) == 7


FULL = """
import resource, sys
import torch
import transferkit as tk
from transferkit.data import workers
from transferkit.data.open import open_data
from transferkit.errors import WorkerError

workers.TIMEOUT_S = 3
big = [(torch.full((3, 2000, 2000), 7, dtype=torch.uint8), 0)] * 8
resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, 6_000_000))  # as a shared memory of 6 MB: files there end so
try:
    for _ in open_data(big, ["a", "b"], num_workers=1).batches(4, seed=0, order=None):
        pass
except WorkerError as error:
    print("told:", error)
import multiprocessing
print("left:", multiprocessing.active_children())
"""


@pytest.mark.slow
def test_shared_memory_that_is_too_small_is_told():
    """Where images do not fit the shared memory between processes: an error in time that speaks of it."""
    printed = python(FULL)
    assert "told: worker processes died (samples cannot be sent" in printed
    assert "/dev/shm" in printed
    assert "left: []" in printed


@pytest.mark.slow
def test_workers_end_when_the_main_process_is_killed(tmp_path):
    """SIGKILL to the main process leaves no orphans for long."""
    script = f"""
import time, multiprocessing, sys
sys.path[:] = {sys.path!r}
import torch
from transferkit.data.open import open_data
batches = open_data([(torch.zeros(3, 32, 32, dtype=torch.uint8), 0)] * 4000, ["a"], num_workers=2).batches(
    4, seed=0, order=None)
next(batches)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
time.sleep(60)
"""
    main = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    orphans = [int(pid) for pid in main.stdout.readline().split()]
    assert len(orphans) == 2
    main.kill()
    main.communicate()
    ends = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and not is_zombie(pid) for pid in orphans):
        assert time.monotonic() < ends
        time.sleep(0.1)


def is_zombie(pid):
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
