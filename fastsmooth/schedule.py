"""What lr, batch size and momentum are at every epoch, and how far the noise smooths the loss.

A method is a row of the table METHODS: how it changes the learning rate and the batch, and which of
the three is solved for. Loader, optimizer and log read the same Point. Formulas: degree of
smoothing delta, P1 (arXiv 2311.08745) and P2 (arXiv 2402.02325); schedules with round m = epoch + 1
of M = epochs, so that delta at epoch e is delta_0 ((M - e) / M)^power.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

from fastsmooth.forms import Bound, Form, noise_of
from fastsmooth.names import about_value

INV_SQRT2 = math.sqrt(0.5)  # the factor of delta at every step of lr, batch and hybrid
HYBRID_LR = math.sqrt(3) / 2  # with a batch 1.5 times as large this is the same factor of delta

MOST = 2**62  # a batch that no data set can fill
SLACK = 1e-13  # of a target delta, far above the rounding of delta and far below what matters
# Published growth of the batch by its size at the start: b (201/2)^(0.9 balance) is near 8192 for
# all.
BALANCE = {16: 1.503, 32: 1.335, 64: 1.169, 128: 1.0, 256: 0.835421888053467, 512: 2 / 3, 1024: 0.5}


@dataclass(frozen=True)
class Point:
    """What the optimizer and the loader use during one epoch: the learning rate, how many samples a
    batch has, the momentum beta, which is 0 for plain SGD, and the nu of qhm where that changes
    from one epoch to another; None: the optimizer's own."""

    lr: float
    batch_size: int
    momentum: float
    nu: float | None = None


# the share of a momentum buffer's content that is left where its history is said to begin
FORGOTTEN = 1e-3


def memory(momentum: float) -> int:
    """The updates after which a momentum buffer holds only FORGOTTEN of what was in it."""
    return math.ceil(math.log(FORGOTTEN) / math.log(momentum)) if momentum else 0


@dataclass(frozen=True)
class Smoothing:
    """The noise model behind delta = lr psi, with psi^2 the bound on E||m_t - grad f(x_t)||^2.

    Args: optimizer, a form (a row of fastsmooth.forms) or the name of a foreign optimizer, as
    --optimizer takes it, of whose noise nothing is known; c2 and k2, the papers'
    constants C^2 >= 0 (a bound on E||g_i - grad f||^2 of one sample i) and K^2 >= 0 (on ||g||^2 of
    a mini-batch), both in units of a squared gradient norm; nu, where the form has it; version, of
    the bound where a form has several (nshb: v3, the latest, or v1).

    Sources: arXiv 2311.08745 for sgd, arXiv 2402.02325 for shb and nshb; qhm is an interpolation of
    ours. For nesterov, and for foreign optimizers, none is published: what hangs on the bound is
    None then. Raises ValueError for a form or a version that is no row of fastsmooth.forms, with
    what may have been meant, and for constants out of range.
    """

    optimizer: str
    c2: float = 1.0
    k2: float = 1.0
    nu: float = 0.5
    version: str | None = None

    def __post_init__(self) -> None:
        if self.defined or self.version is not None:
            _ = self.bound
        for name, ok in (("c2", self.c2 >= 0), ("k2", self.k2 >= 0), ("nu", 0 <= self.weight <= 1)):
            if not ok:
                raise ValueError(f"{name} {getattr(self, name)} is out of range")

    @property
    def form(self) -> Form:
        return noise_of(self.optimizer)

    @property
    def defined(self) -> bool:
        """Whether there is a bound, and with it delta."""
        return bool(self.form.bounds)

    @property
    def bound(self) -> Bound:
        return self.form.bound(self.version)

    @property
    def weight(self) -> float:
        """nu, which is 1 where the form has none."""
        return self.nu if self.form.uses_nu else 1.0

    def degree(self, lr: float, batch_size: float, momentum: float) -> float | None:
        """delta, the degree of smoothing at this lr, batch size and beta: lr times psi, the bound
        on the distance of the search direction from the full gradient, in units of a parameter.
        None where no bound is known."""
        return self.bounded(lr, batch_size, momentum) if self.defined else None

    def bounded(self, lr: float, batch_size: float, momentum: float) -> float:
        """The same where there is a bound. Raises ValueError where there is none."""
        return lr * math.sqrt(self.noise(batch_size, momentum))

    def noise(self, batch_size: float, beta: float) -> float:
        """The bound psi^2 on E||m_t - grad f(x_t)||^2. Raises ValueError where there is none."""
        return self.bound.noise(self.c2 / batch_size, self.k2, beta, self.weight)

    def critical_factor(self, beta: float) -> float | None:
        """kappa in C^2 = b* eps^2 / (kappa lr), the estimate from the critical batch size b*; None
        where it is not known."""
        if self.form.kappa is None:
            return None
        return self.form.kappa(beta, self.weight) if beta > 0 else 1.0

    def solve_momentum(self, target: float, lr: float, batch_size: float, highest: float) -> float:
        """The beta in [0, highest] whose delta is `target`; the nearer end if there is none.

        delta grows with beta for every form, so bisection to the last bit of a double is safe. Only
        near the root is delta computed: elsewhere two points on either side of it, where delta is
        off by more than it can be rounded, tell.
        """
        degree = partial(self.bounded, lr, batch_size)  # of a beta
        if degree(0.0) >= target:
            return 0.0
        if degree(highest) <= target:
            return highest
        below = self.momentum_near(target * (1 - SLACK) / lr, batch_size)
        above = self.momentum_near(target * (1 + SLACK) / lr, batch_size)
        if not (0 < below < 1 and degree(below) < target * (1 - SLACK / 4)):
            below = 0.0
        if not (0 < above < 1 and degree(above) > target * (1 + SLACK / 4)):
            above = 1.0
        low, high = 0.0, highest
        while low < (middle := (low + high) / 2) < high:
            if middle <= below or (middle < above and degree(middle) < target):
                low = middle
            else:
                high = middle
        return low

    def momentum_near(self, psi: float, batch_size: float) -> float:
        """The beta at which the noise is psi^2, but for rounding; nan where the numbers are too
        large to tell."""
        variance = self.c2 / batch_size
        if not 0 < psi * psi - variance < math.inf:
            return math.nan
        return self.bound.momentum(psi * psi, variance, self.k2, self.weight)


