"""The data sets by name, read into one Split for training and one for testing."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from fastsmooth.data import cifar
from fastsmooth.data.images import DataConfig, DataError, ImageSet, Split

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
SUFFIXES = ", ".join(sorted(EXTENSIONS))
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


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imagenet(config: DataConfig) -> ImageSet:
    """ImageNet in the ImageFolder layout: train/ and val/, a folder a class, its WordNet id."""
    return folder(config, tests=("val",))


def folder(config: DataConfig, tests: tuple[str, ...] = ("val", "test")) -> ImageSet:
    """Any tree DIR/train/CLASS/IMAGE with DIR/val or DIR/test, normalised as ImageNet is."""
    root = Path(config.data_dir)
    if not root.is_dir():
        raise DataError(
            f"--data-dir {root}: no such directory: it must hold train/ and "
            f"{' or '.join(t + '/' for t in tests)}"
        )
    beside = [root / name for name in tests if (root / name).is_dir()]
    if not (root / "train").is_dir() or not beside:
        missing = "train/" if not (root / "train").is_dir() else " or ".join(t + "/" for t in tests)
        raise DataError(
            f"--data-dir {root} has no {missing}: --dataset {config.dataset} wants "
            "train/CLASS/IMAGE and the same beside it"
        )
    train, test = root / "train", beside[0]
    classes = tuple(sorted(entry.name for entry in listed(train) if entry.is_dir()))
    if len(classes) < 2:
        raise DataError(
            f"{train} has {len(classes)} class folders: at least two are needed{flat(train)}"
        )
    inside, tested = ({name: images_of(part, name) for name in classes} for part in (train, test))
    for part, by_class in ((train, inside), (test, tested)):
        if not any(by_class.values()):
            raise DataError(
                f"{part} has no images: looked for {SUFFIXES} in {len(classes)} class "
                f"folders{flat(part)}"
            )
    empty = [name for name in classes if not inside[name]]
    if empty:
        raise DataError(
            f"{train / empty[0]} has no images{more(empty)}: put some there or remove the folder "
            f"(looked for {SUFFIXES})"
        )
    for name in sorted(entry.name for entry in listed(test) if entry.is_dir()):
        if name not in inside and images_of(test, name):
            alike = next(
                (f" (it has {c!r})" for c in classes if c.casefold() == name.casefold()), ""
            )
            raise DataError(
                f"{test} has a class folder {name!r} that train/ has not{alike}: remove it or add "
                "it there"
            )
    untested = [name for name in classes if not tested[name]]
    remarks = []
    if untested:
        named = f"{untested[0]!r}{more(untested)}"
        remarks.append(f"{test} has no images of class {named}: they are never tested")
    for part in (train, test):
        if loose := sum(is_image(entry) for entry in listed(part)):
            remarks.append(f"{part}: images that lie in no class folder are left out: {loose:,}")
    return ImageSet(
        split_of(inside), split_of(tested), classes, IMAGENET_MEAN, IMAGENET_STD, tuple(remarks)
    )


def split_of(by_class: dict[str, list[str]]) -> Split:
    labels = np.repeat(np.arange(len(by_class)), [len(paths) for paths in by_class.values()])
    return Split(labels, paths=tuple(path for paths in by_class.values() for path in paths))


def images_of(part: Path, name: str) -> list[str]:
    """The image files below PART/NAME in order, those in linked folders too. Raises DataError for a
    link that never ends."""
    if not (part / name).is_dir():
        return []
    images: list[str] = []
    # folders to look into, each with those that it is in
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]]
    waiting = [(str(part / name), (identity(part.parent), identity(part)))]
    while waiting:
        folder, around = waiting.pop()
        if (own := identity(folder)) in around:
            raise DataError(
                f"{folder} leads back to a folder that it is in, without end: remove that link"
            )
        for entry in listed(folder):
            if is_folder(entry):
                waiting.append((entry.path, (*around, own)))
            elif is_image(entry):
                images.append(entry.path)
    return sorted(images)


def identity(folder: Path | str) -> tuple[int, int]:
    """What a folder is, by whatever path one comes to it."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def listed(folder: Path | str) -> list[os.DirEntry[str]]:
    """What is in a folder, less hidden files and those that belong to a system."""
    with os.scandir(folder) as entries:
        return [e for e in entries if e.name[0] != "." and e.name.lower() not in OF_SYSTEMS]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is one, or a link to one."""
    with contextlib.suppress(OSError):  # a link to itself is none
        return entry.is_dir()
    return False


def is_image(entry: os.DirEntry[str]) -> bool:
    """Whether a file's name is an image's."""
    return os.path.splitext(entry.name)[1].lower() in EXTENSIONS and not is_folder(entry)


def flat(part: Path) -> str:
    """What to say of a folder without classes where its images lie in it themselves, as ImageNet's
    val/ comes."""
    loose = any(map(is_image, listed(part)))
    return f"; its images lie there without them: sort them into {part}/CLASS/" if loose else ""


def more(names: list[str]) -> str:
    """How many there are beside the first."""
    return f" (nor {len(names) - 1:,} more)" if len(names) > 1 else ""


READERS = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagenet": imagenet,
    "folder": folder,
}
