"""Random crop, flip and rotation: the numbers drawn for each sample, and what they do to a batch or
to one image.

The same numbers give the same pixels in both forms, and both equal torchvision's transforms on PIL
images bit for bit (RandomCrop with zero padding, RandomHorizontalFlip, RandomRotation(15) nearest).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from fastsmooth.data.order import AUGMENT, CROP_ATTEMPT, philox

MAX_ANGLE = 15.0  # degrees
ATTEMPTS = 10  # of RandomResizedCrop before it falls back to a central crop
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
ONE = 1 << 16  # in 16.16 fixed point

# of one image: its rows of box, scaled and corner, and size
View = tuple[list[int], list[int], list[int], int]


class Views(NamedTuple):
    """What a decoder is to make of n images of any size: int64 on the CPU, in pixels."""

    box: Tensor  # [n, 4] top, left, height, width: the part that is wanted
    scaled: Tensor  # [n, 2] height, width that it is resized to, antialiased
    corner: Tensor  # [n, 2] top, left of the size x size pixels that are kept of that

    def each(self, size: int) -> list[View]:
        rows = zip(*(rows.tolist() for rows in self), strict=True)
        return [(box, scaled, corner, size) for box, scaled, corner in rows]


def padding(size: int) -> int:
    """4 pixels at 32, the same share at other sizes."""
    return max(1, size // 8)


def draw(kind: str, size: int, seed: int, epoch: int, index: Tensor) -> Tensor:
    """The augmentation's parameters for the samples `index` [n]: float64 [n, 4] rows (top, left,
    flip, angle).

    top and left count from 0 to 2 padding. For resized-crop-flip the row is (flip, then four
    uniforms an attempt), since the box depends on the image: crop_boxes makes it.
    """
    words = philox(seed, epoch, index, AUGMENT)
    if kind == "resized-crop-flip":
        streams = CROP_ATTEMPT + torch.arange(ATTEMPTS, device=index.device)[:, None]
        drawn = philox(seed, epoch, index, streams)  # [4, ATTEMPTS, n]
        uniforms = drawn.transpose(0, 1).flatten(0, 1).double() / 2**32
        return torch.cat([(words[2] >> 31).double()[None], uniforms]).T
    spread = 2 * padding(size) + 1
    top, left = (words[0] * spread) >> 32, (words[1] * spread) >> 32
    angle = (words[3].double() / 2**32 * 2 - 1) * MAX_ANGLE
    if kind == "crop-flip":
        angle = torch.zeros_like(angle)
    return torch.stack([top.double(), left.double(), (words[2] >> 31).double(), angle], dim=1)


def moves(kind: str, size: int, params: Tensor) -> Tensor:
    """What `draw` gave, in the numbers of fastsmooth.kernels.augment: int32 [n, 8].

    PIL's nearest affine transform works in 16.16 fixed point from coefficients rounded to 15
    decimals. Of resized-crop-flip only the flip is left: views has the rest.
    """
    if kind == "resized-crop-flip":
        top = left = angle = torch.zeros_like(params[:, 0])
        flip, border = params[:, 0], 0
    else:
        (top, left, flip, angle), border = params.T, padding(size)
    radians = -torch.deg2rad(angle)
    cos, sin = (f(radians).round(decimals=15) for f in (torch.cos, torch.sin))
    half = size / 2
    x0 = cos * -half + sin * -half + half + cos * 0.5 + sin * 0.5
    y0 = -sin * -half + cos * -half + half - sin * 0.5 + cos * 0.5
    rotation = [torch.floor(value * ONE + 0.5) for value in (x0, y0, cos, sin, -sin)]
    return torch.stack([*rotation, top - border, left - border, flip], dim=1).to(torch.int32)


def views(kind: str, size: int, drawn: Tensor | None, width: Tensor, height: Tensor) -> Views:
    """The views of images with these sizes, int64 [n]; `drawn` is what `draw` gave, None for the
    view that is tested."""
    zero = torch.zeros_like(width)
    corner = torch.stack([zero, zero], dim=1)
    if drawn is not None and kind == "resized-crop-flip":
        box = crop_boxes(width, height, drawn[:, 1:])
        return Views(box, torch.full_like(corner, size), corner)
    short = torch.full_like(width, short_side(kind, size))
    wide = width >= height
    # as torchvision's Resize: the long side is rounded down
    tall_to = torch.where(wide, short, (short * height).double().div(width).floor().long())
    wide_to = torch.where(wide, (short * width).double().div(height).floor().long(), short)
    scaled = torch.stack([tall_to, wide_to], dim=1)
    box = torch.stack([zero, zero, height, width], dim=1)
    return Views(box, scaled, ((scaled - size) / 2).round().long())


def short_side(kind: str, size: int) -> int:
    """What the view that is tested is resized to before its centre is kept: 256 for 224 in
    ImageNet's recipe."""
    return round(size * 256 / 224) if kind == "resized-crop-flip" else size


