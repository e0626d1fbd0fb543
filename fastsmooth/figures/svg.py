"""Drawings as SVG: in a page, whose style sheet knows light from dark, and in their own files."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable
from html import escape
from itertools import pairwise

from fastsmooth.figures.chart import COLORS, SMALL, Dot, Drawing, Picture, Shape, Text, ramp

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def svg(drawing: Drawing, attributes: str = "", style: str = "", paper: bool = False) -> str:
    """Markup whose colours are attributes, for any program, and classes, for a style sheet that
    knows dark from light."""
    w, h = number(drawing.width), number(drawing.height)
    title = escape(drawing.title)
    body = (
        [f'<rect class="f-paper" width="{w}" height="{h}" fill="{COLORS["paper"][0]}"/>']
        if paper
        else []
    )
    body += [element(shape) for shape in drawing.shapes]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" '
        'role="img" '
        f'aria-label="{title}" font-family="{escape(FONT)}" font-size="{SMALL}" '
        'stroke-linejoin="round" '
        f'stroke-linecap="round" fill="none"{attributes}>{style}' + "".join(body) + "</svg>"
    )


def svg_file(drawing: Drawing) -> str:
    """A file of its own: on white paper, or dark where the viewer asks for it."""
    return svg(drawing, style=f"<style>{dark_rules()}</style>", paper=True) + "\n"


def dark_rules() -> str:
    """The style sheet that turns a light SVG dark on a screen that is."""
    rules = (
        f".s-{name}{{stroke:{dark}}}.f-{name}{{fill:{dark}}}" for name, (_, dark) in COLORS.items()
    )
    return f"@media screen and (prefers-color-scheme:dark){{{''.join(rules)}}}"


def element(shape: Shape) -> str:
    if isinstance(shape, Picture):
        return picture(shape)
    if isinstance(shape, Text):
        style = f' text-anchor="{shape.anchor}"' if shape.anchor != "start" else ""
        style += f' font-size="{shape.size}"' if shape.size != SMALL else ""
        style += ' font-weight="600"' if shape.bold else ""
        at = f'x="{number(shape.x)}" y="{number(shape.y)}"'
        return f"<text {at}{paint(fill=shape.color)}{style}>{escape(shape.text)}</text>"
    look = paint(stroke=shape.stroke, fill=shape.fill)
    look += f' stroke-width="{number(shape.width)}"' if shape.stroke and shape.width != 1 else ""
    if isinstance(shape, Dot):
        return closed(
            "circle",
            f'cx="{number(shape.x)}" cy="{number(shape.y)}" r="{number(shape.radius)}"{look}',
            shape.tip,
        )
    look += f' stroke-dasharray="{shape.dash}"' if shape.dash else ""
    look += f' opacity="{shape.opacity}"' if shape.opacity != 1 else ""
    return closed(
        "path", f'd="{path_data(shape.points)}{"z" if shape.fill else ""}"{look}', shape.tip
    )


def picture(shape: Picture) -> str:
    at = f'x="{number(shape.x)}" y="{number(shape.y)}"'
    size = f'width="{number(shape.width)}" height="{number(shape.height)}"'
    data = base64.b64encode(png(shape.columns, shape.levels)).decode()
    return (
        f'<image {at} {size} preserveAspectRatio="none" image-rendering="pixelated" '
        f'href="data:image/png;base64,{data}"/>'
    )


def png(columns: int, levels: bytes) -> bytes:
    """A PNG file of one byte a pixel, by the ramp's palette (ISO 15948)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    rows = [levels[i : i + columns] for i in range(0, len(levels), columns)]
    header = struct.pack(">IIBBBBB", columns, len(rows), 8, 3, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)  # each row unfiltered
    chunks = ((b"IHDR", header), (b"PLTE", ramp()), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks)


def paint(**colors: str) -> str:
    """Attributes for the light, and classes for the dark, of stroke and fill."""
    given = {what: name for what, name in colors.items() if name}
    classes = " ".join(f"{what[0]}-{name}" for what, name in given.items())
    literal = "".join(f' {what}="{COLORS[name][0]}"' for what, name in given.items())
    return f' class="{classes}"{literal}'


def closed(name: str, attributes: str, tip: str) -> str:
    return (
        f"<{name} {attributes}><title>{escape(tip)}</title></{name}>"
        if tip
        else f"<{name} {attributes}/>"
    )


def number(value: float) -> str:
    """With one decimal, none where it is 0."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def path_data(points: Iterable[tuple[float, float]]) -> str:
    """Tenths of a pixel, each relative to the one before: half the bytes of absolute ones."""
    tenths = [(round(10 * x), round(10 * y)) for x, y in points]
    words = [f"M{number(tenths[0][0] / 10)} {number(tenths[0][1] / 10)}l"] if tenths else []
    for (px, py), (x, y) in pairwise(tenths):
        dx, dy = (
            (number(d / 10)).replace("0.", ".") if abs(d) < 10 else number(d / 10)
            for d in (x - px, y - py)
        )
        words.append(f"{dx}{'' if dy.startswith('-') else ' '}{dy}")
    return "".join(w if i < 2 or w.startswith("-") else f" {w}" for i, w in enumerate(words))
