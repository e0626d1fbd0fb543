"""Arrays of pixels and labels in one .npz: MedMNIST's, Keras', or one's own."""

from __future__ import annotations

import contextlib
import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from fastsmooth.data.images import DataConfig, DataError, ImageSet, Split
from fastsmooth.data.layouts.common import (
    divided,
    existing,
    kept_whole,
    listed,
    needs_share,
    put_together,
    refuse_share,
)
from fastsmooth.data.memory import check_room
from fastsmooth.messages import one_line
from fastsmooth.runfolder.files import size_of

WANTS = (
    "one .npz of train_images, train_labels, test_images and test_labels, or x_train, y_train, "
    "x_test and y_test, or images and labels"
)
# the words of an array's name: whose images or labels it holds, and which of the two
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")
KINDS = dict.fromkeys(("images", "image", "imgs", "x", "data", "pixels"), "images")
KINDS |= dict.fromkeys(("labels", "label", "y", "targets", "target"), "labels")
CHANNELS = (1, 3)
SMALLEST_VOLUME = 8  # planes, below which three sizes that are alike are no volume
LARGEST_LABEL = 1 << 31  # what is above is no number of a class
AT_ONCE = 1 << 22  # values that are looked at together


def npz_in(root: Path) -> list[str]:
    return sorted(e.name for e in listed(root) if e.name.lower().endswith(".npz") and e.is_file())


def sign(root: Path) -> str:
    """What tells that arrays are meant; nothing where there are none."""
    if root.is_file():
        return "one .npz" if root.suffix.lower() == ".npz" else ""
    found = npz_in(root)
    return "" if not found else f"{len(found)} files .npz" if len(found) > 1 else "one .npz"


def read(config: DataConfig) -> ImageSet:
    """The arrays of --data-dir, a .npz or a folder with one; normalised by the mean and deviation
    of the training pixels. Nothing is unpickled."""
    path = file_of(config)
    with unpacking(path) as archive:
        names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        pairs = chosen(config, path, names)
        parts = [Part.of(archive, path, images, labels) for images, labels in pairs]
        for part in parts[1:]:
            if part.shape[1:] != parts[0].shape[1:]:
                raise DataError(
                    f"{path}: {parts[0].images} has images of {sized(parts[0].shape)}, "
                    f"{part.images} of {sized(part.shape)}: make them alike"
                )
        check_room(
            # those that are held out are copied
            sum(part.bytes for part in parts) * (2 if len(parts) == 1 else 1),
            f"{path}: {' and '.join(part.images for part in parts)}",
            "keep fewer or smaller images",
        )
        loaded = [part.read(archive, path) for part in parts]
    classes, codes, remarks = numbered(str(path), [labels for _, labels in loaded])
    splits = [Split(code, pixels) for code, (pixels, _) in zip(codes, loaded, strict=True)]
    train, test = divided(config, splits, [str(i) for i in range(len(splits[0]))])
    about = [f"{path.name}: {' and '.join(p.images for p in parts)} of {sized(parts[0].shape)}"]
    about += [f"{p.images} of {p.dtype} as 0 to 255" for p in parts if p.dtype != np.uint8]
    if unread := [name for name in names if name not in {n for pair in pairs for n in pair}]:
        about.append(f"left out: {some(unread)}")
    return of_pixels(config, classes, train, test, ", ".join(about), remarks)


def file_of(config: DataConfig) -> Path:
    """The .npz that --data-dir names or holds. Raises DataError where it is not one."""
    root = existing(config)
    if not root.is_dir():
        return root
    found = npz_in(root)
    if not found:
        raise DataError(f"--data-dir {root} holds no .npz: give the folder of one, or its path")
    if len(found) > 1:
        raise DataError(
            f"--data-dir {root} holds {len(found)} files .npz, such as {found[0]} and {found[1]}: "
            "give the path of the one that is meant"
        )
    return root / found[0]


# Which arrays are read


