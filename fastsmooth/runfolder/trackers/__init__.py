"""Rows go to trackers too, where asked: adapters at the edge, behind one guard, so that none of
them stops or changes a run."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fastsmooth.messages import one_line
from fastsmooth.runfolder.files import read_object, replace
from fastsmooth.runfolder.read import read_rows


class Row(NamedTuple):
    """The numbers of a row of metrics.jsonl, each as kind/key, and the update that it is of."""

    update: int
    numbers: dict[str, float]


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told of a run: its folder and name, its config, and what the trackers
    before a --resume have been told, which are the rows that metrics.jsonl holds."""

    folder: Path
    name: str
    config: dict[str, Any]
    rows: list[Row]


class Tracker(Protocol):
    """One of the modules' classes; it may raise whatever it likes, and is then left out."""

    where: str  # the rows are, in words; empty where they go nowhere, and then it is told no more

    def row(self, row: Row) -> None: ...

    def finish(self, summary: dict[str, Any], update: int, exit_code: int) -> None: ...


# By name, the class in the module of that name that is made of a Tracked. What is installed for it
# has that name as well, and so has the extra that does.
TRACKERS = {"wandb": "Wandb", "trackio": "Trackio", "tensorboard": "Tensorboard"}


class Trackers:
    """The trackers of a run, by name; they begin with start(), once the run stands where it goes
    on. What one of them raises becomes one warning, and the run goes on without it."""

    def __init__(
        self,
        names: tuple[str, ...],
        config: dict[str, Any],
        folder: Path,
        warn: Callable[[str], None],
    ):
        self._names, self._config, self._folder, self._warn = names, config, folder, warn
        self._trackers: dict[str, Tracker] = {}
        self._update = 0

    @property
    def where(self) -> list[str]:
        """A line for each: where the rows are, and how to look at them."""
        return [f"{name}: {tracker.where}" for name, tracker in self._trackers.items()]

    def start(self) -> None:
        rows: list[Row] | None = None
        for name in self._names:
            with self._guarded(name):
                if rows is None:
                    found = map(told, read_rows(self._folder / "metrics.jsonl")[0])
                    rows = [row for row in found if row is not None]
                    self._update = max((row.update for row in rows), default=0)
                run = Tracked(self._folder, self._folder.absolute().name, self._config, rows)
                module = importlib.import_module(f"{__name__}.{name}")
                tracker = getattr(module, TRACKERS[name])(run)
                if tracker.where:
                    self._trackers[name] = tracker

    def row(self, kind: str, values: dict[str, Any]) -> None:
        row = told({"kind": kind} | values)
        if row is None:
            return
        self._update = row.update
        for name, tracker in list(self._trackers.items()):
            with self._guarded(name):
                tracker.row(row)

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._guarded(name):
                tracker.finish(summary, self._update, exit_code)
        self._trackers = {}

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            self._trackers.pop(name, None)
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                self._warn(
                    f"--tracker {name}: {name} is not installed, so nothing is sent: pip install "
                    f"'fastsmooth[{name}]'"
                )
            else:
                ended = f"it called sys.exit({error})"
                why = one_line(error) if isinstance(error, Exception) else ended
                self._warn(f"{name}: {why}: going on without it")


def numbers(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """Those that metrics.jsonl holds as numbers, named kind/key."""
    found = {key: v for key, v in values.items() if isinstance(v, int | float)}
    return {f"{kind}/{key}": v for key, v in found.items() if math.isfinite(v)}


def told(row: dict[str, Any]) -> Row | None:
    """What trackers are told of a row of metrics.jsonl; None where it is none of a run's."""
    kind, update = row.get("kind"), row.get("step")
    if not isinstance(kind, str) or not isinstance(update, int):
        return None
    return Row(update, numbers(kind, row))


def known_id(path: Path) -> str | None:
    """The id by which a tracker knows the run, as the run folder keeps it, so that a resumed run
    goes on as the same one; None where it has none yet."""
    known = (read_object(path) or {}).get("id")
    return known if isinstance(known, str) and re.fullmatch(r"[0-9a-f]{16}", known) else None


def new_id() -> str:
    """A random one."""
    return secrets.token_hex(8)


def keep_id(path: Path, made: str) -> None:
    replace(path, json.dumps({"id": made}).encode() + b"\n")
