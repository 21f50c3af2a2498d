"""`cache_features`: the features of images as an ordinary `Dataset`, for a training loop of your own."""

import zlib
from functools import cached_property
from os import PathLike

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from transferkit.base.arguments import whole_number
from transferkit.base.arrays import raw_bytes
from transferkit.base.calls import explained
from transferkit.base.display import Display
from transferkit.base.processes import check_same, together, world_size
from transferkit.base.surroundings import own_surroundings
from transferkit.compute.device import Device, find_device
from transferkit.data.augmentation import Augment, Transform, build_augmentation
from transferkit.data.inputs import Inputs
from transferkit.data.open import open_data
from transferkit.data.sources import Source
from transferkit.errors import ArgumentError
from transferkit.features.cache import FeatureCache, open_folder
from transferkit.features.chunks import CachedFeatures
from transferkit.features.feed import Feed
from transferkit.model.head import TransferModel, check_float32


class FeatureDataset(Dataset[tuple[Tensor, Tensor]]):
    """Features and targets of every image, view after view. Made by `cache_features`.

    Sample i is a pair: features `(C, h, w)`, in the dtype they were computed in, and the target. `model.split()[1]`
    takes batches of features and returns logits.

    Attributes:
        targets: int64 `(views * N,)` or float32 `(views * N, K)`.
    """

    def __init__(self, cached: CachedFeatures) -> None:
        self.targets = cached.targets_of_rows
        self._cached = cached
        self._rows = cached.rows.flatten().to(cached.parts[0].device)

    @cached_property
    def features(self) -> Tensor:
        """All features, `(views * N, C, h, w)`, channels-last; do not write to it.

        They are copied into one tensor unless they already lie in this order in one tensor or file.
        """
        whole = self._cached.parts[0]
        in_order = torch.equal(self._rows.cpu(), torch.arange(len(whole), device="cpu"))
        return (whole if in_order else self._cached.gather(self._rows)).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._cached.gather(self._rows[index][None])[0].permute(2, 0, 1), self.targets[index]

    def numpy(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64 | np.float32]]:
        """Return copies for scikit-learn: features, float32 `(views * N, C * h * w)`, and targets.

        The columns have the order that the head's first layer sees.
        """
        features = self.features.flatten(1).to("cpu", torch.float32, copy=True)
        return features.numpy(), self.targets.to("cpu", copy=True).numpy()


@explained
@together("cache_features")
@own_surroundings()
def cache_features(
    model: TransferModel,
    data: object,
    *,
    cache: str | PathLike[str] | None = None,
    augment: Augment | None = None,
    n_views: int | None = None,
    seed: int = 0,
    device: str | torch.device | Device = "auto",
    precision: str = "auto",
    num_workers: int = 0,
    verbose: int = 0,
) -> FeatureDataset:
    """Compute the output of a model's frozen layers for each image, and return it as a `Dataset`.

    Args:
        model: From `attach_head`, with frozen layers; it is moved to the device.
        data: `(images, targets)` or a `Dataset`, as in `Trainer.fit`.
        cache: A folder for feature files, for later runs and other processes; None keeps them in memory.
        augment: As in `Trainer.fit`; needs `n_views`.
        n_views: Fixed random views of each image.
        seed: Determines the views.
        device: As in `Trainer`.
        precision: As in `Trainer`.
        num_workers: As in `Trainer.fit`.
        verbose: As in `Trainer.fit`.

    Raises:
        ArgumentError: When `model` is something else, or an argument is out of range.
        CacheError: When nothing is frozen, the frozen layers are not a pure function, the images differ each time they
            are read, or there is no room.
        TransferKitError: When the data cannot be used.

    Example:
        >>> from transferkit import attach_head, freeze_until, load_backbone
        >>> model = attach_head(load_backbone("vgg11", weights=None, image_size=32), ["cat", "dog"])
        >>> images, targets = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1, 1, 0])
        >>> features = cache_features(freeze_until(model, "head"), (images, targets), device="cpu")
        >>> len(features), features[0][0].shape, features.numpy()[0].shape
        (4, torch.Size([3840, 1, 1]), (4, 3840))
    """
    if not isinstance(model, TransferModel):
        raise ArgumentError(f"model is a {type(model).__name__}: expected a TransferModel from attach_head.")
    place = find_device(device, precision)
    return FeatureDataset(
        features_of(
            model,
            open_data(data, model.classes, num_workers=num_workers, multi_label=model.threshold is not None),
            device=place,
            cache=FeatureCache(place, open_folder(cache)),
            transform=None if augment is None else build_augmentation(augment, model.backbone.image_size),
            num_views=None if n_views is None else whole_number("n_views", n_views),
            seed=whole_number("seed", seed, at_least=0),
            display=Display(verbose),
        )
    )


def features_of(
    model: TransferModel,
    source: Source,
    *,
    device: Device,
    cache: FeatureCache,
    transform: Transform | None = None,
    num_views: int | None = None,
    seed: int = 0,
    display: Display,
) -> CachedFeatures:
    """Return what the frozen layers of a model make of each image, in memory or in files; see `cache_features`."""
    check_float32(model, trains=False)
    if world_size() > 1:
        digest = zlib.crc32(b"".join(raw_bytes(value) for value in model.backbone.state_dict().values()))
        check_same({"images": source.num_images, "data": source.digest(), "backbone": digest}, "the features")
    inputs = Inputs(source, model.backbone.preprocess, device, transform, seed)
    model = device.prepare(model)
    feed = Feed(inputs=inputs, model=model, cache=cache, mode=True, num_views=num_views, what="given", display=display)
    return feed.features()
