"""Methods that are asked at every update, and those in which batch, lr or momentum go by a factor
of one's own: against PyTorch's schedulers, closed forms and a simulation batch by batch."""

import dataclasses
import json
import math

import pytest
import torch
from lrs import torch_lrs
from said import refused, said

from fastsmooth import Schedule
from fastsmooth.cli.config import resolve
from fastsmooth.cli.parse import flags_of, over_finished, parse, read_saved
from fastsmooth.places import Place
from fastsmooth.schedule import METHODS, SMOOTH
from fastsmooth.train import main
from fastsmooth.training.plan import make_plan

SCHEDULERS = torch.optim.lr_scheduler


def config(*flags):
    return resolve(parse([str(flag) for flag in flags]).given)


def plan_of(*flags, images=80):
    return make_plan(config("--batchsize", "10", *flags), images)


def points(plan):
    return [plan.at(plan.layout.at(update)) for update in range(plan.layout.updates)]


# Update by update


@pytest.mark.parametrize(
    ("flags", "make"),
    [
        (["--method", "cosine"], lambda o: SCHEDULERS.CosineAnnealingLR(o, 48)),
        (
            ["--method", "cosine", "--lr-min", "0.02"],
            lambda o: SCHEDULERS.CosineAnnealingLR(o, 48, eta_min=0.02),
        ),
        (["--method", "poly", "--power", "2"], lambda o: SCHEDULERS.PolynomialLR(o, 48, power=2)),
        (
            ["--method", "exp", "--gamma", "0.5"],
            lambda o: SCHEDULERS.ExponentialLR(o, 0.5 ** (1 / 8)),
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_method_per_update_is_the_scheduler_that_is_stepped_at_every_update(flags, make):
    plan = plan_of(*flags, "--per", "update", "--epochs", "6")
    theirs = torch_lrs(make, 48)
    assert [p.lr for p in points(plan)] == pytest.approx(theirs, rel=1e-12, abs=48 * 0.1 * 2**-53)
    # which at the beginning of epochs is what it is per epoch
    by_epoch = plan_of(*flags, "--epochs", "6")
    assert [by_epoch.point(e, 8 * e) for e in range(6)] == [plan.point(e, 8 * e) for e in range(6)]


def test_a_warm_up_goes_with_it():
    plan = plan_of("--method", "cosine", "--per", "update", "--epochs", "6", "--warmup", "10")
    bare = plan_of("--method", "cosine", "--per", "update", "--epochs", "6")
    expected = [p.lr * min(1, (t + 1) / 10) for t, p in enumerate(points(bare))]
    assert [p.lr for p in points(plan)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", sorted(SMOOTH - {"poly", "cosine", "exp"}))
@pytest.mark.parametrize("drop_last", [False, True])
def test_growing_and_solved_methods_per_update_are_simulated_right(method, drop_last):
    flags = ["--method", method, "--per", "update", "--epochs", "5", "--optimizer", "shb"]
    flags += ["--c2", "30", "--k2", "2", *["--drop-last"] * drop_last]
    plan = plan_of(*flags, images=77)
    update = samples = 0
    for epoch in range(5):
        cursor, begun = 0, update
        while cursor < 77:
            place = Place(epoch, update, samples, cursor, 77)
            p = plan.schedule.at(place)
            if drop_last and cursor + p.batch_size > 77:
                break
            assert plan.layout.at(update) == place and plan.at(place) == p
            taken = min(p.batch_size, 77 - cursor)
            update, samples, cursor = update + 1, samples + taken, cursor + taken
            if METHODS[method].solves and p.momentum not in (0, 0.9):
                e = place.epochs
                assert plan.delta(p) == pytest.approx(
                    plan.delta(plan.schedule.start) * ((5 - e) / 5) ** 0.9, rel=1e-9
                )
        assert list(plan.epochs())[epoch] == (update - begun, cursor)
    assert (plan.layout.updates, plan.layout.samples) == (update, samples)


def test_a_plan_per_update_has_a_row_an_epoch():
    line = ["--plan", "--method", "cosine", "--per", "update", "--epochs", "3"]
    rows = said(main, line).out.splitlines()
    ends = [(e, e + 44 * 32 / 1437) for e in range(3)]  # of 45 updates
    cosine = [[f"{0.05 * (1 + math.cos(math.pi * e / 3)):.6g}" for e in pair] for pair in ends]
    assert [row.split()[:4] for row in rows[1:4]] == [
        [f"{epoch}-{epoch + 1}", first, "to", last] for epoch, (first, last) in enumerate(cosine)
    ]


# Factors


def lrs(s):
    return [p.lr for p in s.points()]


def schedule(method, **more):
    given = {"epochs": 9, "lr": 0.1, "batch_size": 12} | more
    return Schedule(method, **given)


def test_lr_by_a_factor_is_step_lr_and_at_milestones_multi_step_lr():
    theirs = torch_lrs(lambda o: SCHEDULERS.StepLR(o, 2, gamma=0.3), 9)
    assert lrs(schedule("lr", factor=0.3, decay_epoch=2)) == pytest.approx(theirs, rel=1e-12)
    theirs = torch_lrs(lambda o: SCHEDULERS.MultiStepLR(o, [3, 4, 8], gamma=0.3), 9)
    assert lrs(schedule("lr", factor=0.3, milestones=(3, 4, 8))) == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("factor", [None, 1.0, 1.25, 2.0, 3.0])
def test_hybrid_lowers_delta_by_the_root_of_two_by_whatever_factor(factor):
    s = schedule("hybrid", factor=factor, batch_size=2**20, decay_epoch=2)
    for epoch, p in enumerate(s.points()):
        assert p.batch_size == pytest.approx(2**20 * (factor or 1.5) ** (epoch // 2), abs=1)
        assert s.delta(p) == pytest.approx(s.delta(s.start) * 0.5 ** (epoch // 2 / 2), rel=1e-5)


def test_seesaw_takes_the_root_of_the_cut_and_the_batch_the_rest():
    """arXiv 2510.14717: where lr would be halved it falls by sqrt(2), and the batch doubles."""
    s = schedule("seesaw", milestones=(2, 5))
    assert [p.batch_size for p in s.points()] == [12] * 2 + [24] * 3 + [48] * 4
    assert lrs(s) == pytest.approx([0.1] * 2 + [0.1 / 2**0.5] * 3 + [0.05] * 4, rel=1e-12)
    cut = schedule("lr", factor=0.5, milestones=(2, 5))
    assert [s.delta(p) for p in s.points()] == pytest.approx([cut.delta(p) for p in cut.points()])
    by_four = schedule("seesaw", factor=0.25, milestones=(2, 5))
    assert (by_four(2).lr, by_four(2).batch_size) == (0.05, 48)


def test_growth_raises_lr_with_the_batch():
    """arXiv 2508.05297, with the rates of its code: 2 and 1.4."""
    s = schedule("growth", decay_epoch=3)
    assert [p.batch_size for p in s.points()] == [12] * 3 + [24] * 3 + [48] * 3
    assert lrs(s) == pytest.approx([0.1 * 1.4 ** (e // 3) for e in range(9)], rel=1e-12)
    assert schedule("growth", decay_epoch=3, images=30).largest_miss()[0] == 6
    assert s.largest_miss() is None


def test_the_batch_by_a_factor_is_the_published_growth_of_a_comparison_of_optimizers():
    """iiduka-researches/incr_bs_comparison, get_bs_scheduler.py: rate^(epoch // interval)."""
    s = schedule("batch", epochs=300, batch_size=8, factor=3.0, decay_epoch=30)
    assert [p.batch_size for p in s.points()] == [8 * 3 ** (e // 30) for e in range(300)]


def test_momentum_in_steps_is_that_of_its_paper():
    """igo-aaai25, main.py: beta times gamma at every decay epoch, which was an epoch late there."""
    s = schedule("beta-step", optimizer="shb", momentum=0.9, decay_epoch=4)
    assert [p.momentum for p in s.points()] == pytest.approx(
        [0.9 * 0.9 ** (e // 4) for e in range(9)], rel=1e-12
    )
    assert {(p.lr, p.batch_size) for p in s.points()} == {(0.1, 12)}
    nesterov = schedule("beta-step", optimizer="nesterov", momentum=0.9)  # no bound is needed
    assert nesterov(8).momentum < 0.9


@pytest.mark.parametrize(("method", "like"), [("batch-poly", "poly"), ("exp-batch", "exp")])
def test_the_batch_alone_has_the_delta_of_the_methods_of_lr(method, like):
    batch, lr = (schedule(name, batch_size=10**6) for name in (method, like))
    for mine, theirs in zip(batch.points(), lr.points(), strict=True):
        assert mine.lr == 0.1 and batch.delta(mine) == pytest.approx(lr.delta(theirs), rel=1e-6)


# Flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--factor", "0.5", "--method", "batch"], "--factor 0.5 is out of range: of --method bat"),
        (["--factor", "2", "--method", "lr"], "of --method lr it is above 0, at most 1"),
        (["--factor", "2", "--method", "cosine"], "--factor has no effect with --method cosine"),
        (["--per", "update", "--method", "lr"], "--per has no effect with --method lr"),
        (["--lr-min", "0.01", "--method", "exp"], "--lr-min has no effect with --method exp"),
        (["--lr-min", "0.2", "--method", "poly"], "--lr-min 0.2 is above --lr 0.1"),
        (["--lr-factor", "1.1", "--method", "batch"], "--lr-factor has no effect with --method"),
        (["--milestones", "3", "--decay-epoch", "2", "--method", "lr"], "both say when steps are"),
        (["--method", "beta-step"], "--method beta-step changes the momentum: choose --optimizer"),
        (["--method", "seesaw", "--compat", "original"], "--method seesaw is none of them"),
        (
            ["--method", "cosine", "--per", "update", "--compat", "original"],
            "--compat original changes with every epoch",
        ),
        (["--method", "growth", "--mode", "critical"], "--mode critical holds the noise fixed"),
        (
            ["--method", "poly", "--per", "update", "--dataset", "folder"],
            "within which this schedule changes, only the images in data tell",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags, words):
    assert words in refused(main, ["--plan", *flags])


@pytest.mark.parametrize(
    "line",
    [
        ["--method", "lr", "--milestones", "3", "50%", "--factor", "0.2"],
        ["--method", "growth", "--lr-factor", "1.2", "--decay-epoch", "2"],
        ["--method", "cosine", "--lr-min", "0.01", "--per", "update"],
        ["--method", "batch"],
        ["--schedule", "lr: 0.1 @0 ->cos 0 @100%"],
    ],
    ids=" ".join,
)
def test_config_json_gives_the_run_again(line, tmp_path):
    started = config(*line)
    (tmp_path / "config.json").write_text(json.dumps(started.to_json()))
    assert read_saved(tmp_path) == started
    assert resolve(flags_of(started)) == started


@pytest.mark.parametrize("method", ["lr", "batch", "hybrid", "step", "cosine"])
def test_a_run_from_before_has_the_factor_of_its_method(method, tmp_path):
    """Its config.json says 0.1, which step alone had a use for."""
    started = config("--method", method, *["--milestones", "3"] * (method == "step"))
    saved = started.to_json() | {"factor": 0.1}
    for name in ("per", "schedule", "lr_min", "lr_factor"):
        del saved[name]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert read_saved(tmp_path) == dataclasses.replace(started)


def test_numbers_of_a_method_are_not_taken_for_those_of_another(tmp_path):
    recipe = config("--recipe", "weiaicunzai", "--method", "lr")
    assert (recipe.milestones, recipe.factor) == (None, math.sqrt(0.5))
    saved = config("--method", "step", "--milestones", "3", "--factor", "0.2")
    (tmp_path / "config.json").write_text(json.dumps(saved.to_json()))
    (tmp_path / "status.json").write_text('{"state": "done"}')
    given = over_finished({"extend": str(tmp_path), "method": "lr"})
    assert "milestones" not in given and "factor" not in given
    assert over_finished({"extend": str(tmp_path), "lr": 0.2})["factor"] == 0.2
