"""What lr, batch size and momentum are at every update, and how far the noise smooths the loss.

A method is a row of the table METHODS: how it changes the learning rate and the batch, and which of
the three is solved for. In the place of a method a schedule may be written (fastsmooth.course), or
be any function of the epoch. Loader, optimizer and log read the same Point, which most schedules
have one of for an epoch, and some for every update. Formulas: degree of
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
from itertools import groupby, pairwise
from typing import Any

from fastsmooth import course
from fastsmooth.course import Track, Written
from fastsmooth.forms import Bound, Form, noise_of
from fastsmooth.names import about_value
from fastsmooth.places import Layout, Place, Span, equal, lay_out

INV_SQRT2 = math.sqrt(0.5)  # the factor of delta at every step of lr, batch and hybrid

MOST = 2**62  # a batch that no data set can fill
SLACK = 1e-13  # of a target delta, far above the rounding of delta and far below what matters
# Published growth of the batch by its size at the start: b (201/2)^(0.9 balance) is near 8192 for
# all.
BALANCE = {16: 1.503, 32: 1.335, 64: 1.169, 128: 1.0, 256: 0.835421888053467, 512: 2 / 3, 1024: 0.5}


@dataclass(frozen=True)
class Point:
    """What the optimizer and the loader use for an update: the learning rate, how many samples a
    batch has, the momentum beta, which is 0 for plain SGD, and the nu of qhm where that changes
    over a run; None: the optimizer's own."""

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
    """A method with its numbers. Call it with an epoch, counted from 0, for the Point in force at
    its beginning, which for most is that of the whole epoch.

    Args:
        method: a row of METHODS: constant, lr, batch, hybrid, poly, cosine, exp, step, beta,
            lr-beta, beta-batch, lr-batch, beta-step, batch-poly, exp-batch, seesaw or growth. Or a
            function that gives the Point of an epoch: then lr, batch_size, momentum and nu are its
            own, and no other number has a meaning.
        epochs, lr, batch_size, momentum: how long, and what the first epoch has.
        optimizer, nu, c2, k2, version: of the noise model behind delta (Smoothing). A method that
            solves for lr or momentum is solved by it; for the others it is what delta() uses. nu is
            a number, or a function that gives the nu of an epoch, which each Point has then.
        images: in the training set; no batch is larger. None: no end of them.
        decay_epoch: epochs between the steps of lr, batch, hybrid, beta-step, seesaw and growth;
            None: a fifth of `epochs`.
        milestones: in the place of decay_epoch the epochs of the steps, which increase; step needs
            them.
        factor: of lr, batch, momentum ... at every step, as the row of METHODS says; None: its own.
        lr_factor: of lr at every step of growth.
        power: the exponent of poly, batch-poly and of the methods that are solved.
        gamma: the factor an epoch of exp, and of delta under exp-batch.
        lr_min: where cosine and poly end.
        per: epoch or update: how often a method that changes smoothly is asked for its Point. At an
            update it counts the share of the epoch's samples that are done as part of an epoch.
        shifted: the indices of the published code, to compare with its curves.

    `Schedule.written` makes one of a text. Methods and formulas: arXiv 2311.08745 (lr, batch,
    hybrid, poly, cosine, exp) and arXiv 2402.02325 (what is solved). Raises ValueError for a method
    or an optimizer that is no row, with what may have been meant; for a number out of range; for a
    momentum that the optimizer has no use for, or that a method which lowers it has not got; for a
    method that is solved and an optimizer without a noise bound; and for a nu that changes where
    the optimizer has none.
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
    lr_factor: float
    lr_min: float
    per: str
    shifted: bool
    nus: Callable[[int], float] | None  # where nu changes
    function: Callable[[int], Point] | None  # in the place of a method
    text: Written | None  # likewise

    def __init__(
        self,
        method: str | Callable[[int], Point],
        *,
        epochs: int,
        lr: float | None = None,
        batch_size: int | None = None,
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
        factor: float | None = None,
        lr_factor: float = 1.4,
        lr_min: float = 0.0,
        per: str = "epoch",
        shifted: bool = False,
        text: Written | None = None,
    ):
        if decay_epoch is None:
            decay_epoch = max(1, epochs // 5)
        nus = nu if callable(nu) else None
        first = nu(0) if callable(nu) else nu
        function = method if callable(method) else None
        if function is not None:
            if lr is not None or batch_size is not None or momentum or nus:
                raise ValueError("a function gives lr, batch_size, momentum and nu by itself")
            start = checked(function(0), 0)
            first = first if start.nu is None else start.nu
            method = "constant"
        elif lr is None or batch_size is None:
            raise ValueError(f"{'lr' if lr is None else 'batch_size'} is missing")
        else:
            start = Point(lr, batch_size, momentum, first if nus else None)
        vars(self).update(  # which a frozen class lets pass
            method=method,
            epochs=epochs,
            start=start,
            smoothing=Smoothing(optimizer, c2, k2, first, version),
            nus=nus,
            images=images,
            decay_epoch=decay_epoch,
            power=power,
            gamma=gamma,
            milestones=None if milestones is None else tuple(milestones),
            factor=METHODS.get(str(method), Method()).factor if factor is None else factor,
            lr_factor=lr_factor,
            lr_min=lr_min,
            per=per,
            shifted=shifted,
            function=function,
            text=text,
        )
        self._check()

    @classmethod
    def written(
        cls,
        text: str | Written,
        *,
        epochs: int,
        lr: float | None = None,
        batch_size: int | None = None,
        momentum: float | None = None,
        nu: float | None = None,
        **numbers: Any,
    ) -> Schedule:
        """The schedule in a text such as "lr: 0.1 @0 ->cos 0 @100%; batch: 32 @0, 64 @40ep", which
        fastsmooth.course describes; of what it does not name, the values are given. `numbers` are
        optimizer, c2, k2, version and images, as of any schedule.

        Raises ValueError for a text that says nothing, or what a run of so many epochs does not
        have, and for a value that is given twice or not at all.
        """
        words = course.read(text) if isinstance(text, str) else text
        given = {"lr": lr, "batch": batch_size, "momentum": momentum, "nu": nu}
        usual = {"momentum": 0.0, "nu": 0.5}
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name in words.by_name:
                if value is not None:
                    raise ValueError(f"{name} is written and given: leave one of them out")
                value = words.first(name)
            values[name] = usual.get(name) if value is None else value
        found = cls(
            "constant",
            epochs=epochs,
            lr=values["lr"],
            batch_size=values["batch"],
            momentum=values["momentum"],
            nu=values["nu"],
            text=words,
            **numbers,
        )
        if found.images is not None:
            found.check_written(found.images)
        return found

    def check_written(self, images: int, drop_last: bool = False) -> None:
        """Raises ValueError for what is written and no run over so many images comes to."""
        if self.text is None:
            return
        most = max(self.text.by_name["batch"].values) if "batch" in self.text.by_name else 0
        if most > images:
            raise ValueError(
                f"a batch of {most:,} exceeds the {images:,} training images: lower it"
            )
        self.text.check(self.layout(images, drop_last))

    def _check(self) -> None:
        """Raises ValueError for what no schedule can be made of."""
        if self.method not in METHODS:
            meant = about_value("--method", str(self.method), METHODS)
            raise ValueError(f"method {self.method!r}: {meant}")
        row = METHODS[self.method]
        lr, batch_size, momentum = self.start.lr, self.start.batch_size, self.start.momentum
        numbers = {
            "epochs": (self.epochs, self.epochs >= 1, "1 or more"),
            "lr": (lr, 0 < lr < math.inf or (lr == 0 and not self.by_method), "above 0"),
            "batch_size": (batch_size, batch_size >= 1, "1 or more"),
            "momentum": (momentum, 0 <= momentum < 1, "from 0 to below 1"),
            "images": (self.images, self.images is None or self.images >= 1, "1 or more"),
            "decay_epoch": (self.decay_epoch, self.decay_epoch >= 1, "1 or more"),
            "power": (self.power, 0 < self.power < math.inf, "above 0"),
            "gamma": (self.gamma, 0 < self.gamma <= 1, "above 0, at most 1"),
            "factor": (self.factor, row.takes_factor(self.factor), row.factors),
            "lr_factor": (self.lr_factor, 0 < self.lr_factor < math.inf, "above 0"),
            "lr_min": (self.lr_min, 0 <= self.lr_min <= lr, f"from 0 to lr ({lr})"),
            "per": (self.per, self.per in ("epoch", "update"), "epoch or update"),
        }
        for name, (value, fits, range_) in numbers.items():
            if not fits:
                raise ValueError(f"{name} {value} is out of range: it is {range_}")
        if row.uses == "milestones" or (self.milestones is not None and "milestones" in row.also):
            self._check_milestones()
        form = self.smoothing.form
        if self.changes_nu and not form.uses_nu:
            raise ValueError(f"optimizer {form.name} has no nu: leave it out, or take qhm")
        if row.solves and not form.bounds:
            raise ValueError(
                f"method {self.method} is solved for delta, and no noise bound is published for "
                f"{form.name}: use another method, or another optimizer"
            )
        if (momentum or "momentum" in self.names) and not form.has_buffer:
            raise ValueError(
                f"optimizer {form.name} has no momentum: leave momentum {momentum} out, or take "
                "shb, which is PyTorch's SGD with momentum"
            )
        if row.changes_momentum and not momentum:
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

    @property
    def by_method(self) -> bool:
        """Whether it is neither written nor a function."""
        return self.text is None and self.function is None

    @property
    def names(self) -> tuple[str, ...]:
        """What is written of it: lr, batch, momentum, nu."""
        return tuple(self.text.by_name) if self.text else ()

    @property
    def changes_nu(self) -> bool:
        """Whether each Point has a nu of its own."""
        return self.nus is not None or "nu" in self.names or self.start.nu is not None

    @property
    def most_momentum(self) -> float:
        """The largest momentum of any update, as far as it is known before the run."""
        written = self.text.by_name.get("momentum") if self.text else None
        if self.function is not None:
            return max(self(epoch).momentum for epoch in range(self.epochs))
        return max(written.values) if written else self.start.momentum  # no method raises it

    @cached_property
    def moves(self) -> bool:
        """Whether the Point may change from one update of an epoch to the next."""
        if self.text is not None:
            return self.text.within_epochs(self.epochs)
        return self.by_method and self.per == "update" and METHODS[self.method].smooth

    @cached_property
    def batch_moves(self) -> bool:
        """Whether the batch size may."""
        if self.text is not None:
            batch = self.text.by_name.get("batch")
            return batch is not None and batch.within_epochs(self.epochs)
        return self.moves and METHODS[self.method].batch is not same_batch

    def __call__(self, epoch: int) -> Point:
        """The Point of an epoch, counted from 0, at its first update. Raises ValueError for one
        that there is not, and where that hangs on how many images there are and they are not given.
        """
        if not 0 <= epoch < self.epochs:
            raise ValueError(f"epoch {epoch} is none of 0 to {self.epochs - 1}")
        if self.images is not None and self.counted:
            return self.at(self.layout(self.images).start(epoch))
        if self.counted:
            raise ValueError(
                "when an update comes, or a sample, only the images tell: give images=N, how many "
                "there are"
            )
        return self.at(Place(epoch))

    @cached_property
    def counted(self) -> bool:
        """Whether it counts updates or samples, which lie in the epochs as the batches have it."""
        knots = [knot for each in (self.text.courses if self.text else ()) for knot in each.knots]
        return any(knot.begins.measure in ("updates", "samples") for knot in knots)

    def at(self, place: Place) -> Point:
        """The Point in force at the update that comes at a place."""
        if self.function is not None:
            point = checked(self.function(place.epoch), place.epoch)
            return dataclasses.replace(point, batch_size=self._at_most(point.batch_size))
        if self.text is not None:
            return self._written_at(place)
        return self._by_method(self._time(place))

    def _time(self, place: Place) -> float:
        """The epochs that are done, as far as the method counts them."""
        return place.epochs if self.per == "update" else place.epoch

    def _written_at(self, place: Place) -> Point:
        tracks, start = self._tracks(place.images), self.start
        value = {name: track(place) for name, track in tracks.items()}
        return Point(
            value.get("lr", start.lr),
            self._at_most(int(value.get("batch", start.batch_size))),
            value.get("momentum", start.momentum),
            value.get("nu", self.nus(place.epoch) if self.nus else start.nu),
        )

    def _tracks(self, images: int) -> dict[str, Track]:
        """What is written, over epochs of so many images."""
        if images not in self._found_tracks:
            named = self.text.by_name.items() if self.text else ()
            self._found_tracks[images] = {name: c.track(self.epochs, images) for name, c in named}
        return self._found_tracks[images]

    @cached_property
    def _found_tracks(self) -> dict[int, dict[str, Track]]:
        return {}

    def _by_method(self, epoch: float) -> Point:
        method, batch = METHODS[self.method], self.batch_solved_for(epoch)
        lr, beta = method.lr(self, epoch), method.momentum(self, epoch)
        nu = self.nus(int(epoch)) if self.nus else None
        smoothing = self.smoothing_with(nu)
        if method.solves == "lr" and epoch > 0:
            lr = self.target(epoch) / smoothing.bounded(1.0, batch, beta)
        if method.solves == "momentum" and epoch > 0:
            beta = smoothing.solve_momentum(self.target(epoch), lr, batch, beta)
        return Point(lr, self._batch_by_method(epoch), beta, nu)

    def smoothing_with(self, nu: float | None) -> Smoothing:
        """The noise model at the nu of a Point."""
        return self.smoothing if nu is None else dataclasses.replace(self.smoothing, nu=nu)

    def batch_size(self, epoch: int) -> int:
        """What the loader serves at the beginning of an epoch."""
        if self.function is not None or (self.text is not None and self.batch_moves):
            return self(epoch).batch_size
        return self.batch_at(Place(epoch))

    def _at_most(self, batch: int) -> int:
        return batch if self.images is None else min(batch, self.images)

    def batch_at(self, place: Place) -> int:
        """The batch size of the update that comes at a place."""
        if self.function is not None:
            return self.at(place).batch_size
        if self.text is not None:
            track = self._tracks(place.images).get("batch")
            return self._at_most(int(track(place)) if track else self.start.batch_size)
        return self._batch_by_method(self._time(place))

    def _batch_by_method(self, epoch: float) -> int:
        return self._at_most(int(METHODS[self.method].batch(self, epoch)))

    def batch_solved_for(self, epoch: float) -> float:
        """The batch of which lr or momentum are solved: the one that is served; the published code
        took the fraction."""
        if self.shifted:
            return METHODS[self.method].batch(self, epoch)
        return self._batch_by_method(epoch)

    def delta(self, point: Point) -> float | None:
        """The degree of smoothing at a Point (Smoothing.degree); None where no bound is known."""
        return self.bounded(point) if self.smoothing.defined else None

    def bounded(self, point: Point) -> float:
        """The same where there is a bound. Raises ValueError where there is none."""
        smoothing = self.smoothing_with(point.nu)
        return smoothing.bounded(point.lr, point.batch_size, point.momentum)

    def target(self, epoch: float) -> float:
        """The delta that a solved method aims at (P1, optimal decay rate)."""
        return self.bounded(self.start) * self.remaining(epoch) ** self.power

    def remaining(self, epoch: float) -> float:
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
        elif METHODS[self.method].uses == "decay_epoch" and METHODS[self.method].falls:
            goal_of, reached_of = self.stepped_target, self.reached
        else:
            return None
        worst, ratio = None, 1.02
        for epoch in range(self.epochs):
            goal, reached = goal_of(epoch), reached_of(epoch)
            if reached > ratio * goal:
                worst, ratio = (epoch, goal, reached), reached / goal if goal else math.inf
        return worst

    def reached(self, epoch: float) -> float:
        """delta of a method."""
        return self.bounded(self._by_method(epoch))

    def floor(self, epoch: float) -> float:
        """delta without momentum, below which a method that solves for the momentum cannot fall."""
        return self.smoothing.bounded(
            METHODS[self.method].lr(self, epoch), self.batch_solved_for(epoch), 0.0
        )

    def stepped_target(self, epoch: float) -> float:
        """delta of a method of steps under plain SGD: lr, batch and hybrid lower it by 1/sqrt(2) at
        each, unless they are given a factor."""
        falls = METHODS[self.method].falls
        return self.bounded(self.start) * (falls(self) if falls else 1) ** self.steps_taken(epoch)

    def steps_taken(self, epoch: float) -> int:
        if self.milestones is not None:
            return bisect_right(self.milestones, epoch)
        return int(epoch // self.decay_epoch)

    def batch_steps_taken(self, epoch: float) -> int:
        """The same epochs as the learning rate; the published code was one epoch late."""
        return self.steps_taken(max(0, epoch - 1) if self.shifted else epoch)

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
        return self.layout(images, drop_last).epoch_of(update)

    def layout(self, images: int, drop_last: bool = False) -> Layout:
        """How the updates over so many training images lie in the epochs."""
        key = images, drop_last
        if key not in self._found_layouts:
            self._found_layouts[key] = Layout(self.spans(images, drop_last), images)
        return self._found_layouts[key]

    @cached_property
    def _found_layouts(self) -> dict[tuple[int, bool], Layout]:
        return {}

    def spans(self, images: int, drop_last: bool = False) -> Iterator[Span]:
        """Stretches of epochs that have the same batches, over so many training images. Nothing is
        solved for it."""
        track = self._tracks(images).get("batch")
        if track is not None:
            yield from lay_out(
                lambda place: min(self._at_most(int(track(place))), images),
                track.piece,
                self.epochs,
                images,
                drop_last,
            )
            return
        if self.batch_moves:  # of a method, which never lowers it
            yield from lay_out(
                lambda place: min(self.batch_at(place), images),
                lambda place: 0,
                self.epochs,
                images,
                drop_last,
            )
            return
        for epochs, size in self.stages():
            yield equal(epochs, size, images, drop_last)

    def stages(self) -> Iterator[tuple[int, int]]:
        """(how many epochs, batch size) of every stretch of epochs that begin with one batch size.
        Nothing is solved for it."""
        if self.function is not None or (self.text is not None and self.batch_moves):
            for size, alike in groupby(map(self.batch_size, range(self.epochs))):
                yield len(list(alike)), size
            return
        track = self._tracks(1).get("batch")
        if track is not None:  # which changes between epochs
            for start, end in pairwise([*sorted(track.firsts), self.epochs]):
                yield end - start, self.batch_at(Place(start))
            return
        first = 0  # no method lowers the batch
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
        for span in self.spans(images, drop_last):
            found += [span.updates] * span.epochs
        return found


def checked(point: object, epoch: int) -> Point:
    """What a function gives as the Point of an epoch. Raises ValueError for what is none."""
    if not isinstance(point, Point):
        raise ValueError(f"the function gives {point!r} for epoch {epoch}, which is no Point")
    fits = {
        "lr": isinstance(point.lr, int | float) and 0 <= point.lr < math.inf,
        "batch_size": isinstance(point.batch_size, int) and point.batch_size >= 1,
        "momentum": 0 <= point.momentum < 1,
        "nu": point.nu is None or 0 <= point.nu <= 1,
    }
    for name, fine in fits.items():
        if not fine:
            raise ValueError(f"{name} {getattr(point, name)!r} of epoch {epoch} is out of range")
    return point


# What a method does to the learning rate and to the batch


def same_lr(s: Schedule, epoch: float) -> float:
    return s.start.lr


def stepped_lr(s: Schedule, epoch: float) -> float:
    return s.start.lr * s.factor ** s.steps_taken(epoch)


def hybrid_lr(s: Schedule, epoch: float) -> float:
    """With a batch that grows by the factor, so that delta falls by 1/sqrt(2) at every step."""
    return s.start.lr * math.sqrt(s.factor / 2) ** s.steps_taken(epoch)


def seesaw_lr(s: Schedule, epoch: float) -> float:
    """The square root of what a scheduler would cut lr by."""
    return s.start.lr * math.sqrt(s.factor) ** s.steps_taken(epoch)


def growing_lr(s: Schedule, epoch: float) -> float:
    return s.start.lr * s.lr_factor ** s.steps_taken(epoch)


def poly(s: Schedule, epoch: float) -> float:
    return s.lr_min + (s.start.lr - s.lr_min) * (1 - epoch / s.epochs) ** s.power


def cosine(s: Schedule, epoch: float) -> float:
    return s.lr_min + (s.start.lr - s.lr_min) * (1 + math.cos(math.pi * epoch / s.epochs)) / 2


def exponential(s: Schedule, epoch: float) -> float:
    return s.start.lr * s.gamma**epoch


def half_of_decay(s: Schedule, epoch: float) -> float:
    """The square root of the target's decay, so that the momentum takes up the other half."""
    return s.start.lr * s.remaining(epoch) ** (s.power / 2)


