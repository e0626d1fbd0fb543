"""What an instrument needs of a run: gradients at its present parameters, and its future over again
with other batches.

A measurement may take as long as many updates, so it heeds what asks the run to stop: it raises
Asked, and is made again when the run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastsmooth.data import Stream
from fastsmooth.data.order import subset
from fastsmooth.noise import gradients
from fastsmooth.noise.instrument import Asked
from fastsmooth.places import Place
from fastsmooth.ranks import Ranks
from fastsmooth.schedule import Point
from fastsmooth.training.loop import Run


def point_after(run: Run, updates: int) -> Point:
    """The Point in force at the update that comes so many updates later."""
    update = run.update + updates
    return run.plan.point(run.plan.epoch_of(update), update)


@contextmanager
def ahead(run: Run, updates: int, history: int) -> Iterator[None]:
    """Inside, the run stands so many updates later, at the end of a history of its own;
    afterwards where it stood.

    History 0 sees the batches that the run itself will see, the others draw theirs from what
    the epoch has left. Call it before an update. Dropout draws numbers of the history's own.
    """
    stood = run.epoch, run.update
    stream = run.stream.branch(run.update, history)
    try:
        with (
            gradients.unmoved(run.model, run.step.optimizer),
            gradients.undisturbed(run.model, "train"),
        ):
            if history:
                torch.manual_seed(history_seed(run.config.seed, run.update, history, run.ranks))
            follow(run, stream, updates)
            run.update += updates
            run.epoch = run.plan.epoch_of(run.update)
            run.step.optimizer.set_point(run.plan.point(run.epoch, run.update))
            yield
    finally:
        stream.close()
        run.epoch, run.update = stood


def follow(run: Run, stream: Stream, updates: int) -> None:
    """Do so many updates on the batches of a stream, and nothing else that a run does."""
    plan, done, samples = run.plan, 0, 0

    def place() -> Place:
        return Place(
            stream.epoch, run.update + done, run.samples + samples, stream.cursor, plan.images
        )

    while done < updates:
        here = place()
        run.step.optimizer.set_point(plan.at(here))
        stream.batch_size = plan.schedule.batch_at(here)
        for x, y in stream.rest_of_epoch():
            heed(run)
            if plan.moves(here.update):
                run.step.optimizer.set_point(plan.at(here))
            run.step.gradient(x.to(run.step.dtype), y, stream.size)
            run.step.update()
            done, samples = done + 1, samples + stream.size
            if done == updates:
                break
            here = place()
            if plan.schedule.batch_moves:
                stream.batch_size = plan.schedule.batch_at(here)


def heed(run: Run) -> None:
    """Raises Asked where the run is asked to stop."""
    asked = run.ranks.vote(run.stop_asked())
    if asked:
        raise Asked(asked)


def heeding(run: Run, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches (x [B, C, S, S], y [B]); before each it is seen whether the run shall stop.

    Raises Asked then. Several processes do not look: they may have unequal numbers of batches.
    """
    for batch in batches:
        if run.ranks.world == 1:
            heed(run)
        yield batch


def measured_epoch(run: Run) -> int | None:
    """The epoch whose augmentation is measured; None where images are not augmented.

    Either way the loss is one fixed function of the parameters.
    """
    return run.data_epoch if run.config.measure_augment else None


def chunk_size(run: Run, point: Point) -> int:
    """Samples a chunk of the full gradient: in train mode the batch size, which is part of what
    is measured."""
    return point.batch_size if run.config.bn == "train" else run.eval_chunk


def pieces(run: Run, index: Tensor) -> list[Tensor]:
    """This process's share of a batch or chunk, `index` int64 [B], cut into the parts, int64 [b]
    each, that go through the model together.

    An empty share gives no parts; with SyncBatchNorm, which waits for every process, one empty
    part.
    """
    own = run.ranks.share(index)
    if len(own) == 0 and not run.step.joined:
        return []
    return list(own.split(run.config.samples_at_once or max(len(own), 1)))


def full_gradient(run: Run, point: Point) -> list[Tensor]:
    """grad f at the present parameters, the same on every process.

    A tensor a trainable parameter, in its shape, float64 (float32 on MPS). Call it inside
    gradients.undisturbed. In eval mode a chunk that does not fit in the GPU's memory is halved,
    once for the whole run.

    Raises Asked where the run is asked to stop, and torch.OutOfMemoryError for a chunk of one
    sample, or any in train mode, that does not fit.
    """
    n = run.plan.images
    order = subset(run.config.seed, run.update, gradients.FULL_GRADIENT_DRAW, n, n, str(run.device))
    while True:
        if run.config.bn == "train":
            chunks = [
                (piece, len(chunk))
                for chunk in order.split(chunk_size(run, point))
                for piece in pieces(run, chunk)
            ]
        else:
            chunks = [
                (piece, len(piece))
                for piece in run.ranks.share(order).split(chunk_size(run, point))
            ]
        batches = run.data.train.batches([piece for piece, _ in chunks], measured_epoch(run))
        try:
            total = gradients.full_gradient(
                run.model,
                heeding(run, batches),
                n=n,
                sizes=[size for _, size in chunks],
                objective=run.step.measured_loss,
            )
            break
        except torch.OutOfMemoryError:
            if run.config.bn == "train" or run.eval_chunk == 1:
                raise
            run.eval_chunk //= 2
    run.ranks.sum_(total)
    return total


def drawn_gradient(run: Run, draw: int, point: Point) -> list[Tensor]:
    """The gradient of a mini-batch drawn at the present parameters, the same everywhere.

    The draw is a function of (seed, update, draw). A tensor a trainable parameter, in its shape and
    dtype. Call it inside gradients.undisturbed.
    """
    size = point.batch_size
    index = subset(run.config.seed, run.update, draw, run.plan.images, size, str(run.device))
    total: list[Tensor] = []
    for x, y in run.data.train.batches(pieces(run, index), measured_epoch(run)):
        grads = gradients.batch_gradient(run.model, x, y, run.step.measured_loss, len(y) / size)
        if total:
            torch._foreach_add_(total, grads)
        total = total or grads
    run.ranks.sum_(total)
    return total


def function_measured(run: Run, chunk: int) -> str:
    """In words: the function of the parameters whose full gradient is taken."""
    c = run.config
    images = f"augmented as in the epoch ({c.changes})" if c.measure_augment else "not augmented"
    how, statistics = "evaluation mode", "running statistics"
    if c.bn == "train":
        share = chunk if run.step.joined else -(-chunk // run.ranks.world)
        how = "training mode"
        statistics = (
            f"the statistics of {min(share, c.samples_at_once or share)} samples at a time, in one "
            "order of the images"
        )
    if run.step.normalises_batches:
        how += f": BatchNorm with {statistics}"
    of = " as a function of the trainable parameters" if c.freeze else ""
    return (
        f"mean {c.loss_in_words}{of} over the {run.plan.images:,} training images, {images}; the "
        f"model in {how}"
    )


def history_seed(seed: int, update: int, history: int, ranks: Ranks) -> int:
    """The seed of the dropout in a history: another one for each history of each process."""
    return (seed + update + (history * ranks.world + ranks.rank) * 0x9E3779B97F4A7C15) % 2**63
