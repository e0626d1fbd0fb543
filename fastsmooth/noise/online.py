"""The gradient variance and what follows from it, measured every so often while a run trains,
without changing it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsmooth.noise import estimators, gradients
from fastsmooth.noise.estimators import Estimate
from fastsmooth.noise.persample import BN, NotCovered, SampleNorms, sample_norms
from fastsmooth.ranks import Ranks
from fastsmooth.schedule import Point, Smoothing

GROUPS = 4  # parts of a batch for the micro-batch estimator
DECAY = 0.9  # a measurement: of the averages behind the noise scale


@dataclass(frozen=True)
class Every:
    """When to measure: before updates 0, count, 2 count, ...; or before the first of every
    `count`-th epoch."""

    count: int
    epochs: bool = False

    @classmethod
    def parse(cls, text: str) -> Every:
        """Of "every=50" or "every=2ep", as the configuration has it."""
        number = text.removeprefix("every=")
        return cls(int(number.removesuffix("ep")), number.endswith("ep"))

    def period(self, update: int, epoch: int) -> int:
        """Grows by one whenever a measurement falls due."""
        return (epoch if self.epochs else update) // self.count


class NoiseTracker:
    """Measures batches of training at the present parameters, and keeps what runs over the
    measurements.

    `estimator` is per-sample (of the batch as one, BatchNorm as `bn` says: batch, frozen or eval)
    or micro-batch (GROUPS parts, each a forward pass of its own, BatchNorm in train or eval mode).
    n is the number of training images.
    """

    def __init__(
        self,
        model: nn.Module,
        every: Every,
        estimator: str,
        why: str,
        bn: str,
        smoothing: Smoothing,
        n: int,
        ranks: Ranks | None = None,
    ):
        self.model, self.every, self.estimator, self.why, self.bn = model, every, estimator, why, bn
        self.smoothing, self.n, self.ranks = smoothing, n, ranks or Ranks()
        self.last_period = -1
        self.count, self.largest = 0, 0.0  # measurements; the largest ||g||
        # sums over measurements of ||g||^2 and of estimates of ||grad f||^2
        self.norm_squares = self.full_squares = 0.0
        self.recent_c2 = self.recent_full = 0.0  # decaying averages
        self.epoch_c2: list[float] = []

    def described(self) -> str:
        """How, in words."""
        when = f"every {self.every.count} {'epochs' if self.every.epochs else 'updates'}"
        how = f"{self.estimator} estimator" + (
            f" of {GROUPS} parts" if self.estimator == "micro-batch" else ""
        )
        return f"{when}: {how}, --bn {self.bn}" + (f" ({self.why})" if self.why else "")

    def due(self, update: int, epoch: int, batch_size: int) -> bool:
        """A batch too small to measure (the last of an epoch) leaves it to the next."""
        smallest = smallest_batch(self.estimator) * self.ranks.world
        return self.every.period(update, epoch) > self.last_period and batch_size >= smallest

    def measure(
        self, x: Tensor, y: Tensor, point: Point, update: int, epoch: int, size: int | None = None
    ) -> dict[str, Any]:
        """The values of a row for metrics.jsonl from the batch x [B, 3, H, W], y [B], before update
        number `update`.

        With several processes x and y are this one's share of a batch of `size` samples. Leaves no
        trace in the model. Raises FloatingPointError for a gradient that is not finite.
        """
        size = size or len(y)
        with gradients.undisturbed(self.model, self.bn):
            c2, grad_square = self.estimate(x, y, size)
        if not (math.isfinite(c2.value) and math.isfinite(grad_square)):
            raise FloatingPointError("the gradient is not finite")
        self.last_period = self.every.period(update, epoch)
        return self.take_in(c2, grad_square, size, point)

    def estimate(self, x: Tensor, y: Tensor, size: int) -> tuple[Estimate, float]:
        """(C2, ||g||^2) of a batch; call it inside measure.undisturbed."""
        if self.estimator == "per-sample":
            found = norms(self.model, x, y, self.bn)
            c2 = estimators.per_sample(self.ranks.gather(found.noise.tolist()), self.n)
            if self.ranks.world == 1:
                return c2, found.grad_square.item()
            return c2, gradients.norm(self.over_all(found.grads, len(y) / size)).item() ** 2
        sizes = [len(part) for part in y.tensor_split(GROUPS)]
        parts = zip(x.split(sizes), y.split(sizes), strict=True)
        grads = [gradients.batch_gradient(self.model, *part) for part in parts]
        mean = self.over_all(estimators.weighted_mean(grads, sizes), len(y) / size)
        c2 = estimators.micro_batch(grads, mean, sizes, self.n, self.ranks.gather)
        return c2, gradients.norm(mean).item() ** 2

    def over_all(self, grads: list[Tensor], share: float) -> list[Tensor]:
        """The mean gradient of the whole batch from that of this process's share of it."""
        if self.ranks.world > 1:
            grads = torch._foreach_mul(grads, share)
            self.ranks.sum_(grads)
        return grads

    def take_in(
        self, c2: Estimate, grad_square: float, batch_size: int, point: Point
    ) -> dict[str, Any]:
        """Update what runs over the measurements.

        E ||g||^2 = ||grad f||^2 + Var(g), and Var(g) = C2 / b (n - b) / (n - 1): the difference
        estimates ||grad f||^2 without bias, and may be negative. k2, the papers' K^2, is the square
        of the largest ||g|| so far, and delta_measured their bound with it and with the C2 of this
        batch.
        """
        full_square = grad_square - c2.value / batch_size * (self.n - batch_size) / max(
            self.n - 1, 1
        )
        self.count += 1
        self.epoch_c2.append(c2.value)
        self.largest = max(self.largest, math.sqrt(grad_square))
        self.norm_squares += grad_square
        self.full_squares += full_square
        self.recent_c2 = DECAY * self.recent_c2 + (1 - DECAY) * c2.value
        self.recent_full = DECAY * self.recent_full + (1 - DECAY) * full_square
        k2 = self.largest**2
        smoothing = dataclasses.replace(
            self.smoothing, grad_variance=max(c2.value, 0.0), grad_norm_bound_sq=k2
        )
        return {
            "c2_sampled": c2.value,
            "c2_sampled_se": c2.error,
            "se_over": c2.over,
            "estimator": self.estimator,
            "bn": self.bn,
            "grad_norm": math.sqrt(grad_square),
            "grad_norm_max": self.largest,
            "grad_norm_rms": math.sqrt(self.norm_squares / self.count),
            "k2": k2,
            "full_grad_square": self.full_squares / self.count,
            "noise_scale": self.recent_c2 / self.recent_full if self.recent_full > 0 else None,
            "delta_measured": smoothing.degree(point.lr, point.batch_size, point.momentum),
        }

    def end_epoch(self) -> float | None:
        """The mean C2 of the epoch's measurements, None where there were none; the next epoch
        begins."""
        mean = math.fsum(self.epoch_c2) / len(self.epoch_c2) if self.epoch_c2 else None
        self.epoch_c2 = []
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state[name])


