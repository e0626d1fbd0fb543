"""--track-noise: right values, at the right updates, and not a bit of the training changed."""

import json
import math
import re

import pytest
import torch
from exact import EXACT
from forks import without_times
from images import epoch_batches
from rows import read_rows
from torch import nn
from torch.nn import functional as F

from fastsmooth import models
from fastsmooth.cli.config import resolve
from fastsmooth.data import open_data
from fastsmooth.noise.online import NoiseTracker, choose_estimator
from fastsmooth.noise.persample import NotCovered
from fastsmooth.optim import NoisySGD
from fastsmooth.runfolder.write import TIMES
from fastsmooth.schedule import Point, Smoothing
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
    assert choose_estimator(scaled, x, y, "auto", "train") == ("per-sample", "")


# The tracker by itself


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


def images(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 3, 2, 2), torch.arange(size) % 3


def called(noise: NoiseTracker, epochs: int, sizes: list[int]) -> list[tuple[int, int]]:
    """(epoch, update of the epoch) of every row."""
    rows = []
    for epoch in range(epochs):
        for update, size in enumerate(sizes):
            if noise(*images(size), Point(0.1, max(sizes), 0.0)) is not None:
                rows.append((epoch, update))
        noise.end_epoch()
    return rows


@pytest.mark.parametrize(
    "every, due",
    [
        (4, [(0, 0), (1, 1), (2, 2)]),
        ("every=4", [(0, 0), (1, 1), (2, 2)]),
        ("2ep", [(0, 0), (2, 0)]),
        # the last batch of an epoch has one sample, and leaves it to the next
        (2, [(0, 0), (1, 0), (1, 1), (2, 0)]),
    ],
)
def test_a_call_an_update_measures_when_due(every, due):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = NoiseTracker(model, optimizer, samples=100, every=every)
    assert called(noise, 3, [8, 8, 1] if every == 2 else [8, 8, 8]) == due
    assert noise.count == len(due)


def test_a_batch_that_is_measured_by_itself_settles_the_estimator():
    model = small()
    optimizer = NoisySGD(model.parameters(), "sgd", 0.1)
    noise = NoiseTracker(model, optimizer, samples=100, every=1)
    row = noise.measure(*images(4), Point(0.1, 4, 0.0), 0, 0)
    assert row["estimator"] == "per-sample" and "samples of one batch" in row["se_over"]
    parts = NoiseTracker(model, optimizer, samples=100, every=1, estimator="micro-batch")
    with pytest.raises(ValueError, match="needs batches of 8 or more, not 3"):
        parts.measure(*images(3), Point(0.1, 3, 0.0), 0, 0)


def test_a_saved_tracker_goes_on_as_it_would():
    model = small()
    optimizer = NoisySGD(model.parameters(), "sgd", 0.1)
    first = NoiseTracker(model, optimizer, samples=100, every=3)
    second = NoiseTracker(model, optimizer, samples=100, every=3)
    called(first, 1, [8, 8])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(4):
        x, y = images(8)
        assert first(x, y, Point(0.1, 8, 0.0)) == second(x, y, Point(0.1, 8, 0.0))
    assert first.count == 2


@pytest.mark.parametrize(
    "of, form, nu",
    [
        (lambda p: NoisySGD(p, "qhm", 0.1, 0.9, nu=0.3), "qhm", 0.3),
        (lambda p: NoisySGD(p, "sgd", 0.1), "sgd", 1.0),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1), "shb", 1.0),
    ],
)
def test_the_noise_model_is_that_of_the_optimizer(of, form, nu):
    model = small()
    noise = NoiseTracker(model, of(model.parameters()), samples=100, every=1)
    beta = 0.0 if form == "sgd" else 0.9
    row = noise(*images(8), Point(0.1, 8, beta))
    smoothing = Smoothing(form, row["c2_sampled"], row["k2"], nu)
    assert row["delta_measured"] == pytest.approx(smoothing.degree(0.1, 8, beta), rel=1e-12)


def test_the_version_of_the_bound_is_a_choice():
    model = small()
    optimizer = NoisySGD(model.parameters(), "nshb", 0.1, 0.9)
    x, y = images(8)
    for version in ("v1", "v3"):
        row = NoiseTracker(model, optimizer, samples=100, every=1, version=version)(
            x, y, Point(0.1, 8, 0.9)
        )
        smoothing = Smoothing("nshb", row["c2_sampled"], row["k2"], version=version)
        assert row["delta_measured"] == pytest.approx(smoothing.degree(0.1, 8, 0.9), rel=1e-12)


def groups_of_two_nu(params) -> NoisySGD:
    first, second = params
    return NoisySGD([{"params": [first], "nu": 0.1}, {"params": [second]}], "qhm", 0.1, 0.9)


@pytest.mark.parametrize(
    "of",
    [
        lambda p: torch.optim.Adam(p),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, dampening=0.9),
        lambda p: NoisySGD(p, "nesterov", 0.1, 0.9),
    ],
)
def test_without_a_noise_model_all_is_measured_but_delta(of):
    model, (x, y) = small(), images(8)
    usual = NoisySGD(model.parameters(), "shb", 0.1, 0.9)
    rows = [
        NoiseTracker(model, optimizer, samples=100, every=1)(x, y, Point(0.1, 8, 0.9))
        for optimizer in (of(model.parameters()), usual)
    ]
    assert rows[0].pop("delta_measured") is None and rows[1].pop("delta_measured") > 0
    assert rows[0] == rows[1]


