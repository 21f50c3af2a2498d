"""Signals while something long runs: real processes, real signals.

This file is also the program that is interrupted: `python test_interrupts.py <scenario> <folder> <number>`.
"""

import code
import contextlib
import functools
import multiprocessing
import os
import random
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
from tiny import differences, environment, in_head, make_backbone, make_model
from transferkit.base.interrupts import Interrupts

LIMIT_S = 40  # against hangs alone
NUMBERS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}
PLACES = ["step", "validation", "fill", "reading", "callback"]
WORKERS = ["workers-step", "workers-validation", "workers-fill", "workers-error"]


class Images(Dataset):
    """Twenty-four images, read one at a time."""

    def __init__(self, watch=None):
        self.targets, self.watch, self.read = [index % 3 for index in range(24)], watch, []

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.read.append(index)
        if self.watch is not None:
            self.watch(self.read)
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator), index % 3


def make_trainer(*, frozen=None, init=0, **options):
    model = make_model(make_backbone(batch_norm=True, seed=init), frozen, seed=init, hidden=(16,), dropout=0.5)
    return tiny.make_trainer(model, **{"schedule": "cosine", **options})


class Sender:
    """Sends a signal to this process at one place of a run, once."""

    def __init__(self, place, number):
        self.place, self.number, self.process, self.sent, self.trainer = place, number, os.getpid(), False, None

    def send(self):
        if not self.sent:
            self.sent = True
            os.kill(self.process, self.number)

    def attach(self, trainer):
        self.trainer = trainer
        in_head(trainer, self.look)

    def look(self, _inputs):
        training = self.trainer.model.head.training
        if self.place == "step" and training and self.trainer.global_step == 3:
            self.send()
        if self.place == "validation" and not training:
            self.send()

    def watch(self, read):
        in_order = read[-3:] == [11, 12, 13]  # all are read in order, and 12 is no image that is probed
        if self.place == "fill" and in_order:
            self.send()
        if self.place == "reading" and self.trainer.model.head.training and self.trainer.global_step == 1:
            self.send()

    def __call__(self, trainer, report):
        if self.place == "callback" and report.epoch == 0:
            self.send()


def fit(trainer, data=None, **changes):
    options = {"epochs": 2, "batch_size": 8, "verbose": 0, "validation_data": Images(), **changes}
    return trainer.fit(Images() if data is None else data, **options)


def placed_run(place, number, folder, *, init=0, **changes):
    """Train with a signal at one place; the trainer is made so that there is such a place."""
    frozen = {"frozen": "head", "cache": True} if place == "fill" else {"cache": False}
    trainer, sender = make_trainer(init=init, **frozen), Sender(place, number)
    sender.attach(trainer)
    callbacks = [sender, *([] if folder is None else [tk.Checkpoint(folder)])]
    data = Images(sender.watch if place in ("fill", "reading") else None)
    history = fit(trainer, data, callbacks=callbacks, resume_from=folder, **changes)
    return trainer, history


def differing(first, second):
    one, two = first.state_dict(), second.state_dict()
    return differences(*([state["model"], state["optimizer"]["state"]] for state in (one, two)))


def losses(history):
    return [
        (report.loss, report.accuracy, report.val_loss, report.val_accuracy, report.lr) for report in history.reports
    ]


def outcome(folder, name):
    return (folder / name).read_text() if (folder / name).exists() else None


