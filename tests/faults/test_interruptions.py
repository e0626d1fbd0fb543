"""Runs that are killed, stopped or moved to other processes end as if nothing had happened, to the
last bit."""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import saboteurs
import torch
from exact import EXACT
from forks import (
    assert_same_run,
    codes,
    final_state,
    finish,
    logs,
    saved_steps,
    start,
    start_ranks,
    wait_for,
)
from rows import read_rows

from fastsmooth.data.order import permutation
from fastsmooth.kernels import native
from fastsmooth.runfolder.read import read_status

BASE = [*EXACT, "--batchsize", "40", "--epochs", "2", "--checkpoint-every", "7", "--log-every", "5"]
STEPS = ["--decay-epoch", "1"]
SHB, NSHB = ["--optimizer", "shb", "--lr", "0.02"], ["--optimizer", "nshb"]
QHM = ["--optimizer", "qhm"]
CONSTANTS = ["--c2", "100", "--k2", "4"]
# every flag of a recipe, and those of them under which noise is measured
WITHOUT_MIXING = [
    "--label-smoothing", "0.1", "--randaugment", "2,9", "--random-erasing", "0.5",
    "--ema", "0.9", "--clip-norm", "1", "--weight-decay", "1e-3", "--decay-weights-only",
    "--warmup", "30", "--patience", "2", "--top5", "--freeze", "stem", "--keep", "all",
    "--augment", "crop-flip", "--lr", "0.02",
]  # fmt: skip
RECIPE = [*WITHOUT_MIXING, "--mixup", "0.2", "--cutmix", "1", "--sam", "rho=0.05,alpha=0.2"]
RUNS = {
    "constant": [],
    "lr": ["--method", "lr", *STEPS],
    "batch": ["--method", "batch", *STEPS, *SHB],
    "hybrid": ["--method", "hybrid", *STEPS, "--augment", "crop-flip"],
    "poly": ["--method", "poly", *NSHB],
    "cosine": ["--method", "cosine", *QHM],
    "exp": ["--method", "exp", "--weight-decay", "1e-4", *SHB],
    "beta": ["--method", "beta", *SHB, *CONSTANTS],
    "lr-beta": ["--method", "lr-beta", *NSHB, *CONSTANTS],
    "beta-batch": ["--method", "beta-batch", *QHM, "--augment", "crop-flip-rotate"],
    "lr-batch": ["--method", "lr-batch"],
    "lr-batch, nshb, micro-batches": [
        "--method",
        "lr-batch",
        *NSHB,
        *CONSTANTS,
        "--micro-batch",
        "16",
    ],
    "group norm, drop last": ["--norm", "group", "--drop-last"],
    "DataLoader": ["--loader", "torch", "--workers", "1"],
    "threads": ["--loader", "threads", "--augment", "crop-flip"],
    "DALI": ["--loader", "dali", "--augment", "crop-flip-rotate"],
    "critical, mean-norm": ["--mode", "critical", "--eps", "3", "2", *SHB],
    "critical, full-grad": [
        "--mode",
        "critical",
        "--eps",
        "1.5",
        "--criterion",
        "full-grad",
        "--bn",
        "eval",
    ],
    "sampling": ["--mode", "sampling", "--steps", "12", "40", "--draws", "3", *NSHB],
    "dropout": [
        "--model",
        "torchvision/mobilenet_v3_small",
        "--loader",
        "resident",
        "--lr",
        "0.01",
    ],
    "tracked, per-sample": ["--track-noise", "every=10", "--norm", "group", *QHM],
    "tracked, micro-batch": ["--track-noise", "every=10"],
    "recipe": [*RECIPE, "--optimizer", "nesterov"],
    "recipe, nu in steps": [*RECIPE, "--optimizer", "qhm", "--nu", "0.9 @0, 0.5 @1"],
    "recipe, AdamW": [*RECIPE, "--optimizer", "torch/AdamW"],
    "recipe, micro-batches, threads": [*RECIPE, "--micro-batch", "16", "--loader", "threads"],
    "recipe without SAM, tracked": [
        *WITHOUT_MIXING, "--optimizer", "shb", "--track-noise", "every=10", "--norm", "group",
    ],
}  # fmt: skip


