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
TENTHS = [x / 10 for x in range(-60, 61)]  # of a standard deviation


def points(run: SavedRun) -> list[dict[str, Any]]:
    """The points of noise.json that are objects with a batch size."""
    entries = run.noise.get("points")
    objects = [p for p in entries if isinstance(p, dict)] if isinstance(entries, list) else []
    return [p for p in objects if (real(p.get("batch_size")) or 0) > 0]


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


def against_batch(grouped: list[Group]) -> list[Figure]:
    """The norm of the search-direction noise, and C^2 of the mini-batch gradient."""
    norms, variances = families(grouped, "noise_norm"), families(grouped, "c2_sampled")
    norm = figure(norms, "Noise norm ‖m − ∇f‖", "noise-norm", "slope −½")
    c2 = figure(variances, "Gradient variance C² (c2_sampled)", "noise-c2", "")
    return [f for f in (norm, c2) if f]


def families(grouped: list[Group], name: str) -> list[Family]:
    """One for each combination of settings but the batch size, and each update measured."""
    differing = groups.differing([g.config for g in grouped])
    fields = [f for f in differing if f not in ("batch_size", "c2", "k2")]
    spoken = [f for f in fields if f in groups.SPOKEN] or fields
    measured = [(g, p) for g in grouped for run in g.done for p in points(run)]
    steps = sorted({step_of(p) for _, p in measured})
    by_key: dict[tuple[str, float], Family] = {}
    for g in grouped:
        for step in steps:
            at = averaged([p for other, p in measured if other is g and step_of(p) == step], name)
            if at:
                update = f"update {step:,.0f}" if len(steps) > 1 else ""
                title = ", ".join(w for w in (groups.spoken(g.config, spoken), update) if w)
                key = (repr([g.config.get(f) for f in fields]), step)
                by_key.setdefault(key, Family(title)).points.append(at)
    return list(by_key.values())


def step_of(point: dict[str, Any]) -> float:
    """The update at which it was measured."""
    return real(point.get("step")) or 0.0


def averaged(measured: list[dict[str, Any]], name: str) -> tuple[float, float, float] | None:
    """(batch, mean, standard error) over seeds; of one seed the error over its draws."""
    known = [(p, value) for p in measured if (value := real(p.get(name)) or 0.0) > 0]
    if not known:
        return None
    first, values = known[0][0], Sample(tuple(value for _, value in known))
    error = real(first.get(f"{name}_se")) or 0.0
    if values.sd is not None:
        error = values.sd / math.sqrt(values.n)
    return real(first["batch_size"]) or 0.0, values.mean, error


def figure(series: list[Family], title: str, name: str, guide: str) -> Figure | None:
    sizes = sorted({at for f in series for at, _, _ in f.points})
    if not sizes:
        return None
    colors = ordered_colors(len(series))
    if len(series) <= FEW:
        colors = [unordered_color(i) for i in range(len(series))]
    curves = [family_curve(f, color, len(series)) for f, color in zip(series, colors, strict=True)]
    if guide and len(sizes) > 1:
        curves.insert(0, half_slope(series[0], guide))
    panel = Panel(title, tuple(curves), True, 235)
    against, ticks = f"{title} against the batch size", tuple(sizes)
    return Figure(name, against, "Batch size b", (panel,), x_log=True, x_ticks=ticks)


def family_curve(f: Family, color: str, count: int) -> Curve:
    ordered = sorted(f.points)
    bars = tuple((b, max(v - error, v / 10), v + error) for b, v, error in ordered if error)
    marks = tuple(
        Mark(b, v, "dot", f"{f.name}, b {b:g}: {v:.4g} ± {error:.2g}".lstrip(", "))
        for b, v, error in ordered
    )
    line = tuple((b, v) for b, v, _ in ordered)
    label = f.name if 1 < count <= MANY else ""
    return Curve(color, line, bars=bars, marks=marks, label=label, width=1.3)


def half_slope(f: Family, label: str) -> Curve:
    """v ~ b^(-1/2) through the centre of a family, as far as it reaches."""
    sizes = [b for b, _, _ in f.points]
    scale = math.exp(sum(math.log(v * math.sqrt(b)) for b, v, _ in f.points) / len(sizes))
    line = tuple((b, scale / math.sqrt(b)) for b in (min(sizes), max(sizes)))
    return Curve("muted", line, label=label, width=1.4, dash="5 4")