def chosen(config: DataConfig, path: Path, names: Sequence[str]) -> list[tuple[str, str]]:
    """(images, labels), by the names of their arrays, to train and to test on, or those that
    --val-share is of. Raises DataError where there are none."""
    found: dict[tuple[str, str], str] = {}
    for name in names:
        if (role := role_of(name)) is None:
            continue
        if role in found:
            raise DataError(
                f"{path}: {found[role]} and {name} could both be the {' '.join(role).strip()}: "
                "leave one out"
            )
        found[role] = name
    has = some(names) or "nothing"
    splits = [split for split, kind in found if kind == "images"]
    if kept_whole(config) and splits and "train" not in splits:
        splits = [min(splits, key=["", "test", "val"].index)]
        found = {("", kind): name for (split, kind), name in found.items() if split == splits[0]}
        splits = [""]
    if "train" not in splits and "" not in splits:
        raise DataError(f"{path} holds no training images: wanted {WANTS}; it has {has}")
    wanted = [""]
    if "train" in splits:
        wanted = ["train", *[split for split in ("test", "val") if split in splits][:1]]
    for split in wanted:
        if (split, "labels") not in found:
            images = found[split, "images"]
            raise DataError(f"{path} has no labels of {images}: wanted {WANTS}; it has {has}")
    pairs = [(found[split, "images"], found[split, "labels"]) for split in wanted]
    if len(pairs) == 2:
        refuse_share(config, f"{path} has {pairs[1][0]} to test on")
    else:
        needs_share(config, f"{path} holds {pairs[0][0]} alone")
    return pairs


def some(names: Sequence[str]) -> str:
    """A few of the names, in words."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")


def role_of(name: str) -> tuple[str, str] | None:
    """(train, test, val or "", images or labels) of an array called so; None for other arrays."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    splits, kinds = ([t[w] for w in words if w in t] for t in (SPLITS, KINDS))
    if len(kinds) != 1 or len(splits) > 1 or len(words) != len(kinds) + len(splits):
        return None
    return (splits[0] if splits else "", kinds[0])


# What the archive holds


class Part(NamedTuple):
    """A split as the headers of its arrays say that it is."""

    images: str
    labels: str
    shape: tuple[int, int, int, int]  # n, height, width, channels
    channels_first: bool  # as they are stored
    dtype: np.dtype
    stored: int  # bytes of both arrays

    @classmethod
    def of(cls, archive: zipfile.ZipFile, path: Path, images: str, labels: str) -> Part:
        """Raises DataError for what are no images, and for other numbers of labels."""
        pixels, marks = (header(archive, path, name) for name in (images, labels))
        shape, channels_first = arranged(f"{path}: {images}", pixels.shape)
        if not marks.shape or marks.shape[0] != shape[0]:
            many = f"{marks.shape[0]:,} labels" if marks.shape else "one number"
            raise DataError(
                f"{path}: {labels} has {many} for the {shape[0]:,} images of {images}: each image "
                "needs one"
            )
        if pixels.dtype.kind not in "biuf":
            raise DataError(
                f"{path}: {images} is of {pixels.dtype}, not of numbers: save it as uint8"
            )
        stored = pixels.bytes + marks.bytes
        return cls(images, labels, shape, channels_first, pixels.dtype, stored)

    @property
    def bytes(self) -> int:
        """That are needed to read it."""
        copied = self.dtype != np.uint8 or self.channels_first
        return self.stored + copied * math.prod(self.shape)

    def read(self, archive: zipfile.ZipFile, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 [n, H, W, C], the n labels as int64 or words)."""
        pixels = whole(f"{path}: {self.images}", unpacked(archive, self.images))
        if self.channels_first:
            pixels = pixels.transpose(0, 2, 3, 1)
        pixels = np.ascontiguousarray(pixels.reshape(self.shape))
        return pixels, one_each(f"{path}: {self.labels}", unpacked(archive, self.labels))


class Array(NamedTuple):
    """What the header of an array says."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def unpacking(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive. Inside, whatever is wrong with it is a DataError; what the disk says is left."""
    try:
        size_of(path)
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DataError:
        raise
    # a damaged file may raise anything: zipfile, zlib, lzma and numpy do not agree on a type
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(
            f"{path}: not a .npz that can be read ({one_line(error)[:200]}): repair it or fetch it "
            "again"
        ) from None


