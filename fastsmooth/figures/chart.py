"""Charts: panels with a shared x axis, laid out as plain shapes, which become SVG or PDF.

One layout serves every output, so that a figure says the same on the page, in its SVG file and in
its PDF. Text is laid out by the widths of a wide typeface (DejaVu Sans) and so has room in any
other. Coordinates are pixels, y pointing down.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

# Colours of light and of dark backgrounds: of paper and ink, of up to 8 unordered series, of up to
# 13 ordered ones (OKLCH ramps in lightness and hue). All have a contrast of 4.5 to their paper,
# since labels are written in them; neighbours differ in lightness too, and every series is named
# where it ends, so that no colour has to be told from another.
PAPER = {
    "paper": ("#ffffff", "#15181c"),
    "ink": ("#1c2024", "#e7e9ec"),
    "muted": ("#5b636d", "#a3abb5"),
}
PAPER |= {
    "axis": ("#9aa1aa", "#6a727c"),
    "grid": ("#e6e8ec", "#2b3036"),
    "faint": ("#c9ced5", "#474e57"),
}
PAPER |= {"panel": ("#f6f7f9", "#1d2126"), "warning": ("#a8480a", "#ffb07a")}
UNORDERED = (
    ("#0072b2", "#4da9e8"), ("#c94a00", "#ff8a47"), ("#008060", "#2fc79a"), ("#b03a87", "#e07fc0"),
    ("#1d3272", "#c3d6ff"), ("#6a4a00", "#f3d36b"), ("#5c1f66", "#a58bff"), ("#666666", "#a8a8a8"),
)  # fmt: skip
ORDERED = (
    ("#44206f", "#9372c8"), ("#32307e", "#8081d9"), ("#0e3f84", "#6991e2"), ("#004e82", "#4da1e3"),
    ("#005b78", "#29afdd"),
    ("#006568", "#00bcd1"), ("#006c54", "#1fc7bf"), ("#07703d", "#4eceab"), ("#477124", "#78d396"),
    ("#6a6f02", "#a0d483"),
    ("#876b00", "#c4d474"), ("#9a6516", "#e5d270"), ("#a85e33", "#ffcf77"),
)  # fmt: skip
COLORS = (
    PAPER
    | {f"c{i}": pair for i, pair in enumerate(UNORDERED)}
    | {f"o{i}": pair for i, pair in enumerate(ORDERED)}
)
# The ramp of maps, evenly spaced in lightness: viridis, CC0, every ninth of it.
HEAT = (
    "#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58",
    "#b5de2b", "#fde725",
)  # fmt: skip
SIZE, SMALL = 12.5, 11  # of text
BOLD = 1.1  # times as wide
LINE = 13.5  # from one label to the next
# How far a line's simplification may be off, in pixels, and the points it may have: on a page of
# many figures, and in a fine panel, whose bends are not seen.
COARSE, FINE = (0.15, 240), (0.04, 1200)


def ordered_colors(count: int) -> list[str]:
    """Names of `count` colours of a ramp, as far apart as it allows."""
    return [f"o{round(i * (len(ORDERED) - 1) / max(count - 1, 1))}" for i in range(count)]


def unordered_color(index: int) -> str:
    return f"c{index % len(UNORDERED)}"


@dataclass(frozen=True)
class Mark:
    """A symbol at a point: dot, ring, circle (a large ring around another mark), square,
    open-square or cross."""

    x: float
    y: float
    shape: str = "dot"
    tip: str = ""  # shown when pointed at


@dataclass(frozen=True)
class Curve:
    """A series: a line, a band and bars of (x, low, high), marks, and the name that is written
    where it ends."""

    color: str
    line: tuple[tuple[float, float], ...] = ()
    band: tuple[tuple[float, float, float], ...] = ()
    bars: tuple[tuple[float, float, float], ...] = ()
    marks: tuple[Mark, ...] = ()
    label: str = ""
    key: str = ""  # stands for a label that has no room
    width: float = 1.8
    dash: str = ""

    def values(self) -> list[tuple[float, float]]:
        """Every (x, y) that an axis has to hold."""
        spans = [(x, y) for x, low, high in (*self.band, *self.bars) for y in (low, high)]
        return [*self.line, *spans, *((m.x, m.y) for m in self.marks)]


@dataclass(frozen=True)
class Panel:
    """One plot. `title` says what y is and its unit; `strip` is low, with two ticks."""

    title: str
    curves: tuple[Curve, ...]
    log: bool = False
    height: float = 190
    strip: bool = False
    floor: float | None = None  # where the y axis begins; lines below it are cut off
    ticks: tuple[float, ...] = ()
    note: tuple[str, ...] = ()  # lines written over the plot
    fine: bool = False  # lines are drawn to more than the eye sees


@dataclass(frozen=True)
class Figure:
    """Panels one above the other over one x axis, and in words what they show."""

    name: str  # of its files
    title: str
    x_title: str
    panels: tuple[Panel, ...]
    caption: str = ""
    x_log: bool = False
    x_ticks: tuple[float, ...] = ()  # else round numbers
    heading: str = ""  # above the panels: what tells the figure from its like


@dataclass(frozen=True)
class Path:
    """Straight lines through points; `fill` closes it."""

    points: tuple[tuple[float, float], ...]
    stroke: str = ""
    fill: str = ""
    width: float = 1.0
    dash: str = ""
    opacity: float = 1.0
    tip: str = ""


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    radius: float
    stroke: str = ""
    fill: str = ""
    width: float = 1.0
    tip: str = ""


@dataclass(frozen=True)
class Text:
    x: float
    y: float  # of the base line
    text: str
    color: str = "muted"
    anchor: str = "start"
    size: float = SMALL
    bold: bool = False


@dataclass(frozen=True)
class Picture:
    """Colours in a rectangle: `levels` 0 to 255 of the ramp, row by row from the top."""

    x: float
    y: float
    width: float
    height: float
    columns: int
    levels: bytes


Shape = Path | Dot | Text | Picture


@dataclass(frozen=True)
class Drawing:
    width: float
    height: float
    title: str
    shapes: list[Shape] = field(default_factory=list)


def ramp() -> bytes:
    """Red, green and blue of the 256 levels of a Picture."""
    ends = [tuple(bytes.fromhex(color[1:])) for color in HEAT]
    colors = []
    for level in range(256):
        below, share = divmod(level * (len(ends) - 1), 255)
        low, high = ends[below], ends[min(below + 1, len(ends) - 1)]
        colors += [round(a + (b - a) * share / 255) for a, b in zip(low, high, strict=True)]
    return bytes(colors)


def text_width(text: str, size: float) -> float:
    """Pixels, at most, in any common sans serif typeface."""
    return size * sum(map(letter_width, text))


def letter_width(letter: str) -> float:
    if letter in "ijl.,:;'|!()[]ftrI ⁻¹²":
        return 0.42
    if letter in "mwMW@%≤≥=+−~" or unicodedata.east_asian_width(letter) in "WF":
        return 1.02
    return 0.76 if letter.isupper() else 0.65


def shortened(text: str, room: float, size: float) -> str:
    """The text, or its beginning and an ellipsis, in at most `room` pixels."""
    if text_width(text, size) <= room:
        return text
    while text and text_width(text + "…", size) > room:
        text = text[:-1]
    return text.rstrip(" ,") + "…"


@dataclass(frozen=True)
class Scale:
    """From a value in [low, high] to a pixel."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(value) if self.log else value
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def spread(values: Iterable[float], log: bool, margin: float) -> tuple[float, float]:
    """The range of an axis that holds the values with some margin, a share of the range."""
    values = list(values)
    low, high = (min(values), max(values)) if values else ((1.0, 10.0) if log else (0.0, 1.0))
    if log:
        pad = math.exp(margin * math.log(high / low)) if high / low > 1 + 1e-9 else 2.0
        return low / pad, high * pad
    pad = (
        margin * (high - low)
        if high - low > 1e-12 * max(abs(low), abs(high))
        else (abs(high) * 0.1 or 1.0)
    )
    return low - pad, high + pad


