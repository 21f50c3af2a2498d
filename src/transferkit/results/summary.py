"""What a model consists of, layer by layer: shapes, parameters, what trains, and what it costs."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transferkit.base.calls import explained
from transferkit.base.surroundings import own_surroundings
from transferkit.errors import ArgumentError
from transferkit.features.prefix import pure_prefix
from transferkit.model.backbone import Backbone
from transferkit.model.head import TransferModel
from transferkit.model.modes import evaluating
from transferkit.results.tabular import html_table, text_table


class LayerSummary(NamedTuple):
    """One layer.

    Attributes:
        name: In the backbone as in `Backbone.layer_names`, in the head as its modules are called.
        output_shape: For one image, without the batch dimension.
        num_parameters: Its own.
        trains: Whether any of them takes a gradient.
        cached: Whether `Trainer` can run it once for each image and cache the result.
        multiply_adds: For one image, of convolutions and fully connected layers; of others 0.
    """

    name: str
    output_shape: tuple[int, ...]
    num_parameters: int
    trains: bool
    cached: bool
    multiply_adds: int

    @property
    def state(self) -> str:
        """Whether it trains or is frozen, where it has parameters, and whether it is cached."""
        trained = "" if not self.num_parameters else "trains" if self.trains else "frozen"
        return ", ".join(filter(None, [trained, "cached" if self.cached else ""]))


@dataclass(frozen=True, repr=False)
class Summary:
    """The layers of a model; from `summary`. It prints as a table, and in a notebook it is one.

    Attributes:
        layers: A `LayerSummary` for each layer, in the order in which they run.
        image_size: Height and width of the images that shapes and arithmetic are for.
        num_parameters: Of the model.
        num_trainable: How many of them take a gradient.
    """

    layers: list[LayerSummary]
    image_size: int
    num_parameters: int
    num_trainable: int

    def share(self, layer: LayerSummary) -> float:
        """Return a layer's share of all multiply-adds, 0 to 1."""
        return layer.multiply_adds / max(1, sum(other.multiply_adds for other in self.layers))

    def __str__(self) -> str:
        return f"{text_table(self._table())}\n{self._last_line()}"

    __repr__ = __str__  # what an interpreter shows

    def _repr_html_(self) -> str:
        return f"{html_table(self._table())}<p>{self._last_line()}</p>"

    def _table(self) -> list[list[str]]:
        table = [["layer", "output", "parameters", "state", "arithmetic"]]
        for layer in self.layers:
            own = f"{layer.num_parameters:,}" if layer.num_parameters else ""
            share = f"{self.share(layer):.1%}" if layer.multiply_adds else ""
            table.append([layer.name, "x".join(map(str, layer.output_shape)), own, layer.state, share])
        return table

    def _last_line(self) -> str:
        arithmetic = sum(layer.multiply_adds for layer in self.layers)
        once = sum(self.share(layer) for layer in self.layers if layer.cached)
        return (
            f"{self.num_parameters:,} parameters, {self.num_trainable:,} train; {arithmetic / 1e9:.3g} billion "
            f"multiply-adds for an image of {self.image_size}x{self.image_size}, {once:.0%} of them cached"
        )


@explained
@own_surroundings()
def summary(model: Backbone | TransferModel) -> Summary:
    r"""Return a model layer by layer: output shape, parameters, frozen or trained, cached or not, share of arithmetic.

    `Trainer` caches the output of the layers marked "cached" if the data allows it: the first frozen layers, if they
    are pure functions. One image of zeros goes through the model; the model does not change.

    Raises:
        ArgumentError: When `model` is neither from `load_backbone` nor from `attach_head`.

    Example:
        >>> from transferkit import attach_head, freeze_until, load_backbone
        >>> backbone = load_backbone("vgg11", weights=None, image_size=32)
        >>> table = summary(freeze_until(attach_head(backbone, 10), "block5"))
        >>> print("\n".join(line for line in str(table).splitlines() if "conv" in line or "logits" in line))
        block1_conv1       64x32x32       1,792  frozen, cached        1.2%
        block2_conv1      128x16x16      73,856  frozen, cached       12.4%
        block3_conv1        256x8x8     295,168  frozen, cached       12.4%
        block3_conv2        256x8x8     590,080  frozen, cached       24.7%
        block4_conv1        512x4x4   1,180,160  frozen, cached       12.4%
        block4_conv2        512x4x4   2,359,808  frozen, cached       24.7%
        block5_conv1        512x2x2   2,359,808          trains        6.2%
        block5_conv2        512x2x2   2,359,808          trains        6.2%
        head.logits              10      38,410          trains        0.0%
    """
    if not isinstance(model, Backbone | TransferModel):
        raise ArgumentError(
            f"model is a {type(model).__name__}: expected a Backbone from load_backbone or a TransferModel."
        )
    backbone = model.backbone if isinstance(model, TransferModel) else model
    names: dict[nn.Module, str] = dict(zip(backbone.features, backbone.layer_names, strict=True))
    cached: set[nn.Module] = set()
    if isinstance(model, TransferModel):
        parts = model.head.named_modules(prefix="head")
        names |= {module: name for name, module in parts if not list(module.children())}
        prefix, reason = pure_prefix(model)
        cached = set() if reason else set(prefix)
    layers: list[LayerSummary] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        parameters = list(module.parameters())
        row = module.weight[0].numel() if isinstance(module, nn.Conv2d | nn.Linear) else 0  # each output is its product
        layers.append(
            LayerSummary(
                name=names[module],
                output_shape=tuple(output.shape[1:]) if isinstance(output, Tensor) else (),
                num_parameters=sum(parameter.numel() for parameter in parameters),
                trains=any(parameter.requires_grad for parameter in parameters),
                cached=module in cached,
                multiply_adds=row * output[0].numel() if row else 0,
            )
        )

    weight, size = next(backbone.parameters()), backbone.image_size
    with torch.no_grad(), evaluating(model), ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_hook(note).remove)
        model(weight.new_zeros(1, 3, size, size))
    own = list(model.parameters())
    return Summary(layers, size, sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad))
