"""Sharpness: against a plain float64 twin, brute force and integrals; and what the command leaves
in a run folder."""

import copy
import dataclasses
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from rows import read_rows
from torch import nn
from torch.nn import functional as F

from fastsmooth import models
from fastsmooth.cli.config import resolve
from fastsmooth.cli.parse import read_saved
from fastsmooth.data import open_data
from fastsmooth.noise.algorithms import ALGORITHMS, Setting
from fastsmooth.noise.sharpness import BatchLoss, Ellipsoid, checkpoints, sharpness
from fastsmooth.runfolder.checkpoint import Checkpoints
from fastsmooth.saved import Images, open_images
from fastsmooth.sharpness import main, parse
from fastsmooth.train import main as train

CPU = torch.device("cpu")
RHO = {"avg_l2": 0.1, "avg_linf": 0.2, "m_apgd_l2": 0.5, "m_apgd_linf": 0.01}
ADAPTIVE = pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "absolute"])
ALGORITHM = pytest.mark.parametrize("algorithm", list(ALGORITHMS))


def small_net() -> nn.Module:
    """With BatchNorm, whose statistics are those of no batch here, and weights that are zero."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).double()
    net(3 * torch.randn(40, 3, 6, 6, dtype=torch.float64))
    return net


def images(batches: int, size: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 5, (size,), generator=generator),
        )
        for _ in range(batches)
    ]


# The twin: the published algorithms parameter by parameter in a copy of the model, with the steps
# in Python floats. Its one change is that where the best weights come back, so does their
# perturbation.


class Twin:
    def __init__(self, model: nn.Module, s: Setting, rho: float):
        self.model, self.s, self.rho = copy.deepcopy(model).double().eval(), s, rho
        self.params = list(self.model.parameters())
        self.original = [p.detach().clone() for p in self.params]
        self.scale = [w.abs() if s.adaptive else torch.ones_like(w) for w in self.original]
        self.generator = torch.Generator().manual_seed(s.seed)
        self.l2 = s.algorithm.endswith("l2")

    def loss(self, d, x, y, grad=False):
        for p, w, e in zip(self.params, self.original, d, strict=True):
            p.data = w + e
        logits = self.model(x)
        if self.s.normalize_logits:
            logits = logits - logits.mean(1, keepdim=True)
            logits = logits / torch.clamp(
                torch.linalg.vector_norm(logits, dim=1, keepdim=True), min=1e-10
            )
        loss = -F.log_softmax(logits, dim=1)[torch.arange(len(y)), y].mean()
        wrong = (logits.argmax(1) != y).double().mean().item()
        return (
            (loss.item(), wrong, torch.autograd.grad(loss, self.params))
            if grad
            else (loss.item(), wrong)
        )

    def noise(self):
        total = sum(p.numel() for p in self.params)
        draw = torch.randn if self.l2 else torch.rand
        flat = draw(total, generator=self.generator, dtype=torch.float64)
        flat = flat if self.l2 else 2 * flat - 1
        parts = flat.split([p.numel() for p in self.params])
        return [self.rho * u.view_as(c) * c for u, c in zip(parts, self.scale, strict=True)]

    def project(self, d):
        if not self.l2:
            return [
                torch.max(torch.min(e, self.rho * c), -self.rho * c)
                for e, c in zip(d, self.scale, strict=True)
            ]

        e, c = (np.concatenate([t.flatten().numpy() for t in part]) for part in (d, self.scale))
        e, c = e[c > 0], c[c > 0]
        low, high = 0.0, 1.0
        while np.linalg.norm(e / (c + high / c)) > self.rho:
            high *= 2
        if np.linalg.norm(e / c) <= self.rho:
            high = 0.0
        for _ in range(80):  # halves an interval of doubles until nothing is left of it
            middle = (low + high) / 2
            low, high = (
                (middle, high) if np.linalg.norm(e / (c + middle / c)) > self.rho else (low, middle)
            )
        return [
            torch.where(c > 0, e / (1 + high / c**2), 0) for e, c in zip(d, self.scale, strict=True)
        ]

    def ascend(self, x, y, clean):
        d = (
            self.project(self.noise())
            if self.s.random_start
            else [torch.zeros_like(w) for w in self.original]
        )
        previous, best_d = d, d
        worst, worst_error = clean
        prev_worst = worst
        step = prev_step = 2 * self.rho * self.s.step_size_mult
        last = updates = 0
        for i in range(self.s.n_iters):
            _, _, grads = self.loss(d, x, y, grad=True)
            if self.l2:
                length = math.sqrt(sum(g.square().sum().item() for g in grads))
                moved = [
                    e + step / (length + 1e-12) * g * c
                    for e, g, c in zip(d, grads, self.scale, strict=True)
                ]
            else:
                moved = [
                    e + step * g.sign() * c for e, g, c in zip(d, grads, self.scale, strict=True)
                ]
            new = [0.75 * p + 0.25 * q for p, q in zip(self.project(moved), previous, strict=True)]
            previous, d = d, new
            loss, error = self.loss(d, x, y)
            if loss > worst:
                worst, worst_error, best_d, updates = loss, error, d, updates + 1
            if i in (5, 9, 12, 15, 16, 18, 19, 20):
                few = updates < 0.75 * (i - last)
                stuck = prev_step == step and prev_worst == worst
                prev_step, prev_worst, last, updates = step, worst, i, 0
                if few or stuck:
                    step /= 2
                    d = best_d
        return worst, worst_error

    def sharpness(self, batches):
        """(rises of the loss, rises of the error), one a batch, and for the averages the draws of
        the loss."""
        rises, errors, draws = [], [], []
        for x, y in batches:
            clean = self.loss([torch.zeros_like(w) for w in self.original], x, y)
            if self.s.algorithm.startswith("avg"):
                found = [self.loss(self.noise(), x, y) for _ in range(self.s.n_iters)]
                found = np.array(found)
                draws.append(found[:, 0])
                loss, error = found.mean(0)
            else:
                loss, error = max(self.ascend(x, y, clean) for _ in range(self.s.restarts))
            rises.append(loss - clean[0])
            errors.append(error - clean[1])
        return np.array(rises), np.array(errors), np.array(draws)


@ADAPTIVE
@ALGORITHM
@pytest.mark.parametrize("rho", [0.3, 2.0])
def test_sharpness_equals_a_plain_twin(algorithm, adaptive, rho):
    setting, batches = Setting(algorithm, adaptive, seed=5), images(3)
    (found,) = sharpness(small_net(), batches, setting, [rho * RHO[algorithm]])
    rises, errors, draws = Twin(small_net(), setting, rho * RHO[algorithm]).sharpness(batches)
    assert found.per_batch == pytest.approx(rises, abs=1e-10)
    assert found.value == pytest.approx(rises.mean(), abs=1e-10)
    assert found.error == pytest.approx(rises.std(ddof=1) / math.sqrt(3), rel=1e-8)
    assert found.error_increase == pytest.approx(errors.mean(), abs=1e-12)
    if algorithm.startswith("m_apgd"):
        assert min(found.per_batch) > 1e-3 and found.draw_error is None
    else:
        assert found.draw_error == pytest.approx(
            math.sqrt((draws.var(axis=1, ddof=1) / 20).sum()) / 3, rel=1e-8
        )


@ADAPTIVE
@pytest.mark.parametrize("algorithm", ["m_apgd_l2", "m_apgd_linf"])
@pytest.mark.parametrize(
    "more",
    [{"restarts": 2, "random_start": True}, {"step_size_mult": 0.05}, {"normalize_logits": True}],
    ids=repr,
)
def test_options_of_the_ascent_equal_the_twins(algorithm, adaptive, more):
    setting, batches = Setting(algorithm, adaptive, seed=3, **more), images(2)
    (found,) = sharpness(small_net(), batches, setting, [RHO[algorithm]])
    assert found.per_batch == pytest.approx(
        Twin(small_net(), setting, RHO[algorithm]).sharpness(batches)[0], abs=1e-10
    )


def test_a_network_in_float32_is_as_sharp_as_in_float64():
    """Its logits, of size one, are rounded by 6e-8, a quarter of that in the mean over 16 samples:
    1.5e-3 of a rise of 1e-5.

    A float32 loss would be rounded by 6e-8 itself.
    """
    setting, batches = Setting(), images(2)
    (found,) = sharpness(small_net().float(), [(x.float(), y) for x, y in batches], setting, [1e-5])
    expected = Twin(small_net(), setting, 1e-5).sharpness(batches)[0]
    assert found.per_batch == pytest.approx(expected, rel=4e-3)


def test_the_step_may_be_halved_where_the_published_code_halves_it():
    assert checkpoints(20) == [5, 9, 12, 15, 16, 18, 19, 20]
    assert checkpoints(1) == [1]


# A model of two parameters, whose loss is written down once more in numpy and looked at everywhere


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in POINT)

    def forward(self, x):
        h = torch.tanh(self.a * x[:, 0] + self.b * x[:, 1])
        return torch.stack([self.b * h, self.a * h * x[:, 1]], dim=1)


POINT = np.array([0.9, -0.6])


def pair_batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(12, 2, generator=generator, dtype=torch.float64), torch.randint(
        0, 2, (12,), generator=generator
    )


def pair_rise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The rise of the loss where the two weights move by u and v."""

    def loss(a, b):
        total = 0.0
        for (p, q), label in zip(*(t.tolist() for t in pair_batch()), strict=True):
            h = np.tanh(a * p + b * q)
            logits = b * h, a * h * q
            total = total + np.logaddexp(*logits) - logits[label]
        return total / 12

    return loss(POINT[0] + u, POINT[1] + v) - loss(*POINT)


