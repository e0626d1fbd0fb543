"""Runs that are killed at random instants and go on with --resume end in the same bits as runs that were not."""

import os
import random
import shutil
import signal

import pytest
from exact import EXACT
from forks import assert_same_run, final_state, finish, start, wait_for

from fastsmooth.log import read_status

BASE = [*EXACT, "--epochs", "3", "--decay-epoch", "1", "--checkpoint-every", "7", "--log-every", "5"]
PLAIN = [*EXACT, "--epochs", "3", "--checkpoint-every", "7", "--log-every", "5"]
RUNS = {
    "hybrid": [*BASE, "--method", "hybrid"],
    "batch with shb": [*BASE, "--method", "batch", "--optimizer", "shb", "--lr", "0.02"],
    "exp with nshb": [*PLAIN, "--method", "exp", "--optimizer", "nshb"],
    "beta-batch with qhm, augmented": [
        *PLAIN,
        "--method",
        "beta-batch",
        "--optimizer",
        "qhm",
        "--augment",
        "crop-flip-rotate",
    ],
    "cosine, GroupNorm, DataLoader": [*PLAIN, "--method", "cosine", "--norm", "group", "--loader", "torch"],
    "critical": [*PLAIN, "--mode", "critical", "--eps", "1.5", "1.0", "--optimizer", "shb", "--lr", "0.02"],
    "sampling": [*PLAIN, "--mode", "sampling", "--steps", "30", "100", "--draws", "3", "--optimizer", "nshb"],
}
KILLS = 3  # of each of the seven


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_in_the_same_bits(name, tmp_path):
    argv = RUNS[name]
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "killed"
    lasts = 0.8 * finish(argv, undisturbed)
    rng = random.Random(name)
    kills = 0
    while kills < KILLS:
        process = start([*argv, "--resume"] if (out / "config.json").exists() else argv, out)
        wait_for(out / "config.json")
        process.join(rng.uniform(0, lasts))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        elif kills == 0:  # it was done before the first kill: another instant, sooner
            shutil.rmtree(out)
            lasts /= 2
        else:
            break
    if read_status(out)["state"] != "done":
        finish([*argv, "--resume"], out)
    assert kills >= 1
    assert_same_run(out, undisturbed)


def test_a_run_killed_before_its_first_checkpoint_starts_from_its_beginning(tmp_path):
    argv = [*PLAIN, "--checkpoint-every", "100000", "--epochs", "2"]
    finish(argv, tmp_path / "undisturbed")
    process = start(argv, tmp_path / "killed")
    wait_for(tmp_path / "killed" / "metrics.jsonl")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    finish([*argv, "--resume"], tmp_path / "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "undisturbed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_at_the_next_update_and_exits_75(number, tmp_path):
    argv = [*BASE, "--method", "hybrid"]
    finish(argv, tmp_path / "undisturbed")
    process = start(argv, tmp_path / "stopped")
    wait_for(tmp_path / "stopped" / "metrics.jsonl")
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 75
    status = read_status(tmp_path / "stopped")
    assert status["state"] == "preempted" and status["reason"] == signal.Signals(number).name
    assert status["step"] == final_state(tmp_path / "stopped")["update"]
    finish(["--resume"], tmp_path / "stopped")  # the flags come from the folder
    assert_same_run(tmp_path / "stopped", tmp_path / "undisturbed")


def test_max_time_saves_and_exits_75(tmp_path):
    argv = [*BASE, "--method", "hybrid", "--max-time", "0.5s"]
    process = start(argv, tmp_path / "run")
    process.join(60)
    assert process.exitcode == 75 and read_status(tmp_path / "run")["reason"] == "--max-time"


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    argv = [*BASE, "--method", "batch"]
    finish(argv, tmp_path / "undisturbed")
    process = start(argv, tmp_path / "run")
    wait_for(tmp_path / "run" / "checkpoints" / "ckpt-14.json")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    newest = max((tmp_path / "run" / "checkpoints").glob("ckpt-*.json"), key=lambda p: int(p.stem.split("-")[1]))
    data = bytearray(newest.with_suffix(".pt").read_bytes())
    data[len(data) // 2] ^= 1
    newest.with_suffix(".pt").write_bytes(data)
    finish([*argv, "--resume"], tmp_path / "run")
    log = (tmp_path / "run.log").read_text()
    assert log.count("fastsmooth: warning:") == 1 and newest.with_suffix(".pt").name in log
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_a_finished_run_is_left_alone(tmp_path):
    argv = ["--epochs", "1"]
    finish(argv, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    finish([*argv, "--resume"], tmp_path / "run")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_another_process_cannot_write_the_same_run(tmp_path):
    process = start([*PLAIN], tmp_path / "run")
    wait_for(tmp_path / "run" / "status.json")
    second = start(["--resume"], tmp_path / "run")
    second.join(60)
    assert second.exitcode == 2 and "another process" in (tmp_path / "run.log").read_text()
    process.join(60)
    assert process.exitcode == 0
