"""How many processors are this process's to use: those that it may run on, and no more than its
container's quota pays for."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by which a user says how many threads compute


def processors() -> int:
    """How many processors this process may use, at least one; 2.5 count as two.

    A quota of half a processor is one that stands still half of the time.
    """
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(mine, quota())))


def keep_within_quota(torch: ModuleType) -> None:
    """Have PyTorch use no more threads than there are processors: it knows no quotas."""
    if not any(os.environ.get(name) for name in THREADS) and torch.get_num_threads() > processors():
        torch.set_num_threads(processors())


def quota(proc: Path = Path("/proc/self")) -> float:
    """The processors that Linux's control groups, version 1 and 2, give this process; infinite
    where they set no limit."""
    # another system, or a file in no form that is known
    with suppress(OSError, ValueError, IndexError):
        return min(limits(proc), default=math.inf)
    return math.inf


def limits(proc: Path) -> Iterator[float]:
    """The limits of every group that the process is in, and of the groups around it."""
    groups: dict[str, str] = {}  # by controller
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path)  # of version 2 it is ""
    for line in (proc / "mountinfo").read_text().splitlines():
        # number, parent, device, root of the mount within its file system, where it is mounted ...
        # - type, source, options
        mount, _, about = line.partition(" - ")
        root, place = (unescaped(word) for word in mount.split()[3:5])
        kind, _, options = about.split(" ", 2)
        controller = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        if controller not in groups or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        below = groups[controller]
        if root != "/":  # a container that sees a part of the tree, and its path in the whole
            below = below.removeprefix(root) if below.startswith(root) else ""
        inner = Path(place, "." if ".." in below else below.lstrip("/"))
        for group in (inner, *inner.parents):
            if group.is_relative_to(place):
                yield limit(group)


def limit(group: Path) -> float:
    """The processors' time that one group may take, in processors."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError, ZeroDivisionError):
            time, period = " ".join((group / name).read_text() for name in names).split()
            if time not in ("max", "-1"):
                return int(time) / int(period)
    return math.inf


def unescaped(path: str) -> str:
    """A path of mountinfo, which writes spaces as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), path)
