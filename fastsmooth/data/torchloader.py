"""PyTorch's DataLoader with PIL and torchvision's transforms, one image after the other: the reference of the engines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastsmooth.data import augment
from fastsmooth.data.chunks import Chunk, Job
from fastsmooth.data.sets import DataError, open_image
from fastsmooth.data.source import Source

Item = tuple[int, list[int], list[float] | None]  # sample, the box of its view, the numbers that `draw` gave


class Images(Dataset):
    """One image at a time, decoded and augmented with the numbers that come with its index.

    It is uint8 [size, size, 3] with None, or black with the reason, which the main process reports.
    """

    def __init__(self, source: Source):
        self.split, self.index, self.kind, self.size = source.split, source.index, source.kind, source.size

    def __getitem__(self, item: Item) -> tuple[np.ndarray, str | None]:
        index, box, drawn = item
        try:
            image = self.open(index)
        except DataError as error:
            return np.zeros((self.size, self.size, 3), dtype=np.uint8), str(error)
        if drawn is not None and self.kind == "resized-crop-flip":
            return np.asarray(augment.resized_crop_flip(image, box, drawn[0], self.size)), None
        image = augment.evaluation_view(image, self.kind, self.size)
        return np.asarray(image if drawn is None else augment.crop_flip_rotate(image, drawn, self.size)), None

    def open(self, index: int) -> Image.Image:
        if self.split.pixels is not None:
            return Image.fromarray(self.split.pixels[index])
        image = open_image(self.split.paths[index])
        self.index.check(index, self.split.paths[index], image.size)
        return image


def collate(images: list[tuple[np.ndarray, str | None]]) -> tuple[Tensor, dict[int, str]]:
    """uint8 [m, size, size, 3], and why some are black, by their place."""
    pixels, reasons = zip(*images, strict=True)
    return torch.from_numpy(np.stack(pixels)), {k: reason for k, reason in enumerate(reasons) if reason}


class Items:
    """What the DataLoader takes its lists of items from; exchanged before each pass."""

    def __init__(self) -> None:
        self.source: Iterable[list[Item]] = ()

    def __iter__(self) -> Iterator[list[Item]]:
        return iter(self.source)


class TorchEngine:
    """Chunks by worker processes, each a chunk at a time; they are kept between passes."""

    ahead = False

    def __init__(self, source: Source, workers: int, pinned: bool):
        self.source, self.workers, self.pinned = source, workers, pinned
        self.images = Images(source)
        self._items, self._loader, self._busy = Items(), None, False

    def chunks(self, jobs: Iterator[Job]) -> Iterator[Chunk]:
        items, loader, kept = self._claim()
        waiting: list[Job] = []  # what the DataLoader has drawn ahead

        def drawn() -> Iterator[list[Item]]:
            for job in jobs:
                waiting.append(job)
                yield self.items(job)

        items.source = drawn()
        try:
            for pixels, reasons in loader:
                job = waiting.pop(0)
                for k, reason in reasons.items():
                    self.source.bad.report(self.source.split.paths[job.index[k]], reason)
                yield Chunk(job, pixels, None)
        finally:
            items.source.close()  # suspended, it and the kept DataLoader hold each other, which stalls the garbage collector
            self._busy = self._busy and not kept

    def items(self, job: Job) -> list[Item]:
        drawn = self.source.drawn(job)
        numbers = [None] * len(job.index) if drawn is None else drawn.tolist()
        boxes = self.source.views(job, drawn).box.tolist() if self.source.index else [None] * len(job.index)
        return list(zip(job.index.tolist(), boxes, numbers, strict=True))

    def _claim(self) -> tuple[Items, DataLoader, bool]:
        """The kept DataLoader, or one of its own for a pass inside another pass."""
        if self._busy:
            items = Items()
            return items, self._make(items), False
        if self._loader is None:
            self._loader = self._make(self._items)
        self._busy = True
        return self._items, self._loader, True

    def _make(self, items: Items) -> DataLoader:
        return DataLoader(
            self.images,
            batch_sampler=items,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.pinned,
            generator=torch.Generator(),  # without one of its own each pass would move the global random state
        )
