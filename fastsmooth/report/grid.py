"""Figures of one number of a configuration against another: degree of smoothing, batch size,
accuracy, sharpness."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from fastsmooth.figures.chart import Curve, Figure, Mark, Panel, ordered_colors, unordered_color
from fastsmooth.report import groups
from fastsmooth.report.curves import FEW, MANY
from fastsmooth.report.groups import Group, Sample, real
from fastsmooth.runfolder.read import SavedRun

Point = tuple[Group, Sample, Sample]  # a configuration with its x and y
WAYS = 4  # of measuring sharpness that are shown


@dataclass(frozen=True)
class Quantity:
    """A number of a run, and how an axis shows it."""

    name: str
    title: str
    of: Callable[[SavedRun], float | None]
    log: bool = False
    factor: float = 1


ACCURACY = Quantity("accuracy", "Final test accuracy, %", groups.final_accuracy, factor=100)
BATCH = Quantity(
    "batch", "Batch size at the start", lambda run: groups.first(run, "batch_size"), log=True
)


def delta(unit: str) -> Quantity:
    title = "Smoothing δ at the start" + (" / √C²" if unit else "")
    return Quantity("delta", title, lambda run: groups.first(run, "delta"), log=True)


def smoothing(grouped: list[Group]) -> list[Figure]:
    """Accuracy against delta, and both against the batch size, for each unit of delta."""
    figures = []
    for i, unit in enumerate(sorted({g.unit() for g in grouped}), 1):
        some = [g for g in grouped if g.unit() == unit]
        d = delta(unit)
        pairs = ((d, ACCURACY), (BATCH, ACCURACY), (BATCH, d))
        figures += [
            f for x, y in pairs if (f := against(some, x, y, f"smoothing-{i}-{y.name}-{x.name}"))
        ]
    return figures


def sharpness(grouped: list[Group]) -> list[Figure]:
    """Sharpness against delta and the batch size, and accuracy against it, for each way in which it
    was measured."""
    figures = []
    ways = sorted({way for g in grouped for run in g.runs for way in sharpness_of(run)}, key=repr)
    for i, way in enumerate(ways[:WAYS], 1):
        algorithm, adaptive, rho, split = way
        how = f"{'adaptive ' if adaptive else ''}{groups.shown(algorithm)}"
        title = f"Sharpness, ρ {rho:g} ({how}, {groups.shown(split)} images)"
        s = Quantity("sharpness", title, partial(sharpness_in, way), log=True)
        for unit in sorted({g.unit() for g in grouped}):
            some = [g for g in grouped if g.unit() == unit]
            pairs = ((delta(unit), s), (BATCH, s), (s, ACCURACY))
            name = f"sharpness-{i}{'-c' if unit else ''}"
            figures += [
                f for x, y in pairs if (f := against(some, x, y, f"{name}-{y.name}-{x.name}"))
            ]
    return figures


Way = tuple[str, bool, float, str]  # algorithm, adaptive, rho, split


def sharpness_in(way: Way, run: SavedRun) -> float | None:
    return sharpness_of(run).get(way)


def sharpness_of(run: SavedRun) -> dict[Way, float]:
    """The value for each way of measuring, of the latest update at which it was measured."""
    results = run.sharpness.get("results")
    latest: dict[Way, tuple[float, float]] = {}  # the update and the value
    for entry in results if isinstance(results, list) else ():
        if not isinstance(entry, dict):
            continue
        value, rho = real(entry.get("value")), real(entry.get("rho"))
        if value is None or rho is None:
            continue
        step, adaptive = real(entry.get("step")) or 0.0, entry.get("adaptive") is True
        way = (str(entry.get("algorithm")), adaptive, rho, str(entry.get("split")))
        if step >= latest.get(way, (0.0, 0.0))[0]:
            latest[way] = (step, value)
    return {way: value for way, (_, value) in latest.items()}


def against(grouped: list[Group], x: Quantity, y: Quantity, name: str) -> Figure | None:
    """A point for each configuration; those that differ in the batch size alone are joined. None
    without two different x."""
    families: dict[str, list[Point]] = {}
    differing = groups.differing([g.config for g in grouped])
    fields = [f for f in differing if f not in ("batch_size", "c2", "k2")]
    for g in grouped:
        at, values = g.sample(x.of), g.sample(y.of)
        if at and values and (not x.log or at.low > 0):
            families.setdefault(repr([g.config.get(f) for f in fields]), []).append((g, at, values))
    points = [point for family in families.values() for point in family]
    if len({at.mean for _, at, _ in points}) < 2:
        return None
    log_y = y.log and all(values.low > 0 for _, _, values in points)
    curves = tuple(
        family_curve(f, fields, i, len(families), x, y) for i, f in enumerate(families.values())
    )
    ticks = tuple(sorted({at.mean for _, at, _ in points})) if x is BATCH else ()
    title = f"{y.title} against {x.title[0].lower() + x.title[1:]}"
    panel = Panel(y.title, curves, log_y, 235)
    return Figure(name, title, x.title, (panel,), x_log=x.log, x_ticks=ticks)


def family_curve(
    family: list[Point], fields: list[str], index: int, count: int, x: Quantity, y: Quantity
) -> Curve:
    family = sorted(family, key=lambda point: point[1].mean)
    points = [(at.mean * x.factor, values, g) for g, at, values in family]
    joined = points if len(points) > 1 else []
    line = tuple((at, values.mean * y.factor) for at, values, _ in joined)
    bars = tuple((at, v.low * y.factor, v.high * y.factor) for at, v, _ in points if v.n > 1)
    marks = tuple(
        Mark(at, v.mean * y.factor, "dot", f"{g.name}: {v.mean * y.factor:.4g} ({v.n} runs)")
        for at, v, g in points
    )
    name = groups.spoken(family[0][0].config, [f for f in fields if f in groups.SPOKEN] or fields)
    label = name if 1 < count <= MANY else ""
    color = unordered_color(index) if count <= FEW else ordered_colors(count)[index]
    key = keys([g.key for g, _, _ in family])
    return Curve(color, line, bars=bars, marks=marks, label=label, key=key, width=1.3)


def keys(of: list[str]) -> str:
    """The keys of a family's members, as they stand in the table: A, A B, A to D."""
    of = sorted(of, key=lambda key: (len(key), key))
    return " ".join(of) if len(of) < 3 else f"{of[0]}…{of[-1]}"


def legend(figures: Iterable[Figure]) -> tuple[tuple[str, str, str], ...]:
    """Colour, keys and name of every series."""
    every = [c for f in figures for p in f.panels for c in p.curves if c.label]
    return tuple(dict.fromkeys((c.color, c.key, c.label) for c in every))
