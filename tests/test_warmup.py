"""What changes within a run beside its method: warm-up update by update, and an end by patience."""

import json
import math

import numpy as np
import pytest
import torch
from exact import EXACT
from forks import assert_same_run
from killed import Killed, killed_at
from lrs import torch_lrs
from rows import read_rows
from said import refused, said

from fastsmooth.cli.config import resolve
from fastsmooth.cli.flags import ConfigError
from fastsmooth.cli.parse import parse
from fastsmooth.optim import NoisySGD
from fastsmooth.runfolder.read import read_status
from fastsmooth.schedule import Schedule
from fastsmooth.train import main
from fastsmooth.training import loop, step
from fastsmooth.training.plan import make_plan

SCHEDULERS = torch.optim.lr_scheduler
IMAGES = 1437
IN_EACH = 8  # updates an epoch at batch 200


def plan_of(*flags, images=IMAGES):
    return make_plan(resolve(parse(["--batchsize", "200", *flags]).given), images)


def ours(plan):
    """The lr of every update of the plan."""
    lrs = []
    for epoch, (updates, _) in enumerate(plan.epochs()):
        lrs += [plan.point(epoch, len(lrs) + k).lr for k in range(updates)]
    return lrs


# The learning rate


@pytest.mark.parametrize("warmup", ["1", "2", "31", "40", "2ep", "5ep"])
def test_a_warm_up_is_torchs_linear_lr(warmup):
    updates = int(warmup.removesuffix("ep")) * (IN_EACH if "ep" in warmup else 1)

    def linear(optimizer):
        return SCHEDULERS.LinearLR(optimizer, 1 / updates, 1.0, total_iters=updates - 1)

    found = ours(plan_of("--epochs", "5", "--warmup", warmup))
    assert found == pytest.approx(torch_lrs(linear, 5 * IN_EACH), rel=1e-12)


def test_a_warm_up_before_steps_is_torchs_sequential_lr():
    updates = 10  # which end inside the second epoch

    def sequence(optimizer):
        return SCHEDULERS.SequentialLR(
            optimizer,
            [
                SCHEDULERS.LinearLR(optimizer, 1 / updates, 1.0, total_iters=updates - 1),
                SCHEDULERS.MultiStepLR(
                    optimizer, [k * IN_EACH - updates for k in (2, 4, 5)], gamma=0.2
                ),
            ],
            milestones=[updates],
        )

    plan = plan_of(
        *("--epochs", "7", "--method", "step", "--milestones", "2", "4", "70%"),
        *("--factor", "0.2", "--warmup", "10"),
    )
    assert ours(plan) == pytest.approx(torch_lrs(sequence, 7 * IN_EACH), rel=1e-12)


def test_steps_within_a_warm_up_lower_what_it_rises_to():
    plan = plan_of("--epochs", "3", "--method", "step", "--milestones", "1", "--warmup", "2ep")
    expected = [0.1 * (1 if t < IN_EACH else 0.1) * min(1, (t + 1) / 16) for t in range(24)]
    assert ours(plan) == pytest.approx(expected, rel=1e-12)


def test_epochs_of_a_warm_up_have_the_updates_of_their_batches():
    plan = plan_of("--epochs", "4", "--method", "batch", "--decay-epoch", "1", "--warmup", "3ep")
    assert plan.warmup == 8 + 4 + 2
    assert plan_of("--epochs", "4", "--drop-last", "--warmup", "3ep").warmup == 3 * 7


def test_without_a_warm_up_no_update_changes_a_point():
    plan = plan_of("--epochs", "2")
    assert plan.warmup == 0 and not any(map(plan.moves, range(16)))
    assert plan.point(1, 8) is plan.point(1, 13)
    warmed = plan_of("--epochs", "2", "--warmup", "5")
    assert [update for update in range(16) if warmed.moves(update)] == [0, 1, 2, 3, 4, 5]


