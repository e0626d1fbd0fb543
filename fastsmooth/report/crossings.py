"""Figures of --mode critical: updates and gradient evaluations against the batch size, and where
theory puts b*."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fastsmooth.figures.chart import Curve, Figure, Mark, Panel, ordered_colors
from fastsmooth.report import groups, noise
from fastsmooth.report.groups import Group, real
from fastsmooth.runfolder.numbers import exact, mean
from fastsmooth.sweep.critical import FLAT, Analysis, BatchResult

GIVEN, SAMPLED = "C² of the configuration", "c2_sampled"


@dataclass(frozen=True)
class Variance:
    """A gradient variance that is known of a configuration."""

    config: dict[str, Any]
    value: float
    source: str


@dataclass(frozen=True)
class Constant:
    """A gradient variance that the theory's batch size follows from, and where it is from."""

    value: float
    source: str
    shape: str


def constants(analysis: Analysis, known: list[Variance]) -> list[Constant]:
    """C^2 that runs of the same settings were given, and the one that was sampled in such runs."""
    fitting = [v for v in known if v.value > 0 and same_training(v.config, analysis.group)]
    given = sorted({v.value for v in fitting if v.source == GIVEN})
    measured = [v.value for v in fitting if v.source == SAMPLED]
    squares = [Constant(value, GIVEN, "square") for value in given]
    return squares + ([Constant(mean(measured), SAMPLED, "open-square")] if measured else [])


MEASURING = {
    "mode", "eps", "criterion", "min_epochs", "full_grad_every", "steps", "draws", "bn",
    "measure_augment", "save_omega",
    "batch_size", "seed", "c2", "k2", "epochs", "decay_epoch", "budget",
}  # fmt: skip


def same_training(one: dict[str, Any], other: dict[str, Any]) -> bool:
    names = (one.keys() | other.keys()) - MEASURING - groups.REPETITION - {"nshb_delta", "data"}
    return all(one.get(name) == other.get(name) for name in names)


def variances(grouped: list[Group]) -> list[Variance]:
    """What the configurations give as C^2 and what was sampled in their runs."""
    given = [
        Variance(g.config, value, GIVEN)
        for g in grouped
        if g.mode == "critical" and (value := real(g.config.get("c2"))) is not None
    ]
    sampled = [
        Variance(g.config, value, SAMPLED)
        for g in grouped
        for run in g.done
        for point in noise.points(run)
        if (value := real(point.get("c2_sampled"))) is not None
    ]
    return given + sampled


def critical(
    analyses: list[Analysis], known: list[Variance], number: int, title: str
) -> list[Figure]:
    """Steps and gradient evaluations against the batch size, for every threshold of one group."""
    sizes = sorted({float(b.batch_size) for a in analyses for b in a.batches})
    colors = ordered_colors(len(analyses)) if len(analyses) > 1 else ["c0"]
    where = f" ({title})" if title else ""
    ticks = tuple(sizes)
    steps = [steps_curve(a, color) for a, color in zip(analyses, colors, strict=True)]
    evaluations = [sfo_curve(a, color, known) for a, color in zip(analyses, colors, strict=True)]
    figures = []
    for kind, y, of_each in (
        ("steps", "Updates T(b) until ε", steps),
        ("sfo", "Gradient evaluations N(b) = b T(b)", evaluations),
    ):
        curves = tuple(c for several in of_each for c in several if c.marks or c.line)
        if curves:
            name, full = f"critical-{number}-{kind}", f"{y} against the batch size{where}"
            panels = (Panel(y, curves, True, 250),)
            figures.append(Figure(name, full, "Batch size b", panels, x_log=True, x_ticks=ticks))
    return figures


def reached(a: Analysis) -> list[BatchResult]:
    """The batch sizes at which every seed crossed the threshold after counting had begun."""
    return [b for b in a.batches if b.complete and min(b.reached) > 0]


def steps_curve(a: Analysis, color: str) -> list[Curve]:
    """A line through the mean T(b) of the batch sizes at which every seed has one.

    At the other batch sizes there is a ring for each seed that crossed, and one at the bound of
    each censored seed.
    """
    full = reached(a)
    line = tuple((float(b.batch_size), mean(b.reached)) for b in full)
    bars = tuple(
        (float(b.batch_size), float(min(b.reached)), float(max(b.reached))) for b in full if b.n > 1
    )
    marks = [Mark(*point, "dot", f"b {point[0]:g}: {point[1]:,.6g} updates") for point in line]
    alone = [
        Mark(float(b.batch_size), float(t), "ring", "one seed: others are censored or not there")
        for b in partly(a)
        for t in b.reached
    ]
    marks += [*alone, *bounds(a, lambda b, t: float(t))]
    return [Curve(color, line, bars=bars, marks=tuple(marks), label=f"ε {exact(a.eps)}", width=1.5)]


