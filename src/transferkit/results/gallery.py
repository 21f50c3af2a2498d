"""Pictures of some images of a source, with a title each."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transferkit.data.sources import Source
from transferkit.results.figures import open_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WRONG = "firebrick"  # color of the title of what is wrong


def read_pixels(source: Source, places: Sequence[int]) -> list[Any]:
    """Return the images at some places, `(H, W, 3)`: uint8, or preprocessed ones stretched to 0..1."""
    if len(places) == 0:
        return []
    return [_as_picture(batch[0]) for batch, _, _ in source.batches(1, seed=0, order=torch.as_tensor(places))]


def _as_picture(image: Tensor) -> Any:
    if image.is_floating_point():
        low, high = image.aminmax()
        image = (image - low) / (high - low).clamp_min(1e-6)
    return image.permute(1, 2, 0).cpu().numpy()


def draw_images(images: Sequence[Any], titles: Sequence[str], *, colors: Sequence[str], ax: "Axes | None") -> "Figure":
    """Draw images `(H, W, 3)` in rows of six, each with a title in its color.

    Raises:
        MissingPackageError: When matplotlib is not installed.
    """
    columns = max(1, min(len(images), 6))
    rows = max(1, math.ceil(len(images) / columns))
    lines = max((title.count("\n") + 1 for title in titles), default=1)
    ax, figure = open_axes(ax, width=1.6 * columns, height=(1.71 + 0.14 * lines) * rows)
    ax.axis("off")
    for index, (title, color, pixels) in enumerate(zip(titles, colors, images, strict=True)):
        row, column = divmod(index, columns)
        part = ax.inset_axes((column / columns, 1 - (row + 1) / rows, 0.94 / columns, 0.8 / rows))
        part.imshow(pixels)
        part.set_axis_off()
        part.set_title(title, fontsize=7, color=color)
    return figure
