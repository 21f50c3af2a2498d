"""Several processes (ranks) that run the same script: what they tell each other, and how all end when one fails.

Every exchange begins with a meeting: one small sum over all ranks, in which each says whether it has failed and what it
expects to do. A rank that fails goes to the next meeting, whatever that is, so no rank waits for one that has left. In
one process every function here returns what it was given.
"""

import atexit
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, distributed

from transferkit.base.interrupts import Interruption, raise_again, receive_elsewhere
from transferkit.errors import ProcessError, TransferKitError

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another that does not answer, unless somebody else made the process group."""

_GRACE_S = 5.0  # how much later than the first to give up waiting the last one may be

_Value = TypeVar("_Value")

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)
_STARTED: list[bool] = []
_THREADS: list[threading.Thread] = []  # the one whose calls are in step with the other ranks'
_GROUP: list[Any] = [None, None]  # the default group, and the one in which ranks meet on the host
atexit.register(_GROUP.clear)  # a group that outlives torch's own reference aborts the process


def start() -> None:
    """Join the process group that torchrun describes in the environment, once, if nobody else has made one."""
    if _STARTED or not distributed.is_available():
        return
    _STARTED.append(True)
    several = distributed.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        from torch.distributed.distributed_c10d import PrefixStore  # not in every build of torch
        from torch.distributed.rendezvous import rendezvous

        store, own, size = next(rendezvous("env://", timeout=TIMEOUT))
        # after a restart torchrun's store may still have the addresses of the processes before
        store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        distributed.init_process_group(backend, store=store, rank=own, world_size=size, timeout=TIMEOUT)
        atexit.register(_leave)


def world_size() -> int:
    """Return how many processes work together: 1 without a process group, and inside `alone`."""
    together = distributed.is_available() and distributed.is_initialized() and not _ALONE.get()
    return distributed.get_world_size() if together else 1


def rank() -> int:
    """Return the number of this process among those that work together, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work inside the block as if there were no others."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


@contextmanager
def together(what: str) -> Iterator[None]:
    """Let what fails on one rank fail on all: with the same error, which names the rank. Also a decorator.

    All ranks must do the same inside the block, `what`. Where another one did other work, ended, or failed with an
    error that is none of this library's, it is a `ProcessError`.
    """
    start()
    if world_size() == 1:
        yield
        return
    here = threading.current_thread()
    if not _THREADS or not _THREADS[0].is_alive():
        _THREADS[:] = [here]
    if _THREADS[0] is not here:
        raise ProcessError(
            f"{what} was called in another thread than what came before, but {world_size()} processes take part in "
            f"it: expected calls in the same order in each. Call it in the thread {_THREADS[0].name}."
        )
    try:
        yield
    except BaseException as error:
        if not any(hasattr(one, "known_to_all") for one in _chain(error)):
            _report(error)
        raise
    try:
        _meet(f"the end of {what}")
    except Interruption as interruption:
        raise_again(interruption.number or 0, "another process received the signal")


def total(value: float, what: str) -> float:
    """Return the sum of a number over all ranks."""
    return value if world_size() == 1 else _meet(what, value)


def clock() -> float:
    """Return the seconds of `time.perf_counter`, on every rank those of rank 0: decisions by it are the same."""
    now = time.perf_counter()
    return now if world_size() == 1 else _meet("the clock", now if rank() == 0 else 0.0)


def broadcast(value: _Value, what: str) -> _Value:
    """Return rank 0's value, which must be picklable."""
    if world_size() == 1:
        return value
    _meet(what)
    values = [value if rank() == 0 else None]
    _guarded(what, lambda: distributed.broadcast_object_list(values, src=0, group=_group()))
    return cast("_Value", values[0])


def exchange(value: _Value, what: str) -> list[_Value]:
    """Return the values of all ranks, in their order; they must be picklable."""
    if world_size() == 1:
        return [value]
    _meet(what)
    return _exchange(value, what)


