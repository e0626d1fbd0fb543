"""Where a run stands, and how its updates lie in its epochs.

An epoch is a row of batches; the size of each is decided at its place, and what the images leave
over at the end is one smaller batch, or is dropped. Everything that is known of a run before it
begins (updates, samples, the epoch of an update) is counted over stretches of equal epochs (Span),
so that a million of them take no longer than one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple


class Place(NamedTuple):
    """Where a run stands before an update: in which epoch, after how many updates and samples of
    the run, and after how many samples (`cursor`) of the `images` that an epoch has."""

    epoch: int
    update: int = 0
    samples: int = 0
    cursor: int = 0
    images: int = 1

    @property
    def epochs(self) -> float:
        """The epochs that are done, this one by the share of its samples."""
        return (self.epoch * self.images + self.cursor) / self.images


class Span(NamedTuple):
    """So many epochs of the same batches: (how many, of how many samples) in their order, and the
    samples of a last, smaller one that is left over (`rest`, 0: none)."""

    epochs: int
    batches: tuple[tuple[int, int], ...]
    rest: int = 0

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """The batches of an epoch with what is left over."""
        return (*self.batches, (1, self.rest)) if self.rest else self.batches

    @property
    def updates(self) -> int:
        """Of one epoch."""
        return sum(count for count, _ in self.runs)

    @property
    def samples(self) -> int:
        """Of one epoch."""
        return sum(count * size for count, size in self.runs)

    def until(self, updates: int) -> int:
        """The samples of the first so many updates of an epoch."""
        samples = 0
        for count, size in self.runs:
            taken = min(count, updates)
            samples, updates = samples + taken * size, updates - taken
        return samples

    def holding(self, samples: int) -> int:
        """The first updates of an epoch that have so many samples or more; all of them where the
        epoch has fewer."""
        updates = 0
        for count, size in self.runs:
            taken = min(count, -(-samples // size))
            updates, samples = updates + taken, samples - taken * size
            if samples <= 0:
                break
        return updates


def equal(epochs: int, size: int, images: int, drop_last: bool) -> Span:
    """Epochs of batches of one size."""
    count, rest = divmod(images, size)
    return Span(epochs, ((count, size),), 0 if drop_last else rest)


def lay_out(
    size_at: Callable[[Place], int],
    piece_at: Callable[[Place], object],
    epochs: int,
    images: int,
    drop_last: bool,
) -> Iterator[Span]:
    """The batches of a run whose size may change between any two.

    size_at: the size of the batch at a place, 1 to `images`; piece_at: the same at two places only
    where the size goes one way between them, so that its changes are found by bisection.
    """
    place, begun = Place(0, images=images), list[tuple[int, int]]()
    while place.epoch < epochs:
        size, piece = size_at(place), piece_at(place)

        def keeps(
            slots: int, place: Place = place, size: int = size, piece: object = piece
        ) -> bool:
            later = after(place, slots, size, drop_last)
            return later.epoch < epochs and piece_at(later) == piece and size_at(later) == size

        slots = first_without(keeps)
        place, taken = after(place, slots, size, drop_last), slots
        # to the end of the epoch that is begun, then whole epochs, then into the next
        room = images - sum(count * size for count, size in begun)
        if taken >= -(-room // size):
            count, rest = divmod(room, size)
            begun += [(count, size)] * (count > 0)
            yield Span(1, merged(begun), 0 if drop_last else rest)
            begun, taken = [], taken - -(-room // size)
            whole, taken = divmod(taken, -(-images // size))
            if whole:
                yield equal(whole, size, images, drop_last)
        if taken:
            begun.append((taken, size))


def merged(batches: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighbours of one size together."""
    found: list[tuple[int, int]] = []
    for count, size in batches:
        if found and found[-1][1] == size:
            count += found.pop()[0]
        found.append((count, size))
    return tuple(found)


def after(place: Place, slots: int, size: int, drop_last: bool) -> Place:
    """The place so many slots later, all of one size. What an epoch leaves over has a slot too,
    even where it is dropped: there it is decided that no batch fits."""
    epoch, update, samples, cursor, images = place
    rest, in_each = images % size, -(-images // size)
    left = -(-(images - cursor) // size)
    if slots < left:
        return Place(epoch, update + slots, samples + slots * size, cursor + slots * size, images)
    lost = (images - cursor) % size if drop_last else 0
    update += left - (lost > 0)
    samples += images - cursor - lost
    whole, slots = divmod(slots - left, in_each)
    lost = rest if drop_last else 0
    update += whole * (in_each - (lost > 0)) + slots
    samples += whole * (images - lost) + slots * size
    return Place(epoch + 1 + whole, update, samples, slots * size, images)


def first_without(holds: Callable[[int], bool]) -> int:
    """The first of 1, 2, 3 ... of which it does not hold; from there on it never does."""
    step = 1
    while holds(step):
        step *= 2
    low, high = step // 2, step  # holds at low, where that is above 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


class Layout:
    """The spans of a run, in which any update is found at once."""

    def __init__(self, spans: Iterable[Span], images: int):
        found: list[Span] = []
        for span in spans:
            if found and found[-1][1:] == span[1:]:
                span = span._replace(epochs=span.epochs + found.pop().epochs)
            found.append(span)
        self.spans, self.images = tuple(found), images
        self.first_epochs = [0, *accumulate(s.epochs for s in found)]
        self.first_updates = [0, *accumulate(s.epochs * s.updates for s in found)]
        self.first_samples = [0, *accumulate(s.epochs * s.samples for s in found)]

    @property
    def epochs(self) -> int:
        return self.first_epochs[-1]

    @property
    def updates(self) -> int:
        return self.first_updates[-1]

    @property
    def samples(self) -> int:
        return self.first_samples[-1]

    def epoch_of(self, update: int) -> int:
        """The epoch of an update, both counted from 0; the last one for what comes after."""
        if update >= self.updates:
            return self.epochs - 1
        at = bisect_right(self.first_updates, update) - 1
        return self.first_epochs[at] + (update - self.first_updates[at]) // self.spans[at].updates

    def start(self, epoch: int) -> Place:
        """Where an epoch begins."""
        at = min(bisect_right(self.first_epochs, epoch), len(self.spans)) - 1
        span, done = self.spans[at], epoch - self.first_epochs[at]
        update = self.first_updates[at] + done * span.updates
        return Place(
            epoch, update, self.first_samples[at] + done * span.samples, images=self.images
        )

    def span_of(self, epoch: int) -> Span:
        return self.spans[min(bisect_right(self.first_epochs, epoch), len(self.spans)) - 1]

    def place(self, epoch: int, update: int) -> Place:
        """The place of an update of the run in its epoch; of its nearest where it is in another."""
        start, span = self.start(epoch), self.span_of(epoch)
        done = min(max(update - start.update, 0), max(span.updates - 1, 0))
        cursor = span.until(done)
        return Place(epoch, start.update + done, start.samples + cursor, cursor, self.images)

    def at(self, update: int) -> Place:
        """The place of an update of the run; of the last one for what comes after."""
        return self.place(self.epoch_of(update), update)
