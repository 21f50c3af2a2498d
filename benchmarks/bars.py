"""Measure what a progress bar costs: microseconds per step, and milliseconds per redraw, twice a second.

The bar is drawn in a pseudo-terminal and in a notebook (needs nbclient and ipykernel). Each redraw reads loss and
accuracy. The limit is 1 % of a training step:

    python benchmarks/bars.py
"""

import contextlib
import json
import os
import pty
import termios
import threading
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from transferkit.base.display import REDRAW_S, Bar
from transferkit.training.metrics import Sums

STEPS, PICTURES = 200_000, 200
STEP_S = 0.030  # the shortest step in docs/performance.md: a head of 4096-4096-10 on 512 features, two cores


def measure(file: Any = None) -> dict[str, float]:
    sums = Sums(torch.device("cpu"))
    none = torch.empty(0)
    sums.add(torch.tensor(1.0), torch.tensor(3), 32, logits=none, targets=none)
    bar = Bar(lambda: tqdm(total=STEPS * 32, file=file, leave=False))

    def figures() -> str:
        loss, accuracy = sums.means()
        return f"loss {loss:.4f} accuracy {accuracy:.4f}"

    bar.advance(32, figures)
    started = time.perf_counter()
    for _ in range(STEPS):
        bar.advance(32, figures)
    step_s = (time.perf_counter() - started) / STEPS
    started = time.perf_counter()
    for _ in range(PICTURES):
        bar._due = 0.0
        bar.advance(32, figures)
    picture_s = (time.perf_counter() - started) / PICTURES
    bar.close()
    share = step_s / STEP_S + picture_s / REDRAW_S
    return {"step_us": step_s * 1e6, "picture_ms": picture_s * 1e3, "percent_of_a_step": 100 * share}


def in_terminal() -> dict[str, float]:
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (40, 120))  # or tqdm draws nothing

    def read() -> None:
        with contextlib.suppress(OSError):  # closed
            while os.read(parent, 65536):
                pass

    threading.Thread(target=read, daemon=True).start()
    with os.fdopen(child, "w") as terminal:
        return measure(terminal)


def in_notebook() -> dict[str, float]:
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    source = f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bars\n"
    notebook = new_notebook(cells=[new_code_cell(f"{source}print('FIGURES', json.dumps(bars.measure()))")])
    NotebookClient(notebook, timeout=300).execute()
    text = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
    return json.loads(text.split("FIGURES ")[1].splitlines()[0])


if __name__ == "__main__":
    print(json.dumps({"terminal": in_terminal(), "notebook": in_notebook()}, indent=1))
