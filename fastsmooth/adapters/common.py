"""What every adapter does, whoever drives the training: keep the batch of an update that is to be
measured, measure it before the update is made, and hand on the numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastsmooth.noise.losses import Loss, NotCovered, name_of
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
        self.seen = 0  # micro-batches of the update to come

    def batch(self, x: Tensor, y: Tensor) -> None:
        """Of each micro-batch x [B, ...], y [B, ...] of the update to come, in the form in which
        the model gets it. Kept until the update, where that is measured."""
        # none where a measurement falls due between two of them, as an epoch may begin there: those
        # that are left are not the batch
        if self.noise.wants_next and len(self.kept) == self.seen:
            self.kept.append((x, y))
        self.seen += 1

    def forget(self) -> None:
        """Where the gradient of the micro-batches so far is set to zero before an update."""
        self.kept, self.seen = [], 0

    def before_update(self, divisor: int | None = None) -> dict[str, Any] | None:
        """Before each update, while the parameters are still those of its batch: the row of a
        measurement, None where none is due.

        divisor: what the host divides the sum of its micro-batches' mean gradients by; None: their
        number. An update whose micro-batches have several sizes, on any process, is left to the
        next. A gradient that is not finite is a warning: what becomes of the training is the
        host's to say. Raises NotCovered for a model or loss that cannot be measured.
        """
        kept, seen = self.kept, self.seen
        self.forget()
        if not kept:
            self.noise.skip()
            return None
        xs, ys = zip(*kept, strict=True)
        try:
            with self.autocast():
                row = self.noise(xs, ys, scale=seen / (divisor or seen), alike=True)
        except FloatingPointError as error:
            warnings.warn(f"gradient noise not measured: {error}", stacklevel=2)
            return None
        if row:
            self.log(numbers_of(row))
        return row


def pair_of(batch: Any, remedy: str) -> tuple[Tensor, Tensor]:
    """x [B, ...] and y [B, ...] of a batch that is such a pair. Raises NotCovered for any other;
    `remedy` says what to do then."""
    parts = tuple(batch) if isinstance(batch, list | tuple) else ()
    if len(parts) == 2 and all(isinstance(part, Tensor) for part in parts):
        return parts
    of = f" of {', '.join(type(part).__name__ for part in parts)}" if parts else ""
    raise NotCovered(
        f"a batch is a {type(batch).__name__}{of}, not two tensors x [B, ...] and y [B, ...]: "
        f"{remedy}"
    )


def numbers_of(row: dict[str, Any]) -> Numbers:
    """The columns of a row that are numbers, under the names that loggers show: noise/..."""
    return {
        f"noise/{name}": float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


class OfEach:
    """A loss of a host that gives one number for a batch and has no reduction: its values for the
    single samples are what it gives for each alone, whose mean NoiseTracker compares with it.

    Raises NotCovered, a ValueError, for one that fails for a sample alone.
    """

    def __init__(self, loss: Loss):
        self.loss = loss
        self.__name__ = name_of(loss).removeprefix("the loss ")

    def __call__(self, output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """Of output [B, ...] and target [B, ...]: 0-d, or [B] with reduction="none"."""
        if reduction != "none":
            return self.loss(output, target)
        try:
            each = zip(output.split(1), target.split(1), strict=True)
            return torch.stack([self.loss(o, t).mean() for o, t in each])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise NotCovered(
                f"{name_of(self)} fails for a sample alone, so that no gradient belongs to one "
                f"({type(error).__name__}: {error})"
            ) from error
