"""RandAugment (Cubuk et al. 2020): some operations on each image, drawn out of fourteen, all of one
magnitude.

Operations, magnitudes and pixels are those of torchvision's transforms.RandAugment on uint8
tensors, with its 31 bins, nearest pixels and black where there are none. What an image becomes
depends on nothing but its pixels and what is drawn for it: not on the batch that it is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import functional as TF
from torchvision.transforms.v2.functional import equalize

from fastsmooth.data.order import RANDAUGMENT, philox
from fastsmooth.kernels.backend import sent

BINS = 31  # of magnitudes, 0 to 30
# pixels a side up to which float32 adds up the values of a channel without rounding, in any order
EXACT = 256


class Operation(NamedTuple):
    """apply(images, amount) of images uint8 [n, C, S, S], C 1 or 3; its amounts by magnitude,
    float32 [BINS], for images of S pixels a side; and whether half of them are negated."""

    apply: Callable[[Tensor, float], Tensor]
    amounts: Callable[[int], Tensor]
    signed: bool


def evenly(low: float, high: float) -> Callable[[int], Tensor]:
    return lambda size: torch.linspace(low, high, BINS)


def share_of_side(size: int) -> Tensor:
    """Pixels: up to 150 of 331, as the paper's images had them."""
    return torch.linspace(0.0, 150.0 / 331.0 * size, BINS)


def bits_left(size: int) -> Tensor:
    """Of eight, down to four."""
    return 8 - (torch.arange(BINS) / ((BINS - 1) / 4)).round()


def moved(images: Tensor, right: float, down: float) -> Tensor:
    return TF.affine(images, 0.0, [int(right), int(down)], 1.0, [0.0, 0.0])


def sheared(images: Tensor, across: float, down: float) -> Tensor:
    """About the upper left corner, by so many pixels a pixel."""
    degrees = [math.degrees(math.atan(slope)) for slope in (across, down)]
    return TF.affine(images, 0.0, [0, 0], 1.0, degrees, center=[0, 0])


MOVEMENTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "ShearX": lambda images, a: sheared(images, a, 0.0),
    "ShearY": lambda images, a: sheared(images, 0.0, a),
    "TranslateX": lambda images, a: moved(images, a, 0.0),
    "TranslateY": lambda images, a: moved(images, 0.0, a),
    "Rotate": lambda images, a: TF.rotate(images, a),
}


@lru_cache(maxsize=64)
def sources(name: str, amount: float, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the pixels of a moved image come from: int64 [S * S], and uint8 [S * S] 1 where that is
    inside.

    torchvision finds them on the CPU, once: on a GPU it would multiply matrices in TF32, which
    takes another pixel here and there, and have the host wait.
    """
    numbers = torch.arange(1.0, size * size + 1).view(1, 1, size, size)  # 0: outside
    found = MOVEMENTS[name](numbers, amount).long().flatten()
    return (found - 1).clamp(min=0).to(device), (found > 0).to(torch.uint8).to(device)


def movement(name: str) -> Callable[[Tensor, float], Tensor]:
    def apply(images: Tensor, amount: float) -> Tensor:
        index, inside = sources(name, amount, images.shape[2], images.device)
        return (images.flatten(2).index_select(2, index) * inside).view_as(images)

    return apply


def contrasted(images: Tensor, amount: float) -> Tensor:
    """Blended with their mean grey, which is summed of each image alone where sums are rounded."""
    parts = images.split(len(images) if images.shape[2] <= EXACT else 1)
    return torch.cat([TF.adjust_contrast(part, 1.0 + amount) for part in parts])


def sharpened(images: Tensor, amount: float) -> Tensor:
    """As TF.adjust_sharpness, whose convolution a GPU may do in TF32, which moves its rounding."""
    size = images.shape[2]
    if size <= 2:
        return images
    values = images.float()
    total = 4 * values[..., 1:-1, 1:-1]  # and once more below
    for down in range(3):
        for right in range(3):
            total = total + values[..., down : size - 2 + down, right : size - 2 + right]
    blurred = values.clone()
    blurred[..., 1:-1, 1:-1] = (total / 13).round()  # of whole numbers by 13: never near a half
    ratio = 1.0 + amount
    return (ratio * values + (1.0 - ratio) * blurred).clamp(0, 255).to(torch.uint8)


# In torchvision's order, by its names. Those without an amount have it 0.
OPERATIONS = {
    "Identity": Operation(lambda images, _: images, evenly(0, 0), False),
    "ShearX": Operation(movement("ShearX"), evenly(0, 0.3), True),
    "ShearY": Operation(movement("ShearY"), evenly(0, 0.3), True),
    "TranslateX": Operation(movement("TranslateX"), share_of_side, True),
    "TranslateY": Operation(movement("TranslateY"), share_of_side, True),
    "Rotate": Operation(movement("Rotate"), evenly(0, 30), True),
    "Brightness": Operation(
        lambda images, a: TF.adjust_brightness(images, 1.0 + a), evenly(0, 0.9), True
    ),
    "Color": Operation(
        lambda images, a: TF.adjust_saturation(images, 1.0 + a), evenly(0, 0.9), True
    ),
    "Contrast": Operation(contrasted, evenly(0, 0.9), True),
    "Sharpness": Operation(sharpened, evenly(0, 0.9), True),
    "Posterize": Operation(lambda images, a: TF.posterize(images, int(a)), bits_left, False),
    "Solarize": Operation(lambda images, a: TF.solarize(images, a), evenly(255, 0), False),
    "AutoContrast": Operation(lambda images, _: TF.autocontrast(images), evenly(0, 0), False),
    # of v2, which takes a batch at a time, in whole numbers
    "Equalize": Operation(lambda images, _: equalize(images), evenly(0, 0), False),
}
# what may be drawn: operation and sign
CHOICES = [(name, sign) for name in OPERATIONS for sign in (1.0, -1.0)]


def draw(seed: int, epoch: int, index: Tensor, count: int) -> Tensor:
    """Which of CHOICES the samples `index`, int64 [n], get in each of `count` rounds: int64
    [count, n]. Every operation is as likely, and so is either sign of those that have one."""
    streams = RANDAUGMENT + torch.arange(count, device=index.device)[:, None]
    words = philox(seed, epoch, index, streams)
    operation = (words[0] * len(OPERATIONS)) >> 32
    signed = torch.tensor([row.signed for row in OPERATIONS.values()], device=index.device)
    return 2 * operation + (words[1] >> 31) * signed[operation]


def randaugment(images: Tensor, drawn: Tensor, magnitude: int) -> Tensor:
    """The images, uint8 [n, C, S, S], C 1 or 3, after what `draw` gave for them, int64 [rounds, n]
    on the CPU, at a magnitude of 0 to 30. A new tensor, which is on the device of `images`."""
    images = images.clone(memory_format=torch.contiguous_format)
    for chosen in drawn:
        groups = torch.bincount(chosen, minlength=len(CHOICES)).tolist()
        places = sent(torch.argsort(chosen, stable=True), images.device)
        for (name, sign), at in zip(CHOICES, places.split(groups), strict=True):
            if len(at) and name != "Identity":
                operation = OPERATIONS[name]
                amount = sign * operation.amounts(images.shape[2])[magnitude].item()
                images.index_copy_(0, at, operation.apply(images.index_select(0, at), amount))
    return images
