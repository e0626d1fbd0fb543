"""The plain DataLoader behind the same order and the same random numbers: for sets that do not fit, and as reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastsmooth.data import augment
from fastsmooth.data.sets import DataError, Split, open_image


class Images(Dataset):
    """One image at a time, decoded and augmented with the numbers that come with its index."""

    def __init__(self, split: Split, kind: str, size: int):
        self.split, self.kind, self.size = split, kind, size

    def __getitem__(self, item: tuple[int, list[float] | None]) -> tuple[np.ndarray, int] | str:
        index, params = item
        try:
            image = self.open(index)
        except DataError as error:
            return str(error)  # raised in the main process, where it is one line
        if params is None or self.kind == "none":
            image = augment.evaluation_view(image, self.kind, self.size)
        elif self.kind == "resized-crop-flip":
            image = augment.resized_crop_flip(image, params, self.size)
        else:
            image = augment.evaluation_view(image, self.kind, self.size)
            image = augment.crop_flip_rotate(image, params, self.size)
        return np.asarray(image), int(self.split.labels[index])

    def open(self, index: int) -> Image.Image:
        if self.split.pixels is not None:
            return Image.fromarray(self.split.pixels[index])
        return open_image(self.split.paths[index])


def collate(items: list) -> tuple[Tensor, Tensor] | str:
    for item in items:
        if isinstance(item, str):
            return item
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in items]))  # [B, size, size, 3]
    return pixels, torch.tensor([label for _, label in items])


class Batches:
    """What the DataLoader takes its batches of (index, parameters) from; exchanged before each pass."""

    def __init__(self) -> None:
        self.source: Iterable[list] = ()

    def __iter__(self) -> Iterator[list]:
        return iter(self.source)


class TorchLoader:
    """The same interface as ResidentLoader; workers are kept between passes."""

    def __init__(self, split: Split, kind: str, size: int, seed: int, mean, std, device: torch.device, workers: int):
        self.images, self.kind, self.size, self.seed = Images(split, kind, size), kind, size, seed
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
        self.device, self.workers = device, workers
        self.labels = torch.from_numpy(split.labels)
        self._sampler, self._loader, self._busy = Batches(), None, False

    def __len__(self) -> int:
        return len(self.images.split)

    def batches(self, indices: Iterable[Tensor], epoch: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """As ResidentLoader.batches. A file that cannot be read raises DataError with its name."""
        sampler, loader, kept = self._claim()
        sampler.source = map(lambda index: self.items(index.cpu(), epoch), indices)
        try:
            for batch in loader:
                if isinstance(batch, str):
                    raise DataError(batch)
                pixels, labels = (t.to(self.device, non_blocking=True) for t in batch)
                x = pixels.to(torch.float32).div_(255).sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)
                yield x, labels
        finally:
            self._busy = self._busy and not kept

    def items(self, index: Tensor, epoch: int | None) -> list:
        if epoch is None or self.kind == "none":
            return [(i, None) for i in index.tolist()]
        drawn = augment.draw(self.kind, self.size, self.seed, epoch, index)
        return list(zip(index.tolist(), drawn.tolist(), strict=True))

    def _claim(self) -> tuple[Batches, DataLoader, bool]:
        """The kept DataLoader, or one of its own for a pass inside another pass."""
        if self._busy:
            sampler = Batches()
            return sampler, self._make(sampler), False
        if self._loader is None:
            self._loader = self._make(self._sampler)
        self._busy = True
        return self._sampler, self._loader, True

    def _make(self, sampler: Batches) -> DataLoader:
        return DataLoader(
            self.images,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # without one of its own each pass would move the global random state
        )