def region_grid(algorithm: str) -> tuple[np.ndarray, np.ndarray]:
    """The unit box, or the unit disc in polar coordinates."""
    if algorithm.endswith("linf"):
        return np.meshgrid(np.linspace(-1, 1, 151), np.linspace(-1, 1, 151))
    radius, angle = np.meshgrid(np.linspace(0, 1, 51), np.linspace(0, 2 * np.pi, 601))
    return radius * np.cos(angle), radius * np.sin(angle)


@ADAPTIVE
@pytest.mark.parametrize("rho", [0.01, 0.1, 0.5])
@pytest.mark.parametrize(
    "start", [{}, {"random_start": True, "restarts": 3}], ids=["zero", "random"]
)
@pytest.mark.parametrize("algorithm", ["m_apgd_l2", "m_apgd_linf"])
def test_the_ascent_reaches_the_largest_loss_and_no_larger_one(algorithm, start, rho, adaptive):
    """By brute force over the box or the disc.

    From above: no point is farther than half a cell from one of the grid in either direction. From
    below: an iterate is three quarters of a projected point and a quarter of the iterate before
    last, so that two iterations leave a quarter of the way to the largest loss, and 20 leave 4^-10;
    each of the seven times that the step may be halved, one iteration may be lost: 4^-6.5. No way
    within the box or disc, of unit size, is longer than 2 sqrt 2, and none is steeper than `slope`.
    """
    u, v = region_grid(algorithm)
    scale = rho * (np.abs(POINT) if adaptive else np.ones(2))
    rise = pair_rise(scale[0] * u, scale[1] * v)
    half_cells = sum(np.abs(np.diff(rise, axis=axis)).max() for axis in (0, 1)) / 2
    square = pair_rise(*(w * t for w, t in zip(scale, region_grid("linf"), strict=True)))
    slope = np.hypot(*(np.abs(np.gradient(square, 1 / 75, axis=axis)).max() for axis in (0, 1)))
    (found,) = sharpness(Pair(), [pair_batch()], Setting(algorithm, adaptive, **start), [rho])
    assert rise.max() - 4**-6.5 * 8**0.5 * slope <= found.value <= rise.max() + half_cells
    assert half_cells < 0.02 * rise.max()


