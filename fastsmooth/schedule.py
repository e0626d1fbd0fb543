"""What lr, batch size and momentum are at every epoch, and how far the resulting noise smooths the loss.

A method is one function epoch -> Point in the table METHODS. Loader, optimizer and log read the same Point.
Formulas: degree of smoothing delta, P1 (arXiv 2311.08745) and P2 (arXiv 2402.02325);
schedules with round m = epoch + 1 of M = epochs, so that delta at epoch e is delta_0 ((M - e) / M)^power.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

INV_SQRT2 = math.sqrt(0.5)  # the factor of delta at every step of lr, batch and hybrid
HYBRID_LR = math.sqrt(3) / 2  # with a batch 1.5 times as large this is the same factor of delta

# Published growth of the batch by its size at the start: b (201/2)^(0.9 balance) is near 8192 for all.
MOST = 2**62  # a batch that no data set can fill
BALANCE = {16: 1.503, 32: 1.335, 64: 1.169, 128: 1.0, 256: 0.835421888053467, 512: 2 / 3, 1024: 0.5}


@dataclass(frozen=True)
class Point:
    """What the optimizer and the loader use during one epoch. `momentum` is beta, 0 for plain SGD."""

    lr: float
    batch_size: int
    momentum: float


@dataclass(frozen=True)
class Smoothing:
    """The noise model behind delta: the optimizer's form and the constants C^2 and K^2."""

    optimizer: str  # sgd, shb, nshb or qhm
    grad_variance: float = 1.0
    grad_norm_bound_sq: float = 1.0
    nu: float = 1.0
    nshb_form: str = "v3"

    def degree(self, lr: float, batch_size: int, momentum: float) -> float:
        """delta, the degree of smoothing: lr times the bound on E||search direction - full gradient||."""
        return lr * math.sqrt(self.noise(batch_size, momentum))

    def noise(self, batch_size: int, beta: float) -> float:
        """The bound psi^2 on E||m_t - grad f(x_t)||^2."""
        variance = self.grad_variance / batch_size
        if self.optimizer == "sgd":
            return variance
        if self.optimizer == "shb":
            growth = (beta / (1 - beta)) ** 2 + beta  # beta (beta^2 - beta + 1) / (1 - beta)^2
            return (1 + growth) * variance + growth * self.grad_norm_bound_sq
        if self.optimizer == "nshb" and self.nshb_form == "v1":
            return variance + 4 * beta**2 * (variance + self.grad_norm_bound_sq)
        nu = 1.0 if self.optimizer == "nshb" else self.nu  # qhm: an interpolation of ours, exact at nu = 0 and 1
        return (1 + nu * beta / (1 - beta)) * variance

    def critical_factor(self, beta: float) -> float:
        """kappa in C^2 = b* eps^2 / (kappa lr), the estimate from the critical batch size b*."""
        if self.optimizer == "sgd" or beta == 0:
            return 1.0
        if self.optimizer == "shb":
            return 1 / (1 - beta) ** 2 + 1 / beta
        nu = 1.0 if self.optimizer == "nshb" else self.nu
        return 1 + nu * beta / (1 - beta)

    def solve_momentum(self, target: float, lr: float, batch_size: int, highest: float) -> float:
        """The beta in [0, highest] whose delta is `target`; the nearer end where no such beta exists.

        delta grows with beta for every form, so bisection to the last bit of a double is safe.
        """
        if self.degree(lr, batch_size, 0.0) >= target:
            return 0.0
        if self.degree(lr, batch_size, highest) <= target:
            return highest
        low, high = 0.0, highest
        while low < (middle := (low + high) / 2) < high:
            if self.degree(lr, batch_size, middle) < target:
                low = middle
            else:
                high = middle
        return low


