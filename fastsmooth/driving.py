"""A schedule in a loop of one's own: the size of the batches of any DataLoader, and the numbers of
any optimizer."""

from __future__ import annotations

import dataclasses
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler

from fastsmooth.data.order import permutation
from fastsmooth.optim import NoisySGD
from fastsmooth.schedule import Point, Schedule

EVERY = ("epoch", "update")  # what the number that a schedule is asked for counts
SAME = ("samples", "seed", "shuffle", "drop_last", "every")  # as where a state was taken
COUNTS = ("epoch", "batch", "cursor", "update")


class BatchSchedule(Sampler[list[int]]):
    """Batches of indices whose size follows a schedule, for a DataLoader with any number of
    workers.

        batches = fs.BatchSchedule(schedule, len(train), seed=0)
        loader = DataLoader(train, batch_sampler=batches, num_workers=4)
        for epoch in range(batches.epoch, schedule.epochs):
            for x, y in loader:  # the rest of the epoch in which it stands
                ...
                batches.step()

    A DataLoader draws ahead, prefetch_factor batches for each of its workers. So the size of a
    batch is a function of its place alone, (epoch, number of the update), and never of when it was
    drawn: a change comes with exactly the batch that it is for. An epoch has every sample once, in
    the order that fastsmooth.train has with the same seed; a batch is what follows in it.

    Args:
        schedule: Schedule, or a function that gives the Point, or the batch size alone, of a number
            counted from 0: pure, for it is asked ahead of the training. A batch size is that over
            all processes.
        samples: in the training set.
        every: "epoch", the number is the epoch's, whose batches have one size; "update", it is the
            update's, counted over the whole training by step().
        seed: of the order of each epoch, a function of (seed, epoch).
        shuffle: False gives the samples in order.
        drop_last: leave out the last batch of an epoch where it is smaller than the others.
        rank, world: of this process; None: those of torch.distributed where it is initialised, else
            one process. Process r has the places i of the epoch's order with i % world == r, as
            fastsmooth.train shares them: all processes together have the batch, whatever their
            number, in shares that differ by one sample where its size is no multiple of it.

    What was drawn is not what was trained on, so the loop tells: step() after each batch. Place,
    `point` and state_dict() go by that, and each pass of the loader begins with the batch after the
    last one told of, so that an epoch which is left early goes on. Without step() a loop says
    set_epoch() before each epoch, as with DistributedSampler, and has no state_dict() between.

    `epoch`, `batch` and `update`: of the batch to be trained on next, its epoch, its number in the
    epoch and its number in the training, each counted from 0. len(): the batches of that epoch, 0
    after the end of a Schedule, where `point` and another pass raise ValueError.

    Raises ValueError for values out of range, a batch size that is no whole number of 1 or more, an
    epoch in which a process would have no sample of a batch, or that has no batch.
    """

    def __init__(
        self,
        schedule: Callable[[int], Point | int],
        samples: int,
        *,
        every: str = "epoch",
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int | None = None,
        world: int | None = None,
    ):
        checked("samples", samples, 1)
        checked("seed", seed, 0)
        if every not in EVERY:
            raise ValueError(f"every {every!r}: it is 'epoch' or 'update'")
        if every == "update" and isinstance(schedule, Schedule):
            raise ValueError(
                "a Schedule says what an epoch has: leave every='update' out, or give a function "
                "of the update"
            )
        self.schedule, self.samples, self.every, self.seed = schedule, samples, every, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.rank, self.world = place_among(rank, world)
        self.epoch = self.batch = self.update = 0
        self.cursor = 0  # samples of the epoch, all processes together, that were trained on
        self._points: dict[int, Point | int] = {}  # as the schedule was asked, ahead
        self._length: int | None = None
        self._given = 0  # the update after the last batch that was drawn
        self._first, self._ended = 0, False  # the update that the last pass began with; all drawn
        self._told = False  # by step(), since the beginning or the state that was taken up
        self._untold = False  # batches were drawn, of which neither step() nor set_epoch() told
        self._check_epoch()

    @property
    def point(self) -> Point | None:
        """What is in force for the next batch to be trained on; None where the schedule gives batch
        sizes alone."""
        found = self._found(self.epoch, self.update)
        return found if isinstance(found, Point) else None

    @property
    def batch_size(self) -> int:
        """The size of the next batch to be trained on, all processes together; the last one of an
        epoch has what is left."""
        return self._size(self.epoch, self.update)

    def __len__(self) -> int:
        if isinstance(self.schedule, Schedule) and self.epoch >= self.schedule.epochs:
            return 0  # who asks after the training is told so
        if self._length is None:
            rest = sum(1 for _ in self._ends(self.epoch, self.cursor, self.update))
            self._length = self.batch + rest
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of the epoch that were not trained on yet: this process's share of each.

        Raises ValueError where step() was called after none of the batches of an earlier pass.
        """
        if self._untold:
            raise ValueError(
                f"batches of epoch {self.epoch} were given before, and step() was called after "
                "none: call step() after each batch that was trained on, or set_epoch() before "
                "each epoch (and after a mere look at a batch)"
            )
        self._warn_of_single_step()
        self._check_epoch()
        return self._pass()

    def _pass(self) -> Iterator[list[int]]:
        """A DataLoader asks for two such at its beginning, and draws from the second: nothing is
        noted before the first batch."""
        epoch, start, update = self.epoch, self.cursor, self.update
        self._first, self._ended = update, False
        order = torch.arange(self.samples)
        if self.shuffle:
            order = permutation(self.seed, epoch, self.samples)
        for end in self._ends(epoch, start, update):
            update += 1
            self._given = max(self._given, update)
            self._untold = not self._told
            yield order[start + (self.rank - start) % self.world : end : self.world].tolist()
            start = end
        self._ended = True

    def step(self) -> None:
        """After each batch that was trained on. Raises ValueError where none was given."""
        if self.update >= self._given:
            raise ValueError(
                f"step() was called after more batches than were given, {self._given} of the "
                "training: call it once after each batch that was trained on"
            )
        self.cursor = min(self.cursor + self.batch_size, self.samples)
        self.batch, self.update = self.batch + 1, self.update + 1
        self._told, self._untold = True, False
        if self.every == "update":
            self._points.pop(self.update - 1)
        if next(self._ends(self.epoch, self.cursor, self.update), None) is None:
            self._begin(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Stand at the beginning of an epoch, counted from 0; the one in which it stands already
        goes on from where it is.

        Raises ValueError where every="update" and the epoch is not this one or, after some of its
        batches, the next: the number of the update is that of the steps.
        """
        checked("epoch", epoch, 0)
        self._warn_of_single_step()
        if self.every == "update" and not 0 <= epoch - self.epoch <= (self.batch > 0):
            raise ValueError(
                f"epoch {epoch} does not follow after {self.update} updates in epoch {self.epoch}: "
                "every='update' counts what step() tells, so call it after each batch, and take "
                "up a training by load_state_dict()"
            )
        self._untold = False
        self._first, self._ended = self.update, False
        if epoch != self.epoch:
            self._begin(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The place in the training, as plain numbers: the same for every process.

        Raises ValueError where batches were given and step() was called after none.
        """
        if self._untold:
            raise ValueError(
                "batches were given, and step() was called after none: a state would say that none "
                "was trained on: call step() after each batch that was"
            )
        return {name: getattr(self, name) for name in (*SAME, *COUNTS)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken, with the batch that was to be trained on next; in a pass
        that begins afterwards. Any number of processes may.

        Raises ValueError for a state of another data set, seed or manner.
        """
        missing = [name for name in (*SAME, *COUNTS) if name not in state]
        if missing:
            raise ValueError(f"the state has no {missing[0]}: it is none of a BatchSchedule")
        for name in SAME:
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the state was taken with {name} {state[name]!r}, not {getattr(self, name)!r}:"
                    " give what it was taken with"
                )
        for name in COUNTS:
            checked(f"the state's {name}", state[name], 0)
        if state["cursor"] >= self.samples:
            raise ValueError(
                f"the state's cursor {state['cursor']} lies outside the {self.samples} samples"
            )
        self._begin(state["epoch"])
        self.batch, self.cursor = state["batch"], state["cursor"]
        self.update = self._given = self._first = state["update"]
        self._told = self.update > 0  # who has told goes on to tell
        self._untold = self._ended = False

    def _begin(self, epoch: int) -> None:
        self.epoch, self.batch, self.cursor, self._length = epoch, 0, 0, None
        if self.every == "epoch":
            self._points.clear()

    def _found(self, epoch: int, update: int) -> Point | int:
        """What the schedule says of a batch; asked once, so that what is told is what was drawn."""
        if isinstance(self.schedule, Schedule) and self.schedule.moves:
            return self._within(self.schedule, epoch, self.batch + update - self.update)
        number = epoch if self.every == "epoch" else update
        if number not in self._points:
            found = self.schedule(number)
            size = found.batch_size if isinstance(found, Point) else found
            if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
                raise ValueError(
                    f"the schedule gives batch size {size!r} for {self.every} {number}: it is a "
                    "whole number, 1 or more"
                )
            self._points[number] = found
        return self._points[number]

    def _within(self, schedule: Schedule, epoch: int, batch: int) -> Point:
        """The Point of a batch of an epoch within which the schedule changes."""
        layout = schedule.layout(self.samples, self.drop_last)
        point = schedule.at(layout.place(epoch, layout.start(epoch).update + batch))
        if batch < layout.span_of(epoch).updates:
            return point
        return dataclasses.replace(point, batch_size=self.samples)  # so many are not left

    def _size(self, epoch: int, update: int) -> int:
        found = self._found(epoch, update)
        return int(found.batch_size if isinstance(found, Point) else found)

    def _ends(self, epoch: int, cursor: int, update: int) -> Iterator[int]:
        """Where each batch ends in the order of the epoch, from a place to the end of the epoch."""
        while cursor < self.samples:
            size = self._size(epoch, update)
            if self.drop_last and self.samples - cursor < size:
                return
            cursor, update = min(cursor + size, self.samples), update + 1
            yield cursor

    def _check_epoch(self) -> None:
        """Raises ValueError for an epoch that cannot be given."""
        start = self.cursor
        for end in self._ends(self.epoch, start, self.update):
            if end - start < self.world:
                raise ValueError(
                    f"epoch {self.epoch} has a batch of {end - start} samples for {self.world} "
                    "processes: give larger batches, or drop_last=True where it is the last one"
                )
            start = end
        if start == self.cursor:
            raise ValueError(
                f"epoch {self.epoch} has no batch: drop_last with batch size {self.batch_size} and "
                f"{self.samples} samples"
            )

    def _warn_of_single_step(self) -> None:
        if self._ended and self.update - self._first == 1 < self._given - self._first:
            warnings.warn(
                f"{self._given - self._first} batches were given, and step() was called once: it "
                "is called after each batch, not after each epoch",
                stacklevel=3,
            )


