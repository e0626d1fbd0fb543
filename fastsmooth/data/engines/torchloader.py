"""PyTorch's DataLoader with PIL and torchvision's transforms, one image after the other: the
reference of the engines."""

from __future__ import annotations

import gc
import multiprocessing.connection
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.transforms import functional as TF

from fastsmooth.data import augment
from fastsmooth.data.augment import View
from fastsmooth.data.chunks import Chunk, Chunks, Job
from fastsmooth.data.images import DataError, image_of, open_image, pixels_of
from fastsmooth.data.source import Source, black
from fastsmooth.messages import one_line

# sample, pixels a side, its view (None where it is no file), the numbers that `draw` gave
Item = tuple[int, int, View | None, list[float] | None]
# what a worker makes of a chunk: uint8 [m, size, size, C], and why some are black, by their place;
# no pixels where they cannot be handed over
Made = tuple[Tensor | None, dict[int, str]]
LIMIT = 300.0  # seconds that a chunk is waited for: many times what one takes on a slow disk
LATE = "no chunk within"
NO_ROOM = (
    "/dev/shm is too small (docker run --shm-size=1g): fewer --workers or a smaller --chunk need "
    "less, --loader threads none"
)
REMEDIES = (  # for what is found in the words of PyTorch or the system
    ("Too many open files", "raise the limit (ulimit -n), or use --loader threads"),
    (LATE, "does the disk or the network hang? a smaller --chunk is there sooner"),
    ("SIGBUS", NO_ROOM),
    ("Bus error", NO_ROOM),
    ("</torch_", NO_ROOM),  # what PyTorch calls a piece of shared memory
    ("No space left", NO_ROOM),
    ("", "was the memory short? fewer --workers need less, --loader threads needs no processes"),
)


class Images(Dataset):
    """One image at a time, decoded and augmented with the numbers that come with its index.

    It is uint8 [size, size, C] with None, or black with the reason, which the main process reports.
    """

    def __init__(self, source: Source):
        self.source, self.split, self.index = source, source.split, source.index
        self.kind = source.kind

    def __getitem__(self, item: Item) -> tuple[np.ndarray, str | None]:
        index, size, view, drawn = item
        smaller = None if view is None else self.source.at_smaller_scale(index, view)
        try:
            image = self.open(index) if smaller is None else smaller
        except DataError as error:
            return black(size), str(error)
        if view is not None and drawn is not None and self.kind == "resized-crop-flip":
            if smaller is None:
                image = augment.resized_crop_flip(image, view[0], drawn[0], size)
            elif drawn[0]:
                image = TF.hflip(image)
            return pixels_of(image), None
        if smaller is None:
            image = augment.evaluation_view(image, self.kind, size)
        if drawn is not None:
            image = augment.crop_flip_rotate(image, drawn, size)
        return pixels_of(image), None

    def open(self, index: int) -> Image.Image:
        if self.split.pixels is not None:
            return image_of(self.split.pixels[index])
        files = self.source.files
        image = open_image(files, index)
        self.index.check(index, files.names[index], image.size)
        return image


def collate(images: list[tuple[np.ndarray, str | None]]) -> Made:
    """The chunk of m images, uint8 [size, size, C] each, in memory that the main process shares."""
    arrays, reasons = zip(*images, strict=True)
    pixels = torch.from_numpy(np.stack(arrays))
    if get_worker_info() is not None:
        try:
            # shared here and not in the queue's thread, which drops what it cannot share, so that
            # the main process would wait for it in vain
            pixels.share_memory_()
        except (RuntimeError, OSError) as error:
            return None, {0: words(error)}
    return pixels, {k: reason for k, reason in enumerate(reasons) if reason}


def words(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)


def lost(reason: str) -> ChildProcessError:
    """What a run ends with, whose DataLoader cannot go on. Ends all processes: Python would wait
    for one that is stuck."""
    ended = multiprocessing.connection.wait(
        [process.sentinel for process in PROCESSES], 0 if LATE in reason else 1
    )
    dead = [process for process in PROCESSES if process.sentinel in ended]
    for process in dead:
        process.join(1)  # its files are closed a moment before it is gone
    code = next((process.exitcode for process in dead if process.exitcode), None)
    if code is not None:  # that was first, whatever came of it
        killed = f"was killed by {signal.Signals(-code).name}" if code < 0 else ""
        reason = f"one of them {killed or f'ended with exit code {code}'}"
    for process in PROCESSES:
        process.kill()
    PROCESSES.clear()
    reason = reason.partition(". ")[0].rstrip(".")  # PyTorch goes on with advice
    remedy = next(remedy for part, remedy in REMEDIES if part in reason)
    return ChildProcessError(f"the processes of --loader torch: {reason}: {remedy}")


