"""Panels in rows and columns with one legend; maps: functions of two coordinates as colours."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fastsmooth.figures.chart import (
    BOLD,
    SIZE,
    SMALL,
    Curve,
    Drawing,
    Panel,
    Path,
    Picture,
    Scale,
    Shape,
    Text,
    draw_panel,
    fitting,
    note,
    shortened,
    spread,
    text_width,
    tick_text,
    ticks,
    y_axis,
    y_numbers,
)

CELL = 215.0  # pixels that a plot is wide
TITLE = 24.0  # above a plot, for its title
DASH = 26.0  # pixels of a line in the legend
BAR = 10.0  # pixels that a colour bar is wide
Axis = tuple[Scale, list[float]]  # without pixels yet, and where its numbers are


@dataclass(frozen=True)
class Map:
    """A function on a square of two coordinates in [low, high].

    `levels`: 0 to 255, row by row from the top; empty where it is not defined. `ends`: its values
    at level 0 and at level 255, which all maps of a row share.
    """

    title: str
    low: float
    high: float
    levels: bytes = b""
    ends: tuple[float, float] = (0.0, 1.0)
    note: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """Rows of panels over one x axis, or rows of maps. `shared`: one y axis for a row's panels."""

    name: str  # of its files
    title: str  # what it shows, in words
    x_title: str
    rows: tuple[tuple[Panel | Map, ...], ...]
    shared: bool = True
    legend: tuple[Curve, ...] = ()  # one for each look of a line, with its label


def draw_grid(grid: Grid) -> Drawing:
    """Lay a grid out: what it shows, the rows, the x axis and the legend, one below the other."""
    axes = [y_axes(row, grid.shared) for row in grid.rows]
    numbered = [axis for row in axes for axis in (row[:1] if grid.shared else row)]
    left = 12 + max(text_width(tick_text(v), SMALL) for _, values in numbered for v in values)
    step = CELL + (14 if grid.shared else left + 4)
    low, high = x_range(grid)
    starts = [left + i * step for i in range(max(map(len, grid.rows)))]
    xs = [Scale(low, high, start, start + CELL) for start in starts]
    x_numbers = fitting(low, high, False, (), xs[0])
    width = xs[-1].end + 12 + max(bar_room(row) for row in grid.rows)
    width = max(width, left + text_width(grid.title, SIZE) + 8)
    shapes: list[Shape] = [Text(left, 15, grid.title, "ink", size=SIZE)]
    top = 20.0
    for row, row_axes in zip(grid.rows, axes, strict=True):
        top += TITLE
        height = max(cell.height if isinstance(cell, Panel) else CELL for cell in row)
        for i, (cell, (scale, values)) in enumerate(zip(row, row_axes, strict=True)):
            y = replace(scale, start=top + height, end=top)
            title = shortened(cell.title, CELL / BOLD, SMALL)
            shapes.append(Text(xs[i].start, top - 7, title, "ink", bold=True))
            own = i == 0 or not grid.shared
            if isinstance(cell, Map):
                shapes += draw_map(cell, xs[i], y, values if own else [])
            else:
                shapes += draw_panel(cell, xs[i], y, x_numbers, values, lambda curve: "", own)
        shapes += color_bar(row, xs[len(row) - 1].end + 14, top)
        top += height
    top += 16
    shapes += [Text(x(v), top, tick_text(v), anchor="middle") for x in xs for v in x_numbers]
    top += 18
    middle = (xs[0].start + xs[-1].end) / 2
    shapes.append(Text(middle, top, grid.x_title, "ink", "middle", SIZE))
    named = legend(grid.legend, top + 20, xs[0].start, xs[-1].end)
    bottom = max([top, *(shape.y for shape in named if isinstance(shape, Text))])
    return Drawing(width, math.ceil(bottom + 8), grid.title, shapes + named)


def x_range(grid: Grid) -> tuple[float, float]:
    first = grid.rows[0][0]
    if isinstance(first, Map):
        return first.low, first.high
    panels = [cell for row in grid.rows for cell in row if isinstance(cell, Panel)]
    return spread([x for p in panels for c in p.curves for x, _ in c.values()], False, 0)


def y_axes(row: tuple[Panel | Map, ...], shared: bool) -> list[Axis]:
    """The y axis of every cell."""
    panels = [cell for cell in row if isinstance(cell, Panel)]
    if panels and shared:
        joined = tuple(curve for panel in panels for curve in panel.curves)
        return [y_axis(replace(panels[0], curves=joined))] * len(row)
    return [y_axis(cell) if isinstance(cell, Panel) else map_axis(cell) for cell in row]


def map_axis(cell: Map) -> Axis:
    return Scale(cell.low, cell.high, 0, 1), ticks(cell.low, cell.high, False, 5)


def draw_map(cell: Map, x: Scale, y: Scale, numbers: list[float]) -> list[Shape]:
    """Colours in a frame, with numbers at the y axis, and the note."""
    shapes: list[Shape] = []
    if cell.levels:
        columns = math.isqrt(len(cell.levels))
        size = x.end - x.start, y.start - y.end
        shapes.append(Picture(x.start, y.end, *size, columns, cell.levels))
    corners = ((x.start, y.start), (x.end, y.start), (x.end, y.end), (x.start, y.end))
    shapes.append(Path((*corners, corners[0]), "axis"))
    return shapes + y_numbers(x, y, numbers) + note(cell.note, x, y)


def ends_of(row: tuple[Panel | Map, ...]) -> tuple[float, float] | None:
    """The values at the ends of a row's colour bar; None for a row without colours."""
    return next((cell.ends for cell in row if isinstance(cell, Map) and cell.levels), None)


def bar_numbers(low: float, high: float) -> list[float]:
    return ticks(low, high, False, 5) if low < high else [low]


def bar_room(row: tuple[Panel | Map, ...]) -> float:
    """Pixels that the colour bar of a row takes."""
    ends = ends_of(row)
    if ends is None:
        return 0.0
    return 14 + BAR + max(text_width(tick_text(v), SMALL) for v in bar_numbers(*ends))


def color_bar(row: tuple[Panel | Map, ...], left: float, top: float) -> list[Shape]:
    """The ramp beside a row of maps, with numbers."""
    ends = ends_of(row)
    if ends is None:
        return []
    low, high = ends
    y = Scale(low, high, top + CELL, top) if low < high else lambda value: top + CELL / 2
    shapes: list[Shape] = [Picture(left, top, BAR, CELL, 1, bytes(range(255, -1, -1)))]
    return shapes + [Text(left + BAR + 6, y(v) + 4, tick_text(v)) for v in bar_numbers(low, high)]


def legend(looks: tuple[Curve, ...], top: float, left: float, right: float) -> list[Shape]:
    """A piece of line and a label for each look, in as many rows as they need, centred."""
    rows: list[list[Curve]] = [[]]
    for look in looks:
        if rows[-1] and legend_width([*rows[-1], look]) > right - left:
            rows.append([])
        rows[-1].append(look)
    shapes: list[Shape] = []
    for i, row in enumerate(rows):
        x, y = (left + right - legend_width(row)) / 2, top + 18 * i
        for look in row:
            line = (x, y - 4), (x + DASH, y - 4)
            shapes.append(Path(line, look.color, width=look.width, dash=look.dash))
            shapes.append(Text(x + DASH + 6, y, look.label, "ink"))
            x += legend_width([look]) + 20
    return shapes


def legend_width(looks: list[Curve]) -> float:
    gaps = 20 * (len(looks) - 1)
    return gaps + sum(DASH + 6 + text_width(look.label, SMALL) for look in looks)
