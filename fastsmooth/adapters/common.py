"""What every adapter does, whoever drives the training: keep the batch of an update that is to be
measured, measure it before the update is made, and hand on the numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from fastsmooth.noise.online import NoiseTracker

Numbers = dict[str, float]


class Watch:
    """A NoiseTracker in a loop that tells of its micro-batches and its updates.

    Args:
        noise: the tracker, whose calls this makes.
        log: gets the numbers of every measurement, on every process.
        autocast: the precision in which the host makes the batch's gradient, as a context.
    """

    def __init__(
        self,
        noise: NoiseTracker,
        log: Callable[[Numbers], None],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.noise, self.log, self.autocast = noise, log, autocast
        self.kept: list[tuple[Tensor, Tensor]] = []

    def batch(self, x: Tensor, y: Tensor) -> None:
        """Of each micro-batch x [B, ...], y [B, ...] of the update to come, in the form in which
        the model gets it. Kept until the update, where that is measured."""
        if self.noise.wants_next:
            self.kept.append((x, y))

    def before_update(self) -> None:
        """Before each update, while the parameters are still those of its batch.

        A gradient that is not finite is a warning: what becomes of the training is the host's to
        say. Raises NotCovered for a model or loss that cannot be measured.
        """
        kept, self.kept = self.kept, []
        if not kept:
            return self.noise.skip()
        xs, ys = zip(*kept, strict=True)
        try:
            with self.autocast():
                row = self.noise(xs, ys)
        except FloatingPointError as error:
            warnings.warn(f"gradient noise not measured: {error}", stacklevel=2)
            return
        if row:
            self.log(numbers_of(row))


def numbers_of(row: dict[str, Any]) -> Numbers:
    """The columns of a row that are numbers, under the names that loggers show: noise/..."""
    return {
        f"noise/{name}": float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
