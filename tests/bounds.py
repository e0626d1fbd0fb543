"""Test statistics, and the limits that chance exceeds less than once in ten thousand."""

import math

import numpy as np

ALPHA = 1e-4


def chi_square(counts, expected) -> float:
    """Pearson's statistic of observed counts."""
    return float(((np.asarray(counts, dtype=float) - expected) ** 2 / expected).sum())


def chi_square_limit(freedom: int) -> float:
    """P(X >= k + 2 sqrt(k x) + 2 x) <= exp(-x) for X of k degrees of freedom (Laurent and Massart
    2000, lemma 1)."""
    x = -math.log(ALPHA)
    return freedom + 2 * math.sqrt(freedom * x) + 2 * x


def ks(a, b) -> float:
    """The largest distance between two empirical distribution functions; ties are stepped over
    together."""
    a, b = np.sort(np.asarray(a, dtype=float)), np.sort(np.asarray(b, dtype=float))
    at = np.concatenate([a, b])
    steps = (np.searchsorted(sample, at, side="right") / len(sample) for sample in (a, b))
    return float(np.abs(np.subtract(*steps)).max())


def ks_limit(n: int, m: int) -> float:
    """Critical value of the two-sample statistic (Smirnov's limit law); smaller still where the
    values are discrete."""
    return math.sqrt(-math.log(ALPHA / 2) / 2 * (n + m) / (n * m))


def share_limit(n: int) -> float:
    """How far the share of successes in n trials may lie from its probability (Hoeffding 1963)."""
    return math.sqrt(math.log(2 / ALPHA) / (2 * n))
