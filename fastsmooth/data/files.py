"""Encoded images by position, wherever they lie: a file each, or ranges of bytes of larger files.

Nothing is unpacked and no file is kept open, so that processes and threads may share them.
"""

from __future__ import annotations

import errno
import io
import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
from torch.utils.data import get_worker_info

from fastsmooth.messages import one_line
from fastsmooth.runfolder.files import size_of

# bytes of decoded row groups that a process keeps at the least: some twenty as Hugging Face writes
# them, of 100 photographs
HELD = 1 << 28
POINTER = b"version https://git-lfs"  # what Git leaves in the place of a large file
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
        return self.names.joined + self.length.astype("<i8").tobytes()

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


class Rows(Files):
    """Images that are values of a column of Parquet files."""

    names: Names

    def __init__(self, root: str, groups: RowGroups, row: np.ndarray, names: Names):
        """row: int64 [n], of all rows of `groups`; names: below `root`."""
        self._root, self.groups, self.row, self.names = root, groups, row, names

    @property
    def root(self) -> str:
        return self._root

    def identity(self) -> bytes:
        # a row's number says little of its image, so the files' lengths and groups say more
        stored = [archive.stat[0] for archive in self.groups.archives]
        told = np.concatenate([np.array(stored, "<i8"), self.groups.ends.astype("<i8")])
        return self.names.joined + told.tobytes()

    def take(self, at: np.ndarray) -> Rows:
        return Rows(self._root, self.groups, self.row[at], self.names.take(at))

    def read(self, i: int) -> np.ndarray:
        return np.frombuffer(self.groups.value(int(self.row[i])), np.uint8).copy()

    def open(self, i: int) -> BinaryIO:
        return io.BytesIO(self.groups.value(int(self.row[i])))

    def stat(self, i: int) -> Stat:
        group, _ = self.groups.where(int(self.row[i]))
        return self.groups.archives[self.groups.archive[group]].stat

    def by_place(self, at: np.ndarray) -> np.ndarray:
        return at[np.argsort(self.row[at], kind="stable")]


class Held:
    """The row groups that a process has decoded, the one used last at the end."""

    def __init__(self) -> None:
        self.process = os.getpid()
        worker = get_worker_info()
        self.processes = 1 if worker is None else worker.num_workers  # each holds groups of its own
        self.lock = threading.Lock()
        self.groups: OrderedDict[int, Future[Any]] = OrderedDict()
        self.bytes: dict[int, int] = {}  # of those that are there
        self.metadata: dict[int, Any] = {}  # of archives


class RowGroups:
    """A binary column of Parquet files, which can be decoded a row group at a time only: the groups
    used last are held, by each process for itself."""

    def __init__(
        self,
        archives: Sequence[Archive],
        column: str,
        archive: np.ndarray,
        number: np.ndarray,
        rows: np.ndarray,
        room: int = 0,
    ):
        """column: its path, as of a struct's field; of each of g groups int64 [g]: the archive, its
        number in there, and its rows. `room`: bytes of groups that all processes may hold; each
        holds HELD of them, or one group, at the least."""
        self.archives, self.column = tuple(archives), column
        self.archive, self.number, self.ends = archive, number, rows.cumsum()
        self.room, self.held = room, Held()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "held"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, held=Held())

    def where(self, row: int) -> tuple[int, int]:
        """The group that a row is in, and which row of it."""
        group = int(np.searchsorted(self.ends, row, "right"))
        return group, row - (int(self.ends[group - 1]) if group else 0)

    def value(self, row: int) -> Any:
        """The bytes of a row, as a buffer. Raises OSError."""
        group, at = self.where(row)
        buffer = self.values(group)[at].as_buffer()
        if buffer is None:
            path = self.archives[self.archive[group]].path
            raise OSError(errno.ENODATA, "it has no image in this row", path)
        return buffer

    def values(self, group: int) -> Any:
        """The column in a group, a pyarrow.ChunkedArray, decoded by whoever asks first."""
        held = self.held
        if held.process != os.getpid():  # what a fork took over may be locked for ever
            held = self.held = Held()
        with held.lock:
            known = held.groups.get(group)
            future = held.groups.setdefault(group, Future())
            held.groups.move_to_end(group)
        if known is None:
            try:
                values = self._decoded(held, group)
            except Exception as error:
                with held.lock:
                    held.groups.pop(group, None)
                future.set_exception(error)
            else:
                future.set_result(values)
                with held.lock:
                    held.bytes[group] = values.nbytes
                    room = max(HELD, self.room // held.processes)
                    while sum(held.bytes.values()) > room and len(held.bytes) > 1:
                        oldest = next(other for other in held.groups if other in held.bytes)
                        del held.groups[oldest], held.bytes[oldest]
        return future.result()

    def _decoded(self, held: Held, group: int) -> Any:
        from pyarrow import chunked_array, parquet, types

        place = int(self.archive[group])
        archive = self.archives[place]
        os.close(archive.descriptor())  # is it what it was?
        try:
            with parquet.ParquetFile(
                archive.path, metadata=held.metadata.get(place), memory_map=True
            ) as file:
                held.metadata[place] = file.metadata
                number = int(self.number[group])
                (column,) = file.read_row_group(
                    number, columns=[self.column], use_threads=False
                ).columns
            if len(column) != self.ends[group] - (self.ends[group - 1] if group else 0):
                raise ValueError("it has fewer rows than it says")
            # a struct's only field here, empty wherever the struct is
            nested = types.is_struct(column.type)
            return chunked_array([c.flatten()[0] if nested else c for c in column.chunks])
        except OSError:
            raise
        except Exception as error:  # Arrow's errors are of many kinds
            raise OSError(errno.EIO, one_line(error), archive.path) from None


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
