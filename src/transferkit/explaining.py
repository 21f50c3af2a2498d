"""Why a model says what it says: where it looks, and which training images are most like an image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from transferkit.analysis.outliers import nearest
from transferkit.base.arguments import whole_number
from transferkit.base.processes import alone
from transferkit.base.randomness import shuffled
from transferkit.data.classes import find_classes
from transferkit.data.open import open_data
from transferkit.data.targets import class_indices
from transferkit.errors import ArgumentError
from transferkit.linear.design import moments
from transferkit.linear.table import Table
from transferkit.model.head import TransferModel
from transferkit.results.figures import Axes, Figure
from transferkit.results.gallery import draw_images, read_pixels
from transferkit.trainer import Trainer
from transferkit.training.evaluation import head_inputs, opened
from transferkit.training.step import evaluation_step


def explain(
    trainer: Trainer, images: object, classes: object = None, *, batch_size: int | None = None, num_workers: int = 0
) -> npt.NDArray[np.float32]:
    """Return how much each pixel adds to a class's logit, float32 `(N, image_size, image_size)`.

    A map sums to the class's logit: positive values speak for the class, negative ones against it. The values are
    exact for a linear head, the default of `attach_head`. With hidden layers they are a first-order approximation.

    Args:
        trainer: Has the model to explain.
        images: As in `Trainer.predict_proba`. A map covers the image as the model sees it: cropped and resized.
        classes: A class name or index for each image, or one for all; None is each image's most probable class.
        batch_size: 32 if None.
        num_workers: Processes that read a `Dataset`.

    Raises:
        ArgumentError: When a class is unknown, or the number of classes is not that of the images.
        ImageError: As in `Trainer.predict_proba`.

    Example:
        >>> import transferkit as tk
        >>> backbone = tk.load_backbone("vgg11", weights=None, image_size=32)
        >>> trainer = tk.Trainer(tk.attach_head(backbone, ["cat", "dog"]), device="cpu")
        >>> explain(trainer, torch.zeros(2, 3, 48, 64, dtype=torch.uint8), "cat").shape
        (2, 32, 32)
    """
    model, device = trainer.model, trainer.device
    wanted = _indices(classes, model.classes)
    maps: list[Tensor] = []
    seen = 0
    with alone(), opened(trainer.training, images, batch_size, num_workers, with_targets=False) as (_, batches):
        for inputs, _ in batches:
            count = len(inputs)
            if wanted is None:
                own = evaluation_step(model, inputs, device=device).argmax(dim=1)
            else:
                own = wanted[seen : seen + count] if wanted.ndim else wanted.expand(count)
            seen += count
            if len(own) != count:
                break
            with device.autocast():
                maps.append(activation_maps(model, inputs, own.to(inputs.device)).cpu())
    if wanted is not None and wanted.ndim and seen != len(wanted):
        raise ArgumentError(f"{len(wanted)} classes do not match the number of images: expected one for each image.")
    return torch.cat(maps).numpy()


def activation_maps(model: TransferModel, inputs: Tensor, classes: Tensor) -> Tensor:
    """Return how much each place of an image adds to a logit, float32 `(N, S, S)`; the arguments are on one device.

    Each output that the head takes is multiplied by the slope of the logit there and summed over channels: class
    activation maps (arXiv:1512.04150) of a linear head, else Grad-CAM without its mean over places (arXiv:2011.08891).
    What then is missing from the logit, such as the bias, is the same at all places, so that a map sums to the logit.
    """
    pools: dict[int, Any] = model.pools or {len(model.backbone.features) - 1: nn.Identity()}
    activation, outputs = inputs, []
    with torch.no_grad():
        for index, layer in enumerate(model.backbone.features):
            activation = layer(activation)
            if index in pools:
                outputs.append(activation.clone())  # the next layer may work in place
    with torch.enable_grad():
        pooled = [pool(output.requires_grad_()) for pool, output in zip(pools.values(), outputs, strict=True)]
        own = model.head(torch.cat(pooled, dim=1))[torch.arange(len(classes)), classes]
        slopes = torch.autograd.grad(own.sum(), outputs)
    size = inputs.shape[2:]
    maps = torch.zeros(len(inputs), *size, device=inputs.device)
    for output, slope in zip(outputs, slopes, strict=True):
        small = (output.detach() * slope).sum(dim=1, keepdim=True).float()
        maps += interpolate(small, size=size, mode="bilinear").squeeze(1) * (small[0].numel() / maps[0].numel())
    rest = own.detach().float() - maps.sum(dim=(1, 2))
    return maps.add_(rest[:, None, None] / maps[0].numel())


def _indices(classes: object, names: tuple[str, ...]) -> Tensor | None:
    """Return class names or indices as int64 `(N,)`, or `()` of a single one; None for None."""
    if classes is None:
        return None
    given = np.asarray(classes)
    indices = []
    for value in given.ravel().tolist():
        if isinstance(value, str) and value in names:
            indices.append(names.index(value))
        elif given.dtype.kind in "iu" and 0 <= value < len(names):
            indices.append(value)
        else:
            raise ArgumentError(
                f"class {value!r} is unknown: expected one of {', '.join(names[:20])}, or an index below {len(names)}."
            )
    return torch.tensor(indices).reshape(given.shape)


def plot_explanations(
    trainer: Trainer, images: object, classes: object = None, *, num_images: int = 6, ax: Axes | None = None
) -> Figure:
    """Show what speaks for a class in the first images: the places in red over each image as the model sees it.

    The arguments are those of `explain`, without a `DataLoader`. They are drawn on `ax`, or on a new figure.

    Raises:
        ArgumentError: As in `explain`, and when `num_images` is below 1.
        MissingPackageError: When matplotlib is not installed.

    Example:
        >>> import transferkit as tk
        >>> backbone = tk.load_backbone("vgg11", weights=None, image_size=32)
        >>> trainer = tk.Trainer(tk.attach_head(backbone, ["cat", "dog"]), device="cpu")
        >>> figure = plot_explanations(trainer, torch.zeros(2, 3, 48, 64, dtype=torch.uint8), "cat")
        >>> len(figure.axes[0].child_axes)
        2
    """
    source = open_data(images, trainer.model.classes, with_targets=False)
    count = min(whole_number("num_images", num_images), source.num_images or 0)
    resize = trainer.model.backbone.preprocess.resize
    shown = [torch.as_tensor(image).permute(2, 0, 1)[None] for image in read_pixels(source, range(count))]
    seen = torch.cat([resize(image) for image in shown])
    maps, probabilities = explain(trainer, seen, classes), trainer.predict_proba(seen)
    wanted = _indices(classes, trainer.model.classes)
    rows = probabilities.argmax(axis=1) if wanted is None else wanted.expand(count).numpy()
    titles = [f"{trainer.model.classes[row]} {probabilities[index, row]:.2f}" for index, row in enumerate(rows)]
    overlays = [_overlay(image, each) for image, each in zip(seen.permute(0, 2, 3, 1).numpy(), maps, strict=True)]
    return draw_images(overlays, titles, ax=ax)


def _overlay(image: npt.NDArray[np.uint8], places: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return an image in gray, red where places speak for a class and blue where against."""
    strength = (places / max(float(np.abs(places).max()), 1e-12))[..., None]
    color = np.where(strength > 0, np.array([0.85, 0.1, 0.1]), np.array([0.1, 0.3, 0.85]))
    share = 0.75 * np.abs(strength)
    mixed: npt.NDArray[np.float64] = image.mean(axis=2, keepdims=True) / 255 * (1 - share) + color * share
    return mixed


