"""Measurements: exact at one point, without a trace, the same however often they are looked at."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastsmooth import measure, models
from fastsmooth.config import resolve
from fastsmooth.data import open_data
from fastsmooth.data.order import epoch_batches, in_order, subset
from fastsmooth.log import read_rows
from fastsmooth.measure import Mean, NormRecord
from fastsmooth.optim import NoisySGD
from fastsmooth.train import main

CPU = torch.device("cpu")


def run(tmp_path, *flags: str, name: str = "run"):
    out = tmp_path / name
    assert main([*flags, "--out", str(out)]) == 0
    return out


def linear_model(features: int = 5, classes: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, classes)).double()


def noisy_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10)
    )


@pytest.mark.parametrize("bn", ["train", "eval"])
def test_a_measurement_leaves_no_trace(bn):
    model = noisy_model()
    optimizer = NoisySGD(model.parameters(), "shb", 0.1, 0.9)
    x, y = torch.randn(20, 3, 8, 8), torch.randint(0, 10, (20,))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    model[1].eval()  # a mode that the measurement must give back as it was
    before = [t.clone() for t in (*model.parameters(), *model.buffers(), torch.get_rng_state())]
    grads = [p.grad.clone() for p in model.parameters()]
    buffers = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    with measure.undisturbed(model, bn):
        assert model.training == model[1].training == (bn == "train")
        full = measure.full_gradient(model, [(x[:12], y[:12]), (x[12:], y[12:])], 20)
        measure.direction_noise(model, optimizer, lambda draw: (x[draw : draw + 4], y[draw : draw + 4]), full, 3, 20)
    after = (*model.parameters(), *model.buffers(), torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))
    assert all(torch.equal(a, s["momentum_buffer"]) for a, s in zip(buffers, optimizer.state.values(), strict=True))
    assert model.training and not model[1].training


@pytest.mark.parametrize("chunk", [1, 3, 7, 20, 64])
def test_the_full_gradient_weights_every_chunk_by_its_true_size(chunk):
    model = noisy_model().double().eval()
    x, y = torch.randn(20, 3, 8, 8, dtype=torch.float64), torch.randint(0, 10, (20,))
    F.cross_entropy(model(x), y).backward()
    full = measure.full_gradient(model, zip(x.split(chunk), y.split(chunk), strict=True), 20)
    for p, g in zip(model.parameters(), full, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-10, atol=1e-14)


def test_batchnorm_in_train_mode_uses_the_chunks_own_statistics():
    model = noisy_model()
    model[3].p = 0.0
    x, y = torch.randn(20, 3, 8, 8), torch.randint(0, 10, (20,))
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for part in (slice(0, 10), slice(10, 20)):
        model.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        expected = [e + p.grad / 2 for e, p in zip(expected, model.parameters(), strict=True)]
    with measure.undisturbed(model, "train"):
        full = measure.full_gradient(model, [(x[:10], y[:10]), (x[10:], y[10:])], 20)
    for g, e in zip(full, expected, strict=True):
        torch.testing.assert_close(g.float(), e, rtol=1e-4, atol=1e-6)


def per_sample_variance(model, x, y) -> float:
    """C^2 = (1/N) sum ||g_i - mean||^2, one backward a sample."""
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in measure.batch_gradient(model, x[i : i + 1], y[i : i + 1])])
            for i in range(len(x))
        ]
    )
    return (rows - rows.mean(0)).square().sum(1).mean().item()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_c2_sampled_is_unbiased_for_batches_without_replacement(batch):
    """Over all subsets of 6 samples the estimate's mean is C^2 exactly: the factor (N - 1)/(N - b) is right."""
    model, n = linear_model(), 6
    x, y = torch.randn(n, 5, dtype=torch.float64), torch.randint(0, 3, (n,))
    subsets = [list(s) for s in itertools.combinations(range(n), batch)]
    optimizer = NoisySGD(model.parameters(), "sgd", 0.1)
    full = measure.full_gradient(model, [(x, y)], n)
    noise = measure.direction_noise(model, optimizer, lambda i: (x[subsets[i]], y[subsets[i]]), full, len(subsets), n)
    assert noise.grad_variance().value == pytest.approx(per_sample_variance(model, x, y), rel=1e-10)
    assert noise.noise_norms == pytest.approx(noise.grad_noise_norms)


def test_c2_sampled_agrees_with_the_per_sample_variance_within_its_error():
    data = open_data(resolve({}), CPU)
    torch.manual_seed(0)
    model = models.build("resnet8", 10, "group").double()
    x, y = next(data.train.batches([torch.arange(300)]))
    x = x.double()
    full = measure.full_gradient(model, [(x, y)], 300)
    optimizer = NoisySGD(model.parameters(), "sgd", 0.1)

    def drawn(i):
        index = subset(0, 5, i, 300, 20)
        return x[index], y[index]

    c2 = measure.direction_noise(model, optimizer, drawn, full, 60, 300).grad_variance()
    assert abs(c2.value - per_sample_variance(model, x, y)) < 4 * c2.error
    assert c2.error < 0.2 * c2.value