FEW = ("hybrid", "critical, full-grad", "sampling", "recipe")


def kill_once(argv: list[str], out: Path, at: float) -> bool:
    """Start or go on, kill after `at` seconds; whether there was still something to kill."""
    process = start([*argv, "--resume"] if (out / "config.json").exists() else argv, out)
    process.join(at)
    alive = process.exitcode is None
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return alive


def go_on(argv: list[str], out: Path, world: int = 1) -> None:
    """To the end of the run, wherever it stopped."""
    if read_status(out).get("state") != "done":
        finish([*argv, "--resume"] if (out / "config.json").exists() else argv, out, world)


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_instants(name, tmp_path, cases):
    if name == "DALI":
        pytest.importorskip("nvidia.dali")
    few = 2 if name in FEW else 0
    number = cases(f"kill -9 at random instants, {len(RUNS)} kinds of run", 10, few)
    if number == 0:
        pytest.skip("with --full")
    argv = [*BASE, *RUNS[name]]
    began = time.monotonic()
    finish(argv, tmp_path / "undisturbed")
    lasts = time.monotonic() - began
    rng = random.Random(name)
    for case in range(number):
        out = tmp_path / f"killed-{case}"
        while not kill_once(argv, out, rng.uniform(0, lasts)):
            shutil.rmtree(out)  # it was done before: another instant
        go_on(argv, out)
        assert_same_run(out, tmp_path / "undisturbed")


