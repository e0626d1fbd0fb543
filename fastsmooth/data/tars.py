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
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsmooth.data.files import Archive, RangeReader
from fastsmooth.data.images import DataError
from fastsmooth.runfolder.files import cache_folder, only_mine, read_file, replace

VERSION = 1  # of what is kept: another one whenever its fields change
BLOCK = 512  # bytes, of which everything in an archive takes a whole number
FILE_TYPES = b"0\0"  # of a member that is a file, as most are
NOTHING = np.zeros(0, np.int64)
PACKED = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)


class Listing(NamedTuple):
    """The m files of an archive in its own order."""

    archive: Archive
    names: list[bytes]  # m
    start: np.ndarray  # int64 [m], bytes
    length: np.ndarray  # int64 [m], bytes


def listed(
    paths: Sequence[str], say: Callable[[str], None] | None = None, nested: bool = False
) -> list[Listing]:
    """What the archives hold, from the cache or read; `nested`: in place of a tar in one of them
    its files. Raises DataError for one that is none, is cut short or is packed; OSError for one
    that cannot be read."""
    listings = []
    for path in paths:
        archive = Archive.at(path)
        kept = load(archive, nested)
        if kept is None:
            if say and archive.stat[0] > 1 << 30:
                say(f"listing {path}, once")
            kept = scan(archive)
            kept = unfolded(kept) if nested else kept
            save(kept, nested)
        listings.append(kept)
    return listings


def unfolded(outer: Listing) -> Listing:
    """The listing with the files of each NAME.tar in its place, as NAME/FILE."""
    names: list[bytes] = []
    starts, lengths = [NOTHING], [NOTHING]
    for i, name in enumerate(outer.names):
        start, length = outer.start[i : i + 1], outer.length[i : i + 1]
        # what begins with a dot is of a system, and no tar
        if name.endswith(b".tar") and not os.path.basename(name).startswith(b"."):
            begin, end = int(start[0]), int(start[0] + length[0])
            called = os.path.join(outer.archive.path, os.fsdecode(name))
            _, inside, start, length = scan(outer.archive, begin, end, called)
            folder = name.removesuffix(b".tar")
            names += [folder + b"/" + file for file in inside]
        else:
            names.append(name)
        starts.append(start)
        lengths.append(length)
    return Listing(outer.archive, names, np.concatenate(starts), np.concatenate(lengths))


def scan(archive: Archive, start: int = 0, end: int | None = None, called: str = "") -> Listing:
    """The listing of the tar that stands in these bytes of the archive, whole or a member of it,
    which messages then name as `called`.

    What has no usual header is left to Python's tarfile, which knows every form that one may have.
    """
    path = called or archive.path
    names: list[bytes] = []
    starts: list[int] = []
    lengths: list[int] = []
    links: dict[bytes, int] = {}  # where the members of these names are, once links ask
    with RangeReader(archive.descriptor(), 0, archive.stat[0] if end is None else end) as reader:
        refuse_packed(reader, start, path)
        at = start
        while True:
            header = os.pread(reader.descriptor, min(BLOCK, max(reader.length - at, 0)), at)
            if usual := usual_file(header):
                name, length = usual
                begin = at + BLOCK
                at = begin + -(-length // BLOCK) * BLOCK
            elif at > start and not header.strip(b"\0"):
                break
            else:
                try:
                    info, taken = unusual(reader, at)
                except (tarfile.TarError, ValueError, EOFError) as error:
                    raise DataError(
                        f"{path}: not a tar archive that can be read ({error}, at byte {at:,}): "
                        "fetch it again"
                    ) from None
                name = info.name.encode("utf-8", "surrogateescape")
                begin, length = at + info.offset_data, info.size
                if length < 0:
                    raise DataError(f"{path}: {info.name!r} has {length} bytes: pack it anew")
                at += taken
                if info.islnk():
                    if not links:
                        links = dict(zip(names, count()))
                    to = links.get(info.linkname.encode("utf-8", "surrogateescape"))
                    if to is None:
                        raise DataError(
                            f"{path}: {info.name!r} is a link to {info.linkname!r}, which it does "
                            "not hold: pack it anew"
                        )
                    begin, length = starts[to], lengths[to]
                elif info.issym() or info.sparse is not None:
                    how = "a link" if info.issym() else "stored in pieces"
                    raise DataError(f"{path}: {info.name!r} is {how}: pack the file itself")
                elif not info.isfile():
                    continue
            if begin + length > reader.length:
                raise DataError(
                    f"{path} is cut short: it ends inside {os.fsdecode(name)!r}: fetch it again"
                )
            if links:
                links[name] = len(names)
            names.append(name)
            starts.append(begin)
            lengths.append(length)
    return Listing(archive, names, np.array(starts, np.int64), np.array(lengths, np.int64))


def refuse_packed(reader: RangeReader, start: int, path: str) -> None:
    first = os.pread(reader.descriptor, 8, start)
    for magic, packer in PACKED:
        if first.startswith(magic):
            raise DataError(
                f"{path} is packed with {packer}: unpack it to a .tar, read by position"
            )


def unusual(reader: RangeReader, at: int) -> tuple[tarfile.TarInfo, int]:
    """What stands at byte `at`, of whatever form, and the bytes that it takes."""
    rest = RangeReader(os.dup(reader.descriptor), at, reader.length - at)
    with io.BufferedReader(rest) as file, tarfile.TarFile(fileobj=file) as tar:
        info = tar.next()
        if info is None:
            raise tarfile.ReadError("no header")
        return info, tar.offset


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
    if not (digits.isdigit() and check.isdigit()) or b"8" in digits or b"9" in digits:
        return None
    rest = sum(header) - sum(header[148:156]) + 8 * 32
    return (name, int(digits, 8)) if b"%06o" % rest == check else None


# The cache


def cache_file(path: str, nested: bool = False) -> Path:
    """Raises RuntimeError where there is no home directory."""
    digest = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()
    return cache_folder() / f"{'nested' if nested else 'members'}-{digest[:16]}.npz"


def load(archive: Archive, nested: bool = False) -> Listing | None:
    """The listing as saved; None where there is none that can be used."""
    with suppress(Exception):  # damage may raise anything
        path = cache_file(archive.path, nested)
        content = io.BytesIO(read_file(path, math.inf) if only_mine(path) else b"")
        with np.load(content, allow_pickle=False) as file:
            version, stat, joined, start, length = (
                file[key] for key in ("version", "stat", "names", "start", "length")
            )
        names = joined.tobytes().split(b"\0")[1:]
        right = (start.dtype, length.dtype, joined.dtype) == (np.int64, np.int64, np.uint8)
        right &= start.shape == length.shape == (len(names),)
        ends = start + length
        right &= bool((length >= 0).all() and (start >= 0).all() and (ends <= stat[0]).all())
        if right and np.array_equal(version, VERSION) and tuple(stat.tolist()) == archive.stat:
            return Listing(archive, names, start, length)
    return None


def save(listing: Listing, nested: bool = False) -> None:
    # no home, no room or no permission: then the archive is listed every time
    with suppress(OSError, RuntimeError):
        target = cache_file(listing.archive.path, nested)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        joined = b"".join(b"\0" + name for name in listing.names)
        content = io.BytesIO()
        np.savez(
            content,
            version=VERSION,
            stat=np.array(listing.archive.stat, np.int64),
            names=np.frombuffer(joined, np.uint8),
            start=listing.start,
            length=listing.length,
        )
        replace(target, content.getbuffer(), mode=0o600)
