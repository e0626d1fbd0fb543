"""Runs compared: the rows of load_runs and of --csv against the runs' files, --table against
statistics of metrics.jsonl by NumPy."""

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from said import refused, said, seen
from test_report import (
    CONFIG,
    HOSTILE,
    critical_folder,
    epoch_rows,
    everything,
    noise_folder,
    run_folder,
)

import fastsmooth as fs
from fastsmooth.cli.config import FIELDS
from fastsmooth.report import runs as report_runs
from fastsmooth.report.__main__ import main
from fastsmooth.train import main as train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of the digits, two of which differ in their seed alone."""
    root = tmp_path_factory.mktemp("trained")
    flags = ["--epochs", "2", "--norm", "group", "--track-noise", "every=5", "--log-every", "5"]
    flags += ["--batchsize", "256", "--lr"]
    for name, more in {"a-0": ["0.1"], "a-1": ["0.1", "--seed", "1"], "b-0": ["0.2"]}.items():
        assert train([*flags, *more, "--out", str(root / name)]) == 0
    return root


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every kind and in every state."""
    return everything(tmp_path_factory.mktemp("many"))


def parsed(folder: Path) -> tuple[dict, dict, list[dict]]:
    """config, summary and the rows of a run, by the json module alone."""
    files = (folder / "config.json", folder / "summary.json")
    config, summary = (json.loads(path.read_text()) for path in files)
    return config, summary, parsed_rows(folder)


def parsed_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_csv(*argv: str) -> list[dict[str, str]]:
    found = said(main, [*argv, "--csv"])
    assert found.code == 0 and not found.err
    return list(csv.DictReader(io.StringIO(found.out, newline=""), strict=True))


# load_runs


def test_a_row_holds_what_the_files_of_the_run_say(trained):
    rows = {row["run"]: row for row in fs.load_runs(trained)}
    assert list(rows) == ["a-0", "a-1", "b-0"]
    for name, row in rows.items():
        config, summary, written = parsed(trained / name)
        assert (
            row["state"] == "done" and row["remarks"] == "" and row["path"] == str(trained / name)
        )
        settings = config.keys() - report_runs.KEEPING
        assert settings == FIELDS.keys() - report_runs.KEEPING and len(settings) > 70
        for key in settings - {"eps", "steps"}:
            assert row[key] == config[key], key
        assert row["eps"] == "0.5" and row["steps"] == " ".join(map(str, config["steps"]))
        assert summary.keys() - row.keys() == set()
        for key in summary.keys() - {"epochs"}:
            assert row[key] == summary[key], key
        assert row["epochs_done"] == summary["epochs"] == 2
        epochs = [r for r in written if r["kind"] == "epoch"]
        assert row["final_train_loss"] == epochs[-1]["train_loss"]
        assert row["train_seconds"] == pytest.approx(sum(r["train_seconds"] for r in epochs))
        assert [row["delta_start"], row["delta_end"]] == [r["delta"] for r in epochs]
        noise = [r for r in written if r["kind"] == "measure"]
        assert len(noise) > 2 and row["measured_at_end"] == noise[-1]["step"] > 0
        for key in ("c2_sampled", "c2_sampled_se", "noise_scale", "k2", "delta_measured"):
            assert row[f"{key}_start"] == noise[0][key] and row[f"{key}_end"] == noise[-1][key]
    assert [row["configuration"] for row in rows.values()] == ["lr 0.1", "lr 0.1", "lr 0.2"]


@pytest.mark.parametrize("kind", ["epoch", "step", "measure"])
def test_rows_of_a_kind_are_those_of_metrics_jsonl_with_the_settings_that_differ(trained, kind):
    found = fs.load_runs(trained / "b-0", str(trained / "a-1"), rows=kind)
    expected = []
    for name, lr, seed in (("a-1", 0.1, 1), ("b-0", 0.2, 0)):
        own = {"run": name, "configuration": f"lr {lr}", "state": "done"}
        own |= {"config_lr": lr, "config_seed": seed}
        expected += [own | row for row in parsed(trained / name)[2] if row["kind"] == kind]
    assert found == expected and len(found) >= 2
    assert list(found[0])[:3] == ["run", "configuration", "state"]


