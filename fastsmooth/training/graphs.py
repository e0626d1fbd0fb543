"""Updates that are captured once for each batch size, as one CUDA graph, and played again.

What Python spends on an update, some hundreds of launches, is spent once then: a replay is one
call. The first update of a size is done as it is, which loads its kernels and fills the allocator;
the second is captured, which executes nothing, and played. Both end in the same bits.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol

import torch

from fastsmooth.cli.flags import ConfigError
from fastsmooth.data.chunks import Images
from fastsmooth.data.stream import Batch
from fastsmooth.messages import one_line, warn
from fastsmooth.ranks import RankLost
from fastsmooth.training.clock import Clock
from fastsmooth.training.update import Update

# Updates of a size, and its largest number of samples, for which --graphs auto captures: a capture
# costs some tens of milliseconds, and a GPU that is busy with a large batch anyway gains nothing.
LEAST, LARGEST = 200, 256
LEAST_ASKED = 3  # updates of a size, where --graphs on asks for it
ALIVE = 2  # graphs at a time: each holds the memory of a whole step
PERIOD = 8  # updates: the host is at most two of these ahead of the device


class Recording(Protocol):
    """A captured update."""

    def replay(self) -> None: ...

    def reset(self) -> None:
        """Give its memory back."""


class Recorder(Protocol):
    """What captures updates: CudaRecorder."""

    def warm(self, update: Callable[[], None]) -> None:
        """Do the update, and see what it takes."""

    def fits(self) -> bool:
        """Whether there is memory for a recording beside what runs as it is."""

    def record(self, update: Callable[[], None]) -> Recording:
        """Capture the update, of which nothing is executed. Raises RuntimeError where it cannot
        be."""


class CudaRecorder:
    """Captures on the current stream of a GPU, which is not the default one."""

    def __init__(self, device: torch.device, settle: Callable[[], None]):
        """`settle` is called after each capture, to write what could not be written within."""
        self.device, self.settle = device, settle
        self.needed = 0  # bytes that an update takes beside what stays

    def warm(self, update: Callable[[], None]) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        update()
        self.needed = torch.cuda.max_memory_allocated(self.device) - before

    def fits(self) -> bool:
        # its own pool, and as much again for the updates that are done as they are
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0] > 2 * self.needed

    def record(self, update: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            self._capture(graph, pool, update)
        except RuntimeError as error:
            self._mend(graph, pool)
            if isinstance(error, RankLost):
                raise
            raise first_of(error) from None
        self.settle()
        return graph

    def _capture(self, graph: torch.cuda.CUDAGraph, pool: Any, work: Callable[[], object]) -> None:
        with (
            uncollected(),
            # of this thread alone: those that load images go on meanwhile
            torch.cuda.graph(
                graph,
                pool=pool,
                stream=torch.cuda.current_stream(self.device),
                capture_error_mode="thread_local",
            ),
        ):
            work()

    def _mend(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """After a capture that failed, have allocator and random numbers know that it is over."""
        graph.reset()
        with suppress(RuntimeError):  # it is over already, from PyTorch 2.14 on
            torch._C._cuda_endAllocateToPool(self.device.index, pool)
        with suppress(RuntimeError):
            other = torch.cuda.CUDAGraph()
            self._capture(
                other, torch.cuda.graph_pool_handle(), lambda: torch.zeros((), device=self.device)
            )
            other.reset()


def first_of(error: BaseException) -> BaseException:
    """What went wrong first: the end of a capture that has failed raises another error."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, no garbage is collected, whose end may be a call that a capture does not allow."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Held(NamedTuple):
    """A recording, and where it reads images that do not come by a cursor."""

    recording: Recording
    images: Images | None


class Graphs:
    """Does updates, those of `sizes` by replay.

    Args: update; sizes, the batch sizes that are worth it, all processes together; world, how many
    those are; recorder, None where there are no sizes; strict, whether a capture that fails ends
    the run; clock, which keeps the seconds of captures apart.
    """

    def __init__(
        self,
        update: Update,
        sizes: frozenset[int],
        world: int,
        recorder: Recorder | None,
        strict: bool,
        clock: Clock,
    ):
        self.update, self.world, self.recorder = update, world, recorder
        self.sizes = sizes
        self.strict, self.clock = strict, clock
        self.warm: set[int] = set()
        self.held: dict[int, Held] = {}
        self.captured = 0  # in all

    def __call__(self, batch: Batch, before_update: Callable[[], None] | None = None) -> None:
        """Do the update of a batch; as it is, where something is to be done before the optimizer
        moves the parameters."""
        if before_update is not None:
            self.eager(batch, before_update)
        elif batch.size not in self.sizes or batch.count * self.world != batch.size:
            self.eager(batch)
        elif batch.size not in self.warm:
            assert self.recorder is not None  # without one there are no sizes
            self.recorder.warm(lambda: self.eager(batch))
            self.warm.add(batch.size)
        else:
            self.replay(batch)

    def eager(self, batch: Batch, before_update: Callable[[], None] = lambda: None) -> None:
        self.update(batch.ahead(self.update.step.dtype), batch.size, batch.cursor, before_update)

    def replay(self, batch: Batch) -> None:
        held = self.held.get(batch.size)
        if held is None:
            with self.clock.measure("capture"):
                held = self.capture(batch)
        elif held.images is not None:
            batch.put(held.images)
        if held is None:
            self.eager(batch)
        else:
            held.recording.replay()

    def capture(self, batch: Batch) -> Held | None:
        """A recording of an update of this size, with the images of this one in place; None where
        none can be had."""
        assert self.recorder is not None
        while len(self.held) >= ALIVE:  # first the one that the schedule has left
            self.held.pop(next(iter(self.held))).recording.reset()
        try:
            if not self.recorder.fits():
                raise RuntimeError("too little memory is free")
            images = None if batch.cursor is not None else batch.ahead(self.update.step.dtype)
            recording = self.recorder.record(
                lambda: self.update(
                    images or batch.ahead(self.update.step.dtype), batch.size, batch.cursor
                )
            )
        except RankLost:
            raise
        except RuntimeError as error:
            why = one_line(error)[:200]
            if self.strict:
                raise ConfigError(
                    f"--graphs on: an update of {batch.size} samples cannot be captured ({why}): "
                    "use --graphs auto or off"
                ) from None
            warn(f"no more updates are captured as CUDA graphs: at {batch.size} samples, {why}")
            self.sizes = frozenset()  # the others would fail likewise
            return None
        self.captured += 1
        self.held[batch.size] = Held(recording, images)
        return self.held[batch.size]

    def drop(self) -> None:
        """Give up what was captured."""
        for held in self.held.values():
            held.recording.reset()
        self.held = {}


class Pace:
    """Keeps the host at most 2 PERIOD updates ahead of a GPU, so that what it says is of now."""

    def __init__(self, device: torch.device):
        self.device = device
        self.events: deque[torch.cuda.Event] = deque()

    def keep(self, update: int) -> None:
        """To be called after every update with its number."""
        if self.device.type != "cuda" or update % PERIOD:
            return
        event = torch.cuda.Event()
        event.record()
        self.events.append(event)
        if len(self.events) > 1:
            self.events.popleft().synchronize()
