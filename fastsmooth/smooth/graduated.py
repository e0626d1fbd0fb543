"""Explicit graduated optimization in many dimensions: descent on f_delta while delta falls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from fastsmooth.smooth.objectives import Objective

Perturb = Callable[[], Tensor]  # [seeds, draws, D], anew at every call


def descend(
    f: Objective, x: Tensor, deltas: Iterable[float], steps: int, perturb: Perturb
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


def starts(f: Objective, dim: int, seeds: Iterable[int]) -> Tensor:
    """Where the seeds start: [seeds, dim] float64; no seed's start depends on another seed."""
    unit = [
        torch.rand(dim, generator=Generator().manual_seed(s), dtype=torch.float64) for s in seeds
    ]
    return f.reach * (2 * torch.stack(unit) - 1)


def normal(dim: int, draws: int, seeds: Iterable[int]) -> Perturb:
    """Standard normal perturbations, [seeds, draws, dim] float64; a seed's own do not depend on the
    other seeds."""
    generators = [Generator().manual_seed(2**32 + s) for s in seeds]
    return lambda: torch.stack(
        [torch.randn(draws, dim, generator=g, dtype=torch.float64) for g in generators]
    )


def nothing(dim: int, draws: int, seeds: Iterable[int]) -> Perturb:
    """No perturbation, [seeds, 1, dim] of zeros: plain gradient descent, with the learning rates of
    the schedule."""
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
        """The least value of f at the end of a round, [seeds] float64."""
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
    """Inside, PyTorch computes on one thread.

    A step's tensors are so small that a second thread mostly waits for the first, and spins
    meanwhile: beside other work a step then took 20 times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
