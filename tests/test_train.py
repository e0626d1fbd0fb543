"""The whole path, on real images: what a person types and what the run folder says afterwards."""

import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exact import EXACT
from implementations import compiles_once
from rows import read_rows
from torch.nn import functional as F

from fastsmooth import models
from fastsmooth.cli.config import resolve
from fastsmooth.cli.facts import SETS
from fastsmooth.cli.parse import read_saved
from fastsmooth.data import open_data
from fastsmooth.kernels import native
from fastsmooth.optim import NoisySGD
from fastsmooth.runfolder.read import read_status
from fastsmooth.schedule import METHODS, SOLVED
from fastsmooth.train import main
from fastsmooth.training import loop
from fastsmooth.training.plan import make_schedule
from fastsmooth.training.step import Step

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def train(out: Path, *flags: str) -> Path:
    assert main([*flags, "--out", str(out)]) == 0
    return out


def epochs_of(out: Path) -> list[dict]:
    return [row for row in read_rows(out) if row["kind"] == "epoch"]


def test_the_first_run_reaches_95_percent_on_the_held_out_digits(tmp_path, capsys):
    out = train(tmp_path / "run", "--method", "exp")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["final_test_acc"] >= 0.95
    assert read_status(out)["state"] == "done"
    assert {p.name for p in out.iterdir()} == {
        ".lock", "best.safetensors", "checkpoints", "config.json", "env.json",
        "last.safetensors", "metrics.jsonl", "model.json", "status.json", "summary.json",
    }  # fmt: skip
    assert len(list((out / "checkpoints").iterdir())) == 4  # two checkpoints with their manifests
    shown = capsys.readouterr().out
    assert "1,797 handwritten digits" in shown and "--dataset cifar100" in shown


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_logs_the_points_of_its_schedule(method, tmp_path, monkeypatch):
    """The logged Point is what the optimizer held and what the loader served, at every epoch."""
    used = []

    def spy(run, batch, point):
        group = run.step.optimizer.param_groups[0]
        advance(run, batch, point)
        used.append((run.epoch, group["lr"], group["momentum"], batch.count))

    advance = loop.Run.advance
    monkeypatch.setattr(loop.Run, "advance", spy)
    optimizer = "nshb" if method in {*SOLVED, "beta-step"} else "sgd"
    steps = ["--milestones", "1", "2"] * (METHODS[method].uses == "milestones")
    flags = ["--method", method, *steps, "--optimizer", optimizer, "--epochs", "3"]
    out = train(tmp_path / "run", *flags)
    schedule = make_schedule(read_saved(out), 1437)
    rows = epochs_of(out)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    for epoch, row in enumerate(rows):
        point = schedule(epoch)
        assert (row["lr"], row["batch_size"], row["momentum"]) == (
            point.lr,
            point.batch_size,
            point.momentum,
        )
        assert row["delta"] == schedule.delta(point)
        mine = [u for u in used if u[0] == epoch]
        assert {u[1:3] for u in mine} == {(point.lr, point.momentum)}
        assert sum(u[3] for u in mine) == 1437
        assert [u[3] for u in mine[:-1]] == [point.batch_size] * (1437 // point.batch_size)
    assert rows[-1]["step"] == sum(schedule.updates(1437)) == len(used)


@pytest.mark.parametrize("optimizer", ["sgd", "shb", "nshb", "qhm"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_optimizer_learns(optimizer, norm, tmp_path):
    lr = "0.02" if optimizer == "shb" else "0.1"
    out = train(
        tmp_path / "run",
        "--optimizer",
        optimizer,
        "--lr",
        lr,
        "--norm",
        norm,
        "--epochs",
        "3",
        "--weight-decay",
        "5e-4",
    )
    assert epochs_of(out)[-1]["test_acc"] > 0.9


def test_evaluation_is_exact():
    """Against one forward pass over the whole test set, whose size no batch divides."""
    data = open_data(resolve({}), CPU)
    torch.manual_seed(0)
    model = models.build("resnet8", 10)
    step = Step(model, NoisySGD(model.parameters(), "sgd", 0.1), CPU, "fp32", False)
    for x, y in data.train.batches([torch.arange(64)]):
        step.gradient(x, y)
    loss, accuracy, _ = step.evaluate(data.test.batches(torch.arange(360).split(77)))
    assert model.training
    x, y = next(data.test.batches([torch.arange(360)]))
    with torch.no_grad():
        logits = model.eval()(x)
    assert loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == y).double().mean().item()


def test_the_training_loss_is_the_mean_over_samples(tmp_path):
    """Every sample counts the same, in the last partial batch too; rows of updates add up to the
    row of the epoch."""
    out = train(tmp_path / "run", "--epochs", "1", "--log-every", "1", "--batchsize", "100")
    rows = read_rows(out)
    steps, epoch = [r for r in rows if r["kind"] == "step"], rows[-1]
    sizes = [100] * 14 + [37]
    assert [r["step"] for r in steps] == list(range(1, 16))
    mean = math.fsum(n * r["train_loss"] for n, r in zip(sizes, steps, strict=True)) / 1437
    assert epoch["train_loss"] == pytest.approx(mean, rel=1e-9)


def test_the_same_command_gives_the_same_bits_and_another_seed_others(tmp_path):
    flags = [*EXACT, "--epochs", "1", "--augment", "crop-flip-rotate"]
    a, b = (epochs_of(train(tmp_path / name, *flags))[0]["test_loss"] for name in "ab")
    c = epochs_of(train(tmp_path / "c", *flags, "--seed", "1"))[0]["test_loss"]
    assert a == b != c


def test_drop_last_drops_the_partial_batch(tmp_path):
    out = train(tmp_path / "run", "--epochs", "2", "--batchsize", "100", "--drop-last")
    assert [r["samples"] for r in epochs_of(out)] == [1400, 2800]


def test_bf16_trains(tmp_path):
    assert (
        epochs_of(train(tmp_path / "run", "--epochs", "3", "--precision", "bf16"))[-1]["test_acc"]
        > 0.9
    )


@compiles_once
def test_a_growing_batch_compiles_once(tmp_path, capsys):
    """Training step and evaluation: two graphs, whatever lr and batch do; the results stay those of
    eager."""
    flags = [
        "--method",
        "hybrid",
        "--epochs",
        "5",
        "--decay-epoch",
        "1",
        "--optimizer",
        "shb",
        "--lr",
        "0.02",
    ]
    out = train(tmp_path / "compiled", *flags, "--compile", "on")
    assert json.loads((out / "summary.json").read_text())["compiled_graphs"] == 2
    assert "compiled 2 graphs" in capsys.readouterr().out
    eager = train(tmp_path / "eager", *flags)
    losses = [[r["train_loss"] for r in epochs_of(o)] for o in (out, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)


def test_the_ninth_compiled_step_of_a_process_is_compiled_like_the_first():
    """PyTorch keeps eight graphs a function, which all steps share, and then runs eagerly without a
    word."""
    x, y = torch.randn(5, 3, 2, 2), torch.arange(5)
    for _ in range(9):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
        step = Step(model, NoisySGD(model.parameters(), "sgd", 0.1), CPU, "fp32", True)
        step.gradient(x, y)
        assert step.compiled_graphs == 1


def test_no_update_waits_for_the_device(monkeypatch, tmp_path):
    """Between two logged rows the loop reads no number back."""
    reads = []
    item, tolist = torch.Tensor.item, torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "item", lambda t: reads.append(1) or item(t))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(1) or tolist(t))
    counts = []
    for batch in ("100", "10"):
        reads.clear()
        train(tmp_path / batch, "--epochs", "1", "--batchsize", batch, "--log-every", "100000")
        counts.append(len(reads))
    assert counts[0] == counts[1]


def test_a_diverged_run_stops_with_3_and_keeps_its_finite_checkpoint(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["--lr", "1e30", "--out", str(out), "--epochs", "2", "--norm", "group"]) == 3
    assert "not finite at update" in capsys.readouterr().err
    assert read_status(out)["state"] == "diverged"
    assert all(row["train_loss"] is not None for row in read_rows(out))


def test_a_disk_that_is_full_leaves_the_run_going_until_its_end(tmp_path, monkeypatch, capsys):
    from fastsmooth.runfolder.checkpoint import Checkpoints

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", full)
    out = tmp_path / "run"
    assert main(["--epochs", "2", "--out", str(out)]) == 74
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("fastsmooth: warning: no checkpoint at update 45") and len(err) == 2
    assert read_status(out)["state"] == "failed" and len(epochs_of(out)) == 2


def test_a_saturating_schedule_warns_with_target_and_reached_delta(capsys):
    flags = [
        "--plan",
        "--dataset",
        "cifar100",
        "--method",
        "beta",
        "--optimizer",
        "shb",
        "--batchsize",
        "16",
    ]
    assert main(flags) == 0
    assert "misses its target: at epoch 199 that is delta" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, why",
    [
        (
            ["--method", "beta", "--optimizer", "shb", "--batchsize", "16"],
            "the momentum cannot fall below 0",
        ),
        (
            ["--method", "batch", "--optimizer", "shb"],
            "a part of the optimizer's bound does not fall with the batch",
        ),
        (["--method", "batch", "--batchsize", "10000"], "no batch exceeds the data set"),
        (["--method", "hybrid", "--batchsize", "3"], "a batch is a whole number"),
        (
            ["--method", "batch", "--compat", "original"],
            "the published code grows the batch an epoch late",
        ),
    ],
)
def test_why_a_schedule_misses_its_target_is_said(flags, why, capsys):
    assert main(["--plan", "--dataset", "cifar100", *flags]) == 0
    assert f"({why})" in capsys.readouterr().out