@ADAPTIVE
@pytest.mark.parametrize("algorithm", ["avg_l2", "avg_linf"])
def test_the_average_agrees_with_the_integral_within_its_error(algorithm, adaptive):
    normal = algorithm == "avg_l2"
    rho = 2.0 if normal else 4.0
    points, weights = (
        np.polynomial.hermite_e.hermegauss(100) if normal else np.polynomial.legendre.leggauss(100)
    )
    u, v = np.meshgrid(points, points)
    scale = rho * (np.abs(POINT) if adaptive else np.ones(2))
    rise = pair_rise(scale[0] * u, scale[1] * v)
    integral = (np.outer(weights, weights) * rise).sum() / weights.sum() ** 2
    (found,) = sharpness(Pair(), [pair_batch()], Setting(algorithm, adaptive, n_iters=600), [rho])
    assert abs(found.value - integral) < 4 * found.draw_error < 0.5 * integral
    assert found.error is None  # one batch


# Properties


@pytest.mark.parametrize("decades", [0, 3, 8])
@pytest.mark.parametrize("far", [1.001, 3.0, 1e3])
def test_the_projection_is_the_nearest_point_of_the_ellipsoid(decades, far):
    """p is nearest to d among the points z of a convex set where (d - p) (z - p) <= 0 for all of
    them.

    The largest (d - p) z over ||z / s|| <= rho is rho ||s (d - p)||, which (d - p) p has to be.
    """
    generator = torch.Generator().manual_seed(decades)
    scale = 10 ** (-decades * torch.rand(5000, generator=generator, dtype=torch.float64))
    scale[:7] = 0
    shape = torch.randn(5000, generator=generator, dtype=torch.float64)
    # much of the length in all, in the long or in the short axes
    for weight in (1.0, scale, scale**-1):
        e = torch.where(scale > 0, shape * weight, 0.0)
        d = far * 0.01 * scale * e / e.norm()
        p = Ellipsoid(scale, 0.01).project(d)
        assert (p[scale > 0] / scale[scale > 0]).norm() == pytest.approx(0.01, rel=1e-9) and not p[
            scale == 0
        ].any()
        away = d - p
        assert (away * p).sum() == pytest.approx(0.01 * (scale * away).norm().item(), rel=1e-6)


