"""Updates that are captured once for each batch size, as one CUDA graph, and played again.

What Python spends on an update, some hundreds of launches, is spent once then: a replay is one
call. The first update of a size is done as it is, which loads its kernels and fills the allocator;
the second is captured, which executes nothing, and played. Both end in the same bits. Updates that
leave the norms of their samples are a kind of their own, with graphs of their own.
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
from fastsmooth.noise.persample import SampleNorms
from fastsmooth.ranks import RankLost
from fastsmooth.training.clock import Clock
from fastsmooth.training.update import Update

# Updates of a size, and its largest number of samples, for which --graphs auto captures: a capture
# costs some tens of milliseconds, and a GPU that is busy with a large batch anyway gains nothing.
LEAST, LARGEST = 200, 256
LEAST_ASKED = 3  # updates of a size, where --graphs on asks for it
ALIVE = 2  # graphs at a time, of whatever kind: each holds the memory of a whole step
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
        self.needed = 0  # bytes that an update takes at most beside what stays

    def warm(self, update: Callable[[], None]) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        update()
        needed = torch.cuda.max_memory_allocated(self.device) - before
        self.needed = max(self.needed, needed)  # of plain and measured updates, whose turns mix

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


class Kind(NamedTuple):
    """What one recording serves."""

    size: int  # of the batch, all processes together
    measured: bool  # whether the norms of its samples are left


class Held(NamedTuple):
    """A recording; where it reads images that do not come by a cursor, and leaves norms."""

    recording: Recording
    images: Images | None
    norms: SampleNorms | None


class Graphs:
    """Does updates, those of `kinds` by replay.

    Args: update; kinds, those that are worth it; world, how many processes there are; recorder,
    None where there are no kinds; strict, whether a capture that fails ends the run; clock, which
    keeps the seconds of captures apart.
    """

    def __init__(
        self,
        update: Update,
        kinds: frozenset[Kind],
        world: int,
        recorder: Recorder | None,
        strict: bool,
        clock: Clock,
    ):
        self.update, self.world, self.recorder = update, world, recorder
        self.kinds = kinds
        self.strict, self.clock = strict, clock
        self.warm: set[Kind] = set()
        self.held: dict[Kind, Held] = {}
        self.captured = 0  # in all

    def __call__(
        self, batch: Batch, before_update: Callable[[], None] | None = None, measured: bool = False
    ) -> None:
        """Do the update of a batch; as it is, where something is to be done before the optimizer
        moves the parameters. Where it is `measured`, it leaves step.norms."""
        kind = Kind(batch.size, measured)
        if before_update is not None:
            self.eager(batch, measured, before_update)
        elif kind not in self.kinds or batch.count * self.world != batch.size:
            self.eager(batch, measured)
        elif kind not in self.warm:
            assert self.recorder is not None  # without one there are no kinds
            self.recorder.warm(lambda: self.eager(batch, measured))
            self.warm.add(kind)
        else:
            self.replay(batch, kind)

    def eager(
        self, batch: Batch, measured: bool, before_update: Callable[[], None] = lambda: None
    ) -> None:
        images = batch.ahead(self.update.step.dtype)
        self.update(images, batch.size, batch.cursor, before_update, measured)

    def replay(self, batch: Batch, kind: Kind) -> None:
        held = self.held.get(kind)
        if held is None:
            with self.clock.measure("capture"):
                held = self.capture(batch, kind)
        elif held.images is not None:
            batch.put(held.images)
        if held is None:
            self.eager(batch, kind.measured)
        else:
            held.recording.replay()
            self.update.step.norms = held.norms

    def capture(self, batch: Batch, kind: Kind) -> Held | None:
        """A recording of an update of this kind, with the images of this one in place; None where
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
                    images or batch.ahead(self.update.step.dtype),
                    batch.size,
                    batch.cursor,
                    measured=kind.measured,
                )
            )
        except RankLost:
            raise
        except RuntimeError as error:
            why = one_line(error)[:200]
            one, more = ("a measured", "measured ") if kind.measured else ("an", "")
            if self.strict:
                raise ConfigError(
                    f"--graphs on: {one} update of {batch.size} samples cannot be captured "
                    f"({why}): use --graphs auto or off"
                ) from None
            warn(
                f"no more {more}updates are captured as CUDA graphs: at {batch.size} samples, {why}"
            )
            # the others would fail likewise; those that are not measured do less
            self.kinds = frozenset(k for k in self.kinds if kind.measured and not k.measured)
            return None
        self.captured += 1
        norms = self.update.step.norms if kind.measured else None
        self.held[kind] = Held(recording, images, norms)
        return self.held[kind]

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