# Of the coordinates


def with_statistics(grouped: list[Group]) -> list[Group]:
    return [g for g in grouped if statistics(g)]


def statistics(g: Group) -> dict[str, Any]:
    """Of the last point of the first seed that has them and a deviation; else empty."""
    for run in g.done:
        for p in reversed(points(run)):
            if (number(p, "statistics", "variance", "value") or 0.0) > 0:
                return p["statistics"]
    return {}


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
    """Density over a standard deviation, in bins that widen with their distance from 0."""
    of_noise = statistics(line.group)
    variance = number(of_noise, "variance", "value")
    bars = sorted(density(of_noise, math.sqrt(variance))) if variance else []
    return Curve(line.color, tuple(bars), label=line.label, key=line.key, width=1.4)


def reals(values: Any) -> list[float]:
    """The list's numbers; empty where it is no list, or not all of it are numbers."""
    known = [real(v) for v in values] if isinstance(values, list) else []
    numbers = [v for v in known if v is not None]
    return numbers if len(numbers) == len(known) else []


def density(of_noise: dict[str, Any], sd: float) -> list[tuple[float, float]]:
    """(middle of a bin, density) in standard deviations, of bins that hold something."""
    histogram = of_noise.get("histogram")
    h = histogram if isinstance(histogram, dict) else {}
    edges, positive, negative = (reals(h.get(name)) for name in ("edges", "positive", "negative"))
    if not len(edges) - 1 == len(positive) == len(negative):
        return []
    zeros = number(of_noise, "zeros") or 0.0
    total = zeros + sum(positive) + sum(negative)
    inner = [i for i in range(len(positive)) if edges[i + 1] <= INNER * sd]
    middle = zeros + sum(positive[i] + negative[i] for i in inner)
    half = edges[len(inner)] / sd if inner else 0.0
    bins = [(0.0, middle, 2 * half)] if middle and half else []
    for sign, counts in ((1, positive), (-1, negative)):
        for i in range(len(inner), len(counts)):
            low, high = edges[i], edges[i + 1]
            bins.append((sign * (low + high) / 2 / sd, counts[i], (high - low) / sd))
    return [(x, count / total / width) for x, count, width in bins if count > 0 and abs(x) <= OUTER]


def normal_curve(facet: Facet) -> Curve:
    """The normal law, as far down as the histograms go."""
    lowest = min((y for line in facet.lines for _, y in histogram(line).line), default=1e-5)
    law = [(x, math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)) for x in TENTHS]
    return Curve("muted", tuple(p for p in law if p[1] >= min(lowest, 0.01)), width=1.2, dash="4 3")


def quantiles(line: Line) -> Curve:
    qq = statistics(line.group).get("qq")
    qq = qq if isinstance(qq, dict) else {}
    normal, observed = qq.get("normal"), qq.get("observed")
    known = []
    if isinstance(normal, list) and isinstance(observed, list):
        for one, other in zip(normal, observed, strict=False):
            x, y = real(one), real(other)
            if x is not None and y is not None:
                known.append((x, y))
    return Curve(line.color, tuple(known), label=line.label, key=line.key, width=1.6)


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
    through = tuple((x, y) for x, y, _ in at)
    return Curve(line.color, through, (), bars, marks, line.label, line.key, 1.2)


Estimate = tuple[float, float | None]  # a value and its standard error


def summary(g: Group) -> list[tuple[str, Estimate | None]]:
    """(name, (value, standard error)) of what a table says of a configuration's noise, None where
    nothing is known."""
    run = g.done[0] if g.done else None
    at = points(run)[-1] if run and points(run) else {}

    def pair(value: float | None, error: float | None) -> Estimate | None:
        return None if value is None else (value, error)

    def of(*path: str) -> Estimate | None:
        return pair(number(at, *path, "value"), number(at, *path, "error"))

    of_noise = at.get("statistics")
    hill = of_noise.get("hill") if isinstance(of_noise, dict) else None
    shares = hill if isinstance(hill, list) else []
    middle = shares[1] if len(shares) > 1 and isinstance(shares[1], dict) else {}
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
