"""--budget: runs of equal updates or samples, whatever their batch size."""

import json

import pytest
from exact import EXACT

from fastsmooth import modes
from fastsmooth.config import ConfigError, parse, resolve
from fastsmooth.log import read_rows
from fastsmooth.train import main, make_schedule, within_budget

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
    ("flags", "samples", "epochs"), [([], 1438, 2), (["--drop-last"], 1408, 1), (["--drop-last"], 1409, 2)]
)
def test_samples_are_those_that_an_epoch_serves(flags, samples, epochs):
    assert planned("--budget", f"samples={samples}", *flags).epochs == epochs  # 44 batches of 32 are 1,408


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

    class Killed(BaseException):
        pass

    def die(run, point):
        if run.update == 60:
            raise Killed
        return end_epoch(run, point)

    end_epoch = modes.Run.end_epoch
    monkeypatch.setattr(modes.Run, "end_epoch", die)
    with pytest.raises(Killed):
        main([*EXACT, *flags, "--out", str(tmp_path / "killed")])
    monkeypatch.setattr(modes.Run, "end_epoch", end_epoch)
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
