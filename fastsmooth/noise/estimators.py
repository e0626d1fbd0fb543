"""Estimators of the gradient variance C2 = E ||grad f_i - grad f||^2, each a value with its error
and what that covers.

All but `sampled` compare gradients of disjoint parts of one batch with their mean. With parts of
m_j samples, h_j their mean gradients and h the mean over all samples,

    C2 = sum_j m_j ||h_j - h||^2 / (k - 1)

is unbiased for every k >= 2 (the mean square between groups of an analysis of variance); for
samples that were drawn from n without replacement it is n / (n - 1) times too large, which is
divided out. The error is the jackknife's over the parts (Efron and Stein 1981), for which three are
needed. It covers what another batch would give at the same parameters, and never the course of
training: for that there are replayed histories (training.modes.Sampling) and seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsmooth.kernels.backend import wide_dtype

PARTS = "the parts of one batch"  # what varies in the error of micro_batch


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error."""

    value: float
    error: float | None  # None where the parts are too few to tell
    count: int  # of draws or parts that it rests on
    over: str  # what varies in the error

    @classmethod
    def mean(cls, draws: list[float], over: str = "independent draws") -> Estimate:
        """The mean of independent draws."""
        mean = math.fsum(draws) / len(draws)
        if len(draws) < 2:
            return cls(mean, None, len(draws), over)
        variance = math.fsum((d - mean) ** 2 for d in draws) / (len(draws) - 1)
        return cls(mean, math.sqrt(variance / len(draws)), len(draws), over)


def between(deviations: list[float], sizes: list[int], n: int | None, over: str) -> Estimate:
    """C2 from ||h_j - h||^2 of parts of `sizes` samples: the mean square between groups.

    n: how many samples there are to draw from without replacement, None where there is no limit.
    Raises ValueError for fewer than two parts.

    Unlike that of per_sample the error does not vanish where the batch is the whole population:
    which samples are in a part together is chance still.
    """
    k, total = len(sizes), sum(sizes)
    if k < 2:
        raise ValueError("the variance between parts needs two or more of them")
    terms = [m * d for m, d in zip(sizes, deviations, strict=True)]
    between_parts = math.fsum(terms)
    finite = 1.0 if n is None else (n - 1) / n
    value, error = finite * between_parts / (k - 1), None
    if k > 2:
        # Without part j the mean moves too, and the sum of squares falls by m_j d_j M / (M - m_j).
        without = [
            (between_parts - t * total / (total - m)) / (k - 2)
            for t, m in zip(terms, sizes, strict=True)
        ]
        error = finite * jackknife_error(without)
    return Estimate(value, error, k, over)


def jackknife_error(without: list[float]) -> float:
    """An estimate's standard error from its values with one of two or more parts left out."""
    k = len(without)
    center = math.fsum(without) / k
    return math.sqrt((k - 1) / k * math.fsum((w - center) ** 2 for w in without))


def per_sample(
    noise: Tensor | Sequence[Tensor] | Sequence[Sequence[float]], n: int | None = None
) -> Estimate:
    """C2 from ||g_i - h||^2 of the samples of a batch, as persample.sample_norms gives them.

    Args: noise, [B], or one such vector a process, each about the mean gradient h of its own
    samples: C2 = sum_i ||g_i - h||^2 / (B - k) over all B samples in k vectors. n: of how many the
    samples were drawn without replacement (the training set's size); None for no end of them. Of
    the jackknife's error sqrt(1 - B / n) is left then (Cochran 1977, 2.9).

    In the unit of a squared gradient norm. Raises ValueError for vectors of fewer than two samples
    and for more samples than n.
    """
    if isinstance(noise, Tensor):
        noise = [noise]
    elif not all(isinstance(part, Tensor | Sequence) for part in noise):
        raise ValueError("noise is a tensor [B], or a list of one such vector a process")
    parts = [part.tolist() if isinstance(part, Tensor) else list(part) for part in noise]
    if min(map(len, parts), default=0) < 2:
        raise ValueError("the variance within parts needs two or more samples of each")
    count = sum(map(len, parts))
    if n is not None and count > n:
        raise ValueError(f"{count} samples cannot have been drawn from n = {n}")
    degrees = count - len(parts)
    total = math.fsum(d for part in parts for d in part)
    finite = 1.0 if n is None else (n - 1) / n
    left = 1.0 if n is None else math.sqrt(max(1 - count / n, 0.0))
    error = None
    if degrees > 1:
        # without a sample its part's mean moves too
        without = [
            (total - d * len(part) / (len(part) - 1)) / (degrees - 1)
            for part in parts
            for d in part
        ]
        error = finite * left * jackknife_error(without)
    return Estimate(finite * total / degrees, error, count, "the samples of one batch")