def test_the_plan_prints_every_epoch(capsys):
    assert main(["--plan", "--json", "--dataset", "cifar100", "--method", "hybrid"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["epoch"] for row in rows] == list(range(200))
    assert rows[0].keys() == {"epoch", "lr", "batch_size", "momentum", "delta"}
    assert rows[160]["batch_size"] == 162 and rows[160]["lr"] == pytest.approx(0.05625)
    assert main(["--plan", "--dataset", "cifar100", "--method", "hybrid"]) == 0
    table = capsys.readouterr().out
    assert (
        "0-39" in table
        and "160-199" in table
        and "162,880 updates, 10,000,000 gradient evaluations" in table
    )
    for name in SETS:
        assert main(["--plan", "--dataset", name]) == 0  # touches no data: none of them is here


def test_a_terminal_gets_a_bar_and_every_epoch(tmp_path):
    pytest.importorskip("rich")
    master, slave = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "fastsmooth.train",
        "--epochs",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "160"}
    process = subprocess.Popen(command, stdout=slave, stderr=slave, cwd=ROOT, env=env)
    os.close(slave)
    shown = b""
    try:
        while block := os.read(master, 65536):
            shown += block
    except OSError:
        pass  # Linux says EIO at the end of a terminal
    assert process.wait() == 0
    assert (
        b"epoch 2/2" in shown
        and b"images/s" in shown
        and b"\x1b[" in shown
        and "━".encode() in shown
    )


