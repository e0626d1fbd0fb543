"""Figures against training time: accuracy, loss and schedule of every configuration, and the noise
measured on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fastsmooth.figures.chart import Curve, Figure, Mark, Panel, ordered_colors, unordered_color
from fastsmooth.report import groups
from fastsmooth.report.groups import Group, Sample, real
from fastsmooth.runfolder.numbers import mean
from fastsmooth.runfolder.read import SavedRun

FEW = 8  # series that one plot shows in colours of their own
MANY = 13  # that it shows in ordered colours
FACETS = 6  # plots beside each other
FAR = 20  # times the updates of another line: then updates stand on a logarithmic axis
BACKGROUND = 60  # lines behind the highlighted ones
# how a line of a run in that state ends; else in a ring
ENDS = {"diverged": "cross", "failed": "cross"}
DELTA = "Degree of smoothing δ"

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A configuration as a series: its colour, and its name among those beside it with what is
    short for it."""

    group: Group
    color: str
    label: str
    key: str


@dataclass(frozen=True)
class Facet:
    """Series that share a plot; `others` lie behind them in grey."""

    title: str
    lines: tuple[Line, ...]
    others: tuple[Group, ...] = ()
    left_out: int = 0


# Which configurations share a plot


def arrange(grouped: list[Group]) -> list[Facet]:
    """Few configurations share one plot; many are parted by all settings but one, or the best stand
    before the others."""
    if len(grouped) <= FEW:
        named = len(grouped) > 1
        lines = tuple(
            Line(g, unordered_color(i), g.name if named else "", g.key)
            for i, g in enumerate(grouped)
        )
        return [Facet("", lines)] if grouped else []
    fields = groups.differing([g.config for g in grouped])
    scales = [f for f in fields if all(real(g.config.get(f)) is not None for g in grouped)]
    for scale in sorted(scales, key=lambda f: -len({g.config[f] for g in grouped})):
        facets = parted(grouped, scale, [f for f in fields if f != scale])
        if facets:
            return facets
    best = set(map(id, sorted(grouped, key=accuracy_of, reverse=True)[:FEW]))
    chosen = [g for g in grouped if id(g) in best]
    lines = tuple(Line(g, unordered_color(i), g.name, g.key) for i, g in enumerate(chosen))
    others = [g for g in grouped if id(g) not in best]
    return [Facet("", lines, tuple(others[:BACKGROUND]), len(others[BACKGROUND:]))]


def parted(grouped: list[Group], scale: str, rest: list[str]) -> list[Facet] | None:
    """A plot for each combination of `rest`, in which colours follow the values of `scale`; None
    where that is no help."""
    values = sorted({g.config[scale] for g in grouped})
    parts: dict[str, list[Group]] = {}
    for g in grouped:
        parts.setdefault(repr([g.config.get(f) for f in rest]), []).append(g)
    if (
        not 2 < len(values) <= MANY
        or len(parts) > FACETS
        or any(len(p) > len(values) for p in parts.values())
    ):
        return None
    color = dict(zip(values, ordered_colors(len(values)), strict=True))
    visible = [f for f in rest if f in groups.SPOKEN] or rest
    return [
        Facet(
            groups.spoken(part[0].config, visible),
            tuple(
                Line(g, color[v], groups.setting(scale, v), groups.shown(v))
                for g in part
                for v in (g.config[scale],)
            ),
        )
        for part in parts.values()
    ]


def accuracy_of(g: Group) -> float:
    sample = g.sample(groups.final_accuracy)
    return sample.mean if sample else -1.0


# Training: against epochs and against updates

Course = Callable[[SavedRun], dict[Any, tuple[float, float]]]  # when -> (x, y)


def training(facet: Facet, index: int) -> list[Figure]:
    """Accuracy, loss and the schedule, against epochs and against updates."""
    where = f" ({facet.title})" if facet.title else ""
    figures = []
    for unit in ("epochs", "updates"):
        accuracy, loss = by_epoch(unit, "test_acc", 100), by_epoch(unit, "train_loss")
        both = (
            means("Test accuracy, %", facet, accuracy, height=215),
            means("Training loss", facet, loss, height=165, log=True),
        )
        panels = [panel for panel in both if panel]
        if panels:
            log = unit == "updates" and far_apart(panels)
            panels += strips(facet, unit)
            title = f"Accuracy, loss and schedule against {unit}{where}"
            x_title = unit.capitalize() + (", log scale" if log else "")
            name = f"training-{index}-{unit}"
            figures.append(
                Figure(name, title, x_title, tuple(panels), heading=facet.title, x_log=log)
            )
    return figures


