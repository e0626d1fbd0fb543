"""Schedules as they are written: how they are read, what they are at every update, against those of
PyTorch and bs_scheduler, and against a simulation batch by batch."""

import json
import random
from argparse import ArgumentTypeError
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from lrs import torch_lrs
from said import refused, said

from fastsmooth import BatchSchedule, Point, Schedule, torch_lr_scheduler
from fastsmooth.cli.config import resolve
from fastsmooth.cli.flags import ConfigError, written
from fastsmooth.cli.parse import from_table, parse, parser
from fastsmooth.course import read
from fastsmooth.places import Place
from fastsmooth.sweep import grid
from fastsmooth.train import main
from fastsmooth.training.plan import make_plan

IMAGES, EPOCHS = 1437, 15
SCHEDULERS = torch.optim.lr_scheduler


def config(*flags):
    return resolve(parse([str(flag) for flag in flags]).given)


def plan_of(text, *flags, images=IMAGES):
    return make_plan(config("--schedule", text, *flags), images)


def points(plan):
    """The Point of every update."""
    return [plan.at(plan.layout.at(update)) for update in range(plan.layout.updates)]


# Without any of it


PLANS = json.loads((Path(__file__).parent / "plans.json").read_text())


@pytest.mark.parametrize("line", PLANS)
def test_plans_of_methods_are_what_they_were_before_batches_could_change_anywhere(line):
    """plans.json was recorded with the code before."""
    code, out = PLANS[line]
    assert said(main, ["--plan", *line.split()])[:2] == (code, out)


# Reading


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("lr:0.1@0", "lr: 0.1 @0"),
        (" beta : .5 @ 0 ,0.9 @ 5ep ", "momentum: 0.5 @0, 0.9 @5"),
        (
            "batch: 8 @0, 16 @2000up; lr: 0 @0->0.4@5ep ->COS 0.0 @100%",
            "lr: 0 @0 -> 0.4 @5 ->cos 0 @100%; batch: 8 @0, 16 @2000up",
        ),
        ("lr: 1e-5 @0 ->exp 0.123456789 @1e3samples", None),
        ("nu: 0.7 @0 -> 0.70 @2.50ep, 0.1 @60%", "nu: 0.7 @0 -> 0.7 @2.5, 0.1 @60%"),
    ],
)
def test_a_text_is_read_and_written_in_one_way(text, written):
    found = read(text)
    assert read(str(found)) == found and (written is None or str(found) == written)


WRONG = [
    ("lr", "'lr' is no NAME: VALUE @POINT"),
    ("lr: 0.1 @0;", "'' is no NAME: VALUE @POINT"),
    ("lr: 0.1", "'0.1' of lr: it is no VALUE @POINT: write \"lr: 0.1 @0"),
    ("lr: 0.1 @0, x @40ep", "'x @40ep' of lr: 'x' is not a number: write"),
    ("lr: 0.1 @0, 0.2 @4eq", "'0.2 @4eq' of lr: '4eq' is no point of a run"),
    ("lr: 0.1 @0 ->sin 0.2 @3", "'->sin 0.2 @3' of lr: there is no way ->sin: write -> (linear)"),
    ("lr: 0.1 @0 0.2 @3", "it has two points, without a comma or ->"),
    ("lr: 0.1 @0; lr: 0.2 @0", "lr is written twice"),
    ("bach: 3 @0", "there is no 'bach': did you mean batch?"),
    ("batch: 3.5 @0", "'3.5' is not a whole number"),
    ("batch: 0 @0", "0 is out of range: it is 1 or more"),
    ("momentum: 1 @0", "1 is out of range"),
    ("lr: nan @0", "'nan @0' of lr: 'nan @0' "),
    ("lr: 0.1 @3", "the first value of lr, 0.1 @3, is not @0"),
    ("lr: 0.1 @0, 0.2 @5, 0.3 @4", "0.3 @4 of lr does not begin after 0.2 @5"),
    ("lr: 0.1 @0, 0.1 @5", "0.1 @5 of lr changes nothing after 0.1 @0"),
    ("lr: 0.1 @0, 0 @5", "0 @5 of lr: nothing is learned at 0"),
    ("lr: 0 @0 -> 0 @5", "nothing is learned at 0"),
    ("lr: 0.1 @0 ->exp 0 @5", "an exponential ramp is between values above 0"),
    ("lr: 0.1 @0, 0.2 @100%", "at 100% the run is over"),
    ("lr: 0.1 @0 -> 0.2 @101%", "at 101% the run is over"),
    ("lr: 0.1 @9up", "is not @0"),
    ("lr: 0.1 @0, 0.2 @500up -> 0 @100%", "0.2 @500up -> 0 @100% of lr: a ramp goes by one unit"),
    ("lr: 0.1 @0" + ", 0.2 @1" * 100, "101 values of lr: write at most 100"),
    ("lr: 0.1 @0, 0.2 @15", "0.2 @15 of lr is not reached: the run ends after 15 epochs"),
    ("lr: 0.1 @0 -> 0.2 @16", "0.2 @16 of lr is not reached"),
    ("lr: 0.1 @0, 0.2 @675up", "0.2 @675up of lr is not reached: the run ends after 15 epochs"),
    ("lr: 0.1 @0, 0.2 @2, 0.3 @90up", "0.3 @90up of lr begins at update 90, counted from 0, and "),
    ("lr: 0.1 @0, 0.2 @5.0001, 0.3 @5.0002", "write points that are further apart"),
    ("batch: 32 @0, 1438 @5", "batch 1438 exceeds the 1437 training images of digits: lower it"),
    ("momentum: 0.9 @0", "--schedule says what momentum is, and sgd has none"),
    ("nu: 0.9 @0", "sgd has none: leave it out, or use --optimizer qhm"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), WRONG, ids=[text[:40] for text, _ in WRONG])
