"""Batches of any size cut from chunks of one size, which an engine makes ahead of time.

A loader reads segments: sample indices in order, with the epoch whose random numbers augment them.
Its reader gives the next `count` samples of the present segment, so that a new batch size holds
from the next batch on while the engine, DALI's memory included, never sees but one size.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastsmooth.data.changes import Changes, erase
from fastsmooth.kernels.augment import augment


class Segment(NamedTuple):
    """Samples in order, from place `start` on."""

    # int64 [n]
    index: Tensor  # type: ignore[assignment]  # tuple.index gives way: nobody looks values up
    epoch: int | None  # whose random numbers augment them; None: as they are tested
    start: int = 0


class Job(NamedTuple):
    """A chunk to be made. `skip` samples at its beginning are not wanted: chunks begin at the same
    places always."""

    segment: int
    # int64 [m]
    index: Tensor  # type: ignore[assignment]  # as in Segment
    epoch: int | None
    skip: int


class Chunk(NamedTuple):
    """A chunk that is made: uint8 pixels [m, S, S, C] on the CPU or the device, and what is still
    to be done to them."""

    job: Job
    pixels: Tensor
    moves: Tensor | None  # int32 [m, 8] of kernels.augment
    release: Callable[[], None] = lambda: None  # gives the memory back, once it is read
    # on a GPU: passed once the pixels are there; None where they are there already
    ready: torch.cuda.Event | None = None


Chunks = Generator[Chunk, None, None]  # close() ends what makes them


class Engine(Protocol):
    """Makes chunks, in the order of the jobs, several at a time."""

    ahead: bool  # whether it works in a thread of ours, or has processes of its own

    def chunks(self, jobs: Iterator[Job]) -> Chunks: ...


Images = tuple[Tensor, Tensor]  # x [B, C, size, size], normalised, and y int64 [B]


class Reader(Protocol):
    """The samples of some segments, in order."""

    @property
    def loader(self) -> Loader:
        """Whose samples they are."""

    @property
    def cursor(self) -> Tensor | None:
        """Where the next samples begin, int64 0-d on the device, if all of them lie there; whoever
        asks for them `ahead` moves it on."""

    def begin(self) -> None:
        """Stand in the present segment: to be called before its samples are asked for `ahead`."""

    def room(self, count: int, dtype: torch.dtype = torch.float32) -> Images:
        """Memory for the next `count` samples of the present segment, x in this dtype, float32 or
        bfloat16."""
        ...

    def take(self, count: int, into: Images | None = None) -> Images:
        """(x, y) of the next `count` samples of the present segment: float32 [count, C, size, size]
        in channels-last memory, int64 [count]; or written into what `room` gave. Raises DataError
        with the file's name where one cannot be read."""
        ...

    def skip(self, count: int) -> None:
        """Go on by `count` samples of the present segment, which nobody asked for."""

    def ahead(self, count: int, dtype: torch.dtype) -> Images:
        """`count` samples from the cursor on, x in this dtype. Only where there is a cursor."""
        ...

    def advance(self) -> None:
        """Go on to the next segment."""

    def close(self) -> None:
        """Stop what works ahead."""


def normalisation(mean: Sequence[float], std: Sequence[float], device: torch.device) -> Tensor:
    """float32 [C, 256]: what ToTensor and Normalize make of a channel's value, by their own
    operations in their order. `mean` and `std` of values from 0 to 1, one a channel."""
    center, scale = (torch.tensor(v, dtype=torch.float32)[:, None] for v in (mean, std))
    return torch.arange(256, dtype=torch.float32).div(255).sub(center).div(scale).to(device)


def tables(
    mean: Sequence[float], std: Sequence[float], device: torch.device
) -> dict[torch.dtype, Tensor]:
    """`normalisation` by the dtype of the images: [C, 256] each."""
    table = normalisation(mean, std, device)
    return {table.dtype: table, torch.bfloat16: table.bfloat16()}


