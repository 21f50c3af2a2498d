"""Worker processes that read samples: what becomes of them when a signal comes, when they die and when they hang."""

import atexit
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from transferkit.data.samples import Sample, Samples, path_of
from transferkit.errors import TransferKitError, WorkerError

TIMEOUT_S = 300.0
"""Seconds without a batch after which workers count as hanging."""

_HANDLER: dict[str, Any] = {}  # torch sets it once in a process, with its first loader

_LIVE: set[Any] = set()  # workers of loaders under way


@atexit.register
def _kill_at_exit() -> None:
    """End what a kept traceback kept from ending; multiprocessing would wait for it forever."""
    for worker in _LIVE:
        worker.kill()


def read_in_workers(
    samples: Samples, keys: Sequence[list[tuple[int, int]]], *, num_workers: int, seed: int
) -> Iterator[list["Sample | TransferKitError"]]:
    """Yield the samples of each batch, read by worker processes if there are to be any.

    Args:
        samples: What to read from.
        keys: For each batch the index and seed of each sample.
        num_workers: Processes; 0 reads in this one.
        seed: The workers' own.

    Raises:
        WorkerError: A worker died or, in the main thread, hangs; the message has the sample it was at. None is left
            behind.
    """
    samples.reading = torch.full((num_workers,), -1).share_memory_() if num_workers else None  # type: ignore[no-untyped-call]
    loader = DataLoader(
        samples,
        batch_sampler=keys,
        num_workers=num_workers,
        collate_fn=_identity,
        generator=torch.Generator().manual_seed(seed),  # or the loader would draw from the global one
        timeout=TIMEOUT_S if num_workers and _in_main_thread() else 0,  # elsewhere it would hide deaths for as long
        worker_init_fn=_begin if num_workers else None,
    )
    if num_workers == 0:
        yield from loader
        return
    try:
        batches: Any = iter(loader)
    except OSError as error:
        raise WorkerError(
            f"{num_workers} processes that read images could not be started: {error}. Expected room for them: pass a "
            "smaller num_workers; 0 reads in this process."
        ) from error
    before = signal.getsignal(signal.SIGCHLD) if _in_main_thread() else None
    if getattr(before, "__module__", None) == signal_handling.__name__:
        _HANDLER["torch's"] = before
    handler = None if before is None else _HANDLER.get("torch's")
    _LIVE.update(batches._workers)
    finished = False
    try:
        while True:
            try:
                batch = _next(batches, handler)
            except StopIteration:
                finished = True
                return
            except Exception as error:  # samples' own failures come as values: this is the loader's
                raise WorkerError(_describe(error, samples)) from error
            yield batch
    finally:
        if not finished:
            _kill(batches)
        _LIVE.difference_update(batches._workers)
        for queue in batches._index_queues:
            if queue._thread is not None:  # it filled the queue, and ends a moment later
                queue._thread.join(timeout=1)
        if handler is not None and _in_main_thread():
            signal.signal(signal.SIGCHLD, before)


def _identity(samples: list["Sample | TransferKitError"]) -> list["Sample | TransferKitError"]:
    return samples


def _begin(_worker: int) -> None:
    """Leave signals to the main process, which gets them too and ends the workers when it has saved its state."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _next(batches: Any, handler: Any) -> list["Sample | TransferKitError"]:
    """Return the next batch; the death of a worker is an error here and nowhere else.

    torch raises it from its handler of SIGCHLD wherever the main thread is, in the middle of a step, say. So the
    handler is set aside between batches, and whoever died meanwhile is looked for.
    """
    if handler is None:
        return next(batches)
    signal.signal(signal.SIGCHLD, handler)
    try:
        for worker in batches._workers:
            if worker.exitcode:  # 0 has finished, None goes on
                raise RuntimeError(f"worker with pid {worker.pid} ended with exit code {worker.exitcode}")
        return next(batches)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _in_main_thread() -> bool:
    """Say whether torch's handler of SIGCHLD works here; Windows has no such signal."""
    return hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()


def _kill(batches: Any) -> None:
    """End the workers of a loader that was left in the middle; they ignore SIGTERM, and may hang."""
    if batches._worker_pids_set:  # or torch would take their end for a death
        signal_handling._remove_worker_pids(id(batches))  # type: ignore[attr-defined]
        batches._worker_pids_set = False
    for worker in batches._workers:
        worker.kill()
    for worker in batches._workers:
        worker.join()
    batches._shutdown_workers()  # closes what is left


def _describe(error: Exception, samples: Samples) -> str:
    reading = [] if samples.reading is None else samples.reading.tolist()
    at = [
        f"worker {number} was reading image {index}{_file(samples, index)}"
        for number, index in enumerate(reading)
        if index >= 0
    ]
    first = str(error).splitlines()[0] if str(error) else "it gave no reason"
    hangs = "timed out" in first
    what = f"hang (no batch for {TIMEOUT_S:g} s)" if hangs else f"died ({type(error).__name__}: {first})"
    return (
        f"the processes that read images {what}; {'; '.join(at) if at else 'none was at an image'}. All were ended. "
        "Expected workers that live and read each image in time. num_workers=0 reads in this process and shows what "
        "happens; too little memory, or shared memory (/dev/shm), kills workers as well."
    )


def _file(samples: Samples, index: int) -> str:
    path = path_of(samples.dataset, index)
    return f" ({path})" if path else ""
