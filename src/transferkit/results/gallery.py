"""Pictures of some images of a source, with a title each."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from transferkit.data.sources import Source
from transferkit.results.figures import Axes, Figure, open_axes


def read_pixels(source: Source, places: Sequence[int]) -> list[Any]:
    """Return the images at some places, `(H, W, 3)`: uint8, or preprocessed ones stretched to 0..1."""
    pixels = []
    for batch, _, _ in source.batches(1, seed=0, order=torch.as_tensor(places)) if len(places) else ():
        image = batch[0]
        if image.is_floating_point():
            low, high = image.aminmax()
            image = (image - low) / (high - low).clamp_min(1e-6)
        pixels.append(image.permute(1, 2, 0).cpu().numpy())
    return pixels


def draw_images(
    images: Sequence[Any], titles: Sequence[str], *, wrong: Sequence[bool] | None = None, ax: Axes | None
) -> Figure:
    """Draw images `(H, W, 3)` in rows of six, each with a title, which is red where something is wrong."""
    columns = max(1, min(len(images), 6))
    rows = max(1, math.ceil(len(images) / columns))
    lines = max((title.count("\n") + 1 for title in titles), default=1)
    ax, figure = open_axes(ax, width=1.6 * columns, height=(1.71 + 0.14 * lines) * rows)
    ax.axis("off")
    for index, (title, pixels) in enumerate(zip(titles, images, strict=True)):
        row, column = divmod(index, columns)
        part = ax.inset_axes((column / columns, 1 - (row + 1) / rows, 0.94 / columns, 0.8 / rows))
        part.imshow(pixels)
        part.set_axis_off()
        part.set_title(title, fontsize=7, color="firebrick" if wrong and wrong[index] else "black")
    return figure
