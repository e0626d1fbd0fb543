"""What the command `prepare` leaves beside the images that it stores: prepared.json says what they
were made of, prepared.part.json that they are not all there yet.

A prepared set is another data set than the one it was made of, and than others made of that: its
fingerprint holds what is said here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fastsmooth.data.images import DataError, ImageSet
from fastsmooth.runfolder.files import read_file

FILE, PART = "prepared.json", "prepared.part.json"
VERSION = 1  # another one whenever the fields change, or what is done to an image
LAYOUTS = {"jpeg": "folder", "tar": "webdataset"}  # --format: the data set that reads it
READS = {"folder": "jpeg", "imagenet": "jpeg", "webdataset": "tar"}  # the other way round
LARGEST = 1 << 24  # bytes; the names of 21,841 classes take less than one or two million
KINDS = {"int": int, "str": str, "list[str]": list}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is made of which images; what prepared.part.json holds."""

    version: int
    layout: str  # of the source, as --dataset calls it
    fingerprint: str  # of the source
    stored: str  # --format
    short_side: int  # pixels, at most
    quality: int  # of what is encoded anew
    encoder: str  # whose bytes they are
    classes: list[str]  # names for people

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1).encode() + b"\n"


@dataclass(frozen=True, kw_only=True)
class Record(Request):
    """That, and what came of it; what prepared.json holds."""

    train: int  # images
    test: int
    labels: str  # labels_of
    contents: str  # SHA-256 of the SHA-256 of every image, in order
    bytes_before: int  # of the images alone; 0 where it is not known
    bytes_after: int

    def about(self) -> str:
        return (
            f"prepared: short side {self.short_side}, JPEG quality {self.quality}, from "
            f"{self.layout} {self.fingerprint[:12]}"
        )


def labels_of(images: ImageSet) -> str:
    """A hash of the labels, and of how many of them are for training."""
    digest = hashlib.sha256()
    for split in (images.train, images.test):
        digest.update(len(split).to_bytes(8, "little") + split.labels.astype("<i8").tobytes())
    return digest.hexdigest()


R = TypeVar("R", bound=Request)


def read(path: Path, form: type[R]) -> R | None:
    """What such a file says; None where there is none. Raises DataError for one that is damaged."""
    if not path.exists():
        return None
    try:
        table = json.loads(read_file(path, LARGEST))
        kinds = {field.name: KINDS[str(field.type)] for field in dataclasses.fields(form)}
        # a bool is an int to isinstance
        if {name: type(value) for name, value in table.items()} != kinds:
            raise ValueError("it has other fields")
        if table["version"] != VERSION:
            raise ValueError(f"it has version {table['version']}, not {VERSION}")
        if table["stored"] not in LAYOUTS or {type(name) for name in table["classes"]} != {str}:
            raise ValueError("its values make no sense")
        return form(**table)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: repair that") from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged, or of another version of fastsmooth ({error}): prepare the images "
            "again, into another folder"
        ) from None


def refuse_unfinished(root: Path) -> None:
    """Raises DataError for a folder in which images are still missing."""
    if (root / PART).exists():
        raise DataError(
            f"--data-dir {root} is unfinished: give the command prepare again that began it, and "
            "it goes on"
        )


def layout_of(root: Path) -> str:
    """The data set that reads a prepared folder; nothing where it is none."""
    record = read(root / FILE, Record)
    return LAYOUTS[record.stored] if record else ""


def marked(images: ImageSet, name: str, root: Path) -> ImageSet:
    """The images that --dataset `name` found below `root`, with what they were prepared of. Raises
    DataError where they are not those that were prepared."""
    record = read(root / FILE, Record)
    if record is None or READS.get(name) != record.stored:
        return images
    if labels_of(images) != record.labels or len(images.classes) != len(record.classes):
        raise DataError(
            f"--data-dir {root} holds {len(images.train):,} training and {len(images.test):,} test "
            f"images, but not the {record.train:,} and {record.test:,} with their labels that "
            f"{FILE} speaks of: prepare them again, or remove {FILE} to take them as they are"
        )
    kept = record.stored, record.short_side, record.quality, record.fingerprint, record.contents
    return dataclasses.replace(
        images,
        about="; ".join(filter(None, [images.about, record.about()])),
        names=tuple(record.classes),
        prepared=" ".join(map(str, kept)),
    )