def test_pandas_takes_the_rows(trained, many):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(fs.load_runs(trained))
    means = frame.groupby("lr")["final_test_acc"].agg(["mean", "sem", "count"])
    accuracies = [parsed(trained / f"a-{seed}")[1]["final_test_acc"] for seed in (0, 1)]
    assert means.loc[0.1, "mean"] == pytest.approx(np.mean(accuracies))
    assert means.loc[0.1, "sem"] == pytest.approx(np.std(accuracies, ddof=1) / math.sqrt(2))
    assert means.loc[0.1, "count"] == 2 and frame["final_test_acc"].dtype == float
    epochs = pandas.DataFrame(fs.load_runs(trained, rows="epoch"))
    assert epochs.pivot(index="epoch", columns="run", values="test_acc").shape == (2, 3)
    rows = fs.load_runs(many)
    assert pandas.DataFrame(rows).shape == (len(rows), len(rows[0]))
    for kind in report_runs.KINDS:
        assert len(pandas.DataFrame(fs.load_runs(many, rows=kind))) >= 0


def test_every_row_has_all_keys_and_what_a_mode_measures(many):
    rows = {row["run"]: row for row in fs.load_runs(many)}
    assert (
        len(rows) == len(list(many.iterdir())) and len({tuple(row) for row in rows.values()}) == 1
    )
    torn = rows["running"]
    assert torn["state"] == "running" and "1 torn line" in torn["remarks"]
    assert torn["epochs_done"] == 3 and torn["final_test_acc"] > 0  # so far
    assert rows["diverged"]["remarks"] == "the loss is nan" and rows["diverged"]["updates"] == 90
    crossed = json.loads((many / "critical-16-1" / "critical.json").read_text())["crossings"]
    critical = rows["critical-16-1"]
    assert critical["eps_0.5_update"] == crossed["0.5"]["step"]
    assert critical["eps_0.5_samples"] == crossed["0.5"]["samples"]
    assert critical["eps_0.1_update"] is None and torn["eps_0.5_update"] is None
    assert critical["configuration"].startswith("critical: ")
    sampled = rows["noise-64"]
    assert sampled["noise_norm_end"] == 1.0 and sampled["c2_sampled_se_start"] == 2.0
    assert rows["lr-1"]["sharpness_adaptive_m_apgd_linf_rho_0.001_train"] == pytest.approx(0.11)


def test_no_setting_has_the_name_of_a_result():
    others = {*report_runs.HEADING, *report_runs.RESULTS, "remarks", "path"}
    others |= {f"{name}_{end}" for name in report_runs.CONSTANTS for end in report_runs.ENDS}
    assert not others & FIELDS.keys()


