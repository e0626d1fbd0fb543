"""Values that go over a run as they are written: "lr: 0.1 @0 ->cos 0 @100%; batch: 32 @0, 64 @9".

A knot is a value with the point of the run from which on it holds, and the way to the next knot: a
step, or a ramp, which is linear, half a cosine or exponential. A point is so many epochs (40 or
40ep), a percentage of the run's epochs (50%), updates (2000up) or samples (1e6samples). Whether one
is reached is a comparison of whole numbers, never of rounded ones.
"""

from __future__ import annotations

import math
import re
import string
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from fastsmooth.names import hint
from fastsmooth.places import Layout, Place

UNITS = {"": "epochs", "ep": "epochs", "%": "percent", "up": "updates", "samples": "samples"}
SUFFIXES = {"epochs": "", "percent": "%", "updates": "up", "samples": "samples"}
# the digits are few, so that all arithmetic is exact
POINT = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?(?:e[0-9])?) *([a-z%]*)")
WAYS = {"": "linear", "linear": "linear", "cos": "cosine", "exp": "exp"}
SIGNS = {"step": ",", "linear": " ->", "cosine": " ->cos", "exp": " ->exp"}
LETTERS = string.ascii_letters
MOST_KNOTS, MOST_LETTERS = 100, 10_000
LARGEST, SMALLEST = 1e100, 1e-100  # numbers whose squares and quotients are numbers
LARGEST_BATCH = 2**62
EXAMPLE = '"lr: 0.1 @0, 0.05 @40ep; batch: 32 @0, 64 @50%"'


class Moment(NamedTuple):
    """A point of a run: so many epochs, updates or samples, or percent of its epochs."""

    amount: Decimal
    unit: str

    def __str__(self) -> str:
        digits = f"{self.amount:f}"
        if "." in digits:
            digits = digits.rstrip("0").rstrip(".")
        return digits + (SUFFIXES[self.unit] if self.amount else "")

    @property
    def measure(self) -> str:
        """What it is counted in: epochs, updates or samples; "" at the beginning of a run."""
        if not self.amount:
            return ""
        return "epochs" if self.unit == "percent" else self.unit

    def of(self, epochs: int) -> Fraction:
        """So many epochs, updates or samples of a run of so many epochs."""
        amount = Fraction(self.amount)
        return amount * epochs / 100 if self.unit == "percent" else amount


def moment(text: str) -> Moment:
    """Raises ValueError for what is no point of a run."""
    match = POINT.fullmatch(text)
    unit = UNITS.get(match[2]) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text[:60]!r} is no point of a run such as 40, 40ep or 50%")
    return Moment(Decimal(match[1]), unit)


@dataclass(frozen=True)
class Quantity:
    """What may be written of: the numbers that it takes."""

    fits: Callable[[float], bool]
    range: str
    whole: bool = False

    def read(self, text: str) -> float:
        """Raises ValueError for a number that it does not take."""
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            kind = "whole number" if self.whole else "number"
            raise ValueError(f"{text[:60]!r} is not a {kind}") from None
        if not math.isfinite(value) or not self.fits(value):
            raise ValueError(f"{text[:60]} is out of range: it is {self.range}")
        return value


QUANTITIES = {
    "lr": Quantity(
        lambda v: v == 0 or SMALLEST <= v <= LARGEST, f"0, or {SMALLEST:g} to {LARGEST:g}"
    ),
    "batch": Quantity(lambda v: 1 <= v <= LARGEST_BATCH, "1 or more", whole=True),
    "momentum": Quantity(lambda v: v == 0 or SMALLEST <= v < 1, f"0, or {SMALLEST:g} to below 1"),
    "nu": Quantity(lambda v: v == 0 or SMALLEST <= v <= 1, f"0, or {SMALLEST:g} to 1"),
}
ALIASES = {"beta": "momentum", "beta1": "momentum", "batchsize": "batch", "batch_size": "batch"}


