"""The data sets of torchvision by name, read as torchvision reads them: arrays of pixels, or image
files. What is not there is downloaded by it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchvision import __version__ as version
from torchvision import datasets

from fastsmooth.data.files import Paths
from fastsmooth.data.images import DataConfig, DataError, ImageSet, Split
from fastsmooth.data.layouts.arrays import arranged, numbered, of_pixels, sized, whole
from fastsmooth.data.layouts.common import (
    divided,
    needs_share,
    put_together,
    refuse_share,
    sorted_by_class,
)
from fastsmooth.messages import one_line
from fastsmooth.names import hint

PATIENCE = 60.0  # seconds that a server may be silent
Given = dict[str, Any]
Items = Callable[[Any], list[tuple[Any, int]]]


class Row(NamedTuple):
    """How a data set is asked for."""

    train: Given  # what its class is called with
    test: Given | None  # None: it has no split
    holds: str  # what lies in --data-dir
    files: Items | None = None  # (path, label) of each image; None: it holds pixels


def by_flag(holds: str, **more: str) -> Row:
    return Row({"train": True, **more}, {"train": False, **more}, holds)


def by_split(
    holds: str, files: Items | None = None, train: str = "train", test: str = "test"
) -> Row:
    return Row({"split": train}, {"split": test}, holds, files)


def image_files(data: Any) -> list[tuple[Any, int]]:
    return list(zip(data._image_files, data._labels, strict=True))


def samples(data: Any) -> list[tuple[Any, int]]:
    return list(data._samples)


def folders(data: Any) -> list[tuple[Any, int]]:
    return list(data.samples)


def pets(data: Any) -> list[tuple[Any, int]]:
    return list(zip(data._images, data._labels, strict=True))


def caltech(folder: str, numbered: bool) -> Items:
    """The images of one of the two trees, which have no list of their files."""

    def files(data: Any) -> list[tuple[Any, int]]:
        names = [
            f"{y + 1:03d}_{i:04d}.jpg" if numbered else f"image_{i:04d}.jpg"
            for i, y in zip(data.index, data.y, strict=True)
        ]
        parents = [Path(data.root, folder, data.categories[y]) for y in data.y]
        return [(p / name, y) for p, name, y in zip(parents, names, data.y, strict=True)]

    return files


IDX = "{}/raw/train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k"
ROWS = {
    "MNIST": by_flag(IDX.format("MNIST")),
    "FashionMNIST": by_flag(IDX.format("FashionMNIST")),
    "KMNIST": by_flag(IDX.format("KMNIST")),
    "QMNIST": by_flag("QMNIST/raw/qmnist-train-images-idx3-ubyte and the three like it"),
    "USPS": by_flag("usps.bz2 and usps.t.bz2"),
    "SVHN": by_split("train_32x32.mat and test_32x32.mat"),
    "STL10": by_split("stl10_binary/train_X.bin and the others of stl10_binary.tar.gz"),
    "FER2013": by_split("fer2013/fer2013.csv"),
    "SEMEION": Row({}, None, "semeion.data"),
    "GTSRB": by_split("gtsrb/GTSRB/Training and Final_Test/Images", samples),
    "Flowers102": by_split("flowers-102/jpg, imagelabels.mat and setid.mat", image_files),
    "OxfordIIITPet": by_split("oxford-iiit-pet/images and annotations", pets, "trainval"),
    "Food101": by_split("food-101/images and meta", image_files),
    "DTD": by_split("dtd/dtd/images and labels", image_files),
    "FGVCAircraft": by_split("fgvc-aircraft-2013b/data", image_files, "trainval"),
    "StanfordCars": by_split("stanford_cars/devkit, cars_train and cars_test", samples),
    "Country211": by_split("country211/train and test", folders),
    "RenderedSST2": by_split("rendered-sst2/train and test", samples),
    "Imagenette": by_split("imagenette2/train and val", samples, test="val"),
    "CLEVRClassification": by_split("clevr/CLEVR_v1.0", image_files, test="val"),
    "EuroSAT": Row({}, None, "eurosat/2750", folders),
    "SUN397": Row({}, None, "SUN397/ClassName.txt and its folders", image_files),
    "Caltech101": Row(
        {}, None, "caltech101/101_ObjectCategories", caltech("101_ObjectCategories", False)
    ),
    "Caltech256": Row(
        {}, None, "caltech256/256_ObjectCategories", caltech("256_ObjectCategories", True)
    ),
}
ROWS |= {
    f"EMNIST-{part}": by_flag(f"EMNIST/raw/emnist-{part}-train-images-idx3-ubyte", split=part)
    for part in datasets.EMNIST.splits
}
# data sets that have classes and are not read here, with what to do
ELSEWHERE = {
    "CIFAR10": "use --dataset cifar10",
    "CIFAR100": "use --dataset cifar100",
    "ImageNet": "use --dataset imagenet",
    "ImageFolder": "use --dataset folder",
    "DatasetFolder": "use --dataset folder",
    "EMNIST": "name one of its parts, such as torchvision/EMNIST-balanced or -letters",
    "Omniglot": "its training and test images have no class in common",
    "LFWPeople": "its training and test images show different people",
    "PCAM": "its arrays are HDF5: save them as .npz and use --dataset npz",
    "Places365": "unpack it, and use --dataset folder or table",
    "INaturalist": "unpack it, and use --dataset folder",
    "CelebA": "its images have several labels each",
    "LSUN": "its images are an LMDB: unpack them, and use --dataset folder",
    "FakeData": "its images are noise",
}


def read(config: DataConfig) -> ImageSet:
    """torchvision/NAME below --data-dir, downloaded where it is absent: arrays normalised by the
    mean and deviation of the training pixels, image files as ImageNet is."""
    name = config.dataset.removeprefix("torchvision/")
    row = row_of(name)
    where = f"torchvision/{name}"
    if row.test is None:
        needs_share(config, f"{where} has one split")
    else:
        refuse_share(config, f"{where} is split into training and test images")
    asked = [given for given in (row.train, row.test) if given is not None]
    with in_words(where):
        parts = [opened(config, name, given) for given in asked]
    spelled = " and ".join(", ".join(f"{k}={v}" for k, v in given.items()) for given in asked)
    about = f"torchvision.datasets.{type(parts[0]).__name__}" + f": {spelled}" * bool(spelled)
    if row.files is None:
        return of_arrays(config, where, parts, about)
    return of_files(config, where, parts, row.files, about)


def of_arrays(config: DataConfig, where: str, parts: list[Any], about: str) -> ImageSet:
    with in_words(where):
        loaded = [pixels_of(where, data) for data in parts]
    classes, codes, remarks = numbered(where, [labels for _, labels in loaded])
    splits = [Split(code, pixels) for code, (pixels, _) in zip(codes, loaded, strict=True)]
    train, test = divided(config, splits, [str(i) for i in range(len(splits[0]))])
    about += f", {sized(loaded[0][0].shape)}"
    return of_pixels(config, classes, train, test, about, remarks, names_of(parts[0], classes))


def of_files(
    config: DataConfig, where: str, parts: list[Any], items: Items, about: str
) -> ImageSet:
    root = os.path.abspath(config.data_dir)
    with in_words(where):
        pairs = [items(data) for data in parts]
        paths = [[os.path.abspath(path) for path, _ in split] for split in pairs]
        labels = [np.array([label for _, label in split], np.int64) for split in pairs]
    classes, codes, remarks = numbered(where, labels)
    keys = [[os.path.relpath(path, root) for path in split] for split in paths]
    # torchvision's own order is here and there that of the disk
    splits = [sorted_by_class(Paths(p), c, k) for p, c, k in zip(paths, codes, keys, strict=True)]
    in_order = sorted(zip(codes[0].tolist(), keys[0], strict=True))
    train, test = divided(config, splits, [key for _, key in in_order])
    names = names_of(parts[0], classes)
    return put_together(config, classes, train, test, about, remarks, names)


def row_of(name: str) -> Row:
    """Raises DataError for what is no row, with what may have been meant."""
    if name in ROWS:
        return ROWS[name]
    if name in ELSEWHERE:
        raise DataError(f"--dataset torchvision/{name} is not read: {ELSEWHERE[name]}")
    if name in datasets.__all__:
        raise DataError(
            f"--dataset torchvision/{name} is not read: its images have no classes: choose from "
            f"{', '.join(ROWS)}"
        )
    near = hint(name, [*ROWS, *ELSEWHERE], "torchvision/") or "not a data set that is read:"
    raise DataError(f"--dataset torchvision/{name}: {near} there are {', '.join(ROWS)}")


# What torchvision gives


@contextlib.contextmanager
def in_words(where: str) -> Iterator[None]:
    """Inside, whatever torchvision stumbles over is a DataError of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that it reads all the same
            yield
    except DataError:
        raise
    except ImportError as error:
        raise DataError(
            f"{where} is read with {error.name}, which is missing: pip install {error.name}"
        ) from None
    except Exception as error:  # of damaged files, whatever reads them
        raise DataError(
            f"{where} cannot be read by torchvision {version} ({type(error).__name__}: "
            f"{one_line(error)[:200]}): delete its files, and they are fetched again"
        ) from None