def test_a_damaged_run_is_left_out_with_a_warning_unless_it_is_named(tmp_path):
    run_folder(tmp_path / "r" / "good")
    run_folder(tmp_path / "r" / "bad", files={"config.json": '{"lr":'})
    with pytest.warns(UserWarning, match="bad is left out: its config.json is damaged") as told:
        (row,) = fs.load_runs(tmp_path / "r")
    assert row["run"] == "good" and len(told) == 1 and told[0].filename == __file__
    found = said(main, [str(tmp_path / "r"), "--csv"])
    assert found.code == 0 and len(found.out.splitlines()) == 2
    assert found.err.startswith("fastsmooth: warning: ") and "bad is left out" in found.err
    with pytest.raises(ValueError, match="bad is not a run folder"):
        fs.load_runs(tmp_path / "r" / "bad")
    run_folder(tmp_path / "s" / "bad", files={"config.json": "[1]"})
    with pytest.raises(ValueError, match=r"bad is left out.*there is no other run"):
        fs.load_runs(tmp_path / "s")
    damaged = run_folder(tmp_path / "t", files={"summary.json": "{", "status.json": "{"})
    (row,) = fs.load_runs(damaged)
    assert row["state"] == "unknown" and "summary.json cannot be read" in row["remarks"]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: fs.load_runs(), "load_runs: no path: name run folders"),
        (lambda: fs.load_runs("nowhere"), "nowhere: no such folder"),
        (lambda: fs.load_runs(".", rows="epochs"), "load_runs: rows 'epochs': did you mean epoch?"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_words(call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        call()
    assert "\n" not in str(caught.value)


# --csv


def test_csv_is_the_same_rows_with_every_digit(trained, many):
    for root in (trained, many):
        expected = fs.load_runs(root)
        found = read_csv(str(root))
        assert [list(row) for row in found] == [list(row) for row in expected]
        for row, other in zip(found, expected, strict=True):
            for key, value in other.items():
                if value is None:
                    assert row[key] == "", key
                elif isinstance(value, bool | str):
                    assert row[key] == str(value), key
                else:
                    assert float(row[key]) == value, key  # every bit
    row = next(row for row in read_csv(str(trained)) if row["run"] == "a-1")
    config, summary, written = parsed(trained / "a-1")
    assert int(row["seed"]) == config["seed"] == 1 and float(row["lr"]) == config["lr"]
    assert float(row["final_test_loss"]) == summary["final_test_loss"]
    last = [r for r in written if r["kind"] == "measure"][-1]
    assert float(row["c2_sampled_end"]) == last["c2_sampled"]


def test_csv_of_hostile_values_is_still_one_line_a_run(tmp_path):
    for i, value in enumerate(HOSTILE):
        run_folder(tmp_path / "r" / f'a,"{i}\nb', model=value, state=value, reason=value, x=value,
        **{f"key {i}, \n": value})  # fmt: skip
    found = said(main, [str(tmp_path / "r"), "--csv"])
    assert found.code == 0 and len(found.out.splitlines()) == len(HOSTILE) + 1
    rows = list(csv.reader(io.StringIO(found.out, newline=""), strict=True))
    assert {len(row) for row in rows} == {len(rows[0])}
    models = {row[rows[0].index("model")] for row in rows[1:]}
    assert HOSTILE[0] in models and HOSTILE[1] in models and "\x1b" not in found.out
    assert any(row[0].startswith('a,"3\\x0ab') for row in rows)
    assert said(main, [str(tmp_path / "r"), "--table"]).code == 0


# --table


def cells_by_heading(out: str) -> list[dict[str, str]]:
    """The lines of a table; what is in one cell has no two spaces in it."""
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if re.search(r"  n  ", line))
    heads = re.split(r"\s{2,}", lines[at].strip())
    end = next(i for i, line in enumerate(lines) if line.startswith("mean +- standard error"))
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[at + 1 : end]]
    assert all(len(row) == len(heads) for row in rows), out
    return [dict(zip(heads, row, strict=True)) for row in rows]


def mean_and_error(values: list[float], mean: str, error: str) -> str:
    if len(values) == 1:
        return f"{values[0]:{mean}}"
    spread = np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):{mean}} +- {spread:{error}}"


def test_the_table_has_mean_and_standard_error_of_the_rows(trained):
    found = said(main, [str(trained), "--table"])
    assert found.code == 0 and not found.err
    rows = cells_by_heading(found.out)
    assert [(row["lr"], row["n"]) for row in rows] == [("0.1", "2"), ("0.2", "1")]
    assert found.out.splitlines()[0] == "resnet8 on digits: 3 runs, 2 configurations"
    assert "All runs: digits, resnet8, norm group" in found.out
    for row, names in zip(rows, (("a-0", "a-1"), ("b-0",)), strict=True):
        runs = [parsed(trained / name)[2] for name in names]
        last = [[r for r in run if r["kind"] == "epoch"][-1] for run in runs]
        noise = [[r for r in run if r["kind"] == "measure"][-1] for run in runs]
        percent = [100 * r["test_acc"] for r in last]
        best = [max(100 * r["test_acc"] for r in run if r["kind"] == "epoch") for run in runs]
        assert row["test acc %"] == mean_and_error(percent, ".2f", ".2f")
        assert row["best acc %"] == mean_and_error(best, ".2f", ".2f")
        for heading, key in (("test loss", "test_loss"), ("train loss", "train_loss")):
            assert row[heading] == mean_and_error([r[key] for r in last], ".4f", ".4f")
        for heading, key in (
            ("C2 sampled", "c2_sampled"),
            ("noise scale", "noise_scale"),
            ("delta measured", "delta_measured"),
        ):
            assert row[heading] == mean_and_error([r[key] for r in noise], ".4g", ".2g")
        assert row["delta end"] == f"{last[0]['delta']:.4g} C" and row["updates"] == "12"


