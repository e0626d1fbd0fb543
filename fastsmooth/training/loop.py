"""A run and its updates: batch after batch, measured, logged, saved and stopped.

`train` is the loop that all runs share; what a mode adds are instruments.
"""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastsmooth.cli.config import Config
from fastsmooth.cli.progress import Progress
from fastsmooth.data import Data, Stream
from fastsmooth.data.order import in_order
from fastsmooth.data.stream import Batch
from fastsmooth.messages import CannotWrite, warn
from fastsmooth.noise.instrument import Asked, Instrument, Values
from fastsmooth.places import Place
from fastsmooth.ranks import Ranks
from fastsmooth.runfolder.checkpoint import Checkpoints
from fastsmooth.runfolder.trackers import Trackers
from fastsmooth.runfolder.write import RunFolder, Unwritten
from fastsmooth.schedule import Point, Schedule
from fastsmooth.training.clock import Clock
from fastsmooth.training.ema import Ema
from fastsmooth.training.ending import OUT_OF_TIME
from fastsmooth.training.graphs import LARGEST, LEAST, LEAST_ASKED, Graphs, Kind, Pace, Recorder
from fastsmooth.training.keeping import Keeper
from fastsmooth.training.plan import Plan
from fastsmooth.training.step import Step, Tested
from fastsmooth.training.update import Update

FORMAT = 3  # of the state in a checkpoint; another number is refused
# samples of a test batch; a GPU takes as many pixels as so many images of 32 x 32 at a time
TEST_BATCH, TEST_BATCH_CUDA = 250, 2000
# Samples a chunk of the full gradient in eval mode, where chunks change time and memory alone. On a
# CPU no size from 100 to 1000 was faster than another beyond the noise (resnet20); a GPU starts
# with many, halved until they fit in its memory.
EVAL_CHUNK = {"cpu": 250, "cuda": 1000, "mps": 250}
NOT_FINITE = 255  # a reason to stop, beside OUT_OF_TIME and the numbers of signals


@dataclass(frozen=True)
class Origin:
    """A finished run that another goes on from."""

    run: str  # its folder
    epochs: int  # that it did itself
    updates: int
    first_epoch: int  # the data's number of the epoch that comes next


class Preempted(Exception):
    """The run was asked to stop and has saved itself; the message is the reason."""


class Diverged(Exception):
    """The loss or its gradient is not finite; the message names the update."""


