"""A run and its updates: batch after batch, logged, saved and stopped."""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsmooth.cli.config import Config
from fastsmooth.cli.progress import Progress
from fastsmooth.data import Data, Stream
from fastsmooth.data.order import in_order, subset
from fastsmooth.kernels.backend import wide_dtype
from fastsmooth.messages import CannotWrite, warn
from fastsmooth.noise import gradients, threshold
from fastsmooth.noise.online import NoiseTracker
from fastsmooth.ranks import Ranks
from fastsmooth.runfolder.checkpoint import Checkpoints
from fastsmooth.runfolder.tracker import Tracker
from fastsmooth.runfolder.write import RunFolder, Unwritten
from fastsmooth.schedule import Point, Schedule
from fastsmooth.training.clock import Clock
from fastsmooth.training.step import Step

TEST_BATCH = 250
# Samples a chunk of the full gradient in eval mode, where chunks change time and memory alone. On a
# CPU no size from 100 to 1000 was faster than another beyond the noise (resnet20); a GPU starts
# with many, halved until they fit in its memory.
EVAL_CHUNK = {"cpu": 250, "cuda": 1000, "mps": 250}
OUT_OF_TIME, NOT_FINITE = 254, 255  # reasons to stop, beside the numbers of signals


class Preempted(Exception):
    """The run was asked to stop and has saved itself; the message is the reason."""


