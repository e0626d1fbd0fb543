"""One image, from anywhere, as a trained network is shown it."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fastsmooth.data import augment
from fastsmooth.data.chunks import normalisation
from fastsmooth.data.files import Paths
from fastsmooth.data.images import DataError, open_image, pixels_of


@dataclass(frozen=True)
class TestedView:
    """The view of an image that a run tests with: called with a PIL image or the path of a file,
    it gives float32 [channels, size, size], normalised: the values that the run's own test images
    have.

    Args: mode, what the image is converted to, RGB or L; resize, pixels that the shorter side is
    brought to; size, those of the centre that is kept; channels of the network, 3 of an L image
    repeat it; mean and std, one a channel, of values from 0 to 1.

    Raises DataError for a file that cannot be read, and for what is neither.
    """

    mode: str
    resize: int
    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image | str | PathLike[str]) -> Tensor:
        if not isinstance(image, Image.Image):
            if not isinstance(image, str | PathLike):
                kind = type(image).__name__
                raise DataError(f"an image of type {kind}: give a PIL image, or the path of a file")
            image = open_image(Paths([str(Path(image))]), 0)
        image = augment.central(image.convert(self.mode), self.resize, self.size)
        pixels = torch.from_numpy(pixels_of(image).copy()).permute(2, 0, 1).long()
        table = normalisation(self.mean, self.std, pixels.device)
        pixels = pixels.expand(self.channels, -1, -1).flatten(1)
        return table.gather(1, pixels).view(self.channels, self.size, self.size)