def commands_below(pid: int) -> list[int]:
    """The process, and those it started, and those that they started."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return found


@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_whole_commands_killed(launcher, tmp_path, cases):
    ranks = 2 if launcher == "torchrun" else 1
    number = cases(f"kill -9 of whole commands, {launcher}", 10 if ranks == 1 else 5, 0)
    if number == 0:
        pytest.skip("with --full")
    module = ["-m", "fastsmooth.train", *BASE, "--method", "hybrid", *STEPS]
    if ranks > 1:
        module = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *module]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def begin(out: Path, *more: str) -> subprocess.Popen:
        command = [sys.executable, *module, *more, "--out", str(out)]
        with open(f"{out}.log", "a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    began = time.monotonic()
    assert begin(tmp_path / "undisturbed").wait() == 0, logs(tmp_path / "undisturbed")
    lasts = time.monotonic() - began
    rng = random.Random(launcher)
    for case in range(number):
        out = tmp_path / f"killed-{case}"
        process = begin(out)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(lasts * rng.uniform(0.3, 1))
        for pid in commands_below(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        if read_status(out).get("state") != "done":
            assert (
                begin(out, *(["--resume"] if (out / "config.json").exists() else [])).wait() == 0
            ), logs(out)
        assert_same_run(out, tmp_path / "undisturbed")


POINTS = (
    "temporary file open",
    "half written",
    "before fsync",
    "between the renames",
    "during clean-up",
)


@pytest.mark.parametrize("point", POINTS)
def test_killed_while_it_saves(point, tmp_path, cases):
    argv = [*BASE, "--method", "batch", *STEPS, *SHB]
    finish(argv, tmp_path / "undisturbed")
    first = 3 if point == "during clean-up" else 1  # until then there is nothing to clean up
    for save in range(first, first + cases("kill -9 at the points of a save", 5, 1)):
        out = tmp_path / f"{save}"
        process = start(argv, out, functools.partial(saboteurs.kill_in_save, point, save))
        assert codes([process]) == [-signal.SIGKILL], logs(out)
        kept = saved_steps(out)
        whole = save - (point != "during clean-up")  # saves that were finished
        assert kept[-1:] == ([7 * whole] if whole else [])
        go_on(argv, out)
        assert_same_run(out, tmp_path / "undisturbed")
        pairs = {f"ckpt-{step}.{end}" for step in saved_steps(out) for end in ("pt", "json")}
        assert {p.name for p in (out / "checkpoints").iterdir()} == pairs and len(pairs) == 4


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_exits_75(number, world, tmp_path, cases):
    argv = [*BASE, "--method", "hybrid", *STEPS]
    few = int((number, world) in ((signal.SIGTERM, 2), (signal.SIGUSR1, 1), (signal.SIGINT, 1)))
    many = cases("a signal at a random instant, one process and two", 10, few)
    if many == 0:
        pytest.skip("with --full")
    finish(argv, tmp_path / "undisturbed", world)
    rng = random.Random(number * world)
    lasts = 2 * read_rows(tmp_path / "undisturbed")[-1]["train_seconds"]  # as long as two epochs
    for case in range(many):
        out = tmp_path / f"stopped-{case}"
        for _ in range(20):
            processes = [start(argv, out)] if world == 1 else start_ranks(argv, out, world)
            wait_for(out / "config.json")
            time.sleep(rng.uniform(0, lasts))
            with contextlib.suppress(ProcessLookupError):
                os.kill(processes[rng.randrange(world)].pid, number)
            found = codes(processes)
            if found != [0] * world:
                break
            shutil.rmtree(out)  # it was done before: another instant
        assert found == [75] * world, logs(out)
        status = read_status(out)
        assert (status["state"], status["reason"]) == ("preempted", signal.Signals(number).name)
        assert status["step"] == saved_steps(out)[-1] == final_state(out)["update"]
        go_on(argv, out, world)
        assert_same_run(out, tmp_path / "undisturbed")


def test_the_order_of_samples_survives_a_change_of_the_number_of_processes(tmp_path, cases):
    """1, 2, 4 and 1 processes in turn: each update has the samples that the permutation says, none
    twice, none missing."""
    cases("world size 1 to 2 to 4 to 1 on resume", 1, 1)
    argv = [*BASE, "--method", "hybrid", *STEPS, "--norm", "group", "--augment", "crop-flip"]
    (tmp_path / "indices").mkdir()
    for world, stop in ((1, 11), (2, 30), (4, 47), (1, None)):
        sabotage = functools.partial(saboteurs.write_down_samples, str(tmp_path / "indices"), stop)
        more = [] if world == 1 and stop == 11 else ["--resume"]
        processes = [start([*argv, *more], tmp_path / "run", sabotage)]
        if world > 1:
            codes(processes, 0)
            processes = start_ranks([*argv, *more], tmp_path / "run", world, sabotage)
        assert codes(processes) == [0 if stop is None else 75] * world, logs(tmp_path / "run")
    served: dict[int, list[int]] = defaultdict(list)
    for path in (tmp_path / "indices").iterdir():
        for line in path.read_text().splitlines():
            update, index = json.loads(line)
            served[update] += index
    expected, update = {}, 0
    for epoch, batch in ((0, 40), (1, 60)):
        order = permutation(0, epoch, 1437).tolist()
        for at in range(0, 1437, batch):
            update += 1
            expected[update] = sorted(order[at : at + batch])
    assert {update: sorted(index) for update, index in served.items()} == expected


# the last is the last update of the run, before it is evaluated
@pytest.mark.parametrize("off", [-1, 0, 1, 18])
def test_resumed_around_a_change_of_the_batch(off, tmp_path, cases):
    cases("resume one update before, at and after a batch change, at the last update", 1, 1)
    argv = [*BASE, "--method", "batch", *STEPS, *SHB, "--augment", "crop-flip-rotate"]
    change = 36  # the first epoch's updates
    finish(argv, tmp_path / "undisturbed")
    process = start(
        argv, tmp_path / "stopped", functools.partial(saboteurs.stop_after, change + off)
    )
    assert codes([process]) == [75] and saved_steps(tmp_path / "stopped")[-1] == change + off
    go_on(argv, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "undisturbed")
    assert {row["batch_size"] for row in read_rows(tmp_path / "stopped")} == {40, 80}


SHORT = [*EXACT, "--batchsize", "40", "--budget", "updates=18", "--log-every", "5"]
MEASURED = [*SHORT, "--track-noise", "every=5", "--norm", "group"]
KEPT = {  # on which machine a run begins, and on which it goes on to the same bits, without a word
    "kernels in plain PyTorch": ("no compiler", "the same", MEASURED),
    "three threads": ("more threads", "many processors", MEASURED),
    "images decoded ahead": ("little memory", "the same", [*MEASURED, "--augment", "crop-flip"]),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_auto_chose_is_kept_on_another_machine(name, tmp_path, cases):
    if (
        cases("another machine on resume: chosen as before", 1, int(name != "images decoded ahead"))
        == 0
    ):
        pytest.skip("with --full")
    first, second, argv = KEPT[name]
    finish(
        argv, tmp_path / "undisturbed", prepare=functools.partial(saboteurs.elsewhere, first, None)
    )
    process = start(argv, tmp_path / "run", functools.partial(saboteurs.elsewhere, first, 11))
    assert codes([process]) == [75]
    (tmp_path / "run.log").unlink()
    process = start(
        ["--resume"], tmp_path / "run", functools.partial(saboteurs.elsewhere, second, None)
    )
    assert codes([process]) == [0]
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
    # nothing to warn of
    assert "fastsmooth: " not in logs(tmp_path / "run"), logs(tmp_path / "run")
    assert name != "images decoded ahead" or "loader threads: as before" in logs(tmp_path / "run")


OTHERWISE = {  # the machines, flags on resume, exit code, and words of the one line on stderr
    "fewer processors": (
        "more threads",
        "one processor",
        [],
        0,
        ["threads 1 instead of 3", "bits may differ"],
    ),
    "as many threads as the user says": (
        "more threads",
        "many processors, of which the user names one",
        [],
        0,
        ["threads 1 instead of 3", "bits may differ"],
    ),
    "another PyTorch": (
        "another torch",
        "the same",
        [],
        0,
        ["torch ", "instead of 1.0", "bits may differ"],
    ),
    "no compiler": (
        "the same",
        "no compiler",
        [],
        2,
        ["--kernels native needs", "--kernels reference", "the run began so"],
    ),
    "no compiler, as you like": (
        "the same",
        "no compiler",
        ["--kernels", "reference"],
        0,
        ["--kernels reference instead of native"],
    ),
    "no DALI": (
        "DALI",
        "no DALI",
        [],
        2,
        ["--loader dali needs", "pip install", "--loader threads", "the run began so"],
    ),
    "no GPU": ("a GPU", "the same", [], 2, ["--device cuda", "--device cpu", "the run began so"]),
    "no GPU, as you like": (
        "a GPU",
        "the same",
        ["--device", "cpu"],
        0,
        ["--device cpu instead of cuda", "gpu None instead of G1"],
    ),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_cannot_be_kept_is_said_in_one_line(name, tmp_path, cases):
    few = int(name in ("fewer processors", "no compiler", "no GPU"))
    if cases("another machine on resume: what is not as before is said, or refused", 1, few) == 0:
        pytest.skip("with --full")
    first, second, flags, code, words = OTHERWISE[name]
    if second == "no compiler" and native.library() is None:
        pytest.skip("there is no C++ compiler here")
    process = start(SHORT, tmp_path / "run", functools.partial(saboteurs.elsewhere, first, 11))
    assert codes([process]) == [75], logs(tmp_path / "run")
    (tmp_path / "run.log").unlink()
    process = start(
        ["--resume", *flags], tmp_path / "run", functools.partial(saboteurs.elsewhere, second, None)
    )
    assert codes([process]) == [code], logs(tmp_path / "run")
    (line,) = [
        line for line in logs(tmp_path / "run").splitlines() if line.startswith("fastsmooth: ")
    ]
    assert all(word in line for word in words), line


CHANGED = [("--lr", "0.1", "0.2"), ("--batchsize", "40", "41"), ("--seed", "0", "1"),
    ("--model", "resnet8", "resnet20"),
           ("--method", "hybrid", "lr"), ("--epochs", "2", "3"),
           ("--norm", "batch", "group")]  # fmt: skip


def test_a_changed_flag_is_refused_with_both_values(tmp_path, cases):
    argv = [*BASE, "--method", "hybrid", *STEPS]
    process = start(argv, tmp_path / "run", functools.partial(saboteurs.stop_after, 3))
    assert codes([process]) == [75]
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for flag, old, new in CHANGED[: cases("a changed flag on resume", len(CHANGED), 2)]:
        (tmp_path / "run.log").unlink()
        assert codes([start(["--resume", flag, new], tmp_path / "run")]) == [2]
        (line,) = logs(tmp_path / "run").splitlines()
        assert all(word in line for word in (flag, old, new)), line
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("where", ["loss", "gradient", "weight", "input"])
def test_what_is_not_finite_stops_the_run_at_that_update(where, world, tmp_path, cases):
    values = [float("nan"), float("inf")][
        : cases("NaN and Inf in loss, gradient, weight, input", 2, 1)
    ]
    argv = [
        *BASE,
        "--mode",
        "critical",
        "--eps",
        "1e-6",
        "--checkpoint-every",
        "9",
        "--log-every",
        "1000",
    ]
    for value in values:
        out = tmp_path / f"{value}"
        sabotage = functools.partial(saboteurs.poison, where, value, 12, world - 1)
        processes = (
            [start(argv, out, sabotage)] if world == 1 else start_ranks(argv, out, world, sabotage)
        )
        assert codes(processes) == [3] * world, logs(out)
        (line,) = [line for line in logs(out).splitlines() if line.startswith("fastsmooth: ")]
        assert "not finite at update 12 " in line
        status = read_status(out)
        # several agree one update later
        assert status["state"] == "diverged" and status["step"] in (12, 13)
        assert not (out / "critical.json").exists()
        state = final_state(out)
        assert state["update"] == 9
        for part in (state["model"], state["optimizer"]["state"], state["instruments"]):
            flat = torch.utils._pytree.tree_leaves(part)
            assert all(torch.isfinite(t).all() for t in flat if isinstance(t, torch.Tensor))


# The end of a measurement


MEASURED = {
    "critical": ["--mode", "critical", "--eps", "2.0", *SHB],
    "critical, full-grad": [
        "--mode",
        "critical",
        "--eps",
        "1e9",
        "--criterion",
        "full-grad",
        "--full-grad-every",
        "20",
    ],
    "sampling": ["--mode", "sampling", "--steps", "12", "40", "--draws", "2", *NSHB],
}


@pytest.mark.parametrize("name", MEASURED)
def test_stopped_at_the_update_that_ends_it(name, tmp_path, cases):
    """It has what it wanted: nothing is trained after --resume."""
    if not cases("stopped at the update that ends a measurement", 1, name == "critical"):
        pytest.skip("with --full")
    argv = [*BASE, *MEASURED[name], "--epochs", "6", "--checkpoint-every", "1", "--log-every", "10"]
    finish(argv, tmp_path / "undisturbed")
    last = saved_steps(tmp_path / "undisturbed")[-1]
    assert last % 10 == 0 and last < 200
    out = tmp_path / "stopped"
    assert codes([start(argv, out, functools.partial(saboteurs.stop_after, last))]) == [75], logs(
        out
    )
    go_on(argv, out)
    assert_same_run(out, tmp_path / "undisturbed")
