"""Figures of --mode sampling: how large the noise of the search direction is, and how its
coordinates are distributed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fastsmooth.figures.chart import Curve, Figure, Mark, Panel, ordered_colors, unordered_color
from fastsmooth.report import groups
from fastsmooth.report.curves import FEW, MANY, Facet, Line
from fastsmooth.report.groups import Group, Sample, real
from fastsmooth.runfolder.read import SavedRun

INNER = 0.05  # standard deviations: bins nearer to 0 are shown as one
OUTER = 10.0  # what lies beyond is not shown


def points(run: SavedRun) -> list[dict[str, Any]]:
    """The points of noise.json that are objects with a batch size."""
    found = run.noise.get("points")
    return [
        p
        for p in (found if isinstance(found, list) else [])
        if isinstance(p, dict) and (real(p.get("batch_size")) or 0) > 0
    ]


def number(where: dict[str, Any], *path: str) -> float | None:
    """where[path[0]][path[1]]..., where that is a finite number."""
    value: Any = where
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return real(value)


# Against the batch size


@dataclass
class Family:
    """What differs in the batch size alone: (batch, value, standard error)."""

    name: str
    points: list[tuple[float, float, float]] = field(default_factory=list)


def against_batch(found: list[Group]) -> list[Figure]:
    """The norm of the search-direction noise, and C^2 of the mini-batch gradient."""
    norm = figure(families(found, "noise_norm"), "Noise norm ‖m − ∇f‖", "noise-norm", "slope −½")
    c2 = figure(families(found, "c2_sampled"), "Gradient variance C² (c2_sampled)", "noise-c2", "")
    return [f for f in (norm, c2) if f]


def families(found: list[Group], name: str) -> list[Family]:
    """One for each combination of settings, the batch size apart, and each update at which was
    measured."""
    fields = [
        f
        for f in groups.differing([g.config for g in found])
        if f not in ("batch_size", "c2", "k2")
    ]
    spoken = [f for f in fields if f in groups.SPOKEN] or fields
    steps = sorted(
        {real(p.get("step")) or 0.0 for g in found for run in g.done for p in points(run)}
    )
    by_key: dict[tuple, Family] = {}
    for g in found:
        for step in steps:
            at = averaged(
                [p for run in g.done for p in points(run) if (real(p.get("step")) or 0.0) == step],
                name,
            )
            if at:
                update = f"update {step:,.0f}" if len(steps) > 1 else ""
                title = ", ".join(w for w in (groups.spoken(g.config, spoken), update) if w)
                by_key.setdefault(
                    (repr([g.config.get(f) for f in fields]), step), Family(title)
                ).points.append(at)
    return list(by_key.values())


def averaged(measured: list[dict[str, Any]], name: str) -> tuple[float, float, float] | None:
    """(batch, mean, standard error) over seeds; of one seed the error over its draws."""
    kept = [p for p in measured if (real(p.get(name)) or 0.0) > 0]
    if not kept:
        return None
    values = Sample(tuple(real(p[name]) for p in kept))
    error = (
        values.sd / math.sqrt(values.n) if values.n > 1 else real(kept[0].get(f"{name}_se")) or 0.0
    )
    return real(kept[0]["batch_size"]), values.mean, error


def figure(found: list[Family], title: str, name: str, guide: str) -> Figure | None:
    sizes = sorted({at for f in found for at, _, _ in f.points})
    if not sizes:
        return None
    colors = (
        [unordered_color(i) for i in range(len(found))]
        if len(found) <= FEW
        else ordered_colors(len(found))
    )
    curves = [family_curve(f, color, len(found)) for f, color in zip(found, colors, strict=True)]
    if guide and len(sizes) > 1:
        curves.insert(0, half_slope(found[0], guide))
    panel = Panel(title, tuple(curves), True, 235)
    return Figure(
        name,
        f"{title} against the batch size",
        "Batch size b",
        (panel,),
        x_log=True,
        x_ticks=tuple(sizes),
    )


def family_curve(f: Family, color: str, count: int) -> Curve:
    ordered = sorted(f.points)
    bars = tuple((b, max(v - error, v / 10), v + error) for b, v, error in ordered if error)
    marks = tuple(
        Mark(b, v, "dot", f"{f.name}, b {b:g}: {v:.4g} ± {error:.2g}".lstrip(", "))
        for b, v, error in ordered
    )
    line = tuple((b, v) for b, v, _ in ordered)
    return Curve(
        color, line, bars=bars, marks=marks, label=f.name if 1 < count <= MANY else "", width=1.3
    )


def half_slope(f: Family, label: str) -> Curve:
    """v ~ b^(-1/2) through the centre of a family, as far as it reaches."""
    sizes, values = [b for b, _, _ in f.points], [v for _, v, _ in f.points]
    scale = math.exp(
        sum(math.log(v * math.sqrt(b)) for b, v in zip(sizes, values, strict=True)) / len(sizes)
    )
    return Curve(
        "muted",
        tuple((b, scale / math.sqrt(b)) for b in (min(sizes), max(sizes))),
        label=label,
        width=1.4,
        dash="5 4",
    )


# Of the coordinates


def with_statistics(found: list[Group]) -> list[Group]:
    return [g for g in found if statistics(g)]


def statistics(g: Group) -> dict[str, Any] | None:
    """Of the last point of the first seed that has them and a standard deviation."""
    for run in g.done:
        for p in reversed(points(run)):
            if (number(p, "statistics", "variance", "value") or 0.0) > 0:
                return p["statistics"]
    return None


def distribution(facet: Facet, index: int) -> list[Figure]:
    """Histogram, QQ plot and tail index of the noise coordinates of each series."""
    where = f" ({facet.title})" if facet.title else ""
    deviations = "m − ∇f, coordinates in standard deviations"
    density = Panel(
        "Density, log scale", (*map(histogram, facet.lines), normal_curve(facet)), True, 215
    )
    qq = Panel(
        "Observed quantile", (diagonal(), *(quantiles(line) for line in facet.lines)), False, 215
    )
    tails = Panel("Tail index α (Hill)", tuple(map(tail, facet.lines)), False, 215)
    return [
        Figure(
            f"noise-{index}-histogram",
            f"Histogram of the noise coordinates{where}",
            deviations,
            (density,),
            heading=facet.title,
        ),
        Figure(
            f"noise-{index}-qq",
            f"QQ plot of the noise coordinates{where}",
            "Quantile of a normal law",
            (qq,),
            heading=facet.title,
        ),
        Figure(
            f"noise-{index}-tail",
            f"Tail index of the noise coordinates{where}",
            "Largest coordinates used, %",
            (tails,),
            x_log=True,
            x_ticks=(0.1, 1.0, 5.0),
            heading=facet.title,
        ),
    ]


def histogram(line: Line) -> Curve:
    """Density over a standard deviation; the bins are as wide as a share of their distance from
    0."""
    found = statistics(line.group)
    sd = math.sqrt(number(found, "variance", "value"))
    bars = sorted(density(found, sd))
    return Curve(line.color, tuple(bars), label=line.label, key=line.key, width=1.4)


def density(found: dict[str, Any], sd: float) -> list[tuple[float, float]]:
    """(middle of a bin, density) in standard deviations, of bins that hold something."""
    h = found.get("histogram") if isinstance(found.get("histogram"), dict) else {}
    lists = (
        h.get(name) if isinstance(h.get(name), list) else []
        for name in ("edges", "positive", "negative")
    )
    edges, positive, negative = (list(map(real, values)) for values in lists)
    if None in (*edges, *positive, *negative) or not len(edges) - 1 == len(positive) == len(
        negative
    ):
        return []
    zeros = number(found, "zeros") or 0.0
    total = zeros + sum(positive) + sum(negative)
    inner = [i for i in range(len(positive)) if edges[i + 1] <= INNER * sd]
    middle = zeros + sum(positive[i] + negative[i] for i in inner)
    half = edges[len(inner)] / sd if inner else 0.0
    bins = [(0.0, middle, 2 * half)] if middle and half else []
    for sign, counts in ((1, positive), (-1, negative)):
        for i in range(len(inner), len(counts)):
            bins.append(
                (
                    sign * (edges[i] + edges[i + 1]) / 2 / sd,
                    counts[i],
                    (edges[i + 1] - edges[i]) / sd,
                )
            )
    return [(x, count / total / width) for x, count, width in bins if count > 0 and abs(x) <= OUTER]


def normal_curve(facet: Facet) -> Curve:
    """The normal law, as far down as the histograms go."""
    lowest = min((y for line in facet.lines for _, y in histogram(line).line), default=1e-5)
    law = [
        (x / 10, math.exp(-((x / 10) ** 2) / 2) / math.sqrt(2 * math.pi)) for x in range(-60, 61)
    ]
    return Curve("muted", tuple(p for p in law if p[1] >= min(lowest, 0.01)), width=1.2, dash="4 3")


def quantiles(line: Line) -> Curve:
    qq = statistics(line.group).get("qq")
    qq = qq if isinstance(qq, dict) else {}
    normal, observed = (
        qq.get(name) if isinstance(qq.get(name), list) else [] for name in ("normal", "observed")
    )
    pairs = zip(normal, observed, strict=False)
    known = tuple(
        (real(x), real(y)) for x, y in pairs if real(x) is not None and real(y) is not None
    )
    return Curve(line.color, known, label=line.label, key=line.key, width=1.6)


def diagonal() -> Curve:
    return Curve("muted", ((-4.0, -4.0), (4.0, 4.0)), width=1.2, dash="4 3")


def tail(line: Line) -> Curve:
    """Hill's estimate from the largest 5, 1 and 0.1 %, with standard errors."""
    hill = statistics(line.group).get("hill")
    at = [
        (100 * share, value, number(entry, "error") or 0.0)
        for entry in (hill if isinstance(hill, list) else [])
        if (share := number(entry, "share") or 0.0) > 0
        and (value := number(entry, "value")) is not None
    ]
    marks = tuple(
        Mark(x, y, "dot", f"{line.group.name}: α {y:.3g} ± {error:.2g}") for x, y, error in at
    )
    bars = tuple((x, y - error, y + error) for x, y, error in at if error)
    return Curve(
        line.color, tuple((x, y) for x, y, _ in at), (), bars, marks, line.label, line.key, 1.2
    )


