"""Measure what safety and progress bars cost, as a percentage of a training step.

    python benchmarks/overhead.py [--image-size 64] [--precision bf16] [--repetitions 40]

Safety: times the calls that a step makes only for it: checking every gradient for NaN and infinity before the update,
copying and restoring batch norm's statistics, and reserving memory for the optimizer's state. Their sum is a
percentage of the step, median and quartiles. (Steps with and without them, run in turns, differ by less than the
machine's noise.) Also times one save of a checkpoint, with fsync and verification, against one epoch of 63 steps.

Progress bars: microseconds a step, and milliseconds a redraw, twice a second, which reads loss and accuracy. The bar is
drawn in a pseudo-terminal and in a notebook (needs nbclient and ipykernel). The limit is 1 % of the shortest step.
"""

import argparse
import contextlib
import os
import pty
import statistics
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from limits import BATCH_SIZE, make_model, seconds
from tqdm.auto import tqdm

import transferkit as tk
from transferkit.base.display import REDRAW_S, Bar
from transferkit.compute.finite import BufferCopies
from transferkit.training import step
from transferkit.training.metrics import Sums

ROWS: dict[str, str | None] = {"head": "head", "block5 and head": "block5", "everything": None}
CHECKS = [
    (step, "gradients_are_finite"),
    (step, "reserve_state"),
    (BufferCopies, "__init__"),
    (BufferCopies, "restore"),
]
BATCHES = 8
STEPS_OF_AN_EPOCH = 63  # 2,000 images
BAR_STEPS, REDRAWS = 200_000, 200
SHORTEST_STEP_S = 0.030  # in docs/performance.md: a head of 4096-4096-10 on 512 features, two cores


def measure_safety(options: argparse.Namespace) -> None:
    device = tk.Device(precision=options.precision)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, images of {options.image_size} px")
    print("trains               step ms   checks, % of it (quartiles)   save s   save, % of an epoch's steps")
    spent = 0.0

    def timed(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal spent
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent += time.perf_counter() - started

        return call

    for name, layer in ROWS.items():
        trainer = tk.Trainer(make_model(options.image_size, layer), lr=1e-5, device=device)
        images = torch.randint(0, 256, (BATCHES * BATCH_SIZE, 3, *[options.image_size] * 2), dtype=torch.uint8)
        steps = trainer.steps((images, torch.arange(len(images)) % 10), epochs=10**6, batch_size=BATCH_SIZE)
        times, shares = [], []
        with contextlib.ExitStack() as stack:
            for owner, check in CHECKS:
                stack.enter_context(mock.patch.object(owner, check, timed(getattr(owner, check))))
            for _ in range(options.repetitions + 3):
                spent = 0.0
                times.append(seconds(partial(next, steps), device))
                shares.append(100 * spent / times[-1])
        step_s = statistics.median(times[3:])  # the first steps allocate, and compute features
        low, median, high = statistics.quantiles(shares[3:], n=4)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = tk.Checkpoint(folder)
            checkpoint.save(trainer)  # writes the frozen weights, once
            save = statistics.median(seconds(partial(checkpoint.save, trainer), device) for _ in range(3))
        print(
            f"{name:20} {1e3 * step_s:7.1f} {median:9.2f} ({low:.2f} to {high:.2f}) {save:18.2f} "
            f"{100 * save / (STEPS_OF_AN_EPOCH * step_s):12.0f}",
            flush=True,
        )


def measure_bar(file: Any = None) -> str:
    sums, none = Sums(torch.device("cpu")), torch.empty(0)
    sums.add(torch.tensor(1.0), torch.tensor(3), 32, logits=none, targets=none)
    bar = Bar(lambda: tqdm(total=BAR_STEPS * 32, file=file, leave=False))

    def figures() -> str:
        loss, accuracy = sums.means()
        return f"loss {loss:.4f} accuracy {accuracy:.4f}"

    def advance(count: int, *, redraw: bool) -> float:
        started = time.perf_counter()
        for _ in range(count):
            if redraw:
                bar._due = 0.0
            bar.advance(32, figures)
        return (time.perf_counter() - started) / count

    bar.advance(32, figures)
    step_s, redraw_s = advance(BAR_STEPS, redraw=False), advance(REDRAWS, redraw=True)
    bar.close()
    share = 100 * (step_s / SHORTEST_STEP_S + redraw_s / REDRAW_S)
    return f"{step_s * 1e6:.2f} microseconds a step, {redraw_s * 1e3:.2f} ms a redraw, {share:.3f} % of a step"


def in_terminal() -> str:
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (40, 120))  # or tqdm draws nothing

    def read() -> None:
        with contextlib.suppress(OSError):  # closed
            while os.read(parent, 65536):
                pass

    threading.Thread(target=read, daemon=True).start()
    with os.fdopen(child, "w") as terminal:
        return measure_bar(terminal)


def in_notebook() -> str:
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    source = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import overhead\n"
    notebook = new_notebook(cells=[new_code_cell(f"{source}print('FIGURES', overhead.measure_bar())")])
    NotebookClient(notebook, timeout=300).execute()
    text = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
    return text.split("FIGURES ")[1].splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--repetitions", type=int, default=40)
    measure_safety(parser.parse_args())
    print(f"bar in a terminal: {in_terminal()}")
    print(f"bar in a notebook: {in_notebook()}")


if __name__ == "__main__":
    main()
