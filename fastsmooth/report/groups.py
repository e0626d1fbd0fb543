"""Runs sorted into configurations: what tells these apart, what they are called, and what their
seeds say together."""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fastsmooth.cli.config import FIELDS, MODES
from fastsmooth.cli.facts import FILE_SETS
from fastsmooth.forms import FORMS
from fastsmooth.runfolder.numbers import SMALLEST, deviation, mean, number
from fastsmooth.runfolder.read import SavedRun
from fastsmooth.schedule import METHODS
from fastsmooth.sweep.critical import NO_RESULT

# What may differ between runs of one configuration: the seed, and what changes where or how fast a
# run goes, not where to.
REPETITION = {"seed", "compile", "deterministic", "hw_decoder_load", "decoder_device_memory"}
REPETITION |= {"decoder_host_memory"} | NO_RESULT - {"epochs", "decay_epoch", "budget"}

# In names: these whenever they differ, others only where these leave two configurations with one
# name.
SPOKEN = (
    "dataset", "data", "model", "norm", "mode", "method", "optimizer", "lr", "batch_size", "beta",
    "nu", "power", "gamma",
    "epochs", "budget",
)  # fmt: skip
BARE = {"dataset", "data", "model", "optimizer", "budget"}  # their values speak for themselves
WORDS = {"batch_size": "batch", "c2": "C²", "k2": "K²"}
KNOWN = {name: i for i, name in enumerate((*METHODS, *FORMS, *MODES))}
LONGEST = 48  # characters of a value that are shown


def real(value: Any) -> float | None:
    """A float that axes can be made of, or None for anything else that a file may hold."""
    if not number(value):
        return None
    return float(value) if abs(value) >= SMALLEST else 0.0


@dataclass(frozen=True)
class Sample:
    """One number of every run of a configuration that has it, of at least one."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def sd(self) -> float | None:
        """With n - 1; None for one run."""
        return deviation(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)


@dataclass(frozen=True)
class Group:
    """A configuration: runs that differ in their seeds alone."""

    config: dict[str, Any]  # what its runs have in common, without paths and devices
    runs: tuple[SavedRun, ...]  # by seed
    name: str = ""
    key: str = ""  # a letter that stands for the name

    @property
    def mode(self) -> str:
        mode = self.config.get("mode")
        return mode if isinstance(mode, str) else "normal"

    @property
    def done(self) -> list[SavedRun]:
        return [run for run in self.runs if run.state == "done"]

    def sample(self, number_of: Callable[[SavedRun], float | None]) -> Sample | None:
        """What the finished runs say; None where none does."""
        values = tuple(v for v in map(number_of, self.done) if v is not None)
        return Sample(values) if values else None

    def unfinished(self) -> dict[str, int]:
        """How many runs are in each other state."""
        states = [run.state for run in self.runs if run.state != "done"]
        return {state: states.count(state) for state in sorted(set(states))}

    def unit(self) -> str:
        """The unit of its delta: 1, or the root of C², "C", where no gradient variance was given or
        published."""
        return "" if real(self.config.get("c2")) is not None else "C"


# Sorting


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that a configuration consists of; a schedule by hand is its method, and a folder
    of images goes by its last name, wherever it lies."""
    kept = {name: value for name, value in config.items() if name not in REPETITION}
    if kept.get("schedule") is not None:  # which stands in the place of a method
        kept["method"] = kept.pop("schedule")
    if config.get("dataset") in FILE_SETS | {"npz"} and isinstance(config.get("data_dir"), str):
        kept["data"] = Path(config["data_dir"]).name
    return kept


def group(runs: Iterable[SavedRun]) -> list[Group]:
    """The configurations, by mode and in the order of their settings, with keys, and with names
    that tell those of a mode apart."""
    alike: dict[str, list[SavedRun]] = {}
    for run in runs:
        alike.setdefault(json.dumps(identity(run.config), sort_keys=True), []).append(run)

    def by_seed(run: SavedRun) -> tuple[Any, ...]:
        return order(run.config.get("seed")), str(run.path)

    members = [tuple(sorted(some, key=by_seed)) for some in alike.values()]
    configs = [identity(some[0].config) for some in members]
    fields = ("mode", *differing(configs))
    ranked = [Group(*pair) for pair in zip(configs, members, strict=True)]
    ranked.sort(key=lambda g: [order(g.config.get(f)) for f in fields])
    names: dict[int, str] = {}
    for some in by_mode(ranked).values():
        same = [g.config for g in some]
        names |= zip(map(id, some), names_of(same, differing(same)), strict=True)
    return [replace(g, name=names[id(g)], key=letters(i)) for i, g in enumerate(ranked)]


def by_mode(grouped: Iterable[Group]) -> dict[str, list[Group]]:
    """The configurations of each mode."""
    parts: dict[str, list[Group]] = {}
    for g in grouped:
        parts.setdefault(g.mode, []).append(g)
    return parts


def differing(configs: list[dict[str, Any]]) -> list[str]:
    """The settings that are not the same in all, those first that names speak of."""
    every = {name for config in configs for name in config}
    rank = {name: i for i, name in enumerate(SPOKEN)}

    def values(name: str) -> set[str]:
        return {json.dumps(config.get(name), sort_keys=True) for config in configs}

    several = [name for name in every if len(values(name)) > 1]
    return sorted(several, key=lambda name: (rank.get(name, len(rank)), name))


