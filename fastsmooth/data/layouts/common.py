"""What all readers of folders share: what counts as an image, how images are held out, how their
sets are put together."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fastsmooth.data.files import Files
from fastsmooth.data.images import DataConfig, DataError, ImageSet, Split

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
SUFFIXES = ", ".join(sorted(EXTENSIONS))
TABLES = (".csv", ".tsv", ".json", ".jsonl")  # how files of names and labels end
# by their names in small letters; what is hidden begins with a dot (.ipynb_checkpoints, .DS_Store,
# ._IMAGE.png)
OF_SYSTEMS = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "lost+found", "@eadir", "@tmp",
    "#recycle", "#snapshot", "@recycle",
    "~snapshot", "$recycle.bin", "system volume information", "__pycache__",
}  # fmt: skip
# opened refuses such images itself; catch_warnings would not do, as threads share the list of
# filters
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def existing(config: DataConfig) -> Path:
    """--data-dir. Raises DataError where there is nothing."""
    root = Path(config.data_dir)
    if not root.exists():
        raise DataError(f"--data-dir {root}: no such directory: give the folder of the images")
    return root


def existing_folder(config: DataConfig, what: str) -> Path:
    """--data-dir, the folder of `what`. Raises DataError where there is nothing, or a file."""
    root = existing(config)
    if not root.is_dir():
        raise DataError(f"--data-dir {root} is a file: give the folder of the {what}")
    return root


def held_out(names: Iterable[str], share: float) -> np.ndarray:
    """bool [n]: which images are for testing, by a hash of each name alone, so that the others stay
    what they are when images are added or removed. `share`: of all, on average."""
    limit = int(share * 2**64)
    digests = (hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names)
    return np.array([int.from_bytes(digest[:8], "big") < limit for digest in digests], bool)


def kept_whole(config: DataConfig) -> bool:
    """Whether images without a split are read in one piece, all of them as those to train on: a
    share of 0, which no flag gives. What is evaluated is read so, and may be of one class."""
    return config.val_share == 0


def needs_share(config: DataConfig, what: str) -> float:
    """--val-share, for images that `what` says are in one piece. Raises DataError without it."""
    if config.val_share is None:
        raise DataError(
            f"{what}, and no split into training and test images: hold some out with --val-share "
            "0.1"
        )
    return config.val_share


def refuse_share(config: DataConfig, what: str) -> None:
    """Raises DataError where --val-share is given of images that `what` says are split already."""
    if config.val_share:
        raise DataError(f"{what} already: leave --val-share out")


def sorted_by_class(files: Files, labels: np.ndarray, keys: Sequence[str]) -> Split:
    """The images by class and then by key, as class folders list them; labels: int64 [n]."""
    order = class_order(labels, keys)
    return Split(labels[order], files=files.take(order))


def class_order(labels: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """int64 [n]: the positions of images by class and then by key; labels: int64 [n]."""
    by_key = np.array(sorted(range(len(labels)), key=keys.__getitem__), np.int64)
    return by_key[np.argsort(labels[by_key], kind="stable")]


def shared_out(config: DataConfig, everything: Split, keys: Sequence[str]) -> tuple[Split, Split]:
    """(train, test): the images whose keys --val-share holds out are the test. Raises DataError
    where none is left for one of them. `keys`: the name of each image, wherever the set lies."""
    share = needs_share(config, f"--data-dir {config.data_dir} holds {len(everything):,} images")
    if kept_whole(config):
        return everything, everything.take(np.empty(0, np.int64))
    test = held_out(keys, share)
    for part, count in (("training", (~test).sum()), ("test", test.sum())):
        if not count:
            raise DataError(
                f"--val-share {share:g} of {len(test):,} images leaves no {part} images: give "
                "another share"
            )
    return everything.take(np.flatnonzero(~test)), everything.take(np.flatnonzero(test))


def divided(
    config: DataConfig, splits: Sequence[Split], keys: Sequence[str]
) -> tuple[Split, Split]:
    """(train, test) of both, or of one of which --val-share is held out by these keys."""
    return shared_out(config, splits[0], keys) if len(splits) == 1 else (splits[0], splits[1])


def put_together(
    config: DataConfig,
    classes: Sequence[str],
    train: Split,
    test: Split,
    about: str,
    remarks: Iterable[str] = (),
    names: Sequence[str] = (),
) -> ImageSet:
    """A set of encoded images, normalised as ImageNet is, with remarks on classes that are never
    tested. Raises DataError for one class, and for classes without training images."""
    if len(classes) < 2 and not kept_whole(config):
        raise DataError(
            f"--data-dir {config.data_dir} has images of {len(classes)} classes: at least two are "
            "needed"
        )
    untrained = missing(train, classes)
    if untrained and not kept_whole(config):
        raise DataError(
            f"--data-dir {config.data_dir} has no training images of class {untrained[0]!r}"
            f"{more(untrained)}: add some, or leave that class out"
        )
    lines = list(remarks)
    if len(test) and (untested := missing(test, classes)):
        lines.append(f"no test images of class {untested[0]!r}{more(untested)}: never tested")
    return ImageSet(
        train, test, tuple(classes), IMAGENET_MEAN, IMAGENET_STD, tuple(lines), about, tuple(names)
    )


def missing(split: Split, classes: Sequence[str]) -> list[str]:
    """The classes without an image."""
    counts = np.bincount(split.labels, minlength=len(classes))
    return [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]


def listed(folder: Path | str) -> list[os.DirEntry[str]]:
    """What is in a folder, less hidden files and those that belong to a system."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not is_hidden(entry.name)]


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden or belongs to a system."""
    return name[:1] == "." or name.lower() in OF_SYSTEMS


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is one, or a link to one."""
    with contextlib.suppress(OSError):  # a link to itself is none
        return entry.is_dir()
    return False


def is_image(entry: os.DirEntry[str]) -> bool:
    """Whether a file's name is an image's."""
    return os.path.splitext(entry.name)[1].lower() in EXTENSIONS and not is_folder(entry)


def more(names: list[str]) -> str:
    """How many there are beside the first."""
    return f" (nor {len(names) - 1:,} more)" if len(names) > 1 else ""


def loose(part: Path) -> list[str]:
    """A remark on images of no class."""
    count = sum(map(is_image, listed(part)))
    return [f"{part}: images that lie in no class folder are left out: {count:,}"] if count else []
