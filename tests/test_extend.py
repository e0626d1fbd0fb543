"""A finished run trained on in a folder of its own: --extend."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from exact import EXACT
from forks import assert_same_bits, final_state, finish, start, wait_for, without_times
from images import noise, tree
from rows import read_rows
from said import refused, said

from fastsmooth import data
from fastsmooth.cli.config import resolve
from fastsmooth.sweep.__main__ import main as sweep
from fastsmooth.train import main

SHORT = [*EXACT, "--batchsize", "240", "--augment", "crop-flip", "--seed", "3", "--log-every", "2"]
MOMENTUM = [*SHORT, "--optimizer", "shb", "--weight-decay", "1e-3"]


def done(argv, out):
    assert main([*argv, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run of two epochs."""
    return done([*MOMENTUM, "--epochs", "2"], tmp_path_factory.mktemp("finished") / "short")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """The same of four."""
    return done([*MOMENTUM, "--epochs", "4"], tmp_path_factory.mktemp("finished") / "long")


def losses(*outs):
    """What the epochs of runs came to, one after the other."""
    names = ("train_loss", "train_acc", "test_loss", "test_acc", "lr", "momentum", "delta")
    epochs = [row for out in outs for row in read_rows(out) if row["kind"] == "epoch"]
    return [[row[name] for name in names] for row in epochs]


def assert_one_run(whole, *parts):
    """The parts, each of which extends the one before, end in the bits of the whole."""
    states = final_state(whole), final_state(parts[-1])
    for name in ("model", "optimizer", "rng"):
        assert_same_bits(*(state[name] for state in states), name)
    assert losses(whole) == losses(*parts)


def test_an_extension_ends_in_the_bits_of_one_long_run(short, long, tmp_path):
    found = said(main, ["--extend", str(short), "--out", str(tmp_path / "more")])
    assert found.code == 0
    assert (
        f"going on from the end of {short} (2 epochs, 12 updates); this run counts its own from 0\n"
    ) in found.out
    assert_one_run(long, short, tmp_path / "more")
    rows = read_rows(tmp_path / "more")
    assert [row["step"] for row in rows if row["kind"] == "step"] == [2, 4, 6, 8, 10, 12]
    config = json.loads((tmp_path / "more" / "config.json").read_text())
    assert config["extend"] == str(short) and config["epochs"] == 2
    env = json.loads((tmp_path / "more" / "env.json").read_text())
    assert env["extends"] == {"run": str(short), "epochs": 2, "updates": 12, "first_epoch": 2}
    summary = json.loads((tmp_path / "more" / "summary.json").read_text())
    assert (summary["epochs"], summary["updates"]) == (2, 12)