def test_what_is_inside_the_ellipsoid_stays():
    scale = torch.tensor([1.0, 1e-3, 0.0])
    d = torch.tensor([0.5, -2e-4, 0.0])
    assert torch.equal(Ellipsoid(scale, 1.0).project(d), d)
    assert torch.equal(Ellipsoid(scale, 1.0).project(torch.zeros(3)), torch.zeros(3))


@ADAPTIVE
@pytest.mark.parametrize("algorithm", ["m_apgd_l2", "m_apgd_linf"])
def test_no_iterate_leaves_the_region(algorithm, adaptive, monkeypatch):
    """Random starts included."""
    seen = []
    look = BatchLoss._values
    monkeypatch.setattr(
        BatchLoss, "_values", lambda f, d: seen.append((f.weights, d.detach())) or look(f, d)
    )
    sharpness(
        small_net(), images(1), Setting(algorithm, adaptive, random_start=True, restarts=2), [0.3]
    )
    order = 2 if algorithm.endswith("l2") else math.inf
    lengths = []
    for w, d in seen:
        ratio = torch.where(w != 0, d / w, d) if adaptive else d
        lengths.append(torch.linalg.vector_norm(ratio, order).item())
    assert len(lengths) == 1 + 2 * 21 and 0.2999 < max(lengths) <= 0.3 * (1 + 1e-9)


@ALGORITHM
def test_several_rho_at_once_equal_one_at_a_time(algorithm):
    setting = Setting(algorithm, random_start=algorithm.startswith("m"), n_iters=7)
    batches, rhos = images(2), [0.2, 0.01, 0.05]
    together = sharpness(small_net(), batches, setting, rhos)
    assert together == [sharpness(small_net(), batches, setting, [rho])[0] for rho in rhos]
    assert together != sharpness(small_net(), batches, dataclasses.replace(setting, seed=1), rhos)


@pytest.mark.parametrize("algorithm", ["avg_l2", "avg_linf", "m_apgd_linf"])
def test_adaptive_sharpness_does_not_change_with_the_units_of_the_weights(algorithm):
    """A ReLU network computes the same with one layer times c and the next over c; only the
    absolute kind tells them apart."""

    def net(c):
        torch.manual_seed(1)
        layers = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.ReLU(), nn.Linear(8, 5)).double()
        with torch.no_grad():
            layers[1].weight.mul_(c)
            layers[1].bias.mul_(c)
            layers[3].weight.div_(c)
        return layers

    for adaptive in (True, False):
        first, second = (
            sharpness(net(c), images(1), Setting(algorithm, adaptive), [0.01])[0].value
            for c in (1.0, 8.0)
        )
        assert (first == pytest.approx(second, rel=1e-9)) == adaptive


