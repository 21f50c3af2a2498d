"""SIGINT and SIGTERM while something long runs: the first ends it at the next good moment, the second at once."""

import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

_Item = TypeVar("_Item")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(BaseException):
    """Ends a loop from inside; `Interrupts` turns it into what the signal stands for. No error: nobody catches it."""


class Interrupts:
    """Holds signals back inside `with`, and re-raises on leaving what was received.

    SIGINT becomes `KeyboardInterrupt` and SIGTERM the exit status 143 (`SystemExit`), unless the process had a handler
    of its own, which is then called first. The handlers that were there are back by then. Outside the main thread,
    which alone gets signals, and for signals that were ignored, nothing is changed. Where one `with` stands inside
    another of the same `Interrupts`, the outer one does all this.

    Attributes:
        received: The signal that is held back, or None.
        twice: Whether another one came.

    Example:
        >>> interrupts = Interrupts()
        >>> with interrupts:
        ...     list(interrupts.watched([1, 2]))
        [1, 2]
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.twice = False
        self._before: dict[int, Any] = {}
        self._depth = 0

    def __enter__(self) -> "Interrupts":
        self._depth += 1
        if self._depth > 1:
            return self
        self.received, self.twice = None, False
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None was installed from C: it could not be put back
                    self._before[number] = before
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        self._put_back()
        received, self.received = self.received, None  # it must not end what is checked later, outside of `with`
        if received is not None and (error is None or isinstance(error, Interruption)):
            _raise_again(received, str(error or ""))

    def check(self) -> None:
        """Raise if a signal was received.

        Raises:
            Interruption: So it was.
        """
        if self.received is not None:
            raise Interruption

    def watched(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Yield the items, and `check` after each was used."""
        for item in items:
            yield item
            self.check()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self.twice = True
            self._put_back()
            _raise_again(number, "interrupted twice: stopped at once, without another checkpoint")
        self.received = number

    def _put_back(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}


def _raise_again(number: int, message: str) -> None:
    handler = signal.getsignal(number)
    if handler not in (signal.SIG_DFL, signal.default_int_handler):
        signal.raise_signal(number)  # the process's own handler
    if number == signal.SIGINT:
        raise KeyboardInterrupt(message) from None
    raise SystemExit(128 + number) from None
