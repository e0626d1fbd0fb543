"""The report: its numbers against the rows of the runs, its markup against hostile input, and how
it looks in a browser."""

import base64
import fcntl
import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from fastsmooth.figures import chart, heat
from fastsmooth.report import groups, noise, page
from fastsmooth.report.__main__ import main
from fastsmooth.runfolder.read import find_runs, read_run

HOSTILE = (
    "<script>alert(1)</script>", "\" onload='alert(1)' x=\"",
    "]]></style></title>--><svg onload=alert(1)>", "a\n\r\tb\x00\x1b[31m\u202ec",
    "x" * 10_000, "../../../etc/passwd", "&lt;b&gt; &amp; &", "url(http://example.org/x)",
    "$\\frac{", "\ud800",
)  # fmt: skip
CONFIG = {
    "dataset": "digits", "model": "resnet8", "norm": "group", "method": "constant",
    "optimizer": "sgd", "mode": "normal",
    "lr": 0.1, "batch_size": 32, "beta": 0.9, "nu": 1.0, "epochs": 6, "c2": None, "k2": None,
    "seed": 0, "device": "auto",
    "out": "runs/x", "eps": [0.5],
}  # fmt: skip


# Run folders


def wave(seed: int, epoch: int, lr: float) -> float:
    """A number in [0, 1) that no two rows share."""
    return (math.sin(12.9898 * (seed + 1) + 78.233 * (epoch + 1) + 3.7 * lr) * 43758.5453) % 1


def epoch_rows(config: dict, epochs: int, updates: int = 45) -> list[dict]:
    lr, batch = config["lr"], config["batch_size"]
    rows = []
    for e in range(epochs):
        grown = (
            1
            - 0.8 ** (e + 1)
            + 0.02 * wave(config["seed"], e, lr if isinstance(lr, float) else 0.1)
        )
        row = {
            "kind": "epoch",
            "epoch": e,
            "step": updates * (e + 1),
            "samples": 1437 * (e + 1),
            "lr": lr,
        }
        row |= {
            "batch_size": batch,
            "momentum": 0.0,
            "delta": lr / batch**0.5 if isinstance(lr, float) else 0.01,
        }
        row |= {
            "train_loss": 2.3 * 0.8**e + 0.05 * grown,
            "train_acc": grown,
            "test_loss": 2.4 * 0.85**e,
        }
        rows.append(row | {"test_acc": 0.95 * grown, "train_seconds": 1.5, "eval_seconds": 0.25})
    return rows