def show_batch(
    data: object, classes: Sequence[str] | None = None, *, num_images: int = 12, ax: Axes | None = None
) -> Figure:
    """Show images drawn from labeled data with the names of their classes, before anything trains.

    The data is as in `Trainer.fit`, but no `DataLoader`. It always shows the same images, on `ax` or on a new figure.
    `classes` are the class names; None takes them from the data.

    Raises:
        ArgumentError: When the classes are not known, or `num_images` is below 1.
        MissingPackageError: When matplotlib is not installed.

    Example:
        >>> images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
        >>> figure = show_batch((images, [0, 1, 1, 0]), ["cat", "dog"], num_images=4)
        >>> sorted(part.get_title() for part in figure.axes[0].child_axes)
        ['cat', 'cat', 'dog', 'dog']
    """
    names = find_classes(data, classes)
    source = open_data(data, names)
    places = shuffled(source.num_images or 0, 0)[: whole_number("num_images", num_images)]
    titles = [names[index] for index in class_indices(source.all_targets(places)).tolist()]
    return draw_images(read_pixels(source, places.tolist()), titles, ax=ax)


def nearest_images(
    trainer: Trainer, data: object, images: object, *, count: int = 5, num_workers: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the training images that are most like each image, for this model.

    Args:
        trainer: Its model's standardized features are compared.
        data: The training images, as in `Trainer.fit`.
        images: As in `Trainer.predict_proba`.
        count: 1 to the number of training images.
        num_workers: Processes that read a `Dataset`.

    Returns:
        Indices in `data`, the nearest first, int64 `(N, count)`, and the cosines of their features, -1 to 1.

    Raises:
        ArgumentError: When `count` is out of range.

    Example:
        >>> import transferkit as tk
        >>> backbone = tk.load_backbone("vgg11", weights=None, image_size=32)
        >>> trainer = tk.Trainer(tk.attach_head(backbone, 2), device="cpu")
        >>> images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        >>> nearest_images(trainer, (images, [0, 1, 0, 1]), images[2:3], count=1)[0]
        array([[2]])
    """
    training, columns = trainer.training, trainer.model.columns or None
    with opened(training, data, None, num_workers) as (network, batches):
        known, _ = head_inputs(network, batches, training=training)
    if whole_number("count", count) > len(known):
        raise ArgumentError(f"count={count} cannot be used: expected 1 to {len(known)}, the number of images.")
    with opened(training, images, None, num_workers, with_targets=False) as (network, batches):
        asked, _ = head_inputs(network, batches, training=training)
    mean, std = moments(Table.of_tensor(known, columns=columns))
    indices, cosines = nearest((known - mean) / std, (asked - mean) / std, count=count)
    return indices.numpy(), cosines.numpy()
