"""Lines where nobody watches, bars where somebody does, and nothing where nothing is wanted."""

import io
import itertools
import os
import pty
import re
import subprocess
import sys
import termios
import textwrap
import threading
from types import SimpleNamespace

import pytest
import torch

import transferkit as tk
from tiny import environment
from transferkit.base.display import REDRAW_S, Display
from transferkit.errors import ArgumentError

LIMIT_S = 60  # against hangs alone

PROGRAM = textwrap.dedent(
    """
    import sys, tiny, transferkit as tk
    backbone, data = tiny.make_backbone(), tiny.make_images()
    def build(): return tk.attach_head(backbone, 3)
    model = tk.freeze_until(build(), "block5")
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    verbose = int(sys.argv[1])
    trainer.fit(data, validation_data=data, epochs=3, batch_size=4, verbose=verbose)
    trainer.lr_find(data, num_steps=3, verbose=verbose)
    tk.search(build, {"lr": [1e-3, 1e-2]}, data, validation_data=data, device="cpu", verbose=verbose)
    """
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and counts what is written."""

    writes = 0

    def isatty(self):
        return True

    def write(self, text):
        self.writes += bool(text)
        return super().write(text)


def screen(text):
    """Return the lines that a terminal shows after some text, as far as tqdm uses one."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|\r|\n|[^\r\n\x1b]+", text):
        if part == "\x1b[A":
            row = max(0, row - 1)
        elif part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def masked(text):
    """Leave out what differs from run to run: seconds and speeds."""
    text = re.sub(r"[\d,.]+ (images/s|s left|s\b)", r"# \1", text)
    return [line for line in text.splitlines() if line]


@pytest.fixture
def as_terminal(monkeypatch):
    """A function that puts a terminal in the place of standard error; set up here, pytest would take it away."""
    pytest.importorskip("tqdm")

    def put():
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return put


class Clock:
    """Stands still, until it is told to go on."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """The clock by which bars are drawn."""
    clock = Clock()
    monkeypatch.setattr("transferkit.base.display.time", clock)
    return clock


@pytest.fixture
def trainer(model):
    return tk.Trainer(tk.freeze_until(model, "block5"), device="cpu", precision="fp32")


# ---- where nobody watches


def test_without_a_terminal_bars_are_lines(trainer, data, capsys):
    """Into a file or a pipe, verbose=1 gives what verbose=2 gives, and nothing on standard error."""
    printed = []
    for verbose in (2, 1):
        fresh = tk.Trainer(trainer.model, device="cpu", precision="fp32", lr=1e-30, optimizer="sgd")
        fresh.fit(data, validation_data=data, epochs=2, verbose=verbose)
        fresh.lr_find(data, num_steps=3, lr_max=1e-5, verbose=verbose)
        out, err = capsys.readouterr()
        assert err == ""
        assert "\r" not in out
        printed.append(masked(out))
    assert printed[0] == printed[1]
    assert len(printed[0]) > 4


def run_program(verbose, **streams):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(verbose)], env=environment(TERM="xterm"), **streams)


def read_all(descriptor):
    """Read a pseudo-terminal until its other end is closed."""
    parts = []
    while True:
        try:
            part = os.read(descriptor, 2**16)
        except OSError:  # Linux says so where nobody holds the other end
            part = b""
        if not part:
            return b"".join(parts).decode()
        parts.append(part)


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True])
def test_in_a_terminal_there_are_bars_and_lines_stay_whole(together):
    """In a real pseudo-terminal: bars on standard error, the lines of verbose=2 on standard output, no bar is left.

    `together` has both streams in the terminal; else standard output is a pipe.
    """
    pytest.importorskip("tqdm")
    plain = run_program(2, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    expected, errors = (part.decode() for part in plain.communicate(timeout=LIMIT_S))
    assert errors == ""
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (60, 80))  # as wide as lines in a pipe; without a size tqdm draws nothing
    process = run_program(1, stdout=child if together else subprocess.PIPE, stderr=child)
    os.close(child)
    lines = [b""]
    reader = threading.Thread(target=lambda: lines.append(process.stdout.read())) if not together else None
    if reader:
        reader.start()
    drawn = read_all(parent)
    if reader:
        reader.join(LIMIT_S)
        process.stdout.close()
    assert process.wait(LIMIT_S) == 0
    os.close(parent)
    shown = [line for line in screen(drawn) if line]
    if together:
        assert masked("\n".join(shown)) == masked(expected)
    else:
        assert shown == []
        assert masked(b"".join(lines).decode()) == masked(expected)
    for what in ("features:", "epoch 1:", "epoch 3:", "validation:", "lr_find:", "search:"):
        assert what in drawn
    assert "24" in drawn


def test_lines_into_a_pipe_are_there_at_once(as_terminal, monkeypatch):
    """With bars in a terminal and standard output in a pipe, a line does not wait for a buffer to be full."""
    as_terminal()
    flushed = []

    class Pipe(io.StringIO):
        def flush(self):
            flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Pipe())
    Display(1).say("epoch 1")
    assert flushed[-1] == "epoch 1\n"


# ---- in a terminal


def test_a_bar_is_drawn_and_wiped(as_terminal, clock, capsys):
    """While work goes on the bar shows count and figures; after it nothing is left, lines are on standard output."""
    terminal = as_terminal()
    display = Display(1)
    with display.bar("epoch 1", 100) as bar:
        bar.advance(30)
        clock.now += 2 * REDRAW_S
        bar.advance(32, lambda: "loss 0.5")
        assert screen(terminal.getvalue())[0].startswith("epoch 1:  62%")
        assert "62/100" in terminal.getvalue()
        assert "loss 0.5" in terminal.getvalue()
        display.say("a line")
        assert capsys.readouterr().out == "a line\n"
        assert screen(terminal.getvalue())[0].startswith("epoch 1:")
    assert screen(terminal.getvalue()) == [""]


def test_a_bar_without_a_total_counts(as_terminal, clock):
    """A loader without length has a bar that counts."""
    terminal = as_terminal()
    with Display(1).bar("epoch 1", None) as bar:
        bar.advance(1)
        clock.now += 2 * REDRAW_S
        bar.advance(6)
        assert "7 images" in terminal.getvalue()


def test_a_bar_that_never_began_draws_nothing(as_terminal):
    """Work that ends before its first image shows no bar."""
    terminal = as_terminal()
    with Display(1).bar("epoch 1", 10):
        pass
    assert terminal.getvalue() == ""


def test_a_bar_is_wiped_when_the_work_fails(as_terminal, trainer, data, clock):
    """An error in the middle of an epoch, of features and of a search leaves no bar on the screen."""
    terminal = as_terminal()

    def fail(*_):
        raise RuntimeError("something broke")

    hook = trainer.model.head.register_forward_pre_hook(fail)
    for call in (trainer.fit, trainer.lr_find):
        with pytest.raises(RuntimeError, match="something broke"):
            call(data, batch_size=4)
    hook.remove()

    def stop(trainer, report):
        raise RuntimeError("something broke")

    with pytest.raises(RuntimeError, match="something broke"):
        trainer.fit(data, epochs=2, batch_size=4, callbacks=[stop])
    assert terminal.getvalue() != ""
    assert screen(terminal.getvalue()) == [""]


def test_no_thread_watches_bars(as_terminal, trainer, data):
    """tqdm's own thread is not started."""
    as_terminal()
    before = threading.enumerate()
    threads = []
    trainer.fit(data, epochs=2, batch_size=4, callbacks=[lambda *_: threads.extend(threading.enumerate())])
    with Display(1).bar("work", 10) as bar:
        bar.advance(1)
        threads.extend(threading.enumerate())
    assert set(threads) == set(before)
    from tqdm import tqdm

    assert tqdm.monitor is None


