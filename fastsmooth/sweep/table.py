"""What a person sees of a sweep."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from fastsmooth.cli import config as configs
from fastsmooth.cli.flags import flag
from fastsmooth.messages import Harmless, note, on_terminal, printable, say
from fastsmooth.runfolder.files import size_of
from fastsmooth.runfolder.numbers import deviation as deviation_of
from fastsmooth.runfolder.numbers import mean, number
from fastsmooth.runfolder.read import read_run, read_status
from fastsmooth.sweep.store import NO_START, Planned

if TYPE_CHECKING:
    from rich.live import Live


class Table:
    """The state of the runs while they go: a table that is redrawn on a terminal, else a line for
    each that ends."""

    def __init__(self, out: Path, runs: list[Planned], done: int):
        self.out, self.runs, self.done = out, runs, done
        self.live: Live | None = None
        self.drawn = 0.0
        if done:
            say(f"{done} of {len(runs)} runs are finished already")
        if on_terminal(sys.stdout):
            try:
                from rich.console import Console  # an extra, for terminals alone
                from rich.live import Live
            except ImportError:
                return
            # lines on stderr go above the table where both are on the terminal, else where the user
            # sent them
            self.live = Live(
                console=Console(file=cast(TextIO, Harmless())),  # it has what rich uses
                transient=True,
                auto_refresh=False,
                redirect_stderr=on_terminal(sys.stderr),
            )
            self.live.start()

    def ended(self, run: Planned) -> None:
        self.done += 1
        say(f"[{self.done}/{len(self.runs)}] {run.name}  {described(self.out / run.name)}")

    def show(self, active: list[Planned]) -> None:
        if self.live is None or time.monotonic() - self.drawn < 1.0:
            return
        from rich.table import Table as Grid  # as the Live above
        from rich.text import Text

        self.drawn = time.monotonic()
        title = f"{self.done} of {len(self.runs)} runs ended, {len(active)} at work"
        grid = Grid("run", "state", title=printable(title))
        for run in active:
            # a name has no spaces, at which it could be wrapped; what tells it from others stands
            # at its end
            grid.add_row(
                Text(printable(run.name.replace("_", " "))),
                Text(printable(described(self.out / run.name))),
            )
        self.live.update(grid, refresh=True)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()


def described(folder: Path) -> str:
    """The state of a run that was begun, with its last epoch."""
    status = read_status(folder)
    state = str(status.get("state", NO_START))
    row = last_epoch(folder)
    if isinstance(row.get("epoch"), int):
        state += f", epoch {row['epoch'] + 1}, test acc {percent(row.get('test_acc'))}"
    return state + (f" ({status['reason']})" if status.get("reason") else "")


def last_epoch(folder: Path) -> dict[str, Any]:
    """The last epoch's row, looked for in the end of metrics.jsonl."""
    try:
        size_of(folder / "metrics.jsonl")
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        if line.startswith(b'{"kind": "epoch"'):
            try:
                return json.loads(line)
            except (ValueError, RecursionError):
                continue
    return {}


def name_failed(out: Path, runs: list[Planned], states: list[str]) -> bool:
    """Say which runs are not done, and why; whether there are any."""
    failed = [(run, state) for run, state in zip(runs, states, strict=True) if state != "done"]
    for run, state in failed:
        log = out / "logs" / f"{run.name}.log"
        reason = read_status(out / run.name).get("reason") or last_line(log)
        note(f"{state}: {run.name}: {reason}")
    return bool(failed)


def last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it wrote nothing"
    return lines[-1] if lines else "it wrote nothing"


def percent(value: Any) -> str:
    return f"{value:.2%}" if number(value) else "-"


def summarise(out: Path, runs: list[Planned]) -> None:
    """Mean and standard deviation of the test accuracy over the seeds of each combination."""
    groups: dict[str, list[float]] = {}
    for run in runs:
        if read_status(out / run.name).get("state") != "done":
            continue
        accuracy = read_run(out / run.name).summary.get("final_test_acc")
        differs = {k: v for k, v in run.differs.items() if k != "seed"}
        name = "_".join(f"{flag(k).strip('-')}={configs.shown(v)}" for k, v in differs.items())
        if accuracy is not None and number(accuracy):
            groups.setdefault(name or "all", []).append(accuracy)
    width = max(map(len, groups), default=0)
    for name, values in groups.items():
        deviation = deviation_of(values)
        spread = "" if deviation is None else f" +- {deviation:.2%}"
        say(f"{name:<{width}}  test acc {mean(values):.2%}{spread}  n {len(values)}")
