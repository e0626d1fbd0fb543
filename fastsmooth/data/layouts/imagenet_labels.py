"""The labels of ImageNet's validation images that lie in no class folders: from Kaggle's csv or the
official devkit where one is there, else known by the images' numbers."""

from __future__ import annotations

import csv
import io
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastsmooth.data.images import DataError
from fastsmooth.data.layouts.flat import refuse_difference, refuse_lines
from fastsmooth.data.layouts.imagenet_facts import facts
from fastsmooth.runfolder.files import read_file

CSV = "LOC_val_solution.csv"
COLUMNS = ["ImageId", "PredictionString"]
DEVKIT = "ILSVRC2012_devkit_t12"
KINDS = ("", ".tar.gz", ".tgz", ".tar")  # of the devkit: a folder, or an archive
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
LARGEST = 1 << 26  # bytes, of either: ten times what they have
NUMBERED = re.compile(r"ILSVRC2012_val_([0-9]{8})")
REMEDY = "fetch it again, or remove it, as the labels are known without it"


def number_of(name: str) -> int:
    """The number of a validation image from its name, less what follows a dot: 1 to 50,000; 0 where
    it has none."""
    match = NUMBERED.fullmatch(name.partition(".")[0])
    number = int(match[1]) if match else 0
    return number if number <= len(facts().labels) else 0


def labels_of(part: Path, names: Sequence[str], places: Sequence[Path]) -> tuple[list[str], str]:
    """(the WordNet id of each image [n], where they are from, in words). `names` [n]: of images
    that have a number, each another; `places`: where a csv or a devkit may be. Raises DataError."""
    images = [name.partition(".")[0] for name in names]
    if path := there([place / CSV for place in places]):
        rows = read_csv(path)
        refuse_difference(path, rows, part, images, REMEDY)
        return [rows[image] for image in images], CSV
    source = "their numbers"
    if path := there([place / f"{DEVKIT}{kind}" for place in places for kind in KINDS]):
        check_ground_truth(*ground_truth(path))
        source = path.name
    wnids, labels = facts().wnids, facts().labels
    return [wnids[labels[number_of(image) - 1]] for image in images], source


def there(paths: Sequence[Path]) -> Path | None:
    """The first that is there."""
    return next((path for path in paths if path.exists()), None)


def read_csv(path: Path) -> dict[str, str]:
    """The WordNet id of each image by its name without .JPEG. Raises DataError."""
    try:
        text = read_file(path, LARGEST).decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a csv that can be read ({error}): {REMEDY}") from None
    if not rows or rows[0] != COLUMNS:
        header = ",".join(rows[0]) if rows else "nothing"
        raise DataError(
            f"{path} begins with {header[:100]!r} in place of {','.join(COLUMNS)!r}: {REMEDY}"
        )
    known = frozenset(facts().wnids)
    found: dict[str, str] = {}
    wrong: list[tuple[int, str]] = []
    for number, row in enumerate(rows[1:], 2):
        if not row:  # an empty line
            continue
        image, boxes = row[0], row[1].split() if len(row) == len(COLUMNS) else []
        wnids = set(boxes[::5])  # an id and four numbers for each thing in the image
        if len(row) != len(COLUMNS):
            wrong.append((number, f"{len(row)} columns in place of {len(COLUMNS)}"))
        elif not number_of(image) or "." in image:
            wrong.append((number, f"{image[:100]!r} is no image of the validation set"))
        elif image in found:
            wrong.append((number, f"{image!r} stands there twice"))
        elif len(boxes) % 5 or len(wnids) != 1:
            wrong.append((number, f"{row[1][:100]!r} is not one class with its boxes"))
        elif not wnids <= known:
            wrong.append((number, f"{boxes[0][:100]!r} is none of ImageNet's 1,000 classes"))
        else:
            found[image] = boxes[0]
    refuse_lines(path, wrong, REMEDY)
    return found


# The devkit


def ground_truth(path: Path) -> tuple[str, bytes]:
    """(where it is, what it says) of the validation labels of a devkit, a folder or an archive.
    Raises DataError."""
    if path.is_dir():
        file = path / "data" / GROUND_TRUTH
        if not file.is_file():
            raise DataError(f"{path} has no data/{GROUND_TRUTH}: {REMEDY}")
        return str(file), read_file(file, LARGEST)
    try:
        content = unpacked(read_file(path, LARGEST))
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                if member.isreg() and member.name.rpartition("/")[2] == GROUND_TRUTH:
                    file_of = tar.extractfile(member)
                    return f"{path}/{GROUND_TRUTH}", file_of.read() if file_of else b""
    except (tarfile.TarError, zlib.error, ValueError, EOFError) as error:
        raise DataError(f"{path}: not an archive that can be read ({error}): {REMEDY}") from None
    raise DataError(f"{path} holds no {GROUND_TRUTH}: {REMEDY}")


def unpacked(content: bytes) -> bytes:
    """Without gzip's packing, if it has that. Raises ValueError for over LARGEST bytes, and for
    what is cut short."""
    if not content.startswith(b"\x1f\x8b"):
        return content
    inflate = zlib.decompressobj(wbits=31)
    content = inflate.decompress(content, LARGEST)
    if not inflate.eof:
        what = "it unpacks to too much" if len(content) == LARGEST else "it is cut short"
        raise ValueError(what)
    return content


def check_ground_truth(where: str, content: bytes) -> None:
    """Raises DataError unless the devkit's labels are those that are known.

    It numbers the classes from 1 to 1,000 in an order of its own, which stands in a file of MATLAB;
    the order that fits the known labels does as well, and there is one where they are the same.
    """
    labels, classes = facts().labels, len(facts().wnids)
    lines = content.split()
    if len(lines) != len(labels):
        raise DataError(f"{where} has {len(lines):,} lines in place of {len(labels):,}: {REMEDY}")
    wrong = [
        (number, f"{line[:20].decode('utf-8', 'replace')!r} is no class from 1 to {classes:,}")
        for number, line in enumerate(lines, 1)
        if not (line.isdigit() and len(line) <= 4 and 1 <= int(line) <= classes)
    ]
    refuse_lines(where, wrong, REMEDY)
    ids = np.array(lines).astype(np.int64) - 1
    pairs = np.bincount(ids * classes + labels, minlength=classes**2).reshape(classes, classes)
    usual_label, usual_id = pairs.argmax(1), pairs.argmax(0)
    # no class has two numbers either, as there are no more numbers than classes
    odd = np.flatnonzero(usual_label[ids] != labels)
    wnids = facts().wnids
    wrong = [
        (
            i + 1,
            f"it says {ids[i] + 1}, but image {i + 1:,} is of class {wnids[labels[i]]}, which is "
            f"{usual_id[labels[i]] + 1} elsewhere",
        )
        for i in odd.tolist()
    ]
    refuse_lines(where, wrong, REMEDY)
