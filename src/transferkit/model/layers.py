"""The layers of a model in a row, the pooled features of several of them, and what layers are."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional


def _mean(activation: Tensor) -> Tensor:
    return functional.adaptive_avg_pool2d(activation, 1)


def _largest(activation: Tensor) -> Tensor:
    return functional.adaptive_max_pool2d(activation, 1)


def _upper_mean(activation: Tensor) -> Tensor:
    return _mean(activation[:, :, : (activation.shape[2] + 1) // 2])  # a middle row belongs to both halves


def _lower_mean(activation: Tensor) -> Tensor:
    return _mean(activation[:, :, activation.shape[2] // 2 :])


POOLINGS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "avg": (_mean,),
    "max": (_largest,),
    "avgmax": (_mean, _largest),
    "halves": (_upper_mean, _lower_mean, _largest),  # sky is above and ground below; left and right are alike
}


class Pool(NamedTuple):
    """How a layer's output of C channels is pooled over its positions, `(N, C, h, w)` to `(N, size, 1, 1)`."""

    name: str
    channels: int

    @property
    def size(self) -> int:
        return self.channels * len(POOLINGS[self.name])

    def __call__(self, activation: Tensor) -> Tensor:
        return torch.cat([pool(activation) for pool in POOLINGS[self.name]], dim=1)


class Layers(nn.Sequential):
    """Consecutive layers of a model: an `nn.Sequential` that may also pool the outputs of some, by index in `pools`.

    Behind the last pooled layer the result is all that was pooled, concatenated: `(N, D, 1, 1)`. Layers that end before
    it return their activation with what is pooled so far in rows below it, `(N, C, h + r, w)`, so that one tensor holds
    all that the following layers need, which are told how many numbers are `pooled`. It can be cached, and cut at any
    layer: `layers[n:](layers[:n](x))` equals `layers(x)`.

    Example:
        >>> layers = Layers([nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)], {0: Pool("avg", 4), 1: Pool("avg", 5)})
        >>> images = torch.randn(2, 3, 8, 8)
        >>> layers(images).shape, layers[:1](images).shape  # 4 pooled numbers fit into one row of 4 x 8
        (torch.Size([2, 9, 1, 1]), torch.Size([2, 4, 9, 8]))
    """

    def __init__(self, layers: Iterable[nn.Module], pools: Mapping[int, Pool] | None = None, pooled: int = 0) -> None:
        super().__init__(*layers)
        self.pools = dict(pools or {})
        self.pooled = pooled

    @overload  # type: ignore[override] # torch's own returns nn.Sequential
    def __getitem__(self, index: int) -> nn.Module: ...

    @overload
    def __getitem__(self, index: slice) -> "Layers": ...

    def __getitem__(self, index: int | slice) -> "nn.Module | Layers":
        modules = list(self)
        if not isinstance(index, slice):
            return modules[index]
        first, end, _ = index.indices(len(modules))
        return Layers(
            modules[first:end],
            {place - first: pool for place, pool in self.pools.items() if first <= place},  # those to come, too
            self.pooled_before(first),
        )

    def pooled_before(self, index: int) -> int:
        """Return how many pooled numbers of an image lie below the input of a layer."""
        if all(place < index for place in self.pools):  # the last is behind: they are the activation now
            return 0
        return self.pooled + sum(pool.size for place, pool in self.pools.items() if place < index)

    def forward(self, inputs: Tensor) -> Tensor:
        return run_layers(list(self), inputs, self.pools, self.pooled)


def run_layers(layers: list[nn.Module], inputs: Tensor, pools: Mapping[int, Pool], pooled: int = 0) -> Tensor:
    """Return what `Layers(layers, pools, pooled)` makes of its inputs."""
    activation, parts = _separate(inputs, pooled)
    last = max(pools, default=-1)
    for index, layer in enumerate(layers):
        activation = layer(activation)
        if index in pools:
            # a ReLU in place would overwrite what the gradient of max pooling needs
            overwritten = any(getattr(following, "inplace", False) for following in layers[index + 1 : index + 2])
            parts.append(pools[index](activation.clone() if overwritten else activation))
        if index == last:
            activation, parts = torch.cat(parts, dim=1), []
    return _below(activation, parts)


def _below(activation: Tensor, pooled: list[Tensor]) -> Tensor:
    if not pooled:
        return activation
    _, channels, _, width = activation.shape
    numbers = torch.cat(pooled, dim=1).flatten(1)
    rows = -(-numbers.shape[1] // (channels * width))
    numbers = functional.pad(numbers, (0, rows * width * channels - numbers.shape[1]))
    return torch.cat([activation, numbers.view(-1, rows, width, channels).permute(0, 3, 1, 2)], dim=2)


def _separate(inputs: Tensor, pooled: int) -> tuple[Tensor, list[Tensor]]:
    if not pooled:
        return inputs, []
    _, channels, _, width = inputs.shape
    rows = -(-pooled // (channels * width))
    numbers = inputs[:, :, -rows:].permute(0, 2, 3, 1).flatten(1)[:, :pooled]
    # with the strides that it would have without rows below it: other kernels would round otherwise
    channels_last = inputs.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if channels_last else torch.contiguous_format
    return inputs[:, :, :-rows].contiguous(memory_format=order), [numbers[:, :, None, None]]


_SHAPES = {"in_channels", "out_channels", "in_features", "out_features", "num_features", "inplace"}


def structure(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the type of each module by name, and the settings of torch's own that its weights' shapes do not tell."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        settings = vars(module) if type(module).__module__.startswith("torch.nn.modules.") else {}
        found[name] = {"type": type(module).__name__} | {
            key: value
            for key, value in settings.items()
            if not key.startswith("_") and key != "training" and key not in _SHAPES and _is_plain(value)
        }
    return found


def unlike(live: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say in which modules and settings two structures differ; a setting that one of them lacks does not count."""
    faults = [f"{name} is in one of them alone" for name in [*live, *other] if (name in live) != (name in other)]
    for name, settings in live.items():
        expected, what = other.get(name, settings), name or "the model"
        if settings["type"] != expected.get("type"):
            faults.append(f"{what} is a {settings['type']} instead of a {expected.get('type')}")
        else:
            changed = [key for key in settings if key in expected and settings[key] != expected[key]]
            faults += [f"{what}.{key} is {settings[key]!r} instead of {expected[key]!r}" for key in changed]
    return faults


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
