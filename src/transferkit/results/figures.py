"""matplotlib figures without pyplot, which would keep every figure in the process.

matplotlib is optional and imported when a figure is made.
"""

import io
from typing import TYPE_CHECKING, cast

from transferkit.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def open_axes(ax: "Axes | None", *, width: float, height: float) -> "tuple[Axes, Figure]":
    """Return the axes to draw on and their figure, a new one if there are none."""
    if ax is not None:
        return ax, cast("Figure", ax.get_figure(root=True))
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "plots need the package matplotlib, which is not installed. From a clone: pip install '.[notebook]'."
        ) from error

    class ShownFigure(Figure):
        """A figure that a notebook shows although pyplot does not know it."""

        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png", bbox_inches="tight", dpi=80)
            return picture.getvalue()

    figure = ShownFigure(figsize=(width, height), layout="constrained")
    return figure.add_subplot(), figure
