"""A line chart as SVG, without matplotlib."""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 428, 28, 220  # of the area between the axes
LEGEND = 110  # width of an entry


def chart(series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str) -> str:
    """Return lines through points as an SVG element; style sheets colour the lines by their classes `s0`, `s1`, ...

    Args:
        series: Points of each line, by the line's name; those that are not finite are left out.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.

    Example:
        >>> chart({"training": [(1, 0.5), (2, 0.25)]}, x="epoch", y="loss").count("<circle")
        2
    """
    lines = [[point for point in points if all(map(math.isfinite, point))] for points in series.values()]
    columns, rows = (_ticks([point[axis] for points in lines for point in points]) for axis in (0, 1))

    def place(point: tuple[float, float]) -> tuple[str, str]:
        across, up = (
            np.interp(point[0], columns[[0, -1]], [LEFT, RIGHT]),
            np.interp(point[1], rows[[0, -1]], [BOTTOM, TOP]),
        )
        return f"{across:.1f}", f"{up:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(f"{y} by {x}")}">']
    for value in rows:
        up = place((columns[0], value))[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{up}" y2="{up}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{up}" dy="4" text-anchor="end">{value:.4g}</text>')
    for value in columns:
        across = place((value, rows[0]))[0]
        parts.append(f'<text x="{across}" y="{BOTTOM + 18}" text-anchor="middle">{value:.4g}</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x)}</text>')
    parts.append(f'<text x="4" y="14">{html.escape(y)}</text>')
    for number, (name, points) in enumerate(zip(series, lines, strict=True)):
        places = [place(point) for point in points]
        line = " ".join(",".join(each) for each in places)
        dots = "".join(f'<circle cx="{across}" cy="{up}" r="3"/>' for across, up in places)
        end = RIGHT - LEGEND * (len(lines) - 1 - number)
        label = f'<text x="{end}" y="14" text-anchor="end">{html.escape(name)}</text>'
        parts.append(f'<g class="s{number}"><polyline points="{line}"/>{dots}{label}</g>')
    return "".join([*parts, "</svg>"])


def _ticks(values: Sequence[float]) -> npt.NDArray[np.floating]:
    """Return round numbers, two or more, from below the least value to above the largest."""
    low, high = min(values), max(values)
    rough = max((high - low) / 5, 1e-6 * abs(high), 1e-9)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    if all(value == int(value) for value in values):
        step = max(step, 1.0)
    first = math.floor(low / step + 1e-9)
    return step * np.arange(first, max(math.ceil(high / step - 1e-9), first + 1) + 1)