def member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The last one called so, as for numpy."""
    infos = archive.infolist()
    return next(i for i in reversed(infos) if i.filename.removesuffix(".npy") == name)


def header(archive: zipfile.ZipFile, path: Path, name: str) -> Array:
    """The header of an array. Raises DataError for pickled objects, and where the array is not as
    long as the header says."""
    info = member(archive, name)
    with archive.open(info) as file:
        array = header_of(file)
        length = file.tell()
    if array.dtype.hasobject:
        raise DataError(
            f"{path}: {name} holds pickled Python objects, which are never loaded: save it as an "
            "array of numbers"
        )
    if any(size < 0 for size in array.shape) or info.file_size != length + array.bytes:
        raise DataError(
            f"{path}: {name} is not as long as its header says ({info.file_size - length:,} bytes, "
            f"not {array.bytes:,}): fetch it again"
        )
    return array


def header_of(file: IO[bytes]) -> Array:
    version = npy.read_magic(file)
    # those of the third version differ in the names of fields alone
    reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = reader(file)
    return Array(shape, dtype)


def unpacked(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(member(archive, name)) as file:
        return npy.read_array(file, allow_pickle=False)


# Pixels


def arranged(where: str, shape: tuple[int, ...]) -> tuple[tuple[int, int, int, int], bool]:
    """((n, height, width, channels), whether the channels are stored first) of images in an array
    of this shape. Raises DataError for what are no images of 1 or 3 channels."""
    if not math.prod(shape):
        raise DataError(f"{where} is empty: give images")
    if len(shape) < 3:
        numbers = f"{shape[1]:,} numbers" if len(shape) == 2 else "one number"
        raise DataError(
            f"{where} has {numbers} an image: reshape it to [n, height, width] or [n, height, "
            "width, 3]"
        )
    n, *sides = shape
    if len(sides) == 2:
        return (n, sides[0], sides[1], 1), False
    if len(sides) == 3 and sides[2] in CHANNELS:
        return (n, sides[0], sides[1], sides[2]), False
    if len(sides) == 3 and sides[0] in CHANNELS:
        return (n, sides[1], sides[2], sides[0]), True
    if len(sides) > 3 or (min(sides) >= SMALLEST_VOLUME and len(set(sides)) == 1):
        raise DataError(
            f"{where} has volumes of {'x'.join(map(str, sides[:3]))}: only images in two "
            "dimensions are read, such as slices of them"
        )
    first = sides[1] == sides[2]
    channels = sides[0] if first else sides[2]
    raise DataError(f"{where} has {channels:,} channels: images have 1 or 3: keep so many")


def whole(where: str, array: np.ndarray) -> np.ndarray:
    """The array as uint8, where that loses nothing: whole numbers from 0 to 255, or such numbers
    divided by 255. Raises DataError for others."""
    if array.dtype == np.uint8:
        return array
    kind = array.dtype.kind
    fractions = kind == "b" or (kind == "f" and array.max() <= 1)
    factor = 255 if fractions else 1
    # what divisions and products of this precision leave
    slack = min(510 * float(np.finfo(array.dtype).eps), 0.25) if fractions and kind == "f" else 0
    pixels = np.empty(array.shape, np.uint8)
    for part in parts_of(array):
        values = array[part].astype(np.float64) * factor
        rounded = np.rint(values)
        fits = (np.abs(values - rounded) <= slack) & (rounded >= 0) & (rounded <= 255)
        if not fits.all():
            wrong = values[~fits][0] / factor
            raise DataError(
                f"{where} of {array.dtype} has the value {wrong:.6g}: pixels are whole numbers "
                "from 0 to 255, or those divided by 255: save them as uint8, without "
                "normalisation"
            )
        pixels[part] = rounded
    return pixels


def parts_of(array: np.ndarray) -> Iterator[slice]:
    """Runs of images of an array [n, ...], few enough to be worked on together."""
    count = max(1, AT_ONCE // max(1, math.prod(array.shape[1:])))
    return (slice(at, at + count) for at in range(0, len(array), count))


def sized(shape: tuple[int, int, int, int]) -> str:
    """The images of an array [n, H, W, C], in words."""
    _, height, width, channels = shape
    return f"{width}x{height} pixels, {'one channel' if channels == 1 else '3 channels'}"


# Labels


def one_each(where: str, array: np.ndarray) -> np.ndarray:
    """The n labels, int64 or words, of an array [n], [n, 1] or one-hot [n, k]. Raises DataError
    for others, such as several labels an image."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 2 and array.dtype.kind in "biuf" and np.isin(array, (0, 1)).all():
        marks = array.sum(axis=1, dtype=np.int64)
        if (marks == 1).all():
            return array.argmax(axis=1).astype(np.int64)
        at = int(np.flatnonzero(marks != 1)[0])
        raise DataError(
            f"{where} marks {marks[at]} of {array.shape[1]} labels for image {at}: only images of "
            "one class each are learned: keep one label an image"
        )
    if array.ndim != 1:
        sides = "x".join(map(str, array.shape[1:]))
        raise DataError(f"{where} has {sides} numbers an image: give one label an image")
    if array.dtype.kind in "US":
        return array if array.dtype.kind == "U" else np.char.decode(array, "utf-8", "replace")
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where} is of {array.dtype}: give whole numbers or words")
    # NaN is no whole number either
    if array.dtype.kind == "f" and not (np.rint(array) == array).all():
        wrong = float(array[np.rint(array) != array][0])
        raise DataError(
            f"{where} has the value {wrong:.6g}: classes are whole numbers or words, and a measure "
            "is not learned"
        )
    for value in (array.min(), array.max()):
        if not 0 <= value < LARGEST_LABEL:
            raise DataError(
                f"{where} has the label {int(value) if np.isfinite(value) else value}: classes are "
                "numbered from 0: leave images without a class out"
            )
    return array.astype(np.int64)


