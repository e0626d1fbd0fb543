"""Class folders of training images beside test images whose labels a text gives: what ImageNet and
Tiny ImageNet share."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from fastsmooth.data.files import Files
from fastsmooth.data.images import DataError, Split
from fastsmooth.data.layouts.common import is_folder, is_hidden

MOST = 10_000  # entries of a folder that is looked at to recognise it: it may hold a million


def folders_of(part: Path) -> list[str]:
    """The class folders of a part; none where it is no folder, or has too many entries to be of
    classes."""
    if not part.is_dir():
        return []
    with os.scandir(part) as entries:
        some = list(islice(entries, MOST + 1))
    found = [entry.name for entry in some if is_folder(entry) and not is_hidden(entry.name)]
    return sorted(found) if len(some) <= MOST else []


def of_classes(
    files: Files, ids: Sequence[str], classes: Sequence[str], part: Path
) -> tuple[Split, list[str]]:
    """(the images by class, in the order that they have, remarks): those of other classes are left
    out. `ids` [n]: the class of each. Raises DataError where none is left."""
    label = {name: k for k, name in enumerate(classes)}
    labels = np.array([label.get(name, -1) for name in ids], np.int64)
    others = {name for name in ids if name not in label}
    order = np.argsort(labels, kind="stable")[np.count_nonzero(labels < 0) :]
    if not len(order):
        raise DataError(
            f"{part} has no images of the {len(classes):,} classes that are trained: add some"
        )
    split = Split(labels[order], files=files.take(order))
    if not others:
        return split, []
    return split, [
        f"{part}: images of {len(others):,} classes that have no training images are left out: "
        f"{len(ids) - len(order):,}"
    ]


def refuse_lines(path: str | Path, wrong: Sequence[tuple[int, str]], remedy: str) -> None:
    """Raises DataError where lines of a text are wrong, each by its number and what is wrong."""
    if wrong:
        number, words = wrong[0]
        others = f" (and {len(wrong) - 1:,} more lines are wrong)" if len(wrong) > 1 else ""
        raise DataError(f"{path}, line {number:,}: {words}{others}: {remedy}")


def refuse_difference(
    path: Path, rows: Collection[str], part: Path, files: Collection[str], remedy: str
) -> None:
    """Raises DataError unless a text has a row for each of the files and none besides."""
    have = f"{len(rows):,} rows, {len(files):,} images"
    if unlabelled := sorted(set(files) - set(rows)):
        raise DataError(f"{path} has no row for {named(unlabelled)} of {part} ({have}): {remedy}")
    if absent := sorted(set(rows) - set(files)):
        raise DataError(
            f"{path} has rows without a file in {part}: {named(absent)} ({have}): {remedy}"
        )


def named(names: Sequence[str]) -> str:
    """The first of the names, and how many there are besides."""
    return f"{names[0]!r}" + (f" (and {len(names) - 1:,} more)" if len(names) > 1 else "")


def twice(names: Sequence[str]) -> list[str]:
    """Those of the names that stand there more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)
