"""Runs whose signals are ignored, whose readers go, whose files and processes are taken away: how
each of them ends."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import saboteurs
from exact import EXACT
from forks import assert_same_run, codes, finish, logs, saved_steps, start, start_ranks

from fastsmooth.runfolder.read import read_status

BASE = [*EXACT, "--batchsize", "80", "--epochs", "2", "--checkpoint-every", "7", "--log-every", "5"]
LAST = 36  # updates


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(BASE, out)
    return out


def remarks(out: Path) -> list[str]:
    """The lines on stderr; anything but a warning or an error would be what a library printed."""
    text = logs(out)
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("fastsmooth: ")]


def some(values: list, number: int) -> list:
    return values[:number]


# Signals and readers


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(undisturbed, tmp_path, cases):
    numbers = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    for number in some(numbers, cases("a signal that was ignored at the start", 4, 1)):
        out = tmp_path / number.name
        assert codes([start(BASE, out, functools.partial(saboteurs.ignore, number, 3))]) == [0], (
            logs(out)
        )
        assert_same_run(out, undisturbed)


def test_a_sweep_under_nohup_goes_on_at_hang_up(tmp_path, cases):
    if cases("a signal that was ignored at the start", 4, 0) == 0:
        pytest.skip("with --full")
    for number in ("HUP", "INT", "TERM", "USR1"):
        out = tmp_path / number
        command = [
            sys.executable,
            "-m",
            "fastsmooth.sweep",
            "--out",
            str(out),
            "--epochs",
            "1",
            "--jobs",
            "1",
        ]
        shell = (
            f'trap "" {number}; "$@" & pid=$!; until [ -e "{out}/logs" ]; do sleep 0.1; done; '
            f"kill -{number} $pid; wait $pid"
        )
        done = subprocess.run(
            ["bash", "-c", shell, "-", *command, "--seeds", "2"], capture_output=True, text=True
        )
        assert done.returncode == 0 and "n 2" in done.stdout, done.stderr


LOST = [
    ("terminal", None, 3),
    ("pipe", signal.SIGINT, 9),
    ("terminal", signal.SIGHUP, LAST),
    ("pipe", None, LAST),
]
LOST += [
    (k, t, u)
    for k in ("terminal", "pipe")
    for t in (None, signal.SIGINT, signal.SIGHUP)
    for u in (4, LAST - 1)
]


def test_a_reader_that_is_gone_changes_nothing(undisturbed, tmp_path, cases):
    """A pipe (| head), a closed terminal with its bar; with Ctrl-C (| tee) and the SIGHUP of that
    terminal."""
    for kind, then, update in some(LOST, cases("a reader that is gone", len(LOST), 2)):
        out = tmp_path / f"{kind}-{then}-{update}"
        process = start(BASE, out, functools.partial(saboteurs.lose_reader, kind, update, then))
        assert codes([process]) == [75 if then else 0], read_status(out)
        if then:
            assert read_status(out)["state"] == "preempted" and saved_steps(out)[-1] == update
            finish(["--resume"], out)
        assert_same_run(out, undisturbed)


# Errors that nobody foresaw

PLACES = ["gradient", "row", "end", "update", "data", "checkpoint", "evaluation", "progress"]


@pytest.mark.parametrize("world", [1, 2])
def test_an_error_that_nobody_foresaw_is_one_line_and_the_run_can_go_on(
    world, undisturbed, tmp_path, cases
):
    """On the last of the processes; row, checkpoint and the end of a run are the first one's."""
    places = [p for p in PLACES if world == 1 or p not in ("row", "checkpoint", "progress", "end")]
    errors = ["KeyError", "RuntimeError", "SystemExit"]
    number = cases("errors that nobody foresaw", 3 * len(places), 3 if world == 1 else 1)
    if world == 2:
        undisturbed = tmp_path / "undisturbed"
        finish(BASE, undisturbed, 2)
    for case in range(number):
        place, error = (
            places[case % len(places)],
            errors[case % 3 if number <= 3 else case // len(places)],
        )
        out = tmp_path / f"{place}-{error}"
        sabotage = functools.partial(saboteurs.fail_at, place, error, 10, world - 1)
        processes = (
            [start(BASE, out, sabotage)] if world == 1 else start_ranks(BASE, out, world, sabotage)
        )
        assert codes(processes) == [70] * world, logs(out)
        (line,) = remarks(out)
        kept = out / ("traceback.txt" if world == 1 else "traceback-1.txt")
        status = read_status(out)
        words = "'nobody knew'" if error == "KeyError" else "nobody knew"
        newest = saved_steps(out)[-1]
        said = (
            f"fastsmooth: error: {error}: {words}: the traceback is in {kept}; this was at update "
            "(\\d+), "
        )
        said += f"--resume --out {out} goes on from the checkpoint of update {newest:,}"
        found = re.fullmatch(said, line)
        assert found and abs(int(found[1]) - status["step"]) < world, (
            line
        )  # the first process may be one update further
        assert (
            status["state"] == "failed"
            and status["reason"].startswith(f"{error}: {words}")
            and status["step"] >= 10
        )
        assert "in failing" in kept.read_text() and newest >= 7
        for log in tmp_path.glob(f"{out.name}*.log"):
            log.unlink()
        finish(["--resume"], out, world)
        assert_same_run(out, undisturbed)


def test_a_run_that_cannot_open_files_says_so(tmp_path, cases):
    """Not that a file cannot be written, which is but what it was about to do."""
    cases("too many open files", 1, 1)
    out = tmp_path / "run"
    assert codes([start(BASE, out, functools.partial(saboteurs.limit_open_files, 20))]) == [74], (
        logs(out)
    )
    *warnings, error = remarks(out)
    assert read_status(out)["state"] == "failed"
    assert (
        all("Too many open files" in line for line in (*warnings, error))
        and "raise the limit (ulimit -n)" in error
    )


# Files taken away


def test_metrics_taken_away_are_written_again_or_the_run_fails(undisturbed, tmp_path, cases):
    ways = ["removed", "cut", "replaced", "folder removed"]
    for how in some(ways, cases("metrics.jsonl taken away", 4, 2)):
        out = tmp_path / how
        found = codes([start(BASE, out, functools.partial(saboteurs.harm_metrics, how, 12))])
        *warnings, line = remarks(out)
        if how in ("removed", "replaced"):
            assert (
                found == [0]
                and not warnings
                and f"{out}/metrics.jsonl was removed or replaced" in line
            )
            assert_same_run(out, undisturbed)
        else:
            assert found == [74] and line.startswith(
                f"fastsmooth: error: cannot write {out}/metrics.jsonl: "
            )
            assert how == "folder removed" or read_status(out)["state"] == "failed"
            assert how == "cut" or not out.exists()


SAMPLING = ["--mode", "sampling", "--steps", "2", "--draws", "3", "--save-omega"]


def test_a_disk_that_is_full_in_the_middle_of_omega(tmp_path, cases):
    sizes = [700_000, 4096, 100]  # a row is 312 kB: in the third row, in the first, in the header
    for size in some(sizes, cases("a disk full in the middle of --save-omega", 3, 1)):
        out = tmp_path / f"{size}"
        assert codes(
            [
                start(
                    [*EXACT, *SAMPLING],
                    out,
                    functools.partial(saboteurs.limit_file_size, max(size, 4096)),
                )
            ]
        ) == [74]
        (line,) = remarks(out)
        assert line.startswith(f"fastsmooth: error: cannot write {out}/omega-2.npy: File too large")
        assert (
            read_status(out)["state"] == "failed"
            and not list(out.glob("*omega*"))
            and not list(out.glob(".*.tmp"))
        )


def on_a_disk_of(size: str, place: str, command: list[str]) -> subprocess.CompletedProcess:
    """The command where `place` is a file system of its own; then what is in it, and
    status.json."""
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount")
    shell = (
        f'mount -t tmpfs -o size={size} tmpfs "{place}"; "$@"; code=$?; ls -A "{place}"; cat '
        f'"{place}"/run/status.json; exit $code'
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["unshare", "-m", "bash", "-c", shell, "-", *command],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip


def test_a_real_disk_that_is_full_in_the_middle_of_omega(tmp_path, cases):
    """A memory map would be ended by SIGBUS here."""
    if cases("a disk full in the middle of --save-omega", 1, 0) == 0:
        pytest.skip("with --full")
    command = [
        sys.executable,
        "-m",
        "fastsmooth.train",
        *SAMPLING,
        "--out",
        str(tmp_path / "disk" / "run"),
    ]
    (tmp_path / "disk").mkdir()
    done = on_a_disk_of("700k", str(tmp_path / "disk"), command)
    assert done.returncode == 74 and len(done.stderr.splitlines()) == 1, done.stderr
    assert (
        "omega-2.npy: No space left on device" in done.stderr and '"state": "failed"' in done.stdout
    )


# The processes of --loader torch

TORCH = [*BASE, "--loader", "torch", "--workers", "1", "--chunk", "40"]
HARMS = {
    "killed": "one of them was killed by SIGKILL: was the memory short?",
    "stopped": "no chunk within 3 s: does the disk",
    "bus": "one of them was killed by SIGBUS: /dev/shm is too small",
    "too many files": "Too many open files",
}


def test_a_process_of_the_loader_that_is_lost_is_one_line(tmp_path, cases):
    finish(TORCH, tmp_path / "undisturbed")
    for how in some(list(HARMS), cases("processes of --loader torch lost", 4, 2)):
        out = tmp_path / how
        assert codes(
            [start(TORCH, out, functools.partial(saboteurs.harm_workers, how, 10))], 60
        ) == [74], logs(out)
        line = logs(out).splitlines()[-1]  # PyTorch has a word to say of SIGBUS before
        assert "Traceback" not in logs(out) and re.search(
            f"error: the processes of --loader torch: .*{HARMS[how]}.*goes on from the ", line
        ), line
        assert read_status(out)["state"] == "failed"
        Path(f"{out}.log").unlink()
        finish(["--resume"], out)
        assert_same_run(out, tmp_path / "undisturbed")


def test_shared_memory_that_is_too_small_is_one_line(tmp_path, cases):
    """What a worker cannot hand over would be dropped by a thread of PyTorch's and waited for."""
    cases("/dev/shm too small", 1, 1)
    out = tmp_path / "run"
    argv = [*EXACT, "--loader", "torch", "--workers", "1", "--epochs", "1"]
    assert codes([start(argv, out, functools.partial(saboteurs.limit_file_size, 30_000))], 60) == [
        74
    ], logs(out)
    (line,) = remarks(out)
    assert (
        "</torch_" in line and "/dev/shm is too small" in line and "--loader threads none" in line
    )


def test_a_real_shared_memory_that_is_too_small(tmp_path, cases):
    sizes = ["16k", "64k", "100k"]
    if cases("/dev/shm too small", 3, 0) == 0:
        pytest.skip("with --full")
    for size in sizes:
        command = [
            sys.executable,
            "-m",
            "fastsmooth.train",
            "--loader",
            "torch",
            "--workers",
            "1",
            "--epochs",
            "1",
        ]
        done = on_a_disk_of(size, "/dev/shm", [*command, "--out", str(tmp_path / size)])
        assert (
            done.returncode == 74
            and "/dev/shm is too small" in done.stderr
            and "Traceback" not in done.stderr
        )
