"""When memory runs out: do the same work in smaller parts."""

import re
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.optim import Optimizer

from transferkit.compute.device import Device, parameters_of
from transferkit.errors import DeviceError, OutOfMemoryError

_Result = TypeVar("_Result")

_PHRASES = re.compile(
    "out of memory|not enough memory|can't allocate memory|cannot allocate memory|failed to allocate|bad.alloc"
    "|status_alloc_failed",  # the last one is cuBLAS's and cuDNN's
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, in any of the wordings of torch and its libraries."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _PHRASES.search(str(error)) is not None


def within_memory(
    run: Callable[[int], _Result], size: int, *, device: Device, what: str, undo: Callable[[], object] | None = None
) -> tuple[_Result, int]:
    """Return the result of `run(size)`, halving the size until memory suffices, and the size that did.

    `run` does the work, `what`, in parts of that many images, and `undo` is called before each further try. Where one
    image is too much, `OutOfMemoryError` is raised.
    """
    while True:
        try:
            return run(size), size
        except OutOfMemoryError:
            raise  # smaller parts would not help
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if size == 1:
                raise OutOfMemoryError(
                    f"not enough memory for {what}, even one image at a time, on {device.torch_device} "
                    f"({_memory(device)}): {reason} Freeze more layers, use a smaller image_size or a smaller head, or "
                    "free other memory."
                ) from error
        # outside the except block, so that the error no longer holds the tensors of the failed try
        if undo is not None:
            undo()
        if device.torch_device.type == "cuda":
            torch.cuda.empty_cache()
        size = (size + 1) // 2


def reserve_state(optimizer: Optimizer, device: Device) -> None:
    """Raise `OutOfMemoryError` if there is no room for the state that an optimizer's first step creates."""
    fresh = [p for p in parameters_of(optimizer) if p.grad is not None and p not in optimizer.state]
    copies = 2  # tensors of a parameter's size: as many as Adam, for those that are not known
    if type(optimizer) is torch.optim.SGD:
        copies = int(any(group["momentum"] for group in optimizer.param_groups))
    try:
        [torch.empty_like(p) for p in fresh for _ in range(copies)]  # all at once, then freed
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        needed = copies * sum(p.numel() * p.element_size() for p in fresh)
        raise OutOfMemoryError(
            f"not enough memory for the optimizer's state, {needed / 2**30:.2f} GiB, on {device.torch_device} "
            f"({_memory(device)}). No weight was changed. Freeze more layers, use a smaller head, or "
            'optimizer="sgd", which needs half of that.'
        ) from error


def _memory(device: Device) -> str:
    try:
        memory = device.memory()
    except DeviceError:
        return "free memory unknown"
    return f"{memory['free'] / 2**30:.2f} GiB free of {memory['total'] / 2**30:.2f} GiB"
