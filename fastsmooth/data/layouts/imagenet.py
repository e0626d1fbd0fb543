"""ImageNet (ILSVRC2012) as it is downloaded: class folders or the official archives, the validation
images sorted or not, from the organisers or from Kaggle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsmooth.data import tars
from fastsmooth.data.files import Files, Names, Paths, Ranges
from fastsmooth.data.images import DataConfig, DataError, ImageSet, Split
from fastsmooth.data.layouts.common import (
    EXTENSIONS,
    is_folder,
    is_hidden,
    is_image,
    listed,
    loose,
    put_together,
    refuse_share,
)
from fastsmooth.data.layouts.flat import folders_of, named, of_classes, twice
from fastsmooth.data.layouts.imagenet_facts import facts, names_of
from fastsmooth.data.layouts.imagenet_labels import labels_of, number_of
from fastsmooth.data.layouts.trees import by_class, images_of, split_of, split_tree
from fastsmooth.messages import note

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
ARCHIVES = {"train": TRAIN_TAR, "val": VAL_TAR}  # by the folder that each may be unpacked to
KAGGLE = ("ILSVRC", "Data", "CLS-LOC")  # the folder of train/ and val/ in Kaggle's archive
NUMBERED = "ILSVRC2012_val_00000001.JPEG"
WANTS = f"train/WNID/IMAGE or {TRAIN_TAR}, beside val/ (sorted or as downloaded) or {VAL_TAR}"


def sign(root: Path) -> str:
    """What tells that a folder is ImageNet's; nothing where it is none."""
    for base in bases(root):
        train, val = part_of(base, "train"), part_of(base, "val")
        where = "" if base == root else f" in {base.relative_to(root)}/"
        beside = f"{val.name}{'/' * val.is_dir()}{where}"
        if not val.exists():
            continue
        if not train.is_dir():
            return f"{TRAIN_TAR} and {beside}"
        folders = folders_of(train)
        # Tiny ImageNet has a folder images/ in each
        tiny = any((train / name / "images").is_dir() for name in folders)
        if len(folders) > 1 and names_of(folders) and not tiny:
            return f"train/ of {len(folders):,} of its 1,000 classes and {beside}"
    return ""


def read(config: DataConfig) -> ImageSet:
    """ImageNet: train/ of class folders, or the tar of their tars; val/ of class folders or of
    images in one heap, or their tar. Classes are those of the training images. Raises DataError."""
    root = Path(config.data_dir)
    if not root.is_dir():
        raise DataError(f"--data-dir {root}: no such directory: give the folder of ImageNet")
    base = base_of(root)
    for part, name in ARCHIVES.items():
        if not part_of(base, part).exists():
            packed = sorted(found.name for found in base.glob(f"{name}.*"))
            instead = f" ({packed[0]} is to be unpacked to it)" if packed else ""
            raise DataError(
                f"--data-dir {root} has no {part}/ and no {name}{instead}: --dataset imagenet "
                f"wants {WANTS}"
            )
    refuse_share(config, f"--data-dir {root} is split into training and validation images")
    train_path, val_path = (part_of(base, part) for part in ARCHIVES)
    heap = heap_of(val_path)
    if heap is None and train_path.is_dir():
        refuse_tars(train_path)
        found = split_tree(config, ("val",), base)
        return replace(found, about=f"train/ and val/ of class folders{unread(base)}")
    train = trained(train_path)
    if heap is None:
        val = sorted_part(val_path, train.classes)
    else:
        val = labelled_part(heap, val_path, places_of(root, base))
    test, left_out = of_classes(val.files, val.ids, train.classes, val_path)
    about = f"train: {train.form}, val: {val.form}{unread(base)}"
    remarks, names = [*train.remarks, *val.remarks, *left_out], names_of(train.classes)
    return put_together(config, train.classes, train.split, test, about, remarks, names)


# Where it lies