def test_real_images_of_a_folder_are_learned(cifar_folder, tmp_path):
    """1,500 CIFAR-100 images of 15 classes with the batch growing: far above the 6.7 % of
    chance."""
    flags = [
        "--dataset",
        "folder",
        "--data-dir",
        str(cifar_folder),
        "--model",
        "resnet8",
        "--method",
        "hybrid",
    ]
    out = train(tmp_path / "run", *flags, "--epochs", "8")
    rows = epochs_of(out)
    assert [r["batch_size"] for r in rows] == [32, 48, 72, 108, 162, 243, 364, 546]
    assert rows[-1]["test_acc"] > 0.2


def test_without_a_compiler_the_run_says_so_and_gives_the_same_bits(tmp_path, monkeypatch, capsys):
    """The C++ update rounds as plain PyTorch does."""
    flags = ["--epochs", "1", "--optimizer", "qhm", "--weight-decay", "0.001", "--device", "cpu"]
    built = train(tmp_path / "built", *flags)
    assert json.loads((built / "env.json").read_text())["kernels"] == "native"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native.library.cache_clear()
    capsys.readouterr()
    try:
        plain = train(tmp_path / "plain", *flags)
    finally:
        native.library.cache_clear()
    assert "plain PyTorch, slower: no C++ compiler" in capsys.readouterr().err
    assert json.loads((plain / "env.json").read_text())["kernels"] == "reference"
    assert epochs_of(built)[0]["test_loss"] == epochs_of(plain)[0]["test_loss"]
