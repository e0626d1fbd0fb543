"""Drawings as PDF files, by matplotlib (the [plot] extra): in light colours, text as text in an
embedded typeface."""

from __future__ import annotations

import io
import warnings

from fastsmooth.figures.chart import COLORS, Dot, Drawing, Path, Text


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


def add(axes, shape: Path | Dot | Text, order: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle, Polygon

    if isinstance(shape, Text):
        where = {"start": "left", "middle": "center", "end": "right"}[shape.anchor]
        # narrower than the widths that the layout reserves; a $ in a name is no formula
        look = {
            "color": color(shape.color),
            "fontsize": shape.size * 0.9,
            "weight": "bold" if shape.bold else "normal",
        }
        axes.text(
            shape.x,
            shape.y,
            shape.text,
            ha=where,
            va="baseline",
            parse_math=False,
            zorder=order,
            **look,
        )
        return
    look = {"linewidth": shape.width, "zorder": order}
    edges = {"edgecolor": color(shape.stroke), "facecolor": color(shape.fill)}
    if isinstance(shape, Dot):
        axes.add_patch(Circle((shape.x, shape.y), shape.radius, **look, **edges))
    elif shape.fill:
        axes.add_patch(Polygon(shape.points, closed=True, alpha=shape.opacity, **look, **edges))
    else:
        x, y = zip(*shape.points, strict=True)
        dash = (0, tuple(map(float, shape.dash.split()))) if shape.dash else "-"
        axes.add_line(
            Line2D(x, y, color=color(shape.stroke), linestyle=dash, alpha=shape.opacity, **look)
        )


def color(name: str) -> str:
    return COLORS[name][0] if name else "none"
