"""Folders that two could take for their own, and rows that a run could take from another: nothing
is lost to a name."""

import functools
import random
from pathlib import Path

import pytest
import saboteurs
from exact import EXACT
from forks import (
    assert_same_bits,
    codes,
    final_state,
    finish,
    logs,
    start,
    start_ranks,
    without_times,
)
from rows import read_rows

from fastsmooth import sharpness
from fastsmooth.runfolder.read import read_status
from fastsmooth.sweep import grid, store

BASE = [*EXACT, "--batchsize", "40", "--epochs", "2", "--checkpoint-every", "7", "--log-every", "5"]
QUICK = ["--samples", "128", "--batch", "64", "--n-iters", "2"]


def test_runs_without_out_that_start_together_never_meet(tmp_path, cases):
    """Four at once, in one second; two processes of one run share one folder; a run that is refused
    leaves none."""
    number = cases("runs started together without --out", 24, 4)
    short = [*EXACT, "--epochs", "1", "--batchsize", "200"]
    place = functools.partial(saboteurs.stand_in, str(tmp_path))
    for base in range(0, number, 4):
        processes = [
            start_ranks(short, tmp_path / f"log{base + k}", 2 if k == 3 else 1, place, named=False)
            for k in range(4)
        ]
        assert codes([p for ranks in processes for p in ranks]) == [0] * 5, logs(tmp_path / "log")
        folders = sorted((tmp_path / "runs").iterdir())
        assert len(folders) == base + 4
        assert all(
            read_status(folder)["state"] == "done" and len(read_rows(folder)) > 0
            for folder in folders
        )
    before = sorted((tmp_path / "runs").iterdir())
    refused = [*short, "--dataset", "folder", "--data-dir", "nowhere"]
    assert codes(start_ranks(refused, tmp_path / "refused", 1, place, named=False)) == [2]
    assert sorted((tmp_path / "runs").iterdir()) == before


@pytest.mark.parametrize("ending", ["preempted", "killed"])
def test_what_was_measured_of_a_stopped_run_survives_its_going_on(ending, tmp_path, cases):
    """Its rows are those of a run that was left alone, and the sharpness's; its bits are the
    same."""
    if cases("sharpness of a stopped run that goes on", 1, int(ending == "killed")) == 0:
        pytest.skip("with --full")
    out, then = (
        tmp_path / "run",
        {"preempted": saboteurs.signal.SIGTERM, "killed": saboteurs.signal.SIGKILL}[ending],
    )
    assert codes([start(BASE, out, functools.partial(saboteurs.stop_after, 32, then))]) == [
        75 if then == 15 else -9
    ]
    assert sharpness.main([str(out), *QUICK]) == 0
    measured = read_rows(out)[-1]
    assert measured["sharpness"] is not None
    finish(["--resume"], out)
    finish(BASE, tmp_path / "undisturbed")
    rows = read_rows(out)
    assert [row for row in rows if "sharpness" in row] == [measured]
    assert without_times([r for r in rows if r != measured]) == without_times(
        read_rows(tmp_path / "undisturbed")
    )
    assert_same_bits(final_state(out), final_state(tmp_path / "undisturbed"))
    assert not list(out.rglob("*.tmp"))


def test_no_run_of_a_sweep_is_lost_to_a_name(tmp_path, cases):
    """Random names that look alike once they are names of folders; added in random order, they keep
    what they have."""
    rng, alphabet = random.Random(5), "aA-_/ .\u00e9E\u0301\u00df"
    out = tmp_path / "sweep"
    out.mkdir()
    for case in range(cases("names of runs that look alike: sweeps", 200, 20)):
        values = {
            "".join(rng.choices(alphabet, k=rng.randrange(1, 5))) + rng.choice(["", "_2", "_3"])
            for _ in range(40)
        }
        values = sorted(values | {"x" * 300 + c for c in "aAb"})
        (out / "sweep.json").unlink(missing_ok=True)
        kept: dict = {}
        for count in (2, len(values) // 2, len(values)):
            rng.shuffle(values)
            known = [flags[0].removeprefix("--data-dir=") for flags in kept]
            chosen = known + [value for value in values if value not in known][: count - len(known)]
            rng.shuffle(chosen)
            runs = grid.named([{"data_dir": value} for value in chosen], out)
            store.write_sweep(out, runs)
            found = {run.flags: run.name for run in store.read_sweep(out)}
            assert len(found) == len({grid.same(name) for name in found.values()}) == len(chosen), (
                case
            )
            assert kept.items() <= found.items(), case
            assert all(
                len(f"{name}.log".encode()) <= 255 and Path(name).name == name
                for name in found.values()
            )
            kept = found
