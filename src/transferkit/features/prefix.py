"""The frozen first layers of a model as a fast, pure function of its input."""

import copy
import hashlib
import zlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from transferkit.base.arrays import digest_tensors, raw_bytes
from transferkit.compute.device import Device
from transferkit.compute.out_of_memory import within_memory
from transferkit.data.preprocessing import Preprocessing
from transferkit.model.backbone import Backbone
from transferkit.model.head import TransferModel
from transferkit.model.layers import Layers

NOTHING_FROZEN = "nothing is frozen: freeze_until(model, 'head') freezes the backbone"

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


def pure_prefix(model: TransferModel) -> tuple[Layers, str]:
    """Return the frozen first layers of a model, and why their output cannot be cached; `""` if it can.

    This is the one decision about what is frozen and pure. `TransferModel.split` finds what training does not change;
    the output of those layers must also depend on their input alone, and nothing else may want to see them run.

    Example:
        >>> from transferkit import attach_head, freeze_until, load_backbone
        >>> model = attach_head(load_backbone("vgg11", weights=None, image_size=32), 10)
        >>> pure_prefix(model)[1]
        "nothing is frozen: freeze_until(model, 'head') freezes the backbone"
        >>> layers, reason = pure_prefix(freeze_until(model, "block2"))
        >>> len(layers), reason
        (3, '')
    """
    layers, _ = model.split()
    if len(layers) == 0:
        return layers, NOTHING_FROZEN
    for part, kind in ((model, TransferModel), (model.backbone, Backbone), (model.backbone.features, nn.Sequential)):
        if type(part) is not kind or is_intercepted(part):
            return layers, f"the {type(part).__name__} has hooks or a forward of its own, which would not be called"
    for index, layer in enumerate(layers):
        name = f"layer {index} ({type(layer).__name__})"
        if type(layer) not in _PURE or nn.utils.parametrize.is_parametrized(layer):
            return layers, f"{name} may not give the same output each time"
        if isinstance(layer, nn.BatchNorm2d) and not layer.track_running_stats:
            return layers, f"{name} normalises by the statistics of each batch"
        if is_intercepted(layer):
            return layers, f"{name} has hooks or a forward of its own, which would not be called"
    return layers, ""


class Prefix:
    """Computes the features of preprocessed images: the output of the frozen layers.

    It gives the same bits as the layers under `Device.autocast`, without recording anything for autograd. In bf16 and
    fp16 it holds a copy of the convolutions, cast once. The layers are from `pure_prefix`; `preprocess` makes their
    input, and `device` is where they are.
    """

    def __init__(self, layers: Layers, preprocess: Preprocessing, *, device: Device) -> None:
        self.device = device
        self._own = layers
        self._preprocess = preprocess
        self._layers = Layers((_cast(layer, device.dtype) for layer in layers), layers.pools)
        self._state: list[Any] | None = None
        pixels = _PIXELS_ON_GPU if device.torch_device.type == "cuda" else _PIXELS_ON_CPU
        self.batch_size = max(1, pixels // preprocess.image_size**2)  # computed at once; halved when memory runs out

    def __len__(self) -> int:
        return len(self._layers)

    def __call__(self, inputs: Tensor, *, first: int = 0) -> Tensor:
        """Return the output `(N, C, h, w)` of all layers, or of those from `first` on, in the device's dtype.

        Inputs are preprocessed images `(N, 3, S, S)`, or the output of the layers before `first`.
        """
        layers = self._layers[first:]
        convolution = isinstance(layers[0], nn.Conv2d)
        dtype = self.device.dtype if convolution else inputs.dtype  # as autocast would cast it
        inputs = inputs.to(dtype, memory_format=torch.channels_last)

        def compute(size: int) -> Tensor:
            with torch.no_grad(), self.device.autocast():  # a ReLU works in place: it gets a copy
                parts = [layers(part if convolution else part.clone()) for part in torch.split(inputs, size)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        output, self.batch_size = within_memory(compute, self.batch_size, device=self.device, what="frozen layers")
        return output

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """Digests of all that the output after 0, 1, ... layers depends on besides the pixels.

        That is the preprocessing, the precision, the kind of device, the version of torch, and the settings and weights
        of each layer. Reading them costs a SHA-256 of every weight (60 ms for VGG16), so only a cache should.
        """
        self._state = _state(self._own, self._preprocess)
        device = self.device
        start = f"{self._preprocess} {device.precision} {device.torch_device.type} {torch.__version__}"
        digest = hashlib.sha256(start.encode())
        digests = [digest.hexdigest()]
        for index, layer in enumerate(self._own):
            digest.update(_settings(layer).encode())
            digest_tensors(digest, layer.state_dict())
            if pool := self._own.pools.get(index):
                digest.update(f"pooled {pool.name} {index == max(self._own.pools)}".encode())
            digests.append(digest.hexdigest())
        return tuple(digests)

    @cached_property
    def outputs(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape `(h, w, C)` and dtype of the output for one image after 0, 1, ... layers."""
        size = self._preprocess.image_size

        def run(_: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
            outputs = []
            output = torch.zeros(1, 3, size, size, device=self.device.torch_device)
            with torch.no_grad(), self.device.autocast():
                for index in range(len(self._layers) + 1):
                    output = self._layers[index - 1 : index](output) if index else output
                    outputs.append((tuple(output.permute(0, 2, 3, 1).shape[1:]), output.dtype))
            return outputs

        return within_memory(run, 1, device=self.device, what="frozen layers")[0]

    def is_current(self, layers: Layers, preprocess: Preprocessing) -> bool:
        """Return whether `digests` were read, and these layers are those they were read of, and unchanged.

        Reads every weight: 15 ms for VGG16. A prefix whose digests nobody has read is never current: making it again
        costs no more than comparing it.
        """
        return self._state is not None and _state(layers, preprocess) == self._state


def is_intercepted(module: nn.Module) -> bool:
    """Return whether calling a module does more than run the `forward` of its class."""
    every = nn.modules.module  # hooks for all modules
    hooked = any(getattr(module, hooks) or getattr(every, f"_global{hooks}") for hooks in _HOOKS)
    return hooked or "forward" in module.__dict__


def _cast(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a convolution in a shorter dtype; autocast would cast its weights again for each batch."""
    if dtype == torch.float32 or not isinstance(layer, nn.Conv2d):
        return layer
    short = copy.deepcopy(layer).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return short.requires_grad_(requires_grad=False)  # type: ignore[no-any-return]


def _settings(layer: nn.Module) -> str:
    """Return all that a layer's output depends on besides tensors; its `repr` leaves some of that out."""
    plain = (bool, int, float, str, tuple, list, type(None))
    settings = {name: value for name, value in vars(layer).items() if isinstance(value, plain) and name != "training"}
    return f"{type(layer).__name__} {sorted(settings.items())}"


def _state(layers: Layers, preprocess: Preprocessing) -> list[Any]:
    """Return something that differs once a layer is replaced or changed in any way; quicker than the digests."""
    tensors = [tensor for layer in layers for tensor in layer.state_dict().values()]
    checksums = [zlib.crc32(raw_bytes(tensor)) for tensor in tensors]
    return [preprocess, layers.pools, *map(id, layers), *map(_settings, layers), *checksums]