def test_only_runs_that_are_done_are_in_a_mean_and_the_others_are_named(many):
    found = said(main, [str(many), "--table"])
    rows = cells_by_heading(found.out)
    assert {row["mode"] for row in rows} == {"normal", "critical", "sampling"}
    lr = next(row for row in rows if row["method"] == "lr" and row["model"] == "resnet8")
    finals = [parsed_rows(many / f"lr-{seed}")[-1]["test_acc"] for seed in range(3)]
    assert lr["n"] == "3" and lr["not done"] == "1 running"
    assert lr["test acc %"] == mean_and_error([100 * v for v in finals], ".2f", ".2f")
    gone = next(row for row in rows if row["method"] == "batch")
    assert (gone["n"], gone["test acc %"], gone["not done"]) == ("0", "-", "1 diverged")
    assert "diverged: diverged: the loss is nan\n" in found.out
    assert re.search(r"^running: running: 1 torn line of metrics.jsonl", found.out, re.M)
    critical = next(r for r in rows if r["mode"] == "critical" and r["batch"] == "16")
    steps = [
        json.loads((many / f"critical-16-{seed}" / "critical.json").read_text()) for seed in (0, 1)
    ]
    at = [s["crossings"]["0.5"]["step"] for s in steps]
    assert critical["updates to eps 0.5"] == mean_and_error(at, ",.0f", ",.0f")
    sampled = next(r for r in rows if r["mode"] == "sampling" and r["batch"] == "64")
    assert (sampled["noise norm"], sampled["C2 sampled"]) == ("1", "64")


def measuring(path, seed, *values, estimator="per-sample"):
    """A run of --track-noise that measured these C^2, none where it was off."""
    rows = epoch_rows(CONFIG | {"seed": seed}, 2)
    for i, c2 in enumerate(values):
        row = {"kind": "measure", "step": 10 * i, "c2_sampled": c2, "noise_scale": 2 * c2}
        rows.append(row | {"estimator": estimator, "bn": "train"})
    run_folder(path, seed=seed, rows=rows, estimator=estimator, track_noise="10" * bool(values))


def test_a_mean_of_fewer_runs_than_are_done_says_of_how_many(tmp_path):
    for seed, values in enumerate([(1.0, 3.0), (7.5,), (), (4.0, 5.0, 6.5)]):
        measuring(tmp_path / str(seed), seed, *values)
    found = said(main, [str(tmp_path), "--table"]).out
    (row,) = cells_by_heading(found)
    last = np.array([3.0, 7.5, 6.5])
    error = last.std(ddof=1) / math.sqrt(3)
    assert row["n"] == "4"
    assert row["C2 sampled"].split() == f"{last.mean():.4g} +- {error:.2g} (of 3)".split()
    assert "(of" not in row["test acc %"] and "(of k): over the k of them" in found


def test_no_mean_is_taken_over_two_ways_to_measure(tmp_path):
    measuring(tmp_path / "0", 0, 1.0)
    measuring(tmp_path / "1", 1, 3.0, estimator="micro-batch")
    measuring(tmp_path / "2", 0, 5.0)
    config = json.loads((tmp_path / "2" / "config.json").read_text()) | {"lr": 0.2}
    (tmp_path / "2" / "config.json").write_text(json.dumps(config))
    found = said(main, [str(tmp_path), "--table"]).out
    both, one = cells_by_heading(found)
    assert both["n"] == "2" and both["C2 sampled"] == both["noise scale"] == "-"
    assert one["C2 sampled"] == "5"
    (line,) = [line for line in found.splitlines() if "of which no mean is taken" in line]
    assert line.startswith("lr 0.1: its noise was measured micro-batch with BatchNorm train and ")


