"""The harness of the benchmarks: variants in processes of their own, asked in turn, medians over
their quiet windows.

A variant is a function that is called over and over; one call is one step. Each variant lives in
its own process for the whole case, so that what one does to its allocator or its threads cannot
help another. While one runs the others sleep. A window is a few steps that are not timed, then
`steps` that are; a round is one window of every variant. Windows in which other processes used the
cores are marked and left out of the median.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# of the cores' time, used by other processes or withheld by the hypervisor: more is not quiet
FOREIGN_LIMIT = 0.05
IDLE_SECONDS, IDLE_TIMEOUT = 0.05, 20.0


class VariantError(RuntimeError):
    """A variant could not be made or run; the message is its last line."""


@dataclass(frozen=True)
class Variant:
    """`make(*args)` is called once, in the variant's process, and returns what is timed: one step a
    call.

    What it returns may have `laps`, a dict that sums seconds by part of the step; `check()`, called
    after each window, which raises where the result is wrong; and `close()`. `steps` overrides the
    steps of a window.
    """

    name: str
    make: Callable[..., Callable[[], None]]
    args: tuple = ()
    steps: int | None = None


@dataclass(frozen=True)
class Window:
    """Some steps timed in a row. Everything but the last two is a mean over its steps."""

    seconds: float
    laps: dict[str, float] = field(default_factory=dict)
    helpers_cpu: float | None = None  # CPU seconds of the variant's child processes
    # share of the cores' time that went elsewhere; None where the system does not say
    foreign: float | None = None
    # of the variant's process alone, resident or on its GPU; None as above
    peak_bytes: int | None = None

    @property
    def quiet(self) -> bool:
        return self.foreign is None or self.foreign <= FOREIGN_LIMIT


@dataclass
class Measured:
    """The windows of one variant, and the seconds that its first step took (compilation is in
    them)."""

    first_step: float
    windows: list[Window] = field(default_factory=list)

    @property
    def quiet(self) -> list[Window]:
        return [w for w in self.windows if w.quiet]

    @property
    def counted(self) -> list[Window]:
        """The quiet windows; all of them where none was quiet."""
        return self.quiet or self.windows

    def seconds(self) -> float:
        """Median seconds a step."""
        return median(w.seconds for w in self.counted)

    def percentile(self, q: float) -> float:
        """The seconds a step that `q` percent of the counted windows do not exceed, interpolated
        between two of them."""
        ordered = sorted(w.seconds for w in self.counted)
        place = q / 100 * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def lap(self, part: str) -> float:
        return median(w.laps[part] for w in self.counted)

    def helpers_cpu(self) -> float | None:
        known = [w.helpers_cpu for w in self.counted if w.helpers_cpu is not None]
        return median(known) if known else None

    def peak_bytes(self) -> int | None:
        known = [w.peak_bytes for w in self.windows if w.peak_bytes is not None]
        return max(known) if known else None

    def knows_load(self) -> bool:
        return all(w.foreign is not None for w in self.windows)


# What the system says


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def machine_cpu() -> float | None:
    """Seconds that our cores have spent on anything, time stolen by the hypervisor included; None
    without /proc."""
    ours = {f"cpu{n}" for n in cores()}
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    except OSError:
        return None
    total = 0
    for name, *ticks in lines:
        if name in ours:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks[:8])
            total += user + nice + system + irq + softirq + steal
    return total / os.sysconf("SC_CLK_TCK")


def process_cpu(pid: int) -> tuple[float, float]:
    """CPU seconds of (process `pid`, the processes below it), those that ended and were waited for
    included."""
    own, parents, used = 0, {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # the name before it may hold spaces
            words = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        number = int(path.parent.name)
        parents[number] = int(words[1])
        utime, stime, ended_utime, ended_stime = map(int, words[11:15])
        used[number] = (utime + stime, ended_utime + ended_stime)
    below = 0
    for number, (alive, ended) in used.items():
        if number == pid:
            own, below = own + alive, below + ended
        elif is_below(number, pid, parents):
            below += alive + ended
    tick = os.sysconf("SC_CLK_TCK")
    return own / tick, below / tick


def is_below(number: int, ancestor: int, parents: dict[int, int]) -> bool:
    while number in parents and number != ancestor:
        number = parents[number]
    return number == ancestor


def foreign_share(machine: float, own: float, wall: float, count: int) -> float:
    """Share of the time of `count` cores over `wall` seconds that went to others, from the CPU
    seconds of all and of us."""
    return max(0.0, machine - own) / (wall * count)


def gpu_memory() -> Any:
    """torch.cuda where this process computes on a GPU: what counts then is the memory that its
    tensors take there."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def reset_peak() -> bool:
    """Count this process's peak memory afresh from now on; False where the system cannot."""
    if gpu_memory() is not None:
        gpu_memory().reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """The most memory that this process held since reset_peak(): on the GPU if it computes there,
    else resident."""
    if gpu_memory() is not None:
        return gpu_memory().max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


