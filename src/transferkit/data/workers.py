"""Worker processes that read samples: a worker that dies or hangs is one error, and none is left behind."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from pickle import PicklingError
from typing import Any, NamedTuple

import torch
from torch.utils.data._utils import worker as torch_worker

from transferkit.base.randomness import derive_seed
from transferkit.data.samples import Sample, Samples, in_parentheses, path_of
from transferkit.errors import TransferKitError, WorkerError

TIMEOUT_S = 300.0  # seconds without a batch, after which a worker counts as hanging
_BATCHES_AHEAD = 2  # that each worker reads before the first of them is used
_MOST_THREADS = 16  # each holds a decoded image, 36 MB for 12 million pixels
_GRACE_S = 5.0  # for a worker that was asked to end

_Keys = list[tuple[int, int | None]]
_Samples = list["Sample | TransferKitError"]

_NO_GUARD = 113  # exit code of a worker that ran the main script as if it were the main process

_NEXT, _STOP = "next", "stop"  # what the main process sends; a worker answers with samples, or why it cannot send them

_LIVE: set[BaseProcess] = set()


@atexit.register
def _kill_at_exit() -> None:
    """Kill workers of a generator that a saved traceback keeps alive: multiprocessing would wait for them forever."""
    for process in _LIVE:
        process.kill()


class _Worker(NamedTuple):
    process: BaseProcess
    connection: "Connection[Any, Any]"


def read_in_workers(samples: Samples, keys: Sequence[_Keys], *, num_workers: int, seed: int) -> Iterator[_Samples]:
    """Yield the samples of each batch, in order, read by worker processes or in this process.

    `keys` are, for each batch, the index and seed of each sample. With `num_workers` of 0, this process reads, files
    that will be resized in threads. `torch.utils.data.get_worker_info().seed` depends on `seed`. Where workers cannot
    be started, or one dies or hangs, a `WorkerError` names the sample it was reading, once all workers are killed.
    """
    if num_workers == 0:
        if samples.are_files and samples.preprocess is not None:  # else a batch may take gigabytes: none is read ahead
            yield from _read_in_threads(samples, keys)
        else:
            yield from ([samples.try_read(*key) for key in batch] for batch in keys)
        return
    reading = RawArray("q", [-1] * num_workers)  # the index of the sample that each worker reads; -1 for none
    workers: list[_Worker] = []
    finished = False
    try:
        for number in range(num_workers):
            info = torch_worker.WorkerInfo(
                id=number, num_workers=num_workers, seed=derive_seed(seed, number), dataset=samples.dataset
            )
            worker = _start(samples, keys[number::num_workers], info, reading)
            workers.append(worker)  # one by one: if a later one cannot be started, these are ended
        requested = range(min(len(keys), _BATCHES_AHEAD * num_workers))
        for number in requested:
            workers[number % num_workers].connection.send(_NEXT)
        for number in range(len(keys)):
            worker = workers[number % num_workers]
            try:
                received = _receive(worker, workers)
                if number + len(requested) < len(keys):
                    worker.connection.send(_NEXT)
            except Exception as error:  # not a sample's own error, which is a value here
                raise WorkerError(_describe(error, samples, reading)) from error
            yield received
        finished = True
    finally:
        _end(workers, at_once=not finished)


def _read_in_threads(samples: Samples, keys: Sequence[_Keys]) -> Iterator[_Samples]:
    """Read image files, which Pillow decodes without holding Python's lock, one batch ahead of the one in use."""
    pool = ThreadPoolExecutor(min(torch.get_num_threads(), _MOST_THREADS))
    try:
        ahead: list[Future[Any]] = []
        for batch in keys:
            before, ahead = ahead, [pool.submit(samples.try_read, *key) for key in batch]
            if before:
                yield [future.result() for future in before]
        yield [future.result() for future in ahead]
    finally:
        pool.shutdown(cancel_futures=True)