def test_figures_are_read_once_in_a_while(as_terminal, clock):
    """Figures, which wait for the device, are asked for at most once per REDRAW_S, however many steps there are."""
    as_terminal()
    asked = []

    def figures():
        asked.append(clock.now)
        return "loss 1"

    with Display(1).bar("epoch 1", 10_000) as bar:
        for _ in range(10_000):
            bar.advance(1, figures)
            clock.now += REDRAW_S / 64
    seconds = 10_000 / 64 * REDRAW_S
    assert len(asked) == pytest.approx(seconds / REDRAW_S, abs=3)
    assert all(later - earlier >= REDRAW_S for earlier, later in itertools.pairwise(asked))


def test_output_does_not_grow_with_the_number_of_steps(as_terminal, clock):
    """In the same time ten thousand steps write no more than ten, on a terminal."""
    terminal = as_terminal()
    writes = []
    for steps in (10, 10_000):
        before = terminal.writes
        with Display(1).bar("epoch 1", steps) as bar:
            for _ in range(steps):
                bar.advance(1)
                clock.now += 10 * REDRAW_S / steps
        writes.append(terminal.writes - before)
    assert writes[1] <= writes[0] + 3


def test_a_run_shows_each_of_its_parts(as_terminal, trainer, data, capsys):
    """A run has bars for features, epochs and validation, and its lines are those of verbose=2."""
    terminal = as_terminal()
    trainer.fit(data, validation_data=data, epochs=2, batch_size=4, verbose=1)
    lines = masked(capsys.readouterr().out)
    for what in ("features:", "epoch 1:", "epoch 2:", "validation:"):
        assert what in terminal.getvalue()
    assert screen(terminal.getvalue()) == [""]
    assert [line.split("  ")[0].split(":")[0] for line in lines if line.startswith("epoch")] == ["epoch 1", "epoch 2"]


# ---- without bars


