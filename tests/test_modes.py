"""Measurements: exact at one point, without a trace, the same however often they are looked at."""

import contextlib
import copy
import itertools
import json
import math
import time

import numpy as np
import pytest
import torch
from exact import EXACT
from forks import assert_same_bits
from images import epoch_batches
from implementations import compiles_once
from rows import read_rows
from torch import nn
from torch.nn import functional as F

from fastsmooth import models
from fastsmooth.cli.config import resolve
from fastsmooth.data import open_data
from fastsmooth.data.order import in_order, permutation, reordered, subset
from fastsmooth.noise import gradients
from fastsmooth.noise.estimators import Estimate
from fastsmooth.noise.threshold import NormRecord
from fastsmooth.optim import NoisySGD
from fastsmooth.ranks import Ranks
from fastsmooth.runfolder.read import read_status
from fastsmooth.runfolder.write import TIMES
from fastsmooth.train import main
from fastsmooth.training import loop, measuring, modes

CPU = torch.device("cpu")


def run(tmp_path, *flags: str, name: str = "run"):
    out = tmp_path / name
    assert main([*flags, "--out", str(out)]) == 0
    return out


def points_of(out) -> list[dict]:
    return json.loads((out / "noise.json").read_text())["points"]


def linear_model(features: int = 5, classes: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, classes)).double()


def drawn(model, batch):
    """draw -> the gradient of the mini-batch (x, y) = batch(draw)."""
    return lambda draw: gradients.batch_gradient(model, *batch(draw))


def there(full):
    """All draws are at one point, where the full gradient is this."""
    return lambda draw: contextlib.nullcontext(full)


def noisy_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(144, 10),
    )


@pytest.mark.parametrize("bn", ["train", "eval"])
def test_a_measurement_leaves_no_trace(bn):
    model = noisy_model()
    optimizer = NoisySGD(model.parameters(), "shb", 0.1, 0.9)
    x, y = torch.randn(20, 3, 8, 8), torch.randint(0, 10, (20,))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    model[1].eval()  # as a module that is frozen: measured so, whatever the mode of the others
    before = [t.clone() for t in (*model.parameters(), *model.buffers(), torch.get_rng_state())]
    grads = [p.grad.clone() for p in model.parameters()]
    buffers = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    with gradients.undisturbed(model, bn):
        assert model.training == model[0].training == (bn == "train") and not model[1].training
        full = gradients.full_gradient(model, [(x[:12], y[:12]), (x[12:], y[12:])])
        gradient = drawn(model, lambda draw: (x[draw : draw + 4], y[draw : draw + 4]))
        gradients.direction_noise(optimizer, gradient, 4, there(full), 3, 20)
    after = (*model.parameters(), *model.buffers(), torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))
    assert all(
        torch.equal(a, s["momentum_buffer"])
        for a, s in zip(buffers, optimizer.state.values(), strict=True)
    )
    assert model.training and not model[1].training


@pytest.mark.parametrize("chunk", [1, 3, 7, 20, 64])
def test_the_full_gradient_weights_every_chunk_by_its_true_size(chunk):
    model = noisy_model().double().eval()
    x, y = torch.randn(20, 3, 8, 8, dtype=torch.float64), torch.randint(0, 10, (20,))
    F.cross_entropy(model(x), y).backward()
    full = gradients.full_gradient(model, zip(x.split(chunk), y.split(chunk), strict=True))
    for p, g in zip(model.parameters(), full, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-10, atol=1e-14)


