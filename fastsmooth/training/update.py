"""The update of a batch, from its images to the numbers that a log wants, on the device alone.

Nothing that changes from one update to the next lives in Python: lr and momentum, the place in the
order of the images, sums, counts and the number of the update are on the device. So an update may
be captured once and played again (training.graphs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsmooth.data.chunks import Images
from fastsmooth.kernels import tally
from fastsmooth.kernels.tally import Sums
from fastsmooth.noise.instrument import Instrument
from fastsmooth.training.ema import Ema
from fastsmooth.training.step import Step


class Meter:
    """Loss and accuracy over samples, summed on the device by kernels.tally."""

    def __init__(self, sums: Sums):
        self.sums = sums

    @property
    def count(self) -> int:
        """Samples; waits for the device."""
        return int(self.sums.seen[1])

    def means(self) -> tuple[float, float]:
        """(mean loss, accuracy); waits for the device."""
        correct, samples = self.sums.seen.tolist()
        return self.sums.loss.item() / max(samples, 1), correct / max(samples, 1)

    def reset(self) -> None:
        for sums in self.sums:
            sums.zero_()

    def state_dict(self) -> dict[str, Any]:
        # copies: a view is saved with all that it is a view of
        correct, samples = self.sums.seen.clone()
        return {"loss": self.sums.loss.clone(), "correct": correct, "count": int(samples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.loss.copy_(state["loss"])
        self.sums.seen[0].copy_(state["correct"])
        self.sums.seen[1].fill_(state["count"])


class Update:
    """Forward, backward, optimizer, the average of the weights where there is one, meters.

    `kept` is what is kept of them on the device, kernels.tally.State; `bad_seen` the number of the
    first update that was not finite, 0 if none was, on the host: on a GPU late by as many updates
    as the host is ahead.
    """

    def __init__(
        self,
        step: Step,
        device: torch.device,
        instruments: list[Instrument],
        ema: Ema | None = None,
    ):
        self.step, self.instruments, self.ema = step, instruments, ema
        self.kept = tally.zeros(device)
        self.meter, self.window = Meter(self.kept.epoch), Meter(self.kept.window)
        self.bad_seen = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")

    def __call__(
        self,
        images: Images,
        size: int,
        cursor: Tensor | None = None,
        before_update: Callable[[], None] = lambda: None,
        measured: bool = False,
    ) -> None:
        """The update of a batch of `size` samples, of which this process has the share `images`.

        `cursor`, int64 0-d, is the place in the order of the images, which is moved on; None where
        they do not come by one. Where it is `measured`, the norms of the samples are in step.norms.
        """
        x, y = images
        if measured:
            loss, correct = self.step.measured_gradient(x, y)
        else:
            loss, correct = self.step.gradient(x, y, size)
        before_update()
        self.step.update()
        if self.ema is not None:
            self.ema.update()
        norms = self.step.squared_norms
        tally.tally(norms, loss, correct, self.kept, size, cursor, len(y))
        for instrument in self.instruments:
            instrument.observe(self.kept)
        self.bad_seen.copy_(self.kept.bad_update, non_blocking=True)
