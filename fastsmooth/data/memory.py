"""How much memory is free, and what is refused because it would not fit."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

import torch

from fastsmooth.data.images import DataError

MEMORY_SHARE = 0.4  # of the free memory, at most, for the images of a resident set
ARRAYS_SHARE = 0.75  # likewise for images that are pixels: they are held once, and nothing beside
MEMINFO = Path("/proc/meminfo")


def free_memory(device: torch.device) -> float:
    """Bytes free on the device, of a computer with those of files that its system only keeps;
    unlimited where the system does not say (macOS, Windows)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, ValueError):
        lines = (line.split() for line in MEMINFO.read_text().splitlines())
        available = [int(line[1]) << 10 for line in lines if line[:1] == ["MemAvailable:"]]
        if available:
            return available[0]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError):
        return math.inf


def check_room(needed: int, what: str, remedy: str) -> None:
    """Raises DataError where `needed` bytes are more than pixels may take: `what` needs them."""
    free = free_memory(torch.device("cpu"))
    if needed > ARRAYS_SHARE * free:
        raise DataError(
            f"{what} would take {needed / 1e9:,.1f} GB of memory, of which {free / 1e9:,.1f} GB "
            f"are free: {remedy}"
        )
