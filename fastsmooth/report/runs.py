"""Runs as rows of a data frame: settings, state, results and what was measured, a dict each; or
their rows of metrics.jsonl."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from fastsmooth.cli.config import FIELDS, WHEREABOUTS
from fastsmooth.names import about_value
from fastsmooth.report import curves, grid, groups, noise, page
from fastsmooth.report.groups import SPOKEN, Group, real
from fastsmooth.runfolder.numbers import exact
from fastsmooth.runfolder.read import SavedRun, read_runs

Row = dict[str, Any]

KINDS = ("epoch", "step", "measure")
# Settings that say where files lie and how often they are written: no comparison is about them.
KEEPING = WHEREABOUTS | {"checkpoint_every", "log_every", "keep"}
PREFIX = "config_"  # of settings in rows of metrics.jsonl, which have an lr of their own
HEADING = ("run", "configuration", "state")
FIRST = [*(name for name in SPOKEN if name in FIELDS), "seed"]
RESULTS = (
    "final_test_acc", "final_test_loss", "final_train_acc", "final_train_loss", "best_test_acc",
    "best_epoch", "epochs_done", "updates", "samples", "train_seconds", "eval_seconds", "seconds",
    "images_per_second",
)  # fmt: skip
JUDGED = ("train_acc", "train_loss", "test_", "ema_")  # columns of epoch rows begin so
ENDS = ("start", "end")
CONSTANTS = (
    "c2_sampled", "c2_sampled_se", "noise_scale", "k2", "delta_measured", "noise_norm",
    "noise_norm_se", "full_grad_norm", "full_grad_norm_se",
)  # fmt: skip


def load_runs(*paths: str | PathLike[str], rows: str | None = None) -> list[Row]:
    """The runs in the folders `paths`, or in folders below them, as rows that pandas.DataFrame
    takes: each a flat dict, all with the same keys, None where a run has nothing to say.

        runs = pandas.DataFrame(fs.load_runs("runs/"))
        runs.groupby("configuration")["final_test_acc"].agg(["mean", "sem", "count"])

    rows=None gives one a run, ordered by configuration, then seed:

        run: its folder, as far as it differs from the others'; path: the whole of it
        configuration: a name for the settings in which the runs differ, whatever the seed
        state: done, running, preempted, diverged, failed or unknown; remarks: why, and what of the
            folder was left out
        method, lr, batch_size, seed, ...: the settings of config.json, less those about the keeping
            of files; several values as one text, the way the command line takes them
        final_test_acc, final_train_acc, best_test_acc (shares), final_test_loss, updates, ...: what
            summary.json says; of a run that is not done, what its rows say so far. epochs is the
            setting, epochs_done how many there were; seconds is of the last process, train_seconds
            and eval_seconds of all epochs
        delta_start, delta_end: the degree of smoothing by schedule, in the first and the last epoch
        c2_sampled_start, c2_sampled_end and so on: the first and the last measurement, of
            --track-noise (c2_sampled, noise_scale, k2, delta_measured) or of --mode sampling
            (c2_sampled, noise_norm, full_grad_norm); _se_ are standard errors; measured_at_start
            and measured_at_end the updates
        eps_X_update, eps_X_samples: where --mode critical first saw the criterion at most X
        sharpness_...: by algorithm, rho and images, as fastsmooth.sharpness measured it

    rows="epoch", "step" or "measure" gives the rows of that kind of metrics.jsonl, each with run,
    configuration, state, and, as config_NAME, the settings in which the runs differ.

    Warns of a folder below `paths` whose config.json is damaged, and leaves it out. Raises
    ValueError in one line: RunError where a path is no run and holds none.
    """
    if rows is not None and rows not in KINDS:
        raise ValueError(f"load_runs: rows {rows!r}: {about_value('', str(rows), KINDS)}")
    several = next((path for path in paths if not isinstance(path, str | PathLike)), None)
    if several is not None:
        raise ValueError(
            f"load_runs: a path is a {type(several).__name__}: give each as an argument, as in "
            "load_runs(*paths)"
        )
    if not paths:
        raise ValueError("load_runs: no path: name run folders, or folders that hold them")
    runs, left_out = read_runs([Path(path) for path in paths])
    for why in left_out:
        warnings.warn(why, stacklevel=2)
    if rows is None:
        return [row for _, some in by_configuration(runs) for row in some]
    return rows_of_kind(runs, rows)


def by_configuration(runs: Iterable[SavedRun]) -> list[tuple[Group, list[Row]]]:
    """A row for each run, those of a configuration together."""
    grouped = groups.group(runs)
    settings = settings_of(grouped)
    rows = []
    for run, row in named(grouped):
        row |= {name: plain(run.config.get(name)) for name in FIRST}
        for more in (results(run), measured(run)):
            row |= {name: value for name, value in more.items() if name not in settings}
        row |= {name: plain(run.config.get(name)) for name in settings if name not in row}
        rows.append(row | {"remarks": "; ".join(page.remarks(run)), "path": str(run.path)})
    whole = iter(filled(rows))
    return [(g, [next(whole) for _ in g.runs]) for g in grouped]


def rows_of_kind(runs: Iterable[SavedRun], kind: str) -> list[Row]:
    """Their rows of metrics.jsonl of that kind, in the order in which they were written."""
    grouped = groups.group(runs)
    configs = [run.config for g in grouped for run in g.runs]
    differing = [name for name in groups.differing(configs) if name not in KEEPING]
    rows = []
    for run, heading in named(grouped):
        heading |= {PREFIX + name: plain(run.config.get(name)) for name in differing}
        rows += [heading | row | heading for row in run.of_kind(kind)]
    return filled(rows)


def named(grouped: list[Group]) -> Iterator[tuple[SavedRun, Row]]:
    """Each run, and what its rows begin with."""
    names = iter(page.short_paths([run.path for g in grouped for run in g.runs]))
    several = len(groups.by_mode(grouped)) > 1  # a mode's names tell its own apart
    for g in grouped:
        called = f"{groups.shown(g.mode)}: {g.name}" if several else g.name
        for run in g.runs:
            yield run, dict(zip(HEADING, (next(names), called, run.state), strict=True))


def settings_of(grouped: list[Group]) -> list[str]:
    """The settings that flags have, then others that a config.json has."""
    every = {name for g in grouped for run in g.runs for name in run.config}
    others = sorted(every - FIELDS.keys() - {*HEADING, "remarks", "path"})
    return [name for name in (*FIELDS, *others) if name not in KEEPING]


def plain(value: Any) -> Any:
    """A value as a cell; several as the command line takes them."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else value


