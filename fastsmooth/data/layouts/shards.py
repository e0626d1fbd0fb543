"""WebDataset shards: tar archives with an image and a label of each sample, read in place.

A sample is made of the members that share a key, which is a member's name up to the first dot of
its last part, as the webdataset library has it: 0001.jpg and 0001.cls.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from fastsmooth.data import tars
from fastsmooth.data.files import Archive, Names, Ranges
from fastsmooth.data.images import DataConfig, DataError, ImageSet, others
from fastsmooth.data.layouts import splits
from fastsmooth.data.layouts.common import EXTENSIONS, existing_folder, listed
from fastsmooth.data.layouts.splits import MOST_CLASSES, Found
from fastsmooth.data.tars import Listing
from fastsmooth.messages import note
from fastsmooth.runfolder.files import read_file

WANTS = "shards *.tar of KEY.jpg with KEY.cls or KEY.json"
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
NAME_LISTS = ("classnames.txt", "classes.txt", "class_names.txt", "labels.txt")
KEY = re.compile(rb"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
OF_LIBRARY = re.compile(rb"__[^/]*__(?:$|/)")  # what the webdataset library passes over
IMAGES = {extension[1:].encode() for extension in EXTENSIONS}
LABELS = (b"cls", b"cls.txt", b"json")  # the first that is there
JSON_KEYS = ("label", "class_id", "cls")  # likewise
LOOKED_FOR = "looked for .cls, and for label, class_id or cls in .json; .txt is a caption"
LONGEST_LABEL = 200  # bytes of a class's name
LARGEST_LABEL = 1 << 20  # bytes of a member that holds a label
FEW = 64  # members at the beginning of a shard, which tell whether it is one


def sign(root: Path) -> str:
    """What tells that a folder is one of shards; nothing where it is none."""
    names = splits.names_below(root, (".tar",)) if root.is_dir() else []
    if not names:
        return ""
    try:
        first = islice(tars.members(Archive.at(str(root / names[0]))), FEW)
        suffixes = {kind_of(member[1]) for name, *_ in first if (member := parted(name))}
    except (DataError, OSError):  # reading it finds the words
        suffixes = {"image", "label"}
    return f"{len(names):,} tar shards" if {"image", "label"} <= suffixes else ""


def read(config: DataConfig) -> ImageSet:
    """Shards in a folder, its train/ and val/, or named so: train-0000.tar, val-0000.tar."""
    root = existing_folder(config, "shards")
    names = splits.names_below(root, (".tar",))
    packed = splits.names_below(root, PACKED)
    if not names:
        raise DataError(
            f"--data-dir {root} holds no shards *.tar, nor do its train/ and val/: "
            + (f"unpack {packed[0]!r}{others(packed)}, read by position" if packed else WANTS)
        )
    parts = splits.parts_of(config, names, "shards")
    every = [*parts.train, *parts.test]
    listings = tars.listed([str(root / name) for name in every], note, "samples", samples)
    refuse_copies(listings)
    noted = {text for listing in listings for text in set(listing.notes.split(b"\0")[1:])}
    texts = {text: os.fsdecode(text.partition(b":")[2]) for text in noted}
    if not texts:
        raise DataError(f"--data-dir {root}: its shards hold no samples ({LOOKED_FOR})")
    classes, numbers = splits.numbered(set(texts.values()), f"--data-dir {root}")
    table = {text: numbers[name] for text, name in texts.items()}
    remarks = parts.remarks("shards")
    if packed:
        remarks.append(f"packed shards are left out: {packed[0]!r}{others(packed)}")
    if empty := [n for n, v in zip(every, listings, strict=True) if not len(v.start)]:
        remarks.append(f"shards without samples: {empty[0]!r}{others(empty)}")
    count = len(parts.train)
    train = found(root, every[:count], listings[:count], table, remarks)
    test = found(root, every[count:], listings[count:], table, remarks) if parts.test else None
    sources = sorted({os.fsdecode(text.partition(b":")[0]) for text in noted})
    about = f"{parts.about('shards')}; labels from {' and '.join(sources)}"
    names_read: Sequence[str] = ()
    if classes[0].isdecimal():
        names_read = class_names(root, Path(every[0]).parent, len(classes), remarks)
    return splits.put_in_order(config, classes, train, test, about, remarks, names_read)


# A shard


def samples(archive: Archive) -> Listing:
    """The images of a shard's samples; the note of each is .cls:LABEL or .json:LABEL. Raises
    DataError for a sample without an image or a label, or with two."""
    images: dict[bytes, tuple[bytes, int, int]] = {}
    labels: dict[bytes, tuple[int, int, int]] = {}  # rank in LABELS, where it is
    seen: set[bytes] = set()

    def refuse(key: bytes, words: str) -> DataError:
        return DataError(f"{archive.path}: sample {os.fsdecode(key)!r} {words}")

    for name, begin, length in tars.members(archive):
        member = parted(name)
        if member is None or (kind := kind_of(member[1])) == "":
            continue
        key, suffix = member
        if name in seen:
            raise refuse(key, f"has two members .{os.fsdecode(suffix)}: pack it anew")
        seen.add(name)
        if kind == "label":
            rank, before = rank_of(suffix), labels.get(key, (len(LABELS),))[0]
            if rank == before:
                of = os.fsdecode(LABELS[rank])
                raise refuse(key, f"has several labels .{of}: keep one")
            if rank < before:
                labels[key] = rank, begin, length
        elif key in images:
            two = sorted(os.fsdecode(parted_name[0]) for parted_name in (images[key], (name,)))
            raise refuse(key, f"has several images ({two[0]!r}, {two[1]!r}): keep one")
        else:
            images[key] = name, begin, length
    if alone := next((key for key in labels if key not in images), None):
        raise refuse(alone, "has no image: pack it anew, or remove it")
    notes = []
    descriptor = archive.descriptor()
    try:
        for key in images:
            if key not in labels:
                raise refuse(key, f"has no label ({LOOKED_FOR}): add one, or remove it")
            rank, begin, length = labels[key]
            try:
                if length > LARGEST_LABEL:
                    raise ValueError(f"it has {length:,} bytes")
                content = os.pread(descriptor, length, begin)
                text = json_label(content) if LABELS[rank] == b"json" else label(content)
            except (ValueError, RecursionError) as error:
                of = os.fsdecode(LABELS[rank])
                raise refuse(key, f"has no usable label in .{of}: {error}: correct it") from None
            notes.append(b".%s:%s" % (LABELS[rank], text))
    finally:
        os.close(descriptor)
    names, starts, lengths = zip(*images.values(), strict=True) if images else ((), (), ())
    joined, noted = (b"".join(b"\0" + text for text in texts) for texts in (names, notes))
    ranges = np.array(starts, np.int64), np.array(lengths, np.int64)
    return Listing(archive, joined, *ranges, noted)


def parted(name: bytes) -> tuple[bytes, bytes] | None:
    """(key, suffix in small letters) of a member; None for one of no sample."""
    match = None if OF_LIBRARY.match(name) else KEY.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


def kind_of(suffix: bytes) -> str:
    """image or label; nothing for what is neither."""
    if suffix.rpartition(b".")[2] in IMAGES:
        return "image"
    return "label" if rank_of(suffix) < len(LABELS) else ""


def rank_of(suffix: bytes) -> int:
    """The place in LABELS, whose length is that of none: meta.json is as json."""
    return next((k for k, of in enumerate(LABELS) if (b"." + suffix).endswith(b"." + of)), 3)


def label(content: bytes) -> bytes:
    """A whole number, without zeros in front, or a class's name. Raises ValueError."""
    text = content.strip()
    if not text:
        raise ValueError("it is empty")
    shown = text[:LONGEST_LABEL].decode("utf-8", "replace")
    if text.isdigit():
        if len(text) > 20 or int(text) >= MOST_CLASSES:
            raise ValueError(f"{shown} is over {MOST_CLASSES - 1:,}")
        return b"%d" % int(text)
    try:
        float(text)
    except ValueError:
        pass
    else:
        raise ValueError(f"{shown} is no whole number from 0 on")
    if len(text) > LONGEST_LABEL:
        raise ValueError(f"{len(text):,} bytes are no class's name")
    if b"\0" in text:
        raise ValueError("it is no text")
    text.decode()  # a UnicodeDecodeError is a ValueError
    return text


