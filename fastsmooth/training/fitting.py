"""How many samples of a batch go through the model together: --micro-batch auto."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from fastsmooth.cli.flags import ConfigError
from fastsmooth.data import Data
from fastsmooth.foreign import Driven
from fastsmooth.noise.gradients import undisturbed
from fastsmooth.ranks import Ranks
from fastsmooth.training.ending import ran_out_of_memory
from fastsmooth.training.objective import Objective
from fastsmooth.training.plan import Plan
from fastsmooth.training.step import Step, return_freed_memory

# Whose memory says when it is full. A processor's is promised beyond what there is, and where a
# limit refuses it (ulimit -v), oneDNN has none left for its code, and may end the process.
TRIED = {"cuda", "mps"}
SPARE = 16  # of a GPU's free memory, one part in so many stays free for what comes beside a step


def largest_share(
    plan: Plan, images: Data, processes: int
) -> tuple[int, tuple[int, int, int, int]]:
    """(samples, their shape [B, C, S, S]) of a process in the batch of the plan that takes most
    memory."""
    sizes, epoch = plan.sizes, 0
    batches = {(size, images.size) for size in plan.measured.values()}
    for span in plan.spans():
        epochs = range(epoch, epoch + span.epochs)
        sides = {sizes(e) for e in epochs} if sizes.changes else {images.size}
        batches |= {(size, side) for _, size in span.batches for side in sides}
        epoch = epochs.stop
    samples, side = max(batches, key=lambda batch: (batch[0] * batch[1] ** 2, batch))
    share = -(-samples // processes)
    return share, (share, images.channels, side, side)


def lone_samples(
    plan: Plan, processes: int, parts: int | None
) -> Iterator[tuple[str, int, list[str]]]:
    """What goes through the model in training mode (Plan.in_training_mode) and would leave a sample
    alone, cut into parts of so many samples."""
    joined = plan.config.sync_bn and processes > 1
    for where, size, remedies in plan.in_training_mode():
        shares = {size} if joined else {size // processes, -(-size // processes)} - {0}
        if any(share == 1 or (parts and share % parts == 1 % parts) for share in shares):
            yield where, size, remedies


def one_left(plan: Plan, processes: int, one_alone: bool, parts: int) -> bool:
    """Whether parts of so many samples leave one alone, on which the model cannot train."""
    return not one_alone and next(lone_samples(plan, processes, parts), None) is not None


class Trial:
    """A batch of images, `shape` [B, C, S, S], which one process computes by itself.

    Args: model and optimizer, those of the run, which stay as they are; precision: fp32, tf32 or
    bf16; bn: what Step wants to know of BatchNorm.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Driven,
        shape: tuple[int, int, int, int],
        precision: str,
        bn: str | None,
        objective: Objective,
    ):
        self.model, self.optimizer, self.shape = model, optimizer, shape
        self.precision, self.bn, self.objective = precision, bn, objective
        self.device = next(model.parameters()).device

    def fits(self, samples: int) -> bool:
        """Whether the gradient of the batch can be had with so many samples together.

        Parameters, buffers, gradients and random numbers are afterwards what they were.
        """
        try:
            with undisturbed(self.model, "train"):
                self._gradient(samples)
            return True
        except Exception as error:
            if not ran_out_of_memory(error, torch):
                raise
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return_freed_memory()
        return False

    def _gradient(self, samples: int) -> None:
        spare = self._spare()
        step = Step(
            self.model,
            self.optimizer,
            self.device,
            self.precision,
            compile=False,
            micro_batch=samples if samples < self.shape[0] else None,
            bn=self.bn,
            objective=self.objective,
        )
        x = torch.zeros(self.shape, dtype=step.dtype, device=self.device)
        y = torch.zeros(self.shape[0], dtype=torch.int64, device=self.device)
        step.gradient(x, y)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        del spare

    def _spare(self) -> torch.Tensor | None:
        """Memory that is held while the batch is tried."""
        if self.device.type != "cuda":
            return None
        free = torch.cuda.mem_get_info(self.device)[0]
        return torch.empty(free // SPARE, dtype=torch.uint8, device=self.device)


def halves(samples: int) -> Iterator[int]:
    """All, a half, a quarter ... one of them, rounded up: so that parts are as equal as can be."""
    while samples > 1:
        yield samples
        samples = -(-samples // 2)
    yield samples


def what_fits(
    share: int, fits: Callable[[int], bool], leaves_one_alone: Callable[[int], bool]
) -> int:
    """The first of the halves of a share that fits, of those that leave no sample alone where none
    may be. Raises ConfigError where there is none."""
    smallest = share
    for samples in halves(share):
        if samples < share and leaves_one_alone(samples):
            continue
        if fits(samples):
            return samples
        smallest = samples
    several = "s" * (smallest > 1)
    raise ConfigError(
        f"--micro-batch auto: not even {smallest} sample{several} fit{'s' * (not several)} in "
        "memory together: use a smaller --model or --image-size"
        + (", or --norm group, under which one may go through the model alone" * (smallest > 1))
    )


def smallest_of(ranks: Ranks, found: int, share: int) -> int | None:
    """What --micro-batch auto comes to: what the process has found that fits fewest; None where the
    whole `share` fits everywhere."""
    fewest = min(ranks.gather(found))
    return fewest if fewest < share else None


def told(share: int, samples: int | None, tried: bool) -> str:
    """The same in words; `tried`: or it was not."""
    if not tried:
        return "--micro-batch auto: whole batches, since what fits is tried on a GPU alone"
    if samples is None:
        return f"--micro-batch auto: the largest batch fits in memory ({share} samples together)"
    return f"micro-batch {samples}: {share} samples do not fit in memory together"
