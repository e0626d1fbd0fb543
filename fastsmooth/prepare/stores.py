"""How the images are stored: in class folders, or in shards of WebDataset.

What is there under its name is whole, whenever the process is killed: it is written aside. What an
earlier process made is looked at and taken.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from fastsmooth.data.images import DataError, Split
from fastsmooth.data.index import Index
from fastsmooth.prepare.names import image_files
from fastsmooth.prepare.shrink import is_jpeg, shrunk, smaller
from fastsmooth.runfolder.files import clean, new_aside, read_file, rename, replace, writing

AHEAD = 4  # images a thread that may be made before the first of them is stored
SHARD = 10_000  # images of a tar: some 250 MB at short side 256
T = TypeVar("T")


class Stored(NamedTuple):
    """An image that is there now, or why it is not."""

    place: int  # in its part
    length: int = 0  # bytes
    digest: bytes = b""  # SHA-256
    wrong: str = ""  # one line


@dataclass(frozen=True)
class Part:
    """The training or the test images, and what is made of them."""

    name: str  # train or val
    split: Split
    index: Index
    short: int  # pixels
    quality: int
    threads: int

    def made(self, i: int) -> bytes | str:
        """Image i as it is to be stored, or what is wrong with it."""
        assert self.split.files is not None
        try:
            return shrunk(self.split.files, self.index, i, self.short, self.quality)
        except DataError as error:
            return str(error)

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of image i as it is to be stored."""
        return smaller((int(self.index.width[i]), int(self.index.height[i])), self.short)


# (out, a folder a class, the images): each of them once
Store = Callable[[Path, Sequence[str], Part], Iterator[Stored]]


def in_threads(work: Callable[[int], T], positions: Iterable[int], threads: int) -> Iterator[T]:
    """What `work` makes of the positions, in order, a few ahead."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for i in positions:
                waiting.append(pool.submit(work, i))
                if len(waiting) > AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # whoever looks no further waits for no more than what is being done
            pool.shutdown(cancel_futures=True)


def stored(i: int, data: bytes) -> Stored:
    return Stored(i, len(data), hashlib.sha256(data).digest())


# Class folders


def to_folders(out: Path, folders: Sequence[str], part: Part) -> Iterator[Stored]:
    """OUT/train/CLASS/NAME.jpg."""
    files, labels = part.split.files, part.split.labels
    assert files is not None
    paths = image_files(files.names, labels, folders)
    for label in sorted(set(labels.tolist())):
        folder = out / part.name / folders[label]
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            clean(folder)

    def store(i: int) -> Stored:
        path = out / part.name / paths[i]
        before = kept(path, part.size(i))
        data = part.made(i) if before is None else before
        if isinstance(data, str):
            return Stored(i, wrong=data)
        if before is None:
            store_whole(path, data)
        return stored(i, data)

    return in_threads(store, files.by_place(np.arange(len(labels))).tolist(), part.threads)


def kept(path: Path, size: tuple[int, int]) -> bytes | None:
    """An image that an earlier process stored. It was decoded before it got its name, but a machine
    that lost its power since may have lost what stood behind the name."""
    with suppress(OSError):
        data = read_file(path)
        return data if is_jpeg(data, size) else None
    return None


def store_whole(path: Path, data: bytes) -> None:
    """The file, whole or not at all if the process is killed. It is not waited for until it is on
    the disk: with a million files that takes longer than to make them, so all are at the end."""
    with writing(path):
        aside = new_aside(path)
        try:
            with aside.open("xb") as file:
                file.write(data)
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


# Shards


def to_shards(out: Path, folders: Sequence[str], part: Part) -> Iterator[Stored]:
    """OUT/train-00000.tar and so on, each of SHARD images KEY.jpg with their class's number
    KEY.cls, where KEY is the image's place; OUT/classes.txt has a class a line."""
    clean(out)
    replace(out / "classes.txt", "".join(f"{name}\n" for name in folders).encode())
    n = len(part.split)
    for number, start in enumerate(range(0, n, SHARD)):
        path, places = out / f"{part.name}-{number:05}.tar", range(start, min(start + SHARD, n))
        yield from held(path, part, places) or written(path, part, places)


def members(part: Part, i: int) -> tuple[str, str, bytes]:
    """The names of image i and of its class in a shard, and what the latter holds."""
    return f"{i:08}.jpg", f"{i:08}.cls", b"%d" % part.split.labels[i]


def held(path: Path, part: Part, places: range) -> list[Stored]:
    """The images of a shard that an earlier process stored; none where it is not as it would be
    written. It was on the disk before it got its name, with images that had been decoded."""
    images = []
    # damage may raise anything
    with suppress(Exception), tarfile.open(path, "r:") as tar:

        def content(name: str) -> bytes:
            info = tar.next()
            file = tar.extractfile(info) if info is not None and info.name == name else None
            if file is None:
                raise ValueError(f"{name} is not there")
            return file.read()

        for i in places:
            name, about, label = members(part, i)
            images.append(stored(i, content(name)))
            if content(about) != label:
                raise ValueError(f"{about} is another class")
        if tar.next() is None:
            return images
    return []


def written(path: Path, part: Part, places: range) -> Iterator[Stored]:
    """The images of a shard while it is written; it gets its name if all of them can be read."""
    aside, whole = new_aside(path), True
    try:
        with writing(path), aside.open("xb") as file:
            # as bytes go: no times, no owners, and one form of header
            with tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                made = in_threads(part.made, places, part.threads)
                for i, data in zip(places, made, strict=True):
                    if isinstance(data, str):
                        whole = False
                        yield Stored(i, wrong=data)
                        continue
                    if whole:  # else the others are looked at for what is wrong with them
                        name, about, label = members(part, i)
                        add(tar, name, data)
                        add(tar, about, label)
                    yield stored(i, data)
            file.flush()
            os.fsync(file.fileno())
        if whole:
            with writing(path):
                rename(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # of time 0, mode 644, user 0
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


STORES: dict[str, Store] = {"jpeg": to_folders, "tar": to_shards}