def micro_batch(
    grads: list[list[Tensor]],
    mean: list[Tensor],
    sizes: list[int],
    n: int | None = None,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> Estimate:
    """C2 from the mean gradients of k parts of a batch, the mean square between groups.

    Args: grads, one list a part, a tensor [...] a parameter in its shape and dtype; mean, their
    `weighted_mean`, shaped alike; sizes, the samples of each part; n, how many samples there are to
    draw from without replacement, None where there is no limit. With several processes each has
    parts of its own, `mean` is over all of them, and gather(value) gives everybody's value.

    In the unit of a squared gradient norm. Raises ValueError for fewer than two parts in all.
    """
    deviations = torch.stack([distance(h, mean) for h in grads]).tolist()
    found = gather((deviations, sizes))
    deviations, sizes = ([v for part in found for v in part[k]] for k in (0, 1))
    return between(deviations, sizes, n, PARTS)


def weighted_mean(grads: list[list[Tensor]], sizes: list[int]) -> list[Tensor]:
    """The mean gradient over all samples from the mean gradients of parts of `sizes` samples.

    `grads` has one list a part, a tensor [...] a parameter; the result is one such list of new
    tensors, in their shapes and dtypes. Raises ValueError unless there is a size for each part.
    """
    mean = list(torch._foreach_mul(grads[0], sizes[0] / sum(sizes)))
    for h, m in zip(grads[1:], sizes[1:], strict=True):
        torch._foreach_add_(mean, h, alpha=m / sum(sizes))
    return mean


def across_ranks(
    local: list[Tensor], mean: list[Tensor], samples: int, n: int | None = None
) -> Estimate:
    """C2 from each process's own gradient and the mean gradient over all processes, which training
    has anyway.

    `local`, the mean over this process's `samples` samples, and `mean` have a tensor [...] a
    parameter, in its shape and dtype. n: how many samples there are to draw from without
    replacement, None where there is no limit. Every process of the default group calls it and gets
    the same estimate; two float64 numbers a process are exchanged.

    In the unit of a squared gradient norm. Raises ValueError where the process is alone.
    """
    own = torch.stack(
        [
            distance(local, mean),
            torch.tensor(float(samples), dtype=torch.float64, device=local[0].device),
        ]
    )
    found = [torch.zeros_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, own)
    deviations, sizes = torch.stack(found).T.tolist()
    return between(deviations, [int(m) for m in sizes], n, "the processes' samples of one batch")


def sampled(
    deviations: list[float], batch_size: int, n: int, over: str = "mini-batches drawn at one point"
) -> Estimate:
    """C2 from ||g - grad f||^2 of mini-batches, each `batch_size` of n without replacement.

    Var(g) = C2 / b (n - b) / (n - 1), so C2 = b mean ||g - grad f||^2 (n - 1) / (n - b).
    """
    factor = batch_size * (n - 1) / (n - batch_size)
    return Estimate.mean([factor * d for d in deviations], over)


def distance(tensors: list[Tensor], mean: list[Tensor]) -> Tensor:
    """The squared L2 distance of two lists of tensors [...] of the same shapes: 0-d, wide."""
    norms = torch._foreach_norm(torch._foreach_sub(tensors, mean), 2, wide_dtype(tensors[0].device))
    return torch.stack(norms).square().sum()