def test_what_is_wrong_is_said_in_one_line_with_its_place(text, words):
    try:
        read(text)
    except ValueError as error:
        if words.startswith("'nan"):
            assert (
                "no way ->" in str(error) or "not a number" in str(error) or "range" in str(error)
            )
            return
    assert words.removeprefix("--schedule ") in refused(main, ["--plan", "--schedule", text])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "lr"], "--schedule and --method lr both say how lr and batch go"),
        (["--lr", "0.2"], "--lr 0.2 is not what --schedule begins with (0.1): leave --lr out"),
        (["--batchsize", "8"], "--batchsize 8 is not what --schedule begins with (32)"),
        (["--mode", "critical"], "--mode critical holds the noise fixed, which --schedule"),
        (["--compat", "original"], "--compat original is of the published methods"),
        (["--dataset", "folder"], "within which this schedule changes, only the images in data"),
        (["--budget", "updates=9", "--dataset", "folder"], "--budget updates=9 takes, only the"),
        (["--mixup", "0.2"], "--schedule with batch 1 has but one: raise --schedule"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, words):
    text = "lr: 0.1 @0, 0.05 @4ep; batch: 32 @0, 64 @2.5ep, 1 @90%"
    assert words in refused(main, ["--plan", "--schedule", text, *flags])


def test_what_it_begins_with_are_the_lr_and_the_batch_of_the_run():
    c = config(
        "--schedule", "lr: 0 @0 -> 0.4 @2 ->cos 0 @100%; batch: 16 @0, 8 @50%", "--lr", "0.4",
        "--optimizer", "shb", "--beta", "0.5",
    )  # fmt: skip
    assert (c.lr, c.batch_size, c.beta, c.method) == (0.4, 16, 0.5, "constant")
    assert (c.smallest_batch, c.largest_batch) == (8, 16)
    published = config("--dataset", "cifar100", "--schedule", "lr: 0.1 @0, 0.05 @40ep")
    assert (published.lr, published.c2) == (0.1, 1280.0)
    momentum = config("--schedule", "beta: 0 @0 -> 0.9 @2", "--optimizer", "shb")
    assert momentum.beta == 0 and momentum.keeps_history
    fixed = config("--mode", "critical", "--schedule", "lr: 0.3 @0")
    assert fixed.lr == 0.3


