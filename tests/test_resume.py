"""Going on with a run: from its beginning, not at all, not twice. tests/faults has the kills and the signals."""

import os
import signal

from exact import EXACT
from forks import assert_same_run, finish, start, wait_for

from fastsmooth.log import read_status

BASE = [*EXACT, "--epochs", "3", "--decay-epoch", "1", "--checkpoint-every", "7", "--log-every", "5"]
PLAIN = [*EXACT, "--epochs", "3", "--checkpoint-every", "7", "--log-every", "5"]


def test_a_run_killed_before_its_first_checkpoint_starts_from_its_beginning(tmp_path):
    argv = [*PLAIN, "--checkpoint-every", "100000", "--epochs", "2"]
    finish(argv, tmp_path / "undisturbed")
    process = start(argv, tmp_path / "killed")
    wait_for(tmp_path / "killed" / "metrics.jsonl")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    finish([*argv, "--resume"], tmp_path / "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "undisturbed")


def test_max_time_saves_and_exits_75(tmp_path):
    argv = [*BASE, "--method", "hybrid", "--max-time", "0.5s"]
    process = start(argv, tmp_path / "run")
    process.join(60)
    assert process.exitcode == 75 and read_status(tmp_path / "run")["reason"] == "--max-time"


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