def partly(a: Analysis) -> list[BatchResult]:
    return [b for b in a.batches if not b.complete and b.reached and min(b.reached) > 0]


def bounds(a: Analysis, height: Callable[[int, int], float]) -> list[Mark]:
    """Open marks at height(b, t) for the seeds that are censored at update t: the true value is at
    most there."""
    words = "at most: below ε at the first update that counts"
    return [
        Mark(float(b.batch_size), height(b.batch_size, t), "ring", f"b {b.batch_size:,}: {words}")
        for b in a.batches
        for t in sorted(set(b.bounds))
        if t > 0
    ]


def sfo_curve(a: Analysis, color: str, known: list[Variance]) -> list[Curve]:
    """N(b) with b* in a circle, the floor of the minimum as a wide line, and squares where the
    theory puts b*."""
    full = reached(a)
    sfo = a.sfo  # which all that are complete have
    line = tuple((float(b.batch_size), sfo[b.batch_size]) for b in full)
    bars = tuple(
        (float(size), size * float(min(b.reached)), size * float(max(b.reached)))
        for b in full
        for size in (b.batch_size,)
        if b.n > 1
    )
    marks = [Mark(b, n, "dot", f"b {b:g}: {n:,.6g} gradient evaluations") for b, n in line]
    best = [p for p in line if p[0] == a.best]
    marks += [Mark(*p, "circle", f"b* = {a.best}") for p in best]
    marks += [m for c in constants(a, known) if (m := theory_mark(a, c, line))]
    marks += bounds(a, lambda b, t: float(b * t))
    label = f"ε {exact(a.eps)}, b* {a.best}" if best else f"ε {exact(a.eps)}"
    curves = [Curve(color, line, bars=bars, marks=tuple(marks), label=label, key="", width=1.5)]
    if best and a.bracket and a.bracket[0] < a.bracket[1]:
        low, high = map(float, a.bracket)
        curves.insert(0, Curve("faint", tuple(p for p in line if low <= p[0] <= high), width=7))
    return curves


def theory_mark(a: Analysis, c: Constant, line: tuple[tuple[float, float], ...]) -> Mark | None:
    """On the curve at kappa lr C^2 / eps^2; None where that lies outside the batches tried."""
    b = a.batch_of(c.value)
    if b is None:
        return None
    for (x, y), (x2, y2) in pairwise(line):
        if x <= b <= x2:
            share = math.log(b / x) / math.log(x2 / x)
            tip = f"κ lr C² / ε² = {b:.4g}, {c.source} {c.value:.4g}"
            return Mark(b, y * (y2 / y) ** share, c.shape, tip)
    return None


def critical_words(a: Analysis, known: list[Variance]) -> str:
    """What the figure cannot say: how flat the minimum is, and the theory's batch size."""
    if a.best is None or a.bracket is None:
        return f"ε {exact(a.eps)}: not reached by every seed at any batch size{censored_words(a)}."
    low, high = a.bracket
    flat = f"from {low:,} to {high:,}" if low < high else f"at {low:,} alone"
    text = f"ε {exact(a.eps)}: b* = {a.best:,}; N is within {FLAT:.0%} of its smallest {flat}"
    if a.at_edge:
        text += ", and the floor ends where the batches that were tried end, so b* may lie outside"
    text += censored_words(a)
    for c in constants(a, known):
        b, tried = a.batch_of(c.value), [float(b.batch_size) for b in reached(a)]
        if b is None:
            continue
        text += f"; theory's κ lr C² / ε² = {b:,.4g} from {c.source}, {c.value:.4g}"
        if not min(tried) <= b <= max(tried):
            text += ", outside the batches that were tried (no square)"
    return text + "."


def censored_words(a: Analysis) -> str:
    """Which batch sizes have no N since a seed was below eps from the first update that counts."""
    if not a.censored:
        return ""
    sizes = ", ".join(f"{b:,}" for b in a.censored)
    return (
        f"; censored, and in no mean, at batch {sizes} (rings: below ε at the first update that "
        "counts, so T is at most that)"
    )
