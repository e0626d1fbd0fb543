"""Values that change at points of a run: "VALUE @POINT, VALUE @POINT".

A point is so many epochs (40 or 40ep), a percentage of the run's epochs (50%), updates (2000up) or
samples (1e6samples). The first is @0, and they increase.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import ROUND_HALF_UP
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

from fastsmooth import course
from fastsmooth.cli.flags import ConfigError, whole
from fastsmooth.course import Moment

T = TypeVar("T")

MOST_STAGES = 100
SIZES = '"128 @0, 192 @50%, 224 @80%"'  # an example
NUMBERS = '"0.9 @0, 0.5 @50%"'


class Stage(NamedTuple, Generic[T]):
    """A value with the point from which on it holds."""

    value: T
    begins: Moment

    def __str__(self) -> str:
        return f"{self.value} @{self.begins}"


Stages = tuple[Stage[T], ...]


def written(stages: Stages[T]) -> str:
    """As `parsed` reads it again."""
    return ", ".join(map(str, stages))


def parsed(text: str, value: Callable[[str], T], example: str) -> Stages[T]:
    """The stages in a text, whose values `value` reads. Raises ArgumentTypeError, with an example
    of what it takes."""
    parts = text.split(",")
    if len(parts) > MOST_STAGES:
        raise ArgumentTypeError(f"{len(parts):,} stages: write at most {MOST_STAGES}")
    stages = tuple(stage(part.strip(), value, example) for part in parts)
    first = stages[0]
    if first.begins.amount:
        raise ArgumentTypeError(f"the first stage, {first}, does not begin @0: write {example}")
    for before, after in pairwise(stages):
        one_unit = before.begins.unit == after.begins.unit or not after.begins.amount
        if one_unit and after.begins.amount <= before.begins.amount:
            raise ArgumentTypeError(
                f"{after} does not begin after {before}: write points that increase, as in "
                f"{example}"
            )
        if after.value == before.value:
            raise ArgumentTypeError(f"{after} changes nothing after {before}: leave it out")
    return stages


def stage(text: str, value: Callable[[str], T], example: str) -> Stage[T]:
    words = [word.strip() for word in text.split("@")]
    if len(words) != 2 or not all(words):
        fault = "is no VALUE @POINT"
        if len(words) > 2:
            fault = "has two points, without a comma between its stages"
        raise ArgumentTypeError(f"{text[:60]!r} {fault}: write {example}")
    try:
        return Stage(value(words[0]), moment(words[1]))
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{text[:60]!r}: {error}: write {example}") from None


def moment(text: str) -> Moment:
    try:
        found = course.moment(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    if found.unit == "percent" and found.amount >= 100:
        raise ArgumentTypeError(f"at {text} the run is over")
    return found


def staged(
    one: Callable[[str], T], stages: Callable[[str, Callable[[str], T]], Stages[T]]
) -> Callable[[str], T | str]:
    """A parser of one value, or of `stages` of them, which it gives as `written`."""

    def parse(text: str) -> T | str:
        if not {"@", ","} & set(text):
            return one(text)
        found = stages(text, one)
        return found[0].value if len(found) == 1 else written(found)

    return parse


def image_size(low: int, high: int) -> Callable[[str], int | str]:
    """A parser of the pixels a side of all images, or of stages, which it gives as `written`."""
    return staged(whole(low, high), sizes)


def sizes(text: str, side: Callable[[str], int] = int) -> Stages[int]:
    """The stages of image sizes in a text. Raises ArgumentTypeError."""
    return between_epochs(parsed(text, side, SIZES), "images change their size", SIZES)


def number(value: Callable[[str], float]) -> Callable[[str], float | str]:
    """A parser of one number, or of stages of them, which it gives as `written`."""
    return staged(value, numbers)


def numbers(text: str, value: Callable[[str], float] = float) -> Stages[float]:
    """The stages of numbers in a text. Raises ArgumentTypeError."""
    return between_epochs(parsed(text, value, NUMBERS), "it changes", NUMBERS)


def between_epochs(stages: Stages[T], what_changes: str, example: str) -> Stages[T]:
    """The stages, each of which begins with an epoch. Raises ArgumentTypeError."""
    for each in stages:
        amount, unit = each.begins
        if unit in ("updates", "samples") or (unit == "epochs" and amount % 1):
            raise ArgumentTypeError(
                f"{each} begins inside an epoch, and {what_changes} between epochs alone: write "
                f"{example}, or whole epochs such as @40"
            )
    return stages


@dataclass(frozen=True)
class ByEpoch(Generic[T]):
    """A value for every epoch: values[k] from epoch starts[k] on, the first of which is 0."""

    starts: tuple[int, ...]
    values: tuple[T, ...]

    def __call__(self, epoch: int) -> T:
        return self.values[bisect_right(self.starts, epoch) - 1]

    @property
    def changes(self) -> bool:
        return len(self.values) > 1


def by_epoch(stages: Stages[T], epochs: int, flag: str) -> ByEpoch[T]:
    """The stages of a run of so many epochs, that begin at epochs or percentages of them; these
    are rounded to whole epochs, halves up. Raises ConfigError for one that no epoch would have."""
    starts = [epoch_of(each.begins, epochs) for each in stages]
    for each, start in zip(stages, starts, strict=True):
        if start >= epochs:
            raise ConfigError(
                f"{flag}: {each} begins at epoch {start}, but the run ends after {epochs}: lower "
                "the point, or train for more epochs"
            )
    for k, (before, after) in enumerate(pairwise(starts)):
        if after <= before:
            raise ConfigError(
                f"{flag}: of {epochs} epochs, {stages[k + 1]} begins at epoch {after} and "
                f"{stages[k]} at epoch {before}: write points that are further apart and increase"
            )
    return ByEpoch(tuple(starts), tuple(each.value for each in stages))


def epochs_of(points: Iterable[str], epochs: int) -> tuple[int, ...]:
    """The epochs before which points of a run of so many lie, each as `moment` reads it."""
    return tuple(epoch_of(moment(point), epochs) for point in points)


def increasing_epochs(points: Iterable[str], epochs: int, flag: str) -> tuple[int, ...]:
    """The same of points that must lie inside the run and increase. Raises ConfigError."""
    points = tuple(points)
    found = epochs_of(points, epochs)
    for point, epoch in zip(points, found, strict=True):
        if not 0 < epoch < epochs:
            raise ConfigError(
                f"{flag} {point} is epoch {epoch}, counted from 0, of a run of {epochs}: give "
                "epochs after the first and before its end, or train for more"
            )
    for k, (before, after) in enumerate(pairwise(found)):
        if after <= before:
            raise ConfigError(
                f"{flag} {' '.join(points)}: {points[k + 1]} (epoch {after}) does not come after "
                f"{points[k]} (epoch {before}): write points that increase"
            )
    return found


def epoch_of(begins: Moment, epochs: int) -> int:
    """The epoch, counted from 0, before which a point lies."""
    share = begins.amount * epochs / 100 if begins.unit == "percent" else begins.amount
    return int(share.to_integral_value(ROUND_HALF_UP))
