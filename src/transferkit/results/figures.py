"""matplotlib figures without pyplot, which would keep every figure in the process."""

import io
import warnings
from typing import TYPE_CHECKING, cast

from typing_extensions import override

from transferkit.base.display import in_notebook, shell
from transferkit.errors import MissingPackageError

__all__ = ["Axes", "Figure", "open_axes"]

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # names for annotations: matplotlib is optional, and imported when a figure is made
    Axes, Figure = (type(name, (), {"__module__": "matplotlib"}) for name in ("Axes", "Figure"))


def open_axes(ax: Axes | None, *, width: float, height: float) -> tuple[Axes, Figure]:
    """Return the axes to draw on and their figure, a new one if there are none."""
    if ax is not None:
        return ax, cast("Figure", ax.get_figure(root=True))
    try:
        from matplotlib.figure import Figure as PlainFigure
    except ImportError as error:
        raise MissingPackageError(
            "plots need the package matplotlib, which is not installed. From a clone: pip install '.[notebook]'."
        ) from error

    class ShownFigure(PlainFigure):
        """A figure that a notebook shows although pyplot does not know it."""

        shown = False

        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png", bbox_inches="tight", dpi=80)
            return picture.getvalue()

        def _ipython_display_(self) -> None:
            from IPython.display import display

            self.shown = True
            display({"image/png": self._repr_png_(), "text/plain": repr(self)}, raw=True)

        @override
        def show(self, warn: bool = True) -> None:
            if in_notebook():
                self._ipython_display_()
            elif warn:
                warnings.warn("a figure has no window here: write figure.savefig('figure.png').", stacklevel=2)

    figure = ShownFigure(figsize=(width, height), layout="constrained")
    if in_notebook():
        events = shell().events

        def show_once() -> None:  # when the cell has run: its last line alone would be shown without this
            events.unregister("post_execute", show_once)
            if not figure.shown:
                figure.show()

        events.register("post_execute", show_once)
    return figure.add_subplot(), figure