def shared(configs: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings that all have, those first that names speak of."""
    other = set(differing(configs))
    first = {name: configs[0][name] for name in SPOKEN if name in configs[0] and name not in other}
    return first | {name: value for name, value in configs[0].items() if name not in other}


def told(name: str, value: Any, grouped: Iterable[Group]) -> bool:
    """Whether a setting that all have is worth telling: names speak of it, and in one of them at
    least it does something."""
    return name in SPOKEN and value is not None and any(has_effect(name, g.config) for g in grouped)


def has_effect(name: str, config: dict[str, Any]) -> bool:
    """Whether a setting does anything beside the others, by the rule of the flags."""
    only = FIELDS[name].metadata["only"] if name in FIELDS else None
    return only is None or shown(config.get(only[0])) in only[1]


def names_of(configs: list[dict[str, Any]], fields: list[str]) -> list[str]:
    """A name for each, made of the settings that tell them apart."""
    used = telling(configs, fields)
    return [spoken(config, used) for config in configs]


def telling(configs: list[dict[str, Any]], fields: list[str]) -> list[str]:
    """Of the settings that differ those that are always said, and as few of the others as tell all
    apart; method and optimizer where none differs."""
    used = list(fields)
    for name in reversed(fields):
        fewer = [f for f in used if f != name]
        distinct = {spoken(config, fewer) for config in configs}
        if name not in SPOKEN and len(distinct) == len(configs):
            used = fewer
    return used or ["method", "optimizer"]


def spoken(config: dict[str, Any], fields: Iterable[str]) -> str:
    return ", ".join(setting(name, config.get(name)) for name in fields)


def setting(name: str, value: Any) -> str:
    """A setting in words: method hybrid, sgd, lr 0.1, batch 32."""
    return shown(value) if name in BARE and value is not None else f"{word(name)} {shown(value)}"


def word(name: str) -> str:
    """What a setting is called."""
    return WORDS.get(name, shown(name.replace("_", " ")))


def shown(value: Any) -> str:
    """A value as one line of text, less what a page cannot hold or turns its direction."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        value = " ".join(map(shown, value[:LONGEST]))
    if isinstance(value, int):
        value = whole(value)
    text = clean(value if isinstance(value, str) else json.dumps(value))
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def whole(value: int) -> str:
    return str(value) if abs(value) < 10**LONGEST else "a huge number"


def clean(text: str) -> str:
    """Without control characters, surrogates, characters that are none and marks of direction:
    U+FFFD stands for each."""
    text = " ".join(text.split())
    return re.sub(
        "[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufffe\uffff]",
        "\ufffd",
        text,
    )


def order(value: Any) -> tuple[Any, ...]:
    """A key that sorts numbers by size, methods and optimizers as they are listed, and text with
    its numbers by size."""
    number = real(value)
    if number is not None:
        return (0, number, "")
    if value is None:
        return (-1, 0, "")
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return (1, KNOWN.get(text, len(KNOWN)), [p.zfill(12) for p in re.split(r"(\d{1,12})", text)])


def letters(index: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    first, last = divmod(index, 26)
    return (letters(first - 1) if first else "") + string.ascii_uppercase[last]


# Numbers of a run


@cache
def epochs(run: SavedRun) -> list[dict[str, Any]]:
    """Its epoch rows, one an epoch, in order: of an epoch that was done twice the last. Asked for
    with every number."""
    rows: dict[int, dict[str, Any]] = {}
    for row in run.of_kind("epoch"):
        at = real(row.get("epoch"))
        if at is not None and at >= 0 and at == int(at):
            rows[int(at)] = row
    return [rows[at] for at in sorted(rows)]


def last(run: SavedRun, name: str) -> float | None:
    """A number of the last epoch's row."""
    rows = epochs(run)
    return real(rows[-1].get(name)) if rows else None


def first(run: SavedRun, name: str) -> float | None:
    rows = epochs(run)
    return real(rows[0].get(name)) if rows else None


def final_accuracy(run: SavedRun) -> float | None:
    """Of the test set, a share. summary.json has the last word; where it is silent, the rows."""
    accuracy = real(run.summary.get("final_test_acc"))
    return last(run, "test_acc") if accuracy is None else accuracy


def best_accuracy(run: SavedRun) -> float | None:
    accuracy = real(run.summary.get("best_test_acc"))
    values = [v for row in epochs(run) if (v := real(row.get("test_acc"))) is not None]
    return max(values, default=None) if accuracy is None else accuracy


def reached(run: SavedRun, name: str) -> float | None:
    """updates or samples of the whole run."""
    total = real(run.summary.get(name))
    if total is not None:
        return total
    counts = [real(row.get("step" if name == "updates" else name)) for row in run.rows]
    return max((v for v in counts if v is not None), default=None)


def seconds(run: SavedRun) -> float | None:
    """Of training and testing, over all epochs and processes; else of the last process."""
    parts = ("train_seconds", "eval_seconds")
    spent = [real(row.get(part)) for row in epochs(run) for part in parts]
    known = [v for v in spent if v is not None]
    return math.fsum(known) if known else real(run.summary.get("seconds"))
