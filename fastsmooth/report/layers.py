"""Where in the network the noise is: C2 by layer as --track-noise with --quantities layers measured
it, over the updates."""

from __future__ import annotations

from fastsmooth.figures.heat import HeatMap, Row
from fastsmooth.report import groups
from fastsmooth.report.curves import FEW
from fastsmooth.report.groups import Group, real
from fastsmooth.runfolder.numbers import mean
from fastsmooth.runfolder.read import SavedRun

OWN = "(own parameters)"  # the layer of parameters that belong to no module but the model
MOST = 1000  # layers that a map shows
Measured = dict[float, list[float | None]]  # update -> C2 of every layer


def measured(run: SavedRun) -> Measured:
    """By update, of the rows that have as many layers as the first that has any."""
    found: Measured = {}
    for row in run.of_kind("measure"):
        at, values = real(row.get("step")), row.get("layer_c2")
        if at is None or not isinstance(values, list) or not 0 < len(values) <= MOST:
            continue
        if not found or len(values) == len(next(iter(found.values()))):
            found[at] = [real(value) for value in values]
    return found


def names(run: SavedRun, count: int) -> list[str]:
    """Of the layers, by layers.json; by their number where that does not say."""
    entries = run.layers.get("layers")
    if isinstance(entries, list) and len(entries) == count:
        given = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
        if all(isinstance(name, str) for name in given):
            return [groups.shown(name) or OWN for name in given]
    return [f"layer {i}" for i in range(1, count + 1)]


def over_seeds(g: Group) -> tuple[SavedRun, Measured] | None:
    """(a run of the configuration, the mean over those that are done): at the updates that all
    have. Where none is done, of the run that came furthest."""
    known = [(run, found) for run in g.done if (found := measured(run))]
    if not known:
        begun = [(run, found) for run in g.runs if (found := measured(run))]
        known = [max(begun, key=lambda pair: len(pair[1]))] if begun else []
    if not known:
        return None
    run, first = known[0]
    alike = [m for _, m in known if width_of(m) == width_of(first)]
    means: Measured = {}
    for at in sorted(first):
        if all(at in m for m in alike):
            means[at] = [average(values) for values in zip(*(m[at] for m in alike), strict=True)]
    return (run, means) if means else None


def width_of(found: Measured) -> int:
    return len(next(iter(found.values())))


def average(values: tuple[float | None, ...]) -> float | None:
    known = [v for v in values if v is not None]
    return mean(known) if len(known) == len(values) else None


def maps(grouped: list[Group]) -> tuple[list[tuple[HeatMap, str]], int]:
    """(a map of each of the first FEW configurations that have one, with what it says in words; how
    many others have one)."""
    known = [(g, found) for g in grouped if (found := over_seeds(g))]
    shown = known[:FEW]
    # one scale of colours, so that the maps can be compared
    values = [v for _, (_, m) in shown for some in m.values() for v in some if v and v > 0]
    ends = (min(values), max(values)) if values else (1.0, 10.0)
    drawn = [
        map_of(i, g.name if len(shown) > 1 else "", *found, ends)
        for i, (g, found) in enumerate(shown, 1)
    ]
    return drawn, len(known) - len(shown)


def map_of(
    index: int, heading: str, run: SavedRun, found: Measured, ends: tuple[float, float]
) -> tuple[HeatMap, str]:
    times = sorted(found)
    labels = names(run, width_of(found))
    by_layer = list(zip(*(found[at] for at in times), strict=True))
    rows = tuple(
        Row(label, values, tip(label, times, values))
        for label, values in zip(labels, by_layer, strict=True)
    )
    where = f" ({heading})" if heading else ""
    heat = HeatMap(
        f"layers-{index}",
        f"Gradient variance by layer and update{where}",
        "C² by layer (layer_c2), log scale",
        "Updates",
        tuple(times),
        rows,
        ends,
        heading,
    )
    said = "; ".join(largest(labels, at, found[at]) for at in dict.fromkeys((times[0], times[-1])))
    return heat, f"{heading}, {said}" if heading else said


def tip(label: str, times: list[float], values: tuple[float | None, ...]) -> str:
    pairs = dict.fromkeys(((times[0], values[0]), (times[-1], values[-1])))
    said = ", ".join(f"{number(v)} at update {at:,.0f}" for at, v in pairs)
    return f"{label}: C² {said}"


def number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def largest(labels: list[str], at: float, values: list[float | None]) -> str:
    """The three layers with most of the variance at an update, and their shares of it."""
    known = [(v, label) for v, label in zip(values, labels, strict=True) if v is not None]
    total = sum(v for v, _ in known)
    if not total > 0:
        return f"at update {at:,.0f} no layer has any of C²"
    first = sorted(known, key=lambda pair: -pair[0])[:3]
    shares = ", ".join(f"{label} {100 * v / total:.0f} %" for v, label in first)
    return f"largest shares of C² at update {at:,.0f}: {shares}"