def check_same(facts: dict[str, Any], what: str) -> None:
    """Refuse, with `ProcessError`, ranks that were given other facts than rank 0."""
    texts = {name: repr(value) for name, value in facts.items()}
    first, *others = exchange(texts, what)
    for other, theirs in enumerate(others, start=1):
        if differing := [name for name in {**first, **theirs} if theirs.get(name) != first.get(name)]:
            name = differing[0]
            raise _known_to_all(
                ProcessError(
                    f"{what}: rank {other} has {name} {str(theirs.get(name))[:100]}, rank 0 "
                    f"{str(first.get(name))[:100]}. Expected the same on every rank: the same script, data and seed. "
                    "Each rank takes its part by itself."
                )
            )


def gather(rows: Tensor | None, what: str) -> Tensor:
    """Return the rows of all ranks, `(N, ...)`, in the order of the ranks, on the device of this rank's.

    Each has another number of them, `(n, ...)`; None for none, and then the result is on the CPU.
    """
    if world_size() == 1:
        return cast("Tensor", rows)
    own = None if rows is None else rows.detach().cpu()
    shapes = exchange(None if own is None else (tuple(own.shape), own.dtype), what)
    _, *trailing = next(shape[0] for shape in shapes if shape is not None)
    dtype = next(shape[1] for shape in shapes if shape is not None)
    parts = []
    for owner, shape in enumerate(shapes):
        if shape is not None and shape[0][0]:
            parts.append(
                send(own if owner == rank() else None, (shape[0][0], *trailing), dtype, owner=owner, what=what)
            )
    whole = torch.cat(parts) if parts else torch.empty(0, *trailing, dtype=dtype)
    return whole if rows is None else whole.to(rows.device)


def send(rows: Tensor | None, shape: Sequence[int], dtype: torch.dtype, *, owner: int, what: str) -> Tensor:
    """Return a tensor of one rank on all, on the host; only the owner gives it. The caller has met the others."""
    whole = torch.empty(tuple(shape), dtype=dtype) if rows is None else rows.contiguous()
    if whole.numel():
        content = whole.view(-1).view(torch.uint8)  # gloo does not know every dtype
        _guarded(what, lambda: distributed.broadcast(content, src=owner, group=_group()))
    return whole


