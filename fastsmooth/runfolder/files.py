"""Files read and files replaced.

What is read, somebody else may have written: never a pipe that keeps its reader waiting, never more
than fits in memory. What is replaced is whole or as it was before, whatever happens meanwhile.

The rule for that, and the one place where it is kept: data goes into a new file beside the old one
(new_aside), is on the disk (fsync) before the file gets its name, and so is the folder's new entry
before anybody is told (rename). `replace` does all of it. Who writes a file in pieces does the
first two steps, and ends with `rename` inside `writing`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastsmooth.messages import CannotWrite, one_line

LARGEST = 1 << 30  # bytes of a file that is read
LONGEST = 1 << 24  # bytes of a line that is read


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, its NaNs and infinities as None; None where there is none that can
    be read."""
    try:
        value = json.loads(read_file(path).decode())
        return finite(value)[0] if isinstance(value, dict) else None
    except (OSError, ValueError, RecursionError):
        return None


def read_file(path: Path, most: float = LARGEST) -> bytes:
    """The bytes of a file. Raises OSError for what is none, as a pipe may keep its reader waiting
    for ever, and for over `most`."""
    if size_of(path) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most / 1024:,.0f} kB", str(path))
    return path.read_bytes()


def size_of(path: Path | str) -> int:
    """The bytes of a file. Raises OSError where the path leads to a pipe, a socket or a device."""
    status = os.stat(path)
    # opening a folder says so itself
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a file", str(path))
    return status.st_size


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file; of one that is longer than LONGEST the beginning alone."""
    size_of(path)
    with path.open("rb") as file:
        while line := file.readline(LONGEST):
            yield line
            while line and len(line) == LONGEST and not line.endswith(b"\n"):
                line = file.readline(LONGEST)


def finite(value: Any) -> tuple[Any, bool]:
    """The value with None for what is not finite, and whether nothing was replaced."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, False
    if isinstance(value, dict):
        pairs = {key: finite(v) for key, v in value.items()}
        return {key: v for key, (v, _) in pairs.items()}, all(whole for _, whole in pairs.values())
    if isinstance(value, list | tuple):
        items = [finite(v) for v in value]
        return [v for v, _ in items], all(whole for _, whole in items)
    return value, True


def cache_folder() -> Path:
    """Where what can be made again is kept. Raises RuntimeError without a home directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsmooth"


def only_mine(path: Path) -> bool:
    """Whether no other user but root may write the file. Raises OSError."""
    status = os.stat(path)
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """What the system refuses inside is CannotWrite, with the path's name."""
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(error.errno, error.strerror or one_line(error), str(path)) from error


def replace(path: Path, data: bytes | memoryview, mode: int = 0o666) -> None:
    """Put the data in the place of the file, on the disk when this returns.

    Others may do the same at the same time: the last one's is there. `mode` is that of the file,
    less the umask. Raises CannotWrite where that fails; then what was there stays.
    """
    with writing(path):
        with suppress(FileNotFoundError):
            size_of(path)  # refuses what is no file: /dev/stdout would be gone
        aside = write_aside(path, data, mode)
        try:
            rename(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


def rename(aside: Path, path: Path) -> None:
    """Put a file whose data is on the disk already in the place of another in the same folder."""
    os.replace(aside, path)
    sync(path.parent)


def write_aside(path: Path, data: bytes | memoryview, mode: int = 0o666) -> Path:
    """The data on the disk, in a new file beside `path`, to be renamed; none if that fails."""
    aside = new_aside(path)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    return aside


def new_aside(path: Path) -> Path:
    """A name beside `path`, that no other writer has, for a file that is to be renamed."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def aside_of(name: str) -> str | None:
    """The file that a file of this name was to become; None if new_aside did not name it."""
    aside = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.tmp", name)
    return aside and aside[1]


def clean(directory: Path) -> None:
    """Remove what writers that were killed left in a directory that nobody else writes now."""
    for entry in os.scandir(directory):
        if aside_of(entry.name) and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)


def sync(path: Path) -> None:
    """Put what was written to a file, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
