"""Many runs: python -m fastsmooth.sweep --out DIR [the flags of fastsmooth.train, with several
values each]

DIR holds a folder a run, sweep.json (what the runs are), logs/ and results.json. The same command
again goes on: finished runs are skipped, interrupted ones go on from their checkpoints. Nothing
here imports torch: every run is a process.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from fastsmooth.cli import flags as flag_types
from fastsmooth.cli.config import FIELDS
from fastsmooth.cli.flags import ConfigError
from fastsmooth.messages import DONE, SOME_FAILED, end_with, exit_code, say, show
from fastsmooth.runfolder.files import clean
from fastsmooth.runfolder.read import RunError, read_run
from fastsmooth.runfolder.write import RunFolderError, lock, refusing
from fastsmooth.sweep.critical import sample_at_best
from fastsmooth.sweep.grid import expanded, grid_runs, parser, refuse_seeds
from fastsmooth.sweep.machines import Stop, do_run, on_ray, on_this_machine, write_slurm
from fastsmooth.sweep.store import NO_START, NOT_STARTED, Planned, Results, read_sweep, write_sweep
from fastsmooth.sweep.table import name_failed, summarise


def main(argv: list[str] | None = None) -> int:
    """Run one command line; the exit code. A failure is a line on stderr, never a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: sweep(argv), (ConfigError, RunFolderError, RunError))


def sweep(argv: list[str]) -> int:
    p = parser()
    line = [flag_types.plain(word) for word in expanded(argv)]
    refuse_seeds(line)
    asked = vars(p.parse_args(line))
    own = {name: asked.pop(name) for name in list(asked) if name not in FIELDS or name == "out"}
    if own.get("help"):
        show(*p.page(own["help"]).splitlines())
        return DONE
    if "out" not in own:
        raise ConfigError("--out DIR is missing: the folder that holds the runs")
    out = Path(own["out"])
    if "run" in own:
        return do_run(out, own["run"])
    described = asked or own.keys() & {"grid", "seeds"}
    runs = grid_runs(asked, own, out) if described else read_sweep(out)
    if own.get("plan"):
        print_plan(runs)
        return DONE
    with refusing(out):
        out.mkdir(parents=True, exist_ok=True)
        held = lock(out)
        clean(out)
    try:
        write_sweep(out, runs)
        if "slurm" in own:
            return write_slurm(Path(own["slurm"]), out, len(runs), own)
        return carry_out(out, runs, own)
    finally:
        os.close(held)


def print_plan(runs: list[Planned]) -> None:
    for number, run in enumerate(runs):
        show(f"{number:>5}  {run.name}  {shlex.join(run.flags)}", indent=9)
    show(f"{len(runs)} runs")


def carry_out(out: Path, runs: list[Planned], own: dict[str, Any]) -> int:
    """Do all runs, then say what came out."""
    with Stop() as stop:
        return do_all(out, runs, own, stop)


def do_all(out: Path, runs: list[Planned], own: dict[str, Any], stop: Stop) -> int:
    work = on_ray if "ray" in own else on_this_machine
    results = Results(out, runs)
    work(out, runs, own, stop, results)
    states = results.write(NOT_STARTED if stop.received else NO_START)
    if stop.received:
        say(
            f"stopped by {stop.received}: {states.count('done')} of {len(runs)} runs done; the "
            "same command goes on"
        )
        return stop.code
    summarise(out, runs)
    pairs = zip(runs, states, strict=True)
    done = [read_run(out / run.name) for run, state in pairs if state == "done"]
    failed = name_failed(out, runs, states)
    if any(run.critical for run in done):
        failed |= sample_at_best(out, done, own, stop)
    if stop.received:
        say(
            f"stopped by {stop.received}: all runs done but those that sample; the same command "
            "goes on"
        )
        return stop.code
    return SOME_FAILED if failed else DONE


if __name__ == "__main__":
    end_with(main)