# In a variant's process


def serve(pipe, variant: Variant) -> None:
    """Make the variant, take its first step, then time a window whenever asked, until the pipe
    closes."""
    # what a variant prints is no part of a report
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    step = None
    try:
        step = variant.make(*variant.args)
        began = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - began)
        while True:
            wait_until_idle()
            pipe.send(take_window(step, *pipe.recv()))
    except EOFError:
        pass
    except BaseException as error:
        traceback.print_exc()
        pipe.send(
            VariantError(
                f"{variant.name}: {' '.join(str(error).split())[:300] or type(error).__name__}"
            )
        )
    finally:
        if hasattr(step, "close"):
            step.close()


def take_window(step: Callable[[], None], lead: int, steps: int) -> Window:
    """`lead` steps to bring caches and queues to where they are in the middle of a run, then
    `steps` timed ones."""
    can_peak = reset_peak()
    for _ in range(lead):
        step()
    before = dict(getattr(step, "laps", {}))
    load = Load()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    wall = time.perf_counter() - began
    foreign, helpers_cpu = load.read(wall)
    laps = {
        part: (total - before[part]) / steps for part, total in getattr(step, "laps", {}).items()
    }
    peak = peak_bytes() if can_peak else None
    if hasattr(step, "check"):
        step.check()
    helpers_cpu = None if helpers_cpu is None else helpers_cpu / steps
    return Window(wall / steps, laps, helpers_cpu, foreign, peak)


class Load:
    """What this process, its children and everybody else do with the cores from now on."""

    def __init__(self) -> None:
        self.machine, self.own = machine_cpu(), process_cpu(os.getpid())

    def read(self, wall: float) -> tuple[float | None, float | None]:
        """(share of the cores that went to others, CPU seconds of our children) after `wall`
        seconds; None if unknown."""
        if self.machine is None:
            return None, None
        machine, own = machine_cpu(), process_cpu(os.getpid())
        mine = sum(own) - sum(self.own)
        return foreign_share(machine - self.machine, mine, wall, len(cores())), own[1] - self.own[1]


def wait_until_idle() -> None:
    """Until this process and those below it, workers that load ahead say, have nothing left to
    do."""
    if machine_cpu() is None:
        time.sleep(4 * IDLE_SECONDS)
        return
    deadline = time.monotonic() + IDLE_TIMEOUT
    quiet_looks, last = 0, sum(process_cpu(os.getpid()))
    while quiet_looks < 3 and time.monotonic() < deadline:
        time.sleep(IDLE_SECONDS)
        now = sum(process_cpu(os.getpid()))
        quiet_looks = quiet_looks + 1 if now - last < 0.4 * IDLE_SECONDS else 0
        last = now


# In the parent


class Runner:
    """A variant's process, seen from outside."""

    def __init__(self, variant: Variant):
        self.variant = variant
        context = multiprocessing.get_context("spawn")
        self.pipe, inner = context.Pipe()
        self.process = context.Process(target=serve, args=(inner, variant))
        self.process.start()
        inner.close()
        try:
            self.first_step = self._answer()
        except VariantError:
            self.close()
            raise

    def window(self, lead: int, steps: int) -> Window:
        self.pipe.send((lead, self.variant.steps or steps))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise VariantError(
                f"{self.variant.name}: its process ended with code {self.process.exitcode}"
            ) from None
        if isinstance(answer, VariantError):
            raise answer
        return answer

    def close(self) -> None:
        hang_up(self.pipe, self.process)


def hang_up(pipe: Any, process: Any) -> None:
    """The process sees the pipe close and leaves; one that hangs is ended."""
    pipe.close()
    process.join(timeout=20)
    if process.is_alive():
        process.kill()
        process.join()


