"""What the norms of a batch say beyond C2, beside the same out of one backward pass a sample, in
float64, by the formulas of the sources."""

import json
import math

import pytest
import torch
from exact import EXACT
from forks import without_times
from rows import read_rows
from torch import nn
from torch.nn import functional as F

from fastsmooth import models
from fastsmooth.cli.config import FIELDS
from fastsmooth.noise import estimators
from fastsmooth.noise.online import NoiseTracker
from fastsmooth.noise.persample import NotCovered
from fastsmooth.noise.quantities import (
    NU,
    QUANTITIES,
    THETA,
    Norms,
    gradient_variance,
    inner_product_test,
    layers_of,
    norm_test,
    orthogonality_test,
    passing_batch_size,
    total_snr,
)
from fastsmooth.ranks import Ranks
from fastsmooth.schedule import Point
from fastsmooth.train import main

N, B, LR = 90, 7, 0.3


class WithOwnParameters(nn.Module):
    """A layer, and weights that belong to the model itself."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(12, 6)
        self.weight = nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        return F.linear(F.relu(self.hidden(x.flatten(1))), self.weight)


def networks(name: str) -> tuple[nn.Module, torch.Tensor]:
    """(a model in float64, images [B, 3, ...])"""
    torch.manual_seed(0)
    if name == "resnet8":
        model, x = models.build("resnet8", 3, "group"), torch.randn(B, 3, 9, 9)
    else:
        model, x = WithOwnParameters(), torch.randn(B, 3, 2, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # norms begin as the identity
    return model.double(), x.double()


def tracker(model: nn.Module, quantities=tuple(QUANTITIES), **more) -> NoiseTracker:
    optimizer = torch.optim.SGD(model.parameters(), LR)
    return NoiseTracker(model, optimizer, samples=N, every=1, quantities=quantities, **more)


@pytest.fixture(scope="module", params=["resnet8", "own parameters"])
def pair(request):
    """(the row of a measurement; the gradient of every sample [B, P]; where the parameters of each
    layer are among the P; the mean loss)"""
    model, x = networks(request.param)
    y = torch.arange(B) % 3
    row = tracker(model)(x, y, Point(LR, B, 0.0))
    params, parts, at = dict(model.named_parameters()), {}, 0
    for name, p in params.items():
        owner = name.rpartition(".")[0]
        parts[owner] = [*parts.get(owner, []), *range(at, at + p.numel())]
        at += p.numel()
    losses = [F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(B)]
    grads = [torch.autograd.grad(loss, list(params.values())) for loss in losses]
    G = torch.stack([torch.cat([g.flatten() for g in one]) for one in grads])
    assert list(parts) == list(layers_of(model))
    assert [len(places) for places in parts.values()] == list(layers_of(model).values())
    return row, G, parts, sum(loss.item() for loss in losses) / B


def jackknife(of, G: torch.Tensor) -> float:
    """The standard error of of(rows) from the rows without each in turn, of a batch out of N."""
    values = [of(torch.cat([G[:j], G[j + 1 :]])) for j in range(len(G))]
    center = sum(values) / len(values)
    spread = sum((v - center) ** 2 for v in values)
    return math.sqrt((1 - B / N) * (B - 1) / B * spread)


def c2_of(G: torch.Tensor) -> float:
    return G.var(0).sum().item() * (N - 1) / N


def snr_of(G: torch.Tensor) -> float:
    c2, b = c2_of(G), len(G)
    return (G.mean(0).square().sum().item() - c2 / b * (N - b) / (N - 1)) / c2


def norm_test_of(G: torch.Tensor) -> float:
    """||Var(g_i)||_1 / B against theta^2 ||g||^2."""
    return math.sqrt(G.var(0).norm(1).item() / B) / G.mean(0).norm().item()


def test_noise_by_layer(pair):
    row, G, parts, _ = pair
    columns = [G[:, places] for places in parts.values()]
    assert row["layer_c2"] == pytest.approx([c2_of(part) for part in columns], rel=1e-9)
    assert sum(row["layer_c2"]) == pytest.approx(row["c2_sampled"], rel=1e-12)
    errors = [jackknife(c2_of, part) for part in columns]
    assert row["layer_c2_se"] == pytest.approx(errors, rel=1e-9)


def test_signal_to_noise_ratio_by_layer_and_of_all_parameters(pair):
    row, G, parts, _ = pair
    columns = [G[:, places] for places in parts.values()]
    assert row["layer_snr"] == pytest.approx([snr_of(part) for part in columns], rel=1e-9)
    errors = [jackknife(snr_of, part) for part in columns]
    assert row["layer_snr_se"] == pytest.approx(errors, rel=1e-9)
    assert row["total_snr"] == pytest.approx(snr_of(G), rel=1e-9)
    assert row["total_snr_se"] == pytest.approx(jackknife(snr_of, G), rel=1e-9)
    # it is the first row: the noise scale is of this batch alone
    if row["noise_scale"] is not None:
        assert row["total_snr"] == pytest.approx(1 / row["noise_scale"], rel=1e-9)


def test_norm_test(pair):
    row, G, _, _ = pair
    assert row["norm_test"] == pytest.approx(norm_test_of(G), rel=1e-9)
    assert row["norm_test_se"] == pytest.approx(jackknife(norm_test_of, G), rel=1e-9)
    variance, square = G.var(0).sum().item(), G.mean(0).square().sum().item()
    assert row["norm_test_batch_size"] == pytest.approx(variance / (0.9**2 * square), rel=1e-9)


def test_inner_product_test(pair):
    row, G, _, _ = pair
    g = G.mean(0)
    variance = (G @ g).var().item()
    value = math.sqrt(variance / B) / g.square().sum().item()
    assert row["inner_product_test"] == pytest.approx(value, rel=1e-9)
    assert row["inner_product_test_batch_size"] == pytest.approx(B * value**2 / 0.81, rel=1e-9)


def test_orthogonality_test(pair):
    row, G, _, _ = pair
    g = G.mean(0)
    across = G - (G @ g)[:, None] * g / g.square().sum()
    value = math.sqrt(across.square().sum().item() / (B - 1) / B) / g.norm().item()
    assert row["orthogonality_test"] == pytest.approx(value, rel=1e-9)
    assert row["orthogonality_test_batch_size"] == pytest.approx(B * (value / 5.84) ** 2, rel=1e-9)


def test_the_noise_along_and_across_the_gradient_is_all_of_it(pair):
    row = pair[0]
    both = row["inner_product_test"] ** 2 + row["orthogonality_test"] ** 2
    assert both == pytest.approx(row["norm_test"] ** 2, rel=1e-9)


def test_batch_size_of_cabs(pair):
    row, G, _, loss = pair
    assert row["cabs_batch_size"] == pytest.approx(LR * c2_of(G) / loss, rel=1e-9)
    # cockpit divides by B, and knows no n
    deviations = (G - G.mean(0)).square().sum().item()
    theirs = row["cabs_batch_size"] * N / (N - 1) * (B - 1) / B
    assert theirs == pytest.approx(LR * deviations / B / loss, rel=1e-9)


def norms_of(G: torch.Tensor, n: int = N) -> Norms:
    g = G.mean(0)
    return Norms(G.square().sum(1), (G - g).square().sum(1), g.square().sum(), n)


TESTS = [
    (lambda norms: norm_test(norms).value, THETA),
    (inner_product_test, THETA),
    (orthogonality_test, NU),
]


@pytest.mark.parametrize("test, bound", TESTS, ids=["norm", "inner product", "orthogonality"])
def test_the_batch_size_that_is_proposed_just_passes(test, bound):
    """Of the same samples as often as it says, and so with the same gradient and variance."""
    torch.manual_seed(0)
    G = torch.randn(40, 5, dtype=torch.float64) + 0.5
    found = test(norms_of(G))
    times = 25
    again = test(norms_of(G.repeat(times, 1)))
    # S2 has b - 1 below it
    drawn = found**2 / times * (1 - 1 / 40) / (1 - 1 / (40 * times))
    assert again.item() ** 2 == pytest.approx(drawn.item(), rel=1e-9)
    size = passing_batch_size(found, 40, bound)
    assert (found * (40 / size).sqrt()).item() == pytest.approx(bound)


@pytest.mark.parametrize("size, n", [(2, 90), (3, 90), (40, 90), (90, 90)])
def test_the_variance_is_that_of_the_estimators(size, n):
    torch.manual_seed(0)
    norms = norms_of(torch.randn(size, 3, dtype=torch.float64), n)
    value, error = gradient_variance(norms)
    expected = estimators.per_sample(norms.noise, n)
    assert value.item() == pytest.approx(expected.value, rel=1e-12)
    if expected.error is None:
        assert error.isnan()
    else:
        assert error.item() == pytest.approx(expected.error, rel=1e-9)


def test_errors_are_the_spread_over_batches():
    """Of a population of gradients, over many batches drawn from it without replacement."""
    torch.manual_seed(0)
    population = torch.randn(400, 6, dtype=torch.float64) * 0.7 + 1
    batches = [norms_of(population[torch.randperm(400)[:60]], 400) for _ in range(400)]
    for quantity in (norm_test, total_snr):
        values, errors = map(torch.stack, zip(*map(quantity, batches), strict=True))
        assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.12), quantity
    whole = norms_of(population, 400)
    mean = population.mean(0)
    exact = mean.square().sum() / (population - mean).square().sum(1).mean()
    assert total_snr(whole).value.item() == pytest.approx(exact.item(), rel=1e-12)
    assert total_snr(whole).error == norm_test(whole).error == 0
    # the numerator is right on average, where ||g||^2 would be too large
    average = torch.stack([total_snr(batch).value for batch in batches]).mean().item()
    assert average == pytest.approx(exact.item(), rel=0.03)


def test_what_is_not_defined_is_nan():
    zero = norms_of(torch.zeros(4, 3, dtype=torch.float64))
    assert all(test(zero).isnan() for test, _ in TESTS)
    assert all(v.isnan() for v in (*total_snr(zero), norm_test(zero).error))
    cancelled = norms_of(torch.tensor([[1.0], [-1.0]], dtype=torch.float64))
    assert all(test(cancelled).isnan() for test, _ in TESTS)
    assert total_snr(cancelled).value < 0 and total_snr(cancelled).error.isnan()
    same = norms_of(torch.ones(3, 2, dtype=torch.float64))
    assert total_snr(same).value.isnan() and norm_test(same).value == 0
    # without one of them nothing varies any more
    alike = norms_of(torch.tensor([[1.0], [1.0], [2.0]], dtype=torch.float64))
    assert total_snr(alike).value > 0 and not total_snr(alike).error.isfinite()


def test_a_layer_that_learns_nothing_has_no_ratio():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))
    nn.init.zeros_(model[3].weight)
    row = tracker(model, ["layers"])(
        torch.randn(B, 3, 2, 2), torch.arange(B) % 3, Point(LR, B, 0.0)
    )
    assert row["layer_c2"][0] == 0 and row["layer_snr"][0] is None
    assert row["layer_c2"][1] > 0 and row["layer_snr"][1] is not None
    assert row["layer_snr_se"][0] is None and row["layer_snr_se"][1] > 0
    json.dumps(row, allow_nan=False)


def test_a_loss_that_is_not_above_0_has_no_batch_size_of_cabs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    noise = tracker(model, ["cabs"], loss=lambda output, target: output.square().sum(1) - 99)
    row = noise(torch.randn(B, 3, 2, 2), torch.arange(B), Point(LR, B, 0.0))
    assert row["cabs_batch_size"] is None and row["c2_sampled"] > 0


# How they are asked for


def test_rows_have_what_was_asked_for_and_nothing_else():
    model, x = networks("own parameters")
    y, point = torch.arange(B) % 3, Point(LR, B, 0.0)
    plain = tracker(model, ())(x, y, point)
    found: set[str] = set()
    for name in QUANTITIES:
        row = tracker(model, [name])(x, y, point)
        assert {key: row[key] for key in plain} == plain
        more = row.keys() - plain.keys()
        assert more and not more & found
        found |= more
    assert tracker(model)(x, y, point).keys() == plain.keys() | found


def test_the_flag_has_the_names_of_the_table():
    assert FIELDS["quantities"].metadata["choices"] == tuple(QUANTITIES)


@pytest.mark.parametrize(
    "more, words",
    [
        ({"quantities": ["norm"]}, "quantities 'norm': did you mean norm-test?"),
        ({"quantities": ["snr"], "estimator": "micro-batch"}, "need the per-sample estimator"),
        ({"quantities": ["layers", "snr"], "ranks": Ranks(0, 2)}, "layers snr: .* use one process"),
    ],
    ids=["unknown", "micro-batch", "processes"],
)
def test_what_cannot_be_had_is_refused(more, words):
    with pytest.raises(ValueError, match=words):
        tracker(nn.Linear(3, 2), **more)


def test_the_rule_of_plain_sgd_is_refused_with_momentum():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    with pytest.raises(ValueError, match="cabs: its rule is that of SGD without momentum"):
        NoiseTracker(model, optimizer, samples=N, every=1, quantities=["snr", "cabs"])


def test_a_model_without_per_sample_gradients_is_refused_at_the_first_batch():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(NotCovered, match="BatchNorm with batch statistics"):
        tracker(model)(torch.randn(B, 3, 2, 2), torch.arange(B) % 3, Point(LR, B, 0.0))


# In a run

RUN = [*EXACT, "--norm", "group", "--epochs", "1", "--track-noise", "every=20"]


def test_a_run_writes_them_and_the_names_of_its_layers(tmp_path):
    out = tmp_path / "run"
    assert main([*RUN, "--quantities", *QUANTITIES, "--out", str(out)]) == 0
    layers = json.loads((out / "layers.json").read_text())["layers"]
    model = models.build("resnet8", 10, "group")
    assert {layer["name"]: layer["parameters"] for layer in layers} == layers_of(model)
    rows = [row for row in read_rows(out) if row["kind"] == "measure"]
    assert len(rows) == 3
    for row in rows:
        assert len(row["layer_c2"]) == len(layers) == len(row["layer_snr_se"])
        assert math.fsum(row["layer_c2"]) == pytest.approx(row["c2_sampled"], rel=1e-4)
        assert row["norm_test_se"] > 0 and row["cabs_batch_size"] > 0
    plain = tmp_path / "plain"
    assert main([*RUN, "--out", str(plain)]) == 0
    assert not (plain / "layers.json").exists()
    without = without_times(read_rows(plain))
    both = zip(read_rows(out), without, strict=True)
    assert [{key: row[key] for key in other} for row, other in both] == without
