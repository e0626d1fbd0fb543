"""Runs whose lr and batch change within epochs: rows, interruptions, loaders, measurements."""

import json
import math

import numpy as np
import pytest
from exact import EXACT
from forks import assert_same_bits, assert_same_run, final_state, finish, without_times
from images import LOADERS
from killed import Killed, killed_at
from rows import read_rows
from said import refused

from fastsmooth.cli.config import resolve
from fastsmooth.cli.parse import parse
from fastsmooth.train import main
from fastsmooth.training import step
from fastsmooth.training.plan import make_plan

IMAGES = 80
# a ramp that falls, with a step up within the second epoch, and a batch that is left over
TEXT = (
    "lr: 0 @0 -> 0.1 @1 ->cos 0.01 @100%; batch: 16 @0 -> 7 @1.5, 12 @1.7; beta: 0.5 @0, 0.9 @9up"
)
FLAGS = ["--schedule", TEXT, "--epochs", "3", "--optimizer", "shb", "--log-every", "1"]


@pytest.fixture(scope="session")
def little(tmp_path_factory):
    """The flags of a small data set: 80 noisy images of 8 x 8 pixels in two classes."""
    draw, path = np.random.default_rng(0), tmp_path_factory.mktemp("little") / "little.npz"
    arrays = {}
    for split, count in (("train", IMAGES), ("test", 20)):
        labels = np.arange(count) % 2
        noise = draw.integers(0, 100, (count, 8, 8))
        arrays[f"{split}_images"] = (noise + 100 * labels[:, None, None]).astype(np.uint8)
        arrays[f"{split}_labels"] = labels
    np.savez(path, **arrays)
    return [*EXACT, "--dataset", "npz", "--data-dir", str(path), "--model", "resnet8"]


def plan_of(*flags):
    return make_plan(resolve(parse([*flags]).given), IMAGES)


def points(plan):
    places = [plan.layout.at(update) for update in range(plan.layout.updates)]
    return places, [plan.at(place) for place in places]


def spied(monkeypatch):
    """(lr, momentum, samples) of each update, in order, as runs go on."""
    used, update, gradient = [], step.Step.update, step.Step.gradient

    def spy(self):
        group = self.optimizer.param_groups[0]
        used[-1] = (group["lr"], group["momentum"], used[-1])
        update(self)

    def count(self, x, *more):
        used.append(len(x))
        return gradient(self, x, *more)

    monkeypatch.setattr(step.Step, "update", spy)
    monkeypatch.setattr(step.Step, "gradient", count)
    return used


def sizes_of(places, found):
    """The samples of every update: of its batch, or what the epoch has left."""
    return [
        min(p.batch_size, IMAGES - place.cursor) for place, p in zip(places, found, strict=True)
    ]


def test_rows_have_the_point_in_force_and_batches_its_size(little, tmp_path, monkeypatch):
    used = spied(monkeypatch)
    assert main([*little, *FLAGS, "--out", str(tmp_path / "run")]) == 0
    places, expected = points(plan_of(*FLAGS))
    sizes = sizes_of(places, expected)
    assert used == [(p.lr, p.momentum, size) for p, size in zip(expected, sizes, strict=True)]
    assert len(set(sizes)) > 8 and sizes != [p.batch_size for p in expected]
    rows = read_rows(tmp_path / "run")
    steps = [row for row in rows if row["kind"] == "step"]
    assert [(r["lr"], r["batch_size"], r["momentum"]) for r in steps] == [
        (p.lr, p.batch_size, p.momentum) for p in expected
    ]
    assert [row["samples"] for row in steps] == np.cumsum(sizes).tolist()
    for row in rows:
        beta = row["momentum"]
        growth = (beta / (1 - beta)) ** 2 + beta
        by_hand = row["lr"] * math.sqrt((1 + growth) / row["batch_size"] + growth)
        assert row["delta"] == pytest.approx(by_hand, rel=1e-12)
    epochs = [row for row in rows if row["kind"] == "epoch"]
    last = [k for k, place in enumerate(places) if place.cursor + sizes[k] == IMAGES]
    assert [row["lr"] for row in epochs] == [expected[k].lr for k in last]
    assert [row["samples"] for row in epochs] == [80, 160, 240]


