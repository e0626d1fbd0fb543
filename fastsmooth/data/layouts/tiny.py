"""Tiny ImageNet: train/ID/images/, and val/images/ with val_annotations.txt or sorted by class."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from fastsmooth.data.files import Paths
from fastsmooth.data.images import DataConfig, DataError, ImageSet
from fastsmooth.data.layouts.common import (
    is_folder,
    is_image,
    listed,
    loose,
    put_together,
    refuse_share,
)
from fastsmooth.data.layouts.flat import (
    folders_of,
    named,
    of_classes,
    refuse_difference,
    refuse_lines,
    twice,
)
from fastsmooth.data.layouts.imagenet_facts import WNID, names_of
from fastsmooth.data.layouts.trees import by_class, images_of, split_of, split_tree
from fastsmooth.runfolder.files import read_file

FOLDER = "tiny-imagenet-200"  # that its archive holds
ANNOTATIONS, IDS, WORDS = "val_annotations.txt", "wnids.txt", "words.txt"
WANTS = f"train/ID/images/IMAGE and val/images/IMAGE with val/{ANNOTATIONS}"
LARGEST = 1 << 26  # bytes of a text: words.txt has 3 MB
REMEDY = f"take it from {FOLDER}.zip again"


def sign(root: Path) -> str:
    """What tells that a folder is Tiny ImageNet's; nothing where it is none."""
    for base in (root, root / FOLDER):
        texts = [path for path in (base / "val" / ANNOTATIONS, base / IDS) if path.is_file()]
        folders = folders_of(base / "train") if texts and (base / "val").is_dir() else []
        if len(folders) > 1 and all((base / "train" / f / "images").is_dir() for f in folders):
            where = "" if base == root else f" in {FOLDER}/"
            return f"train/ID/images/ of {len(folders):,} classes and {texts[0].name}{where}"
    return ""


def read(config: DataConfig) -> ImageSet:
    """Tiny ImageNet, at DIR or DIR/tiny-imagenet-200; its test/ has no labels and is not read.
    Classes are those of train/. Raises DataError."""
    root = Path(config.data_dir)
    if not root.is_dir():
        raise DataError(f"--data-dir {root}: no such directory: give the folder of Tiny ImageNet")
    base = root / FOLDER if (root / FOLDER).is_dir() and not (root / "train").is_dir() else root
    train, val = base / "train", base / "val"
    for part in (train, val):
        if not part.is_dir():
            raise DataError(
                f"--data-dir {root} has no {part.relative_to(root)}/: --dataset tiny-imagenet "
                f"wants {WANTS}"
            )
    refuse_share(config, f"--data-dir {root} is split into training and validation images")
    ids = ids_of(base / IDS)
    folders = sorted(entry.name for entry in listed(train) if is_folder(entry))
    if ids and (strange := [name for name in folders if name not in ids]):
        raise DataError(
            f"{train} has a class folder that {IDS} does not name: {named(strange)}: remove it"
        )
    names = words_of(base / WORDS, folders)
    if is_sorted(val):
        found = split_tree(config, ("val",), base)
        return replace(found, about="train/ and val/ of class folders", names=names)
    inside = by_class(train)
    heap = images_of(val, "images")
    files = [path.removeprefix(f"{val}/images/") for path in heap]
    labels = annotated(val, files, ids or set(inside))
    test, left_out = of_classes(Paths(heap), [labels[f] for f in files], tuple(inside), val)
    about = f"train: class folders, val: val/images/, labels from {ANNOTATIONS}"
    remarks = [*loose(train), *left_out]
    return put_together(config, tuple(inside), split_of(inside), test, about, remarks, names)


def is_sorted(val: Path) -> bool:
    """Whether its images are in class folders. Raises DataError for images in and beside such."""
    folders = [e.name for e in listed(val) if is_folder(e) and images_of(val, e.name)]
    beside = [name for name in folders if name != "images"]
    if "images" in folders and beside:
        raise DataError(
            f"{val} has images both in images/ and in class folders ({named(sorted(beside))}): "
            "sort all of them, or none"
        )
    if not folders:
        lost = " in images/, but beside it" if any(map(is_image, listed(val))) else ""
        raise DataError(f"{val} has no images{lost}: --dataset tiny-imagenet wants {WANTS}")
    return bool(beside)


def annotated(val: Path, files: list[str], ids: set[str]) -> dict[str, str]:
    """The class of each image of val/images/ by its name, of the classes `ids`. Raises
    DataError."""
    path = val / ANNOTATIONS
    if not path.is_file():
        raise DataError(
            f"{path}: no such file, which has the labels of {val}/images: {REMEDY}, or sort the "
            "images into class folders"
        )
    found: dict[str, str] = {}
    wrong: list[tuple[int, str]] = []
    for number, line in enumerate(lines_of(path), 1):
        file, *rest = line.split("\t")
        if not rest:  # the box may be left out
            wrong.append((number, f"{line[:100]!r} is no name and class with a tab between"))
        elif file in found:
            wrong.append((number, f"{file[:100]!r} stands there twice"))
        elif rest[0] not in ids:
            wrong.append((number, f"{rest[0][:100]!r} is none of the {len(ids):,} classes"))
        else:
            found[file] = rest[0]
    refuse_lines(path, wrong, REMEDY)
    refuse_difference(path, found, val / "images", files, REMEDY)
    return found


def ids_of(path: Path) -> set[str]:
    """The ids that wnids.txt names; none where it is not there. Raises DataError."""
    if not path.exists():
        return set()
    ids = lines_of(path)
    wrong = [
        (number, f"{name[:100]!r} is no WordNet id")
        for number, name in enumerate(ids, 1)
        if not WNID.fullmatch(name)
    ]
    refuse_lines(path, wrong, REMEDY)
    if again := twice(ids):
        raise DataError(f"{path} names {named(again)} more than once: {REMEDY}")
    return set(ids)


def words_of(path: Path, classes: list[str]) -> tuple[str, ...]:
    """What words.txt calls the classes, each by the first of its words that no other has; where it
    is not there or does not know them, ImageNet's names, or none."""
    if not path.exists():
        return names_of(classes)
    words = dict(line.split("\t", 1) for line in lines_of(path) if "\t" in line)
    if not words.keys() >= set(classes):
        return names_of(classes)
    short = [words[name].partition(",")[0].strip() for name in classes]
    count = Counter(short)
    return tuple(
        word if count[word] == 1 else words[name] for word, name in zip(short, classes, strict=True)
    )


def lines_of(path: Path) -> list[str]:
    """The lines of a text. Raises DataError for what is no UTF-8."""
    try:
        text = read_file(path, LARGEST).decode().replace("\r\n", "\n")
        return text.rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8 ({error}): {REMEDY}") from None