def filled(rows: list[Row]) -> list[Row]:
    """The rows with all keys in each, None where there was none."""
    keys: Row = dict.fromkeys(name for row in rows for name in row)
    return [keys | row for row in rows]


def results(run: SavedRun) -> Row:
    """What came out of it. summary.json has the last word; where it is silent, the rows."""
    epochs = groups.epochs(run)
    tests = [(v, row["epoch"]) for row in epochs if (v := real(row.get("test_acc"))) is not None]
    best, at = max(tests, key=lambda pair: pair[0], default=(None, None))
    found: Row = dict.fromkeys(RESULTS)
    for name, value in epochs[-1].items() if epochs else ():
        if name.startswith(JUDGED):
            found[f"final_{name}"] = plain(value)
    found |= {"best_test_acc": best, "best_epoch": at, "epochs_done": len(epochs)}
    found |= {name: whole(groups.reached(run, name)) for name in ("updates", "samples")}
    for name in ("train_seconds", "eval_seconds"):
        spent = [v for row in epochs if (v := real(row.get(name))) is not None]
        found[name] = math.fsum(spent) if spent else None
    said = {name: plain(value) for name, value in run.summary.items() if value is not None}
    if "epochs" in said:  # which is a setting too
        said["epochs_done"] = said.pop("epochs")
    return found | said


def whole(value: float | None) -> float | None:
    return int(value) if value is not None and value == int(value) else value


def measurements(run: SavedRun) -> list[Row]:
    """Those of --track-noise, else of --mode sampling."""
    return [row for row in run.of_kind("measure") if curves.tracked(row)] or noise.points(run)


def measured(run: SavedRun) -> Row:
    """The constants of its noise by schedule and as they were measured; what else its files say."""
    found: Row = {"delta_start": groups.first(run, "delta"), "delta_end": groups.last(run, "delta")}
    found |= dict.fromkeys(f"{name}_{end}" for name in (*CONSTANTS, "measured_at") for end in ENDS)
    rows = measurements(run)
    for end, row in zip(ENDS, (rows[0], rows[-1]), strict=True) if rows else ():
        found |= {f"{name}_{end}": real(row.get(name)) for name in CONSTANTS}
        found[f"measured_at_{end}"] = whole(real(row.get("step")))
    crossings = run.critical.get("crossings")
    for eps, entry in crossings.items() if isinstance(crossings, dict) else ():
        at = entry if isinstance(entry, dict) else {}
        found[f"eps_{eps}_update"] = whole(real(at.get("step")))
        found[f"eps_{eps}_samples"] = whole(real(at.get("samples")))
    for (algorithm, adaptive, rho, split), value in grid.sharpness_of(run).items():
        adapted = "adaptive_" * adaptive
        found[f"sharpness_{adapted}{algorithm}_rho_{exact(rho)}_{split}"] = value
    return found
