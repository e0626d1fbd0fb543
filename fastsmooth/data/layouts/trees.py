"""Class folders: train/CLASS/IMAGE beside val/ or test/, or CLASS/IMAGE with a share held out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fastsmooth.data.files import Paths
from fastsmooth.data.images import DataConfig, DataError, ImageSet, Split
from fastsmooth.data.layouts.common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SUFFIXES,
    TABLES,
    existing,
    is_folder,
    is_image,
    kept_whole,
    listed,
    loose,
    more,
    put_together,
    shared_out,
)
from fastsmooth.data.layouts.imagenet_facts import names_of

WANTS = "train/CLASS/IMAGE beside val/ or test/, or CLASS/IMAGE alone"
TESTS = ("val", "test", "valid", "validation")  # the first that is there


def sign(root: Path) -> str:
    """What tells that a folder is one of class folders; nothing where it is none."""
    if not root.is_dir():
        return ""
    folders = [entry for entry in listed(root) if is_folder(entry)]
    if any(entry.name == "train" for entry in folders):
        return "train/ of class folders" if any(map(is_folder, listed(root / "train"))) else ""
    if any(entry.name.lower().endswith(TABLES) for entry in listed(root)):
        return ""  # which says more of the images than their folders do
    classes = sum(any(map(is_image, listed(entry.path))) for entry in folders)
    return f"{classes:,} folders of images" if classes > 1 else ""


def read(config: DataConfig) -> ImageSet:
    """Any tree DIR/train/CLASS/IMAGE with DIR/val or DIR/test, or one without a split of which
    --val-share is held out; normalised as ImageNet is."""
    if config.val_share is None:
        return split_tree(config)
    root = existing(config)
    beside = [name for name in TESTS if (root / name).is_dir()]
    if beside and kept_whole(config):
        return split_tree(config)
    if beside:
        raise DataError(
            f"--data-dir {root} has {beside[0]}/ to test on already: leave --val-share out"
        )
    return whole_tree(config, root / "train" if (root / "train").is_dir() else root)


def whole_tree(config: DataConfig, root: Path) -> ImageSet:
    """The tree root/CLASS/IMAGE, of which --val-share is held out."""
    inside = by_class(root)
    if kept_whole(config):
        inside = {name: paths for name, paths in inside.items() if paths}
        if not inside:
            raise DataError(
                f"{root} has no images in folders of classes: looked for {SUFFIXES}{flat(root)}"
            )
    classes = tuple(inside)
    if empty := [name for name in classes if not inside[name]]:
        raise DataError(
            f"{root / empty[0]} has no images{more(empty)}: put some there or remove the folder "
            f"(looked for {SUFFIXES})"
        )
    if len(classes) < 2 and not kept_whole(config):
        raise DataError(
            f"{root} has {len(classes)} class folders: at least two are needed{flat(root)}"
        )
    everything = split_of(inside)
    keys = [os.path.relpath(path, root) for paths in inside.values() for path in paths]
    train, test = shared_out(config, everything, keys)
    return put_together(config, classes, train, test, "", names=names_of(classes))


def split_tree(
    config: DataConfig, tests: tuple[str, ...] = TESTS, root: Path | None = None
) -> ImageSet:
    """The tree ROOT/train/CLASS/IMAGE with one of `tests` beside train/; `root`: --data-dir, or a
    folder in it."""
    root = root or Path(config.data_dir)
    wanted = tests[:2]
    if not root.is_dir():
        raise DataError(
            f"--data-dir {root}: no such directory: it must hold train/ and "
            f"{' or '.join(t + '/' for t in wanted)}"
        )
    beside = [root / name for name in tests if (root / name).is_dir()]
    if not (root / "train").is_dir() or not beside:
        no_train = not (root / "train").is_dir()
        missing = "train/" if no_train else " or ".join(t + "/" for t in wanted)
        where = "CLASS/IMAGE" if no_train else "train/CLASS/IMAGE"
        unsplit = f"; --val-share 0.1 holds out a part of {where}" * (config.dataset != "imagenet")
        raise DataError(
            f"--data-dir {root} has no {missing}: --dataset {config.dataset} wants "
            f"train/CLASS/IMAGE and the same beside it{unsplit}"
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
    remarks += [*loose(train), *loose(test)]
    return ImageSet(
        split_of(inside),
        split_of(tested),
        classes,
        IMAGENET_MEAN,
        IMAGENET_STD,
        tuple(remarks),
        names=names_of(classes),
    )


def by_class(part: Path) -> dict[str, list[str]]:
    """The image files of each class folder, in order."""
    classes = sorted(entry.name for entry in listed(part) if is_folder(entry))
    return {name: images_of(part, name) for name in classes}


def split_of(by_class: dict[str, list[str]]) -> Split:
    labels = np.repeat(np.arange(len(by_class)), [len(paths) for paths in by_class.values()])
    paths = [path for paths in by_class.values() for path in paths]
    return Split(labels, files=Paths(paths))


def images_of(part: Path, name: str) -> list[str]:
    """The image files below PART/NAME in order, those in linked folders too. Raises DataError for a
    link that never ends."""
    if not (part / name).is_dir():
        return []
    return images_below(part / name, (identity(part.parent), identity(part)))


def images_below(top: Path, within: tuple[tuple[int, int], ...] = ()) -> list[str]:
    """The image files below a folder in order, as images_of. `within`: the folders that it is in,
    which no link below may lead back to."""
    images: list[str] = []
    # folders to look into, each with those that it is in
    waiting = [(str(top), within)]
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


def flat(part: Path) -> str:
    """What to say of a folder without classes where its images lie in it themselves, as ImageNet's
    val/ comes."""
    if not any(map(is_image, listed(part))):
        return ""
    return f"; its images lie there without them: sort them into {part}/CLASS/"