@dataclass(frozen=True, init=False)
class Schedule:
    """A method with its numbers. Call it with an epoch, counted from 0, for the Point in force
    during that epoch.

    Args:
        method: a row of METHODS: constant, lr, batch, hybrid, poly, cosine, exp, step, beta,
            lr-beta, beta-batch or lr-batch.
        epochs, lr, batch_size, momentum: how long, and what the first epoch has.
        optimizer, nu, c2, k2, version: of the noise model behind delta (Smoothing). A method that
            solves for lr or momentum is solved by it; for the others it is what delta() uses. nu is
            a number, or a function that gives the nu of an epoch, which each Point has then.
        images: in the training set; no batch is larger. None: no end of them.
        decay_epoch: epochs between the steps of lr, batch and hybrid; None: a fifth of `epochs`.
        power: the exponent of poly and of the methods that are solved.
        gamma: the factor an epoch of exp.
        milestones, factor: the epochs of step, which increase, at each of which lr is multiplied by
            the factor: torch.optim.lr_scheduler.MultiStepLR.
        shifted: the indices of the published code, to compare with its curves.

    Methods and formulas: arXiv 2311.08745 (lr, batch, hybrid, poly, cosine, exp) and arXiv
    2402.02325 (what is solved). Raises ValueError for a method or an optimizer that is no row, with
    what may have been meant; for a number out of range; for a momentum that the optimizer has no
    use for, or that a method which lowers it has not got; for a method that is solved and an
    optimizer without a noise bound; and for a nu that changes where the optimizer has none.
    """

    method: str
    epochs: int
    start: Point
    smoothing: Smoothing
    images: int | None
    decay_epoch: int
    power: float
    gamma: float
    milestones: tuple[int, ...] | None
    factor: float
    shifted: bool
    nus: Callable[[int], float] | None  # where nu changes

    def __init__(
        self,
        method: str,
        *,
        epochs: int,
        lr: float,
        batch_size: int,
        optimizer: str = "sgd",
        momentum: float = 0.0,
        nu: float | Callable[[int], float] = 0.5,
        c2: float = 1.0,
        k2: float = 1.0,
        version: str | None = None,
        images: int | None = None,
        decay_epoch: int | None = None,
        power: float = 0.9,
        gamma: float = 0.9,
        milestones: Sequence[int] | None = None,
        factor: float = 0.1,
        shifted: bool = False,
    ):
        if decay_epoch is None:
            decay_epoch = max(1, epochs // 5)
        nus = nu if callable(nu) else None
        first = nu(0) if callable(nu) else nu
        vars(self).update(  # which a frozen class lets pass
            method=method,
            epochs=epochs,
            start=Point(lr, batch_size, momentum, first if nus else None),
            smoothing=Smoothing(optimizer, c2, k2, first, version),
            nus=nus,
            images=images,
            decay_epoch=decay_epoch,
            power=power,
            gamma=gamma,
            milestones=None if milestones is None else tuple(milestones),
            factor=factor,
            shifted=shifted,
        )
        self._check()

    def _check(self) -> None:
        """Raises ValueError for what no schedule can be made of."""
        if self.method not in METHODS:
            meant = about_value("--method", str(self.method), METHODS)
            raise ValueError(f"method {self.method!r}: {meant}")
        lr, batch_size, momentum = self.start.lr, self.start.batch_size, self.start.momentum
        numbers = {
            "epochs": (self.epochs, self.epochs >= 1, "1 or more"),
            "lr": (lr, 0 < lr < math.inf, "above 0"),
            "batch_size": (batch_size, batch_size >= 1, "1 or more"),
            "momentum": (momentum, 0 <= momentum < 1, "from 0 to below 1"),
            "images": (self.images, self.images is None or self.images >= 1, "1 or more"),
            "decay_epoch": (self.decay_epoch, self.decay_epoch >= 1, "1 or more"),
            "power": (self.power, 0 < self.power < math.inf, "above 0"),
            "gamma": (self.gamma, 0 < self.gamma <= 1, "above 0, at most 1"),
            "factor": (self.factor, 0 < self.factor <= 1, "above 0, at most 1"),
        }
        for name, (value, fits, range_) in numbers.items():
            if not fits:
                raise ValueError(f"{name} {value} is out of range: it is {range_}")
        if METHODS[self.method].uses == "milestones":
            self._check_milestones()
        form = self.smoothing.form
        if self.nus and not form.uses_nu:
            raise ValueError(f"optimizer {form.name} has no nu: leave it out, or take qhm")
        if METHODS[self.method].solves and not form.bounds:
            raise ValueError(
                f"method {self.method} is solved for delta, and no noise bound is published for "
                f"{form.name}: use another method, or another optimizer"
            )
        if momentum and not form.has_buffer:
            raise ValueError(
                f"optimizer {form.name} has no momentum: leave momentum {momentum} out, or take "
                "shb, which is PyTorch's SGD with momentum"
            )
        if METHODS[self.method].solves == "momentum" and not momentum:
            raise ValueError(
                f"method {self.method} lowers the momentum: give an optimizer that has one "
                "(shb, nshb or qhm) and a momentum above 0"
            )

    def _check_milestones(self) -> None:
        if self.milestones is None:
            raise ValueError(f"method {self.method} needs milestones: the epochs of its steps")
        out = next((m for m in self.milestones if not 1 <= m < self.epochs), None)
        if out is not None:
            raise ValueError(
                f"milestones: {out} is out of range: the epochs of the steps are 1 to "
                f"{self.epochs - 1}"
            )
        if any(after <= before for before, after in pairwise(self.milestones)):
            raise ValueError(f"milestones {self.milestones} do not increase")

    def __call__(self, epoch: int) -> Point:
        """The Point of an epoch, counted from 0. Raises ValueError for one that there is not."""
        if not 0 <= epoch < self.epochs:
            raise ValueError(f"epoch {epoch} is none of 0 to {self.epochs - 1}")
        method, batch = METHODS[self.method], self.batch_solved_for(epoch)
        lr, beta = method.lr(self, epoch), self.start.momentum
        nu = self.nus(epoch) if self.nus else None
        smoothing = self.smoothing_with(nu)
        if method.solves == "lr" and epoch > 0:
            lr = self.target(epoch) / smoothing.bounded(1.0, batch, beta)
        if method.solves == "momentum" and epoch > 0:
            beta = smoothing.solve_momentum(self.target(epoch), lr, batch, beta)
        return Point(lr, self.batch_size(epoch), beta, nu)

    def smoothing_with(self, nu: float | None) -> Smoothing:
        """The noise model at the nu of a Point."""
        return self.smoothing if nu is None else dataclasses.replace(self.smoothing, nu=nu)

    def batch_size(self, epoch: int) -> int:
        """What the loader serves; it never falls from one epoch to the next."""
        batch = int(METHODS[self.method].batch(self, epoch))
        return batch if self.images is None else min(batch, self.images)

    def batch_solved_for(self, epoch: int) -> float:
        """The batch of which lr or momentum are solved: the one that is served; the published code
        took the fraction."""
        return METHODS[self.method].batch(self, epoch) if self.shifted else self.batch_size(epoch)

    def delta(self, point: Point) -> float | None:
        """The degree of smoothing at a Point (Smoothing.degree); None where no bound is known."""
        return self.bounded(point) if self.smoothing.defined else None

    def bounded(self, point: Point) -> float:
        """The same where there is a bound. Raises ValueError where there is none."""
        smoothing = self.smoothing_with(point.nu)
        return smoothing.bounded(point.lr, point.batch_size, point.momentum)

    def target(self, epoch: int) -> float:
        """The delta that a solved method aims at (P1, optimal decay rate)."""
        return self.bounded(self.start) * self.remaining(epoch) ** self.power

    def remaining(self, epoch: int) -> float:
        """(M - e) / M, the product of the papers' decay factors; 1 at the first epoch."""
        # factors (M - m) / (M - m + 1) from m = 0: the epoch after round m has the product up to m
        if self.shifted:
            return (self.epochs - epoch + 1) / (self.epochs + 1)
        return (self.epochs - epoch) / self.epochs

    def largest_miss(self) -> tuple[int, float, float] | None:
        """(epoch, target delta, reached delta) where the method misses its target most, by over 2
        %; None if never, and where there is no delta."""
        if not self.smoothing.defined:
            return None
        if METHODS[self.method].solves == "momentum":
            goal_of, reached_of = self.target, self.floor
        elif METHODS[self.method].uses == "decay_epoch":
            goal_of, reached_of = self.stepped_target, lambda epoch: self.bounded(self(epoch))
        else:
            return None
        worst, ratio = None, 1.02
        for epoch in range(self.epochs):
            goal, reached = goal_of(epoch), reached_of(epoch)
            if reached > ratio * goal:
                worst, ratio = (epoch, goal, reached), reached / goal if goal else math.inf
        return worst

    def floor(self, epoch: int) -> float:
        """delta without momentum, below which a method that solves for the momentum cannot fall."""
        return self.smoothing.bounded(
            METHODS[self.method].lr(self, epoch), self.batch_solved_for(epoch), 0.0
        )

    def stepped_target(self, epoch: int) -> float:
        """delta of lr, batch and hybrid under plain SGD: 1/sqrt(2) at every step."""
        return self.bounded(self.start) * INV_SQRT2 ** self.steps_taken(epoch)

    def steps_taken(self, epoch: int) -> int:
        return epoch // self.decay_epoch

    def batch_steps_taken(self, epoch: int) -> int:
        """The same epochs as the learning rate; the published code was one epoch late."""
        return max(0, epoch - 1) // self.decay_epoch if self.shifted else self.steps_taken(epoch)

    @cached_property
    def published_batches(self) -> list[float]:
        """The batch of every epoch as the published code grows it: a fraction, epoch by epoch, of
        which int() is served."""
        batches = [float(self.start.batch_size)]
        exponent = self.power * balance(self.start.batch_size)
        for m in range(self.epochs - 1):
            factor = (self.epochs - (m - 1)) / (self.epochs - m)
            small = exponent * math.log(factor) < math.log(MOST / batches[-1])
            batches.append(batches[-1] * factor**exponent if small else float(MOST))
        return batches

    def points(self) -> Iterator[Point]:
        return map(self, range(self.epochs))

    def epoch_of(self, update: int, images: int, drop_last: bool = False) -> int:
        """The epoch of an update, both counted from 0, over `images` training images; the last one
        for what comes after."""
        done = first = 0
        for epochs, size in self.stages():
            in_each = updates_of(images, size, drop_last)
            if update < done + epochs * in_each:
                return first + (update - done) // in_each
            done, first = done + epochs * in_each, first + epochs
        return self.epochs - 1

    def stages(self) -> Iterator[tuple[int, int]]:
        """(how many epochs, batch size) of every stretch of epochs that have one batch size.
        Nothing is solved for it."""
        first = 0
        while first < self.epochs:
            size, last, step = self.batch_size(first), first, 1
            reached = False  # the end of the stretch: until then the steps double, then they halve
            while step:
                here = last + step < self.epochs and self.batch_size(last + step) == size
                reached = reached or not here
                last += step if here else 0
                step = step // 2 if reached else 2 * step
            yield last + 1 - first, size
            first = last + 1

    def updates(self, images: int, drop_last: bool = False) -> list[int]:
        """Parameter updates in each epoch over `images` training images."""
        found: list[int] = []
        for epochs, size in self.stages():
            found += [updates_of(images, size, drop_last)] * epochs
        return found


def updates_of(images: int, batch_size: int, drop_last: bool) -> int:
    """Parameter updates in one epoch."""
    return images // batch_size if drop_last else -(-images // batch_size)


# What a method does to the learning rate and to the batch


def same_lr(s: Schedule, epoch: int) -> float:
    return s.start.lr


def stepped_lr(s: Schedule, epoch: int, factor: float) -> float:
    return s.start.lr * factor ** s.steps_taken(epoch)


def poly(s: Schedule, epoch: int) -> float:
    return s.start.lr * (1 - epoch / s.epochs) ** s.power


def cosine(s: Schedule, epoch: int) -> float:
    return s.start.lr * (1 + math.cos(math.pi * epoch / s.epochs)) / 2


def exponential(s: Schedule, epoch: int) -> float:
    return s.start.lr * s.gamma**epoch


def multistep(s: Schedule, epoch: int) -> float:
    return s.start.lr * s.factor ** bisect_right(s.milestones or (), epoch)


def half_of_decay(s: Schedule, epoch: int) -> float:
    """The square root of the target's decay, so that the momentum takes up the other half."""
    return s.start.lr * s.remaining(epoch) ** (s.power / 2)


def same_batch(s: Schedule, epoch: int) -> float:
    return s.start.batch_size


def stepped_batch(s: Schedule, epoch: int, factor: float) -> float:
    """b factor^steps rounded down; the published code rounds down at every step."""
    steps = s.batch_steps_taken(epoch)
    return (
        grown_by_steps(s.start.batch_size, factor, steps)
        if s.shifted
        else grown(s.start.batch_size, factor, steps)
    )


def grown_batch(s: Schedule, epoch: int) -> float:
    """b (M / (M - e))^(power balance), whole; the fraction under the published indices."""
    if s.shifted:
        return s.published_batches[epoch]
    return grown(s.start.batch_size, s.remaining(epoch), -s.power * balance(s.start.batch_size))


def grown(batch_size: int, factor: float, power: float) -> int:
    """batch_size factor^power, rounded down, where that is no more than MOST."""
    if power * math.log(factor) > math.log(MOST / batch_size):
        return MOST
    return int(batch_size * factor**power)


def grown_by_steps(batch_size: int, factor: float, steps: int) -> int:
    """batch_size times factor, rounded down, `steps` times, where that is no more than MOST."""
    for _ in range(steps):
        larger = min(int(batch_size * factor), MOST)
        if larger == batch_size:
            break
        batch_size = larger
    return batch_size


def balance(batch_size: int) -> float:
    """How fast the batch grows: the published values, elsewhere the rule behind them (a last batch
    near 8192)."""
    rule = math.log(8192 / batch_size) / (0.9 * math.log(201 / 2))
    return BALANCE.get(batch_size, max(0.0, rule))


@dataclass(frozen=True)
class Method:
    """How lr and batch go with the epoch, and which of lr and momentum is solved to meet the target
    delta, if any."""

    lr: Callable[[Schedule, int], float] = same_lr
    batch: Callable[[Schedule, int], float] = same_batch
    solves: str = ""
    # the number that it takes beside the start: decay_epoch, power, gamma or milestones
    uses: str = ""


METHODS = {
    "constant": Method(),
    "lr": Method(lr=partial(stepped_lr, factor=INV_SQRT2), uses="decay_epoch"),
    "batch": Method(batch=partial(stepped_batch, factor=2), uses="decay_epoch"),
    "hybrid": Method(
        lr=partial(stepped_lr, factor=HYBRID_LR),
        batch=partial(stepped_batch, factor=1.5),
        uses="decay_epoch",
    ),
    "poly": Method(lr=poly, uses="power"),
    "cosine": Method(lr=cosine),
    "exp": Method(lr=exponential, uses="gamma"),
    "step": Method(lr=multistep, uses="milestones"),
    "beta": Method(solves="momentum", uses="power"),
    "lr-beta": Method(lr=half_of_decay, solves="momentum", uses="power"),
    "beta-batch": Method(batch=grown_batch, solves="momentum", uses="power"),
    "lr-batch": Method(batch=grown_batch, solves="lr", uses="power"),
}
SOLVED = {name for name, method in METHODS.items() if method.solves}
