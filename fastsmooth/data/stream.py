"""The training batches in order, of a size that may change between any two of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from fastsmooth.data.chunks import Loader, Reader, Segment
from fastsmooth.data.images import DataError
from fastsmooth.data.order import permutation, reordered


class Stream:
    """Epoch after epoch of a loader's samples. Its whole state is (seed, epoch, cursor), the cursor
    in samples.

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
        self.epoch = self.cursor = 0
        # global; assign it before the first batch, and again whenever it changes
        self.batch_size = 0
        self.size = 0  # of the batch given last, all ranks together
        self.order: Callable[[int], Tensor] = lambda epoch: permutation(seed, epoch, len(loader))
        self._reader: Reader | None = None

    def rest_of_epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, y) of every batch from the cursor to the end of the epoch, the last one partial
        unless it is dropped.

        x is float32 [share of B, 3, size, size], y int64. The cursor stands behind a batch as soon
        as it is given, and at the beginning of the next epoch after the last. Raises DataError with
        the file's name where one cannot be read.
        """
        n = len(self.loader)
        while self.cursor < n - (self.batch_size - 1 if self.drop_last else 0):
            if self._reader is None:
                self._reader = self.loader.reader(self._segments())
            end = min(self.cursor + self.batch_size, n)
            batch = self._reader.take(self._share(end) - self._share(self.cursor))
            self.size, self.cursor = end - self.cursor, end
            yield batch
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

    def _segments(self) -> Iterator[Segment]:
        """This rank's share of every epoch still to come."""
        start = self._share(self.cursor)
        for epoch in range(self.epoch, self.epochs):
            yield Segment(self.order(epoch)[self.rank :: self.world], epoch, start)
            start = 0
