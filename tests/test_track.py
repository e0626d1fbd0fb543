"""--track-noise: right values, at the right updates, and not a bit of the training changed."""

import json
import math

import pytest
import torch
from exact import EXACT
from images import epoch_batches
from torch import nn
from torch.nn import functional as F

from fastsmooth import models
from fastsmooth.cli.config import resolve
from fastsmooth.data import open_data
from fastsmooth.noise.online import NoiseTracker, choose_estimator
from fastsmooth.noise.persample import NotCovered
from fastsmooth.optim import NoisySGD
from fastsmooth.runfolder.write import TIMES, read_rows
from fastsmooth.schedule import Point
from fastsmooth.train import main

CPU = torch.device("cpu")


def run(out, *flags: str, code: int = 0):
    assert main([*EXACT, *flags, "--out", str(out)]) == code
    return out


def rows_of(out) -> list[dict]:
    return [row for row in read_rows(out) if row["kind"] == "measure"]


def final_weights(out) -> dict:
    newest = max((out / "checkpoints").glob("*.pt"), key=lambda p: int(p.stem.split("-")[1]))
    return torch.load(newest, weights_only=True)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--bn", "frozen"],
        ["--bn", "batch"],
        ["--bn", "eval"],
        ["--norm", "group", "--augment", "crop-flip"],
        ["--estimator", "micro-batch", "--bn", "eval"],
    ],
    ids=" ".join,
)
def test_training_is_the_same_bit_for_bit(flags, tmp_path):
    plain = [
        f
        for f in flags
        if f not in ("--bn", "frozen", "batch", "eval", "--estimator", "micro-batch")
    ]
    line = ["--epochs", "2", "--method", "hybrid", "--decay-epoch", "1", "--optimizer", "nshb"]
    one = final_weights(run(tmp_path / "plain", *line, *plain))
    other = final_weights(run(tmp_path / "tracked", *line, *flags, "--track-noise", "every=20"))
    assert len(rows_of(tmp_path / "tracked")) == 4
    for part in ("model", "optimizer"):
        a, b = (torch.utils._pytree.tree_leaves(state[part]) for state in (one, other))
        assert all(
            torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
            for x, y in zip(a, b, strict=True)
        )
    assert torch.equal(one["rng"][0][0], other["rng"][0][0])


def first_batch(size: int):
    data = open_data(resolve({}), CPU)
    index = next(iter(epoch_batches(0, 0, len(data.train), size)))
    x, y = next(iter(data.train.batches([index], 0)))
    torch.manual_seed(0)
    return x, y, len(data.train)


def test_the_first_row_is_that_of_one_backward_pass_a_sample(tmp_path):
    out = run(
        tmp_path / "run",
        "--epochs",
        "1",
        "--norm",
        "group",
        "--track-noise",
        "every=1ep",
        "--batchsize",
        "64",
    )
    (row,) = rows_of(out)
    x, y, n = first_batch(64)
    model = models.build("resnet8", 10, "group").double()
    params = list(model.parameters())
    G = []
    for i in range(64):
        grads = torch.autograd.grad(
            F.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1]), params
        )
        G.append(torch.cat([g.flatten() for g in grads]))
    G = torch.stack(G)
    mean = G.mean(0)
    c2 = ((G - mean).square().sum() / 63 * (n - 1) / n).item()
    square = mean.square().sum().item()
    full = square - c2 / 64 * (n - 64) / (n - 1)
    expected = {
        "c2_sampled": c2,
        "grad_norm": math.sqrt(square),
        "grad_norm_max": math.sqrt(square),
        "k2": square,
        "full_grad_square": full,
        "noise_scale": c2 / full,
        "delta_measured": 0.1 * math.sqrt(c2 / 64),
    }
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert row["estimator"] == "per-sample" and row["step"] == 0
    epoch = [r for r in read_rows(out) if r["kind"] == "epoch"]
    assert epoch[0]["c2_sampled"] == row["c2_sampled"]


def test_parts_of_a_batch_have_batch_statistics_of_their_own(tmp_path):
    (row,) = rows_of(
        run(tmp_path / "run", "--epochs", "1", "--track-noise", "every=100", "--batchsize", "18")
    )
    x, y, n = first_batch(18)
    model = models.build("resnet8", 10).double()
    params = list(model.parameters())
    sizes = [5, 5, 4, 4]
    H = []
    for part, labels in zip(x.double().split(sizes), y.split(sizes), strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(part), labels), params)
        H.append(torch.cat([g.flatten() for g in grads]))
    weights = torch.tensor(sizes, dtype=torch.float64)
    mean = (torch.stack(H) * weights[:, None]).sum(0) / 18
    c2 = sum(m * (h - mean).square().sum() for m, h in zip(sizes, H, strict=True)) / 3 * (n - 1) / n
    assert row["c2_sampled"] == pytest.approx(c2.item(), rel=1e-3)
    assert row["grad_norm"] == pytest.approx(mean.norm().item(), rel=1e-3)
    assert row["estimator"] == "micro-batch" and row["bn"] == "train"