@pytest.mark.parametrize("form", ["sgd", "shb", "nshb", "qhm"])
def test_the_direction_noise_compares_the_next_direction_with_the_full_gradient_at_the_same_point(form):
    model, n = linear_model(), 30
    x, y = torch.randn(n, 5, dtype=torch.float64), torch.randint(0, 3, (n,))
    optimizer = NoisySGD(model.parameters(), form, 0.1, 0.0 if form == "sgd" else 0.9, 0.6)
    for _ in range(4):
        model.zero_grad()
        F.cross_entropy(model(x[:7]), y[:7]).backward()
        optimizer.step()
    full = measure.full_gradient(model, [(x, y)], n)
    kept = []
    noise = measure.direction_noise(
        model, optimizer, lambda i: (x[7:15], y[7:15]), full, 2, n, lambda i, w: kept.append(w)
    )
    before = [p.detach().clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(x[7:15]), y[7:15]).backward()
    optimizer.step()
    direction = [(b - p.detach()) / 0.1 for b, p in zip(before, model.parameters(), strict=True)]
    for w, m, g in zip(kept[0], direction, full, strict=True):
        torch.testing.assert_close(w, m - g, rtol=1e-9, atol=1e-12)
    expected = math.sqrt(sum((m - g).square().sum().item() for m, g in zip(direction, full, strict=True)))
    assert noise.noise_norms[0] == pytest.approx(expected, rel=1e-9)


def test_a_mean_has_the_textbook_standard_error():
    draws = [1.0, 4.0, 2.5, 7.0]
    mean = Mean.of(draws)
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
        record.observe(torch.tensor(value), t)
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
    record.observe(torch.tensor(float("nan")), 1)
    record.observe(torch.tensor(1.0), 2)
    assert record.crossings() == [0]


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
            total += math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
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
    assert found["crossings"]["1.6"]["step"] <= found["updates"] < found["crossings"]["1.6"]["step"] + 5


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
                grads = torch.autograd.grad(F.cross_entropy(model(x_all), y_all), list(model.parameters()))
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
    rows = [[r["test_loss"] for r in read_rows(out) if r["kind"] == "epoch"] for out in (plain, measured)]
    assert rows[0] == rows[1]


def test_sampling_measures_after_exactly_so_many_updates(tmp_path):
    """The weights of the measurement are those of a plain run after --steps updates; omega.npy holds m_t - grad f."""
    # few updates: rounding differs between the two computations and grows with each
    flags = [
        "--mode",
        "sampling",
        "--batchsize",
        "300",
        "--steps",
        "6",
        "--draws",
        "3",
        "--optimizer",
        "nshb",
        "--bn",
        "eval",
        "--save-omega",
    ]
    out = run(tmp_path, *flags)
    noise = json.loads((out / "noise.json").read_text())
    omega = np.load(out / "omega.npy")
    assert omega.shape == (3, 78042) and noise["step"] == 6 and noise["epoch"] == 1
    assert np.linalg.norm(omega.astype(np.float64), axis=1) == pytest.approx(noise["noise_norms"], rel=1e-5)

    data = open_data(resolve({}), CPU)
    torch.manual_seed(0)
    model = models.build("resnet8", 10).to(memory_format=torch.channels_last)
    buffers = [torch.zeros_like(p) for p in model.parameters()]
    done = 0
    for epoch in range(2):
        for x, y in data.train.batches(epoch_batches(0, epoch, 1437, 300), epoch):
            if done == 6:
                break
            grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
            with torch.no_grad():
                for p, b, g in zip(model.parameters(), buffers, grads, strict=True):
                    b.mul_(0.9).add_(g, alpha=1 - 0.9)
                    p.sub_(0.1 * b)
            done += 1
    model.eval()
    x, y = next(data.train.batches(in_order(1437, 1437)))
    full = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    full_norm = math.sqrt(sum(g.double().square().sum().item() for g in full))
    assert noise["full_grad_norm"] == pytest.approx(full_norm, rel=1e-3)
    index = subset(0, 6, 1, 1437, 300)
    x, y = next(data.train.batches([index]))
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    direction = [0.9 * b + 0.1 * g - f for b, g, f in zip(buffers, grads, full, strict=True)]
    expected = torch.cat([w.flatten() for w in direction]).numpy()
    np.testing.assert_allclose(omega[1], expected, rtol=2e-2, atol=2e-5)
    variance = 300 * np.square(noise["grad_noise_norms"]) * 1436 / (1437 - 300)
    assert noise["c2_sampled"] == pytest.approx(variance.mean())
    assert noise["c2_sampled_se"] == pytest.approx(variance.std(ddof=1) / math.sqrt(3))
    measured = [r for r in read_rows(out) if r["kind"] == "measure"]
    assert len(measured) == 1 and measured[0]["c2_sampled"] == noise["c2_sampled"]


def test_the_method_named_sampling_is_the_mode_with_a_constant_schedule(tmp_path):
    flags = ["--steps", "3", "--draws", "2", "--seed", "4"]
    a = run(tmp_path, "--method", "sampling", *flags, name="a")
    b = run(tmp_path, "--mode", "sampling", *flags, name="b")
    assert json.loads((a / "noise.json").read_text()) | {"seconds": 0} == json.loads((b / "noise.json").read_text()) | {
        "seconds": 0
    }
