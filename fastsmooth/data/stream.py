"""The training batches in order, of a size that may change between any two of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastsmooth.data.chunks import Images, Loader, Reader, Segment
from fastsmooth.data.images import DataError
from fastsmooth.data.order import permutation, reordered


class Batch:
    """One process's share of a batch, whose images are made where they are asked for.

    count: samples of the share; size: of the batch, all processes together. `reader` stands before
    them until they are asked for, or passed over.
    """

    def __init__(self, reader: Reader, count: int, size: int):
        self.reader, self.count, self.size = reader, count, size
        self._images: Images | None = None

    def images(self) -> Images:
        """x float32 [count, C, S, S] and y int64 [count]; the same tensors whenever it is asked.
        Raises DataError with the file's name where an image cannot be read."""
        if self._images is None:
            self._images = self.reader.take(self.count)
        return self._images

    @property
    def cursor(self) -> Tensor | None:
        """Where the images begin, int64 0-d on the device, if that is where they lie; whoever asks
        for them `ahead` moves it on."""
        return self.reader.cursor

    def ahead(self, dtype: torch.dtype) -> Images:
        """As `images`, x in this dtype, float32 or bfloat16: at the cursor, where there is one."""
        if self.cursor is not None:
            return self.reader.ahead(self.count, dtype)
        images = self.reader.room(self.count, dtype)
        self.put(images)
        return images

    def put(self, into: Images) -> None:
        """Write the images into x [count, C, S, S], float32 or bfloat16, and y [count]."""
        if self._images is None:
            self._images = self.reader.take(self.count, into)
            return
        for to, held in zip(into, self._images, strict=True):
            to.copy_(held)

    def passed(self) -> None:
        """Nobody will ask any more."""
        if self._images is None:
            self.reader.skip(self.count)


class Stream:
    """Epoch after epoch of a loader's samples. Its whole state is (seed, epoch, cursor), the cursor
    in samples; and `first_epoch`, the number that order and augmentation know its epoch 0 by, which
    is that of the epochs that another run has seen before.

    A global batch of size B is permutation(seed, epoch)[cursor : cursor + B]; rank r of W owns the
    places i of the permutation with i % W == r, and serves its share of the batch. So any batch
    size works on any number of ranks, and what they serve together is the batch, whatever their
    number.
    """

    def __init__(
        self,
        loader: Loader,
        seed: int,
        epochs: int,
        fingerprint: str,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ):
        self.loader, self.seed, self.epochs, self.fingerprint = loader, seed, epochs, fingerprint
        self.drop_last, self.rank, self.world = drop_last, rank, world
        self.epoch = self.cursor = self.first_epoch = 0
        # global; assign it before the first batch, and again whenever it changes
        self.batch_size = 0
        self.size = 0  # of the batch given last, all ranks together
        self.order: Callable[[int], Tensor] = lambda epoch: permutation(
            seed, self.first_epoch + epoch, len(loader)
        )
        self._reader: Reader | None = None

    def rest_of_epoch(self) -> Iterator[Images]:
        """(x, y) of every batch of `batches`: x float32 [share of B, C, size, size], y int64 [share
        of B]. Raises DataError with the file's name where an image cannot be read."""
        for batch in self.batches():
            yield batch.images()

    def batches(self) -> Iterator[Batch]:
        """Every batch from the cursor to the end of the epoch, the last one partial unless it is
        dropped.

        The cursor stands behind a batch as soon as it is given, and at the beginning of the next
        epoch after the last.
        """
        n = len(self.loader)
        while self.cursor < n - (self.batch_size - 1 if self.drop_last else 0):
            if self._reader is None:
                self._reader = self.loader.reader(
                    self._segments(self.epoch, self._share(self.cursor))
                )
            self._reader.begin()
            end = min(self.cursor + self.batch_size, n)
            count = self._share(end) - self._share(self.cursor)
            self.size, self.cursor = end - self.cursor, end
            batch = Batch(self._reader, count, self.size)
            yield batch
            if self._reader is batch.reader:  # not closed meanwhile
                batch.passed()
        self.epoch, self.cursor = self.epoch + 1, 0
        if self._reader is not None:
            self._reader.advance()

    def close(self) -> None:
        """Stop what works ahead; the stream can still go on from where it is."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "cursor": self.cursor,
            "first_epoch": self.first_epoch,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises DataError for another data set or seed."""
        if state["fingerprint"] != self.fingerprint:
            raise DataError("the images are not those the run was started with")
        if state["seed"] != self.seed:
            raise DataError(f"the run was started with --seed {state['seed']}, not {self.seed}")
        self.close()
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self.first_epoch = state.get("first_epoch", 0)

    def branch(self, step: int, history: int) -> Stream:
        """Another stream from the batch given last on, that batch included: update `step` is the
        one it is for.

        What comes is in an order of the history's own; history 0 gives the batches that this stream
        gives.
        """
        order, epoch, start = self.order, self.epoch, self.cursor - self.size
        branch = copy.copy(self)
        branch.cursor, branch._reader = start, None
        branch.order = lambda e: reordered(
            order(e), start * (e == epoch), self.seed, step, history, e - epoch
        )
        return branch

    def _share(self, places: int) -> int:
        """How many of the first `places` of a permutation are this rank's."""
        return max(0, -((self.rank - places) // self.world))

    def _segments(self, first: int, start: int) -> Iterator[Segment]:
        """This rank's share of every epoch from the `first` on, of that one from place `start`."""
        for epoch in range(first, self.epochs):
            own = self.order(epoch)[self.rank :: self.world]
            yield Segment(own, self.first_epoch + epoch, start)
            start = 0
