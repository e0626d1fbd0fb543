"""Run folders read back, as they are: unfinished, torn or foreign ones are said to be so and never
stop a reader."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsmooth.runfolder.files import finite, lines_of, read_object

OBJECTS = ("status", "summary", "critical", "noise", "sharpness", "layers")
FILES = ("config.json", "metrics.jsonl", *(f"{name}.json" for name in OBJECTS))  # that are read
EXPORTED = "model.safetensors"  # the weights in a folder for the Hub; no run has any of this name


def read_status(path: Path) -> dict[str, Any]:
    """status.json of a run folder; empty where there is none that can be read."""
    return read_object(path / "status.json") or {}


class RunError(ValueError):
    """A path that holds no run; the message, one line, names it and says what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


@dataclass(frozen=True, eq=False)  # a run equals itself alone, and so can be a key
class SavedRun:
    """What a run folder holds; empty where a file is missing or cannot be read (then `damaged`
    names it)."""

    path: Path
    config: dict[str, Any]
    status: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    critical: dict[str, Any] = field(default_factory=dict)
    noise: dict[str, Any] = field(default_factory=dict)
    sharpness: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl, in order
    torn: int = 0  # lines of metrics.jsonl that are no JSON object
    not_finite: int = 0  # rows with a NaN or an infinity; those values are None
    damaged: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """running, done, preempted, diverged or failed; unknown where status.json does not say."""
        state = self.status.get("state")
        return state if isinstance(state, str) else "unknown"

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The rows of a kind: step, epoch or measure."""
        return [row for row in self.rows if row.get("kind") == kind]


def read_run(path: Path | str) -> SavedRun:
    """The run in `path`. Raises RunError where no config.json can be read: without it a run cannot
    be told from others."""
    path = Path(path)
    config = read_object(path / "config.json")
    if config is None:
        why = (
            "its config.json is damaged"
            if (path / "config.json").exists()
            else "it has no config.json"
        )
        raise RunError(
            f"{path} is not a run folder: {why}: name a folder that fastsmooth.train wrote"
        )
    files: dict[str, dict[str, Any]] = {}
    damaged = []
    for name in OBJECTS:
        value = read_object(path / f"{name}.json")
        if value is None and (path / f"{name}.json").exists():
            damaged.append(f"{name}.json")
        files[name] = value or {}
    try:
        rows, torn, not_finite = read_rows(path / "metrics.jsonl")
    except FileNotFoundError:
        rows, torn, not_finite = [], 0, 0
    except OSError:
        rows, torn, not_finite = [], 0, 0
        damaged.append("metrics.jsonl")
    return SavedRun(
        path, config, **files, rows=rows, torn=torn, not_finite=not_finite, damaged=tuple(damaged)
    )


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders among and below `paths`, each once, sorted within each path. What
    fastsmooth.export made for the Hub has a config.json too, and is none. Raises RunError where a
    path has none."""
    runs: dict[Path, None] = {}
    for path in paths:
        if not os.path.isdir(path):  # that of Path raises what a name that is too long meets
            raise RunError(f"{path}: no such folder: name run folders, or folders that hold them")
        inside = sorted(
            Path(base)
            for base, _, files in os.walk(path)
            if "config.json" in files and EXPORTED not in files
        )
        if not inside:
            raise RunError(
                f"{path} holds no run folder (none with a config.json): name a folder that "
                "fastsmooth.train wrote"
            )
        runs |= dict.fromkeys(inside)
    return list(runs)


def read_runs(paths: Sequence[Path]) -> tuple[list[SavedRun], list[str]]:
    """The runs among and below `paths`; and a line for each folder below them that is left out, as
    its config.json cannot be read. Raises RunError where a path is such a folder itself, or where
    no run is left."""
    runs, left_out = [], []
    for path in find_runs(paths):
        try:
            runs.append(read_run(path))
        except RunError:
            if path in paths:
                raise
            left_out.append(f"{path} is left out: its config.json is damaged")
    if not runs:
        raise RunError(f"{left_out[0]}, and there is no other run: name a folder that holds one")
    return runs, left_out


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int, int]:
    """(rows, lines that are no JSON object, rows with values that are not finite) of a
    metrics.jsonl. Raises OSError."""
    rows, torn, not_finite = [], 0, 0
    for line in lines_of(path):
        try:
            row = json.loads(line)
            row, whole = finite(row) if isinstance(row, dict) else (None, True)
        except (ValueError, RecursionError):
            row, whole = None, True
        if row is None:
            torn += bool(line.strip())
            continue
        not_finite += not whole
        rows.append(row)
    return rows, torn, not_finite