def json_label(content: bytes) -> bytes:
    """As label, of a JSON object with one of JSON_KEYS."""
    fields = json.loads(content)
    key = next((k for k in JSON_KEYS if isinstance(fields, dict) and k in fields), None)
    if key is None:
        raise ValueError(f"it has none of {', '.join(JSON_KEYS)}")
    value = fields[key]
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{key} is {value!r:.40}, no whole number and no name")
    return label(str(value).encode())


# All shards


def found(
    root: Path,
    names: Sequence[str],
    listings: Sequence[Listing],
    table: dict[bytes, int],
    remarks: list[str],
) -> Found:
    """The images of these shards; `table`: the label of each note. Adds a remark where keys stand
    in several shards."""
    prefixes = [os.fsencode(name) + b"/" for name in names]
    joined = b"".join(
        listing.joined.replace(b"\0", b"\0" + prefix)
        for listing, prefix in zip(listings, prefixes, strict=True)
    )
    begins = np.flatnonzero(np.frombuffer(joined, np.uint8) == 0)
    notes = b"".join(listing.notes for listing in listings).split(b"\0")[1:]
    files = Ranges(
        str(root),
        [listing.archive for listing in listings],
        np.repeat(np.arange(len(names), dtype=np.int32), [len(v.start) for v in listings]),
        np.concatenate([listing.start for listing in listings]),
        np.concatenate([listing.length for listing in listings]),
        Names(str(root), joined, np.append(begins[1:], len(joined))),
    )
    keys = [os.fsdecode(name) for listing in listings for name in listing.names]
    if (distinct := len(set(keys))) < len(keys):
        keys = splits.distinct(keys, [os.fsdecode(name) for name in joined.split(b"\0")[1:]])
        remarks.append(
            f"{names[0]!r}{others(names)}: {len(keys) - distinct:,} of {len(keys):,} samples have "
            "the key of another in another shard: taken for different ones"
        )
    return Found(
        files, np.fromiter(map(table.__getitem__, notes), np.int64, len(notes)), keys, keys
    )


