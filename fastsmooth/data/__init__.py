"""Images in, batches out: open_data reads a data set and puts one of the loaders in front of it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from fastsmooth.data import augment, dali
from fastsmooth.data.resident import ResidentLoader
from fastsmooth.data.sets import READERS, DataError, ImageSet, decode_all
from fastsmooth.data.torchloader import TorchLoader

MEMORY_SHARE = 0.4  # of the free memory, at most, for the images of a resident set

__all__ = ["Data", "DataError", "open_data"]


@dataclass(frozen=True)
class Data:
    """A training and a test loader with the facts that the rest of a run needs."""

    train: ResidentLoader | TorchLoader
    test: ResidentLoader | TorchLoader
    classes: int
    size: int
    fingerprint: str
    choice: str  # one line: which loader was picked and why


def open_data(config, device: torch.device) -> Data:
    """The data set of `config` (a resolved fastsmooth.config.Config) behind its loader. Raises DataError."""
    if config.loader == "dali":
        dali.refuse()
    try:
        images = READERS[config.dataset](config)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise DataError(f"--data-dir {config.data_dir}: {error.strerror or error}{where}") from None
    resident, why = fits(config, images, device)
    if resident:
        train, test = (decode(split, config) for split in (images.train, images.test))
        loaders = [
            ResidentLoader(split, config.augment, config.seed, images.mean, images.std, device)
            for split in (train, test)
        ]
    else:
        loaders = [
            TorchLoader(
                s, config.augment, config.image_size, config.seed, images.mean, images.std, device, config.workers
            )
            for s in (images.train, images.test)
        ]
    choice = f"loader {'resident' if resident else 'torch'}: {why}"
    return Data(*loaders, len(images.classes), config.image_size, images.fingerprint(), choice)


def decode(split, config):
    return decode_all(
        split, config.image_size, lambda image: augment.evaluation_view(image, config.augment, config.image_size)
    )


def fits(config, images: ImageSet, device: torch.device) -> tuple[bool, str]:
    """Whether the images are to be resident, and why."""
    if config.loader != "auto":
        return config.loader == "resident", "as asked"
    if config.augment == "resized-crop-flip":
        return False, "random resized crops need the whole images"
    needed = 4 * (config.image_size**2 + 1) * (len(images.train) + len(images.test))
    free = free_memory(device)
    verdict = f"{needed / 1e6:,.0f} MB of images, {free / 1e9:.1f} GB free"
    return needed <= MEMORY_SHARE * free, verdict


def free_memory(device: torch.device) -> float:
    """Bytes free on the device; unlimited where the system does not say (macOS, Windows)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError):
        return math.inf
