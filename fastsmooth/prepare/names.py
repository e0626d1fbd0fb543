"""What images are called in class folders: as in the source, where that is safe and keeps their
order, which the names alone make."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence

import numpy as np

from fastsmooth.data.layouts.common import EXTENSIONS, OF_SYSTEMS

LONGEST_NAME = 200  # bytes; a file system takes 255, of which a file that is being written needs 14
UNSAFE = re.compile(r'[%/\\<>:"|?*]')  # to some system, and what stands for them


def safe(name: str) -> str:
    """The name in characters that every system takes and every terminal shows; no two become one.

    Others are %HH, the bytes of each: a class "a/b" is the folder "a%2Fb". So is the first
    character where the name would be hidden or taken for a system's.
    """
    name = UNSAFE.sub(lambda c: percent(c[0]), name)
    if not name.isprintable():
        name = "".join(c if c.isprintable() else percent(c) for c in name)
    hidden = name[:1] == "." or name.lower() in OF_SYSTEMS
    return percent(name[0]) + name[1:] if hidden else name


def percent(c: str) -> str:
    # a byte of a file name that is not UTF-8 comes as a surrogate
    return "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogatepass"))


def in_order(names: Sequence[str], ending: str = "") -> list[str]:
    """The names, each with the ending, where they then sort as they stand, each once, and are short
    enough; else with their places before them: 007-NAME."""
    whole = [name + ending for name in names]
    fit = all(0 < len(name.encode()) <= LONGEST_NAME for name in whole)
    if fit and all(a < b for a, b in itertools.pairwise(whole)):
        return whole
    digits = len(str(len(names) - 1))
    cut = (name.encode()[: LONGEST_NAME // 2].decode(errors="ignore") for name in names)
    return [f"{k:0{digits}}-{name}{ending}" for k, name in enumerate(cut)]


def class_folders(classes: Sequence[str]) -> list[str]:
    return in_order([safe(name) for name in classes])


def image_files(names: Sequence[str], labels: np.ndarray, folders: Sequence[str]) -> list[str]:
    """FOLDER/NAME.jpg of every image, `names` being paths and labels int64 [n]; the images of a
    class sort as they stand."""
    paths = [""] * len(labels)
    order = np.argsort(labels, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        if not len(part):  # of no images at all
            continue
        own = [names[i] for i in part.tolist()]
        root = os.path.join(os.path.commonpath([os.path.dirname(name) for name in own]), "")
        files = in_order([safe(stem(name.removeprefix(root))) for name in own], ".jpg")
        for i, name in zip(part.tolist(), files, strict=True):
            paths[i] = f"{folders[labels[i]]}/{name}"
    return paths


def stem(name: str) -> str:
    begin, extension = os.path.splitext(name)
    return begin if extension.lower() in EXTENSIONS else name