def far_apart(panels: list[Panel]) -> bool:
    """Whether lines end so far apart that short ones would vanish on a linear axis."""
    ends = [c.line[-1][0] for panel in panels for c in panel.curves]
    return min(ends) > 0 and max(ends) > FAR * min(ends)


def by_epoch(unit: str, name: str, factor: float = 1) -> Course:
    """A number of the epoch rows, at the number of epochs or of updates that were done by then."""

    def course(run: SavedRun) -> dict[int, tuple[float, float]]:
        points = {}
        for row in groups.epochs(run):
            x = row["epoch"] + 1 if unit == "epochs" else real(row.get("step"))
            y = real(row.get(name))
            if x is not None and y is not None:
                points[int(row["epoch"])] = (float(x), y * factor)
        return points

    return course


def means(
    title: str, facet: Facet, course: Course, *, height: float, log: bool = False
) -> Panel | None:
    """A panel with the mean over the seeds of each series, a band from the lowest to the highest,
    and runs that broke off."""
    curves = [Curve("faint", mean_of(g.done, course), width=0.9) for g in facet.others]
    for line in facet.lines:
        curves += broken_off(line, course)
        at = together(line.group.done, course)
        curves.append(mean_line(line, at, band=len(facet.lines) <= FEW))
    shown = tuple(c for c in curves if c.line)
    if not shown:
        return None
    floor = None
    if not log:
        floor = legible_floor(tuple(c for c in shown if c.color != "faint") or shown)
    return Panel(title, shown, log, height, floor=floor)


def together(runs: Iterable[SavedRun], course: Course) -> list[tuple[float, Sample]]:
    """(x, the values of all runs) where all have one: the mean would jump where one lacks it."""
    courses = [course(run) for run in runs]
    every = [at for at in courses[0] if all(at in c for c in courses)] if courses else []
    return [
        (mean([c[at][0] for c in courses]), Sample(tuple(c[at][1] for c in courses)))
        for at in every
    ]


def mean_of(runs: Iterable[SavedRun], course: Course) -> tuple[tuple[float, float], ...]:
    return tuple((x, s.mean) for x, s in together(runs, course))


def mean_line(line: Line, at: list[tuple[float, Sample]], *, band: bool) -> Curve:
    points = tuple((x, s.mean) for x, s in at)
    spans = tuple((x, s.low, s.high) for x, s in at if s.n > 1) if band else ()
    marks = (Mark(*points[0]),) if len(points) == 1 else ()
    return Curve(line.color, points, spans, marks=marks, label=line.label, key=line.key)


def broken_off(line: Line, course: Course) -> list[Curve]:
    """Runs that are not done, dashed, with a mark where each ends; the longest bears the name where
    no run is done."""
    runs = [run for run in line.group.runs if run.state != "done"]
    runs.sort(key=lambda run: -len(course(run)))
    curves = []
    for run in runs:
        points = tuple(course(run).values())
        label = line.label if run is runs[0] and not line.group.done else ""
        tip = f"{line.group.name}: {groups.shown(run.state)}"
        end = tuple(Mark(*point, ENDS.get(run.state, "ring"), tip) for point in points[-1:])
        curves.append(
            Curve(line.color, points, marks=end, label=label, key=line.key, width=1.2, dash="4 3")
        )
    return curves


