"""What surrounds a call and must not change what it does: modes and defaults of torch, also those of other threads."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


class ProcessSetting:
    """A setting that torch has once in a process, changed for a while by several threads; the latest change counts."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        self._read = read
        self._write = write
        self._before: Any = None
        self._values: list[tuple[object, Any]] = []
        self._lock = threading.Lock()

    @contextmanager
    def at(self, value: Any) -> Iterator[None]:
        entry = (object(), value)  # not equal to another with the same value
        with self._lock:
            if not self._values:
                self._before = self._read()
            self._values.append(entry)
            self._write(value)
        try:
            yield
        finally:
            with self._lock:
                self._values.remove(entry)
                self._write(self._values[-1][1] if self._values else self._before)


_DEFAULT_DTYPE = ProcessSetting(torch.get_default_dtype, torch.set_default_dtype)


@contextmanager
def own_surroundings() -> Iterator[None]:
    """Compute with autograd, without autocast, in float32 and on the CPU, whatever is set outside; also a decorator."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_DEFAULT_DTYPE.at(torch.float32))  # for the process; all else is this thread's alone
        for device in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
