"""What the runs of a sweep are: the combinations of the values of flags, and their names."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastsmooth.cli import config as configs
from fastsmooth.cli import flags as flag_types
from fastsmooth.cli import parse as parsing
from fastsmooth.cli.config import FIELDS
from fastsmooth.cli.flags import ConfigError, flag
from fastsmooth.messages import command
from fastsmooth.runfolder.numbers import LARGEST
from fastsmooth.runfolder.write import refusing
from fastsmooth.sweep.store import Planned, read_sweep

OWN = ("out", "resume", "config")  # flags of train that a sweep sets itself
MOST_RUNS = 100_000
LONGEST_NAME = 120  # bytes


def refuse_seeds(words: list[str]) -> None:
    """Say what --seeds wants where it is followed by several numbers."""
    after = words[words.index("--seeds") + 1 :] if "--seeds" in words else []
    seeds = list(itertools.takewhile(lambda word: not word.startswith("-"), after))
    if len(seeds) > 1:
        named = " ".join(seeds)
        raise ConfigError(
            f"--seeds takes one number N, for the seeds 0 to N - 1: for the seeds {named} write "
            f"--seed {named}"
        )


def parser() -> flag_types.Parser:
    """That of train, where a flag takes several values."""
    p = parsing.parser()
    p.prog, p.usage, p.several = command("sweep"), "%(prog)s --out DIR [flags]", ""
    p.description = (
        "Many runs, one for each combination of the values that flags of fastsmooth.train are "
        "given: --lr 0.01 0.1 --batchsize 8..1024x2 (8 16 ... 1024; 0..4+1 adds). A flag without "
        "effect in a combination is left out there."
    )
    ours = {*OWN, *parsing.REQUESTS} - {"help"}  # which mean something else here
    p.short = {name: line for name, line in p.short.items() if name not in ours}
    p.hideable = FIELDS.keys() - ours
    for action in list(p._actions):
        name = action.dest
        if name in OWN or name in parsing.REQUESTS:
            p._remove_action(action)
            for option in action.option_strings:
                p._option_string_actions.pop(option)
            for group in p._action_groups:
                if action in group._group_actions:
                    group._group_actions.remove(action)
        elif not isinstance(FIELDS[name].default, bool) and not FIELDS[name].metadata["many"]:
            action.nargs = "+"
    g = p.add_argument_group("sweep")
    g.add_argument(
        "--out",
        metavar="DIR",
        type=flag_types.text,
        help="the folder of the runs; given alone: go on with them",
    )
    g.add_argument(
        "--grid",
        metavar="FILE",
        type=flag_types.text,
        help="a TOML file of flags; [[grid]] tables are added up",
    )
    g.add_argument(
        "--seeds",
        metavar="N",
        type=flag_types.whole(1, 10_000),
        help="the seeds 0 to N - 1 of every combination",
    )
    g.add_argument(
        "--jobs",
        metavar="N",
        type=flag_types.whole(1, 1024),
        help="runs at a time (one a GPU, else a processor)",
    )
    g.add_argument(
        "--critical",
        action="store_true",
        help="--mode critical, then b*, C2 and K2, with a sampled C2 at b*",
    )
    g.add_argument(
        "--slurm",
        metavar="FILE",
        type=flag_types.text,
        help="write a job array script and run nothing",
    )
    g.add_argument(
        "--sbatch", metavar="OPTION", action="append", help="a line for it: --sbatch=--time=4:00:00"
    )
    g.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="local",
        type=flag_types.text,
        help="run on a Ray cluster (one started here)",
    )
    g.add_argument("--plan", action="store_true", help="list the runs, do nothing")
    g.add_argument(
        "--run",
        metavar="I",
        type=flag_types.whole(0),
        help="do run number I of the sweep in --out, nothing else",
    )
    p.help_in(g)
    return p


def expanded(words: Iterable[str]) -> list[str]:
    """The words with ranges written out: 8..64x2 is 8 16 32 64, 0..4+2 is 0 2 4."""
    return [value for word in words for value in values_of(word)]


def values_of(word: str) -> list[str]:
    written = r"(?:(--?[\w-]+)=)?([\d.e-]+?)\.\.([\d.e-]+)([x+])([\d.e-]+)"
    # of a longer word the expression would try every beginning
    range_ = re.fullmatch(written, word) if len(word) <= 200 else None
    if range_ is None:
        return [word]
    name, *numbers = range_.groups()
    try:
        first, last, by = float(numbers[0]), float(numbers[1]), float(numbers[3])
    except ValueError:
        return [word]
    grows = 1 < by <= LARGEST if numbers[2] == "x" else by > 0
    if not (0 <= first <= last <= LARGEST and grows and (numbers[2] == "+" or first > 0)):
        raise ConfigError(
            f"{word} is not a range: write FIRST..LASTxFACTOR or FIRST..LAST+STEP, as in 8..1024x2"
        )
    values = []
    for k in range(MOST_RUNS):
        value = first * by**k if numbers[2] == "x" else first + by * k
        if value > last * (1 + 1e-9):
            break
        values.append(f"{value:.12g}")
    else:
        raise ConfigError(f"{word} has over {MOST_RUNS:,} values: take a larger step")
    return ([name] if name else []) + values


def grid_runs(given: dict[str, Any], own: dict[str, Any], out: Path) -> list[Planned]:
    """The runs in `out` that flags and --grid describe. Raises ConfigError for a combination that
    cannot be run."""
    shared, tables = read_grid(own["grid"]) if "grid" in own else ({}, [{}])
    distinct: dict[str, dict[str, Any]] = {}  # what is given, by what it comes to
    asked: set[str] = set()
    for table in tables:
        axes = shared | table | given
        if "seeds" in own:
            if "seed" in axes:
                raise ConfigError("--seed and --seeds both choose the seeds: give one of them")
            axes["seed"] = list(range(own["seeds"]))
        if own.get("critical") and axes.setdefault("mode", ["critical"]) != ["critical"]:
            raise ConfigError("--critical is a sweep of --mode critical: leave --mode out")
        asked |= axes.keys()
        if math.prod(len(listed(axes, name)) for name in axes) > MOST_RUNS:
            raise ConfigError(f"the grid has over {MOST_RUNS:,} runs: give fewer values")
        for one in map(parsing.over_finished, combinations(axes)):
            kept = configs.without_idle(one)
            comes_to = configs.resolve(kept).to_json()
            distinct.setdefault(json.dumps(comes_to, sort_keys=True), kept)
    runs = list(distinct.values())
    for name in sorted(asked - {name for one in runs for name in one} - {"method"}):
        raise ConfigError(
            f"{flag(name)} has no effect in any of the {len(runs)} runs: leave it out"
        )
    return named(runs, out)


def listed(axes: dict[str, Any], name: str) -> list[Any]:
    """The values of an axis; what train takes as a list or a switch is one value."""
    value = axes[name]
    return value if isinstance(value, list) and not FIELDS[name].metadata["many"] else [value]


def combinations(axes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every choice of one value an axis, in the order of train's flags, the seed fastest."""
    names = [name for name in FIELDS if name in axes and name != "seed"]
    names += ["seed"] if "seed" in axes else []
    for values in itertools.product(*(listed(axes, name) for name in names)):
        pairs = zip(names, values, strict=True)
        yield {name: tuple(v) if isinstance(v, list) else v for name, v in pairs}


