"""Runs compared in a terminal, a line a configuration; and for other programs, a line a run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fastsmooth.messages import csv_line
from fastsmooth.report import groups, page
from fastsmooth.report.groups import Group, Sample, real
from fastsmooth.report.runs import Row, by_configuration, measurements
from fastsmooth.runfolder.read import SavedRun
from fastsmooth.terminal import Table, cells

MOST_REMARKS = 12  # runs of which a line says what is wrong with them


@dataclass(frozen=True)
class Number:
    """A column of numbers: its heading, and how a mean and its standard error are written."""

    heading: str
    mean: str = ".4g"
    error: str = ".2g"
    factor: float = 1.0
    planned: bool = False  # by the settings: without an error where all runs agree


NUMBERS = {  # by the key that the rows of load_runs have
    "final_test_acc": Number("test acc %", ".2f", ".2f", 100.0),
    "final_test_loss": Number("test loss", ".4f", ".4f"),
    "final_train_loss": Number("train loss", ".4f", ".4f"),
    "best_test_acc": Number("best acc %", ".2f", ".2f", 100.0),
    "delta_start": Number("delta start", planned=True),
    "delta_end": Number("delta end", planned=True),
    "c2_sampled_end": Number("C2 sampled"),
    "noise_scale_end": Number("noise scale"),
    "delta_measured_end": Number("delta measured"),
    "noise_norm_end": Number("noise norm"),
    "updates": Number("updates", ",.0f", ",.0f", planned=True),
    "train_seconds": Number("train s", ".1f", ".1f"),
}
# What a narrow terminal goes without, the first first; sharpness goes before all.
LEAST_FIRST = (
    "train s", "updates", "best acc %", "delta start", "delta end", "train loss", "noise scale",
    "delta measured", "noise norm", "C2 sampled", "test loss",
)  # fmt: skip
MEANING = "mean +- standard error (deviation / sqrt n) over the n runs that are done"
SOME = "(of k): over the k of them that have the number"
# What depends on how it is measured: no mean is taken over several ways.
MEASURED = ("c2_sampled_end", "noise_scale_end", "delta_measured_end", "noise_norm_end")
# What words below the table say of columns that are there.
EXPLAINED = {
    ("test acc %", "test loss", "train loss"): "of the last epoch",
    ("C2 sampled", "noise scale", "delta measured", "noise norm"): "of the last measurement",
}
UNIT = " C"  # of delta, as the lines of a run have it


def in_csv(runs: list[SavedRun]) -> Iterator[str]:
    """A line of column names, then a line a run: the rows of load_runs, floats with all their
    digits."""
    rows = [row for _, some in by_configuration(runs) for row in some]
    yield csv_line(rows[0])
    for row in rows:
        yield csv_line("" if value is None else str(value) for value in row.values())


def in_words(runs: list[SavedRun], room: int | None) -> Iterator[str]:
    """What the runs are, the table, in lines of at most `room` columns as far as that can be, and
    what it leaves out."""
    parts = by_configuration(runs)
    grouped = [g for g, _ in parts]
    yield ": ".join([page.title(grouped), page.counts(runs, grouped)])
    if same := page.same_settings(grouped):
        yield same
    columns = settings(grouped) | {"n": [str(len(g.done)) for g in grouped]} | numbers(parts)
    columns["not done"] = [
        ", ".join(f"{count} {groups.shown(state)}" for state, count in g.unfinished().items())
        for g in grouped
    ]
    columns = {heading: column for heading, column in columns.items() if any(column)}
    sharpest = [heading for heading in columns if heading.startswith("sharpness ")]
    table = Table(
        {heading: layout(heading, column) for heading, column in columns.items()},
        (*sharpest, *LEAST_FIRST),
    )
    rows = [[column[i] or "-" for column in columns.values()] for i in range(len(grouped))]
    for row in (table.layout, *rows):  # the longest says what has no room
        table.row(row, room)
    yield table.heading(room)
    yield from (table.row(row, room) for row in rows)
    left = {heading: column for heading, column in columns.items() if heading not in table.gone}
    yield from meaning(left, grouped)
    if table.gone:
        left_out = ", ".join(heading for heading in columns if heading in table.gone)
        yield f"no room for: {left_out}; --csv has every number of every run"
    yield from remarks(parts)


# Columns, by their heading: a text for each configuration


def settings(grouped: list[Group]) -> dict[str, list[str]]:
    """Those that tell the configurations apart."""
    configs = [g.config for g in grouped]
    names = groups.telling(configs, groups.differing(configs))
    return {groups.word(name): [groups.shown(c.get(name)) for c in configs] for name in names}


def numbers(parts: list[tuple[Group, list[Row]]]) -> dict[str, list[str]]:
    """Those that a finished run has."""
    columns = NUMBERS | {
        name: Number(f"updates to eps {groups.clean(eps[1])}", ",.0f", ",.0f")
        if (eps := re.fullmatch("eps_(.+)_update", name))
        else Number(groups.clean(name.replace("_", " ")))
        for name in parts[0][1][0]
        if name.startswith("sharpness_") or re.fullmatch("eps_(.+)_update", name)
    }
    return {number.heading: cells_of(name, number, parts) for name, number in columns.items()}


def cells_of(name: str, number: Number, parts: list[tuple[Group, list[Row]]]) -> list[str]:
    """Means below means, and errors below errors."""
    pairs = []
    for g, rows in parts:
        values = [real(row[name]) for row in rows if row["state"] == "done"]
        known = tuple(v for v in values if v is not None)
        if not known or (name in MEASURED and len(ways(g)) > 1):
            pairs.append(("", ""))
            continue
        unit = UNIT if name in ("delta_start", "delta_end") and g.unit() else ""
        mean, error = pair(Sample(known), number, unit)
        pairs.append((mean, error + f" (of {len(known)})" * (len(known) < len(values))))
    wide, wider = (max(map(len, texts)) for texts in zip(*pairs, strict=True))
    return [f"{mean:>{wide}}{error:<{wider}}" if mean else "" for mean, error in pairs]


def ways(g: Group) -> list[str]:
    """How the noise of its finished runs was measured, in words."""
    rows = [rows[-1] for run in g.done if (rows := measurements(run))]
    words = (
        f"{groups.shown(row.get('estimator'))} with BatchNorm {groups.shown(row.get('bn'))}"
        if "estimator" in row
        else "by draws"
        for row in rows
    )
    return sorted(set(words))


def pair(sample: Sample, number: Number, unit: str) -> tuple[str, str]:
    mean = f"{sample.mean * number.factor:{number.mean}}{unit}"
    if sample.sd is None or (number.planned and not sample.sd):
        return mean, ""
    error = sample.sd / math.sqrt(sample.n) * number.factor
    return mean, f" +- {error:{number.error}}"


def layout(heading: str, column: list[str]) -> str:
    """How a column is set: text to the left, numbers to the right."""
    numeric = all(re.match(r" *[-+]?[\d.]", text) or not text for text in column)
    return f"{'>' if numeric else '<'}{max(map(cells, (heading, *column)))}"


# Below the table


def meaning(shown: dict[str, list[str]], grouped: list[Group]) -> Iterator[str]:
    """What the numbers in the columns are."""
    words = [MEANING]
    if any(" (of " in text for column in shown.values() for text in column):
        words.append(SOME)
    for headings, said in EXPLAINED.items():
        there = [heading.removesuffix(" %") for heading in headings if heading in shown]
        words += [f"{', '.join(there)}: {said}"] if there else []
    if shown.keys() & {"delta start", "delta end"} and any(g.unit() for g in grouped):
        words.append("C: in units of the root of C2, which was not given")
    yield "; ".join(words)


def remarks(parts: list[tuple[Group, list[Row]]]) -> Iterator[str]:
    """Runs that are in no mean, or of which something is left out."""
    yield from page.seeds_twice([g for g, _ in parts])
    for g, _ in parts:
        if len(several := ways(g)) > 1:
            yield (
                f"{g.name}: its noise was measured {' and '.join(several)}, of which no mean is "
                "taken: --csv has the numbers of each run"
            )
    rows = [row for _, some in parts for row in some]
    told = [row for row in rows if row["remarks"] or row["state"] != "done"]
    for row in told[:MOST_REMARKS]:
        yield ": ".join(filter(None, (groups.shown(row["state"]), row["run"], row["remarks"])))
    if len(told) > MOST_REMARKS:
        yield f"and {len(told) - MOST_REMARKS} more of which --csv has the remarks"
