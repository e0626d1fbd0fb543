"""What measures while a run trains: one form for --track-noise, crossings and sampling.

A run asks its instruments around every update, and none of them changes a bit of the training, but
for one that has the norms of samples left by the update itself: its sums are in another order. An
instrument is made for one run and keeps what it has seen, also over an interruption. A new one is
a class of this form and a row in fastsmooth.training.modes.INSTRUMENTS.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastsmooth.schedule import Point

Values = dict[str, Any]  # of a row of kind measure: numbers, words and None


class Asked(Exception):
    """A measurement was asked to stop, by a signal's number or OUT_OF_TIME."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Instrument:
    """Measures nothing by itself: a kind of instrument has the methods below that it needs.

    `run` is fastsmooth.training.loop.Run; x [B, C, H, W] and y [B] are this process's share of
    the batch to come, which holds run.stream.size samples, and `point` is in force for it.
    """

    name: str  # of its state in a checkpoint
    wants_gradient = False  # whether it has a before_update, which no captured update calls
    # updates from one that is to leave the norms of its samples, step.norms, to the next; 0: none
    norms_every = 0

    def introduction(self) -> list[str]:
        """Lines for the beginning of the run."""
        return []

    def chosen(self) -> dict[str, str]:
        """What it chose where a flag said auto, by the field of the configuration; a run that goes
        on has it again."""
        return {}

    def due(self, run: Any) -> bool:
        """Whether `before_gradient` and `before_update` are to be called for the batch to come.

        One that is not due costs nothing; one that is may take as long as it needs.
        """
        return False

    def falls_out(self, run: Any) -> bool:
        """Whether what is due comes out of the update itself: after_update has it then, and
        before_gradient is not asked."""
        return False

    def before_gradient(self, run: Any, x: Tensor, y: Tensor, point: Point) -> Values | None:
        """At the parameters of which the batch's gradient will be taken. What is returned becomes a
        row of metrics.jsonl.

        Raises Asked, where it is asked to stop, to be called again once the run goes on; and
        FloatingPointError where the run has diverged.
        """
        return None

    def before_update(self, run: Any, x: Tensor, y: Tensor, point: Point) -> Values | None:
        """The same point, with the batch's gradient in .grad."""
        return None

    def observe(self, kept: Any) -> None:
        """Part of every update, which may be captured once and played again: so it works on tensors
        on the device alone, always the same ones, and nothing that it keeps in Python changes.

        `kept` is kernels.tally.State: the update's number and squared norms are among it.
        """

    def after_update(self, run: Any, point: Point) -> Values | None:
        """After every update, which run.update counts from 1; it must not wait for the device."""
        return None

    def end_epoch(self) -> Values:
        """What it adds to the row of the epoch that has ended."""
        return {}

    def enough(self) -> bool:
        """Whether the run may end."""
        return False

    def files(self, run: Any) -> dict[str, Any]:
        """What it leaves in the run folder: the name and the content of each JSON file."""
        return {}

    def conclusion(self, run: Any) -> list[str]:
        """Lines for the end of the run."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, words, lists and dicts; part of every checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state_dict` was asked."""