STATE = (
    "last_period",
    "count",
    "largest",
    "norm_squares",
    "full_squares",
    "recent_c2",
    "recent_full",
    "epoch_c2",
)


def norms(model: nn.Module, x: Tensor, y: Tensor, bn: str) -> SampleNorms:
    """sample_norms for a value of --bn, whose train and eval say nothing about per-sample
    gradients."""
    return sample_norms(model, x, y, bn=bn if bn in BN else None)


def smallest_batch(estimator: str) -> int:
    return 2 if estimator == "per-sample" else 2 * GROUPS


def choose_estimator(model: nn.Module, x: Tensor, wanted: str, bn: str) -> tuple[str, str]:
    """(per-sample or micro-batch, why) for `wanted`, which may be "auto": per-sample wherever it
    has a clear meaning.

    x [B, ...] are a few images of the kind that will come. Raises NotCovered where per-sample is
    wanted and cannot be.
    """
    if wanted == "micro-batch":
        return wanted, ""
    try:
        with gradients.undisturbed(model, bn):
            norms(model, x, torch.zeros(len(x), dtype=torch.int64, device=x.device), bn)
    except NotCovered as error:
        if wanted == "per-sample" or bn in BN:
            raise
        return "micro-batch", str(error)
    return "per-sample", ""