def same_momentum(s: Schedule, epoch: float) -> float:
    return s.start.momentum


def stepped_momentum(s: Schedule, epoch: float) -> float:
    return s.start.momentum * s.factor ** s.steps_taken(epoch)


def same_batch(s: Schedule, epoch: float) -> float:
    return s.start.batch_size


def stepped_batch(s: Schedule, epoch: float, factor: float | None = None) -> float:
    """b factor^steps rounded down; the published code rounds down at every step."""
    steps, factor = s.batch_steps_taken(epoch), s.factor if factor is None else factor
    return (
        grown_by_steps(s.start.batch_size, factor, steps)
        if s.shifted
        else grown(s.start.batch_size, factor, steps)
    )


def seesaw_batch(s: Schedule, epoch: float) -> float:
    return stepped_batch(s, epoch, 1 / s.factor)


def grown_batch(s: Schedule, epoch: float) -> float:
    """b (M / (M - e))^(power balance), whole; the fraction under the published indices."""
    if s.shifted:
        return s.published_batches[int(epoch)]
    return grown(s.start.batch_size, s.remaining(epoch), -s.power * balance(s.start.batch_size))


def poly_batch(s: Schedule, epoch: float) -> float:
    """b (M / (M - e))^(2 power), whole: delta, which falls with its root, is that of poly."""
    return grown(s.start.batch_size, s.remaining(epoch), -2 * s.power)


