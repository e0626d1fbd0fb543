"""Going on with a run: from its beginning, not at all, not twice. tests/faults has the kills and
the signals."""

import os
import signal

from exact import EXACT
from forks import assert_same_run, finish, start, wait_for
from images import noise, tree

from fastsmooth import sharpness
from fastsmooth.runfolder.read import read_status
from fastsmooth.train import main

BASE = [
    *EXACT,
    "--epochs",
    "3",
    "--decay-epoch",
    "1",
    "--checkpoint-every",
    "7",
    "--log-every",
    "5",
]
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


def test_a_run_folder_works_from_any_directory(tmp_path, monkeypatch):
    """Its images are found where they lay, by --resume and by sharpness."""
    home, away = tmp_path / "home", tmp_path / "away"
    tree(
        home / "images",
        {
            f"{s}/{c}/{i}.png": noise()
            for s in ("train", "val")
            for c in ("ant", "bee")
            for i in range(4)
        },
    )
    away.mkdir()
    monkeypatch.chdir(home)
    line = [
        "--dataset",
        "folder",
        "--data-dir",
        "images",
        "--model",
        "resnet8",
        "--image-size",
        "16",
        "--norm",
        "group",
    ]
    assert (
        main(
            [
                *EXACT,
                *line,
                "--epochs",
                "2",
                "--batchsize",
                "2",
                "--out",
                "run",
                "--max-time",
                "1e-3",
            ]
        )
        == 75
    )
    monkeypatch.chdir(away)
    assert main(["--resume", "--out", str(home / "run"), "--max-time", "1h"]) == 0
    flags = ["--samples", "4", "--batch", "2", "--n-iters", "1"]
    assert sharpness.main([str(home / "run"), *flags]) == 0
    os.rename(home / "run", away / "moved")  # and wherever it is moved
    assert sharpness.main(["moved", *flags]) == 0


def test_the_config_of_a_run_does_the_same_run(tmp_path):
    argv = [
        *EXACT,
        "--method",
        "hybrid",
        "--decay-epoch",
        "1",
        "--epochs",
        "2",
        "--batchsize",
        "100",
        "--seed",
        "3",
    ]
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    assert (
        main(["--config", str(tmp_path / "one" / "config.json"), "--out", str(tmp_path / "two")])
        == 0
    )
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_another_process_cannot_write_the_same_run(tmp_path):
    process = start([*PLAIN], tmp_path / "run")
    wait_for(tmp_path / "run" / "status.json")
    second = start(["--resume"], tmp_path / "run")
    second.join(60)
    assert second.exitcode == 2 and "another process" in (tmp_path / "run.log").read_text()
    process.join(60)
    assert process.exitcode == 0