class Watch:
    """What ends the wait for a DataLoader: PyTorch's handler of SIGCHLD, which raises RuntimeError,
    and a time limit.

    The handler is in force for as long alone: elsewhere the error would be taken for that of
    whatever goes on. The limit is an alarm, since PyTorch's own does not hold while a process that
    is stuck is asked for its memory.
    """

    died: Callable[[int, Any], None] | None = None  # PyTorch sets it once a process

    @contextmanager
    def started(self) -> Iterator[None]:
        """Around the start of a DataLoader, which may set the handler."""
        before = signal.getsignal(signal.SIGCHLD)
        try:
            yield
        finally:
            after = signal.getsignal(signal.SIGCHLD)
            if callable(after) and after is not before and before is not None:
                self.died = after
                signal.signal(signal.SIGCHLD, before)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # which alone has handlers
            yield
            return
        handlers: dict[int, Callable[[int, Any], None]] = {signal.SIGALRM: late}
        if self.died:
            handlers[signal.SIGCHLD] = self.died
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            signal.setitimer(signal.ITIMER_REAL, LIMIT)
            if self.died:
                self.died(signal.SIGCHLD, None)  # of those that were killed before
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)


def late(*_: object) -> None:
    raise RuntimeError(f"{LATE} {LIMIT:g} s")


WATCH = Watch()
PROCESSES: weakref.WeakSet = weakref.WeakSet()  # of all DataLoaders


@contextmanager
def without_remarks() -> Iterator[None]:
    """Inside, what a DataLoader raises while it is freed is not printed.

    One that was only half made raises then, and that says nothing of why it could not be made.
    """
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before


def leave_alone(worker: int) -> None:
    """Have the process of a worker, a fork, free nothing that was garbage before: what threads of
    the first process belong to (a pipeline of DALI) would end it."""
    gc.freeze()


class Items:
    """What the DataLoader takes its lists of items from; exchanged before each pass."""

    def __init__(self) -> None:
        self.source: Generator[list[Item], None, None] | None = None

    def __iter__(self) -> Iterator[list[Item]]:
        return self.source or iter(())


class TorchEngine:
    """Chunks by worker processes, each a chunk at a time; they are kept between passes."""

    ahead = False

    def __init__(self, source: Source, workers: int, pinned: bool):
        self.source, self.workers, self.pinned = source, workers, pinned
        self.images = Images(source)
        self._items, self._busy = Items(), False
        self._loader: DataLoader[Any] | None = None

    def chunks(self, jobs: Iterator[Job]) -> Chunks:
        items, loader, kept = self._claim()
        waiting: list[Job] = []  # what the DataLoader has drawn ahead

        def drawn() -> Generator[list[Item], None, None]:
            for job in jobs:
                waiting.append(job)
                yield self.items(job)

        items.source = source = drawn()
        try:
            batches = self._started(loader)
            while (made := self._next(batches)) is not None:
                pixels, reasons = made
                job = waiting.pop(0)
                for k, reason in reasons.items():
                    self.source.bad.report(self.source.files.names[int(job.index[k])], reason)
                yield Chunk(job, pixels, None)
        finally:
            # suspended, it and the kept DataLoader hold each other, which stalls the garbage
            # collector
            source.close()
            self._busy = self._busy and not kept

    def items(self, job: Job) -> list[Item]:
        drawn = self.source.drawn(job)
        numbers = [None] * len(job.index) if drawn is None else drawn.tolist()
        views: list[View | None] = [None] * len(job.index)
        if self.source.split.pixels is None:
            views = list(self.source.views(job, drawn).each(self.source.size_in(job.epoch)))
        sizes = [self.source.size_in(job.epoch)] * len(job.index)
        return list(zip(job.index.tolist(), sizes, views, numbers, strict=True))

    def _started(self, loader: DataLoader[Any]) -> Iterator[Made]:
        """A pass over the DataLoader. Raises ChildProcessError where its processes cannot be
        started or do not answer."""
        with without_remarks(), WATCH.started():
            try:
                with WATCH.waiting():
                    batches = iter(loader)
                PROCESSES.update(getattr(batches, "_workers", ()))
                return batches
            except (RuntimeError, OSError) as error:
                reason = words(error)
        raise lost(reason)

    def _next(self, batches: Iterator[Made]) -> tuple[Tensor, dict[int, str]] | None:
        """What the DataLoader gives next; None at its end. Raises ChildProcessError where a process
        is lost or silent."""
        try:
            with WATCH.waiting():
                made = next(batches, None)
        except (RuntimeError, OSError) as error:
            made = None, {0: words(error)}
        if made is None:
            return None
        pixels, reasons = made
        if pixels is None:
            raise lost(reasons[0])
        return pixels, reasons

    def _claim(self) -> tuple[Items, DataLoader[Any], bool]:
        """The kept DataLoader, or one of its own for a pass inside another pass."""
        if self._busy:
            items = Items()
            return items, self._make(items), False
        if self._loader is None:
            self._loader = self._make(self._items)
        self._busy = True
        return self._items, self._loader, True

    def _make(self, items: Items) -> DataLoader[Any]:
        return DataLoader(
            self.images,
            batch_sampler=items,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.pinned,
            worker_init_fn=leave_alone,
            # without one of its own each pass would move the global random state
            generator=torch.Generator(),
        )