def run_folder(
    path: Path, *, state="done", reason="", epochs=6, rows=None, tail="", files=None, **settings
) -> Path:
    """A run folder as fastsmooth.train writes it; the config's seed, lr, batch size say what its
    rows are."""
    path.mkdir(parents=True)
    config = CONFIG | {"out": str(path)} | settings
    rows = epoch_rows(config, epochs) if rows is None else rows
    (path / "config.json").write_text(json.dumps(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    (path / "status.json").write_text(json.dumps({"state": state, "reason": reason, "step": 1}))
    for name, value in (files or {}).items():
        (path / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def critical_folder(path: Path, batch: int, seed: int, **settings) -> Path:
    """Of a curve N(b) = 4000 (b / 64 + 64 / b) / 2, with its smallest value at 64."""
    updates = round(4000 * (batch / 64 + 64 / batch) / 2 / batch) + seed
    crossings = {"0.5": {"step": updates, "epoch": 1, "samples": batch * updates}, "0.1": None}
    found = {"batch_size": batch, "seed": seed, "momentum": 0.0, "crossings": crossings}
    found |= {"grad_norm_max": 3.0, "grad_norm_rms": 1.0}
    settings = {"mode": "critical", "batch_size": batch, "seed": seed} | settings
    return run_folder(path, files={"critical.json": found}, **settings)


def noise_folder(path: Path, batch: int, seed: int = 0, **settings) -> Path:
    point = {
        "step": 50,
        "epoch": 2,
        "lr": 0.1,
        "batch_size": batch,
        "noise_norm": 8.0 / batch**0.5 * (1 + 0.01 * seed),
    }
    point |= {
        "noise_norm_se": 0.01,
        "full_grad_norm": 0.4,
        "full_grad_norm_se": 0.02,
        "c2_sampled": 64.0,
        "c2_sampled_se": 2.0,
    }
    edges = [0.01 * 1.5**i for i in range(16)]
    counts = [int(5000 * math.exp(-(e**2) / 2)) for e in edges[1:]]
    hill = [{"share": s, "value": 3.0 + s, "error": 0.1} for s in (0.05, 0.01, 0.001)]
    qq = {"normal": [-3, -1, 0, 1, 3], "observed": [-4, -1, 0, 1, 4]}
    point["statistics"] = {
        "variance": {"value": 1.0, "error": 0.1},
        "zeros": 10,
        "hill": hill,
        "qq": qq,
    }
    point["statistics"]["histogram"] = {"edges": edges, "positive": counts, "negative": counts}
    settings = {"mode": "sampling", "batch_size": batch, "seed": seed} | settings
    return run_folder(path, files={"noise.json": {"points": [point]}}, **settings)


def layers_folder(path: Path, count: int = 3, updates=(0, 50, 100), **settings) -> Path:
    """A run of --track-noise with C^2 by layer: that of the last layer is 0 at first."""
    seed = settings.get("seed", 0)
    config = CONFIG | {"seed": seed}
    rows = epoch_rows(config, 3)
    for i, at in enumerate(updates):
        c2 = [10.0 ** (k % 4 - i) * (1 + seed) for k in range(count)]
        c2[-1] *= i > 0
        row = {"kind": "measure", "step": at, "c2_sampled": sum(c2), "delta_measured": 0.1}
        rows.append(row | {"delta": 0.02, "estimator": "per-sample", "bn": "train", "layer_c2": c2})
    names = ["stem", *(f"stages.{k}.0.convolution" for k in range(1, count - 1)), "head"]
    found = {"layers": [{"name": name, "parameters": 9} for name in names]}
    return run_folder(path, rows=rows, files={"layers.json": found}, **settings)


def sharpness_file(values: dict[float, float]) -> dict:
    setting = {"algorithm": "m_apgd_linf", "adaptive": True, "split": "train", "step": 270}
    return {"results": [setting | {"rho": rho, "value": value} for rho, value in values.items()]}


def everything(root: Path) -> Path:
    """Runs of every kind and in every state."""
    for seed in range(3):
        for method in ("constant", "lr", "hybrid"):
            run_folder(root / f"{method}-{seed}", method=method, seed=seed,
            lr={"constant": 0.1, "lr": 0.2, "hybrid": 0.05}[method],
                       files={"sharpness.json": sharpness_file({0.001: 0.1 + 0.01 * seed,
                           0.002: 0.3})})  # fmt: skip
    run_folder(
        root / "diverged",
        method="batch",
        seed=0,
        state="diverged",
        reason="the loss is nan",
        epochs=2,
    )
    run_folder(
        root / "running",
        method="lr",
        lr=0.2,
        seed=4,
        state="running",
        epochs=3,
        tail='{"kind": "epo',
    )
    for batch in (16, 32, 64, 128, 256):
        for seed in range(2):
            critical_folder(root / f"critical-{batch}-{seed}", batch, seed, c2=20.0)
        noise_folder(root / f"noise-{batch}", batch)
    layers_folder(root / "layers", model="resnet18", track_noise="every=50")
    layers_folder(root / "many-layers", 80, model="resnet50", track_noise="every=50")
    return root


def report(tmp_path: Path, *runs: Path) -> tuple[str, list[Path]]:
    out = tmp_path / "out"
    assert main([*map(str, runs), "--out", str(out)]) == 0
    return (out / "report.html").read_text(encoding="utf-8"), sorted(
        (out / "figures").glob("*.svg")
    )


def figures_of(*runs: Path) -> dict:
    return {
        f.name: f
        for part in page.sections([read_run(p) for p in find_runs(runs)])
        for f in part.figures
    }


@pytest.fixture(autouse=True)
def no_pdf(request, monkeypatch):
    """Figures as PDF cost seconds: only the tests of them write them."""
    if "pdf" not in request.node.name:
        monkeypatch.setattr("fastsmooth.figures.pdf.available", lambda: False)


# Reading the page

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Strict: every tag is closed where it should be; remembers elements, text and tables."""

    def __init__(self, markup: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.tables, self.words = [], [], [], ""
        self.feed(markup)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes no <{tag}>"

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, head: str) -> list[dict[str, str]]:
        """The rows of the table whose first column is called `head`, by column."""
        heads, *rows = next(t for t in self.tables if t[0][0] == head)
        assert all(len(row) == len(heads) for row in rows)
        return [dict(zip(heads, row, strict=True)) for row in rows]


PNG = "data:image/png;base64,"


def checked(markup: str) -> Page:
    """The page, after everything that no page may have was looked for."""
    found = Page(markup)
    ET.fromstring(markup.removeprefix("<!DOCTYPE html>"))  # well-formed XML too
    for tag, attributes in found.elements:
        assert tag not in (
            "script",
            "iframe",
            "object",
            "embed",
            "link",
            "base",
            "form",
            "foreignobject",
        ), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            assert name not in ("src", "srcset", "xlink:href", "action", "data"), name
            # a picture is in the page, as what the report itself has drawn
            begins = PNG if tag == "image" else "#"
            assert name != "href" or value.startswith(begins), value
            assert "url(" not in (value or "") or name in ("aria-label", "data-name"), value
    assert all(
        "url(" not in s and "@import" not in s
        for s in re.findall(r"<style>(.*?)</style>", markup, re.S)
    )
    return found


def checked_svg(path: Path) -> ET.Element:
    root = ET.fromstring(path.read_bytes())
    for element in root.iter():
        tag = element.tag.removeprefix("{http://www.w3.org/2000/svg}")
        assert tag in ("svg", "style", "rect", "path", "circle", "text", "title", "image"), tag
        for name, value in element.attrib.items():
            assert not name.startswith("on") and name != "xlink:href", name
            assert name != "href" or (tag == "image" and value.startswith(PNG)), value
            assert "url(" not in value or name == "aria-label", value
    return root


# Numbers


def test_the_results_table_says_mean_deviation_and_count_of_the_rows(tmp_path):
    configs = {("constant", 0.1): 3, ("lr", 0.2): 2, ("hybrid", 0.05): 1}
    for (method, lr), seeds in configs.items():
        for seed in range(seeds):
            run_folder(tmp_path / "runs" / f"{method}-{seed}", method=method, lr=lr, seed=seed)
    markup, _ = report(tmp_path, tmp_path / "runs")
    rows = checked(markup).table("configuration")
    assert len(rows) == len(configs)
    for (method, _), seeds in configs.items():
        row = next(r for r in rows if re.search(rf"\b{method},", r["configuration"]))
        finals, bests, losses = [], [], []
        for seed in range(seeds):
            lines = (
                (tmp_path / "runs" / f"{method}-{seed}" / "metrics.jsonl").read_text().splitlines()
            )
            of = [json.loads(line) for line in lines]
            finals.append(100 * of[-1]["test_acc"])
            bests.append(max(100 * r["test_acc"] for r in of))
            losses.append(of[-1]["train_loss"])
        for name, values, digits in (
            ("final accuracy, %", finals, 2),
            ("best accuracy, %", bests, 2),
            ("training loss", losses, 4),
        ):
            spread = f" ± {statistics.stdev(values):.{digits}f}" if seeds > 1 else ""
            assert row[name] == f"{statistics.fmean(values):.{digits}f}{spread}"
        assert row["n"] == str(seeds)
        assert (
            row["updates"] == "270"
            and row["samples"] == f"{6 * 1437:,}"
            and row["time, s"].startswith("10.5")
        )


def test_summary_json_has_the_last_word_on_the_accuracy(tmp_path):
    run_folder(
        tmp_path / "r",
        files={"summary.json": {"final_test_acc": 0.4242, "best_test_acc": 0.5, "updates": 7}},
    )
    row = checked(report(tmp_path, tmp_path / "r")[0]).table("configuration")[0]
    assert (row["final accuracy, %"], row["best accuracy, %"], row["updates"]) == (
        "42.42",
        "50.00",
        "7",
    )


def test_lines_are_means_and_bands_reach_from_the_lowest_to_the_highest_seed(tmp_path):
    for method in ("constant", "lr"):
        for seed in range(4):
            run_folder(
                tmp_path / f"{method}-{seed}",
                method=method,
                seed=seed,
                lr=0.1 if method == "lr" else 0.3,
            )
    found = figures_of(tmp_path)
    for unit in ("epochs", "updates"):
        accuracy, loss = found[f"training-1-{unit}"].panels[:2]
        for panel, name, factor in ((accuracy, "test_acc", 100), (loss, "train_loss", 1)):
            assert [c.label.split(",")[0] for c in panel.curves] == ["method constant", "method lr"]
            for curve, method in zip(panel.curves, ("constant", "lr"), strict=True):
                rows = [
                    [
                        json.loads(x)
                        for x in (tmp_path / f"{method}-{s}" / "metrics.jsonl")
                        .read_text()
                        .splitlines()
                    ]
                    for s in range(4)
                ]
                for e in range(6):
                    values = [factor * r[e][name] for r in rows]
                    x = e + 1 if unit == "epochs" else 45 * (e + 1)
                    assert curve.line[e] == pytest.approx((x, statistics.fmean(values)))
                    assert curve.band[e] == pytest.approx((x, min(values), max(values)))


def test_updates_stand_on_a_logarithmic_axis_where_some_runs_take_many_times_those_of_others(
    tmp_path,
):
    for batch, updates in ((8, 180), (256, 6)):
        run_folder(
            tmp_path / f"{batch}",
            batch_size=batch,
            rows=epoch_rows(CONFIG | {"batch_size": batch}, 6, updates),
        )
    found = figures_of(tmp_path)
    assert not found["training-1-epochs"].x_log
    assert (
        found["training-1-updates"].x_log
        and found["training-1-updates"].x_title == "Updates, log scale"
    )
    ends = [c.line[-1][0] for c in found["training-1-updates"].panels[0].curves]
    assert ends == [1080, 36]
    # the schedule begins at update 0, which no such axis has
    shapes = page.drawn(found["training-1-updates"]).shapes
    assert all(0 <= x <= page.WIDE for s in shapes for x, _ in getattr(s, "points", ()))
    run_folder(tmp_path / "64", batch_size=64, rows=epoch_rows(CONFIG | {"batch_size": 64}, 6, 22))
    shutil.rmtree(tmp_path / "256")
    assert not figures_of(tmp_path)["training-1-updates"].x_log


def test_runs_are_one_configuration_whatever_seed_path_and_device_they_have(tmp_path):
    run_folder(tmp_path / "a", seed=0, device="cpu", data_dir="/one", workers=2)
    run_folder(
        tmp_path / "b", seed=1, device="cuda", data_dir="/two", wandb_mode="offline", max_time=5
    )
    run_folder(tmp_path / "c", seed=0, weight_decay=0.1)
    rows = checked(report(tmp_path, tmp_path)[0]).table("configuration")
    assert sorted(row["n"] for row in rows) == ["1", "2"]
    assert (
        "weight decay 0.1" in rows[1]["configuration"]
        and "weight decay none" in rows[0]["configuration"]
    )


def test_a_folder_of_images_is_known_by_its_last_name(tmp_path):
    for i, place in enumerate(("/home/a/flowers", "/data/flowers", "/data/birds")):
        run_folder(tmp_path / str(i), seed=i, dataset="folder", data_dir=place)
    rows = checked(report(tmp_path, tmp_path)[0]).table("configuration")
    assert [(row["configuration"].split(" ", 1)[1], row["n"]) for row in rows] == [
        ("birds", "1"),
        ("flowers", "2"),
    ]


def test_accuracy_against_delta_and_sharpness_has_one_point_a_configuration(tmp_path):
    for lr in (0.05, 0.1):
        for batch in (8, 64):
            for seed in range(2):
                value = lr / batch + 0.001 * seed
                run_folder(tmp_path / f"{lr}-{batch}-{seed}", lr=lr, batch_size=batch, seed=seed,
                           files={"sharpness.json": sharpness_file({0.01: value}),
                               "summary.json": {"final_test_acc": lr + batch / 100 + seed / 50}})  # fmt: skip
    found = figures_of(tmp_path)
    expected = {}
    for lr in (0.05, 0.1):
        for batch in (8, 64):
            a = lr + batch / 100
            expected[lr / batch**0.5] = (
                (100 * a, 100 * (a + 0.02)),
                (lr / batch, lr / batch + 0.001),
            )
    for name, which in (("smoothing-1-accuracy-delta", 0), ("sharpness-1-c-sharpness-delta", 1)):
        curves = found[name].panels[0].curves
        marks = sorted((m.x, m.y) for c in curves for m in c.marks)
        bars = sorted(bar for c in curves for bar in c.bars)
        assert len(marks) == 4
        for (x, y), (at, low, high), (delta, spans) in zip(
            marks, bars, sorted(expected.items()), strict=True
        ):
            assert x == at == pytest.approx(delta)
            assert (y, low, high) == pytest.approx((statistics.fmean(spans[which]), *spans[which]))
    page_ = checked(report(tmp_path, tmp_path)[0])
    assert "Sharpness, ρ 0.01 (adaptive m_apgd_linf, train images)" in page_.words


def pictures(figure: heat.HeatMap) -> tuple[chart.Picture, list[chart.Path]]:
    """(the colours of a map's cells, what covers those that have none)"""
    shapes = page.drawn(figure).shapes
    (cells,) = [s for s in shapes if isinstance(s, chart.Picture) and s.columns > 1]
    covers = [s for s in shapes if isinstance(s, chart.Path) and s.fill and s.opacity == 1]
    return cells, covers


def test_noise_by_layer_is_a_map_of_layers_over_updates(tmp_path):
    for seed in range(2):
        layers_folder(tmp_path / str(seed), seed=seed)
    figure = figures_of(tmp_path)["layers-1"]
    assert [row.name for row in figure.rows] == ["stem", "stages.1.0.convolution", "head"]
    assert figure.times == (0, 50, 100) and figure.span == (0, 150)
    # the mean over seeds of 1 and 2 times 10^(layer - measurement)
    assert figure.rows[0].values == pytest.approx((1.5, 0.15, 0.015))
    assert figure.rows[1].values == pytest.approx((15, 1.5, 0.15))
    assert figure.rows[2].values == pytest.approx((0, 15, 1.5))
    assert figure.ends == pytest.approx((0.015, 15))
    cells, covers = pictures(figure)
    levels = [cells.levels[i : i + cells.columns] for i in range(0, 3 * cells.columns, 240)]
    third = cells.columns // 3
    # three powers of ten are the whole ramp
    assert levels[0] == bytes([170] * third + [85] * third + [0] * third)
    assert levels[1] == bytes([255] * third + [170] * third + [85] * third)
    assert levels[2][third:] == bytes([255] * third + [170] * third)
    (cover,) = covers  # of the last layer, in the first third
    (left, top), _, (right, bottom), _ = cover.points
    assert (left, right) == pytest.approx((cells.x, cells.x + cells.width / 3))
    assert (top, bottom) == pytest.approx((cells.y + cells.height * 2 / 3, cells.y + cells.height))
    found = checked(report(tmp_path, tmp_path)[0])
    assert "at update 0: stages.1.0.convolution 91 %, stem 9 %, head 0 %" in found.words
    assert "at update 100: head 90 %, stages.1.0.convolution 9 %, stem 1 %" in found.words
    assert "stages.1.0.convolution: C² 15 at update 0, 0.15 at update 100" in found.words


def test_a_map_is_of_the_updates_that_all_finished_seeds_have(tmp_path):
    layers_folder(tmp_path / "0", seed=0)
    layers_folder(tmp_path / "1", seed=1, updates=(0, 50))
    layers_folder(tmp_path / "2", seed=2, updates=(0, 50, 100, 150), state="running")
    figure = figures_of(tmp_path)["layers-1"]
    assert figure.times == (0, 50) and figure.rows[0].values == pytest.approx((1.5, 0.15))
    for seed in range(2):
        shutil.rmtree(tmp_path / str(seed))
    layers_folder(tmp_path / "3", seed=3, updates=(0,), state="diverged")
    figure = figures_of(tmp_path)["layers-1"]  # of the one that came furthest
    assert figure.times == (0, 50, 100, 150) and figure.rows[0].values[0] == 3


def test_maps_of_several_configurations_share_their_colours(tmp_path):
    for i in range(10):
        layers_folder(tmp_path / str(i), lr=0.1 * (i + 1), seed=i)
    found = [f for name, f in figures_of(tmp_path).items() if name.startswith("layers")]
    assert len(found) == 8
    assert {f.ends for f in found} == {(0.01, 80.0)}
    assert [f.heading for f in found][:2] == ["lr 0.1", "lr 0.2"]
    assert "2 other configurations not drawn." in checked(report(tmp_path, tmp_path)[0]).words


def test_time_is_divided_evenly_and_a_measurement_holds_until_the_next():
    row = heat.Row("a", (1.0, 2.0, None, 4.0, 8.0))
    # of 400 updates, which end 200 after the last
    figure = heat.HeatMap("a", "a", "a", "a", (0, 1, 100, 101, 200), (row,), (1.0, 8.0))
    assert figure.span == (0, 299)
    values = heat.in_columns(figure, row)
    assert len(values) == 240
    expected = []
    for i in range(240):
        begins, ends = 299 * i / 240, 299 * (i + 1) / 240
        within = [v for t, v in zip(figure.times, row.values, strict=True) if begins <= t < ends]
        if not within:
            within = [[v for t, v in zip(figure.times, row.values, strict=True) if t < ends][-1]]
        known = [v for v in within if v is not None]
        expected.append(sum(known) / len(known) if known else None)
    assert values == expected
    assert values[:2] == [1.5, 2.0] and values[80:82] == [None, 4.0] and values[-1] == 8.0


@pytest.mark.parametrize("layers", [None, "{", {"layers": 3}, {"layers": [{"name": 1}] * 3}])
def test_layers_without_names_are_numbered(tmp_path, layers):
    folder = layers_folder(tmp_path / "r")
    (folder / "layers.json").unlink()
    if layers is not None:
        (folder / "layers.json").write_text(
            layers if isinstance(layers, str) else json.dumps(layers)
        )
    figure = figures_of(tmp_path)["layers-1"]
    assert [row.name for row in figure.rows] == ["layer 1", "layer 2", "layer 3"]


def test_rows_with_other_layers_than_the_first_are_left_out(tmp_path):
    folder = layers_folder(tmp_path / "r")
    with (folder / "metrics.jsonl").open("a") as file:
        for wrong in ([1.0], [], "abc", None, [1.0] * 5):
            file.write(json.dumps({"kind": "measure", "step": 120, "layer_c2": wrong}) + "\n")
        words = {"kind": "measure", "step": 150, "layer_c2": ["x", {}, 1e-3]}
        file.write(json.dumps(words) + "\n")
    figure = figures_of(tmp_path)["layers-1"]
    assert figure.times == (0, 50, 100, 150)
    assert [row.values[-1] for row in figure.rows] == [None, None, 1e-3]


def test_the_critical_batch_is_circled_and_theory_squared(tmp_path):
    for batch in (16, 32, 64, 128, 256):
        for seed in range(2):
            critical_folder(tmp_path / f"{batch}-{seed}", batch, seed, c2=150.0)
    found = figures_of(tmp_path)
    curves = found["critical-1-sfo"].panels[0].curves
    marks = [m for c in curves for m in c.marks]
    (circle,) = [m for m in marks if m.shape == "circle"]
    # 62.5 rounds to even
    assert circle.x == 64 and circle.y == pytest.approx(statistics.fmean((64 * 62, 64 * 63)))
    (square,) = [m for m in marks if m.shape == "square"]
    theory = 1 * 0.1 * 150 / 0.5**2  # kappa of SGD, lr, C^2, eps^2
    assert square.x == pytest.approx(theory) == pytest.approx(60)
    found = {
        (batch, seed): json.loads((tmp_path / f"{batch}-{seed}" / "critical.json").read_text())
        for batch in (32, 64)
        for seed in range(2)
    }
    low, high = (
        batch
        * statistics.fmean(found[batch, seed]["crossings"]["0.5"]["step"] for seed in range(2))
        for batch in (32, 64)
    )
    assert (
        square.y == pytest.approx(low * (high / low) ** math.log2(theory / 32))
        and "150" in square.tip
    )
    rows = checked(report(tmp_path, tmp_path)[0]).table("runs, ε")
    assert {row["runs, ε"]: row["b*"] for row in rows} == {"ε 0.1": "\u2013", "ε 0.5": "64"}


def test_a_censored_crossing_is_a_ring_and_in_no_mean(tmp_path):
    for batch in (16, 32, 64, 128):
        critical_folder(tmp_path / f"{batch}", batch, 0)
    path = tmp_path / "128" / "critical.json"
    found = json.loads(path.read_text())
    found["crossings"]["0.5"]["censored"] = True
    path.write_text(json.dumps(found))
    for name in ("critical-1-steps", "critical-1-sfo"):
        curves = figures_of(tmp_path)[name].panels[0].curves
        assert all(x != 128 for c in curves for x, _ in c.line)
        (ring,) = [m for c in curves for m in c.marks if m.x == 128]
        assert ring.shape == "ring" and "at most" in ring.tip
    assert "censored, and in no mean, at batch 128" in checked(report(tmp_path, tmp_path)[0]).words


def test_no_square_where_no_gradient_variance_is_known_and_an_open_one_where_it_was_sampled(
    tmp_path,
):
    for batch in (16, 32, 64, 128):
        critical_folder(tmp_path / "runs" / f"{batch}", batch, 0)
    shapes = {
        m.shape
        for c in figures_of(tmp_path / "runs")["critical-1-sfo"].panels[0].curves
        for m in c.marks
    }
    assert shapes == {"dot", "circle"}
    noise_folder(tmp_path / "noise", 32)
    shapes = {
        m.shape for c in figures_of(tmp_path)["critical-1-sfo"].panels[0].curves for m in c.marks
    }
    assert shapes == {"dot", "circle", "open-square"}


def test_the_noise_norm_falls_along_the_dashed_half_slope(tmp_path):
    for batch in (8, 32, 128):
        for seed in range(2):
            noise_folder(tmp_path / f"{batch}-{seed}", batch, seed)
    guide, measured = figures_of(tmp_path)["noise-norm"].panels[0].curves
    assert guide.dash and guide.label == "slope −½"
    for (at, value), batch in zip(measured.line, (8, 32, 128), strict=True):
        assert (at, value) == pytest.approx((batch, 8 / batch**0.5 * 1.005))
    assert guide.line[0][1] / guide.line[1][1] == pytest.approx(4)
    for (at, low, high), batch in zip(measured.bars, (8, 32, 128), strict=True):
        seeds = [8 / batch**0.5 * (1 + 0.01 * seed) for seed in range(2)]
        error = statistics.stdev(seeds) / math.sqrt(2)  # over seeds
        assert (at, low, high) == pytest.approx(
            (batch, statistics.fmean(seeds) - error, statistics.fmean(seeds) + error)
        )
    names = set(figures_of(tmp_path))
    assert {"noise-1-histogram", "noise-1-qq", "noise-1-tail"} <= names


def test_one_seeds_noise_has_the_error_of_its_draws(tmp_path):
    for batch in (8, 32):
        noise_folder(tmp_path / str(batch), batch)
    for name, value, error in (("noise-norm", 8 / 8**0.5, 0.01), ("noise-c2", 64.0, 2.0)):
        curve = figures_of(tmp_path)[name].panels[0].curves[-1]
        assert curve.bars[0] == pytest.approx((8, value - error, value + error))


def test_the_table_of_noise_has_every_error_that_the_run_found(tmp_path):
    noise_folder(tmp_path / "run", 8)
    cells = dict(noise.summary(groups.group([read_run(tmp_path / "run")])[0]))
    assert (
        cells["‖m − ∇f‖"][1] == 0.01
        and cells["‖∇f‖"] == (0.4, 0.02)
        and cells["c2_sampled"] == (64.0, 2.0)
    )


def test_the_histogram_is_a_density_in_standard_deviations(tmp_path):
    edges, sd = [0.5, 1.0, 2.0, 4.0], 2.0
    found = {"variance": {"value": sd**2}, "zeros": 0, "histogram": {"edges": edges,
        "positive": [10, 20, 0], "negative": [30, 20, 20]}}  # fmt: skip
    run_folder(tmp_path / "r", mode="sampling", files={"noise.json": {"points": [{"batch_size": 8,
        "step": 1, "noise_norm": 1.0, "statistics": found}]}})  # fmt: skip
    curve = figures_of(tmp_path)["noise-1-histogram"].panels[0].curves[0]
    expected = [
        (-1.5, 20 / 100 / 1),
        (-0.75, 20 / 100 / 0.5),
        (-0.375, 30 / 100 / 0.25),
        (0.375, 10 / 100 / 0.25),
        (0.75, 20 / 100 / 0.5),
    ]
    # an empty bin has no logarithm
    assert list(curve.line) == [pytest.approx(point) for point in expected]


# What is damaged or not done


def test_torn_lines_nan_rows_and_damaged_files_are_counted_and_shown(tmp_path):
    broken = epoch_rows(CONFIG, 6)
    broken[2] |= {"test_acc": float("nan"), "train_loss": float("inf")}
    run_folder(tmp_path / "r" / "bad", rows=broken, tail='[1]\nnot json\n{"kind": "ep',
    files={"summary.json": "{", "noise.json": "[]"})  # fmt: skip
    run_folder(tmp_path / "r" / "good", seed=1)
    found = checked(report(tmp_path, tmp_path / "r")[0])
    assert (
        "3 torn lines, the NaN or infinite values of 1 row, 2 files that cannot be read"
        in found.words
    )
    row = next(r for r in found.table("run") if r["run"] == "bad")
    for words in (
        "3 torn lines",
        "1 row with NaN or infinity",
        "summary.json cannot be read",
        "noise.json cannot",
    ):
        assert words in row["remarks"]
    line = figures_of(tmp_path / "r")["training-1-epochs"].panels[0].curves[0].line
    assert [x for x, _ in line] == [1, 2, 4, 5, 6]  # a mean of one seed alone would jump


@pytest.mark.parametrize("lacking", [0, 1])
def test_an_epoch_that_one_seed_lacks_is_in_no_mean(tmp_path, lacking):
    for seed in range(2):
        rows = epoch_rows(CONFIG | {"seed": seed}, 6)
        run_folder(
            tmp_path / str(seed), seed=seed, rows=rows[:3] + rows[4:] if seed == lacking else rows
        )
    curve = figures_of(tmp_path)["training-1-epochs"].panels[0].curves[0]
    assert [x for x, _ in curve.line] == [1, 2, 3, 5, 6]


def test_a_configuration_without_finished_runs_is_named_once(tmp_path):
    for seed in range(3):
        run_folder(tmp_path / f"a-{seed}", seed=seed, state="running", epochs=2 + seed)
        run_folder(tmp_path / f"b-{seed}", seed=seed, method="lr")
    curves = figures_of(tmp_path)["training-1-epochs"].panels[0].curves
    assert sorted((c.label, len(c.line)) for c in curves if c.label) == [
        ("method constant", 4),
        ("method lr", 6),
    ]


def test_runs_that_are_not_done_are_shown_as_such_and_in_no_mean(tmp_path):
    run_folder(tmp_path / "r" / "a", seed=0)
    run_folder(tmp_path / "r" / "b", seed=1, state="running", epochs=3)
    run_folder(tmp_path / "r" / "c", seed=2, state="diverged", reason="loss is nan", epochs=2)
    run_folder(tmp_path / "r" / "d", seed=3, state="failed", epochs=4)
    run_folder(tmp_path / "r" / "e", seed=4, files={"status.json": "{"})
    found = checked(report(tmp_path, tmp_path / "r")[0])
    row = found.table("configuration")[0]
    assert row["n"] == "1" and row["not done"] == "1 diverged, 1 failed, 1 running, 1 unknown"
    final = json.loads((tmp_path / "r" / "a" / "metrics.jsonl").read_text().splitlines()[-1])[
        "test_acc"
    ]
    assert row["final accuracy, %"] == f"{100 * final:.2f}"
    assert {r["run"]: r["state"] for r in found.table("run")} == dict(
        a="done", b="running", c="diverged", d="failed", e="unknown"
    )
    assert (
        "1 diverged, 1 failed, 1 running, 1 unknown: not in any mean." in found.words
        and "loss is nan" in found.words
    )
    curves = figures_of(tmp_path / "r")["training-1-epochs"].panels[0].curves
    ends = {
        c.marks[0].tip.rsplit(" ", 1)[-1]: (c.marks[0].shape, c.marks[0].x)
        for c in curves
        if c.dash
    }
    assert ends == {
        "running": ("ring", 3),
        "diverged": ("cross", 2),
        "failed": ("cross", 4),
        "unknown": ("ring", 6),
    }


def test_files_of_any_shape_stop_nothing(tmp_path):
    values = [None, "x", 1e400, -1, 0, True, [], {}, 10**400]
    for i, value in enumerate(values):
        rows = epoch_rows(CONFIG, 3)
        rows[1] |= dict.fromkeys(("epoch", "test_acc", "lr", "delta", "step", "batch_size"), value)
        files = {"summary.json": {"final_test_acc": value, "updates": value},
            "critical.json": {"crossings": value, "batch_size": value},
                 "noise.json": {"points": [value, {"batch_size": value, "statistics": value,
                     "noise_norm": value}, {"batch_size": 8, "noise_norm": 1.0,
                         "statistics": {"variance": {"value": 1.0}, "histogram": value,
                             "qq": {"normal": value}, "hill": [value]}}]},
                 "sharpness.json": {"results": [value, {"rho": value, "value": value}]},
                     "status.json": {"state": "done", "reason": value}}  # fmt: skip
        for mode in ("normal", "sampling", "critical"):
            run_folder(tmp_path / "r" / f"{i}-{mode}", rows=rows, files=files, lr=value,
            batch_size=value, mode=mode, c2=value, beta=value)  # fmt: skip
            checked(report(tmp_path, tmp_path / "r" / f"{i}-{mode}")[0])
    checked(report(tmp_path, tmp_path / "r")[0])


# Markup


def test_hostile_names_and_values_are_text_on_the_page_in_svg_and_in_file_names(tmp_path):
    names = [
        "<script>alert(1)<",
        "\" onload='x' y=\"",
        "]]> --> </style>",
        "a\nb\x1b[31m",
        "n" * 250,
        "&amp;",
        "url(x)",
    ]
    for i, value in enumerate(HOSTILE):
        settings = {
            "model": value,
            "method": value,
            "dataset": value,
            "norm": value,
            "weight_decay": value,
        }
        folder = tmp_path / "r" / names[i % len(names)] / str(i)
        run_folder(folder, state=value, reason=value, **settings)
        run_folder(folder / "done", optimizer=value, batch_size=8 + i,
        files={"sharpness.json": {"results": [{"algorithm": value, "split": value, "rho": 0.1,
            "value": 1.0}]}}, **settings)  # fmt: skip
        critical_folder(folder / "critical", 8 * 2**i, 0, **{value: value}, c2=1.0)
        noise_folder(folder / "noise", 8 * 2**i, **settings)
    markup, figures = report(tmp_path, tmp_path / "r")
    found = checked(markup)
    assert "<script>alert(1)</script>" in found.words and "<script" not in markup
    assert "x" * 300 not in markup and "\ud800" not in markup
    assert len(figures) > 10
    for path in figures:
        assert re.fullmatch(r"[a-z0-9-]+\.svg", path.name)
        assert all(
            len(t.text or "") < 400 for t in checked_svg(path).iter() if not t.tag.endswith("style")
        )
    written = {p.relative_to(tmp_path / "out").parts[0] for p in (tmp_path / "out").rglob("*")}
    assert written == {"report.html", "figures"}
    for i, value in enumerate(HOSTILE):  # alone, where it is the title of the page
        run_folder(tmp_path / f"alone-{i}", model=value, dataset=value)
        checked(report(tmp_path, tmp_path / f"alone-{i}")[0])


def test_page_and_figures_of_every_kind_are_strict_and_the_same_bytes_again(tmp_path):
    root = everything(tmp_path / "r")
    markup, figures = report(tmp_path, root)
    found = checked(markup)
    names = {path.stem for path in figures}
    assert {
        "training-1-epochs",
        "training-1-updates",
        "smoothing-1-accuracy-delta",
        "critical-1-steps",
    } <= names
    assert {
        "critical-1-sfo",
        "noise-norm",
        "noise-c2",
        "noise-1-histogram",
        "noise-1-qq",
        "noise-1-tail",
    } <= names
    for path in figures:
        assert float(checked_svg(path).attrib["width"]) > 0
    assert len({e["id"] for _, e in found.elements if "id" in e}) == sum(
        "id" in e for _, e in found.elements
    )
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    report(tmp_path, root)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_figures_in_files_say_what_their_letters_stand_for(tmp_path):
    """On the page the section's legend does; a file stands alone."""
    for i in range(3):
        run_folder(tmp_path / "r" / str(i), model=f"a model with a rather long name, number {i}")
    markup, (epochs, _) = report(tmp_path, tmp_path / "r")
    texts = [
        (t.text, float(t.attrib["y"]))
        for t in checked_svg(epochs).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert [text for text, _ in texts].count("A") == 3  # beside two lines, and in the legend
    for key, i in zip("ABC", range(3), strict=True):
        name = f"a model with a rather long name, number {i}"
        assert {y for text, y in texts if text == name} <= {y for text, y in texts if text == key}
        assert (name in {text for text, _ in texts}) and f">{name}</text>" not in markup
    bottom = max(y for _, y in texts)
    assert bottom < float(checked_svg(epochs).attrib["height"])


def test_series_of_parted_plots_are_called_by_their_values_where_names_have_no_room(tmp_path):
    """Their legend names colours, and knows no letters."""
    for lr in (0.01, 0.1):
        for batch in (1000, 2000, 4000, 8000, 16000):
            run_folder(tmp_path / f"{lr}-{batch}", lr=lr, batch_size=batch)
    for number in (1, 2):
        figure = figures_of(tmp_path)[f"training-{number}-epochs"]
        beside = {
            narrow: {s.text for s in page.drawn(figure, narrow).shapes if getattr(s, "bold", False)}
            for narrow in (False, True)
        }
        assert {"batch 1000", "batch 16000"} <= beside[False]
        assert {"1000", "16000"} <= beside[True] and not {"A", "J"} & beside[True]
    legend = re.findall(r'<b class="key">(.*?)</b> (batch \d+)</li>', report(tmp_path, tmp_path)[0])
    assert legend == [("", f"batch {batch}") for batch in (1000, 2000, 4000, 8000, 16000)]


def test_settings_without_effect_are_not_said_of_all_runs(tmp_path):
    for seed, lr in enumerate((0.1, 0.2)):
        run_folder(tmp_path / "sgd" / str(seed), lr=lr, power=0.7, gamma=0.6)
        run_folder(
            tmp_path / "qhm" / str(seed),
            lr=lr,
            optimizer="qhm",
            method="poly",
            power=0.7,
            gamma=0.6,
        )
    all_sgd, all_qhm = (
        re.search(r"All runs: (.*?)\.<", report(tmp_path, tmp_path / name)[0])[1]
        for name in ("sgd", "qhm")
    )
    assert [name for name in ("beta", "nu", "power", "gamma") if name in all_sgd] == []
    assert [name for name in ("beta 0.9", "nu 1", "power 0.7", "gamma") if name in all_qhm] == [
        "beta 0.9",
        "nu 1",
        "power 0.7",
    ]


def test_a_single_run_is_shown(tmp_path):
    run_folder(tmp_path / "one", files={"sharpness.json": sharpness_file({0.01: 0.2})})
    found = checked(report(tmp_path, tmp_path / "one")[0])
    assert (
        len(found.table("configuration")) == 1
        and "±" not in found.table("configuration")[0]["final accuracy, %"]
    )
    assert (
        "resnet8 on digits" in found.words
        and "Each line is one run" in found.words
        and "1 runs" not in found.words
    )
    assert not any(
        c.label for f in figures_of(tmp_path / "one").values() for c in f.panels[0].curves
    )


def test_150_runs_of_200_epochs_make_a_small_page(tmp_path):
    for lr in range(10):
        for batch in (8, 16, 32, 64, 128):
            for seed in range(3):
                run_folder(tmp_path / "r" / f"{lr}-{batch}-{seed}", epochs=200, lr=0.01 * (lr + 1),
                batch_size=batch, seed=seed)  # fmt: skip
    markup, figures = report(tmp_path, tmp_path / "r")
    assert len(markup.encode()) < 2_000_000 and sum(f.stat().st_size for f in figures) < 2_000_000
    assert len(checked(markup).table("configuration")) == 50


def test_names_without_room_are_left_out_and_none_is_written_over_another():
    for count in (5, 12, 40):
        curves = tuple(
            chart.Curve("c0", ((0.0, 1.0), (1.0, 1.0 + i % 3)), label=f"series {i}")
            for i in range(count)
        )
        drawing = chart.draw(
            chart.Figure("f", "t", "x", (chart.Panel("y", curves, height=160),)), page.WIDE, 150
        )
        heights = sorted(
            s.y for s in drawing.shapes if isinstance(s, chart.Text) and s.text.startswith("series")
        )
        assert len(heights) == (0 if count == 40 else count)
        assert all(b - a >= chart.LINE - 1e-6 for a, b in pairwise(heights))


# Files


@pytest.mark.parametrize("low", [0.0, 79.4, -3e-5])
@pytest.mark.parametrize("span", [860.0, 1.0, 2.4e-7, 31.0])
@pytest.mark.parametrize("most", [1, 4, 8])
def test_an_axis_has_two_numbers_at_least(low, span, most):
    """There was one, 500, on an axis from 80 to 940."""
    values = chart.ticks(low, low + span, False, most)
    assert 2 <= len(values) <= max(most, 4)
    assert all(low - 1e-9 * span <= v <= low + (1 + 1e-9) * span for v in values)


def test_pdf_figures_are_written_and_the_same_bytes_again(tmp_path):
    pytest.importorskip("matplotlib")
    run_folder(tmp_path / "r", model="$\\frac{")
    report(tmp_path, tmp_path / "r")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out" / "figures").glob("*.pdf")}
    assert set(before) == {"training-1-epochs.pdf", "training-1-updates.pdf"}
    assert all(
        b.startswith(b"%PDF-") and b.rstrip().endswith(b"%%EOF") and len(b) > 2000
        for b in before.values()
    )
    report(tmp_path, tmp_path / "r")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out" / "figures").glob("*.pdf")} == before


def test_without_matplotlib_one_line_says_so_and_svg_is_written(tmp_path):
    run_folder(tmp_path / "r")
    code = (
        "import sys; sys.modules['matplotlib'] = None\nfrom fastsmooth.report.__main__ import "
        "main\nsys.exit(main())"
    )
    told = subprocess.run([sys.executable, "-c", code, tmp_path / "r", "--out", tmp_path / "out"],
    capture_output=True, text=True, check=True)  # fmt: skip
    assert (
        told.stderr
        == "fastsmooth: no PDF figures without matplotlib: pip install 'fastsmooth[plot]'\n"
    )
    assert "(SVG in" in told.stdout
    assert {p.suffix for p in (tmp_path / "out").rglob("*") if p.is_file()} == {".svg", ".html"}


@pytest.mark.parametrize(
    "case", ["missing", "a file", "empty", "damaged config", "config is a list", "no runs", "flag"]
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, case):
    path = tmp_path / "in\nput"
    if case == "a file":
        path.write_text("x")
    elif case not in ("missing", "no runs", "flag"):
        path.mkdir()
    if "config" in case:
        (path / "config.json").write_text("[1]" if "list" in case else '{"lr":')
    run_folder(tmp_path / "good")
    asked = {"no runs": [], "flag": [str(tmp_path / "good"), "--nonsense"]}.get(
        case, [str(tmp_path / "good"), str(path)]
    )
    assert main([*asked, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert not told.out and told.err.count("\n") == 1 and told.err.startswith("fastsmooth: error: ")
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written_is_one_line(tmp_path, capsys):
    run_folder(tmp_path / "r")
    (tmp_path / "file").write_text("x")
    assert main([str(tmp_path / "r"), "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and (tmp_path / "file").read_text() == "x"


# In a browser

CHROMIUM = shutil.which("chromium", path="/usr/bin") or shutil.which(
    "google-chrome", path="/usr/bin"
)
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
QUIET += [
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
]
LAID_OUT = """(() => {
  const found = [];
  for (const svg of document.querySelectorAll("figure svg")) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;
    const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([a, r], i) => {
      if (r.left < frame.left - 1 || r.right > frame.right + 1 || r.bottom > frame.bottom + 1)
        found.push(svg.ariaLabel + ": outside: " + a);
      for (const [b, s] of texts.slice(0, i))
        if (Math.min(r.right, s.right) - Math.max(r.left, s.left) > 1 && Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top) > 1)
          found.push(svg.ariaLabel + ": " + b + " over " + a);
    });
  }
  for (const sd of document.querySelectorAll("td .sd")) {
    const value = document.createRange();
    value.selectNode(sd.previousSibling);
    const [v, r] = [value.getBoundingClientRect(), sd.getBoundingClientRect()];
    if (r.width && (r.left - v.right > 8 || r.top > v.bottom)) found.push("apart: " + sd.parentNode.textContent);
  }
  for (const table of document.querySelectorAll(".table"))
    if (innerWidth < 640 && table.scrollWidth > table.clientWidth + 1) found.push("wide: " + table.textContent.slice(0, 40));
  const light = color => {
    const [r, g, b] = color.match(/[0-9.]+/g).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const ground = light(getComputedStyle(document.documentElement).backgroundColor);
  const contrast = color => Math.max(light(color), ground) / Math.min(light(color), ground);
  for (const text of document.querySelectorAll("figure svg text"))
    if (contrast(getComputedStyle(text).fill) < 4.5) found.push("pale: " + text.textContent);
  for (const line of document.querySelectorAll("figure svg path[class^='s-c'], figure svg path[class^='s-o']"))
    if (contrast(getComputedStyle(line).stroke) < 4.5) found.push("pale: " + line.getAttribute("class"));
  const shown = [...document.querySelectorAll("figure svg")].filter(s => s.getBoundingClientRect().width).length;
  const page = document.documentElement;
  return JSON.stringify({found, shown, figures: document.querySelectorAll("figure").length, width: page.scrollWidth,
    screen: innerWidth, height: page.scrollHeight, paper: getComputedStyle(page).backgroundColor});
})()"""


class Browser:
    """Headless Chromium, spoken to through its debugging pipe; remembers every event."""

    def __init__(self, profile: Path):
        self.events, self.count, self.rest = [], 0, b""
        theirs_in, self.to = os.pipe()
        self.back, theirs_out = os.pipe()
        a, b = (fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs_in, theirs_out))
        start = f'exec "$0" "$@" 3<&{a} 4>&{b}'
        asked = [
            "bash",
            "-c",
            start,
            CHROMIUM,
            *QUIET,
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        self.process = subprocess.Popen(
            asked, pass_fds=(a, b), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for fd in (a, b, theirs_in, theirs_out):
            os.close(fd)
        self.session = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def read(self) -> dict:
        while b"\0" not in self.rest:
            chunk = os.read(self.back, 1 << 20)
            assert chunk, "Chromium ended"
            self.rest += chunk
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def ask(self, method: str, **params) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        os.write(
            self.to,
            json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode()
            + b"\0",
        )
        while (answer := self.read()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path, width: int, scheme: str) -> tuple[dict, bytes]:
        """(what LAID_OUT says, a screenshot of the whole page)."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.ask(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        before = len(self.events)
        self.ask("Page.navigate", url=path.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events[before:]):
            self.events.append(self.read())
        said = json.loads(self.ask("Runtime.evaluate", expression=LAID_OUT)["result"]["value"])
        return said, base64.b64decode(
            self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        )

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("neither chromium nor google-chrome is in /usr/bin")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def grid_of(root: Path) -> Path:
    """Nine configurations and more: plots parted, in ordered colours, with many names."""
    for lr in (0.01, 0.05, 0.1, 0.5):
        for batch in (8, 16, 64, 256, 1024):
            for optimizer in ("sgd", "shb"):
                run_folder(
                    root / f"{optimizer}-{lr}-{batch}", lr=lr, batch_size=batch, optimizer=optimizer
                )
    return root


def long_names(root: Path) -> Path:
    for i in range(12):
        run_folder(root / str(i), model=f"WWWW<{i}>" + "m" * 3 * i, method=f"q{i}" * 9,
        norm="x" * 10_000, lr=10.0**-i, batch_size=3**i)  # fmt: skip
    return root


@pytest.mark.parametrize("runs", [everything, grid_of, long_names])
def test_a_browser_shows_the_page_whole_and_asks_for_nothing(tmp_path, browser, runs):
    image = pytest.importorskip("PIL.Image")
    report(tmp_path, runs(tmp_path / "r"))
    first = len(browser.events)
    for width in (1280, 360):
        for scheme, paper in (("light", (255, 255, 255)), ("dark", (21, 24, 28))):
            said, png = browser.open(tmp_path / "out" / "report.html", width, scheme)
            assert said["found"] == []
            assert said["shown"] == said["figures"] > 1
            assert said["width"] <= said["screen"] == width
            assert said["paper"] == f"rgb{paper}"
            shot = image.open(io.BytesIO(png)).convert("RGB")
            colors = {color: count for count, color in shot.getcolors(1 << 24)}
            assert shot.width == width and shot.height == said["height"] > 900
            assert (
                len(colors) > 50
                and 0.02 < 1 - colors.get(paper, 0) / (shot.width * shot.height) < 0.8
            )
    events = browser.events[first:]
    asked = [
        e["params"]["request"]["url"]
        for e in events
        if e.get("method") == "Network.requestWillBeSent"
    ]
    loaded = {address for address in asked if not address.startswith(PNG)}
    assert loaded == {(tmp_path / "out" / "report.html").as_uri()}
    complaints = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert [e for e in events if e.get("method") in complaints] == []