def test_a_table_of_toml_is_a_schedule(tmp_path):
    (tmp_path / "f.toml").write_text(
        'epochs = 9\n[schedule]\nlr = "0.1 @0, 0.05 @4"\nbatch = "8 @0"\n'
    )
    (tmp_path / "g.toml").write_text('schedule = "lr: 0.1 @0, 0.05 @4"\nmethod = "constant"\n')
    c = config("--config", tmp_path / "f.toml")
    assert (c.schedule, c.epochs, c.batch_size) == ("lr: 0.1 @0, 0.05 @4; batch: 8 @0", 9, 8)
    assert config("--config", tmp_path / "g.toml").schedule == "lr: 0.1 @0, 0.05 @4"
    # the command line overrides a file, the other way of saying it too
    over = config("--config", tmp_path / "f.toml", "--method", "lr")
    assert (over.schedule, over.method) == (None, "lr")
    over = config("--config", tmp_path / "f.toml", "--schedule", "lr: 0.3 @0")
    assert (over.schedule, over.lr, over.batch_size) == ("lr: 0.3 @0", 0.3, 32)
    (tmp_path / "h.toml").write_text("[schedule]\nlr = 0.1\n")
    assert "'0.1' of lr: it is no VALUE" in refused(main, ["--config", str(tmp_path / "h.toml")])
    (tmp_path / "h.toml").write_text("[lr]\na = 0.1\n")
    assert "[lr] is a table" in refused(main, ["--config", str(tmp_path / "h.toml")])


def test_a_recipe_keeps_what_a_schedule_does_not_say():
    c = config("--recipe", "weiaicunzai", "--schedule", "lr: 0.2 @0, 0.1 @50%")
    assert (c.method, c.milestones, c.warmup, c.lr, c.batch_size) == (
        "constant", None, "1ep", 0.2, 128,
    )  # fmt: skip


def test_a_sweep_is_over_schedules(tmp_path):
    texts = ["lr: 0.1 @0 ->cos 0 @100%", "lr: 0.2 @0, 0.1 @50%; batch: 8 @0"]
    asked = vars(grid.parser().parse_args(["--schedule", *texts, "--seed", "0", "1"]))
    runs = grid.grid_runs(asked, {}, tmp_path)
    assert [(run.differs["schedule"], run.differs["seed"]) for run in runs] == [
        (text, seed) for text in texts for seed in (0, 1)
    ]
    assert [config(*run.flags).lr for run in runs] == [0.1, 0.1, 0.2, 0.2]
    assert len({run.name for run in runs}) == 4


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--batch-size-schedule=1", "--schedule"),
        ("--lr-boundaries=1", "--schedule"),
        ("--lr-scheduler-type=cosine", "--method"),
        ("--decay-milestones=3", "--milestones"),
        ("--min-lr=0", "--lr-min"),
        ("--sched-on-updates=1", "--per update"),
        ("--shcedule=1", "--schedule"),
    ],
)
def test_what_others_call_it_is_understood(flag, meant):
    assert meant in refused(main, [flag])


def test_the_json_of_a_config_gives_it_again(tmp_path):
    c = config("--schedule", "lr: 0.1 @0 ->exp 1e-05 @100%; batch: 8 @0, 16 @2000up")
    values = {k: v for k, v in c.to_json().items() if v is not None and k != "resume"}
    given = from_table(parser(), values, "config.json")
    assert type(c)(**given | {"resume": False}) == c


RIGHT = [
    "lr: 0.1 @0, 0.05 @40%; batch: 32 @0, 64 @5ep, 128 @60%",
    "lr: 0 @0 -> 0.4 @5ep ->cos 0 @100%",
    "batch: 8 @0 -> 256 @300up; momentum: 0.9 @0, 0.5 @9ep",
    "lr: 0.1 @0 ->exp 0.001 @9000samples; nu: 0.5 @0, 0.7 @5",
]
PIECES = [*"0123456789.,;:@-> %eu\n\0é[]", "->", "ep", "up", "cos", "exp", "samples", "lr", "batch",
          "nan", "inf", "-1", "1e999", "100%", "@0", "9" * 30]  # fmt: skip


