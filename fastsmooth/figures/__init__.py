"""Figures laid out as shapes, and written as SVG and, where matplotlib is installed, as PDF."""

from __future__ import annotations

from fastsmooth.figures import pdf, svg
from fastsmooth.figures.chart import Drawing

NO_PDF = "fastsmooth: no PDF figures without matplotlib: pip install 'fastsmooth[plot]'"


def files_of(drawing: Drawing) -> dict[str, bytes]:
    """What the files of a drawing hold, by their suffix: .svg, and .pdf where pdf.available()."""
    files = {".svg": svg.svg_file(drawing).encode()}
    if pdf.available():
        files[".pdf"] = pdf.pdf_file(drawing)
    return files