def test_the_full_gradient_is_summed_in_float64():
    model = noisy_model().eval()
    x, y = torch.randn(300, 3, 8, 8), torch.randint(0, 10, (300,))
    chunks = list(zip(x.split(7), y.split(7), strict=True))
    expected = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for part in chunks:
        for e, g in zip(expected, gradients.batch_gradient(model, *part), strict=True):
            e += g.double() * (len(part[1]) / 300)
    for g, e in zip(gradients.full_gradient(model, chunks), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("chunk", [7, 100, 250])
def test_the_chunks_of_a_float32_network_do_not_show_in_eval_mode(chunk):
    """Against one batch in float64; no chunk is worse than twice one float32 batch."""
    data = open_data(resolve({}), CPU)
    torch.manual_seed(0)
    model = models.build("resnet8", 10)
    x, y = next(data.train.batches([torch.arange(250)]))
    with torch.no_grad():
        model(x)  # running statistics of real images
    exact = copy.deepcopy(model).double().eval()
    expected = torch.cat([g.flatten() for g in gradients.batch_gradient(exact, x.double(), y)])
    model.eval()

    def error(size):
        full = gradients.full_gradient(model, zip(x.split(size), y.split(size), strict=True))
        return (torch.cat([g.flatten() for g in full]) - expected).norm() / expected.norm()

    assert error(chunk) <= 2 * error(250) < 1e-5


def test_batchnorm_in_train_mode_uses_the_chunks_own_statistics():
    model = noisy_model()
    model[3].p = 0.0
    x, y = torch.randn(20, 3, 8, 8), torch.randint(0, 10, (20,))
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for part in (slice(0, 10), slice(10, 20)):
        model.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        expected = [e + p.grad / 2 for e, p in zip(expected, model.parameters(), strict=True)]
    with gradients.undisturbed(model, "train"):
        full = gradients.full_gradient(model, [(x[:10], y[:10]), (x[10:], y[10:])])
    for g, e in zip(full, expected, strict=True):
        torch.testing.assert_close(g.float(), e, rtol=1e-4, atol=1e-6)


def per_sample_variance(model, x, y) -> float:
    """C^2 = (1/N) sum ||g_i - mean||^2, one backward a sample."""
    rows = torch.stack(
        [
            torch.cat(
                [g.flatten() for g in gradients.batch_gradient(model, x[i : i + 1], y[i : i + 1])]
            )
            for i in range(len(x))
        ]
    )
    return (rows - rows.mean(0)).square().sum(1).mean().item()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_c2_sampled_is_unbiased_for_batches_without_replacement(batch):
    """Over all subsets of 6 samples the estimate's mean is C^2 exactly: the factor (N - 1)/(N - b)
    is right."""
    model, n = linear_model(), 6
    x, y = torch.randn(n, 5, dtype=torch.float64), torch.randint(0, 3, (n,))
    subsets = [list(s) for s in itertools.combinations(range(n), batch)]
    optimizer = NoisySGD(model.parameters(), "sgd", 0.1)
    full = gradients.full_gradient(model, [(x, y)])
    gradient = drawn(model, lambda i: (x[subsets[i]], y[subsets[i]]))
    noise = gradients.direction_noise(optimizer, gradient, batch, there(full), len(subsets), n)
    assert noise.grad_variance().value == pytest.approx(per_sample_variance(model, x, y), rel=1e-10)
    assert noise.noise_norms == pytest.approx(noise.grad_noise_norms)


def test_c2_sampled_agrees_with_the_per_sample_variance_within_its_error():
    data = open_data(resolve({}), CPU)
    torch.manual_seed(0)
    model = models.build("resnet8", 10, "group").double()
    x, y = next(data.train.batches([torch.arange(300)]))
    x = x.double()
    full = gradients.full_gradient(model, [(x, y)])
    optimizer = NoisySGD(model.parameters(), "sgd", 0.1)

    def batch(i):
        index = subset(0, 5, i, 300, 20)
        return x[index], y[index]

    c2 = gradients.direction_noise(
        optimizer, drawn(model, batch), 20, there(full), 60, 300
    ).grad_variance()
    assert abs(c2.value - per_sample_variance(model, x, y)) < 4 * c2.error
    assert c2.error < 0.2 * c2.value


@pytest.mark.parametrize("form", ["sgd", "shb", "nshb", "qhm"])
def test_the_direction_noise_compares_the_next_direction_with_the_full_gradient_at_the_same_point(
    form,
):
    model, n = linear_model(), 30
    x, y = torch.randn(n, 5, dtype=torch.float64), torch.randint(0, 3, (n,))
    optimizer = NoisySGD(model.parameters(), form, 0.1, 0.0 if form == "sgd" else 0.9, 0.6)
    for _ in range(4):
        model.zero_grad()
        F.cross_entropy(model(x[:7]), y[:7]).backward()
        optimizer.step()
    full = gradients.full_gradient(model, [(x, y)])
    kept = []
    gradient = drawn(model, lambda i: (x[7:15], y[7:15]))
    noise = gradients.direction_noise(
        optimizer, gradient, 8, there(full), 2, n, lambda i, w: kept.append(w)
    )
    before = [p.detach().clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(x[7:15]), y[7:15]).backward()
    optimizer.step()
    direction = [(b - p.detach()) / 0.1 for b, p in zip(before, model.parameters(), strict=True)]
    for w, m, g in zip(kept[0], direction, full, strict=True):
        torch.testing.assert_close(w, m - g, rtol=1e-9, atol=1e-12)
    expected = math.sqrt(
        sum((m - g).square().sum().item() for m, g in zip(direction, full, strict=True))
    )
    assert noise.noise_norms[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize(
    "form, nu", [("sgd", 1.0), ("shb", 1.0), ("nshb", 1.0), ("qhm", 0.3), ("qhm", 0.7)]
)
def test_noise_of_linear_regression_at_a_frozen_point_has_its_closed_form(form, nu, beta):
    """E||m_t - grad f||^2 over mini-batches drawn with replacement, one chain of draws a row of the
    parameter."""
    chains, n, features, b = 4000, 60, 6, 8
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(n, features, generator=generator, dtype=torch.float64)
    targets = torch.randn(n, generator=generator, dtype=torch.float64)
    frozen = torch.randn(features, generator=generator, dtype=torch.float64)
    gradients = (inputs @ frozen - targets)[:, None] * inputs  # of (a w - t)^2 / 2, [n, features]
    full = gradients.mean(0)
    s2 = (gradients - full).square().sum(1).mean().item() / b
    expected = {
        "sgd": s2,
        "nshb": s2 * (1 - beta) / (1 + beta),
        "qhm": s2 * ((1 - nu * beta) ** 2 + nu**2 * beta**2 * (1 - beta) / (1 + beta)),
        "shb": s2 / (1 - beta**2) + (beta / (1 - beta)) ** 2 * full.square().sum().item(),
    }[form]
    w = frozen.repeat(chains, 1).requires_grad_()
    # lr 0 freezes the point
    optimizer = NoisySGD([w], form, 0.0, 0.0 if form == "sgd" else beta, nu)

    def drawn():
        return gradients[torch.randint(0, n, (chains, b), generator=generator)].mean(1)

    for _ in range(150):  # the start is forgotten to 0.9^150 = 1e-7
        w.grad = drawn()
        optimizer.step()
    (direction,) = optimizer.directions([drawn()])
    squares = (direction - full).square().sum(1)
    standard_error = squares.std().item() / math.sqrt(chains)
    assert torch.equal(w[0], frozen) and standard_error < 0.02 * expected
    assert abs(squares.mean().item() - expected) < 3 * standard_error


def test_no_draw_waits_for_the_device(monkeypatch):
    model, n = linear_model(), 30
    x, y = torch.randn(n, 5, dtype=torch.float64), torch.randint(0, 3, (n,))
    optimizer = NoisySGD(model.parameters(), "sgd", 0.1)
    full = gradients.full_gradient(model, [(x, y)])
    reads, counts = [], []
    item, tolist = torch.Tensor.item, torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "item", lambda t: reads.append(1) or item(t))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(1) or tolist(t))
    for draws in (2, 9):
        reads.clear()
        gradient = drawn(model, lambda i: (x[i : i + 4], y[i : i + 4]))
        gradients.direction_noise(optimizer, gradient, 4, there(full), draws, n)
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0