def test_groups_of_several_nu_have_no_one_noise_model():
    model = small()
    with pytest.raises(ValueError, match=r"several nu \(\[0.1, 0.5\]\)"):
        NoiseTracker(model, groups_of_two_nu(model.parameters()), samples=100, every=1)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"estimator": "persample"}, "estimator 'persample': did you mean per-sample?"),
        ({"bn": "evaluation"}, "bn 'evaluation': "),
        ({"every": 0}, "every 0: give a number of updates"),
        ({"every": "2 epochs"}, "every '2 epochs': give"),
        ({"samples": 0}, "samples 0 is out of range"),
        ({"samples": None}, "samples None: give the number of samples"),
        ({"samples": 320.5}, "samples 320.5: give the number of samples"),
        ({"loss": "ce"}, "loss 'ce' is no loss(output, target)"),
        ({"loss": nn.CrossEntropyLoss}, "is no loss(output, target)"),
        ({"quantities": "layers"}, "quantities 'layers': give a list of names"),
    ],
    ids=str,
)
def test_arguments_that_there_are_not_are_refused(wrong, words):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=re.escape(words)):
        NoiseTracker(model, optimizer, **({"samples": 100, "every": 1} | wrong))


def test_epochs_that_nobody_ends_are_a_warning():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = NoiseTracker(model, optimizer, samples=16, every="1ep")
    for _ in range(4):
        noise(*images(8))
    with pytest.warns(UserWarning, match=r"two epochs of 16 samples .* call it after each epoch"):
        noise(*images(8))
    noise.end_epoch()
    assert noise(*images(8)) and noise.count == 2


def test_a_tracker_of_another_model_or_of_half_a_batch_is_refused():
    model, (x, y) = small(), images(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for stranger, words in (
        (torch.optim.SGD(small().parameters(), lr=0.1), "no parameter of the model"),
        (None, "optimizer is a NoneType"),
    ):
        with pytest.raises(ValueError, match=words):
            NoiseTracker(model, stranger, samples=100, every=1)
    with pytest.raises(ValueError, match=r"not a torch.nn.Module"):
        NoiseTracker(optimizer, model, samples=100, every=1)
    noise = NoiseTracker(model, optimizer, samples=100, every=1)
    for batch, words in (
        (([x, x], [y]), "2 x and 1 y"),
        (([], []), "0 x and 0 y"),
        ((x.numpy(), y.numpy()), "y is a "),
        ((x, y, 0.1), "point is a float"),
    ):
        with pytest.raises(ValueError, match=words):
            noise(*batch)


def test_batches_that_can_never_be_measured_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = NoiseTracker(model, optimizer, samples=100, every=1)
    with pytest.raises(ValueError, match="micro-batch estimator needs batches of 8 or more, not 4"):
        noise(*images(4), Point(0.1, 4, 0.0))
    noise = NoiseTracker(model, optimizer, samples=10, every=1)
    with pytest.raises(ValueError, match="a batch of 12 samples, where the training set has 10"):
        noise(*images(12), Point(0.1, 12, 0.0))


# Parts that the update makes anyway

MICRO = ["--estimator", "micro-batch", "--batchsize", "64", "--budget", "updates=50"]


def timeless(out, *flags: str) -> list[dict]:
    """All rows of a run, without times."""
    return without_times(read_rows(run(out, *flags)))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_parts_of_micro_batches_are_measured_by_the_update_itself(norm, tmp_path):
    """Update 0 is at the same point with and without --micro-batch: four parts of 16 samples."""
    flags = [*MICRO, "--norm", norm, "--optimizer", "nshb", "--weight-decay", "1e-3"]
    tracked = [*flags, "--track-noise", "every=7"]
    apart = timeless(tmp_path / "apart", *tracked, "--micro-batch", "16")
    extra = timeless(tmp_path / "extra", *tracked)
    plain = timeless(tmp_path / "plain", *flags[2:], "--micro-batch", "16")
    measured = [[row for row in rows if row["kind"] == "measure"] for rows in (apart, extra)]
    # the last batch of the epoch has 29 samples, which are no parts of 16: measured beside it
    assert [row["step"] for row in measured[0]] == [row["step"] for row in measured[1]]
    assert [row["samples"] for row in measured[0]] == [row["samples"] for row in measured[1]]
    for key in ("c2_sampled", "c2_sampled_se", "grad_norm", "delta_measured", "full_grad_square"):
        assert measured[0][0][key] == pytest.approx(measured[1][0][key], rel=1e-4), key
    assert measured[0][0]["se_over"] == measured[1][0]["se_over"]
    # and training does not notice
    kept = [row for row in apart if row["kind"] != "measure"]
    without = [{k: v for k, v in row.items() if k != "c2_sampled"} for row in kept]
    assert without == [{k: v for k, v in row.items() if k != "c2_sampled"} for row in plain]


def test_a_measured_update_of_parts_makes_no_other_backward_pass(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(NoiseTracker, "measure", lambda *given, **more: calls.append(given))
    rows = timeless(
        tmp_path / "run", *MICRO, *("--track-noise", "every=1", "--micro-batch", "8", "--drop-last")
    )
    assert sum(row["kind"] == "measure" for row in rows) == 50 and not calls
