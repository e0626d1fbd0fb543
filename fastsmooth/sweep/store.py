"""The folder of a sweep: sweep.json says what the runs are, results.json what came out."""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsmooth.cli.config import FIELDS
from fastsmooth.cli.flags import ConfigError
from fastsmooth.runfolder.files import read_file, read_object, replace
from fastsmooth.runfolder.read import read_status

FINAL = ("done", "diverged")  # states that no run leaves: one that has diverged would do so again
NO_START, NOT_STARTED = "failed to start", "not started"


@dataclass(frozen=True)
class Planned:
    """A run of a sweep: its folder's name, the flags of its command line, and which of them tell it
    from the others."""

    name: str
    flags: tuple[str, ...]
    differs: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "flags": list(self.flags), "differs": self.differs}


def read_sweep(out: Path) -> list[Planned]:
    path = out / "sweep.json"
    try:
        saved = json.loads(read_file(path).decode())
        return [planned(run["name"], run["flags"], run["differs"]) for run in saved["runs"]]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: give the flags of the runs") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ConfigError(
            f"{path} is damaged: give the flags of the sweep again, or another --out"
        ) from None


def planned(name: Any, flags: Any, differs: Any) -> Planned:
    """A run as sweep.json has it. Raises ValueError for what no sweep has written: the name becomes
    a folder that may be removed."""
    named = isinstance(name, str) and re.fullmatch(r"[\w.=+-]{1,150}", name)
    if not named or name in (".", ".."):
        raise ValueError(f"{name!r} is not the name of a run")
    listed = flags if isinstance(flags, list) else [None]
    if not all(isinstance(word, str) and "\0" not in word for word in listed):
        raise ValueError(f"the flags of {name} are not words")
    # or it raises, as a command line and print would
    "".join((*flags, json.dumps(differs, ensure_ascii=False))).encode()
    if not isinstance(differs, dict) or not differs.keys() <= FIELDS.keys():
        raise ValueError(f"{name} differs from the others in what is no flag")
    return Planned(name, tuple(flags), differs)


def write_sweep(out: Path, runs: list[Planned]) -> None:
    """Say what the runs of the folder are. Runs may be added to it; raises ConfigError where others
    would be lost."""
    if (out / "sweep.json").exists():
        known = {run.name: run.flags for run in runs}
        for before in read_sweep(out):
            if known.get(before.name) != before.flags:
                raise ConfigError(
                    f"--out {out} holds another sweep (with {before.name}): choose another folder, "
                    "or give --out alone to go on"
                )
    elif any(path.name != ".lock" for path in out.iterdir()):
        raise ConfigError(f"--out {out} is not empty and holds no sweep: choose another folder")
    write_json(out / "sweep.json", {"runs": [run.to_json() for run in runs]})


def write_json(path: Path, value: Any) -> None:
    replace(path, json.dumps(value, indent=1).encode() + b"\n")


class Results:
    """results.json while the runs go: each with its state, and a summary of those that are done."""

    def __init__(self, out: Path, runs: list[Planned]):
        self.out, self.runs, self.due = out, runs, 0.0
        self.entries: list[dict[str, Any]] = []
        self.ended: dict[str, dict[str, Any]] = {}

    def show(self) -> None:
        """Write it anew where something has changed, as often as takes a fiftieth of the time, once
        a second at most."""
        began = time.monotonic()
        if began < self.due:
            return
        with contextlib.suppress(OSError):  # of a disk that is full now; it is tried again
            self.write(NOT_STARTED)
        self.due = time.monotonic() + max(1.0, 50 * (time.monotonic() - began))

    def write(self, without: str) -> list[str]:
        """The states of the runs, `without` where there is none, once they are written. Raises
        OSError."""
        entries = [self.ended.get(run.name) or self.entry(run, without) for run in self.runs]
        if entries != self.entries:
            write_json(self.out / "results.json", entries)
            self.entries = entries
        return [entry["state"] for entry in entries]

    def entry(self, run: Planned, without: str) -> dict[str, Any]:
        folder = self.out / run.name
        state = read_status(folder).get("state", without)
        summary = read_object(folder / "summary.json") if state == "done" else None
        entry = run.to_json() | {"state": state, "summary": summary or {}}
        if state in FINAL:
            self.ended[run.name] = entry
        return entry
