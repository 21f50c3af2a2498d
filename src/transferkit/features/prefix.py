"""The frozen first layers of a model as a fast, pure function of its input."""

import copy
import hashlib
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transferkit.base.arrays import digest_tensors, raw_bytes
from transferkit.compute.device import Device
from transferkit.compute.out_of_memory import within_memory
from transferkit.data.preprocessing import Preprocessing

_PURE = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Identity,
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PIXELS_ON_CPU = 2**19  # 128 images of 64x64: more brought nothing, and the widest activations then take 128 MB
_PIXELS_ON_GPU = 2**23  # 167 images of 224x224


class Prefix:
    """Computes what the frozen layers make of preprocessed images.

    It holds a copy of the convolutions, cast once to the device's number format, and gives the same bits as the
    layers themselves do under `Device.autocast`, without autograd's records.

    Args:
        layers: The frozen layers, from `TransferModel.split`; none of them is impure (see `why_impure`).
        preprocess: What makes their input.
        device: Where they are and which number format they compute in.
        compiled: Let `torch.compile` fuse them: half a minute of compiling, once for each shape.

    Attributes:
        digests: One for each number of layers, from 0 to all: what the output after that many layers depends on
            besides the pixels, i.e. preprocessing, number format, kind of device, version of torch, and every layer's
            settings and weights.
        batch_size: Images that are computed at once.
    """

    def __init__(
        self, layers: nn.Sequential, preprocess: Preprocessing, *, device: Device, compiled: bool = False
    ) -> None:
        self.device = device
        self.digests = _chain(layers, f"{preprocess} {device.precision} {device.torch_device.type} {torch.__version__}")
        self._state = _state(layers, preprocess)
        self._layers = nn.Sequential(*(_cast(layer, device.dtype) for layer in layers))
        self._compiled = compiled
        self._runs: dict[int, Callable[[Tensor], Tensor]] = {}
        pixels = _PIXELS_ON_GPU if device.torch_device.type == "cuda" else _PIXELS_ON_CPU
        self.batch_size = max(1, pixels // preprocess.image_size**2)

    def __len__(self) -> int:
        return len(self._layers)

    def __call__(self, inputs: Tensor, *, first: int = 0) -> Tensor:
        """Return the output `(N, C, h, w)` of all layers, or of those from `first` on, in the device's number format.

        Args:
            inputs: Preprocessed images `(N, 3, S, S)`, or what the layers before `first` made of them.
            first: Number of layers already computed.
        """
        if first not in self._runs:
            layers = self._layers[first:]
            self._runs[first] = torch.compile(layers) if self._compiled else layers
        run = self._runs[first]
        convolution = isinstance(self._layers[first], nn.Conv2d)
        dtype = self.device.dtype if convolution else inputs.dtype  # as autocast would cast it
        inputs = inputs.to(dtype, memory_format=torch.channels_last)
        output, self.batch_size = within_memory(
            lambda size: self._compute(run, inputs, size, in_place=not convolution),
            self.batch_size,
            device=self.device,
            what="frozen layers",
        )
        return output

    def _compute(self, run: Callable[[Tensor], Tensor], inputs: Tensor, size: int, *, in_place: bool) -> Tensor:
        with torch.no_grad(), self.device.autocast():
            parts = [run(part.clone() if in_place else part) for part in torch.split(inputs, size)]  # a ReLU writes
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def is_current(self, layers: nn.Sequential, preprocess: Preprocessing) -> bool:
        """Say whether this was made from these very layers and nothing of them has changed.

        Reads every weight: 15 ms for VGG16.
        """
        return _state(layers, preprocess) == self._state


def why_impure(layers: nn.Sequential) -> str | None:
    """Return why the output of frozen layers may depend on more than their input; None if it does not.

    Example:
        >>> why_impure(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()))
        'layer 1 is a Dropout, which may not give the same output each time'
    """
    for index, layer in enumerate(layers):
        if type(layer) not in _PURE or nn.utils.parametrize.is_parametrized(layer):
            return f"layer {index} is a {type(layer).__name__}, which may not give the same output each time"
        if isinstance(layer, nn.BatchNorm2d) and (layer.training or not layer.track_running_stats):
            return f"layer {index} is a BatchNorm2d in training mode"
        if is_intercepted(layer):
            return (
                f"layer {index} ({type(layer).__name__}) has hooks or a forward of its own, which would not be called"
            )
    return None


def is_intercepted(module: nn.Module) -> bool:
    """Say whether a module's own `forward` is not all that happens when it is called."""
    return "forward" in module.__dict__ or any(getattr(module, hooks) for hooks in _HOOKS)


def _cast(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a convolution in a shorter format; autocast would cast its weights again for each batch."""
    if dtype == torch.float32 or not isinstance(layer, nn.Conv2d):
        return layer
    short = copy.deepcopy(layer).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return short.requires_grad_(requires_grad=False)  # type: ignore[no-any-return]


def _chain(layers: nn.Sequential, start: str) -> tuple[str, ...]:
    digest = hashlib.sha256(start.encode())
    digests = [digest.hexdigest()]
    for layer in layers:
        digest.update(_settings(layer).encode())
        digest_tensors(digest, layer.state_dict())
        digests.append(digest.hexdigest())
    return tuple(digests)


def _settings(layer: nn.Module) -> str:
    """Return all that a layer's output depends on besides tensors; its `repr` leaves some of that out."""
    plain = (bool, int, float, str, tuple, list, type(None))
    settings = {name: value for name, value in vars(layer).items() if isinstance(value, plain) and name != "training"}
    return f"{type(layer).__name__} {sorted(settings.items())}"


def _state(layers: nn.Sequential, preprocess: Preprocessing) -> list[Any]:
    """Return what differs when a layer was replaced or changed in whatever way; quicker than the digests."""
    tensors = [tensor for layer in layers for tensor in layer.state_dict().values()]
    checksums = [zlib.crc32(raw_bytes(tensor)) for tensor in tensors]
    return [preprocess, *map(id, layers), *map(_settings, layers), *checksums]