@dataclass(frozen=True)
class Knot:
    """A value, the point from which on it holds, and the way to the next knot."""

    value: float
    begins: Moment
    way: str = "step"

    def __str__(self) -> str:
        short = f"{self.value:g}"
        return f"{short if float(short) == self.value else repr(self.value)} @{self.begins}"


@dataclass(frozen=True)
class Course:
    """How one value goes over a run. `name` is a row of QUANTITIES."""

    name: str
    knots: tuple[Knot, ...]

    def __str__(self) -> str:
        words = [str(self.knots[0])]
        for before, knot in pairwise(self.knots):
            words.append(f"{SIGNS[before.way]} {knot}")
        return f"{self.name}: {''.join(words)}"

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(knot.value for knot in self.knots)

    @property
    def changes(self) -> bool:
        return len(self.knots) > 1

    def within_epochs(self, epochs: int) -> bool:
        """Whether it may change between two updates of one epoch of so many."""
        for knot in self.knots:
            inside = knot.begins.measure in ("updates", "samples")
            if inside or knot.way != "step" or knot.begins.of(epochs).denominator > 1:
                return True
        return False

    def track(self, epochs: int, images: int) -> Track:
        """It over a run of so many epochs of so many images."""
        return Track(self, epochs, images)


class Ramp(NamedTuple):
    """From one knot to the next, over `length` of the positions of a unit; all three numbers are
    multiplied by `scale`, so that they are whole."""

    unit: str
    first: int
    length: int
    scale: int


class Track:
    """A course over epochs of so many images: its value at any place."""

    def __init__(self, course: Course, epochs: int, images: int):
        self.knots, self.whole = course.knots, QUANTITIES[course.name].whole
        self.units = [knot.begins.measure for knot in course.knots]
        # in samples where epochs are counted
        self.points = [
            knot.begins.of(epochs) * (images if unit in ("epochs", "") else 1)
            for knot, unit in zip(course.knots, self.units, strict=True)
        ]
        self.firsts = [math.ceil(point) for point in self.points]
        used = set(self.units) - {""}
        self.unit = used.pop() if len(used) == 1 else None
        self.ramps = [self._ramp(k) for k in range(len(self.knots) - 1)]

    def _ramp(self, k: int) -> Ramp:
        first, last = self.points[k], self.points[k + 1]
        scale = math.lcm(first.denominator, last.denominator)
        return Ramp(self.units[k + 1], int(first * scale), int((last - first) * scale), scale)

    def piece(self, place: Place) -> int:
        """The number of the last knot that is reached."""
        if self.unit:
            return max(bisect_right(self.firsts, position(place, self.unit)) - 1, 0)
        for k in range(len(self.knots) - 1, 0, -1):
            if position(place, self.units[k]) >= self.firsts[k]:
                return k
        return 0

    def __call__(self, place: Place) -> float:
        k = self.piece(place)
        knot = self.knots[k]
        if knot.way == "step" or k + 1 == len(self.knots):
            return knot.value
        ramp, a, b = self.ramps[k], knot.value, self.knots[k + 1].value
        gone = position(place, ramp.unit) * ramp.scale - ramp.first
        if self.whole and knot.way == "linear":  # exactly, a half rounded up
            return a + (2 * int(b - a) * gone + ramp.length) // (2 * ramp.length)
        share = gone / ramp.length
        if knot.way == "linear":
            value = a + (b - a) * share
        elif knot.way == "cosine":
            value = b + (a - b) * (1 + math.cos(math.pi * share)) / 2
        else:
            value = a * (b / a) ** share
        return math.floor(value + 0.5) if self.whole else value


def position(place: Place, unit: str) -> int:
    """Where a place lies: updates or samples of the run, or its epochs in samples of them."""
    if unit == "updates":
        return place.update
    if unit == "samples":
        return place.samples
    return place.epoch * place.images + place.cursor


