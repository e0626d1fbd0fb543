"""A plain loop with a NoiseTracker: what training in other libraries is compared with."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastsmooth as fs

LR, MOMENTUM = 0.1, 0.9
Batch = tuple[Tensor, Tensor]


def images(samples: int = 70) -> torch.utils.data.TensorDataset:
    """Noise with labels, float32 [samples, 1, 6, 6] of ten classes."""
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 1, 6, 6, generator=drawn)
    return torch.utils.data.TensorDataset(x, torch.randint(10, (samples,), generator=drawn))


def network(mixing: bool = False) -> nn.Module:
    """One that draws no random numbers; `mixing` one that does, and whose samples mix."""
    torch.manual_seed(0)
    inner = [nn.BatchNorm2d(4), nn.Dropout(0.2)] if mixing else [nn.GroupNorm(2, 4)]
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), *inner, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 10)
    )


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)


def batches(data: torch.utils.data.Dataset, size: int) -> list[Batch]:
    """In order; the last may be smaller."""
    return list(torch.utils.data.DataLoader(data, size))


def windows(found: list[Batch], count: int) -> Iterator[list[Batch]]:
    """Of `count` micro-batches each; the last may have fewer."""
    for start in range(0, len(found), count):
        yield found[start : start + count]


def plain(
    model: nn.Module,
    data: list[Batch],
    *,
    every: int | str,
    samples: int,
    micro_batches: int = 1,
    epochs: int = 1,
    clip: float | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    convert: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[tuple[int, dict[str, Any]]]:
    """Train as the hosts do, which divide by `micro_batches` also where an epoch ends with fewer:
    (updates before, row) of each measurement."""
    optimizer = optimizer_of(model)
    noise = fs.NoiseTracker(model, optimizer, samples=samples, every=every)
    rows, update = [], 0
    for _ in range(epochs):
        for window in windows(data, micro_batches):
            xs, ys = [convert(x) for x, _ in window], [y for _, y in window]
            size = sum(map(len, ys))
            lr = LR * len(window) / micro_batches
            with context():
                row = noise(xs, ys, fs.Point(lr, size, MOMENTUM))
            if row:
                rows.append((update, row))
            for x, y in zip(xs, ys, strict=True):
                with context():
                    loss = F.cross_entropy(model(x), y)
                (loss / micro_batches).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            update += 1
        noise.end_epoch()
    return rows


def within(model: nn.Module, parts: list[Batch], n: int) -> tuple[float, float]:
    """(C2 from each sample's distance from the mean gradient of its part, ||g|| of the whole) in
    float64, a backward pass a sample: sum_p sum_i ||g_pi - h_p||^2 / (B - P) (n - 1) / n."""
    model = model.double()
    total, squares, seen = 0.0, 0.0, 0
    for x, y in parts:
        grads = []
        for i in range(len(y)):
            loss = F.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
            found = torch.autograd.grad(loss, list(model.parameters()))
            grads.append(torch.cat([g.flatten() for g in found]))
        stacked = torch.stack(grads)
        squares += (stacked - stacked.mean(0)).square().sum().item()
        total, seen = total + stacked.sum(0), seen + len(y)
    return squares / (seen - len(parts)) * (n - 1) / n, (total / seen).norm().item()


def assert_same_rows(
    found: list[tuple[int, dict[str, float]]], rows: list[tuple[int, dict[str, Any]]]
) -> None:
    """That a logger got the numbers of these rows, at the same updates, within 1e-6."""
    assert rows and [update for update, _ in found] == [update for update, _ in rows]
    for (update, numbers), (_, row) in zip(found, rows, strict=True):
        for name in ("c2_sampled", "c2_sampled_se", "grad_norm", "grad_norm_max", "k2",
                     "full_grad_square", "delta_measured"):  # fmt: skip
            got, wanted = numbers.get(f"noise/{name}"), row[name]
            assert got is not None and abs(got - wanted) <= 1e-6 * abs(wanted), (update, name)
