"""Progress of long work: lines of text, and bars where someone can watch them move."""

import importlib.util
import re
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor

from transferkit.base.processes import rank
from transferkit.errors import ArgumentError, printable

COLUMNS = 80  # where there is no terminal
REDRAW_S = 0.5  # between redraws of a bar: reading loss and accuracy waits for the device, and drawing takes 1 ms


class Bar:
    """The progress of one task, in images; `draw` makes a `tqdm` bar at the first one, None draws nothing."""

    def __init__(self, draw: Callable[[], Any] | None = None) -> None:
        self._draw = draw
        self._drawn: Any = None
        self._due = 0.0

    def advance(self, count: int, figures: Callable[[], str] = str) -> None:
        """Count images, and redraw the bar with `figures`, which may wait for the device, if `REDRAW_S` has passed."""
        if self._draw is None:
            return
        if self._drawn is None:
            self._drawn, self._due = self._draw(), time.perf_counter() + REDRAW_S
        self._drawn.n += count
        if time.perf_counter() >= self._due:
            self._drawn.set_postfix_str(figures(), refresh=False)
            self._drawn.refresh()
            self._due = time.perf_counter() + REDRAW_S

    def close(self) -> None:
        if self._drawn is not None:
            self._drawn.close()

    def over(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield batches of inputs and targets unchanged, and count their images."""
        for batch in batches:
            yield batch
            self.advance(len(batch[1]))


class Display:
    """Lines of text, and bars if `tqdm` is installed; `verbose` 0 shows nothing, 1 lines and bars, 2 lines only."""

    def __init__(self, verbose: int) -> None:
        if verbose not in (0, 1, 2):
            expected = "0 (nothing), 1 (lines and bars) or 2 (lines only)"
            raise ArgumentError(f"verbose={verbose!r} is not known: expected {expected}.")
        self.verbose = int(verbose)
        self._tqdm = _find_tqdm() if verbose == 1 else None

    def say(self, line: str) -> None:
        """Print a line of text above any bar, in several rows if it is wide, whatever the encoding of the output."""
        if self.verbose == 0 or sys.stdout is None or rank():  # of several processes the first prints
            return
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        text = _in_rows(printable(line)).encode(encoding, "backslashreplace").decode(encoding)
        with suppress(OSError):  # a full disk or a reader that has gone away ends no run
            if self._tqdm is None:
                print(text, flush=True)  # noqa: T201 - what it is for
            else:
                self._tqdm.write(text)
                sys.stdout.flush()  # stdout may be a file or a pipe while the bar is in a terminal

    @contextmanager
    def bar(self, what: str, total: int | None, *, unit: str = "images") -> Iterator[Bar]:
        """Show a bar of `total` images, or other units, while the block runs; None if their number is unknown."""
        options = {"desc": what, "total": total, "unit": f" {unit}", "leave": False, "dynamic_ncols": True}
        draw = None if self._tqdm is None or rank() else partial(self._tqdm, **options)
        with closing(Bar(draw)) as bar:
            yield bar


QUIET = Display(0)


def _in_rows(line: str) -> str:
    """Break a line that is wider than the terminal, or 80 columns elsewhere, between figures, two spaces apart."""
    rows, width = [""], shutil.get_terminal_size().columns if sys.stdout.isatty() else COLUMNS
    for part in re.split("(?=  )", line):
        if rows[-1] and len(rows[-1] + part) > width:
            rows.append("")
        rows[-1] += part
    return "\n".join(rows)


def in_notebook() -> bool:
    """Return whether this is a notebook."""
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell()).__mro__)  # Colab's is derived from it


def _find_tqdm() -> Any:
    """Return tqdm's class of bars; None if tqdm is missing or output is neither a terminal nor a notebook."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if not (in_notebook() or terminal) or importlib.util.find_spec("tqdm") is None:
        return None
    from tqdm.auto import tqdm  # takes 0.1 s: not at import

    return type("Tqdm", (tqdm,), {"monitor_interval": 0})  # no extra thread that watches slow bars


def shell() -> Any:
    """Return the running IPython shell, or None."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()