def exponential_batch(s: Schedule, epoch: float) -> float:
    """b gamma^(-2 e), whole: the delta of exp."""
    return grown(s.start.batch_size, s.gamma, -2 * epoch)


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
    """How lr, batch and momentum go with the epochs that are done, and which of lr and momentum is
    solved to meet the target delta, if any."""

    lr: Callable[[Schedule, float], float] = same_lr
    batch: Callable[[Schedule, float], float] = same_batch
    momentum: Callable[[Schedule, float], float] = same_momentum
    solves: str = ""
    # the number that it takes beside the start: decay_epoch, power, gamma or milestones
    uses: str = ""
    also: tuple[str, ...] = ()  # further ones
    factor: float = 0.1  # where none is given
    # the factor of plain SGD's delta at a step; None: it is not what the method goes by
    falls: Callable[[Schedule], float] | None = lambda s: INV_SQRT2
    smooth: bool = False  # whether it may be asked at every update

    @property
    def changes_momentum(self) -> bool:
        return self.solves == "momentum" or self.momentum is not same_momentum

    def takes(self, name: str) -> bool:
        """Whether a number, such as decay_epoch, has an effect on it."""
        return name == self.uses or name in self.also

    def takes_factor(self, factor: float) -> bool:
        """Whether it may go by a factor: one that grows goes by no smaller one than 1."""
        return 1 <= factor < math.inf if self.factor > 1 else 0 < factor <= 1

    @property
    def factors(self) -> str:
        return "1 or more" if self.factor > 1 else "above 0, at most 1"


