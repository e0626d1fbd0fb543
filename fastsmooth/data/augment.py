"""Random crop, flip and rotation: the numbers drawn for each sample, and what they do to a batch or to one image.

The same numbers give the same pixels in both forms, and both equal torchvision's transforms on PIL images bit for bit
(RandomCrop with zero padding, RandomHorizontalFlip, RandomRotation(15) nearest).
"""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from fastsmooth.data.order import AUGMENT, CROP_ATTEMPT, philox

MAX_ANGLE = 15.0  # degrees
ATTEMPTS = 10  # of RandomResizedCrop before it falls back to a central crop
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def padding(size: int) -> int:
    """4 pixels at 32, the same share at other sizes."""
    return max(1, size // 8)


def draw(kind: str, size: int, seed: int, epoch: int, index: Tensor) -> Tensor:
    """The augmentation's parameters for the samples `index` [n]: float64 [n, 4] rows (top, left, flip, angle).

    top and left count from 0 to 2 padding. For resized-crop-flip the row is (flip, then four uniforms an attempt),
    since the box depends on the image: crop_box makes it.
    """
    words = philox(seed, epoch, index, AUGMENT)
    if kind == "resized-crop-flip":
        attempts = [philox(seed, epoch, index, CROP_ATTEMPT + k) for k in range(ATTEMPTS)]
        uniforms = torch.cat(attempts).double() / 2**32
        return torch.cat([(words[2] >> 31).double()[None], uniforms]).T
    spread = 2 * padding(size) + 1
    top, left = (words[0] * spread) >> 32, (words[1] * spread) >> 32
    angle = (words[3].double() / 2**32 * 2 - 1) * MAX_ANGLE
    if kind == "crop-flip":
        angle = torch.zeros_like(angle)
    return torch.stack([top.double(), left.double(), (words[2] >> 31).double(), angle], dim=1)


def source_pixels(params: Tensor, size: int, rotate: bool) -> Tensor:
    """Where each output pixel comes from: int64 [n, size * size], the pixel's index, or size * size for the zero fill.

    Crop, flip and rotation collapse into one look-up. Rotation follows PIL's nearest affine transform, which works in
    16.16 fixed point from coefficients rounded to 15 decimals.
    """
    top, left, flip, angle = params.T[:, :, None, None]  # each [n, 1, 1]
    pixels = torch.arange(size, device=params.device)
    y, x = pixels[:, None], pixels[None, :]
    inside = torch.ones((), dtype=torch.bool, device=params.device)
    if rotate:
        radians = -torch.deg2rad(angle)
        cos, sin = (f(radians).round(decimals=15) for f in (torch.cos, torch.sin))
        half = size / 2
        x0 = cos * -half + sin * -half + half + cos * 0.5 + sin * 0.5
        y0 = -sin * -half + cos * -half + half - sin * 0.5 + cos * 0.5
        x, y = (
            (fixed(x0) + x * fixed(cos) + y * fixed(sin)) >> 16,
            (fixed(y0) + x * fixed(-sin) + y * fixed(cos)) >> 16,
        )
        inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    x = torch.where(flip != 0, size - 1 - x, x) + left.long() - padding(size)
    y = y + top.long() - padding(size)
    inside = inside & (x >= 0) & (x < size) & (y >= 0) & (y < size)
    return torch.where(inside, y * size + x, size * size).flatten(1)


def fixed(value: Tensor) -> Tensor:
    """16.16 fixed point, rounded as PIL does."""
    return torch.floor(value * 65536 + 0.5).long()


def crop_flip_rotate(image: Image.Image, params: list[float], size: int) -> Image.Image:
    """One PIL image through torchvision's functions with the numbers that `draw` gave."""
    top, left, flip, angle = params
    image = TF.crop(TF.pad(image, padding(size), fill=0), int(top), int(left), size, size)
    if flip:
        image = TF.hflip(image)
    return TF.rotate(image, angle, InterpolationMode.NEAREST, fill=0) if angle else image


def resized_crop_flip(image: Image.Image, params: list[float], size: int) -> Image.Image:
    """RandomResizedCrop(size) and RandomHorizontalFlip with the numbers that `draw` gave."""
    top, left, height, width = crop_box(image.width, image.height, params[1:])
    image = TF.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    return TF.hflip(image) if params[0] else image


def crop_box(width: int, height: int, uniforms: list[float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) as torchvision's RandomResizedCrop.get_params draws them, from given uniforms."""
    by_attempt = [uniforms[k : k + 4] for k in range(0, len(uniforms), 4)]
    for area, ratio, at_y, at_x in by_attempt:
        target = width * height * (SCALE[0] + area * (SCALE[1] - SCALE[0]))
        log_ratio = math.log(RATIO[0]) + ratio * (math.log(RATIO[1]) - math.log(RATIO[0]))
        w = round(math.sqrt(target * math.exp(log_ratio)))
        h = round(math.sqrt(target / math.exp(log_ratio)))
        if 0 < w <= width and 0 < h <= height:
            return int(at_y * (height - h + 1)), int(at_x * (width - w + 1)), h, w
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def evaluation_view(image: Image.Image, kind: str, size: int) -> Image.Image:
    """The view that is tested: Resize and CenterCrop; the short side is 256/224 of the crop for ImageNet's recipe."""
    short = round(size * 256 / 224) if kind == "resized-crop-flip" else size
    if image.size != (size, size) or short != size:
        image = TF.center_crop(TF.resize(image, short, antialias=True), [size, size])
    return image