def test_no_text_ends_in_anything_but_a_refusal_or_a_plan():
    """2,000 mutations of right ones."""
    draw, planned = random.Random(0), 0
    for _ in range(2000):
        letters = list(draw.choice(RIGHT))
        for _ in range(draw.choice([1, 1, 2, 4])):
            at = draw.randrange(len(letters) + 1)
            kind = draw.random()
            if kind < 0.4:
                letters[at:at] = [draw.choice(PIECES)]
            elif kind < 0.7:
                del letters[at : at + draw.randint(1, 4)]
            else:
                letters[at : at + 1] = [draw.choice(PIECES)]
        text = "".join(letters)
        try:
            given = {"schedule": written(text), "optimizer": "qhm"}
            plan = make_plan(resolve(given), IMAGES)
        except (ConfigError, ArgumentTypeError) as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 500
            continue
        assert plan.layout.epochs == EPOCHS and plan.layout.samples == EPOCHS * IMAGES
        last = plan.at(plan.layout.at(plan.layout.updates))
        assert last.lr >= 0 and 1 <= last.batch_size <= IMAGES and 0 <= last.momentum < 1
        planned += 1
    assert planned > 100


# What it comes to


def warm_cosine(optimizer, unit):
    return SCHEDULERS.SequentialLR(
        optimizer,
        [
            SCHEDULERS.LinearLR(optimizer, 0.25, 1.0, total_iters=3 * unit),
            SCHEDULERS.CosineAnnealingLR(optimizer, 12 * unit, eta_min=0.001),
        ],
        milestones=[3 * unit],
    )


TORCH = {  # the text for points @N{u}, and PyTorch's scheduler where an epoch has k of its steps
    "LinearLR": (
        "0.05 @0 -> 0.1 @10{u}",
        lambda o, k: SCHEDULERS.LinearLR(o, 0.5, 1.0, total_iters=10 * k),
    ),
    "ConstantLR": (
        "0.02 @0, 0.1 @4{u}",
        lambda o, k: SCHEDULERS.ConstantLR(o, 0.2, total_iters=4 * k),
    ),
    "MultiStepLR": (
        "0.1 @0, 0.01 @5{u}, 0.001 @9{u}",
        lambda o, k: SCHEDULERS.MultiStepLR(o, [5 * k, 9 * k], 0.1),
    ),
    "ExponentialLR": (
        "0.1 @0 ->exp 0.0035184372088832 @15{u}",
        lambda o, k: SCHEDULERS.ExponentialLR(o, 0.8 ** (1 / k)),
    ),
    "CosineAnnealingLR": (
        "0.1 @0 ->cos 0.01 @15{u}",
        lambda o, k: SCHEDULERS.CosineAnnealingLR(o, 15 * k, eta_min=0.01),
    ),
    "PolynomialLR": (
        "0.1 @0 -> 0 @15{u}",
        lambda o, k: SCHEDULERS.PolynomialLR(o, 15 * k, power=1.0),
    ),
    "SequentialLR": ("0.025 @0 -> 0.1 @3{u} ->cos 0.001 @15{u}", warm_cosine),
}


@pytest.mark.parametrize("name", TORCH)
def test_a_text_is_the_scheduler_of_pytorch_epoch_by_epoch_and_update_by_update(name):
    text, make = TORCH[name]
    per_epoch = Schedule.written("lr: " + text.format(u="ep"), epochs=15, batch_size=10)
    ours = [p.lr for p in per_epoch.points()]
    assert ours == pytest.approx(torch_lrs(lambda o: make(o, 1), 15), rel=1e-12, abs=1e-16)
    # 8 updates an epoch; by updates, and by epochs that the batch divides
    by_updates = text
    for number in (15, 12, 10, 9, 5, 4, 3):
        by_updates = by_updates.replace(f"@{number}{{u}}", f"@{8 * number}up")
    theirs = torch_lrs(lambda o: make(o, 8), 120)
    for words in (by_updates, text.format(u="ep")):
        plan = plan_of("lr: " + words, "--batchsize", 10, images=80)
        assert [p.lr for p in points(plan)] == pytest.approx(theirs, rel=1e-12, abs=1e-16)


def batches(make, epochs=15):
    """What a scheduler of bs_scheduler makes of a batch, epoch by epoch."""
    schedulers = pytest.importorskip("bs_scheduler")
    data = torch.utils.data.TensorDataset(torch.zeros(1000, 1))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    scheduler, found = make(schedulers, loader), []
    for _ in range(epochs):
        found.append(loader.batch_sampler.batch_size)
        scheduler.step()
    return found


