"""The data sets by name, and how a folder tells which of them it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsmooth.data import cifar, prepared
from fastsmooth.data.images import DataConfig, DataError, ImageSet, Split
from fastsmooth.data.layouts import arrays, columns, imagenet, shards, table, tiny, trees, zoo


def digits(config: DataConfig) -> ImageSet:
    """1,797 handwritten digits of 8x8 pixels (UCI); the test split is every fifth image, from the
    first on."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        images, labels = file["images"], file["labels"].astype(np.int64)
    pixels = np.round(images * (255 / 16)).astype(np.uint8)[..., None].repeat(3, axis=-1)
    held_out = np.arange(len(labels)) % 5 == 0
    train, test = (Split(labels[part], pixels[part]) for part in (~held_out, held_out))
    mean, std = pixels[~held_out].mean() / 255, pixels[~held_out].std() / 255
    return ImageSet(train, test, tuple("0123456789"), (mean,) * 3, (std,) * 3)


def cifar10(config: DataConfig) -> ImageSet:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    return ImageSet(*cifar.read("cifar10", Path(config.data_dir)), mean, std)


def cifar100(config: DataConfig) -> ImageSet:
    mean = (0.5070751592371323, 0.48654887331495095, 0.4409178433670343)
    std = (0.2673342858792401, 0.2564384629170883, 0.27615047132568404)
    return ImageSet(*cifar.read("cifar100", Path(config.data_dir)), mean, std)


# by --dataset
READERS: dict[str, Callable[[DataConfig], ImageSet]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagenet": imagenet.read,
    "tiny-imagenet": tiny.read,
    "folder": trees.read,
    "table": table.read,
    "webdataset": shards.read,
    "parquet": columns.read_parquet,
    "arrow": columns.read_arrow,
    "npz": arrays.read,
    "torchvision": zoo.read,
}


class Sign(NamedTuple):
    """How --dataset auto recognises a data set."""

    # what in the folder tells that it is one, in words; "" where nothing does
    look: Callable[[Path], str]
    wants: str  # what such a folder holds
    over: frozenset[str] = frozenset()  # those that look alike and say less


SIGNS = {
    "imagenet": Sign(imagenet.sign, imagenet.WANTS, frozenset({"folder", "webdataset", "table"})),
    "tiny-imagenet": Sign(tiny.sign, tiny.WANTS, frozenset({"folder", "table"})),
    "folder": Sign(trees.sign, trees.WANTS),
    "table": Sign(table.sign, table.WANTS),
    "webdataset": Sign(shards.sign, shards.WANTS),
    "parquet": Sign(columns.sign_of_parquet, columns.WANTS_PARQUET),
    "arrow": Sign(columns.sign_of_arrow, columns.WANTS_ARROW),
    "npz": Sign(arrays.sign, arrays.WANTS),
}


LABELLED = ("table", "parquet", "arrow")  # which --labels says more of


def recognised(root: Path, labels: str | None = None) -> tuple[str, str]:
    """(the data set that a folder is one of, what tells so), with --labels one that has any.
    Raises DataError where none or several would fit."""
    if not root.exists():
        raise DataError(f"--data-dir {root}: no such directory: give the folder of the images")
    if layout := prepared.layout_of(root):
        return layout, prepared.FILE
    found = {name: sign.look(root) for name, sign in SIGNS.items()}
    found = {name: words for name, words in found.items() if words}
    if labels is not None:
        found = {name: words for name, words in found.items() if name in LABELLED}
        found = found or {"table": f"--labels {labels}"}
    hidden = {other for name in found for other in SIGNS[name].over}
    left = {name: words for name, words in found.items() if name not in hidden}
    if len(left) == 1:
        return next(iter(left.items()))
    if not left:
        forms = "; ".join(f"{name}: {sign.wants}" for name, sign in SIGNS.items())
        raise DataError(
            f"--data-dir {root} is none of the forms that are known ({forms}): rearrange it, or "
            "name what it is with --dataset"
        )
    several = " and ".join(f"{name} ({words})" for name, words in left.items())
    raise DataError(f"--data-dir {root} could be {several}: say which with --dataset")


def read(config: DataConfig) -> ImageSet:
    """The data set of a run's resolved Config, with what it was taken for. Raises DataError."""
    name, told, root = config.dataset, "", Path(config.data_dir)
    if name == "auto" or name in prepared.READS:
        prepared.refuse_unfinished(root)
    if name == "auto":
        name, told = recognised(root, config.labels)
    images = prepared.marked(READERS[name.partition("/")[0]](config), name, root)
    lines = [f"--dataset {name}: {told}" if told else "", images.about]
    if config.val_share:
        count = len(images.train) + len(images.test)
        lines.append(
            f"{len(images.test):,} of {count:,} images held out (--val-share {config.val_share:g})"
        )
    return replace(images, layout=name, about="; ".join(filter(None, lines)))