def named(given: list[dict[str, Any]], out: Path) -> list[Planned]:
    """Runs with names made of the flags in which they differ."""
    names = [name for name in FIELDS if len({repr(one.get(name)) for one in given}) > 1]
    wanted = []
    for one in given:
        differs = {name: one[name] for name in names if name in one}
        parts = [f"{flag(k).strip('-')}={configs.shown(v)}" for k, v in differs.items()]
        plain = re.sub(r"[^\w.=+-]", "-", "_".join(parts)).encode()[:LONGEST_NAME]
        name = plain.decode(errors="ignore") or "run"
        wanted.append(Planned(name, tuple(words(one)), differs))
    return apart(wanted, out)


def apart(wanted: list[Planned], out: Path) -> list[Planned]:
    """The runs with a folder each in `out`: that which they have there already, else one of this
    name that none has.

    Two names that are one where case does not count, or where accents are stored otherwise, are
    told apart too.
    """
    # that of Path raises what a name that is too long meets
    before = read_sweep(out) if os.path.exists(out / "sweep.json") else []
    had = {run.flags: run.name for run in before}
    with refusing(out):
        there = os.listdir(out) if os.path.isdir(out) else []
    taken = {same(name) for name in (*had.values(), *there)}
    runs = []
    tried: collections.Counter[str] = collections.Counter()
    for run in wanted:
        if run.flags not in had:
            name = run.name
            while same(name) in taken:
                tried[run.name] += 1
                name = f"{run.name}_{tried[run.name] + 1}"
            taken.add(same(name))
            had[run.flags] = name
        runs.append(dataclasses.replace(run, name=had[run.flags]))
    return runs


def same(name: str) -> str:
    """What two names have in common that some file system takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def words(given: dict[str, Any]) -> Iterator[str]:
    """The command line of what was given."""
    for name, value in given.items():
        if value is True:
            yield flag(name)
        elif isinstance(value, tuple):
            yield from (flag(name), *map(str, value))
        elif value is not False:
            yield f"{flag(name)}={value}"


def read_grid(path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what all runs share, the tables that are added up) of a TOML file, as parsed."""
    source = f"--grid {path}"
    table = flag_types.toml_table(path, source)
    tables = table.pop("grid", [{}])
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise ConfigError(f"{source}: write [[grid]] above each set of flags")
    shared, *rest = (grid_table(t, source) for t in (table, *tables))
    return shared, rest


def grid_table(table: dict[str, Any], source: str) -> dict[str, Any]:
    try:
        long = {
            key: expanded(map(str, v if isinstance(v, list) else [v]))
            for key, v in table.items()
            if not isinstance(v, bool | dict)
        }
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    values = parsing.from_table(parser(), table | long, source)
    stranger = next((name for name in values if name not in FIELDS or name == "out"), None)
    if stranger:
        raise ConfigError(f"{source}: {stranger} belongs on the command line")
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
