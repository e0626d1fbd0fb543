"""Where the runs of a sweep are done: processes of this machine, Ray, a Slurm job array."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fastsmooth.cli.flags import ConfigError
from fastsmooth.messages import DONE, INTERRUPTED, PREEMPTED, on_stop, say
from fastsmooth.processors import processors
from fastsmooth.runfolder.files import replace
from fastsmooth.runfolder.read import read_status
from fastsmooth.runfolder.write import RunFolderError, lock
from fastsmooth.sweep.store import FINAL, Planned, Results, read_sweep
from fastsmooth.sweep.table import Table

PARENT = "FASTSMOOTH_SWEEP"  # the process that a run must not outlive


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
    """Wait until no earlier sweep writes there; raises RunFolderError after a minute."""
    for left in range(240, -1, -1):
        try:
            os.close(lock(folder))
            return
        except RunFolderError:
            if not left:
                raise
            time.sleep(0.25)


def end_with_parent() -> None:
    """Have the kernel stop this process, and what it becomes, once its sweep is gone."""
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    pr_set_pdeathsig = 1  # prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != int(parent):
        sys.exit(PREEMPTED)


class Stop:
    """Notes the first signal that asks to stop, while it is entered."""

    def __init__(self) -> None:
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


def on_this_machine(
    out: Path, runs: list[Planned], own: dict[str, Any], stop: Stop, results: Results
) -> None:
    """Every run that is not finished, --jobs at a time, each in a process of its own."""
    gpus = visible_gpus()
    jobs = own.get("jobs") or len(gpus) or processors()
    waiting = [number for number, run in enumerate(runs) if unfinished(out, run)]
    table = Table(out, runs, len(runs) - len(waiting))
    # the place of each job: a run's number and its process
    active: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}
    (out / "logs").mkdir(exist_ok=True)
    try:
        while (waiting and not stop.received) or active:
            for place in range(jobs):
                if waiting and not stop.received and place not in active:
                    number = waiting.pop(0)
                    gpu = gpus[place % len(gpus)] if gpus else None
                    active[place] = number, start(out, runs[number], number, jobs, gpu)
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


def start(
    out: Path, run: Planned, number: int, jobs: int, gpu: str | None
) -> subprocess.Popen[bytes]:
    env = os.environ | {PARENT: str(os.getpid())}
    env.setdefault("OMP_NUM_THREADS", str(max(1, processors() // jobs)))
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpu
    with (out / "logs" / f"{run.name}.log").open("ab") as log:
        # a session of its own: Ctrl-C is for the sweep, which asks its runs to save
        return subprocess.Popen(
            command_of(out, number),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            start_new_session=True,
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


def on_ray(
    out: Path, runs: list[Planned], own: dict[str, Any], stop: Stop, results: Results
) -> None:
    """The same on a Ray cluster, whose machines must all see the folder."""
    try:
        import ray  # an extra
    except ImportError:
        raise ConfigError("--ray needs Ray: pip install 'fastsmooth[ray]'") from None
    waiting = [number for number, run in enumerate(runs) if unfinished(out, run)]
    (out / "logs").mkdir(exist_ok=True)
    address = None if own["ray"] == "local" else own["ray"]
    ray.init(address, log_to_driver=False, logging_level="ERROR")
    gpus = 1 if ray.cluster_resources().get("GPU") else 0

    # a worker that is lost is a run that goes on elsewhere
    @ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)
    def do(command: list[str], log: str, where: str) -> int:
        with open(log, "ab") as file:
            done = subprocess.run(
                command,
                cwd=where,
                env=os.environ | {PARENT: str(os.getpid())},
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
            return done.returncode

    table = Table(out.absolute(), runs, len(runs) - len(waiting))
    try:
        log, here = out.absolute() / "logs", os.getcwd()
        tasks = {
            do.remote(command_of(out.absolute(), k), str(log / f"{runs[k].name}.log"), here): k
            for k in waiting
        }
        while tasks and not stop.received:
            ready, _ = ray.wait(list(tasks), timeout=1.0)
            for task in ready:
                number = tasks.pop(task)
                # the run's folder says how far it came
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(task)
                table.ended(runs[number])
            table.show([])
            results.show()
    finally:
        table.close()
        ray.shutdown()


def write_slurm(script: Path, out: Path, count: int, own: dict[str, Any]) -> int:
    """A job array that does the runs; a run that Slurm preempts or that meets its time limit saves,
    and is queued again."""
    limit = f"%{own['jobs']}" if "jobs" in own else ""
    options = ["--job-name=fastsmooth", f"--array=0-{count - 1}{limit}", "--requeue"]
    options += ["--open-mode=append", "--signal=USR1@120"]
    options += [f"--output={out.absolute()}/logs/slurm-%a.log", *own.get("sbatch", [])]
    for option in options:
        if not option.startswith("-") or option.splitlines() != [option]:
            raise ConfigError(
                f"--sbatch {option!r} is not an option: write --sbatch=--time=4:00:00"
            )
    (out / "logs").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "fastsmooth.sweep", "--out", str(out.absolute()), "--run"]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        f"cd {shlex.quote(os.getcwd())} || exit 74",
        "# srun gets the signal 120 s before the time limit; the run saves and exits 75",
        "code=0",
        f'srun {shlex.join(command)} "$SLURM_ARRAY_TASK_ID" || code=$?',
        f'if [ "$code" -eq {PREEMPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"',
    ]
    replace(script, ("\n".join(lines) + "\n").encode())
    say(f"{script}: {count} runs; start them with: sbatch {shlex.quote(str(script))}")
    say(f"when they are done: {shlex.join(command[:-1])}")
    return DONE
