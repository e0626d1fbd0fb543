"""How much the loss rises when the weights move, on average (avg_l2, avg_linf) or at worst
(m_apgd_l2, m_apgd_linf).

After Andriushchenko et al. 2023 (arXiv 2302.07011).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from fastsmooth.kernels.backend import wide_dtype
from fastsmooth.noise.algorithms import ALGORITHMS, Setting
from fastsmooth.noise.estimators import Estimate
from fastsmooth.noise.gradients import undisturbed

MIX = 0.75  # of the new point in the next iterate; the rest is the iterate before the present one
MIN_IMPROVED = 0.75  # of the iterations since the last checkpoint, or the step is halved
# of a projection: 8 are enough where |w| spans three decades, 13 where it spans eight
NEWTON_STEPS = 16


class BatchLoss:
    """Loss and error of one batch at the weights w + d. The model's parameters are never written.

    d [P] is one vector over all trainable parameters, in their order.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, normalize_logits: bool):
        self.model, self.x, self.y, self.normalize_logits = model, x, y, normalize_logits
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = torch.cat([p.detach().flatten() for p in self.parameters.values()])

    def climb(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """(values(d), [2]; the gradient of the loss [P], in the dtype of d) at d [P]."""
        with torch.enable_grad():
            d = d.detach().requires_grad_()
            values = self._values(d)
            (gradient,) = torch.autograd.grad(values[0], d)
        return values.detach(), gradient

    @torch.no_grad()
    def values(self, d: Tensor) -> Tensor:
        """[2], wide: the mean cross-entropy in nats and the share of wrong samples, at d [P]."""
        return self._values(d)

    def _values(self, d: Tensor) -> Tensor:
        parts = (self.weights + d).split([p.numel() for p in self.parameters.values()])
        moved = {
            name: part.view(p.shape)
            for (name, p), part in zip(self.parameters.items(), parts, strict=True)
        }
        # wide, since sharpness is a small difference of losses
        logits = torch.func.functional_call(self.model, moved, (self.x,)).to(wide_dtype(d.device))
        if self.normalize_logits:
            logits = normalized(logits)
        wrong = (logits.argmax(dim=1) != self.y).to(logits.dtype).mean()
        return torch.stack([F.cross_entropy(logits, self.y), wrong])


def normalized(logits: Tensor) -> Tensor:
    """Each row [C] of logits [B, C] with mean 0 and length 1: their scale does not count."""
    logits = logits - logits.mean(dim=1, keepdim=True)
    return logits / logits.norm(dim=1, keepdim=True).clamp_min(1e-10)


class Box:
    """|d_i| <= rho s_i for every coordinate, with the scale s: |w| [P] if adaptive, else 1, 0-d.

    d and gradients are [P] in the dtype of the weights; rho is in the unit of s.
    """

    def __init__(self, scale: Tensor, rho: float):
        self.scale, self.rho = scale, rho

    def noise(self, like: Tensor, generator: Generator) -> Tensor:
        """Uniform in the box, [P] in the dtype of `like` [P]."""
        uniform = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        return self.rho * (2 * uniform - 1) * self.scale

    def step(self, d: Tensor, gradient: Tensor, size: Tensor) -> Tensor:
        """d + size sign(gradient) s, [P]: steepest ascent in the box's norm; size is 0-d."""
        return d + size * gradient.sign() * self.scale

    def project(self, d: Tensor) -> Tensor:
        """The point of the box nearest to d [P]: every coordinate clamped, [P]."""
        bound = self.rho * self.scale
        return d.clamp(-bound, bound)


class Ellipsoid:
    """||d / s||_2 <= rho, with the scale s of Box: a ball unless adaptive."""

    def __init__(self, scale: Tensor, rho: float):
        self.scale, self.rho = scale, rho
        squares = scale.to(wide_dtype(scale.device)).square()
        self.squares = squares.clamp_min(
            torch.finfo(squares.dtype).tiny
        )  # a weight of 0 does not move, and 0 / 0 is no 0

    def noise(self, like: Tensor, generator: Generator) -> Tensor:
        """Normal with standard deviation rho s in every coordinate, [P] in the dtype of `like` [P].

        ||d / s||_2 is then about rho sqrt(P): not in the ellipsoid.
        """
        normal = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        return self.rho * normal * self.scale

    def step(self, d: Tensor, gradient: Tensor, size: Tensor) -> Tensor:
        """d + size s gradient / ||gradient||_2, [P], of d [P] and gradient [P]; size is 0-d."""
        return d + size / (gradient.norm() + 1e-12) * gradient * self.scale

    def project(self, d: Tensor) -> Tensor:
        """The nearest point to d [P]: d s^2 / (s^2 + t) for the t >= 0 at which it is on the
        surface. [P] in the dtype of d.

        1 / ||d s / (s^2 + t)|| is concave in t, so that Newton's method ends there from any t
        below. The originals bisect until the length is within 1e-5 of rho, 5 % of the published
        rho.
        """
        moved = d.to(self.squares.dtype) * self.scale
        # there the length is rho or more
        t = (moved.norm() / self.rho - self.squares.max()).clamp_min(0)
        for _ in range(NEWTON_STEPS):
            r = moved / (self.squares + t)
            length = r.norm()
            slope = (r.square() / (self.squares + t)).sum()
            rise = (length / self.rho - 1) * length.square() / slope
            t = t + torch.where(slope > 0, rise, 0).clamp_min(0)
        length = (moved / (self.squares + t)).norm()
        # what rounding left outside the surface is brought onto it
        return (d * (self.squares / (self.squares + t)) * (self.rho / length).clamp_max(1)).to(
            d.dtype
        )


Region = Box | Ellipsoid
REGIONS: dict[str, type[Region]] = {"l2": Ellipsoid, "linf": Box}  # by their norm


# From the values [2] of one batch at no perturbation those at k perturbations, [k, 2], whose mean
# counts.
Search = Callable[[BatchLoss, Region, Setting, Generator, Tensor], Tensor]


def average(
    f: BatchLoss, region: Region, setting: Setting, generator: Generator, clean: Tensor
) -> Tensor:
    """The values at random perturbations, one an iteration: [n_iters, 2], of which the mean counts.

    `clean` [2], the values at no perturbation, is not used. Average-case sharpness of
    Andriushchenko et al. 2023 (arXiv 2302.07011).
    """
    return torch.stack(
        [f.values(region.noise(f.weights, generator)) for _ in range(setting.n_iters)]
    )


def worst(
    f: BatchLoss, region: Region, setting: Setting, generator: Generator, clean: Tensor
) -> Tensor:
    """The largest loss that any restart finds, [1, 2]."""
    ends = torch.stack(
        [ascend(f, region, setting, generator, clean) for _ in range(setting.restarts)]
    )
    return ends.index_select(0, ends[:, :1].argmax(dim=0))


def ascend(
    f: BatchLoss, region: Region, setting: Setting, generator: Generator, clean: Tensor
) -> Tensor:
    """The values [2] at the largest loss that APGD meets (Croce and Hein 2020, as coded by
    Andriushchenko et al. 2023).

    d_{k+1} = 0.75 P(d_k + step) + 0.25 d_{k-1}. Two things differ from that code. Where the step is
    halved, d goes back to the best one so far with the weights, which the code resets alone. Random
    starts, which lie outside an ellipsoid and whose quarter would stay in the first iterate, are
    projected. Nothing waits for the device.
    """
    start = (
        region.noise(f.weights, generator) if setting.random_start else torch.zeros_like(f.weights)
    )
    d = before = best_d = region.project(start)
    values, gradient = f.climb(d)
    best, best_gradient = clean, gradient
    size = 2 * region.rho * setting.step_size_mult * torch.ones_like(clean[0])
    improved, last = torch.zeros_like(size), 0
    turns = checkpoints(setting.n_iters)
    for i in range(setting.n_iters):
        d, before = MIX * region.project(region.step(d, gradient, size)) + (1 - MIX) * before, d
        # the gradient serves the next iteration; the last has none
        values, gradient = f.climb(d) if i + 1 < setting.n_iters else (f.values(d), gradient)
        better = values[0] > best[0]
        best = torch.where(better, values, best)
        best_d, best_gradient = (
            torch.where(better, d, best_d),
            torch.where(better, gradient, best_gradient),
        )
        improved = improved + better
        if i in turns:
            # that code also halves where the best loss stands still, but then no step improved it,
            # and this condition holds too
            stalled = improved < MIN_IMPROVED * (i - last)
            size = torch.where(stalled, size / 2, size)
            d, gradient = (
                torch.where(stalled, best_d, d),
                torch.where(stalled, best_gradient, gradient),
            )
            improved, last = torch.zeros_like(size), i
    return best


def checkpoints(n_iters: int) -> list[int]:
    """The iterations, counted from 0, after which the step may be halved; 20: 5, 9, 12, 15, 16, 18,
    19 and one never reached."""
    shares, iterations = [0.0, 0.22], [0, math.ceil(n_iters * 0.22)]
    while iterations[-1] < n_iters and iterations[-1] != iterations[-2]:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
        iterations.append(math.ceil(shares[-1] * n_iters))
    return iterations[1:]


@dataclass(frozen=True)
class Sharpness:
    """The mean rise of the loss over batches, in nats, at one rho."""

    rho: float
    value: float
    error: float | None  # the standard error over batches; None for one batch
    draw_error: float | None  # of the averages: the part of it that more draws would lower
    error_increase: float  # of the share of wrong samples, at the same perturbations
    clean_loss: float
    per_batch: list[float]


def loss_sharpness(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    rhos: Iterable[float],
    *,
    algorithm: str = "m_apgd_linf",
    adaptive: bool = True,
    normalize_logits: bool = False,
    n_iters: int = 20,
    restarts: int = 1,
    step_size_mult: float = 1.0,
    random_start: bool = False,
    seed: int = 0,
) -> list[Sharpness]:
    """How much the mean cross-entropy of a batch rises when the weights move by rho, on average
    over perturbations or at worst, one Sharpness a rho (arXiv 2302.07011).

    Args:
        model: it is measured in eval mode, and left as it was.
        batches: (x [m, ...], y int64 [m]), each measured by itself.
        rhos: how far the weights move, in units of |w| where `adaptive`, else of a weight.
        algorithm: avg_l2, avg_linf (on average), m_apgd_l2 or m_apgd_linf (at worst, by APGD).
        normalize_logits: first bring each row of logits to mean 0 and length 1.
        n_iters: draws of an average, iterations of APGD; restarts, step_size_mult and random_start
            are APGD's.
        seed: of the perturbations.

    The rise is in nats. Raises ValueError for an algorithm that there is not.
    """
    setting = Setting(
        algorithm, adaptive, normalize_logits, n_iters, restarts, step_size_mult, random_start, seed
    )
    return sharpness(model, batches, setting, rhos)


def sharpness(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    setting: Setting,
    rhos: Iterable[float],
) -> list[Sharpness]:
    """The sharpness of `model` in eval mode on batches (x [m, C, H, W], y [m]), one for each rho,
    each as if it were alone.

    Random numbers come from the setting's seed alone (on a GPU they are others than on a CPU).
    Parameters, buffers, gradients, modes and random state are bit for bit what they were.
    """
    algorithm = ALGORITHMS[setting.algorithm]
    search: Search = worst if algorithm.at_worst else average
    rhos = list(rhos)
    regions: list[Region] = []
    clean, moved = [], []
    with undisturbed(model, "eval"):
        for x, y in batches:
            f = BatchLoss(model, x, y, setting.normalize_logits)
            if not regions:
                scale = f.weights.abs() if setting.adaptive else torch.ones_like(f.weights[0])
                regions = [REGIONS[algorithm.norm](scale, rho) for rho in rhos]
                generators = [Generator(x.device).manual_seed(setting.seed) for _ in rhos]
            clean.append(f.values(torch.zeros_like(f.weights)))
            searched = [
                search(f, r, setting, g, clean[-1])
                for r, g in zip(regions, generators, strict=True)
            ]
            moved.append(torch.stack(searched))
    unmoved = torch.stack(clean)  # [batches, 2]
    rises = torch.stack(moved, dim=1) - unmoved[:, None]  # [rhos, batches, draws, 2]
    return [summary(rho, rise, unmoved) for rho, rise in zip(rhos, rises.cpu(), strict=True)]


def summary(rho: float, rises: Tensor, clean: Tensor) -> Sharpness:
    """From the rises of loss and error [batches, draws, 2] and what they rise from [batches, 2]."""
    count, draws, _ = rises.shape
    per_batch = rises[..., 0].mean(dim=1)
    mean = Estimate.mean(per_batch.tolist())
    draw_error = None
    if draws > 1:
        draw_error = (rises[..., 0].var(dim=1).sum() / draws).sqrt().item() / count
    return Sharpness(
        rho,
        mean.value,
        mean.error,
        draw_error,
        rises[..., 1].mean().item(),
        clean[:, 0].mean().item(),
        per_batch.tolist(),
    )
