"""The plan of a run as a page: what its schedule does over the epochs, and what that costs.

One file that needs no script and loads nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

from fastsmooth import __version__
from fastsmooth.cli.config import Config
from fastsmooth.course import steps
from fastsmooth.figures import svg
from fastsmooth.figures.chart import Curve, Figure, Panel, draw
from fastsmooth.places import Place
from fastsmooth.runfolder.files import replace
from fastsmooth.schedule import Point
from fastsmooth.training.plan import Plan

MOST_CUTS = 500  # places of a line, beside those where something begins
WIDTH, LABELS = 720, 10  # pixels
Value = Callable[[Point], float | None]
Line = tuple[tuple[float, float], ...]


def write_page(plan: Plan, said: list[str], path: Path) -> None:
    """`said`: lines in words below the figure. Raises CannotWrite."""
    c = plan.config
    followed = c.schedule or f"--method {c.method}" + f", changed at every {c.per}" * (
        c.per != "epoch"
    )
    pictures = [
        svg.svg(draw(figure, WIDTH, LABELS), f' class="{name}"')
        for name, figure in (("settings", settings(plan)), ("costs", costs(plan)))
    ]
    words = "".join(f"<p>{escape(line)}</p>\n" for line in said)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta name="color-scheme" content="light dark"/>
<title>{escape(followed)}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ max-width: 760px; margin: 24px auto; padding: 0 16px; font: 15px/1.5 {svg.FONT}; }}
h1 {{ font-size: 20px; overflow-wrap: anywhere; }}
svg {{ display: block; max-width: 100%; height: auto; margin: 16px 0; }}
{svg.dark_rules()}
</style>
</head>
<body>
<h1>{escape(followed)}</h1>
<p>{escape(about(c, plan))}</p>
{"".join(pictures)}
{words}<p>fastsmooth {__version__}</p>
</body>
</html>
"""
    replace(path, page.encode())


def about(c: Config, plan: Plan) -> str:
    """The run in words."""
    beta = f", momentum {c.momentum:g}" if c.momentum else ""
    return (
        f"{c.dataset} ({plan.images:,} training images), {c.model}, {c.optimizer} from lr "
        f"{c.lr:g}, batch {c.batch_size}{beta}"
    )


def settings(plan: Plan) -> Figure:
    """lr, batch, momentum, nu and delta over the epochs; none of what is not there."""
    c, schedule = plan.config, plan.schedule
    unit = " (in units of C)" if c.assumed == ("c2",) else c.delta_unit
    values: list[tuple[str, str, Value]] = [
        ("learning rate", "c0", lambda p: p.lr),
        ("batch size (samples)", "c1", lambda p: p.batch_size),
    ]
    if schedule.most_momentum and not c.foreign:
        values.append(("momentum", "c2", lambda p: p.momentum))
    if schedule.changes_nu:
        values.append(("nu", "c3", lambda p: p.nu))
    if plan.delta(schedule.start) is not None:
        values.append((f"delta, the degree of smoothing{unit}", "c4", plan.delta))
    found = [(place, plan.at(place), holds) for place, holds in places(plan)]
    panels = tuple(
        panel(title, color, line(found, value, end_of(plan))) for title, color, value in values
    )
    return Figure("schedule", "lr, batch, momentum and delta over the epochs", "epochs", panels)


def costs(plan: Plan) -> Figure:
    """Updates and gradient evaluations so far."""
    found, end = [place for place, _ in places(plan)], end_of(plan)
    twice = 2 if plan.config.sam else 1
    updates = (*((p.epochs, float(p.update)) for p in found), (end.epochs, float(end.update)))
    samples = tuple((p.epochs, float(p.samples * twice)) for p in (*found, end))
    panels = (
        panel("updates so far", "c6", updates),
        panel("gradient evaluations so far (samples)", "c7", samples),
    )
    return Figure("cost", "updates and gradient evaluations over the epochs", "epochs", panels)


def panel(title: str, color: str, points: Line) -> Panel:
    return Panel(title, (Curve(color, line=points),), height=96, floor=None, fine=True)


def line(found: list[tuple[Place, Point, bool]], value: Value, end: Place) -> Line:
    """The values at the places, each held to the next place where nothing moves in between."""
    points: list[tuple[float, float]] = []
    after = [place.epochs for place, _, _ in found[1:]] + [end.epochs]
    for (place, point, holds), until in zip(found, after, strict=True):
        at = value(point)
        if at is not None:
            points.append((place.epochs, at))
            points += [(until, at)] * (holds or until == end.epochs)
    return tuple(points)


def places(plan: Plan) -> Iterator[tuple[Place, bool]]:
    """Places of the run where its Points are looked at, and whether each is held to the next one:
    those where an epoch or a written value begins, and some in between."""
    end, layout = end_of(plan), plan.layout
    epochs = range(0, layout.epochs, max(1, layout.epochs // MOST_CUTS))
    cuts = {layout.start(epoch).update for epoch in epochs}
    cuts |= {layout.start(epoch).update for epoch in layout.first_epochs[:-1]}
    if plan.schedule.moves or plan.warmup:
        cuts |= set(range(0, end.update, max(1, end.update // MOST_CUTS)))
    cuts |= {plan.warmup}
    for course in plan.schedule.text.courses if plan.schedule.text else ():
        firsts = {first for _, _, first in steps(course, layout) if first}
        cuts |= firsts | {first - 1 for first in firsts}
    for first, after in itertools.pairwise([*sorted(u for u in cuts if u < end.update), -1]):
        step = after == first + 1 and plan.schedule.text is not None
        yield layout.at(first), step or not plan.moves(first)


def end_of(plan: Plan) -> Place:
    """Where the run ends."""
    spans = list(plan.spans())
    updates = sum(span.epochs * span.updates for span in spans)
    samples = sum(span.epochs * span.samples for span in spans)
    if updates < plan.layout.updates:
        return plan.layout.at(updates)
    return Place(plan.layout.epochs, updates, samples, 0, plan.images)