def test_extensions_of_extensions_go_on(short, long, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    done(["--extend", str(short), "--epochs", "1"], one)
    done(["--extend", str(one)], two)
    assert_one_run(long, short, one, two)
    assert json.loads((two / "env.json").read_text())["extends"]["first_epoch"] == 3


def test_an_extension_has_a_schedule_of_its_own(short, tmp_path):
    argv = ["--extend", str(short), "--method", "cosine", "--epochs", "3", "--lr", "0.05"]
    out = done([*argv, "--weight-decay", "0.01", "--beta", "0.5"], tmp_path / "run")
    fresh = [row["lr"] for row in read_rows(out) if row["kind"] == "epoch"]
    c = resolve({"method": "cosine", "epochs": 3, "lr": 0.05, "optimizer": "shb"})
    from fastsmooth.training.plan import make_schedule

    assert fresh == [make_schedule(c, 1437)(epoch).lr for epoch in range(3)]
    group = final_state(out)["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["momentum"]) == (0.01, 0.5)
    assert final_state(out)["data"]["first_epoch"] == 2


def test_an_extension_that_is_killed_goes_on(short, tmp_path):
    argv = ["--extend", str(short), "--method", "cosine", "--checkpoint-every", "4"]
    whole, cut = done(argv, tmp_path / "whole"), tmp_path / "cut"
    assert main([*argv, "--out", str(cut), "--max-time", "1e-6s"]) == 75
    assert main([*argv, "--resume", "--out", str(cut), "--max-time", "1h"]) == 0
    assert_same_bits(final_state(cut), final_state(whole))
    assert without_times(read_rows(cut)) == without_times(read_rows(whole))
    # before its first checkpoint: it begins anew, from wherever it is called
    shutil.rmtree(cut / "checkpoints")
    (cut / "status.json").write_text('{"state": "running"}')
    assert main(["--resume", "--out", str(cut), "--max-time", "1h"]) == 0
    assert_same_bits(final_state(cut), final_state(whole))
    assert without_times(read_rows(cut)) == without_times(read_rows(whole))


@pytest.mark.full
def test_an_extension_goes_on_after_kill_9(short, tmp_path):
    argv = ["--extend", str(short), "--epochs", "40", "--method", "cosine"]
    finish(argv, tmp_path / "whole")
    for every in ("4", "100000"):
        out = tmp_path / f"killed-{every}"
        process = start([*argv, "--checkpoint-every", every], out)
        wait_for(out / "metrics.jsonl")
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        finish(["--resume"], out)
        for name in ("model", "optimizer", "rng", "data"):
            assert_same_bits(final_state(out)[name], final_state(tmp_path / "whole")[name])


@pytest.mark.full
def test_two_processes_extend_as_one_long_run(tmp_path):
    argv = [*MOMENTUM, "--batchsize", "241"]
    finish([*argv, "--epochs", "2"], tmp_path / "short", 2)
    finish([*argv, "--epochs", "4"], tmp_path / "long", 2)
    finish(["--extend", str(tmp_path / "short")], tmp_path / "more", 2)
    assert_one_run(tmp_path / "long", tmp_path / "short", tmp_path / "more")


def test_a_run_that_its_budget_ended_goes_on_with_the_next_epoch(tmp_path):
    out = done([*SHORT, "--budget", "updates=8"], tmp_path / "run")
    assert final_state(out)["data"]["cursor"] > 0
    more = done(["--extend", str(out), "--epochs", "1"], tmp_path / "more")
    assert final_state(more)["data"]["first_epoch"] == 2
    assert len(losses(more)) == 1


def test_image_sizes_are_those_of_the_epochs_of_the_extension(tmp_path):
    folder = tmp_path / "images"
    tree(
        folder,
        {f"{s}/{k}/{i}.png": noise() for s in ("train", "val") for k in "ab" for i in range(4)},
    )
    argv = [*EXACT, "--data-dir", str(folder), "--model", "resnet8", "--batchsize", "4"]
    for loader in ("resident", "threads"):
        short = done(
            [*argv, "--image-size", "16", "--epochs", "2", "--loader", loader],
            tmp_path / f"{loader}-run",
        )
        more = ["--extend", str(short), "--image-size", "8 @0, 12 @1", "--epochs", "2"]
        out = done(more, tmp_path / f"{loader}-more")
        rows = [row for row in read_rows(out) if row["kind"] == "epoch"]
        assert [row["image_size"] for row in rows] == [8, 12]
    c = resolve({"data_dir": str(folder), "model": "resnet8", "image_size": "8 @0, 12 @1",
                 "epochs": 2, "augment": "none"})  # fmt: skip
    images = data.open_data(c, torch.device("cpu"), first_epoch=5)
    sides = [next(iter(images.train.batches([torch.arange(2)], e)))[0].shape[2] for e in (5, 6, 9)]
    assert sides == [8, 12, 12]


@pytest.fixture
def copied(short, tmp_path):
    return Path(shutil.copytree(short, tmp_path / "copied"))


def test_what_would_not_be_its_state_is_refused(short):
    for words, said_of in (
        (["--model", "resnet20"], "the run has --model resnet8, not resnet20"),
        (["--norm", "group"], "the run has --norm batch, not group"),
        (["--seed", "4"], "the run has --seed 3, not 4"),
        (["--optimizer", "nshb"], "the run has --optimizer shb, not nshb"),
        (["--dataset", "cifar10"], "the run has --dataset digits, not cifar10"),
        (["--ema", "0.9"], "the run was trained without --ema"),
    ):
        line = refused(main, ["--extend", str(short), *words])
        assert line.startswith(f"--extend {short}: {said_of}: "), line
    for words, line in (
        (["--init", "w.pth"], "--extend goes on with the weights of its run, and --init has"),
        (["--mode", "sampling"], "--extend trains a run on, and --mode sampling measures one"),
        (["--out", str(short)], f"--out {short} exists: "),
    ):
        assert refused(main, ["--extend", str(short), *words]).startswith(line)


def test_a_run_that_measured_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"mode": "critical"}))
    assert "a run of --mode critical ends where it has measured" in refused(
        main, ["--extend", str(copied)]
    )


