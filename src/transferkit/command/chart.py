"""A line chart as SVG, without matplotlib."""

import html
import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

LEFT, RIGHT, TOP, BOTTOM = 52, 428, 28, 220  # of the area between the axes, in a picture of 440 by 260
LEGEND = 110  # width of an entry


def chart(series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str) -> str:
    """Return lines through finite points as an SVG element, in the colors of a style sheet's classes `s0`, `s1`, ...

    Example:
        >>> chart({"training": [(1, 0.5), (2, 0.25)]}, x="epoch", y="loss").count("<circle")
        2
    """
    lines = [[point for point in points if all(map(math.isfinite, point))] for points in series.values()]
    columns, rows = (_ticks([point[axis] for points in lines for point in points]) for axis in (0, 1))
    across = partial(np.interp, xp=columns[[0, -1]], fp=[LEFT, RIGHT])
    up = partial(np.interp, xp=rows[[0, -1]], fp=[BOTTOM, TOP])
    drawn = "".join(
        f'<path class="grid" d="M{LEFT} {up(row):.1f}H{RIGHT}"/>'
        f'<text x="{LEFT - 8}" y="{up(row):.1f}" dy="4" text-anchor="end">{row:.4g}</text>'
        for row in rows
    )
    for column in columns:
        drawn += f'<text x="{across(column):.1f}" y="{BOTTOM + 18}" text-anchor="middle">{column:.4g}</text>'
    for number, (name, points) in enumerate(zip(series, lines, strict=True)):
        places = [(f"{across(column):.1f}", f"{up(row):.1f}") for column, row in points]
        dots = "".join(f'<circle cx="{column}" cy="{row}" r="3"/>' for column, row in places)
        end = RIGHT - LEGEND * (len(lines) - 1 - number)
        label = f'<text x="{end}" y="14" text-anchor="end">{html.escape(name)}</text>'
        drawn += f'<g class="s{number}"><polyline points="{" ".join(map(",".join, places))}"/>{dots}{label}</g>'
    x, y = html.escape(x), html.escape(y)
    names = f'<text x="{(LEFT + RIGHT) / 2}" y="256" text-anchor="middle">{x}</text><text x="4" y="14">{y}</text>'
    return f'<svg viewBox="0 0 440 260" role="img" aria-label="{y} by {x}">{drawn}{names}</svg>'


def _ticks(values: Sequence[float]) -> npt.NDArray[np.floating]:
    """Return round numbers, two or more, from below the least value to above the largest."""
    low, high = min(values), max(values)
    rough = max((high - low) / 5, 1e-6 * abs(high), 1e-9)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    step = max(step, 1.0) if all(value == int(value) for value in values) else step
    first = math.floor(low / step + 1e-9)
    return step * np.arange(first, max(math.ceil(high / step - 1e-9), first + 1) + 1)
