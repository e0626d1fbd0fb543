"""Drawings as PDF files, by matplotlib (the [plot] extra): in light colours, text as text in an
embedded typeface."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

from fastsmooth.figures.chart import COLORS, Dot, Drawing, Path, Picture, Shape, Text, ramp

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib.backends.backend_pdf  # noqa: F401
    except ImportError:
        return False
    return True


def pdf_file(drawing: Drawing) -> bytes:
    """One pixel of the drawing is one point. The same drawing gives the same bytes: the file holds
    no date."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.figure import Figure

    with rc_context({"pdf.fonttype": 42, "font.family": "DejaVu Sans"}), warnings.catch_warnings():
        # a name may be in any script
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure = Figure((drawing.width / 72, drawing.height / 72))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.autoscale(False)  # a picture would fill them
        axes.set_xlim(0, drawing.width)
        axes.set_ylim(drawing.height, 0)
        for order, shape in enumerate(drawing.shapes):
            add(axes, shape, order)
        nobody = {
            "CreationDate": None,
            "Creator": "fastsmooth",
            "Producer": None,
            "Title": drawing.title,
        }
        file = io.BytesIO()
        FigureCanvasPdf(figure).print_pdf(file, metadata=nobody)
    return file.getvalue()


def add(axes: Axes, shape: Shape, order: int) -> None:
    if isinstance(shape, Text):
        write(axes, shape, order)
    elif isinstance(shape, Picture):
        show(axes, shape, order)
    else:
        line(axes, shape, order)


def write(axes: Axes, text: Text, order: int) -> None:
    """Narrower than the widths that the layout reserves; a $ in a name is no formula."""
    axes.text(
        text.x,
        text.y,
        text.text,
        ha={"start": "left", "middle": "center", "end": "right"}[text.anchor],
        va="baseline",
        parse_math=False,
        zorder=order,
        color=color(text.color),
        fontsize=text.size * 0.9,
        weight="bold" if text.bold else "normal",
    )


def show(axes: Axes, picture: Picture, order: int) -> None:
    import numpy as np

    colors = np.frombuffer(ramp(), np.uint8).reshape(256, 3)
    levels = np.frombuffer(picture.levels, np.uint8).reshape(-1, picture.columns)
    right, bottom = picture.x + picture.width, picture.y + picture.height
    extent = (picture.x, right, bottom, picture.y)
    axes.imshow(colors[levels], extent=extent, aspect="auto", interpolation="none", zorder=order)


def line(axes: Axes, shape: Path | Dot, order: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle, Patch, Polygon

    stroke, fill, width = color(shape.stroke), color(shape.fill), shape.width
    if isinstance(shape, Path) and not shape.fill:
        x, y = zip(*shape.points, strict=True)
        drawn = Line2D(x, y, color=stroke, linewidth=width, alpha=shape.opacity, zorder=order)
        if shape.dash:
            drawn.set_linestyle((0, [float(length) for length in shape.dash.split()]))
        axes.add_line(drawn)
        return
    patch: Patch
    if isinstance(shape, Dot):
        patch = Circle((shape.x, shape.y), shape.radius)
    else:
        patch = Polygon(shape.points, closed=True, alpha=shape.opacity)
    patch.set(linewidth=width, zorder=order, edgecolor=stroke, facecolor=fill)
    axes.add_patch(patch)


def color(name: str) -> str:
    return COLORS[name][0] if name else "none"
