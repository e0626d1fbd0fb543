"""Many runs: python -m fastsmooth.sweep --out DIR [the flags of fastsmooth.train, with several values each]

DIR holds a folder a run, sweep.json (what the runs are), logs/ and results.json. The same command again goes on: finished
runs are skipped, interrupted ones go on from their checkpoints. Nothing here imports torch: every run is a process.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsmooth import config as configs
from fastsmooth import critical
from fastsmooth.config import FIELDS, ConfigError, flag
from fastsmooth.files import clean, read_file, read_object, replace, size_of
from fastsmooth.log import RunFolderError, lock, read_status, refusing
from fastsmooth.messages import (
    DONE,
    INTERRUPTED,
    PREEMPTED,
    SOME_FAILED,
    Harmless,
    command,
    end_with,
    exit_code,
    note,
    on_stop,
    on_terminal,
    printable,
    say,
    show,
    warn,
)
from fastsmooth.processors import processors
from fastsmooth.runs import RunError, SavedRun, read_run

OWN = ("out", "resume", "config")  # flags of train that a sweep sets itself
MOST_RUNS = 100_000
LONGEST_NAME = 120  # bytes
FINAL = ("done", "diverged")  # states that no run leaves: one that has diverged would do so again
NO_START, NOT_STARTED = "failed to start", "not started"
PARENT = "FASTSMOOTH_SWEEP"  # the process that a run must not outlive


def main(argv: list[str] | None = None) -> int:
    """Run one command line; the exit code. Whatever goes wrong is one line on stderr, never a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: sweep(argv), (ConfigError, RunFolderError, RunError))


def sweep(argv: list[str]) -> int:
    p = parser()
    line = [configs.plain(word) for word in expanded(argv)]
    refuse_seeds(line)
    asked = vars(p.parse_args(line))
    own = {name: asked.pop(name) for name in list(asked) if name not in FIELDS or name == "out"}
    if own.get("help"):
        show(*p.format_help().splitlines())
        return DONE
    if "out" not in own:
        raise ConfigError("--out DIR is missing: the folder that holds the runs")
    out = Path(own["out"])
    if "run" in own:
        return do_run(out, own["run"])
    runs = grid_runs(asked, own, out) if asked or own.keys() & {"grid", "seeds"} else read_sweep(out)
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


# What the runs are ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A run of a sweep: its folder's name, the flags of its command line, and which of them tell it from the others."""

    name: str
    flags: tuple[str, ...]
    differs: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "flags": list(self.flags), "differs": self.differs}


def refuse_seeds(words: list[str]) -> None:
    """Say what --seeds wants where it is followed by several numbers."""
    after = words[words.index("--seeds") + 1 :] if "--seeds" in words else []
    seeds = list(itertools.takewhile(lambda word: not word.startswith("-"), after))
    if len(seeds) > 1:
        named = " ".join(seeds)
        raise ConfigError(
            f"--seeds takes one number N, for the seeds 0 to N - 1: for the seeds {named} write --seed {named}"
        )


def parser() -> configs.Parser:
    """That of train, where a flag takes several values."""
    p = configs.parser()
    p.prog, p.usage, p.several = command("sweep"), "%(prog)s --out DIR [flags]", ""
    p.description = (
        "Many runs, one for each combination of the values that flags of fastsmooth.train are given: --lr 0.01 0.1 "
        "--batchsize 8..1024x2 (8 16 ... 1024; 0..4+1 adds). A flag without effect in a combination is left out there."
    )
    for action in list(p._actions):
        name = action.dest
        if name in OWN or name in configs.REQUESTS:
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
        "--out", metavar="DIR", type=configs.text, help="the folder of the runs; given alone: go on with them"
    )
    g.add_argument(
        "--grid", metavar="FILE", type=configs.text, help="a TOML file of flags; [[grid]] tables are added up"
    )
    g.add_argument(
        "--seeds", metavar="N", type=configs.whole(1, 10_000), help="the seeds 0 to N - 1 of every combination"
    )
    g.add_argument(
        "--jobs", metavar="N", type=configs.whole(1, 1024), help="runs at a time (one a GPU, else a processor)"
    )
    g.add_argument(
        "--critical", action="store_true", help="--mode critical, then b*, C2 and K2, with a sampled C2 at b*"
    )
    g.add_argument("--slurm", metavar="FILE", type=configs.text, help="write a job array script and run nothing")
    g.add_argument("--sbatch", metavar="OPTION", action="append", help="a line for it: --sbatch=--time=4:00:00")
    g.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="local",
        type=configs.text,
        help="run on a Ray cluster (one started here)",
    )
    g.add_argument("--plan", action="store_true", help="list the runs, do nothing")
    g.add_argument(
        "--run", metavar="I", type=configs.whole(0), help="do run number I of the sweep in --out, nothing else"
    )
    g.add_argument("-h", "--help", action="store_true", help="this page")
    return p


