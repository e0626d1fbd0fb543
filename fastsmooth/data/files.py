"""Encoded images by position, wherever they lie: a file each, or ranges of bytes of larger files.

Nothing is unpacked and no file is kept open, so that processes and threads may share them.
"""

from __future__ import annotations

import errno
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import numpy as np

from fastsmooth.runfolder.files import size_of

LATEST = 2**63 - 1  # ns: a time in the far future would not fit
Stat = tuple[int, int, int]  # bytes, and ns of the last modification and change


class Files(ABC):
    """The n encoded images of a split."""

    names: Sequence[str]  # n: what a message calls each

    def __len__(self) -> int:
        return len(self.names)

    @property
    @abstractmethod
    def root(self) -> str:
        """What all of them lie below; what is kept of them in the cache is kept by its name."""

    @abstractmethod
    def identity(self) -> bytes:
        """What tells these images from those of another data set, wherever both lie."""

    @abstractmethod
    def take(self, at: np.ndarray) -> Files:
        """The images at these positions, int64 [m], in this order."""

    @abstractmethod
    def read(self, i: int) -> np.ndarray:
        """uint8 [bytes] of image i. Raises OSError."""

    @abstractmethod
    def open(self, i: int) -> str | BinaryIO:
        """Image i for Image.open; whoever gets a file closes it. Raises OSError."""

    @abstractmethod
    def stat(self, i: int) -> Stat:
        """What stays as it is as long as image i does; zeros where the system does not say."""

    def by_place(self, at: np.ndarray) -> np.ndarray:
        """These positions, int64 [m], in the order in which their images are read fastest."""
        return at


class Paths(Files):
    """A file an image."""

    def __init__(self, paths: Sequence[str]):
        self.names = tuple(paths)

    @cached_property
    def root(self) -> str:
        return os.path.commonpath([os.path.dirname(path) for path in self.names])

    def identity(self) -> bytes:
        root = os.path.commonpath(self.names)
        names = "\0".join(os.path.relpath(path, root) for path in self.names)
        return names.encode("utf-8", "surrogateescape")

    def take(self, at: np.ndarray) -> Paths:
        return Paths([self.names[i] for i in at.tolist()])

    def read(self, i: int) -> np.ndarray:
        return np.fromfile(self.names[i], dtype=np.uint8)

    def open(self, i: int) -> str:
        size_of(self.names[i])
        return self.names[i]

    def stat(self, i: int) -> Stat:
        try:
            return stat_of(self.names[i])
        except OSError:  # open_image has the words for it
            return 0, 0, 0


class Names(Sequence[str]):
    """Many names in little memory: `folder` and a separator before each part of `joined`."""

    def __init__(self, folder: str, joined: bytes, ends: np.ndarray):
        """joined: the names, each behind a zero byte; ends: int64 [n], where each of them ends."""
        self.folder, self.joined, self.ends = folder, joined, ends

    @classmethod
    def of(cls, folder: str, names: Sequence[bytes]) -> Names:
        lengths = np.fromiter((len(name) + 1 for name in names), np.int64, len(names))
        return cls(folder, b"".join(b"\0" + name for name in names), lengths.cumsum())

    def __len__(self) -> int:
        return len(self.ends)

    def take(self, at: np.ndarray) -> Names:
        """The names at these positions, int64 [m], in this order."""
        ends = self.ends.tolist()
        begins = [0, *ends]
        return Names.of(self.folder, [self.joined[begins[i] + 1 : ends[i]] for i in at.tolist()])

    def __getitem__(self, i):  # type: ignore[no-untyped-def]  # as Sequence has it
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        begin = 1 + (int(self.ends[i - 1]) if i else 0)
        return os.path.join(self.folder, os.fsdecode(self.joined[begin : int(self.ends[i])]))

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class Archive:
    """A file that holds images, as it was when they were looked for in it."""

    path: str
    stat: Stat

    @classmethod
    def at(cls, path: str) -> Archive:
        """Raises OSError, also for a pipe or a folder."""
        size_of(path)
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return cls(path, stat_of(path))

    def descriptor(self) -> int:
        """The file opened. Raises OSError where it is not what it was, as no range would be."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns & LATEST) != self.stat[:2]:
            os.close(descriptor)
            words = "it has changed since its images were listed: start again"
            raise OSError(errno.ESTALE, words, self.path)
        return descriptor


class Ranges(Files):
    """Images that are ranges of bytes of a few archives."""

    names: Names

    def __init__(
        self,
        root: str,
        archives: Sequence[Archive],
        archive: np.ndarray,
        start: np.ndarray,
        length: np.ndarray,
        names: Names,
    ):
        """archive: int32 [n], which of them; start and length: int64 [n], bytes; names: below
        `root`."""
        self._root, self.archives, self.names = root, tuple(archives), names
        self.archive, self.start, self.length = archive, start, length

    @property
    def root(self) -> str:
        return self._root

    def identity(self) -> bytes:
        return self.names.joined

    def take(self, at: np.ndarray) -> Ranges:
        arrays = self.archive[at], self.start[at], self.length[at]
        return Ranges(self._root, self.archives, *arrays, self.names.take(at))

    def read(self, i: int) -> np.ndarray:
        archive = self.archives[self.archive[i]]
        data = np.empty(int(self.length[i]), np.uint8)
        with self._reader(i) as reader:
            done = 0
            while done < len(data):  # it may give less at a time
                count = reader.readinto(data[done:].data)
                if not count:
                    raise OSError(errno.EIO, "it ends before the image does", archive.path)
                done += count
        return data

    def open(self, i: int) -> BinaryIO:
        return io.BufferedReader(self._reader(i))

    def _reader(self, i: int) -> RangeReader:
        descriptor = self.archives[self.archive[i]].descriptor()
        return RangeReader(descriptor, int(self.start[i]), int(self.length[i]))

    def stat(self, i: int) -> Stat:
        return int(self.length[i]), *self.archives[self.archive[i]].stat[1:]

    def by_place(self, at: np.ndarray) -> np.ndarray:
        return at[np.lexsort((self.start[at], self.archive[at]))]


class RangeReader(io.RawIOBase):
    """A range of bytes of an open file as a file of its own, which closes the other."""

    def __init__(self, descriptor: int, start: int, length: int):
        self.descriptor, self.start, self.length, self.at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.at = base + offset
        return self.at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # bytes alone
        wanted = memoryview(buffer)[: max(self.length - self.at, 0)]
        count = os.preadv(self.descriptor, [wanted], self.start + self.at) if wanted else 0
        self.at += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self.descriptor)
        super().close()


def stat_of(path: str) -> Stat:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns & LATEST, status.st_ctime_ns & LATEST