def test_a_schedule_by_hand_is_told_in_the_place_of_a_method(tmp_path):
    text = "lr: 0.1 @0 ->cos 0 @100%"
    for name, schedule in (("by-hand", text), ("constant", None)):
        run_folder(tmp_path / name, method="constant", schedule=schedule)
    table = said(main, [str(tmp_path), "--table"]).out
    assert {row["method"] for row in cells_by_heading(table)} == {text, "constant"}
    assert {row["schedule"] for row in fs.load_runs(tmp_path)} == {text, None}


def test_c2_given_and_delta_without_units(tmp_path):
    run_folder(tmp_path / "r", c2=20.0)
    found = said(main, [str(tmp_path / "r"), "--table"])
    (row,) = cells_by_heading(found.out)
    assert row["delta start"] == f"{0.1 / 32**0.5:.4g}" and "root of C2" not in found.out
    assert (row["method"], row["optimizer"], row["n"]) == ("constant", "sgd", "1")


@pytest.mark.parametrize("columns", [200, 100, 80, 60])
def test_the_table_fits_the_terminal_and_says_what_it_leaves_out(trained, columns):
    whole = said(main, [str(trained), "--table"]).out
    found = seen(main, [str(trained), "--table"], columns)
    assert found.code == 0 and found.widest <= columns
    heads = set(cells_by_heading(whole)[0])
    shown = cells_by_heading("\n".join(found.lines))
    left_out = re.search(r"no room for: (.*?);", " ".join(" ".join(found.lines).split()))
    gone = set(left_out[1].split(", ")) if left_out else set()
    assert set(shown[0]) | gone == heads and not set(shown[0]) & gone
    assert {"lr", "n", "test acc %"} <= set(shown[0]) and bool(gone) == (columns < 200)


def test_tables_write_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    for flag in ("--table", "--csv"):
        assert said(main, [str(trained), flag]).code == 0
    assert not list(tmp_path.iterdir())
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before


def test_a_reader_that_has_enough_ends_it_silently_and_a_full_disk_in_a_line(many):
    command = [sys.executable, "-m", "fastsmooth.report", str(many)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*command, "--csv"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "--table"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 74
    assert done.stderr == (
        "fastsmooth: error: cannot write standard output: No space left on device\n"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--table --csv", "--table and --csv do not go together: give one of them"),
        ("--csv --watch", "--csv and --watch do not go together: give one of them"),
        ("--table --out o", "--out has no effect with --table, which writes no files"),
        ("--watch --out o", "--out has no effect with --watch, which writes no files"),
        ("--port 9000", "--port has no effect without --watch"),
        ("--table --every 3", "--every has no effect without --watch"),
        ("--watch --port 0", "--port: 0 is out of range: it must be at least 1 and at most 65535"),
        ("--watch --every 0", "--every: 0 is out of range: it must be at least 0.1"),
        ("--tabel", "unknown flag --tabel: did you mean --table?"),
        ("--live", "unknown flag --live: fastsmooth calls it --watch"),
        ("--interval 3", "unknown flag --interval: fastsmooth calls it --every"),
    ],
)
def test_flags_that_say_nothing_together_are_refused(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "r")
    assert refused(main, ["r", *flags.split()]).startswith(words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r"]


def test_a_single_sampling_run_and_a_critical_one(tmp_path):
    """Whose figures are of other files than metrics.jsonl."""
    noise_folder(tmp_path / "n", 16)
    critical_folder(tmp_path / "c", 16, 0)
    for name in ("n", "c"):
        assert len(cells_by_heading(said(main, [str(tmp_path / name), "--table"]).out)) == 1