def bases(root: Path) -> list[Path]:
    """The folders that may hold train/ and val/, those that hold the first of them."""
    inside = [root, root.joinpath(*KAGGLE[1:]), root.joinpath(*KAGGLE)]
    return [base for base in inside if part_of(base, "train").exists()]


def base_of(root: Path) -> Path:
    """The one of them. Raises DataError for several."""
    found = bases(root)
    if len(found) > 1:
        where = " and ".join(f"{part_of(base, 'train').relative_to(root)}" for base in found)
        raise DataError(f"--data-dir {root} has {where}: give the folder of one of them")
    return found[0] if found else root


def part_of(base: Path, part: str) -> Path:
    """The folder of a part, or its archive where only that is there: who unpacks it may keep it."""
    folder, archive = base / part, base / ARCHIVES[part]
    return archive if archive.is_file() and not folder.is_dir() else folder


def unread(base: Path) -> str:
    """What to say of archives beside what was unpacked of them."""
    left = [
        name
        for part, name in ARCHIVES.items()
        if (base / name).exists() and part_of(base, part).name != name
    ]
    return f" ({' and '.join(left)} not read)" if left else ""


def places_of(root: Path, base: Path) -> list[Path]:
    """The folders in which a csv or a devkit may lie: --data-dir, the folder of train/ and val/,
    and in Kaggle's form those that it is in."""
    for path in (os.path.abspath(base), os.path.realpath(base)):
        if Path(path).parts[-len(KAGGLE) :] == KAGGLE:
            return [root, base, *list(Path(path).parents)[: len(KAGGLE)]]
    return [root, base]


# Training images


class Trained(NamedTuple):
    """The training images."""

    split: Split
    classes: tuple[str, ...]
    form: str  # in words
    remarks: list[str]


def trained(path: Path) -> Trained:
    """The training images of a folder or an archive, by class. Raises DataError for a class that is
    none of ImageNet's."""
    if not path.is_dir():
        return unpacked(path)
    refuse_tars(path)
    inside = by_class(path)
    strange = sorted(inside.keys() - set(facts().wnids))
    if strange:
        raise DataError(
            f"{path} has a class folder that is none of ImageNet's 1,000 classes: "
            f"{named(strange)}: remove it, or sort the images of val/ into class folders"
        )
    return Trained(split_of(inside), tuple(inside), "class folders", loose(path))


def refuse_tars(train: Path) -> None:
    """Raises DataError where the archive of archives was unpacked, and they were not."""
    entries = listed(train)
    if not any(map(is_folder, entries)):
        inner = sorted(entry.name for entry in entries if entry.name.endswith(".tar"))
        if inner:
            raise DataError(
                f"{train} holds archives in place of class folders: {named(inner)}: unpack each "
                f"into a folder of its name, or put {TRAIN_TAR} itself beside val/"
            )


def unpacked(path: Path) -> Trained:
    """The training images of a tar of WNID.tar, read in place."""
    (listing,) = tars.listed([str(path)], note, "nested", tars.scan_nested)
    found = members(listing)
    names = [name for name, _ in found]
    classes = sorted({name.partition("/")[0] for name in names})
    strange = sorted(set(classes) - set(facts().wnids))
    if strange:
        raise DataError(
            f"{path} is to hold WNID.tar of ImageNet's 1,000 classes, and has {named(strange)}: "
            "fetch it again"
        )
    refuse_twice(path, twice(names))
    kept = [(name, i) for name, i in found if has_suffix(name)]
    label = {name: k for k, name in enumerate(classes)}
    labels = np.array([label[name.partition("/")[0]] for name, _ in kept], np.int64)
    files = ranges(path, listing, kept)
    return Trained(Split(labels, files=files), tuple(classes), f"{TRAIN_TAR}, in place", [])


# Validation images