def test_a_mean_has_the_textbook_standard_error():
    draws = [1.0, 4.0, 2.5, 7.0]
    mean = Estimate.mean(draws)
    assert mean.value == pytest.approx(np.mean(draws))
    assert mean.error == pytest.approx(np.std(draws, ddof=1) / 2)


@pytest.mark.parametrize("criterion", ["mean-norm", "rms-norm"])
def test_first_crossings_equal_a_plain_loop(criterion):
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(size=400)) * np.linspace(2, 0.1, 400)
    eps = (3.0, 2.0, 1.5, 1.2, 1e-3)
    record = NormRecord(eps, criterion, 20, CPU)
    expected = dict.fromkeys(eps, 0)
    total = 0.0
    for t, value in enumerate(norms, start=1):
        record.observe(torch.tensor(value), torch.tensor(t))
        total += value if criterion == "mean-norm" else value**2
        running = total / t if criterion == "mean-norm" else math.sqrt(total / t)
        for e in eps:
            if t > 20 and running <= e and not expected[e]:
                expected[e] = t
    assert record.crossings() == list(expected.values())
    assert record.crossings()[0] > 0 and record.crossings()[-1] == 0
    summary = record.summary()
    assert summary["grad_norm_max"] == pytest.approx(norms.max())
    assert summary["grad_norm_rms"] == pytest.approx(math.sqrt((norms**2).mean()))


def test_a_norm_that_is_not_a_number_is_no_crossing():
    record = NormRecord((1e9,), "mean-norm", 0, CPU)
    record.observe(torch.tensor(float("nan")), torch.tensor(1))
    record.observe(torch.tensor(1.0), torch.tensor(2))
    assert record.crossings() == [0]


def test_every_eps_has_a_key_of_its_own(tmp_path):
    line = [
        "--mode",
        "critical",
        "--epochs",
        "1",
        "--min-epochs",
        "0",
        "--batchsize",
        "400",
        "--eps",
    ]
    out = run(tmp_path, *line, "9.0000001", "9", "1e-6", "0.1")
    crossings = json.loads((out / "critical.json").read_text())["crossings"]
    assert list(crossings) == ["9.0000001", "9", "1e-06", "0.1"]
    assert (
        crossings["9"]["step"] == crossings["9.0000001"]["step"] == 1 and crossings["0.1"] is None
    )


CRITICAL = ["--mode", "critical", "--epochs", "4", "--eps", "1.6", "1.2", "0.9", "1e-6"]


def test_a_crossing_is_exact_however_often_it_is_looked_at(tmp_path):
    found = []
    for every in ("1", "7", "1000"):
        out = run(tmp_path, *CRITICAL, "--log-every", every, name=every)
        found.append(json.loads((out / "critical.json").read_text())["crossings"])
    assert found[0] == found[1] == found[2]
    assert found[0]["1.6"]["step"] > 45 and found[0]["1e-06"] is None


