"""Adam for large fully connected layers, whose weight gradient is used without ever being written to memory.

The gradient of a weight is a product of two thin matrices, the gradient of the layer's output and its input, with as
many rows as the batch has images. `adam_linear.c` forms it tile by tile in registers and applies Adam at once, in one
pass over the weight and its moments; what it saves is writing the gradient in bf16, converting it to fp32 and reading
it again, which is half of the memory that a step touches. The bits are those of `torch.optim.Adam(fused=True)` after
autocast.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.optim import Adam, AdamW, Optimizer
from torch.overrides import TorchFunctionMode

from transferkit.device import Device

LARGE = 2**18
"""Weights of fewer elements stay in the processor's cache: nothing to save."""

Factors = list[tuple[Tensor, Tensor]]


class LinearAdam(TorchFunctionMode):
    """Runs the large fully connected layers of a network, as a context of its forward pass, and updates them.

    Args:
        network: In it the layers are looked for.
        optimizer: `Adam` or `AdamW`, fused. A weight that it has not updated yet it updates first itself.
        kernel: From `load_kernel`.

    Example:
        >>> linear_adam = LinearAdam(network, optimizer, kernel)  # doctest: +SKIP
        >>> with linear_adam, torch.autocast("cpu", torch.bfloat16):  # doctest: +SKIP
        ...     loss = network(inputs).float().sum()
        >>> loss.backward()  # doctest: +SKIP
        >>> linear_adam.update()  # doctest: +SKIP
        >>> optimizer.step()  # doctest: +SKIP
    """

    def __init__(self, network: nn.Module, optimizer: Optimizer, kernel: Callable[..., int]) -> None:
        super().__init__()
        self.optimizer = optimizer
        self._kernel = kernel
        groups = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
        self._groups = {
            id(layer.weight): groups[id(layer.weight)] for layer in network.modules() if _is_large_linear(layer)
        }
        self._factors: dict[Tensor, Factors] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is functional.linear and len(args) == 3 and id(args[1]) in self._groups:
            inputs, weight, bias = args
            if inputs.ndim == 2 and "exp_avg" in self.optimizer.state.get(weight, {}):
                factors = self._factors.setdefault(weight, [])
                short = None if bias is None else bias.to(torch.bfloat16)
                return _Linear.apply(inputs.to(torch.bfloat16), weight, short, factors)
        return func(*args, **(kwargs or {}))

    def gradient_bounds(self) -> list[Tensor]:
        """Return a number for each weight used, float32 `()`, that is finite only if its whole gradient is.

        A gradient is a sum over images of products of two factors, so no entry exceeds the number of images times the
        largest of each.
        """
        return [
            len(gradient) * _largest(gradient) * _largest(inputs)
            for factors in self._factors.values()
            for gradient, inputs in factors
        ]

    def clear(self) -> None:
        """Forget the gradients gathered since the last update."""
        self._factors.clear()

    def update(self) -> None:
        """Apply the gradients gathered since the last update; before the optimizer's own step."""
        for weight, factors in self._factors.items():
            if not factors:
                continue  # the layer took no part in the loss
            gradients, inputs = (
                torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*factors, strict=True)
            )
            if weight.grad is not None:  # it was used otherwise too: the optimizer takes the sum
                weight.grad += (gradients.t() @ inputs).float()
            else:
                state = self.optimizer.state[weight]
                state["step"] += 1
                decoupled = type(self.optimizer) is AdamW
                group = self._groups[id(weight)]
                if not _run_kernel(
                    weight, gradients, inputs, state=state, group=group, decoupled=decoupled, kernel=self._kernel
                ):
                    state["step"] -= 1
                    weight.grad = (gradients.t() @ inputs).float()  # the optimizer has its own ways with memory
        self._factors.clear()


def find_linear_adam(network: nn.Module, optimizer: Optimizer, *, device: Device) -> LinearAdam | None:
    """Return what trains the large fully connected layers of a network; None where it would not give the same result.

    It is for a CPU that computes bf16 natively, and for `Adam` and `AdamW` as `Trainer` makes them, without the
    variants that few use.
    """
    kernel = load_kernel() if (device.torch_device.type, device.precision) == ("cpu", "bf16") else None
    if kernel is None:
        return None
    if (
        type(optimizer) not in (Adam, AdamW)
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
    ):
        return None
    for group in optimizer.param_groups:
        if not group["fused"] or any(group[name] for name in ("amsgrad", "maximize", "capturable", "differentiable")):
            return None
        if isinstance(group["lr"], Tensor):
            return None
    return LinearAdam(network, optimizer, kernel)