@pytest.mark.parametrize("missing", ["tqdm", "terminal", "stderr"])
def test_without_tqdm_or_terminal_there_are_lines(monkeypatch, data, trainer, capsys, missing):
    """Where tqdm is not installed, nobody watches, or there is no standard error at all, lines are printed."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", None if missing == "stderr" else stream)
    if missing == "tqdm":
        monkeypatch.setitem(sys.modules, "tqdm", None)
    if missing == "terminal":
        monkeypatch.setattr(stream, "isatty", lambda: False)
    trainer.fit(data, epochs=2, batch_size=4, verbose=1)
    assert stream.getvalue() == ""
    out = capsys.readouterr().out
    assert "\r" not in out
    assert [line[:7] for line in out.splitlines() if line.startswith("epoch")] == ["epoch 1", "epoch 2"]


def test_nothing_is_shown_when_told_so(as_terminal, model, trainer, data, capsys):
    """verbose=0 shows nothing on either stream, in a terminal, whatever is called and whatever there is to say."""
    terminal = as_terminal()
    trainer.fit(data, validation_data=data, epochs=2, augment="flip", verbose=0)  # has something to say
    trainer.lr_find(data, num_steps=2, lr_max=1e-5, verbose=0)  # likewise
    tk.search(lambda: model, {"lr": [1e-3, 1e30]}, data, validation_data=data, device="cpu", verbose=0)
    assert capsys.readouterr().out == ""
    assert terminal.getvalue() == ""


def test_lines_alone_in_a_terminal(as_terminal, trainer, data, capsys):
    """verbose=2 draws no bar in a terminal either."""
    terminal = as_terminal()
    trainer.fit(data, verbose=2, epochs=1)
    assert terminal.getvalue() == ""
    assert "epoch 1" in capsys.readouterr().out


@pytest.mark.parametrize("verbose", [-1, 3, 0.5, "1", None, "auto"])
def test_other_values_are_refused(trainer, data, verbose):
    """What is not 0, 1 or 2 is refused with what these mean, by each call that has it, before anything is done."""
    message = rf"verbose={re.escape(repr(verbose))} is not known: expected 0 \(nothing\), 1 .* or 2"
    for call in (trainer.fit, trainer.lr_find):
        with pytest.raises(ArgumentError, match=message):
            call(data, verbose=verbose)
    with pytest.raises(ArgumentError, match=message):
        tk.search(lambda: trainer.model, {"lr": [1e-3]}, data, validation_data=data, verbose=verbose)
    assert trainer.global_step == 0


@pytest.mark.parametrize(("verbose", "number"), [(True, 1), (False, 0), (2.0, 2)])
def test_equal_values_serve(verbose, number):
    """True is 1 and False is 0."""
    assert Display(verbose).verbose == number


# ---- notebooks


def shell(name):
    """Return a module IPython with a shell of some kind."""
    kind = type(name, (), {"config": {}})
    return SimpleNamespace(get_ipython=kind)


def test_a_notebook_has_bars(monkeypatch, clock):
    """A notebook's shell is recognised, though its standard error is no terminal; what it prints does not grow."""
    pytest.importorskip("tqdm")
    stream = Terminal()
    monkeypatch.setattr(stream, "isatty", lambda: False)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setitem(sys.modules, "IPython", shell("ZMQInteractiveShell"))
    writes = []
    for steps in (5, 5_000):
        before = stream.writes
        with Display(1).bar("epoch 1", steps) as bar:
            for _ in range(steps):
                bar.advance(1)
        writes.append(stream.writes - before)
    assert 0 < writes[0] == writes[1]


@pytest.mark.parametrize("name", ["TerminalInteractiveShell", "Shell", None])
def test_other_shells_have_lines(monkeypatch, name):
    """Another shell without a terminal, IPython that is only imported, or none, is no notebook."""
    stream = Terminal()
    monkeypatch.setattr(stream, "isatty", lambda: False)
    monkeypatch.setattr(sys, "stderr", stream)
    module = SimpleNamespace(get_ipython=lambda: None) if name is None else shell(name)
    monkeypatch.setitem(sys.modules, "IPython", module)
    with Display(1).bar("epoch 1", 10) as bar:
        bar.advance(1)
    assert stream.getvalue() == ""


# ---- what it must not change


def test_bars_change_no_number(as_terminal, make_backbone, data):
    """A run with bars gives the bits of one without."""
    trained, terminal = [], as_terminal()
    for verbose in (0, 1):
        torch.manual_seed(0)
        model = tk.freeze_until(tk.attach_head(make_backbone(), 3, hidden=(8,), dropout=0.5), "block5")
        tk.Trainer(model, device="cpu", precision="fp32").fit(data, epochs=2, batch_size=4, verbose=verbose)
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert "epoch 2" in terminal.getvalue()


def test_batches_pass_through_a_bar_as_they_are(as_terminal, clock):
    """A bar over batches yields each of them, the same object, and counts its images."""
    as_terminal()
    batches = [(torch.zeros(4, 1), torch.zeros(4)), (torch.zeros(2, 1), torch.zeros(2))]
    with Display(1).bar("validation", 6) as bar:
        seen = list(bar.over(batches))
        assert bar._drawn.n == 6
    assert all(one is other for one, other in zip(seen, batches, strict=True))
