"""Estimators of the gradient variance: unbiased on synthetic gradients, and agreed on a network."""

import math
import os
import socket

import pytest
import torch
from torch import multiprocessing
from torch.nn import functional as F

from fastsmooth import models
from fastsmooth.noise import estimators
from fastsmooth.noise.estimators import Estimate, across_ranks, between, per_sample, sampled
from fastsmooth.noise.persample import sample_norms

N, P, REPETITIONS = 40, 6, 2000


def population():
    """[N, P] gradients of unequal spread around a mean that is not zero, and their variance."""
    rows = (
        torch.randn(N, P, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        * torch.arange(1, P + 1)
        + 5
    )
    return rows, (rows - rows.mean(0)).square().sum(1).mean().item()


def micro_batch(grads, sizes, n=None) -> Estimate:
    return estimators.micro_batch(grads, estimators.weighted_mean(grads, sizes), sizes, n)


def one(name: str, rows, generator) -> Estimate:
    index = torch.randperm(N, generator=generator)
    if name == "per-sample":
        batch = rows[index[:10]]
        return per_sample([(batch - batch.mean(0)).square().sum(1).tolist()], N)
    if name == "micro-batch":  # of unequal sizes
        sizes = [3, 4, 4, 5]
        return micro_batch([[part.mean(0)] for part in rows[index[:16]].split(sizes)], sizes, N)
    if name == "halves":
        return micro_batch([[part.mean(0)] for part in rows[index[:16]].split(8)], [8, 8], N)
    draws = [rows[torch.randperm(N, generator=generator)[:10]].mean(0) for _ in range(6)]
    return sampled([(g - rows.mean(0)).square().sum().item() for g in draws], 10, N)


@pytest.mark.parametrize("name", ["per-sample", "micro-batch", "halves", "sampled"])
def test_unbiased_over_repetitions_and_the_error_is_their_spread(name):
    rows, c2 = population()
    generator = torch.Generator().manual_seed(0)
    found = [one(name, rows, generator) for _ in range(REPETITIONS)]
    overall = Estimate.mean([e.value for e in found])
    assert abs(overall.value - c2) < 3 * overall.error
    assert overall.error < 0.02 * c2
    if name == "halves":
        assert all(e.error is None for e in found)
        return
    spread = overall.error * math.sqrt(REPETITIONS)
    stated = math.sqrt(sum(e.error**2 for e in found) / REPETITIONS)
    # jackknife variances are too large on average (Efron and Stein), the more the fewer the parts
    assert 0.9 * spread < stated < (2.0 if name == "micro-batch" else 1.3) * spread


def test_the_jackknife_leaves_parts_out_one_by_one():
    rows, _ = population()
    sizes = [2, 5, 1, 4]
    parts = list(rows[:12].split(sizes))

    def estimate(parts):
        return micro_batch([[part.mean(0)] for part in parts], [len(part) for part in parts])

    without = torch.tensor(
        [estimate(parts[:j] + parts[j + 1 :]).value for j in range(4)], dtype=torch.float64
    )
    expected = math.sqrt(3 / 4 * (without - without.mean()).square().sum().item())
    assert math.isclose(estimate(parts).error, expected, rel_tol=1e-9)


def test_one_part_has_no_variance():
    with pytest.raises(ValueError, match="two or more"):
        between([0.0], [4], None, "")


def network():
    torch.manual_seed(0)
    model = models.build("resnet8", 10, "group").double()
    x, y = torch.randn(96, 3, 12, 12, dtype=torch.float64), torch.randint(10, (96,))
    return model, x, y


def gradient(model, x, y):
    return list(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())))


def on_a_rank(rank: int, world: int, port: int, results) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.set_num_threads(1)
    model, x, y = network()
    sizes = [33, 31, 32][:world]
    local = gradient(model, x.split(sizes)[rank], y.split(sizes)[rank])
    mean = [g * (sizes[rank] / len(y)) for g in local]
    for g in mean:
        torch.distributed.all_reduce(g)
    results[rank] = across_ranks(local, mean, sizes[rank])
    torch.distributed.destroy_process_group()


@pytest.mark.full  # three processes
def test_all_agree_within_their_errors_on_one_network():
    model, x, y = network()
    found = {"per-sample": per_sample([sample_norms(model, x, y).noise.tolist()])}
    found["micro-batch"] = micro_batch(
        [gradient(model, x[i::12], y[i::12]) for i in range(12)], [8] * 12
    )
    full = gradient(model, x, y)
    generator = torch.Generator().manual_seed(3)
    deviations = []
    for _ in range(24):
        index = torch.randperm(len(y), generator=generator)[:8]
        deviations.append(estimators.distance(gradient(model, x[index], y[index]), full).item())
    found["sampled"] = sampled(deviations, 8, len(y))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(on_a_rank, (3, port, results), nprocs=3)
        ranks = [results[r] for r in range(3)]
    assert ranks[0] == ranks[1] == ranks[2]
    found["across ranks"] = ranks[0]
    exact = found["per-sample"].value * (len(y) - 1) / len(y)  # of these 96 samples
    for name, estimate in found.items():
        assert abs(estimate.value - exact) < 3 * estimate.error, name
        assert estimate.error < 0.8 * estimate.value, name
        for other in found.values():
            assert abs(estimate.value - other.value) < 3 * math.hypot(estimate.error, other.error)


def test_per_sample_takes_a_vector_or_one_a_process():
    torch.manual_seed(0)
    noise = torch.rand(9, dtype=torch.float64)
    found = per_sample(noise)
    assert found == per_sample([noise]) == per_sample([noise.tolist()])
    assert found.value == pytest.approx(noise.sum().item() / 8, rel=1e-14)
    two = per_sample([noise[:4], noise[4:].tolist()], 100)
    assert two.value == pytest.approx(noise.sum().item() / 7 * 99 / 100, rel=1e-14)
    for wrong, n in ((noise[:1], None), ([noise, noise[:1]], None), ([], None), (noise, 8)):
        with pytest.raises(ValueError):
            per_sample(wrong, n)