@dataclass(frozen=True)
class Written:
    """The courses of a text, one for each value that it names."""

    courses: tuple[Course, ...]

    def __str__(self) -> str:
        """As `read` reads it again."""
        return "; ".join(map(str, self.courses))

    @cached_property
    def by_name(self) -> dict[str, Course]:
        return {course.name: course for course in self.courses}

    def first(self, name: str) -> float:
        """The value that a run begins with; of lr the first above 0, where it rises from there."""
        values = self.by_name[name].values
        return next(filter(None, values)) if name == "lr" else values[0]

    @property
    def changes(self) -> bool:
        return any(course.changes for course in self.courses)

    def within_epochs(self, epochs: int) -> bool:
        return any(course.within_epochs(epochs) for course in self.courses)

    def check_epochs(self, epochs: int) -> None:
        """Raises ValueError, with what to do, for a knot that lies behind so many epochs."""
        for course in self.courses:
            for before, knot in pairwise(course.knots):
                point = knot.begins.of(epochs) if knot.begins.measure == "epochs" else 0
                if point > epochs or (point == epochs and before.way == "step"):
                    raise ValueError(
                        f"{knot} of {course.name} is not reached: the run ends after {epochs:,} "
                        "epochs: lower the point, or train for more epochs"
                    )

    def check(self, layout: Layout) -> None:
        """Raises ValueError, with what to do, for a knot that the run does not come to, or that no
        update is made with."""
        for course in self.courses:
            last = -1
            for before, knot, first in steps(course, layout):
                label = f"{knot} of {course.name}"
                ends = before is not None and before.way != "step"
                if first is None and not (ends and at_the_end(knot, layout)):
                    raise ValueError(
                        f"{label} is not reached: the run ends after {layout.epochs:,} epochs, "
                        f"{layout.updates:,} updates and {layout.samples:,} samples: lower the "
                        "point, or train for longer"
                    )
                if first is not None and first <= last:
                    raise ValueError(
                        f"{label} begins at update {first:,}, counted from 0, and {before} at "
                        f"update {last:,}: write points that are further apart and increase"
                    )
                last = layout.updates if first is None else first


def steps(course: Course, layout: Layout) -> Iterator[tuple[Knot | None, Knot, int | None]]:
    """(the knot before, each knot, the update that is the first from it on; None: it is none)."""
    track = course.track(layout.epochs, layout.images)
    before = None
    for knot, unit, first in zip(course.knots, track.units, track.firsts, strict=True):

        def reached(update: int, unit: str = unit) -> int:
            return position(layout.at(update), unit)

        update = bisect_left(range(layout.updates), first, key=reached)
        yield before, knot, update if update < layout.updates else None
        before = knot


def at_the_end(knot: Knot, layout: Layout) -> bool:
    """Whether a knot lies at the end of the run, and not behind it."""
    whole = {"epochs": layout.epochs, "updates": layout.updates, "samples": layout.samples}
    return knot.begins.of(layout.epochs) <= whole[knot.begins.measure or "epochs"]


# Reading


def read(text: str) -> Written:
    """Raises ValueError in one line, with the piece of the text that is wrong and an example."""
    if len(text) > MOST_LETTERS:
        raise ValueError(f"{len(text):,} letters: write at most {MOST_LETTERS:,}")
    courses: dict[str, Course] = {}
    for part in text.split(";"):
        name, colon, knots = part.partition(":")
        if not colon or not knots.strip():
            raise ValueError(f"{shown(part)} is no NAME: VALUE @POINT, ...: write {EXAMPLE}")
        name = ALIASES.get(name.strip().lower(), name.strip().lower())
        if name not in QUANTITIES:
            meant = hint(name, QUANTITIES) or f"the names are {', '.join(QUANTITIES)}"
            raise ValueError(f"{shown(part)}: there is no {shown(name)}: {meant}")
        if name in courses:
            raise ValueError(f"{shown(part)}: {name} is written twice: give it once")
        courses[name] = course(name, knots)
    return Written(tuple(courses[name] for name in QUANTITIES if name in courses))