def test_normalized_logits_hide_the_scale_of_the_logits():
    def net(c):
        layers = small_net()
        with torch.no_grad():
            layers[-1].weight.mul_(c)
            layers[-1].bias.mul_(c)
        return layers

    for normalize in (True, False):
        first, second = (
            sharpness(net(c), images(1), Setting(normalize_logits=normalize), [0.01])[0].value
            for c in (1.0, 8.0)
        )
        assert (first == pytest.approx(second, rel=1e-9)) == normalize


@ALGORITHM
def test_sharpness_leaves_no_trace(algorithm):
    model = nn.Sequential(*small_net(), nn.Dropout(0.5)).train()
    (x, y), *_ = batches = images(2)
    F.cross_entropy(model(x), y).backward()
    model[1].eval()  # a mode that must be as it was
    before = copy.deepcopy(
        [*model.state_dict().values(), *(p.grad for p in model.parameters()), torch.get_rng_state()]
    )
    held = [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()]
    sharpness(model, batches, Setting(algorithm), [0.1, 0.2])
    after = [
        *model.state_dict().values(),
        *(p.grad for p in model.parameters()),
        torch.get_rng_state(),
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert held == [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()]
    assert model.training and not model[1].training


@ALGORITHM
def test_no_iteration_waits_for_the_device(algorithm, monkeypatch):
    reads, counts = [], []
    for name in ("item", "tolist", "__bool__", "__float__", "cpu"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, plain=plain: reads.append(1) or plain(t))
    for n_iters in (3, 12):
        reads.clear()
        sharpness(small_net(), images(2), Setting(algorithm, n_iters=n_iters), [0.1])
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0


# The command

QUICK = ["--samples", "128", "--batch", "64", "--n-iters", "3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The digits, two epochs."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert train(["--epochs", "2", "--batchsize", "64", "--lr", "0.2", "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def results(run) -> list[dict]:
    return json.loads((run / "sharpness.json").read_text())["results"]


def change_checkpoint(run, change) -> None:
    """Save the newest checkpoint anew, whole and with a right sum, after change(state)."""
    state = Checkpoints(run / "checkpoints", print).load()
    shutil.rmtree(run / "checkpoints")
    change(state)
    Checkpoints(run / "checkpoints", print).save(state["update"], state)


def test_the_plain_command_measures_what_is_published(trained):
    request = parse(["RUN"])
    assert request.setting == Setting(
        "m_apgd_linf", adaptive=True, normalize_logits=False, n_iters=20, restarts=1
    )
    assert (request.rho, request.samples, request.batch) == ((0.0002,), 1024, 128)
    assert not request.test and not request.augment and not request.setting.random_start


def test_the_originals_flags_are_known():
    flags = [
        "--n_eval_sharpness",
        "256",
        "--bs_sharpness=64",
        "--n_restarts",
        "2",
        "--sharpness_rand_init",
        "--no-adaptive",
    ]
    flags += [
        "--step_size_mult",
        "2",
        "--sharpness_on_test_set",
        "--data_augm_sharpness",
        "--normalize_logits",
        "--rho",
        "1",
        "2",
    ]
    request = parse(["RUN", *flags])
    assert (request.samples, request.batch, request.test, request.augment, request.rho) == (
        256,
        64,
        True,
        True,
        (1.0, 2.0),
    )
    assert request.setting == Setting("m_apgd_linf", False, True, 20, 2, 2.0, True)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_run_is_measured_on_its_own_images_and_the_result_joins_it(run, split, capsys):
    rows = read_rows(run)
    assert main([str(run), *QUICK, "--rho", "0.01", *["--test"] * (split == "test")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 3 and table[0].startswith(
        "adaptive m_apgd_linf, 3 iterations a batch, the first 128 "
    )

    images = open_data(read_saved(run), CPU)
    model = models.build("resnet8", 10)
    model.load_state_dict(Checkpoints(run / "checkpoints", print).load()["model"])
    loader = images.train if split == "train" else images.test
    batches = [
        (x.double(), y) for x, y in loader.batches([torch.arange(64), torch.arange(64, 128)])
    ]
    rises, errors, _ = Twin(model, Setting(n_iters=3), 0.01).sharpness(batches)
    (entry,) = results(run)
    assert entry["per_batch"] == pytest.approx(rises, rel=1e-3, abs=1e-5)
    assert entry["error_increase"] == pytest.approx(errors.mean(), abs=1e-2)
    known = {
        "algorithm": "m_apgd_linf",
        "adaptive": True,
        "rho": 0.01,
        "normalize_logits": False,
        "split": split,
    }
    known |= {"samples": 128, "batch": 64, "n_iters": 3, "restarts": 1, "seed": 0, "step": 46}
    assert known.items() <= entry.items() and {"value", "error", "clean_loss"} <= entry.keys()
    assert f"{entry['value']:.6g} +- {entry['error']:.2g}" in table[2]

    *before, row = read_rows(run)
    assert before == rows and row["kind"] == "measure"
    standard = ("epoch", "step", "samples", "lr", "batch_size", "momentum", "delta")
    assert [row[name] for name in standard] == [rows[-1][name] for name in standard]
    assert (row["sharpness"], row["sharpness_se"], row["sharpness_rho"]) == (
        entry["value"],
        entry["error"],
        0.01,
    )
    assert row["sharpness_batch"] == 64 and row["sharpness_samples"] == 128


def test_a_setting_measured_again_replaces_its_result(run, capsys):
    flags = [*QUICK, "--algorithm", "avg_l2", "--json", "--rho"]
    assert main([str(run), *flags, "0.1", "0.2"]) == 0
    first = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry.pop("run") for entry in first] == [str(run)] * 2 and first == results(run)
    saved = run / "sharpness.json"
    saved.write_text(saved.read_text().replace(str(first[0]["value"]), "77"))
    assert main([str(run), *flags, "0.1"]) == 0
    assert main([str(run), *flags, "0.1", "--seed", "1"]) == 0
    found = results(run)
    assert [(entry["rho"], entry["seed"]) for entry in found] == [(0.2, 0), (0.1, 0), (0.1, 1)]
    assert found[:2] == [first[1], first[0]] and found[2]["value"] != found[1]["value"]


def test_augmented_images_are_those_of_the_epoch_that_seed_names(run, capsys):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"augment": "crop-flip"}))
    values = []
    for flags in ([], ["--augment"], ["--augment"], ["--augment", "--seed", "1"]):
        assert main([str(run), *QUICK, "--json", *flags]) == 0
        values.append(json.loads(capsys.readouterr().out)["clean_loss"])
    assert values[1] == values[2] and len(set(values)) == 3


def test_a_checkpoint_inside_an_epoch_says_what_is_known(run):
    change_checkpoint(run, lambda state: state.update(update=30, epoch=1, samples=1901))
    assert main([str(run), *QUICK]) == 0
    row = read_rows(run)[-1]
    assert (row["step"], row["epoch"], row["samples"], row["lr"], row["delta"]) == (
        30,
        1,
        1901,
        None,
        None,
    )
    assert results(run)[0]["step"] == 30


def test_half_a_row_at_the_end_of_the_metrics_is_removed(run):
    rows = read_rows(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')
    assert main([str(run), *QUICK]) == 0
    assert read_rows(run)[:-1] == rows and read_rows(run)[-1]["kind"] == "measure"


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run, capsys):
    (run / "checkpoints" / "ckpt-46.pt").write_bytes(b"")
    assert main([str(run), *QUICK]) == 0
    assert results(run)[0]["step"] == 23 and "ckpt-46.pt is damaged" in capsys.readouterr().err


def test_a_failing_run_leaves_the_others_measured(run, tmp_path, capsys):
    assert main([str(tmp_path / "nosuch"), str(run), str(tmp_path), *QUICK]) == 2
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 3 and len(results(run)) == 1
    assert [line.startswith("fastsmooth: error: ") for line in output.err.splitlines()] == [
        True,
        True,
    ]


LOCKED = (
    "import sys, pathlib; from fastsmooth.runfolder.write import lock; "
    "lock(pathlib.Path(sys.argv[1])); print(); sys.stdin.read()"
)


def test_a_run_that_is_being_written_is_refused(run, capsys):
    writer = subprocess.Popen(
        [sys.executable, "-c", LOCKED, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    writer.stdout.readline()
    assert main([str(run), *QUICK]) == 2
    writer.communicate()
    refused(capsys, "another process is writing this run")
    assert not (run / "sharpness.json").exists()


def refused(capsys, words: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("fastsmooth: error: ") and error.count("\n") == 1 and words in error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "no run is named"),
        (["RUN", "--rho", "0"], "--rho: 0 is out of range: it must be above 0"),
        (["RUN", "--rho", "-1"], "--rho"),
        (["RUN", "--rho", "nan"], "not a finite number"),
        (["RUN", "--rho", "0.1", "0.2", "0.1"], "more than once"),
        (
            ["RUN", "--algorithm", "avg_l2"],
            "needs --rho, since none is published for it; its authors scan 0.05",
        ),
        (["RUN", "--algorithm", "avg_12", "--rho", "1"], "did you mean avg_l2?"),
        (
            ["RUN", "--algorithm", "avg_l2", "--rho", "1", "--random-start"],
            "--random-start has no effect",
        ),
        (
            ["RUN", "--algorithm", "avg_linf", "--rho", "1", "--restarts", "2"],
            "--restarts has no effect",
        ),
        (["RUN", "--restarts", "2"], "add --random-start"),
        (["RUN", "--samples", "1000"], "give --samples 896"),
        (["RUN", "--samples", "100"], "give --samples 128"),
        (["RUN", "--n-iter", "5"], "did you mean --n-iters?"),
        (["RUN", "--n-iters", "0"], "at least 1"),
        (["RUN", "--device", "cuda:7"], "--device cpu"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, words, capsys):
    assert main(flags) == 2
    refused(capsys, words)


def lose(name):
    return lambda run: shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


def other_head(state):
    state["model"]["head.weight"], state["model"]["head.bias"] = torch.zeros(7, 64), torch.zeros(7)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose("config.json"), "is this a run folder?"),
        (lambda run: (run / "config.json").write_text('{"dataset": "dig'),
        "config.json is damaged"),
        (lambda run: (run / "config.json").write_text("[1]"), "config.json is damaged"),
        (lambda run: (run / "config.json").write_text('{"dataset": "digits"}'), "it lacks"),
        (lose("checkpoints"), "has no checkpoint"),
        (lambda run: [p.write_bytes(b"") for p in (run / "checkpoints").glob("*.pt")],
        "none of its 2 checkpoints is valid"),
        (lambda run: change_checkpoint(run, other_head),
        "its checkpoint is not of resnet8 with 10 classes"),
        (lambda run: change_checkpoint(run, lambda state: state.pop("model")),
        "its checkpoint is not of"),
        (lambda run: change_checkpoint(run, lambda s: s["data"].update(fingerprint="0")),
        "are not those it was trained on"),
        (lambda run: (run / "sharpness.json").write_text("{"),
        "sharpness.json is damaged: move it away"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_measured_is_refused_in_one_line(run, damage, words, capsys):
    damage(run)
    capsys.readouterr()
    rows = (run / "metrics.jsonl").read_bytes()
    assert main([str(run), *QUICK]) == 2
    error = capsys.readouterr().err
    assert (
        error.splitlines()[-1].startswith("fastsmooth: error: ") and words in error.splitlines()[-1]
    )
    assert "Traceback" not in error and (run / "metrics.jsonl").read_bytes() == rows


def test_more_images_than_there_are_and_augmentation_that_there_was_not_are_refused(run, capsys):
    assert main([str(run), "--test"]) == 2
    refused(capsys, "--samples 1024 exceeds the 360 test images")
    assert main([str(run), "--augment"]) == 2
    refused(capsys, "trained on images as they are")


def test_a_full_disk_is_said(run, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "sharpness.json")

    monkeypatch.setattr("fastsmooth.runfolder.write.RunFolder.write", full)
    assert main([str(run), *QUICK]) == 74
    refused(capsys, "cannot write sharpness.json: No space left on device")


def test_an_interruption_is_no_traceback(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastsmooth.saved.sharpness", interrupted)
    assert main([str(run), *QUICK]) == 130


def test_files_are_decoded_as_the_run_decoded_them(cifar_folder):
    """Only those that are measured, where the run had them all in memory."""
    config = resolve(
        {"dataset": "folder", "data_dir": str(cifar_folder), "loader": "resident", "image_size": 32}
    )
    resident = open_data(config, CPU)
    found = open_images(cifar_folder, config, Images(128, 64, False, False, None), CPU)
    for split in ("train", "test"):
        (x, y), (u, v) = (
            next(iter(getattr(d, split).batches([torch.arange(64)]))) for d in (resident, found)
        )
        assert torch.equal(x, u) and torch.equal(y, v)
    assert found.fingerprint == resident.fingerprint and found.choice.startswith("loader threads")