def test_critical_finds_what_an_independent_loop_finds(tmp_path):
    """torch.optim.SGD, a Python sum of norms and nothing of the trainer but its data order."""
    crossings = json.loads((run(tmp_path, *CRITICAL) / "critical.json").read_text())["crossings"]
    data = open_data(resolve({}), CPU)
    torch.manual_seed(0)
    model = models.build("resnet8", 10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total, update, first = 0.0, 0, {}
    for epoch in range(4):
        for x, y in data.train.batches(epoch_batches(0, epoch, 1437, 32), epoch):
            update += 1
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            total += math.sqrt(
                sum(p.grad.double().square().sum().item() for p in model.parameters())
            )
            optimizer.step()
            for eps in (1.6, 1.2, 0.9):
                if update > 45 and total / update <= eps:
                    first.setdefault(f"{eps:g}", update)
    assert {eps: c["step"] for eps, c in crossings.items() if c} == first
    found = crossings["1.6"]
    epoch, within = divmod(found["step"] - 1, 45)
    assert found["epoch"] == epoch
    assert found["samples"] == epoch * 1437 + min((within + 1) * 32, 1437)


def test_critical_stops_when_every_threshold_is_crossed(tmp_path):
    out = run(tmp_path, "--mode", "critical", "--epochs", "9", "--eps", "1.6", "--log-every", "5")
    found = json.loads((out / "critical.json").read_text())
    assert (
        found["crossings"]["1.6"]["step"]
        <= found["updates"]
        < found["crossings"]["1.6"]["step"] + 5
    )


@pytest.mark.parametrize(
    "how, first", [([], 46), (["--criterion", "full-grad", "--full-grad-every", "30"], 60)]
)
def test_a_mean_that_is_below_eps_when_counting_begins_is_censored(how, first, tmp_path, capsys):
    """45 updates are the epoch in which none counts; full gradients are taken at updates 30 and
    60."""
    out = run(tmp_path, "--mode", "critical", "--epochs", "2", "--eps", "1e9", "1e-9", *how)
    found = json.loads((out / "critical.json").read_text())
    early, never = found["crossings"].values()
    assert (early["step"], early["censored"], never) == (first, True, None) and found[
        "first_that_counts"
    ] == first
    assert "the first that counts" in capsys.readouterr().out


def test_a_crossing_at_the_very_first_update_is_none_that_was_there_before(tmp_path):
    found = run(
        tmp_path,
        "--mode",
        "critical",
        "--epochs",
        "1",
        "--min-epochs",
        "0",
        "--log-every",
        "5",
        "--eps",
        "1e9",
    )
    (found,) = json.loads((found / "critical.json").read_text())["crossings"].values()
    assert (found["step"], found["censored"]) == (1, False)


def test_a_crossing_after_counting_has_begun_is_not_censored(tmp_path):
    out = run(tmp_path, "--mode", "critical", "--epochs", "4", "--eps", "1.6")
    (found,) = json.loads((out / "critical.json").read_text())["crossings"].values()
    assert found["step"] > 46 and found["censored"] is False


FULL_GRAD = ["--mode", "critical", "--criterion", "full-grad", "--full-grad-every"]


def test_the_full_gradient_criterion_averages_full_gradient_norms(tmp_path):
    flags = [*FULL_GRAD, "30", "--bn", "eval", "--norm", "group"]
    out = run(tmp_path, *flags, "--epochs", "2", "--eps", "0.001")
    found = json.loads((out / "critical.json").read_text())
    data = open_data(resolve({}), CPU)
    torch.manual_seed(0)
    model = models.build("resnet8", 10, "group").to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x_all, y_all = next(data.train.batches(in_order(1437, 1437)))
    norms, update = [], 0
    for epoch in range(2):
        for x, y in data.train.batches(epoch_batches(0, epoch, 1437, 32), epoch):
            update += 1
            if update % 30 == 0:
                grads = torch.autograd.grad(
                    F.cross_entropy(model(x_all), y_all), list(model.parameters())
                )
                norms.append(math.sqrt(sum(g.double().square().sum().item() for g in grads)))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert len(norms) == 3 and found["resolution"] == 30
    assert found["grad_norm_mean"] == pytest.approx(np.mean(norms), rel=1e-4)


def test_measuring_the_full_gradient_does_not_change_the_run(tmp_path):
    plain = run(tmp_path, "--epochs", "2", name="plain")
    flags = [*FULL_GRAD, "11", "--eps", "1e-9", "--epochs", "2"]
    measured = run(tmp_path, *flags, name="measured")
    rows = [
        [r["test_loss"] for r in read_rows(out) if r["kind"] == "epoch"]
        for out in (plain, measured)
    ]
    assert rows[0] == rows[1]


class Plain:
    """NSHB (beta 0.9, lr 0.1) of the digits' resnet8 in plain autograd; weights, buffers and
    BatchNorm's own."""

    def __init__(self):
        self.data = open_data(resolve({}), CPU)
        torch.manual_seed(0)
        self.model = models.build("resnet8", 10).to(memory_format=torch.channels_last)
        self.buffers = [torch.zeros_like(p) for p in self.model.parameters()]

    def gradient(self, index) -> list[torch.Tensor]:
        x, y = next(self.data.train.batches([index]))
        return list(
            torch.autograd.grad(F.cross_entropy(self.model(x), y), list(self.model.parameters()))
        )

    def update(self, index) -> None:
        grads = self.gradient(index)
        with torch.no_grad():
            for p, b, g in zip(self.model.parameters(), self.buffers, grads, strict=True):
                b.mul_(0.9).add_(g, alpha=1 - 0.9)
                p.sub_(0.1 * b)


# few updates: rounding differs between the two computations and grows with each
FEW = ["--mode", "sampling", "--batchsize", "300", "--steps", "6", "--draws", "3", "--save-omega"]


def test_sampling_measures_after_exactly_so_many_updates(tmp_path):
    """The weights of the measurement are those of a plain run after --steps updates; the omega file
    holds m_t - grad f."""
    out = run(tmp_path, *FEW, "--optimizer", "nshb")
    (noise,) = points_of(out)
    omega = np.load(out / "omega-6.npy")
    assert omega.shape == (3, 78042) and noise["step"] == 6 and noise["epoch"] == 1
    assert np.linalg.norm(omega.astype(np.float64), axis=1) == pytest.approx(
        noise["noise_norms"], rel=1e-5
    )
    centered = omega.astype(np.float64).ravel() - omega.mean(dtype=np.float64)
    assert noise["statistics"]["variance"]["value"] == pytest.approx(np.mean(centered**2), rel=1e-5)
    kurtosis = np.mean(centered**4) / np.mean(centered**2) ** 2 - 3
    assert noise["statistics"]["excess_kurtosis"]["value"] == pytest.approx(kurtosis, rel=1e-4)

    batches = [*epoch_batches(0, 0, 1437, 300), *epoch_batches(0, 1, 1437, 300)]
    for history in range(3):
        plain = Plain()
        for index in batches[:6] if history == 0 else history_batches(history, 6):
            plain.update(index)
        chunks = subset(0, 6, gradients.FULL_GRADIENT_DRAW, 1437, 1437).split(300)
        parts = [torch._foreach_mul(plain.gradient(chunk), len(chunk) / 1437) for chunk in chunks]
        full = [sum(pieces) for pieces in zip(*parts, strict=True)]
        full_norm = math.sqrt(sum(g.double().square().sum().item() for g in full))
        assert noise["full_grad_norms"][history] == pytest.approx(full_norm, rel=1e-3)
        grads = plain.gradient(subset(0, 6, history, 1437, 300))
        direction = [
            0.9 * b + 0.1 * g - f for b, g, f in zip(plain.buffers, grads, full, strict=True)
        ]
        expected = torch.cat([w.flatten() for w in direction]).numpy()
        # another batch or another point would be as far away as the noise is long
        assert np.linalg.norm(omega[history] - expected) < 0.02 * np.linalg.norm(expected), history
    variance = 300 * np.square(noise["grad_noise_norms"]) * 1436 / (1437 - 300)
    assert noise["c2_sampled"] == pytest.approx(variance.mean())
    assert noise["c2_sampled_se"] == pytest.approx(variance.std(ddof=1) / math.sqrt(3))
    assert noise["noise_norm_se"] == pytest.approx(
        np.std(noise["noise_norms"], ddof=1) / math.sqrt(3)
    )
    assert noise["se_over"] == "3 histories, the last 6 updates replayed"
    measured = [r for r in read_rows(out) if r["kind"] == "measure"]
    assert len(measured) == 1 and measured[0]["c2_sampled"] == noise["c2_sampled"]


def history_batches(history: int, updates: int) -> list[torch.Tensor]:
    """Of a history that begins with training: every epoch in an order of its own."""
    whole = torch.arange(1437)
    orders = [reordered(permutation(0, e, 1437), 0, 0, 0, history, e) for e in range(2)]
    assert all(torch.equal(order.sort().values, whole) for order in orders)
    return [batch for order in orders for batch in order.split(300)][:updates]


def test_no_two_processes_drop_the_same_units_in_their_histories():
    places = [(history, Ranks(rank, 3)) for history in range(1, 9) for rank in range(3)]
    seeds = {
        measuring.history_seed(seed, update, *place)
        for seed in range(3)
        for update in (0, 9)
        for place in places
    }
    assert len(seeds) == 3 * 2 * len(places)
    assert measuring.history_seed(5, 2, 1, Ranks()) == (7 + 0x9E3779B97F4A7C15) % 2**63


def test_a_history_draws_from_what_the_epoch_has_left():
    order = permutation(0, 3, 1437)
    assert torch.equal(reordered(order, 600, 0, 47, 0, 0), order)
    seen = set()
    for history in (1, 2):
        other = reordered(order, 600, 0, 47, history, 0)
        assert torch.equal(other[:600], order[:600])
        assert torch.equal(other[600:].sort().values, order[600:].sort().values)
        seen.add(tuple(other.tolist()))
    assert len({*seen, tuple(order.tolist())}) == 3


@pytest.mark.parametrize(
    "flags",
    [["--optimizer", "shb"], ["--optimizer", "qhm", "--method", "hybrid", "--decay-epoch", "1"]],
)
def test_the_first_history_is_the_run_itself(flags, tmp_path, monkeypatch):
    """Bit for bit, from the middle of an epoch over its edge; every other history ends
    elsewhere."""
    ends, places = [], []
    ahead, before_gradient = measuring.ahead, loop.Run.before_gradient

    def flat(live):
        buffers = [s["momentum_buffer"] for s in live.step.optimizer.state.values()]
        return torch.cat(
            [t.detach().double().flatten() for t in (*live.model.parameters(), *buffers)]
        )

    @contextlib.contextmanager
    def watched(live, count, history):
        with ahead(live, count, history):
            places.append((live.update, live.epoch, live.step.optimizer.param_groups[0]["lr"]))
            ends.append(flat(live))
            yield

    def watching(live, *batch):
        if live.update == 95:
            places.append((live.update, live.epoch, live.step.optimizer.param_groups[0]["lr"]))
            ends.append(flat(live))
        before_gradient(live, *batch)

    monkeypatch.setattr(measuring, "ahead", watched)
    monkeypatch.setattr(loop.Run, "before_gradient", watching)
    line = "--mode sampling --lr 0.02 --steps 95 --beta 0.5 --draws 3 --epochs 4"
    run(tmp_path, *EXACT, *line.split(), *flags)
    first, *others, own = ends
    assert torch.equal(first, own) and len(others) == 2 and len(set(places)) == 1
    assert not any(torch.equal(other, own) for other in others)


@pytest.mark.parametrize("form, nu", [("shb", 1.0), ("nshb", 1.0), ("qhm", 0.6)])
def test_the_noise_of_a_direction_has_its_closed_form_where_the_point_does_not_move(
    form, nu, tmp_path
):
    """Second moments at a frozen iterate, for batches that an epoch gives out without
    replacement."""
    flags = (
        "--mode sampling --lr 1e-30 --norm group --steps 12 --batchsize 48 --draws 12 --beta 0.5 "
        "--optimizer"
    )
    flags = [*flags.split(), form] + (["--nu", str(nu)] if form == "qhm" else [])
    (point,) = points_of(run(tmp_path, *flags))
    b, n, beta = 48, 1437, 0.5
    c2, full = point["c2_sampled"], point["full_grad_norm"] ** 2
    keep = {"shb": 1.0, "nshb": 0.5, "qhm": nu * 0.5}[form]
    weights = [keep * beta**k for k in range(point["replayed"] + 1)]
    weights[0] += 0.0 if form != "qhm" else 1 - nu
    alone = sum(w * w for w in weights) * c2 / b * (n - b) / (n - 1)
    # two batches of an epoch never share a sample; the last one is drawn from all
    together = (sum(weights[1:]) ** 2 - sum(w * w for w in weights[1:])) * -c2 / (n - 1)
    expected = alone + together + (sum(weights) - 1) ** 2 * full
    squares = Estimate.mean([w * w for w in point["noise_norms"]])
    assert squares.error < 0.2 * expected
    assert abs(squares.value - expected) < 3.5 * math.hypot(
        squares.error, expected * point["c2_sampled_se"] / c2
    )
    assert point["full_grad_norm_se"] < 1e-5 * point["full_grad_norm"]


def test_the_error_of_a_direction_covers_its_history(tmp_path):
    """It is the spread over histories; with the buffer held fixed the last gradient alone would
    vary, a tenth of it."""
    flags = [
        *EXACT,
        "--mode",
        "sampling",
        "--optimizer",
        "nshb",
        "--steps",
        "24",
        "--draws",
        "4",
        "--batchsize",
        "100",
    ]
    (point,) = points_of(run(tmp_path, *flags))
    spread = np.std(point["noise_norms"], ddof=1)
    assert point["noise_norm_se"] == pytest.approx(spread / math.sqrt(4))
    assert spread > 0.02 * point["noise_norm"]


@pytest.mark.parametrize("form", ["shb", "nshb", "qhm"])
def test_a_direction_is_never_held_against_another_function(form, tmp_path, capsys):
    flags = [
        "--mode",
        "sampling",
        "--steps",
        "3",
        "--optimizer",
        form,
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*flags, "--bn", "eval"]) == 2
    assert "use --bn train" in capsys.readouterr().err and not (tmp_path / "run").exists()
    augmented = resolve({"mode": "sampling", "optimizer": form, "augment": "crop-flip"})
    assert augmented.measure_augment
    assert not resolve(
        {"mode": "sampling", "optimizer": "sgd", "augment": "crop-flip"}
    ).measure_augment
    # the digits are not augmented
    assert not resolve({"mode": "sampling", "optimizer": form}).measure_augment


