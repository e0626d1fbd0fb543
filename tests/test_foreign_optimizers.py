"""Optimizers of PyTorch, timm and the user's, driven by a run, against plain PyTorch loops."""

import itertools
import json
import signal

import pytest
import torch
from exact import EXACT
from forks import finish
from rows import read_rows
from torch.nn import functional as F

from fastsmooth import foreign, owncode, train
from fastsmooth.foreign import Foreign
from fastsmooth.noise.online import NoiseTracker
from fastsmooth.optim import NoisySGD
from fastsmooth.report.__main__ import main as report
from fastsmooth.runfolder.checkpoint import Checkpoints
from fastsmooth.runfolder.read import read_run
from fastsmooth.schedule import Point
from fastsmooth.sweep.critical import analyse, print_curve
from fastsmooth.train import main
from fastsmooth.training.step import Step

QUICK = [*EXACT, "--epochs", "2", "--batchsize", "160", "--log-every", "3"]


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 8, 3), nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))
"""


@pytest.fixture
def net(tmp_path):
    """A small network of own code: FILE.py:NAME."""
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path / 'net.py'}:Net"


def weights(out):
    state = Checkpoints(out / "checkpoints", print).load()
    assert state is not None
    return state["model"]


def rows_of(out, kind):
    return [row for row in read_rows(out) if row["kind"] == kind]


def close(mine, theirs, **tolerance):
    for name, value in theirs.items():
        torch.testing.assert_close(
            mine[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def batches_of(monkeypatch):
    """The batches that a run trains on, as it goes."""
    seen, gradient = [], Step.gradient

    def spy(step, x, y, size=None):
        seen.append((x.clone(), y.clone()))
        return gradient(step, x, y, size)

    monkeypatch.setattr(Step, "gradient", spy)
    return seen


def timm_optimizer(name):
    def make(params, **options):
        from timm import optim

        return optim.get_optimizer_class(name)(params, **options)

    return make


CASES = [
    ("torch/AdamW", torch.optim.AdamW, 0.004, {"betas": (0.8, 0.95), "eps": 1e-5}, 0.1),
    ("torch/SGD", torch.optim.SGD, 0.1, {"momentum": 0.9, "nesterov": True}, 0.001),
    ("torch/RMSprop", torch.optim.RMSprop, 0.001, {"centered": True}, 0.0),
    ("torch/Adagrad", torch.optim.Adagrad, 0.01, {}, 0.0),
    ("timm/lamb", timm_optimizer("lamb"), 0.01, {}, 0.01),
    ("timm/lion", timm_optimizer("lion"), 0.0005, {}, 0.01),
]


@pytest.mark.parametrize("name, make, lr, options, decay", CASES, ids=[name for name, *_ in CASES])
def test_a_whole_run_is_a_plain_loop_over_the_same_batches(
    name, make, lr, options, decay, net, tmp_path, monkeypatch
):
    seen = batches_of(monkeypatch)
    words = [
        f"{key}={','.join(map(str, v)) if isinstance(v, tuple) else str(v).lower()}"
        for key, v in options.items()
    ]
    argv = [*QUICK, "--model", net, "--optimizer", name, "--lr", str(lr), "--method", "exp"]
    argv += ["--seed", "4"]
    argv += ["--optimizer-args", *words] * bool(words)
    argv += ["--weight-decay", str(decay)] * bool(decay)
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    torch.manual_seed(4)
    model = owncode.load(net)(10, 3).to(memory_format=torch.channels_last)
    optimizer = make(model.parameters(), lr=lr, weight_decay=decay, **options)
    logged = rows_of(tmp_path / "run", "step")
    for number, (x, y) in enumerate(seen):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.9 ** (number // 9)  # of --method exp, 9 updates an epoch
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        if (number + 1) % 3 == 0:
            row, now = logged[number // 3], optimizer.param_groups[0]["lr"]
            moved = [(b - p) / now for b, p in zip(before, model.parameters(), strict=True)]
            norm = torch.cat([m.flatten() for m in moved]).norm().item()
            slope = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
            assert row["direction_norm"] == pytest.approx(norm, rel=1e-3)
            assert row["grad_norm"] == pytest.approx(slope, rel=1e-3)
            assert row["lr"] == pytest.approx(now) and row["delta"] is row["momentum"] is None
    assert len(seen) == 18
    close(weights(tmp_path / "run"), model.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name, words",
    [("torch/AdamW", ["amsgrad=true"]), ("torch/SGD", ["momentum=0.9"]), ("timm/adafactor", [])],
)
def test_an_interrupted_run_goes_on_in_the_same_bits(name, words, net, tmp_path, monkeypatch):
    argv = [*QUICK, "--model", net, "--optimizer", name, "--lr", "0.002", "--method", "cosine"]
    argv += ["--optimizer-args", *words] * bool(words)
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    calls = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(train, "watch", lambda c: lambda: signal.SIGTERM * (next(calls) == 11))
        assert main([*argv, "--out", str(tmp_path / "halves")]) == 75
    assert main([*argv, "--resume", "--out", str(tmp_path / "halves")]) == 0
    close(weights(tmp_path / "halves"), weights(tmp_path / "whole"), rtol=0, atol=0)
    first, second = (
        Checkpoints(tmp_path / n / "checkpoints", print).load() for n in ("whole", "halves")
    )
    assert first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"]
    assert (
        rows_of(tmp_path / "halves", "epoch")[-1]["test_loss"]
        == rows_of(tmp_path / "whole", "epoch")[-1]["test_loss"]
    )


@pytest.mark.full
def test_two_processes_train_as_one_does(net, tmp_path):
    argv = [*QUICK, "--model", net, "--optimizer", "torch/AdamW", "--lr", "0.003"]
    for world in (1, 2):
        finish(argv, tmp_path / f"run-{world}", world)
    mine, theirs = (weights(tmp_path / f"run-{world}") for world in (2, 1))
    close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_c2_at_a_point_does_not_hang_on_the_optimizer(net, tmp_path):
    flags = ["--track-noise", "every=100", "--model", net, "--epochs", "1"]
    found = []
    for name in ("sgd", "torch/AdamW", "nesterov"):
        out = tmp_path / name.replace("/", "-")
        assert main([*QUICK, *flags, "--optimizer", name, "--out", str(out)]) == 0
        (row,) = rows_of(out, "measure")
        found.append(row)
    for row in found[1:]:
        assert row["delta"] is row["delta_measured"] is None
        for name in ("c2_sampled", "c2_sampled_se", "grad_norm", "noise_scale", "estimator"):
            assert row[name] == found[0][name], name
    assert found[0]["delta_measured"] > 0


def sampled(out, net, *flags):
    steps = ["--mode", "sampling", "--steps", "0", "6", "--draws", "4", "--model", net]
    assert main([*EXACT, "--batchsize", "64", *steps, *flags, "--out", str(out)]) == 0
    return json.loads((out / "noise.json").read_text())["points"]


def test_sampling_with_sgd_of_torch_is_sampling_with_sgd(net, tmp_path):
    ours = sampled(tmp_path / "ours", net, "--optimizer", "sgd", "--weight-decay", "0.01")
    theirs = sampled(tmp_path / "theirs", net, "--optimizer", "torch/SGD", "--weight-decay", "0.01")
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("noise_norm", "noise_norm_se", "full_grad_norm", "c2_sampled"):
            assert other[name] == pytest.approx(mine[name], rel=2e-5), name
        assert other["se_over"] == mine["se_over"] == "4 mini-batches drawn at one point"


def test_sampling_says_that_the_state_stands(net, tmp_path):
    flags = ["--optimizer", "torch/SGD", "--optimizer-args", "momentum=0.9"]
    first, later = sampled(tmp_path / "run", net, *flags)
    assert first["se_over"] == "4 mini-batches drawn at one point"
    assert later["se_over"].endswith("with the state of torch/SGD as it stands")
    assert later["noise_norm"] > 2 * later["c2_sampled"] ** 0.5 / 8  # the buffer is far off


def test_crossings_are_found_and_reported_without_kappa(net, tmp_path, capsys):
    for size in (64, 128):
        argv = [
            *EXACT,
            "--model",
            net,
            "--mode",
            "critical",
            "--batchsize",
            str(size),
            "--eps",
            "9",
        ]
        argv += ["--min-epochs", "0", "--epochs", "1", "--log-every", "5"]
        argv += ["--optimizer", "torch/AdamW", "--lr", "0.003"]
        assert main([*argv, "--out", str(tmp_path / "runs" / str(size))]) == 0
    runs = [read_run(tmp_path / "runs" / str(size)) for size in (64, 128)]
    assert all(run.critical["momentum"] is None for run in runs)
    (curve,) = analyse(runs)
    assert curve.best in (64, 128) and curve.sfo and curve.bracket
    assert curve.kappa is curve.c2_critical is curve.c2_range is curve.batch_of(3.0) is None
    capsys.readouterr()
    print_curve(curve, curve.to_json() | {"c2_sampled": None})
    assert "c2_critical unknown" in capsys.readouterr().out
    assert report([str(tmp_path / "runs"), "--out", str(tmp_path / "page")]) == 0
    assert "torch/AdamW" in (tmp_path / "page" / "report.html").read_text()


def test_a_report_copes_without_delta(net, tmp_path):
    for name in ("torch/AdamW", "nesterov"):
        argv = [*QUICK, "--model", net, "--optimizer", name, "--track-noise", "every=3"]
        out = tmp_path / "runs" / name.replace("/", "-")
        assert main([*argv, "--lr", "0.003", "--out", str(out)]) == 0
    assert report([str(tmp_path / "runs"), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert "Gradient variance" in page and "nesterov" in page


# The adapter


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in ((3, 4), (5,), ())]


def gradients(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return [torch.randn(s, dtype=dtype) for s in ((3, 4), (5,), ())]


def made(name="torch/AdamW", *words, params=None, lr=0.01, decay=0.1):
    return foreign.build(name, words, params or parameters(), lr, decay)


def stepped(optimizer, params, count=3):
    for step in range(count):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g
        optimizer.step()


@pytest.mark.parametrize("name", ["torch/AdamW", "torch/Rprop", "torch/NAdam", "timm/lamb"])
def test_directions_are_those_of_the_next_step_and_leave_no_trace(name):
    params = parameters()
    optimizer = made(name, params=params, decay=0.0)
    stepped(optimizer, params)
    kept = [p.detach().clone() for p in params]
    state = json.dumps(str(optimizer.state_dict()))
    given, random = gradients(9), torch.get_rng_state()
    found = optimizer.directions(given)
    assert all(torch.equal(p, q) for p, q in zip(params, kept, strict=True))
    assert json.dumps(str(optimizer.state_dict())) == state
    assert torch.equal(random, torch.get_rng_state())
    for p, g in zip(params, given, strict=True):
        p.grad = g
    optimizer.step()
    for m, p, before in zip(found, params, kept, strict=True):
        assert m.dtype == torch.float64
        torch.testing.assert_close((before - p.detach()).double() / 0.01, m, rtol=1e-3, atol=1e-4)
    square = sum(m.square().sum() for m in found)
    torch.testing.assert_close(optimizer.sq_norms[1], square, rtol=1e-3, atol=0)
    expected = sum(g.double().square().sum() for g in given)
    torch.testing.assert_close(optimizer.sq_norms[0], expected, rtol=1e-6, atol=0)


def test_groups_keep_the_ratio_of_their_learning_rates():
    params = parameters()
    groups = [{"params": params[:1], "lr": 0.001, "weight_decay": 0.0}, {"params": params[1:]}]
    optimizer = made("torch/SGD", params=groups, decay=0.5)
    optimizer.set_point(Point(0.2, 1, 0.0))
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.02, 0.2])
    given = gradients(1)
    found = optimizer.directions(given)  # in units of the schedule's lr
    torch.testing.assert_close(found[0], 0.1 * given[0].double())
    torch.testing.assert_close(found[1], (given[1] + 0.5 * params[1]).double().detach())


def test_steps_along_a_mean_have_the_noise_of_the_parts():
    mine, theirs = parameters(), parameters()
    ours, reference = (
        made("torch/SGD", params=mine, decay=0.1),
        NoisySGD(theirs, "sgd", 0.01, weight_decay=0.1),
    )
    parts = [gradients(seed) for seed in range(4)]
    for a, b in zip(ours.step_along_mean(parts), reference.step_along_mean(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.sq_norms, reference.sq_norms, rtol=1e-4, atol=0)
    close(dict(enumerate(mine)), dict(enumerate(theirs)), rtol=1e-6, atol=1e-7)


def test_a_step_whose_gradient_is_not_finite_shows_in_the_norms():
    params = parameters()
    optimizer = made(params=params)
    stepped(optimizer, params, 1)
    assert optimizer.sq_norms.isfinite().all()
    params[0].grad[0, 0] = torch.nan
    optimizer.step()
    assert optimizer.sq_norms.isnan().all()


def test_a_run_that_diverges_stops_with_3(net, tmp_path, capsys):
    argv = [*QUICK, "--model", net, "--optimizer", "torch/SGD", "--lr", "1e30"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 3
    assert "not finite" in capsys.readouterr().err


def test_a_tracker_measures_with_any_optimizer():
    model = torch.nn.Linear(3, 2)
    noise = NoiseTracker(model, torch.optim.AdamW(model.parameters()), samples=100, every=1)
    row = noise(torch.randn(8, 3), torch.arange(8) % 2, Point(0.1, 8, 0.0))
    assert row["c2_sampled"] > 0 and row["delta_measured"] is None
    driven = Foreign("x", torch.optim.Adam(model.parameters(), 0.1), 0.1)
    with pytest.raises(ValueError, match="its rule is that of SGD without momentum"):
        NoiseTracker(model, driven, samples=100, every=1, quantities=["cabs"])