BATCHES = {
    "StepBS": ("8 @0, 16 @5, 32 @10", lambda s, x: s.StepBS(x, 5, 2.0)),
    "MultiStepBS": ("8 @0, 24 @3, 72 @7", lambda s, x: s.MultiStepBS(x, [3, 7], 3.0)),
    "ConstantBS": ("40 @0, 8 @5", lambda s, x: s.ConstantBS(x, 5.0, milestone=5)),
    "LinearBS": ("8 @0 -> 48 @10", lambda s, x: s.LinearBS(x, 1.0, 6.0, milestone=10)),
    "falling LinearBS": ("80 @0 -> 8 @9", lambda s, x: s.LinearBS(x, 10.0, 1.0, milestone=9)),
    "ExponentialBS": ("8 @0 ->exp 512 @6", lambda s, x: s.ExponentialBS(x, 2.0)),
    "CosineAnnealingBS": (
        "8 @0 ->cos 200 @14",
        lambda s, x: s.CosineAnnealingBS(x, 14, max_batch_size=200),
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_text_is_the_scheduler_of_bs_scheduler(name):
    text, make = BATCHES[name]
    ours = [p.batch_size for p in Schedule.written(f"batch: {text}", epochs=15, lr=1.0).points()]
    last = 7 if name == "ExponentialBS" else 15  # which has no end
    assert ours[:last] == batches(make)[:last]


def simulated(plan, drop_last):
    """(epoch, samples, place) of every batch of a run, one after the other."""
    n, update, samples = plan.images, 0, 0
    for epoch in range(plan.layout.epochs):
        cursor = 0
        while cursor < n:
            place = Place(epoch, update, samples, cursor, n)
            size = plan.schedule.at(place).batch_size
            if drop_last and cursor + size > n:
                break
            size = min(size, n - cursor)
            yield epoch, size, place
            update, samples, cursor = update + 1, samples + size, cursor + size


def drawn(draw, n, epochs):
    """A text that may be one."""
    unit, at, knots = draw.choice(["", "%", "up", "samples", "mixed"]), 0.0, []
    for k in range(draw.randint(1, 5)):
        at += draw.choice([1, 1, 2, 3.5, 0.37]) if k else 0
        points = [f"{at:g}ep", f"{at * 95 / epochs:.2f}%"]
        points += [f"{int(at * 3) + k}up", f"{int(at * n / 3) + k}samples"]
        which = {"": 0, "%": 1, "up": 2, "samples": 3}
        point = points[which[unit]] if unit in which else draw.choice(points[:2])
        knots.append(f"{draw.randint(1, n)} @{point if k else '0'}")
    signs = [draw.choice([", ", " -> ", " ->cos ", " ->exp "]) for _ in knots[1:]]
    return "batch: " + knots[0] + "".join(s + k for s, k in zip(signs, knots[1:], strict=True))


def test_updates_samples_and_epochs_are_those_of_a_simulation_batch_by_batch():
    draw, done = random.Random(1), 0
    while done < 150:
        n, epochs, drop_last = draw.randint(8, 70), draw.randint(1, 9), draw.random() < 0.4
        try:
            plan = plan_of(
                drawn(draw, n, epochs), "--epochs", epochs, *["--drop-last"] * drop_last, images=n
            )
        except ConfigError:
            continue
        batches = list(simulated(plan, drop_last))
        layout, done = plan.layout, done + 1
        assert (layout.updates, layout.samples) == (
            len(batches),
            sum(size for _, size, _ in batches),
        )
        assert [layout.at(u) for u in range(layout.updates)] == [place for *_, place in batches]
        of_epochs = [[size for e, size, _ in batches if e == epoch] for epoch in range(epochs)]
        assert list(plan.epochs()) == [(len(sizes), sum(sizes)) for sizes in of_epochs]
        assert plan.schedule.updates(n, drop_last) == [len(sizes) for sizes in of_epochs]
        assert [plan.epoch_of(u) for u in range(len(batches))] == [e for e, *_ in batches]
        served = {size for _, size, place in batches if place.cursor + size < n}
        assert plan.batch_sizes() >= served


@pytest.mark.parametrize(
    ("unit", "amounts"), [("updates", (21, 30, 41)), ("samples", (151, 200, 301))]
)
def test_a_budget_takes_the_fewest_epochs_also_where_batches_fall(unit, amounts):
    text = "batch: 40 @0 -> 3 @2, 9 @9up"
    whole = plan_of(text, "--epochs", 9, images=50)
    sizes = [size for _, size, _ in simulated(whole, False)]
    for amount in amounts:
        plan = make_plan(config("--schedule", text, "--budget", f"{unit}={amount}"), 50)
        done = list(accumulate(sizes if unit == "samples" else [1] * len(sizes)))
        updates = next(k for k, total in enumerate(done, 1) if total >= amount)
        of_epochs = list(plan.epochs())
        assert sum(n for n, _ in of_epochs) == updates
        assert sum(n for _, n in of_epochs) == sum(sizes[:updates])
        assert plan.config.epochs == len(of_epochs) == whole.epoch_of(updates - 1) + 1


@pytest.mark.parametrize(
    ("point", "first"),
    [("2.5", 50), ("50%", 50), ("2.501", 60), ("50.000001%", 60), ("250samples", 50), ("26up", 60)],
)
def test_a_point_is_reached_exactly(point, first):
    s = Schedule.written(f"lr: 0.1 @0, 0.2 @{point}", epochs=5, batch_size=10, images=100)
    for cursor in range(0, 100, 10):
        place = Place(2, 20 + cursor // 10, 200 + cursor, cursor, 100)
        assert s.at(place).lr == (0.2 if cursor >= first else 0.1), cursor


def test_what_is_not_written_may_have_stages_of_its_own():
    flags = ["--optimizer", "qhm", "--nu", "0.9 @0, 0.4 @50%", "--epochs", "4"]
    text = "lr: 0.1 @0 -> 0.02 @3"
    plan = plan_of(text, *flags)
    found = {(p.nu, place.epoch // 2) for p, place in zip(
        points(plan), map(plan.layout.at, range(plan.layout.updates)), strict=True
    )}  # fmt: skip
    assert found == {(0.9, 0), (0.4, 1)}
    rows = said(main, ["--plan", *flags, "--schedule", text]).out.splitlines()
    assert [row.split()[0] for row in rows[1:4]] == ["0-2", "2-3", "3-4"]
    words = ["--plan", "--optimizer", "qhm", "--schedule", "nu: 0.7 @0", "--nu", "0.5"]
    assert "--nu 0.5 is not what --schedule begins with (0.7)" in refused(main, words)


def test_the_rows_of_a_plan_say_first_and_last():
    line = ["--plan", "--batchsize", "100", "--epochs", "4", "--schedule"]
    text = "lr: 0.1 @0 -> 0.02 @2; batch: 100 @0, 200 @2.5"
    shown = said(main, [*line, text]).out.splitlines()
    assert [row.split() for row in shown[1:4]] == [
        ["0-2", "0.1", "to", "0.0210299", "100", "0", "0.01", "to", "0.002103", "30"],
        ["2-2.557", "0.02", "100", "0", "0.002", "8"],
        ["2.557-4", "0.02", "200", "0", "0.001414", "12"],
    ]
    assert "within them this schedule changes" in shown[4]
    rows = [json.loads(row) for row in said(main, [*line, text, "--json"]).out.splitlines()]
    assert [(r["batch_first"], r["batch_last"]) for r in rows] == [(100, 100)] * 2 + [
        (100, 200),
        (200, 200),
    ]
    assert [r["lr"] for r in rows] == [r["lr_first"] for r in rows]
    assert rows[0]["lr_last"] == pytest.approx(0.1 - 0.04 * 1400 / 1437)
    steps = said(main, [*line, "lr: 0.1 @0, 0.05 @2"]).out.splitlines()
    assert steps[1].split()[0] == "0-1" and "within" not in steps[3]


# In Python


def test_any_function_of_the_epoch_is_a_schedule():
    def mine(epoch):
        return Point(0.1 / (epoch + 1), [8, 32, 16][epoch], 0.5)

    s = Schedule(mine, epochs=3, optimizer="shb", images=20, c2=2.0, k2=3.0)
    assert [p.batch_size for p in s.points()] == [8, 20, 16]
    assert s.updates(20) == [3, 1, 2] and s.most_momentum == 0.5
    growth = 0.5 * (0.25 - 0.5 + 1) / 0.25
    assert s.delta(s(2)) == pytest.approx(
        0.1 / 3 * ((1 + growth) * 2 / 16 + growth * 3) ** 0.5, rel=1e-12
    )
    for bad, words in (
        (lambda e: 0.1, "the function gives 0.1 for epoch 0, which is no Point"),
        (lambda e: Point(0.1, 0, 0.0), "batch_size 0 of epoch 0 is out of range"),
        (lambda e: Point(0.1, 4, 0.9), "optimizer sgd has no momentum"),
    ):
        with pytest.raises(ValueError, match=words):
            Schedule(bad, epochs=3)
    with pytest.raises(ValueError, match="a function gives lr, batch_size, momentum and nu"):
        Schedule(mine, epochs=3, lr=0.1)
    with pytest.raises(ValueError, match="batch_size is missing"):
        Schedule("constant", epochs=3, lr=0.1)


def test_a_function_is_the_lambda_of_bs_scheduler():
    s = Schedule(lambda e: Point(1.0, round(8 * 1.3**e), 0.0), epochs=15)
    theirs = batches(lambda b, loader: b.LambdaBS(loader, lambda e: 1.3**e))
    assert [p.batch_size for p in s.points()] == theirs


def test_a_lambda_is_pytorchs_lambda_lr():
    theirs = torch_lrs(lambda o: SCHEDULERS.LambdaLR(o, lambda e: 0.95**e), 15)
    s = Schedule(lambda e: Point(0.1 * 0.95**e, 8, 0.0), epochs=15)
    assert [p.lr for p in s.points()] == pytest.approx(theirs, rel=1e-12)


def test_a_text_is_used_from_python():
    s = Schedule.written("lr: 0.4 @0 ->cos 0 @100%; batch: 10 @0, 20 @2.5", epochs=5, images=100)
    assert s(0) == Point(0.4, 10, 0.0) and s.updates(100) == [10, 10, 8, 5, 5]
    assert s.at(Place(2, 25, 250, 50, 100)).batch_size == 20
    counted = "lr: 0.1 @0, 0.2 @7up"
    s = Schedule.written(counted, epochs=3, batch_size=9, images=30)
    assert [p.lr for p in s.points()] == [0.1, 0.1, 0.2]
    for options, words in (
        ({"lr": 0.1, "batch_size": 9}, "lr is written and given"),
        ({}, "batch_size is missing"),
        ({"batch_size": 9, "images": 8}, "0.2 @7up of lr is not reached"),
    ):
        with pytest.raises(ValueError, match=words):
            Schedule.written(counted, epochs=3, **options)
    with pytest.raises(ValueError, match="only the images tell"):
        Schedule.written(counted, epochs=3, batch_size=9)(1)


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_loop_of_ones_own_has_the_batches_and_the_lr_of_each_update(drop_last):
    text = "lr: 0 @0 -> 0.1 @2 ->cos 0.01 @100%; batch: 16 @0 -> 30 @1.3, 8 @2.4"
    s, n = Schedule.written(text, epochs=3), 101
    layout = s.layout(n, drop_last)
    expected = [s.at(layout.at(update)) for update in range(layout.updates)]
    batches = BatchSchedule(s, n, drop_last=drop_last)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch_lr_scheduler(optimizer, s, samples=n, drop_last=drop_last)
    served, lrs = [], []
    for epoch in range(3):
        assert len(batches) == layout.span_of(epoch).updates
        drawn = list(batches)  # ahead of the training, as a DataLoader may
        for batch in drawn:
            assert batches.point == expected[len(served)]
            served.append(len(batch))
            lrs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
            batches.step()
    places = [layout.at(update) for update in range(layout.updates)]
    assert served == [
        min(p.batch_size, n - place.cursor) for p, place in zip(expected, places, strict=True)
    ]
    assert lrs == pytest.approx([p.lr for p in expected], rel=1e-12)
    with pytest.raises(ValueError, match="this schedule changes within epochs: give samples=N"):
        torch_lr_scheduler(optimizer, s)