def expanded(words: Iterable[str]) -> list[str]:
    """The words with ranges written out: 8..64x2 is 8 16 32 64, 0..4+2 is 0 2 4."""
    return [value for word in words for value in values_of(word)]


def values_of(word: str) -> list[str]:
    found = re.fullmatch(r"(?:(--?[\w-]+)=)?([\d.e-]+?)\.\.([\d.e-]+)([x+])([\d.e-]+)", word[:200])
    if not found or len(word) > 200:  # of which the expression would try every beginning
        return [word]
    name, *numbers = found.groups()
    try:
        first, last, by = float(numbers[0]), float(numbers[1]), float(numbers[3])
    except ValueError:
        return [word]
    grows = 1 < by <= configs.LARGEST if numbers[2] == "x" else by > 0
    if not (0 <= first <= last <= configs.LARGEST and grows and (numbers[2] == "+" or first > 0)):
        raise ConfigError(f"{word} is not a range: write FIRST..LASTxFACTOR or FIRST..LAST+STEP, as in 8..1024x2")
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
    """The runs in `out` that flags and --grid describe. Raises ConfigError for a combination that cannot be run."""
    shared, tables = read_grid(own["grid"]) if "grid" in own else ({}, [{}])
    found: dict[str, tuple[dict[str, Any], configs.Config]] = {}
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
        for one in combinations(axes):
            kept = configs.without_idle(one)
            c = configs.resolve(kept)
            found.setdefault(json.dumps(c.to_json(), sort_keys=True), (kept, c))
    kept = [one for one, _ in found.values()]
    for name in sorted(asked - {name for one in kept for name in one} - {"method"}):
        raise ConfigError(f"{flag(name)} has no effect in any of the {len(kept)} runs: leave it out")
    return named(kept, out)


def listed(axes: dict[str, Any], name: str) -> list[Any]:
    """The values of an axis; what train takes as a list or a switch is one value."""
    value = axes[name]
    return value if isinstance(value, list) and not FIELDS[name].metadata["many"] else [value]


def combinations(axes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every choice of one value an axis, in the order of train's flags, the seed changing fastest."""
    names = [name for name in FIELDS if name in axes and name != "seed"] + ["seed"] * ("seed" in axes)
    for values in itertools.product(*(listed(axes, name) for name in names)):
        yield {n: tuple(v) if isinstance(v, list) else v for n, v in zip(names, values, strict=True)}


def named(given: list[dict[str, Any]], out: Path) -> list[Planned]:
    """Runs with names made of the flags in which they differ."""
    names = [name for name in FIELDS if len({repr(one.get(name)) for one in given}) > 1]
    wanted = []
    for one in given:
        differs = {name: one[name] for name in names if name in one}
        parts = [f"{flag(name).strip('-')}={configs.shown(value)}" for name, value in differs.items()]
        name = re.sub(r"[^\w.=+-]", "-", "_".join(parts)).encode()[:LONGEST_NAME].decode(errors="ignore") or "run"
        wanted.append(Planned(name, tuple(words(one)), differs))
    return apart(wanted, out)


def apart(wanted: list[Planned], out: Path) -> list[Planned]:
    """The runs with a folder each in `out`: that which they have there already, else one of this name that none has.

    Two names that are one where case does not count, or where accents are stored otherwise, are told apart too.
    """
    # that of Path raises what a name that is too long meets
    had = {run.flags: run.name for run in read_sweep(out)} if os.path.exists(out / "sweep.json") else {}
    with refusing(out):
        taken = {same(name) for name in (*had.values(), *(os.listdir(out) if os.path.isdir(out) else ()))}
    found, tried = [], collections.Counter()
    for run in wanted:
        if run.flags not in had:
            name = run.name
            while same(name) in taken:
                tried[run.name] += 1
                name = f"{run.name}_{tried[run.name] + 1}"
            taken.add(same(name))
            had[run.flags] = name
        found.append(dataclasses.replace(run, name=had[run.flags]))
    return found


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
    """(what all runs share, the tables that are added up) of a TOML file, as the parser has them."""
    source = f"--grid {path}"
    table = configs.toml_table(path, source)
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
    found = configs.from_table(parser(), table | long, source)
    stranger = next((name for name in found if name not in FIELDS or name == "out"), None)
    if stranger:
        raise ConfigError(f"{source}: {stranger} belongs on the command line")
    return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}


