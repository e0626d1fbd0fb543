"""Files read and files replaced.

What is read, somebody else may have written: never a pipe that keeps its reader waiting, never more than fits in memory.
What is replaced is whole or as it was before, whatever happens meanwhile.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastsmooth.messages import CannotWrite, one_line

LARGEST = 1 << 30  # bytes of a file that is read
LONGEST = 1 << 24  # bytes of a line that is read


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, its NaNs and infinities as None; None where there is none that can be read."""
    try:
        value = json.loads(read_file(path).decode())
        return finite(value)[0] if isinstance(value, dict) else None
    except (OSError, ValueError, RecursionError):
        return None


def read_file(path: Path, most: float = LARGEST) -> bytes:
    """The bytes of a file. Raises OSError for what is none, as a pipe may keep its reader waiting for ever, and for over `most`."""
    if size_of(path) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most / 1024:,.0f} kB", str(path))
    return path.read_bytes()


def size_of(path: Path | str) -> int:
    """The bytes of a file. Raises OSError where the path leads to a pipe, a socket or a device."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):  # opening a folder says so itself
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a file", str(path))
    return found.st_size


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
    """Where what can be made again is kept. Raises RuntimeError where there is no home directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsmooth"


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """What the system refuses inside is CannotWrite, with the path's name."""
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(error.errno, error.strerror or one_line(error), str(path)) from error


def replace(path: Path, data: bytes | memoryview) -> None:
    """Put the data in the place of the file, on the disk when this returns.

    Raises CannotWrite where that fails; then what was there stays.
    """
    with writing(path):
        os.replace(write_aside(path, data), path)
        sync(path.parent)


def write_aside(path: Path, data: bytes | memoryview) -> Path:
    """The data on the disk, in a file beside `path` that is to be renamed; none where that fails."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    return aside


def sync(directory: Path) -> None:
    """Put the names in a directory on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