def test_batch_size(device: torch.device, side: int) -> int:
    """Samples of a test batch of images of side x side pixels."""
    if device.type != "cuda":
        return TEST_BATCH
    return max(TEST_BATCH, TEST_BATCH_CUDA * 32**2 // side**2)


def check_standing(state: dict[str, Any], images: int, epochs: int) -> None:
    """Raises ValueError where what a checkpoint says of its place in the run is nothing that a run
    has saved."""
    most = {"epoch": epochs, "update": math.inf, "samples": math.inf}
    places = [(name, state[name], limit) for name, limit in most.items()]
    places.append(("eval_chunk", state["eval_chunk"], math.inf))
    places += [
        (name, state["data"][name], limit)
        for name, limit in (("epoch", epochs), ("cursor", images))
    ]
    places.append(("first_epoch", state["data"].get("first_epoch", 0), math.inf))
    for name, value, limit in places:
        if type(value) is not int or not 0 <= value <= limit:
            raise ValueError(f"its {name} is {value!r}")
    if not isinstance(state["best_test_acc"], float | None) or not isinstance(
        state["last_epoch"], dict
    ):
        raise ValueError("its last epoch is none")
    best = state["best_epoch"]
    if best is not None and (type(best) is not int or not 0 <= best < max(state["epoch"], 1)):
        raise ValueError(f"its best epoch is {best!r}")


def train(run: Run) -> None:
    """From where the run stands to its end, or until an instrument has enough."""
    for point in run.epochs_left():
        with run.clock.measure("train"):
            for batch in run.batches_left():
                point = run.at_update(point)
                run.before_gradient(batch, point)
                if run.enough():
                    return
                with run.compiling():
                    run.advance(batch, point)
                run.count(point)
                run.after_update(point)
                if run.enough():
                    return
        run.end_epoch(point)


@dataclass
class Run:
    """The parts of a run, and where it stands: everything below `epoch` is in its checkpoints."""

    plan: Plan
    data: Data
    model: torch.nn.Module
    step: Step
    device: torch.device
    folder: RunFolder | Unwritten
    checkpoints: Checkpoints
    trackers: Trackers
    clock: Clock
    progress: Progress = field(init=False)  # once it is known where the run goes on
    stop_asked: Callable[[], int] = lambda: 0  # a signal's number, OUT_OF_TIME, or 0
    begun: bool = False  # or it was refused, and its folder is as it was
    ranks: Ranks = field(default_factory=Ranks)
    instruments: list[Instrument] = field(default_factory=list)
    # what the bits depend on besides the flags
    made_with: dict[str, Any] = field(default_factory=dict)
    recorder: Recorder | None = None  # of updates that are captured
    ema: Ema | None = None  # the average of the weights, where there is one
    # what is said of its weights; the finished run that it is about to go on from
    remarks: list[str] = field(default_factory=list)
    origin: Origin | None = None

    epoch: int = 0
    update: int = 0
    samples: int = 0
    best_test_acc: float | None = None
    best_ema_test_acc: float | None = None
    best_epoch: int | None = None  # the first one that had it
    last_epoch: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def schedule(self) -> Schedule:
        return self.plan.schedule

    @property
    def data_epoch(self) -> int:
        """The number of this epoch by which random numbers of the images are drawn: that of the
        epochs of all runs that this one goes on from."""
        return self.stream.first_epoch + self.epoch

    def __post_init__(self) -> None:
        c = self.config
        self.updates = Update(self.step, self.device, self.instruments, self.ema)
        self.keeper = Keeper(c.keep, c.model, self.folder.path, self.model, self.ema, self.ranks)
        self.kept = self.updates.kept
        self.meter, self.window = self.updates.meter, self.updates.window
        strict = c.graphs == "on"
        least, largest = (LEAST_ASKED, self.plan.images) if strict else (LEAST, LARGEST)
        kinds: set[Kind] = set()
        if self.recorder:
            kinds = {Kind(size, False) for size in self.plan.lasting(least, largest)}
            for every in {i.norms_every for i in self.instruments} - {0}:
                sizes = self.plan.lasting(least * every, largest)
                kinds |= {Kind(size, True) for size in sizes}
        world = self.ranks.world
        self.graphs = Graphs(
            self.updates, frozenset(kinds), world, self.recorder, strict, self.clock
        )
        self.pace = Pace(self.device)
        place = {"rank": self.ranks.rank, "world": self.ranks.world}
        data = self.data
        self.stream = Stream(data.train, c.seed, c.epochs, data.fingerprint, c.drop_last, **place)
        self.eval_chunk = EVAL_CHUNK[self.device.type]
        self.epoch_seconds_before = 0.0  # of this epoch, spent by an earlier process
        self.train_seconds = 0.0  # of this process, in epochs that are done
        self.recent: float | None = None
        self.due: list[Instrument] = []  # of the instruments, for the batch at hand
        # those that had their turn when a later one was asked to stop, and the batch comes again
        self.asked: list[str] = []

    # What the loop asks of it, in its order

    def epochs_left(self) -> Iterator[Point]:
        """Every epoch that is still to be trained, by the Point in force: the optimizer, the
        images and the log go by it."""
        while self.epoch < self.plan.config.epochs and not (
            self.enough() or self.out_of_patience()
        ):
            # that of the update before, the last of the epoch where only its test is left to do
            point = self.plan.point(self.epoch, max(self.update - 1, 0))
            self.step.optimizer.set_point(point)
            yield point

    def place(self, behind: int = 0) -> Place:
        """Where the run stands, so many samples before the end of what the stream has given."""
        cursor = self.stream.cursor - behind
        return Place(self.epoch, self.update, self.samples, cursor, self.plan.images)

    def at_update(self, point: Point) -> Point:
        """The Point in force at the update to come, where `point` was at the one before it."""
        if self.plan.moves(self.update):
            point = self.plan.at(self.place(behind=self.stream.size))
            self.step.optimizer.set_point(point)
        return point

    def batches_left(self) -> Iterator[Batch]:
        """The batch of every update of the epoch that is still to be done, until --budget is used
        up. With several processes this one's share of it may be empty."""
        if self.spent():
            return
        size_at = self.plan.schedule.batch_at
        self.stream.batch_size = size_at(self.place())
        for batch in self.stream.batches():
            yield batch
            if self.spent():
                return
            if self.plan.schedule.batch_moves:
                self.stream.batch_size = size_at(self.place())

    def spent(self) -> bool:
        return self.plan.spent(self.update, self.samples)

    def enough(self) -> bool:
        """Whether an instrument has all that it wanted."""
        return any(instrument.enough() for instrument in self.instruments)

    def out_of_patience(self) -> bool:
        """Whether --patience epochs have gone by without a better test accuracy than the best."""
        patience = self.plan.config.patience
        if patience is None or self.best_epoch is None:
            return False
        return self.epoch - self.best_epoch > patience

    def before_gradient(self, batch: Batch, point: Point) -> None:
        """Measure what falls due before the gradient of the batch is taken, for which `point` is in
        force.

        Raises Diverged where a gradient is not finite, Preempted where the run is asked to stop,
        and DataError where an image cannot be read.
        """
        self.due = [instrument for instrument in self.instruments if instrument.due(self)]
        for instrument in self.due:
            if instrument.name in self.asked or instrument.falls_out(self):
                continue
            try:
                values = instrument.before_gradient(self, *batch.images(), point)
            except Asked as stop:
                self.stream.cursor -= self.stream.size  # this batch comes again
                self.checkpoints.saved = None  # one of this update lacks what is measured by now
                self.stop(stop.number)
            except FloatingPointError as error:
                raise Diverged(
                    f"{error} at update {self.update + 1} (epoch {self.epoch}): lower --lr"
                ) from None
            self.measured(instrument, point, values)
            self.asked.append(instrument.name)
        self.asked = []

    def advance(self, batch: Batch, point: Point) -> None:
        """The update of a batch, as it is or played again; instruments that are due may look at its
        gradient in between. Raises DataError where an image cannot be read."""
        due = [i for i in self.due if i.wants_gradient]

        def before_update() -> None:
            self.step.show_gradient()
            for instrument in due:
                values = instrument.before_update(self, *batch.images(), point)
                self.measured(instrument, point, values)

        if self.step.mixer is not None:
            place = self.stream.cursor - self.stream.size
            self.step.mixer.draw(self.data_epoch, place, self.plan.sizes(self.epoch))
        measured = any(i.norms_every for i in self.due)
        self.graphs(batch, before_update if due else None, measured)

    def count(self, point: Point) -> None:
        """One more update is done: measure what is of every one."""
        self.samples += self.stream.size
        self.update += 1
        for instrument in self.instruments:
            self.measured(instrument, point, instrument.after_update(self, point))

    def measured(self, instrument: Instrument, point: Point, values: Values | None) -> None:
        """Write what an instrument has found, where it has."""
        if values is not None:
            self.row("measure", point, {"precision": self.step.measures_in} | values)
            self.write_files(instrument)

    def write_files(self, instrument: Instrument) -> None:
        for name, content in instrument.files(self).items():
            self.folder.write(name, content)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Around an update: the first one of --compile is no part of the speed."""
        if not self.step.compile or self.step.compiled_graphs:
            yield
            return
        with self.clock.measure("compile"):
            yield
        self.progress.restart_clock(self.samples + self.stream.size)

    def after_update(self, point: Point) -> None:
        """Log, save when due, and stop when asked."""
        self.pace.keep(self.update)
        if self.update % self.config.log_every == 0:
            self.log_step(point)
        self.progress.update(self.samples, self.epoch, point, self.recent)
        # on a GPU bad_seen is late by the updates that the host is ahead
        asked = self.ranks.vote(NOT_FINITE if int(self.updates.bad_seen) else self.stop_asked())
        if asked:
            self.stop(asked)
        if self.config.checkpoint_every and self.update % self.config.checkpoint_every == 0:
            self.save()

    def stop(self, asked: int) -> NoReturn:
        self.save(final=True)  # which refuses what is not finite
        self.keeper.last({"epoch": self.epoch, "step": self.update}, final=False)
        raise Preempted("--max-time" if asked == OUT_OF_TIME else signal.Signals(asked).name)

    def log_step(self, point: Point) -> None:
        self.check_finite()
        loss, accuracy = self.window.means()
        self.window.reset()
        self.recent = loss
        seconds = self.clock.read("train") + self.clock.read("eval")
        grad_norm, direction_norm = self.kept.squared_norms.sqrt().tolist()
        values = {
            "train_loss": loss,
            "train_acc": accuracy,
            "grad_norm": grad_norm,
            "direction_norm": direction_norm,
        }
        self.row("step", point, values | {"seconds": round(seconds, 3)})

    def end_epoch(self, point: Point) -> None:
        """Evaluate, write the epoch's row, save."""
        self.check_finite()
        train_loss, train_acc = self.meter.means()
        samples = self.meter.count
        evaluated = self.clock.read("eval")
        with self.clock.measure("eval"):
            tested = self.step.evaluate(self.test_batches())
            averaged = self.tested_average()
        test_loss, test_acc, _ = tested
        if not math.isfinite(test_loss):
            raise Diverged(f"the test loss is not finite after update {self.update}")
        train_seconds = self.clock.read("train") + self.epoch_seconds_before
        values = {
            "train_loss": train_loss,
            "train_acc": train_acc,
            "test_loss": test_loss,
            "test_acc": test_acc,
            **more_of(tested, averaged),
            "c2_sampled": None,
            "precision": self.step.precision,
            "train_seconds": round(train_seconds, 3),
            "eval_seconds": round(self.clock.read("eval") - evaluated, 3),
            "images_per_second": round(samples / max(train_seconds, 1e-9), 1),
        }
        if self.plan.sizes.changes:
            values["image_size"] = self.plan.sizes(self.epoch)
        for instrument in self.instruments:
            values |= instrument.end_epoch()
        self.last_epoch = self.row("epoch", point, values)
        self.progress.epoch(self.last_epoch)
        self.keeper.after_epoch(self.last_epoch, self.best_test_acc, self.best_ema_test_acc)
        if self.best_test_acc is None or test_acc > self.best_test_acc:
            self.best_test_acc, self.best_epoch = test_acc, self.epoch
        if averaged is not None:
            self.best_ema_test_acc = max(averaged.accuracy, self.best_ema_test_acc or 0.0)
        self.meter.reset()
        self.train_seconds += self.clock.read("train")
        self.clock.seconds["train"] = self.epoch_seconds_before = 0.0
        self.epoch += 1
        last = self.epoch == self.plan.config.epochs or self.out_of_patience()
        if last or not self.config.checkpoint_every:
            self.save(final=last)

    def tested_average(self) -> Tested | None:
        """What the test images say of the average of the weights, where there is one."""
        if self.ema is None:
            return None
        with self.ema.in_place():
            return self.step.evaluate(self.test_batches())

    def finish(self) -> None:
        """Write the last weights, and what the instruments have found."""
        tested = self.last_epoch.get("step") == self.update
        row = self.last_epoch if tested else {"epoch": self.epoch, "step": self.update}
        self.keeper.last(row, final=True)
        for instrument in self.instruments:
            self.write_files(instrument)

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the test batches: x float32 [B, C, S, S], y int64 [B]."""
        # the published ImageNet code tests on the training view
        augmented = self.config.compat == "original" and self.config.dataset == "imagenet"
        size = test_batch_size(self.device, self.data.size)
        batches = itertools.islice(
            in_order(len(self.data.test), size), self.ranks.rank, None, self.ranks.world
        )
        return self.data.test.batches(batches, self.data_epoch if augmented else None)

    def row(self, kind: str, point: Point, values: dict[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {"epoch": self.epoch, "step": self.update, "samples": self.samples}
        momentum = None if self.config.foreign else point.momentum  # which is its own affair
        row |= {"lr": point.lr, "batch_size": point.batch_size, "momentum": momentum}
        row |= {} if point.nu is None else {"nu": point.nu}
        row |= {"delta": self.plan.delta(point)} | values
        self.folder.row(kind, row)
        self.trackers.row(kind, row)
        return row

    def check_finite(self) -> None:
        bad = self.kept.bad_update.item()
        if bad:
            raise Diverged(
                f"the loss or its gradient is not finite at update {bad} (epoch {self.epoch}): "
                "lower --lr"
            )

    # Saving and going on

    def save(self, final: bool = False) -> None:
        """Checkpoint the present update.

        Where the disk is full, the run warns and goes on without this checkpoint; the `final` one
        raises CannotWrite.
        """
        self.check_finite()
        state, failed = self.state(), None
        if self.ranks.leader:
            try:
                self.checkpoints.save(self.update, state)
            except OSError as error:
                failed = error
                if not final:
                    warn(
                        f"no checkpoint at update {self.update} ({error.strerror}): the one before "
                        "stays, the run goes on"
                    )
        reason = self.ranks.from_leader(failed and failed.strerror)
        if reason and final:
            raise CannotWrite(
                failed.errno if failed else 0, reason, str(self.checkpoints.directory)
            ) from failed

    def state(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "format": FORMAT,
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "epoch": self.epoch,
            "data": self.stream.state_dict(),
            "update": self.update,
            "samples": self.samples,
            "best_test_acc": self.best_test_acc,
            "best_epoch": self.best_epoch,
            "last_epoch": self.last_epoch,
            "meter": self.meter.state_dict(),
            "window": self.window.state_dict(),
            "instruments": {i.name: i.state_dict() for i in self.instruments},
            "asked": self.asked,
            "rng": self.ranks.gather(
                (torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None)
            ),
            "metrics_bytes": self.folder.sync(),
            "made_with": self.made_with,
            "eval_chunk": self.eval_chunk,
            "epoch_seconds": self.clock.read("train") + self.epoch_seconds_before,
            **self.state_of_average(),
        }

    def state_of_average(self) -> dict[str, Any]:
        if self.ema is None:
            return {}
        return {"ema": self.ema.state_dict(), "best_ema_test_acc": self.best_ema_test_acc}

    def restore(self, state: dict[str, Any]) -> None:
        """Stand where `state` was saved. Raises DataError where that was with other images."""
        check_standing(state, self.plan.images, self.config.epochs)
        self.stream.load_state_dict(state["data"])
        self.model.load_state_dict(state["model"])
        self.step.optimizer.load_state_dict(state["optimizer"])
        names = ("epoch", "update", "samples", "best_test_acc", "best_epoch", "last_epoch", "asked")
        for name in names:
            setattr(self, name, state[name])
        self.meter.load_state_dict(state["meter"])
        self.window.load_state_dict(state["window"])
        self.kept.updates.fill_(self.update)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.best_ema_test_acc = state["best_ema_test_acc"]
            if not isinstance(self.best_ema_test_acc, float | None):
                raise ValueError("its best accuracy of the averaged weights is none")
        for instrument in self.instruments:
            instrument.load_state_dict(state["instruments"][instrument.name])
        # a process that joins later begins with the numbers of its own seed
        if self.ranks.rank < len(state["rng"]):
            rng, cuda_rng = state["rng"][self.ranks.rank]
            torch.set_rng_state(rng)
            if cuda_rng is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(cuda_rng, self.device)
        self.eval_chunk = max(state["eval_chunk"], 1)
        self.epoch_seconds_before = state["epoch_seconds"]

    def summary(self) -> dict[str, Any]:
        return {
            "final_test_acc": self.last_epoch.get("test_acc"),
            "final_test_loss": self.last_epoch.get("test_loss"),
            "best_test_acc": self.best_test_acc,
            "best_epoch": self.best_epoch,
            **self.summary_of_more(),
            "epochs": self.epoch,
            "updates": self.update,
            "samples": self.samples,
            "compiled_graphs": self.step.compiled_graphs,
            "captured_graphs": self.graphs.captured,
            "bad_images": len(set().union(*self.ranks.gather(sorted(self.data.bad.reasons)))),
        }

    def summary_of_more(self) -> dict[str, Any]:
        """Of what --top5 and --ema add to the rows of epochs."""
        last = self.last_epoch
        found = {f"final_{name}": last[name] for name in MORE if name in last}
        return found | ({"best_ema_test_acc": self.best_ema_test_acc} if self.ema else {})


# What an epoch's row has of --top5 and --ema.
MORE = ("test_top5", "ema_test_acc", "ema_test_loss", "ema_test_top5")


def more_of(tested: Tested, averaged: Tested | None) -> dict[str, Any]:
    """These columns; none of a flag that is off."""
    values = [tested.top5]
    values += [averaged.accuracy, averaged.loss, averaged.top5] if averaged else [None] * 3
    return {name: v for name, v in zip(MORE, values, strict=True) if v is not None}
