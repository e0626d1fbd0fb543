"""--recipe: what it sets, what overrides it, files, sweeps and resumes; the pages of help."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from exact import EXACT
from lrs import torch_lrs
from said import refused, said

from fastsmooth.cli.config import FIELDS, resolve
from fastsmooth.cli.facts import RECIPES
from fastsmooth.cli.flags import ConfigError
from fastsmooth.cli.parse import from_table, parse, parser, read_saved, resumed
from fastsmooth.sweep import grid
from fastsmooth.train import main
from fastsmooth.training import build
from fastsmooth.training.plan import make_plan

SCHEDULERS = torch.optim.lr_scheduler
IMAGES = 50_000
# whether the optimizers of timm are among those that --optimizer takes
OF_TIMM = "timm/lamb" in FIELDS["optimizer"].metadata["choices"]
READY = [
    pytest.param(name, marks=pytest.mark.skipif(
        not OF_TIMM and name == "timm-a3", reason="no optimizer of timm is known"
    ))
    for name in RECIPES
]  # fmt: skip
DATA = {
    "pytorch-cifar": ["--dataset", "cifar10"],
    "weiaicunzai": ["--dataset", "cifar100"],
    "timm-a3": ["--dataset", "imagenet"],
}


def given(*argv):
    return parse([str(word) for word in argv]).given


def config(*argv):
    return resolve(given(*argv))


def words_of(recipe):
    """The recipe as the flags that one would type."""
    words = []
    for name, value in RECIPES[recipe].items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        else:
            words += [flag, *(value if isinstance(value, tuple) else [str(value)])]
    return words


# What it sets


@pytest.mark.parametrize("recipe", READY)
def test_a_recipe_is_the_flags_that_it_stands_for(recipe):
    table = RECIPES[recipe]
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in table.items()}
    assert from_table(parser(), listed, "recipe") == table
    short = config(*DATA[recipe], "--recipe", recipe)
    assert dataclasses.replace(short, recipe=None) == config(*DATA[recipe], *words_of(recipe))
    assert short.recipe == recipe


def test_the_recipe_of_kuangliu_has_the_lr_of_its_scheduler():
    plan = make_plan(config("--dataset", "cifar10", "--recipe", "pytorch-cifar"), IMAGES)
    theirs = torch_lrs(lambda o: SCHEDULERS.CosineAnnealingLR(o, T_max=200), 200)
    assert [p.lr for p in plan.schedule.points()] == pytest.approx(theirs, rel=1e-9, abs=1e-15)
    assert {(p.batch_size, p.momentum) for p in plan.schedule.points()} == {(128, 0.9)}
    assert plan.config.model == "resnet18" and plan.warmup == 0


def test_the_recipe_of_weiaicunzai_has_the_lr_of_its_scheduler():
    plan = make_plan(config("--dataset", "cifar100", "--recipe", "weiaicunzai"), IMAGES)
    theirs = torch_lrs(lambda o: SCHEDULERS.MultiStepLR(o, [60, 120, 160], gamma=0.2), 200)
    assert [p.lr for p in plan.schedule.points()] == pytest.approx(theirs, rel=1e-12)
    assert plan.warmup == 391  # of an epoch: iter_per_epoch * args.warm
    assert plan.config.augment == "crop-flip-rotate"


def test_a_recipe_for_fewer_epochs_steps_earlier():
    c = config("--recipe", "weiaicunzai", "--epochs", 30)
    assert make_plan(c, 1437).schedule.milestones == (9, 18, 24)


# What overrides it


def test_flags_and_files_override_a_recipe_which_overrides_the_data_set(tmp_path):
    c = config("--recipe", "pytorch-cifar", "--lr", 0.05, "--weight-decay", 0)
    assert (c.lr, c.weight_decay, c.batch_size, c.beta) == (0.05, 0.0, 128, 0.9)
    assert (c.augment, c.model) == ("crop-flip", "resnet8")  # the latter of the digits
    (tmp_path / "f.toml").write_text('recipe = "pytorch-cifar"\nbatchsize = 64\nlr = 0.2\n')
    c = config("--config", tmp_path / "f.toml", "--lr", 0.3)
    assert (c.recipe, c.batch_size, c.lr, c.method) == ("pytorch-cifar", 64, 0.3, "cosine")


def test_what_has_no_effect_any_more_is_left_out():
    c = config("--recipe", "weiaicunzai", "--method", "poly", "--power", 2)
    assert (c.milestones, c.factor, c.warmup) == (None, 0.1, "1ep")
    assert config("--recipe", "pytorch-cifar", "--optimizer", "sgd").momentum == 0
    # what the user gives in vain is refused all the same
    with pytest.raises(ConfigError, match="--factor has no effect with --method poly"):
        config("--recipe", "weiaicunzai", "--method", "poly", "--factor", 0.5)


def test_a_budget_takes_the_place_of_the_epochs_of_a_recipe():
    c = make_plan(config("--recipe", "weiaicunzai", "--budget", "updates=120"), 1437).config
    assert (c.epochs, c.batch_size) == (10, 128)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--recipe", "pytorch-cifr"], "--recipe pytorch-cifr: did you mean pytorch-cifar?"),
        (
            ["--recipe", "pytorch-cifar", "--mode", "critical"],
            "--recipe pytorch-cifar: --mode critical holds the noise fixed: use --method constant",
        ),
        (
            ["--recipe", "weiaicunzai", "--epochs", "2"],
            "--recipe weiaicunzai: --milestones 80% is epoch 2, counted from 0, of a run of 2",
        ),
    ],
)
def test_what_does_not_go_with_a_recipe_is_refused_in_one_line(flags, words):
    assert refused(main, flags).startswith(words)


def test_without_timm_a_recipe_of_it_is_refused_in_one_line(monkeypatch):
    c = dataclasses.replace(config(), recipe="timm-a3", model="timm/resnet50")
    build.check_recipe(c)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "timm" else found(n))
    with pytest.raises(ConfigError) as refusal:
        build.check_recipe(c)
    assert str(refusal.value) == (
        "--recipe timm-a3: --model timm/resnet50 needs timm, which is not installed: pip install "
        "timm"
    )
    build.check_recipe(dataclasses.replace(c, model="resnet8"))


# Files, sweeps, resumes


LINES = [
    ["--recipe", "pytorch-cifar"],
    ["--recipe", "pytorch-cifar", "--weight-decay", "0.0", "--seed", "3"],
    ["--recipe", "weiaicunzai", "--lr", "0.05", "--epochs", "30"],
    ["--recipe", "weiaicunzai", "--method", "lr"],
]


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_config_json_holds_the_name_and_every_value_and_gives_the_run_again(line, tmp_path):
    started = config(*line)
    (tmp_path / "config.json").write_text(json.dumps(started.to_json()))
    assert read_saved(tmp_path) == started
    again = given("--config", tmp_path / "config.json")
    assert resolve(again) == started
    assert again.keys() <= given(*line).keys() | {"dataset"}


def test_a_resume_may_name_the_recipe_again_and_no_other(tmp_path):
    started = config("--recipe", "pytorch-cifar", "--out", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(started.to_json()))
    line = {"resume": True, "out": str(tmp_path)}
    assert resumed(line | {"recipe": "pytorch-cifar", "lr": 0.1}).recipe == "pytorch-cifar"
    with pytest.raises(ConfigError, match="has --recipe pytorch-cifar, not weiaicunzai"):
        resumed(line | {"recipe": "weiaicunzai"})


def test_a_sweep_runs_over_recipes_and_over_flags_of_one(tmp_path):
    def runs(*argv):
        asked = vars(grid.parser().parse_args(list(argv)))
        return grid.grid_runs(asked, {}, tmp_path)

    names = ["pytorch-cifar", "weiaicunzai"]
    assert [run.differs for run in runs("--recipe", *names)] == [{"recipe": n} for n in names]
    several = runs("--recipe", "weiaicunzai", "--lr", "0.1", "0.2", "--milestones", "10", "50%")
    assert [run.flags for run in several] == [
        (f"--lr={lr}", "--milestones", "10", "50%", "--recipe=weiaicunzai") for lr in (0.1, 0.2)
    ]
    for run in several:
        assert config(*run.flags).milestones == ("10", "50%")


def test_a_recipe_trains_and_goes_on_where_it_was_stopped(tmp_path):
    line = [*EXACT, "--recipe", "weiaicunzai", "--epochs", "4", "--batchsize", "400"]
    out = tmp_path / "run"
    assert main([*line, "--max-time", "0.01", "--out", str(out)]) == 75
    assert main(["--resume", "--max-time", "60", "--out", str(out)]) == 0
    saved = json.loads((out / "config.json").read_text())
    assert (saved["recipe"], saved["milestones"]) == ("weiaicunzai", ["30%", "60%", "80%"])
    assert (saved["lr"], saved["batch_size"], saved["factor"]) == (0.1, 400, 0.2)


# Docs


def test_the_page_has_every_value_of_every_recipe():
    page = (Path(__file__).parents[1] / "docs" / "train.md").read_text()
    rows = [row.split("|")[1:-1] for row in page.splitlines() if row.startswith("|")]
    (names,) = (row for row in rows if row[1].strip() == "`pytorch-cifar`")
    table = {row[0]: row for row in rows if len(row) == len(names)}
    for column, name in enumerate(names[1:], 1):
        cells = {key: row[column] for key, row in table.items()}
        for field, value in RECIPES[name.strip(" `")].items():
            flag = "--" + {"batch_size": "batchsize"}.get(field, field).replace("_", "-")
            if value is True:
                assert any(f"`{flag}`" in cell for cell in cells.values()), (name, flag)
                continue
            (cell,) = (cell for key, cell in cells.items() if f"`{flag}`" in key)
            words = value if isinstance(value, tuple) else (str(value),)
            for word in words:
                said_there = re.search(rf"(?<![\w.]){re.escape(word)}(?![\w.])", cell)
                assert said_there, (name, flag, cell)


# The short page of help


@pytest.mark.parametrize(("columns", "most"), [(118, 72), (80, 80)])
def test_help_fits_a_screen_and_a_half(columns, most, monkeypatch):
    monkeypatch.setattr("fastsmooth.cli.flags.columns", lambda stream: columns)
    page = said(main, ["--help"]).out.splitlines()
    assert len(page) <= most and max(map(len, page)) <= columns
    assert page[-1].startswith("--help all has every flag: ")
    # a flag has a line of its own, and nothing is cut
    flags = [line for line in page if line.startswith("  -")]
    assert len(flags) > 40 and all(re.search(r"\S {2,}\S", line) for line in flags)


def test_no_flag_is_lost_on_the_longer_page():
    short, long = (said(main, ["--help", *more]).out for more in ([], ["all"]))

    def named(page):
        return set(re.findall(r"^  (--[\w-]+)", page, re.M))

    known = {action.option_strings[0] for action in parser()._actions}
    assert named(short) < named(long) == known
    hidden = re.search(r"every flag: (\d+) more", short)[1]
    assert int(hidden) == len(named(long) - named(short))
    assert {"--hw-decoder-load", "--chunk", "--compat", "--save-omega"} <= named(long) - named(
        short
    )
    assert {"--lr", "--recipe", "--micro-batch", "--resume"} <= named(short)