class Part(NamedTuple):
    """The validation images."""

    files: Files  # in the order of their names
    ids: Sequence[str]  # [n], the WordNet id of each
    form: str  # in words
    remarks: list[str]


class Heap(NamedTuple):
    """Validation images that are in no class folders."""

    files: Files
    names: list[str]  # [n]
    form: str  # in words


def heap_of(path: Path) -> Heap | None:
    """The images of val/ or of its archive, sorted by name; None where they are in class folders.
    Raises DataError for images in and beside class folders, and for images without a number or with
    that of another."""
    if not path.is_dir():
        (listing,) = tars.listed([str(path)], note)
        found = members(listing)
        heap = Heap(ranges(path, listing, found), [name for name, _ in found], VAL_TAR)
    else:
        entries = listed(path)
        names = sorted(entry.name for entry in entries if is_image(entry))
        folders = sorted(entry.name for entry in entries if is_folder(entry))
        if folders == ["images"] and not names:
            raise DataError(f"{path}/images is a form of Tiny ImageNet: --dataset tiny-imagenet")
        if not any(map(number_of, names)) and (folders or not names):
            return None
        if filled := [name for name in folders if images_of(path, name)]:
            raise DataError(
                f"{path} has images both in class folders ({named(filled)}) and beside them "
                f"({named(names)}): sort all of them, or none"
            )
        heap = Heap(Paths([str(path / name) for name in names]), names, "val/ unsorted")
    if strange := [name for name in heap.names if not (number_of(name) and has_suffix(name))]:
        raise DataError(
            f"{path} is to hold {NUMBERED} and so on, to 50,000, and has {named(strange)}: "
            "remove what is none of them, or sort all into class folders"
        )
    refuse_twice(path, twice([f"ILSVRC2012_val_{number_of(name):08}" for name in heap.names]))
    return heap


def labelled_part(heap: Heap, path: Path, places: Sequence[Path]) -> Part:
    ids, source = labels_of(path, heap.names, places)
    form = f"{heap.form}, labels from {source}"
    return Part(heap.files, ids, form, [])


def sorted_part(val: Path, classes: Sequence[str]) -> Part:
    """The images of val/ in class folders. Raises DataError for a class that is not trained."""
    inside = by_class(val)
    extra = [name for name, paths in inside.items() if paths and name not in classes]
    if extra:
        raise DataError(
            f"{val} has a class folder that {TRAIN_TAR} has not: {named(extra)}: remove it"
        )
    files = Paths([path for paths in inside.values() for path in paths])
    ids = [name for name, paths in inside.items() for _ in paths]
    return Part(files, ids, "class folders", loose(val))


# What lies in an archive


def members(listing: tars.Listing) -> list[tuple[str, int]]:
    """(name, position) of each file of a listing by name, less those that are hidden or belong to a
    system."""
    system: dict[str, bool] = {}  # whether a folder is such, as many files are in one
    found: list[tuple[str, int]] = []
    for i, raw in enumerate(listing.names):
        name = os.fsdecode(raw).replace("/./", "/").removeprefix("./")
        folder, _, file = name.rpartition("/")
        if folder not in system:
            system[folder] = any(map(is_hidden, folder.split("/")))
        if not system[folder] and not is_hidden(file):
            found.append((name, i))
    return sorted(found)


def has_suffix(name: str) -> bool:
    """Whether a file's name is an image's."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def ranges(path: Path, listing: tars.Listing, found: Sequence[tuple[str, int]]) -> Ranges:
    """The images of these names and positions."""
    at = np.array([i for _, i in found], np.int64)
    names = Names.of(str(path), [os.fsencode(name) for name, _ in found])
    archive = np.zeros(len(at), np.int32)
    return Ranges(
        str(path), [listing.archive], archive, listing.start[at], listing.length[at], names
    )


def refuse_twice(path: Path, names: Sequence[str]) -> None:
    if names:
        raise DataError(f"{path} has {named(names)} more than once: remove what is there twice")