class Loader:
    """What all loaders have: their length, and passes over given samples."""

    labels: Tensor
    size: int  # pixels a side of images as they are tested
    device: torch.device
    tables: dict[torch.dtype, Tensor]  # of `normalisation`, by the dtype of the images
    changes: Changes | None  # of images in an epoch

    def changes_in(self, epoch: int | None) -> Changes | None:
        """None for images as they are tested."""
        return None if epoch is None else self.changes

    def table(self, dtype: torch.dtype, changes: Changes | None) -> Tensor:
        """What the values of pixels become where they are looked up, [C, 256]: normalised ones, or
        themselves where RandAugment comes first."""
        table = self.tables[dtype]
        if changes is None or not changes.operations:
            return table
        return torch.arange(256, device=table.device).to(dtype).expand_as(table).contiguous()

    def change(
        self, x: Tensor, changes: Changes, epoch: int, index: Tensor, boxes: Tensor | None
    ) -> None:
        """Change x [n, C, S, S], looked up in `table`, in place. RandAugment needs the samples,
        `index` int64 [n], on the CPU; `boxes`, of the samples, are erased."""
        stored = x.permute(0, 2, 3, 1)
        if changes.operations:
            pixels = changes.augmented(x.to(torch.uint8), epoch, index).permute(0, 2, 3, 1)
            augment(pixels.contiguous(), None, None, self.tables[x.dtype], stored)
        if boxes is not None:
            erase(stored, boxes)

    def room(self, count: int, dtype: torch.dtype, size: int) -> Images:
        """Memory for `count` samples of size x size pixels, x in this dtype."""
        shape = count, size, size, len(self.tables[dtype])
        x = torch.empty(shape, dtype=dtype, device=self.device)
        y = torch.empty(count, dtype=torch.int64, device=self.device)
        return x.permute(0, 3, 1, 2), y

    def __len__(self) -> int:
        return len(self.labels)

    def reader(self, segments: Iterable[Segment]) -> Reader:
        """What gives the samples of the segments."""
        raise NotImplementedError

    def batches(self, indices: Iterable[Tensor], epoch: int | None = None) -> Iterator[Images]:
        """(x, y) for each tensor of sample indices: x float32 [B, C, size, size] normalised, y
        int64 [B].

        With an epoch the images are augmented with that epoch's numbers; with None they are as they
        are tested. Raises DataError with the file's name where one cannot be read.
        """
        indices = list(indices)
        if not indices:
            return
        reader = self.reader([Segment(torch.cat(indices), epoch)])
        try:
            for index in indices:
                yield reader.take(len(index))
        finally:
            reader.close()


class ChunkedLoader(Loader):
    """Batches on `device` from the chunks of an engine."""

    def __init__(
        self,
        engine: Engine,
        labels: np.ndarray,
        size: int,
        chunk: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        changes: Changes | None = None,
    ):
        self.engine, self.size, self.chunk, self.device = engine, size, chunk, device
        self.changes = changes
        self.labels = torch.from_numpy(labels).to(device)
        self.tables = tables(mean, std, device)

    def reader(self, segments: Iterable[Segment]) -> ChunkReader:
        return ChunkReader(self, segments)


