"""Measure what the safety of training costs, as a percentage of a training step.

    python benchmarks/safety.py [--image-size 64] [--precision bf16] [--repetitions 40] [--json safety.json]

Times the calls that a step makes only for safety: checking every gradient for NaN and infinity before the update,
copying and restoring batch norm's statistics, and reserving memory for the optimizer's state. Their sum is a
percentage of the step, median and quartiles. (Steps with and without them, run in turns, differ by less than the
machine's noise.) Also times one save of a checkpoint, with fsync and verification, against one epoch of 63 steps.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from limits import BATCH_SIZE, seconds

import transferkit as tk
from transferkit.compute.finite import BufferCopies
from transferkit.training import step

ROWS: dict[str, str | None] = {"head": "head", "block5 and head": "block5", "everything": None}
BATCHES = 8
STEPS_OF_AN_EPOCH = 63  # 2,000 images


class Clock:
    """Adds up the seconds spent in functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return call


def watch_checks(clock: Clock) -> ExitStack:
    """Time the checks of every step made inside."""
    stack = ExitStack()
    places = [
        (step, "gradients_are_finite"),
        (step, "reserve_state"),
        (BufferCopies, "__init__"),
        (BufferCopies, "restore"),
    ]
    for owner, name in places:
        stack.enter_context(mock.patch.object(owner, name, clock.timed(getattr(owner, name))))
    return stack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = tk.Device(precision=options.precision)
    rows = []
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, images of {options.image_size} px")
    print("trains               step ms   checks, % of it (quartiles)   save s   save, % of an epoch's steps")
    for name, layer in ROWS.items():
        model = tk.attach_head(
            tk.load_backbone(weights=None, image_size=options.image_size), 10, hidden=(4096, 4096), pooling="flatten"
        )
        trainer = tk.Trainer(tk.freeze_until(model, layer), lr=1e-5, device=device)
        images = torch.randint(0, 256, (BATCHES * BATCH_SIZE, 3, *[options.image_size] * 2), dtype=torch.uint8)
        steps = trainer.steps((images, torch.arange(len(images)) % 10), epochs=10**6, batch_size=BATCH_SIZE)
        run = partial(next, steps)
        clock, times, shares = Clock(), [], []
        with watch_checks(clock):
            for number in range(options.repetitions + 3):
                clock.seconds = 0.0
                times.append(seconds(run, device))
                shares.append(100 * clock.seconds / times[-1])
                if number < 3:  # the first steps allocate, and compute features
                    times, shares = [], []
        step_s = statistics.median(times)
        low, median, high = statistics.quantiles(shares, n=4)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = tk.Checkpoint(folder)
            checkpoint.save(trainer)  # writes the frozen weights, once
            save = statistics.median(seconds(partial(checkpoint.save, trainer), device) for _ in range(3))
        row = {"trains": name, "step_ms": 1e3 * step_s, "checks_percent": [low, median, high], "save_s": save}
        row["save_percent_of_epoch"] = 100 * save / (STEPS_OF_AN_EPOCH * step_s)
        rows.append(row)
        print(
            f"{name:20} {1e3 * step_s:7.1f} {median:9.2f} ({low:.2f} to {high:.2f}) {save:18.2f} "
            f"{row['save_percent_of_epoch']:12.0f}"
        )
    if options.json:
        about = {"torch": torch.__version__, "device": repr(device), "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({**about, "image_size": options.image_size, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