def crop_boxes(width: Tensor, height: Tensor, uniforms: Tensor) -> Tensor:
    """int64 [n, 4] rows (top, left, height, width) as torchvision's RandomResizedCrop.get_params
    draws them, for images of these sizes, int64 [n], from given uniforms [n, 4 ATTEMPTS]."""
    # each [n, ATTEMPTS]
    area, ratio, at_y, at_x = uniforms.view(len(uniforms), ATTEMPTS, 4).permute(2, 0, 1)
    target = (width * height)[:, None] * (SCALE[0] + area * (SCALE[1] - SCALE[0]))
    low, high = map(math.log, RATIO)
    ratio = torch.exp(low + ratio * (high - low))
    w, h = torch.sqrt(target * ratio).round().long(), torch.sqrt(target / ratio).round().long()
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = fits.long().argmax(dim=1, keepdim=True)
    w, h, at_y, at_x = (value.gather(1, first)[:, 0] for value in (w, h, at_y, at_x))
    top, left = (at_y * (height - h + 1)).long(), (at_x * (width - w + 1)).long()
    drawn = torch.stack([top, left, h, w], dim=1)
    # none fits: the largest box of an allowed ratio in the centre
    tall, flat = width / height < RATIO[0], width / height > RATIO[1]
    h = torch.where(tall, (width / RATIO[0]).round().long(), height)
    w = torch.where(flat, (height * RATIO[1]).round().long(), width)
    central = torch.stack([(height - h) // 2, (width - w) // 2, h, w], dim=1)
    return torch.where(fits.any(dim=1, keepdim=True), drawn, central)


def crop_flip_rotate(image: Image.Image, params: list[float], size: int) -> Image.Image:
    """One PIL image through torchvision's functions with the numbers that `draw` gave."""
    top, left, flip, angle = params
    image = TF.crop(TF.pad(image, padding(size), fill=0), int(top), int(left), size, size)
    if flip:
        image = TF.hflip(image)
    return TF.rotate(image, angle, InterpolationMode.NEAREST, fill=0) if angle else image


def resized_crop_flip(image: Image.Image, box: list[int], flip: float, size: int) -> Image.Image:
    """One PIL image through torchvision's functions: the box (top, left, height, width), resized
    and flipped."""
    image = TF.resized_crop(image, *box, [size, size], antialias=True)
    return TF.hflip(image) if flip else image


def evaluation_view(image: Image.Image, kind: str, size: int) -> Image.Image:
    """The view that is tested: Resize and CenterCrop."""
    return central(image, short_side(kind, size), size)


def central(image: Image.Image, short: int, size: int) -> Image.Image:
    """The shorter side brought to `short` pixels, and the size x size of the centre kept."""
    if image.size != (size, size) or short != size:
        image = TF.center_crop(TF.resize(image, short, antialias=True), [size, size])
    return image
