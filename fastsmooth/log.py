"""The run folder: config, environment, metrics, status, summary; and the tracker adapter at its edge.

metrics.jsonl is the truth: one JSON object a row, "kind" is "step", "epoch" or "measure". The other files are replaced
whole, so that a reader never sees half of one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastsmooth.files import finite, read_object, replace, size_of
from fastsmooth.messages import one_line

# What differs between two runs of the same bits: every other entry of a row is a function of the command.
TIMES = {"seconds", "train_seconds", "eval_seconds", "images_per_second"}
# What may lie in a folder before config.json does, and the bytes it may hold.
UNFINISHED = {
    ".lock": 0,
    "metrics.jsonl": 0,
    "env.json": 1 << 16,
    ".env.json.tmp": 1 << 16,
    ".config.json.tmp": 1 << 16,
}


class RunFolderError(ValueError):
    """A folder that cannot be written or gone on with; the message says why and what to do."""


class RunFolder:
    """One run's files. Holds a lock on the folder, so that two processes never write the same run."""

    def __init__(self, path: Path):
        self.path = path
        with refusing(path):
            self._lock = lock(path)
            if (path / "metrics.jsonl").exists():
                size_of(path / "metrics.jsonl")  # a pipe would wait for its reader
            self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")

    @classmethod
    def create(cls, path: Path, config: dict[str, Any], environment: dict[str, Any]) -> RunFolder:
        """A new or empty folder, with its config.json and env.json. Raises RunFolderError where something is in it."""
        check_unused(path)
        with refusing(path):
            path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        folder.write("env.json", environment)
        folder.write("config.json", config)  # last: with it the folder is a run
        return folder

    def row(self, kind: str, values: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        self._metrics.write(json.dumps({"kind": kind} | finite(values)[0], allow_nan=False) + "\n")
        self._metrics.flush()

    def sync(self) -> int:
        """Put all rows on the disk; the size of metrics.jsonl in bytes, for rewind."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        return os.fstat(self._metrics.fileno()).st_size

    def rewind(self, size: int) -> None:
        """Drop the rows written after `size`: those of updates that no checkpoint holds and that will be done again."""
        if os.fstat(self._metrics.fileno()).st_size < size:
            raise RunFolderError(f"{self.path / 'metrics.jsonl'} is shorter than at the checkpoint: it was changed")
        os.ftruncate(self._metrics.fileno(), size)

    def write(self, name: str, values: dict[str, Any]) -> None:
        """Replace a JSON file of the folder."""
        replace(self.path / name, json.dumps(finite(values)[0], indent=1, allow_nan=False).encode() + b"\n")

    def status(self, state: str, reason: str, step: int) -> None:
        """running, done, preempted, diverged or failed."""
        self.write("status.json", {"state": state, "reason": reason, "step": step, "time": now()})

    def close(self) -> None:
        self._metrics.close()
        os.close(self._lock)


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
    """Refuse a folder that holds something already, but for what a run leaves that was killed while it made the folder."""
    with refusing(path):
        if path.is_dir():
            used = any(
                entry.name not in UNFINISHED or entry.stat().st_size > UNFINISHED[entry.name]
                for entry in path.iterdir()
            )
        else:
            used = path.exists()
        if used:
            raise RunFolderError(f"--out {path} exists: go on with that run by --resume, or choose another folder")


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """A folder that cannot be opened is a bad --out; a disk that is full or broken stays an OSError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        raise RunFolderError(f"--out {path}: {error.filename}: {error.strerror}: choose another folder") from None


def lock(path: Path) -> int:
    """The descriptor that holds the lock on a run folder. Raises RunFolderError where another process has it."""
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # A POSIX lock: unlike flock's, DataLoader workers that outlive a killed run by seconds do not inherit it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(descriptor)
            raise RunFolderError(f"{path}: another process is writing this run: wait for it or stop it") from None
        # a network file system without locks: then nothing guards the folder
    return descriptor


def read_status(path: Path) -> dict[str, Any]:
    """status.json of a run folder; empty where there is none that can be read."""
    return read_object(path / "status.json") or {}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    with (path / "metrics.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def environment() -> dict[str, Any]:
    """Versions, machine, commit and command line, for env.json."""
    import numpy
    import torch
    import torchvision

    cuda = torch.cuda.is_available()
    return {
        "command": [sys.executable, *sys.argv],
        "time": now(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "platform": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def commit() -> str | None:
    """The commit of the checkout that runs, with "+" where it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        describe = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+"]
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# --------------------------------------------------------------------------------------------------------------------


class Tracker:
    """Rows go to Weights & Biases too, where asked. Whatever it raises becomes one warning: it never stops a run."""

    def __init__(self, config: dict[str, Any], folder: Path, warn: Callable[[str], None]):
        self._warn, self._run = warn, None
        mode = config["wandb_mode"]
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        if mode in ("off", "disabled"):
            return
        if mode == "offline":
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        try:
            import wandb

            self._run = wandb.init(
                project=config["wandb_project"],
                entity=config["wandb_entity"],
                mode=mode,
                config=config,
                dir=str(folder),
                name=folder.name,
                id=f"{folder.name}-{config['seed']}",
                resume="allow" if mode == "online" else None,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except ImportError:
            warn("--wandb-mode: wandb is not installed, so nothing is sent: pip install 'fastsmooth[wandb]'")
        except Exception as error:  # the tracker must never stop a run
            warn(f"wandb: {one_line(error)}: going on without it")

    def row(self, kind: str, values: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            numbers = {f"{kind}/{key}": v for key, v in values.items() if isinstance(v, int | float)}
            self._run.log(numbers | {"update": values.get("step")})
        except Exception as error:  # as above
            self._warn(f"wandb: {one_line(error)}: going on without it")
            self._run = None

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        if self._run is None:
            return
        try:
            self._run.summary.update(summary)
            self._run.finish(exit_code=exit_code)
        except Exception as error:  # as above
            self._warn(f"wandb: {one_line(error)}")
