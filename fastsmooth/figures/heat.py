"""Heat maps: one number of many things over time, a row each, as colours on a logarithmic scale."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import pairwise

from fastsmooth.figures.chart import (
    SIZE,
    SMALL,
    Drawing,
    Path,
    Picture,
    Scale,
    Shape,
    Text,
    fitting,
    shortened,
    spread,
    text_width,
    tick_text,
    ticks,
)

COLUMNS = 240  # in which time is divided
ROW = 16.0  # pixels of a row,
LOW, TALL = 96.0, 480.0  # but a map is so high at least and, with a pixel a row, at most
NUMBER = 40.0  # pixels from one number of the scale to the next, about
NAME = 13.0  # pixels from one name to the next, at the least
BAR = 10.0  # pixels that the colour bar is wide
LEVELS = 255  # of the ramp, above its lowest


@dataclass(frozen=True)
class Row:
    """One thing's values at the map's times: where one is no number above 0 its colour is that of
    the paper. `tip` is shown when pointed at."""

    name: str
    values: tuple[float | None, ...]
    tip: str = ""


@dataclass(frozen=True)
class HeatMap:
    """Rows from the top, over times that ascend. A value holds until the next time, the last one as
    long as the one before it did."""

    name: str  # of its files
    title: str  # what it shows, in words
    value: str  # what a colour stands for, and its unit
    x_title: str
    times: tuple[float, ...]
    rows: tuple[Row, ...]
    ends: tuple[float, float]  # the values of the lowest and the highest colour, both above 0
    heading: str = ""  # above the map: what tells it from its like

    @property
    def span(self) -> tuple[float, float]:
        """The first time, and where the last value ends."""
        last = self.times[-1] - self.times[-2] if len(self.times) > 1 else 1.0
        return self.times[0], self.times[-1] + last


def draw_heat(heat: HeatMap, width: float) -> Drawing:
    """Lay a map out, with names at its left and the colours' scale at its right."""
    low, high = spread(heat.ends, True, 0)
    count = len(heat.rows)
    height = max(LOW, min(ROW * count, max(TALL, float(count))))
    numbers = ticks(low, high, True, int(height / NUMBER))
    right = 14 + BAR + 6 + max(text_width(tick_text(v), SMALL) for v in numbers)
    names = [ending(row.name, width / 3, SMALL) for row in heat.rows]
    left = 8 + max(text_width(name, SMALL) for name in names)
    shapes: list[Shape] = []
    top = 4.0
    if heat.heading:
        top += 18
        shapes.append(Text(0, top - 5, shortened(heat.heading, width, SIZE), size=SIZE))
    top += 22
    title = shortened(heat.value, width / 1.1, SIZE)
    shapes.append(Text(0, top - 10, title, "ink", size=SIZE, bold=True))
    x = Scale(*heat.span, left, width - right)
    y = Scale(0, count, top, top + height)
    scale = Scale(low, high, 0, LEVELS, log=True)
    shapes += cells(heat, x, y, scale)
    every = math.ceil(NAME / (height / count))
    for i in range(0, count, every):
        shapes.append(Text(left - 6, y(i + 0.5) + 4, names[i], anchor="end"))
    bar = replace(scale, start=top + height, end=top)
    at = width - right + 14
    shapes.append(Picture(at, top, BAR, height, 1, bytes(range(LEVELS, -1, -1))))
    shapes += [Text(at + BAR + 6, bar(v) + 4, tick_text(v)) for v in numbers]
    top += height + 14
    for v in fitting(*heat.span, False, (), x):
        half = text_width(tick_text(v), SMALL) / 2
        shapes.append(Text(min(x(v), width - half), top, tick_text(v), anchor="middle"))
    middle = (x.start + x.end) / 2
    shapes.append(Text(middle, top + 19, heat.x_title, "ink", "middle", SIZE))
    return Drawing(width, math.ceil(top + 28), heat.title, shapes)


def ending(text: str, room: float, size: float) -> str:
    """The text, or an ellipsis and its end, which tells one layer from another, in `room` pixels or
    less."""
    if text_width(text, size) <= room:
        return text
    while text and text_width("…" + text, size) > room:
        text = text[1:]
    return "…" + text


def cells(heat: HeatMap, x: Scale, y: Scale, scale: Scale) -> list[Shape]:
    """The colours, paper over what has none, a frame, and the rows' tips."""
    levels, blank, tips = bytearray(), list[Shape](), list[Shape]()
    column = Scale(0, COLUMNS, x.start, x.end)
    for i, row in enumerate(heat.rows):
        colors = [None if v is None else level(scale(v)) for v in in_columns(heat, row)]
        levels += bytes(color or 0 for color in colors)
        for first, last in gaps(colors):
            blank.append(box(column(first), y(i), column(last), y(i + 1), 1.0))
        if row.tip:
            tips.append(box(x.start, y(i), x.end, y(i + 1), 0.0, row.tip))
    size = x.end - x.start, y.end - y.start
    frame = box(x.start, y.start, x.end, y.end, 1.0)
    return [
        Picture(x.start, y.start, *size, COLUMNS, bytes(levels)),
        *blank,
        Path((*frame.points, frame.points[0]), "axis"),
        *tips,
    ]


def level(at: float) -> int:
    """Of the ramp; a value beyond the scale has the colour of its end."""
    return min(max(round(at), 0), LEVELS)


def in_columns(heat: HeatMap, row: Row) -> list[float | None]:
    """The value of each of COLUMNS equal parts of the time: the mean of those that begin in it, or
    else the one that holds; None where there is none above 0."""
    start, end = heat.span
    edges = [start + (end - start) * i / COLUMNS for i in range(COLUMNS + 1)]
    # times that are at an edge but for a rounding belong to the column that begins there
    slack = 1e-9 * (end - start)
    until = [bisect_right(heat.times, edge - slack) for edge in edges]
    values: list[float | None] = []
    for first, last in pairwise(until):
        within = row.values[min(first, max(last - 1, 0)) : last]
        known = [v for v in within if v is not None and v > 0]
        values.append(math.fsum(known) / len(known) if known else None)
    return values


def gaps(colors: list[int | None]) -> list[tuple[int, int]]:
    """(first, behind the last) of each stretch without a colour."""
    found: list[tuple[int, int]] = []
    for i, color in enumerate(colors):
        if color is None and found and found[-1][1] == i:
            found[-1] = (found[-1][0], i + 1)
        elif color is None:
            found.append((i, i + 1))
    return found


def box(
    left: float, top: float, right: float, bottom: float, opacity: float, tip: str = ""
) -> Path:
    corners = ((left, top), (right, top), (right, bottom), (left, bottom))
    return Path(corners, fill="paper", opacity=opacity, tip=tip)