def ticks(low: float, high: float, log: bool, most: int) -> list[float]:
    """Round numbers in [low, high], `most` or fewer where that leaves two."""
    if log and high / low >= 8:
        return log_ticks(low, high, most)
    raw = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    steps = [power * m for m in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20)]
    at = next(i for i, step in enumerate(steps) if step >= raw * (1 - 1e-9))
    while len(values := multiples(steps[at], low, high)) < 2:
        at -= 1
    return values


def multiples(step: float, low: float, high: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten; 1, 2 and 5 times those where there is room."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        values = [
            float(f"{m}e{d}") for d in decades for m in factors if low <= float(f"{m}e{d}") <= high
        ]
        if len(values) <= max(most, 2):
            return values
    return values[:: math.ceil(len(values) / max(most, 2))]


def tick_text(value: float) -> str:
    """0.001, 250, 10k, 1.5M, 10⁻⁵, with a true minus sign."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e9):
        mantissa, exponent = f"{value:.2e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".").replace("-", "−")
        power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return power if mantissa == "1" else f"{mantissa}×{power}"
    for limit, letter in ((1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e6 if letter == 'M' else 1e3):.4g}{letter}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def fitting(
    low: float, high: float, log: bool, wanted: tuple[float, ...], place: Callable[[float], float]
) -> list:
    """Ticks of the x axis whose labels do not touch; of wanted ones every second, third, ..."""
    every, most = 1, 8
    while True:
        inside = (
            [v for v in wanted if low <= v <= high][::every]
            if wanted
            else ticks(low, high, log, most)
        )
        ends = [(place(v), text_width(tick_text(v), SMALL) / 2) for v in inside]
        apart = all(b - wb - (a + wa) >= 8 for (a, wa), (b, wb) in pairwise(ends))
        if apart or len(inside) < 3 or (most < 1 and not wanted):
            return inside if apart else inside[:1]
        every, most = every + 1, most - 1


def draw(figure: Figure, width: float, label_room: float, legend: bool = False) -> Drawing:
    """Lay a figure out. Names longer than `label_room` pixels give way to their keys, which a
    `legend` below explains."""
    panels = [visible(panel, figure.x_log) for panel in figure.panels]
    labels = [label_of(c, panels, label_room) for p in panels for c in p.curves if not p.strip]
    right = max([text_width(text, SMALL) * BOLD + 14 for text in labels if text] or [12])
    y_axes = [y_axis(panel) for panel in panels]
    left = 8 + max(
        (text_width(tick_text(v), SMALL) for _, values in y_axes for v in values), default=20
    )
    xs = [x for p in panels for c in p.curves for x, _ in c.values()]
    low, high = spread(
        xs,
        figure.x_log,
        0.04 if figure.x_log or any(c.marks for p in panels for c in p.curves) else 0,
    )
    x_scale = Scale(low, high, left, width - right, figure.x_log)
    x_ticks = fitting(low, high, figure.x_log, figure.x_ticks, x_scale)
    shapes: list[Shape] = []
    top = 4.0
    if figure.heading:
        top += 18
        shapes.append(Text(0, top - 5, shortened(figure.heading, width, SIZE), "muted", size=SIZE))
    for panel, (scale, values) in zip(panels, y_axes, strict=True):
        top += 17 if panel.strip else 22
        title = shortened(panel.title, width / BOLD, SIZE)
        shapes.append(
            Text(0, top - (5 if panel.strip else 10), title, "ink", size=SIZE, bold=not panel.strip)
        )
        scale = replace(scale, start=top + panel.height, end=top)
        shapes += draw_panel(
            panel,
            x_scale,
            scale,
            x_ticks,
            values,
            partial(label_of, panels=panels, room=label_room),
        )
        top += panel.height + (8 if panel.strip else 14)
    shapes += x_axis(figure, x_scale, x_ticks, top, width)
    top += 28
    if legend:
        shapes += key_legend(panels, label_room, top, width)
        top = max([top, *(s.y + 8 for s in shapes if isinstance(s, Text))])
    return Drawing(width, math.ceil(top), figure.title, shapes)


def key_legend(panels: list[Panel], label_room: float, top: float, width: float) -> list[Text]:
    """Below `top` a line for each key that stands for a name."""
    short = {
        c.key: c
        for p in panels
        for c in p.curves
        if not p.strip and c.label and label_of(c, panels, label_room) == c.key
    }
    indent = 8 + max((text_width(key, SMALL) * BOLD for key in short), default=0)
    shapes = []
    for i, (key, c) in enumerate(short.items(), 1):
        shapes.append(Text(0, top + i * (LINE + 2), key, c.color, bold=True))
        shapes.append(
            Text(indent, top + i * (LINE + 2), shortened(c.label, width - indent, SMALL), "ink")
        )
    return shapes


def visible(panel: Panel, x_log: bool) -> Panel:
    """Without what a logarithmic axis cannot hold."""

    def fits(x: float, y: float) -> bool:
        return (x > 0 or not x_log) and (y > 0 or not panel.log)

    kept = []
    for c in panel.curves:
        line = tuple(p for p in c.line if fits(*p))
        band, bars = (tuple(s for s in spans if fits(*s[:2])) for spans in (c.band, c.bars))
        kept.append(
            replace(
                c,
                line=line,
                band=band,
                bars=bars,
                marks=tuple(m for m in c.marks if fits(m.x, m.y)),
            )
        )
    return replace(panel, curves=tuple(kept))


def label_of(curve: Curve, panels: list[Panel], room: float) -> str:
    """Its name, or its key where any name of the figure is too long."""
    names = [c.label for p in panels for c in p.curves if c.label and c.key and not p.strip]
    if curve.key and any(text_width(name, SMALL) > room for name in names):
        return curve.key if curve.label else ""
    return shortened(curve.label, room, SMALL)


def y_axis(panel: Panel) -> tuple[Scale, list[float]]:
    """Its range, without pixels yet, and its ticks."""
    values = [y for c in panel.curves for _, y in c.values()]
    if panel.floor is not None:
        values = [max(v, panel.floor) for v in values]
    low, high = spread(values, panel.log, 0.12 if panel.strip else 0.06)
    if panel.ticks:
        return Scale(low, high, 0, 1, panel.log), [v for v in panel.ticks if low <= v <= high]
    if panel.strip:
        ends = dict.fromkeys((min(values), max(values))) if values else {}
        return Scale(low, high, 0, 1, panel.log), list(ends)
    return Scale(low, high, 0, 1, panel.log), ticks(low, high, panel.log, int(panel.height // 36))


def draw_panel(
    panel: Panel,
    x: Scale,
    y: Scale,
    x_ticks: list[float],
    y_ticks: list[float],
    label: Callable[[Curve], str],
    numbered: bool = True,
) -> list[Shape]:
    """Grid, with numbers at the y axis if `numbered`, then bands, lines and marks, then the names
    and the note."""
    shapes: list[Shape] = []
    for v in y_ticks:
        shapes.append(Path(((x.start, y(v)), (x.end, y(v))), "grid"))
        shapes += y_numbers(x, y, [v]) if numbered else []
    shapes += [Path(((x(v), y.start), (x(v), y.end)), "grid") for v in x_ticks]
    shapes.append(Path(((x.start, y.start), (x.end, y.start)), "axis"))
    for c in panel.curves:
        if len(c.band) > 1:
            edge = [(at, high) for at, _, high in c.band] + [
                (at, low) for at, low, _ in reversed(c.band)
            ]
            points = [(x(a), min(y(b), y.start)) for a, b in edge]
            half = len(c.band)
            outline = (
                *simplified(points[:half], panel.fine),
                *simplified(points[half:], panel.fine),
            )
            shapes.append(Path(outline, fill=c.color, opacity=0.16))
    for c in panel.curves:
        shapes += lines_of(c, x, y, panel.fine)
    for c in panel.curves:
        shapes += [
            shape for m in c.marks if m.y >= y.low for shape in symbol(m, x(m.x), y(m.y), c.color)
        ]
    if not panel.strip:
        shapes += names(panel.curves, x, y, label)
    return shapes + note(panel.note, x, y)


def y_numbers(x: Scale, y: Scale, values: list[float]) -> list[Shape]:
    return [Text(x.start - 6, y(v) + 4, tick_text(v), anchor="end") for v in values]


def note(lines: tuple[str, ...], x: Scale, y: Scale) -> list[Shape]:
    """The lines in the upper part of a plot, on a piece of paper that hides what is behind them."""
    if not lines:
        return []
    middle, top = (x.start + x.end) / 2, y.end + 0.12 * (y.start - y.end)
    half, bottom = max(text_width(line, SMALL) for line in lines) / 2 + 6, top + 15 * len(lines) + 6
    box = ((-half, top), (half, top), (half, bottom), (-half, bottom))
    shapes: list[Shape] = [Path(tuple((middle + a, b) for a, b in box), fill="paper", opacity=0.9)]
    return shapes + [
        Text(middle, top + 15 * i, line, "ink", "middle") for i, line in enumerate(lines, 1)
    ]


def lines_of(c: Curve, x: Scale, y: Scale, fine: bool) -> list[Path]:
    shapes = []
    for piece in above([(x(a), y(b)) for a, b in c.line], y.start):
        points = tuple(simplified(piece, fine))
        shapes.append(Path(points, c.color, width=c.width, dash=c.dash))
    for at, low, high in c.bars:
        top, bottom = y(high), min(y(low), y.start)
        shapes.append(Path(((x(at), bottom), (x(at), top)), c.color, width=1.2))
        shapes += [
            Path(((x(at) - 3, v), (x(at) + 3, v)), c.color, width=1.2) for v in (bottom, top)
        ]
    return shapes


def above(points: list[tuple[float, float]], bottom: float) -> list[list[tuple[float, float]]]:
    """The pieces of a line that lie above the pixel row `bottom`."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for i, (a, b) in enumerate(points):
        inside = b <= bottom + 1e-6
        if i and inside != (points[i - 1][1] <= bottom + 1e-6):
            p, q = points[i - 1]
            pieces[-1].append((p + (a - p) * (bottom - q) / (b - q), bottom))
            if not inside:
                pieces.append([])
        if inside:
            pieces[-1].append((a, b))
    return [piece for piece in pieces if len(piece) > 1]


