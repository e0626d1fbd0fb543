"""Explicit graduated optimization in many dimensions: gradient descent on f_delta while delta
falls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

# of central differences: rounding and curvature both err by some 1e-8 of Rastrigin's gradient;
# published: 1e-8
STEP = 1e-5


@dataclass(frozen=True)
class Join:
    """How the terms [..., D] of the coordinates become one number, and that number without the term
    of each."""

    all: Callable[[Tensor], Tensor]  # [..., D] to [...]
    others: Callable[[Tensor], Tensor]  # [..., D] to [..., D]
    put: Callable[[Tensor, Tensor], Tensor]  # others and a term to the number with that term


SUM = Join(lambda t: t.sum(-1), lambda t: t.sum(-1, keepdim=True) - t, torch.add)
# no factor is 0: cos is 0 at odd multiples of pi / 2, none of which is a float64
PRODUCT = Join(lambda t: t.prod(-1), lambda t: t.prod(-1, keepdim=True) / t, torch.mul)


@dataclass(frozen=True)
class Landscape:
    """f(x) = value(D, numbers joined from per-coordinate terms of x [..., D]); its least value is
    0.

    `lr` is l0, the learning rate at delta 1 (SPEC B.5). Starts are uniform in [-reach, reach], as
    published.
    """

    lr: float
    reach: float
    terms: Callable[[Tensor], tuple[Tensor, ...]]
    value: Callable[..., Tensor]
    joins: tuple[Join, ...] = (SUM,)

    def __call__(self, x: Tensor) -> Tensor:
        """f [...] at x [..., D]."""
        return self.value(
            x.shape[-1], *(join.all(t) for join, t in zip(self.joins, self.terms(x), strict=True))
        )

    def gradient(self, x: Tensor) -> Tensor:
        """The central differences [..., D] of f at x [..., D].

        Moving one coordinate changes one term of each number, so that all 2 D values of f cost what
        two do.
        """
        others = [join.others(t) for join, t in zip(self.joins, self.terms(x), strict=True)]
        return (self._moved(x, others, STEP) - self._moved(x, others, -STEP)) / (2 * STEP)

    def _moved(self, x: Tensor, others: list[Tensor], step: float) -> Tensor:
        """f where coordinate i alone is moved, for every i: [..., D]."""
        terms = self.terms(x + step)
        return self.value(
            x.shape[-1], *(j.put(o, t) for j, o, t in zip(self.joins, others, terms, strict=True))
        )


def griewank_terms(x: Tensor) -> tuple[Tensor, Tensor]:
    roots = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype).sqrt()
    return x.square() / 4000, (x / roots).cos()


LANDSCAPES: dict[str, Landscape] = {
    "rastrigin": Landscape(
        0.01,
        5.12,
        lambda x: (x.square() - 10 * (2 * math.pi * x).cos(),),
        lambda n, total: total + 10 * n,
    ),
    "ackley": Landscape(
        10,
        32.768,
        lambda x: (x.square(), (2 * math.pi * x).cos()),
        lambda n, squares, waves: (
            20 + math.e - 20 * (-0.2 * (squares / n).sqrt()).exp() - (waves / n).exp()
        ),
        (SUM, SUM),
    ),
    # with 12 r and raised by 1, as is usual in many dimensions; the curves above have 12 pi x (SPEC
    # B.9)
    "drop_wave": Landscape(
        0.1,
        5.12,
        lambda x: (x.square(),),
        lambda n, r2: 1 - (1 + (12 * r2.clamp_min(0).sqrt()).cos()) / (2 + 0.5 * r2),
    ),
    "schwefel": Landscape(
        10,
        500,
        lambda x: (x * x.abs().sqrt().sin(),),
        lambda n, total: 418.9828872724337 * n - total,
    ),
    "griewank": Landscape(
        50, 100, griewank_terms, lambda n, total, product: total - product + 1, (SUM, PRODUCT)
    ),
}


def nice(first: float, last: float, rounds: int) -> list[float]:
    """The optimal decay of power 1 (SPEC A.6), counted from round 1 and ending at `last` instead of
    0: a straight line."""
    return [first + (last - first) * m / max(rounds - 1, 1) for m in range(rounds)]


def geo(first: float, last: float, rounds: int) -> list[float]:
    return [first * (last / first) ** (m / max(rounds - 1, 1)) for m in range(rounds)]


SCHEDULES: dict[str, Callable[[float, float, int], list[float]]] = {"nice": nice, "geo": geo}
Perturb = Callable[[], Tensor]  # [seeds, draws, D], anew at every call


def descend(
    f: Landscape, x: Tensor, deltas: Iterable[float], steps: int, perturb: Perturb
) -> Tensor:
    """f [rounds, seeds] after each round of graduated optimization from x [seeds, D].

    A step moves x by -lr delta times the mean over draws of the gradient at x + delta *
    perturbation.
    """
    values = []
    for delta in deltas:
        for _ in range(steps):
            x = x - f.lr * delta * f.gradient(x[:, None] + delta * perturb()).mean(dim=1)
        values.append(f(x))
    return torch.stack(values)


def starts(f: Landscape, dim: int, seeds: Iterable[int]) -> Tensor:
    """[seeds, dim]; a seed's start does not depend on the other seeds."""
    unit = [
        torch.rand(dim, generator=Generator().manual_seed(s), dtype=torch.float64) for s in seeds
    ]
    return f.reach * (2 * torch.stack(unit) - 1)


def normal(dim: int, draws: int, seeds: Iterable[int]) -> Perturb:
    """Standard normal perturbations; those of a seed do not depend on the other seeds."""
    generators = [Generator().manual_seed(2**32 + s) for s in seeds]
    return lambda: torch.stack(
        [torch.randn(draws, dim, generator=g, dtype=torch.float64) for g in generators]
    )


def nothing(dim: int, draws: int, seeds: Iterable[int]) -> Perturb:
    """No perturbation: plain gradient descent, with the learning rates of the schedule."""
    zeros = torch.zeros(len(list(seeds)), 1, dim, dtype=torch.float64)
    return lambda: zeros


DESCENTS: dict[str, Callable[[int, int, Iterable[int]], Perturb]] = {
    "graduated": normal,
    "plain": nothing,
}


@dataclass(frozen=True)
class Descent:
    """One cell of the table. `values` is f at the end of every round, [rounds, seeds]."""

    function: str
    schedule: str
    method: str
    values: Tensor

    @property
    def best(self) -> Tensor:
        """The least value at the end of a round, one a seed."""
        return self.values.min(dim=0).values

    def summary(self) -> dict[str, Any]:
        """For smooth.json. A value that is not finite is null."""
        sd = self.values.std(dim=1).tolist() if len(self.best) > 1 else [None] * len(self.values)
        return {
            "function": self.function,
            "schedule": self.schedule,
            "method": self.method,
            "mean_best": self.best.mean().item(),
            "sd_best": self.best.std().item() if len(self.best) > 1 else None,
            "mean_last": self.values[-1].mean().item(),
            "sd_last": sd[-1],
            "n": len(self.best),
            "best": self.best.tolist(),
            "mean_by_round": self.values.mean(dim=1).tolist(),
            "sd_by_round": sd,
        }


@contextmanager
def one_thread() -> Iterator[None]:
    """A step's tensors are so small that a second thread mostly waits, and busily: beside other
    work 20 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