def start(scenario, folder, number=signal.SIGINT, **options):
    return subprocess.Popen(
        [sys.executable, __file__, scenario, str(folder), str(int(number))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment(PYTHONUNBUFFERED="1"),
        **options,
    )


def finish(process):
    """Wait for a process; one that hangs is killed, with all of its session, and its status is "hangs"."""
    status = None
    try:
        printed, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        status = "hangs"
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
    return status or process.returncode, printed


def in_group(group):
    """Processes of a group that still live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if int(fields[2]) == group and fields[0] not in "ZX":
                found.append(int(stat.parent.name))
    return found


# In processes of their own: how they end


def scenario_fit(place, folder, number):
    placed_run(place, number, folder)


def scenario_workers(place, folder, number):
    """A run with four workers that says where it is, and is interrupted from outside; or by an error."""
    marks = {
        "workers-step": "step",
        "workers-validation": "validation",
        "workers-fill": "fill",
        "workers-error": "error",
    }
    what = marks[place]
    trainer = make_trainer(**({"frozen": "head", "cache": True} if what == "fill" else {"cache": False}))
    told = []

    def tell(_inputs):
        training = trainer.model.head.training
        if what == "error" and training and trainer.global_step == 3:
            raise RuntimeError("of the user's own")
        if what in ("step", "validation") and training == (what == "step") and not told and trainer.global_step >= 2:
            told.append(1)
            (folder / "children").write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
            os.killpg(os.getpid(), number)

    def watch(read):
        if what == "fill" and torch.utils.data.get_worker_info() is not None and 12 in read and os.getppid() != 1:
            with contextlib.suppress(FileExistsError):
                (folder / "filling").touch(exist_ok=False)
                os.killpg(os.getpgid(0), number)

    in_head(trainer, tell)
    fit(
        trainer,
        Images(watch),
        num_workers=4,
        batch_size=2,
        callbacks=[tk.Checkpoint(folder / "run")],
    )


def scenario_second(place, folder, number):
    """Two signals: the second while the first one's checkpoint is being written."""
    trainer, sender = make_trainer(cache=False), Sender("step", number)
    sender.attach(trainer)
    checkpoint = tk.Checkpoint(folder / "run", every_steps=1)
    state_dict = trainer.state_dict

    def slow_state_dict():
        if sender.sent:
            os.kill(os.getpid(), number)
            time.sleep(LIMIT_S)
        return state_dict()

    trainer.state_dict = slow_state_dict
    fit(trainer, callbacks=[checkpoint])


def main(place, folder, number):
    torch.set_num_threads(1)
    if place in PLACES:
        scenario_fit(place, folder / "run", number)
    elif place in WORKERS:
        scenario_workers(place, folder, number)
    else:
        scenario_second(place, folder, number)


def run_all(root, cases):
    """Run scenarios, each in a session of its own; return exit status, output, folder and processes left of each."""
    found, waiting = {}, list(cases)
    while waiting:
        processes = {}
        for scenario, number in waiting[:3]:  # a few at a time: they are slow to start
            folder = root / f"{scenario}-{number}"
            folder.mkdir()
            processes[scenario, number] = (start(scenario, folder, NUMBERS[number]), folder)
        waiting = waiting[3:]
        for key, (process, folder) in processes.items():
            found[key] = (*finish(process), folder, in_group(process.pid))
    return found


@functools.cache
def uncaught():
    """What an uncaught KeyboardInterrupt makes of a process here: torch's own handlers at exit may turn it into 1."""
    program = "import torchvision; raise KeyboardInterrupt"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    return 130, -signal.SIGINT, ended.returncode


ENDS = [("step", "SIGINT"), ("step", "SIGTERM"), ("second", "SIGINT")]


GROUPS = [("workers-step", "SIGINT"), ("workers-step", "SIGTERM"), ("workers-validation", "SIGINT")]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What became of processes that a signal or an error ended."""
    others = [("workers-fill", "SIGINT"), ("workers-error", "SIGINT")]
    return run_all(tmp_path_factory.mktemp("ended"), [*ENDS, *GROUPS, *others])


@pytest.mark.slow
@pytest.mark.parametrize(("place", "number"), ENDS[:-1])
def test_exit_status(ended, place, number):
    """SIGTERM ends a process with status 143, SIGINT as an uncaught KeyboardInterrupt does, and both were saved."""
    status, printed, folder, left = ended[place, number]
    assert status in ((143,) if number == "SIGTERM" else uncaught())
    assert list((folder / "run").glob("step-*.pt"))
    if number == "SIGINT":
        assert "KeyboardInterrupt: stopped after step" in printed
    assert left == []


@pytest.mark.slow
def test_a_second_signal_during_the_save_stops_at_once(ended):
    """The second Ctrl-C, while the checkpoint is made, ends the process at once; the old checkpoint is whole."""
    status, printed, folder, _ = ended["second", "SIGINT"]
    assert status in uncaught()
    assert "interrupted twice" in printed
    assert sorted(path.name for path in (folder / "run").glob("step-*")) == ["step-00000002.pt", "step-00000003.pt"]
    trainer, whole = make_trainer(init=1, cache=False), make_trainer(cache=False)
    assert losses(fit(trainer, resume_from=folder / "run")) == losses(fit(whole))
    assert differing(trainer, whole) == []


@pytest.fixture(scope="module")
def four_at_work(tmp_path_factory):
    """The run with four workers that nothing stops."""
    trainer = make_trainer(cache=False)
    return trainer, losses(fit(trainer, batch_size=2))


@pytest.mark.slow
@pytest.mark.parametrize(("place", "number"), GROUPS)
def test_ctrl_c_reaches_the_whole_group(ended, four_at_work, place, number):
    """A signal to run and workers alike: a checkpoint is written, the run ends, no process is left, resume is exact."""
    status, printed, folder, left = ended[place, number]
    assert len((folder / "children").read_text().split()) >= 4
    assert "Worker" not in printed
    trainer, (whole, expected) = make_trainer(init=1, cache=False), four_at_work
    assert losses(fit(trainer, batch_size=2, resume_from=folder / "run")) == expected
    assert differing(trainer, whole) == []
    assert status in ((143,) if number == "SIGTERM" else uncaught()), f"{status}: {printed}"
    assert left == []


@pytest.mark.slow
def test_ctrl_c_while_workers_fill_the_cache(ended):
    """A signal to run and workers while features are computed: saved before the first step, and all processes end."""
    status, printed, _, left = ended["workers-fill", "SIGINT"]
    assert "stopped after step 0; saved to" in printed
    assert status in uncaught(), f"{status}: {printed}"
    assert left == []


@pytest.mark.slow
def test_an_error_with_workers_ends_the_process(ended):
    """A script that an error ends in the middle of an epoch exits, with that error, and its workers too."""
    status, printed, _, left = ended["workers-error", "SIGINT"]
    assert "RuntimeError: of the user's own" in printed
    assert status == 1, f"{status}: {printed}"
    assert left == []


# In this process: what is left behind


@pytest.mark.parametrize(
    ("place", "number"), [*((place, "SIGINT") for place in PLACES), ("step", "SIGTERM"), ("callback", "SIGTERM")]
)
def test_interrupted_anywhere_and_resumed(tmp_path, place, number):
    """A signal anywhere in a run is raised again after it was saved, and the resumed run is the uninterrupted one."""
    raised = {"SIGINT": KeyboardInterrupt, "SIGTERM": SystemExit}[number]
    before = [signal.getsignal(each) for each in NUMBERS.values()]
    with pytest.raises(raised) as caught:
        placed_run(place, NUMBERS[number], tmp_path / "run")
    assert [signal.getsignal(each) for each in NUMBERS.values()] == before
    if number == "SIGINT":
        steps = {"step": 4, "validation": 3, "fill": 0, "reading": 2, "callback": 3}[place]
        assert str(caught.value).startswith(f"stopped after step {steps}; saved to {tmp_path / 'run'}")
    else:
        assert caught.value.code == 143
    resumed, history = resume(place, tmp_path / "run")
    whole = make_trainer(**({"frozen": "head", "cache": True} if place == "fill" else {"cache": False}))
    assert losses(history) == losses(fit(whole))
    assert differing(resumed, whole) == []


def resume(place, folder):
    random.seed(99)
    torch.manual_seed(99)
    trainer = make_trainer(init=1, **({"frozen": "head", "cache": True} if place == "fill" else {"cache": False}))
    return trainer, fit(trainer, resume_from=folder)


@pytest.mark.parametrize("number", list(NUMBERS))
def test_nothing_is_saved_without_a_checkpoint(number):
    """Without a Checkpoint the message says that nothing was saved."""
    raised = {"SIGINT": KeyboardInterrupt, "SIGTERM": SystemExit}[number]
    with pytest.raises(raised) as caught:
        placed_run("step", NUMBERS[number], None)
    if number == "SIGINT":
        assert (
            str(caught.value) == "stopped after step 4; nothing was saved: there is no Checkpoint among the callbacks"
        )


def test_what_ended_the_run_is_printed(tmp_path, capsys):
    """With verbose=1 the place of the checkpoint is printed, also where SIGTERM then ends the process silently."""
    with pytest.raises(SystemExit):
        placed_run("step", signal.SIGTERM, tmp_path / "run", verbose=1)
    assert f"stopped after step 4; saved to {tmp_path / 'run' / 'step-00000004.pt'}" in capsys.readouterr().out


def test_best_weights_are_back_after_an_interrupt():
    """Whoever catches the interrupt finds the weights of the best epoch in the model."""
    trainer, kept = make_trainer(cache=False), {}
    sender = Sender("step", signal.SIGINT)

    def look(_inputs):
        if trainer.model.training and trainer.global_step == 4:
            sender.send()

    in_head(trainer, look)

    def keep(_trainer, report):
        kept.update({name: value.clone() for name, value in trainer.model.state_dict().items()})

    with pytest.raises(KeyboardInterrupt, match="stopped after step 5"):
        fit(trainer, callbacks=[keep])
    assert all(torch.equal(value, kept[name]) for name, value in trainer.model.state_dict().items())


def test_a_notebook_goes_on(capsys):
    """In an interpreter that goes on after Ctrl-C a run can be made again with the same trainer."""
    names = {"trainer": make_trainer(cache=False), "fit": fit, "sender": Sender("step", signal.SIGINT)}
    interpreter = code.InteractiveInterpreter(names)
    interpreter.runsource("sender.attach(trainer); fit(trainer)")
    assert "KeyboardInterrupt" in capsys.readouterr().err
    names["sender"].sent = True
    interpreter.runsource("history = fit(trainer)")
    assert len(names["history"].reports) == 2
    assert names["trainer"].global_step == 4 + 6
    forget_last_error()


def forget_last_error():
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        if hasattr(sys, name):
            delattr(sys, name)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["step", "validation", "fill"])
def test_no_worker_outlives_an_interrupt(place):
    """Workers are ended before `KeyboardInterrupt` comes out, also where its traceback is kept, as notebooks do."""
    frozen = {"frozen": "head", "cache": True} if place == "fill" else {"cache": False}
    trainer, sender = make_trainer(**frozen), Sender(place, signal.SIGINT)
    sender.attach(trainer)
    data = Images(sender.watch if place == "fill" else None)
    left = None
    try:
        fit(trainer, data, num_workers=2, batch_size=2, validation_data=Images())
    except KeyboardInterrupt:
        left = multiprocessing.active_children()  # while the traceback is held
    for child in left or ():
        child.kill()
        child.join()
    assert left == []


@pytest.mark.parametrize("number", list(NUMBERS))
def test_ignored_signals_stay_ignored(number):
    """What a process ignores (nohup) does not end its run."""
    before = signal.signal(NUMBERS[number], signal.SIG_IGN)
    try:
        _, history = placed_run("step", NUMBERS[number], None)
        assert len(history.reports) == 2
        assert signal.getsignal(NUMBERS[number]) is signal.SIG_IGN
    finally:
        signal.signal(NUMBERS[number], before)


@pytest.mark.parametrize("number", list(NUMBERS))
def test_an_own_handler_is_called(tmp_path, number):
    """A handler of the user's own is called once, after the checkpoint was written, and is in place again."""
    calls = []

    def handler(received, frame):
        calls.append((received, [path.name for path in (tmp_path / "run").glob("step-*")]))

    before = signal.signal(NUMBERS[number], handler)
    try:
        with pytest.raises(KeyboardInterrupt if number == "SIGINT" else SystemExit):
            placed_run("step", NUMBERS[number], tmp_path / "run")
        assert signal.getsignal(NUMBERS[number]) is handler
    finally:
        signal.signal(NUMBERS[number], before)
    assert [received for received, _ in calls] == [NUMBERS[number]]
    assert "step-00000004.pt" in calls[0][1]


def test_an_own_handler_that_raises_decides():
    """What a handler of the user's own raises is what comes out."""

    def handler(received, frame):
        raise TimeoutError("the job's time is up")

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(TimeoutError, match="time is up"):
            placed_run("step", signal.SIGTERM, None)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_leaves_handlers_alone():
    """`fit` outside the main thread works, and the handlers are those of the main thread all the time."""
    before = [signal.getsignal(each) for each in NUMBERS.values()]
    seen, histories = [], []

    def look(trainer, report):
        seen.append([signal.getsignal(each) for each in NUMBERS.values()])

    thread = threading.Thread(target=lambda: histories.append(fit(make_trainer(cache=False), callbacks=[look])))
    thread.start()
    thread.join(LIMIT_S)
    assert len(histories[0].reports) == 2
    assert seen == [before, before]


def test_handlers_are_back_after_an_error_and_a_refusal():
    """However `fit` ends, the handlers are those from before."""
    before = [signal.getsignal(each) for each in NUMBERS.values()]

    def fail(trainer, report):
        raise RuntimeError("of the user's own")

    with pytest.raises(RuntimeError):
        fit(make_trainer(cache=False), callbacks=[fail])
    with pytest.raises(tk.errors.TransferKitError):
        fit(make_trainer(cache=False), epochs=0)
    assert [signal.getsignal(each) for each in NUMBERS.values()] == before


def test_a_second_signal_ends_a_validation_without_another_checkpoint(tmp_path):
    """After two signals in a validation the run ends at once, and as the message says without a checkpoint."""
    trainer = make_trainer(cache=False)

    def look(_inputs):
        if not trainer.model.head.training:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    in_head(trainer, look)
    with pytest.raises(KeyboardInterrupt, match="interrupted twice"):
        fit(trainer, callbacks=[tk.Checkpoint(tmp_path / "run")])
    assert list((tmp_path / "run").iterdir()) == []


def test_a_signal_in_the_callback_that_ends_the_run_is_saved(tmp_path):
    """A signal in a callback that ends the run as well: the run is saved where it stands, and the message says so."""

    def end(trainer, report):
        os.kill(os.getpid(), signal.SIGINT)
        return True

    with pytest.raises(KeyboardInterrupt, match="stopped after step 3; saved to"):
        fit(make_trainer(cache=False), callbacks=[end, tk.Checkpoint(tmp_path / "run", every_epochs=5)])
    assert (tmp_path / "run" / "step-00000003.pt").exists()


def test_a_signal_before_the_first_step_ends_the_run_there(tmp_path):
    """A signal while the run is prepared ends it before or after its first step, saved."""
    data = Images(lambda read: os.kill(os.getpid(), signal.SIGINT) if len(read) == 1 else None)
    trainer = make_trainer(cache=False)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step [01]; saved to"):
        fit(trainer, data, callbacks=[tk.Checkpoint(tmp_path / "run")])


def test_interrupts_serve_twice():
    """What one use received does not end the next."""
    interrupts = Interrupts()
    with pytest.raises(KeyboardInterrupt), interrupts:
        os.kill(os.getpid(), signal.SIGINT)
    with interrupts:
        interrupts.check()


def interrupted(interrupts, *, count=1, error=None):
    with interrupts:
        for _ in range(count):
            os.kill(os.getpid(), signal.SIGINT)
        if error is not None:
            raise error


def test_a_second_signal_does_not_mark_the_next_use():
    """That a use was stopped at once by a second signal is forgotten when the next begins."""
    interrupts = Interrupts()
    with pytest.raises(KeyboardInterrupt, match="interrupted twice"):
        interrupted(interrupts, count=2)
    assert interrupts.twice
    with interrupts:
        assert not interrupts.twice


def test_nested_blocks_are_one():
    """A block inside another of the same object neither raises nor puts handlers back: the outer one does."""
    interrupts, before = Interrupts(), signal.getsignal(signal.SIGINT)

    def nested():
        with interrupts as outer:
            interrupted(interrupts)
            with interrupts as inner:
                assert inner is outer is interrupts
                assert interrupts.received == signal.SIGINT
            assert signal.getsignal(signal.SIGINT) != before

    with pytest.raises(KeyboardInterrupt) as caught:
        nested()
    assert str(caught.value) == ""
    assert signal.getsignal(signal.SIGINT) == before


def test_an_error_after_a_signal_is_not_hidden():
    """Where the work fails after a signal came, its own error is raised."""
    with pytest.raises(ValueError, match="the work's own"):
        interrupted(Interrupts(), error=ValueError("the work's own"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