def simplified(points: list[tuple[float, float]], fine: bool = False) -> list[tuple[float, float]]:
    """The line with fewer points, nowhere further off than a fraction of a pixel, or than it takes
    to have as many as it may."""
    tolerance, most = FINE if fine else COARSE
    while len(kept := thinned(points, tolerance)) > most:
        tolerance *= 1.6
    return kept


def thinned(points: list[tuple[float, float]], tolerance: float) -> list[tuple[float, float]]:
    """Douglas and Peucker's algorithm, without recursion."""
    if len(points) < 3:
        return list(points)
    kept, todo = {0, len(points) - 1}, [(0, len(points) - 1)]
    while todo:
        first, last = todo.pop()
        (ax, ay), (bx, by) = points[first], points[last]
        length = math.hypot(bx - ax, by - ay)
        worst, at = tolerance, 0
        for i in range(first + 1, last):
            px, py = points[i]
            off = (
                abs((bx - ax) * (ay - py) - (ax - px) * (by - ay)) / length
                if length
                else math.hypot(px - ax, py - ay)
            )
            if off > worst:
                worst, at = off, i
        if at:
            kept.add(at)
            todo += [(first, at), (at, last)]
    return [points[i] for i in sorted(kept)]


def symbol(m: Mark, x: float, y: float, color: str) -> list[Path | Dot]:
    if m.shape in ("dot", "ring"):
        return [Dot(x, y, 3.2, color, color if m.shape == "dot" else "paper", 1.4, m.tip)]
    if m.shape == "circle":
        return [Dot(x, y, 8.5, color, "", 1.8, m.tip)]
    if m.shape in ("square", "open-square"):
        corners = ((x - 5, y - 5), (x + 5, y - 5), (x + 5, y + 5), (x - 5, y + 5), (x - 5, y - 5))
        return [Path(corners, color, color if m.shape == "square" else "paper", 1.6, tip=m.tip)]
    return [Path(((x - 4, y + d), (x + 4, y - d)), color, width=2, tip=m.tip) for d in (4, -4)]


