"""A sweep that is killed ends with the results of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import without_times
from rows import read_rows

from fastsmooth import train
from fastsmooth.runfolder.read import read_run
from fastsmooth.sweep import store

SHORT = ["--epochs", "2", "--batchsize", "64", "--checkpoint-every", "5", "--device", "cpu"]


def call(out: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "fastsmooth.sweep", *flags, "--out", str(out), "--jobs", "2"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_sweep_killed_three_times_ends_with_the_results_of_one_that_was_not(tmp_path, cases):
    """kill -9 of the sweep, whose runs stop with it, at three instants; each run's rows are those
    of the run alone."""
    number = cases("a sweep killed three times: its runs", 12, 0)
    if number == 0:
        pytest.skip("with --full")
    rates = ["0.02", "0.05", "0.1", "0.2", "0.3", "0.4"][: number // 2]
    flags, out = [*SHORT, "--lr", *rates, "--seeds", "2"], tmp_path / "sweep"
    # runs that are done when the sweep is killed
    for done in (number // 4, number // 3, number // 2):
        process = call(out, *flags)
        while not out.is_dir() or len(list(out.glob("*/summary.json"))) < done:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        # whole, and nothing that is not so
        for result in json.loads((out / "results.json").read_text()):
            assert (
                result["state"] != "done"
                or result["summary"] == read_run(out / result["name"]).summary
            )
    process = call(out, *flags)
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    runs = store.read_sweep(out)
    results = json.loads((out / "results.json").read_text())
    assert len(runs) == len(results) == number
    assert shown.count("n 2") == number // 2 and "finished already" in shown
    for run, result in zip(runs, results, strict=True):
        assert train.main([*run.flags, "--out", str(tmp_path / run.name)]) == 0
        assert without_times(read_rows(out / run.name)) == without_times(
            read_rows(tmp_path / run.name)
        )
        assert result["state"] == "done"
        assert (
            result["summary"]["final_test_acc"]
            == read_run(tmp_path / run.name).summary["final_test_acc"]
        )