def measure(
    variants: Iterable[Variant],
    steps: int,
    rounds: int,
    lead: int = 1,
    budget: float = 3600.0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Measured]:
    """Rounds of windows until each variant has `rounds` quiet ones, or for as long as `budget`
    seconds allow.

    At least `rounds`, or two where the budget is short. A variant that cannot be made is reported
    through `say` and left out; one that fails later raises VariantError.
    """
    runners, found = [], {}
    try:
        for variant in variants:
            try:
                runners.append(Runner(variant))
            except VariantError as error:
                say(f"not measured: {error}")
                continue
            found[variant.name] = Measured(runners[-1].first_step)
        began, done = time.monotonic(), 0
        while runners and not enough(found, rounds, done, time.monotonic() - began, budget):
            # so that a drift favours nobody
            for runner in runners if done % 2 == 0 else reversed(runners):
                found[runner.variant.name].windows.append(runner.window(lead, steps))
            done += 1
    finally:
        for runner in runners:
            runner.close()
    return found


def require_measured(case: str, found: dict[str, Measured], names: Iterable[str]) -> None:
    """Raises VariantError where one of `names`, without which the case says nothing, could not be
    made."""
    missing = set(names) - set(found)
    if missing:
        raise VariantError(f"{case} cannot be reported without {' and '.join(sorted(missing))}")


def enough(found: dict[str, Measured], rounds: int, done: int, spent: float, budget: float) -> bool:
    if done >= 2 and spent * (done + 1) / done > budget:  # the next round would not fit
        return True
    return done >= rounds and all(len(m.quiet) >= rounds for m in found.values())


def rows(
    bench: str, case: str, found: dict[str, Measured], ratio_to: str, units: float
) -> list[dict[str, Any]]:
    """One row a variant. `units` is what a step processes (images, bytes): per_s counts them. Below
    1 is faster."""
    base = found[ratio_to]
    result = []
    for name, m in found.items():
        seconds, peak, base_peak = m.seconds(), m.peak_bytes(), base.peak_bytes()
        row = {"bench": bench, "case": case, "variant": name, "median_s": rounded(seconds)}
        row |= {
            "per_s": rounded(units / seconds),
            "ratio": rounded(seconds / base.seconds()),
            "ratio_to": ratio_to,
        }
        row["mem_ratio"] = rounded(peak / base_peak) if peak and base_peak else None
        row |= {"rounds": len(m.windows), "quiet": len(m.quiet) if m.knows_load() else None}
        result.append(row)
    return result


