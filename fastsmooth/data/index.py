"""What the headers of a split's image files say, read before training begins, so that a bad file is
found then.

What was read is kept in $XDG_CACHE_HOME/fastsmooth (~/.cache/fastsmooth) under a name that holds a
hash of the path that all lie below, and holds for a file as long as its name, size, time of
modification and time of change stay; the last is the system's own, which nobody sets back as
`touch`, `cp -p` and rsync do the other. An image inside an archive has the archive's times. The
cache may be damaged or another user's work: nothing in it is unpickled, and what does not fit, or
what another user owns or may write, is read again from the images. A file that is replaced after
its header was read is found when it is decoded (Index.check).
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from fastsmooth.data.files import Files, Names
from fastsmooth.data.images import DataError, most_pixels, open_image, opened
from fastsmooth.runfolder.files import cache_folder, only_mine, read_file, replace

VERSION = 2  # of the cache: another one whenever its fields change, or the meaning of plain
# plain is a byte, since a bool that another program stored as 2 is not safe to compute with
TYPES = {"size": "<i8", "mtime": "<i8", "ctime": "<i8", "width": "<i4", "height": "<i4"}
RECORD = np.dtype([*TYPES.items(), ("plain", "u1")])
STAT = ["size", "mtime", "ctime"]  # what must stay
THREADS = 16  # they wait for the disk more than for a core, so the number of cores does not matter
CHUNK = 256  # files that a thread takes at a time
T = TypeVar("T")


@dataclass(frozen=True)
class Index:
    """What is known of n image files without decoding them."""

    # int32 [n], pixels as stored, before any EXIF rotation; 0 where the file is bad
    width: np.ndarray
    height: np.ndarray  # int32 [n], likewise
    size: np.ndarray  # int64 [n], bytes; 0 where the system does not say
    # bool [n]: a JPEG or PNG that every decoder turns into the same RGB pixels as PIL
    plain: np.ndarray
    # position: one line that names the file and says what is wrong and what to do
    bad: dict[int, str]

    def check(self, i: int, path: str, size: tuple[int, int]) -> None:
        """Raises DataError where the i-th image, now at `path`, has another size (width, height)
        than its header said."""
        width, height = size
        if (width, height) != (self.width[i], self.height[i]):
            reason = (
                f"{width} x {height} pixels, which was {self.width[i]} x {self.height[i]} when "
                "the run began"
            )
            raise DataError(f"{path}: {reason}: put the old image back, or start a new run", reason)


NONE = np.zeros(0, np.int32)
NO_FILES = Index(NONE, NONE, NONE.astype(np.int64), NONE.astype(bool), {})  # of a split of pixels


def read_index(files: Files, say: Callable[[str], None] | None = None, part: str = "") -> Index:
    """The index of all image files below a root: what is not among `files` leaves the cache.

    `part`: what they are of all that lies there, where it is not all; each part is kept for itself.
    `say` gets a line now and then once it has taken 2 seconds. Bad files raise nothing and are read
    again each time.
    """
    root, every = files.root, range(len(files))
    names = relative(files)
    table = np.zeros(len(files), RECORD)
    for rows, stats in in_threads(
        files.stat, every, "looking for changed image files", say, THREADS, CHUNK
    ):
        for field, values in zip(STAT, zip(*stats, strict=True), strict=True):
            table[field][rows] = values

    kept_names, kept = load(root, part)
    # zeros for new names
    before = np.append(kept, np.zeros(1, RECORD))[positions(names, kept_names)]
    pixels = before["width"].astype(np.int64) * before["height"]
    known = (before[STAT] == table[STAT]) & (table["size"] > 0)
    known &= (before["width"] > 0) & (before["height"] > 0) & (pixels <= most_pixels())
    table[known] = before[known]

    unknown = files.by_place(np.flatnonzero(~known))
    bad: dict[int, str] = {}
    if len(unknown):
        load_formats()
    for some, headers in in_threads(
        partial(header, files), unknown.tolist(), "reading image headers", say, THREADS, CHUNK
    ):
        at = unknown[some]
        width, height, plain, wrong = zip(*headers, strict=True)
        table["width"][at], table["height"][at], table["plain"][at] = width, height, plain
        bad.update((i, line) for i, line in zip(at.tolist(), wrong, strict=True) if line)
    if names != kept_names or not np.array_equal(table, kept):
        save(root, part, names, table)
    sizes = table["width"].copy(), table["height"].copy(), table["size"].copy()
    return Index(*sizes, table["plain"] != 0, dict(sorted(bad.items())))


def load_formats() -> None:
    """Make PIL ready for threads that open images."""
    Image.preinit()  # so that JPEG and PNG are tried first
    Image.init()  # all formats, now: threads that load them at the same time may miss one


def in_threads(
    work: Callable[[int], T],
    positions: Sequence[int],
    what: str,
    say: Callable[[str], None] | None,
    threads: int,
    chunk: int,
) -> Iterator[tuple[slice, list[T]]]:
    """Slices of `positions`, in order, each with what `work` says of its positions."""
    due = time.monotonic() + 2
    starts = range(0, len(positions), chunk)
    with ThreadPoolExecutor(threads) as pool:
        try:
            chunks = pool.map(
                lambda start: list(map(work, positions[start : start + chunk])), starts
            )
            for start, results in zip(starts, chunks, strict=True):
                yield slice(start, start + chunk), results
                if say and time.monotonic() > due:
                    say(f"{what}: {100 * (start + len(results)) // len(positions)} %")
                    due = time.monotonic() + 10
        finally:  # whoever looks no further waits for no more than what is being done
            pool.shutdown(cancel_futures=True)


def header(files: Files, i: int) -> tuple[int, int, bool, str]:
    """Width and height of image i in pixels, whether its file is plain, and what is wrong with it:
    nothing, or one line."""
    # open_image finds the words for whatever is raised
    with suppress(Exception), opened(files, i) as image:
        return *image.size, is_plain(image), ""
    try:
        open_image(files, i)
        raise DataError(f"{files.names[i]}: it changed while it was read: start again")
    except DataError as error:
        return 0, 0, False, str(error)


def is_plain(image: Image.Image) -> bool:
    if image.format == "PNG" and "transparency" not in image.info:
        # the tile speaks of the file: RGB;16B or L;4 is RGB or L once it is decoded
        tiles = getattr(image, "tile", ())  # ImageFile's, of an image that is not loaded yet
        return image.mode in ("RGB", "L") and all(tile.args == image.mode for tile in tiles)
    return image.format == "JPEG" and image.mode in ("RGB", "L", "CMYK")


def relative(files: Files) -> bytes:
    """The names below the root, each behind a zero byte."""
    if isinstance(files.names, Names):
        return files.names.joined
    prefix = str(Path(files.root, "_"))[:-1]
    return os.fsencode("\0".join(("", *files.names)).replace("\0" + prefix, "\0"))


def positions(names: bytes, kept_names: bytes) -> np.ndarray:
    """int64 [n]: where each of n names stood when the index was kept, -1 for new ones."""
    if names == kept_names:
        return np.arange(names.count(b"\0"))
    where = dict(zip(kept_names.split(b"\0")[1:], count()))
    return np.array([where.get(name, -1) for name in names.split(b"\0")[1:]], np.int64)


def cache_file(root: str, part: str = "") -> Path:
    """Raises RuntimeError where there is no home directory."""
    name = os.path.abspath(root) + ("\0" + part if part else "")
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()
    return cache_folder() / f"index-{digest[:16]}.npz"


def load(root: str, part: str = "") -> tuple[bytes, np.ndarray]:
    """The names and their records, RECORD [n], as saved; none where no cache can be used."""
    with suppress(Exception):  # damage may raise anything
        path = cache_file(root, part)
        content = io.BytesIO(read_file(path, math.inf) if only_mine(path) else b"")
        with np.load(content, allow_pickle=False) as file:
            version, names, table = (file[key] for key in ("version", "names", "table"))
        right = (names.dtype, table.dtype, names.ndim, table.ndim) == (np.uint8, RECORD, 1, 1)
        names = names.tobytes()
        if right and np.array_equal(version, VERSION) and names.count(b"\0") == len(table):
            return names, table
    return b"", np.zeros(0, RECORD)


def save(root: str, part: str, names: bytes, table: np.ndarray) -> None:
    # no home, no room or no permission: then the headers are read every time
    with suppress(OSError, RuntimeError):
        target = cache_file(root, part)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = io.BytesIO()
        np.savez(content, version=VERSION, names=np.frombuffer(names, np.uint8), table=table)
        replace(target, content.getbuffer(), mode=0o600)
