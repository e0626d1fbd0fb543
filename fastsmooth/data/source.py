"""What the engines read from: the images of a split, their sizes, and what is done about those that
cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastsmooth.data import augment, reduced
from fastsmooth.data.augment import View, Views
from fastsmooth.data.chunks import Job
from fastsmooth.data.files import Files
from fastsmooth.data.images import DataError, Sizes, Split, open_image, size_in
from fastsmooth.data.index import Index


class BadImages:
    """Files that cannot be read. With "raise" the first ends the run; with "zeros" they are black,
    and are counted."""

    def __init__(self, policy: str, say: Callable[[str], None]):
        self.policy, self.say = policy, say
        self.reasons: dict[str, str] = {}  # by path

    def report(self, path: str, reason: str) -> None:
        """Raises DataError(reason), or keeps it and says it once."""
        if self.policy == "raise":
            raise DataError(f"{reason}; or serve it black with --on-bad-image zeros")
        if path not in self.reasons:
            self.reasons[path] = reason
            self.say(f"{DataError(reason)}; it is served black")


@dataclass
class Source:
    """A split with what its augmentation is: `kind`, at `size` pixels a side, or in training at
    those of `sizes`, with the random numbers of `seed`."""

    split: Split
    index: Index  # of a split of files; NO_FILES of one of pixels
    kind: str
    size: int
    seed: int
    bad: BadImages
    reduced: bool = False  # whether a JPEG may be decoded at a smaller scale
    sizes: Sizes | None = None

    def size_in(self, epoch: int | None) -> int:
        """Pixels a side in this epoch; with None as they are tested."""
        return size_in(epoch, self.size, self.sizes)

    @property
    def files(self) -> Files:
        """Of a split of files."""
        if self.split.files is None:
            raise ValueError("a split of pixels has no files")
        return self.split.files

    def drawn(self, job: Job) -> Tensor | None:
        """augment.draw's rows for the m samples of the job: float64 [m, 4], of resized-crop-flip
        [m, 1 + 4 ATTEMPTS]. None where nothing is drawn."""
        if job.epoch is None or self.kind == "none":
            return None
        size = self.size_in(job.epoch)
        return augment.draw(self.kind, size, self.seed, job.epoch, job.index)

    def moves(self, job: Job, drawn: Tensor | None) -> Tensor | None:
        """int32 [m, 8], what is left to do once the views are cut out."""
        if drawn is None:
            return None
        return augment.moves(self.kind, self.size_in(job.epoch), drawn)

    def views(self, job: Job, drawn: Tensor | None) -> Views:
        """What is wanted of each file of the job: box [m, 4], scaled and corner [m, 2], int64 on
        the CPU, in pixels. `drawn` is what the method of that name gave."""
        at = job.index.numpy()
        # an image that cannot be read has no size, and gets some view that nobody looks at
        width, height = (
            torch.from_numpy(v[at].astype(np.int64)).clamp(min=1)
            for v in (self.index.width, self.index.height)
        )
        return augment.views(self.kind, self.size_in(job.epoch), drawn, width, height)

    def given(self, i: int, view: View) -> np.ndarray | None:
        """Pixels, uint8 [size, size, 3], of a sample no fast decoder may read; else None.

        Black where the header was bad, or an earlier decoding, once that is reported; PIL's where
        others would differ, or cannot decode at a smaller scale as is wanted.
        """
        path = self.files.names[i]
        if i in self.index.bad:
            self.bad.report(path, self.index.bad[i])
        if i in self.index.bad or path in self.bad.reasons:
            return black(view[-1])
        if not self.index.plain[i]:
            return self.by_pil(i, view)
        smaller = self.at_smaller_scale(i, view)
        return None if smaller is None else np.asarray(smaller)

    def by_pil(self, i: int, view: View) -> np.ndarray:
        """The view of sample i by PIL, uint8 [size, size, 3]; black, once that is reported, where
        there is none."""
        path = self.files.names[i]
        (top, left, height, width), (tall, wide), (down, right), size = view
        try:
            image = open_image(self.files, i)
            self.index.check(i, path, image.size)
            image = image.crop((left, top, left + width, top + height))
        except DataError as error:
            self.bad.report(path, str(error))
            return black(size)
        image = image.resize((wide, tall), Image.Resampling.BILINEAR)
        return np.array(image.crop((right, down, right + size, down + size)))

    def at_smaller_scale(self, i: int, view: View) -> Image.Image | None:
        """The view of sample i where it may be decoded so; None where the whole image is to be."""
        if not self.reduced or reduced.factor(view) == 1:
            return None
        size = int(self.index.width[i]), int(self.index.height[i])
        # a file that was replaced has no view: Index.check has the words
        return reduced.decoded(self.files, i, lambda *now: view if now == size else None)


def black(size: int) -> np.ndarray:
    """uint8 [size, size, 3]."""
    return np.zeros((size, size, 3), dtype=np.uint8)
