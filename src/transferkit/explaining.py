"""Why a model says what it says: where it looks, and which training images are most like an image."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transferkit.analysis.maps import activation_maps
from transferkit.analysis.outliers import nearest
from transferkit.base.arguments import whole_number
from transferkit.base.processes import alone
from transferkit.base.randomness import shuffled
from transferkit.data.classes import find_classes
from transferkit.data.open import open_data
from transferkit.data.targets import class_indices
from transferkit.errors import ArgumentError
from transferkit.results.gallery import draw_images, plot_images, read_pixels
from transferkit.trainer import Trainer
from transferkit.training.evaluation import head_inputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def explain(
    trainer: Trainer, images: object, classes: object = None, *, batch_size: int | None = None, num_workers: int = 0
) -> npt.NDArray[np.float32]:
    """Return how much each place of an image speaks for a class, float32 `(N, image_size, image_size)`.

    The numbers of a map sum to the class's logit: positive where the image speaks for it, negative where against. With
    a linear head, as `attach_head` makes it, each place has exactly its part. With hidden layers the parts hold for
    small changes; see `transferkit.analysis.maps.activation_maps`.

    Args:
        trainer: Whose model is asked.
        images: As in `Trainer.predict_proba`. The maps lie over what the model sees: the middle square, resized.
        classes: A class name or index for each image, or one for all; None takes each image's most probable class.
        batch_size: 32 if None.
        num_workers: Processes that read a `Dataset`.

    Raises:
        ArgumentError: When a class is unknown, or there are not as many as images.
        ImageError: As in `Trainer.predict_proba`.

    Example:
        >>> import transferkit as tk
        >>> backbone = tk.load_backbone("vgg11", weights=None, image_size=32)
        >>> trainer = tk.Trainer(tk.attach_head(backbone, ["cat", "dog"]), device="cpu")
        >>> explain(trainer, torch.zeros(2, 3, 48, 64, dtype=torch.uint8), "cat").shape
        (2, 32, 32)
    """
    wanted = _indices(classes, trainer.model.classes)
    maps: list[Tensor] = []
    model, seen = trainer.model, 0
    with alone(), trainer._passing(images, batch_size, num_workers, with_targets=False) as (_, batches):
        for inputs, _ in batches:
            with torch.no_grad(), trainer.device.autocast():
                indices = model(inputs).argmax(dim=1)
            if isinstance(wanted, int):
                indices = torch.full_like(indices, wanted)
            elif wanted is not None:
                indices = torch.as_tensor(wanted[seen : seen + len(inputs)], device=indices.device)
            seen += len(inputs)
            if len(indices) != len(inputs):
                break
            with trainer.device.autocast():
                maps.append(activation_maps(model, inputs, indices).cpu())
    if isinstance(wanted, list) and seen != len(wanted):
        raise ArgumentError(f"{len(wanted)} classes for another number of images: expected one for each image.")
    return torch.cat(maps).numpy()


def _indices(classes: object, names: tuple[str, ...]) -> int | list[int] | None:
    if classes is None:
        return None
    if isinstance(classes, list | tuple | np.ndarray | Tensor):
        return [_index(each, names) for each in np.asarray(classes).tolist()]
    return _index(classes, names)


def _index(value: Any, names: tuple[str, ...]) -> int:
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, int | np.integer) and 0 <= value < len(names):
        return int(value)
    raise ArgumentError(
        f"class {value!r} is unknown: expected one of {', '.join(names[:20])}, or an index below {len(names)}."
    )


def plot_explanations(
    trainer: Trainer, images: object, classes: object = None, *, num_images: int = 6, ax: "Axes | None" = None
) -> "Figure":
    """Show what speaks for a class: the places in red over each image as the model sees it.

    Args:
        trainer: As in `explain`.
        images: As in `explain`, but no `DataLoader`; the first `num_images` are shown.
        classes: As in `explain`.
        num_images: 1 or more.
        ax: Where to draw; None makes a figure.

    Raises:
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
    shown = [torch.as_tensor(pixels) for pixels in read_pixels(source, range(count))]
    preprocess = trainer.model.backbone.preprocess
    seen = [preprocess.resize(pixels.permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy() for pixels in shown]
    pixels = torch.stack([torch.as_tensor(each).permute(2, 0, 1) for each in seen])
    maps = explain(trainer, pixels, classes)
    probabilities = trainer.predict_proba(pixels)
    wanted = _indices(classes, trainer.model.classes)
    rows = probabilities.argmax(axis=1) if wanted is None else np.broadcast_to(np.asarray(wanted), count)
    titles = [f"{trainer.model.classes[row]} {probabilities[index, row]:.2f}" for index, row in enumerate(rows)]
    overlays = [_overlay(image, one) for image, one in zip(seen, maps, strict=True)]
    return draw_images(overlays, titles, colors=["black"] * count, ax=ax)


def show_batch(
    data: object, classes: Sequence[str] | None = None, *, num_images: int = 12, ax: "Axes | None" = None
) -> "Figure":
    """Show images drawn from labelled data with the names of their classes, before anything trains.

    Args:
        data: As in `Trainer.fit`, but no `DataLoader`. Its images are drawn at random, always the same.
        classes: The class names; None takes them from the data.
        num_images: 1 or more.
        ax: Where to draw; None makes a figure.

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
    names = [str(name) for name in (range(names) if isinstance(names, int) else names)]
    source = open_data(data, names)
    places = shuffled(source.num_images or 0, 0)[: whole_number("num_images", num_images)]
    titles = [names[index] for index in class_indices(source.all_targets(places)).tolist()]
    return plot_images(source, places.tolist(), titles, colors=["black"] * len(titles), ax=ax)


def _overlay(image: npt.NDArray[np.uint8], places: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return an image in gray, red where places speak for a class and blue where against."""
    gray = image.mean(axis=2, keepdims=True) / 255 * np.ones(3)
    strength = np.clip(places / max(float(np.abs(places).max()), 1e-12), -1, 1)[..., None]
    color = np.where(strength > 0, np.array([0.85, 0.1, 0.1]), np.array([0.1, 0.3, 0.85]))
    share = 0.75 * np.abs(strength)
    mixed: npt.NDArray[np.float64] = gray * (1 - share) + color * share
    return mixed


def nearest_images(
    trainer: Trainer, data: object, images: object, *, count: int = 5, num_workers: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the training images that are most like each image, for this model.

    Args:
        trainer: By whose features images are compared, standardised.
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
    with trainer._passing(data, None, num_workers) as (network, batches):
        known, _ = head_inputs(network, batches, training=trainer._training)
    if whole_number("count", count) > len(known):
        raise ArgumentError(f"count={count} cannot be used: expected 1 to {len(known)}, the number of images.")
    with trainer._passing(images, None, num_workers, with_targets=False) as (network, batches):
        asked, _ = head_inputs(network, batches, training=trainer._training)
    mean, std = known.mean(dim=0), known.std(dim=0, correction=0)
    std = std.clamp_min(std.median().clamp_min(1e-12))
    indices, cosines = nearest((known - mean) / std, (asked - mean) / std, count=count)
    return indices.numpy(), cosines.numpy()