def refuse_copies(listings: Sequence[Listing]) -> None:
    """Raises DataError for two shards that hold the same samples."""
    seen: dict[bytes, Listing] = {}
    for listing in listings:
        parts = listing.joined, listing.length.tobytes(), listing.notes
        alike = seen.setdefault(hashlib.sha256(b"".join(parts)).digest(), listing)
        # numbered anew in each shard, raw images may be alike in all this
        if (
            alike is not listing
            and len(listing.start)
            and first_image(alike) == first_image(listing)
        ):
            raise DataError(
                f"{listing.archive.path} holds the same samples as {alike.archive.path}: remove one"
            )


def first_image(listing: Listing) -> bytes:
    descriptor = listing.archive.descriptor()
    try:
        return os.pread(descriptor, int(listing.length[0]), int(listing.start[0]))
    finally:
        os.close(descriptor)


def class_names(root: Path, folder: Path, count: int, remarks: list[str]) -> list[str]:
    """The names of numbered classes, a line each, from a list beside the shards or in --data-dir;
    none where there is none that fits."""
    for place in (root, root / folder):
        beside = {entry.name.lower(): entry.path for entry in listed(place)}
        for name in NAME_LISTS:
            if name not in beside:
                continue
            lines = read_file(Path(beside[name]), 1 << 24).decode("utf-8", "replace").splitlines()
            lines = [line.strip() for line in lines if line.strip()]
            if len(lines) == count:
                return lines
            remarks.append(
                f"{beside[name]} has {len(lines):,} lines, the labels are of {count:,} classes: it "
                "is not taken for their names"
            )
    return []