def rounded(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def table(result: list[dict[str, Any]], unit: str, found: dict[str, Measured]) -> list[str]:
    """The rows of a case for people."""
    width = max(len("variant"), *(len(row["variant"]) for row in result))
    lines = [
        f"  {'variant':<{width}}  {'ms':>9}  {unit + '/s':>11}  {'ratio':>6}  {'memory':>6}  quiet "
        "windows"
    ]
    for row in result:
        memory = "-" if row["mem_ratio"] is None else f"{row['mem_ratio']:.2f}"
        lines.append(
            f"  {row['variant']:<{width}}  {row['median_s'] * 1e3:>9.4g}  {row['per_s']:>11.4g}  "
            f"{row['ratio']:>6.3f}"
            f"  {memory:>6}  {'?' if row['quiet'] is None else row['quiet']} of {row['rounds']}"
        )
    return [*lines, *load_notes(found), *memory_notes(result)]


def load_notes(found: dict[str, Measured]) -> list[str]:
    if not all(m.knows_load() for m in found.values()):
        return ["  foreign load cannot be seen on this system: every window counts"]
    left_out = sum(len(m.windows) - len(m.quiet) for m in found.values() if m.quiet)
    lines = []
    if left_out:
        lines.append(
            f"  {left_out} windows with more than {FOREIGN_LIMIT:.0%} foreign load on the cores "
            "left out"
        )
    for name, m in found.items():
        if not m.quiet:
            load = median(w.foreign for w in m.windows)
            lines.append(
                f"  {name}: NO quiet window (foreign load {load:.0%} of the cores): all of them "
                "count, do not quote it"
            )
    return lines


def memory_notes(result: list[dict[str, Any]]) -> list[str]:
    if any(row["mem_ratio"] is None for row in result):
        return ["  memory was not measured: this system does not say a process's peak"]
    return []


# The command line and the results file


def arguments(description: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    p = argparse.ArgumentParser(description=description, allow_abbrev=False)
    p.add_argument(
        "--quick",
        action="store_true",
        help="a tiny case, to see that it works; its times mean nothing",
    )
    p.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a line on stdout; the words go to stderr",
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the JSON lines here too, machine and commit first",
    )
    return p


def add_selection(
    p: argparse.ArgumentParser, cases: Iterable[str], variants: Iterable[str]
) -> None:
    """The flags of a benchmark with several cases and variants, by their names."""
    p.add_argument(
        "--cases",
        nargs="+",
        choices=list(cases),
        metavar="CASE",
        help="these alone, in this order; not with --quick",
    )
    names = list(dict.fromkeys(variants))
    p.add_argument(
        "--variants",
        nargs="+",
        choices=names,
        default=names,
        help="beside those that ratios refer to",
    )


def selected(
    p: argparse.ArgumentParser, args: argparse.Namespace, cases: Iterable[Any], quick: Iterable[Any]
) -> list[Any]:
    """The cases that the flags of add_selection ask for."""
    if args.quick and args.cases:
        p.error("--quick has cases of its own: leave out --cases")
    by_name = {case.name: case for case in cases}
    return list(quick) if args.quick else [by_name[name] for name in args.cases or by_name]


class Report:
    """Words for people, rows for machines. The file is replaced whole whenever a case is done."""

    def __init__(self, bench: str, argv: list[str], as_json: bool, out: Path | None):
        self.bench, self.as_json, self.out = bench, as_json, out
        self.header = header(bench, argv)
        self.rows: list[dict[str, Any]] = []
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._write()  # a file that cannot be written fails now, not when all is measured

    def say(self, line: str) -> None:
        print(line, file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def add(self, case: str, result: list[dict[str, Any]], about: dict[str, Any]) -> None:
        """The rows of one case; `about` is kept in the header under its name."""
        self.rows += result
        self.header["about"][case] = about
        if self.as_json:
            for row in result:
                print(json.dumps(row), flush=True)
        if self.out is not None:
            self._write()

    def _write(self) -> None:
        lines = [json.dumps(value) for value in (self.header, *self.rows)]
        self.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def header(bench: str, argv: list[str]) -> dict[str, Any]:
    """Machine, versions, commit and command."""
    from fastsmooth.runfolder.machine import environment

    env = environment()
    machine = ("processor", "cpus", "threads", "gpu", "platform")
    versions = ("python", "torch", "torchvision", "numpy", "cuda")
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{bench}", *argv]),
        "commit": env["commit"],
        "time": env["time"],
        "machine": {key: env[key] for key in machine},
        "versions": {key: env[key] for key in versions},
        "about": {},
    }


class RedTests(RuntimeError):
    """A test of what is to be measured fails; the message is the end of what pytest said."""


def run_cases(
    report: Report,
    quick: bool,
    tests: Iterable[str],
    cases: Iterable[Any],
    bench: Callable[[Any], None],
    refused: tuple[type[Exception], ...] = (),
) -> int:
    """Run the tests of what is measured (unless `quick`), then bench(case) of each case; the exit
    code.

    Red tests, a variant that fails and the errors in `refused` end the benchmark with one message.
    """
    began = time.perf_counter()
    try:
        if quick:
            report.say("quick: tiny cases, their tests are not run; these times mean nothing")
        else:
            require_green(tests, report.say)
        for case in cases:
            bench(case)
    except (RedTests, VariantError, *refused) as error:
        print(f"{report.bench}: {error}", file=sys.stderr)
        return 1
    report.say(f"{time.perf_counter() - began:.0f} s in all")
    return 0


def require_green(names: Iterable[str], say: Callable[[str], None]) -> None:
    """Run these files of tests/; raises RedTests, since a speed-up of something broken is none."""
    began = time.perf_counter()
    there = [name for name in names if (ROOT / "tests" / name).is_file()]
    missing = [name for name in names if name not in there]
    if missing:
        say(f"tests that are not there: {' '.join(missing)}")
    if not there:
        return
    command = [sys.executable, "-m", "pytest", "-q", "-x", *(f"tests/{name}" for name in there)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RedTests(
            f"{done.stdout.strip()[-2000:]}\nthe tests of what is measured are red: nothing is "
            "reported"
        )
    say(f"tests that are green: {' '.join(there)} ({time.perf_counter() - began:.0f} s)")
