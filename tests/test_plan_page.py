"""--plan --html: a page of its own, whose lines are what the run will do."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from said import refused, said

from fastsmooth.cli.config import resolve
from fastsmooth.cli.parse import parse
from fastsmooth.messages import CANNOT_WRITE
from fastsmooth.train import main
from fastsmooth.training.pictured import costs, end_of, settings
from fastsmooth.training.plan import make_plan

TEXT = "lr: 0 @0 -> 0.4 @2 ->cos 0 @100%; batch: 32 @0, 64 @2.5, 16 @3; momentum: 0.5 @0, 0.9 @50%"
WRITTEN = ["--schedule", TEXT, "--optimizer", "shb", "--epochs", "4"]


def plan_of(*flags):
    return make_plan(resolve(parse([*flags]).given), 1437)


def lines(figure):
    return {panel.title.partition(" ")[0]: panel.curves[0].line for panel in figure.panels}


def at(line, x):
    """The value of a line just after x, on its straight piece there."""
    for (a, p), (b, q) in pairwise(line):
        if a <= x < b:
            return p + (q - p) * (x - a) / (b - a)
    raise AssertionError(f"no value at {x}")


@pytest.mark.parametrize(
    "flags",
    [
        WRITTEN,
        ["--method", "hybrid", "--decay-epoch", "1", "--epochs", "4", "--warmup", "1ep"],
        ["--method", "exp-batch", "--per", "update", "--epochs", "4"],
        ["--method", "batch", "--decay-epoch", "400", "--epochs", "2000", "--batchsize", "100"],
        ["--method", "lr", "--budget", "updates=333"],
    ],
    ids=lambda flags: " ".join(flags[:2])[:30],
)
def test_lines_are_the_points_of_the_run(flags):
    plan = plan_of(*flags)
    drawn, cost, end = lines(settings(plan)), lines(costs(plan)), end_of(plan)
    for update in range(0, end.update, max(1, end.update // 97)):
        place = plan.layout.at(update)
        p, x = plan.at(place), place.epochs + 1e-9
        # half a batch where a ramp is drawn straight, and what two updates of it are apart
        assert at(drawn["learning"], x) == pytest.approx(p.lr, rel=0.02, abs=0.002), place
        assert at(drawn["batch"], x) == pytest.approx(p.batch_size, abs=1.5), place
        assert at(cost["updates"], x) == pytest.approx(update, abs=1.5)
    for name, last in (("updates", end.update), ("gradient", end.samples)):
        assert cost[name][-1] == (end.epochs, last)
    assert {line[-1][0] for line in drawn.values()} == {end.epochs}


def test_the_page_is_whole_and_loads_nothing(tmp_path):
    path = tmp_path / "plan.html"
    done = said(main, ["--plan", *WRITTEN, "--html", str(path)])
    assert done.code == 0 and done.out == f"{path}: the plan over 4 epochs\n"
    page = path.read_text()
    ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    assert "<script" not in page and not re.search(r"(src|href)=", page)
    assert set(re.findall(r"https?://[^\"]*", page)) == {"http://www.w3.org/2000/svg"}
    assert "lr: 0 @0 -&gt; 0.4 @2" in page and "gradient evaluations of resnet8" in page
    for title in ("learning rate", "batch size (samples)", "momentum", "updates so far"):
        assert f">{title}</text>" in page
    assert ">delta, the degree of smoothing (c2 = k2 = 1)</text>" in page
    bare = tmp_path / "bare.html"
    assert said(main, ["--plan", "--optimizer", "torch/AdamW", "--html", str(bare)]).code == 0
    assert ">momentum</text>" not in bare.read_text() and "delta, the" not in bare.read_text()


def test_what_cannot_be_drawn_is_refused(tmp_path):
    page = str(tmp_path / "p.html")
    assert "--html FILE goes with --plan" in refused(main, ["--html", page])
    assert "without --json" in refused(main, ["--plan", "--json", "--html", page])
    folder = ["--plan", "--dataset", "folder", "--html", page]
    assert "only those in data tell" in refused(main, folder)
    nowhere = said(main, ["--plan", "--html", str(tmp_path / "no" / "p.html")])
    assert nowhere.code == CANNOT_WRITE and len(nowhere.err.splitlines()) == 1
    assert not (tmp_path / "p.html").exists()