def print_plan(runs: list[Planned]) -> None:
    for number, run in enumerate(runs):
        show(f"{number:>5}  {run.name}  {shlex.join(run.flags)}", indent=9)
    show(f"{len(runs)} runs")


# The folder of a sweep ------------------------------------------------------------------------------------------------


def read_sweep(out: Path) -> list[Planned]:
    path = out / "sweep.json"
    try:
        saved = json.loads(read_file(path).decode())
        return [planned(run["name"], run["flags"], run["differs"]) for run in saved["runs"]]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: give the flags of the runs") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ConfigError(f"{path} is damaged: give the flags of the sweep again, or another --out") from None


def planned(name: Any, flags: Any, differs: Any) -> Planned:
    """A run as sweep.json has it. Raises ValueError for what no sweep has written: the name becomes a folder that may be removed."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.=+-]{1,150}", name) or name in (".", ".."):
        raise ValueError(f"{name!r} is not the name of a run")
    if not isinstance(flags, list) or not all(isinstance(word, str) and "\0" not in word for word in flags):
        raise ValueError(f"the flags of {name} are not words")
    "".join(
        (*flags, json.dumps(differs, ensure_ascii=False))
    ).encode()  # or it raises, as a command line and print would
    if not isinstance(differs, dict) or not differs.keys() <= FIELDS.keys():
        raise ValueError(f"{name} differs from the others in what is no flag")
    return Planned(name, tuple(flags), differs)


def write_sweep(out: Path, runs: list[Planned]) -> None:
    """Say what the runs of the folder are. Runs may be added to it; raises ConfigError where others would be lost."""
    if (out / "sweep.json").exists():
        known = {run.name: run.flags for run in runs}
        for before in read_sweep(out):
            if known.get(before.name) != before.flags:
                raise ConfigError(
                    f"--out {out} holds another sweep (with {before.name}): choose another folder, or give --out alone to go on"
                )
    elif any(path.name != ".lock" for path in out.iterdir()):
        raise ConfigError(f"--out {out} is not empty and holds no sweep: choose another folder")
    write_json(out / "sweep.json", {"runs": [run.to_json() for run in runs]})


def write_json(path: Path, value: Any) -> None:
    replace(path, json.dumps(value, indent=1).encode() + b"\n")


# One run --------------------------------------------------------------------------------------------------------------


def do_run(out: Path, number: int) -> int:
    """Become the process of a run, begun anew or gone on with; 0 at once where it is finished."""
    runs = read_sweep(out)
    if number >= len(runs):
        raise ConfigError(f"--run {number}: the sweep in {out} has the runs 0 to {len(runs) - 1}")
    end_with_parent()
    run, folder = runs[number], out / runs[number].name
    if folder.exists():
        wait_for(folder)
        if read_status(folder).get("state") == "done":
            say(f"{folder} is finished")
            return DONE
        if not (folder / "config.json").exists():  # ended before it had begun
            shutil.rmtree(folder)
    rest = ["--resume"] if folder.exists() else list(run.flags)
    command = [sys.executable, "-m", "fastsmooth.train", *rest, "--out", str(folder)]
    os.execv(sys.executable, command)


def wait_for(folder: Path) -> None:
    """Until no process of an earlier sweep writes there any more; raises RunFolderError after a minute."""
    for left in range(240, -1, -1):
        try:
            os.close(lock(folder))
            return
        except RunFolderError:
            if not left:
                raise
            time.sleep(0.25)


def end_with_parent() -> None:
    """Have the kernel stop this process, and what it becomes, when the sweep that started it is gone."""
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    pr_set_pdeathsig = 1  # prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != int(parent):
        sys.exit(PREEMPTED)


# Many runs ------------------------------------------------------------------------------------------------------------


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
        say(f"stopped by {stop.received}: {states.count('done')} of {len(runs)} runs done; the same command goes on")
        return stop.code
    summarise(out, runs)
    found = [read_run(out / run.name) for run, state in zip(runs, states, strict=True) if state == "done"]
    failed = name_failed(out, runs, states)
    if any(run.critical for run in found):
        failed |= sample_at_best(out, found, own, stop)
    if stop.received:
        say(f"stopped by {stop.received}: all runs done but those that sample; the same command goes on")
        return stop.code
    return SOME_FAILED if failed else DONE


def name_failed(out: Path, runs: list[Planned], states: list[str]) -> bool:
    """Say which runs are not done, and why; whether there are any."""
    failed = [(run, state) for run, state in zip(runs, states, strict=True) if state != "done"]
    for run, state in failed:
        reason = read_status(out / run.name).get("reason") or last_line(out / "logs" / f"{run.name}.log")
        note(f"{state}: {run.name}: {reason}")
    return bool(failed)


class Stop:
    """Notes the first signal that asks to stop, while it is entered."""

    def __init__(self):
        self.received: str | None = None

    @property
    def code(self) -> int:
        """The exit code of a sweep that was stopped."""
        return INTERRUPTED if self.received == "SIGINT" else PREEMPTED

    def __enter__(self) -> Stop:
        self._before = on_stop(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.received = self.received or signal.Signals(number).name


def on_this_machine(out: Path, runs: list[Planned], own: dict[str, Any], stop: Stop, results: Results) -> None:
    """Every run that is not finished, --jobs at a time, each in a process of its own."""
    gpus = visible_gpus()
    jobs = own.get("jobs") or len(gpus) or processors()
    waiting = [number for number, run in enumerate(runs) if unfinished(out, run)]
    table = Table(out, runs, len(runs) - len(waiting))
    active: dict[int, tuple[int, subprocess.Popen]] = {}  # the place of each job: a run's number and its process
    (out / "logs").mkdir(exist_ok=True)
    try:
        while (waiting and not stop.received) or active:
            for place in range(jobs):
                if waiting and not stop.received and place not in active:
                    number = waiting.pop(0)
                    active[place] = (
                        number,
                        start(out, runs[number], number, jobs, gpus[place % len(gpus)] if gpus else None),
                    )
            for place, (number, process) in list(active.items()):
                if stop.received:
                    process.terminate()
                if process.poll() is not None:
                    del active[place]
                    table.ended(runs[number])
            table.show([runs[number] for number, _ in active.values()])
            results.show()
            time.sleep(0.1)
    finally:
        table.close()
        for _, process in active.values():
            process.terminate()


def start(out: Path, run: Planned, number: int, jobs: int, gpu: str | None) -> subprocess.Popen:
    env = os.environ | {PARENT: str(os.getpid())}
    env.setdefault("OMP_NUM_THREADS", str(max(1, processors() // jobs)))
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpu
    with (out / "logs" / f"{run.name}.log").open("ab") as log:
        # a session of its own: Ctrl-C is for the sweep, which asks its runs to save
        return subprocess.Popen(
            command_of(out, number), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
        )


def command_of(out: Path, number: int) -> list[str]:
    return [sys.executable, "-m", "fastsmooth.sweep", "--out", str(out), "--run", str(number)]


def unfinished(out: Path, run: Planned) -> bool:
    """Whether a run is to be begun, or gone on with."""
    return read_status(out / run.name).get("state") not in FINAL


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to for one GPU each; the driver knows, without torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    cards = Path("/proc/driver/nvidia/gpus")
    return [str(k) for k in range(len(list(cards.iterdir())))] if cards.is_dir() else []


def on_ray(out: Path, runs: list[Planned], own: dict[str, Any], stop: Stop, results: Results) -> None:
    """The same on a Ray cluster, whose machines must all see the folder."""
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray needs Ray: pip install 'fastsmooth[ray]'") from None
    waiting = [number for number, run in enumerate(runs) if unfinished(out, run)]
    (out / "logs").mkdir(exist_ok=True)
    ray.init(None if own["ray"] == "local" else own["ray"], log_to_driver=False, logging_level="ERROR")
    gpus = 1 if ray.cluster_resources().get("GPU") else 0

    # a worker that is lost is a run that goes on elsewhere
    @ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)
    def do(command: list[str], log: str, where: str) -> int:
        with open(log, "ab") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            env = os.environ | {PARENT: str(os.getpid())}
            return subprocess.run(command, cwd=where, env=env, check=False, **streams).returncode

    table = Table(out.absolute(), runs, len(runs) - len(waiting))
    try:
        log, here = out.absolute() / "logs", os.getcwd()
        tasks = {do.remote(command_of(out.absolute(), k), str(log / f"{runs[k].name}.log"), here): k for k in waiting}
        while tasks and not stop.received:
            ready, _ = ray.wait(list(tasks), timeout=1.0)
            for task in ready:
                number = tasks.pop(task)
                with contextlib.suppress(ray.exceptions.RayError):  # the run's folder says how far it came
                    ray.get(task)
                table.ended(runs[number])
            table.show([])
            results.show()
    finally:
        table.close()
        ray.shutdown()


def write_slurm(script: Path, out: Path, count: int, own: dict[str, Any]) -> int:
    """A job array that does the runs; a run that Slurm preempts or that meets its time limit saves, and is queued again."""
    limit = f"%{own['jobs']}" if "jobs" in own else ""
    options = ["--job-name=fastsmooth", f"--array=0-{count - 1}{limit}", "--requeue", "--open-mode=append"]
    options += ["--signal=USR1@120", f"--output={out.absolute()}/logs/slurm-%a.log", *own.get("sbatch", [])]
    bad = next((option for option in options if not option.startswith("-") or option.splitlines() != [option]), None)
    if bad is not None:
        raise ConfigError(f"--sbatch {bad!r} is not an option: write --sbatch=--time=4:00:00")
    (out / "logs").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "fastsmooth.sweep", "--out", str(out.absolute()), "--run"]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), f"cd {shlex.quote(os.getcwd())} || exit 74"]
    lines += ["# srun gets the signal 120 s before the time limit; the run saves and exits 75", "code=0"]
    lines += [f'srun {shlex.join(command)} "$SLURM_ARRAY_TASK_ID" || code=$?']
    lines += [f'if [ "$code" -eq {PREEMPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi', 'exit "$code"']
    replace(script, ("\n".join(lines) + "\n").encode())
    say(f"{script}: {count} runs; start them with: sbatch {shlex.quote(str(script))}")
    say(f"when they are done: {shlex.join([*command[:-1]])}")
    return DONE


# What is shown --------------------------------------------------------------------------------------------------------


class Table:
    """The state of the runs while they go: a table that is redrawn on a terminal, else a line for each that ends."""

    def __init__(self, out: Path, runs: list[Planned], done: int):
        self.out, self.runs, self.done = out, runs, done
        self.live = None
        self.drawn = 0.0
        if done:
            say(f"{done} of {len(runs)} runs are finished already")
        if on_terminal(sys.stdout):
            try:
                from rich.console import Console
                from rich.live import Live
            except ImportError:
                return
            # lines on stderr go above the table where both are on the terminal, else where the user sent them
            self.live = Live(
                console=Console(file=Harmless()),
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
        from rich.table import Table as Grid
        from rich.text import Text

        self.drawn = time.monotonic()
        title = f"{self.done} of {len(self.runs)} runs ended, {len(active)} at work"
        grid = Grid("run", "state", title=printable(title))
        for run in active:
            # a name has no spaces, at which it could be wrapped; what tells it from others stands at its end
            grid.add_row(Text(printable(run.name.replace("_", " "))), Text(printable(described(self.out / run.name))))
        self.live.update(grid, refresh=True)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()


class Results:
    """results.json while the runs go: each with its state, and the summary of those that are done."""

    def __init__(self, out: Path, runs: list[Planned]):
        self.out, self.runs, self.due = out, runs, 0.0
        self.entries: list[dict[str, Any]] = []
        self.ended: dict[str, dict[str, Any]] = {}

    def show(self) -> None:
        """Write it anew where something has changed, as often as takes a fiftieth of the time, once a second at most."""
        began = time.monotonic()
        if began < self.due:
            return
        with contextlib.suppress(OSError):  # of a disk that is full now; it is tried again
            self.write(NOT_STARTED)
        self.due = time.monotonic() + max(1.0, 50 * (time.monotonic() - began))

    def write(self, without: str) -> list[str]:
        """The states of the runs, `without` where there is none, once they are written. Raises OSError."""
        entries = [self.ended.get(run.name) or self.entry(run, without) for run in self.runs]
        if entries != self.entries:
            write_json(self.out / "results.json", entries)
            self.entries = entries
        return [entry["state"] for entry in entries]

    def entry(self, run: Planned, without: str) -> dict[str, Any]:
        folder = self.out / run.name
        state = read_status(folder).get("state", without)
        summary = read_object(folder / "summary.json") if state == "done" else None
        found = run.to_json() | {"state": state, "summary": summary or {}}
        if state in FINAL:
            self.ended[run.name] = found
        return found


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


def last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it wrote nothing"
    return lines[-1] if lines else "it wrote nothing"


def percent(value: Any) -> str:
    return f"{value:.2%}" if critical.number(value) else "-"


def summarise(out: Path, runs: list[Planned]) -> None:
    """Mean and standard deviation of the test accuracy over the seeds of each combination."""
    groups: dict[str, list[float]] = {}
    for run in runs:
        if read_status(out / run.name).get("state") != "done":
            continue
        found = read_run(out / run.name).summary.get("final_test_acc")
        name = "_".join(f"{flag(k).strip('-')}={configs.shown(v)}" for k, v in run.differs.items() if k != "seed")
        if critical.number(found):
            groups.setdefault(name or "all", []).append(found)
    width = max(map(len, groups), default=0)
    for name, values in groups.items():
        deviation = critical.deviation(values)
        say(
            f"{name:<{width}}  test acc {critical.mean(values):.2%}"
            + (f" +- {deviation:.2%}" if deviation is not None else "")
            + f"  n {len(values)}"
        )


# The critical batch size ----------------------------------------------------------------------------------------------


def sample_at_best(out: Path, found: list[SavedRun], own: dict[str, Any], stop: Stop) -> bool:
    """critical.json: b*, C^2 and K^2 of every curve, with C^2 sampled at b* where the smallest eps was reached.

    Whether any of the runs that sample failed.
    """
    failed = False
    curves = critical.analyse(found)
    folder = out / "sampled"
    folder.mkdir(exist_ok=True)
    sampled = sampling_runs(curves, found)
    planned = apart([run for _, run in sampled], folder)  # curves may share a run
    names = {id(curve): run.name for (curve, _), run in zip(sampled, planned, strict=True)}
    runs = list({run.name: run for run in planned}.values())
    write_json(folder / "sweep.json", {"runs": [run.to_json() for run in runs]})
    if runs:
        say(f"sampling C2 at b* in {len(runs)} more runs")
        results = Results(folder, runs)
        on_this_machine(folder, runs, own, stop, results)
        states = results.write(NOT_STARTED if stop.received else NO_START)
        if not stop.received:
            failed = name_failed(folder, runs, states)
    entries = []
    for curve in curves:
        entry = curve.to_json() | {"c2_sampled": None, "c2_sampled_se": None}
        if id(curve) in names and read_status(folder / names[id(curve)]).get("state") == "done":
            entry |= sampled_point(read_run(folder / names[id(curve)]))
        entries.append(entry)
        print_curve(curve, entry)
    write_json(out / "critical.json", {"curves": entries})
    return failed


def sampled_point(run: SavedRun) -> dict[str, Any]:
    """What a sampling run adds to the entry of a curve; nothing, with a warning, where its noise.json does not say it."""
    try:
        point = run.noise["points"][-1]
        found = {"c2_sampled": point["c2_sampled"], "c2_sampled_se": point["c2_sampled_se"]}
        found |= {"sampled_step": point["step"], "sampled_batch_size": point["batch_size"]}
    except (KeyError, IndexError, TypeError):
        found = {"c2_sampled": None}
    if all(critical.number(value) for value in found.values()):
        return found
    file = run.path / "noise.json"
    warn(f"{file} is damaged: remove its folder, and the noise is sampled again")
    return {}


def sampling_runs(curves: list[critical.Analysis], found: list[SavedRun]) -> list[tuple[critical.Analysis, Planned]]:
    """For every curve the run that samples the noise at b*, where its first seed crossed the smallest eps that has a b*."""
    runs = []
    lowest: dict[str, critical.Analysis] = {}
    for curve in sorted(curves, key=lambda curve: -curve.eps):
        if curve.best is not None:
            lowest[repr(curve.group)] = curve
    for curve in curves:
        aim = lowest.get(repr(curve.group))
        if aim is None:
            continue
        of_group = [r for r in found if critical.sound(r) and critical.settings(r.config) == aim.group]
        of_batch = [r for r in of_group if r.critical["batch_size"] == aim.best]
        run = min(of_batch, key=lambda r: r.critical["seed"])
        step = next(b.steps[0] for b in aim.batches if b.batch_size == aim.best)
        runs.append((curve, sampling_run(run, step)))
    return runs


def sampling_run(run: SavedRun, step: int) -> Planned:
    """The run again, up to the point from which update `step` was made, where the noise is sampled."""
    left_out = {"mode", "eps", "criterion", "min_epochs", "full_grad_every", "budget", "out", "resume", "max_time"}
    left_out |= {"track_noise", "estimator"}
    saved = configs.read_saved(run.path)
    if saved.bn != "eval" or saved.momentum:  # a direction has no other mode than training then
        left_out.add("bn")
    given = {f.name: getattr(saved, f.name) for f in dataclasses.fields(saved) if f.name not in left_out}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    given |= {"mode": "sampling", "steps": (step - 1,)}
    return Planned(run.path.name, tuple(words(configs.without_idle(given))), {})


def print_curve(curve: critical.Analysis, entry: dict[str, Any]) -> None:
    about = f"{curve.group['optimizer']}, lr {curve.group['lr']:g}, eps {configs.exact(curve.eps)}"
    without = f"; left out, since censored at the first update that counts: b {', '.join(map(str, curve.censored))}"
    without *= bool(curve.censored)
    if curve.best is None:
        say(f"{about}: no batch size reached it with every seed{without}")
        return
    low, high = curve.bracket
    edge = "; the floor reaches the edge of what was tried, so b* may lie outside" if curve.at_edge else ""
    sampled = entry["c2_sampled"]
    say(
        f"{about}: b* {curve.best} (N within {critical.FLAT:.0%} from {low} to {high}{edge}{without}), "
        f"c2_critical {curve.c2_critical:.4g} ({curve.c2_range[0]:.4g} to {curve.c2_range[1]:.4g})"
        + (f", k2 {curve.k2:.4g}" if curve.k2 is not None else "")
        + (f", c2_sampled {sampled:.4g} +- {entry['c2_sampled_se']:.2g}" if sampled is not None else "")
    )


if __name__ == "__main__":
    end_with(main)
