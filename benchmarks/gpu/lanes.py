"""Training loops side by side, each in a process of its own, of which one works at a time."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Protocol

import torch

from benchmarks.gpu.cell import words
from benchmarks.gpu.events import kernels_of, seconds_of
from benchmarks.timing import Measured, Window, hang_up


class Loop(Protocol):
    """Training that makes so many updates as it is told."""

    device: torch.device
    lead: int  # updates before some are timed

    def advance(self, updates: int) -> int:
        """Make so many updates, or a few more; how many. Raises where the training is wrong."""
        ...

    def call(self, function: Callable[[], Any]) -> None:
        """Call it in the thread that trains."""

    def facts(self) -> dict[str, Any]:
        """What its rows say of it."""
        ...

    def close(self) -> None: ...


class Driver:
    """One loop after the other, made by make(*args), and its times."""

    def __init__(self) -> None:
        self.loop: Loop | None = None

    def begin(self, make: Callable[..., Loop], *args: Any) -> list[float]:
        """Make a loop in the place of the one before; seconds of each of its first updates, which
        load, compile and capture."""
        self.close()
        self.loop = make(*args)
        if self.loop.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return [self.window(1, lead=0)[0] for _ in range(4)]

    def window(self, updates: int, lead: int | None = None) -> tuple[float, int]:
        """(seconds, updates made), after `lead` that are not timed; by default as the loop wants
        it."""
        self.loop.advance(self.loop.lead if lead is None else lead)
        made: list[int] = []
        seconds = seconds_of(self.loop.device, lambda: made.append(self.loop.advance(updates)))
        return seconds, made[0]

    def kernels(self, updates: int) -> float:
        """Kernels, copies and fills that an update runs."""
        made: list[int] = []
        seen = kernels_of(
            self.loop.device, lambda: made.append(self.loop.advance(updates)), self.loop.call
        )
        return round(len(seen) / made[0], 1)

    def facts(self) -> dict[str, Any]:
        peak = {}
        if self.loop.device.type == "cuda":
            peak = {"peak_mb": round(torch.cuda.max_memory_allocated() / 1e6)}
        return self.loop.facts() | peak

    def close(self) -> None:
        if self.loop is not None:
            self.loop.close()
            self.loop = None
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


class Lane:
    """A Driver in a process of its own. `ask` does not wait, so several may prepare at once."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, inner = context.Pipe()
        self.process = context.Process(target=serve, args=(inner,))
        self.process.start()
        inner.close()

    def ask(self, method: str, *args: Any) -> None:
        self.pipe.send((method, args))

    def answer(self) -> Any:
        """Of the first question that has none. Raises RuntimeError in the lane's words."""
        try:
            answer, error = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"its process ended with code {self.process.exitcode}") from None
        if error is not None:
            raise RuntimeError(error)
        return answer

    def close(self) -> None:
        hang_up(self.pipe, self.process)


def serve(pipe: Any) -> None:
    """Answer questions until the pipe closes."""
    # what a run prints is no row
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    driver = Driver()
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            break
        pipe.send(tried(driver, method, args))
    driver.close()


def tried(driver: Driver, method: str, args: tuple[Any, ...]) -> tuple[Any, str | None]:
    """(answer, None), or (None, why there is none)."""
    try:
        return getattr(driver, method)(*args), None
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return None, words(error)


class Here:
    """As Lane, in this process: for trying the cells."""

    def __init__(self) -> None:
        self.driver, self.answers = Driver(), []

    def ask(self, method: str, *args: Any) -> None:
        self.answers.append(tried(self.driver, method, args))

    def answer(self) -> Any:
        answer, error = self.answers.pop(0)
        if error is not None:
            raise RuntimeError(error)
        return answer

    def close(self) -> None:
        self.driver.close()


AnyLane = Lane | Here


def call(lane: AnyLane, method: str, *args: Any) -> Any:
    lane.ask(method, *args)
    return lane.answer()


def race(
    lanes: dict[str, AnyLane],
    firsts: dict[str, list[float]],
    seconds: float,
    rounds: int,
    failed: Callable[[str, RuntimeError], None],
) -> dict[str, Measured]:
    """Windows of about `seconds` of all lanes in turn: seconds an update.

    `firsts`: seconds of the first updates of each, of which the first is kept. A lane that fails is
    left out, and failed(name, why) called.
    """
    found = {name: Measured(firsts[name][0]) for name in lanes}
    updates = dict.fromkeys(lanes, 5 if seconds > 0.1 else 1)  # of a first window, not counted
    for number in range(rounds + 1):
        for name in list(found) if number % 2 == 0 else list(reversed(found)):
            try:
                took, made = call(lanes[name], "window", updates[name])
            except RuntimeError as error:
                del found[name]
                failed(name, error)
                continue
            if number:
                found[name].windows.append(Window(took / made))
            else:
                updates[name] = max(round(seconds * made / took), 1)
    return found
