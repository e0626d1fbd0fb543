"""Data sets in files of many images each: which of them are to train on and which to test on, by
the words in their names, and how what they hold becomes a set."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsmooth.data.files import Files
from fastsmooth.data.images import DataConfig, DataError, ImageSet, Split, others
from fastsmooth.data.layouts.common import (
    class_order,
    is_folder,
    kept_whole,
    listed,
    needs_share,
    put_together,
    refuse_share,
    shared_out,
    sorted_by_class,
)
from fastsmooth.data.layouts.trees import TESTS

WORDS = {"train": "train", "training": "train"} | {word: word for word in TESTS}
PLAIN = {"data", "default"}  # folders that say nothing, as those of Hugging Face's data sets
DEEPEST = 2  # folders inside one another
MOST_CLASSES = 1_000_000


class Parts(NamedTuple):
    """The files of a data set by what they are for, by their names below its root."""

    train: list[str]
    test: list[str]  # none where the images are in one piece
    test_word: str  # what the names call the test: val
    left_out: list[str]

    def about(self, what: str) -> str:
        tested = f" to train on, {len(self.test):,} named {self.test_word}" if self.test else ""
        return f"{what}: {len(self.train):,}{tested}"

    def remarks(self, what: str) -> list[str]:
        if not self.left_out:
            return []
        named = f"{self.left_out[0]!r}{others(self.left_out)}"
        return [f"{what} that are neither to train nor to test on are left out: {named}"]


class Found(NamedTuple):
    """The n images of a part, in any order."""

    files: Files
    labels: np.ndarray  # int64 [n]
    keys: Sequence[str]  # n, by which those of a class are ordered
    held_by: Sequence[str]  # n, by a hash of which --val-share holds them out


def names_below(root: Path, suffixes: tuple[str, ...]) -> list[str]:
    """The files with such an ending in a folder, in its data/, and in those that are named as a
    split is; their names below it, sorted."""
    names = []
    waiting = [("", DEEPEST)]
    while waiting:
        folder, deeper = waiting.pop()
        for entry in listed(root / folder):
            name = os.path.join(folder, entry.name)
            if is_folder(entry):
                if deeper and (words_in(entry.name) or entry.name in PLAIN):
                    waiting.append((name, deeper - 1))
            elif entry.name.lower().endswith(suffixes):
                names.append(name)
    return sorted(names)


def words_in(name: str) -> set[str]:
    """The splits that a file's or folder's name speaks of."""
    return {WORDS[word] for word in re.findall("[a-z]+", name.lower()) if word in WORDS}


def parts_of(config: DataConfig, names: Sequence[str], what: str, whole: str = "") -> Parts:
    """The files by what they are for. Raises DataError for a name that says two things, for a test
    alone, for --val-share where there is a test, and without it where there is none; then `whole`
    says what there is, else so many of `what`."""
    root = config.data_dir
    by_word: dict[str, list[str]] = {}
    for name in names:
        words = words_in(name)
        if len(words) > 1:
            said = " and ".join(sorted(words))
            raise DataError(
                f"{os.path.join(root, name)}: its name says {said}: rename it to what it is for"
            )
        by_word.setdefault(next(iter(words), ""), []).append(name)
    word = next((word for word in TESTS if word in by_word), "")
    if word and "train" not in by_word and kept_whole(config):
        by_word, word = {"": by_word[word]}, ""
    if word and "train" not in by_word:
        raise DataError(
            f"--data-dir {root} has {what} named {word} and none named train: give those to train "
            "on a name with train"
        )
    if word:
        refuse_share(config, f"--data-dir {root} has {what} named {word} to test on")
    else:
        needs_share(config, f"--data-dir {root} holds {whole or f'{len(names):,} {what}'}")
    train = by_word.get("train") or by_word[""]
    test = by_word.get(word, []) if word else []
    used = {*train, *test}
    return Parts(train, test, word, [name for name in names if name not in used])


def distinct(keys: Sequence[str], where: Sequence[str]) -> list[str]:
    """The keys, each once: of those that are alike all but the first are told apart by where they
    are, so that what comes later changes none that was there."""
    seen: set[str] = set()
    found = []
    for key, place in zip(keys, where, strict=True):
        found.append(f"{key}\0{place}" if key in seen else key)
        seen.add(key)
    return found


def numbered(texts: Collection[str], where: str) -> tuple[list[str], dict[str, int]]:
    """(the classes, the number of each label): the labels that occur, whole numbers by their size
    and names by their letters. Raises DataError for a mixture."""
    numbers = [text for text in texts if text.isdecimal() and text.isascii()]
    if not numbers:
        classes = sorted(texts)
        return classes, {name: k for k, name in enumerate(classes)}
    if len(numbers) < len(texts):
        name = min(set(texts) - set(numbers))
        raise DataError(
            f"{where}: some labels are numbers and others names ({numbers[0]} and {name!r}): label "
            "all by one of them"
        )
    occur = sorted({int(text) for text in numbers})
    place = {number: k for k, number in enumerate(occur)}
    return [str(number) for number in occur], {text: place[int(text)] for text in numbers}


def put_in_order(
    config: DataConfig,
    classes: Sequence[str],
    train: Found,
    test: Found | None,
    about: str,
    remarks: Iterable[str],
    names: Sequence[str] = (),
) -> ImageSet:
    """The set of what was found; without a test --val-share holds out a part. Raises DataError."""
    if test is None:
        order = class_order(train.labels, train.keys)
        everything = Split(train.labels[order], files=train.files.take(order))
        parts = shared_out(config, everything, [train.held_by[i] for i in order.tolist()])
    else:
        parts = (
            sorted_by_class(train.files, train.labels, train.keys),
            sorted_by_class(test.files, test.labels, test.keys),
        )
    return put_together(config, classes, *parts, about, remarks, names)
