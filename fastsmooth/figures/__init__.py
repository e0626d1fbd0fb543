"""One way to draw: curves laid out as charts, written as SVG and PDF."""