def place_among(rank: int | None, world: int | None) -> tuple[int, int]:
    """(rank, world) as given, or of torch.distributed, or of a process alone. Raises ValueError for
    a rank that there is not."""
    if (rank is None) != (world is None):
        raise ValueError("rank and world go together: give both, or neither")
    if rank is None or world is None:
        joined = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    checked("world", world, 1)
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is none of 0 to {world - 1}")
    return rank, world


def checked(name: str, value: Any, least: int) -> None:
    """Raises ValueError for what is no whole number of `least` or more."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} {value!r} is out of range: it is a whole number, {least} or more")


class ScheduledLR(LRScheduler):
    """A schedule's lr, momentum and nu in the groups of an optimizer; see torch_lr_scheduler."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], Point],
        samples: int | None = None,
        drop_last: bool = False,
    ):
        self.schedule, self.samples, self.drop_last = schedule, samples, drop_last
        self.ends: list[int] = []  # the update after the last one of each epoch
        if samples is not None:
            checked("samples", samples, 1)
            if not isinstance(schedule, Schedule):
                raise ValueError(
                    "samples says how many updates the epochs of a Schedule have: leave it out, "
                    "and give a function of what step() counts"
                )
            self.ends = list(accumulate(schedule.updates(samples, drop_last)))
        if isinstance(schedule, Schedule) and schedule.moves and samples is None:
            raise ValueError(
                "this schedule changes within epochs: give samples=N, how many an epoch has, and "
                "call step() after every update"
            )
        start = self.point_at(0)
        check_momentum(optimizer, start.momentum)
        self.base = base_of(optimizer, start.lr)
        super().__init__(optimizer)

    @property
    def point(self) -> Point:
        """What is in force for the next update."""
        return self.point_at(self.last_epoch)

    def point_at(self, count: int) -> Point:
        """Of so many calls of step(). After the end of a Schedule its last epoch stays in force."""
        if isinstance(self.schedule, Schedule) and self.schedule.moves and self.samples:
            return self.schedule.at(self.schedule.layout(self.samples, self.drop_last).at(count))
        epoch = bisect_right(self.ends, count) if self.ends else count
        if isinstance(self.schedule, Schedule):
            epoch = min(epoch, self.schedule.epochs - 1)
        found = self.schedule(epoch)
        if not isinstance(found, Point):
            raise ValueError(f"the schedule gives {found!r} for {epoch}: it gives a Point")
        return found

    def get_lr(self) -> list[float | torch.Tensor]:
        """The lr of each group: that of the schedule by the group's share of the base lr."""
        lr = self.point.lr
        return [lr * (float(initial) / self.base) for initial in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self._put()

    def _put(self) -> None:
        """Momentum and nu, in the groups that have them."""
        point = self.point
        for group in self.optimizer.param_groups:
            if "momentum" in group:
                group["momentum"] = point.momentum
            if "nu" in group and point.nu is not None:
                group["nu"] = point.nu

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; the schedule itself is given anew."""
        return {k: v for k, v in super().state_dict().items() if k not in ("schedule", "ends")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a state was taken; the groups have what was in force there.

        Raises ValueError for a state of steps that were counted in another way.
        """
        for name in ("samples", "drop_last"):
            if state_dict.get(name) != getattr(self, name):
                raise ValueError(
                    f"the state was taken with {name} {state_dict.get(name)!r}, not "
                    f"{getattr(self, name)!r}: give what it was taken with"
                )
        super().load_state_dict(state_dict)
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._put()


def torch_lr_scheduler(
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], Point],
    samples: int | None = None,
    *,
    drop_last: bool = False,
) -> ScheduledLR:
    """A scheduler of torch.optim.lr_scheduler that puts a schedule into an optimizer's groups: lr;
    momentum, where the groups have it; and nu, where they have it and it changes.

    Args:
        optimizer: any of torch's kind: torch.optim.SGD, NoisySGD, AdamW.
        schedule: Schedule, or a function that gives the Point of a number counted from 0.
        samples: in the training set; then step() is called after each update, and the epoch follows
            from how many updates each has. None: the number is that of the calls of step(), after
            each epoch where the schedule is a Schedule.
        drop_last: whether the loader leaves out the smaller last batch of an epoch; with `samples`.

    Groups with several lrs keep their ratios, as LambdaLR has it: that of the schedule's first
    epoch is the base. `point` is what is in force for the next update. After the end of a Schedule
    its last epoch stays in force.

    Raises ValueError where several lrs have not the schedule's first among them; for an optimizer
    with momentum under a schedule without, and the other way round; and for `samples` with a plain
    function.
    """
    return ScheduledLR(optimizer, schedule, samples, drop_last)