def numbered(
    where: str, labels: Sequence[np.ndarray]
) -> tuple[list[str], list[np.ndarray], list[str]]:
    """(the classes, int64 [n] of each split, remarks): the classes are the labels that occur, in
    their order."""
    if len({array.dtype.kind for array in labels}) > 1:
        raise DataError(f"{where}: the labels of one split are numbers, of the other words")
    found = np.unique(np.concatenate([np.unique(array) for array in labels]))
    codes = [np.searchsorted(found, array).astype(np.int64) for array in labels]
    remarks = []
    if found.dtype.kind == "i" and len(found) <= int(found[-1]):
        gaps = next(i for i, value in enumerate(found.tolist()) if i != value)
        count = int(found[-1]) + 1 - len(found)
        others = f" (nor {count - 1:,} others)" if count > 1 else ""
        remarks.append(
            f"{where}: no image has the label {gaps}{others}: the classes are the {len(found):,} "
            "labels that occur"
        )
    return [str(value) for value in found.tolist()], codes, remarks


# The set


def of_pixels(
    config: DataConfig,
    classes: Sequence[str],
    train: Split,
    test: Split,
    about: str,
    remarks: Iterable[str] = (),
    names: Sequence[str] = (),
) -> ImageSet:
    """A set of pixels, normalised by the mean and the deviation of each channel of the training
    images. Raises DataError as put_together does, and where all pixels are alike."""
    images = put_together(config, classes, train, test, about, remarks, names)
    if train.pixels is None:
        raise ValueError("a set of files is normalised by what is known of photographs")
    mean, std = moments(train.pixels)
    if not any(std) and not kept_whole(config):
        raise DataError(
            f"--data-dir {config.data_dir}: all pixels of the training images are alike: there is "
            "nothing to learn"
        )
    # a channel that says nothing is left at 0
    return replace(images, mean=mean, std=tuple(value or 1.0 for value in std))


def moments(pixels: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of each channel of uint8 [n, H, W, C], as values from 0 to 1.

    They are of whole numbers, so that they have the same bits everywhere.
    """
    channels = pixels.shape[3]
    counts = np.zeros((channels, 256), np.int64)
    for part in parts_of(pixels):
        for channel in range(channels):
            values = pixels[part][..., channel].ravel()
            counts[channel] += np.bincount(values, minlength=256)
    mean, std = [], []
    for row in counts.tolist():
        count = sum(row)
        first, second = (sum(v**power * k for v, k in enumerate(row)) for power in (1, 2))
        mean.append(first / count / 255)
        std.append(math.sqrt(count * second - first**2) / count / 255)
    return tuple(mean), tuple(std)
