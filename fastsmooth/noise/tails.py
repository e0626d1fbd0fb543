"""How the coordinates of noise vectors are distributed: moments, quantiles, distance from a normal
law, tail index.

Coordinates are streamed: what is kept of them is central moments and histograms of their float32
bits, of up to 32 groups of draws, and the estimates of single draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastsmooth.kernels.backend import wide_dtype
from fastsmooth.noise.estimators import Estimate, jackknife_error

# A bin is a float32 cut to its sign, exponent and 7 leading bits: 128 bins an octave, found by one
# shift, the same for every draw, so that histograms add up exactly.
CUT = 16
BINS = 255 << 7  # of one sign: magnitudes from 0 to 2^128
CODES = 1 << 15  # the codes of one sign; those from BINS on are infinite or not a number
# [BINS + 1]
EDGES = (torch.arange(BINS + 1, dtype=torch.int32) << CUT).view(torch.float32).double()
EDGES[-1] = 2.0**128
LOW, HIGH = EDGES[:-1], EDGES[1:]
ZERO = EDGES[1].item()  # 2^-133: magnitudes below it, in the first bin, count as zero
# of a value between the edges of its bin, and of the rounding to float32
RELATIVE_ERROR = 2.0**-7 + 2.0**-23
# The mean of log x over a bin in which x is evenly spread. A power law x^-(1 + alpha) is off by (1
# + alpha) h^2 / 12 in a bin of width h in log x, 5e-6 (1 + alpha) at most, and scatter within bins
# adds a share (alpha h)^2 / 24 to the standard error of a tail index: it needs no sorted values.
# torch.topk of the largest 1 % of 11 million coordinates takes four times as long as everything
# here together.
LOGS = (HIGH * HIGH.log() - torch.special.xlogy(LOW, LOW)) / (HIGH - LOW) - 1
LEVELS = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
QQ = torch.arange(-20, 21, dtype=torch.float64) / 5  # standard deviations
SHARES = (0.05, 0.01, 0.001)  # of the largest magnitudes
WIDE = 16  # bins make one of the reported histogram: 8 an octave, 26.6 a decade
GROUPS = 32  # of draws, one of which is left out at a time: 0.5 MB of counts each
# Coordinates that are worked on at a time: on a CPU they stay in its cache, on a GPU they fill it.
BLOCK = {"cpu": 1 << 17, "cuda": 1 << 22}


class NoiseStatistics:
    """Statistics of `coordinates` noise coordinates over any number of draws, none of them stored.

    All moments are of float64 values about their mean; histogram, quantiles, KS distance and tail
    indices are of the values rounded to float32. A draw of 11 million coordinates takes about 80 ms
    on two CPU cores, 6 % of a gradient of ResNet-18 at batch 32.
    """

    def __init__(self, coordinates: int, device: torch.device):
        self.coordinates = coordinates
        size = min(coordinates, BLOCK.get(device.type, BLOCK["cpu"]))
        self.block = torch.empty(size, dtype=wide_dtype(device), device=device)
        self.groups: list[CoordinateStats] = []  # draw i is in group i % GROUPS
        self.estimates: list[dict[str, float | None]] = []  # one a draw

    def observe(self, omega: list[Tensor]) -> None:
        """Take in one draw: floating tensors of any shapes [...], of `coordinates` elements in all.

        Raises ValueError for another number of elements and FloatingPointError for a value that
        float32 cannot hold (NaN, Inf, above 3.4e38), with the number of the draw, counted from 0,
        and forgets the draw.
        """
        draw, elements = len(self.estimates), sum(w.numel() for w in omega)
        if elements != self.coordinates:
            raise ValueError(f"draw {draw} has {elements:,} coordinates, not {self.coordinates:,}")
        counts = torch.zeros(2 * CODES, dtype=torch.int64, device=self.block.device)
        moments = []
        for block in self.blocks(omega):
            counts += torch.bincount(codes(block), minlength=2 * CODES)
            moments.append(central_moments(block))
        counts = counts.view(2, CODES).cpu()
        if counts[:, BINS:].any():
            raise FloatingPointError(f"draw {draw} has coordinates that are not finite in float32")
        sample = CoordinateStats(counts[:, :BINS], merged(torch.stack(moments).cpu().double()))
        if draw < GROUPS:
            self.groups.append(sample)
        else:
            self.groups[draw % GROUPS] = joined([self.groups[draw % GROUPS], sample])
        self.estimates.append(sample.estimates())

    def blocks(self, omega: list[Tensor]) -> Iterator[Tensor]:
        """Wide blocks [b] of the coordinates, cut alike however they are split into tensors.

        `omega` has tensors [...] of any shapes and dtypes. A block is overwritten by the next.
        """
        filled = 0
        for w in omega:
            rest = w.flatten()
            while len(rest):
                piece, rest = rest.tensor_split([len(self.block) - filled])
                self.block[filled : filled + len(piece)] = piece
                filled += len(piece)
                if filled == len(self.block):
                    yield self.block
                    filled = 0
        if filled:
            yield self.block[:filled]

    def state_dict(self) -> dict[str, Any]:
        """What the draws so far have left: tensors, numbers and None."""
        return {
            "counts": [sample.counts for sample in self.groups],
            "moments": [sample.moments for sample in self.groups],
            "estimates": self.estimates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state_dict` was asked, of as many coordinates."""
        self.groups = list(map(CoordinateStats, state["counts"], state["moments"]))
        self.estimates = list(state["estimates"])

    def summary(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON. Raises ValueError before the first draw.

        An estimate is {"value", "error", "draws_mean", "draws_error", "draws"}: of all coordinates
        of all draws pooled, with its standard error; the mean of the estimates of one draw each,
        with its standard error; the number of draws that have one. Where draws differ in scale the
        two differ: pooling mixes the scales, which adds kurtosis. Coordinates of one draw come out
        of one mini-batch and are not independent, so every error is the spread over draws: "error"
        by the jackknife, which leaves out one of up to 32 groups of draws at a time (Kott 2001). It
        has the binning in it only as far as that varies. Errors of a single draw are None, as is a
        value that is not defined.

        draws, coordinates, count    numbers; count is of pooled coordinates
        zeros                        pooled coordinates below 2^-133 (9e-41) in magnitude
        mean, variance, skewness, excess_kurtosis
                                     estimates, with sums divided by the count; the latter two are 0
                                     for a normal law, and None for a standard deviation below
                                     2^-126, as are ks_distance and qq
        quantiles                    estimates with their "level": the smallest coordinate with at
                                     least this share of coordinates at or below it, within
                                     quantile_relative_error of its magnitude plus 2^-133
        ks_distance                  estimate of sup |F - Phi|, Phi the normal law of the pooled (or
                                     the draw's) mean and variance. The true value for the pooled
                                     coordinates lies between "value" and "value" + "bound". No
                                     p-value: it would assume independent coordinates.
        qq                           "normal": z; "observed": the quantile at level Phi(z) over the
                                     standard deviation
        hill                         estimates of the tail index of |omega|, P(|omega| > x) ~
                                     x^-alpha (Hill 1975), from the k largest magnitudes: those
                                     above "threshold", the lowest bin edge that leaves at most
                                     "share" of the nonzero coordinates above it.
                                     "error_if_independent" is alpha / sqrt(k). A power law has the
                                     same index at every share.
        log_moment                   estimates of alpha of a symmetric alpha-stable law from the
                                     variance of log |omega| without zeros: "inverse_square" = 1 /
                                     alpha^2 = 6 Var / pi^2 - 1 / 2 (Ma and Nikias 1995), and
                                     "alpha", None where that is not positive. 2 is a normal law; an
                                     estimate above 2 stands as it is. Pooling coordinates of
                                     different scales lowers it.
        histogram                    counts "positive" and "negative" of magnitudes between
                                     consecutive "edges", without zeros
        """
        if not self.estimates:
            raise ValueError("no draw was observed")
        pooled = joined(self.groups)
        left_out = [s.estimates() for s in leave_one_out(self.groups, pooled)]
        each = {
            name: {"value": value, "error": pooled_error([s[name] for s in left_out])}
            | over_draws([draw[name] for draw in self.estimates])
            for name, value in pooled.estimates().items()
        }
        count = len(self.estimates) * self.coordinates
        return {
            "draws": len(self.estimates),
            "coordinates": self.coordinates,
            "count": count,
            "zeros": count - int(pooled.magnitudes().sum()),
            **{name: each[name] for name in ("mean", "variance", "skewness", "excess_kurtosis")},
            "quantiles": [{"level": level} | each[f"quantile {level}"] for level in LEVELS],
            "quantile_relative_error": RELATIVE_ERROR,
            "ks_distance": each["ks distance"] | {"bound": pooled.ks_distance()[1]},
            "qq": pooled.qq(),
            "hill": [each[f"hill {share}"] | pooled.hill(share) for share in SHARES],
            "log_moment": {
                name: each[f"log-moment {name}"] for name in ("inverse_square", "alpha")
            },
            "histogram": pooled.histogram(),
        }


@dataclass(frozen=True)
class CoordinateStats:
    """What is kept of the coordinates of one draw or several."""

    counts: Tensor  # [2, BINS] int64: of positive and negative magnitudes
    moments: Tensor  # [5] float64, as of central_moments

    def estimates(self) -> dict[str, float | None]:
        """Every statistic that is one number, by name."""
        count, mean, *sums = self.moments.tolist()
        second, third, fourth = (s / count for s in sums)
        wide = self.deviation() is not None
        quantiles = self.quantiles(torch.tensor(LEVELS, dtype=torch.float64)).tolist()
        inverse_square = self.inverse_square()
        return {
            "mean": mean,
            "variance": second,
            "skewness": third / second**1.5 if wide else None,
            "excess_kurtosis": fourth / second**2 - 3 if wide else None,
            "ks distance": self.ks_distance()[0],
            **{f"quantile {level}": q for level, q in zip(LEVELS, quantiles, strict=True)},
            **{f"hill {share}": self.hill(share)["value"] for share in SHARES},
            "log-moment inverse_square": inverse_square,
            "log-moment alpha": inverse_square**-0.5
            if inverse_square and inverse_square > 0
            else None,
        }

    def deviation(self) -> float | None:
        """The standard deviation, where float32 holds it as a normal number and its fourth power
        does not underflow."""
        deviation = math.sqrt(self.moments[2] / self.moments[0])
        return deviation if deviation >= 2.0**-126 else None

    @cached_property
    def filled(self) -> slice:
        """The bins from that of the smallest magnitude to that of the largest, n of them."""
        bins = self.counts.sum(0).nonzero()
        return slice(int(bins[0]), int(bins[-1]) + 1)

    def edges(self) -> Tensor:
        """[n + 1] float64: the magnitudes at the edges of the filled bins."""
        return EDGES[self.filled.start : self.filled.stop + 1]

    def cumulated(self) -> tuple[Tensor, Tensor]:
        """[2 n + 2] float64 each: the edges with both signs, ascending, and how many coordinates
        lie below each."""
        positive, negative = self.counts[:, self.filled]
        # no coordinate lies below the first edge, and none between the innermost two
        none = torch.zeros(1, dtype=torch.int64)
        ordered = torch.cat([none, negative.flip(0), none, positive])
        return torch.cat([-self.edges().flip(0), self.edges()]), ordered.cumsum(0).double()

    def quantiles(self, levels: Tensor) -> Tensor:
        """The coordinates [k] at which their share reaches each of the levels [k], float64 both, in
        the unit of a coordinate: on a straight line through the bin in which it does."""
        edges, below = self.cumulated()
        wanted = levels * below[-1]
        right = torch.searchsorted(below, wanted)  # below[right - 1] < wanted <= below[right]
        left = right - 1
        part = (wanted - below[left]) / (below[right] - below[left])
        found = edges[left] + part * (edges[right] - edges[left])
        return torch.where(found.abs() <= ZERO, 0.0, found)

    def qq(self) -> dict[str, list[float]] | None:
        deviation = self.deviation()
        if deviation is None:
            return None
        return {
            "normal": QQ.tolist(),
            "observed": (self.quantiles(torch.special.ndtr(QQ)) / deviation).tolist(),
        }

    def ks_distance(self) -> tuple[float | None, float | None]:
        """The largest |F - Phi| at the edges of bins, and how much larger it can be inside them."""
        deviation = self.deviation()
        if deviation is None:
            return None, None
        edges, below = self.cumulated()
        found = below / below[-1]
        normal = torch.special.ndtr((edges - self.moments[1]) / deviation)
        at_edges = (found - normal).abs().max()
        between = torch.maximum(found[1:] - normal[:-1], normal[1:] - found[:-1]).max()
        return at_edges.item(), (between - at_edges).item()

    def magnitudes(self) -> Tensor:
        """[n] int64: counts of |omega|, zeros left out."""
        counts = self.counts[:, self.filled].sum(0)
        if self.filled.start == 0:
            counts[0] = 0
        return counts

    def hill(self, share: float) -> dict[str, Any]:
        """k / sum log(x / threshold) over the k magnitudes x above the threshold (Hill 1975), from
        the bins' mean logs."""
        counts, edges, logs = self.magnitudes(), self.edges(), LOGS[self.filled]
        above = counts.flip(0).cumsum(0).flip(0)  # [n]: at least the lower edge
        edge = int((above.double() > share * above[0].double()).sum())
        k = int(counts[edge:].sum())
        about = {"share": share, "k": k, "threshold": edges[edge].item()}
        if k == 0:
            return about | {"value": None, "error_if_independent": None}
        alpha = k / ((counts[edge:] * logs[edge:]).sum() - k * edges[edge].log()).item()
        return about | {"value": alpha, "error_if_independent": alpha / math.sqrt(k)}

    def inverse_square(self) -> float | None:
        """1 / alpha^2 = 6 Var(log |x|) / pi^2 - 1 / 2 (Ma and Nikias 1995).

        None where all coordinates count as zero. The width of the bins adds less than 1e-5.
        """
        counts = self.magnitudes().double()
        if not counts.any():
            return None
        shares, logs = counts / counts.sum(), LOGS[self.filled]
        mean = (shares * logs).sum()
        variance = (shares * (logs - mean).square()).sum().item()
        return 6 * variance / math.pi**2 - 0.5

    def histogram(self) -> dict[str, list]:
        """The wide bins from that of the smallest magnitude to that of the largest."""
        counts = self.counts.clone()
        counts[:, 0] = 0
        wide = counts.view(2, -1, WIDE).sum(2)
        filled = wide.sum(0).nonzero().flatten().tolist()
        if not filled:
            return {"edges": [], "positive": [], "negative": []}
        first, end = filled[0], filled[-1] + 1
        positive, negative = wide[:, first:end].tolist()
        return {
            "edges": EDGES[::WIDE][first : end + 1].tolist(),
            "positive": positive,
            "negative": negative,
        }


def codes(values: Tensor) -> Tensor:
    """The bin of each value: int32 [n] for floating `values` [n].

    0 to CODES - 1 for values with a plus sign, CODES more for those with a minus.
    """
    return (values.float().view(torch.int32) >> CUT) & (2 * CODES - 1)


def central_moments(values: Tensor) -> Tensor:
    """[5]: count, mean and the sums of the second to fourth powers of deviations from it.
    Overwrites `values`."""
    first = values[0].clone()  # taken off first, so that equal values deviate by exactly zero
    values -= first
    mean = values.mean()
    values -= mean
    squares = values.square()
    count = torch.full_like(mean, len(values))
    return torch.stack(
        [
            count,
            first + mean,
            squares.sum(),
            torch.dot(squares, values),
            torch.dot(squares, squares),
        ]
    )


def merged(moments: Tensor) -> Tensor:
    """The moments [5] of several sets together, from those of each, [sets, 5] (Chan et al. 1983;
    Pebay 2008)."""
    count, mean, second, third, fourth = moments.unbind(1)
    total = count.sum()
    overall = mean[0] + (count * (mean - mean[0])).sum() / total
    d = mean - overall
    return torch.stack(
        [
            total,
            overall,
            (second + count * d**2).sum(),
            (third + 3 * d * second + count * d**3).sum(),
            (fourth + 4 * d * third + 6 * d**2 * second + count * d**4).sum(),
        ]
    )


def joined(samples: list[CoordinateStats]) -> CoordinateStats:
    """The sample of all their coordinates."""
    counts = torch.stack([s.counts for s in samples]).sum(dim=0)
    return CoordinateStats(counts, merged(torch.stack([s.moments for s in samples])))


def leave_one_out(
    samples: list[CoordinateStats], all_joined: CoordinateStats
) -> Iterator[CoordinateStats]:
    """For each of two or more samples that of all others; for one nothing."""
    moments = torch.stack([s.moments for s in samples])
    for i, left in enumerate(samples):
        if len(samples) > 1:
            yield CoordinateStats(
                all_joined.counts - left.counts, merged(torch.cat([moments[:i], moments[i + 1 :]]))
            )


def pooled_error(values: list[float | None]) -> float | None:
    """An estimate's standard error from its values with one group of draws left out at a time."""
    known = [v for v in values if v is not None]
    return None if len(values) < 2 or len(known) < len(values) else jackknife_error(known)


def over_draws(values: list[float | None]) -> dict[str, float | int | None]:
    """Mean and standard error of the estimates of single draws, without those that are None."""
    found = [v for v in values if v is not None]
    if not found:
        return {"draws_mean": None, "draws_error": None, "draws": 0}
    mean = Estimate.mean(found)
    return {"draws_mean": mean.value, "draws_error": mean.error, "draws": mean.count}
