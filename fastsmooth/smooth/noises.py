"""The noise u: its characteristic function E exp(i t u), mean, variance and a sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy import ndarray


@dataclass(frozen=True)
class Noise:
    """`characteristic` takes t > 0 [k]; `mean` and `variance` are None where they do not exist or
    are infinite.

    The scales are those of the published demo. E||u|| exceeds 1 under several laws, so
    that equal deltas of two laws are not equal degrees of smoothing in the papers' sense.
    """

    tails: str  # light or heavy
    law: str
    characteristic: Callable[[ndarray], ndarray]
    draw: Callable[[np.random.Generator, tuple[int, ...]], ndarray]
    mean: float | None = None
    variance: float | None = None


def dawson(x: ndarray) -> ndarray:
    """exp(-x^2) times the integral of exp(s^2) from 0 to x, as a sum over odd n (Rybicki 1989); the
    error is below 1e-16."""
    h = 0.2  # the error is exp(-(pi / 2h)^2)
    n = np.arange(1, 2 * math.ceil((np.max(np.abs(x)) + 7) / h / 2) + 1, 2)
    away = np.exp(-((x[:, None] - h * n) ** 2)) - np.exp(-((x[:, None] + h * n) ** 2))
    return (away / n).sum(axis=1) / math.sqrt(math.pi)


def rayleigh(t: ndarray) -> ndarray:
    normal = np.exp(-(t**2) / 2)
    return (
        1 - math.sqrt(2) * t * dawson(t / math.sqrt(2)) + 1j * math.sqrt(math.pi / 2) * t * normal
    )


def pareto(t: ndarray) -> ndarray:
    """The exponential integral E_2(-it): its series near 0, elsewhere its continued fraction (DLMF
    6.6.2, 8.9.2)."""
    z, near = -1j * t, t < 2
    term: ndarray = np.ones_like(z)
    series, fraction = -np.euler_gamma - np.log(z), np.zeros_like(z)
    for k in range(1, 40):
        term = term * np.where(near, -z, 0) / k
        series = series - term / k
    for k in range(120, 0, -1):
        fraction = k * (k + 1) / (z + 2 + 2 * k - fraction)
    return np.where(near, np.exp(-z) - z * series, np.exp(-z) / (z + 2 - fraction))


NOISES: dict[str, Noise] = {
    "normal": Noise(
        "light", "N(0, 1)", lambda t: np.exp(-(t**2) / 2), lambda g, n: g.normal(size=n), 0.0, 1.0
    ),
    "uniform": Noise(
        "light",
        "U(-2, 2)",
        lambda t: np.sinc(2 * t / np.pi),
        lambda g, n: g.uniform(-2, 2, n),
        0.0,
        4 / 3,
    ),
    "exponential": Noise(
        "light",
        "exponential of mean 1.5",
        lambda t: 1 / (1 - 1.5j * t),
        lambda g, n: g.exponential(1.5, n),
        1.5,
        2.25,
    ),
    "rayleigh": Noise(
        "light",
        "Rayleigh of scale 1",
        rayleigh,
        lambda g, n: g.rayleigh(1.0, n),
        math.sqrt(math.pi / 2),
        2 - math.pi / 2,
    ),
    "pareto": Noise(
        "heavy", "Pareto of index 1 from 1 on", pareto, lambda g, n: g.pareto(1.0, n) + 1
    ),
    "cauchy": Noise(
        "heavy", "standard Cauchy", lambda t: np.exp(-t), lambda g, n: g.standard_cauchy(n)
    ),
    "levy": Noise(
        "heavy",
        "standard Levy",
        lambda t: np.exp(-np.sqrt(-2j * t)),
        lambda g, n: g.normal(size=n) ** -2.0,
    ),
}
