"""SIGINT and SIGTERM during long work: the first stops it at the next safe point, the second at once."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from typing_extensions import Self

_Item = TypeVar("_Item")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(BaseException):
    """Ends a loop from inside, past handlers of errors; `Interrupts` replaces it with the signal's own exception."""

    def __init__(self, message: str = "", *, number: int | None = None) -> None:
        super().__init__(message)
        self.number = number  # of the signal


_ACTIVE: list["Interrupts"] = []


def receive_elsewhere(number: int) -> None:
    """Let everything that delays signals here end as if it had received one that another process received."""
    for interrupts in _ACTIVE:
        interrupts.received = interrupts.received or number


class Interrupts:
    """Delays signals inside a `with` block, and raises the one `received` when the block ends; `twice` if two came.

    SIGINT becomes `KeyboardInterrupt` and SIGTERM exit status 143 (`SystemExit`). If the process had its own handler,
    that is restored and called first. Nothing changes outside the main thread, which alone receives signals, or for
    signals that were ignored. In nested blocks of the same `Interrupts` the outermost does all this.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.twice = False
        self._before: dict[int, Any] = {}
        self._depth = 0

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth > 1:
            return self
        self.received, self.twice = None, False
        _ACTIVE.append(self)
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None was installed from C, and could not be restored
                    self._before[number] = before
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        _ACTIVE.remove(self)
        self._restore_handlers()
        received, self.received = self.received, None  # or a later `check` outside the block would raise
        if received is not None and (error is None or isinstance(error, Interruption)):
            raise_again(received, str(error or ""))

    def check(self) -> None:
        """Raise `Interruption` if a signal was received inside the `with` block."""
        if self.received is not None:
            raise Interruption(number=self.received)

    def watched(self, items: Iterable[_Item]) -> Iterator[_Item]:
        for item in items:
            yield item
            self.check()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and "TORCHELASTIC_RUN_ID" in os.environ:
            return  # torchrun sends the signal that reached it and the whole job once more, and kills after 30 s
        if self.received is not None:
            self.twice = True
            self._restore_handlers()
            raise_again(number, "interrupted twice: stopped at once, without another checkpoint")
        self.received = number

    def _restore_handlers(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}


def raise_again(number: int, message: str) -> None:
    """Raise what a signal is raised as, through the process's own handler if it has one."""
    handler = signal.getsignal(number)
    if handler not in (signal.SIG_DFL, signal.default_int_handler):
        signal.raise_signal(number)  # calls the process's own handler
    if number == signal.SIGINT:
        raise KeyboardInterrupt(message) from None
    raise SystemExit(128 + number) from None