class Asked(Exception):
    """A measurement was asked to stop, by a signal's number or OUT_OF_TIME."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Diverged(Exception):
    """The loss or its gradient is not finite; the message names the update."""


class Meter:
    """Loss and accuracy over samples, summed on the device, and the first update whose loss was not
    finite."""

    def __init__(self, device: torch.device):
        self.loss = torch.zeros((), dtype=wide_dtype(device), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.count = 0

    def add(self, loss: Tensor, correct: Tensor, count: int) -> None:
        self.loss += loss.to(self.loss.dtype) * count
        self.correct += correct
        self.count += count

    def means(self) -> tuple[float, float]:
        """(mean loss, accuracy); waits for the device."""
        count = max(self.count, 1)
        return self.loss.item() / count, self.correct.item() / count

    def reset(self) -> None:
        self.loss.zero_()
        self.correct.zero_()
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "correct": self.correct, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.copy_(state["loss"])
        self.correct.copy_(state["correct"])
        self.count = state["count"]


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
    for name, value, limit in places:
        if type(value) is not int or not 0 <= value <= limit:
            raise ValueError(f"its {name} is {value!r}")
    if not isinstance(state["best_test_acc"], float | None) or not isinstance(
        state["last_epoch"], dict
    ):
        raise ValueError("its last epoch is none")


@dataclass
class Run:
    """The parts of a run, and where it stands: everything below `epoch` is in its checkpoints."""

    config: Config
    schedule: Schedule
    data: Data
    model: torch.nn.Module
    step: Step
    device: torch.device
    folder: RunFolder | Unwritten
    checkpoints: Checkpoints
    tracker: Tracker
    clock: Clock
    progress: Progress | None = None
    stop_asked: Callable[[], int] = lambda: 0  # a signal's number, OUT_OF_TIME, or 0
    begun: bool = False  # or it was refused, and its folder is as it was
    ranks: Ranks = field(default_factory=Ranks)

    epoch: int = 0
    update: int = 0
    samples: int = 0
    best_test_acc: float | None = None
    last_epoch: dict[str, Any] = field(default_factory=dict)
    enough: bool = False  # a mode has what it wanted: no update comes after this one
    record: threshold.NormRecord | None = None
    noise: NoiseTracker | None = None
    # what the bits depend on besides the flags
    made_with: dict[str, Any] = field(default_factory=dict)
    noise_points: list[dict[str, Any]] = field(default_factory=list)  # the points of noise.json

    def __post_init__(self) -> None:
        self.meter, self.window = Meter(self.device), Meter(self.device)
        self.bad_update = torch.zeros((), dtype=torch.int64, device=self.device)
        self.bad_seen = torch.zeros((), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        c = self.config
        place = {"rank": self.ranks.rank, "world": self.ranks.world}
        data = self.data
        self.stream = Stream(
            data.train, c.seed, self.schedule.epochs, data.fingerprint, c.drop_last, **place
        )
        self.eval_chunk = EVAL_CHUNK[self.device.type]
        self.epoch_seconds_before = 0.0  # of this epoch, spent by an earlier process
        self.train_seconds = 0.0  # of this process, in epochs that are done
        self.recent: float | None = None

    # The loop that all modes share

    def updates(self) -> Iterator[tuple[Tensor, Tensor, Point]]:
        """(x, y, point) of every update still to be done; the caller computes the gradient and
        applies it.

        With several processes x and y are this one's share of a batch of stream.size samples, and
        may be empty. When the caller comes back for more, the update counts as done: it is logged,
        saved when due, and stopped after when asked. A finished epoch is evaluated.
        """
        while self.epoch < self.schedule.epochs and not self.enough:
            point = self.schedule(self.epoch)
            self.step.optimizer.set_point(point)
            self.stream.batch_size = point.batch_size
            with self.clock.measure("train"):
                for x, y in () if self.spent() else self.stream.rest_of_epoch():
                    if self.noise is not None and self.noise.due(
                        self.update, self.epoch, self.stream.size
                    ):
                        self.track(x, y, point)
                    if self.step.compile and not self.step.compiled_graphs:
                        with self.clock.measure("compile"):
                            yield x, y, point
                        self.progress.restart_clock(self.samples + self.stream.size)
                    else:
                        yield x, y, point
                    self.samples += self.stream.size
                    self.update += 1
                    self.after_update(point)
                    if self.enough:
                        return
                    if self.spent():
                        break
            self.end_epoch(point)

    def spent(self) -> bool:
        """Whether the --budget is used up, which ends the last epoch early."""
        unit, amount = self.config.limit or ("", 0)
        done = {"updates": self.update, "samples": self.samples}
        return unit in done and done[unit] >= amount

    def gradient(self, x: Tensor, y: Tensor) -> None:
        """Forward and backward; what they say is kept on the device."""
        self.loss, correct = self.step.gradient(x, y, self.stream.size)
        for meter in (self.meter, self.window):
            meter.add(self.loss, correct, self.stream.size)

    def after_update(self, point: Point) -> None:
        finite = torch.isfinite(self.loss + self.step.optimizer.sq_norms.sum()) | (
            self.bad_update > 0
        )
        self.bad_update = torch.where(finite, self.bad_update, self.update)
        self.bad_seen.copy_(self.bad_update, non_blocking=True)
        if self.update % self.config.log_every == 0:
            self.log_step(point)
        self.progress.update(self.samples, self.epoch, point, self.recent)
        # on a GPU what is seen is some updates old, since nobody waits for it
        asked = self.ranks.vote(NOT_FINITE if int(self.bad_seen) else self.stop_asked())
        if asked:
            self.stop(asked)
        if self.config.checkpoint_every and self.update % self.config.checkpoint_every == 0:
            self.save()

    def stop(self, asked: int) -> None:
        self.save(final=True)  # which refuses what is not finite
        raise Preempted("--max-time" if asked == OUT_OF_TIME else signal.Signals(asked).name)

    def log_step(self, point: Point) -> None:
        self.check_finite()
        loss, accuracy = self.window.means()
        self.window.reset()
        self.recent = loss
        seconds = self.clock.read("train") + self.clock.read("eval")
        grad_norm, direction_norm = self.step.optimizer.sq_norms.sqrt().tolist()
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
        evaluated = self.clock.read("eval")
        with self.clock.measure("eval"):
            test_loss, test_acc = self.step.evaluate(self.test_batches())
        if not math.isfinite(test_loss):
            raise Diverged(f"the test loss is not finite after update {self.update}")
        train_seconds = self.clock.read("train") + self.epoch_seconds_before
        values = {
            "train_loss": train_loss,
            "train_acc": train_acc,
            "test_loss": test_loss,
            "test_acc": test_acc,
            "c2_sampled": self.noise.end_epoch() if self.noise else None,
            "train_seconds": round(train_seconds, 3),
            "eval_seconds": round(self.clock.read("eval") - evaluated, 3),
            "images_per_second": round(self.meter.count / max(train_seconds, 1e-9), 1),
        }
        self.last_epoch = self.row("epoch", point, values)
        self.progress.epoch(self.last_epoch)
        self.best_test_acc = max(test_acc, self.best_test_acc or 0.0)
        self.meter.reset()
        self.train_seconds += self.clock.read("train")
        self.clock.seconds["train"] = self.epoch_seconds_before = 0.0
        self.epoch += 1
        if self.epoch == self.schedule.epochs or not self.config.checkpoint_every:
            self.save(final=self.epoch == self.schedule.epochs)

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        # the published ImageNet code tests on the training view
        augmented = self.config.compat == "original" and self.config.dataset == "imagenet"
        batches = itertools.islice(
            in_order(len(self.data.test), TEST_BATCH), self.ranks.rank, None, self.ranks.world
        )
        return self.data.test.batches(batches, self.epoch if augmented else None)

    def row(self, kind: str, point: Point, values: dict[str, Any]) -> dict[str, Any]:
        row = {"epoch": self.epoch, "step": self.update, "samples": self.samples}
        row |= {"lr": point.lr, "batch_size": point.batch_size, "momentum": point.momentum}
        row |= {"delta": self.schedule.delta(point)} | values
        self.folder.row(kind, row)
        self.tracker.row(kind, row)
        return row

    def check_finite(self) -> None:
        bad = self.bad_update.item()
        if bad:
            raise Diverged(
                f"the loss or its gradient is not finite at update {bad} (epoch {self.epoch}): "
                "lower --lr"
            )

    # Saving and going on

    def save(self, final: bool = False) -> None:
        """Checkpoint the present update. A disk that is full costs a warning, at the end of a run
        the run."""
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
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "epoch": self.epoch,
            "data": self.stream.state_dict(),
            "update": self.update,
            "samples": self.samples,
            "best_test_acc": self.best_test_acc,
            "last_epoch": self.last_epoch,
            "meter": self.meter.state_dict(),
            "window": self.window.state_dict(),
            "enough": self.enough,
            "record": self.record.state_dict() if self.record else None,
            "noise_points": self.noise_points,
            "noise": self.noise.state_dict() if self.noise else None,
            "rng": self.ranks.gather(
                (torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None)
            ),
            "metrics_bytes": self.folder.sync(),
            "made_with": self.made_with,
            "eval_chunk": self.eval_chunk,
            "epoch_seconds": self.clock.read("train") + self.epoch_seconds_before,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Stand where `state` was saved. Raises DataError where that was with other images."""
        check_standing(state, len(self.data.train), self.schedule.epochs)
        self.stream.load_state_dict(state["data"])
        self.model.load_state_dict(state["model"])
        self.step.optimizer.load_state_dict(state["optimizer"])
        for name in (
            "epoch",
            "update",
            "samples",
            "best_test_acc",
            "last_epoch",
            "enough",
            "noise_points",
        ):
            setattr(self, name, state[name])
        self.meter.load_state_dict(state["meter"])
        self.window.load_state_dict(state["window"])
        if self.record is not None:
            self.record.load_state_dict(state["record"])
        if self.noise is not None:
            self.noise.load_state_dict(state["noise"])
        # a process that joins later begins with the numbers of its own seed
        if self.ranks.rank < len(state["rng"]):
            rng, cuda_rng = state["rng"][self.ranks.rank]
            torch.set_rng_state(rng)
            if cuda_rng is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(cuda_rng, self.device)
        self.eval_chunk = max(state["eval_chunk"], 1)
        self.epoch_seconds_before = state["epoch_seconds"]

    # Measuring

    def track(self, x: Tensor, y: Tensor, point: Point) -> None:
        """Measure the noise of the batch that comes next; training does not notice."""
        before = self.clock.read("track")
        with self.clock.measure("track"):
            try:
                values = self.noise.measure(x, y, point, self.update, self.epoch, self.stream.size)
            except FloatingPointError as error:
                raise Diverged(
                    f"{error} at update {self.update + 1} (epoch {self.epoch}): lower --lr"
                ) from None
        self.row(
            "measure", point, values | {"seconds": round(self.clock.read("track") - before, 3)}
        )

    def point_after(self, updates: int) -> Point:
        """The Point in force at the update that comes so many updates later."""
        return self.schedule(
            self.schedule.epoch_of(
                self.update + updates, len(self.data.train), self.config.drop_last
            )
        )

    @contextmanager
    def ahead(self, updates: int, history: int) -> Iterator[None]:
        """Inside, the run stands so many updates later, at the end of a history of its own;
        afterwards where it stood.

        History 0 sees the batches that the run itself will see, the others draw theirs from what
        the epoch has left. Call it before an update. Dropout draws numbers of the history's own.
        """
        stood = self.epoch, self.update
        stream = self.stream.branch(self.update, history)
        try:
            with (
                gradients.unmoved(self.model, self.step.optimizer),
                gradients.undisturbed(self.model, "train"),
            ):
                if history:
                    torch.manual_seed(
                        history_seed(self.config.seed, self.update, history, self.ranks)
                    )
                self._follow(stream, updates)
                self.update += updates
                self.epoch = self.schedule.epoch_of(
                    self.update, len(self.data.train), self.config.drop_last
                )
                point = self.schedule(self.epoch)
                self.step.optimizer.set_point(point)
                yield
        finally:
            stream.close()
            self.epoch, self.update = stood

    def _follow(self, stream: Stream, updates: int) -> None:
        """Do so many updates on the batches of a stream, and nothing else that a run does."""
        done = 0
        while done < updates:
            point = self.schedule(stream.epoch)
            self.step.optimizer.set_point(point)
            stream.batch_size = point.batch_size
            for x, y in stream.rest_of_epoch():
                self.heed()
                self.step.gradient(x, y, stream.size)
                self.step.update()
                done += 1
                if done == updates:
                    break

    def heed(self) -> None:
        """Raises Asked where the run is asked to stop: a measurement may take as long as many
        updates."""
        asked = self.ranks.vote(self.stop_asked())
        if asked:
            raise Asked(asked)

    def heeding(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, between which a single process may be asked to stop; several may have
        unequal numbers of them."""
        for batch in batches:
            if self.ranks.world == 1:
                self.heed()
            yield batch

    def stop_before_update(self, asked: int) -> None:
        """Save the run as it stands before the update whose batch is drawn, and raise Preempted."""
        self.stream.cursor -= self.stream.size
        self.stop(asked)

    def measured_epoch(self) -> int | None:
        """The augmentation under which is measured: none, or this epoch's own numbers, a fixed
        function of x either way."""
        return self.epoch if self.config.measure_augment else None

    def chunk(self, point: Point) -> int:
        """Samples a chunk of the full gradient: in train mode the batch size, which is part of what
        is measured."""
        return point.batch_size if self.config.bn == "train" else self.eval_chunk

    def pieces(self, index: Tensor) -> list[Tensor]:
        """This process's share of a batch or chunk, in what goes through the model together."""
        own = self.ranks.share(index)
        if len(own) == 0 and not self.step.joined:
            return []
        return list(own.split(self.config.micro_batch or max(len(own), 1)))

    def full_gradient(self, point: Point) -> list[Tensor]:
        """grad f at the present parameters, the same on every process; call it inside
        measure.undisturbed.

        In eval mode a chunk that does not fit in the GPU's memory is halved, once for the whole
        run.
        """
        n = len(self.data.train)
        order = subset(
            self.config.seed, self.update, gradients.FULL_GRADIENT_DRAW, n, n, str(self.device)
        )
        while True:
            if self.config.bn == "train":
                chunks = [
                    (piece, len(chunk))
                    for chunk in order.split(self.chunk(point))
                    for piece in self.pieces(chunk)
                ]
            else:
                chunks = [
                    (piece, len(piece))
                    for piece in self.ranks.share(order).split(self.chunk(point))
                ]
            batches = self.data.train.batches([piece for piece, _ in chunks], self.measured_epoch())
            try:
                total = gradients.full_gradient(
                    self.model,
                    self.heeding(batches),
                    n=n,
                    sizes=[size for _, size in chunks],
                    objective=self.step.measured_loss,
                )
                break
            except torch.OutOfMemoryError:
                if self.config.bn == "train" or self.eval_chunk == 1:
                    raise
                self.eval_chunk //= 2
        self.ranks.sum_(total)
        return total

    def drawn_gradient(self, draw: int, point: Point) -> list[Tensor]:
        """The gradient of a mini-batch drawn at the present parameters, the same on every
        process."""
        size = point.batch_size
        index = subset(
            self.config.seed, self.update, draw, len(self.data.train), size, str(self.device)
        )
        total: list[Tensor] = []
        for x, y in self.data.train.batches(self.pieces(index), self.measured_epoch()):
            grads = gradients.batch_gradient(
                self.model, x, y, self.step.measured_loss, len(y) / size
            )
            if total:
                torch._foreach_add_(total, grads)
            total = total or grads
        self.ranks.sum_(total)
        return total

    def summary(self) -> dict[str, Any]:
        return {
            "final_test_acc": self.last_epoch.get("test_acc"),
            "final_test_loss": self.last_epoch.get("test_loss"),
            "best_test_acc": self.best_test_acc,
            "epochs": self.epoch,
            "updates": self.update,
            "samples": self.samples,
            "compiled_graphs": self.step.compiled_graphs,
            "bad_images": len(set().union(*self.ranks.gather(sorted(self.data.bad.reasons)))),
        }


def history_seed(seed: int, update: int, history: int, ranks: Ranks) -> int:
    """That of a history's dropout: another one for each history of each process."""
    return (seed + update + (history * ranks.world + ranks.rank) * 0x9E3779B97F4A7C15) % 2**63
