"""The first update at which a running mean of gradient norms is at most a threshold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsmooth.kernels.backend import wide_dtype


class NormRecord:
    """The running mean of gradient norms and the first update at which it is at most each eps, kept
    on the device.

    After norm_1 .. norm_t the mean is that of the norms ("mean-norm", "full-grad") or the root of
    that of their squares ("rms-norm"). observe() works on the device alone, always on the same
    tensors, so that it can be part of a captured update; and the update of a crossing is exact
    however rarely `first` is read.
    """

    def __init__(self, eps: tuple[float, ...], criterion: str, ignore: int, device: torch.device):
        wide = wide_dtype(device)
        self.squares = criterion == "rms-norm"
        self.ignore = ignore  # updates before which no crossing counts
        self.eps = torch.tensor(eps, dtype=wide, device=device)
        self.first = torch.zeros(len(eps), dtype=torch.int64, device=device)  # 0: not yet
        # of norms, of squares, and the largest norm
        self.sums = torch.zeros(3, dtype=wide, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    def observe(self, norm: Tensor, update: Tensor) -> None:
        """Take in the gradient norm, 0-d, of update number `update`, int64 0-d, counted from 1."""
        self.count += 1
        self.sums[:2] += torch.stack([norm, norm**2])
        self.sums[2].copy_(torch.maximum(self.sums[2], norm))
        crossed = (self.running() <= self.eps) & (self.first == 0) & (update > self.ignore)
        self.first.copy_(torch.where(crossed, update, self.first))

    def running(self) -> Tensor:
        """What is compared with eps, 0-d."""
        return (self.sums[1] / self.count).sqrt() if self.squares else self.sums[0] / self.count

    def crossings(self) -> list[int]:
        """The update of the first crossing of each eps, 0 where there was none."""
        return self.first.tolist()

    def summary(self) -> dict[str, float]:
        norms, squares, largest = self.sums.tolist()
        count = max(self.count.item(), 1)
        return {
            "grad_norm_mean": norms / count,
            "grad_norm_rms": math.sqrt(squares / count),
            "grad_norm_max": largest,
        }

    def state_dict(self) -> dict:
        return {"first": self.first, "sums": self.sums, "count": int(self.count)}

    def load_state_dict(self, state: dict) -> None:
        self.first.copy_(state["first"])
        self.sums.copy_(state["sums"])
        self.count.fill_(state["count"])