def test_measured_when_due(tmp_path):
    # 5 updates an epoch, the last of one sample
    line = ["--epochs", "3", "--norm", "group", "--batchsize", "359"]
    assert [r["step"] for r in rows_of(run(tmp_path / "a", *line, "--track-noise", "every=4"))] == [
        0,
        5,
        8,
        12,
    ]
    assert [
        r["step"] for r in rows_of(run(tmp_path / "b", *line, "--track-noise", "every=2ep"))
    ] == [0, 10]


def tracker(form: str) -> NoiseTracker:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    optimizer = NoisySGD(model.parameters(), form, 0.1, 0.9)
    return NoiseTracker(model, optimizer, samples=1000, every=1, estimator="per-sample")


def test_maximum_mean_square_and_delta_run_over_the_measurements():
    torch.manual_seed(0)
    tracked = tracker("shb")
    point = Point(0.1, 8, 0.9)
    rows = []
    for t in range(3):
        x, y = torch.randn(8, 3, 2, 2) * (3 - t), torch.randint(3, (8,))
        rows.append(tracked.measure(x, y, point, t, 0))
    norms = [row["grad_norm"] for row in rows]
    fulls = [row["grad_norm"] ** 2 - row["c2_sampled"] / 8 * 992 / 999 for row in rows]
    last = rows[-1]
    assert last["grad_norm_max"] == max(norms) > norms[-1]
    assert last["grad_norm_rms"] == pytest.approx(math.sqrt(sum(v**2 for v in norms) / 3))
    assert last["k2"] == last["grad_norm_max"] ** 2
    assert last["full_grad_square"] == pytest.approx(sum(fulls) / 3)
    growth = 0.9 * (0.81 - 0.9 + 1) / 0.01
    delta = 0.1 * math.sqrt((1 + growth) * last["c2_sampled"] / 8 + growth * last["k2"])
    assert last["delta_measured"] == pytest.approx(delta)
    ratio = sum(r["c2_sampled"] * 0.9 ** (2 - t) for t, r in enumerate(rows))
    ratio /= sum(f * 0.9 ** (2 - t) for t, f in enumerate(fulls))
    assert last["noise_scale"] == (pytest.approx(ratio) if ratio > 0 else None)
    assert tracked.end_epoch() == pytest.approx(sum(r["c2_sampled"] for r in rows) / 3)
    assert tracked.end_epoch() is None


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, capsys):
    run(
        tmp_path / "run",
        "--epochs",
        "2",
        "--norm",
        "group",
        "--lr",
        "1e18",
        "--track-noise",
        "every=1",
        code=3,
    )
    error = capsys.readouterr().err
    assert "the gradient is not finite at update" in error and len(error.splitlines()) == 1
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "diverged"


def test_going_on_measures_what_an_uninterrupted_run_measures(tmp_path):
    line = [
        "--epochs",
        "2",
        "--checkpoint-every",
        "13",
        "--track-noise",
        "every=10",
        "--norm",
        "group",
    ]
    whole = run(tmp_path / "whole", *line)
    halved = run(tmp_path / "halved", *line, "--max-time", "0.001", code=75)
    for _ in range(2):
        main(["--resume", "--out", str(halved), "--max-time", "0.001"])
    assert main(["--resume", "--out", str(halved), "--max-time", "1h"]) == 0
    rows = [
        [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(out)]
        for out in (whole, halved)
    ]
    assert sum(row["kind"] == "measure" for row in rows[0]) == 9
    assert rows[0] == rows[1]


def test_per_sample_only_where_it_has_a_clear_meaning():
    x, y = torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    plain, grouped = models.build("resnet8", 10), models.build("resnet8", 10, "group")
    assert choose_estimator(plain, x, y, "auto", "eval") == ("per-sample", "")
    assert choose_estimator(grouped, x, y, "auto", "train") == ("per-sample", "")
    assert choose_estimator(plain, x, y, "auto", "train")[0] == "micro-batch"
    with pytest.raises(NotCovered, match="BatchNorm with batch statistics"):
        choose_estimator(plain, x, y, "per-sample", "train")
    scaled = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.PReLU())
    estimator, why = choose_estimator(scaled, x, y, "auto", "train")
    assert estimator == "micro-batch" and "2.weight" in why
    with pytest.raises(NotCovered, match=r"2\.weight"):
        choose_estimator(scaled, x, y, "per-sample", "train")
