"""matplotlib figures without pyplot, which would keep every figure in the process.

matplotlib is optional and imported when a figure is made.
"""

import io
import warnings
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import override

from transferkit.base.display import in_notebook, shell
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

        shown = False

        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png", bbox_inches="tight", dpi=80)
            return picture.getvalue()

        def _ipython_display_(self) -> None:
            from IPython.display import display

            self.shown = True
            picture = {"image/png": self._repr_png_(), "text/plain": repr(self)}
            display(picture, raw=True)

        @override
        def show(self, warn: bool = True) -> None:
            if in_notebook():
                self._ipython_display_()
            elif warn:
                warnings.warn("a figure has no window here: write figure.savefig('figure.png').", stacklevel=2)

    figure = ShownFigure(figsize=(width, height), layout="constrained")
    if in_notebook():
        _show_after_cell(figure)
    return figure.add_subplot(), figure


def _show_after_cell(figure: Any) -> None:
    """Show a figure when the cell has run, unless it was shown: the last line of a cell alone would be."""
    events = shell().events

    def show() -> None:
        events.unregister("post_execute", show)
        if not figure.shown:
            figure.show()

    events.register("post_execute", show)
