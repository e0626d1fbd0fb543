"""Images as a data set has them: splits of files or of pixels, and how a file is opened."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastsmooth.data.files import Files
from fastsmooth.processors import processors

# times its width: what a height may be, since a row of pixels grows thick when it is resized
LONGEST = 4000


class Sizes(Protocol):
    """Pixels a side of the training images of each epoch."""

    @property
    def values(self) -> tuple[int, ...]:
        """In the order in which the run comes to them; the last is that of all images that are not
        trained on."""

    def __call__(self, epoch: int) -> int: ...


@dataclass(frozen=True)
class Later:
    """Sizes of a run whose first epoch has the number `first_epoch`."""

    sizes: Sizes
    first_epoch: int

    @property
    def values(self) -> tuple[int, ...]:
        return self.sizes.values

    def __call__(self, epoch: int) -> int:
        return self.sizes(max(epoch - self.first_epoch, 0))


def size_in(epoch: int | None, tested: int, sizes: Sizes | None) -> int:
    """Pixels a side of images in this epoch; with None, or where no `sizes` are given, those of
    images as they are tested."""
    return tested if epoch is None or sizes is None else sizes(epoch)


class DataConfig(Protocol):
    """What is read of a run's resolved Config to find and serve its images."""

    # fmt: off
    @property
    def dataset(self) -> str: ...
    @property
    def data_dir(self) -> str: ...
    @property
    def val_share(self) -> float | None: ...
    @property
    def labels(self) -> str | None: ...
    @property
    def image_size(self) -> int | str: ...  # pixels a side, or stages of them in words
    @property
    def sizes(self) -> Sizes: ...
    @property
    def model(self) -> str: ...
    @property
    def augment(self) -> str: ...
    @property
    def randaugment(self) -> str | None: ...
    @property
    def random_erasing(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def on_bad_image(self) -> str: ...
    @property
    def decode(self) -> str: ...
    @property
    def loader(self) -> str: ...
    @property
    def workers(self) -> int | None: ...
    @property
    def chunk(self) -> int | None: ...
    @property
    def hw_decoder_load(self) -> float: ...
    @property
    def decoder_device_memory(self) -> int: ...  # MB
    @property
    def decoder_host_memory(self) -> int: ...  # MB
    @property
    def resume(self) -> bool: ...
    @property
    def extend(self) -> str | None: ...
    # fmt: on


class DataError(ValueError):
    """Images that are missing or cannot be read; the message, one line, names the file and says
    what to do."""

    def __init__(self, message: str, reason: str = ""):
        # file names and servers may hold line breaks
        super().__init__(" ".join(message.splitlines()))
        self.reason = reason  # of an image file: what is wrong with it, without its name


def others(names: Sized) -> str:
    """How many there are beside the one that a message names."""
    return f" and {len(names) - 1:,} more" if len(names) > 1 else ""


@dataclass(frozen=True)
class Split:
    """Images with labels: either pixels or encoded."""

    labels: np.ndarray  # int64 [n]
    pixels: np.ndarray | None = None  # uint8 [n, H, W, C], C 1 or 3, as they are stored
    files: Files | None = None  # n where there are no pixels

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Image.Image:
        """Image i, RGB or of one channel. Raises DataError, as open_image."""
        if self.files is not None:
            return open_image(self.files, i)
        if self.pixels is None:
            raise ValueError("a split has pixels or files")
        return image_of(self.pixels[i])

    def take(self, at: np.ndarray) -> Split:
        """The images at these positions, int64 [m], in this order."""
        if self.files is not None:
            return Split(self.labels[at], files=self.files.take(at))
        return Split(self.labels[at], None if self.pixels is None else self.pixels[at])


@dataclass(frozen=True)
class ImageSet:
    """A data set: its splits, class names, and the constants that normalise its images."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    # of each channel of the images, as values from 0 to 1
    mean: tuple[float, ...]
    std: tuple[float, ...]
    remarks: tuple[str, ...] = ()  # lines about what was found and may not be meant
    about: str = ""  # one line: the form it was found in, and where its labels are from
    names: tuple[str, ...] = ()  # of the classes, for people, where others than `classes`
    layout: str = ""  # what --dataset calls it
    prepared: str = ""  # of which images, how, and what came of it; "" where they are the originals

    def fingerprint(self) -> str:
        """A hash of the labels, of the pixels or file names, and of how they were prepared, so that
        a run is not resumed on other data."""
        facts = repr((self.classes, self.mean, self.std))
        digest = hashlib.sha256((facts + self.prepared).encode())
        for split in (self.train, self.test):
            digest.update(split.labels.tobytes())
            if split.pixels is not None:
                digest.update(np.ascontiguousarray(split.pixels).data)
            elif split.files is not None:
                digest.update(split.files.identity())
        return digest.hexdigest()


def open_image(files: Files, i: int) -> Image.Image:
    """Image i as RGB. Raises DataError that names the file, also for decompression bombs."""
    path = files.names[i]
    try:
        with opened(files, i) as image:
            return image.convert("RGB")
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


def most_pixels() -> float:
    """Of an image: PIL's own limit, above which it warns of a bomb; None means none to it."""
    return math.inf if Image.MAX_IMAGE_PIXELS is None else Image.MAX_IMAGE_PIXELS


@contextlib.contextmanager
def opened(files: Files, i: int) -> Iterator[Image.Image]:
    """Image i with its header read. Raises whatever open_image has words for."""
    with contextlib.ExitStack() as held:
        file = files.open(i)
        if not isinstance(file, str):
            held.enter_context(file)
        image = held.enter_context(Image.open(file))
        if image.width * image.height > most_pixels():
            raise Image.DecompressionBombError
        if max(image.size) > LONGEST * min(image.size):
            raise ValueError(
                f"it is {image.width} x {image.height} pixels, one side over {LONGEST} times the "
                "other"
            )
        yield image


def image_of(pixels: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] as a grey image, where C is 1, or an RGB one."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def pixels_of(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C] of a grey or an RGB image."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def decode_all(
    split: Split,
    size: int,
    view: Callable[[Split, int], Image.Image],
    report: Callable[[str, str], None],
) -> Split:
    """The split with view(split, i) of its images, each size x size; bad files are black, and
    report(path, reason) may raise."""
    files, stored = split.files, split.pixels
    if stored is not None and stored.shape[1:3] == (size, size):
        return split
    channels = 3 if stored is None else stored.shape[3]
    pixels = np.zeros((len(split), size, size, channels), dtype=np.uint8)

    def decode(i: int) -> None:
        try:
            pixels[i] = pixels_of(view(split, i))
        except DataError as error:
            if files is None:
                raise
            report(files.names[i], str(error))

    every = np.arange(len(split))
    with ThreadPoolExecutor(processors()) as pool:
        # what is stored together is read together
        for _ in pool.map(decode, (every if files is None else files.by_place(every)).tolist()):
            pass
    return Split(split.labels, pixels)