def in_steps(*also: str, **parts: Any) -> Method:
    """A method that changes at every so many epochs, or at milestones."""
    return Method(uses="decay_epoch", also=("milestones", "factor", *also), **parts)


METHODS = {
    "constant": Method(),
    # arXiv 2311.08745; by a factor of one's own where one is given
    "lr": in_steps(lr=stepped_lr, factor=INV_SQRT2, falls=lambda s: s.factor),
    "batch": in_steps(batch=stepped_batch, factor=2.0, falls=lambda s: math.sqrt(1 / s.factor)),
    "hybrid": in_steps(lr=hybrid_lr, batch=stepped_batch, factor=1.5),
    "poly": Method(lr=poly, uses="power", also=("lr_min",), smooth=True),
    "cosine": Method(lr=cosine, also=("lr_min",), smooth=True),
    "exp": Method(lr=exponential, uses="gamma", smooth=True),
    "step": Method(lr=stepped_lr, uses="milestones", also=("factor",)),
    # arXiv 2402.02325
    "beta": Method(solves="momentum", uses="power", smooth=True),
    "lr-beta": Method(lr=half_of_decay, solves="momentum", uses="power", smooth=True),
    "beta-batch": Method(batch=grown_batch, solves="momentum", uses="power", smooth=True),
    "lr-batch": Method(batch=grown_batch, solves="lr", uses="power", smooth=True),
    # by the code of a later paper of the same authors (igo-aaai25, main.py at 1849b3a), whose
    # batch-poly grows by the exponent power: half as fast as delta of poly asks for
    "beta-step": in_steps(momentum=stepped_momentum, factor=0.9, falls=None),
    "batch-poly": Method(batch=poly_batch, uses="power", smooth=True),
    "exp-batch": Method(batch=exponential_batch, uses="gamma", smooth=True),
    # arXiv 2510.14717: where a scheduler would cut lr by the factor
    "seesaw": in_steps(lr=seesaw_lr, batch=seesaw_batch, factor=0.5, falls=lambda s: s.factor),
    # arXiv 2508.05297: both grow exponentially, lr by less than the root of what the batch does
    "growth": in_steps(
        "lr_factor",
        lr=growing_lr,
        batch=stepped_batch,
        factor=2.0,
        falls=lambda s: s.lr_factor / math.sqrt(s.factor),
    ),
}
SOLVED = {name for name, method in METHODS.items() if method.solves}
SMOOTH = {name for name, method in METHODS.items() if method.smooth}
