"""What is known of ImageNet (ILSVRC2012) without its images: its classes, what people call them,
and the labels of its validation set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

WNID = re.compile(r"n[0-9]{8}")  # how WordNet's ids look


class Facts(NamedTuple):
    """ImageNet's 1,000 classes and its 50,000 images for validation."""

    wnids: tuple[str, ...]  # [1000], sorted
    names: tuple[str, ...]  # [1000], in the same order, each another
    # int64 [50,000]: the position in `wnids` of the class of ILSVRC2012_val_00000001 and so on
    labels: np.ndarray


@cache
def facts() -> Facts:
    """Read from the file that scripts/make_imagenet.py made."""
    with np.load(Path(__file__).parents[1] / "imagenet.npz", allow_pickle=False) as file:
        wnids = tuple(f"n{number:08}" for number in file["wnids"].tolist())
        names = tuple(file["names"].tobytes().decode().split("\n"))
        return Facts(wnids, names, file["labels"].astype(np.int64))


def names_of(classes: Sequence[str]) -> tuple[str, ...]:
    """What people call these classes; nothing unless all of them are ImageNet's."""
    if not all(map(WNID.fullmatch, classes)):
        return ()
    names = dict(zip(facts().wnids, facts().names, strict=True))
    return tuple(names[wnid] for wnid in classes) if names.keys() >= set(classes) else ()
