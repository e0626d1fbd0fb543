"""All images of a split on the device: a batch is one gather, crop, flip and rotation included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from fastsmooth.data import augment
from fastsmooth.data.sets import Split


class ResidentLoader:
    """Serves batches of any size from pixels packed as 32-bit RGBX, so that a pixel moves in one piece."""

    def __init__(self, split: Split, kind: str, seed: int, mean, std, device: torch.device):
        n, size = len(split), split.pixels.shape[1]
        packed = np.zeros((n, size * size + 1, 4), dtype=np.uint8)  # one more pixel: the zero fill
        packed[:, :-1, :3] = split.pixels.reshape(n, -1, 3)
        # [n, size * size + 1]
        self.packed = torch.from_numpy(packed).to(device).view(torch.int32).squeeze(-1)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
        self.kind, self.seed, self.size, self.device = kind, seed, size, device
        self._drawn: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, indices: Iterable[Tensor], epoch: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, y) for each tensor of sample indices: x float32 [B, 3, size, size] normalised, y int64 [B].

        With an epoch the images are augmented with that epoch's numbers; with None they are as stored.
        """
        for index in indices:
            index = index.to(self.device)
            yield self.normalise(self.pixels(index, epoch)), self.labels[index]

    def pixels(self, index: Tensor, epoch: int | None) -> Tensor:
        """uint8 [B, size, size, 3]."""
        rows = self.packed.index_select(0, index)
        if epoch is None or self.kind == "none":
            rows = rows[:, :-1].contiguous()
        else:
            sources = augment.source_pixels(self.drawn(epoch)[index], self.size, self.kind == "crop-flip-rotate")
            rows = rows.gather(1, sources)
        return rows.view(torch.uint8).view(-1, self.size, self.size, 4)[..., :3]

    def drawn(self, epoch: int) -> Tensor:
        """The epoch's augmentation parameters for all samples, made once an epoch."""
        if self._drawn is None or self._drawn[0] != epoch:
            index = torch.arange(len(self), device=self.device)
            self._drawn = epoch, augment.draw(self.kind, self.size, self.seed, epoch, index)
        return self._drawn[1]

    def normalise(self, pixels: Tensor) -> Tensor:
        """As ToTensor and Normalize do it, in the same order of operations; channels last in memory."""
        return pixels.to(torch.float32).div_(255).sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)
