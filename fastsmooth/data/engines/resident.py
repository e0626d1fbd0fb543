"""All images of a split on the device: a batch is one look-up, crop, flip, rotation and
normalisation included."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastsmooth.data import augment
from fastsmooth.data.chunks import Loader, Segment, normalisation
from fastsmooth.data.images import Split
from fastsmooth.kernels.augment import augment as augmented

# samples: few enough for the intermediate numbers to stay in a processor's cache
DRAWN_AT_ONCE = 8192


class ResidentLoader(Loader):
    """Serves batches of any size from the pixels of a split; `kind` is the augmentation."""

    def __init__(
        self,
        split: Split,
        kind: str,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ):
        if split.pixels is None:
            raise ValueError("a split of files has no pixels: decode it first")
        self.stored = torch.from_numpy(split.pixels).to(device)  # [n, size, size, 3]
        self.labels = torch.from_numpy(split.labels).to(device)
        self.table = normalisation(mean, std, device)
        self.kind, self.seed, self.size, self.device = kind, seed, split.pixels.shape[1], device
        self._drawn: tuple[int, Tensor] | None = None

    def reader(self, segments: Iterable[Segment]) -> ResidentReader:
        return ResidentReader(self, segments)

    def moves(self, epoch: int | None) -> Tensor | None:
        """What the epoch's augmentation does to each image, int32 [n, 8], drawn once an epoch."""
        if epoch is None or self.kind == "none":
            return None
        if self._drawn is None or self._drawn[0] != epoch:
            parts = torch.arange(len(self), device=self.device).split(DRAWN_AT_ONCE)
            kind, size = self.kind, self.size
            drawn = (augment.draw(kind, size, self.seed, epoch, part) for part in parts)
            moves = [augment.moves(kind, size, params) for params in drawn]
            self._drawn = epoch, torch.cat(moves)
        return self._drawn[1]


class ResidentReader:
    """The samples of the segments, in order."""

    def __init__(self, loader: ResidentLoader, segments: Iterable[Segment]):
        self.loader, self._segments = loader, iter(segments)
        self._index: Tensor | None = None

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """As Reader.take: float32 [count, 3, size, size] in channels-last memory, int64 [count]."""
        if self._index is None:
            index, self._epoch, self._at = next(self._segments)
            self._index = index.to(self.loader.device).contiguous()  # a rank's share has gaps
        index = self._index[self._at : self._at + count]
        self._at += count
        x = augmented(self.loader.stored, index, self.loader.moves(self._epoch), self.loader.table)
        return x.permute(0, 3, 1, 2), self.loader.labels[index]

    def advance(self) -> None:
        self._index = None

    def close(self) -> None:
        pass
