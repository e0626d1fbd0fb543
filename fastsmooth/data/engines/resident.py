"""All images of a split on the device: a batch is one look-up, crop, flip, rotation and
normalisation included.

Where the size of the images changes over a run, those of one size are kept, and decoded anew when
an epoch of another begins: in the memory of the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fastsmooth.data import augment
from fastsmooth.data.changes import Changes
from fastsmooth.data.chunks import Images, Loader, Segment, tables
from fastsmooth.data.images import Sizes, Split, size_in
from fastsmooth.kernels.augment import augment as augmented

# samples: few enough for the intermediate numbers to stay in a processor's cache
DRAWN_AT_ONCE = 8192


class ResidentLoader(Loader):
    """Serves batches of any size from the pixels of a split; `kind` is the augmentation.

    `sizes`: of the training images by epoch, where they are not always those of `split`; then
    `decoded` gives the split with its images at a size, which may raise DataError.
    """

    def __init__(
        self,
        split: Split,
        kind: str,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        sizes: Sizes | None = None,
        decoded: Callable[[int], Split] | None = None,
        changes: Changes | None = None,
    ):
        self.device, self.sizes, self.decoded = device, sizes, decoded
        self.changes = changes
        self.stored = self._placed(split)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.tables = tables(mean, std, device)
        self.kind, self.seed = kind, seed
        self.size = sizes.values[-1] if sizes else self.stored.shape[1]
        self._drawn: tuple[int, Tensor] | None = None
        self._boxes: tuple[int, Tensor] | None = None

    def _placed(self, split: Split) -> Tensor:
        """uint8 [n, size, size, C], on the device."""
        if split.pixels is None:
            raise ValueError("a split of files has no pixels: decode it first")
        return torch.from_numpy(split.pixels).to(self.device)

    def pixels(self, epoch: int | None) -> Tensor:
        """The images at the size of this epoch, uint8 [n, size, size, C]; with None as they are
        tested. Raises DataError."""
        size = size_in(epoch, self.size, self.sizes)
        if self.sizes and self.decoded and size != self.stored.shape[1]:
            # its memory is given back before the other size needs it
            self.stored = self.stored.new_empty(0, 0, 0, self.stored.shape[3])
            self.stored = self._placed(self.decoded(size))
        return self.stored

    def reader(self, segments: Iterable[Segment]) -> ResidentReader:
        return ResidentReader(self, segments)

    def moves(self, epoch: int | None) -> Tensor | None:
        """What the epoch's augmentation does to each image, int32 [n, 8], drawn once an epoch."""
        if epoch is None or self.kind == "none":
            return None
        if self._drawn is None or self._drawn[0] != epoch:
            parts = torch.arange(len(self), device=self.device).split(DRAWN_AT_ONCE)
            kind, size = self.kind, size_in(epoch, self.size, self.sizes)
            drawn = (augment.draw(kind, size, self.seed, epoch, part) for part in parts)
            moves = [augment.moves(kind, size, params) for params in drawn]
            self._drawn = epoch, torch.cat(moves)
        return self._drawn[1]

    def boxes(self, epoch: int | None) -> Tensor | None:
        """What the epoch erases of each image, int64 [n, 4], drawn once an epoch."""
        changes = self.changes_in(epoch)
        if epoch is None or changes is None or not changes.erasing:
            return None
        if self._boxes is None or self._boxes[0] != epoch:
            parts = torch.arange(len(self), device=self.device).split(DRAWN_AT_ONCE)
            size = size_in(epoch, self.size, self.sizes)
            self._boxes = epoch, torch.cat([changes.boxes(size, epoch, part) for part in parts])
        return self._boxes[1]


class ResidentReader:
    """The samples of the segments, in order.

    What tells which they are lies on the device, and stays at its place in memory from segment to
    segment of one length: the order, the moves, the boxes, and the cursor that `ahead` reads. For
    RandAugment the host tells them, and there is no cursor.
    """

    def __init__(self, loader: ResidentLoader, segments: Iterable[Segment]):
        self.loader, self._segments = loader, iter(segments)
        self._begun = False
        self._pixels = torch.empty(0, dtype=torch.uint8)  # [n, size, size, C] once it has begun
        self._order = torch.empty(0, dtype=torch.int64, device=loader.device)
        self._moves: Tensor | None = None
        self._boxes: Tensor | None = None
        self._epoch: int | None = None
        self._index = torch.empty(0, dtype=torch.int64)  # the order on the CPU, for RandAugment
        self.cursor: Tensor | None = None
        if loader.changes is None or not loader.changes.operations:
            self.cursor = torch.zeros((), dtype=torch.int64, device=loader.device)

    def begin(self) -> None:
        if self._begun:
            return
        index, epoch, self._at = next(self._segments)
        self._epoch = epoch
        if self.cursor is None:
            self._index = index.cpu()
        self._pixels = self._pixels.new_empty(0)  # gives memory back where the size changes
        self._pixels = self.loader.pixels(epoch)
        moves = self.loader.moves(epoch)
        if len(index) == len(self._order):
            self._order.copy_(index)
        else:
            self._order = index.to(self.loader.device).contiguous()  # a rank's share has gaps
        self._moves = kept(self._moves, moves)
        self._boxes = kept(self._boxes, self.loader.boxes(epoch))
        if self.cursor is not None:
            self.cursor.fill_(self._at)
        self._begun = True

    def room(self, count: int, dtype: torch.dtype = torch.float32) -> Images:
        self.begin()
        return self.loader.room(count, dtype, self._pixels.shape[1])

    def take(self, count: int, into: Images | None = None) -> Images:
        self.begin()
        places = slice(self._at, self._at + count)
        self._at += count
        return self._look(self._order[places], into or self.room(count), self._index[places])

    def skip(self, count: int) -> None:
        self.begin()
        self._at += count

    def ahead(self, count: int, dtype: torch.dtype) -> Images:
        self.begin()
        return self._look(self._order, self.room(count, dtype), self._index, self.cursor)

    def advance(self) -> None:
        self._begun = False

    def close(self) -> None:
        pass

    def _look(
        self, rows: Tensor, images: Images, index: Tensor, cursor: Tensor | None = None
    ) -> Images:
        """The images of these samples, int64 on the device, of all or of those at the cursor;
        `index` are the samples on the CPU, for RandAugment."""
        x, y = images
        loader = self.loader
        changes = loader.changes_in(self._epoch)
        augmented(
            self._pixels,
            rows,
            self._moves,
            loader.table(x.dtype, changes),
            x.permute(0, 2, 3, 1),
            cursor,
            loader.labels,
            y,
        )
        if changes is not None and self._epoch is not None:
            boxes = self._boxes
            if boxes is not None:
                if cursor is not None:
                    rows = rows.index_select(0, cursor + torch.arange(len(y), device=rows.device))
                boxes = boxes.index_select(0, rows)
            loader.change(x, changes, self._epoch, index, boxes)
        return images


def kept(held: Tensor | None, values: Tensor | None) -> Tensor | None:
    """The values at the place in memory that is held already, if any."""
    if held is None or values is None:
        return None if values is None else values.clone()
    return held.copy_(values)