class ChunkReader:
    """Cuts batches from chunks, in order."""

    cursor: Tensor | None = None

    def __init__(self, loader: ChunkedLoader, segments: Iterable[Segment]):
        self.loader = loader
        chunks = loader.engine.chunks(jobs(segments, loader.chunk))
        self._chunks: Ahead | Chunks = Ahead(chunks) if loader.engine.ahead else chunks
        self._chunk: Chunk | None = None
        self._at = self._segment = 0
        # on a GPU: read by work that may be still to come
        self._used: deque[tuple[torch.cuda.Event, Chunk]] = deque()

    def begin(self) -> None:
        pass

    def room(self, count: int, dtype: torch.dtype = torch.float32) -> Images:
        # an empty share of a batch is in no chunk
        size = self._present().pixels.shape[1] if count else self.loader.size
        return self.loader.room(count, dtype, size)

    def take(self, count: int, into: Images | None = None) -> Images:
        loader = self.loader
        x, y = into or self.room(count)
        if not count:
            return x, y
        stored, samples = x.permute(0, 2, 3, 1), []
        epoch = self._present().job.epoch
        changes = loader.changes_in(epoch)
        table = loader.table(x.dtype, changes)
        for chunk, part, to in self._parts(count):
            pixels, index = (
                t[part].to(loader.device, non_blocking=True)
                for t in (chunk.pixels, chunk.job.index)
            )
            moves = chunk.moves
            if moves is not None:
                moves = moves[part].to(loader.device, non_blocking=True)
            augment(pixels, None, moves, table, stored[to])
            torch.index_select(loader.labels, 0, index, out=y[to])
            samples.append(chunk.job.index[part])
        if changes is not None and epoch is not None:
            index = torch.cat(samples)
            boxes = None
            if changes.erasing:
                boxes = changes.boxes(x.shape[2], epoch, index.to(loader.device))
            loader.change(x, changes, epoch, index, boxes)
        return x, y

    def skip(self, count: int) -> None:
        for _ in self._parts(count):
            pass

    def ahead(self, count: int, dtype: torch.dtype) -> Images:
        raise RuntimeError("samples that come in chunks have no cursor")

    def _parts(self, count: int) -> Iterator[tuple[Chunk, slice, slice]]:
        """(chunk, samples of it, places among the next `count` samples that they have)."""
        done = 0
        while done < count:
            chunk = self._present()
            part = slice(self._at, min(len(chunk.pixels), self._at + count - done))
            to = slice(done, done + part.stop - part.start)
            yield chunk, part, to
            self._at, done = part.stop, to.stop
            if self._at == len(chunk.pixels):
                self._retire()

    def advance(self) -> None:
        self._segment += 1
        self._retire()

    def close(self) -> None:
        self._chunks.close()
        self._retire()
        for event, chunk in self._used:
            event.synchronize()
            chunk.release()
        self._used.clear()

    def _present(self) -> Chunk:
        """The chunk that the next sample is in."""
        while self._chunk is None:
            chunk = next(self._chunks)
            if chunk.job.segment == self._segment:
                self._chunk, self._at = chunk, chunk.job.skip
                if chunk.ready is not None:
                    torch.cuda.current_stream(self.loader.device).wait_event(chunk.ready)
            else:  # the last samples of a segment may be left over
                chunk.release()
        return self._chunk

    def _retire(self) -> None:
        chunk, self._chunk = self._chunk, None
        if chunk is None:
            return
        if self.loader.device.type != "cuda":
            chunk.release()
            return
        event = torch.cuda.Event()
        event.record()
        self._used.append((event, chunk))
        while self._used and self._used[0][0].query():
            self._used.popleft()[1].release()


def jobs(segments: Iterable[Segment], size: int) -> Iterator[Job]:
    """The chunks of the segments, cut at the multiples of `size` wherever a segment starts."""
    for number, segment in enumerate(segments):
        index = segment.index.cpu()
        for at in range(segment.start // size * size, len(index), size):
            yield Job(number, index[at : at + size], segment.epoch, max(segment.start - at, 0))


class Ahead:
    """Chunks that are made in a thread, two ahead. What the thread raises is raised by next()."""

    def __init__(self, chunks: Chunks):
        self._chunks = chunks
        # each a chunk, or what ended them
        self._ready: queue.Queue[Chunk | BaseException] = queue.Queue(maxsize=2)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fastsmooth data", daemon=True)
        self._thread.start()

    def __next__(self) -> Chunk:
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # for whoever asks again
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and wait for it; chunks that nobody took are dropped."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)

    def _work(self) -> None:
        end: BaseException = StopIteration()
        try:
            for chunk in self._chunks:
                self._ready.put(chunk)
                if self._stop.is_set():
                    break
        except BaseException as error:  # handed on, whatever it is
            end = error
        self._chunks.close()
        if not self._stop.is_set():
            self._ready.put(end)
