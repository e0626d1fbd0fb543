"""ImageNet as it is downloaded."""

from __future__ import annotations

from pathlib import Path

from fastsmooth.data.images import DataConfig, ImageSet
from fastsmooth.data.layouts import trees

WANTS = "train/WNID/IMAGE and val/WNID/IMAGE"


def sign(root: Path) -> str:
    return ""


def read(config: DataConfig) -> ImageSet:
    """ImageNet in the ImageFolder layout: train/ and val/, a folder a class, its WordNet id."""
    return trees.split_tree(config, tests=("val",))
