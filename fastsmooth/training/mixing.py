"""Training batches whose images are mixed with each other: mixup (Zhang et al. 2018) and cutmix
(Yun et al. 2019), as torchvision's transforms.v2.MixUp and CutMix do it.

A batch has one share and one box, and its images are mixed with those of the batch rolled by one.
Both are functions of (seed, epoch, place of the batch in the epoch's order). The host puts them
where the device reads them, so that the mixing itself may be captured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsmooth.kernels.backend import sent


class Mix(NamedTuple):
    """One batch's numbers: what an image keeps of itself outside of the box, what its target keeps,
    and the box of the other image, (top, left, bottom, right) in pixels."""

    own: float
    target: float
    box: tuple[int, int, int, int] = (0, 0, 0, 0)


def drawn(mixup: float, cutmix: float, size: int, seed: int, epoch: int, place: int) -> Mix:
    """The numbers of the batch that begins at this place of the epoch, of size x size pixels.

    The share is from Beta(mixup, mixup) or Beta(cutmix, cutmix). With both, half of the batches are
    cut, as with timm's mixup_switch_prob of 0.5.
    """
    bits = np.random.Philox(key=seed, counter=[0, place, epoch, 0])
    numbers = np.random.RandomState(bits)  # what it gives no version of NumPy changes (NEP 19)
    cuts = numbers.random_sample() < 0.5 if mixup and cutmix else bool(cutmix)
    alpha = cutmix if cuts else mixup
    share = float(numbers.beta(alpha, alpha))
    if not cuts:
        return Mix(share, share)
    x, y = numbers.randint(size, size=2).tolist()
    half = int(0.5 * math.sqrt(1.0 - share) * size)
    top, left, bottom, right = (
        min(max(edge, 0), size) for edge in (y - half, x - half, y + half, x + half)
    )
    # the box may reach over the edge
    left_over = 1.0 - (right - left) * (bottom - top) / (size * size)
    return Mix(1.0, left_over, (top, left, bottom, right))


class Mixer:
    """Mixes batches: `draw` says how before each update. alphas are 0 for what is not done."""

    def __init__(self, mixup: float, cutmix: float, seed: int, classes: int, device: torch.device):
        self.mixup, self.cutmix, self.seed, self.device = mixup, cutmix, seed, device
        self.classes = torch.arange(classes, device=device)
        # own and other share of images, then of targets; top, left, bottom, right: nothing is mixed
        self.numbers = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], device=device)

    def draw(self, epoch: int, place: int, size: int) -> None:
        """Have the batch that begins at this place of the epoch, of size x size pixels, mixed by
        its numbers from now on."""
        own, target, box = drawn(self.mixup, self.cutmix, size, self.seed, epoch, place)
        values = torch.tensor([own, 1.0 - own, target, 1.0 - target, *box])
        self.numbers.copy_(sent(values, self.device))

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed x [b, C, S, S], of its dtype and memory format, and the share of each class in it,
        float32 [b, classes], for y int64 [b]. Nothing is read on the host."""
        own, other, target_own, target_other, top, left, bottom, right = self.numbers
        stored = x.permute(0, 2, 3, 1)
        rolled = stored.roll(1, 0)
        mixed = rolled.float() * other + stored.float() * own
        pixels = torch.arange(x.shape[2], device=x.device)
        down, across = (pixels >= top) & (pixels < bottom), (pixels >= left) & (pixels < right)
        inside = (down[:, None] & across)[..., None]
        mixed = torch.where(inside, rolled, mixed.to(x.dtype))
        shares = (y[:, None] == self.classes).float()
        shares = shares.roll(1, 0) * target_other + shares * target_own
        return mixed.permute(0, 3, 1, 2), shares
