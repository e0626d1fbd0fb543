"""The run folder: config, environment, metrics, status, summary; and the tracker adapter at its
edge.

metrics.jsonl is the truth: one JSON object a row, "kind" is "step", "epoch" or "measure". The other
files are replaced whole, so that a reader never sees half of one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastsmooth.messages import CannotWrite, warn
from fastsmooth.runfolder.files import aside_of, clean, finite, replace, size_of, writing
from fastsmooth.runfolder.machine import now

# What differs between two runs of the same bits: every other entry of a row is a function of the
# command.
TIMES = {"seconds", "train_seconds", "eval_seconds", "images_per_second"}
LATER = "sharpness"  # the field of rows that are added to a run once it has stopped
# What may lie in a folder before config.json does, and the bytes it may hold; files that are being
# written go by ".name".
UNFINISHED = {
    ".lock": 0,
    "metrics.jsonl": 0,
    "env.json": 1 << 16,
    ".env.json": 1 << 16,
    ".config.json": 1 << 16,
}


class RunFolderError(ValueError):
    """A folder that cannot be written or gone on with; the message says why and what to do."""


class RunFolder:
    """One run's files, under a lock: no two processes ever write the same run."""

    def __init__(self, path: Path):
        self.path = path
        with refusing(path):
            self._lock = lock(path)
            clean(path)
            if (path / "metrics.jsonl").exists():
                size_of(path / "metrics.jsonl")  # a pipe would wait for its reader
            self._open()

    @classmethod
    def create(cls, path: Path, config: dict[str, Any], environment: dict[str, Any]) -> RunFolder:
        """A new or empty folder, with its config.json and env.json. Raises RunFolderError where
        something is in it."""
        check_unused(path)
        with refusing(path):
            path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        folder.write("env.json", environment)
        folder.write("config.json", config)  # last: with it the folder is a run
        return folder

    def _open(self) -> None:
        self._metrics = (self.path / "metrics.jsonl").open("a+", encoding="utf-8")
        self._synced = os.fstat(self._metrics.fileno()).st_size

    def row(self, kind: str, values: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        with writing(self.path / "metrics.jsonl"):
            self._metrics.write(
                json.dumps({"kind": kind} | finite(values)[0], allow_nan=False) + "\n"
            )
            self._metrics.flush()

    def sync(self) -> int:
        """Put all rows on the disk; the size of metrics.jsonl in bytes, for rewind.

        One that was removed or replaced under the run is written again; one that was cut is
        CannotWrite.
        """
        path = self.path / "metrics.jsonl"
        with writing(path):
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
            ours = os.fstat(self._metrics.fileno())
            if ours.st_size < self._synced:
                raise CannotWrite(
                    errno.EIO, "rows were cut from it while the run wrote it", str(path)
                )
            if not (path.exists() and os.path.samestat(ours, path.stat())):
                replace(path, os.pread(self._metrics.fileno(), ours.st_size, 0))
                self._metrics.close()
                self._open()
                warn(
                    f"{path} was removed or replaced under the run: all of its rows are written "
                    "again"
                )
        self._synced = ours.st_size
        return ours.st_size

    def rewind(self, size: int) -> None:
        """Drop the rows written after `size`: those of updates that no checkpoint holds and that
        will be done again.

        What was measured of a checkpoint meanwhile is not done again, and stays.
        """
        path = self.path / "metrics.jsonl"
        if os.fstat(self._metrics.fileno()).st_size < size:
            raise RunFolderError(f"{path} is shorter than at the checkpoint: it was changed")
        with path.open("rb") as file:
            file.seek(size)
            kept = [line for line in file if measured_later(line)]
            if kept:
                file.seek(0)
                replace(path, file.read(size) + b"".join(kept))
                self._metrics.close()
                self._open()
            else:
                os.ftruncate(self._metrics.fileno(), size)
                self._synced = size

    def write(self, name: str, values: dict[str, Any]) -> None:
        """Replace a JSON file of the folder."""
        replace(
            self.path / name,
            json.dumps(finite(values)[0], indent=1, allow_nan=False).encode() + b"\n",
        )

    def status(self, state: str, reason: str, step: int) -> None:
        """running, done, preempted, diverged or failed; no rows are written after the last four."""
        if state != "running":
            self._metrics.close()  # a run may end since it had no room for one more open file
        self.write("status.json", {"state": state, "reason": reason, "step": step, "time": now()})

    def close(self) -> None:
        self._metrics.close()
        os.close(self._lock)


def measured_later(line: bytes) -> bool:
    """Whether a line of metrics.jsonl is a whole row of fastsmooth.sharpness."""
    if LATER.encode() not in line or not line.endswith(b"\n"):
        return False
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and LATER in row


class Unwritten:
    """The run folder of a process that leaves writing it to the first one."""

    def __init__(self, path: Path):
        self.path = path

    def row(self, kind: str, values: dict[str, Any]) -> None:
        pass

    def sync(self) -> int:
        return 0

    def rewind(self, size: int) -> None:
        pass

    def write(self, name: str, values: dict[str, Any]) -> None:
        pass

    def status(self, state: str, reason: str, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def check_unused(path: Path) -> None:
    """Refuse a folder that holds something already, but for what a run leaves that was killed while
    it made the folder."""
    with refusing(path):
        if path.is_dir():
            used = any(not unfinished(entry) for entry in path.iterdir())
        else:
            used = path.exists()
        if used:
            raise RunFolderError(
                f"--out {path} exists: go on with that run by --resume, or choose another folder"
            )


def claim(path: Path) -> Path:
    """A new folder of this name or, where there is one already, of path-2, path-3 and so on: nobody
    else can claim it."""
    with refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder, number = path, 1
        while True:
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                number += 1
                folder = path.with_name(f"{path.name}-{number}")


def unfinished(entry: Path) -> bool:
    """Whether a run that was killed may have left this while it made its folder."""
    aside = aside_of(entry.name)
    name = f".{aside}" if aside else entry.name
    return name in UNFINISHED and entry.stat().st_size <= UNFINISHED[name]


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """A folder that cannot be opened is a bad --out; a full or broken disk stays an OSError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        raise RunFolderError(
            f"--out {path}: {error.filename}: {error.strerror}: choose another folder"
        ) from None


def lock(path: Path) -> int:
    """The descriptor that holds the lock on a run folder. Raises RunFolderError where another
    process has it."""
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # A POSIX lock: unlike flock's, DataLoader workers that outlive a killed run by seconds do
        # not inherit it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(descriptor)
            raise RunFolderError(
                f"{path}: another process is writing this run: wait for it or stop it"
            ) from None
        # a network file system without locks: then nothing guards the folder
    return descriptor
