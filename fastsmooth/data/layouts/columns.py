from __future__ import annotations

from pathlib import Path

from fastsmooth.data.images import DataConfig, DataError, ImageSet

WANTS_PARQUET = "*.parquet with an image column"
WANTS_ARROW = "a data set that Hugging Face saved to disk"


def sign_of_parquet(root: Path) -> str:
    return ""


def sign_of_arrow(root: Path) -> str:
    return ""


def read_parquet(config: DataConfig) -> ImageSet:
    raise DataError("parquet")


def read_arrow(config: DataConfig) -> ImageSet:
    raise DataError("arrow")
