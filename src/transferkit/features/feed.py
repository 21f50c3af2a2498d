"""What a network is trained or evaluated on, epoch by epoch: kept features where that is safe, else images."""

from collections.abc import Generator
from typing import cast

import torch
from torch import Tensor, nn

from transferkit.base.display import Display
from transferkit.compute.device import Device
from transferkit.data.inputs import Inputs
from transferkit.errors import CacheError
from transferkit.features.cache import FeatureCache, KeptFeatures
from transferkit.features.prefix import Prefix, is_intercepted, why_impure
from transferkit.model.backbone import Backbone
from transferkit.model.head import TransferModel

Batches = Generator[tuple[Tensor, Tensor], None, None]

NOTHING_FROZEN = "nothing is frozen: freeze_until(model, 'head') freezes the backbone"


class Frozen:
    """The frozen prefix of a model and the network behind it, made anew when the model's layers are no longer the same.

    Args:
        model: It may change between two calls of `split`.
        device: Where it is.
        compiled: Let `torch.compile` fuse both parts.
    """

    def __init__(self, model: TransferModel, device: Device, *, compiled: bool) -> None:
        self.model = model
        self.device = device
        self.compiled = compiled
        self._prefix: Prefix | None = None
        self._layers: list[nn.Module] = []
        self._network: nn.Module = model

    def split(self) -> tuple[Prefix | None, nn.Module, str]:
        """Return the prefix, the network behind it and, if there is no prefix, why; the network is then all of it."""
        layers, suffix = self.model.split()
        reason = why_impure(layers)
        for part in (self.model, self.model.backbone, self.model.backbone.features):
            if type(part) not in (TransferModel, Backbone, nn.Sequential) or is_intercepted(part):
                reason = f"the {type(part).__name__} has hooks or a forward of its own, which would not be called"
        if len(layers) == 0:
            reason = NOTHING_FROZEN
        if reason is not None:
            return None, self._compile_once(self.model, [self.model]), reason
        preprocess = self.model.backbone.preprocess
        if self._prefix is None or not self._prefix.is_current(layers, preprocess):
            self._prefix = Prefix(layers, preprocess, device=self.device, compiled=self.compiled)
        return self._prefix, self._compile_once(suffix, list(suffix)), ""

    def _compile_once(self, network: nn.Module, layers: list[nn.Module]) -> nn.Module:
        if layers != self._layers:
            self._layers = layers
            self._network = cast("nn.Module", torch.compile(network)) if self.compiled else network
        return self._network


class Feed:
    """One source of a run, as its epochs read it.

    Args:
        inputs: The images.
        frozen: The model's frozen prefix.
        cache: The features that are kept.
        mode: `"auto"` keeps features where it is safe and says so where it is not; True raises there; False does not.
        num_views: Fixed views of each image that epochs go through in turn; None draws each epoch anew.
        what: What the images are for: `"training"` or `"validation"`.
        display: Shows what is done.
    """

    def __init__(
        self,
        inputs: Inputs,
        frozen: Frozen,
        cache: FeatureCache,
        *,
        mode: bool | str,
        num_views: int | None,
        what: str,
        display: Display,
    ) -> None:
        self.inputs = inputs
        self.frozen = frozen
        self.cache = cache
        self.mode = mode
        self.num_views = num_views
        self.what = what
        self.display = display
        self._prefix: Prefix | None = None
        self._kept: KeptFeatures | None = None
        self._said: set[str] = set()

    def open(
        self, batch_size: int, *, order: Tensor | None = None, epoch: int = 0, kept_batch_size: int | None = None
    ) -> tuple[nn.Module, Batches]:
        """Return the network and, for one epoch, the batches of what it takes and of targets, on the device.

        Args:
            batch_size: Images in a batch.
            order: Their places in the source, int64; None takes them as they lie.
            epoch: Number of the epoch, which random changes depend on.
            kept_batch_size: Another batch size for where features are kept.

        Raises:
            CacheError: Features cannot be kept, and `mode` is True.
        """
        prefix, network, reason = self.frozen.split()
        view = epoch if self.num_views is None else epoch % self.num_views
        if prefix is None:
            self._refuse(reason)
            return network, self.inputs.batches(batch_size, order=order, view=view)
        if self._prefix is not prefix:  # the first epoch, or one after the boundary or a weight changed
            self._prefix, self._kept = prefix, None
            try:
                self._kept = self._keep(prefix) if self.mode is not False else None
            except CacheError as error:
                self._refuse(str(error))
        if self._kept is not None:
            kept_view = view % len(self._kept.features)
            return network, self._kept.batches(kept_batch_size or batch_size, order=order, view=kept_view)
        images = self.inputs.batches(batch_size, order=order, view=view)
        return network, ((prefix(batch), targets) for batch, targets in images)

    def check(self) -> None:
        """Refuse what can be seen before anything is computed.

        Raises:
            CacheError: Features cannot be kept, and `mode` is True.
        """
        if self.mode is True:
            prefix, _, reason = self.frozen.split()
            if found := reason if prefix is None else self._why_not():
                self._refuse(found)

    def keep(self) -> KeptFeatures:
        """Return the features of every image.

        Raises:
            CacheError: They cannot be kept.
        """
        prefix, _, reason = self.frozen.split()
        if prefix is None:
            raise CacheError(f"features cannot be kept: {reason}.")
        return self._keep(prefix)

    def _keep(self, prefix: Prefix) -> KeptFeatures:
        if reason := self._why_not():
            raise CacheError(reason)
        return self.cache.keep(self.inputs, prefix, num_views=self.num_views or 1, display=self.display)

    def _why_not(self) -> str | None:
        source = self.inputs.source
        if source.num_images is None:
            return source.why_not_repeatable()
        if self.num_views is not None:
            return None
        if self.inputs.transform is not None:
            return "augment changes images at random in each epoch; n_views=2 would keep two fixed views of each"
        return source.why_not_repeatable()

    def _refuse(self, reason: str) -> None:
        message = f"features of the {self.what} images are not kept: {reason}."
        if self.mode is True:
            raise CacheError(f'{message} cache="auto" goes on without.')
        if self.mode == "auto" and reason != NOTHING_FROZEN and message not in self._said:
            self._said.add(message)
            self.display.say(message)