def test_milestones_of_the_library_are_checked():
    def step(**options):
        return Schedule("step", epochs=10, lr=1.0, batch_size=4, **options)

    assert [p.lr for p in step(milestones=(3, 5), factor=0.5).points()] == (
        [1.0] * 3 + [0.5] * 2 + [0.25] * 5
    )
    for options, words in (
        ({}, "needs milestones"),
        ({"milestones": (3, 10)}, "10 is out of range: the epochs of the steps are 1 to 9"),
        ({"milestones": (0, 3)}, "0 is out of range"),
        ({"milestones": (5, 3)}, "do not increase"),
        ({"milestones": (3,), "factor": 0.0}, "factor 0.0 is out of range"),
    ):
        with pytest.raises(ValueError, match=words):
            step(**options)


# What a run does


IN_SMALL = 8  # updates an epoch of `small` at batch 10


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The flags of a small data set: 80 noisy images of 8 x 8 pixels in two classes."""
    draw, path = np.random.default_rng(0), tmp_path_factory.mktemp("small") / "small.npz"
    arrays = {}
    for split, count in (("train", 80), ("test", 20)):
        labels = np.arange(count) % 2
        noise = draw.integers(0, 100, (count, 8, 8))
        arrays[f"{split}_images"] = (noise + 100 * labels[:, None, None]).astype(np.uint8)
        arrays[f"{split}_labels"] = labels
    np.savez(path, **arrays)
    line = ["--dataset", "npz", "--data-dir", str(path), "--model", "resnet8", "--batchsize", "10"]
    return [*EXACT, *line]


def plan_of_small(*flags):
    return make_plan(resolve(parse(["--batchsize", "10", *flags]).given), 80)


def spied(monkeypatch):
    """The lr that the optimizer had at each update, in order, as runs go on."""
    used, update = [], step.Step.update

    def spy(self):
        used.append(self.optimizer.param_groups[0]["lr"])
        update(self)

    monkeypatch.setattr(step.Step, "update", spy)
    return used


FLAGS = [
    *("--epochs", "4", "--warmup", "2ep", "--method", "step"),
    *("--milestones", "3", "--optimizer", "shb", "--log-every", "1"),
]


def test_rows_have_the_lr_that_was_in_force(small, tmp_path, monkeypatch):
    used = spied(monkeypatch)
    assert main([*small, *FLAGS, "--out", str(tmp_path / "run")]) == 0
    assert used == ours(plan_of_small(*FLAGS)) and len(used) == 32
    rows = read_rows(tmp_path / "run")
    assert [row["lr"] for row in rows if row["kind"] == "step"] == used
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [row["lr"] for row in epochs] == [used[7], used[15], used[23], used[31]]
    full = epochs[1]["delta"] / epochs[1]["lr"]
    assert [row["delta"] for row in rows] == pytest.approx([full * row["lr"] for row in rows])


def test_measurements_are_of_the_lr_in_force(small, tmp_path):
    out = tmp_path / "run"
    line = ["--norm", "group", "--track-noise", "every=5", "--epochs", "3", "--warmup", "20"]
    assert main([*small, *line, "--out", str(out)]) == 0
    rows = [row for row in read_rows(out) if row["kind"] == "measure"]
    assert [row["lr"] for row in rows] == pytest.approx(
        [0.1 * min(1, (step + 1) / 20) for step in (0, 5, 10, 15, 20)]
    )
    deltas = [row["lr"] * math.sqrt(row["c2_sampled"] / 10) for row in rows]
    assert [row["delta_measured"] for row in rows] == pytest.approx(deltas)


def test_histories_rise_as_the_run_does(small, tmp_path, monkeypatch):
    """What --mode sampling replays, across the edge of an epoch and the end of the warm-up."""
    monkeypatch.setattr("fastsmooth.training.modes.memory", lambda beta: 12)
    used = spied(monkeypatch)
    out = tmp_path / "run"
    line = ["--mode", "sampling", "--steps", "18", "--draws", "2", "--optimizer", "shb"]
    line += ["--epochs", "3", "--warmup", "11", "--method", "cosine"]
    assert main([*small, *line, "--out", str(out)]) == 0
    plan = plan_of_small(*line)
    expected = [plan.point(u // IN_SMALL, u).lr for u in range(18)]
    assert used == [*expected[:6], *2 * expected[6:], *expected[6:]]
    (point,) = json.loads((out / "noise.json").read_text())["points"]
    assert (point["step"], point["lr"]) == (18, plan.point(2, 18).lr)
    early = [*line[:3], "5", *line[4:]]
    assert main([*small, *early, "--out", str(tmp_path / "early")]) == 0
    (point,) = json.loads((tmp_path / "early" / "noise.json").read_text())["points"]
    assert point["lr"] == pytest.approx(0.1 * 6 / 11)


@pytest.mark.parametrize(
    ("name", "update"),
    [
        ("after_update", 10),
        pytest.param("end_epoch", 8, marks=pytest.mark.full),
        pytest.param("end_epoch", 16, marks=pytest.mark.full),
    ],
)
def test_a_run_that_is_killed_in_its_warm_up_ends_in_the_same_bits(
    name, update, small, tmp_path, monkeypatch
):
    line = [*small, *FLAGS, "--checkpoint-every", "4"]
    assert main([*line, "--out", str(tmp_path / "whole")]) == 0
    killed_at(monkeypatch, name, update)
    with pytest.raises(Killed):
        main([*line, "--out", str(tmp_path / "killed")])
    assert main(["--resume", "--out", str(tmp_path / "killed")]) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_the_optimizer_is_told_of_a_point_only_where_it_moves(small, tmp_path, monkeypatch):
    told, set_point = [], NoisySGD.set_point
    monkeypatch.setattr(
        NoisySGD, "set_point", lambda self, point: told.append(point.lr) or set_point(self, point)
    )
    line = [*small, "--epochs", "2"]
    assert main([*line, "--out", str(tmp_path / "plain")]) == 0
    assert told == [0.1, 0.1]
    told.clear()
    assert main([*line, "--warmup", "3", "--out", str(tmp_path / "warm")]) == 0
    assert told[1:] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.1])  # the last an epoch's


# What is said


def test_a_plan_shows_the_warm_up_in_words_and_in_its_rows():
    line = ["--plan", "--batchsize", "200", "--epochs", "3", "--warmup", "12"]
    shown = said(main, line).out
    assert (
        "--warmup 12: lr, and delta with it, rises over the first 12 updates: at update t, counted "
        "from 0, it is (t + 1) / 12 of that of the epoch\n"
    ) in shown
    rows = [json.loads(row) for row in said(main, [*line, "--json"]).out.splitlines()]
    ends = [(row.get("lr_first"), row.get("lr_last")) for row in rows]
    assert ends[0] == pytest.approx((0.1 / 12, 0.1 * 8 / 12))
    assert ends[1] == pytest.approx((0.1 * 9 / 12, 0.1))
    assert ends[2] == (None, None) and {row["lr"] for row in rows} == {0.1}
    one = said(main, ["--plan", "--warmup", "1ep"]).out
    assert "rises over the first epoch, 45 updates: " in one
    folder = said(main, ["--plan", "--dataset", "folder", "--warmup", "5ep"]).out
    assert "rises over the first 5 epochs: " in folder and "(t + 1) / W" in folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mode", "critical", "--warmup", "9"], "the noise fixed, which --warmup 9 changes"),
        (["--warmup", "16ep"], "--warmup 16ep is longer than the run of 15 epochs"),
        (["--patience", "3", "--mode", "sampling"], "--patience ends a run by its test accuracy"),
        (["--patience", "3", "--mode", "critical"], "--patience ends a run by its test accuracy"),
        (["--method", "step"], "--method step needs the epochs of its steps: give --milestones"),
        (["--method", "step", "--milestones", "3", "15"], "--milestones 15 is epoch 15, counted"),
        (["--method", "step", "--milestones", "1%"], "--milestones 1% is epoch 0, counted"),
        (["--method", "step", "--milestones", "9", "3"], "3 (epoch 3) does not come after 9"),
        (["--method", "step", "--milestones", "3", "3"], "3 (epoch 3) does not come after 3"),
        (["--method", "step", "--milestones", "5", "33%"], "33% (epoch 5) does not come after 5"),
        (["--method", "cosine", "--milestones", "3"], "--milestones has no effect with --method"),
        (["--factor", "0.5"], "--factor has no effect with --method constant: it needs"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(flags, words):
    assert words in refused(main, flags)


def test_what_only_the_images_tell_is_refused_with_them(tmp_path):
    plan_of("--warmup", "120")
    for flags, words in (
        (["--warmup", "121"], "--warmup 121 is longer than the run of 120 updates"),
        (
            ["--budget", "updates=24", "--method", "step", "--milestones", "3"],
            "--milestones 3 is epoch 3, counted from 0, of a run of 3",
        ),
        (["--budget", "updates=24", "--warmup", "4ep"], "--warmup 4ep is longer than the run of 3"),
    ):
        with pytest.raises(ConfigError) as refusal:
            plan_of(*flags)
        assert words in str(refusal.value)
    budget = ["--budget", "updates=32", "--method", "step", "--milestones", "50%"]
    assert [p.lr for p in plan_of(*budget).schedule.points()] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01]
    )


# Patience


@pytest.fixture
def accuracies(monkeypatch):
    """Test accuracies that runs find, epoch by epoch; resumed runs go on in the list."""
    given = []
    evaluate = step.Step.evaluate

    def found(self, batches):
        return evaluate(self, batches)._replace(accuracy=given.pop(0))

    monkeypatch.setattr(step.Step, "evaluate", found)
    return given


LINE = ["--epochs", "9", "--patience", "2"]
WORDS = "no better test accuracy in 2 epochs: ended after epoch 5 of 9, the best was after epoch 3"


def test_a_run_ends_after_so_many_epochs_without_a_better_accuracy(small, tmp_path, accuracies):
    accuracies += [0.5, 0.5, 0.7, 0.7, 0.6, 0.9]
    out = tmp_path / "run"
    done = said(main, [*small, *LINE, "--out", str(out)])
    assert done.code == 0 and WORDS in done.out.splitlines()
    status, summary = read_status(out), json.loads((out / "summary.json").read_text())
    assert (status["state"], status["reason"], status["step"]) == ("done", WORDS, 40)
    assert (summary["epochs"], summary["best_epoch"], summary["best_test_acc"]) == (5, 2, 0.7)
    assert accuracies == [0.9]
    again = said(main, ["--resume", "--out", str(out)])
    assert again.code == 0 and "is a finished run: nothing to do" in again.out


def test_an_end_at_the_last_epoch_is_none_by_patience(small, tmp_path, accuracies):
    accuracies += [0.5, 0.4, 0.3]
    done = said(main, [*small, *LINE, "--epochs", "3", "--out", str(tmp_path / "run")])
    assert done.code == 0 and "no better" not in done.out
    assert read_status(tmp_path / "run")["reason"] == ""


@pytest.mark.parametrize(
    "update", [25, *(pytest.param(u, marks=pytest.mark.full) for u in (32, 40))]
)
def test_patience_counts_on_in_a_run_that_is_stopped(
    update, small, tmp_path, accuracies, monkeypatch
):
    accuracies += [0.5, 0.5, 0.7, 0.7, 0.6, 0.9]
    killed_at(monkeypatch, "after_update", update)
    line = [*small, *LINE, "--out", str(tmp_path / "run")]
    with pytest.raises(Killed):
        main(line)
    assert said(main, ["--resume", "--out", str(tmp_path / "run")]).code == 0
    assert read_status(tmp_path / "run")["reason"] == WORDS


def test_a_run_that_dies_once_its_patience_is_over_is_done(
    small, tmp_path, accuracies, monkeypatch
):
    """The final checkpoint is there, its summary is not: nothing is trained any more."""
    accuracies += [0.5, 0.4, 0.3]
    finish = loop.Run.finish
    monkeypatch.setattr(loop.Run, "finish", lambda run: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        main([*small, *LINE, "--out", str(tmp_path / "run")])
    monkeypatch.setattr(loop.Run, "finish", finish)
    done = said(main, ["--resume", "--out", str(tmp_path / "run")])
    assert done.code == 0 and "ended after epoch 3 of 9" in done.out
    assert not accuracies
