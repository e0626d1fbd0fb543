"""What --plan says of a run: its schedule, stretch by stretch or epoch by epoch, and its cost."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastsmooth.cli.config import Config
from fastsmooth.cli.flags import ConfigError
from fastsmooth.course import steps
from fastsmooth.messages import show
from fastsmooth.schedule import Point, Schedule
from fastsmooth.terminal import Table, columns
from fastsmooth.training.pictured import write_page
from fastsmooth.training.plan import (
    Plan,
    cost,
    cost_of_a_folder,
    delta_of,
    make_plan,
    make_schedule,
    notes,
    units,
    warming,
)


def print_plan(c: Config, as_json: bool, html: str | None = None) -> None:
    """Point and delta of every epoch that the run begins; equal epochs share a line. `html`: the
    file that it is drawn in, in the place of a table."""
    plan, schedule, c = planned(c)
    if html is not None:
        if plan is None:
            raise ConfigError(f"--html: over how many images, only those in {c.data_dir} tell")
        write_page(
            plan, [*units(c), *warming(c, plan), *notes(c, schedule), cost(plan)], Path(html)
        )
        show(f"{html}: the plan over {plan.layout.epochs:,} epochs")
        return
    if as_json:
        for row in rows(c, plan, schedule):
            show(json.dumps(row), whole=True)
        return
    stretches = list(inside(plan) if plan and schedule.moves else whole(c, plan, schedule))
    layout = {"epochs": ">9", "lr": ">11", "batch": ">6", "momentum": ">8", "delta": ">10"}
    layout |= {"nu": ">6"} if schedule.changes_nu else {}
    layout |= {"pixels": ">9"} if c.sizes.changes else {}
    layout |= {"updates": ">9"} if plan else {}
    table_rows = [stretch.cells(c, schedule) for stretch in stretches]
    if schedule.moves:  # two numbers where there is one elsewhere
        for name in ("epochs", "lr", "batch", "momentum", "delta"):
            width = max(int(layout[name][1:]), *(len(row[name]) for row in table_rows))
            layout[name] = f">{width}"
    table = Table(layout, least_first=("updates", "momentum"))
    show(table.heading(columns(sys.stdout)))
    for cells in table_rows:
        show(table.row([cells[name] for name in layout], columns(sys.stdout)))
    said = [*units(c), *warming(c, plan), *notes(c, schedule)]
    if schedule.moves:
        said.insert(
            0,
            "epochs are those that are done where a stretch begins and where it ends: within them "
            "this schedule changes",
        )
    for line in [*said, cost(plan) if plan else cost_of_a_folder(c)]:
        show(line)
    if not c.image_size:
        show(
            "the images, which --plan does not open, decide what --image-size and --model are "
            "where they are not given"
        )


def planned(c: Config) -> tuple[Plan | None, Schedule, Config]:
    """The plan, None where only the images tell, the schedule, and the Config with the epochs that
    its --budget takes. Raises ConfigError for what cannot be planned without the images."""
    if c.images is not None:
        plan = make_plan(c, c.images)
        return plan, plan.schedule, plan.config
    if c.limit:
        raise ConfigError(
            f"--plan: how many epochs --budget {c.budget} takes, only the images in "
            f"{c.data_dir} tell"
        )
    schedule = make_schedule(c, None)
    if schedule.moves:
        raise ConfigError(
            "--plan: how the updates lie in an epoch, within which this schedule changes, only the "
            f"images in {c.data_dir} tell"
        )
    return None, schedule, c


class Stretch(NamedTuple):
    """A row of the table: from one update to another, and the Points of both."""

    name: str  # its epochs
    first: Point
    last: Point
    side: int  # of the images, in pixels
    updates: int

    def cells(self, c: Config, schedule: Schedule) -> dict[str, str]:
        """What its columns say: one number, or the first and the last."""
        ends = (self.first, self.last)
        deltas = ["-" if (d := delta_of(c, schedule, p)) is None else f"{d:.4g}" for p in ends]
        return {
            "epochs": self.name,
            "lr": span([f"{p.lr:.6g}" for p in ends]),
            "batch": span([f"{p.batch_size}" for p in ends]),
            "momentum": "-" if c.foreign else span([f"{p.momentum:.4g}" for p in ends]),
            "delta": span(deltas),
            "nu": span(["-" if p.nu is None else f"{p.nu:.4g}" for p in ends]),
            "pixels": f"{self.side}x{self.side}",
            "updates": f"{self.updates:,}",
        }


def span(ends: list[str]) -> str:
    first, last = ends
    return first if first == last else f"{first} to {last}"


def whole(c: Config, plan: Plan | None, schedule: Schedule) -> Iterator[Stretch]:
    """Epochs that are equal, of a schedule that changes between them alone."""
    done = [updates for updates, _ in plan.epochs()] if plan else []
    epochs, sizes = len(done) if plan else c.epochs, c.sizes
    for (p, side), alike in itertools.groupby(range(epochs), lambda e: (schedule(e), sizes(e))):
        first, *rest = alike
        last = rest[-1] if rest else first
        name = f"{first}-{last}" if rest else f"{first}"
        yield Stretch(name, p, p, side, sum(done[first : last + 1]))


def inside(plan: Plan) -> Iterator[Stretch]:
    """Stretches within which nothing changes, or everything goes one way, of a schedule that
    changes within epochs."""
    updates = sum(span.epochs * span.updates for span in plan.spans())
    epochs = range(plan.layout.epochs) if plan.schedule.text is None else plan.sizes.starts
    nus = plan.config.nus.starts if plan.schedule.nus else ()
    starts = {plan.layout.start(epoch).update for epoch in (*epochs, *nus)}
    for course in plan.schedule.text.courses if plan.schedule.text else ():
        starts |= {first for _, _, first in steps(course, plan.layout) if first is not None}
    starts = {first for first in starts if first < updates}
    for first, after in itertools.pairwise([*sorted(starts), updates]):
        begin, last = plan.layout.at(first), plan.layout.at(after - 1)
        end = plan.layout.at(after) if after < plan.layout.updates else None
        yield Stretch(
            f"{begin.epochs:.4g}-{plan.layout.epochs if end is None else end.epochs:.4g}",
            plan.schedule.at(begin),
            plan.schedule.at(last),
            plan.sizes(begin.epoch),
            after - first,
        )


def rows(c: Config, plan: Plan | None, schedule: Schedule) -> Iterator[dict[str, Any]]:
    """What --json has of every epoch."""
    done = [updates for updates, _ in plan.epochs()] if plan else []
    begun = 0  # updates before the epoch
    for epoch in range(len(done) if plan else c.epochs):
        p = schedule.at(plan.layout.start(epoch)) if plan else schedule(epoch)
        row: dict[str, Any] = (
            {"epoch": epoch} | dataclasses.asdict(p) | {"delta": delta_of(c, schedule, p)}
        )
        if p.nu is None:
            del row["nu"]
        if c.foreign:
            row["momentum"] = None
        row |= {"image_size": c.sizes(epoch)} if c.sizes.changes else {}
        if plan and plan.moves(begun) and done[epoch]:
            first, last = plan.point(epoch, begun), plan.point(epoch, begun + done[epoch] - 1)
            row |= {"lr_first": first.lr, "lr_last": last.lr}
            if schedule.batch_moves:
                row |= {"batch_first": first.batch_size, "batch_last": last.batch_size}
        begun += done[epoch] if done else 0
        yield row
