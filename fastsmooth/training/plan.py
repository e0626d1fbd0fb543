"""What a run will do, known before anything is opened: its schedule, updates and cost."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator

from fastsmooth.cli import config as configs
from fastsmooth.cli.config import Config
from fastsmooth.cli.flags import ConfigError
from fastsmooth.messages import show
from fastsmooth.schedule import SOLVED, Schedule, memory, updates_of
from fastsmooth.terminal import Table, columns


def make_schedule(c: Config, images: int | None) -> Schedule:
    """The schedule that `c` describes over `images` training images."""
    return Schedule(
        c.method,
        epochs=c.epochs,
        lr=c.lr,
        batch_size=c.batch_size,
        optimizer=c.optimizer,
        momentum=c.momentum,
        nu=c.nu,
        c2=c.c2 or 1.0,
        k2=1.0 if c.k2 is None else c.k2,
        version=c.bound_version,
        images=images,
        decay_epoch=c.decay_epoch,
        power=c.power,
        gamma=c.gamma,
        shifted=c.compat == "original",
    )


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
        return training(lasting(epochs), images)[unit]

    # what an epoch holds at most: the first one's updates, since the batch never falls
    most = images if unit == "samples" else held(1)
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


def training(c: Config, images: int) -> dict[str, int]:
    """How many epochs, and the updates and samples of all of them."""
    updates = samples = 0
    for epochs, size in make_schedule(c, images).stages():
        in_each = updates_of(images, size, c.drop_last)
        updates, samples = (
            updates + epochs * in_each,
            samples + epochs * min(in_each * size, images),
        )
    return {"epochs": c.epochs, "updates": updates, "samples": samples}


def epochs_done(c: Config, schedule: Schedule, images: int) -> Iterator[tuple[int, int]]:
    """(updates, samples) of every epoch that the run begins: to its last, to the end of --budget or
    the largest of --steps."""
    sampling = c.mode == "sampling"
    unit, amount = ("updates", max(c.steps)) if sampling else c.limit or ("epochs", c.epochs)
    done = {"epochs": 0, "updates": 0, "samples": 0}
    for epochs, size in schedule.stages():
        in_each = updates_of(images, size, c.drop_last)
        for _ in range(epochs):
            if done[unit] >= amount and not sampling:  # which measures once the next batch is there
                return
            left = {
                "epochs": in_each,
                "updates": amount - done["updates"],
                "samples": -(-(amount - done["samples"]) // size),
            }
            updates = min(in_each, left[unit])
            samples = min(updates * size, images)
            yield updates, samples
            if updates < in_each:
                return
            done["epochs"] += 1
            done["updates"] += updates
            done["samples"] += samples


def print_plan(c: Config, as_json: bool) -> None:
    """Point and delta of every epoch that the run begins; equal epochs share a line."""
    images = c.images
    if c.limit:
        if images is None:
            raise ConfigError(
                f"--plan: how many epochs --budget {c.budget} takes, only the images in "
                f"{c.data_dir} tell"
            )
        c = within_budget(c, images)
    schedule = make_schedule(c, images)
    done = None
    if images is not None:
        check_steps(c, schedule, images)
        done = list(epochs_done(c, schedule, images))
    epochs = c.epochs if done is None else len(done)
    if as_json:
        for epoch, p in enumerate(map(schedule, range(epochs))):
            show(
                json.dumps({"epoch": epoch} | dataclasses.asdict(p) | {"delta": schedule.delta(p)}),
                whole=True,
            )
        return
    layout = {"epochs": ">9", "lr": ">11", "batch": ">6", "momentum": ">8", "delta": ">10"}
    table = Table(layout | ({"updates": ">9"} if done else {}), least_first=("updates", "momentum"))
    show(table.heading(columns(sys.stdout)))
    for p, alike in itertools.groupby(range(epochs), schedule):
        first, *rest = alike
        last = rest[-1] if rest else first
        name = f"{first}-{last}" if rest else f"{first}"
        cells = [
            name,
            f"{p.lr:.6g}",
            f"{p.batch_size}",
            f"{p.momentum:.4g}",
            f"{schedule.delta(p):.4g}",
        ]
        cells += [f"{sum(n for n, _ in done[first : last + 1]):,}"] if done else []
        show(table.row(cells, columns(sys.stdout)))
    for line in [*units(c), *notes(c, schedule), cost(c, schedule, done)]:
        show(line)
    if c.image_size is None:
        show(
            "the images, which --plan does not open, decide what --image-size and --model are "
            "where they are not given"
        )


def cost(c: Config, schedule: Schedule, done: list[tuple[int, int]] | None) -> str:
    """What the run will compute; `done` are the updates and samples of its epochs, None where only
    the folder can tell."""
    if done is None and c.mode == "sampling":
        return (
            f"cost: {max(c.steps):,} updates, and at {len(c.steps)} of them the gradient of all "
            f"images in {c.data_dir}"
        )
    if done is None:
        return f"cost: {c.epochs} passes over the images in {c.data_dir}"
    updates, samples = (sum(column) for column in zip(*done, strict=True))
    most = "at most " if c.mode == "critical" else ""
    line = f"cost: {most}{updates:,} updates, {samples:,} gradient evaluations of {c.model}"
    if c.mode == "sampling":
        more = 0
        for step, size in measured(c, schedule, c.images).items():
            # with momentum each direction ends a history of its own, which has its batches and a
            # full gradient to itself
            replayed = min(step, memory(c.momentum))
            more += (c.draws if replayed else 1) * c.images + c.draws * (1 + replayed) * size
        line += (
            f", and {'about ' * (c.momentum > 0)}{more:,} more to measure at {len(c.steps)} of them"
        )
    return line


def units(c: Config) -> list[str]:
    """What delta is in, where that is not what it is in the papers."""
    if not c.assumed:
        return []
    ones = " = ".join([*c.assumed, "1"])
    flags = " and ".join(map(configs.flag, c.assumed))
    unit = f"in units of C ({ones})" if c.assumed == ("c2",) else f"computed with {ones}"
    return [
        f"delta is {unit}: none is published for {configs.setting_of(c)}: give {flags} (--mode "
        "sampling measures c2)"
    ]


def notes(c: Config, schedule: Schedule) -> list[str]:
    """Where delta is not what the method aims at."""
    found = []
    missed = schedule.largest_miss()
    if missed and not (c.assumed and configs.uses_k2(c)):
        epoch, target, reached = missed
        found.append(
            f"--method {c.method} misses its target: at epoch {epoch} that is delta {target:.4g}, "
            f"reached {reached:.4g} "
            f"({why_missed(c, schedule, epoch)})"
        )
    return found


def why_missed(c: Config, schedule: Schedule, epoch: int) -> str:
    if c.method in SOLVED:
        return "the momentum cannot fall below 0"
    if schedule.batch_size(epoch) == schedule.images:
        return "no batch exceeds the data set"
    if configs.uses_k2(c):
        return "a part of the optimizer's bound does not fall with the batch"
    return (
        "the published code grows the batch an epoch late"
        if schedule.shifted
        else "a batch is a whole number"
    )


def check_steps(c: Config, schedule: Schedule, n: int) -> None:
    total = sum(schedule.updates(n, c.drop_last))
    if c.mode == "sampling" and max(c.steps) >= total:
        raise ConfigError(
            f"--steps {max(c.steps)} lies past the run's {total} updates: lower --steps or raise "
            "--epochs"
        )
    full = next((step for step, size in measured(c, schedule, n).items() if size == n), None)
    if full is not None:
        raise ConfigError(
            f"--steps {full}: the batch is the whole training set of {n} images then, whose "
            "gradient has no noise: lower "
            "--batchsize, or measure before"
        )


def measured(c: Config, schedule: Schedule, n: int) -> dict[int, int]:
    """The batch size at each of --steps at which --mode sampling measures."""
    steps = c.steps if c.mode == "sampling" else ()
    return {step: schedule.batch_size(schedule.epoch_of(step, n, c.drop_last)) for step in steps}