def base_of(optimizer: torch.optim.Optimizer, first: float) -> float:
    """The lr of the groups that stands for the schedule's, whose first is `first`."""
    found = {float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups}
    if first not in found and len(found) > 1:
        raise ValueError(
            f"the groups have the lrs {sorted(found)}, and the schedule begins with {first}: let a "
            "group begin with that, so that it is clear what the ratios are to"
        )
    base = first if first in found else found.pop()
    if base <= 0:
        raise ValueError(f"the optimizer begins with lr {base}: give it the schedule's {first}")
    return base


def check_momentum(optimizer: torch.optim.Optimizer, first: float) -> None:
    """Raises ValueError where the schedule, whose first momentum is `first`, would take the
    optimizer's away, or give it one that it has no use for."""
    held = max((group.get("momentum", 0.0) for group in optimizer.param_groups), default=0.0)
    if held and not first:
        raise ValueError(
            f"the optimizer has momentum {held}, and the schedule none: make the schedule with "
            f"optimizer='shb', which is torch.optim.SGD (or the form of NoisySGD), and "
            f"momentum={held}"
        )
    if first and isinstance(optimizer, NoisySGD) and not optimizer.form.has_buffer:
        raise ValueError(
            f"form {optimizer.form.name} has no momentum, and the schedule has {first}: give both "
            "the same form"
        )