def summary(g: Group) -> list[tuple[str, tuple[float, float | None] | None]]:
    """(name, (value, standard error)) of what a table says of a configuration's noise, None where
    nothing is known."""
    run = g.done[0] if g.done else None
    at = points(run)[-1] if run and points(run) else {}

    def pair(value: float | None, error: float | None):
        return None if value is None else (value, error)

    def of(*path: str):
        return pair(number(at, *path, "value"), number(at, *path, "error"))

    hill = at.get("statistics", {}).get("hill") if isinstance(at.get("statistics"), dict) else None
    middle = (
        hill[1] if isinstance(hill, list) and len(hill) > 1 and isinstance(hill[1], dict) else {}
    )
    return [
        ("update", pair(number(at, "step"), None)),
        ("‖m − ∇f‖", pair(number(at, "noise_norm"), number(at, "noise_norm_se"))),
        ("‖∇f‖", pair(number(at, "full_grad_norm"), number(at, "full_grad_norm_se"))),
        ("c2_sampled", pair(number(at, "c2_sampled"), number(at, "c2_sampled_se"))),
        ("excess kurtosis", of("statistics", "excess_kurtosis")),
        ("KS distance", of("statistics", "ks_distance")),
        ("Hill α, 1 %", pair(number(middle, "value"), number(middle, "error"))),
        ("log-moment α", of("statistics", "log_moment", "alpha")),
    ]
