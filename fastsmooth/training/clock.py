"""Seconds spent training, evaluating and compiling, kept apart; waits for the device before it
reads the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Parts are named by the caller ("train", "eval", "compile"); only one runs at a time, an inner
    one stops an outer."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None):
        self.synchronize = synchronize
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    def read(self, part: str) -> float:
        """Seconds of `part` so far."""
        self._settle()
        return self.seconds.get(part, 0.0)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        self._settle()
        self._running.append(part)
        try:
            yield
        finally:
            self._settle()
            self._running.pop()

    def _settle(self) -> None:
        self.synchronize()
        now = time.perf_counter()
        if self._running:
            part = self._running[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now
