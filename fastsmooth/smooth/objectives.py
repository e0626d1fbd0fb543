"""What explicit graduated optimization minimises, and how delta falls. No torch: flags name them.

The functions take tensors and use their methods alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# The step of central differences. At this one rounding and curvature each put an error of some 1e-8
# into Rastrigin's gradient; the published code takes steps of 1e-8.
STEP = 1e-5


@dataclass(frozen=True)
class Join:
    """How the terms [..., D] of the coordinates become one number, and that number without the term
    of each."""

    all: Callable[[Tensor], Tensor]  # [..., D] to [...]
    others: Callable[[Tensor], Tensor]  # [..., D] to [..., D]
    put: Callable[[Tensor, Tensor], Tensor]  # others and a term to the number with that term


SUM = Join(lambda t: t.sum(-1), lambda t: t.sum(-1, keepdim=True) - t, operator.add)
# no factor is 0: cos is 0 at odd multiples of pi / 2, none of which is a float64
PRODUCT = Join(lambda t: t.prod(-1), lambda t: t.prod(-1, keepdim=True) / t, operator.mul)


@dataclass(frozen=True)
class Objective:
    """f(x) = value(D, numbers joined from per-coordinate terms of x [..., D]); its minimum is 0.

    `lr` is l0, the learning rate at delta 1 (arXiv 2412.11501). Starts are uniform in [-reach,
    reach], as published.
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
    """x_i^2 / 4000 and cos(x_i / sqrt(i)), i from 1, [..., D] each, of x [..., D].

    The terms of Griewank's function (Griewank 1981), in the dtype of x.
    """
    roots = x.new_tensor(range(1, x.shape[-1] + 1)).sqrt()
    return x.square() / 4000, (x / roots).cos()


OBJECTIVES: dict[str, Objective] = {
    "rastrigin": Objective(
        0.01,
        5.12,
        lambda x: (x.square() - 10 * (2 * math.pi * x).cos(),),
        lambda n, total: total + 10 * n,
    ),
    "ackley": Objective(
        10,
        32.768,
        lambda x: (x.square(), (2 * math.pi * x).cos()),
        lambda n, squares, waves: (
            20 + math.e - 20 * (-0.2 * (squares / n).sqrt()).exp() - (waves / n).exp()
        ),
        (SUM, SUM),
    ),
    # with 12 r and raised by 1, as is usual in many dimensions; the curves above have 12 pi x
    "drop_wave": Objective(
        0.1,
        5.12,
        lambda x: (x.square(),),
        lambda n, r2: 1 - (1 + (12 * r2.clamp_min(0).sqrt()).cos()) / (2 + 0.5 * r2),
    ),
    "schwefel": Objective(
        10,
        500,
        lambda x: (x * x.abs().sqrt().sin(),),
        lambda n, total: 418.9828872724337 * n - total,
    ),
    "griewank": Objective(
        50, 100, griewank_terms, lambda n, total, product: total - product + 1, (SUM, PRODUCT)
    ),
}


def nice(first: float, last: float, rounds: int) -> list[float]:
    """The optimal decay of power 1 (arXiv 2412.11501), counted from round 1 and ending at `last`
    instead of 0: a straight line."""
    return [first + (last - first) * m / max(rounds - 1, 1) for m in range(rounds)]


def geo(first: float, last: float, rounds: int) -> list[float]:
    return [first * (last / first) ** (m / max(rounds - 1, 1)) for m in range(rounds)]


SCHEDULES: dict[str, Callable[[float, float, int], list[float]]] = {"nice": nice, "geo": geo}