def copy_from_rank_0(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with those of rank 0; other shapes are a `ProcessError`."""
    if world_size() > 1:
        check_same({"shapes": [tuple(tensor.shape) for tensor in tensors]}, "the model")
        with torch.no_grad():
            for tensor in tensors:
                own = tensor.detach().cpu() if rank() == 0 else None
                tensor.copy_(send(own, tensor.shape, tensor.dtype, owner=0, what="the model"))


def sum_gradients(parameters: Sequence[Tensor], *numbers: Tensor) -> tuple[Tensor, ...]:
    """Replace the gradients of parameters, and numbers `()`, by their sums over all ranks; return the sums.

    A parameter that has a gradient on no rank has none afterwards. Sends float32: 4 bytes for each entry, and for each
    parameter and number, in one all-reduce.
    """
    if world_size() == 1:
        return numbers
    present = [parameter.grad is not None for parameter in parameters]
    device = numbers[0].device
    parts = [torch.tensor(present, dtype=torch.float32, device=device)]
    parts += [number.detach().float().reshape(1) for number in numbers]
    parts += [torch.zeros(p.numel(), device=device) if p.grad is None else p.grad.reshape(-1) for p in parameters]
    flat = torch.cat(parts)
    _meet("the gradients")
    group = distributed.group.WORLD if flat.is_cuda and "nccl" in _backends() else _group()
    _guarded("the gradients", lambda: distributed.all_reduce(flat, group=group))
    anywhere, sums, *gradients = torch.split(flat, [len(present), len(numbers), *(p.numel() for p in parameters)])
    for parameter, has, gradient in zip(parameters, anywhere.tolist(), gradients, strict=True):  # host sync
        if has and parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        if parameter.grad is not None:
            parameter.grad.copy_(gradient.view(parameter.shape))
    return torch.unbind(sums)


def _meet(what: str, value: float = 0.0, *, failed: bool = False) -> float:
    """Meet all others; return the sum of the values. `ProcessError` if one failed, ended or came for something else."""
    place = zlib.crc32(what.encode()) % 2**20
    header = torch.tensor([float(failed), place, place**2, value], dtype=torch.float64)
    _guarded(what, lambda: distributed.all_reduce(header, group=_group()))
    failures, places, squares, summed = header.tolist()
    size = world_size()
    if failures:
        if not failed:
            _raise_cause(_exchange(None, what))
    elif places != size * place or squares != size * place**2:
        names = _exchange(what, what)
        raise _known_to_all(
            ProcessError(
                f"the ranks do not do the same: {', '.join(f'rank {r} is at {name}' for r, name in enumerate(names))}. "
                "Expected the same calls in the same order on every rank."
            )
        )
    return float(summed)


def _report(error: BaseException) -> None:
    """Tell all others at the next meeting why this rank failed."""
    _known_to_all(error)
    signals = [one.number for one in _chain(error) if isinstance(one, Interruption) and one.number is not None]
    cause: Any = (ProcessError, (f"{type(error).__name__}: {error}",))
    if signals:
        cause = signals[0]
    elif isinstance(error, TransferKitError):
        cause = (type(error), tuple(map(str, error.args)))
    try:
        _meet("a failure", failed=True)
        _exchange(cause, "a failure")
    except ProcessError:  # nobody is left to be told
        return


def _raise_cause(causes: list[Any]) -> NoReturn:
    """Raise what another rank failed with."""
    other, cause = next((r, cause) for r, cause in enumerate(causes) if cause is not None)
    if isinstance(cause, int):
        receive_elsewhere(cause)
        raise _known_to_all(Interruption(number=cause))
    kind, (message, *lines) = cause
    raise _known_to_all(kind(f"on rank {other}: {message}", *lines))


def _known_to_all(error: BaseException) -> BaseException:
    """Mark an error that all ranks raise: nobody needs to be told of it."""
    error.known_to_all = True  # type: ignore[attr-defined]
    return error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those it was raised from."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or each.__context__


def _exchange(value: Any, what: str) -> list[Any]:
    values: list[Any] = [None] * world_size()
    _guarded(what, lambda: distributed.all_gather_object(values, value, group=_group()))
    return values


def _guarded(what: str, collective: Callable[[], object]) -> None:
    """Run a collective; what torch raises when a peer has gone or does not answer names the work."""
    started = time.monotonic()
    try:
        collective()
    except RuntimeError as failure:
        reason, waited = str(failure).splitlines()[0], time.monotonic() - started
        found = f"a process that takes part in {what} has ended. Its output says why. {reason}"
        if "timed out" in reason.lower():
            found = f"{_silent()} did not come to {what} within {waited:.0f} s: hangs, or has more to do than others."
        raise _known_to_all(ProcessError(found)) from failure


def _silent() -> str:
    """Return which ranks have not given up waiting: those that the others wait for."""
    others = [r for r in range(world_size()) if r != rank()]

    def ask() -> None:
        with suppress(RuntimeError):  # nobody serves it any more
            store = distributed.distributed_c10d._get_default_store()
            store.set(f"gave up {rank()}", "")
            while others:
                time.sleep(0.1)
                others[:] = [r for r in others if not store.check([f"gave up {r}"])]

    if distributed.is_torchelastic_launched():  # whose store is in none of these processes
        asking = threading.Thread(target=ask, daemon=True)  # it would wait for a host that is gone
        asking.start()
        asking.join(_GRACE_S)
        if others:
            return f"rank {', '.join(map(str, others))}"
    return "another rank"


def _backends() -> str:
    return str(distributed.get_backend_config())


def _group() -> Any:
    """Return the group in which ranks meet: the default one if it works on the host, else one of its own."""
    world = distributed.group.WORLD
    if _GROUP[0] is not world:
        own = world if "gloo" in _backends() else distributed.new_group(backend="gloo", timeout=TIMEOUT)
        _GROUP[:] = [world, own]
    return _GROUP[1]


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def part_of(count: int) -> slice:
    """Return this rank's part of `count` things in a row, which may be empty; the last rank's is not, unless all are.

    Example:
        >>> part_of(9)
        slice(0, 9, None)
    """
    size, own = world_size(), rank()
    return slice(own * count // size, (own + 1) * count // size)