@pytest.mark.parametrize("state", ["running", "preempted", "failed", "diverged", None])
def test_a_run_that_is_not_done_is_refused(state, copied):
    (copied / "status.json").write_text(json.dumps({"state": state}))
    line = refused(main, ["--extend", str(copied)])
    if state == "diverged":
        assert line.startswith(f"--extend {copied}: the run has diverged")
    else:
        assert line == (
            f"--extend {copied}: the run is not finished (its status is {state or 'unknown'}): "
            f"finish it with --resume --out {copied}"
        )


def test_a_folder_without_the_state_of_a_run_is_refused(copied, tmp_path):
    out = ["--out", str(tmp_path / "out")]
    line = refused(main, ["--extend", str(tmp_path / "none"), *out])
    assert line.startswith("--extend ")
    assert "No such file or directory: is this a run folder?" in line
    newest = max((copied / "checkpoints").glob("*.pt"), key=lambda p: int(p.stem.split("-")[1]))
    newest.write_bytes(newest.read_bytes()[:-1])
    found = said(main, ["--extend", str(copied), *out])  # with a warning of the damage
    assert found.code == 2 and "is of update 6, and the run ended later" in found.err
    shutil.rmtree(copied / "checkpoints")
    assert "has no checkpoint" in refused(main, ["--extend", str(copied), *out])
    assert not (tmp_path / "out").exists()


def rewritten(run, change):
    """The newest checkpoint of a run with a change."""
    from fastsmooth.runfolder.checkpoint import Checkpoints

    checkpoints = Checkpoints(run / "checkpoints", print)
    state = checkpoints.load()
    change(state)
    checkpoints.saved = None
    checkpoints.save(state["update"], state)


def test_a_state_of_something_else_is_refused(copied, tmp_path):
    for change, words in (
        (lambda s: s["data"].update(fingerprint="other"), "the images are not those"),
        (lambda s: s["model"].pop("stem.weight"), "is not of a run with these flags"),
        (lambda s: s["data"].update(cursor="x"), "is not of a run with these flags"),
        (lambda s: s["optimizer"].update(param_groups=[]), "other groups of parameters"),
        (lambda s: s.update(format=1), "the form of another version"),
    ):
        again = shutil.copytree(copied, tmp_path / "again")
        rewritten(again, change)
        line = refused(main, ["--extend", str(again), "--out", str(tmp_path / "out")])
        assert line.startswith(f"--extend {again}: ") and words in line
        assert not (tmp_path / "out").exists()
        shutil.rmtree(again)


def test_what_the_other_method_does_not_use_is_not_inherited(tmp_path):
    poly = done([*SHORT, "--epochs", "1", "--method", "poly", "--power", "2"], tmp_path / "poly")
    found = said(main, ["--extend", str(poly), "--plan"])
    assert found.code == 0
    assert said(main, ["--extend", str(poly), "--method", "constant", "--plan"]).code == 0
    assert "--gamma has no effect" in refused(
        main, ["--extend", str(poly), "--gamma", "0.5", "--plan"]
    )


def test_a_plan_is_that_of_the_extension(short):
    found = said(main, ["--extend", str(short), "--epochs", "3", "--method", "cosine", "--plan"])
    assert found.code == 0
    assert found.out.splitlines()[-1] == ("cost: 18 updates, 4,311 gradient evaluations of resnet8")


def test_a_sweep_extends_a_run_in_several_ways(short, tmp_path):
    argv = ["--extend", str(short), "--lr", "0.01", "0.1", "--epochs", "1", "--jobs", "1"]
    found = said(sweep, [*argv, "--out", str(tmp_path / "sweep"), "--plan"])
    assert found.code == 0 and found.out.endswith("2 runs\n")
    assert found.out.count("--optimizer=shb") == 2 and found.out.count(f"--extend={short}") == 2
    line = found.out.splitlines()[0].split()[2:]
    done(line, tmp_path / "one")
    assert final_state(tmp_path / "one")["data"]["first_epoch"] == 2
    grid = ["--freeze", "stem", "norm", "--init", str(short), "pretrained", "--model", "resnet8"]
    line = refused(sweep, [*grid, "--out", str(tmp_path / "sweep"), "--plan"])
    assert line.startswith("--init pretrained: no pretrained weights are published for resnet8")