def legible_floor(curves: tuple[Curve, ...]) -> float | None:
    """Where an axis of accuracies begins so that all but the first tenth of every line is on it;
    None: at the lowest."""
    every = [y for c in curves for _, y in c.line]
    later = [y for c in curves for _, y in c.line[min(len(c.line) // 10 + 1, len(c.line) - 1) :]]
    floor = min(later) - 0.08 * (max(every) - min(later))
    return floor if floor - min(every) > 0.3 * (max(every) - floor) else None


# The strip below: lr, batch, momentum, delta


def strips(facet: Facet, unit: str) -> list[Panel]:
    """Low panels with the schedule of each series, of those settings that are not 0 everywhere."""
    titles = {
        "lr": "Learning rate",
        "batch_size": "Batch size",
        "momentum": "Momentum β",
        "delta": delta_title(facet),
    }
    count = len(facet.lines)
    panels = []
    for name, title in titles.items():
        every = [schedule_line(line, unit, name, i, count) for i, line in enumerate(facet.lines)]
        curves = tuple(c for c in every if c.line)
        values = [y for c in curves for _, y in c.line]
        if values and any(values):
            log = min(values) > 0 and max(values) / min(values) > 3
            panels.append(Panel(title, curves, log, height=40, strip=True))
    return panels


def schedule_line(line: Line, unit: str, name: str, place: int, count: int) -> Curve:
    """A staircase, as a setting holds for an epoch; lines below others are wider, so that equal
    ones show as a ribbon."""
    longest = max(line.group.runs, key=lambda run: len(groups.epochs(run)))
    points, before = [], 0.0
    for x, y in by_epoch(unit, name)(longest).values():
        points += [(before, y), (x, y)]
        before = x
    width = 1.6 + (1.5 * (count - 1 - place) if count <= 4 else 0)
    return Curve(line.color, tuple(points), width=width)


def delta_title(facet: Facet) -> str:
    units = {line.group.unit() for line in facet.lines}
    if "C" not in units:
        return DELTA
    return f"{DELTA} ({'of some ' if len(units) > 1 else ''}in units of √C²)"


# The noise while training


def online(facet: Facet, index: int) -> list[Figure]:
    """C^2 and the degree of smoothing as --track-noise measured them, against updates."""
    measured = [
        measured_panel("Gradient variance C² (c2_sampled)", facet, "c2_sampled", 165),
        measured_panel("δ with the measured constants", facet, "delta_measured", 165),
    ]
    panels = tuple(p for p in measured if p)
    where = f" ({facet.title})" if facet.title else ""
    title = f"Gradient variance and degree of smoothing while training{where}"
    figure = Figure(f"online-{index}", title, "Updates", panels, heading=facet.title)
    return [figure] if panels else []


def measured_panel(title: str, facet: Facet, name: str, height: float) -> Panel | None:
    course = by_measurement(name)
    panel = means(title, facet, course, height=height, log=True)
    if panel is None:
        return None
    if name != "c2_sampled":
        expected = [expected_line(line, course) for line in facet.lines if len(facet.lines) <= FEW]
        curves = (*(c for c in expected if len(c.line) > 1), *panel.curves)
        panel = Panel(title, curves, True, height)
    return panel


def tracked(row: dict[str, Any]) -> bool:
    """Whether a row is a measurement of --track-noise. Some have no delta."""
    return isinstance(row.get("estimator"), str) and real(row.get("c2_sampled")) is not None


def by_measurement(name: str) -> Course:
    """A number of the rows of --track-noise, at their updates."""

    def course(run: SavedRun) -> dict[float, tuple[float, float]]:
        rows = run.of_kind("measure")
        known = [row for row in rows if tracked(row)]
        at = [(real(row.get("step")), real(row.get(name))) for row in known]
        return {x: (x, y) for x, y in at if x is not None and y is not None}

    return course


def expected_line(line: Line, course: Course) -> Curve:
    """What the schedule alone makes of the first measured delta: how it would go on with constants
    that stay."""
    measured = mean_of(line.group.done, course)
    planned = dict(mean_of(line.group.done, by_measurement("delta")))
    first = next(((x, y) for x, y in measured if planned.get(x, 0) > 0 and y > 0), None)
    if first is None:
        return Curve(line.color)
    scale = first[1] / planned[first[0]]
    return Curve(line.color, tuple((x, y * scale) for x, y in planned.items()), width=1, dash="2 3")


def estimators(facets: Iterable[Facet]) -> list[str]:
    """How the constants were measured: estimator and BatchNorm mode."""
    rows = (
        row
        for facet in facets
        for line in facet.lines
        for run in line.group.runs
        for row in run.of_kind("measure")
        if tracked(row)
    )
    pairs = {(groups.shown(row.get("estimator")), groups.shown(row.get("bn"))) for row in rows}
    return sorted(f"{estimator}, BatchNorm {bn}" for estimator, bn in pairs)
