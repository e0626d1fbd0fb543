"""What a recipe still does to training images once they are cropped and flipped: RandAugment on
their pixels, and random erasing (Zhong et al. 2020) once they are normalised.

It is done where batches are made, on their device, so that every loader gives the same bits: what
is drawn for a sample is a function of (seed, epoch, sample).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsmooth.data.images import DataConfig
from fastsmooth.data.order import ERASE, ERASE_ATTEMPT, philox
from fastsmooth.data.randaugment import draw, randaugment

ATTEMPTS = 10  # at a box that fits, of RandomErasing, before it leaves an image as it is
SCALE, RATIO = (0.02, 0.33), (0.3, 3.3)  # of the image's area; height by width


@dataclass(frozen=True)
class Changes:
    """With the random numbers of `seed`: `operations` of RandAugment of this magnitude, and a box
    that is erased with probability `erasing`."""

    seed: int
    operations: int = 0
    magnitude: int = 0
    erasing: float = 0.0

    def augmented(self, images: Tensor, epoch: int, index: Tensor) -> Tensor:
        """The samples `index`, int64 [n] on the CPU, after RandAugment: images uint8 [n, C, S, S]
        and a new tensor like them."""
        drawn = draw(self.seed, epoch, index, self.operations)
        return randaugment(images, drawn, self.magnitude)

    def boxes(self, size: int, epoch: int, index: Tensor) -> Tensor:
        """What is erased of the samples `index`, int64 [n], as erased_boxes gives it, on the
        index's device."""
        return erased_boxes(self.erasing, size, self.seed, epoch, index)


def changes_of(c: DataConfig) -> Changes | None:
    """What the flags ask for; None where that is nothing."""
    operations, magnitude = map(int, (c.randaugment or "0,0").split(","))
    if not operations and not c.random_erasing:
        return None
    return Changes(c.seed, operations, magnitude, c.random_erasing)


def erased_boxes(share: float, size: int, seed: int, epoch: int, index: Tensor) -> Tensor:
    """int64 [n, 4] rows (top, left, height, width), as torchvision's RandomErasing draws them with
    probability `share` for images of size x size pixels; of 0 pixels where nothing is erased."""
    streams = ERASE_ATTEMPT + torch.arange(ATTEMPTS, device=index.device)[:, None]
    # each [ATTEMPTS, n]
    area, ratio, at_y, at_x = philox(seed, epoch, index, streams).double() / 2**32
    target = size * size * (SCALE[0] + area * (SCALE[1] - SCALE[0]))
    low, high = map(math.log, RATIO)
    ratio = torch.exp(low + ratio * (high - low))
    h, w = torch.sqrt(target * ratio).round().long(), torch.sqrt(target / ratio).round().long()
    fits = (h < size) & (w < size)
    first = fits.long().argmax(dim=0, keepdim=True)
    h, w, at_y, at_x = (value.gather(0, first)[0] for value in (h, w, at_y, at_x))
    top, left = (at_y * (size - h + 1)).long(), (at_x * (size - w + 1)).long()
    chosen = philox(seed, epoch, index, ERASE)[0].double() / 2**32 < share
    return torch.stack([top, left, h, w], dim=1) * (chosen & fits.any(dim=0))[:, None]


def erase(stored: Tensor, boxes: Tensor) -> None:
    """Write 0, the mean of normalised images, into these boxes, int64 [n, 4] as erased_boxes gives
    them, of images [n, S, S, C]. Nothing is read on the host."""
    pixels = torch.arange(stored.shape[1], device=stored.device)
    top, left, height, width = boxes.T[:, :, None]
    down = (pixels >= top) & (pixels < top + height)  # [n, S]
    across = (pixels >= left) & (pixels < left + width)
    stored.masked_fill_((down[:, :, None] & across[:, None, :])[..., None], 0.0)