def test_what_was_measured_is_said_in_words(tmp_path, capsys):
    out = run(
        tmp_path, "--mode", "sampling", "--steps", "0", "3", "--draws", "2", "--optimizer", "shb"
    )
    at_start, later = points_of(out)
    assert at_start["se_over"] == "2 mini-batches drawn at one point"  # no update lies before it
    assert later["se_over"] == "2 histories, the last 3 updates replayed"
    assert "training mode: BatchNorm with the statistics of 32 samples" in later["function"]
    said = capsys.readouterr().out
    assert later["function"] in said and f"standard errors over {later['se_over']}" in said


def test_the_function_is_named_by_what_batchnorm_sees(tmp_path):
    flags = ["--mode", "sampling", "--steps", "0", "--draws", "2"]
    ways = {"whole": [], "parts": ["--micro-batch", "8"], "none": ["--norm", "group"]}
    said = {
        how: points_of(run(tmp_path, *flags, *more, name=how))[0]["function"]
        for how, more in ways.items()
    }
    assert said["whole"].endswith(
        "training mode: BatchNorm with the statistics of 32 samples at a time, in one order of the "
        "images"
    )
    assert said["parts"].endswith(
        "training mode: BatchNorm with the statistics of 8 samples at a time, in one order of the "
        "images"
    )
    assert said["none"].endswith("the model in training mode")


