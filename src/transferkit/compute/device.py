"""Where the arithmetic runs and in which number format.

`Device` stands alone: it serves `Trainer`, and it serves anybody's own loop.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transferkit.base.arguments import one_of
from transferkit.compute.host_memory import host_bytes, keep_freed_blocks
from transferkit.errors import DeviceError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_Module = TypeVar("_Module", bound=nn.Module)
_Data = TypeVar("_Data")


class Device:
    """A torch device together with a number format, and the calls a training loop makes of the two.

    Args:
        device: `"auto"` (CUDA if there is one, then Apple's MPS, then the CPU), `"cuda"`, `"cuda:1"`, `"mps"`,
            `"cpu"` or a `torch.device`.
        precision: `"fp32"`, `"bf16"`, `"fp16"` or `"auto"`: bf16 where the hardware computes it natively
            (CUDA capability 8.0 and up; CPUs with AVX512-BF16 or AMX), else fp16 with gradient scaling on CUDA,
            else fp32. With bf16 and fp16 the parameters stay fp32 and matrix products run in the short format
            (`torch.autocast`). fp32 on CUDA lets products use TF32 inside `autocast` and `backward`.

    On the CPU it also makes the process keep the memory blocks it frees (see `host_memory`).

    Attributes:
        torch_device: The `torch.device`, with its index on CUDA.
        precision: `"fp32"`, `"bf16"` or `"fp16"`, never `"auto"`.
        dtype: The matching `torch.dtype`.
        scaler: The gradient scaler; it does nothing unless `precision` is `"fp16"`.

    Raises:
        DeviceError: The machine has no such device, or the device does not compute in that precision.
        ArgumentError: `precision` is no known name.

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
        self.precision = _resolve_precision(precision, self.torch_device)
        self.dtype = PRECISIONS[self.precision]
        self.scaler = torch.amp.GradScaler(self.torch_device.type, enabled=self.precision == "fp16")
        if self.torch_device.type == "cpu":
            keep_freed_blocks()

    def __repr__(self) -> str:
        return f"Device({str(self.torch_device)!r}, precision={self.precision!r})"

    def prepare(self, module: _Module) -> _Module:
        """Move a module to the device, in place, lay its convolutions out channels-last, and return it.

        Channels-last convolutions ran 1.2 to 1.4 times as fast in every format measured on CPUs, and it is
        the layout of the tensor cores.
        """
        module.to(self.torch_device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    def move(self, data: _Data) -> _Data:
        """Copy a tensor, or each tensor of a list, to the device; whatever else it is comes back as it is.

        From the host to CUDA the copy leaves pinned memory and nobody waits for it.
        """
        moved: Any = data
        if isinstance(data, list):
            moved = [self.move(part) for part in data]
        elif isinstance(data, Tensor) and self.torch_device.type == "cuda" and data.device.type == "cpu":
            moved = data.pin_memory().to(self.torch_device, non_blocking=True)
        elif isinstance(data, Tensor):
            moved = data.to(self.torch_device)
        return cast("_Data", moved)

    def batches(self, loader: Iterable[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
        """Yield each batch of `loader` with its tensors on the device, one batch ahead of the caller.

        The next batch is read and its copy begun before the current one is handed out, so on CUDA, where
        kernels run behind the host, reading and copying overlap with computing.
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
        """Run what stands inside in the device's number format."""
        short = self.precision != "fp32"
        with self._tf32(), torch.autocast(self.torch_device.type, self.dtype, enabled=short):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss, scaled against fp16 underflow, to those already there."""
        with self._tf32():
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(
        self, optimizer: Optimizer, *, clip_grad_norm: float | None = None, finite: Tensor | None = None
    ) -> None:
        """Unscale, clip and apply the gradients, then clear them.

        In fp16 an update whose gradients overflowed is skipped, and the scale shrinks.

        Args:
            optimizer: Its gradients are used up.
            clip_grad_norm: Largest allowed Euclidean norm of all gradients together, or None.
            finite: bool `()`, on the device: where false, no weight is changed. With a fused optimizer nobody waits
                for it, but in the first step. None is true.
        """
        if finite is not None and self.scaler.is_enabled():
            _spoil_unless(finite, optimizer)
        if clip_grad_norm is not None:
            self.scaler.unscale_(optimizer)  # first, or the limit would apply to scaled gradients
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
        if finite is None or self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            step_where(finite, optimizer)
        optimizer.zero_grad(set_to_none=True)

    def step(self, loss: Tensor, optimizer: Optimizer, *, clip_grad_norm: float | None = None) -> None:
        """`backward` and `update` in one call."""
        self.backward(loss)
        self.update(optimizer, clip_grad_norm=clip_grad_norm)

    def synchronize(self) -> None:
        """Wait until everything asked of the device is done. Costs the overlap: for timing only."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)
        elif self.torch_device.type == "mps":
            torch.mps.synchronize()

    def memory(self) -> dict[str, int]:
        """Return the bytes of memory `"free"` and `"total"` on the device, now.

        Raises:
            DeviceError: The system does not tell (MPS; CPUs elsewhere than on Linux).

        Example:
            >>> sorted(Device("cpu").memory())
            ['free', 'total']
        """
        if self.torch_device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.torch_device)
            return {"free": free, "total": total}
        memory = host_bytes() if self.torch_device.type == "cpu" else None
        if memory is None:
            raise DeviceError(
                f"memory of {self.torch_device} is not known: expected CUDA, or a CPU under Linux. Ask the system's "
                "own tools instead."
            )
        return memory

    def _tf32(self) -> AbstractContextManager[None]:
        tensor_cores = self.precision == "fp32" and self.torch_device.type == "cuda"
        return _float32_products("high") if tensor_cores else nullcontext()


def _has_state(optimizer: Optimizer) -> bool:
    """Say whether no parameter makes its first step: torch's fused SGD would leave its momentum unwritten memory."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return all(p in optimizer.state for p in parameters if p.grad is not None)


def step_where(finite: Tensor, optimizer: Any) -> None:
    """Make an optimizer's step where `finite`, bool `()`, is true, and change nothing where it is not.

    With a fused optimizer the host does not wait: its kernels look at two attributes, through which GradScaler tells
    them of overflows. In the first step it does, since torch's fused SGD would leave its momentum unwritten memory.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False) and _has_state(optimizer):
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf
    elif bool(finite):  # host sync on an accelerator
        optimizer.step()


def _spoil_unless(finite: Tensor, optimizer: Optimizer) -> None:
    """Make a gradient NaN where `finite` is false, so that the gradient scaler skips the step; without a host sync."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None and p.numel()]
    smallest = min(gradients, key=Tensor.numel)
    smallest += torch.where(finite, 0.0, float("nan"))


@contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _resolve_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(
            f"device {device!r} is no device torch knows: expected {_present()}, 'auto' or a torch.device."
        ) from error
    if resolved.type != "cuda":
        resolved = torch.device(resolved.type)  # "cpu:0" is the CPU
    elif resolved.index is None and torch.cuda.is_available():
        resolved = torch.device("cuda", torch.cuda.current_device())
    if str(resolved) not in _present():
        raise DeviceError(
            f"device {str(resolved)!r} is not on this machine: expected one of {_present()}. "
            'Pass one of these, or device="auto".'
        )
    return resolved


def _present() -> list[str]:
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def _resolve_precision(precision: str, device: torch.device) -> str:
    if precision != "auto":
        one_of("precision", precision, PRECISIONS)
    able = supported_precisions(device)
    if precision == "auto":
        return able[0]
    if precision not in able:
        raise DeviceError(
            f"precision={precision!r} cannot be used on {device}: it computes in {', '.join(able)}. "
            f'Pass precision="auto" (here {able[0]}) or one of these.'
        )
    return precision


def supported_precisions(device: torch.device) -> tuple[str, ...]:
    """Return the number formats that `device` can train in, the one that "auto" takes first.

    bf16 in software is allowed on any CPU and on older CUDA cards, but it is slower than fp32 there.

    Example:
        >>> "fp32" in supported_precisions(torch.device("cpu"))
        True
    """
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return ("bf16", "fp16", "fp32") if native else ("fp16", "fp32", "bf16")
    if device.type == "cpu":
        return ("bf16", "fp32") if _cpu_has_bf16() else ("fp32", "bf16")
    return ("fp32",)


def _cpu_has_bf16() -> bool:
    checks: tuple[Callable[[], bool], ...] = (
        torch.cpu._is_avx512_bf16_supported,  # torch has no public name for these
        torch.cpu._is_amx_tile_supported,
    )
    return any(check() for check in checks)