def opened(config: DataConfig, name: str, given: Given) -> Any:
    """A split of the data set, downloaded where it is not there. Raises DataError where it cannot
    be."""
    make = getattr(datasets, name.partition("-")[0])
    downloads = {"download": False} if name != "FER2013" else {}  # which nobody may hand on
    absent = (RuntimeError, FileNotFoundError, NotADirectoryError)
    try:
        return make(config.data_dir, **given, **downloads)
    except absent as error:
        words = f"has no sound copy of it ({one_line(error)[:200]})"
    try:
        if downloads:
            with alone(Path(config.data_dir)):
                return make(config.data_dir, **given, download=True)
    # of the network, and of sets that torchvision downloads no longer
    except (OSError, RuntimeError, ValueError) as error:
        words += f", and it cannot be downloaded ({one_line(error)[:300]})"
    raise DataError(
        f"--dataset torchvision/{name}: {config.data_dir} {words}: put {ROWS[name].holds} into "
        f"{config.data_dir}"
    )


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Inside, no other process downloads into the folder, and no server is waited for without
    end."""
    root.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    with open(root / ".download.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        socket.setdefaulttimeout(PATIENCE)
        try:
            yield
        finally:
            socket.setdefaulttimeout(before)


def pixels_of(where: str, data: Any) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n, H, W, C], labels int64 [n]) of a set that holds arrays, or makes them."""
    if hasattr(data, "data"):
        pixels = np.asarray(data.data)
        labels = np.asarray(data.targets if hasattr(data, "targets") else data.labels, np.int64)
    else:
        items = [data[i] for i in range(len(data))]
        pixels = np.stack([np.asarray(image) for image, _ in items])
        labels = np.array([label for _, label in items], np.int64)
    if labels.ndim == 2:  # of QMNIST: the class, and who wrote it
        labels = labels[:, 0]
    shape, channels_first = arranged(where, pixels.shape)
    if channels_first:
        pixels = pixels.transpose(0, 2, 3, 1)
    if len(labels) != len(pixels):
        raise DataError(
            f"{where} has {len(labels):,} labels for {len(pixels):,} images: delete its files, "
            "and they are fetched again"
        )
    return np.ascontiguousarray(whole(where, pixels).reshape(shape)), labels


def names_of(data: Any, classes: list[str]) -> tuple[str, ...]:
    """What torchvision calls the classes, which are labels of its; nothing where it has no names
    for them."""
    names = getattr(data, "classes", None) or getattr(data, "categories", None) or ()
    if len(names) <= int(classes[-1]):
        return ()
    found = (names[int(label)] for label in classes)
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in found)
