"""The figures of both studies."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from fastsmooth.runfolder.files import replace
from fastsmooth.smooth.graduated import Descent
from fastsmooth.smooth.noises import NOISES
from fastsmooth.smooth.smoothing import REACH, drop_wave, rastrigin
from fastsmooth.smooth.study import Curve, Request

FIGURES, KINDS = ("light", "heavy", "graduated"), (".svg", ".pdf")
LINES = {"graduated": "-", "plain": "--"}
COLOURS = {"nice": "#0072b2", "geo": "#c94a00"}  # apart for colour-blind eyes, and in grey


def new_figure(rows: int, columns: int, **options: Any) -> tuple[Any, ndarray]:
    """A figure that belongs to no window, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 2.6 * columns, 0.8 + 2.3 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Any, stem: Path) -> None:
    """As SVG and as PDF, without dates, so that the same numbers give the same bytes."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "fastsmooth", "pdf.fonttype": 42}):
        for kind, date in zip(KINDS, ("Date", "CreationDate"), strict=True):
            drawn = io.BytesIO()
            figure.savefig(drawn, format=kind[1:], metadata={date: None})
            replace(stem.with_suffix(kind), drawn.getbuffer())


def draw_smoothing(r: Request, curves: list[Curve]) -> None:
    """light and heavy, each where it has a noise."""
    for tails in ("light", "heavy"):
        names = [
            n for n in r.noise if NOISES[n].tails == tails and any(c.noise == n for c in curves)
        ]
        if names:
            figure = (draw_lines if r.dim == 1 else draw_images)(
                r, [c for c in curves if c.noise in names], names
            )
            figure.suptitle(
                f"$f_\\delta(x) = E\\,f(x - \\delta u)$, {tails} tails" + ", centred" * r.centred
            )
            save(figure, r.out / tails)


def add_legend(figure: Any, axes: ndarray, width: float) -> None:
    """Below all axes [rows, columns], in as many rows as labels of `width` inches need."""
    handles, labels = axes[-1, 0].get_legend_handles_labels()
    columns = min(len(labels), max(1, int(figure.get_figwidth() / width)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def draw_lines(r: Request, curves: list[Curve], names: list[str]) -> Any:
    """A row a function, a column a noise, a line a delta, the darker the smaller; f itself in
    dashed grey."""
    from matplotlib import colormaps

    colours = dict(
        zip(sorted(r.delta), colormaps["viridis"](np.linspace(0, 0.85, len(r.delta))), strict=True)
    )
    figure, axes = new_figure(2, len(names), sharex=True, sharey="row")
    for row, (function, f) in enumerate((("rastrigin", rastrigin), ("drop_wave", drop_wave))):
        for axis, name in zip(axes[row], names, strict=True):
            axis.plot(r.grid, f(r.grid), "--", color="0.65", lw=0.8, label="$f$")
            shown = [c for c in curves if (c.function, c.noise) == (function, name)]
            for curve in (c for c in shown if c.smoothed.values is not None):
                look = {"color": colours[curve.delta], "label": f"$\\delta$ = {curve.delta:g}"}
                axis.plot(r.grid, curve.smoothed.values, lw=1.3, **look)
            say_undefined(axis, shown)
            axis.set_title(f"{function.replace('_', '-')}, {name}", fontsize=10)
        axes[row, 0].set_ylim(*([-2, 52] if function == "rastrigin" else [-1.05, 0.05]))
    add_legend(figure, axes, 1.2)
    return figure


def draw_images(r: Request, curves: list[Curve], names: list[str]) -> Any:
    """A row a function and delta, a column a noise, a colour scale a row."""
    kinds = list(dict.fromkeys((c.function, c.delta) for c in curves))
    figure, axes = new_figure(len(kinds), len(names), sharex=True, sharey=True)
    for row, (function, delta) in enumerate(kinds):
        shown = {c.noise: c for c in curves if (c.function, c.delta) == (function, delta)}
        known = [c.smoothed.values for c in shown.values() if c.smoothed.values is not None]
        for axis, name in zip(axes[row], names, strict=True):
            axis.set_title(
                f"{function.replace('_', '-')}, $\\delta$ = {delta:g}, {name}", fontsize=8
            )
            say_undefined(axis, [shown[name]])
            if (values := shown[name].smoothed.values) is not None:
                scale = {"vmin": min(map(np.min, known)), "vmax": max(map(np.max, known))}
                extent = (-REACH, REACH, -REACH, REACH)
                image = axis.imshow(values.T, origin="lower", extent=extent, **scale)
        if known:
            figure.colorbar(image, ax=list(axes[row]))
    return figure


def say_undefined(axis: Any, shown: list[Curve]) -> None:
    if any(c.smoothed.values is None for c in shown):
        words = "undefined for $\\delta > 0$:\n$E\\,u^2$ is infinite"
        look = {
            "transform": axis.transAxes,
            "ha": "center",
            "va": "center",
            "bbox": {"fc": "white", "ec": "none"},
        }
        axis.text(0.5, 0.8, words, **look)


def draw_graduated(r: Request, descents: list[Descent]) -> None:
    """A panel a function: mean and range over seeds of f after each round."""
    figure, axes = new_figure(1, len(r.functions))
    rounds = np.arange(1, r.rounds + 1)
    for axis, function in zip(axes[0], r.functions, strict=True):
        for d in (d for d in descents if d.function == function):
            look = {"color": COLOURS[d.schedule], "ls": LINES[d.method]}
            axis.plot(
                rounds, d.values.mean(dim=1), label=f"{d.schedule}, {d.method}", lw=1.3, **look
            )
            low, high = d.values.amin(dim=1), d.values.amax(dim=1)
            axis.fill_between(rounds, low, high, color=look["color"], alpha=0.12, lw=0)
        axis.set_title(f"{function.replace('_', '-')}, {r.dim_ego} dimensions", fontsize=10)
        axis.set_xlabel("round")
    axes[0, 0].set_ylabel("f, mean and range over seeds")
    add_legend(figure, axes, 1.7)
    save(figure, r.out / "graduated")
