"""What the safety of training costs: a step with its checks against the same step without, in turns.

    python benchmarks/safety.py [--image-size 64] [--precision bf16] [--repetitions 40] [--json safety.json]

Taken out for comparison: looking at every gradient for NaN and infinity before the update, copies of batch norm's
statistics, and room for the optimizer's state. What they cost is measured as a share: the difference of pairs of
neighbouring steps over the time of the bare step, median and quartiles. A checkpoint's cost is measured beside it: one
save, with fsync and verification, against one epoch of 63 steps.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from limits import BATCH_SIZE, seconds

import transferkit as tk

ROWS: dict[str, str | None] = {"head": "head", "block5 and head": "block5", "everything": None}
STEPS_OF_AN_EPOCH = 63  # 2,000 images


class NoCopies:
    """Stands in for `BufferCopies`."""

    def __init__(self, network: object) -> None:
        pass

    def restore_unless(self, finite: object) -> None:
        pass


def bare(run: Callable[[], object]) -> Callable[[], object]:
    """Return the same step without its checks."""
    finite = torch.ones((), dtype=torch.bool)
    stand_ins = {
        "transferkit.step.gradients_are_finite": lambda *_: finite,
        "transferkit.step.BufferCopies": NoCopies,
        "transferkit.step.reserve_state": lambda *_: None,
        "transferkit.device.step_where": lambda _, optimizer: optimizer.step(),
    }

    def step() -> None:
        with ExitStack() as stack:
            for name, stand_in in stand_ins.items():
                stack.enter_context(mock.patch(name, stand_in))
            clock.append(seconds(run, device))

    device = tk.Device()
    clock: list[float] = []
    step.clock = clock  # type: ignore[attr-defined]
    return step


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
        model = tk.attach_head(tk.load_backbone(weights=None, image_size=options.image_size), 10, hidden=(4096, 4096))
        trainer = tk.Trainer(tk.freeze_until(model, layer), lr=1e-5, device=device)
        images = torch.randint(0, 256, (4 * BATCH_SIZE, 3, *[options.image_size] * 2), dtype=torch.uint8)
        steps = trainer.steps((images, torch.arange(len(images)) % 10), epochs=10**6, batch_size=BATCH_SIZE)
        run = partial(next, steps)
        without = bare(run)
        differences, times = [], []
        for number in range(options.repetitions + 3):
            checked = seconds(run, device)
            without()
            if number >= 3:  # the first ones allocate, and compute features
                times.append(without.clock[-1])  # type: ignore[attr-defined]
                differences.append(checked - times[-1])
        step = statistics.median(times)
        low, median, high = (100 * value / step for value in statistics.quantiles(differences, n=4))
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = tk.Checkpoint(folder)
            checkpoint.save(trainer)  # writes what is frozen, once
            save = statistics.median(seconds(partial(checkpoint.save, trainer), device) for _ in range(3))
        row = {"trains": name, "step_ms": 1e3 * step, "checks_percent": [low, median, high], "save_s": save}
        row["save_percent_of_epoch"] = 100 * save / (STEPS_OF_AN_EPOCH * step)
        rows.append(row)
        print(
            f"{name:20} {1e3 * step:7.1f} {median:9.1f} ({low:.1f} to {high:.1f}) {save:18.2f} "
            f"{row['save_percent_of_epoch']:12.0f}"
        )
    if options.json:
        about = {"torch": torch.__version__, "device": repr(device), "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({**about, "image_size": options.image_size, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