def test_a_measurement_is_no_part_of_the_speed_that_is_told(tmp_path, monkeypatch):
    measure, clocks = modes.Sampling.measure, []

    def watched(sampling, live, step):
        began = time.monotonic()
        measure(sampling, live, step)
        clocks.append((live.progress.started - began, live.progress.begun_at, live.samples))

    monkeypatch.setattr(modes.Sampling, "measure", watched)
    run(tmp_path, "--mode", "sampling", "--steps", "0", "3", "--draws", "2")
    assert (
        all(started > 0 and begun == samples for started, begun, samples in clocks)
        and len(clocks) == 2
    )


@pytest.mark.parametrize("draw", [0, 1])
def test_a_measurement_that_is_asked_to_stop_saves_and_is_made_again(draw, tmp_path, monkeypatch):
    flags = [*SEVERAL, "--beta", "0.3", "--batchsize", "100", "--steps", "20"]
    undisturbed = run(tmp_path, *flags, name="undisturbed")
    follow = measuring.follow
    calls = 0

    def stopping(live, stream, updates):
        nonlocal calls
        if calls == draw:
            live.stop_asked = lambda: 15
        calls += 1
        follow(live, stream, updates)

    monkeypatch.setattr(measuring, "follow", stopping)
    out = tmp_path / "out"
    assert main([*flags, "--out", str(out)]) == 75
    assert read_status(out)["state"] == "preempted" and read_status(out)["step"] == 14
    monkeypatch.undo()
    assert main(["--resume", "--out", str(out)]) == 0
    assert (out / "noise.json").read_bytes() == (undisturbed / "noise.json").read_bytes()
    assert (out / "omega-20.npy").read_bytes() == (undisturbed / "omega-20.npy").read_bytes()
    assert not list(out.glob(".omega*"))
    a, b = (
        torch.load(o / "checkpoints" / "ckpt-15.pt", weights_only=True) for o in (out, undisturbed)
    )
    for key in ("model", "optimizer", "meter", "rng", "samples", "data"):
        assert_same_bits(a[key], b[key], key)


