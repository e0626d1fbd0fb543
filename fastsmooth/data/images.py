"""Images as a data set has them: splits of files or of pixels, and how a file is opened."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastsmooth.processors import processors
from fastsmooth.runfolder.files import size_of

# times its width: what a height may be, since a row of pixels grows thick when it is resized
LONGEST = 4000


class DataError(ValueError):
    """Images that are missing or cannot be read; the message, one line, names the file and says
    what to do."""

    def __init__(self, message: str, reason: str = ""):
        # file names and servers may hold line breaks
        super().__init__(" ".join(message.splitlines()))
        self.reason = reason  # of an image file: what is wrong with it, without its name


@dataclass(frozen=True)
class Split:
    """Images with labels: either pixels, uint8 [n, size, size, 3], or paths of image files."""

    labels: np.ndarray  # int64 [n]
    pixels: np.ndarray | None = None
    paths: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageSet:
    """A data set: its splits, class names, and the constants that normalise its images."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    remarks: tuple[str, ...] = ()  # lines about what was found and may not be meant

    def fingerprint(self) -> str:
        """A hash of the labels, and of the pixels or file names, so that a run is not resumed on
        other data."""
        digest = hashlib.sha256(repr((self.classes, self.mean, self.std)).encode())
        for split in (self.train, self.test):
            digest.update(split.labels.tobytes())
            if split.pixels is not None:
                digest.update(np.ascontiguousarray(split.pixels))
            else:
                root = os.path.commonpath(split.paths)
                digest.update(
                    "\0".join(os.path.relpath(p, root) for p in split.paths).encode(
                        "utf-8", "surrogateescape"
                    )
                )
        return digest.hexdigest()


def open_image(path: str) -> Image.Image:
    """The image as RGB. Raises DataError that names the file, also for decompression bombs."""
    try:
        with opened(path) as file:
            return file.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        reason = "the image is too large to decode safely"
        raise DataError(f"{path}: {reason}: remove it or make it smaller", reason) from None
    except UnidentifiedImageError:
        reason = "not an image that can be read"
        raise DataError(f"{path}: {reason}: remove it", reason) from None
    # a damaged file may raise anything: Pillow's decoders do not agree on a type
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: {reason}: remove or replace it", reason) from None


def opened(path: str) -> Image.Image:
    """The image with its header read. Raises whatever open_image has words for."""
    size_of(path)
    file = Image.open(path)
    with contextlib.ExitStack() as wrong:
        wrong.callback(file.close)
        if file.width * file.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        if max(file.size) > LONGEST * min(file.size):
            raise ValueError(
                f"it is {file.width} x {file.height} pixels, one side over {LONGEST} times the "
                "other"
            )
        wrong.pop_all()
    return file


def decode_all(
    split: Split,
    size: int,
    view: Callable[[Image.Image], Image.Image],
    report: Callable[[str, str], None],
) -> Split:
    """The split with its images decoded and brought to size x size; bad files are black, and
    report(path, reason) may raise."""
    if split.pixels is not None:
        return split
    pixels = np.zeros((len(split), size, size, 3), dtype=np.uint8)

    def decode(i: int) -> None:
        try:
            pixels[i] = np.asarray(view(open_image(split.paths[i])))
        except DataError as error:
            report(split.paths[i], str(error))

    with ThreadPoolExecutor(processors()) as pool:
        for _ in pool.map(decode, range(len(split)), chunksize=64):
            pass
    return Split(split.labels, pixels)
