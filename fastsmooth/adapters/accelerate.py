"""Gradient noise in a loop that accelerate drives: called for each micro-batch, it measures the
batch of the update that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from fastsmooth.adapters.common import Numbers, Watch, pair_of
from fastsmooth.noise.aside import instead
from fastsmooth.noise.losses import NotCovered
from fastsmooth.noise.online import NoiseTracker


class AcceleratedTracker:
    """A NoiseTracker that knows which micro-batches an update is made of.

        noise = AcceleratedTracker(accelerator, model, optimizer, samples=len(train), every=50)
        accelerator.register_for_checkpointing(noise)
        for x, y in loader:
            with accelerator.accumulate(model):
                row = noise(x, y)  # for each micro-batch; None where no measurement is made
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()

    Args:
        accelerator: whose log() gets the numbers of a row as noise/..., at the number of updates
            before this one.
        model, optimizer: what accelerator.prepare gave.
        samples, every, options: as NoiseTracker has them; clips=True for a loop that clips the
            gradient.

    In a row the batch is that of an update: all its micro-batches, of all processes. Gradients are
    measured in the precision in which the prepared model makes them; under fp16, where they vanish
    without a scaled loss, in float32. `watch.noise` is the NoiseTracker.

    Raises ValueError as NoiseTracker; NotCovered, a ValueError, for mixed_precision="fp8", and for
    a model that no DistributedDataParallel keeps alike in all processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        samples: int,
        every: int | str,
        **options: Any,
    ):
        if accelerator.mixed_precision == "fp8":
            raise NotCovered(
                "mixed_precision fp8: the scales of its tensors move with every pass, so that none "
                "leaves training as it was: measure under bf16"
            )
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer  # whose class says which delta it has
        noise = NoiseTracker(model, optimizer, samples=samples, every=every, **options)
        if noise.ranks.world != accelerator.num_processes:
            raise NotCovered(
                f"{accelerator.num_processes} processes share every batch, of which this model "
                "knows nothing: give the one that accelerator.prepare returned"
            )
        half = accelerator.mixed_precision == "fp16"
        self.accelerator = accelerator
        self.watch = Watch(
            noise, self.write, partial(own_forward, noise.model) if half else nullcontext
        )

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Any] | None:
        """Call it for each micro-batch x [B, ...], y [B, ...], inside accelerator.accumulate and
        before optimizer.step(): the row of a measurement, with the last micro-batch of an update
        that one is due for; else None. Raises NotCovered."""
        self.watch.batch(*pair_of((x, y), "give those, of a model wrapped to take one tensor"))
        if not self.accelerator.sync_gradients:
            return None
        return self.watch.before_update(self.accelerator.gradient_accumulation_steps)

    def write(self, numbers: Numbers) -> None:
        self.accelerator.log(numbers, step=self.watch.noise.update - 1)

    def end_epoch(self) -> float | None:
        """Call it after each epoch where `every` counts epochs: the mean C2 of the measurements in
        it, None if none."""
        return self.watch.noise.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        return self.watch.noise.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.watch.noise.load_state_dict(state)


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes without the autocast that accelerator.prepare has put around its
    forward."""
    network = getattr(model, "_orig_mod", model)  # of one that torch.compile wraps
    with instead(network, "forward", vars(network).get("_original_forward", network.forward)):
        yield