@dataclass(frozen=True)
class Schedule:
    """A method with its numbers. Call it with an epoch for the Point in force during that epoch."""

    method: str
    epochs: int
    start: Point
    smoothing: Smoothing
    decay_epoch: int = 40
    power: float = 0.9
    gamma: float = 0.9
    largest_batch: int | None = None  # images in the training set: no batch can hold more
    shifted: bool = False  # the published code's indices, to compare with its curves

    def __call__(self, epoch: int) -> Point:
        point = METHODS[self.method](self, epoch)
        if self.largest_batch is not None and point.batch_size > self.largest_batch:
            point = Point(point.lr, self.largest_batch, point.momentum)
        return point

    def delta(self, point: Point) -> float:
        return self.smoothing.degree(point.lr, point.batch_size, point.momentum)

    def target(self, epoch: int) -> float:
        """The delta that a solved method aims at (P1, optimal decay rate)."""
        return self.delta(self.start) * self.remaining(epoch) ** self.power

    def remaining(self, epoch: int) -> float:
        """(M - e) / M, which the product of the papers' decay factors comes to; 1 at the first epoch."""
        if self.shifted:  # factors (M - m) / (M - m + 1) from m = 0: the epoch after round m has the product up to m
            return (self.epochs - epoch + 1) / (self.epochs + 1)
        return (self.epochs - epoch) / self.epochs

    def largest_miss(self) -> tuple[int, float, float] | None:
        """(epoch, target delta, reached delta) where the method misses its target most, by over 2 %; None if never."""
        if self.method not in SOLVED and self.method not in STEPPED:
            return None
        worst, ratio = None, 1.02
        for epoch, point in enumerate(self.points()):
            goal = self.target(epoch) if self.method in SOLVED else self.stepped_target(epoch)
            reached = self.delta(point)
            if reached > ratio * goal:
                worst, ratio = (epoch, goal, reached), reached / goal if goal else math.inf
        return worst

    def stepped_target(self, epoch: int) -> float:
        """delta of lr, batch and hybrid under plain SGD: 1/sqrt(2) at every step."""
        return self.delta(self.start) * INV_SQRT2 ** self.steps_taken(epoch)

    def steps_taken(self, epoch: int) -> int:
        return epoch // self.decay_epoch

    def batch_steps_taken(self, epoch: int) -> int:
        """The same epochs as the learning rate; the published code was one epoch late."""
        return max(0, epoch - 1) // self.decay_epoch if self.shifted else self.steps_taken(epoch)

    def points(self) -> Iterator[Point]:
        return map(self, range(self.epochs))

    def epoch_of(self, update: int, images: int, drop_last: bool = False) -> int:
        """The epoch of an update, both counted from 0, over `images` training images; the last one for what comes after."""
        done = 0
        for epoch, count in enumerate(self.updates(images, drop_last)):
            done += count
            if update < done:
                return epoch
        return self.epochs - 1

    def updates(self, images: int, drop_last: bool = False) -> list[int]:
        """Parameter updates in each epoch over `images` training images."""
        return [images // p.batch_size if drop_last else -(-images // p.batch_size) for p in self.points()]


def constant(s: Schedule, epoch: int) -> Point:
    return s.start


def step_lr(s: Schedule, epoch: int) -> Point:
    return Point(s.start.lr * INV_SQRT2 ** s.steps_taken(epoch), s.start.batch_size, s.start.momentum)


def step_batch(s: Schedule, epoch: int) -> Point:
    return Point(s.start.lr, grown(s.start.batch_size, 2, s.batch_steps_taken(epoch)), s.start.momentum)


def hybrid(s: Schedule, epoch: int) -> Point:
    batch = grown(s.start.batch_size, 1.5, s.batch_steps_taken(epoch))
    return Point(s.start.lr * HYBRID_LR ** s.steps_taken(epoch), batch, s.start.momentum)


def grown(batch_size: int, factor: float, power: float) -> int:
    """batch_size factor^power, rounded down, where that is no more than MOST."""
    if power * math.log(factor) > math.log(MOST / batch_size):
        return MOST
    return int(batch_size * factor**power)


def poly(s: Schedule, epoch: int) -> Point:
    return Point(s.start.lr * (1 - epoch / s.epochs) ** s.power, s.start.batch_size, s.start.momentum)


def cosine(s: Schedule, epoch: int) -> Point:
    lr = s.start.lr * (1 + math.cos(math.pi * epoch / s.epochs)) / 2
    return Point(lr, s.start.batch_size, s.start.momentum)


def exponential(s: Schedule, epoch: int) -> Point:
    return Point(s.start.lr * s.gamma**epoch, s.start.batch_size, s.start.momentum)


def solved_momentum(s: Schedule, epoch: int, *, lr_decays: bool = False, batch_grows: bool = False) -> Point:
    """beta, lr-beta, beta-batch: beta takes up whatever part of the target delta lr and batch leave."""
    lr = s.start.lr * s.remaining(epoch) ** (s.power / 2) if lr_decays else s.start.lr
    batch = grown_batch(s, epoch) if batch_grows else s.start.batch_size
    if epoch == 0:
        return Point(lr, batch, s.start.momentum)
    return Point(lr, batch, s.smoothing.solve_momentum(s.target(epoch), lr, batch, s.start.momentum))


def lr_batch(s: Schedule, epoch: int) -> Point:
    batch = grown_batch(s, epoch)
    lr = s.target(epoch) / s.smoothing.degree(1.0, batch, s.start.momentum)
    return Point(s.start.lr if epoch == 0 else lr, batch, s.start.momentum)


def grown_batch(s: Schedule, epoch: int) -> int:
    """b (M / (M - e))^(power balance), as the whole number that the loader serves."""
    batch = grown(s.start.batch_size, s.remaining(epoch), -s.power * balance(s.start.batch_size))
    return batch if s.largest_batch is None else min(batch, s.largest_batch)


def balance(batch_size: int) -> float:
    """How fast the batch grows: the published values, elsewhere the rule behind them (a last batch near 8192)."""
    rule = math.log(8192 / batch_size) / (0.9 * math.log(201 / 2))
    return BALANCE.get(batch_size, max(0.0, rule))


METHODS: dict[str, Callable[[Schedule, int], Point]] = {
    "constant": constant,
    "lr": step_lr,
    "batch": step_batch,
    "hybrid": hybrid,
    "poly": poly,
    "cosine": cosine,
    "exp": exponential,
    "beta": solved_momentum,
    "lr-beta": partial(solved_momentum, lr_decays=True),
    "beta-batch": partial(solved_momentum, batch_grows=True),
    "lr-batch": lr_batch,
}
SOLVED = {"beta", "lr-beta", "beta-batch", "lr-batch"}
STEPPED = {"batch", "hybrid"}
