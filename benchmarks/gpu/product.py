"""Where the cells touch fastsmooth: whole runs of fastsmooth.train that stop where they are told,
and what today's version has. What changes in the product changes here alone.
"""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fastsmooth import data, train
from fastsmooth.cli.device import compute_float32
from fastsmooth.data.images import ImageSet
from fastsmooth.runfolder.checkpoint import Checkpoints
from fastsmooth.runfolder.read import read_status
from fastsmooth.training import build


def multiply_in(how: str) -> None:
    """float32 products in "ieee" float32 or in "tf32"."""
    compute_float32(torch, how)


def run(
    flags: list[str],
    images: ImageSet,
    begun: Callable[[Any], None] = lambda run: None,
    after_update: Callable[[Any], int] = lambda run: 0,
) -> int:
    """The exit code of fastsmooth.train for the flags, whose data set are these images.

    begun(run) is called once it stands where it begins, after_update(run) after each update: the
    number of a signal says that the run is to stop. May be called in any thread.
    """
    with ExitStack() as patches:
        begin = build.begin

        def begin_and_tell(made: Any, *rest: Any) -> None:
            patches.close()
            begin(made, *rest)
            made.stop_asked = lambda: after_update(made)
            begun(made)

        patches.enter_context(
            patch.dict(data.READERS, dict.fromkeys(data.READERS, lambda c: images))
        )
        patches.enter_context(patch.object(build, "begin", begin_and_tell))
        # signals can be heeded in the main thread alone
        patches.enter_context(patch.object(train, "watch", lambda config: lambda: 0))
        return train.main(flags)


class Trainer:
    """A run in a thread of its own, which makes so many updates as it is told and waits."""

    lead = 3  # updates before some are timed, in which the device wakes up

    def __init__(self, flags: list[str], images: ImageSet):
        self.flags, self.images = flags, images
        self.run: Any = None
        self.code: int | None = None  # once it has ended
        self._until, self._stopping = 0, False
        self._task: Callable[[], Any] | None = None
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._scratch = tempfile.TemporaryDirectory()
        self.out = Path(self._scratch.name) / "run"
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self._waits.acquire()
        if self.run is None:
            self.close()
            raise RuntimeError(f"fastsmooth.train {' '.join(flags)} ended with code {self.code}")
        self.device = self.run.device

    def advance(self, updates: int) -> int:
        """Let it make so many updates; how many it has made, which may be a few more. They may be
        still under way on a GPU. Raises RuntimeError where the run ends before."""
        before = self.run.update
        self._until = before + updates
        self._go.release()
        self._waits.acquire()
        if self.code is not None:
            raise RuntimeError(
                f"the run ended with code {self.code} at update {self.run.update}"
                f"{why_ended(self.out)}"
            )
        return self.run.update - before

    def call(self, function: Callable[[], Any]) -> None:
        """Call it in the thread of the run."""
        self._task = function
        self._go.release()
        self._waits.acquire()

    def facts(self) -> dict[str, Any]:
        """What it has compiled and captured, and what that took."""
        found: dict[str, Any] = {"flags": " ".join(self.flags)}
        found |= {"compiled_graphs": self.run.step.compiled_graphs}
        found |= {
            f"{part}_s": round(self.run.clock.read(part), 3) for part in ("compile", "capture")
        }
        return found | {"captured": self.run.graphs.captured}

    def close(self) -> None:
        self._stopping = True
        self._go.release()
        self._thread.join()
        self.run = None
        self._scratch.cleanup()

    def _work(self) -> None:
        try:
            self.code = run(
                [*self.flags, "--out", str(self.out)], self.images, self._begun, self._after_update
            )
        finally:
            if self.code is None:
                self.code = -1
            self._waits.release()

    def _begun(self, run: Any) -> None:
        self.run = run
        self._wait()

    def _after_update(self, run: Any) -> int:
        if run.update >= self._until:
            self._wait()
        return signal.SIGTERM if self._stopping else 0

    def _wait(self) -> None:
        self._waits.release()
        self._go.acquire()
        while self._task is not None:
            task, self._task = self._task, None
            task()
            self._waits.release()
            self._go.acquire()


def why_ended(out: Path) -> str:
    """What its folder says, as the end of a sentence."""
    status = read_status(out)
    return f": {status['reason']}" if status.get("reason") else ""


def last_state(out: Path) -> dict[str, Any]:
    """The newest checkpoint of a run folder: parameters, buffers, momentum, meters."""
    state = Checkpoints(out / "checkpoints", print).load()
    if state is None:
        raise RuntimeError(f"{out} has no checkpoint")
    return state