def course(name: str, text: str) -> Course:
    """The knots in a text, whose first is @0 and which increase. Raises ValueError."""
    pieces = re.split(r"(,|->)", text)
    if len(pieces) > 2 * MOST_KNOTS:
        raise ValueError(f"{len(pieces) // 2 + 1:,} values of {name}: write at most {MOST_KNOTS}")
    knots: list[Knot] = []
    for k, piece in enumerate(pieces[::2]):
        sign = pieces[2 * k - 1] if k else ""
        where = shown((sign + piece).lstrip(","))
        if sign == "->":
            rest = piece.lstrip().lstrip(LETTERS)
            way = piece.strip()[: len(piece.lstrip()) - len(rest)]
            if way.lower() not in WAYS:
                raise ValueError(
                    f"{where} of {name}: there is no way ->{way[:20]}: write -> (linear), ->cos or "
                    "->exp"
                )
            knots[-1] = Knot(knots[-1].value, knots[-1].begins, WAYS[way.lower()])
            piece = rest
        try:
            knots.append(knot(name, piece))
        except ValueError as error:
            raise ValueError(f"{where} of {name}: {error}: write {EXAMPLE}") from None
    check_knots(name, knots)
    return Course(name, tuple(knots))


def knot(name: str, text: str) -> Knot:
    words = [word.strip() for word in text.split("@")]
    if len(words) > 2:
        raise ValueError("it has two points, without a comma or -> between its values")
    if len(words) != 2 or not all(words):
        raise ValueError("it is no VALUE @POINT")
    return Knot(QUANTITIES[name].read(words[0]), moment(words[1]))


def check_knots(name: str, knots: list[Knot]) -> None:
    """Raises ValueError for knots that no run can go by."""
    if knots[0].begins.amount:
        raise ValueError(f"the first value of {name}, {knots[0]}, is not @0: write {EXAMPLE}")
    for before, after in pairwise(knots):
        units = before.begins.unit, after.begins.unit
        measures = {before.begins.measure, after.begins.measure} - {""}
        comparable = units[0] == units[1] or not before.begins.amount or not after.begins.amount
        if comparable and after.begins.amount <= before.begins.amount:
            raise ValueError(
                f"{after} of {name} does not begin after {before}: write points that increase"
            )
        if before.way != "step" and len(measures) > 1:
            raise ValueError(
                f"{before}{SIGNS[before.way]} {after} of {name}: a ramp goes by one unit: give "
                "both points in epochs (or percent), in updates or in samples"
            )
        if before.way == "exp" and not (before.value and after.value):
            raise ValueError(
                f"{before} ->exp {after} of {name}: an exponential ramp is between values above 0: "
                "write -> or ->cos, or a small number in the place of 0"
            )
        if before.way == after.way == "step" and before.value == after.value:
            raise ValueError(f"{after} of {name} changes nothing after {before}: leave it out")
    for k, each in enumerate(knots):
        ramps = each.way != "step" or (k and knots[k - 1].way != "step")
        if name == "lr" and each.value == 0 and not ramps:
            raise ValueError(
                f"{each} of lr: nothing is learned at 0, which a ramp alone may begin or end with: "
                "write a number above 0"
            )
        if name == "lr" and not any(each.value for each in knots):
            raise ValueError(f"{each} of lr: nothing is learned at 0: write a number above 0")
        over = each.begins.unit == "percent" and each.begins.amount >= 100
        ends = each.begins.amount == 100 and each.way == "step" and k and ramps
        if over and not ends:
            raise ValueError(
                f"{each} of {name}: at {each.begins} the run is over: lower it, or end a ramp there"
            )


def shown(text: str) -> str:
    """A piece of what was written, on one line."""
    return repr(text.strip()[:60])