@functools.cache
def load_kernel() -> Callable[..., int] | None:
    """Return the compiled function; None where it cannot be used.

    That is where it was not compiled, where the processor lacks the instructions, and where this version of torch
    gives other bits, which one small step tells.
    """
    path = Path(__file__).with_name("adam_linear.so")
    if not path.exists() or not torch.cpu._is_avx512_bf16_supported():
        return None
    kernel: Any = ctypes.CDLL(str(path)).adam_linear
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    kernel.argtypes = [pointer] * 4 + [size, pointer] + [size] * 4 + [pointer, ctypes.c_int]
    kernel.restype = ctypes.c_int
    return kernel if _agrees_with_torch(kernel) else None


def _agrees_with_torch(kernel: Callable[..., int]) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight, *moments = (torch.rand(24, 40, generator=generator) for _ in range(3))
    gradients, inputs = (torch.randn(5, size, generator=generator).bfloat16() for size in weight.shape)
    parameter = nn.Parameter(weight.clone())
    optimizer = Adam([parameter], fused=True)
    group = optimizer.param_groups[0]
    state = dict(zip(("step", "exp_avg", "exp_avg_sq"), (torch.tensor(3.0), *moments), strict=True))
    optimizer.state[parameter] = {name: value.clone() for name, value in state.items()}
    parameter.grad = (gradients.t() @ inputs).float()
    optimizer.step()
    state["step"] += 1
    _run_kernel(weight, gradients, inputs, state=state, group=group, decoupled=False, kernel=kernel)
    return all(
        torch.equal(*pair)
        for pair in ((weight, parameter), *((state[n], optimizer.state[parameter][n]) for n in state))
    )


class _Linear(torch.autograd.Function):
    """A linear layer in bf16 that leaves its weight's gradient as two factors."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> Tensor:
        short = weight.to(torch.bfloat16)
        ctx.save_for_backward(inputs, short)
        ctx.factors = factors
        return functional.linear(inputs, short, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, short = ctx.saved_tensors
        ctx.factors.append((gradient, inputs))
        of_inputs = gradient @ short if ctx.needs_input_grad[0] else None
        of_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        return of_inputs, None, of_bias, None


def _largest(tensor: Tensor) -> Tensor:
    """Return the largest magnitude, float32 `()`; NaN if there is one."""
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low, high).float()


def _is_large_linear(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear:
        return False
    weight = layer.weight
    plain = weight.dtype == torch.float32 and weight.is_contiguous() and weight.requires_grad
    hooked = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    return plain and not hooked and weight.numel() >= LARGE


def _run_kernel(
    weight: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    *,
    state: dict[str, Tensor],
    group: dict[str, Any],
    decoupled: bool,
    kernel: Callable[..., int],
) -> bool:
    """Update a weight and its moments; return whether there was memory to work in. If not, nothing was changed."""
    step, lr, decay = state["step"].item(), group["lr"], group["weight_decay"]
    beta1, beta2 = group["betas"]
    coefficients = (ctypes.c_float * 8)(
        lr / (1 - beta1**step),
        math.sqrt(1 - beta2**step),
        group["eps"],
        beta2,
        1 - beta1,
        1 - beta2,
        0.0 if decoupled else decay,
        1 - lr * decay if decoupled else 1.0,
    )
    gradients, inputs = (part if part.stride(1) == 1 else part.contiguous() for part in (gradients, inputs))
    failed = kernel(
        weight.data_ptr(),
        state["exp_avg"].data_ptr(),
        state["exp_avg_sq"].data_ptr(),
        gradients.data_ptr(),
        gradients.stride(0),
        inputs.data_ptr(),
        inputs.stride(0),
        len(inputs),
        *weight.shape,
        coefficients,
        torch.get_num_threads(),
    )
    if failed:
        return False
    torch.autograd.graph.increment_version((weight, state["exp_avg"], state["exp_avg_sq"]))
    return True
