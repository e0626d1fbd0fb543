"""The figures of both studies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy import ndarray

from fastsmooth.figures import files_of
from fastsmooth.figures.chart import Curve, Panel, ordered_colors
from fastsmooth.figures.grid import Grid, Map, draw_grid
from fastsmooth.runfolder import files
from fastsmooth.runfolder.numbers import number
from fastsmooth.smooth.graduated import Descent
from fastsmooth.smooth.noises import NOISES
from fastsmooth.smooth.request import Request
from fastsmooth.smooth.smoothing import REACH, Case, drop_wave, rastrigin

UNDEFINED = ("undefined for δ > 0:", "E u² is infinite")
ITSELF = Curve("axis", label="f", width=0.8, dash="3 2")
COLORS, DASHES = {"nice": "c0", "geo": "c1"}, {"graduated": "", "plain": "5 3"}
HEIGHT = 185.0  # of a panel, in pixels


def save(grid: Grid, r: Request) -> None:
    """As SVG and, where matplotlib is installed, as PDF: the same numbers give the same bytes."""
    for suffix, data in files_of(draw_grid(grid)).items():
        files.replace(r.out / f"{grid.name}{suffix}", data)


def draw_smoothing(r: Request, cases: list[Case]) -> None:
    """light and heavy, each where it has a noise."""
    for tails in ("light", "heavy"):
        shown = [case for case in cases if NOISES[case.noise].tails == tails]
        if shown:
            title = f"E f(x − δu), noise u with {tails} tails" + ", centred" * r.centred
            save((lines if r.dim == 1 else maps)(r, tails, title, shown), r)


def noises_of(r: Request, shown: list[Case]) -> list[str]:
    """Of the cases, in the order of the command line: the columns of a figure."""
    return [name for name in r.noise if any(case.noise == name for case in shown)]


def lines(r: Request, name: str, title: str, shown: list[Case]) -> Grid:
    """A row a function, a column a noise, a line a delta (smaller, darker); f itself dashed."""
    colors = dict(zip(sorted(r.delta), ordered_colors(len(r.delta)), strict=True))
    looks = {d: Curve(colors[d], label=f"δ = {d:g}", width=1.3) for d in r.delta}

    def panel(function: str, noise: str, f: ndarray) -> Panel:
        own = [case for case in shown if (case.function, case.noise) == (function, noise)]
        curves = [line(ITSELF, r.grid, f)]
        for case in own:
            if case.smoothed.values is not None:
                curves.append(line(looks[case.delta], r.grid, case.smoothed.values))
        title = f"{spelled(function)}, {noise}"
        return Panel(title, tuple(curves), height=HEIGHT, note=undefined(own), fine=True)

    columns = noises_of(r, shown)
    rows = tuple(
        tuple(panel(function, noise, f(r.grid)) for noise in columns)
        for function, f in (("rastrigin", rastrigin), ("drop_wave", drop_wave))
    )
    return Grid(name, title, "x", rows, legend=(ITSELF, *looks.values()))


def maps(r: Request, name: str, title: str, shown: list[Case]) -> Grid:
    """A row a function and delta, a column a noise, a colour scale a row."""
    rows = []
    for function, delta in dict.fromkeys((case.function, case.delta) for case in shown):
        row = {c.noise: c for c in shown if (c.function, c.delta) == (function, delta)}
        values = [c.smoothed.values for c in row.values() if c.smoothed.values is not None]
        low = min((float(v.min()) for v in values), default=0.0)
        high = max((float(v.max()) for v in values), default=1.0)
        rows.append(
            tuple(
                Map(
                    f"{spelled(function)}, {noise}, δ {delta:g}",
                    -REACH,
                    REACH,
                    levels(row[noise].smoothed.values, low, high),
                    (low, high),
                    undefined([row[noise]]),
                )
                for noise in noises_of(r, shown)
            )
        )
    return Grid(name, title, "x₁; upwards x₂", tuple(rows))


def levels(values: ndarray | None, low: float, high: float) -> bytes:
    """0 at `low` to 255 at `high` of values [x1, x2], row by row from the largest x2."""
    if values is None:
        return b""
    shares = (values - low) / (high - low) if low < high else np.zeros_like(values)
    return np.rint(255 * shares).astype(np.uint8).T[::-1].tobytes()


def undefined(cases: list[Case]) -> tuple[str, ...]:
    return UNDEFINED if any(case.smoothed.values is None for case in cases) else ()


def spelled(function: str) -> str:
    return function.replace("_", "-")


def line(look: Curve, x: ndarray, y: ndarray) -> Curve:
    """The look with a line; what no axis can hold is left out."""
    points = zip(x.tolist(), y.tolist(), strict=True)
    return replace(look, line=tuple(point for point in points if number(point[1])))


def draw_graduated(r: Request, descents: list[Descent]) -> None:
    """A panel a function: mean and range over seeds of f after each round."""
    rounds = np.arange(1, r.rounds + 1)
    panels, looks = [], {}
    for function in r.functions:
        curves = []
        for d in (d for d in descents if d.function == function):
            name = f"{d.schedule}, {d.method}"
            looks[name] = Curve(COLORS[d.schedule], label=name, width=1.5, dash=DASHES[d.method])
            low, high = d.values.amin(dim=1).tolist(), d.values.amax(dim=1).tolist()
            span = zip(rounds.tolist(), low, high, strict=True)
            band = tuple(at for at in span if number(at[1]) and number(at[2]))
            mean = line(looks[name], rounds, d.values.mean(dim=1).numpy())
            curves.append(replace(mean, band=band))
        title = f"{spelled(function)}, {r.dim_ego} dimensions"
        panels.append(Panel(title, tuple(curves), height=HEIGHT, fine=True))
    title = "f after every round: mean and range over seeds"
    rows = (tuple(panels),)
    save(Grid("graduated", title, "Round", rows, shared=False, legend=tuple(looks.values())), r)