@pytest.mark.parametrize(
    ("name", "update"),
    [
        ("after_update", 11),
        pytest.param("end_epoch", 6, marks=pytest.mark.full),
        *(pytest.param("after_update", n, marks=pytest.mark.full) for n in range(2, 24)),
    ],
)
def test_a_run_that_is_killed_goes_on_in_the_same_bits(name, update, little, tmp_path, monkeypatch):
    line = [*little, *FLAGS, "--checkpoint-every", "1"]
    assert main([*line, "--out", str(tmp_path / "whole")]) == 0
    killed_at(monkeypatch, name, update)
    with pytest.raises(Killed):
        main([*line, "--out", str(tmp_path / "killed")])
    assert main(["--resume", "--out", str(tmp_path / "killed")]) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_the_same_schedule_may_be_given_again_to_a_run_and_no_other(little, tmp_path):
    line = [*little, *FLAGS, "--out", str(tmp_path / "run")]
    assert main([*line, "--max-time", "1e-3"]) == 75
    other = TEXT.replace("0.01", "0.02")
    words = refused(main, ["--resume", "--out", str(tmp_path / "run"), "--schedule", other])
    assert "has --schedule lr: 0 @0 -> 0.1 @1" in words
    again = ["--resume", "--out", str(tmp_path / "run"), "--schedule", TEXT, "--max-time", "1h"]
    assert main(again) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["lr"], saved["batch_size"], saved["beta"]) == (0.1, 16, 0.5)


def test_all_loaders_end_in_the_same_bits(little, tmp_path):
    for loader, workers in LOADERS:
        if (loader, workers) == ("torch", 2):
            continue  # whose batches are those of one process, by tests/test_loaders.py
        more = [] if loader == "resident" else ["--workers", str(workers), "--chunk", "9"]
        out = tmp_path / f"{loader}{workers}"
        assert main([*little, *FLAGS, "--loader", loader, *more, "--out", str(out)]) == 0
        first = tmp_path / "resident0"
        assert without_times(read_rows(out)) == without_times(read_rows(first))
        for name in ("model", "optimizer", "data"):
            assert_same_bits(final_state(out)[name], final_state(first)[name])


def test_processes_share_batches_that_change(little, tmp_path):
    line = [*little, *FLAGS, "--norm", "group"]
    assert main([*line, "--out", str(tmp_path / "one")]) == 0
    finish(line, tmp_path / "two", 2)
    one, two = (without_times(read_rows(tmp_path / name)) for name in ("one", "two"))
    for name in ("step", "samples", "lr", "batch_size", "momentum", "delta"):
        assert [row[name] for row in two] == [row[name] for row in one]
    losses = [[row["train_loss"] for row in rows if row["kind"] == "step"] for rows in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    text = TEXT.replace("7 @1.5", "1 @1.5")
    finish_code = ["--schedule", text, "--epochs", "3", "--optimizer", "shb"]
    c = resolve(parse([*little, *finish_code]).given)
    from fastsmooth.training.build import planned

    with pytest.raises(ValueError, match="--schedule: batch 1 is less than one sample for each"):
        planned(c, IMAGES, 2)


def test_measurements_are_of_the_point_in_force(little, tmp_path):
    out = tmp_path / "run"
    line = [*FLAGS, "--norm", "group", "--track-noise", "every=5", "--optimizer", "sgd"]
    line[line.index(TEXT)] = TEXT.partition("; beta")[0]
    assert main([*little, *line, "--out", str(out)]) == 0
    rows = [row for row in read_rows(out) if row["kind"] == "measure"]
    places, expected = points(plan_of(*line))
    full = [row for row in rows if places[row["step"]].cursor + row["batch_size"] <= IMAGES]
    assert len(full) >= 4
    for row in full:
        p = expected[row["step"]]
        assert (row["lr"], row["batch_size"]) == (p.lr, p.batch_size)
        delta = p.lr * math.sqrt(row["c2_sampled"] / p.batch_size)
        assert row["delta_measured"] == pytest.approx(delta, rel=1e-6)


def test_histories_have_the_batches_of_the_run(little, tmp_path, monkeypatch):
    """What --mode sampling replays, over the edge of an epoch and a batch that changes."""
    monkeypatch.setattr("fastsmooth.training.modes.memory", lambda beta: 9)
    used = spied(monkeypatch)
    line = ["--mode", "sampling", "--steps", "14", "--draws", "2", *FLAGS]
    assert main([*little, *line, "--out", str(tmp_path / "run")]) == 0
    places, expected = points(plan_of(*FLAGS))
    sizes = sizes_of(places, expected)
    run = [(p.lr, p.momentum, size) for p, size in zip(expected, sizes, strict=True)][:14]
    assert used == [*run[:5], *run[5:], *run[5:], *run[5:]]
    (point,) = json.loads((tmp_path / "run" / "noise.json").read_text())["points"]
    assert (point["lr"], point["batch_size"]) == (expected[14].lr, expected[14].batch_size)


def test_steps_between_epochs_end_in_the_bits_of_a_method(little, tmp_path):
    line = [*little, "--epochs", "2", "--out"]
    by_method = ["--method", "batch", "--decay-epoch", "1", "--batchsize", "20"]
    assert main([*line, str(tmp_path / "a"), *by_method]) == 0
    assert main([*line, str(tmp_path / "b"), "--schedule", "batch: 20 @0, 40 @50%"]) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
