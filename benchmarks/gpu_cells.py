"""What only a GPU can say, in cells that each tell what they found when they are done:

    python -m benchmarks.gpu_cells [CELL ...] [--runs] [--dry] [--out DIR] [--data DIR]

CELLS, the check, takes ten minutes at the most; RUNS, by --runs, are of training at full length,
and take longer. Without names all of either run, in the order of the table, the most telling first.

Each runs in a process of its own under its own alarm: one that fails, hangs or ends the GPU's
context stops no other. Rows are appended to DIR/<date>_gpu_check.jsonl (or _runs.jsonl), after a
line with machine, GPU, driver, versions and commit; what else is said goes to the .log beside it.
A row with `failed` says why, one with `right` false that something is not as it must be, one with
`skipped` what was not there to be measured. Times are medians of windows that take turns, with p20
and p80; ratios are of seconds to those of `ratio_to` in the same cell, below 1 is faster.

--dry does every cell in a tiny form on the CPU, which finds mistakes in the cells and nothing else.

Exit code: 0 all is well, 1 something failed or is wrong, 2 PyTorch sees no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 560  # seconds for the check; the rest of ten minutes is for what comes before and after
HEADER, HEADER_SECONDS = "header", 90  # the first import of PyTorch on a cold machine is in it
GRACE = 5  # seconds for what a cell that was ended has said; less are no time for a cell
NO_GPU = 2


class CellRow(NamedTuple):
    """`seconds` is the alarm; `place` is MODULE:FUNCTION in benchmarks.gpu."""

    name: str
    seconds: int
    place: str
    decides: str


CELLS = (
    CellRow("ceilings", 30, "machine:ceilings", "what bandwidth, products and launches reach"),
    CellRow("kernels", 120, "kernels:right", "whether every kernel is right"),
    CellRow("update", 40, "kernels:update_times", "the optimizer's step beside torch.optim.SGD"),
    CellRow("step", 150, "steps:training_steps", "what precision, compiling and graphs are worth"),
    CellRow("bits", 80, "runs:bits", "whether captured updates are the eager ones, bit for bit"),
    CellRow("convolutions", 120, "kernels:convolutions", "what per-sample norms and noise cost"),
    CellRow("persample", 75, "steps:per_sample", "what norms, deviations and measuring cost"),
    CellRow("peers", 110, "steps:peers", "our loop beside others' of the same network"),
    CellRow("runs", 90, "runs:whole_runs", "seconds of epochs, of compiling and of capturing"),
    CellRow("timeline", 45, "machine:timeline", "which kernel or gap is the longest"),
)
RUNS = (
    CellRow("decode", 420, "decode:decoding", "whether decoding keeps up with ResNet-50"),
    CellRow("long", 420, "runs:long_runs", "seconds and accuracy of 200 epochs"),
    CellRow("precisions", 900, "runs:precisions", "whether bf16 and tf32 end as fp32 does"),
)
ROWS = {row.name: row for row in (*CELLS, *RUNS)}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    p = argparse.ArgumentParser(description="What only a GPU can say.", allow_abbrev=False)
    p.add_argument("cells", nargs="*", metavar="CELL", help=f"of {', '.join(ROWS)}")
    p.add_argument("--runs", action="store_true", help="training at full length, not the check")
    p.add_argument("--dry", action="store_true", help="every cell in a tiny form on the CPU")
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    p.add_argument("--data", type=Path, default=ROOT / "data", metavar="DIR", help="image archives")
    p.add_argument("--here", type=Path, metavar="DIR", help="one cell in this process; its scratch")
    p.add_argument("--asked", default="", metavar="WORDS", help="what the header calls the command")
    args = p.parse_args(argv)
    args.data = args.data.resolve()
    if args.here:
        # what libraries print is no row
        rows = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        (name,), write = args.cells, partial(tell, stream=rows)
        return work(name, args.dry, args.data, args.here, shlex.split(args.asked), write)
    unknown = [name for name in args.cells if name not in ROWS]
    if unknown:
        p.error(f"no cell {unknown[0]}: there are {', '.join(ROWS)}")
    # so that what was started is ended with this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    chosen = [ROWS[name] for name in args.cells] or list(RUNS if args.runs else CELLS)
    runs = any(row in RUNS for row in chosen)
    return carry_out(chosen, runs, args.dry, args.data, args.out, shlex.join(argv))


def tell(row: dict[str, Any], stream: IO[str]) -> None:
    print(json.dumps(row), file=stream, flush=True)


# In a cell's process


def work(
    name: str,
    dry: bool,
    data: Path,
    scratch: Path,
    argv: list[str],
    write: Callable[[dict[str, Any]], None],
) -> int:
    """The exit code of a cell, or of the header."""
    import torch

    from benchmarks.gpu.cell import Cell

    if not dry and not torch.cuda.is_available():
        print("gpu_cells: PyTorch sees no GPU", file=sys.stderr)
        return NO_GPU
    if name == HEADER:
        write(header(argv))
        return 0
    module, _, function = ROWS[name].place.partition(":")
    cell = Cell(name, dry, data, scratch, write)
    began = time.perf_counter()
    with cell.part("cell"):
        found = importlib.import_module(f"benchmarks.gpu.{module}")
        getattr(found, function)(cell)
    cell.tell("cell", done=not cell.failed, seconds=round(time.perf_counter() - began, 1))
    return int(cell.failed)


def header(argv: list[str]) -> dict[str, Any]:
    from benchmarks import timing

    found = timing.header("gpu_cells", argv)
    found["machine"]["driver"] = driver()
    found["versions"]["triton"] = version("triton")
    return found


def driver() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.splitlines()[0].strip()
    return None


def version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


# In the process that starts them


def carry_out(
    chosen: list[CellRow], runs: bool, dry: bool, data: Path, out: Path, asked: str
) -> int:
    """Run the cells one after the other; the exit code. `asked`: the words of the command."""
    began, failed = time.monotonic(), []
    out.mkdir(parents=True, exist_ok=True)
    name = f"{time.strftime('%Y-%m-%d', time.gmtime())}_gpu_{'runs' if runs else 'check'}"
    with (
        (out / f"{name}.jsonl").open("a", encoding="utf-8") as rows,
        (out / f"{name}.log").open("a", encoding="utf-8") as log,
    ):
        for row in (CellRow(HEADER, HEADER_SECONDS, "", ""), *chosen):
            left = LIMIT - (time.monotonic() - began) if not runs else row.seconds
            most = int(min(row.seconds, left))
            code = 1
            if most > GRACE:
                code = run_cell(row.name, most, dry, data, asked, rows, log)
            else:
                forward(json.dumps(ended(row.name, "no time was left")), rows)
            if row.name == HEADER and code == NO_GPU:
                print("gpu_cells: PyTorch sees no GPU: nothing was run", file=sys.stderr)
                return NO_GPU
            if code:
                failed.append(row.name)
    verdict = f"{', '.join(failed)}: something failed" if failed else "all is well"
    seconds = time.monotonic() - began
    print(f"gpu_cells: {verdict} in {seconds:.0f} s: {out / name}.jsonl, .log", file=sys.stderr)
    return int(bool(failed))


def command_of(name: str, dry: bool, data: Path, scratch: Path, asked: str) -> list[str]:
    flags = [name, "--data", str(data), "--here", str(scratch), f"--asked={asked}"]
    return [sys.executable, "-m", "benchmarks.gpu_cells", *flags, *(["--dry"] if dry else [])]


def run_cell(
    name: str, seconds: int, dry: bool, data: Path, asked: str, rows: IO[str], log: IO[str]
) -> int:
    """Run one cell under its alarm and pass its rows on; its exit code, 1 where it was stopped."""
    print(f"== {name}", file=log, flush=True)
    scratch = Path(tempfile.mkdtemp(prefix="gpu_cells"))
    process = subprocess.Popen(
        command_of(name, dry, data, scratch, asked),
        cwd=ROOT,
        # where a shell has it, kernels would run in Triton's interpreter
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        process_group=0,  # with all that it starts
    )
    passing = threading.Thread(target=pass_on, args=(process.stdout, rows), daemon=True)
    passing.start()
    code = 1
    try:
        code = process.wait(timeout=seconds)
        why = f"ended by {signal.Signals(-code).name}" if code < 0 else ""
    except subprocess.TimeoutExpired:
        why = f"stopped after {seconds} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        passing.join(timeout=GRACE)
        shutil.rmtree(scratch, ignore_errors=True)
    if why:
        forward(json.dumps(ended(name, why)), rows)
    return 1 if why else code


def pass_on(lines: Iterable[str], rows: IO[str]) -> None:
    for line in lines:
        forward(line.rstrip("\n"), rows)


def forward(line: str, rows: IO[str]) -> None:
    print(line, flush=True)
    print(line, file=rows, flush=True)


def ended(name: str, why: str) -> dict[str, Any]:
    return {"bench": f"gpu_{name}", "case": "cell", "failed": why}


if __name__ == "__main__":
    sys.exit(main())
