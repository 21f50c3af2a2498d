"""Where computation runs and in which precision. `Device` works without `Trainer`, in your own training loop."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transferkit.base.arguments import one_of
from transferkit.base.surroundings import ProcessSetting
from transferkit.compute.host_memory import host_bytes, keep_freed_blocks
from transferkit.errors import ArgumentError, DeviceError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_Module = TypeVar("_Module", bound=nn.Module)
_Data = TypeVar("_Data")


class Device:
    """A torch device and a precision, with the methods that a training loop needs.

    Args:
        device: `"auto"` (CUDA if available, else Apple's MPS, else the CPU), `"cuda"`, `"cuda:1"`, `"mps"`, `"cpu"`
            or a `torch.device`.
        precision: `"fp32"`, `"bf16"`, `"fp16"` or `"auto"`: bf16 if the hardware computes it natively (CUDA
            capability 8.0 and up; CPUs with AVX512-BF16 or AMX), else fp16 with gradient scaling on CUDA, else fp32.
            In bf16 and fp16 the parameters stay fp32 and matrix products run in the lower precision
            (`torch.autocast`). In fp32 on CUDA, products may use TF32 inside `autocast` and `backward`.

    A CPU `Device` also makes the process keep the memory blocks it frees (see `host_memory`).

    Attributes:
        torch_device: The `torch.device`, with its index on CUDA.
        precision: `"fp32"`, `"bf16"` or `"fp16"`, never `"auto"`.
        dtype: The matching `torch.dtype`.
        scaler: The gradient scaler, which is disabled unless `precision` is `"fp16"`.

    Raises:
        DeviceError: The machine has no such device, or the device does not support that precision.
        ArgumentError: `precision` is not one of the names above.

    Example:
        >>> device = Device("cpu", precision="fp32")
        >>> model = device.prepare(torch.nn.Linear(3, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with device.autocast():
        ...     loss = model(torch.ones(4, 3)).square().mean()
        >>> device.step(loss, optimizer, clip_grad_norm=1.0)
    """

    def __init__(self, device: str | torch.device = "auto", precision: str = "auto") -> None:
        self.torch_device = _resolve_device(device)
        supported = supported_precisions(self.torch_device)
        self.precision = supported[0] if precision == "auto" else one_of("precision", precision, PRECISIONS)
        if self.precision not in supported:
            raise DeviceError(
                f"precision={precision!r} is not supported on {self.torch_device}: expected one of "
                f'{", ".join(supported)}. Pass one of these, or precision="auto" (here {supported[0]}).'
            )
        self.dtype = PRECISIONS[self.precision]
        self.scaler = torch.amp.GradScaler(self.torch_device.type, enabled=self.precision == "fp16")
        if self.torch_device.type == "cpu":
            keep_freed_blocks()

    def __repr__(self) -> str:
        return f"Device({str(self.torch_device)!r}, precision={self.precision!r})"

    def prepare(self, module: _Module) -> _Module:
        """Move a module to the device in channels-last layout, in place, and return it.

        CPU convolutions run 1.2 to 1.4 times as fast in that layout, in every precision, and tensor cores use it.
        """
        module.to(self.torch_device, memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stubs lack it
        return module

    def move(self, data: _Data) -> _Data:
        """Return a tensor or a list of tensors on the device; anything else is returned unchanged.

        A copy from the host to CUDA goes through pinned memory, and the host does not wait for it.
        """
        moved: Any = data
        if isinstance(data, list) and data and isinstance(data[0], Tensor):  # not a list of indices
            moved = [self.move(tensor) for tensor in data]
        elif isinstance(data, Tensor) and self.torch_device.type == "cuda" and data.device.type == "cpu":
            moved = data.pin_memory().to(self.torch_device, non_blocking=True)
        elif isinstance(data, Tensor):
            moved = data.to(self.torch_device)
        return cast("_Data", moved)

    def batches(self, loader: Iterable[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
        """Yield each batch of `loader` with its tensors on the device, reading one batch ahead.

        On CUDA, where kernels run asynchronously, reading and copying overlap with computation.
        """
        ahead: tuple[Any, ...] | None = None
        for batch in loader:
            moved = tuple(self.move(part) for part in batch)
            if ahead is not None:
                yield ahead
            ahead = moved
        if ahead is not None:
            yield ahead

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Run the operations inside the block in the device's precision."""
        enabled = self.precision != "fp32"
        with self._tf32(), torch.autocast(self.torch_device.type, self.dtype, enabled=enabled):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss to those present, scaled in fp16 so that small ones do not underflow."""
        with self._tf32():
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call] # torch's

    def update(
        self, optimizer: Optimizer, *, clip_grad_norm: float | None = None, finite: Tensor | None = None
    ) -> None:
        """Call `apply`, then clear the gradients."""
        self.apply(optimizer, clip_grad_norm=clip_grad_norm, finite=finite)
        optimizer.zero_grad(set_to_none=True)

    def apply(self, optimizer: Optimizer, *, clip_grad_norm: float | None = None, finite: Tensor | None = None) -> None:
        """Unscale, clip and apply the gradients, and keep them as applied.

        In fp16, an update whose gradients overflowed is skipped and the scale is reduced.

        Args:
            optimizer: Holds the parameters and their gradients.
            clip_grad_norm: Largest allowed Euclidean norm of all gradients together; None does not clip.
            finite: bool `()`, on the device. If false, the update is skipped. Fused optimizers read it on the device
                without a host sync, except on the first step. None always updates.
        """
        if finite is not None and self.scaler.is_enabled():  # NaN in a gradient makes the scaler skip, without a sync
            gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None and p.numel()]
            smallest = min(gradients, key=Tensor.numel)
            smallest += torch.where(finite, 0.0, float("nan"))
        if clip_grad_norm is not None:
            self.scaler.unscale_(optimizer)  # first: the limit is for unscaled gradients
            nn.utils.clip_grad_norm_(parameters_of(optimizer), clip_grad_norm)
        if finite is None or self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            step_where(finite, optimizer)

    def step(self, loss: Tensor, optimizer: Optimizer, *, clip_grad_norm: float | None = None) -> None:
        """Call `backward` and `update`."""
        self.backward(loss)
        self.update(optimizer, clip_grad_norm=clip_grad_norm)

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work. Only for timing: it ends the overlap with the host."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)
        elif self.torch_device.type == "mps":
            torch.mps.synchronize()

    def memory(self) -> dict[str, int]:
        """Return the current `"free"` and `"total"` memory of the device, in bytes.

        On MPS, and on a CPU under any system but Linux, nobody reports it: that is a `DeviceError`.
        """
        if self.torch_device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.torch_device)
            return {"free": free, "total": total}
        memory = host_bytes() if self.torch_device.type == "cpu" else None
        if memory is None:
            raise DeviceError(f"free memory of {self.torch_device} is unknown: expected CUDA, or a CPU under Linux.")
        return memory

    def _tf32(self) -> AbstractContextManager[None]:
        tensor_cores = self.precision == "fp32" and self.torch_device.type == "cuda"
        return float32_products.at("high") if tensor_cores else nullcontext()


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def find_device(device: str | torch.device | Device, precision: str) -> Device:
    """Return the device that a call was given, which must not contradict `precision`, or the one described."""
    if not isinstance(device, Device):
        return Device(device, precision)
    if precision not in ("auto", device.precision):
        raise ArgumentError(f"precision={precision!r} contradicts {device}: pass only one of them.")
    return device


def step_where(finite: Tensor, optimizer: Any) -> None:
    """Make an optimizer's step if `finite`, bool `()`, is true; change nothing if it is false."""
    # torch's fused SGD would leave its momentum uninitialized on the first step
    has_state = all(p in optimizer.state for p in parameters_of(optimizer) if p.grad is not None)
    if has_state and getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # GradScaler's: no host sync
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf
    elif bool(finite):  # host sync on an accelerator
        optimizer.step()


float32_products = ProcessSetting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
"""In which precision of torch's float32 matrix products are computed: "highest", "high" or "medium"."""


def _resolve_device(device: str | torch.device) -> torch.device:
    mps = torch.backends.mps.is_available()
    available = [*(f"cuda:{index}" for index in range(torch.cuda.device_count())), *(["mps"] if mps else []), "cpu"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(
            f"device {device!r} is not known to torch: expected one of {available}, 'auto' or a torch.device."
        ) from error
    if resolved.type != "cuda":
        resolved = torch.device(resolved.type)  # "cpu:0" is "cpu"
    elif resolved.index is None and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))  # torchrun's: each process on a machine has a GPU of its own
        index = torch.cuda.current_device() or (local if local < torch.cuda.device_count() else 0)
        resolved = torch.device("cuda", index)
    if str(resolved) not in available:
        raise DeviceError(
            f"device {str(resolved)!r} is not available on this machine: expected one of {available}. "
            'Pass one of these, or device="auto".'
        )
    return resolved


def supported_precisions(device: torch.device) -> tuple[str, ...]:
    """Return the precisions `device` can train in, that of `"auto"` first; bf16 in software is slower than fp32."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return ("bf16", "fp16", "fp32") if native else ("fp16", "fp32", "bf16")
    if device.type == "cpu":
        return ("bf16", "fp32") if _cpu_has_bf16() else ("fp32", "bf16")
    return ("fp32",)


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # torch has no public names