def test_the_method_named_sampling_is_the_mode_with_a_constant_schedule(tmp_path):
    flags = ["--steps", "3", "--draws", "2", "--seed", "4"]
    a = run(tmp_path, "--method", "sampling", *flags, name="a")
    b = run(tmp_path, "--mode", "sampling", *flags, name="b")
    assert (a / "noise.json").read_bytes() == (b / "noise.json").read_bytes()


SEVERAL = [
    *EXACT,
    "--mode",
    "sampling",
    "--draws",
    "3",
    "--optimizer",
    "nshb",
    "--save-omega",
    "--log-every",
    "9",
]


@pytest.mark.parametrize(
    "how", [["--optimizer", "sgd", "--bn", "eval"], ["--optimizer", "nshb", "--beta", "0.3"]]
)
def test_several_steps_in_one_run_are_those_of_separate_runs(how, tmp_path):
    """Bit for bit, in whatever order they are given; 45 updates are an epoch."""
    flags = [*SEVERAL, *how, "--batchsize", "32", "--steps"]
    together = run(tmp_path, *flags, "50", "0", "7", name="together")
    assert [p["step"] for p in points_of(together)] == [0, 7, 50]
    measured = [r for r in read_rows(together) if r["kind"] == "measure"]
    for point, row in zip(points_of(together), measured, strict=True):
        alone = run(tmp_path, *flags, str(point["step"]), name=str(point["step"]))
        assert [point] == points_of(alone)
        assert row["step"] == point["step"] and row["c2_sampled"] == point["c2_sampled"]
        name = f"omega-{point['step']}.npy"
        assert (together / name).read_bytes() == (alone / name).read_bytes()
    assert (
        json.loads((together / "summary.json").read_text())["updates"] == 50
    )  # the run ends with its last measurement


@pytest.mark.parametrize("how", [["--optimizer", "sgd", "--bn", "eval"], ["--optimizer", "shb"]])
def test_training_after_a_measurement_is_that_of_a_run_without(how, tmp_path):
    flags = [*EXACT, *how[:2], "--lr", "0.02", "--checkpoint-every", "1"]
    plain = run(tmp_path, *flags, "--epochs", "1", name="plain")
    flags += ["--mode", "sampling", "--steps", "0", "5", "44", "--draws", "2", *how[2:]]
    measured = run(tmp_path, *flags, name="measured")
    a, b = (
        torch.load(out / "checkpoints" / "ckpt-44.pt", weights_only=True)
        for out in (plain, measured)
    )
    # with momentum a point is measured where its histories begin
    expected = [0, 5] if "sgd" in how else [0, 5, 44]
    points = b["instruments"]["sampling"]["points"]
    assert [p["step"] for p in points] == expected and a["instruments"] == {}
    for key in ("model", "optimizer", "meter", "window", "rng", "samples"):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, msg=key)


def test_a_measurement_that_is_asked_to_stop_keeps_the_histories_that_are_done(
    tmp_path, monkeypatch
):
    """Else one that takes longer than --max-time would never end."""
    flags = [flag for flag in SEVERAL if flag != "--save-omega"]
    flags += ["--beta", "0.3", "--batchsize", "100", "--steps", "20", "--draws", "4"]
    undisturbed = run(tmp_path, *flags, name="undisturbed")
    follow = measuring.follow
    calls = 0

    def stopping(live, stream, updates):
        nonlocal calls
        calls += 1
        if calls in (3, 5):  # in the third history, and when it is made again
            live.stop_asked = lambda: 15
        follow(live, stream, updates)

    monkeypatch.setattr(measuring, "follow", stopping)
    out = tmp_path / "out"
    assert main([*flags, "--out", str(out)]) == 75
    assert main(["--resume", "--out", str(out)]) == 75
    assert main(["--resume", "--out", str(out)]) == 0
    assert calls == 4 + 2  # none that was done is made again
    assert (out / "noise.json").read_bytes() == (undisturbed / "noise.json").read_bytes()


