"""What a tar archive holds, as ranges of its bytes: listed once, then read by position.

Listing reads 512 bytes a member and skips the rest, so it takes as long as the members are many and
not as they are large. It is kept in the cache beside the image headers (fastsmooth.data.index), and
holds as long as the archive's size and times stay.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import tarfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastsmooth.data.files import POINTER, Archive, RangeReader
from fastsmooth.data.images import DataError, others
from fastsmooth.data.index import in_threads
from fastsmooth.runfolder.files import cache_folder, only_mine, read_file, replace

VERSION = 2  # of what is kept: another one whenever its fields change
BLOCK = 512  # bytes, of which everything in an archive takes a whole number
# bytes of zeros that an archive may end with: more than any program writes, and less than a
# download leaves that was given its room before it came
LONGEST_END = 1 << 20
LONGEST_HEADER = 1 << 20  # bytes of a member's long name and the like
THREADS = 4  # they wait for the disk; of archives in memory more would be slower
FIELDS = ("version", "paths", "stats", "counts", "names", "start", "length", "notes")
FILE_TYPES = b"0\0"  # of a member that is a file, as most are
PACKED = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)


class Listing(NamedTuple):
    """The m files of an archive in its own order, or some of them."""

    archive: Archive
    joined: bytes  # their names, each behind a zero byte
    start: np.ndarray  # int64 [m], bytes
    length: np.ndarray  # int64 [m], bytes
    notes: bytes = b""  # what else is kept of each, behind a zero byte too; nothing of `scan`

    @property
    def names(self) -> list[bytes]:
        return self.joined.split(b"\0")[1:]


def scan(archive: Archive) -> Listing:
    """The listing of the files of an archive, read from it."""
    return collected(archive, members(archive))


def scan_nested(archive: Archive) -> Listing:
    """As `scan`, in place of each NAME.tar in it that one's files, as NAME/FILE."""
    return collected(archive, nested_members(archive))


def nested_members(archive: Archive) -> Iterator[tuple[bytes, int, int]]:
    for name, begin, length in members(archive):
        # what begins with a dot is of a system, and no tar
        if not name.endswith(b".tar") or os.path.basename(name).startswith(b"."):
            yield name, begin, length
            continue
        folder, called = name.removesuffix(b".tar"), os.path.join(archive.path, os.fsdecode(name))
        empty = True
        for file, start, size in members(archive, begin, begin + length, called):
            empty = False
            yield folder + b"/" + file, start, size
        if empty:
            raise DataError(f"{called}: it holds no files: fetch {archive.path} again")


def collected(archive: Archive, found: Iterable[tuple[bytes, int, int]]) -> Listing:
    joined, starts, lengths = bytearray(), array("q"), array("q")
    for name, begin, length in found:
        joined += b"\0" + name
        starts.append(begin)
        lengths.append(length)
    return Listing(archive, bytes(joined), np.array(starts, np.int64), np.array(lengths, np.int64))