def names(
    curves: tuple[Curve, ...], x: Scale, y: Scale, label: Callable[[Curve], str]
) -> list[Path | Text]:
    """Each series' name at the right of the plot, as near to the height of its end as the others
    leave room."""
    ends = []
    for c in curves:
        points = [p for p in (*c.line, *((m.x, m.y) for m in c.marks)) if p[1] >= y.low]
        if label(c) and points:
            at, value = max(points, key=lambda p: p[0])
            ends.append((y(value), x(at), c))
    room = int((y.start - y.end) // LINE) + 1
    ends = sorted(ends, key=lambda end: end[:2])
    if len(ends) > room:
        return []
    shapes: list[Path | Text] = []
    for (height, at, c), placed in zip(
        ends, apart([e[0] for e in ends], y.end, y.start), strict=True
    ):
        if x.end - at < 24:
            shapes.append(
                Path(((at + 4, height), (x.end + 9, placed)), c.color, width=0.7, opacity=0.6)
            )
        shapes.append(Text(x.end + 12, placed + 4, label(c), c.color, bold=True))
    return shapes


def apart(wanted: list[float], low: float, high: float) -> list[float]:
    """Ascending heights LINE or more apart in [low, high], in the least squares nearest to the
    wanted ascending ones."""
    blocks: list[list[float]] = []  # [sum of (wanted - offset), members]
    for i, at in enumerate(wanted):
        blocks.append([at - i * LINE, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    most = high - (len(wanted) - 1) * LINE
    starts = [
        min(max(total / count, low), max(most, low))
        for total, count in blocks
        for _ in range(int(count))
    ]
    return [start + i * LINE for i, start in enumerate(starts)]


def x_axis(figure: Figure, x: Scale, values: list[float], top: float, width: float) -> list[Text]:
    shapes = []
    for v in values:
        half = text_width(tick_text(v), SMALL) / 2
        at = min(x(v), width - half)
        shapes.append(Text(at, top, tick_text(v), anchor="middle"))
    middle = (x.start + x.end) / 2
    shapes.append(
        Text(middle, top + 19, shortened(figure.x_title, width, SIZE), "ink", "middle", SIZE)
    )
    return shapes
