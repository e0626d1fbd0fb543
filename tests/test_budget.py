"""--budget: runs of equal updates or samples, whatever their batch size."""

import dataclasses
import json
import re

import pytest
from exact import EXACT
from killed import Killed, killed_at
from rows import read_rows

from fastsmooth.cli.config import resolve
from fastsmooth.cli.flags import ConfigError
from fastsmooth.cli.parse import parse
from fastsmooth.schedule import Schedule, Smoothing
from fastsmooth.train import main
from fastsmooth.training.plan import make_schedule, within_budget

IMAGES = 1437


def planned(*flags: str, images: int = IMAGES):
    return within_budget(resolve(parse([*flags]).given), images)


def train(out, *flags: str) -> list[dict]:
    assert main([*EXACT, *flags, "--out", str(out)]) == 0
    return read_rows(out)


@pytest.mark.parametrize("method", ["constant", "batch", "hybrid", "cosine", "lr-batch"])
@pytest.mark.parametrize("updates", [1, 45, 46, 1000])
def test_the_epochs_are_the_fewest_that_hold_the_updates(method, updates):
    def held(epochs: int) -> int:
        given = ["--method", method, "--epochs", str(epochs)]
        return sum(make_schedule(resolve(parse(given).given), IMAGES).updates(IMAGES))

    c = planned("--method", method, "--budget", f"updates={updates}")
    assert held(c.epochs) >= updates
    assert c.epochs == 1 or held(c.epochs - 1) < updates
    assert c.decay_epoch == max(1, c.epochs // 5)


@pytest.mark.parametrize(
    ("flags", "samples", "epochs"),
    [([], 1438, 2), (["--drop-last"], 1408, 1), (["--drop-last"], 1409, 2)],
)
def test_samples_are_those_that_an_epoch_serves(flags, samples, epochs):
    # 44 batches of 32 are 1,408
    assert planned("--budget", f"samples={samples}", *flags).epochs == epochs


@pytest.mark.parametrize(
    "line", ["--method beta --optimizer shb --c2 9 --k2 1", "--method beta-batch --optimizer qhm"]
)
def test_every_point_of_a_plan_is_solved_once_and_none_for_its_budget(line, monkeypatch, capsys):
    solved, solve = [], Smoothing.solve_momentum
    monkeypatch.setattr(
        Smoothing, "solve_momentum", lambda *given: solved.append(1) or solve(*given)
    )
    for length in (["--epochs", "300"], ["--budget", "updates=5000"]):
        solved.clear()
        assert main(["--plan", "--json", *line.split(), *length]) == 0
        epochs = len(capsys.readouterr().out.splitlines())
        assert main(["--plan", *line.split(), *length]) == 0
        assert len(solved) == 2 * (epochs - 1)  # the first is the start
        capsys.readouterr()


def test_the_longest_budget_is_found_without_a_point(monkeypatch):
    """The epochs of 10^8 updates are counted by their batches alone, a look at each batch size."""
    sizes, batch_size = [], Schedule.batch_size
    monkeypatch.setattr(Schedule, "__call__", None)
    monkeypatch.setattr(
        Schedule, "batch_size", lambda *given: sizes.append(1) or batch_size(*given)
    )
    line = [
        "--dataset",
        "cifar100",
        "--optimizer",
        "shb",
        "--batchsize",
        "128",
        "--budget",
        "updates=100000000",
    ]
    assert planned(*line, "--method", "beta", images=50_000).epochs == -(-(10**8) // 391)
    assert len(sizes) < 1000
    monkeypatch.undo()
    c = planned(*line[:-1], "updates=3000000", "--method", "beta-batch", images=50_000)
    counts = [
        sum(make_schedule(dataclasses.replace(c, epochs=n), 50_000).updates(50_000))
        for n in (c.epochs - 1, c.epochs)
    ]
    assert counts[0] < 3_000_000 <= counts[1]


DONE = [  # flags, and whether delta has a unit
    ["--budget", "updates=50", "--method", "batch"],
    ["--budget", "samples=2000", "--drop-last"],
    ["--epochs", "1"],
    ["--mode", "sampling", "--steps", "3", "21", "--draws", "2"],  # in the middle of an epoch
    ["--mode", "sampling", "--steps", "15", "--draws", "2"],  # at the end of one
    ["--mode", "sampling", "--steps", "0", "--draws", "2"],
]


@pytest.mark.parametrize("flags", DONE, ids=" ".join)
def test_the_plan_counts_what_the_run_does(flags, tmp_path, capsys):
    line = ["--batchsize", "100", *flags]
    assert main(["--plan", *line]) == 0
    *table, unit, cost = (
        row for row in capsys.readouterr().out.splitlines() if not row.startswith("--method")
    )
    assert unit.startswith(
        "delta is in units of C (c2 = 1): none is published for sgd with resnet8 on digits at lr "
        "0.1: "
    )
    assert main([*EXACT, *line, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out.splitlines()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert cost.startswith(
        f"cost: {summary['updates']:,} updates, {summary['samples']:,} gradient evaluations of "
        "resnet8"
    )
    assert sum(int(row.split()[-1]) for row in table[1:]) == summary["updates"]
    if "sampling" in flags:
        measured = flags.index("--draws") - flags.index("--steps") - 1
        assert cost.endswith(
            f"and {measured * (1437 + 2 * 100):,} more to measure at {measured} of them"
        )
    # a run says the unit beside each delta, and nowhere else
    assert not any("units of C" in row for row in said)
    deltas = [row for row in said if "  delta " in row]
    assert (
        all(re.search(r"  delta \S+ C  ", row) for row in deltas)
        and len(deltas) == summary["epochs"]
    )


def test_a_plan_of_sampling_refuses_steps_that_the_run_refuses(capsys):
    assert main(["--plan", "--mode", "sampling", "--steps", "675"]) == 2
    assert "--steps 675 lies past the run's 675 updates" in capsys.readouterr().err


def test_a_budget_of_epochs_is_epochs():
    c = planned("--budget", "epochs=7", "--method", "lr")
    assert (c.epochs, c.decay_epoch) == (7, 1)


def test_runs_of_other_batch_sizes_end_after_the_same_updates(tmp_path):
    for batch, epoch in ((16, 0), (100, 2)):
        rows = train(tmp_path / str(batch), "--batchsize", str(batch), "--budget", "updates=40")
        assert [row["step"] for row in rows if row["kind"] == "epoch"][-1] == 40
        summary = json.loads((tmp_path / str(batch) / "summary.json").read_text())
        assert (summary["updates"], summary["epochs"]) == (40, epoch + 1)
        assert summary["final_test_acc"] == rows[-1]["test_acc"]


def test_a_budget_of_samples_ends_with_the_batch_that_reaches_it(tmp_path):
    rows = train(tmp_path / "run", "--budget", "samples=1500")
    assert rows[-1]["samples"] == 1437 + 64


def test_a_run_that_is_stopped_at_its_last_update_goes_on_to_the_same_end(tmp_path, monkeypatch):
    """The checkpoint of the last update knows that nothing is left to train."""
    flags = ["--budget", "updates=60", "--checkpoint-every", "20"]
    whole = train(tmp_path / "whole", *flags)

    killed_at(monkeypatch, "end_epoch", 60)
    with pytest.raises(Killed):
        main([*EXACT, *flags, "--out", str(tmp_path / "killed")])
    rows = train(tmp_path / "killed", "--resume")
    assert [row["test_loss"] for row in rows if row["kind"] == "epoch"] == [
        row["test_loss"] for row in whole if row["kind"] == "epoch"
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budget", "updates=0"], "updates=N"),
        (["--budget", "100"], "updates=N"),
        (["--budget", "updates=10", "--epochs", "3"], "--epochs and --budget"),
        (["--budget", "updates=10", "--mode", "sampling"], "--mode sampling"),
    ],
)
def test_contradictions_are_refused(flags, words):
    with pytest.raises(ConfigError, match=words):
        resolve(parse(flags).given)


def test_a_plan_over_a_folder_needs_its_images(capsys):
    assert main(["--plan", "--dataset", "folder", "--budget", "updates=10"]) == 2
    assert "only the images in data tell" in capsys.readouterr().err