def listed(
    paths: Sequence[str],
    say: Callable[[str], None] | None = None,
    kind: str = "members",
    make: Callable[[Archive], Listing] = scan,
) -> list[Listing]:
    """What the archives hold, from the cache or read. Raises DataError for one that is none, is
    cut short or is packed; OSError for one that cannot be read.

    `make` lists an archive; what it makes is kept under `kind`, apart from what others make.
    """
    if not paths:
        return []
    archives = [Archive.at(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    keys = [os.path.relpath(path, root) for path in paths]
    kept = load(kind, root)
    new = [
        i
        for i, (key, archive) in enumerate(zip(keys, archives, strict=True))
        if key not in kept or kept[key].archive.stat != archive.stat
    ]
    if say and sum(archives[i].stat[0] for i in new) > 1 << 30:
        say(f"listing what is in {archives[new[0]].path}{others(new)}, once")
    for part, listings in in_threads(
        lambda i: make(archives[i]), new, "listing archives", say, THREADS, 1
    ):
        kept.update((keys[i], listing) for i, listing in zip(new[part], listings, strict=True))
    if new:  # those of archives that are gone leave the cache
        there = {key for key in kept if os.path.exists(os.path.join(root, key))}
        save(kind, root, {key: kept[key] for key in sorted(there.union(keys))})
    return [kept[key]._replace(archive=a) for key, a in zip(keys, archives, strict=True)]


def members(
    archive: Archive, start: int = 0, end: int | None = None, called: str = ""
) -> Iterator[tuple[bytes, int, int]]:
    """(name, where its bytes start, how many they are) of each file in the tar that stands in these
    bytes of the archive, whole or a member of it, which messages then name as `called`.

    What has no usual header is left to Python's tarfile, which knows every form that one may have.
    """
    path, end = called or archive.path, archive.stat[0] if end is None else end
    with RangeReader(archive.descriptor(), 0, end) as reader:
        refuse_packed(reader, start, path)
        linked: dict[bytes, tuple[int, int]] | None = None  # the files so far, once links ask
        at = start
        while header := os.pread(reader.descriptor, min(BLOCK, end - at), at):
            if usual := usual_file(header):
                name, length = usual
                begin = at + BLOCK
                following = begin + -(-length // BLOCK) * BLOCK
            elif not header.strip(b"\0"):
                check_end(reader, at, path)
                return
            else:
                info, taken = unusual(reader, at, path)
                name, length = info.name.encode("utf-8", "surrogateescape"), info.size
                begin, following = at + info.offset_data, at + taken
                if info.islnk():
                    if linked is None:
                        linked = {n: (b, size) for n, b, size in members(archive, start, at)}
                    to = info.linkname.encode("utf-8", "surrogateescape")
                    if to not in linked:
                        raise DataError(
                            f"{path}: {info.name!r} is a link to {info.linkname!r}, which it does "
                            "not hold: pack it anew"
                        )
                    begin, length = linked[to]
                elif info.issym() or info.sparse is not None:
                    how = "a link" if info.issym() else "stored in pieces"
                    raise DataError(f"{path}: {info.name!r} is {how}: pack the file itself")
                elif not info.isfile():
                    name = b""
            if following > end:
                inside = os.fsdecode(name) or "what is no file"
                raise DataError(f"{path} is cut short: it ends inside {inside!r}: fetch it again")
            if name:
                if linked is not None:
                    linked[name] = begin, length
                yield name, begin, length
            at = following
        if at == start:
            raise DataError(f"{path}: not a tar archive, it is empty: fetch it again")


def refuse_packed(reader: RangeReader, start: int, path: str) -> None:
    first = os.pread(reader.descriptor, len(POINTER), start)
    if first == POINTER:
        raise DataError(f"{path} only says where Git LFS has the file: fetch it with git lfs pull")
    for magic, packer in PACKED:
        if first.startswith(magic):
            raise DataError(
                f"{path} is packed with {packer}: unpack it to a .tar, read by position"
            )


def check_end(reader: RangeReader, at: int, path: str) -> None:
    """Raises DataError where more than the end of an archive stands from byte `at` on."""
    rest = reader.length - at
    if rest > LONGEST_END or os.pread(reader.descriptor, rest, at).strip(b"\0"):
        raise DataError(
            f"{path}: it goes on behind its end, at byte {at:,}: two archives in one, or one that "
            "was not fetched whole: pack or fetch it anew"
        )


def unusual(reader: RangeReader, at: int, path: str) -> tuple[tarfile.TarInfo, int]:
    """What stands at byte `at`, of whatever form, and the bytes that it takes."""
    most = min(reader.length - at, LONGEST_HEADER)
    rest = RangeReader(os.dup(reader.descriptor), at, most)
    try:
        with (
            io.BufferedReader(rest) as file,
            tarfile.TarFile(fileobj=file, encoding="utf-8") as tar,
        ):
            info = tar.next()
            if info is None:
                raise tarfile.ReadError("no header")
            if info.size < 0:
                raise tarfile.ReadError(f"{info.name!r} has {info.size} bytes")
            if "\0" in info.name or not info.name:
                raise tarfile.ReadError(f"a file has the name {info.name!r}")
            return info, tar.offset
    except (tarfile.TarError, ValueError, EOFError, RecursionError) as error:
        raise DataError(
            f"{path}: not a tar archive that can be read ({error}, at byte {at:,}): fetch it again"
        ) from None


def usual_file(header: bytes) -> tuple[bytes, int] | None:
    """The name and the length of the file that a header begins; None if it is no file, or not of
    the usual form."""
    if len(header) < BLOCK or header[156] not in FILE_TYPES or header[257:262] != b"ustar":
        return None
    name = header[:100].rstrip(b"\0")
    # GNU's form has times where ustar's has the folder
    if header[345] and header[263:265] == b"00":
        name = header[345:500].rstrip(b"\0") + b"/" + name
    if b"\0" in name or not name or name[-1:] == b"/":
        return None
    digits, check = header[124:135], header[148:154]
    # int alone would take signs too
    if not (digits.isdigit() and check.isdigit() and header[135] in b"\0 "):
        return None
    # the sum of all bytes, those of the sum itself as spaces: Adler-32 has it, and is fast
    rest = zlib.adler32(header[156:], zlib.adler32(b" " * 8, zlib.adler32(header[:148])))
    try:
        right = (int(check, 8) + 1) % 65521 == rest & 0xFFFF
        return (name, int(digits, 8)) if right else None
    except ValueError:  # an 8 or a 9
        return None


# The cache


def cache_file(kind: str, root: str) -> Path:
    """Raises RuntimeError where there is no home directory."""
    return cache_folder() / f"{kind}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.npz"


def load(kind: str, root: str) -> dict[str, Listing]:
    """The listings as saved, by their paths below the root; none where they cannot be used."""
    with suppress(Exception):  # damage may raise anything
        path = cache_file(kind, root)
        content = io.BytesIO(read_file(path, math.inf) if only_mine(path) else b"")
        with np.load(content, allow_pickle=False) as file:
            version, paths, stats, counts, names, start, length, notes = (
                file[key] for key in FIELDS
            )
        keys = [os.fsdecode(key) for key in paths.tobytes().split(b"\0")[1:]]
        every, ends = counts.sum(), counts.cumsum()
        right = np.array_equal(version, VERSION) and stats.shape == (len(keys), 3)
        right &= counts.shape == (len(keys),) and start.shape == length.shape == (every,)
        right &= {v.dtype for v in (stats, counts, start, length)} == {np.dtype(np.int64)}
        right &= bool((counts >= 0).all() and (start >= 0).all() and (length >= 0).all())
        if right and (start <= np.repeat(stats[:, 0], counts) - length).all():
            columns = (
                [
                    Archive(os.path.join(root, key), stat)
                    for key, stat in zip(keys, map(tuple, stats.tolist()), strict=True)
                ],
                parts(names, ends),
                np.split(start, ends[:-1]),
                np.split(length, ends[:-1]),
                parts(notes, ends if len(notes) else ends * 0),
            )
            listings = (Listing(*row) for row in zip(*columns, strict=True))
            return dict(zip(keys, listings, strict=True))
    return {}


def parts(joined: np.ndarray, ends: np.ndarray) -> list[bytes]:
    """The names, uint8, each behind a zero byte, cut behind so many of them. Raises ValueError
    where they are not as many as that."""
    begins = np.append(np.flatnonzero(joined == 0), len(joined))
    if joined.dtype != np.uint8 or begins[0] or len(begins) != (ends[-1] if len(ends) else 0) + 1:
        raise ValueError("names that do not fit")
    data, cuts = joined.tobytes(), begins[np.append(0, ends)].tolist()
    return [data[begin:end] for begin, end in pairwise(cuts)]


def save(kind: str, root: str, listings: dict[str, Listing]) -> None:
    # no home, no room or no permission: then the archives are listed every time
    with suppress(OSError, RuntimeError):
        target = cache_file(kind, root)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        every = listings.values()
        paths = b"".join(b"\0" + os.fsencode(key) for key in listings)
        arrays = [
            np.array(VERSION),
            np.frombuffer(paths, np.uint8),
            np.array([listing.archive.stat for listing in every], np.int64),
            np.array([len(listing.start) for listing in every], np.int64),
            np.frombuffer(b"".join(listing.joined for listing in every), np.uint8),
            np.concatenate([listing.start for listing in every]),
            np.concatenate([listing.length for listing in every]),
            np.frombuffer(b"".join(listing.notes for listing in every), np.uint8),
        ]
        content = io.BytesIO()
        named: dict[str, Any] = dict(zip(FIELDS, arrays, strict=True))
        np.savez(content, **named)
        replace(target, content.getbuffer(), mode=0o600)