def _start(samples: Samples, keys: Sequence[_Keys], info: Any, reading: Any) -> _Worker:
    """Start a worker process.

    Under the start methods `"spawn"` and `"forkserver"` a worker first runs the main script again. Where that has no
    main guard it comes here, too, and ends with a code that the main process knows.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(_NO_GUARD)
    try:
        connection, theirs = multiprocessing.Pipe()
        process = multiprocessing.Process(target=_serve, args=(theirs, samples, keys, info, reading), daemon=True)
        process.start()
    except OSError as error:
        raise WorkerError(
            f"worker {info.id} of {info.num_workers} could not be started: {error}. Pass a smaller num_workers; 0 "
            "reads in this process."
        ) from error
    except (AttributeError, PicklingError, TypeError) as error:
        raise WorkerError(
            f"the data set cannot be sent to worker processes: {str(error) or type(error).__name__}. A lambda, or a "
            "function or class defined inside another, cannot: define it at the top level of a module, or pass "
            "num_workers=0."
        ) from error
    theirs.close()
    _LIVE.add(process)
    return _Worker(process, connection)


def _serve(
    connection: "Connection[Any, Any]", samples: Samples, keys: Sequence[_Keys], info: Any, reading: Any
) -> None:
    """Run in a worker: read each batch when the main process asks for it, until told to stop or that process is dead.

    Signals are left to the main process: it gets them too, and ends the workers once it has saved its state.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    torch_worker._worker_info = info  # what torch.utils.data.get_worker_info returns to the data set
    main: Any = parent_process()
    batches = iter(keys)
    while main.sentinel not in wait([connection, main.sentinel]) and connection.recv() == _NEXT:
        batch: _Samples = []
        for index, seed in next(batches):
            reading[info.id] = index
            batch.append(samples.try_read(index, seed))
        reading[info.id] = -1
        try:
            connection.send(batch)
        except (AttributeError, OSError, PicklingError, RuntimeError, TypeError) as error:  # or shared memory is full
            connection.send(f"samples cannot be sent to the main process: {error}")


def _receive(worker: _Worker, workers: Sequence[_Worker]) -> _Samples:
    """Return the next batch of one worker; `TimeoutError`, or `ChildProcessError` if one died or cannot send it."""
    ready = wait([worker.connection, *(each.process.sentinel for each in workers)], TIMEOUT_S)
    if not ready:
        raise TimeoutError
    for each in workers:
        if each.process.sentinel in ready:
            each.process.join()
            raise ChildProcessError(f"exit code {each.process.exitcode}")
    received: _Samples | str = worker.connection.recv()
    if isinstance(received, str):
        raise ChildProcessError(received)
    return received


def _end(workers: Sequence[_Worker], *, at_once: bool) -> None:
    for worker in workers:
        if at_once:
            worker.process.kill()  # they ignore SIGTERM
        else:
            with suppress(OSError):  # dead already
                worker.connection.send(_STOP)
    for worker in workers:
        worker.process.join(_GRACE_S)
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        _LIVE.discard(worker.process)
        worker.process.close()


def _describe(error: Exception, samples: Samples, reading: Sequence[int]) -> str:
    at = [
        f"worker {number} was reading image {index}{in_parentheses(path_of(samples.dataset, index))}"
        for number, index in enumerate(reading)
        if index >= 0
    ]
    if str(error) == f"exit code {_NO_GUARD}":
        return (
            "worker processes run the script again when they start, and began to train, too. All were killed. Put what "
            'the script does under `if __name__ == "__main__":`, or pass num_workers=0.'
        )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    what = f"hang (no batch for {TIMEOUT_S:g} s)" if isinstance(error, TimeoutError) else f"died ({reason})"
    return (
        f"worker processes {what}; {'; '.join(at) if at else 'none was reading an image'}. All were killed. Pass "
        "num_workers=0 to read in this process and see the cause. Too little memory or shared memory (/dev/shm) kills "
        "workers too."
    )