@pytest.mark.parametrize(
    "stop", [16, *(pytest.param(stop, marks=pytest.mark.full) for stop in (12, 26, 30))]
)
def test_a_run_interrupted_between_its_measurements_neither_loses_nor_repeats_one(
    stop, tmp_path, monkeypatch
):
    """Checkpoints at every 7th update: some points are in one and kept, others are measured
    again."""
    flags = [*SEVERAL, "--beta", "0.3", "--steps", "10", "25", "40", "--checkpoint-every", "7"]
    undisturbed = run(tmp_path, *flags, name="undisturbed")
    after_update = loop.Run.after_update

    def interrupted(live, point):
        if live.update == stop:
            raise KeyboardInterrupt
        after_update(live, point)

    monkeypatch.setattr(loop.Run, "after_update", interrupted)
    out = tmp_path / "out"
    assert main([*flags, "--out", str(out)]) == 130
    assert [p["step"] for p in points_of(out)] == [step for step in (10, 25) if step < stop]
    monkeypatch.undo()
    assert main(["--resume", "--out", str(out)]) == 0
    assert (out / "noise.json").read_bytes() == (undisturbed / "noise.json").read_bytes()
    rows = [
        [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(o)]
        for o in (out, undisturbed)
    ]
    assert rows[0] == rows[1]
    for step in (10, 25, 40):
        assert (out / f"omega-{step}.npy").read_bytes() == (
            undisturbed / f"omega-{step}.npy"
        ).read_bytes()
    assert not list(out.glob(".omega*"))


def test_a_run_that_has_diverged_is_not_measured(tmp_path, capsys):
    flags = ["--mode", "sampling", "--lr", "1e30", "--norm", "group", "--steps", "0", "40"]
    assert main([*flags, "--out", str(tmp_path / "run")]) == 3
    assert "not finite at update" in capsys.readouterr().err
    assert [p["step"] for p in points_of(tmp_path / "run")] == [0]


def test_measurements_are_in_float32_under_bf16(tmp_path):
    flags = ["--mode", "sampling", "--steps", "0", "--draws", "2", "--bn", "eval"]
    runs = [points_of(run(tmp_path, *flags, "--precision", p, name=p)) for p in ("fp32", "bf16")]
    assert runs[0] == runs[1]


@compiles_once
@pytest.mark.parametrize(
    "bn, precision, graphs", [("train", "fp32", 1), ("eval", "fp32", 2), ("train", "bf16", 2)]
)
def test_neither_draws_nor_chunks_compile_again(bn, precision, graphs, tmp_path):
    """The training step's own graph serves where it can; batches of 100 leave 37 of 1,437 images
    over."""
    flags = [
        "--mode",
        "sampling",
        "--steps",
        "0",
        "1",
        "2",
        "--draws",
        "3",
        "--batchsize",
        "100",
        "--bn",
        bn,
    ]
    flags += ["--precision", precision]
    compiled = run(tmp_path, *flags, "--compile", "on", name="compiled")
    assert json.loads((compiled / "summary.json").read_text())["compiled_graphs"] == graphs
    found, expected = points_of(compiled), points_of(run(tmp_path, *flags, name="eager"))
    for key in ("full_grad_norm", "c2_sampled", "noise_norm"):
        # before training, which amplifies rounding
        assert found[0][key] == pytest.approx(expected[0][key], rel=1e-4)


def test_a_chunk_that_does_not_fit_in_memory_is_halved(tmp_path, monkeypatch):
    flags = ["--mode", "sampling", "--steps", "0", "1", "--draws", "2", "--bn", "eval"]
    whole = points_of(run(tmp_path, *flags, name="whole"))
    sizes, gradient = [], gradients.batch_gradient

    def small(model, x, y, *rest):
        sizes.append(len(y))
        if len(y) > 40:
            raise torch.OutOfMemoryError
        return gradient(model, x, y, *rest)

    monkeypatch.setattr(gradients, "batch_gradient", small)
    halved = points_of(run(tmp_path, *flags, name="halved"))
    first = loop.EVAL_CHUNK["cpu"]
    assert [p["chunk"] for p in whole] == [first] * 2 and [p["chunk"] for p in halved] == [
        first // 8
    ] * 2
    # what did not fit is not tried again
    assert [sizes.count(first // part) for part in (1, 2, 4)] == [1, 1, 1]
    assert halved[0]["full_grad_norm"] == pytest.approx(whole[0]["full_grad_norm"], rel=1e-5)


def test_a_training_batch_is_never_divided(tmp_path, monkeypatch, capsys):
    sizes = []

    def full(*given):
        sizes.append(len(given[2]))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gradients, "batch_gradient", full)
    assert main(["--mode", "sampling", "--steps", "0", "--out", str(tmp_path / "run")]) == 2
    assert "lower --batchsize" in capsys.readouterr().err and sizes == [32]
