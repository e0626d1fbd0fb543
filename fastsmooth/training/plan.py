"""What a run will do, known before anything is opened: its schedule, updates and cost."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache

from fastsmooth.cli import config as configs
from fastsmooth.cli import stages
from fastsmooth.cli.config import Config
from fastsmooth.cli.flags import ConfigError, flag
from fastsmooth.cli.stages import ByEpoch
from fastsmooth.places import Layout, Place, Span
from fastsmooth.schedule import SOLVED, Point, Schedule, memory


def make_schedule(c: Config, images: int | None) -> Schedule:
    """The schedule that `c` describes over `images` training images."""
    return Schedule(
        c.method,
        epochs=c.epochs,
        lr=c.lr,
        batch_size=c.batch_size,
        optimizer=c.optimizer,
        momentum=c.momentum,
        nu=c.nus if len(c.nu_stages) > 1 else c.nu_stages[0].value,
        c2=c.c2 or 1.0,
        k2=1.0 if c.k2 is None else c.k2,
        version=c.bound_version,
        images=images,
        decay_epoch=c.decay_epoch,
        power=c.power,
        gamma=c.gamma,
        milestones=steps_of(c),
        factor=c.factor,
        lr_factor=c.lr_factor,
        lr_min=c.lr_min,
        per=c.per,
        shifted=c.compat == "original",
        text=c.written,
    )


def steps_of(c: Config) -> list[int] | None:
    """The epochs of --milestones, as far as the run has them; None without any."""
    if c.milestones is None:
        return None
    epochs = stages.epochs_of(c.milestones, c.epochs)
    return sorted({epoch for epoch in epochs if 0 < epoch < c.epochs})


def delta_of(c: Config, schedule: Schedule, point: Point) -> float | None:
    """delta at a Point; None where the update is not one that it is defined for."""
    return schedule.delta(point) if c.plain_update else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will do over so many training images: made once, by `make_plan`."""

    config: Config  # with the epochs that its --budget takes
    schedule: Schedule
    images: int

    @cached_property
    def sizes(self) -> ByEpoch[int]:
        """Pixels a side of the training images by epoch; the last of them is that of the tests."""
        return self.config.sizes

    @cached_property
    def warmup(self) -> int:
        """The updates over which lr rises: 0 without --warmup."""
        amount, unit = self.config.warmup_length
        if unit == "updates":
            return amount
        if amount >= self.layout.epochs:
            return self.layout.updates + (amount > self.layout.epochs)
        return self.layout.start(amount).update

    @cached_property
    def layout(self) -> Layout:
        """How the updates lie in all epochs of the schedule, those of a run that ends early too."""
        return self.schedule.layout(self.images, self.config.drop_last)

    @cached_property
    def _in_force(self) -> Callable[[Place], Point]:
        # a warm-up asks at every update, and some schedules are solved
        found = lru_cache(maxsize=2)(self.schedule.at)
        if self.schedule.moves:
            return found
        return lambda place: found(place._replace(update=0, samples=0, cursor=0))

    def at(self, place: Place) -> Point:
        """What is in force at the update that comes at a place: that of the schedule, whose lr a
        warm-up of W updates multiplies by (update + 1) / W."""
        point = self._in_force(place)
        if place.update >= self.warmup:
            return point
        return dataclasses.replace(point, lr=point.lr * (place.update + 1) / self.warmup)

    def point(self, epoch: int, update: int) -> Point:
        """The same at an update of an epoch, both counted from 0; at the nearest of the epoch's
        where it is in another."""
        return self.at(self.layout.place(epoch, update))

    def moves(self, update: int) -> bool:
        """Whether the Point of an update may be another than that of the update before it in the
        same epoch."""
        return self.schedule.moves or (self.warmup > 0 and update <= self.warmup)

    @cached_property
    def limit(self) -> tuple[str, int]:
        """("epochs", "updates" or "samples", how many) that the run ends after."""
        c = self.config
        if c.mode == "sampling":
            return "updates", max(c.steps)
        return c.limit or ("epochs", c.epochs)

    @cached_property
    def measured(self) -> dict[int, int]:
        """The batch size at each of --steps at which --mode sampling measures."""
        c = self.config
        steps = c.steps if c.mode == "sampling" else ()
        return {step: self.schedule.batch_at(self.layout.at(step)) for step in steps}

    @cached_property
    def samples(self) -> int:
        """What the run will process in all."""
        return sum(samples for _, samples in self.epochs())

    @cached_property
    def updates_at_first(self) -> int:
        """Of the first epoch."""
        return self.layout.spans[0].updates

    @property
    def samples_at_first(self) -> int:
        """Of the first epoch."""
        return self.layout.spans[0].samples

    def delta(self, point: Point) -> float | None:
        """delta at a Point; None where the update is not one that it is defined for."""
        return delta_of(self.config, self.schedule, point)

    def epoch_of(self, update: int) -> int:
        """The epoch of an update, both counted from 0; the last one for what comes after."""
        return self.layout.epoch_of(update)

    def spent(self, updates: int, samples: int) -> bool:
        """Whether the --budget is used up, which ends the last epoch early."""
        unit, amount = self.config.limit or ("epochs", self.config.epochs)
        done = {"updates": updates, "samples": samples}
        return unit in done and done[unit] >= amount

    def epochs(self) -> Iterator[tuple[int, int]]:
        """(updates, samples) of every epoch that the run begins: to its last, to the end of
        --budget or the largest of --steps."""
        for span in self.spans():
            yield from itertools.repeat((span.updates, span.samples), span.epochs)

    def spans(self) -> Iterator[Span]:
        """Stretches of equal epochs as far as the run goes, which may end inside its last one."""
        unit, amount = self.limit
        sampling = self.config.mode == "sampling"
        done = {"epochs": 0, "updates": 0, "samples": 0}
        for span in self.layout.spans:
            each = {"epochs": 1, "updates": span.updates, "samples": span.samples}
            # so many epochs are whole; the one that reaches the amount is too, if it does not go on
            whole = min(span.epochs, (amount - done[unit]) // max(each[unit], 1))
            if whole:
                yield span._replace(epochs=whole)
            for name in done:
                done[name] += whole * each[name]
            # --mode sampling measures once the next batch is there
            if whole < span.epochs and (sampling or done[unit] < amount):
                left = amount - done[unit]
                yield cut(span, left if unit == "updates" else span.holding(left))
            if whole < span.epochs:
                return

    def lasting(self, least: int, largest: int) -> frozenset[int]:
        """The batch sizes of at most `largest` samples of which the run will make at least `least`
        updates; the last batches of epochs, which are smaller, are left out."""
        most: Counter[int] = Counter()  # updates of a size that follow each other
        size = count = 0
        for span in self.spans():
            alone = len(span.batches) == 1
            for many, its in span.batches:
                count = (count if its == size else 0) + many * (span.epochs if alone else 1)
                size = its
                most[size] = max(most[size], count)
        return frozenset(s for s, count in most.items() if count >= least and s <= largest)

    def in_training_mode(self) -> Iterator[tuple[str, int, list[str]]]:
        """(what, of how many samples, what else avoids it) of all that will go through the model in
        training mode.

        What --track-noise measures is no part of it: it waits for a batch whose parts have two
        samples or more.
        """
        c, n = self.config, self.images
        if c.bn == "train" and c.mode == "critical" and c.criterion == "full-grad":
            yield "the last chunk of the full gradient", n % c.batch_size, []
        for size in self.measured.values() if c.bn == "train" else ():
            yield "a drawn batch", size, []
            yield "the last chunk of the full gradient", n % size, []
        for span in self.spans():
            for _, size in span.batches:
                yield "a batch", size, []
            if span.rest:
                yield "the last batch of an epoch", span.rest, ["--drop-last"]

    def batch_sizes(self) -> set[int]:
        """Of all updates of the run, but for what is left over at the end of epochs."""
        return {size for span in self.spans() for _, size in span.batches}


def cut(span: Span, updates: int) -> Span:
    """An epoch of a span that ends after so many of its updates."""
    batches = []
    for count, size in span.batches:
        taken = min(count, updates)
        batches += [(taken, size)] * (taken > 0)
        updates -= taken
    return Span(1, tuple(batches), span.rest if updates else 0)


def make_plan(c: Config, images: int) -> Plan:
    """Raises ConfigError for what cannot be done over so many images."""
    if not c.resume:  # else its epochs are those that the run began with
        c = within_budget(c, images)
    plan = Plan(c, make_schedule(c, images), images)
    _ = plan.sizes  # which must all begin within the epochs
    configs.check_length(c)
    configs.refuse(plan.schedule.check_written, images, c.drop_last)
    total = plan.layout.updates
    if plan.warmup > total:
        raise ConfigError(
            f"--warmup {c.warmup} is longer than the run of {total:,} updates: lower it, or train "
            "for more epochs"
        )
    if c.mode == "sampling" and max(c.steps) >= total:
        raise ConfigError(
            f"--steps {max(c.steps)} lies past the run's {total} updates: lower --steps or raise "
            "--epochs"
        )
    full = next((step for step, size in plan.measured.items() if size == images), None)
    if full is not None:
        raise ConfigError(
            f"--steps {full}: the batch is the whole training set of {images} images then, whose "
            "gradient has no noise: lower --batchsize, or measure before"
        )
    return plan


def totals(c: Config, schedule: Schedule, images: int) -> dict[str, int]:
    """How many epochs, and the updates and samples of all of them."""
    layout = schedule.layout(images, c.drop_last)
    return {"epochs": c.epochs, "updates": layout.updates, "samples": layout.samples}


def within_budget(c: Config, images: int) -> Config:
    """`c` with the fewest epochs over `images` training images that hold its --budget; the run ends
    inside the last of them."""
    if c.limit is None:
        return c
    unit, amount = c.limit

    def lasting(epochs: int) -> Config:
        return dataclasses.replace(
            c, epochs=epochs, decay_epoch=c.decay_epoch or max(1, epochs // 5)
        )

    def held(epochs: int) -> int:
        # not by --nu, some of whose stages may begin after so few
        lasts = dataclasses.replace(lasting(epochs), nu=c.nu_stages[0].value)
        return totals(lasts, make_schedule(lasts, images), images)[unit]

    # what an epoch holds at most: no batch is smaller than this
    most = images if unit == "samples" else -(-images // c.smallest_batch)
    longest = configs.MOST_EPOCHS
    few = (amount - 1) // most  # so many epochs are too few
    enough = few + 1
    while enough <= longest and held(enough) < amount:
        few, enough = enough, longest if enough < longest <= 2 * enough else 2 * enough
    if enough > longest:
        raise ConfigError(f"--budget {c.budget} takes over {longest:,} epochs: lower it")
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if held(middle) >= amount else (middle, enough)
    return lasting(enough)


def cost(plan: Plan) -> str:
    """What the run will compute."""
    c = plan.config
    spans = list(plan.spans())
    updates = sum(span.epochs * span.updates for span in spans)
    samples = sum(span.epochs * span.samples for span in spans)
    samples *= 2 if c.sam else 1
    most = "at most " if c.mode == "critical" else ""
    line = f"cost: {most}{updates:,} updates, {samples:,} gradient evaluations of {c.model}"
    if plan.measured:
        more = 0
        for step, size in plan.measured.items():
            # with momentum each direction ends a history of its own, which has its batches and a
            # full gradient to itself
            replayed = min(step, memory(plan.schedule.most_momentum))
            more += (c.draws if replayed else 1) * plan.images + c.draws * (1 + replayed) * size
        about = "about " * (plan.schedule.most_momentum > 0)
        line += f", and {about}{more:,} more to measure at {len(c.steps)} of them"
    return line


def cost_of_a_folder(c: Config) -> str:
    """The same in words, where only the folder can tell how many images there are."""
    if c.mode == "sampling":
        return (
            f"cost: {max(c.steps):,} updates, and at {len(c.steps)} of them the gradient of all "
            f"images in {c.data_dir}"
        )
    return f"cost: {c.epochs} passes over the images in {c.data_dir}"


def units(c: Config) -> list[str]:
    """What delta is in, where that is not what it is in the papers; why there is none."""
    if not c.form.bounds:
        return [
            f"delta is null: no bound on the noise of {c.optimizer}'s direction is published (C2 "
            "and the noise scale are measured all the same)"
        ]
    if not (c.assumed and c.plain_update):
        return []
    ones = " = ".join([*c.assumed, "1"])
    flags = " and ".join(map(flag, c.assumed))
    unit = f"in units of C ({ones})" if c.assumed == ("c2",) else f"computed with {ones}"
    return [
        f"delta is {unit}: none is published for {configs.setting_of(c)}: give {flags} (--mode "
        "sampling measures c2)"
    ]


def warming(c: Config, plan: Plan | None) -> list[str]:
    """What --warmup does, in words."""
    if c.warmup is None:
        return []
    amount, unit = c.warmup_length
    length = f"{amount:,} {unit}" if amount > 1 else unit.removesuffix("s")
    if plan and unit == "epochs":
        length += f", {plan.warmup:,} updates"
    many = f"{plan.warmup}" if plan else "W" if unit == "epochs" else f"{amount}"
    schedule = plan.schedule if plan else make_schedule(c, None)
    has_delta = delta_of(c, schedule, schedule.start) is not None
    return [
        f"--warmup {c.warmup}: lr{', and delta with it,' * has_delta} rises over the first "
        f"{length}: at update t, counted from 0, it is (t + 1) / {many} of that of the epoch"
    ]


def notes(c: Config, schedule: Schedule) -> list[str]:
    """Where delta is not what the method aims at, or is nothing; and what is minimised, where that
    is not the loss of the tests."""
    found = []
    if c.loss_in_words != "cross-entropy" and "loss" not in c.own_code:
        found.append(
            f"the training loss is {c.loss_in_words}; the test loss is plain cross-entropy"
        )
    if not c.plain_update:
        names = ("sam", "clip_norm", "mixup", "cutmix")
        *most, last = [flag(name) for name in names if getattr(c, name)]
        flags = f"{', '.join(most)} and {last}" if most else last
        found.append(
            f"delta is not given: it is defined for updates along mini-batch gradients, not for "
            f"{flags}"
        )
        return found
    missed = schedule.largest_miss()
    if missed and not (c.assumed and configs.uses_k2(c)):
        epoch, target, reached = missed
        found.append(
            f"--method {c.method} misses its target: at epoch {epoch} that is delta {target:.4g}, "
            f"reached {reached:.4g} ({why_missed(c, schedule, epoch)})"
        )
    return found


def why_missed(c: Config, schedule: Schedule, epoch: int) -> str:
    if c.method in SOLVED:
        return "the momentum cannot fall below 0"
    if schedule.nus:
        return "nu changes"
    if schedule.batch_size(epoch) == schedule.images:
        return "no batch exceeds the data set"
    if configs.uses_k2(c):
        return "a part of the optimizer's bound does not fall with the batch"
    return (
        "the published code grows the batch an epoch late"
        if schedule.shifted
        else "a batch is a whole number"
    )
